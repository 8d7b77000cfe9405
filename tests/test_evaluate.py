"""Metrics against hand-made matrices and slow twins, intervals, checkpoints, and evaluate.py as a program."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

import data
import evaluate
from data import BadInput, Record
from evaluate import (
    Measure,
    auroc,
    average_precision,
    balanced_accuracy,
    best_threshold,
    bootstrap_ci,
    encode,
    encode_texts,
    f1,
    in_chunks,
    label_sets,
    mcc,
    partner_rank,
    shares_at_k,
)

A, B, AB, NONE = [True, False], [False, True], [True, True], [False, False]
NAN = math.nan


# ------------------------------------------------------------------------------------------------ retrieval


def precision_at_k(similarity, queries, candidates, ks=(1, 2, 5, 10)):
    shares = shares_at_k(similarity, *label_sets(queries, candidates), ks)
    return dict(zip(ks, shares.mean(0).tolist(), strict=True))


@pytest.mark.parametrize(
    ("similarity", "queries", "candidates", "precision"),
    [
        ([[0.9, 0.8, 0.1], [0.3, 0.2, 0.7]], [A, B], [A, B, A], {1: 1 / 2, 2: 1 / 4, 3: 1 / 2}),
        (np.zeros((1, 4)), [AB], [A, B, AB, NONE], {4: 1 / 4}),  # exactly the findings of the query
        (np.zeros((1, 2)), [NONE], [NONE, NONE], {2: 0}),  # without findings nothing is relevant
        (np.ones((1, 4)), [A], [A, B, B, A], {1: 0, 2: 0, 4: 1 / 2}),  # ties count against the query
        (np.ones((1, 4)), [A], [B, B, A, A], {1: 0, 2: 0, 4: 1 / 2}),
    ],
)
def test_precision_by_hand(similarity, queries, candidates, precision):
    assert precision_at_k(similarity, queries, candidates, ks=tuple(precision)) == precision


def slow_precision(similarity, queries, candidates, k):
    shares = []
    for row, query in zip(similarity, queries, strict=True):
        relevant = [query.any() and (candidate == query).all() for candidate in candidates]
        nearest = sorted(range(len(row)), key=lambda j: (-row[j], relevant[j]))
        shares.append(sum(relevant[j] for j in nearest[:k]) / k)
    return np.mean(shares)


@pytest.mark.parametrize("seed", range(5))
def test_precision_equals_its_slow_twin(seed):
    rng = np.random.default_rng(seed)
    queries, candidates = (rng.random((n, 3)) < 0.4 for n in (12, 20))  # many alike, some without a finding
    similarity = rng.integers(0, 8, (12, 20)) / 8  # many ties
    slow = {k: slow_precision(similarity, queries, candidates, k) for k in (1, 2, 5, 10)}
    assert precision_at_k(similarity, queries, candidates) == pytest.approx(slow)
    with pytest.raises(ValueError, match="21"):  # more places than candidates
        precision_at_k(similarity, queries, candidates, ks=(1, 21))


def test_the_rank_by_hand():
    similarity, ids = [[0.9, 0.1, 0.2], [0.8, 0.5, 0.3], [0.3, 0.2, 0.1]], torch.arange(3)
    assert partner_rank(similarity, ids, ids).tolist() == [0, 1, 2]
    assert partner_rank(np.ones((3, 3)), ids, ids).tolist() == [2, 2, 2]  # ties count against the query


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_equals_its_slow_twin(seed):
    """With copies: a query has up to three candidates of its own."""
    rng = np.random.default_rng(seed)
    queries, candidates = rng.permutation(6).repeat(2), rng.permutation(np.r_[:6, :6, :3])
    similarity = rng.integers(0, 9, (len(queries), len(candidates)))  # many ties
    slow = []
    for row, query in zip(similarity, queries, strict=True):
        nearest = max(s for s, id in zip(row, candidates, strict=True) if id == query)
        slow.append(sum(s >= nearest for s, id in zip(row, candidates, strict=True) if id != query))
    assert partner_rank(similarity, torch.tensor(queries), torch.tensor(candidates)).tolist() == slow


@pytest.mark.parametrize("cells", [1, 7, 40, 1000])
def test_chunks_of_any_size_give_the_same_shares_and_ranks(cells):
    rng = np.random.default_rng(0)
    queries, candidates = (torch.tensor(rng.integers(-2, 3, (12, 3)), dtype=torch.float32) for _ in range(2))
    sets = torch.tensor(rng.integers(-1, 3, 12))
    for function, rows in (
        (partial(shares_at_k, candidate_sets=sets, ks=(1, 2, 5, 10)), sets),
        (partial(partner_rank, candidate_ids=torch.arange(12)), torch.arange(12)),
    ):
        chunks = in_chunks(function, queries, candidates, rows, cells=cells)
        assert torch.equal(chunks, function(queries @ candidates.T, rows))


@pytest.mark.parametrize("row", [[NAN, 0.5, 0.1], [0.5, NAN, 0.1], [NAN, NAN, NAN]], ids=str)
def test_nan_counts_against_the_query(row):
    """Its own text is the first; the two others have other findings. A broken model finds nothing."""
    similarity, ids = torch.tensor([row]), torch.arange(3)
    ahead = sum(math.isnan(row[0]) or not x < row[0] for x in row[1:])
    assert partner_rank(similarity, ids[:1], ids).item() == ahead
    own_first = not any(map(math.isnan, row))
    assert precision_at_k(similarity, [A], [A, B, B], ks=(1, 3)) == {1: own_first, 3: 1 / 3}


# ------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_double_loop(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 40), rng.random(40) < 0.3
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


def test_auroc_of_the_best_the_worst_the_blind_and_one_class():
    labels = [False, False, True, True]
    assert [auroc(scores, labels) for scores in ([1, 2, 3, 4], [4, 3, 2, 1], [5, 5, 5, 5])] == [1, 0, 0.5]
    assert all(math.isnan(auroc([1, 2], [label, label])) for label in (True, False))


def test_average_precision_equals_the_slow_sum():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, labels = rng.integers(0, 6, 20) / 5, rng.random(20) < 0.4
        labels[0] = True
        slow = [labels[scores >= each].mean() for each in scores[labels]]
        assert average_precision(scores, labels) == pytest.approx(np.mean(slow))


def test_balanced_accuracy_weighs_classes_alike():
    true, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 2, 0, 1])
    assert balanced_accuracy(predicted, true) == (3 / 4 + 1 / 2) / 2


# three of four found, one of six called by mistake: precision and recall 3 / 4
PREDICTED, PRESENT = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], bool), np.array([1] * 4 + [0] * 6, bool)


def test_f1_and_mcc_by_hand_and_of_one_answer_for_all():
    assert f1(PREDICTED, PRESENT) == 2 * 3 / (2 * 3 + 1 + 1)
    assert mcc(PREDICTED, PRESENT) == pytest.approx((3 * 5 - 1 * 1) / (4 * 4 * 6 * 6) ** 0.5)
    assert f1(PRESENT, PRESENT) == 1 and mcc(PRESENT, PRESENT) == pytest.approx(1)
    assert f1(~PRESENT, PRESENT) == 0 and mcc(~PRESENT, PRESENT) == pytest.approx(-1)
    always, never = np.full(10, True), np.full(10, False)
    assert [mcc(always, PRESENT), mcc(PRESENT, always), mcc(never, PRESENT), mcc(PRESENT, never)] == [0] * 4
    assert f1(always, PRESENT) == 2 * 4 / (4 + 10) and f1(never, PRESENT) == f1(never, never) == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_better_f1(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.3
    best = f1(scores >= best_threshold(scores, labels), labels)
    assert best == max(f1(scores >= threshold, labels) for threshold in np.arange(0, 1.2, 0.2))


# ------------------------------------------------------------------------------------------------- intervals


def test_an_interval_is_a_function_of_its_seed_and_leaves_out_draws_without_a_class():
    values = np.random.default_rng(0).random(50)
    one, same, other = (bootstrap_ci(np.mean, values, seed=seed) for seed in (3, 3, 4))
    assert one == same != other
    assert bootstrap_ci(auroc, np.array([0.0, 1, 2]), np.array([False, False, True])) == (1, 1)


def obvious_interval(metric, *arrays, patients, n, seed=0):
    """Draws the patients, puts their rows together and computes the metric: nothing is counted."""
    rng, names, values = np.random.default_rng(seed), np.unique(patients), []
    for _ in range(n):
        drawn = names[rng.integers(len(names), size=len(names))]
        rows = np.concatenate([np.flatnonzero(patients == name) for name in drawn])
        values.append(metric(*(array[rows] for array in arrays)))
    return tuple(np.nanpercentile(values, (2.5, 97.5)))


@pytest.mark.parametrize("metric", [auroc, average_precision, f1])
@pytest.mark.parametrize("cells", [1, 500, 10**6])
def test_counted_draws_give_the_interval_of_the_obvious_bootstrap(metric, cells, monkeypatch):
    """Also of the mean over findings, one of which most draws miss, and with ties."""
    monkeypatch.setitem(evaluate.drawn.__kwdefaults__, "cells", cells)
    rng = np.random.default_rng(0)
    patients, labels = rng.integers(30, size=90), rng.random((90, 3)) < (0.3, 0.6, 0.0)
    labels[7, 2] = True
    scores, known = rng.integers(0, 9, (90, 3)) / 8 + labels / 4, rng.random((90, 3)) < 0.9
    known[7] = True
    scores = scores > 0.5 if metric is f1 else scores
    for function, arrays in (
        (metric, (scores[:, 0], labels[:, 0])),
        (partial(evaluate.mean_over_findings, metric), (scores, labels, known)),
    ):
        counted = bootstrap_ci(function, *arrays, n=40, patients=patients)
        assert counted == pytest.approx(
            obvious_interval(function, *arrays, patients=patients, n=40), abs=1e-12
        )


LABELS = np.arange(150) % 3 == 0


@pytest.mark.parametrize(
    ("metric", "sample", "truth", "draws"),
    [
        (np.mean, lambda rng: [rng.random(200) < 0.7], 0.7, 200),
        # of two normal numbers the one with mean 1 is larger than the one with mean 0
        (auroc, lambda rng: [rng.normal(size=150) + LABELS, LABELS], (1 + math.erf(0.5)) / 2, 100),
    ],
    ids=["accuracy", "AUROC"],
)
def test_of_1000_intervals_about_950_hold_the_truth(metric, sample, truth, draws):
    rng, covered = np.random.default_rng(0), 0
    for seed in range(1000):
        low, high = bootstrap_ci(metric, *sample(rng), n=draws, seed=seed)
        covered += low <= truth <= high
    assert 920 <= covered <= 970


def test_whole_patients_are_drawn():
    """Twenty patients with five like images each are as good as twenty images."""
    patient = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5))
    values = np.random.default_rng(1).random(20)
    drawn = bootstrap_ci(np.mean, values[patient], patients=patient)
    assert drawn == pytest.approx(bootstrap_ci(np.mean, values), abs=1e-12)
    low, high = bootstrap_ci(np.mean, values[patient])
    assert high - low < 0.7 * (drawn[1] - drawn[0])  # √5 times as narrow, and wrong


def test_the_interval_of_a_difference_is_paired_drawn_by_patient_and_by_the_metric_of_each_run():
    one, other = np.random.default_rng(0).random((2, 80))
    patients = np.arange(80) // 4
    first, same, second = (Measure(np.mean, (v,), patients=patients) for v in (one, one + 0.25, other))
    assert evaluate.difference([(first, same)]) == pytest.approx((0.25, 0.25, 0.25))
    found = evaluate.difference([(first, second)])
    assert found[1:] == pytest.approx(bootstrap_ci(np.mean, other - one, patients=patients))
    shifted = first._replace(metric=lambda values: values.mean() - 3)  # a distance to its own prompts, say
    assert evaluate.difference([(first, shifted)]) == pytest.approx((-3, -3, -3))


def test_trained_classifiers_are_drawn_for_the_interval():
    """Rows alone would give no width: each classifier is right or wrong everywhere."""
    right = np.tile([1.0, 0, 0, 0], (50, 1))
    entry = evaluate.entry_of(Measure(partial(np.mean, axis=0), (right,)))
    assert entry["value"] == 0.25 and entry["low"] == 0 and entry["high"] >= 0.5
    assert entry["spread"] == 0.5


def covered(sample, truth, draws=300):
    """Share of the intervals that hold the truth; sample: rng -> Measure."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(draws):
        low, high = evaluate.interval(sample(rng))
        inside += low <= truth <= high
    return inside / draws


