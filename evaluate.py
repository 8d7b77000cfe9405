"""Evaluates a trained run, task by task, with intervals and chance levels.

    python evaluate.py                                      zero-shot and retrieval of the newest run
    python evaluate.py --task retrieval --gallery out.png   and a picture of what was retrieved
    python evaluate.py --task linear-probe prompt-sensitivity prompt-words
    python evaluate.py --compare runs/umcl runs/umcl-label-mask-none
    python evaluate.py --images chest.png FOLDER --out scores.csv   scores of your own images
    python evaluate.py --curves runs/umcl --out curves.png          losses and validation scores as a picture
    python evaluate.py --task zero-shot --data covid-radiography=FOLDER \\
        --classes COVID-19 "No Finding"                     these two against each other

Similarity is the cosine of unit-length features. The score of an image does not depend on the other images.
Results go to RUN/results.json, one entry for each task, data set and prompt set; they contain no report.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # see train.py
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import copy
import csv
import functools
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is imported; see data.py

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from tqdm import tqdm

import data
import prompts
from data import BadInput, Lacking, Parser, number_type
from umcl import UMCL, SwinTransformer, TextEncoder

# ------------------------------------------------------------------------------------------------- metrics


def label_sets(*labels):
    """Numbers the sets of findings: (N, C) bool each -> (N,) int64 each, -1 where no finding is present."""
    rows = np.concatenate([np.asarray(each, dtype=bool) for each in labels])
    number = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return torch.from_numpy(np.where(rows.any(1), number, -1)).split([len(each) for each in labels])


def nearest_of(similarity, query_sets, candidate_sets, k):
    """The k nearest candidates of each query, and whether they are relevant, 0 or 1 -> (Q, k, 2) int64.

    A candidate is relevant when its findings equal the query's, never without findings; ties and NaN count
    against the query. (Q, K) float, (Q,) and (K,) int64 of label_sets. Raises ValueError: K < k.
    """
    similarity = torch.as_tensor(similarity).double()
    if k > similarity.shape[1]:
        raise ValueError(f"P@{k} needs as many candidates, not {similarity.shape[1]}")
    relevant = (candidate_sets == query_sets[:, None]) & (query_sets[:, None] >= 0)
    # An irrelevant candidate is put one step of double precision ahead of those that it ties with.
    ahead = similarity.nextafter(torch.tensor(torch.inf, dtype=torch.double)).nan_to_num(torch.inf)
    nearest = torch.where(relevant, similarity.nan_to_num(-torch.inf), ahead).topk(k).indices
    return torch.stack([nearest, relevant.gather(1, nearest).long()], 2)


def shares_at_k(similarity, query_sets, candidate_sets, ks):
    """P@K of each query: the share of relevant candidates among its K nearest (family: GLoRIA).

    See nearest_of -> (Q, len(ks)) float.
    """
    hits = nearest_of(similarity, query_sets, candidate_sets, max(ks))[..., 1].double()
    return torch.stack([hits[:, :k].mean(1) for k in ks], 1)


def partner_rank(similarity, query_ids, candidate_ids):
    """0-based rank of the query's own partner, the nearest candidate of its id; ties, NaN count against it.

    (Q, K) float, (Q,) and (K,) int64 -> (Q,) int64. Each query has a candidate; further ones are never wrong.
    """
    similarity = torch.as_tensor(similarity)
    similarity = similarity if similarity.is_floating_point() else similarity.double()
    own = query_ids[:, None] == candidate_ids
    nearest = similarity.nan_to_num(-torch.inf).masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return (~(similarity < nearest) & ~own).sum(1)


def in_chunks(function, queries, candidates, of_query, cells=2**20):
    """function(similarity, of_query) of a few queries at a time, joined: (Q, D), (K, D), (Q,).

    A chunk has at most `cells` similarities, so memory does not grow with Q · K.
    """
    rows, found = max(1, cells // len(candidates)), None
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        values = function(queries[part] @ candidates.T, of_query[part])
        if found is None:  # small tensors kept between large ones would fragment the memory
            found = values.new_empty((len(queries), *values.shape[1:]))
        found[part] = values
    return found


def share(right):
    """How far the rows are right on average, (N,) or (N, V) in 0 ... 1 -> float."""
    return float(np.mean(right))


def auroc(scores, labels, counts=None):
    """Probability that a positive, (N,) bool, outscores a negative; ties half, nan if a class is absent.

    -> float; with counts, how often each of n draws has each row, (n, N) int -> (n,) float.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    one, counts = counts is None, np.ones((1, len(labels)), dtype=int) if counts is None else counts
    positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
    negative = negative[scores[negative].argsort()]
    below = np.zeros((len(counts), len(negative) + 1), dtype=int)  # negatives drawn in front of each place
    counts.take(negative, axis=1).cumsum(1, out=below[:, 1:])
    places = (np.searchsorted(scores[negative], scores[positive], side) for side in ("left", "right"))
    positives = counts.take(positive, axis=1)
    with np.errstate(invalid="ignore"):
        pairs = (positives * sum(below.take(place, axis=1) for place in places)).sum(1) / 2
        values = pairs / positives.sum(1) / below[:, -1]
    return float(values[0]) if one else values


def average_precision(scores, labels, counts=None):
    """Mean over the positives of the precision among all that score as high: (N,) each -> float.

    counts: see auroc.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    one, counts = counts is None, np.ones((1, len(labels)), dtype=int) if counts is None else counts
    order = (-scores).argsort()
    positive = order[labels[order]]
    positives = counts.take(positive, axis=1)

    def as_high(rows):
        """How many of these rows a draw has that score as high as each positive."""
        places = np.searchsorted(-scores[rows], -scores[positive], "right") - 1
        return counts.take(rows, axis=1).cumsum(1).take(places, axis=1)

    with np.errstate(invalid="ignore"):
        precision = as_high(positive) / np.maximum(as_high(order), 1)
        values = (positives * precision).sum(1) / positives.sum(1)
    return float(values[0]) if one else values


def of_draws(metric, arrays, counts):
    """The metric of each draw: counts, (n, N) int, how often it has each row of the arrays -> (n, ...)."""
    if "counts" in inspect.signature(metric).parameters:
        return metric(*arrays, counts=counts)
    rows = np.arange(counts.shape[1])
    return np.array([metric(*(array[rows.repeat(times)] for array in arrays)) for times in counts])


def blind_precision(labels):
    """Expected average precision of a random order: (N,) bool, both classes in it -> float."""
    n, m = len(labels), np.count_nonzero(labels)
    first = (1 / np.arange(1, n + 1)).mean()
    return float((m - 1) / (n - 1) * (1 - first) + first)


def mean_over_findings(metric, scores, labels, known, counts=None):
    """Mean over the columns in which both classes occur, each over its known rows: (N, C) each -> float.

    counts: see auroc; a draw's mean is over its own such columns.
    """
    one, counts = counts is None, np.ones((1, len(known)), dtype=int) if counts is None else counts
    total, columns = np.zeros(len(counts)), np.zeros(len(counts))
    for score, label, rows in zip(scores.T, labels.T, map(np.flatnonzero, known.T), strict=True):
        score, label, of_rows = score[rows], label[rows], counts.take(rows, axis=1)
        positives = of_rows.take(np.flatnonzero(label), axis=1).sum(1)
        both = (positives > 0) & (positives < of_rows.sum(1))
        total[both] += of_draws(metric, (score, label), of_rows[both])
        columns += both
    with np.errstate(invalid="ignore"):
        values = total / columns
    return float(values[0]) if one else values


mean_auroc = partial(mean_over_findings, auroc)


def balanced_accuracy(predicted, true):
    """Mean over the classes in `true` of the share of their rows predicted right: two (N,) int -> float."""
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


def f1(predicted, labels):
    """2 TP / (2 TP + FP + FN): two (N,) bool -> float, 0 where nothing is present or predicted."""
    return float(2 * (predicted & labels).sum() / max(1, predicted.sum() + labels.sum()))


def mcc(predicted, labels):
    """Matthews' correlation coefficient: two (N,) bool -> float in -1 ... 1, 0 where one is constant."""
    spread = predicted.std() * labels.std()
    covariance = (predicted & labels).mean() - predicted.mean() * labels.mean()
    return float(covariance / spread) if spread else 0.0


def agreement(predicted, labels):
    """Share of predictions that are right: two (N,) bool -> float."""
    return float((predicted == labels).mean())


def best_threshold(scores, labels):
    """The score from which on all are predicted present for the best F1: (N,) float, (N,) bool -> float."""
    every, positive = np.sort(scores), np.sort(scores[labels])
    found = len(positive) - np.searchsorted(positive, every)
    predicted = len(every) - np.searchsorted(every, every)
    return float(every[np.argmax(2 * found / (predicted + len(positive)))])


# ------------------------------------------------------------------------------------------------ intervals


def drawn(metric, *arrays, n=1000, seed=0, patients=None, cells=2**18):
    """n times the metric of rows drawn with replacement, the same from all arrays -> (n, ...) float.

    A metric with `counts` gets many draws at a time, at most `cells` counts, and sorts rows once for them.
    patients: (rows,) int, whose row it is; then whole patients are drawn, since their images are alike.
    """
    rng, rows = np.random.default_rng(seed), np.arange(len(arrays[0]))
    patient = rows if patients is None else np.unique(patients, return_inverse=True)[1]
    size, values = patient.max() + 1, []
    step = max(1, cells // len(rows))
    for start in range(0, n, step):
        draws = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(start, n)[:step]]
        counts = np.stack(draws).take(patient, axis=1)
        values.extend(of_draws(metric, arrays, counts))
    return np.array(values)


def middle(values):
    """The 95 % in the middle of drawn values -> (low, high)."""
    return tuple(float(v) for v in np.nanpercentile(values, (2.5, 97.5)))


def bootstrap_ci(metric, *arrays, n=1000, seed=0, patients=None):
    """95 % percentile interval of metric(*arrays) -> (low, high); see drawn."""
    return middle(drawn(metric, *arrays, n=n, seed=seed, patients=patients))


class Part(NamedTuple):
    """A share or an AUROC, and what tells its precision."""

    value: float
    errors: np.ndarray  # (N,) what each row adds to the error of the value; their sum is 0
    rows: np.ndarray  # (N,) bool: the rows that limit the precision, of an AUROC the rarer class


def share_part(right, rows):
    """The share of these rows, (N,) bool, that are right, (N,) or (N, V) -> Part."""
    right = right.reshape(len(right), -1).mean(1)
    value = np.clip(right[rows].mean(), 0, 1)
    return Part(value, rows * (right - value) / rows.sum(), rows)


def auroc_part(scores, labels, rows):
    """AUROC over these rows, (N,) bool, by its structural components (DeLong and others, 1988) -> Part."""
    errors, classes, values = np.zeros(len(scores)), [rows & labels, rows & ~labels], []
    for sign, (own, others) in zip((1, -1), (classes, classes[::-1]), strict=True):
        ordered, n = np.sort(sign * scores[others]), own.sum()
        below = sum(np.searchsorted(ordered, sign * scores[own], side) for side in ("left", "right"))
        values.append(below / 2 / len(ordered))
        errors[own] = (values[-1] - values[-1].mean()) / np.sqrt(n * max(1, n - 1))
    return Part(values[0].mean(), errors, min(classes, key=np.sum))


def auroc_parts(scores, labels, known):
    columns = zip(scores.T, labels.T, known.T, strict=True)
    return [auroc_part(*column) for column in columns if np.unique(column[1][column[2]]).size == 2]


# Metrics that are a share, an AUROC or a mean of such -> function of the arrays that gives these
PARTS = {
    share: lambda right: [share_part(right, np.full(len(right), True))],
    agreement: lambda predicted, labels: [share_part(predicted == labels, np.full(len(labels), True))],
    balanced_accuracy: lambda predicted, true: [
        share_part(predicted == true, true == label) for label in np.unique(true)
    ],
    auroc: lambda scores, labels: [auroc_part(scores, labels, np.full(len(labels), True))],
    mean_auroc: auroc_parts,
}


