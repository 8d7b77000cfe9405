"""Metrics against hand-made matrices and slow twins, the tasks, and what evaluate.py writes and refuses."""

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
from PIL import Image

import data
import evaluate
from data import Record
from evaluate import (
    auroc,
    balanced_accuracy,
    bootstrap_ci,
    combined,
    encode,
    encode_findings,
    encode_texts,
    over_queries,
    own_rank,
    precision_at_k,
    recall_at_k,
    shares_at_k,
)

A, B, AB, NONE = [True, False], [False, True], [True, True], [False, False]


def some_labels(rng, n):
    """(n, 3) bool; many rows are alike and some have no finding."""
    return rng.random((n, 3)) < 0.4


# ------------------------------------------------------------------------------------------------ retrieval


def test_precision_of_a_hand_made_matrix():
    similarity = [[0.9, 0.8, 0.1], [0.3, 0.2, 0.7]]
    assert precision_at_k(similarity, [A, B], [A, B, A], ks=(1, 2, 3)) == {1: 1 / 2, 2: 1 / 4, 3: 1 / 2}


def test_a_candidate_is_relevant_only_with_exactly_the_findings_of_the_query():
    assert precision_at_k(np.zeros((1, 4)), [AB], [A, B, AB, NONE], ks=(4,)) == {4: 1 / 4}


def test_without_findings_nothing_is_relevant():
    assert precision_at_k(np.zeros((1, 2)), [NONE], [NONE, NONE], ks=(2,)) == {2: 0}


def test_ties_count_against_the_precision_of_the_query():
    for candidates in ([A, B, B, A], [B, B, A, A]):
        assert precision_at_k(np.ones((1, 4)), [A], candidates, ks=(1, 2, 4)) == {1: 0, 2: 0, 4: 1 / 2}


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
    queries, candidates = some_labels(rng, 12), some_labels(rng, 20)
    similarity = rng.integers(0, 8, (12, 20)) / 8  # many ties
    slow = {k: slow_precision(similarity, queries, candidates, k) for k in (1, 2, 5, 10)}
    assert precision_at_k(similarity, queries, candidates) == pytest.approx(slow)


def test_more_places_than_candidates_are_refused():
    with pytest.raises(ValueError, match="10"):
        precision_at_k(np.zeros((2, 9)), np.ones((2, 2), bool), np.ones((9, 2), bool))


def test_recall_of_a_hand_made_matrix():
    similarity = [[0.9, 0.1, 0.2], [0.8, 0.5, 0.3], [0.3, 0.2, 0.1]]  # own text first, second and third
    assert recall_at_k(similarity, ks=(1, 2, 3)) == {1: 1 / 3, 2: 2 / 3, 3: 1}


def test_ties_count_against_the_recall_of_the_query():
    assert recall_at_k(np.ones((3, 3)), ks=(1, 2, 3)) == {1: 0, 2: 0, 3: 1}


@pytest.mark.parametrize("seed", range(5))
def test_recall_equals_its_slow_twin(seed):
    similarity = np.random.default_rng(seed).integers(0, 15, (15, 15))  # many ties
    ahead = [sum(row[j] >= row[i] for j in range(15) if j != i) for i, row in enumerate(similarity)]
    assert recall_at_k(similarity) == {k: np.mean([a < k for a in ahead]) for k in (1, 5, 10)}


@pytest.mark.parametrize("seed", range(5))
def test_without_ties_recall_and_median_rank_are_those_of_open_clip(seed):
    """Its definition: the place of the own partner in the candidates sorted by similarity, below K."""
    similarity = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed))
    place = (similarity.argsort(dim=1, descending=True) == torch.arange(40)[:, None]).nonzero()[:, 1]
    assert recall_at_k(similarity) == {k: (place < k).double().mean().item() for k in (1, 5, 10)}
    assert torch.equal(own_rank(similarity).long(), place)


@pytest.mark.parametrize("seed", range(5))
def test_with_copies_the_rank_equals_its_slow_twin(seed):
    rng = np.random.default_rng(seed)
    queries, candidates = rng.permutation(6).repeat(2), rng.permutation(np.r_[:6, :6, :3])
    similarity = rng.integers(0, 9, (len(queries), len(candidates)))  # many ties
    slow = []
    for row, query in zip(similarity, queries, strict=True):
        nearest = max(s for s, id in zip(row, candidates, strict=True) if id == query)
        slow.append(sum(s >= nearest for s, id in zip(row, candidates, strict=True) if id != query))
    assert own_rank(similarity, torch.tensor(queries), torch.tensor(candidates)).tolist() == slow


@pytest.mark.parametrize("cells", [1, 7, 40, 1000])
def test_pieces_of_any_size_give_the_same_shares_and_ranks(cells):
    rng = np.random.default_rng(0)
    queries, candidates = (torch.tensor(rng.integers(-2, 3, (12, 3)), dtype=torch.float32) for _ in range(2))
    sets = torch.tensor(rng.integers(-1, 3, 12))
    for function, rows in (
        (partial(shares_at_k, candidate_sets=sets, ks=(1, 2, 5, 10)), sets),
        (partial(own_rank, candidate_ids=torch.arange(12)), torch.arange(12)),
    ):
        pieces = over_queries(function, queries, candidates, rows, cells=cells)
        assert torch.equal(pieces, function(queries @ candidates.T, rows))