def clustered(rng):
    """30 patients of five images each, which are often alike."""
    own, patients = rng.random(30) < 0.8, np.arange(150) // 5
    right = np.where(rng.random(150) < 0.7, own[patients], rng.random(150) < 0.8)
    return Measure(evaluate.share, (right,), patients=patients)


def of_classes(sizes, right):
    """Classes of these sizes, with these shares predicted right."""
    true = np.arange(len(sizes)).repeat(sizes)
    return lambda rng: Measure(
        balanced_accuracy, (np.where(rng.random(len(true)) < np.array(right)[true], true, -1), true)
    )


def of_findings(positives, shifts):
    """300 images with correlated scores of findings, which so many have and which are so much higher then."""
    labels = np.array([np.arange(300) * 7 % 300 < number for number in positives]).T

    def sample(rng):
        scores = rng.normal(size=labels.shape) * 0.51**0.5 + 0.7 * rng.normal(size=(300, 1)) + labels * shifts
        if len(positives) == 1:
            return Measure(auroc, (scores[:, 0], labels[:, 0]), counts={"positives": positives[0]})
        return Measure(evaluate.mean_auroc, (scores, labels, np.ones_like(labels)))

    return sample


def shifted(*shifts):
    """The mean AUROC of normal scores that are so much higher in positives."""
    return np.mean([(1 + math.erf(shift / 2)) / 2 for shift in shifts])