def wilson(value, n, z=1.96):
    """95 % interval of a share of n trials (Wilson, 1927) -> (low, high)."""
    centre, half = value + z**2 / 2 / n, z * np.sqrt(value * (1 - value) / n + z**2 / 4 / n**2)
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def score_interval(parts, patients):
    """95 % interval of the mean of Parts, whose rows are of these patients, (N,) int -> (low, high).

    Each part's is Wilson's, of as many trials as have its variance; errors of a patient are summed first. Few
    positives may show hardly any variance by chance, so a patient of the rows that limit a part counts as at
    most three trials, and as one where there is no variance (ours; with 5 positives 0.90 to 0.98 are covered,
    by a bootstrap 0.64 to 0.84). Distances from values to bounds add up as the errors are correlated (Zou and
    Donner, 2008).
    """
    patient = np.unique(patients, return_inverse=True)[1]
    errors = np.stack([np.bincount(patient, part.errors) for part in parts])
    covariance, bounds = errors @ errors.T, []
    deviation = np.sqrt(covariance.diagonal())
    for part, sd in zip(parts, deviation, strict=True):
        most = len(np.unique(patient[part.rows]))
        spread = part.value * (1 - part.value)
        trials = min(spread / sd**2, 3 * most) if min(spread, sd) > 1e-9 else most
        bounds.append(wilson(part.value, trials))
    correlation = covariance / np.maximum(np.outer(deviation, deviation), 1e-18)
    np.fill_diagonal(correlation, 1)
    values = np.array([part.value for part in parts])
    below, above = (np.array(side) for side in zip(*bounds, strict=True))
    squares = (each @ correlation @ each for each in (values - below, above - values))
    down, up = (np.sqrt(max(0, square)) / len(parts) for square in squares)  # rounding may make it negative
    return float(values.mean() - down), float(values.mean() + up)


class Measure(NamedTuple):
    """A metric and what it is computed from: all that its value, interval and differences need."""

    metric: Callable  # function of the arrays -> float, or the float of each of several trained classifiers
    arrays: tuple  # N rows each, one for each image or text asked about
    chance: float = None  # value of a blind guess
    constant: float = None  # value of always answering the most frequent class
    patients: np.ndarray = None  # (N,) int, whose row it is
    counts: dict = {}  # further numbers for the results

    @property
    def value(self):
        return float(np.mean(self.metric(*self.arrays)))


def drawn_values(measure):
    """Values of the measure for 1000 draws of its patients, the same for all measures of the same rows.

    Trained classifiers are drawn like the rows: they are a sample of what the training patients could give.
    """
    values = drawn(measure.metric, *measure.arrays, patients=measure.patients).reshape(1000, -1)
    classifiers = np.random.default_rng(0).integers(values.shape[1], size=values.shape)
    return np.take_along_axis(values, classifiers, axis=1).mean(1)


def rarest_class(labels, known=True):
    """Rows of the rarer class, the fewest of all columns in which both occur: (N,) or (N, C) bool -> int."""
    labels = labels.reshape(len(labels), -1)
    rarer = np.minimum((labels & known).sum(0), (~labels & known).sum(0))
    return rarer[rarer > 0].min()


# An AUROC, F1 and so on of fewer positives or negatives has no interval: none of use covers the truth.
FEWEST = 5


def interval(measure):
    """95 % interval of a measure -> (low, high), or two None where a class has fewer than FEWEST rows.

    Shares, AUROCs and their means by score_interval, others by the bootstrap, whose mean over findings needs
    as many rows of each.
    """
    if "positives" in measure.counts and measure.metric is not mean_auroc:
        if rarest_class(*measure.arrays[1:]) < FEWEST:
            return None, None
    if measure.metric in PARTS:
        rows = np.arange(len(measure.arrays[0]))
        patients = rows if measure.patients is None else measure.patients
        return score_interval(PARTS[measure.metric](*measure.arrays), patients)
    return middle(drawn_values(measure))


def entry_of(measure):
    """Measure -> what results.json and the table have of it: dict of numbers, None for no interval."""
    each = np.atleast_1d(measure.metric(*measure.arrays))
    entry = {"value": measure.value, "n": len(measure.arrays[0]), **measure.counts}
    if len(each) > 1:
        entry["spread"] = float(np.std(each, ddof=1))
    if measure.patients is not None:
        entry["patients"] = len(np.unique(measure.patients))
    entry |= {k: float(v) for k in ("chance", "constant") if (v := getattr(measure, k)) is not None}
    entry["low"], entry["high"] = interval(measure)
    return entry


def difference(pairs):
    """Mean of the second measure less the first of each pair, all of the same rows -> (value, low, high).

    The patients are drawn once for all pairs: the interval says nothing of how runs of further seeds differ.
    """
    values = [other.value - one.value for one, other in pairs]
    drawn = [drawn_values(other) - drawn_values(one) for one, other in pairs]
    return float(np.mean(values)), *middle(np.mean(drawn, axis=0))


def progress(items, what, **options):
    """A bar on stderr while one goes through the items, gone after it; none where stderr is a file."""
    return tqdm(items, desc=what, leave=False, disable=None, **options)


# --------------------------------------------------------------------------------------------------- tasks


def read_prompts(source, findings):
    """Prompts of the findings' presence and of their absence -> two {finding: [text, ...]}.

    source: name of a set in prompts.py, a template with {}, or FILE.json with {finding: [text, ...]} or
    {finding: {"positive": [text, ...], "negative": [text, ...]}}; the negative ones may be left out.
    findings: names; of a file None takes all that it has.
    """
    if source in (*prompts.TEMPLATES, "ensemble") or "{}" in source:
        return tuple(prompts.prompt_set(findings, source, by) for by in (prompts.wordings, prompts.negations))
    sides = {"positive": {}, "negative": {}}
    data.refuse_no_file(source)
    try:
        for name, each in json.loads(Path(source).read_text(encoding="utf-8")).items():
            for side, texts in (each if isinstance(each, dict) else {"positive": each}).items():
                if not texts or not isinstance(texts, list) or not all(text.encode() for text in texts):
                    raise ValueError(f"{name!r} has no list of texts")
                sides[side][name] = texts
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        form = '{finding: [text, ...]} or {finding: {"positive": [...], "negative": [...]}}'
        raise BadInput(f"{source} is no prompt set ({error}); it needs {form}") from error
    findings = list(sides["positive"]) if findings is None else findings
    missing = [name for name in findings if name not in sides["positive"]]
    if missing:
        known = ", ".join(sides["positive"])
        raise BadInput(f"{source} has no prompt for {missing[0]!r}; it has {known}, see --classes")
    return tuple({name: side[name] for name in findings if name in side} for side in sides.values())


# How the T prompts of one finding become its score of N images: (N, D), (T, D) -> (N,). The first is of the
# family of CLIP, the others of MedCLIP.
COMBINE = {
    "mean-embedding": lambda images, texts: images @ (texts.mean(0) / np.linalg.norm(texts.mean(0))),
    "mean-similarity": lambda images, texts: (images @ texts.T).mean(1),
    "max": lambda images, texts: (images @ texts.T).max(1),
}


def combined(image_features, prompt_features, combine):
    """Score of each finding for each image: (N, D), [(T, D), ...] of C findings -> (N, C), see COMBINE."""
    return np.stack([COMBINE[combine](image_features, texts) for texts in prompt_features], axis=1)


def chosen_classes(encoded, classes):
    """Names, None for all findings of the records -> (names, their columns of present and of absent)."""
    classes = list(dict.fromkeys(classes or encoded.findings))
    unknown = [name for name in classes if name not in encoded.findings]
    if unknown:
        known = ", ".join(encoded.findings) or "no label at all"
        raise BadInput(f"no image of this data has {unknown[0]!r}; it has {known}")
    if not classes:
        raise Lacking("this needs labels, and these data have none")
    columns = [encoded.findings.index(name) for name in classes]
    return classes, encoded.present[:, columns], encoded.absent[:, columns]


def with_one(present, absent):
    """Rows with exactly one of the classes, the others known to be absent: two (N, C) bool -> (N,) bool.

    Where another class is unknown, naming it may be right, so such rows cannot be scored; a note counts them.
    """
    one, known = present.sum(1) == 1, (present | absent).all(1)
    if (one & ~known).any():
        count = f"{(one & ~known).sum():,} of {one.sum():,} images with one of the classes"
        data.note(f"{count} are left out of accuracies: whether they have another is unknown")
    return one & known


class Scored(NamedTuple):
    """Scores of N images for C findings, and what is known of these."""

    names: list
    scores: np.ndarray  # (N, C)
    present: np.ndarray  # (N, C) bool
    absent: np.ndarray  # (N, C) bool
    patients: np.ndarray  # (N,) int

    def of(self, names):
        """The same of these findings alone."""
        columns = [self.names.index(name) for name in names]
        parts = (part[:, columns] for part in (self.scores, self.present, self.absent))
        return Scored(list(names), *parts, self.patients)


def zero_shot(run, encoded, *, prompt_set=None, combine="mean-embedding", classes=None, thresholds=None):
    """Classification by label prompts (paper) -> {metric: Measure}; see classification and at_thresholds.

    "pair AUROC" is by a finding's score less that of the prompts of its absence (family: CheXzero, whose
    softmax over the two gives the same ranking), "absence AUROC" of absence, by the prompts of absence alone.

    prompt_set: see read_prompts; None is the template of training. combine: see COMBINE.
    classes: names; None takes all findings of the records.
    thresholds: split -> records of other patients, to choose them by; None leaves their metrics out.
    """
    classes, present, absent = chosen_classes(encoded, classes)
    positive, negative = read_prompts(prompt_set or run.args.template, classes)
    texts = encode_findings(run, positive)
    refuse_equal_prompts(run, positive)

    def scored(images, present, absent):
        scores = combined(images.image_features, texts, combine)
        return Scored(classes, scores, present, absent, images.patients)

    found = scored(encoded, present, absent)
    measures = classification(found)
    if negative:
        some = found.of(negative)
        of_absence = combined(encoded.image_features, encode_findings(run, negative), combine)
        measures |= by_finding("pair AUROC", auroc, some._replace(scores=some.scores - of_absence))
        swapped = some._replace(scores=of_absence, present=some.absent, absent=some.present)
        measures |= by_finding("absence AUROC", auroc, swapped)
    if not measures:
        raise Lacking("zero-shot needs labels of two classes, and these data have none")
    if thresholds:
        try:
            chosen_by = encode(run, labelled(thresholds("valid"), "valid"))
            labels = (each.numpy() for each in data.label_matrices(chosen_by.records, classes))
            measures |= at_thresholds(found, scored(chosen_by, *labels))
        except BadInput as error:
            data.note(f"F1, MCC and binary accuracy are left out, for want of a threshold: {error}")
    return measures


def baselines(present):
    """Accuracies of a blind guess and of the most frequent class: (N, C) bool, one True a row -> dict."""
    return {"chance": 1 / present.shape[1], "constant": present.mean(0).max()}


def by_finding(kind, metric, scored, chance=lambda labels: 0.5):
    """A metric of each finding over the images where it is known, and its mean over the findings -> Measures.

    A finding that has not both classes is left out.
    metric: function of a finding's scores and labels. chance: function of its labels.
    """
    measures, known = {}, scored.present | scored.absent
    for i, name in enumerate(scored.names):
        rows = known[:, i]
        scores, labels = scored.scores[rows, i], scored.present[rows, i]
        if labels.any() and not labels.all():
            told = {"patients": scored.patients[rows], "counts": {"positives": int(labels.sum())}}
            measures[f"{kind} {name}"] = Measure(metric, (scores, labels), chance(labels), **told)
    if measures:
        arrays = scored.scores, scored.present, known
        blind = np.mean([measure.chance for measure in measures.values()])
        mean = mean_auroc if metric is auroc else partial(mean_over_findings, metric)
        counts = {"positives": min(measure.counts["positives"] for measure in measures.values())}
        measures[f"{kind} mean"] = Measure(mean, arrays, blind, patients=scored.patients, counts=counts)
    return measures


