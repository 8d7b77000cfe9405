"""Evaluates a trained run, task by task, with intervals and chance levels.

    python evaluate.py                                      zero-shot and retrieval of the newest run
    python evaluate.py --task retrieval --gallery out.png   and a picture of what was retrieved
    python evaluate.py --task linear-probe prompt-sensitivity prompt-words false-negatives
    python evaluate.py --task pointing-game --heatmap out.png
    python evaluate.py --compare runs/umcl runs/umcl-no-label-mask
    python evaluate.py --task zero-shot --data nih-chestxray14=FOLDER covid-chestxray=FOLDER \\
        --classes COVID-19 "No Finding"                     these two against each other

Similarity is the cosine of unit-length features. No score depends on what else is in the test set. Results go
to RUN/results.json, an entry for each task, data set and prompt set; it holds no report.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import data
import prompts
import umcl
from data import BadInput, Lacking, number
from umcl import UMCL, SwinTransformer, TextEncoder

# ------------------------------------------------------------------------------------------------- metrics


def label_sets(*labels):
    """(N, C) bool each -> (N,) int64 each, one number for each set of findings, -1 where none is known."""
    rows = np.concatenate([np.asarray(each, dtype=bool) for each in labels])
    _, number = np.unique(rows, axis=0, return_inverse=True)
    number = torch.from_numpy(np.where(rows.any(1), number.reshape(-1), -1))
    return number.split([len(each) for each in labels])


def shares_at_k(similarity, query_sets, candidate_sets, ks):
    """For each query the share of relevant candidates among its K nearest: P@K before the mean over queries.

    Args:
        similarity: (Q, K) float. query_sets: (Q,) int64, candidate_sets: (K,) int64, as label_sets has them.

    Returns:
        (Q, len(ks)) float
    """
    similarity = torch.as_tensor(similarity)
    count, query_sets = similarity.shape[1], query_sets[:, None]
    if max(ks) > count:
        raise ValueError(f"P@{max(ks)} needs as many candidates, not {count}")
    nearest, where = similarity.topk(min(max(ks) + 1, count))
    relevant = (candidate_sets[where] == query_sets) & (query_sets >= 0)
    shares = []
    for k in ks:
        hits = relevant[:, :k].sum(1)
        tied = nearest[:, k - 1] == nearest[:, k] if k < count else torch.zeros(len(hits), dtype=torch.bool)
        if tied.any():  # of those as near as the K-th the irrelevant come first
            edge = nearest[tied, k - 1 : k]
            rows, columns = (similarity[tied] == edge).nonzero(as_tuple=True)
            sets = query_sets[tied][rows, 0]
            wrong = torch.bincount(rows[(candidate_sets[columns] != sets) | (sets < 0)], minlength=len(edge))
            nearer = nearest[tied] > edge
            hits[tied] = (relevant[tied] & nearer).sum(1) + (k - nearer.sum(1) - wrong).clamp(min=0)
        shares.append(hits.double() / k)
    return torch.stack(shares, 1)


def precision_at_k(similarity, query_labels, candidate_labels, ks=(1, 2, 5, 10)):
    """Class-level Precision@K: P@K = mean over queries of (relevant candidates among the K nearest) / K.

    A candidate is relevant when its findings equal the query's; without findings it is never relevant. Ties
    count against the query. The query's own text stays among the candidates (family: GLoRIA).

    Args:
        similarity: (Q, K) float, larger is nearer. query_labels: (Q, C) bool. candidate_labels: (K, C) bool.

    Returns:
        {k: float in 0 ... 1}

    Raises:
        ValueError: there are fewer candidates than the largest k.
    """
    shares = shares_at_k(similarity, *label_sets(query_labels, candidate_labels), ks)
    return dict(zip(ks, shares.mean(0).tolist(), strict=True))


def own_rank(similarity, query_ids=None, candidate_ids=None):
    """How many candidates of another id are as near to a query as the nearest of its own id, or nearer.

    Args:
        similarity: (Q, K) float. query_ids: (Q,) int64, candidate_ids: (K,) int64, None for the row's and the
            column's number; each query has a candidate of its id.

    Returns:
        (Q,) int64, 0 for a query that finds its own first
    """
    similarity = torch.as_tensor(similarity)
    query_ids = torch.arange(len(similarity)) if query_ids is None else query_ids
    candidate_ids = torch.arange(similarity.shape[1]) if candidate_ids is None else candidate_ids
    rows, columns = (query_ids[:, None] == candidate_ids).nonzero(as_tuple=True)
    own = similarity[rows, columns]
    nearest = similarity.amin(1).scatter_reduce(0, rows, own, "amax")
    as_near = (similarity >= nearest[:, None]).sum(1, dtype=torch.int32)
    return as_near - torch.bincount(rows[own == nearest[rows]], minlength=len(similarity))


def recall_at_k(similarity, ks=(1, 5, 10)):
    """Instance-level Recall@K: the share of queries whose own partner is among their K nearest.

    Ties count against the query. Copies of a text are to be merged before (own_rank's ids), since each
    would be the other's wrong answer.

    Args:
        similarity: (N, N) float, row i belongs to column i.

    Returns:
        {k: float in 0 ... 1}
    """
    rank = own_rank(similarity)
    return {k: (rank < k).double().mean().item() for k in ks}


def over_queries(function, queries, candidates, *of_query, cells=2**24):
    """function(similarity, *of_query), for some queries at a time, put together: (Q, D), (K, D), (Q, ...).

    A piece of the (Q, K) similarities has at most `cells` numbers, 64 MB, so memory does not grow with Q · K.
    """
    rows = max(1, cells // len(candidates))
    pieces = range(0, len(queries), rows)
    cut = ([each[i : i + rows] for each in (queries, *of_query)] for i in pieces)
    return torch.cat([function(part @ candidates.T, *others) for part, *others in cut])


def auroc(scores, labels):
    """Chance that a positive scores higher than a negative, ties counted half.

    Args:
        scores: (N,) float. labels: (N,) bool.

    Returns:
        float in 0 ... 1, nan when a class is absent.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / 2 / len(positive) / len(negative))


def mean_auroc(scores, labels, known):
    """Mean over the columns in which both classes occur, each over its known rows: (N, C) each -> float."""
    columns = zip(scores.T, labels.T, known.T, strict=True)
    values = np.array([auroc(score[rows], label[rows]) for score, label, rows in columns])
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")


def balanced_accuracy(predicted, true):
    """Mean over the classes of `true` of the share of their rows predicted right: two (N,) int -> float."""
    return float(np.mean([(predicted[true == label] == label).mean() for label in np.unique(true)]))


def bootstrap_ci(metric, *arrays, n=1000, seed=0, patients=None):
    """95 % percentile interval of metric(*arrays): n times, rows are drawn with replacement, alike in all.

    patients: (rows,) int, whose row it is. Whole patients are drawn then, since the images of one are alike.

    Returns:
        (low, high)
    """
    rng = np.random.default_rng(seed)
    patients = np.arange(len(arrays[0])) if patients is None else patients
    _, patient, count = np.unique(patients, return_inverse=True, return_counts=True)
    rows_of, values = np.split(patient.argsort(kind="stable"), count.cumsum()[:-1]), []
    for _ in range(n):
        drawn = rng.integers(len(count), size=len(count))
        rows = np.concatenate([rows_of[each] for each in drawn]) if len(count) < len(patient) else drawn
        values.append(metric(*(array[rows] for array in arrays)))
    return tuple(float(v) for v in np.nanpercentile(values, (2.5, 97.5)))


def measured(metric, *arrays, draws, patients=None, chance=None, redraw=None, **counts):
    """One entry of the results: value, interval from `draws` bootstrap draws (0: none), chance, counts.

    patients: see bootstrap_ci. redraw: takes the metric's place in the draws, where more than the rows is
    drawn anew. "of" keeps metric, arrays and patients, whose rows are the images or texts asked about, to
    compare runs by.
    """
    entry = {"value": float(metric(*arrays)), "n": len(arrays[0]), **counts}
    if patients is not None:
        entry["patients"] = len(np.unique(patients))
    if chance is not None:
        entry["chance"] = float(chance)
    if draws:
        entry["low"], entry["high"] = bootstrap_ci(redraw or metric, *arrays, n=draws, patients=patients)
    return entry | {"of": (metric, arrays, patients)}