# ------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_the_double_loop(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 40), rng.random(40) < 0.3
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn(seed):
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(seed)
    scores, labels = rng.integers(0, 30, 200) / 7, rng.random(200) < 0.3
    assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize(("scores", "value"), [([1, 2, 3, 4], 1), ([4, 3, 2, 1], 0), ([5, 5, 5, 5], 0.5)])
def test_auroc_of_the_best_the_worst_and_the_blind(scores, value):
    assert auroc(scores, [False, False, True, True]) == value


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_auroc_without_one_of_the_classes_is_nan(labels):
    assert np.isnan(auroc([0.1, 0.2], labels))


def test_balanced_accuracy_weighs_classes_alike():
    true, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 2, 0, 1])
    assert balanced_accuracy(predicted, true) == (3 / 4 + 1 / 2) / 2


# ------------------------------------------------------------------------------------------------- intervals


def test_the_interval_brackets_the_value():
    values = np.random.default_rng(0).random(100)
    low, high = bootstrap_ci(np.mean, values)
    assert low < values.mean() < high


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_ci(np.mean, values)
    width = 2 * 1.96 * values.std() / 400**0.5
    assert high - low == pytest.approx(width, rel=0.1)  # percentiles of 1000 draws scatter by some 4 %


def test_the_interval_of_a_constant_has_no_width():
    assert bootstrap_ci(np.mean, np.full(20, 0.25)) == (0.25, 0.25)


def test_rows_of_several_arrays_are_drawn_alike():
    values = np.random.default_rng(0).integers(0, 9, 50)
    assert bootstrap_ci(lambda one, other: np.mean(other - one), values, values + 1) == (1, 1)


def test_same_seed_same_interval():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_ci(np.mean, values, seed=3) == bootstrap_ci(np.mean, values, seed=3)


def test_another_seed_is_another_interval():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_ci(np.mean, values, seed=3) != bootstrap_ci(np.mean, values, seed=4)


def test_draws_in_which_a_class_is_absent_are_left_out_of_the_interval():
    low, high = bootstrap_ci(auroc, np.array([0.0, 1.0, 2.0]), np.array([False, False, True]))
    assert (low, high) == (1, 1)