def classification(scored):
    """Accuracies over the images with exactly one finding, AUROCs and mAP -> Measures."""
    measures, names = {}, scored.names
    single = with_one(scored.present, scored.absent)
    if single.any() and len(names) > 1:
        true, predicted = scored.present[single].argmax(1), scored.scores[single].argmax(1)
        told = baselines(scored.present[single]) | {"patients": scored.patients[single]}
        measures["accuracy"] = Measure(share, (predicted == true,), **told)
        confusion = {  # {true class: {predicted class: images}}
            name: {other: int(((true == i) & (predicted == j)).sum()) for j, other in enumerate(names)}
            for i, name in enumerate(names)
        }
        told |= {"constant": 1 / len(np.unique(true)), "counts": {"confusion": confusion}}
        measures["balanced accuracy"] = Measure(balanced_accuracy, (predicted, true), **told)
    measures |= by_finding("AUROC", auroc, scored)
    precision = by_finding("AP", average_precision, scored, chance=blind_precision)
    return measures | ({"mAP": precision["AP mean"]} if precision else {})


def one_answer(metric, labels):
    """The metric of the better of all-yes and all-no."""
    return max(metric(np.full(len(labels), answer), labels) for answer in (True, False))


def at_thresholds(scored, valid):
    """F1, MCC and accuracy of each finding, predicted where its score reaches a threshold -> Measures.

    The threshold has the best F1 on the validation split. Chance is the better of all-yes and all-no.
    """
    thresholds = {}
    columns = zip(valid.names, valid.scores.T, valid.present.T, valid.absent.T, strict=True)
    for name, scores, present, absent in columns:
        if present.any() and absent.any():
            known = present | absent
            thresholds[name] = best_threshold(scores[known], present[known])
    if not thresholds:
        raise Lacking("no evaluated finding is both present and absent in the valid split")
    scored, measures = scored.of(thresholds), {}
    scored = scored._replace(scores=scored.scores >= np.array(list(thresholds.values())))
    for kind, metric in (("F1", f1), ("MCC", mcc), ("binary accuracy", agreement)):
        measures |= by_finding(kind, metric, scored, chance=partial(one_answer, metric))
    for name in scored.names:
        if f"F1 {name}" in measures:
            measures[f"F1 {name}"].counts["threshold"] = thresholds[name]
    return measures


def class_sentences(records, findings, count, seed=0):
    """Draws sentences of each finding from reports with exactly that finding -> K str, (K, C) bool.

    A sentence in reports of two findings, such as "The bones are intact.", is left out (ours).
    """
    found = {}
    for record in records:
        has = data.present(record)
        if record.report and len(has) == 1:
            for sentence in re.split(r"(?<=[.!?])\s+", record.report.strip()):
                found.setdefault(sentence, set()).update(has)
    rng, texts = np.random.default_rng(seed), []
    for name in findings:
        own = sorted(sentence for sentence, owners in found.items() if owners == {name})
        if len(own) < count:
            raise BadInput(f"--sentences {count}: there are {len(own)} sentences of {name!r} alone")
        texts += rng.choice(own, count, replace=False).tolist()
    return texts, np.eye(len(findings), dtype=bool).repeat(count, 0)


def hit_chance(right, count, k):
    """Chance that k blind draws from `count` candidates have a right one: (Q,) numbers of these -> float."""
    missed = np.prod([np.maximum(count - right - i, 0) / (count - i) for i in range(k)], axis=0)
    return 1 - missed.mean()


def blind_rank(right, count):
    """Median 1-based rank of the first right one of `count` in random order: (Q,) how many are -> float."""
    ranks, behind = np.arange(count), 0
    for number, queries in zip(*np.unique(right, return_counts=True), strict=True):
        # P(rank > r) = P(rank > r - 1) · (count - number - r + 1) / (count - r + 1)
        behind += queries / len(right) * np.cumprod(np.maximum(count - number - ranks, 0) / (count - ranks))
    return 1 + float((behind > 0.5 + 1e-9).sum() + (behind > 0.5 - 1e-9).sum()) / 2


def precisions(nearest, k, patients=None, hit=False):
    """Share of relevant candidates among each query's k nearest, or whether there is one -> (Q,) float.

    patients: (Q,) int; then candidate i belongs to query i, and is drawn with it. So that the rows vary like
    that, each has what its candidate adds to the queries of other patients (jackknife), less the mean of it.
    What the queries of one candidate do not share is counted with the queries already, and taken off.
    """
    texts, hits = nearest[:, :k, 0], nearest[..., 1]
    values = hits[:, :k].sum(1)
    without = hits[:, : k + 1].sum(1, keepdims=True) - hits[:, :k]  # with the next in place of each
    values, without = ((each > 0) * 1.0 if hit else each / k for each in (values, without))
    if patients is not None and k < hits.shape[1]:
        each = np.where(patients[texts] == patients[:, None], 0, values[:, None] - without)
        added = np.bincount(texts.ravel(), each.ravel(), minlength=len(values))
        added -= added.mean()
        shared = max(0, 1 - each.size * each.var() / max(np.square(added).sum(), 1e-9))
        values = values + np.sqrt(shared) * added
    return values


def retrieved(images, texts, by_class):
    """P@K and Hit@K, or R@K and median rank, both ways -> Measures.

    images, texts: (N, D) and (K, D) features, their int64 keys and patients; patients of texts may be None. A
    candidate is right where its key is the query's; each key is on both sides.
    i2t has images as queries and texts as candidates, t2i the reverse. K beyond the candidates is left out.
    """
    measures = {}
    for way, asking, answering in (("i2t", images, texts), ("t2i", texts, images)):
        (queries, keys, patients), (candidates, of_candidates, _) = asking, answering
        count = len(candidates)
        right = torch.bincount(of_candidates, minlength=int(keys.max()) + 1)[keys].numpy()
        ks = [k for k in ((1, 2, 5, 10) if by_class else (1, 5, 10)) if k <= count]
        if by_class:
            ranked = partial(nearest_of, candidate_sets=of_candidates, k=min(max(ks) + 1, count))
            nearest = in_chunks(ranked, queries, candidates, keys).numpy()
            drawn_with = None if texts[2] is None else patients
            found = {f"P@{k}": (precisions(nearest, k, drawn_with), right.mean() / count) for k in ks}
            for k in ks[1:]:  # Hit@1 is P@1
                hit = precisions(nearest, k, drawn_with, hit=True)
                found[f"Hit@{k}"] = hit, hit_chance(right, count, k)
        else:
            ranked = partial(partner_rank, candidate_ids=of_candidates)
            rank = in_chunks(ranked, queries, candidates, keys).numpy()
            found = {f"R@{k}": (rank < k, hit_chance(right, count, k)) for k in ks}
            found["median rank"] = rank + 1, blind_rank(right, count)
        told = {"patients": patients, "counts": {"candidates": count}}
        for name, (of_queries, chance) in found.items():
            metric = np.median if name == "median rank" else share
            measures[f"{way}_{name}"] = Measure(metric, (of_queries,), chance, **told)
    return measures


def retrieval(run, encoded, *, sentences=None, others=None):
    """Images and texts, both ways -> {"i2t_P@1": Measure, ...}.

    P@K (class level, paper) over the reports of images of which each finding is known; R@K and median rank
    (instance level) over all reports: a text that several images have is one candidate; as a query, it looks
    for any of them.

    sentences: so many of each finding, see class_sentences, in place of the reports; the images are those
    with exactly one finding, and there is no instance level. others: split -> records of other patients.
    """
    images, patients = torch.as_tensor(encoded.image_features), encoded.patients
    if sentences:
        single = with_one(encoded.present, encoded.absent)
        if not single.any():
            raise Lacking("sentences need images with exactly one finding, and these data have none")
        columns = np.flatnonzero(encoded.present[single].any(0))
        findings = [encoded.findings[column] for column in columns]
        texts, text_labels = class_sentences(others("train", *run.args.data), findings, sentences)
        image_sets, text_sets = label_sets(encoded.present[single][:, columns], text_labels)
        texts = torch.as_tensor(encode_texts(run, texts)), text_sets, None
        return retrieved((images[single], image_sets, patients[single]), texts, by_class=True)
    if not len(encoded.report_features):
        raise Lacking("retrieval needs reports, and these data have none")
    rows = encoded.report_rows
    (images, text, patients), (texts, *_) = instances(encoded)
    labels, measures = encoded.present[rows], {}
    known = labels.any(1) & (encoded.present | encoded.absent)[rows].all(1)
    if (~known & labels.any(1)).any():
        count = f"{(~known & labels.any(1)).sum():,} of {labels.any(1).sum():,} reports with findings"
        data.note(f"{count} are left out of P@K: whether their images have others is unknown")
    if known.any():  # copies of a text have one and the same feature, so they tie
        (sets,) = label_sets(labels[known])
        sides = ((each[known], sets, patients[known]) for each in (images, texts[text]))
        measures |= retrieved(*sides, by_class=True)
    return measures | retrieved(*instances(encoded), by_class=False)


def instances(encoded):
    """Images with a report, and the different reports -> features, numbers of the texts, patients of each."""
    rows = encoded.report_rows
    text = numbered(" ".join(encoded.records[row].report.split()) for row in rows)
    first = np.unique(text, return_index=True)[1]
    patients, features = encoded.patients[rows], torch.as_tensor(encoded.report_features[first])
    images = torch.as_tensor(encoded.image_features[rows]), torch.tensor(text), patients
    return images, (features, torch.arange(len(first)), patients[first])


def drawn_by_patient(records, percent, seed):
    """Rows of all records of a share of the patients, at least one patient, drawn by the seed."""
    patient_of = [(record.source, record.patient) for record in records]
    patients = sorted(set(patient_of))
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = {patients[i] for i in order[: max(1, round(len(patients) * percent / 100))]}
    return [row for row, patient in enumerate(patient_of) if patient in chosen]


def transfer(encoded, scores):
    """Measures of classifiers that are trained on shares of the training patients, each on several draws.

    scores: {percent of the patients: [(N, C) scores of the evaluated records by each classifier]}
    """
    measures, present, known = {}, encoded.present, encoded.present | encoded.absent
    one_class = known.all() and (present.sum(1) == 1).all() and present.shape[1] > 1

    def aurocs(scores, *labels, counts=None):
        each = (scores[..., t] for t in range(scores.shape[-1]))
        return np.stack([mean_auroc(one, *labels, counts=counts) for one in each], axis=-1)

    for percent, each in scores.items():
        each = np.stack(each, axis=2)  # (N, C, draws)
        told = {"patients": encoded.patients, "counts": {"trained": each.shape[2]}}
        if one_class:
            right = each.argmax(1) == present.argmax(1)[:, None]
            accuracies = partial(np.mean, axis=0)
            measures[f"{percent:g} % accuracy"] = Measure(accuracies, (right,), **baselines(present), **told)
        measure = Measure(aurocs, (each, present, known), chance=0.5, **told)
        if not np.isnan(measure.value):
            measures[f"{percent:g} % AUROC mean"] = measure
    return measures