@pytest.mark.parametrize(
    ("sample", "truth"),
    [
        (lambda rng: Measure(evaluate.share, (rng.random(30) < 0.95,)), 0.95),
        (clustered, 0.8),
        (of_classes((3, 100), (0.9, 0.8)), 0.85),
        (of_classes((3, 100, 100, 100), (0.4, 0.9, 0.9, 0.9)), 0.775),
        (of_findings([5], [1]), shifted(1)),
        (of_findings([5], [2.8]), shifted(2.8)),
        (of_findings([10], [2]), shifted(2)),
        (of_findings([3, 50, 50], [2.8, 1, 1]), shifted(2.8, 1, 1)),
        (of_findings([1, 100], [2, 1]), shifted(2, 1)),
    ],
    ids=lambda value: "" if callable(value) else f"{value:.3f}",
)
def test_intervals_of_few_rows_and_of_few_positives_hold_the_truth(sample, truth):
    assert 0.905 <= covered(sample, truth) <= 0.99  # 0.95, and three standard errors of 300 draws


def of_pairs(rng, patients=150, pairs=1):
    """Images and reports of five classes, which look as their patient does."""
    sets = torch.tensor(rng.integers(5, size=patients).repeat(pairs))
    centres = 0.7 * rng.normal(size=(patients, 8)).repeat(pairs, 0) + 1.2 * np.eye(5, 8)[sets]
    sides = (torch.tensor(centres + 0.4 * rng.normal(size=centres.shape)) for _ in range(2))
    of = np.arange(patients).repeat(pairs)
    return evaluate.retrieved(*((torch.nn.functional.normalize(side), sets, of) for side in sides), True)