# ------------------------------------------------------------------------------------- runs and checkpoints

# Options that say where and how a run is computed: they change it by rounding and random numbers at most.
MACHINE_OPTIONS = ("device", "workers", "micro_batch_size", "log_every", "save_every", "skip_bad_images")


class Run(NamedTuple):
    """A model and what it needs to be used: all of it is in the checkpoint."""

    model: UMCL
    tokenizer: PreTrainedTokenizerFast
    findings: list
    args: argparse.Namespace

    @property
    def device(self):
        return self.model.log_scale.device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def prompt_tokens(self, texts):
        """Label prompts -> Tokens, cut so that the continuous prompt still fits into BERT's positions."""
        positions = self.model.text_encoder.bert.config.max_position_embeddings
        room = positions - (len(self.model.prompt.context) if self.model.prompt else 0)
        return data.tokenize(self.tokenizer, texts, min(self.args.max_length, room))


def wrap_tokenizer(tokenizer_json):
    """The text form that a checkpoint holds -> transformers tokenizer."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **special)


def build_model(args, bert):
    """The parts put together; what an ablation takes away is taken away here or in train -> UMCL."""
    try:
        swin = SwinTransformer(
            image_size=args.image_size,
            patch_size=args.patch_size,
            embed_dim=args.swin_dim,
            depths=args.swin_depths,
            num_heads=args.swin_heads,
            window_size=args.window_size,
            drop_path=args.drop_path,
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    positions = bert.config.max_position_embeddings
    if args.max_length > positions:
        raise BadInput(f"--max-length {args.max_length}: the text model has {positions} positions")
    # Without label prompts nothing would train the vectors, and random ones would only disturb zero-shot.
    with_prompt = args.continuous_prompt and args.image_label and args.prompt_length > 0
    prompt = prompts.ContinuousPrompt(args.prompt_length, bert.config.hidden_size) if with_prompt else None
    if with_prompt and positions - args.prompt_length < 8:
        raise BadInput(
            f"--prompt-length {args.prompt_length} leaves no room for text: the text model has "
            f"{positions} positions"
        )
    return UMCL(swin, TextEncoder(bert), prompt, embed_dim=args.embed_dim)


def save_checkpoint(path, run, progress, **more):
    """Writes a whole file beside the old one, then puts it in its place; it holds tensors and plain data."""
    if not all(torch.isfinite(p).all() for p in run.model.parameters()):
        raise BadInput(f"the weights are not finite any more, and {path} is left as it was; try a lower --lr")
    state = {
        "kind": "umcl",
        "model": run.model.state_dict(),
        "args": vars(run.args),
        "findings": run.findings,
        "tokenizer": run.tokenizer.backend_tokenizer.to_str(),
        "bert": run.model.text_encoder.bert.config.to_json_string(),
        "progress": progress,
        **more,
    }
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(state, temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save's own error does not say that the disk is full
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path} cannot be written; is the disk full? ({error})") from error


def sync(path):
    """Has what was written to a file, or the names in a folder, put on the disk: a crash cannot undo it."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def read_checkpoint(path):
    """RUN/best.pt or RUN/last.pt -> dict of tensors and plain data, as save_checkpoint made it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"the checkpoint {path} is not there; `python train.py` makes one") from error
    except Exception as error:  # torch.load has no error of its own for what it cannot read
        raise BadInput(f"the checkpoint {path} is cut short or no checkpoint at all") from error
    if not isinstance(state, dict) or state.get("kind") != "umcl":
        raise BadInput(f"{path} is no checkpoint of this program")
    return state


def load_run(path, device="cpu"):
    """RUN, RUN/best.pt or RUN/last.pt -> Run in evaluation mode; no text model and no network is needed."""
    path = Path(path, "best.pt") if Path(path).is_dir() else Path(path)
    return run_from_checkpoint(read_checkpoint(path), device)


def run_from_checkpoint(state, device):
    args = argparse.Namespace(**state["args"])
    # "_" marks the library's own state, by which older versions would choose another form of attention.
    fields = {name: value for name, value in json.loads(state["bert"]).items() if name[0] != "_"}
    bert = BertModel(BertConfig.from_dict(fields), add_pooling_layer=False)
    model = build_model(args, bert)
    model.load_state_dict(state["model"])
    return Run(model.to(device).eval(), wrap_tokenizer(state["tokenizer"]), state["findings"], args)


def resolve_machine(args):
    """Fills in --device auto and --precision auto -> torch.device, under torchrun that of this process."""
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
    if args.precision == "auto":
        units = {  # torch has no public question for a processor's bf16 units in the oldest version supported
            "cuda": lambda: torch.cuda.is_bf16_supported(),
            "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        }.get(device.type, lambda: False)
        args.precision = "bf16" if units() else "fp32"
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
    pooled: np.ndarray = None  # (N, F) float32, the image tower's features before the projection
    report_labels: np.ndarray = None  # (R, C) bool, what each report stands for in training, see data.Batch

    @property
    def patients(self):
        """(N,) int, whose image it is."""
        return numbered((record.source, record.patient) for record in self.records)


def numbered(names):
    """Names -> (N,) int64, alike where the names are."""
    number = {}
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)


@torch.no_grad()
def encode(run, records, skip_bad_images=0):
    """Records -> Encoded, in their order; up to `skip_bad_images` that cannot be read are left out."""
    run.model.eval()
    findings = data.vocabulary(records)
    loader = torch.utils.data.DataLoader(
        data.Images(records, data.evaluation_transform(run.args.image_size)),
        run.args.batch_size,
        collate_fn=data.Collate(records, findings, None, run.tokenizer, run.args.max_length),
        num_workers=run.args.workers,
    )
    rows, report_rows, report_labels, unreadable = [], [], [], []
    image_features, report_features, pooled = [], [], []
    tap = run.model.image_projection.register_forward_pre_hook(lambda _, x: pooled.append(x[0].float().cpu()))
    with tap:
        for batch in loader:
            unreadable += batch.unreadable
            data.refuse_unreadable(unreadable, skip_bad_images)
            report_rows.append(sum(map(len, rows)) + batch.report_rows)
            report_labels.append(batch.report_labels)
            rows.append(batch.rows)
            batch = data.to_device(batch, run.device)
            with run.autocast():
                if len(batch.rows):
                    image_features.append(run.model.encode_image(data.normalise(batch.images)))
                report_features += [run.model.encode_text(*piece) for piece in batch.reports]
    rows, report_rows = torch.cat(rows), torch.cat(report_rows)
    if not len(rows):
        raise BadInput("none of the images can be read")
    order = report_rows.argsort()
    report_features = torch.cat(report_features or [torch.zeros(0, 1)]).cpu()[order]
    records = [records[row] for row in rows.tolist()]
    return Encoded(
        records,
        findings,
        torch.cat(image_features).cpu().numpy(),
        report_features.numpy(),
        report_rows[order].numpy(),
        *(labels.numpy() for labels in data.label_matrices(records, findings)),
        torch.cat(pooled).numpy(),
        torch.cat(report_labels)[order].numpy(),
    )


@torch.no_grad()
def encode_texts(run, texts, as_prompts=False):
    """Reports, or label prompts with the continuous prompt put in -> (T, D) float32, unit length."""
    features = []
    for i in range(0, len(texts), run.args.batch_size):
        part = texts[i : i + run.args.batch_size]
        reports = data.tokenize(run.tokenizer, part, run.args.max_length) if not as_prompts else None
        tokens = data.to_device(reports or run.prompt_tokens(part), run.device)
        with run.autocast():
            features.append((run.model.encode_prompt if as_prompts else run.model.encode_text)(*tokens))
    return torch.cat(features).cpu().numpy()


def encode_findings(run, texts):
    """{finding: [prompt, ...]} -> [(T, D) float32 for each finding]."""
    features = encode_texts(run, [text for each in texts.values() for text in each], as_prompts=True)
    return np.split(features, np.cumsum([len(each) for each in texts.values()])[:-1])


# --------------------------------------------------------------------------------------------------- tasks


def read_prompts(source, findings):
    """Prompts of the findings' presence and of their absence.

    Args:
        source: name of a set in prompts.py, a template with {}, or FILE.json with {finding: [text, ...]} or
            {finding: {"positive": [text, ...], "negative": [text, ...]}}.

    Returns:
        two {finding: [text, ...]}; the second lacks the findings of which a file has no negative.

    Raises:
        BadInput: the file cannot be used, or has no prompt for a finding.
    """
    if source in (*prompts.TEMPLATES, "ensemble") or "{}" in source:
        return tuple(prompts.prompt_set(findings, source, by) for by in (prompts.wordings, prompts.negations))
    form = 'it needs {finding: [text, ...]} or {finding: {"positive": [...], "negative": [...]}}'
    try:
        table = json.loads(Path(source).read_text(encoding="utf-8"))
        table = {name: {"positive": each} if isinstance(each, list) else each for name, each in table.items()}
        fits = all(
            part in ("positive", "negative")
            and isinstance(texts, list)
            and texts
            and all(isinstance(text, str) for text in texts)
            for each in table.values()
            for part, texts in each.items()
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{source} is no prompt set ({error}); {form}") from error
    if not fits:
        raise BadInput(f"{source} is no prompt set; {form}")
    for name in findings:
        if "positive" not in table.get(name, ()):
            raise BadInput(f"{source} has no prompt for {name!r}; it has {', '.join(table)}, see --classes")
    negative = {name: table[name]["negative"] for name in findings if "negative" in table[name]}
    return {name: table[name]["positive"] for name in findings}, negative


COMBINE = ("mean-embedding", "mean-similarity", "max")


def combined(image_features, prompt_features, combine):
    """Score of each finding for each image: (N, D), [(T, D), ...] of C findings -> (N, C).

    "mean-embedding": cosine with the mean of its prompt features (family: CLIP); "mean-similarity": mean of
    the cosines; "max": the largest (both family: MedCLIP). With one prompt all three are its cosine.
    """
    if combine == "max":
        return np.stack([(image_features @ features.T).max(1) for features in prompt_features], axis=1)
    means = np.stack([features.mean(0) for features in prompt_features])
    if combine == "mean-embedding":
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    return image_features @ means.T


def chosen_classes(encoded, classes):
    """Names, None for all findings of the records -> (names, their columns)."""
    classes = list(dict.fromkeys(classes or encoded.findings))
    unknown = [name for name in classes if name not in encoded.findings]
    if unknown:
        known = ", ".join(encoded.findings) or "no label at all"
        raise BadInput(f"no image of this data has {unknown[0]!r}; it has {known}")
    return classes, [encoded.findings.index(name) for name in classes]


def zero_shot(run, encoded, *, prompt_set=None, combine="mean-embedding", classes=None, draws=1000):
    """Classification by label prompts (paper).

    Accuracy and balanced accuracy over the images with exactly one of the classes, by the highest score.
    AUROC of each finding over the images in which it is known to be present or absent, by its score; "pair
    AUROC" by its score less that of the prompts of its absence (family: CheXzero, whose softmax over the two
    ranks alike). Where a class has several prompts, the other combinations stand beside the one chosen.

    Args:
        prompt_set: see read_prompts; None is the template of training. combine: see combined.
        classes: names; None takes all findings of the records. draws: of the bootstrap; 0 for no interval.

    Returns:
        {metric: entry as measured makes it}; nothing where no two classes can be told apart.
    """
    classes, columns = chosen_classes(encoded, classes)
    if not classes:
        return {}
    present, absent = encoded.present[:, columns], encoded.absent[:, columns]
    positive, negative = read_prompts(prompt_set or run.args.template, classes)
    features = encode_findings(run, positive)
    several = any(len(texts) > 1 for texts in positive.values())

    results = {}
    for way in [combine, *(other for other in COMBINE if several and other != combine)]:
        scores = combined(encoded.image_features, features, way)  # (N, classes)
        each = classification(scores, present, absent, encoded.patients, classes, draws)
        if way == combine:
            results |= each
        else:
            results |= {f"{k}, {way}": each[k] for k in ("accuracy", "AUROC mean") if k in each}
    paired = [i for i, name in enumerate(classes) if name in negative]
    if paired:
        features = [features[i] for i in paired], encode_findings(run, negative)
        scores = np.subtract(*(combined(encoded.image_features, each, combine) for each in features))
        names = [classes[i] for i in paired]
        each = classification(scores, present[:, paired], absent[:, paired], encoded.patients, names, draws)
        results |= {f"pair {k}": entry for k, entry in each.items() if k.startswith("AUROC")}
    return results


def classification(scores, present, absent, patients, names, draws):
    """Accuracies and AUROCs of (N, C) scores against what is present and known to be absent -> entries."""
    results = {}
    single = present.sum(1) == 1
    if single.any() and len(names) > 1:
        true, predicted = present[single].argmax(1), scores[single].argmax(1)
        of = {"chance": 1 / len(names), "draws": draws, "patients": patients[single]}
        results["accuracy"] = measured(np.mean, predicted == true, **of)
        results["balanced accuracy"] = measured(balanced_accuracy, predicted, true, **of)
    known = present | absent
    for column, name in enumerate(names):
        rows = known[:, column]
        labels = present[rows, column]
        if labels.any() and not labels.all():
            of = {"chance": 0.5, "draws": draws, "patients": patients[rows], "positives": int(labels.sum())}
            results[f"AUROC {name}"] = measured(auroc, scores[rows, column], labels, **of)
    if any(metric.startswith("AUROC") for metric in results):
        of = {"chance": 0.5, "draws": draws, "patients": patients}
        results["AUROC mean"] = measured(mean_auroc, scores, present, known, **of)
    return results


def class_sentences(records, findings, count, seed=0):
    """So many sentences of each finding, out of reports of images with exactly that finding.

    A sentence that stands in reports of two findings, such as "The bones are intact.", belongs to neither
    (ours).

    Returns:
        list of K str and their labels, (K, C) bool.
    """
    found = {}
    for record in records:
        if record.report and len(record.findings) == 1:
            for sentence in re.split(r"(?<=[.!?])\s+", record.report.strip()):
                found.setdefault(sentence, set()).update(record.findings)
    rng, texts = np.random.default_rng(seed), []
    for name in findings:
        own = sorted(sentence for sentence, owners in found.items() if owners == {name})
        if len(own) < count:
            raise BadInput(f"--sentences {count}: there are {len(own)} sentences of {name!r} alone")
        texts += rng.choice(own, count, replace=False).tolist()
    return texts, np.eye(len(findings), dtype=bool).repeat(count, 0)


def class_level(images, texts, image_labels, text_labels, patients, draws):
    """P@K both ways of images and texts with known findings: (N, D), (T, D), (N, C), (T, C) -> entries.

    patients: of the images and of the texts, each None or (N,) int; queries are drawn by them.
    """
    sets = label_sets(image_labels, text_labels)
    results, sides = {}, list(zip((images, texts), sets, patients, strict=True))
    for way, (queries, query_sets, of_queries), (candidates, candidate_sets, _) in (
        ("i2t", *sides),
        ("t2i", *reversed(sides)),
    ):
        ks = [k for k in (1, 2, 5, 10) if k <= len(candidates)]
        of_set = torch.bincount(candidate_sets, minlength=int(query_sets.max()) + 1)
        chance = of_set[query_sets].double().mean() / len(candidates)  # that a random candidate is relevant
        precision = partial(shares_at_k, candidate_sets=candidate_sets, ks=ks)
        shares = over_queries(precision, queries, candidates, query_sets)
        for k, share in zip(ks, shares.T.numpy(), strict=True):
            results[f"{way}_P@{k}"] = measured(
                np.mean, share, chance=chance, draws=draws, patients=of_queries, candidates=len(candidates)
            )
    return results


def instance_level(images, texts, text_of_image, patients, draws):
    """R@K and median rank both ways: (N, D), (T, D) of different texts, (N,) int64 -> entries.

    A text that several images have is one candidate; as a query, it looks for any of these images. patients:
    of the images and of the texts, (N,) and (T,) int; queries are drawn by them.
    """
    results, each = {}, torch.arange(len(texts))
    for way, queries, candidates, query_ids, candidate_ids, of_queries in (
        ("i2t", images, texts, text_of_image, each, patients[0]),
        ("t2i", texts, images, each, text_of_image, patients[1]),
    ):
        rank = partial(own_rank, candidate_ids=candidate_ids)
        rank = over_queries(rank, queries, candidates, query_ids).numpy()
        own, count = torch.bincount(candidate_ids)[query_ids].numpy(), len(candidates)
        of = {"draws": draws, "patients": of_queries, "candidates": count}
        for k in (k for k in (1, 5, 10) if k <= count):
            missed = np.prod([np.maximum(count - own - i, 0) / (count - i) for i in range(k)], axis=0)
            results[f"{way}_R@{k}"] = measured(np.mean, rank < k, chance=1 - missed.mean(), **of)
        chance = ((count - own) / (own + 1)).mean() + 1
        results[f"{way}_median rank"] = measured(np.median, rank + 1, chance=chance, **of)
    return results


def retrieval(run, encoded, *, sentences=None, sentences_from=None, split="test", draws=1000):
    """Images and texts, both ways: i2t has images as queries and texts as candidates, t2i the reverse.

    P@K (class level, paper) over the reports with known findings, R@K and median rank (instance level) over
    all, each different report once. K beyond the number of candidates is left out.

    Args:
        sentences: the texts are so many sentences of each finding instead, see class_sentences; the images
            those with exactly one of the findings. There is no instance level then.
        sentences_from: data sets whose reports of this split have the sentences; None is the evaluated ones.

    Returns:
        {"i2t_P@1": entry as measured makes it, ...}; nothing where no record has a report.
    """
    images = torch.as_tensor(encoded.image_features)
    if sentences:
        single = encoded.present.sum(1) == 1
        if not single.any():
            return {}
        records = data.load_records(sentences_from, split) if sentences_from else encoded.records
        texts, text_labels = class_sentences(records, encoded.findings, sentences)
        features, patients = torch.as_tensor(encode_texts(run, texts)), (encoded.patients[single], None)
        return class_level(images[single], features, encoded.present[single], text_labels, patients, draws)
    if not len(encoded.report_features):
        return {}
    images, labels = images[encoded.report_rows], encoded.present[encoded.report_rows]
    text = numbered(" ".join(encoded.records[row].report.split()) for row in encoded.report_rows)
    first = np.unique(text, return_index=True)[1]
    texts = torch.as_tensor(encoded.report_features[first])
    patients, known, results = encoded.patients[encoded.report_rows], labels.any(1), {}
    if known.any():
        sides = images[known], texts[text[known]]  # copies of a text are alike to the last bit, so they tie
        results |= class_level(*sides, labels[known], labels[known], 2 * (patients[known],), draws)
    return results | instance_level(images, texts, torch.tensor(text), (patients, patients[first]), draws)


def drawn_by_patient(records, percent, seed):
    """All records of so many percent of the patients, at least one, drawn by the seed -> list."""
    patients = sorted({(record.source, record.patient) for record in records})
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = {patients[i] for i in order[: max(1, round(len(patients) * percent / 100))]}
    return [record for record in records if (record.source, record.patient) in chosen]


def other_splits(encoded, load):
    """Training and validation records with labels, without the patients of the evaluated records."""
    for split in ("train", "valid"):
        kept = [record for record in data.hold_out(load(split), encoded.records) if record.findings]
        if not kept:
            raise Lacking(f"no labelled record of the {split} split is left beside the evaluated patients")
        yield kept


def validation_labels(records, findings):
    """Present and known, (N, C) bool each, of records that can tell the better of two classifiers."""
    present, absent = (each.numpy() for each in data.label_matrices(records, findings))
    if not (present.any(0) & absent.any(0)).any():
        raise Lacking("no evaluated finding is both present and absent in the valid split, to choose by")
    return present, present | absent


def transfer(encoded, percent, scores, draws):
    """Entries of a classifier trained several times: (N, C, T) scores of T draws of its training records.

    The value is the mean over the draws; the interval draws both images and draws anew. "spread" is the
    standard deviation over the draws.
    """
    rng, T = np.random.default_rng(0), scores.shape[2]
    present, known = encoded.present, encoded.present | encoded.absent

    def mean_of(metric):
        def over(scores, *arrays):
            return np.mean([metric(scores[..., t], *arrays) for t in range(scores.shape[-1])])

        return over, lambda scores, *arrays: over(scores[..., rng.integers(T, size=T)], *arrays)

    def entry(metric, scores, *arrays, chance):
        metric_of_all, redraw = mean_of(metric)
        spread = np.std([metric(scores[..., t], *arrays) for t in range(T)], ddof=1) if T > 1 else 0.0
        told = {"trained": T, "spread": float(spread)}
        told |= {"chance": chance, "draws": draws, "patients": encoded.patients}
        return measured(metric_of_all, scores, *arrays, redraw=redraw, **told)

    results, single = {}, present.sum(1) == 1
    if single.all() and present.shape[1] > 1:
        right = scores.argmax(1) == present.argmax(1)[:, None]
        results[f"{percent:g} % accuracy"] = entry(np.mean, right, chance=1 / present.shape[1])
    if not np.isnan(mean_auroc(scores[..., 0], present, known)):
        results[f"{percent:g} % AUROC mean"] = entry(mean_auroc, scores, present, known, chance=0.5)
    return results


def logistic_regression(features, present, absent, penalty, steps=100):
    """One regression for each finding over the rows where it is known, by L-BFGS on the mean cross-entropy.

    Args:
        features: (N, F) float32. present, absent: (N, C) bool. penalty: of half the squared weights.

    Returns:
        (F + 1, C) float32, the intercept last, without penalty.
    """
    known = (present | absent).float()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    weight = torch.zeros(features.shape[1], present.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(
            features @ weight, present.float(), known, reduction="sum"
        )
        value = entropy / known.sum().clamp(min=1) + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def linear_probe(run, encoded, *, load, fractions=(1, 10, 100), repeats=5, skip_bad_images=0, draws=1000):
    """How much a linear classifier reads off the frozen image tower, from shares of the training patients.

    Features before the projection, standardised by the training records; one logistic regression for each
    finding of the evaluated records, its penalty (out of PENALTIES) chosen by the mean AUROC on the
    validation split. Accuracy where each image has exactly one finding, by the highest score.

    Args:
        load: split -> records. fractions: percent of the training patients. repeats: draws of each but 100.
        skip_bad_images: how many unreadable images of each split are left out.
    """
    train, valid = (encode(run, records, skip_bad_images) for records in other_splits(encoded, load))
    findings, results = encoded.findings, {}
    row_of = {id(record): row for row, record in enumerate(train.records)}
    labels = data.label_matrices(train.records, findings)
    present, known = validation_labels(valid.records, findings)
    for percent in fractions:
        scores = []
        for repeat in range(1 if percent == 100 else repeats):
            rows = [row_of[id(record)] for record in drawn_by_patient(train.records, percent, repeat)]
            mean, std = train.pooled[rows].mean(0), train.pooled[rows].std(0) + 1e-6
            of_train, of_valid, of_test = (
                torch.from_numpy((part - mean) / std)
                for part in (train.pooled[rows], valid.pooled, encoded.pooled)
            )
            best = -1.0
            for penalty in PENALTIES:
                weight = logistic_regression(of_train, *(each[rows] for each in labels), penalty)
                fits = mean_auroc((of_valid @ weight[:-1]).numpy(), present, known)
                if fits > best:
                    best, kept = fits, (of_test @ weight[:-1] + weight[-1]).numpy()
            scores.append(kept)
        results |= transfer(encoded, percent, np.stack(scores, axis=2), draws)
    return results


STEPS, PATIENCE, LOOKS = 20, 5, 40  # of fine_tuned, all ours
FINE_TUNE_LR = 1e-4


def image_batches(run, records):
    """(B, 1, H, W) float each, on the run's device; every image must be readable."""
    transform = data.evaluation_transform(run.args.image_size)
    for i in range(0, len(records), run.args.batch_size):
        images = [transform(data.read_image(r.image)) for r in records[i : i + run.args.batch_size]]
        yield data.normalise(torch.stack(images).to(run.device))


