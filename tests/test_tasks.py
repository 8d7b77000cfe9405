"""The tasks of evaluate.py on features made by hand, the prompts of a file, and the pictures."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import prompts
from data import BadInput, Record
from evaluate import combined, drawn_by_patient, encode_findings, logistic_regression


def records_of(*labels, absent=None, findings="ABC", report="Report {}."):
    """One record, with a patient of its own, for each text of its findings: "AB" has A and B."""
    absent = absent or ["".join(set(findings) - set(each)) for each in labels]
    image = np.zeros((16, 16), np.uint8)
    return [
        Record(
            image, report.format(i), dict.fromkeys(lacks, 0) | dict.fromkeys(has, 1), str(i), "test", str(i)
        )
        for i, (has, lacks) in enumerate(zip(labels, absent, strict=True))
    ]


def hand_made(images, labels, reports=None, rows=None, **more):
    """Encoded of records_of(*labels, **more) with these features of images and, by rows, of reports."""
    records, findings = records_of(*labels, **more), list(more.get("findings", "ABC"))
    present, absent = (np.array([[r.labels.get(f) == v for f in findings] for r in records]) for v in (1, 0))
    images = np.array(images, np.float32)
    reports = images if reports is None else np.array(reports, np.float32)
    rows = np.arange(len(reports)) if rows is None else np.array(rows)
    return evaluate.Encoded(records, findings, images, reports, rows, present, absent, images, images)


def values(measures):
    return {name: measure.value for name, measure in measures.items()}


@pytest.fixture
def on_records(tiny_run, tmp_path, monkeypatch):
    """evaluate.py on the data set "given", {split: records}, with further flags -> exit status."""

    def on_records(splits, *flags):
        monkeypatch.setitem(data.DATASETS, "given", lambda root, split: splits.get(split, []))
        fixed = ["--checkpoint", tiny_run, "--data", f"given={tmp_path}", "--out", tmp_path / "r.json"]
        return evaluate.main([str(flag) for flag in (*fixed, *flags)])

    return on_records


# ------------------------------------------------------------------------------------------------ zero-shot


@pytest.fixture
def classify(run, monkeypatch):
    """zero_shot of images whose features are their scores."""

    def unit_vectors(run, texts):
        return [np.eye(3)[["ABC".index(name)]] for name in texts]

    monkeypatch.setattr(evaluate, "encode_findings", unit_vectors)
    monkeypatch.setattr(evaluate, "refuse_equal_prompts", lambda *_: None)  # a tiny run knows no B

    def classify(scores, labels, absent=None, **options):
        return evaluate.zero_shot(run, hand_made(scores, labels, absent=absent), **options)

    return classify


def test_accuracy_is_over_images_with_exactly_one_of_the_classes_by_the_nearest_prompt(classify):
    found = classify(
        [[3, 1, 2], [1, 2, 3], [1, 2, 3], [2, 3, 1], *2 * [[1, 2, 3]]], ["A", "C", *"BB", "AB", ""]
    )
    assert found["accuracy"].value == 3 / 4 and found["balanced accuracy"].value == 5 / 6
    assert len(found["accuracy"].arrays[0]) == 4
    assert found["accuracy"].chance == 1 / 3 and found["accuracy"].constant == 2 / 4  # "B" for all
    assert found["balanced accuracy"].constant == 1 / 3
    assert found["AUROC A"].chance == 1 / 2 and found["AUROC A"].constant is None


def test_an_image_of_which_another_class_is_unknown_is_left_out_and_counted(classify, capsys):
    found = classify([[3, 1, 2], [1, 3, 2], [1, 2, 3]], ["A", "A", "B"], ["BC", "B", "AC"])
    assert len(found["accuracy"].arrays[0]) == 2 and found["accuracy"].value == 1 / 2
    assert "1 of 3 images with one of the classes are left out" in capsys.readouterr().err


def test_classes_restrict_the_choice(classify):
    found = classify([[3, 1, 2], [3, 2, 1], [3, 1, 2]], ["C", "B", "A"], classes=["B", "C"])
    assert {name for name in found if name.startswith("AUROC")} == {"AUROC B", "AUROC C", "AUROC mean"}
    assert found["accuracy"].value == 1 and len(found["accuracy"].arrays[0]) == 2


def test_auroc_leaves_out_what_is_unknown_and_its_mean_is_over_the_findings(classify):
    found = classify([[2, 0, 0], [1, 0, 0], [9, 0, 0], [0, 5, 0]], ["A", "", "", "B"], ["B", "AB", "", "A"])
    assert found["AUROC A"].value == found["AUROC B"].value == 1 and "AUROC C" not in found
    assert [len(found[f"AUROC {name}"].arrays[0]) for name in "AB"] == [3, 3]
    found = values(classify([[3, 1, 2], [1, 2, 3], [1, 2, 3]], ["A", "C", "B"]))
    assert found["AUROC mean"] == np.mean([found[f"AUROC {name}"] for name in "ABC"])


def test_zero_shot_uses_the_template_of_training(run, monkeypatch):
    used = []
    features = lambda run, texts: used.append(texts) or list(np.eye(2)[:, None])  # noqa: E731
    monkeypatch.setattr(evaluate, "encode_findings", features)
    monkeypatch.setattr(evaluate, "refuse_equal_prompts", lambda *_: None)
    encoded = hand_made([[1, 0], [0, 1]], ["A", "B"], findings="AB")
    evaluate.zero_shot(run, encoded)
    evaluate.zero_shot(run, encoded, prompt_set="ensemble")
    assert used[0] == {name: [prompts.label_prompt(name, run.args.template)] for name in "AB"}
    assert [len(texts["B"]) for texts in used] == [1, 1, 3, 3]


TWO, ONE = np.array([[1.0, 0], [0, 1]]), np.array([[0.6, 0.8]])


@pytest.mark.parametrize(
    ("combine", "score"), [("mean-embedding", 0.5**0.5), ("mean-similarity", 0.5), ("max", 1)]
)
def test_prompts_are_combined_by_hand_and_one_prompt_is_its_cosine(combine, score):
    assert combined(np.array([[1.0, 0]]), [TWO, ONE], combine) == pytest.approx(np.array([[score, 0.6]]))


def test_the_pair_score_is_the_difference_between_presence_and_absence(run, monkeypatch):
    """Presence alone ranks the images wrongly, presence against absence rightly."""
    features = iter([[np.array([[1.0, 0]])], [np.array([[0, 1.0]])]])
    monkeypatch.setattr(evaluate, "encode_findings", lambda run, texts: next(features))
    found = values(evaluate.zero_shot(run, hand_made([[1, 0], [2, 5]], ["A", ""], findings="A")))
    assert found.pop("mAP") == 1 / 2
    assert found == {"AUROC A": 0, "AUROC mean": 0, "pair AUROC A": 1, "pair AUROC mean": 1} | {
        f"absence AUROC {name}": 1 for name in ("A", "mean")
    }


def test_the_threshold_is_the_best_of_the_validation_split(classify, monkeypatch):
    """There A is best called from 2 on and B from 7 on; C is always there, so it has no threshold."""
    valid = hand_made([[2, 7, 0], [3, 0, 0], [1, 0, 0]], ["ABC", "AC", "C"])
    monkeypatch.setattr(evaluate, "encode", lambda run, records: valid)
    others = {"valid": valid.records}
    found = classify([[2, 0, 0], [1, 5, 0], [5, 6, 0]], ["A", "AB", "C"], thresholds=others.get)
    assert found["F1 A"].counts["threshold"] == 2 and found["F1 B"].counts["threshold"] == 7
    # A: found, missed, called by mistake. B: never called, once missed.
    assert found["F1 A"].value == 1 / 2 and found["MCC A"].value == pytest.approx(-1 / 2)
    assert found["binary accuracy A"].value == 1 / 3 and found["binary accuracy B"].value == 2 / 3
    assert found["F1 B"].value == found["MCC B"].value == 0 and found["F1 mean"].value == 1 / 4
    assert found["F1 A"].chance == 4 / 5 and found["binary accuracy B"].chance == 2 / 3
    assert not any(name.startswith("F1 C") for name in found)


def test_what_training_watches_has_no_threshold(run, monkeypatch):
    monkeypatch.setattr(evaluate, "at_thresholds", lambda *_: pytest.fail("a threshold was chosen"))
    scores = evaluate.quick_scores(run, data.load_records(["phantom=16"], "valid", 20))
    assert list(scores) == ["AUROC mean", "i2t_R@10"]


def test_without_labels_to_choose_a_threshold_by_a_note_says_so(classify, monkeypatch, capsys):
    valid = hand_made(np.eye(3)[:2], "AA")
    monkeypatch.setattr(evaluate, "encode", lambda run, records: valid)
    found = classify(np.eye(3), "ABC", thresholds=lambda split: valid.records)
    assert not any(name.startswith(("F1", "MCC", "binary")) for name in found) and "accuracy" in found
    (line,) = capsys.readouterr().err.splitlines()
    assert "F1, MCC and binary accuracy are left out" in line


# ------------------------------------------------------------------------------------------ prompts of a file


def test_a_file_of_prompts_with_and_without_negatives(tmp_path):
    source = tmp_path / "prompts.json"
    source.write_text('{"A": ["a", "an a"], "B": {"positive": ["b"], "negative": ["no b"]}, "C": ["c"]}')
    read = partial(evaluate.read_prompts, str(source))
    assert read(["B", "A"]) == ({"B": ["b"], "A": ["a", "an a"]}, {"B": ["no b"]})
    with pytest.raises(BadInput, match="no prompt for 'Gout'; it has A, B, C"):
        read(["A", "Gout"])


NO_PROMPTS = ["", "[]", '{"A": "a"}', '{"A": []}', '{"A": [1]}', '{"A": {"both": ["a"]}}', '{"A": null}']
NO_PROMPTS += ['{"A": {"positive": "a"}}', "[" * 9999, '{"A": ["\\ud800"]}']


@pytest.mark.parametrize("content", NO_PROMPTS)
def test_what_is_no_prompt_set_is_refused(tmp_path, content):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(BadInput, match="prompts.json"):
        evaluate.read_prompts(str(tmp_path / "prompts.json"), ["A"])


# ------------------------------------------------------------------------------------------------ retrieval


def test_retrieval_of_hand_made_features(run):
    """Images 0 and 2 have a report; each report lies nearest to the other's image."""
    encoded = hand_made([[1, 0], [1, 0], [0, 1]], ["A", "A", "B"], [[0, 1], [1, 0]], [0, 2])
    assert values(evaluate.retrieval(run, encoded)) == {
        "i2t_P@1": 0, "i2t_P@2": 0.5, "i2t_Hit@2": 1, "i2t_R@1": 0, "i2t_median rank": 2,
        "t2i_P@1": 0, "t2i_P@2": 0.5, "t2i_Hit@2": 1, "t2i_R@1": 0, "t2i_median rank": 2,
    }  # fmt: skip