@pytest.mark.parametrize("pairs", [1, 4])
def test_intervals_of_p_at_k_hold_what_other_images_and_other_reports_would_give(pairs):
    rng = np.random.default_rng(0)
    samples = [of_pairs(rng, 150 // pairs, pairs) for _ in range(150)]
    for name in ("i2t_P@1", "i2t_P@10", "t2i_P@5", "i2t_Hit@2") if pairs == 1 else ("i2t_P@10", "t2i_P@10"):
        truth = np.mean([found[name].value for found in samples])
        bounds = [evaluate.interval(found[name]) for found in samples]
        assert 0.9 <= np.mean([low <= truth <= high for low, high in bounds]) <= 0.99, name


def test_candidates_that_are_drawn_with_the_queries_leave_the_precision_as_it_is():
    rng = np.random.default_rng(0)
    texts = rng.random((30, 30)) + np.arange(30) / 10  # some are near to most queries
    texts = texts.argsort(1)
    nearest = np.stack([texts, texts % 3 == 0], 2)
    for k in (1, 2, 10):
        alone, together = (evaluate.precisions(nearest, k, patients) for patients in (None, np.arange(30)))
        assert alone.mean() == pytest.approx(together.mean()) and not np.allclose(alone, together)


def test_the_interval_of_one_share_is_wilsons():
    low, high = evaluate.interval(Measure(evaluate.share, (np.arange(10) < 1,)))
    assert (low, high) == pytest.approx((0.0179, 0.4042), abs=1e-3)  # Brown, Cai and DasGupta, 2001
    low, high = evaluate.interval(Measure(evaluate.share, (np.full(20, True),)))
    assert high == pytest.approx(1) and low == pytest.approx(20 / (20 + 1.96**2))


@pytest.mark.parametrize("seed", range(5))
def test_parts_that_err_against_each_other_have_an_interval_without_nan(seed):
    """Each patient is right in one class and wrong in the other."""
    right = np.random.default_rng(seed).random(21) < 0.5
    true = np.arange(2).repeat(21)
    predicted = np.where(np.r_[right, ~right], true, -1)
    measure = Measure(balanced_accuracy, (predicted, true), patients=np.tile(np.arange(21), 2))
    assert evaluate.interval(measure) == pytest.approx((0.5, 0.5), abs=0.05)  # of one class alone 0.2


@pytest.mark.parametrize("positives", [1, 4, 5, 35, 36])
def test_too_few_positives_or_negatives_have_no_interval(positives, capsys):
    labels = np.arange(40) < positives
    names, columns = ["A", "B"], np.stack([labels, np.arange(40) % 2 == 0], 1)
    scores = np.random.default_rng(0).random((40, 2))
    found = evaluate.classification(evaluate.Scored(names, scores, columns, ~columns, np.arange(40)))
    entries = {name: evaluate.entry_of(measure) for name, measure in found.items()}
    few = not 5 <= positives <= 35
    assert (entries["AUROC A"]["low"] is None) == (entries["mAP"]["low"] is None) == few
    assert entries["AUROC mean"]["low"] is not None and entries["AUROC B"]["positives"] == 20
    evaluate.print_table("zero-shot", entries, all_metrics=True)
    table = capsys.readouterr().out
    assert ("no interval of fewer than 5 positives" in table) == few
    assert re.search(rf"AUROC A .* {positives}\n", table)
    assert bool(re.search(r"AUROC A +0\.\d{3} +- ", table)) == few


# -------------------------------------------------------------------------------------------------- features


def alike(one, other):
    return np.allclose(one, other, atol=1e-5)  # float32, summed up in an order that depends on the batch


def test_the_score_of_an_image_does_not_depend_on_the_others_nor_on_the_mode(run):
    records = data.load_records(["phantom=16"], "test", 20)
    alone = [encode(run, [record]).image_features[0] for record in records]
    run.model.train()
    assert alike(encode(run, records).image_features, alone) and not run.model.training


def test_features_of_reports_belong_to_their_records_and_have_no_vectors(run):
    records = data.load_records(["phantom=16"], "train", 20)  # half of them without a report
    encoded = encode(run, records)
    assert [row for row, record in enumerate(records) if record.report] == encoded.report_rows.tolist()
    alone = [encode_texts(run, [records[row].report])[0] for row in encoded.report_rows]
    assert alike(encoded.report_features, alone)


@pytest.mark.parametrize("part", ["image_projection", "text_projection"])
def test_features_that_are_not_finite_and_unreadable_images_are_refused(tiny_run, tmp_path, part):
    run = evaluate.load_run(tiny_run)
    with pytest.raises(BadInput, match="bad.png"):
        evaluate.encode_images(run, [tmp_path / "bad.png"])
    getattr(run.model, part).weight.data[0, 0] = NAN
    with pytest.raises(BadInput, match="the model is broken"):
        encode(run, data.load_records(["phantom=16"], "test", 3))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_paths_pictures_and_arrays_of_an_image_have_the_same_features(run, tmp_path, depth):
    """Also of 16 bits, which Pillow itself would clip at 255; an array has 8."""
    grey, path = data.phantom("16", "valid")[0].image.copy(), tmp_path / "0.png"
    grey[0] = 255  # more than one pixel, which alone would not set the exposure
    Image.fromarray(grey.astype(depth) * depth(1 if depth == np.uint8 else 257)).save(path)
    with Image.open(path) as picture:
        features = evaluate.encode_images(run, [path, picture, grey])
    assert np.array_equal(features[0], features[1]) and np.array_equal(features[0], features[2])
    with pytest.raises(BadInput, match="uint8"):
        evaluate.encode_images(run, [grey.astype(float)])


# ---------------------------------------------------------------------------------------------- checkpoints


def swap(part, name, value):
    """A change of a checkpoint's state: one value in one of its parts, "" for the state itself."""

    def change(state):
        if part == "bert":
            return state | {"bert": json.dumps(json.loads(state["bert"]) | {name: value})}
        return state | ({part: state[part] | {name: value}} if part else {name: value})

    return change


FAULTS = {
    "no dict": lambda state: [state],
    "another kind": swap("", "kind", "other"),
    "no weights": lambda state: {name: part for name, part in state.items() if name != "model"},
    "a weight is missing": swap("", "model", {}),
    "a weight is left over": swap("model", "more", torch.zeros(1)),
    "another shape": swap("model", "image_projection.weight", torch.zeros(2)),
    "NaN": swap("model", "log_scale", torch.tensor(NAN)),
    "no options": swap("", "args", None),
    "an option is missing": swap("", "args", {"image_size": 16}),
    "a size of 0": swap("args", "patch_size", 0),
    "a huge size": swap("args", "image_size", 10**18),
    "sizes that are no list": swap("args", "swin_depths", 2),
    "endless depths": swap("args", "swin_depths", [10**6, 1]),
    "sizes that do not fit": swap("args", "patch_size", 3),
    "a broken tokenizer": swap("", "tokenizer", "{"),
    "a tokenizer of another model": swap("bert", "vocab_size", 3),
    "no BERT": swap("", "bert", "[]"),
    "an unknown activation": swap("bert", "hidden_act", "none/of-ours"),
    "heads that do not fit": swap("bert", "num_attention_heads", 7),
    "endless layers": swap("bert", "num_hidden_layers", 10**9),
    "layers of another type": swap("bert", "num_hidden_layers", "2"),
    "cut short": lambda state: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_checkpoint_is_one_sentence(tiny_run, tmp_path, capsys, fault):
    state = FAULTS[fault](torch.load(tiny_run / "best.pt", weights_only=True))
    torch.save(state, tmp_path / "bad.pt")
    if state is None:
        (tmp_path / "bad.pt").write_bytes((tiny_run / "best.pt").read_bytes()[:5000])
    assert evaluate.main(["--checkpoint", str(tmp_path / "bad.pt"), "--limit", "5"]) == 2
    assert re.match(r".*bad.pt is cut short or no checkpoint of this program \(.+\)$", refusal(capsys))


def test_evaluation_takes_the_threads_of_training_unless_told(tiny_run, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    words = f"--checkpoint {tiny_run} --limit 5 --task zero-shot --out {tmp_path}/r.json".split()
    assert evaluate.main(words) == evaluate.main([*words, "--threads", "3"]) == 0
    assert taken == [1, 3]


def test_fp32_on_the_cpu_is_exact_to_float32(options):
    evaluate.resolve_machine(options("--precision", "fp32"))
    a, b = torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-4)  # bf16 is 0.1 away


def test_a_configuration_cannot_choose_how_attention_is_computed(tiny_run, tmp_path):
    state = torch.load(tiny_run / "best.pt", weights_only=True)
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "auto_map"):
        state = swap("bert", name, "someone/code")(state)
    torch.save(state, tmp_path / "other.pt")
    config = evaluate.load_run(tmp_path / "other.pt").model.text_encoder.bert.config
    assert config._attn_implementation == "sdpa" and not hasattr(config, "auto_map")


# -------------------------------------------------------------------------------------------------- program


def entries_of(file):
    """{task: entry} of a file of results."""
    return {entry["task"]: entry for entry in json.loads(file.read_text()).values()}


def metrics_of(file):
    """{task: {metric: entry}} of a file of results."""
    return {task: entry["metrics"] for task, entry in entries_of(file).items()}


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory):
    """What evaluate.py writes of the tiny run."""
    file = tmp_path_factory.mktemp("results") / "results.json"
    flags = ["--limit", "40", "--all-metrics", "--out", str(file)]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags]) == 0
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
    return metrics_of(file)