def share_covered(metric, sample, truth, draws):
    """Share of 1,000 simulated data sets whose interval holds the truth."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(1000):
        low, high = bootstrap_ci(metric, *sample(rng), n=draws, seed=seed)
        covered += low <= truth <= high
    return covered / 1000


def test_of_1000_intervals_of_an_accuracy_about_950_hold_the_truth():
    assert 0.92 <= share_covered(np.mean, lambda rng: [rng.random(200) < 0.7], 0.7, 200) <= 0.97


def test_of_1000_intervals_of_an_auroc_about_950_hold_the_truth():
    labels = np.arange(150) % 3 == 0

    def sample(rng):
        return rng.normal(size=150) + labels, labels

    truth = (1 + math.erf(0.5)) / 2  # the chance that of two normal numbers the one with mean 1 is larger
    assert 0.92 <= share_covered(auroc, sample, truth, 100) <= 0.97


# -------------------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def run(tiny_run):
    return evaluate.load_run(tiny_run / "best.pt")


def alike(one, other):
    return np.allclose(one, other, atol=1e-5)  # float32, summed up in an order that depends on the batch


def test_the_score_of_an_image_does_not_depend_on_the_others(run):
    records = data.load_records(["phantom=16"], "test", 20)
    alone = [encode(run, [record]).image_features[0] for record in records]
    assert alike(encode(run, records).image_features, alone)


def test_features_are_taken_in_evaluation_mode(run):
    run.model.train()
    encode(run, data.load_records(["phantom=16"], "test", 1))
    assert not run.model.training


def test_features_of_reports_belong_to_their_records(run):
    records = data.load_records(["phantom=16"], "train", 20)  # half of them without a report
    encoded = encode(run, records)
    assert [row for row, record in enumerate(records) if record.report] == encoded.report_rows.tolist()
    alone = [encode(run, [records[row]]).report_features[0] for row in encoded.report_rows]
    assert alike(encoded.report_features, alone)


def test_unreadable_images_are_refused(run, tmp_path):
    bad = Record(tmp_path / "bad.png", None, frozenset("A"), "1", "test")
    with pytest.raises(data.BadInput, match="bad.png"):
        encode(run, [bad])


def test_unreadable_images_are_left_out_on_demand(run, tmp_path):
    good = data.load_records(["phantom=16"], "test", 12)
    bad = Record(tmp_path / "bad.png", "Bad.", frozenset({"Edema"}), "1", "test")
    encoded = encode(run, [*good[:3], bad, *good[3:]], skip_bad_images=1)
    assert encoded.records == good and alike(encoded.report_features, encode(run, good).report_features)


def test_prompts_are_encoded_with_the_vectors_and_stay_with_their_finding(run):
    texts = {"Edema": ["edema", "fluid"], "Gout": ["gout"]}
    features = encode_findings(run, texts)
    assert [len(each) for each in features] == [2, 1]
    assert alike(features[1][0], run.model.encode_prompt(*run.prompt_tokens(["gout"]))[0].detach())


def test_reports_are_encoded_without_the_vectors(run):
    records = [record for record in data.load_records(["phantom=16"], "test", 3)]
    assert alike(encode_texts(run, [r.report for r in records]), encode(run, records).report_features)


# ---------------------------------------------------------------------------------------------------- tasks


def hand_made(image_features, present, absent=None, report_features=None, report_rows=None):
    present = np.array(present, bool)
    absent = ~present if absent is None else np.array(absent, bool)
    names = ["A", "B", "C"][: present.shape[1]]
    records = [
        Record(
            np.zeros((8, 8), np.uint8), f"Report {i}.", frozenset(np.array(names)[row].tolist()), "1", "test"
        )
        for i, row in enumerate(present)
    ]
    rows = np.arange(len(records)) if report_rows is None else np.array(report_rows)
    texts = np.zeros((len(rows), 2)) if report_features is None else np.array(report_features, float)
    return evaluate.Encoded(records, names, np.array(image_features, float), texts, rows, present, absent)


@pytest.fixture
def classify(run, monkeypatch):
    """zero_shot of images whose features are their scores."""

    def unit_vectors(run, texts):
        return [np.eye(3)[["ABC".index(name)]] for name in texts]

    monkeypatch.setattr(evaluate, "encode_findings", unit_vectors)
    return lambda scores, *labels, **options: evaluate.zero_shot(run, hand_made(scores, *labels), **options)


def test_zero_shot_takes_the_nearest_prompt(classify):
    scores, present = (
        [[3, 1, 2], [1, 2, 3], [1, 2, 3], [2, 3, 1]],
        [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]],
    )
    results = classify(scores, present)
    assert results["accuracy"]["value"] == 3 / 4 and results["balanced accuracy"]["value"] == 5 / 6


def test_accuracy_is_over_images_with_exactly_one_of_the_classes(classify):
    results = classify([[3, 1, 2]] * 4, [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert results["accuracy"]["n"] == 2 and results["accuracy"]["value"] == 1 / 2


def test_chance_is_one_of_the_classes(classify):
    results = classify([[3, 1, 2]] * 2, [[1, 0, 0], [0, 0, 1]])
    assert results["accuracy"]["chance"] == 1 / 3 and results["AUROC A"]["chance"] == 1 / 2


def test_classes_restrict_the_choice(classify):
    scores, present = [[3, 1, 2], [3, 2, 1], [3, 1, 2]], [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    results = classify(scores, present, classes=["B", "C"])
    auroc = {"AUROC B", "AUROC C", "AUROC mean"}
    assert results.keys() == {"accuracy", "balanced accuracy"} | auroc | {f"pair {name}" for name in auroc}
    assert results["accuracy"]["value"] == 1 and results["accuracy"]["n"] == 2


def test_auroc_leaves_out_what_is_unknown(classify):
    present, absent = [[1, 0], [0, 0], [0, 0], [0, 1]], [[0, 1], [1, 1], [0, 0], [0, 0]]
    results = classify([[2, 0, 0], [1, 0, 0], [9, 0, 0], [9, 5, 0]], present, absent)
    assert results["AUROC A"]["value"] == 1 and results["AUROC A"]["n"] == 2
    assert results["AUROC B"]["value"] == 1 and results["AUROC B"]["n"] == 3


def test_auroc_mean_is_the_mean_over_the_findings(classify):
    results = classify([[3, 1, 2], [1, 2, 3], [1, 2, 3]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert results["AUROC mean"]["value"] == np.mean([results[f"AUROC {name}"]["value"] for name in "ABC"])


def test_zero_shot_uses_the_template_of_training(run, monkeypatch):
    used = []

    def spy(run, texts):
        used.append([len(each) for each in texts.values()])
        return [np.eye(2)[[i]] for i in range(len(texts))]

    monkeypatch.setattr(evaluate, "encode_findings", spy)
    encoded = hand_made([[1, 0], [0, 1]], [A, B])
    evaluate.zero_shot(run, encoded)
    evaluate.zero_shot(run, encoded, prompt_set="ensemble")
    assert used == [[1, 1], [1, 1], [3, 3], [3, 3]]


PROMPTS = [np.array([[1.0, 0], [0, 1]]), np.array([[0.6, 0.8]])]


@pytest.mark.parametrize(
    ("combine", "scores"),
    [("mean-embedding", [0.5**0.5, 0.6]), ("mean-similarity", [0.5, 0.6]), ("max", [1, 0.6])],
)
def test_prompts_are_combined_by_hand(combine, scores):
    assert combined(np.array([[1.0, 0]]), PROMPTS, combine) == pytest.approx(np.array([scores]))


def test_with_one_prompt_all_combinations_are_its_cosine():
    images = np.random.default_rng(0).normal(size=(5, 2))
    for combine in evaluate.COMBINE:
        assert combined(images, PROMPTS[1:], combine) == pytest.approx(images @ PROMPTS[1].T)


def test_several_prompts_show_all_combinations(classify):
    results = classify(
        [[3, 1, 2], [1, 2, 3]], [A + [False], B + [False]], prompt_set="ensemble", combine="max"
    )
    assert {"accuracy", "accuracy, mean-embedding", "accuracy, mean-similarity"} <= results.keys()
    assert "accuracy, max" not in results


def test_the_pair_score_is_the_difference_between_presence_and_absence(run, monkeypatch):
    """Presence alone ranks the images wrongly, presence against absence rightly."""
    features = iter([[np.array([[1.0, 0]])], [np.array([[0, 1.0]])]])
    monkeypatch.setattr(evaluate, "encode_findings", lambda run, texts: next(features))
    encoded = hand_made([[1, 0], [2, 5]], [[True], [False]])
    results = evaluate.zero_shot(run, encoded)
    assert results["AUROC A"]["value"] == 0 and results["pair AUROC A"]["value"] == 1


def test_the_pair_score_ranks_like_the_softmax_over_both():
    positive, negative = np.random.default_rng(0).uniform(-1, 1, (2, 50))
    softmax = np.exp(positive) / (np.exp(positive) + np.exp(negative))
    assert (np.argsort(positive - negative) == np.argsort(softmax)).all()


# ------------------------------------------------------------------------------------------ prompts of a file


@pytest.fixture
def prompt_file(tmp_path):
    """Writes a prompt set -> its path."""

    def write(content):
        path = tmp_path / "prompts.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_a_file_of_prompts_with_and_without_negatives(prompt_file):
    source = prompt_file({"A": ["a", "an a"], "B": {"positive": ["b"], "negative": ["no b"]}, "C": ["c"]})
    assert evaluate.read_prompts(source, ["B", "A"]) == ({"B": ["b"], "A": ["a", "an a"]}, {"B": ["no b"]})


@pytest.mark.parametrize("name", ["prompts.txt", "missing.json", "missing"])
def test_prompts_that_are_no_file_of_prompts_are_refused(assess, tmp_path, capsys, name):
    (tmp_path / "prompts.txt").write_text("a word")
    assert assess("--task", "zero-shot", "--prompts", str(tmp_path / name)) == 2
    assert name in refusal(capsys)


NO_PROMPTS = ["", "[]", '{"A": "a"}', '{"A": []}', '{"A": [1]}', '{"A": {"both": ["a"]}}', '{"A": null}']


@pytest.mark.parametrize("content", [*NO_PROMPTS, '{"A": {"positive": "a"}}'])
def test_what_is_no_prompt_set_is_refused(prompt_file, content):
    with pytest.raises(data.BadInput, match="prompts.json"):
        evaluate.read_prompts(prompt_file(content), ["A"])


def test_a_class_without_a_prompt_is_named(assess, prompt_file, capsys):
    assert assess("--task", "zero-shot", "--prompts", prompt_file({"Edema": ["edema"]})) == 2
    sentence = refusal(capsys)
    assert "'Atelectasis'" in sentence and "Edema" in sentence


def test_prompts_their_combination_and_source_are_in_the_result(assess, prompt_file, tmp_path):
    source = prompt_file({name: [name, f"some {name}"] for name in data.PHANTOM_FINDINGS})
    assert assess("--task", "zero-shot", "--prompts", source, "--combine", "max") == 0
    (entry,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert entry["options"] == {"prompt_set": source, "combine": "max"}
    assert entry["prompts"][0]["Edema"] == ["Edema", "some Edema"] and entry["prompts"][1] == {}


def test_classes_that_training_never_saw_are_named(assess, chests, tmp_path, capsys):
    assert assess("--data", f"nih-chestxray14={chests}", "--task", "zero-shot", "--split", "train") == 0
    assert "no label Pneumonia" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert entry["not trained"] == ["Pneumonia"]


def test_a_score_worse_than_a_blind_guess_is_pointed_out(capsys):
    entry = {"value": 0.1, "low": 0.05, "high": 0.2, "chance": 0.5, "n": 9}
    evaluate.print_table(
        {"zero-shot": {"AUROC A": entry, "AUROC B": entry | {"high": 0.6}, "accuracy": entry}}
    )
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "AUROC A" in warnings[0]


def test_retrieval_of_hand_made_features(run):
    """Images 0 and 2 have a report; each report lies nearest to the other's image."""
    encoded = hand_made([[1, 0], [1, 0], [0, 1]], [A, A, B], None, [[0, 1], [1, 0]], [0, 2])
    results = evaluate.retrieval(run, encoded)
    assert {name: entry["value"] for name, entry in results.items()} == {
        "i2t_P@1": 0, "i2t_P@2": 0.5, "i2t_R@1": 0, "i2t_median rank": 2,
        "t2i_P@1": 0, "t2i_P@2": 0.5, "t2i_R@1": 0, "t2i_median rank": 2,
    }  # fmt: skip