def test_text_to_image_is_image_to_text_with_the_sides_swapped(run):
    rng = np.random.default_rng(0)
    images, reports = rng.normal(size=(2, 12, 4))
    labels = ["".join(name for name in "ABC" if rng.random() < 0.4) for _ in range(12)]
    one = evaluate.retrieval(run, hand_made(images, labels, reports))
    other = evaluate.retrieval(run, hand_made(reports, labels, images))
    for metric in ("P@1", "P@2", "P@5", "P@10", "R@1", "R@5", "R@10", "median rank"):
        assert evaluate.entry_of(one[f"t2i_{metric}"]) == evaluate.entry_of(other[f"i2t_{metric}"])


def test_chance_is_that_of_a_blind_draw_and_pairs_without_findings_count_for_recall_alone(run):
    found = evaluate.retrieval(run, hand_made(np.eye(6), "AAAABB"))
    assert found["i2t_P@1"].chance == found["i2t_P@5"].chance == (4 * 4 + 2 * 2) / 6**2
    assert found["i2t_R@1"].chance == pytest.approx(1 / 6)
    assert found["i2t_R@5"].chance == pytest.approx(5 / 6)
    assert found["i2t_median rank"].value == 1 and found["i2t_median rank"].chance == 3.5
    found = evaluate.retrieval(run, hand_made(np.eye(3), ["A", "", "B"]))
    assert len(found["i2t_P@1"].arrays[0]) == 2 and len(found["i2t_R@1"].arrays[0]) == 3