AUROCS = [f"AUROC {name}" for name in (*data.PHANTOM_FINDINGS, "mean")]
CLASS_LEVEL = ("P@1", "P@2", "P@5", "P@10", "Hit@2", "Hit@5", "Hit@10")
RETRIEVAL = (*CLASS_LEVEL, "R@1", "R@5", "R@10", "median rank")


def test_results_have_every_metric_with_value_interval_chance_and_number(results):
    kinds = {f"{side} {name}" for side in ("pair", "absence") for name in AUROCS}
    kinds |= {f"{kind}{name[5:]}" for kind in ("F1", "MCC", "binary accuracy") for name in AUROCS}
    assert results["zero-shot"].keys() == {"accuracy", "balanced accuracy", "mAP", *AUROCS, *kinds}
    assert results["retrieval"].keys() == {f"{way}_{m}" for way in ("i2t", "t2i") for m in RETRIEVAL}
    for metric, entry in [pair for task in results.values() for pair in task.items()]:
        assert {"value", "low", "high", "chance", "n", "patients"} <= entry.keys(), metric
        if metric != "mAP":  # records drawn twice raise the precision, so its interval may lie above it
            assert entry["low"] <= entry["value"] <= entry["high"], metric
        assert ("constant" in entry) == (metric in ("accuracy", "balanced accuracy")), metric
        assert entry["patients"] == 40 or any(name in metric for name in data.PHANTOM_FINDINGS), metric
    assert {(e["n"], e["candidates"]) for e in results["retrieval"].values()} == {(40, 40)}


def test_whole_patients_are_counted(run):
    records = data.load_records(["phantom=16"], "test", 20)
    encoded = encode(run, [replace(record, patient=str(i % 7)) for i, record in enumerate(records)])
    found = evaluate.zero_shot(run, encoded) | evaluate.retrieval(run, encoded)
    entries = {evaluate.entry_of(found[name])["patients"] for name in ("accuracy", "i2t_P@1", "t2i_R@1")}
    assert entries == {7}