def logistic_regression(features, present, absent, penalty, steps=100):
    """One regression for each finding over the rows where it is known, by L-BFGS.

    (N, F) float32, two (N, C) bool -> (F + 1, C) float32; the last row is the intercept, without a penalty.
    penalty: factor of half the squared weights.
    """
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    weight = torch.zeros(features.shape[1], present.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")
    known = (present | absent).float()
    entropy = partial(torch.nn.functional.binary_cross_entropy_with_logits, weight=known, reduction="sum")

    def loss():
        optimizer.zero_grad()
        value = entropy(features @ weight, present.float()) / known.sum().clamp(min=1)
        value = value + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def probe_scores(train, test, present, absent, folds):
    """(N, C) scores of the test rows by the regression whose penalty is best across the folds.

    train, test: (rows, F) float32. present, absent: (rows, C) bool tensors. folds: (rows,) int, of a patient.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (torch.from_numpy((part - mean) / std) for part in (train, test))

    def fit(penalty):
        scores = torch.zeros(present.shape)
        for fold in range(FOLDS):
            out = torch.from_numpy(folds == fold)
            weight = logistic_regression(train[~out], present[~out], absent[~out], penalty)
            scores[out] = train[out] @ weight[:-1] + weight[-1]
        return np.nan_to_num(mean_auroc(scores.numpy(), present.numpy(), (present | absent).numpy()))

    weight = logistic_regression(train, present, absent, max((1.0, 1e-1, 1e-2, 1e-3, 1e-4), key=fit))
    return (test @ weight[:-1] + weight[-1]).numpy()


FOLDS = 3  # of the linear probe's cross-validation


def linear_probe(run, encoded, *, others, fractions=(1, 10, 100), repeats=5):
    """A linear classifier on the frozen image tower's features, trained on shares of the training patients.

    The features are standardised by the training records; cross-validation within the share, patients apart,
    chooses the penalty. Beside it stand two trivial baselines: "pixels", the same on 16 x 16 pixels, and
    "untrained", on a tower of the same sizes with random weights.

    others: split -> records of patients that are not evaluated.
    fractions: percent of the training patients. repeats: draws of each fraction but 100.
    """
    records = labelled(others("train"), "train")
    train, labels = encode(run, records), data.label_matrices(records, encoded.findings)
    features = {
        "": (train.pooled, encoded.pooled),
        ", pixels": (train.pixels, encoded.pixels),
        ", untrained": tuple(encode(untrained(run), each).pooled for each in (records, encoded.records)),
    }
    draws = [(percent, n) for percent in fractions for n in range(1 if percent == 100 else repeats)]
    measures, bar = {}, progress(draws * len(features), "linear probe", unit="classifier")
    for name, (of_train, of_test) in features.items():
        scores = {percent: [] for percent in fractions}
        for percent, n in draws:
            rows = drawn_by_patient(records, percent, n)
            patients = np.unique(train.patients[rows], return_inverse=True)[1]
            folds = np.random.default_rng(n).permutation(len(rows))[patients] % FOLDS
            found = probe_scores(of_train[rows], of_test, *(each[rows] for each in labels), folds)
            scores[percent].append(found)
            bar.update()
        measures |= {f"{metric}{name}": each for metric, each in transfer(encoded, scores).items()}
    bar.close()
    if not measures:
        raise Lacking("no finding is both present and absent in the evaluated images")
    return measures


def labelled(records, split):
    """Those with a known finding; without reports, which nobody looks at."""
    found = [replace(record, report=None) for record in records if record.labels]
    if not found:
        raise Lacking(f"no labelled record of the {split} split is left beside the evaluated patients")
    return found


def untrained(run):
    """The run with an image tower of the same sizes whose weights are random."""
    model = copy.deepcopy(run.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.image_encoder = build_image_encoder(run.args).to(run.device)
    return run._replace(model=model)


def prompt_sensitivity(run, encoded, *, classes=None):
    """How much the wording of the prompts changes zero-shot classification (the paper's motivation).

    The accuracy of the trained prompt and of each of prompts.variants over the images with exactly one of the
    classes. Variants of the same tokens count once. "drop" is the trained prompt's accuracy less the mean of
    the others. "negated" prompts say the opposite and stay out of mean, worst and drop: a model that
    understands "no" is below chance with them.
    """
    classes, present, absent = chosen_classes(encoded, classes)
    single = with_one(present, absent)
    if len(classes) < 2 or not single.any():
        raise Lacking("prompt-sensitivity needs images with exactly one of two classes; these data have none")
    right, seen = {}, set()
    for variant, texts in prompts.variants(classes, run.args.template).items():
        tokens = repr(token_lists(run, texts))
        if tokens not in seen:
            seen.add(tokens)
            scores = combined(encoded.image_features[single], encode_findings(run, texts), "mean-embedding")
            right[variant] = scores.argmax(1) == present[single].argmax(1)
    trained, *others = (each for variant, each in right.items() if variant != "negated")
    if not others:
        raise Lacking("prompt-sensitivity needs prompts that differ from the trained one in their tokens")
    patients, others = encoded.patients[single], np.stack(others, axis=1)
    told = baselines(present[single]) | {"patients": patients}
    return {
        "drop": Measure(lambda one, others: one.mean() - others.mean(), (trained, others), patients=patients),
        "mean": Measure(share, (others,), counts={"variants": others.shape[1]}, **told),
        "worst": Measure(lambda right: right.mean(0).min(), (others,), **told),
        **{variant: Measure(share, (each,), **told) for variant, each in right.items()},
    }


class HiddenPrompt(prompts.ContinuousPrompt):
    """Vectors that nothing attends to: all that is left of them is that the text's positions are later."""

    def forward(self, embeddings, attention_mask):
        embeddings, attention_mask = super().forward(embeddings, attention_mask)
        attention_mask[:, 1 : 1 + len(self.context)] = 0
        return embeddings, attention_mask


def controls(prompt):
    """What can stand in the place of the trained vectors -> {name: ContinuousPrompt, None for plain text}."""
    if prompt is None:
        return {"without vectors": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        zeros, noise = (prompts.ContinuousPrompt(*prompt.context.shape) for _ in range(2))
        hidden = HiddenPrompt(*prompt.context.shape)
    torch.nn.init.zeros_(zeros.context)
    made = {"zeros": zeros, "untrained vectors": noise, "positions alone": hidden}
    made = {name: each.to(prompt.context.device) for name, each in made.items()}
    return {"trained vectors": prompt, **made, "without vectors": None}


def prompt_words(run, encoded):
    """What the trained vectors do, beside controls: zeros, untrained ones, and only the positions they take.

    One prompt for each finding; images and reports with exactly one of them. "image" and "report": the share
    whose nearest prompt is its finding's. "margin": a report's cosine with its finding's prompt less the mean
    of the others. Prompts that are all alike, however near, are at chance in all three.
    """
    single = with_one(encoded.present, encoded.absent)
    columns = np.flatnonzero(encoded.present[single].any(0))
    of_reports = single[encoded.report_rows]
    if len(columns) < 2 or not of_reports.any():
        raise Lacking("prompt-words needs reports of images with exactly one of two findings; there are none")
    rows, measures = encoded.report_rows[of_reports], {}
    images, reports = encoded.image_features[single], encoded.report_features[of_reports]
    texts = [prompts.label_prompt(encoded.findings[column], run.args.template) for column in columns]
    own, own_of_report = (encoded.present[each][:, columns] for each in (single, rows))
    for name, vectors in controls(run.model.prompt).items():
        features = encode_texts(run, texts, as_prompts=True, prompt=vectors)
        of_image, of_report = images @ features.T, reports @ features.T
        with_own = of_report[own_of_report]
        found = {
            "image": (share, of_image.argmax(1) == own.argmax(1), single),
            "report": (share, of_report.argmax(1) == own_of_report.argmax(1), rows),
            "margin": (np.mean, with_own - (of_report.sum(1) - with_own) / (len(columns) - 1), rows),
        }
        for kind, (metric, values, of) in found.items():
            chance = 0 if kind == "margin" else 1 / len(columns)
            measures[f"{kind}, {name}"] = Measure(metric, (values,), chance, patients=encoded.patients[of])
    return measures


TASKS = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "prompt-sensitivity": prompt_sensitivity,
    "prompt-words": prompt_words,
}
# The rows that the screen shows without --all-metrics; of the other tasks all.
MAIN_ROWS = {
    "zero-shot": ("accuracy", "balanced accuracy", "AUROC mean"),
    "retrieval": ("i2t_P@1", "t2i_P@1", "i2t_R@10", "t2i_R@10"),
    "prompt-sensitivity": ("drop", "mean", "worst"),
}


def quick_scores(run, records):
    """What train watches after each epoch, over all images of the validation split -> {name: float}."""
    if not records:  # all of their patients may be held out
        return {}
    encoded, found = encode(run, records), {}
    if encoded.findings:
        texts = prompts.prompt_set(encoded.findings, run.args.template)
        scores = combined(encoded.image_features, encode_findings(run, texts), "mean-embedding")
        found["AUROC mean"] = mean_auroc(scores, encoded.present, encoded.present | encoded.absent)
    if len(encoded.report_features):
        ranked = retrieved(*instances(encoded), by_class=False)
        name = [name for name in ("i2t_R@1", "i2t_R@5", "i2t_R@10") if name in ranked][
            -1
        ]  # K of so few texts
        found[name] = ranked[name].value
    return {name: value for name, value in found.items() if not np.isnan(value)}


# ------------------------------------------------------------------------------------ runs and checkpoints

# Options that say where and how a run is computed: they change it by rounding and random numbers at most.
MACHINE_OPTIONS = ("device", "workers", "threads", "micro_batch_size", "log_every", "save_every")
# The fields of BERT's configuration that a checkpoint may set. Others, such as the kernel that computes
# attention, could make the library fetch code.
BERT_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act pad_token_id "
    "max_position_embeddings type_vocab_size layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob"
).split()


class Run(NamedTuple):
    """A model and what it needs to be used: all of it is in the checkpoint."""

    model: UMCL
    tokenizer: object  # a PreTrainedTokenizerFast of transformers
    findings: list
    args: argparse.Namespace

    @property
    def device(self):
        return self.model.log_scale.device

    @property
    def batch_size(self):
        """Images or texts to encode at a time."""
        return self.args.micro_batch_size or self.args.batch_size

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def prompt_tokens(self, texts):
        """Label prompts -> Tokens, cut so that the continuous prompt still fits into BERT's positions."""
        positions = self.model.text_encoder.bert.config.max_position_embeddings
        room = positions - (len(self.model.prompt.context) if self.model.prompt else 0)
        return data.tokenize(self.tokenizer, texts, min(self.args.max_length, room))


def wrap_tokenizer(tokenizer_json):
    """A tokenizer as the checkpoint holds it -> transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast  # a second to import, for which --help need not wait

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **special)


def build_image_encoder(args):
    """The Swin Transformer of these options; sizes that do not fit are a BadInput."""
    alike = ("image_size", "patch_size", "window_size", "drop_path")
    sizes = {"embed_dim": args.swin_dim, "depths": args.swin_depths, "num_heads": args.swin_heads}
    sizes |= {name: getattr(args, name) for name in alike}
    try:
        return SwinTransformer(in_chans=args.channels, **sizes)
    except ValueError as error:
        raise BadInput(str(error)) from error


def build_model(args, bert, prompt_length):
    """Puts the parts together -> UMCL. With a prompt_length of 0 label prompts are plain text."""
    positions = bert.config.max_position_embeddings
    if args.max_length > positions:
        raise BadInput(f"--max-length {args.max_length}: the text model has {positions} positions")
    if prompt_length and positions - prompt_length < 8:
        raise BadInput(f"--prompt-length {prompt_length}: no text fits beside it into {positions} positions")
    prompt = prompts.ContinuousPrompt(prompt_length, bert.config.hidden_size) if prompt_length else None
    text_encoder = TextEncoder(bert, frozen=args.freeze_text)
    return UMCL(build_image_encoder(args), text_encoder, prompt, embed_dim=args.embed_dim)


def finite(model):
    return all(torch.isfinite(parameter).all() for parameter in model.parameters())


def save_checkpoint(path, run, progress, **more):
    """Writes a run as tensors and plain data."""
    if not finite(run.model):
        raise BadInput(f"the weights are not finite any more, and {path} is left as it was; try a lower --lr")
    state = {
        "kind": "umcl",
        "model": run.model.state_dict(),
        "args": vars(run.args),
        "findings": run.findings,
        "tokenizer": run.tokenizer.backend_tokenizer.to_str(),
        "bert": run.model.text_encoder.bert.config.to_json_string(),
        "progress": progress,
    }
    with data.replacing(path, "xb") as file:
        torch.save(state | more, file)


def run_file(path):
    """RUN or a checkpoint in it -> the checkpoint's path, of a folder that of the best epoch."""
    return Path(path, "best.pt") if Path(path).is_dir() else Path(path)


@contextlib.contextmanager
def refusing(path):
    """Turns what goes wrong with a checkpoint, in torch or in other libraries, into one BadInput."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"the checkpoint {path} is not there; `python train.py` makes one") from error
    except Exception as error:  # the libraries have no error of their own for what they cannot read or build
        what = " ".join(str(error).split())[:200]
        raise BadInput(f"{path} is cut short or no checkpoint of this program ({what})") from error


def read_checkpoint(path):
    """RUN/best.pt or RUN/last.pt -> dict of tensors and plain data, see save_checkpoint, and its "path"."""
    data.refuse_no_file(path)
    with refusing(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] != "umcl":
            raise ValueError("it holds something else")
        return state | {"path": str(path)}


# Options that older runs lack, and what these did.
LATER = {"channels": 1, "section": "both", "freeze_text": False, "micro_batch_size": None}
LATER |= {"findings": None, "held_out": []}


def checked_options(options, findings):
    """The options that a checkpoint holds, with those that an older run lacked -> Namespace.

    Those that evaluation reads are looked through, and so are the findings.
    """
    args = argparse.Namespace(**LATER | options)
    lists = [findings, args.findings or [], args.data, args.views, args.held_out]
    if not all(isinstance(each, (list, tuple)) for each in [*lists, args.swin_depths, args.swin_heads]):
        raise ValueError("an option or its findings are no list")
    texts = [getattr(args, name) for name in ("template", "precision", "uncertain", "section")]
    if not all(type(text) is str for text in [*texts, *(name for each in lists for name in each)]):
        raise ValueError("an option or a finding is no text")
    sizes = "threads batch_size max_length image_size channels patch_size window_size swin_dim embed_dim"
    numbers = [getattr(args, name) for name in sizes.split()] + [*args.swin_depths, *args.swin_heads]
    numbers += [args.seed + 1, args.workers + 1, *{args.micro_batch_size} - {None}]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("an option is no number that it can be")
    if args.template not in prompts.TEMPLATES and "{}" not in args.template:
        raise ValueError("its template has no place for a finding")
    return args


def run_from_checkpoint(state, device):
    """What read_checkpoint gives -> Run in evaluation mode."""
    from transformers import BertConfig, BertModel

    with refusing(state["path"]):
        args = checked_options(state["args"], state["findings"])
        fields = json.loads(state["bert"])
        fields = {name: fields[name] for name in BERT_FIELDS if name in fields}
        if not max(fields.get("num_hidden_layers", 0), *args.swin_depths) <= len(state["model"]):
            raise ValueError("a tower has more layers than there are weights")
        if args.image_size > data.SIDE:
            raise ValueError(f"its images have {args.image_size} pixels a side")
        config = BertConfig(**fields, attn_implementation="sdpa")
        bert = BertModel(config, add_pooling_layer=False)
        model = build_model(args, bert, len(state["model"].get("prompt.context", ())))
        model.load_state_dict(state["model"])
        tokenizer = wrap_tokenizer(state["tokenizer"])
        if max(tokenizer.get_vocab().values()) >= bert.config.vocab_size:
            raise ValueError("its tokenizer has more pieces than its text model")
        if not finite(model):
            raise ValueError("its weights are not finite")
        run = Run(model.eval(), tokenizer, state["findings"], args)
    run.model.to(device)
    return run


def load_run(path, device="cpu"):
    """RUN, RUN/best.pt or RUN/last.pt -> Run in evaluation mode; needs no text model and no network."""
    return run_from_checkpoint(read_checkpoint(run_file(path)), device)


def resolve_machine(args):
    """Fills in --device and --precision auto, sets the CPU's matrix products -> torch.device of a process."""
    if args.device == "auto":
        found = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
        args.device = (found + ["cpu"])[0]
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    # The oldest version of torch supported has no public question for these.
    avx512, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    if args.precision == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if cuda or device.type == "cpu" and (avx512 or amx) else "fp32"
    if device.type == "cpu" and avx512 and not amx:
        # oneDNN's products: up to 1.9 times as fast as MKL's on AMD's processors; with AMX they would be bf16
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)  # the CPU's, too: its backward pass is slow in bf16
    return device