@torch.no_grad()
def tower_scores(run, tower, records):
    """(N, C) float32, in evaluation mode."""
    tower.eval()
    with run.autocast():
        return torch.cat([tower(images).float().cpu() for images in image_batches(run, records)]).numpy()


def fine_tuned(run, records, valid, findings, seed):
    """A copy of the image tower with a linear head, trained on records: images -> (B, C) scores.

    After every pass, or STEPS steps where that is more, the mean AUROC on the validation records is looked
    at; the best weights are kept, and PATIENCE looks without a better one end the training, as LOOKS do.
    """
    torch.manual_seed(seed)
    head = torch.nn.Linear(run.model.image_encoder.num_features, len(findings))
    tower = torch.nn.Sequential(copy.deepcopy(run.model.image_encoder), head.to(run.device))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=FINE_TUNE_LR, weight_decay=run.args.weight_decay)
    loader = torch.utils.data.DataLoader(
        data.Images(records, data.training_transform(run.args.image_size, run.args.horizontal_flip)),
        run.args.batch_size,
        shuffle=True,
        collate_fn=data.Collate(records, findings, None, run.tokenizer, run.args.max_length),
        num_workers=run.args.workers,
        persistent_workers=run.args.workers > 0,
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    present, known_valid = validation_labels(valid, findings)
    best, since = -1.0, 0
    for _ in range(LOOKS):
        tower.train()
        for batch in itertools.islice(batches, max(STEPS, len(loader))):
            data.refuse_unreadable(batch.unreadable, 0)  # they were read before
            batch = data.to_device(batch, run.device)
            known = (batch.present | batch.absent).float()
            if not known.any():
                continue
            with run.autocast():
                scores = tower(data.normalise(batch.images))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                scores.float(), batch.present.float(), known, reduction="sum"
            )
            optimizer.zero_grad()
            (loss / known.sum()).backward()
            optimizer.step()
        fits = mean_auroc(tower_scores(run, tower, valid), present, known_valid)
        if fits > best:
            best, since, kept = fits, 0, copy.deepcopy(tower.state_dict())
        else:
            since += 1
        if since == PATIENCE:
            break
    tower.load_state_dict(kept)
    return tower