@pytest.mark.parametrize(
    ("right", "count"), [([1], 7), ([1] * 5, 8), ([3, 1, 9, 1], 30), ([2], 2), ([4, 4], 4)]
)
def test_chance_of_the_median_rank_is_that_of_random_orders(right, count):
    """Over many queries with as many right candidates as these."""
    rng = np.random.default_rng(0)
    ranks = [
        rng.permutation(count)[:number].min() + 1 for number in right for _ in range(20_000 // len(right))
    ]
    middle = [np.quantile(ranks, 0.5 + step) for step in (-0.01, 0.01)]
    assert middle[0] - 0.5 <= evaluate.blind_rank(np.array(right), count) <= middle[1] + 0.5
    assert evaluate.blind_rank(np.ones(4, int), count) == (count + 1) / 2


@pytest.mark.parametrize(("positives", "n"), [(1, 5), (2, 6), (8, 40)])
def test_chance_of_the_average_precision_is_that_of_random_scores(positives, n):
    rng, labels = np.random.default_rng(0), np.arange(n) < positives
    blind = [evaluate.average_precision(rng.random(n), labels) for _ in range(4000)]
    assert evaluate.blind_precision(labels) == pytest.approx(
        np.mean(blind), abs=4 * np.std(blind) / 4000**0.5
    )
    assert evaluate.blind_precision(np.arange(234) < 8) == pytest.approx(0.055, abs=5e-4)


def test_reports_of_images_with_unknown_findings_are_left_out_of_p_at_k_and_counted(run, capsys):
    encoded = hand_made(np.eye(4), "ABAB", absent=["BC", "AC", "B", "AC"])
    found = evaluate.retrieval(run, encoded)
    assert len(found["i2t_P@1"].arrays[0]) == 3 and len(found["i2t_R@1"].arrays[0]) == 4
    assert "1 of 4 reports with findings are left out of P@K" in capsys.readouterr().err


def test_a_text_that_stands_twice_is_one_candidate_and_one_query(run):
    """It is right for both of its images, and looks for any of them."""
    encoded = hand_made(np.eye(3), "AAB", np.eye(3)[[0, 0, 2]])
    pairs = zip(encoded.records, ("Normal.", "Normal. ", "Edema."), strict=True)
    records = [replace(record, report=report) for record, report in pairs]
    found = evaluate.retrieval(run, encoded._replace(records=records))
    one, other = found["i2t_R@1"], found["t2i_R@1"]
    assert one.counts["candidates"] == 2 and len(one.arrays[0]) == 3
    assert one.value == 2 / 3  # the second image is as near to both texts
    assert other.value == 1 and len(other.arrays[0]) == 2
    assert other.chance == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_sentences_of_a_finding_are_those_of_its_reports_alone_drawn_by_the_seed():
    reports = "Big heart. Bones intact.", "Wet lungs! Bones intact.", "Air.", None
    labelled = records_of("A", "B", "AB", "A")
    records = [replace(r, report=text) for r, text in zip(labelled, reports, strict=True)]
    texts, labels = evaluate.class_sentences(records, ["A", "B"], 1)
    assert texts == ["Big heart.", "Wet lungs!"] and labels.tolist() == [[True, False], [False, True]]
    records = data.load_records(["phantom=16"], "test", 100)
    one, same, other = (evaluate.class_sentences(records, ["Edema"], 5, seed)[0] for seed in (0, 0, 1))
    assert one == same != other


def test_sentences_are_of_the_findings_that_an_image_has_alone(run):
    records = [replace(records_of("A")[0], report="Big heart.")]  # none says anything of B
    encoded = hand_made(np.eye(2, 16), ["A", "AB"])
    found = evaluate.retrieval(run, encoded, sentences=1, others=lambda *_: records)
    assert found["i2t_P@1"].value == found["t2i_P@1"].value == 1


# ------------------------------------------------------------------------------------------------- transfer


def test_a_fraction_takes_all_records_of_its_patients_drawn_by_the_seed():
    records = [record for record in records_of(*"ABC" * 20) for _ in range(2)]
    drawn, same, other = (drawn_by_patient(records, 10, seed) for seed in (0, 0, 1))
    patients = {records[row].patient for row in drawn}
    assert len(patients) == 6 and drawn == same != other
    assert drawn == [row for row, record in enumerate(records) if record.patient in patients]
    assert len(drawn_by_patient(records, 0.1, seed=0)) == 2  # at least one patient


def problem():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(200, 4)), dtype=torch.float32)
    present = torch.tensor(rng.random((200, 2)) < 0.4) | (x[:, :2] > 0.5)
    absent = ~present & torch.tensor(rng.random((200, 2)) < 0.8)
    return x, present, absent