@pytest.fixture
def assess(tiny_run, tmp_path):
    """evaluate.py on five phantoms, with further flags, into tmp_path/results.json -> exit status."""
    fixed = ["--checkpoint", str(tiny_run), "--limit", "5", "--out", str(tmp_path / "results.json")]
    return lambda *flags: evaluate.main([*fixed, *map(str, flags)])


def test_the_screen_shows_the_main_rows_and_on_demand_all(assess, tmp_path, capsys):
    shown = {}
    for flags in ((), ("--all-metrics",)):
        assert assess("--limit", 20, *flags) == 0
        table = capsys.readouterr().out
        assert re.search(r"zero-shot +value +95 % interval +chance +constant +n +positives\n", table)
        assert re.search(r"accuracy +\d\.\d{3} +\d\.\d{3} to \d\.\d{3} +0\.200 +0\.\d00 +20\n", table)
        lines = table.splitlines()
        shown[flags] = [line.split("  ")[0] for line in lines if re.search(r"( to | - ).* \d+$", line)]
        assert ("F1 mean" in metrics_of(tmp_path / "results.json")["zero-shot"]) == bool(flags)
    main = ["accuracy", "balanced accuracy", "AUROC mean", "i2t_P@1", "t2i_P@1", "i2t_R@10", "t2i_R@10"]
    assert shown[()] == main
    every = [name for metrics in metrics_of(tmp_path / "results.json").values() for name in metrics]
    assert shown[("--all-metrics",)] == every and len(every) > 25