def fine_tune(run, encoded, *, load, fractions=(1, 10, 100), repeats=5, skip_bad_images=0, draws=1000):
    """As linear_probe, but the whole image tower is trained on, see fine_tuned."""
    splits = ([replace(record, report=None) for record in records] for records in other_splits(encoded, load))
    train, valid = (encode(run, records, skip_bad_images).records for records in splits)
    results = {}
    for percent in fractions:
        scores = []
        for repeat in range(1 if percent == 100 else repeats):
            records = drawn_by_patient(train, percent, repeat)
            tower = fine_tuned(run, records, valid, encoded.findings, repeat)
            scores.append(tower_scores(run, tower, encoded.records))
        results |= transfer(encoded, percent, np.stack(scores, axis=2), draws)
    return results


def prompt_sensitivity(run, encoded, *, classes=None, draws=1000):
    """What the wording of the prompts does to zero-shot classification (the paper's motivation).

    Every variant of prompts.variants, one prompt a class: its accuracy over the images with exactly one of
    the classes; over all of them the mean, the spread (standard deviation) and the worst. "negated" prompts
    say the opposite, so they stay out of these three, and the better the model understands "no" the further
    below chance they are.
    """
    classes, columns = chosen_classes(encoded, classes)
    present = encoded.present[:, columns]
    single = present.sum(1) == 1
    if len(classes) < 2 or not single.any():
        return {}
    right = {}
    for variant, texts in prompts.variants(classes, run.args.template).items():
        scores = combined(encoded.image_features[single], encode_findings(run, texts), COMBINE[0])
        right[variant] = scores.argmax(1) == present[single].argmax(1)
    said = np.stack([each for variant, each in right.items() if variant != "negated"], axis=1)
    of = {"chance": 1 / len(classes), "draws": draws, "patients": encoded.patients[single]}
    results = {
        "mean": measured(np.mean, said, **of, variants=said.shape[1]),
        "worst": measured(lambda right: right.mean(0).min(), said, **of),
        "spread": measured(lambda right: right.mean(0).std(), said, **of | {"chance": None}),
    }
    return results | {variant: measured(np.mean, each, **of) for variant, each in right.items()}