def test_the_regression_ends_where_its_gradient_vanishes():
    x, present, absent = problem()
    weight = logistic_regression(x, present, absent, 0.1)
    known = present | absent
    error = ((torch.sigmoid(x @ weight[:-1] + weight[-1]) - present.float()) * known) / known.sum()
    assert torch.allclose(x.T @ error + 0.1 * weight[:-1], torch.zeros(4, 2), atol=1e-4)
    assert torch.allclose(error.sum(0), torch.zeros(2), atol=1e-4)


def test_neither_what_is_unknown_nor_a_finding_without_a_positive_disturbs_the_regression():
    x, present, absent = problem()
    other = x.clone()
    other[~(present | absent).any(1)] = 9.0
    one, same = (logistic_regression(each, present, absent, 0.1) for each in (x, other))
    assert torch.equal(one, same)
    assert logistic_regression(x, present & torch.tensor([True, False]), absent, 0.1).isfinite().all()


def test_a_probe_takes_what_is_known_of_patients_that_are_not_evaluated(on_records, monkeypatch, capsys):
    """The last record has no finding: it is known to lack A. Of the one before nothing is known."""
    records, taken, encode = (
        records_of("A", "B", "C", "", "", absent=["", "", "", "", "A"]),
        [],
        evaluate.encode,
    )
    monkeypatch.setattr(evaluate, "encode", lambda run, found: taken.append(found) or encode(run, found))
    for train in (records, records[:1]):
        splits = {"train": train, "valid": train, "test": records[:1]}
        assert on_records(splits, "--task", "linear-probe") == 2  # the one test image has A
    ids = [[(record.id, record.report) for record in found] for found in taken[1:3]]
    assert ids[0] == [(id, None) for id in "124"]
    assert "no labelled record of the train split is left" in capsys.readouterr().err