# ------------------------------------------------------------------------------------------------ features


class Encoded(NamedTuple):
    """Features of N records, R of them with a report, and what is known of C findings."""

    records: list
    findings: list
    image_features: np.ndarray  # (N, D) float32, unit length
    report_features: np.ndarray  # (R, D) float32, unit length
    report_rows: np.ndarray  # (R,) int, the record of each report
    present: np.ndarray  # (N, C) bool
    absent: np.ndarray  # (N, C) bool
    pooled: np.ndarray  # (N, F) float32, the image tower's features before the projection
    pixels: np.ndarray  # (N, 256) float32 of a grey image, shrunk to 16 x 16

    @property
    def patients(self):
        """(N,) int, whose image it is."""
        return numbered((record.source, record.patient) for record in self.records)


def numbered(names):
    """Names -> (N,) int64, one number for each different name, in order of appearance."""
    number = {}
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)


@torch.no_grad()
def encode(run, records):
    """Records -> Encoded, in their order; the findings are those that are present at least once."""
    run.model.eval()
    findings = data.vocabulary(records)
    transform = data.evaluation_transform(run.args.image_size)
    images = data.Images(records, transform, run.args.channels)
    collate = data.Collate(records, findings, None, run.tokenizer, run.args.max_length)
    batch_bytes = run.batch_size * run.args.channels * run.args.image_size**2
    options = {"batch_size": run.batch_size, "collate_fn": collate}
    loader = data.loader(images, run.args.workers, batch_bytes, **options)
    pooled, pixels, image_features, report_features, report_rows = ([] for _ in range(5))
    for batch in progress(data.readable(loader), "images and reports", total=len(loader), unit="batch"):
        report_rows.append(batch.rows[batch.report_pairs.images])
        batch = data.to_device(batch, run.device)
        with run.autocast():
            features = run.model.image_encoder(data.normalise(batch.images))
            image_features.append(run.model.project_image(features))
            pooled.append(features.float().cpu())
            pixels.append(torch.nn.functional.adaptive_avg_pool2d(batch.images.float(), 16).flatten(1).cpu())
            report_features += [run.model.encode_text(*piece) for piece in batch.reports]
    order = torch.cat(report_rows).argsort()  # Collate sorts the reports of a batch by length
    return Encoded(
        records,
        findings,
        finite_features(image_features),
        finite_features(report_features or [torch.zeros(0, 1)])[order.numpy()],
        torch.cat(report_rows)[order].numpy(),
        *(labels.numpy() for labels in data.label_matrices(records, findings)),
        *(torch.cat(parts).numpy() for parts in (pooled, pixels)),
    )


def finite_features(parts):
    """[(n, D) tensor, ...] -> (N, D) float32 array."""
    features = torch.cat(parts).cpu()
    if not features.isfinite().all():
        raise BadInput("the model is broken: its features are not finite; train it again with a lower --lr")
    return features.numpy()


TRAINED = object()  # the run's own continuous prompt


@torch.no_grad()
def encode_texts(run, texts, as_prompts=False, prompt=TRAINED):
    """Reports, or label prompts with a continuous prompt put in, its own or another -> (T, D) float32."""
    run.model.eval()
    report_tokens = partial(data.tokenize, run.tokenizer, max_length=run.args.max_length)
    tokens_of = run.prompt_tokens if as_prompts else report_tokens
    vectors = (run.model.prompt if prompt is TRAINED else prompt) if as_prompts else None
    encode_part = partial(run.model.encode_text, prompt=vectors)
    features = []
    for i in range(0, len(texts), run.batch_size):
        tokens = data.to_device(tokens_of(texts[i : i + run.batch_size]), run.device)
        with run.autocast():
            features.append(encode_part(*tokens))
    return finite_features(features)


def encode_images(run, images):
    """A path, or a list of paths, Pillow images, (H, W) or (H, W, 3) uint8 arrays -> (N, D) float32."""
    images, records = [images] if isinstance(images, (str, Path)) else images, []
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            image = np.asarray(data.upright(image, run.args.channels))
        if not isinstance(image, np.ndarray):
            image = Path(image)
        elif image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
            what = f"{image.shape} {image.dtype}"
            raise BadInput(f"an image as array is (H, W) or (H, W, 3) uint8, not {what}")
        records.append(data.Record(image, None, {}, str(i), "images"))
    return encode(run, records).image_features


@torch.no_grad()
def image_scores(run, image, texts, combine):
    """Scores of one image, and of each cell of the image tower's last map by itself (see COMBINE).

    image: what data.read_image gives. texts: [(T, D) for each of C classes].
    -> (C,) and (S, S, C) float32
    """
    pixels = data.evaluation_transform(run.args.image_size)(image)[None].to(run.device)
    with run.autocast():
        cells = run.model.image_encoder.cells(data.normalise(pixels))
        features = run.model.project_image(torch.cat([cells.mean(1), cells[0]]))
    whole, *of_cells = combined(finite_features([features]), texts, combine)
    side = math.isqrt(len(of_cells))
    return whole, np.reshape(of_cells, (side, side, -1))


def note_untrained(run, findings):
    """Says of which findings the run saw no label."""
    new = [name for name in findings if name not in run.findings]
    if new:
        data.note(f"training had no label {', '.join(new)}")


def encode_prompts(run, findings):
    """The prompt of each finding as in training -> (C, D) float32, unit length."""
    note_untrained(run, findings)
    texts = [prompts.label_prompt(finding, run.args.template) for finding in findings]
    return encode_texts(run, texts, as_prompts=True)


def token_lists(run, texts):
    """{finding: [prompt, ...]} -> a list of the prompts' tokens, as they are cut, for each finding."""
    tokens = map(run.prompt_tokens, texts.values())
    return [[row[mask.bool()].tolist() for row, mask in zip(*each, strict=True)] for each in tokens]


def refuse_equal_prompts(run, texts):
    """Refuses {finding: [prompt, ...]} of which two are the same to the run; notes prompts that are cut."""
    tokens = dict(zip(texts, token_lists(run, texts), strict=True))
    longest = run.prompt_tokens([text for each in texts.values() for text in each]).input_ids.shape[1]
    whole = data.tokenize(run.tokenizer, [text for each in texts.values() for text in each], None)
    cut = int((whole.attention_mask.sum(1) > longest).sum())
    if cut:
        data.note(f"{cut} of {len(whole.input_ids)} prompts are longer than {longest} tokens and are cut")
    for name, other in itertools.combinations(texts, 2):
        if sorted(tokens[name]) == sorted(tokens[other]):
            raise BadInput(f"the prompts of {name!r} and {other!r} are the same to this run; word them apart")


def encode_findings(run, texts):
    """{finding: [prompt, ...]} -> [(T, D) float32 for each finding]."""
    features = encode_texts(run, [text for each in texts.values() for text in each], as_prompts=True)
    return np.split(features, np.cumsum([len(each) for each in texts.values()])[:-1])


# ------------------------------------------------------------------------------------------------ pictures

FONT = ImageFont.load_default(13)