def prompt_words(run, encoded, *, draws=1000, near=3):
    """What the continuous prompt learned, and whether it brings label prompts nearer to the reports.

    Norms of the vectors against those that they start with, 0.02 √dim in expectation (the start itself is not
    kept), and their nearest word pieces by cosine against those of random vectors. Distance between the
    centre of the label prompts (one for each finding that a report has alone) and the centre of these
    reports, and the mean cosine of a report with the prompt of its finding and with the others', each with
    the vectors and without.

    Returns:
        entries; that of the nearest word piece has "words", one line for each vector.
    """
    labels = encoded.present[encoded.report_rows]
    single = labels.sum(1) == 1
    if not single.any():
        return {}
    findings = [name for column, name in enumerate(encoded.findings) if labels[single, column].any()]
    labels = labels[single][:, [encoded.findings.index(name) for name in findings]]
    reports, results = encoded.report_features[single], {}
    of = {"draws": draws, "patients": encoded.patients[encoded.report_rows[single]]}
    texts = [prompts.label_prompt(name, run.args.template) for name in findings]
    for way, as_prompts in (("with the vectors", True), ("without", False)):
        features = encode_texts(run, texts, as_prompts)
        cosine = reports @ features.T
        own = cosine[labels]
        others = (cosine.sum(1) - own) / max(1, len(findings) - 1)
        gap = partial(
            lambda reports, centre: np.linalg.norm(reports.mean(0) - centre), centre=features.mean(0)
        )
        results[f"distance to the reports, {way}"] = measured(gap, reports, **of)
        results[f"cosine with the own reports, {way}"] = measured(np.mean, own, **of)
        results[f"cosine with other reports, {way}"] = measured(np.mean, others, **of)
    if run.model.prompt is not None:
        vectors = run.model.prompt.context.detach().float().cpu()
        words = run.model.text_encoder.bert.get_input_embeddings().weight.detach().float().cpu()
        random = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
        of_vectors, of_random = (cosines(each, words).topk(near) for each in (vectors, random))
        norms, lines = vectors.norm(dim=1), []
        for i, (ids, values) in enumerate(zip(of_vectors.indices, of_vectors.values, strict=True)):
            pieces = zip(run.tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist(), strict=True)
            nearest = ", ".join(f"{piece} {value:.2f}" for piece, value in pieces)
            lines.append(f"vector {i + 1:2}, norm {norms[i]:.2f}: {nearest}")
        start = 0.02 * vectors.shape[1] ** 0.5
        results["norm of the vectors"] = measured(np.mean, norms.numpy(), chance=start, draws=draws)
        results["cosine with the nearest word piece"] = measured(
            np.mean,
            of_vectors.values[:, 0].numpy(),
            chance=of_random.values[:, 0].mean(),
            draws=draws,
            words=lines,
        )
    return results


def cosines(one, other):
    """(N, D), (M, D) tensors -> (N, M)."""
    return torch.nn.functional.normalize(one, dim=1) @ torch.nn.functional.normalize(other, dim=1).T