def test_a_score_worse_than_a_blind_guess_is_pointed_out(capsys):
    entry = {"value": 0.1, "low": 0.05, "high": 0.2, "chance": 0.5, "n": 9}
    few = entry | {"low": None, "high": None}
    entries = {"AUROC A": entry, "AUROC B": entry | {"high": 0.6}, "AUROC C": few, "accuracy": entry}
    for task in ("zero-shot", "linear-probe"):  # the probe has no prompts to be wrong
        evaluate.print_table(task, entries, all_metrics=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "AUROC A" in warnings[0]


def test_a_checkpoint_is_a_folder_or_a_file(tiny_run):
    for place in (".", "best.pt", "last.pt"):
        assert set(evaluate.load_run(tiny_run / place).findings) == {*data.PHANTOM_FINDINGS, data.NO_FINDING}


def test_the_newest_run_is_the_default_and_without_one_it_says_how_to_make_one(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2 and "train.py" in refusal(capsys)
    for age, name in enumerate(["newer", "a-older", "z-older"]):
        ignored = shutil.ignore_patterns("results.json")
        shutil.copytree(tiny_run, tmp_path / "runs" / name, ignore=ignored)
        os.utime(tmp_path / "runs" / name / "best.pt", (1e9 - age, 1e9 - age))
    assert evaluate.main(["--task", "retrieval", "--limit", "5"]) == 0
    assert metrics_of(tmp_path / "runs" / "newer" / "results.json").keys() == {"retrieval"}


NONSENSE = (
    "--repeats 0,--fractions 0,--fractions 101,--sentences -1,--limit 0,--repeats x,--fractions nan,"
    "--task poetry,--check run,--compare a --gallery x.png,--compare a --checkpoint b,--gallery x,--out x.csv"
)


@pytest.mark.parametrize("flags", NONSENSE.split(","))
def test_options_that_make_no_sense_are_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert flags.split()[0] in line or "has to end in" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--task zero-shot --classes Edema Gout", ["'Gout'", *data.PHANTOM_FINDINGS]),
        ("--task prompt-sensitivity --classes Edema Gout", ["'Gout'", *data.PHANTOM_FINDINGS]),
        ("--task zero-shot --prompts missing.json", ["missing.json"]),
        ("--task zero-shot --prompts missing", ["missing"]),
        ("--task retrieval --sentences 300", ["'Atelectasis'"]),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(assess, capsys, flags, named):
    assert assess(*flags.split()) == 2
    sentence = refusal(capsys)
    assert all(name in sentence for name in named)


def test_sentences_replace_the_reports(assess, tmp_path):
    assert assess("--task", "retrieval", "--sentences", "3", "--limit", "100") == 0
    results = metrics_of(tmp_path / "results.json")["retrieval"]
    assert results.keys() == {f"{way}_{metric}" for way in ("i2t", "t2i") for metric in CLASS_LEVEL}
    assert (results["i2t_P@1"]["n"], results["i2t_P@1"]["candidates"]) == (100, 15)
    assert results["i2t_P@1"]["chance"] == pytest.approx(1 / 5)


def test_of_data_without_labels_retrieval_is_by_instance_and_zero_shot_refused(
    assess, tmp_path, monkeypatch, capsys
):
    image = np.zeros((8, 8), np.uint8)
    notes = [Record(image, f"Report {n}.", {}, "1", "notes") for n in range(4)]
    monkeypatch.setitem(data.DATASETS, "notes", lambda root, split: notes)
    assert assess("--data", f"notes={tmp_path}") == 0
    metrics = metrics_of(tmp_path / "results.json")["retrieval"]
    assert metrics.keys() == {"i2t_R@1", "t2i_R@1", "i2t_median rank", "t2i_median rank"}
    assert assess("--data", f"notes={tmp_path}", "--task", "zero-shot") == 2 and "labels" in refusal(capsys)


# -------------------------------------------------------------------------------------------------- results


def test_ctrl_c_keeps_what_is_done(assess, monkeypatch, tmp_path, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluate.TASKS, "retrieval", stopped)
    assert assess() == 130
    assert refusal(capsys) == "stopped by Ctrl-C; the results of finished tasks are written"
    assert metrics_of(tmp_path / "results.json").keys() == {"zero-shot"}


def test_a_task_run_again_replaces_its_entry_and_no_other(assess, tmp_path, capsys):
    file = tmp_path / "results.json"
    for task in ("retrieval", "zero-shot", "zero-shot"):
        assert assess("--task", task) == 0
        assert "test split of phantom=16, first 5, 5 images" in capsys.readouterr().out
    first = json.loads(file.read_text())
    assert [entry["task"] for entry in first.values()] == ["retrieval", "zero-shot"]
    assert assess("--task", "zero-shot", "--prompt-set", "word") == 0
    second = json.loads(file.read_text())
    assert len(second) == 3 and second.items() >= first.items()


def test_a_result_says_what_it_was_made_of(assess, tmp_path):
    assert assess("--task", "retrieval", "--split", "all") == 0
    entry = entries_of(tmp_path / "results.json")["retrieval"]
    assert entry["chosen"] == "all split" and entry["data"] == ["phantom=16"]
    assert entry["counts"] == {"images": 5, "reports": 3, "labelled": 5} and entry["seed"] == 0
    assert {"torch", "numpy", "transformers"} <= entry["versions"].keys() and "commit" in entry


def test_prompts_and_their_combination_are_in_the_result_and_the_confusion_names_its_classes(
    assess, tmp_path
):
    (tmp_path / "prompts.json").write_text(json.dumps({n: [n, f"some {n}"] for n in data.PHANTOM_FINDINGS}))
    source = str(tmp_path / "prompts.json")
    classes = [*data.PHANTOM_FINDINGS, "Edema"]  # a class named twice counts once
    flags = ["--task", "zero-shot", "--prompts", source, "--combine", "max", "--classes", *classes]
    assert assess(*flags) == 0
    entry = entries_of(tmp_path / "results.json")["zero-shot"]
    assert entry["options"] == {"prompt_set": source, "combine": "max", "classes": classes}
    assert entry["metrics"]["accuracy"]["chance"] == 1 / 5
    assert entry["prompts"][0]["Edema"] == ["Edema", "some Edema"] and entry["prompts"][1] == {}
    confusion = entry["metrics"]["balanced accuracy"]["confusion"]
    assert [row.keys() for row in confusion.values()] == [confusion.keys()] * 5
    assert sum(confusion["Edema"].values()) == 1 and list(confusion) == list(data.PHANTOM_FINDINGS)


def test_other_data_are_chosen_and_classes_that_training_never_saw_named(assess, cases, tmp_path, capsys):
    assert assess(*cases, "--split", "train", "--task", "zero-shot") == 0
    printed, noted = capsys.readouterr()
    assert f"train split of {cases[1]}, first 5, 5 images" in printed
    assert "no label Abdomen, Head, Thorax" in noted
    assert entries_of(tmp_path / "results.json")["zero-shot"]["not trained"] == ["Abdomen", "Head", "Thorax"]


def test_the_hash_of_records_changes_with_labels_and_reports_but_not_with_their_order():
    image = np.zeros((8, 8), np.uint8)
    one, other = (Record(image, "A report.", {name: 1}, "1", "test") for name in "AB")
    labels, reports = evaluate.records_sha256([one, other])
    assert evaluate.records_sha256([other, one]) == (labels, reports)
    assert evaluate.records_sha256([one, replace(other, labels={})])[0] != labels
    assert evaluate.records_sha256([one, replace(other, report="More.")])[1] != reports


@pytest.mark.parametrize("content", ["mine", "[1]", "[" * 9999])
def test_results_that_are_no_results_are_kept(assess, tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert assess("--task", "retrieval") == 2 and "results.json" in refusal(capsys)
    assert (tmp_path / "results.json").read_text() == content


# ----------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def family(tiny_run, tmp_path):
    """Folders of runs with these options changed and weights of their own, by (number, {option: value})."""

    def make(number, changed):
        folder = tmp_path / f"run{number}"
        shutil.copytree(tiny_run, folder)
        saved = torch.load(folder / "best.pt", weights_only=True)
        saved["args"] |= changed
        noise = torch.Generator().manual_seed(number)
        weight = saved["model"]["image_projection.weight"]
        weight += torch.randn(weight.shape, generator=noise)
        torch.save(saved, folder / "best.pt")
        return str(folder)

    return make


@pytest.fixture
def compare(tmp_path):
    """Zero-shot of these runs, side by side -> [entry of results.json]."""

    def compare(*folders, status=0):
        file = tmp_path / "compared.json"
        file.unlink(missing_ok=True)
        flags = ["--task", "zero-shot", "--limit", "40", "--out", str(file)]
        assert evaluate.main(["--compare", *folders, *flags]) == status
        return list(json.loads(file.read_text()).values()) if file.exists() else []

    return compare


def test_runs_that_differ_in_the_seed_alone_are_one_group_and_compared_by_seed(family, compare, capsys):
    seeds = {True: (0, 1, 2), False: (1, 2, 3)}
    folders = [family(4 * mask + n, {"label_mask": mask, "seed": n}) for mask in seeds for n in seeds[mask]]
    found = compare(*folders)
    value = {Path(each["checkpoint"]).parent.name: each["metrics"]["accuracy"]["value"] for each in found}
    one, other = (np.array([value[f"run{4 * mask + n}"] for n in seeds[mask]]) for mask in (True, False))
    (line,) = re.findall(r"\nzero-shot  accuracy .*±.*", capsys.readouterr().out)
    t_of = {2: 12.706, 3: 4.303}
    halves = [t_of[len(each)] * each.std(ddof=1) / len(each) ** 0.5 for each in (one, other)]
    cells = [f"{each.mean():.3f} ± {half:.3f}" for each, half in zip((one, other), halves, strict=True)]
    assert re.findall(r"-?\d\.\d{3} ± \d\.\d{3}", line) == cells
    less = other[:2] - one[1:]
    ((mean, low, high),) = re.findall(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)", line)
    assert mean == f"{less.mean():+.3f}"
    half = t_of[2] * less.std(ddof=1) / 2**0.5  # over the seeds; with the patients it is wider
    assert float(low) < less.mean() - half < less.mean() + half < float(high)


def test_the_interval_over_seeds_has_what_all_of_them_share_the_test_patients():
    """Here all seeds differ by the same in each patient, so seeds alone would give no width."""
    one, other = np.random.default_rng(0).random((2, 50))
    first, group = ({seed: Measure(np.mean, (each,)) for seed in range(3)} for each in (one, other))
    alone = evaluate.seeds_difference({0: first[0]}, {0: group[0]})
    assert evaluate.seeds_difference(first, group) == pytest.approx(alone)
    low, high = bootstrap_ci(np.mean, other - one)
    assert alone == pytest.approx(((other - one).mean(), low, high))
    assert evaluate.seeds_difference(first, {7: group[0]}) is None


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (999, 1.962)]
)
def test_students_t_as_in_the_tables(freedom, t):
    assert evaluate.t_p(t, freedom) == evaluate.t_p(-t, freedom) == pytest.approx(0.05, abs=1e-4)
    values = np.random.default_rng(0).random(freedom + 1)
    error = values.std(ddof=1) / len(values) ** 0.5
    assert evaluate.half_width(values) == pytest.approx(t * error, rel=1e-3)
    assert evaluate.half_width(values, further=True) == pytest.approx(
        t * error * (freedom + 2) ** 0.5, rel=3e-4
    )


def test_p_of_paired_differences_and_their_correction_by_hand():
    assert evaluate.t_test([1, 2, 3]) == pytest.approx(0.0742, abs=1e-4)  # t = 3.464, 2 degrees of freedom
    assert evaluate.t_test([0.5, 0.5]) == 0 and evaluate.t_test([0, 0]) == 1
    assert math.isnan(evaluate.t_test([1.0]))
    corrected = evaluate.holm({"a": 0.02, "b": 0.01, "c": 0.5, "d": 0.021})
    assert corrected == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06})
    assert evaluate.holm({"a": 0.9, "b": 0.8}) == {"a": 1, "b": 1}