def gallery(encoded, path, rows=4, columns=3, side=224):
    """Draws random query images beside their nearest reports; a green frame: exactly the same findings.

    Of equal reports the first alone is shown, or the query's own.
    """
    if not len(encoded.report_features):
        raise BadInput("a gallery needs reports, and these data have none")
    images, labels = encoded.image_features[encoded.report_rows], encoded.present[encoded.report_rows]
    records = [encoded.records[row] for row in encoded.report_rows]
    text_of = numbered(" ".join(record.report.split()) for record in records)
    queries = np.random.default_rng(0).permutation(len(images))[:rows]
    width, height, title = side + 8, side + 30, 22  # of a tile, and of the line above its image
    picture = Image.new("RGB", ((1 + columns) * width, len(queries) * height), "white")
    draw = ImageDraw.Draw(picture)
    for top, query in zip(range(0, picture.height, height), queries, strict=True):
        view = data.evaluation_transform(side)(data.read_image(records[query].image, 3))
        picture.paste(data.to_pillow(view), (0, top + title))
        draw.text((4, top + 4), ", ".join(sorted(data.present(records[query])))[:32], "black", FONT)
        nearest = (-(images[query] @ encoded.report_features.T)).argsort(kind="stable")
        first = {text_of[query]: query}  # a report of each text
        nearest = [near for near in nearest if first.setdefault(text_of[near], near) == near]
        for rank, near in enumerate(nearest[:columns], 1):
            match, left = (labels[near] == labels[query]).all() and labels[query].any(), rank * width
            own = ", its own report" if near == query else ""
            lines = [f"{rank}. {'match' if match else 'no match'}{own}"]
            text = f"[{', '.join(sorted(data.present(records[near])))}] {records[near].report}"
            lines += textwrap.wrap(text, 30)[:12]
            frame = left, top, left + side, top + title + side
            draw.rectangle(frame, outline="green" if match else "red", width=3)
            draw.multiline_text((left + 8, top + 6), "\n".join(lines), "black", FONT)
    save_picture(picture, path)


HEAT = 0.5  # cosine of the strongest colour: one scale for all maps, so that any two can be compared
HOT, COLD = np.array((210, 0, 0)), np.array((0, 60, 230))
NO_EXPLANATION = "The cosine of each cell with the prompt. Cells know of each other: a map is no explanation."


def heated(pixels, scores):
    """Lays red over what is near and blue over what is far: (H, W, 3), (H, W) -> (H, W, 3) uint8."""
    strength = 0.7 * np.minimum(np.abs(scores) / HEAT, 1)[..., None]
    return (pixels * (1 - strength) + np.where(scores[..., None] > 0, HOT, COLD) * strength).astype(np.uint8)