def test_text_to_image_is_image_to_text_with_the_sides_swapped(run):
    rng = np.random.default_rng(0)
    images, reports, labels = rng.normal(size=(12, 4)), rng.normal(size=(12, 4)), some_labels(rng, 12)
    one = evaluate.retrieval(run, hand_made(images, labels, None, reports))
    other = evaluate.retrieval(run, hand_made(reports, labels, None, images))
    for metric in ("P@1", "P@2", "P@5", "P@10", "R@1", "R@5", "R@10", "median rank"):
        one[f"t2i_{metric}"].pop("of"), other[f"i2t_{metric}"].pop("of")
        assert one[f"t2i_{metric}"] == other[f"i2t_{metric}"]


def test_pairs_without_findings_count_for_recall_alone(run):
    results = evaluate.retrieval(run, hand_made(np.eye(3), [A, NONE, B], None, np.eye(3)))
    assert results["i2t_P@1"]["n"] == 2 and results["i2t_R@1"]["n"] == 3


def test_chance_of_retrieval_is_that_of_a_blind_draw(run):
    results = evaluate.retrieval(run, hand_made(np.eye(6), [A, A, A, A, B, B], None, np.eye(6)))
    assert results["i2t_P@1"]["chance"] == results["i2t_P@5"]["chance"] == (4 * 4 + 2 * 2) / 6**2
    assert results["i2t_R@1"]["chance"] == pytest.approx(1 / 6)
    assert results["i2t_R@5"]["chance"] == pytest.approx(5 / 6)