def test_a_comparison_says_what_its_intervals_are_over_and_on_demand_lists_the_seeds(
    family, tmp_path, capsys
):
    folders = [family(2 * mask + n, {"label_mask": mask, "seed": n}) for mask in (0, 1) for n in (0, 1)]
    fixed = ["--task", "zero-shot", "--limit", "20", "--out", str(tmp_path / "compared.json"), "--compare"]
    said = "one seed each: the interval is over test patients alone"
    assert evaluate.main([*fixed, folders[0], folders[2]]) == 0
    assert said in capsys.readouterr().out
    assert evaluate.main([*fixed, *folders]) == 0
    several = capsys.readouterr().out
    assert said not in several and "over seeds and test patients" in several and "seed 0" not in several
    assert evaluate.main([*fixed, *folders, "--all-metrics"]) == 0
    listed = re.findall(r"seed 0 \d\.\d{3}, seed 1 \d\.\d{3}, a further seed .*", capsys.readouterr().out)
    assert len(listed) > 2


def test_runs_of_two_commits_and_two_checkpoints_of_one_run_are_two_groups(family):
    runs = [evaluate.load_run(family(n, {"seed": n, "commit": "ab"[n]})) for n in range(2)]
    assert evaluate.groups_by_flags(runs) == [{0: 0}, {1: 1}]
    assert evaluate.groups_by_flags(runs[:1] * 2) == [{0: 0}, {0: 1}]


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_the_commit_says_whether_files_differ_and_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    (tmp_path / "evaluate.py").write_text("1")
    assert evaluate.commit() == "unknown"
    own = "-c user.name=a -c user.email=a -c commit.gpgsign=false commit -m one".split()
    for command in (["init"], ["add", "."], own):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    clean = evaluate.commit()
    (tmp_path / "evaluate.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{40}", clean) and evaluate.commit() == f"{clean}-dirty"


def test_classes_are_the_findings_of_the_first_run_that_are_there(family, compare):
    sets = [["Gout", "Edema", "Atelectasis"], ["Edema"], ["Gout"]]
    folders = [family(n, {"findings": each}) for n, each in enumerate(sets)]
    entries = compare(*folders[:2])
    assert [entry["options"]["classes"] for entry in entries] == 2 * [["Atelectasis", "Edema"]]
    assert entries[0]["metrics"]["accuracy"]["chance"] == 1 / 2
    (entry,) = compare(folders[2])
    assert "classes" not in entry["options"] and entry["metrics"]["accuracy"]["chance"] == 1 / 5


def test_runs_stand_side_by_side_with_the_flags_that_differ(tiny_run, family, compare, capsys):
    assert len(compare(str(tiny_run), family(0, {"label_mask": "none"}))) == 2
    table = capsys.readouterr().out
    assert "--label-mask: both | none" in table and "--seed" not in table
    assert "2 less 1" in table and "zero-shot  AUROC mean" in table and "AUROC Edema" not in table
    assert "95 %" not in table  # no run's own table
