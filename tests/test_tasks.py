"""The tasks of evaluate.py that look into a run: transfer, wording, continuous prompt, label mask."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import prompts
import train
from data import Record
from evaluate import drawn_by_patient, fine_tuned, logistic_regression


@pytest.fixture(scope="module")
def run(tiny_run):
    return evaluate.load_run(tiny_run / "best.pt")


def records_of(*label_sets, report="A report."):
    """One record a set of findings out of A, B and C; each is a patient."""
    image, every = np.zeros((16, 16), np.uint8), frozenset("ABC")
    return [
        Record(image, report, frozenset(found), str(i), "test", every - set(found), id=str(i))
        for i, found in enumerate(label_sets)
    ]


def features(records, images, reports=None):
    """Encoded of records, with these features."""
    present, absent = (each.numpy() for each in data.label_matrices(records, ["A", "B", "C"]))
    images = np.array(images, np.float32)
    reports = images if reports is None else np.array(reports, np.float32)
    rows = np.arange(len(records))
    return evaluate.Encoded(records, ["A", "B", "C"], images, reports, rows, present, absent, images, present)


@pytest.fixture(scope="module")
def examined(tiny_run, tmp_path_factory):
    """{task: {metric: entry}} of the tasks in one call."""
    file = tmp_path_factory.mktemp("tasks") / "results.json"
    tasks = ["linear-probe", "prompt-sensitivity", "prompt-words", "false-negatives"]
    flags = ["--fractions", "10", "100", "--repeats", "2", "--limit", "30", "--out", str(file)]
    assert evaluate.main(["--checkpoint", str(tiny_run), "--task", *tasks, *flags]) == 0
    return {entry["task"]: entry["metrics"] for entry in json.loads(file.read_text()).values()}


# ------------------------------------------------------------------------------------------------- transfer


def test_a_fraction_takes_all_records_of_its_patients():
    records = [record for record in records_of(*"ABC" * 20) for _ in range(2)]
    drawn = drawn_by_patient(records, 10, seed=0)
    patients = {record.patient for record in drawn}
    assert len(patients) == 6 and drawn == [record for record in records if record.patient in patients]


def test_the_smallest_fraction_is_one_patient():
    assert len(drawn_by_patient(records_of(*"ABC"), 0.1, seed=0)) == 1


def test_another_seed_draws_other_patients():
    records = records_of(*"ABC" * 20)
    assert (
        drawn_by_patient(records, 10, 0)
        == drawn_by_patient(records, 10, 0)
        != drawn_by_patient(records, 10, 1)
    )


def problem(seed=0):
    rng = np.random.default_rng(seed)
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


def test_what_is_unknown_does_not_change_the_regression():
    x, present, absent = problem()
    other = x.clone()
    other[~(present | absent).any(1)] = 9.0
    one, same = (logistic_regression(each, present, absent, 0.1) for each in (x, other))
    assert torch.equal(one, same)


def test_a_finding_without_any_positive_is_no_obstacle():
    x, present, absent = problem()
    weight = logistic_regression(x, present & torch.tensor([True, False]), absent, 0.1)
    assert weight.isfinite().all()


def test_other_splits_lack_the_evaluated_patients():
    records = records_of("A", "B", "C", "A", "")
    encoded = features(records[:1], np.eye(3)[:1])
    train_records, valid = evaluate.other_splits(encoded, lambda split: records)
    assert train_records == valid == records[1:4]  # nor the one without labels


def test_without_a_training_record_it_says_so():
    records = records_of("A")
    with pytest.raises(data.BadInput, match="train"):
        list(evaluate.other_splits(features(records, np.eye(3)[:1]), lambda split: records))


def test_a_validation_split_that_cannot_choose_is_refused(run):
    records = records_of("A", "A")
    with pytest.raises(data.BadInput, match="valid"):
        evaluate.validation_labels(records, ["A"])


def test_transfer_is_the_mean_over_the_draws():
    encoded = features(records_of("A", "B", "C"), np.eye(3))
    scores = np.stack([np.eye(3), np.roll(np.eye(3), 1, axis=1)], axis=2)  # all right, all wrong
    entry = evaluate.transfer(encoded, 1, scores, draws=100)["1 % accuracy"]
    assert entry["value"] == 0.5 and entry["spread"] == pytest.approx(0.5**0.5)
    assert (entry["low"], entry["high"]) == (0, 1)  # the interval knows that the draws differ


def test_transfer_of_several_findings_an_image_is_by_auroc():
    encoded = features(records_of("AB", "B", "C"), np.eye(3))
    assert evaluate.transfer(encoded, 10, np.eye(3)[..., None], draws=0).keys() == {"10 % AUROC mean"}


def test_a_linear_probe_reads_what_the_features_hold(run, monkeypatch):
    rng, records = np.random.default_rng(0), records_of(*"ABC" * 60)

    def known_features(run, records, skip):
        clean = np.eye(3)[["ABC".index(*record.findings) for record in records]]
        return features(records, clean + 0.05 * rng.normal(size=clean.shape))

    monkeypatch.setattr(evaluate, "encode", known_features)
    encoded, splits = (
        known_features(run, records[:60], False),
        {"train": records[60:120], "valid": records[120:]},
    )
    results = evaluate.linear_probe(run, encoded, load=splits.get, fractions=(20, 100), repeats=2, draws=0)
    assert results["100 % accuracy"]["value"] == 1 and results["20 % accuracy"]["trained"] == 2


def test_the_probe_names_its_fractions(examined):
    assert examined["linear-probe"].keys() == {
        f"{percent} % {metric}" for percent in (10, 100) for metric in ("accuracy", "AUROC mean")
    }
    assert [entry["trained"] for entry in examined["linear-probe"].values()] == [2, 2, 1, 1]


def test_fine_tuning_learns_what_the_labels_say(run):
    """Bright or dark: of each kind twenty training images."""
    labels = np.arange(60) % 2
    records = [
        replace(record, image=np.full((16, 16), 40 + 160 * label, np.uint8))
        for record, label in zip(records_of(*("AB"[label] for label in labels)), labels, strict=True)
    ]
    encoded, splits = evaluate.encode(run, records[40:]), {"train": records[:30], "valid": records[30:40]}
    results = evaluate.fine_tune(run, encoded, load=splits.get, fractions=(100,), draws=0)
    assert results["100 % accuracy"]["value"] == 1


@pytest.mark.parametrize("task", [evaluate.linear_probe, evaluate.fine_tune])
def test_training_images_that_cannot_be_read_are_left_out_within_the_budget(run, task, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LOOKS", 1)
    records = data.load_records(["phantom=16"], "test", 32)
    for row in (12, 25):  # one for training, one for validation
        records[row] = replace(records[row], image=tmp_path / f"bad-{row}.png")
    encoded, splits = evaluate.encode(run, records[:10]), {"train": records[10:21], "valid": records[21:]}
    options = {"load": splits.get, "fractions": (100,), "draws": 0}
    assert task(run, encoded, skip_bad_images=1, **options)
    with pytest.raises(data.BadInput, match="bad-12.png"):
        task(run, encoded, **options)


def test_fine_tuning_leaves_the_run_as_it_was(run):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    records = data.load_records(["phantom=16"], "test", 20)
    fine_tuned(run, records, records, data.vocabulary(records), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_fine_tuning_keeps_the_weights_that_were_best_on_the_validation_records(run, monkeypatch):
    records, looks = data.load_records(["phantom=16"], "test", 20), iter([0.5, 0.7, *[0.6] * 9])
    seen = []
    monkeypatch.setattr(
        evaluate, "tower_scores", lambda run, tower, records: seen.append(tower[1].weight.clone())
    )
    monkeypatch.setattr(evaluate, "mean_auroc", lambda *_: next(looks))
    tower = fine_tuned(run, records, records, data.vocabulary(records), seed=0)
    assert torch.equal(tower[1].weight, seen[1]) and len(seen) == 2 + evaluate.PATIENCE


# -------------------------------------------------------------------------------------------------- wording


def test_the_first_variant_is_the_trained_prompt():
    first = next(iter(prompts.variants(["Edema"], "caption").values()))
    assert first == {"Edema": [prompts.label_prompt("Edema", "caption")]}


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_no_two_variants_are_the_same(template):
    texts = [
        tuple(map(tuple, each.values())) for each in prompts.variants(["Edema", "Gout"], template).values()
    ]
    assert len(texts) == len(set(texts))


def test_mean_worst_and_spread_are_those_of_the_variants(run, monkeypatch):
    """Two variants: one tells all apart, one none; the negated one does not count."""
    monkeypatch.setattr(prompts, "variants", lambda findings, template: {"one": 0, "two": 1, "negated": 1})
    turn = [np.eye(3), np.roll(np.eye(3), 1, axis=0)]
    monkeypatch.setattr(evaluate, "encode_findings", lambda run, texts: list(turn[texts][:, None]))
    results = evaluate.prompt_sensitivity(run, features(records_of("A", "B", "C"), np.eye(3)), draws=0)
    values = {name: entry["value"] for name, entry in results.items()}
    assert values == {"mean": 0.5, "worst": 0, "spread": 0.5, "one": 1, "two": 0, "negated": 0}


def test_sensitivity_shows_every_variant(examined):
    names = prompts.variants(data.PHANTOM_FINDINGS, "caption").keys()
    assert examined["prompt-sensitivity"].keys() == {"mean", "worst", "spread"} | names


# ------------------------------------------------------------------------------------------ continuous prompt


def test_each_vector_has_its_nearest_word_pieces(run, examined):
    lines = examined["prompt-words"]["cosine with the nearest word piece"]["words"]
    assert len(lines) == len(run.model.prompt.context)


def test_a_vector_that_is_a_word_is_named_by_it(run):
    records = data.load_records(["phantom=16"], "test", 5)
    word = run.tokenizer.convert_tokens_to_ids("edema")
    before = run.model.prompt.context.data.clone()
    run.model.prompt.context.data[0] = (
        3 * run.model.text_encoder.bert.get_input_embeddings().weight[word].detach()
    )
    entry = evaluate.prompt_words(run, evaluate.encode(run, records), draws=0)[
        "cosine with the nearest word piece"
    ]
    run.model.prompt.context.data.copy_(before)
    assert "edema 1.00" in entry["words"][0]


def test_the_distance_is_that_of_the_centres(run, monkeypatch):
    monkeypatch.setattr(
        evaluate, "encode_texts", lambda run, texts, as_prompts: np.eye(3)[:2] * (1 + as_prompts)
    )
    encoded = features(records_of("A", "B"), np.eye(3)[:2], np.zeros((2, 3)))
    results = evaluate.prompt_words(run, encoded, draws=0)
    assert results["distance to the reports, without"]["value"] == pytest.approx(0.5**0.5)
    assert results["distance to the reports, with the vectors"]["value"] == pytest.approx(2 * 0.5**0.5)


def test_own_and_other_reports_are_told_apart(run, monkeypatch):
    monkeypatch.setattr(evaluate, "encode_texts", lambda run, texts, as_prompts: np.eye(3)[:2])
    encoded = features(records_of("A", "B"), np.eye(3)[:2], [[0.8, 0.6, 0], [0, 1, 0]])
    results = evaluate.prompt_words(run, encoded, draws=0)
    assert results["cosine with the own reports, without"]["value"] == pytest.approx(0.9)
    assert results["cosine with other reports, without"]["value"] == pytest.approx(0.3)


# -------------------------------------------------------------------------------------------- false negatives


def test_pairs_are_counted_by_hand(run):
    """Of six ordered pairs the two with {A} twice are equal, and {A} is a subset of {A, B} twice."""
    encoded = features(records_of("A", "A", "AB"), np.eye(3))
    results = evaluate.false_negatives(run, encoded, draws=0)
    all_pairs = run.args.batch_size * (run.args.batch_size - 1)
    counts = [
        results[f"{kind}: pairs, of {all_pairs} in a batch"]["value"] for kind in ("equal", "subset", "other")
    ]
    assert counts == pytest.approx([all_pairs / 3] * 3)


def test_pairs_that_are_nearer_than_real_negatives_have_an_auroc_of_one(run):
    vectors = [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    results = evaluate.false_negatives(run, features(records_of("A", "A", "B"), vectors), draws=0)
    assert results["equal: AUROC against other"]["value"] == results["equal: cosine"]["value"] == 1
    assert results["other: cosine"]["value"] == 0


def test_two_normal_images_are_no_false_negatives_of_each_other(run):
    records = [Record(np.zeros((8, 8), np.uint8), "Normal.", data.HEALTHY, str(i), "test") for i in range(3)]
    results = evaluate.false_negatives(run, evaluate.encode(run, records), draws=0)
    assert [entry["value"] for name, entry in results.items() if name.startswith("equal: pairs")] == [0]


def test_the_number_of_pairs_is_what_training_removes(tiny_run, examined):
    """With one finding an image and balanced classes, a fifth of the others is equal."""
    (entry,) = (e for name, e in examined["false-negatives"].items() if name.startswith("equal: pairs"))
    assert entry["value"] == pytest.approx(8 * 7 * 5 / 29)


# ----------------------------------------------------------------------------------------- place of a finding


def test_the_cosine_is_the_mean_over_the_cells(run):
    records = data.load_records(["phantom=16"], "test", 20)
    encoded = evaluate.encode(run, records)
    maps = evaluate.similarity_maps(run, records, encoded.report_features)
    cosine = (encoded.image_features * encoded.report_features).sum(1)
    assert np.allclose(maps.mean((1, 2)), cosine, atol=1e-5)


def test_cells_lie_where_the_image_has_them(options):
    """Where a part of an image changes, with no attention between windows and no mixing, so does its cell."""
    run = train.new_run(
        options("--window-size", "2", "--image-size", "32", "--swin-depths", "0", "0"), reporting()
    )
    bright = np.zeros((32, 32), np.uint8)
    bright[8:16, 24:] = 255  # of 4 x 4 cells the second from above, the last
    records = [
        Record(image, "A.", frozenset({"A"}), "1", "test") for image in (np.zeros_like(bright), bright)
    ]
    one, other = evaluate.similarity_maps(run, records, np.ones((2, run.args.embed_dim), np.float32))
    ratio = np.divide(one, other)  # the image's length divides all cells alike
    odd = np.abs(ratio - np.median(ratio)) > 1e-3
    assert odd.sum() == 1 and odd[1, 3]


def reporting():
    return records_of("A", "B", report="A report of A and B.")


def test_cells_are_inside_by_their_centre():
    inside = evaluate.cells_inside([(0.0, 0.5, 0.3, 1.0)], 4)  # left half less a bit, lower half
    assert inside.tolist() == [
        [False] * 4,
        [False] * 4,
        [True, False, False, False],
        [True, False, False, False],
    ]


def test_pointing_is_scored_by_hand(run, monkeypatch):
    """The map of the first image is hottest within its box, that of the second is not."""
    records = [
        Record(np.zeros((16, 16), np.uint8), None, frozenset({"Edema"}), str(i), "test", boxes=(box,))
        for i, box in enumerate([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)])
    ]
    maps = np.zeros((2, 2, 2))
    maps[:, 0, 0] = 1
    monkeypatch.setattr(evaluate, "similarity_maps", lambda *_: maps)
    results = evaluate.pointing_game(run, features(records, np.eye(3)[:2]), draws=0)
    assert results["all"]["value"] == 0.5 and results["all"]["chance"] == 0.25
    assert results.keys() == {"all", "another's map", "Edema"}


def test_phantoms_with_one_finding_have_its_box():
    for record in data.load_records(["phantom=16"], "test", 20):
        ((left, top, right, bottom),) = record.boxes
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def test_the_pointing_game_is_played_for_the_chosen_classes(tiny_run, tmp_path):
    flags = ["--task", "pointing-game", "--classes", "Edema", "--limit", "20"]
    file = tmp_path / "results.json"
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags, "--out", str(file)]) == 0
    (entry,) = json.loads(file.read_text()).values()
    assert entry["metrics"].keys() == {"all", "another's map", "Edema"}


def test_a_heatmap_is_drawn_on_demand(tiny_run, tmp_path):
    flags = ["--task", "pointing-game", "--limit", "10", "--heatmap", str(tmp_path / "heat.png")]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags, "--out", str(tmp_path / "r.json")]) == 0
    colours = {colour for _, colour in Image.open(tmp_path / "heat.png").getcolors(1 << 24)}
    assert (255, 255, 0) in colours  # the frame of a box


def test_a_heatmap_without_boxes_is_refused(tiny_run, chests, tmp_path, capsys):
    flags = [
        "--data",
        f"nih-chestxray14={chests}",
        "--task",
        "zero-shot",
        "--heatmap",
        str(tmp_path / "h.png"),
    ]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags, "--out", str(tmp_path / "r.json")]) == 2
    assert "box" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags",
    ["--repeats 0", "--fractions 0", "--fractions 101", "--sentences -1", "--limit 0", "--repeats x"]
    + ["--skip-bad-images -1", "--fractions nan"],
)
def test_numbers_that_make_no_sense_are_refused(flags):
    with pytest.raises(SystemExit, match="2"):
        evaluate.build_parser().parse_args(flags.split())


BARE = [*([task] for task in evaluate.TASKS), ["all"], ["zero-shot", "retrieval"]]


@pytest.mark.parametrize("flags", [*BARE, ["retrieval", "--sentences", "3"]], ids=" ".join)
def test_tasks_without_their_data_are_refused(tiny_run, flags, tmp_path, monkeypatch, capsys):
    bare = [Record(np.zeros((8, 8), np.uint8), None, frozenset(), "1", "bare", id="1")]
    monkeypatch.setitem(data.DATASETS, "bare", lambda root, split: bare)
    flags = ["--data", f"bare={tmp_path}", "--task", *flags, "--out", str(tmp_path / "r.json")]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_of_all_tasks_those_without_training_records_are_left_out(tiny_run, tmp_path, monkeypatch, capsys):
    test = data.load_records(["phantom=16"], "test", 20)
    monkeypatch.setitem(data.DATASETS, "tests", lambda root, split: test if split == "test" else [])
    flags = ["--data", f"tests={tmp_path}", "--task", "zero-shot", "linear-probe", "prompt-sensitivity"]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags, "--out", str(tmp_path / "r.json")]) == 0
    assert "linear-probe is left out: tests has no record in its split 'train'" in capsys.readouterr().out
    entries = json.loads((tmp_path / "r.json").read_text()).values()
    assert [entry["task"] for entry in entries] == ["zero-shot", "prompt-sensitivity"]


def test_a_picture_that_cannot_be_one_is_refused_after_the_results(tiny_run, tmp_path, capsys):
    flags = ["--limit", "20", "--out", str(tmp_path / "r.json"), "--gallery", str(tmp_path / "picture")]
    assert evaluate.main(["--checkpoint", str(tiny_run), *flags]) == 2
    assert "such as .png" in capsys.readouterr().err and (tmp_path / "r.json").exists()