def heatmaps(classes, found, path, side=224):
    """Draws images beside the scores of their cells for each class, with one scale for all.

    found: [(path of an image, (C,) scores, (S, S, C) scores of its cells), ...], see image_scores.
    """
    width, height, title, foot = side + 8, side + 48, 40, 48  # of a tile, of the line above it, of the scale
    size = max(1 + len(classes), 3) * width, foot + len(found) * height + foot
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for top, (name, scores, cells) in zip(range(foot, picture.height, height), found, strict=False):
        view = data.to_pillow(data.evaluation_transform(side)(data.read_image(name, 3)))
        draw.text((4, top + 4), ending(Path(name).name, 28), "black", FONT)
        picture.paste(view, (4, top + title))
        for i, finding in enumerate(classes):
            left = 4 + (1 + i) * width
            draw.text((left, top + 4), f"{finding[:28]}\n{scores[i]:+.3f}", "black", FONT)
            smooth = Image.fromarray(np.float32(cells[..., i])).resize(
                (side, side), Image.Resampling.BILINEAR
            )
            drawn = heated(np.asarray(view), np.asarray(smooth))
            picture.paste(Image.fromarray(drawn), (left, top + title))
    draw.text((4, 6), textwrap.fill(NO_EXPLANATION, picture.width // 8), "black", FONT)
    scale = np.linspace(-HEAT, HEAT, 2 * side)[None].repeat(14, 0)
    picture.paste(Image.fromarray(heated(np.full((*scale.shape, 3), 128), scale)), (24, picture.height - 40))
    for i, value in enumerate((-HEAT, 0, HEAT)):
        draw.text((24 + i * side, picture.height - 22), f"{value:+g}" if value else "0", "black", FONT, "ma")
    save_picture(picture, path)


COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22".split()


def ticks(low, high, most=5):
    """Round numbers from low to high, at most so many and at least one -> list of float."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if high - low < factor * step * most)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def read_log(folder):
    """RUN/log.jsonl -> {quantity: [(step, value or None), ...]}, losses and what validation says."""
    path, curves = Path(folder, "log.jsonl"), {}
    data.refuse_no_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):  # a run that is going on may be writing the last one
                line = json.loads(line)
                for name, value in line.items():
                    if name.startswith("loss") or ("loss" not in line and name not in ("step", "epoch")):
                        curves.setdefault(name, []).append((line["step"] + 0, value and value + 0.0))
    except OSError as error:
        raise BadInput(f"{path} cannot be read; --curves takes folders of runs of train.py") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is no log of train.py ({error!r})") from error
    if not curves:
        raise BadInput(f"{path} has no step yet")
    return curves


def draw_curves(runs, path, side=300, columns=3):
    """Draws losses and validation scores over steps, a panel each, several runs in one picture.

    runs: {label: {quantity: [(step, value or None), ...]}}; None, a value that was not finite, leaves a gap.
    """
    panels = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    columns, width, height = min(columns, len(panels)), side + 70, side + 60
    rows, legend = math.ceil(len(panels) / columns), 16 + 20 * len(runs)
    picture = Image.new("RGB", (max(columns * width, 400), legend + rows * height), "white")
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(runs):
        draw.line((10, 18 + 20 * i, 40, 18 + 20 * i), COLOURS[i % len(COLOURS)], 3)
        draw.text((48, 18 + 20 * i), ending(label, picture.width // 8 - 6), "black", FONT, "lm")
    for i, name in enumerate(panels):
        left, top = i % columns * width + 60, legend + i // columns * height + 24
        curves = [curves.get(name, []) for curves in runs.values()]
        known = [value for curve in curves for _, value in curve if value is not None] or [0]
        low, high = min(known), max(known)
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
        steps = max(step for curve in curves for step, _ in curve)

        def place(step, value, left=left, top=top, low=low, high=high, steps=steps):
            return left + side * step / max(1, steps), top + side * (high - value) / (high - low)

        draw.text((left, top - 5), f"{name} by step", "black", FONT, "ls")
        draw.rectangle((left, top, left + side, top + side), outline="grey")
        for value in ticks(low, high):
            y = place(0, value)[1]
            draw.line((left, y, left + side, y), "lightgrey")
            draw.text((left - 5, y), f"{value:.4g}", "black", FONT, "rm")
        for step in ticks(0, max(1, steps), 4):
            x = place(step, low)[0]
            draw.line((x, top + side, x, top + side + 4), "grey")
            draw.text((x, top + side + 7), f"{step:,.0f}", "black", FONT, "ma")
        for colour, curve in zip(itertools.cycle(COLOURS), curves, strict=False):
            for finite, part in itertools.groupby(curve, lambda point: point[1] is not None):
                points = [place(*point) for point in part] if finite else []
                draw.line(points, colour, 2, "curve")
                if len(curve) < 50:
                    for x, y in points:
                        draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    save_picture(picture, path)


def forest_plot(rows, path, side=260, columns=3):
    """Draws values with their intervals, a row a group and a panel a metric, red where one leaves out 0.

    rows: [(label, {metric: (value, low, high)}), ...]; a metric that a row lacks stays empty.
    """
    panels = list(dict.fromkeys(metric for _, values in rows for metric in values))
    name = max([80, *(round(FONT.getlength(label)) + 1 for label, _ in rows)]) + 16
    width, height, title = side + 40, 40, 34
    band = title + len(rows) * height + 34
    bands = math.ceil(len(panels) / columns)
    picture = Image.new("RGB", (name + min(columns, len(panels)) * width, bands * band), "white")
    draw = ImageDraw.Draw(picture)
    for i, metric in enumerate(panels):
        left, top = name + i % columns * width, title + i // columns * band
        bottom = top + len(rows) * height
        ends = [0, *(end for _, values in rows for end in values.get(metric, ()))]
        low, high = min(ends), max(ends)
        margin = (high - low) * 0.05 or 0.5
        low, high = low - margin, high + margin

        def across(value, left=left, low=low, high=high):
            return left + side * (value - low) / (high - low)

        draw.text((left, top - 8), ending(metric, side // 7), "black", FONT, "ls")
        draw.rectangle((left, top, left + side, bottom), outline="grey")
        for value in ticks(low, high, 4):
            draw.line((across(value), bottom, across(value), bottom + 4), "grey")
            draw.text((across(value), bottom + 7), f"{value:+.3g}" if value else "0", "black", FONT, "ma")
        draw.line((across(0), top, across(0), bottom), "grey", 2)
        for row, (label, values) in enumerate(rows):
            if i % columns == 0:
                draw.text((8, top + (row + 0.6) * height), label, "black", FONT, "lm")
            if metric in values:
                value, begin, end = map(float, values[metric])
                y = top + (row + 0.65) * height
                colour = COLOURS[0] if begin <= 0 <= end else COLOURS[1]
                draw.line((across(begin), y, across(end), y), colour, 2)
                for each in (begin, end):
                    draw.line((across(each), y - 4, across(each), y + 4), colour, 2)
                draw.ellipse((across(value) - 4, y - 4, across(value) + 4, y + 4), colour)
                middle = min(max(across(value), left + 26), left + side - 26)
                draw.text(
                    (middle, y - 8), f"{value:+.3f}", "black", FONT, "ms", stroke_width=2, stroke_fill="white"
                )
    save_picture(picture, path)


def ending(name, most):
    """A name, or its last characters where it has more than so many; of runs they tell them apart."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def save_picture(picture, path):
    with data.replacing(path, "xb") as file:
        picture.save(file, format="PNG")


# ------------------------------------------------------------------------------------------------- program


def read_results(path):
    """A file of results -> dict, empty where there is none."""
    data.refuse_no_file(path)
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        if not all("metrics" in entry for entry in entries.values()):
            raise ValueError("an entry has no metrics")
        return entries
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} holds no results ({error}); move it away") from error


def newest_checkpoint():
    """The best checkpoint of the run that was written last -> path."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BadInput("no run is under runs/ yet: `python train.py` makes one, --checkpoint names another")
    return found[-1]


def rows_shown(task, metrics, all_metrics):
    """Names of the metrics for the screen."""
    return [name for name in metrics if name in MAIN_ROWS.get(task, ()) and not all_metrics] or list(metrics)


def print_table(task, entries, all_metrics):
    """{metric: entry} of a task, and a warning where zero-shot is worse than a blind guess."""
    rows = rows_shown(task, entries, all_metrics)
    width, counted = max([34, *map(len, rows)]), any("positives" in entries[name] for name in rows)
    head = f"\n{task:{width}}{'value':>8}{'95 % interval':>21}{'chance':>8}{'constant':>10}{'n':>7}"
    print(head + f"{'positives':>11}" * counted)
    for name in rows:
        entry = entries[name]
        bounds = "-" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"
        blind, constant = (f"{entry[k]:.3f}" if k in entry else "" for k in ("chance", "constant"))
        line = f"{name:{width}}{entry['value']:8.3f}{bounds:>21}{blind:>8}{constant:>10}{entry['n']:7}"
        print(line + (f"{entry['positives']:11}" if "positives" in entry else ""))
    if any(entries[name]["low"] is None for name in rows):
        print(f"-: no interval of fewer than {FEWEST} positives or negatives")
    if counted and any(name.endswith(" mean") for name in rows):
        print("positives of a mean: those of its rarest finding")
    if len(rows) < len(entries):
        print(f"({len(entries) - len(rows)} more with --all-metrics)")
    for name, entry in entries.items():
        below = entry["high"] is not None and entry["high"] < 0.5
        if task == "zero-shot" and name.startswith("AUROC") and below:
            print(f"warning: {name} is below 0.5: do its prompts and labels mean the same?")


def print_confusion(confusion):
    """{true class: {predicted class: images}}, a row for each true class."""
    width = max([5, *map(len, confusion)])
    for number, (name, row) in enumerate(confusion.items(), 1):
        if number == 1:
            columns = "".join(f"{each:>7}" for each in range(1, len(row) + 1))
            print(f"\n{'true class, and the images predicted to be of each':{width + 4}}")
            print(f"{'':{width + 4}}{columns}")
        print(f"{number:>2}  {name:{width}}" + "".join(f"{count:7,}" for count in row.values()))


def records_sha256(records):
    """SHA-256 of the ids and what is known of each, in any order, and of the reports -> two str."""
    known = ((r, sorted(data.present(r)), sorted(data.absent(r))) for r in records)
    lines = ["\t".join([r.source, r.id or r.patient, *has, "-", *lacks]) for r, has, lacks in known]
    return data.ids_sha256(sorted(lines)), data.ids_sha256(sorted(r.report or "" for r in records))


def commit():
    """The commit of this program -> str, "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# What stands in the place of the tasks, and the options that mean something beside it.
INSTEAD = {"images": "checkpoint classes prompt_set combine out heatmap device threads", "curves": "out"}


# fmt: off
def build_parser():
    positive = number_type(int, 1)
    p = Parser(description="Evaluate a run of train.py.", allow_abbrev=False)
    p.add_argument("--task", nargs="+", choices=[*TASKS, "all"], default=["zero-shot", "retrieval"])
    p.add_argument("--checkpoint", help="RUN or RUN/best.pt; default the newest run's best")
    p.add_argument("--compare", nargs="+", metavar="RUN", help="several, side by side on the same records")
    p.add_argument("--images", nargs="+", metavar="FILE", type=data.text,
                   help="scores of your own images, or of all below folders, in place of the tasks")
    p.add_argument("--plot", metavar="FILE.png", help="draw the differences of --compare to its first group")
    p.add_argument("--curves", nargs="+", metavar="RUN",
                   help="draw losses and validation scores into --out FILE.png, in place of the tasks")
    p.add_argument("--data", nargs="+", metavar="NAME[=ROOT]", help="default: what the run was trained on")
    p.add_argument("--split", choices=[*data.SPLITS, "all"], help="default test; valid where there is none")
    p.add_argument("--limit", type=positive, help="only N records of each data set, by a fixed shuffle")
    p.add_argument("--ids", metavar="FILE", help="exactly the images of this list of `data.py protocol`")
    p.add_argument("--classes", nargs="+", metavar="NAME", type=data.text,
                   help='findings to tell apart by prompts, such as COVID-19 "No Finding"; default those of '
                        "--findings in training, or all of the data")
    s = p.add_mutually_exclusive_group()
    s.add_argument("--prompt-set", choices=[*prompts.TEMPLATES, "ensemble"],
                   help="zero-shot prompts; default the trained template; ensemble: every wording in each")
    s.add_argument("--prompts", type=data.text, dest="prompt_set", metavar="FILE.json",
                   help="or your own, {finding: [text, ...]}; see evaluate.py::read_prompts")
    p.add_argument("--combine", choices=COMBINE, default="mean-embedding", help="several prompts of a class")
    p.add_argument("--sentences", type=positive, metavar="K",
                   help="retrieve among K sentences of each finding, drawn from the reports that the run was "
                        "trained on, instead of the images' reports")
    p.add_argument("--fractions", type=number_type(float, 0.001, 100), nargs="+", default=(1, 10, 100),
                   metavar="PERCENT", help="of the training patients, for linear-probe")
    p.add_argument("--repeats", type=positive, default=5, help="draws of patients for each of them but 100")
    p.add_argument("--out", metavar="FILE",
                   help="results, default RUN/results.json; or FILE.csv: of --images the "
                   "scores, of --task zero-shot alone scores and labels, of --compare all metrics")
    p.add_argument("--all-metrics", action="store_true", help="print all rows, not the main ones alone")
    p.add_argument("--heatmap", metavar="FILE.png", help="draw the scores of the cells of --images over them")
    p.add_argument("--gallery", metavar="FILE.png", help="draw images and the reports that they retrieve")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--threads", type=number_type(int, 1, 1024), help="on the CPU; default as in training")
    return p
# fmt: on


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for mode, options in INSTEAD.items():
        for name in given if getattr(args, mode) else ():
            if name not in (mode, *options.split()):
                parser.error(f"--{mode} does not go with --{name.replace('_', '-')}")
    if args.compare and (args.checkpoint or args.gallery):
        parser.error("--compare does not go with --checkpoint or --gallery")
    for option, needed in (("heatmap", "images"), ("plot", "compare")):
        if getattr(args, option) and not getattr(args, needed):
            parser.error(f"--{option} needs --{needed}")
    if args.curves and not args.out:
        parser.error("--curves needs --out FILE.png")
    table = args.compare or args.task == ["zero-shot"]
    results = (".json", ".csv") if table else (".json",)
    results = (".png",) if args.curves else (".csv",) if args.images else results
    for file, endings in (
        (args.out, results),
        (args.gallery, (".png",)),
        (args.heatmap, (".png",)),
        (args.plot, (".png",)),
    ):
        if file and not file.lower().endswith(endings):
            parser.error(f"{file}: the name of this file has to end in {' or '.join(endings)}")
    return args


def load_split(args, run, specs, split):
    """The records of a split of these data sets, read as the run read its own."""
    chosen = {name: getattr(run.args, name) for name in ("views", "uncertain", "section")}
    return data.load_records(specs, split, args.limit, **chosen)


def evaluated_split(args, run):
    """The records of --split and its name; without --split of test, or of valid where there is no test."""
    try:
        split = args.split or "test"
        return load_split(args, run, args.data, split), f"{split} split"
    except Lacking:
        if args.split:
            raise
    records = load_split(args, run, args.data, "valid")
    data.note("these data have no test split; the valid split is used, by which training has chosen best.pt")
    return records, "valid split"


def result_of(task, args, run, encoded, checkpoint, chosen, measures, options):
    """-> (name, entry) of a task for results.json; what can change the result is in the name."""
    labels, reports = records_sha256(encoded.records)
    labelled = int(encoded.present.any(1).sum())
    bar = progress(measures.items(), "intervals", delay=1)
    entry = {
        "task": task,
        "options": options,
        "data": args.data,
        "chosen": chosen,
        "checkpoint": str(checkpoint),
        "counts": {"images": len(encoded.records), "reports": len(encoded.report_rows), "labelled": labelled},
        "fingerprint": {"labels": labels, "reports": reports},
        "seed": run.args.seed,
        "commit": commit(),
        "versions": {name: version(name) for name in ("numpy", "torch", "torchvision", "transformers")},
        "metrics": {metric: entry_of(measure) for metric, measure in bar},
    }
    if "prompt_set" in options:
        classes = options.get("classes") or encoded.findings
        entry["prompts"] = read_prompts(options["prompt_set"], classes)
        entry["not trained"] = [each for each in classes if each not in run.findings]
    parts = [task, str(checkpoint), f"{chosen} of {', '.join(args.data)}"]
    parts += [f"first {args.limit}"] if args.limit else []
    parts += [f"{k} {v}" for k, v in options.items()]
    return ", ".join(parts), entry


def settings(run):
    """{option: value} of what can change a result, commit included, seed excepted."""
    apart = {"out", "resume", "seed", *MACHINE_OPTIONS}
    return {name: value for name, value in vars(run.args).items() if name not in apart and value is not None}


def groups_by_flags(runs):
    """[{seed: number of the run}, ...]: runs that differ in the seed alone are one group."""
    groups = []
    for i, run in enumerate(runs):
        for group in groups:
            alike = settings(run) == settings(runs[min(group.values())])
            if alike and run.args.seed not in group:  # two checkpoints of one run are two groups
                group[run.args.seed] = i
                break
        else:
            groups.append({run.args.seed: i})
    return groups


def t_p(t, freedom):
    """Two-sided p of Student's t with whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle, odd = math.atan2(abs(t), math.sqrt(freedom)), freedom % 2
    term = total = math.cos(angle) ** odd if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def t_test(differences):
    """Two-sided p of no difference, from the differences of paired seeds -> float, nan of one."""
    n, mean = len(differences), np.mean(differences)
    error = np.std(differences, ddof=1) / n**0.5 if n > 1 else math.nan
    return t_p(mean / error, n - 1) if error else float(mean == 0)


def holm(p):
    """p of several tests corrected for their number (Holm, 1979): {name: p} -> {name: p}."""
    corrected, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        corrected[name] = least = max(least, min(1.0, (len(p) - rank) * p[name]))
    return {name: corrected[name] for name in p}


def half_width(values, further=False):
    """Half the width of the 95 % interval of the mean of several seeds, or of one further seed's value."""
    low, high = 0.0, 1000.0
    while high - low > 1e-9 * high:
        t = (low + high) / 2
        low, high = (t, high) if t_p(t, len(values) - 1) > 0.05 else (low, t)
    return high * np.std(values, ddof=1) * (1 / len(values) + further) ** 0.5


def mean_over_seeds(values):
    """The mean, and of several values half the width of its 95 % interval -> str."""
    return f"{np.mean(values):.3f}" + (f" ± {half_width(values):.3f}" if len(values) > 1 else "")


def seeds_difference(first, group):
    """The second group's values less the first's, {seed: Measure} each, by runs of the same seed.

    -> (value, low, high), None without a seed that both have

    All seeds have the same test patients, so these are drawn once for all; of several seeds, the widths over
    patients and over seeds add up as those of independent errors.
    """
    pairs = [(first[seed], group[seed]) for seed in group if seed in first]
    if not pairs:
        return None
    values = [other.value - one.value for one, other in pairs]
    value, low, high = difference(pairs)
    if len(pairs) > 1:
        half = half_width(values)
        low, high = value - math.hypot(value - low, half), value + math.hypot(high - value, half)
    return value, low, high


def differing(flags):
    """Options in which groups or runs differ, of {option: value} of each -> names."""
    names = dict.fromkeys(name for each in flags for name in each)
    return [name for name in names if any(each.get(name) != flags[0].get(name) for each in flags)]


def print_comparison(paths, runs, results, all_metrics):
    """Groups of runs that differ in the seed alone, side by side, and each group's difference to the first.

    all_metrics: list the value of each seed, too, and where 95 % of further seeds should lie.
    results: [{task: {metric: Measure}} of each run]

    -> the differences as forest_plot draws them
    """
    groups = groups_by_flags(runs)
    print()
    for i, group in enumerate(groups, 1):
        print(f"{i}: {', '.join(str(paths[run]) for run in group.values())}")
    flags = [settings(runs[min(group.values())]) for group in groups]
    rows = [(f"{i}: {flags_told(flags[0], each)}", {}) for i, each in enumerate(flags[1:], 2)]
    for name in differing(flags):
        print(f"  --{name.replace('_', '-')}: " + " | ".join(str(each.get(name)) for each in flags))
    numbers = range(1, len(groups) + 1)
    lines = {"": [f"{i:>18}" for i in numbers] + [f"{f'{i} less 1':>28}" for i in numbers[1:]]}
    for task, measures in results[0].items():
        for metric in rows_shown(task, measures, all_metrics):
            if all(metric in each.get(task, ()) for each in results):
                of = [{seed: results[i][task][metric] for seed, i in group.items()} for group in groups]
                cells = [f"{mean_over_seeds([each.value for each in group.values()]):>18}" for group in of]
                for group, (_, differences) in zip(of[1:], rows, strict=True):
                    found = seeds_difference(of[0], group)
                    cells.append(f"{'{:+.3f} ({:+.3f} to {:+.3f})'.format(*found) if found else '':>28}")
                    if found:
                        differences[f"{task} {metric}"] = found
                lines[f"{task}  {metric}"] = cells
                for number, values in enumerate(of if all_metrics else [], 1):
                    told = [f"seed {seed} {values[seed].value:.3f}" for seed in sorted(values)]
                    seeds = [measure.value for measure in values.values()]
                    if len(seeds) > 1:
                        mean, half = np.mean(seeds), half_width(seeds, further=True)
                        told.append(f"a further seed {mean - half:.3f} to {mean + half:.3f}")
                    lines[f"{task}  {metric}  {number}"] = ["  " + ", ".join(told)]
    for name, cells in lines.items():
        print(f"{name:{max(map(len, lines))}}" + "".join(cells))
    if any(len(group) > 1 for group in groups):
        print("±: 95 % over the seeds, of these test patients")
    shared = [len(groups[0].keys() & group.keys()) for group in groups[1:]]
    if 1 in shared:
        print("one seed each: the interval is over test patients alone; other seeds may differ by more")
    if any(number > 1 for number in shared):
        print("several seeds each: the interval of a difference is over seeds and test patients")
    return rows


def flags_told(first, flags):
    """What another group has that the first has not, {option: value} each -> str."""
    names = [name for name in differing([first, flags]) if name != "commit"]
    told = [f"--{name.replace('_', '-')} {flags.get(name)}" for name in names]
    return ending(", ".join(told) or "another commit or checkpoint", 60)


def write_comparison(path, paths, runs, entries):
    """Writes a row a run and metric. entries: [{task: entry of results.json} of each run]"""
    names = [name for name in differing([settings(run) for run in runs]) if name != "commit"]
    rows = [
        [file, task, metric, *(found[key] for key in ("value", "low", "high")), run.args.seed]
        + [settings(run).get(name, "") for name in names]
        + [settings(run).get("commit", "")]
        for file, run, of_run in zip(paths, runs, entries, strict=True)
        for task, entry in of_run.items()
        for metric, found in entry["metrics"].items()
    ]
    write_csv(path, ["run", *"task metric value low high seed".split(), *names, "commit"], rows)


def note_seen_patients(path, records):
    """Says how many of the evaluated patients the run was trained on, by RUN/patients.txt."""
    file = path.parent / "patients.txt"
    if file.exists():
        asked = data.patient_hashes(records)
        seen = asked & {line.strip() for _, line in data.read_lines(file)}
        if seen:
            data.note(f"{path} was trained on {len(seen):,} of these {len(asked):,} patients")


def evaluate_run(args, path, out, run, records, chosen):
    """All tasks for one run; each is written, and printed, once it is done.

    -> Encoded, {task: Measures}, {task: entry of results.json}
    """
    data.check_images(records, run.args.image_size, run.args.channels)
    limit = f", first {args.limit}" if args.limit else ""
    print(f"{path}, {chosen} of {', '.join(args.data)}{limit}, {len(records)} images")
    note_seen_patients(path, records)
    if args.ids and data.ids_sha256(data.read_ids(args.ids)) not in run.args.held_out:
        data.note(f"{path} did not hold out the patients of {args.ids}; it may have seen these images")
    note_untrained(run, args.classes or data.vocabulary(records))
    encoded, results, written = encode(run, records), {}, {}

    @functools.cache
    def others(split, *specs):
        return data.hold_out(load_split(args, run, list(specs) or args.data, split), records)

    given = {**vars(args), "prompt_set": args.prompt_set or run.args.template, "others": others}
    given["thresholds"] = others if args.all_metrics else None
    tasks = list(TASKS) if "all" in args.task else list(dict.fromkeys(args.task))
    for task in tasks:
        options = {name: given[name] for name in inspect.signature(TASKS[task]).parameters if name in given}
        try:
            results[task] = TASKS[task](run, encoded, **options)
        except Lacking as error:
            if len(tasks) == 1:
                raise
            print(f"{task} is left out: {error}")
            continue
        told = {name: value for name, value in options.items() if value is not None and not callable(value)}
        name, entry = result_of(task, args, run, encoded, path, chosen, results[task], told)
        written[task] = entry
        entries = read_results(out) | {name: entry}
        with data.replacing(out) as file:
            file.write(json.dumps(entries, indent=1) + "\n")
        if not args.compare:
            print_table(task, entry["metrics"], args.all_metrics)
            if args.all_metrics:
                print_confusion(entry["metrics"].get("balanced accuracy", {}).get("confusion", {}))
    if not results:
        raise BadInput(f"the {chosen} has nothing for any of the tasks")
    return encoded, results, written


def write_scores(path, run, encoded, args):
    """Writes each image's score, and label (1, 0 or blank), of each class, for statistics of one's own."""
    classes, present, absent = chosen_classes(encoded, args.classes)
    texts, _ = read_prompts(args.prompt_set or run.args.template, classes)
    scores = combined(encoded.image_features, encode_findings(run, texts), args.combine)
    labels = np.where(present, "1", np.where(absent, "0", ""))
    header = ["data", "id", *(f"{name} {what}" for what in ("score", "label") for name in classes)]
    ids = ([record.source, record.id or record.patient] for record in encoded.records)
    write_csv(path, header, ([*id, *own, *of] for id, own, of in zip(ids, scores, labels, strict=True)))


def load_runs(paths, args):
    """Checkpoints -> [Run, ...] on the machine that --device and --threads choose."""
    runs = [load_run(path) for path in paths]
    torch.set_num_threads(args.threads or min(runs[0].args.threads, torch.get_num_threads()))
    for run in runs:
        run.args.device = args.device
        run.model.to(resolve_machine(run.args))
    return runs


def write_csv(path, header, rows):
    with data.replacing(path) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def own_classes(args, run):
    """The classes of one's own images: --classes, or those of a file of prompts, or the run's findings."""
    if args.classes:
        return list(dict.fromkeys(args.classes))
    if args.prompt_set and args.prompt_set not in (*prompts.TEMPLATES, "ensemble"):
        return list(read_prompts(args.prompt_set, None)[0])
    if not run.findings:
        raise BadInput("this run was trained without findings; --classes names what to look for")
    return run.findings


def own_paths(names):
    """Files, and all images below folders -> [path, ...], each once."""
    paths = {}
    for name in names:
        below = sorted(data.image_files(name)) if Path(name).is_dir() else [Path(name)]
        if not below:
            raise BadInput(f"the folder {name} has no image; known endings are {', '.join(data.ENDINGS)}")
        paths |= dict.fromkeys(below)
    return list(paths)


def score_own_images(args):
    """--images: the cosine of each image with each class's prompt, on the screen and as a table."""
    path, paths = run_file(args.checkpoint or newest_checkpoint()), own_paths(args.images)
    (run,) = load_runs([path], args)
    classes = own_classes(args, run)
    note_untrained(run, classes)
    texts, _ = read_prompts(args.prompt_set or run.args.template, classes)
    refuse_equal_prompts(run, texts)
    features, rows, cells_of = encode_findings(run, texts), [], {}
    for each in progress(paths, "images", unit="image"):
        try:
            image = data.read_image(each, run.args.channels)
        except BadInput as error:
            rows.append((str(each), None, str(error)))
            continue
        if len(rows) < 3:
            data.note_oddities(each, data.read_image(each, 3), run.args.image_size, run.args.channels)
        scores, cells = image_scores(run, image, features, args.combine)
        rows.append((str(each), scores, ""))
        cells_of[each] = scores, cells
    bad = [error for *_, error in rows if error]
    if len(bad) == len(rows):
        raise BadInput(f"none of {len(rows):,} images can be read, the first because {bad[0]}")
    print_scores(path, classes, rows)
    if args.out:
        cells = ([each, *(["" for _ in classes] if error else scores), error] for each, scores, error in rows)
        write_csv(args.out, ["image", *classes, "error"], cells)
    if args.heatmap:
        if len(cells_of) > MAPPED:
            data.note(f"{args.heatmap} shows the first {MAPPED} of {len(cells_of):,} images")
        heatmaps(classes, [(each, *cells_of[each]) for each in list(cells_of)[:MAPPED]], args.heatmap)
    if args.out or args.heatmap:
        print(f"\nwritten: {', '.join(file for file in (args.out, args.heatmap) if file)}")


MAPPED = 16  # images of a picture of heat maps; more would be tens of thousands of pixels high


def print_scores(path, classes, rows, most=30):
    """Prints [(image, (C,) scores or None, error), ...] as a table, a row's highest score with a star."""
    names = [ending(each, 40) for each, *_ in rows[:most]]
    width = max(map(len, names))
    heads = [textwrap.wrap(name, 11, break_long_words=False) for name in classes]
    widths = [2 + max(6, *map(len, head)) for head in heads]
    print(f"{path}: cosines of images and prompts, from -1 to 1; none is a probability\n")
    for line in range(-max(map(len, heads)), 0):
        cells = (head[line] if -line <= len(head) else "" for head in heads)
        print(" " * width + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    for name, (_, scores, error) in zip(names, rows, strict=False):
        if error:
            print(f"{name:{width}}  {error}")
            continue
        stars = ["*" if score == scores.max() and len(classes) > 1 else "" for score in scores]
        cells = (f"{star}{score:.3f}" for star, score in zip(stars, scores, strict=True))
        print(f"{name:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    if len(rows) > most:
        print(f"({len(rows) - most:,} more with --out FILE.csv)")


def evaluate(args):
    """The tasks for each run, on the same records; then the comparison, or the gallery of the one run."""
    paths = [run_file(path) for path in args.compare or [args.checkpoint or newest_checkpoint()]]
    table = args.out if (args.out or "").lower().endswith(".csv") else None
    outs = [Path(args.out) if args.out and not table else path.parent / "results.json" for path in paths]
    for out in outs:
        read_results(out)  # what is no file of results is refused before anything is computed
    runs = load_runs(paths, args)
    if args.plot and len(groups_by_flags(runs)) == 1:
        raise BadInput("--plot draws differences between groups, and these runs differ in the seed alone")
    args.data = args.data or runs[0].args.data
    if args.ids:
        found = data.read_records(args.data, "all", section=runs[0].args.section)
        known = [record for records in found.values() for record in records]
        listed = data.pick_listed(known, data.read_ids(args.ids), " and ".join(args.data))
        records = [data.settle(record, runs[0].args.uncertain) for record in data.first(args.limit, listed)]
        chosen = f"list {args.ids}"
    else:
        records, chosen = evaluated_split(args, runs[0])
    named = runs[0].args.findings or ()
    if (args.prompt_set or "").endswith(".json"):
        named = read_prompts(args.prompt_set, None)[0]
    args.classes = args.classes or [name for name in data.vocabulary(records) if name in named] or None
    results, entries = [], []
    for path, out, run in zip(paths, outs, runs, strict=True):
        encoded, measures, written = evaluate_run(args, path, out, run, records, chosen)
        results.append(measures)
        entries.append(written)
    if args.compare:
        differences = print_comparison(paths, runs, results, args.all_metrics)
        if args.plot:
            forest_plot(differences, args.plot)
        if table:
            write_comparison(table, paths, runs, entries)
    elif table:
        write_scores(table, runs[0], encoded, args)
    if args.gallery:
        gallery(encoded, args.gallery)
    files = dict.fromkeys(str(file) for file in [*outs, table, args.plot, args.gallery] if file)
    print(f"\nwritten: {', '.join(files)}")


def show_curves(args):
    """--curves: what the logs of runs say, as a picture."""
    draw_curves({str(folder): read_log(folder) for folder in args.curves}, args.out)
    print(f"written: {args.out}")


def run_options(args):
    """Does what the options ask for."""
    (show_curves if args.curves else score_own_images if args.images else evaluate)(args)


def main(argv=None):
    stopped = "the results of finished tasks are written"
    return data.run_program("evaluate.py", lambda: run_options(parse_args(argv)), stopped)


if __name__ == "__main__":
    sys.exit(main())