def false_negatives(run, encoded, *, pairs_of=2000, draws=1000):
    """What the label mask removes, and whether these pairs are alike (no direct evidence in the paper).

    Pairs of an image and another image's report, both with known findings, among at most `pairs_of` records:
    "equal", the findings are the same and a disease is among them, which the mask removes; "subset", the
    report's findings are some of the image's, which the rule of label prompts would remove beside; "other",
    real negatives. For each kind its number in a random batch of the run's size, its mean cosine, and the
    chance that such a text is nearer to the image than a real negative; the last two are means over images.
    """
    rows = np.flatnonzero(encoded.present[encoded.report_rows].any(1))
    if len(rows) < 2:
        return {}
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:pairs_of])
    images, reports = encoded.image_features[encoded.report_rows[rows]], encoded.report_features[rows]
    described = torch.from_numpy(encoded.report_labels[rows])
    equal = umcl.label_mask(described, described, "equal").numpy()  # as in train.losses
    subset = umcl.label_mask(described, described, "subset").numpy() & ~equal
    similarity, others = images @ reports.T, ~np.eye(len(rows), dtype=bool)
    patients = encoded.patients[encoded.report_rows[rows]]
    B, results = run.args.batch_size, {}
    for kind, pairs in (("equal", equal), ("subset", subset), ("other", ~equal & ~subset)):
        pairs = pairs & others
        share = pairs.sum(1) / (len(rows) - 1)
        results[f"{kind}: pairs, of {B * (B - 1)} in a batch"] = measured(
            lambda share: share.mean() * B * (B - 1), share, draws=draws, patients=patients
        )
        if not pairs.any():
            continue
        having = pairs.any(1)
        cosine = np.array([row[of].mean() for row, of in zip(similarity[having], pairs[having], strict=True)])
        results[f"{kind}: cosine"] = measured(np.mean, cosine, draws=draws, patients=patients[having])
        if kind != "other":
            real = ~equal & ~subset & others
            both = np.flatnonzero(having & real.any(1))
            nearer = np.array(
                [auroc(similarity[i, m], pairs[i, m]) for i in both for m in [pairs[i] | real[i]]]
            )
            if len(nearer):
                of = {"chance": 0.5, "draws": draws, "patients": patients[both]}
                results[f"{kind}: AUROC against other"] = measured(np.mean, nearer, **of)
    return results


@torch.no_grad()
def similarity_maps(run, records, text_features):
    """How much each cell of the last Swin map speaks for a text: cells whose mean is the cosine.

    The tower's feature is the mean over the cells and the projection is linear, so the cosine is the mean of
    the cells' own products with the text, each divided by the length of the image's feature.

    Args:
        records: N. text_features: (N, D) float32, unit length, one text for each record.

    Returns:
        (N, S, S) float32
    """
    run.model.eval()
    cells, maps = [], []
    texts = torch.as_tensor(text_features).to(run.device).split(run.args.batch_size)
    with run.model.image_encoder.norm.register_forward_hook(lambda *found: cells.append(found[2])):
        for images, of_images in zip(image_batches(run, records), texts, strict=True):
            with run.autocast():
                pooled = run.model.image_encoder(images)
                of_cells = run.model.image_projection(cells.pop()).float()  # (B, S², D)
                length = run.model.image_projection(pooled).float().norm(dim=-1)
            maps.append((of_cells @ of_images[:, :, None])[..., 0] / length[:, None])
    maps = torch.cat(maps).cpu()
    side = int(maps.shape[1] ** 0.5)
    by_rows = umcl.window_order(side, min(run.args.window_size, side)).argsort()  # they lie window by window
    return maps[:, by_rows].view(-1, side, side).numpy()


def boxed(run, encoded, prompt_set, classes):
    """Records with boxes and exactly one finding, one of the classes, and a feature of its prompts each."""
    records = [record for record in encoded.records if record.boxes and len(record.findings) == 1]
    if classes:
        chosen = set(chosen_classes(encoded, classes)[0])
        records = [record for record in records if record.findings <= chosen]
    names = sorted({name for record in records for name in record.findings})
    if not names:
        return [], None
    features = encode_findings(run, read_prompts(prompt_set or run.args.template, names)[0])
    means = np.stack([each.mean(0) / np.linalg.norm(each.mean(0)) for each in features])
    return records, means[[names.index(*record.findings) for record in records]]


def cells_inside(boxes, side):
    """(S, S) bool, True where the cell's centre is in one of the boxes, in fractions of a square image."""
    centres = (np.arange(side) + 0.5) / side
    inside = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= ((top <= centres) & (centres < bottom))[:, None] & ((left <= centres) & (centres < right))
    return inside


def pointing_game(run, encoded, *, prompt_set=None, classes=None, draws=1000):
    """How often the cell that speaks most for an image's finding lies in the finding's box.

    Over the square images with exactly one finding and its box; chance is a blind choice of a cell, the mean
    share of cells in the box. "another's map" takes the hottest cell of another image with the same finding:
    what the pointing has more than that is seen in the image itself and is not the finding's usual place.
    """
    records, texts = boxed(run, encoded, prompt_set, classes)
    if not records:
        return {}
    maps = similarity_maps(run, records, texts)
    inside = np.stack([cells_inside(record.boxes, maps.shape[1]) for record in records]).reshape(
        len(maps), -1
    )
    hottest, rows = maps.reshape(len(maps), -1).argmax(1), np.arange(len(maps))
    finding = np.array(["".join(record.findings) for record in records])
    another = hottest.copy()
    for name in set(finding.tolist()):
        another[finding == name] = np.roll(hottest[finding == name], 1)
    results, patients = {}, numbered((record.source, record.patient) for record in records)
    for name, cell in (("all", hottest), ("another's map", another)):
        of = {"chance": inside.mean(), "draws": draws, "patients": patients}
        results[name] = measured(np.mean, inside[rows, cell], **of)
    for name in sorted(set(finding.tolist())):
        of = finding == name
        told = {"chance": inside[of].mean(), "draws": draws, "patients": patients[of]}
        results[name] = measured(np.mean, inside[rows, hottest][of], **told)
    return results


def heatmap(run, encoded, path, prompt_set=None, classes=None, each=2):
    """A picture of images with boxes beside their similarity maps, red where most speaks for the finding."""
    records, texts = boxed(run, encoded, prompt_set, classes)
    if not records:
        raise BadInput("--heatmap needs images with one finding and its box, and these data have none")
    of_finding = {}
    for row, record in enumerate(records):
        of_finding.setdefault(*record.findings, []).append(row)
    rows = [row for name in sorted(of_finding) for row in of_finding[name][:each]]
    side, tiles = 144, []
    for row, cells in zip(rows, similarity_maps(run, [records[r] for r in rows], texts[rows]), strict=True):
        grey = data.read_image(records[row].image).resize((side, side)).convert("RGB")
        heat = Image.fromarray((255 * (cells - cells.min()) / np.ptp(cells).clip(1e-9)).astype(np.uint8))
        red = Image.composite(
            Image.new("RGB", (side, side), "red"), grey, heat.resize((side, side)).point(lambda v: v // 2)
        )
        draw = ImageDraw.Draw(red)
        for left, top, right, bottom in records[row].boxes:
            box = [left * side, top * side, right * side - 1, bottom * side - 1]
            draw.rectangle(box, outline="yellow", width=2)
        tiles += [titled(grey, "".join(records[row].findings)), titled(red, "its map and its box")]
    save_grid(tiles, 2 * each, path)


def titled(picture, title):
    """Pillow image -> the same below a line with its title."""
    tile = Image.new("RGB", (picture.width, picture.height + 22), "white")
    tile.paste(picture, (0, 22))
    ImageDraw.Draw(tile).text((4, 3), title, "black", ImageFont.load_default(13))
    return tile


def save_grid(tiles, columns, path):
    """Pillow images of one size -> one picture."""
    tiles = torch.stack([torchvision.transforms.functional.pil_to_tensor(tile) for tile in tiles])
    grid = torchvision.utils.make_grid(tiles, nrow=columns, pad_value=255)
    try:
        torchvision.transforms.functional.to_pil_image(grid).save(path)
    except ValueError as error:
        raise BadInput(f"{path} has no ending of a picture's, such as .png ({error})") from error


TASKS = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "fine-tune": fine_tune,
    "prompt-sensitivity": prompt_sensitivity,
    "prompt-words": prompt_words,
    "false-negatives": false_negatives,
    "pointing-game": pointing_game,
}
NEEDS = {
    "zero-shot": "labels of two classes",
    "retrieval": "reports",
    "linear-probe": "labels of two classes",
    "fine-tune": "labels of two classes",
    "prompt-sensitivity": "images with exactly one of two classes",
    "prompt-words": "reports of images with exactly one finding",
    "false-negatives": "two reports with labels",
    "pointing-game": "images with one finding and its box",
}