def test_aurocs_of_several_classifiers_are_counted_as_those_of_the_drawn_rows():
    rng = np.random.default_rng(0)
    encoded = hand_made(np.eye(12), "AABBABABBBAB", absent="BBAABABAAABA")
    measure = evaluate.transfer(encoded, {1: list(rng.random((3, 12, 3)))})["1 % AUROC mean"]
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=5)
    found = evaluate.of_draws(measure.metric, measure.arrays, counts)
    rows = [np.arange(12).repeat(times) for times in counts]
    assert np.allclose(found, [measure.metric(*(array[some] for array in measure.arrays)) for some in rows])
    assert found.shape == (5, 3) and len(np.unique(found)) > 5


def test_transfer_is_the_mean_over_the_training_draws_and_its_interval_draws_them():
    scores = [np.eye(3), np.roll(np.eye(3), 1, axis=1)]  # all right, all wrong
    accuracy = evaluate.transfer(hand_made(np.eye(3), "ABC"), {1: scores})["1 % accuracy"]
    entry = evaluate.entry_of(accuracy)
    assert entry["value"] == 0.5 and entry["spread"] == pytest.approx(0.5**0.5) and entry["trained"] == 2
    assert (entry["low"], entry["high"]) == (0, 1)
    worse = accuracy._replace(arrays=(np.zeros_like(accuracy.arrays[0]),))
    assert evaluate.difference([(worse, accuracy)]) == (0.5, 0, 1)
    several = hand_made(np.eye(3), ["AB", "B", "C"])  # findings an image: there is no accuracy
    assert evaluate.transfer(several, {10: [np.eye(3)]}).keys() == {"10 % AUROC mean"}