def with_reports(encoded, *reports):
    """The same records with these reports."""
    pairs = zip(encoded.records, reports, strict=True)
    return encoded._replace(records=[replace(record, report=report) for record, report in pairs])


def test_a_text_that_stands_twice_is_one_candidate_and_right_for_both_images(run):
    encoded = hand_made(np.eye(3), [A, A, B], None, np.eye(3)[[0, 0, 2]])
    results = evaluate.retrieval(run, with_reports(encoded, "Normal.", "Normal. ", "Edema."))
    assert results["i2t_R@1"]["candidates"] == 2 and results["i2t_R@1"]["n"] == 3
    assert results["i2t_R@1"]["value"] == 2 / 3  # the second image is as near to both texts


def test_a_text_that_stands_twice_is_one_query_and_looks_for_any_of_its_images(run):
    encoded = hand_made(np.eye(3), [A, A, B], None, [[0, 1, 0], [0, 1, 0], [0, 0, 1]])
    entry = evaluate.retrieval(run, with_reports(encoded, "Normal.", "Normal.", "Edema."))["t2i_R@1"]
    assert entry["value"] == 1 and entry["n"] == 2
    assert entry["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_median_rank_counts_from_one(run):
    features = np.eye(4)
    entry = evaluate.retrieval(run, hand_made(features, [A] * 4, None, features))["i2t_median rank"]
    assert entry["value"] == 1 and entry["chance"] == 2.5


def reporting(*pairs):
    image = np.zeros((8, 8), np.uint8)
    return [Record(image, report, frozenset(findings), "1", "test") for report, findings in pairs]


def test_sentences_of_a_finding_are_those_of_its_reports_alone():
    records = reporting(
        ("Big heart. Bones intact.", "A"), ("Wet lungs! Bones intact.", "B"), ("Air.", "AB"), (None, "A")
    )
    texts, labels = evaluate.class_sentences(records, ["A", "B"], 1)
    assert texts == ["Big heart.", "Wet lungs!"] and labels.tolist() == [A, B]


def test_same_seed_same_sentences():
    records = data.load_records(["phantom=16"], "test", 100)
    one, same, other = (evaluate.class_sentences(records, ["Edema"], 5, seed)[0] for seed in (0, 0, 1))
    assert one == same != other


def test_sentences_replace_the_reports(assess, tmp_path):
    assert assess("--task", "retrieval", "--sentences", "3", "--limit", "100") == 0
    results = metrics_of(tmp_path / "results.json")["retrieval"]
    assert results.keys() == {f"{way}_P@{k}" for way in ("i2t", "t2i") for k in (1, 2, 5, 10)}
    assert (results["i2t_P@1"]["n"], results["i2t_P@1"]["candidates"]) == (100, 15)
    assert results["i2t_P@1"]["chance"] == pytest.approx(1 / 5)


def test_fewer_sentences_than_asked_for_are_refused(assess, capsys):
    assert assess("--task", "retrieval", "--sentences", "300") == 2
    assert "'Atelectasis'" in refusal(capsys)


# -------------------------------------------------------------------------------------------------- program


def metrics_of(file):
    """{task: {metric: entry}} of a file of results."""
    return {entry["task"]: entry["metrics"] for entry in json.loads(file.read_text()).values()}


@pytest.fixture(scope="module")
def results(tiny_run, tmp_path_factory):
    """What evaluate.py writes of the tiny run."""
    file = tmp_path_factory.mktemp("results") / "results.json"
    assert evaluate.main(["--checkpoint", str(tiny_run), "--limit", "40", "--out", str(file)]) == 0
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
    return metrics_of(file)


def test_zero_shot_reports_accuracy_and_auroc(results):
    auroc = {f"AUROC {name}" for name in data.PHANTOM_FINDINGS}
    auroc |= {"AUROC mean"} | {f"pair {name}" for name in auroc} | {"pair AUROC mean"}
    assert results["zero-shot"].keys() == {"accuracy", "balanced accuracy"} | auroc


def test_retrieval_reports_precision_and_recall_both_ways(results):
    metrics = ("P@1", "P@2", "P@5", "P@10", "R@1", "R@5", "R@10", "median rank")
    assert results["retrieval"].keys() == {f"{way}_{m}" for way in ("i2t", "t2i") for m in metrics}


def test_each_metric_has_value_interval_chance_and_number(results):
    lacking = [
        f"{metric}: {key}"
        for task in results.values()
        for metric, entry in task.items()
        for key in ("value", "low", "high", "chance", "n")
        if key not in entry
    ]
    assert lacking == []


def test_each_value_lies_in_its_interval(results):
    entries = [entry for task in results.values() for entry in task.values() if "low" in entry]
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in entries)