def quick_scores(run, records):
    """What train watches after each epoch: the metrics without intervals -> {name: float}."""
    if not records:  # all of their patients may be held out
        return {}
    encoded = encode(run, records, 0)
    results = zero_shot(run, encoded, draws=0) | retrieval(run, encoded, draws=0)
    watched = ("balanced accuracy", "i2t_P@1")
    return {name: results[name]["value"] for name in watched if name in results}


def gallery(run, encoded, path, rows=4, columns=3):
    """A picture of random query images, each with its nearest reports; green ones have its findings."""
    if not len(encoded.report_features):
        raise BadInput("a gallery needs reports, and these data have none")
    images, labels = encoded.image_features[encoded.report_rows], encoded.present[encoded.report_rows]
    queries = np.random.default_rng(0).permutation(len(images))[:rows]
    side, font, tiles = 224, ImageFont.load_default(13), []
    for query in queries:
        record = encoded.records[encoded.report_rows[query]]
        picture = data.read_image(record.image).resize((side, side))
        tiles.append(titled(picture, ", ".join(sorted(record.findings))))
        for rank, near in enumerate((-(images[query] @ encoded.report_features.T)).argsort()[:columns], 1):
            found = encoded.records[encoded.report_rows[near]]
            right = (labels[near] == labels[query]).all() and labels[query].any()
            tile = Image.new("RGB", (side, side + 22), "white")
            draw = ImageDraw.Draw(tile)
            draw.rectangle((1, 1, side - 2, side + 20), outline="green" if right else "red", width=3)
            title = f"{rank}. {'right' if right else 'wrong'}{', its own' if near == query else ''}"
            lines = [title, ", ".join(sorted(found.findings)), "", *textwrap.wrap(found.report, 31)]
            draw.multiline_text((8, 6), "\n".join(lines[:14]), "black", font)
            tiles.append(tile)
    save_grid(tiles, 1 + columns, path)


# ------------------------------------------------------------------------------------------------- program


def newest_checkpoint():
    """The best checkpoint of the run that was written last -> path."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BadInput("no run is under runs/ yet: `python train.py` makes one, --checkpoint names another")
    return found[-1]


def print_table(results):
    """{task: {metric: entry}}, and a warning of what is worse than a blind guess."""
    width = max([32, *(len(f"{task}  {metric}") for task, metrics in results.items() for metric in metrics)])
    print(f"{'':{width}}{'value':>8}{'95 % interval':>20}{'chance':>8}{'n':>7}")
    for task, metrics in results.items():
        for metric, entry in metrics.items():
            interval = f"{entry['low']:.3f} to {entry['high']:.3f}" if "low" in entry else ""
            name = f"{task}  {metric}"
            chance = f"{entry['chance']:.3f}" if "chance" in entry else ""
            print(f"{name:{width}}{entry['value']:8.3f}{interval:>20}{chance:>8}{entry['n']:7}")
            print("".join(f"  {line}\n" for line in entry.get("words", ())), end="")
    for task, metrics in results.items():
        for metric, entry in metrics.items():
            if "AUROC" in metric and entry.get("high", 1) < 0.5:
                print(f"warning: {task}  {metric} is below 0.5: do its prompts and labels mean the same?")


def fingerprint(records):
    """SHA-256 of the ids and what is known of each, in any order, and of the reports -> two str."""
    lines = [
        "\t".join([r.source, r.id or r.patient, *sorted(r.findings), "-", *sorted(r.absent)]) for r in records
    ]
    return data.fingerprint(sorted(lines)), data.fingerprint(sorted(r.report or "" for r in records))


def commit():
    """Of this program -> str; with a hash of its files where it was changed or git does not know it."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        name = "unknown"
    if name.endswith(("unknown", "-dirty")):
        files = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        name += f"-{hashlib.sha256(files).hexdigest()[:8]}"
    return name