def test_a_linear_probe_reads_what_the_features_hold_beside_pixels_and_an_untrained_tower(run, monkeypatch):
    rng, labels = np.random.default_rng(0), "ABC" * 20
    clean = np.eye(3)[["ABC".index(label) for label in labels]]
    test, train = (hand_made(clean + 0.05 * rng.normal(size=clean.shape), labels) for _ in range(2))
    blank = {True: np.zeros((60, 3), np.float32), False: None}

    def encode(given, records):
        found = test if records is test.records else train
        pixels = rng.normal(size=(60, 3)).astype(np.float32)
        return found._replace(pixels=pixels, pooled=found.pooled if given is run else blank[True])

    monkeypatch.setattr(evaluate, "encode", encode)
    encoded = encode(run, test.records)
    options = {"others": lambda split: train.records, "fractions": (20, 100), "repeats": 2}
    found = evaluate.linear_probe(run, encoded, **options)
    assert found["100 % accuracy"].value == 1 and found["20 % accuracy"].counts == {"trained": 2}
    assert found["100 % accuracy"].constant == pytest.approx(1 / 3)
    assert found["100 % accuracy, untrained"].value == pytest.approx(1 / 3)
    assert found["100 % accuracy, pixels"].value < 0.6


def test_the_untrained_tower_differs_in_the_image_encoder_alone(run):
    twin = evaluate.untrained(run)
    pairs = zip(run.model.named_parameters(), twin.model.parameters(), strict=True)
    changed = {name.split(".")[0] for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed == {"image_encoder"}


def test_the_penalty_is_chosen_by_patients_of_the_share_alone():
    """Noise of 30 columns and 40 rows: a weak penalty fits each fold's noise, a strong one does not."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 40, 30)).astype(np.float32)
    present = torch.tensor(rng.random((40, 2)) < 0.5)
    folds = np.arange(40) % evaluate.FOLDS
    scores = evaluate.probe_scores(train, test, present, ~present, folds)
    tried = [
        logistic_regression(torch.from_numpy((train - train.mean(0)) / train.std(0)), present, ~present, p)
        for p in (1.0, 1e-4)
    ]
    strong, weak = (np.abs(weight[:-1].numpy()).sum() for weight in tried)
    chosen = np.abs(scores - scores.mean(0)).max()
    assert chosen < np.abs(test @ tried[1][:-1].numpy()).max() and strong < weak


def test_results_name_the_fractions_the_variants_and_what_is_near(tiny_run, tmp_path):
    tasks = ["linear-probe", "prompt-sensitivity", "prompt-words"]
    flags = ["--fractions", "10", "100", "--repeats", "2", "--limit", "30", "--out", str(tmp_path / "r.json")]
    assert evaluate.main(["--checkpoint", str(tiny_run), "--task", *tasks, *flags]) == 0
    found = {each["task"]: each["metrics"] for each in json.loads((tmp_path / "r.json").read_text()).values()}
    metrics = [
        f"{percent} % {metric}{baseline}"
        for baseline in ("", ", pixels", ", untrained")
        for percent in (10, 100)
        for metric in ("accuracy", "AUROC mean")
    ]
    assert list(found["linear-probe"]) == metrics
    assert [entry["trained"] for entry in found["linear-probe"].values()] == [2, 2, 1, 1] * 3
    variants = prompts.variants(data.PHANTOM_FINDINGS, "caption").keys()
    shown = found["prompt-sensitivity"].keys()
    assert shown >= {"drop", "mean", "worst", "negated"} and shown - {"drop", "mean", "worst"} <= variants
    assert "caption, upper case" not in shown  # to a vocabulary without capitals it is the trained prompt
    ways = ("trained vectors", "zeros", "untrained vectors", "positions alone", "without vectors")
    words = {f"{kind}, {way}" for kind in ("image", "report", "margin") for way in ways}
    assert found["prompt-words"].keys() == words


# -------------------------------------------------------------------------------------------------- wording


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_the_first_variant_is_the_trained_prompt_and_no_two_are_the_same(template):
    found = list(prompts.variants(["Edema", "Gout"], template).values())
    assert found[0] == {name: [prompts.label_prompt(name, template)] for name in ("Edema", "Gout")}
    texts = [tuple(map(tuple, each.values())) for each in found]
    assert len(texts) == len(set(texts))


def test_drop_mean_and_worst_are_those_of_the_variants(run, monkeypatch):
    """Of the two variants beside the trained prompt one tells all apart, one none; the negated is apart."""
    texts = {"trained": 0, "two": 1, "three": 0, "same": 1, "negated": 1}
    monkeypatch.setattr(prompts, "variants", lambda findings, template: texts)
    turn = [np.eye(3), np.roll(np.eye(3), 1, axis=0)]
    tokens = iter("abcbd")  # "same" has the tokens of "two"
    monkeypatch.setattr(evaluate, "token_lists", lambda run, texts: next(tokens))
    monkeypatch.setattr(evaluate, "encode_findings", lambda run, texts: list(turn[texts][:, None]))
    found = evaluate.prompt_sensitivity(run, hand_made(np.eye(3), "ABC"))
    assert values(found) == {"drop": 0.5, "mean": 0.5, "worst": 0} | {
        "trained": 1, "two": 0, "three": 1, "negated": 0,
    }  # fmt: skip
    assert found["drop"].chance is None and found["mean"].constant == found["mean"].chance == 1 / 3


def test_prompts_that_are_the_same_to_the_run_are_refused_and_cut_ones_counted(run, capsys):
    long = "edema " * 60
    with pytest.raises(BadInput, match="'A' and 'B' are the same"):
        evaluate.refuse_equal_prompts(run, {"A": [f"{long}left"], "B": [f"{long}right"]})
    assert "2 of 2 prompts are longer than" in capsys.readouterr().err
    evaluate.refuse_equal_prompts(run, {"A": ["edema"], "B": ["effusion"]})
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------------------- continuous prompt


def test_what_prompts_do_to_images_and_reports_by_hand_and_a_constant_is_at_chance(run, monkeypatch):
    given = {"way": np.eye(2)}
    monkeypatch.setattr(evaluate, "controls", lambda prompt: {"way": None})
    monkeypatch.setattr(evaluate, "encode_texts", lambda *_, **__: given["way"])
    encoded = hand_made(np.eye(2), "AB", [[0.8, 0.6], [0.9, 0.1]], findings="AB")
    found = values(evaluate.prompt_words(run, encoded))
    assert found == {"image, way": 1, "report, way": 0.5, "margin, way": pytest.approx((0.2 - 0.8) / 2)}
    given["way"] = np.full((2, 2), 0.5**0.5)
    found = values(evaluate.prompt_words(run, encoded))
    assert found == {"image, way": 0.5, "report, way": 0.5, "margin, way": pytest.approx(0)}


def test_controls_keep_the_number_of_vectors_and_positions_alone_only_move_the_text(run):
    made = evaluate.controls(run.model.prompt)
    assert not made["zeros"].context.any() and made["untrained vectors"].context.std() > 0
    shapes = {each.context.shape for each in made.values() if each is not None}
    assert shapes == {run.model.prompt.context.shape}
    tokens, bert, m = run.prompt_tokens(["edema"]), run.model.text_encoder.bert, len(run.model.prompt.context)
    with torch.no_grad():
        ours = run.model.text_encoder(*tokens, made["positions alone"])
        positions = torch.arange(tokens.input_ids.shape[1])
        positions[1:] += m
        hidden = bert(input_ids=tokens.input_ids, position_ids=positions[None]).last_hidden_state
    torch.testing.assert_close(ours, hidden.mean(1), rtol=0, atol=1e-5)
    assert evaluate.controls(None) == {"without vectors": None}


# ------------------------------------------------------------------------------------------------- pictures


GREEN, RED = (0, 128, 0), (255, 0, 0)


@pytest.mark.parametrize(("reports", "frame"), [([[1, 0], [0, 1]], GREEN), ([[0, 1], [1, 0]], RED)])
def test_the_gallery_frames_matches_in_green_and_others_in_red(tmp_path, reports, frame):
    encoded = hand_made([[1, 0], [0, 1]], "AB", reports)
    evaluate.gallery(encoded, tmp_path / "gallery.png", columns=1)
    colours = {colour for _, colour in Image.open(tmp_path / "gallery.png").getcolors(1 << 24)}
    assert colours & {GREEN, RED} == {frame}
    with pytest.raises(BadInput, match="needs reports"):
        evaluate.gallery(encoded._replace(report_features=np.zeros((0, 2))), tmp_path / "none.png")


def test_a_gallery_is_drawn_on_demand(tiny_run, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("r.json", "gallery.png")]
    flags = ["--checkpoint", tiny_run, "--task", "zero-shot", "--limit", 10, "--out", *files[:1]]
    assert evaluate.main([str(flag) for flag in (*flags, "--gallery", files[1])]) == 0
    assert min(Image.open(files[1]).size) > 4 * 224  # rows of a query and 3 reports
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {', '.join(files)}"


# -------------------------------------------------------------------------------------------------- bad input

BARE = [*([task] for task in evaluate.TASKS), ["all"], ["zero-shot", "retrieval"]]


@pytest.mark.parametrize("flags", [*BARE, ["retrieval", "--sentences", "3"]], ids=" ".join)
def test_tasks_without_their_data_are_refused(on_records, flags, capsys):
    bare = [Record(np.zeros((8, 8), np.uint8), None, {}, "1", "bare", id="1")]
    assert on_records(dict.fromkeys(data.SPLITS, bare), "--task", *flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_of_several_tasks_those_without_training_records_are_left_out(on_records, tmp_path, capsys):
    test = {"test": data.load_records(["phantom=16"], "test", 20)}
    assert on_records(test, "--task", "zero-shot", "linear-probe", "prompt-sensitivity") == 0
    printed = capsys.readouterr().out
    assert "linear-probe is left out: given has no record in its split 'train'" in printed
    entries = json.loads((tmp_path / "r.json").read_text()).values()
    assert [entry["task"] for entry in entries] == ["zero-shot", "prompt-sensitivity"]


def test_prompts_are_encoded_with_the_vectors_and_stay_with_their_finding(run):
    features = encode_findings(run, {"Edema": ["edema", "fluid"], "Gout": ["gout"]})
    assert [len(each) for each in features] == [2, 1]
    own = run.model.encode_prompt(*run.prompt_tokens(["gout"]))[0].detach()
    assert np.allclose(features[1][0], own, atol=1e-5)


# ---------------------------------------------------------------------------------- what a run has seen


def test_evaluation_says_how_many_of_the_patients_the_run_was_trained_on(tiny_run, tmp_path, capsys):
    out = ["--checkpoint", str(tiny_run), "--task", "zero-shot", "--out", str(tmp_path / "r.json")]
    assert evaluate.main([*out, "--limit", "20"]) == 0
    assert "was trained on" not in capsys.readouterr().err
    assert evaluate.main([*out, "--split", "train", "--limit", "40"]) == 0
    seen = len((tiny_run / "patients.txt").read_text().split())
    assert f"was trained on {seen} of these 40 patients" in capsys.readouterr().err


def test_the_findings_of_a_file_of_prompts_are_the_classes(tiny_run, tmp_path, capsys):
    (tmp_path / "two.json").write_text('{"Edema": ["edema"], "Cardiomegaly": ["a big heart"]}')
    flags = ["--task", "zero-shot", "--limit", "20", "--all-metrics", "--out", str(tmp_path / "r.json")]
    prompts = ["--prompts", str(tmp_path / "two.json")]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags, *prompts]) == 0
    printed = capsys.readouterr().out
    assert "AUROC Edema" in printed and "AUROC Atelectasis" not in printed
    entry = next(iter(json.loads((tmp_path / "r.json").read_text()).values()))
    confusion = entry["metrics"]["balanced accuracy"]["confusion"]
    (row,) = [line.split() for line in printed.splitlines() if line.startswith(" 1  Cardiomegaly")]
    assert row[2:] == [str(count) for count in confusion["Cardiomegaly"].values()]


def test_mixed_phantoms_are_like_those_of_training_and_new_ones():
    single, mixed, train = (
        data.phantom(root, split, 60) for root, split in (("", "test"), ("mixed", "test"), ("", "train"))
    )
    counts = [{len(data.present(record)) for record in records} for records in (single, mixed, train)]
    assert counts[0] == {1} and counts[1] >= {1, 2} and any("No Finding" in data.present(r) for r in mixed)
    assert all(record.report for record in mixed)
    pixels = {record.image.tobytes() for record in (*single, *train)}
    assert not pixels & {record.image.tobytes() for record in mixed}
    assert not {record.id for record in mixed} & {record.id for record in single}