def test_retrieval_says_how_many_candidates_there_were(results):
    candidates = {(entry["n"], entry["candidates"]) for entry in results["retrieval"].values()}
    assert candidates == {(40, 40)}


@pytest.fixture
def assess(tiny_run, tmp_path):
    """evaluate.py on five phantoms, with further flags, into tmp_path/results.json -> exit status."""
    fixed = ["--checkpoint", str(tiny_run), "--limit", "5", "--out", str(tmp_path / "results.json")]
    return lambda *flags: evaluate.main([*fixed, *map(str, flags)])


def refusal(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    script, _, sentence = line.partition(": ")
    assert script == "evaluate.py"
    return sentence


def test_the_table_shows_every_metric(assess, capsys):
    assess("--task", "zero-shot")
    table = capsys.readouterr().out
    assert all(name in table for name in ("accuracy", "AUROC Edema", "95 %", "chance", "n"))


@pytest.mark.parametrize("task", ["zero-shot", "retrieval"])
def test_a_task_runs_alone(assess, tmp_path, task):
    assess("--task", task)
    assert metrics_of(tmp_path / "results.json").keys() == {task}


def test_the_data_of_training_are_the_default(assess, capsys):
    assess("--task", "retrieval")
    assert "test split of phantom=16, first 5, 5 images" in capsys.readouterr().out


def test_other_data_and_another_split_are_chosen(assess, chests, capsys):
    assess("--task", "zero-shot", "--data", f"nih-chestxray14={chests}", "--split", "valid")
    assert f"valid split of nih-chestxray14={chests}, first 5, 2 images" in capsys.readouterr().out


@pytest.mark.parametrize("place", [".", "best.pt", "last.pt"])
def test_a_checkpoint_is_a_folder_or_a_file(tiny_run, tmp_path, capsys, place):
    flags = ["--task", "retrieval", "--limit", "5", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--checkpoint", str(tiny_run / place), *flags]) == 0


def test_the_newest_run_is_the_default(tiny_run, tmp_path, monkeypatch, capsys):
    for age, name in enumerate(["newer", "a-older", "z-older"]):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "best.pt", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--task", "retrieval", "--limit", "5"]) == 0
    assert "newer" in capsys.readouterr().out


def test_without_a_run_it_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 2 and "train.py" in refusal(capsys)


@pytest.mark.parametrize("task", ["zero-shot", "prompt-sensitivity"])
def test_an_unknown_class_is_answered_with_those_there(assess, capsys, task):
    assert assess("--task", task, "--classes", "Edema", "Gout") == 2
    sentence = refusal(capsys)
    assert "'Gout'" in sentence and all(name in sentence for name in data.PHANTOM_FINDINGS)


def test_an_unknown_task_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--task", "poetry"])
    message = capsys.readouterr().err
    assert all(task in message for task in ("zero-shot", "retrieval", "all"))


def test_options_cannot_be_abbreviated():
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--check", "run"])


def test_retrieval_alone_on_data_without_reports_is_refused(assess, chests, capsys):
    assert assess("--data", f"nih-chestxray14={chests}", "--task", "retrieval") == 2
    assert "reports" in refusal(capsys)


def test_of_all_tasks_retrieval_is_left_out_on_data_without_reports(assess, chests, capsys):
    assert assess("--data", f"nih-chestxray14={chests}") == 0
    assert "retrieval is left out" in capsys.readouterr().out


@pytest.fixture
def unlabelled(tmp_path, monkeypatch):
    reports = [
        Record(np.zeros((8, 8), np.uint8), f"Report {n}.", frozenset(), "1", "notes") for n in range(4)
    ]
    monkeypatch.setitem(data.DATASETS, "notes", lambda root, split: reports)
    return f"notes={tmp_path}"


def test_zero_shot_alone_on_data_without_labels_is_refused(assess, unlabelled, capsys):
    assert assess("--data", unlabelled, "--task", "zero-shot") == 2 and "labels" in refusal(capsys)


def test_retrieval_of_data_without_labels_is_by_instance(assess, unlabelled, tmp_path):
    assert assess("--data", unlabelled) == 0
    metrics = metrics_of(tmp_path / "results.json")["retrieval"]
    assert metrics.keys() == {"i2t_R@1", "t2i_R@1", "i2t_median rank", "t2i_median rank"}


# -------------------------------------------------------------------------------------------------- results


def test_a_task_run_again_replaces_its_entry_and_no_other(assess, tmp_path):
    file = tmp_path / "results.json"
    for task in ("retrieval", "zero-shot", "zero-shot"):
        assert assess("--task", task) == 0
    first = json.loads(file.read_text())
    assert assess("--task", "zero-shot", "--prompt-set", "word") == 0
    second = json.loads(file.read_text())
    assert len(first) == 2 and len(second) == 3 and second.items() >= first.items()


def test_results_are_beside_the_checkpoint(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--task", "retrieval", "--limit", "5"]) == 0
    assert metrics_of(tmp_path / "run" / "results.json").keys() == {"retrieval"}


def test_a_result_says_what_it_was_made_of(assess, tmp_path):
    assert assess("--task", "retrieval") == 0
    (entry,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert entry["counts"] == {"images": 5, "reports": 5, "labelled": 5} and entry["seed"] == 0
    assert entry["reports"] == {"phantom": data.REPORTS["phantom"]}
    assert {"torch", "numpy", "transformers"} <= entry["versions"].keys() and "commit" in entry


def test_the_fingerprint_changes_with_labels_and_reports_but_not_with_their_order():
    one, other = reporting(("A report.", "A"), ("A report.", "B"))
    labels, reports = evaluate.fingerprint([one, other])
    assert evaluate.fingerprint([other, one]) == (labels, reports)
    assert evaluate.fingerprint([one, replace(other, findings=frozenset())])[0] != labels
    assert evaluate.fingerprint([one, replace(other, report="More.")])[1] != reports


def test_results_that_are_no_results_are_kept(assess, tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    assert assess("--task", "retrieval") == 2 and "results.json" in refusal(capsys)
    assert (tmp_path / "results.json").read_text() == "mine"


# ----------------------------------------------------------------------------------------------- comparison


def paired(one, other):
    one, other = (evaluate.measured(np.mean, np.array(each), draws=0) for each in (one, other))
    return evaluate.difference(one, other)


def test_the_difference_of_a_run_with_itself_is_nothing():
    values = np.random.default_rng(0).random(50)
    assert paired(values, values) == (0, 0, 0)


def test_the_same_records_are_drawn_for_both_runs():
    values = np.random.default_rng(0).random(50)
    assert paired(values, values + 0.25) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_of_a_difference_is_that_of_the_mean_difference():
    one, other = np.random.default_rng(0).random((2, 80))
    assert paired(one, other)[1:] == pytest.approx(bootstrap_ci(np.mean, other - one))


def test_whole_patients_are_drawn():
    """Twenty patients with five like images each are as good as twenty images."""
    patient = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5))
    values = np.random.default_rng(1).random(20)
    drawn = bootstrap_ci(np.mean, values[patient], patients=patient)
    assert drawn == pytest.approx(bootstrap_ci(np.mean, values), abs=1e-12)
    low, high = bootstrap_ci(np.mean, values[patient])
    assert high - low < 0.7 * (drawn[1] - drawn[0])  # √5 times as narrow, and wrong


def test_results_say_of_how_many_patients_they_are(run):
    records = data.load_records(["phantom=16"], "test", 20)
    records = [replace(record, patient=str(i % 7)) for i, record in enumerate(records)]
    encoded = evaluate.encode(run, records)
    found = evaluate.zero_shot(run, encoded, draws=20) | evaluate.retrieval(run, encoded, draws=20)
    assert {entry["patients"] for name, entry in found.items() if "AUROC" not in name} == {7}


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


def test_runs_that_differ_in_the_seed_alone_are_one_group(family, tmp_path, capsys):
    masks = (True, False)
    folders = [
        family(3 * mask + seed, {"label_mask": mask, "seed": seed}) for mask in masks for seed in range(3)
    ]
    flags = ["--task", "zero-shot", "--limit", "40", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--compare", *folders, *flags]) == 0
    found = {
        e["checkpoint"]: e["metrics"] for e in json.loads((tmp_path / "results.json").read_text()).values()
    }
    values = np.array([found[f"{folder}/best.pt"]["accuracy"]["value"] for folder in folders]).reshape(2, 3)
    line = next(
        line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("zero-shot  accuracy")
    )
    cells = [values[0], values[1], values[1] - values[0]]
    expected = [(each.mean(), 4.303 * each.std(ddof=1) / 3**0.5) for each in cells]
    assert re.findall(r"-?\d\.\d{3} ± \d\.\d{3}", line) == [f"{m:.3f} ± {h:.3f}" for m, h in expected]


def test_differences_are_between_runs_of_one_seed(family, tmp_path, capsys):
    seeds = {True: (0, 1, 2), False: (1, 2, 3)}
    folders = [family(4 * mask + n, {"label_mask": mask, "seed": n}) for mask in seeds for n in seeds[mask]]
    flags = ["--task", "zero-shot", "--limit", "40", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--compare", *folders, *flags]) == 0
    found = json.loads((tmp_path / "results.json").read_text()).values()
    value = {Path(each["checkpoint"]).parent.name: each["metrics"]["accuracy"]["value"] for each in found}
    pairs = np.array([value[f"run{n}"] - value[f"run{4 + n}"] for n in (1, 2)])
    (line,) = re.findall(r"\nzero-shot  accuracy .*±.*", capsys.readouterr().out)
    half = 12.706 * pairs.std(ddof=1) / 2**0.5
    assert line.endswith(f"{pairs.mean():+.3f} ± {half:.3f}")


def test_runs_of_two_commits_are_two_groups(family, capsys):
    runs = [evaluate.load_run(f"{family(n, {'seed': n, 'commit': 'ab'[n]})}/best.pt") for n in range(2)]
    assert evaluate.groups_by_flags(runs) == [{0: 0}, {1: 1}]


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
@pytest.mark.parametrize("git", ["clean", "dirty", "none"])
def test_a_changed_program_is_another_commit(tmp_path, monkeypatch, git):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "evaluate.py").write_text("1")
    monkeypatch.setattr(evaluate, "__file__", str(folder / "evaluate.py"))
    if git != "none":
        call = partial(subprocess.run, cwd=folder, check=True, capture_output=True)
        call(["git", "init"])
        call(["git", "add", "."])
        own = "-c user.name=a -c user.email=a -c commit.gpgsign=false".split()
        call(["git", *own, "commit", "-m", "one"])
    if git == "dirty":
        (folder / "evaluate.py").write_text("2")
    one = evaluate.commit()
    (folder / "evaluate.py").write_text("3")
    other = evaluate.commit()
    assert one != other and ("-dirty-" in one) == (git == "dirty")
    assert other.startswith("unknown-") == (git == "none")


def test_prompts_of_two_lengths_have_a_difference_and_no_interval():
    one, other = (evaluate.measured(np.mean, np.arange(n), draws=0) for n in (4, 8))
    value, low, high = evaluate.difference(one, other)
    assert value == 2 and math.isnan(low) and math.isnan(high)


def test_a_run_of_some_findings_is_asked_for_these(family, tmp_path):
    folder = family(0, {"findings": ["Cardiomegaly", "Edema"]})
    flags = ["--task", "zero-shot", "--limit", "40", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--checkpoint", folder, *flags]) == 0
    (entry,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert entry["metrics"]["accuracy"]["chance"] == 0.5 and "AUROC Consolidation" not in entry["metrics"]


def test_runs_of_different_findings_are_compared_by_those_that_both_have(family, tmp_path, capsys):
    sets = [["Cardiomegaly", "Edema", "Atelectasis"], ["Edema", "Atelectasis"], ["Consolidation"]]
    folders = [family(n, {"findings": each}) for n, each in enumerate(sets)]
    flags = ["--task", "zero-shot", "--limit", "40", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--compare", *folders[:2], *flags]) == 0
    entries = list(json.loads((tmp_path / "results.json").read_text()).values())
    assert [entry["options"]["classes"] for entry in entries] == 2 * [["Atelectasis", "Edema"]]
    capsys.readouterr()
    assert evaluate.main(["--compare", *folders[1:], *flags]) == 2 and "--classes" in refusal(capsys)


def test_each_run_is_measured_by_its_own_metric():
    """The distance to its own prompts, say."""
    values = np.arange(10.0)
    one, other = (
        evaluate.measured(lambda v, centre=centre: v.mean() - centre, values, draws=0) for centre in (0, 3)
    )
    assert evaluate.difference(one, other) == pytest.approx((-3, -3, -3))


def test_a_class_named_twice_counts_once(assess, tmp_path):
    classes = ["Edema", "Edema", "Cardiomegaly"]
    assert assess("--task", "zero-shot", "--limit", "40", "--classes", *classes) == 0
    assert metrics_of(tmp_path / "results.json")["zero-shot"]["accuracy"]["chance"] == 0.5


def test_two_checkpoints_of_one_run_are_two_groups(tiny_run):
    run = evaluate.load_run(tiny_run / "best.pt")
    assert evaluate.groups_by_flags([run, run]) == [{0: 0}, {0: 1}]


def test_runs_stand_side_by_side_with_the_flags_that_differ(tiny_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_run, tmp_path / "other")
    saved = torch.load(tmp_path / "other" / "best.pt", weights_only=True)
    saved["args"]["label_mask"] = False
    saved["model"]["image_projection.weight"].neg_()
    torch.save(saved, tmp_path / "other" / "best.pt")
    flags = ["--task", "zero-shot", "--limit", "20", "--out", str(tmp_path / "results.json")]
    assert evaluate.main(["--compare", str(tiny_run), str(tmp_path / "other"), *flags]) == 0
    table = capsys.readouterr().out.partition("\n1: ")[2]
    assert "--label-mask: True | False" in table and "--seed" not in table
    assert "2 less 1" in table and "zero-shot  AUROC mean" in table
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2


# -------------------------------------------------------------------------------------------------- gallery

GREEN, RED = (0, 128, 0), (255, 0, 0)


@pytest.mark.parametrize(("reports", "colour"), [([[1, 0], [0, 1]], GREEN), ([[0, 1], [1, 0]], RED)])
def test_the_gallery_frames_right_in_green_and_wrong_in_red(run, tmp_path, reports, colour):
    encoded = hand_made([[1, 0], [0, 1]], [A, B], None, reports)
    evaluate.gallery(run, encoded, tmp_path / "gallery.png", columns=1)
    colours = {c for _, c in Image.open(tmp_path / "gallery.png").getcolors(1 << 24)}
    assert colours & {GREEN, RED} == {colour}


def test_the_gallery_is_drawn_on_demand(assess, tmp_path):
    assert assess("--task", "retrieval", "--gallery", tmp_path / "gallery.png") == 0
    assert min(Image.open(tmp_path / "gallery.png").size) > 4 * 224  # 5 rows of a query and 3 reports


def test_a_gallery_without_reports_is_refused(assess, chests, tmp_path, capsys):
    flags = [
        "--data",
        f"nih-chestxray14={chests}",
        "--task",
        "zero-shot",
        "--gallery",
        tmp_path / "gallery.png",
    ]
    assert assess(*flags) == 2 and "reports" in refusal(capsys)