def write_results(path, entries):
    """Puts entries in the place of those of the same name and leaves the others as they are."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        before = json.loads(path.read_text()) if path.exists() else {}
        temporary.write_text(json.dumps({**before, **entries}, indent=1) + "\n")
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} holds no results ({error}); move it away") from error
    os.replace(temporary, path)


# fmt: off
def build_parser():
    positive = number(int, 1)
    p = argparse.ArgumentParser(description="Evaluate a run of train.py.", allow_abbrev=False)
    p.add_argument("--task", nargs="+", choices=[*TASKS, "all"], default=["zero-shot", "retrieval"])
    c = p.add_mutually_exclusive_group()
    c.add_argument("--checkpoint", help="RUN or RUN/best.pt; default the newest run's best")
    c.add_argument("--compare", nargs="+", metavar="RUN", help="several, side by side on the same records")
    p.add_argument("--data", nargs="+", metavar="NAME[=ROOT]", help="default: what the run was trained on")
    p.add_argument("--split", choices=data.SPLITS, default="test")
    p.add_argument("--limit", type=positive, help="only the first N records of each data set")
    p.add_argument("--ids", metavar="FILE", help="exactly the images of this list of `data.py protocol`")
    p.add_argument("--classes", nargs="+", metavar="NAME",
                   help='findings asked for by prompts, such as COVID-19 "No Finding"; default those of the '
                        "data, or of --findings in training")
    s = p.add_mutually_exclusive_group()
    s.add_argument("--prompt-set", choices=[*prompts.TEMPLATES, "ensemble"],
                   help="zero-shot prompts; default the trained template; ensemble: all there are")
    s.add_argument("--prompts", dest="prompt_set", metavar="FILE.json",
                   help="or your own, {finding: [text, ...]}; evaluate.py::read_prompts")
    p.add_argument("--combine", choices=COMBINE, default=COMBINE[0], help="several prompts of a finding")
    p.add_argument("--sentences", type=positive, metavar="K",
                   help="retrieve among K sentences of each finding, by a seed, not the images' reports")
    p.add_argument("--sentences-from", nargs="+", metavar="NAME[=ROOT]",
                   help="data sets whose reports have these sentences; default the evaluated ones")
    p.add_argument("--fractions", type=number(float, 0.001, 100), nargs="+", default=(1, 10, 100),
                   metavar="PERCENT", help="of the training patients, for linear-probe and fine-tune")
    p.add_argument("--repeats", type=positive, default=5, help="draws of each of them but 100")
    p.add_argument("--out", metavar="FILE.json", help="results; default results.json in the run's folder")
    p.add_argument("--gallery", metavar="FILE.png", help="draw images and the reports they retrieve")
    p.add_argument("--heatmap", metavar="FILE.png", help="draw where in the image the label prompt is found")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--skip-bad-images", type=number(int, 0), default=0, metavar="N",
                   help="leave out up to N unreadable images")
    return p
# fmt: on


def chosen_records(args, run):
    """The records to evaluate -> (records, words for which they are)."""
    if not args.ids:
        options = {"views": run.args.views, "uncertain": run.args.uncertain}
        records = data.load_records(args.data, args.split, args.limit, **options)
        chosen = f"{args.split} split"
    else:
        records = data.listed_records(args.data, data.read_ids(args.ids), run.args.uncertain)
        records, chosen = records[: args.limit], f"list {args.ids}"
    return records, f"{chosen} of {', '.join(args.data)}" + (f", first {args.limit}" if args.limit else "")


def classes_of(runs, findings):
    """Of the findings those that all runs had among their --findings; None where no run had any."""
    chosen = [set(run.args.findings) for run in runs if run.args.findings]
    if chosen and not set.intersection(*chosen):
        raise BadInput("the runs were trained on different --findings; name --classes to compare them by")
    return [name for name in findings if chosen and all(name in each for each in chosen)] or None


def run_tasks(args, run, encoded, chosen):
    """-> ({task: {metric: entry}}, {name: what results.json keeps of a task})."""
    import transformers

    labels, reports = fingerprint(encoded.records)
    with_report = {record.source for record in encoded.records if record.report}
    known = {
        "data": chosen,
        "checkpoint": str(args.checkpoint),
        "counts": {
            "images": len(encoded.records),
            "reports": len(encoded.report_rows),
            "labelled": int(encoded.present.any(1).sum()),
        },
        "fingerprint": {"labels": labels, "reports": reports},
        "reports": {name: text for name, text in data.REPORTS.items() if name in with_report},
        "seed": run.args.seed,
        "commit": commit(),
        "versions": {m.__name__: m.__version__ for m in (np, torch, torchvision, transformers)},
    }
    results, entries = {}, {}
    settings = {"views": run.args.views, "uncertain": run.args.uncertain}
    given = {
        **vars(args),
        "prompt_set": args.prompt_set or run.args.template,
        "load": lambda split: data.load_records(args.data, split, args.limit, **settings),
    }
    for task in TASKS if "all" in args.task else args.task:
        names = inspect.signature(TASKS[task]).parameters
        options = {name: given[name] for name in names if name in given}
        try:
            found = TASKS[task](run, encoded, **options)
            if not found:
                raise Lacking(f"{task} needs {NEEDS[task]}; the {chosen} has none")
        except Lacking as error:
            if [task] == args.task:
                raise
            print(f"{task} is left out: {error}")
            continue
        results[task] = found
        metrics = {
            metric: {key: value for key, value in entry.items() if key != "of"}
            for metric, entry in found.items()
        }
        apart = ("split", "load", "skip_bad_images")
        told = {k: value for k, value in options.items() if k not in apart and value is not None}
        name = ", ".join([task, known["checkpoint"], chosen, *(f"{k} {v}" for k, v in told.items())])
        entries[name] = {"task": task, "options": told, **known, "metrics": metrics}
        if "prompt_set" in told:
            classes = told.get("classes") or encoded.findings
            entries[name]["prompts"] = read_prompts(told["prompt_set"], classes)
            entries[name]["not trained"] = [each for each in classes if each not in run.findings]
    if not results:
        raise BadInput(f"the {chosen} has nothing for any of the tasks")
    return results, entries


def flags_that_differ(runs):
    """{flag: [value in each run]} of what can change a result but the seed, and the commit."""
    apart = {"out", "resume", "seed", *MACHINE_OPTIONS}
    names = dict.fromkeys(name for run in runs for name in vars(run.args) if name not in apart)
    values = {name: [getattr(run.args, name, None) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def groups_by_flags(runs):
    """[{seed: which run}, ...]: runs that differ in nothing but the seed are one group."""
    groups, flags = [], list(flags_that_differ(runs).values())
    for i, run in enumerate(runs):
        alike = (g for g in groups if all(each[i] == each[min(g.values())] for each in flags))
        group = next((group for group in alike if run.args.seed not in group), None)
        if group is None:  # its options are others, or two checkpoints of one run are compared
            groups.append(group := {})
        group[run.args.seed] = i
    return groups


def difference(one, other, draws=1000):
    """Second entry less the first and its interval, drawn from both alike -> (value, low, high).

    Where the two are about different things, vectors of two prompts say, there is none: nan.
    """
    (of_one, first, patients), (of_other, second, _) = one["of"], other["of"]
    if len(first[0]) != len(second[0]):
        return other["value"] - one["value"], np.nan, np.nan

    def less(*arrays):
        return of_other(*arrays[len(first) :]) - of_one(*arrays[: len(first)])

    return other["value"] - one["value"], *bootstrap_ci(less, *first, *second, n=draws, patients=patients)


# 97.5 % of Student's t, for the mean of so many seeds; for more than ten the last, which is a little wide
T_OF = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def mean_over_seeds(values, sign=""):
    """The mean and, of several, half the width of its 95 % interval -> str, "" of none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{sign}.3f}"
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{sign}.3f} ± {T_OF[min(len(values), 10)] * error:.3f}"


def print_comparison(paths, runs, results):
    """Groups of runs that differ in the seed alone, side by side, and what each has more than the first.

    Of one run each: paired differences, their intervals drawn from the test set. Of several seeds: mean and
    interval over the seeds, and so for the differences between runs of the same seed.
    """
    groups = groups_by_flags(runs)
    for i, group in enumerate(groups, 1):
        print(f"{i}: {', '.join(str(paths[run]) for run in group.values())}")
    for name, values in flags_that_differ([runs[min(group.values())] for group in groups]).items():
        print(f"  --{name.replace('_', '-')}: " + " | ".join(map(str, values)))
    metrics = [(task, metric) for task, each in results[0].items() for metric in each]
    metrics = [(task, m) for task, m in metrics if all(m in each.get(task, ()) for each in results)]
    width = max((len(f"{task}  {metric}") for task, metric in metrics), default=0)
    numbers = range(1, len(groups) + 1)
    print(f"{'':{width}}" + "".join(f"{i:>18}" for i in numbers), end="")
    print("".join(f"{f'{i} less 1':>28}" for i in numbers[1:]))
    for task, metric in metrics:
        of = [{seed: results[i][task][metric] for seed, i in group.items()} for group in groups]
        line = f"{f'{task}  {metric}':{width}}"
        for group in of:
            line += f"{mean_over_seeds([entry['value'] for entry in group.values()]):>18}"
        for group in of[1:]:
            pairs = [(of[0][seed], group[seed]) for seed in group if seed in of[0]]
            cell = mean_over_seeds([other["value"] - one["value"] for one, other in pairs], "+")
            if len(of[0]) == len(group) == len(pairs) == 1:
                value, low, high = difference(*pairs[0])
                cell = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
            line += f"{cell:>28}"
        print(line)


def evaluate(args):
    """Runs the tasks, prints the table, writes what was asked for."""
    paths = args.compare or [newest_checkpoint() if args.checkpoint is None else args.checkpoint]
    paths = [Path(path, "best.pt") if Path(path).is_dir() else Path(path) for path in paths]
    runs = [load_run(path) for path in paths]
    args.data = args.data or runs[0].args.data  # all see the same records
    records, chosen = chosen_records(args, runs[0])
    args.classes = args.classes or classes_of(runs, data.vocabulary(records))
    results = []
    for path, run in zip(paths, runs, strict=True):
        run.args.device = args.device
        run.model.to(resolve_machine(run.args))
        data.check_images(records, run.args.image_size)
        encoded = encode(run, records, args.skip_bad_images)
        if args.ids and data.fingerprint(data.read_ids(args.ids)) not in run.args.held_out:
            print(f"note: {path} did not hold out the patients of {args.ids}; it may have seen these images")
        new = [name for name in args.classes or encoded.findings if name not in run.findings]
        if new:
            print(f"note: training of {path} had no label {', '.join(new)}")
        args.checkpoint = path
        found, entries = run_tasks(args, run, encoded, chosen)
        results.append(found)
        print(f"{path}, {chosen}, {len(encoded.records)} images")
        print_table(found)
        write_results(args.out or path.parent / "results.json", entries)
    if args.gallery:
        gallery(run, encoded, args.gallery)
    if args.heatmap:
        heatmap(run, encoded, args.heatmap, args.prompt_set, args.classes)
    if len(runs) > 1:
        print_comparison(paths, runs, results)
    return 0


def main(argv=None):
    try:
        return evaluate(build_parser().parse_args(argv))
    except (BadInput, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
