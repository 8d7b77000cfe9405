"""One's own images, and the pictures and tables that evaluate.py makes on demand."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

import data
import evaluate
import prompts

# ----------------------------------------------------------------------------------------- one's own images


@pytest.fixture
def folder(tmp_path):
    """A folder of three phantoms as PNG, one of them in a folder below, and one file that is no image."""
    (tmp_path / "own" / "below").mkdir(parents=True)
    for name, record in zip("ab", data.phantom("16", "test"), strict=False):
        Image.fromarray(record.image).save(tmp_path / "own" / f"{name}.png")
    Image.fromarray(data.phantom("16", "test")[2].image).save(tmp_path / "own" / "below" / "c.png")
    (tmp_path / "own" / "broken.png").write_text("no image")
    return tmp_path / "own"


@pytest.fixture
def own(tiny_run):
    """evaluate.py --images with further flags, on the tiny run -> exit status."""
    return lambda *flags: evaluate.main(["--checkpoint", *map(str, (tiny_run, "--images", *flags))])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_scores_of_own_images_are_their_cosines_with_the_prompts(own, run, folder, tmp_path, capsys):
    assert own(folder / "b.png", folder, "--out", tmp_path / "s.csv") == 0
    rows = {row["image"]: row for row in table(tmp_path / "s.csv")}
    names = [folder / name for name in ("b.png", "a.png", "below/c.png", "broken.png")]
    assert list(rows) == [str(name) for name in names]  # each once, a folder in order
    cosines = evaluate.encode_images(run, names[:3]) @ evaluate.encode_prompts(run, run.findings).T
    scores = [[float(rows[str(name)][finding]) for finding in run.findings] for name in names[:3]]
    np.testing.assert_allclose(scores, cosines, rtol=0, atol=1e-5)
    printed = capsys.readouterr().out
    assert "none is a probability" in printed and f"{scores[0][0]:.3f}" in printed
    assert "report" not in (tmp_path / "s.csv").read_text()


def test_an_image_that_cannot_be_read_is_a_row_with_its_error(own, run, folder, tmp_path, capsys):
    assert (
        own(folder / "a.png", folder / "broken.png", tmp_path / "none.png", "--out", tmp_path / "s.csv") == 0
    )
    good, *bad = table(tmp_path / "s.csv")
    assert good["error"] == "" and all("cannot be read" in row["error"] for row in bad)
    assert {row[finding] for row in bad for finding in run.findings} == {""}
    assert capsys.readouterr().out.count("cannot be read") == 2


@pytest.mark.parametrize("given", ["broken.png", "none.png", "empty"])
def test_without_any_image_it_is_one_sentence_and_no_table(own, folder, tmp_path, capsys, given):
    (folder / "empty").mkdir()
    assert own(folder / given, "--out", tmp_path / "s.csv") == 2
    assert given in refusal(capsys) and not (tmp_path / "s.csv").exists()


def test_classes_are_named_or_those_of_the_prompts_or_those_of_the_run(own, run, folder, tmp_path):
    (tmp_path / "p.json").write_text('{"Gout": ["gout", "swollen toe"], "Edema": ["water"]}')
    out = ("--out", tmp_path / "s.csv")
    for flags, classes in (
        ((), run.findings),
        (("--classes", "Gout", "Edema", "Gout"), ["Gout", "Edema"]),
        (("--prompts", tmp_path / "p.json"), ["Gout", "Edema"]),
        (("--prompts", tmp_path / "p.json", "--classes", "Edema"), ["Edema"]),
    ):
        assert own(folder / "a.png", *out, *flags) == 0
        assert list(table(tmp_path / "s.csv")[0]) == ["image", *classes, "error"]


def test_prompts_and_their_combination_are_used(own, run, folder, tmp_path):
    out = ("--out", tmp_path / "s.csv", "--classes", "Edema")
    assert own(folder / "a.png", *out, "--prompt-set", "ensemble", "--combine", "max") == 0
    texts = prompts.prompt_set(["Edema"], "ensemble")["Edema"]
    cosines = evaluate.encode_images(run, [folder / "a.png"]) @ evaluate.encode_texts(run, texts, True).T
    assert float(table(tmp_path / "s.csv")[0]["Edema"]) == pytest.approx(cosines.max(), abs=1e-5)


def test_many_images_are_all_in_the_table_and_the_first_on_the_screen(capsys):
    evaluate.print_scores("run", ["A", "B"], [(f"{i}.png", np.array([i, 0.0]), "") for i in range(40)])
    printed = capsys.readouterr().out
    assert "29.png" in printed and "30.png" not in printed and "10 more" in printed


BESIDE = "--split test,--data phantom,--ids x,--limit 3,--gallery x.png,--compare a b,--out x.json,--task all"


@pytest.mark.parametrize("flags", BESIDE.split(","))
def test_what_means_nothing_beside_own_images_is_refused(own, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        own("a.png", *flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert flags.split()[0] in line or "has to end in .csv" in line


def test_a_finding_that_the_run_never_saw_is_noted(own, run, folder, capsys):
    evaluate.encode_prompts(run, ["Edema"])
    assert capsys.readouterr().err == ""
    evaluate.encode_prompts(run, ["Edema", "Scurvy"])
    assert "no label Scurvy" in capsys.readouterr().err
    assert own(folder / "a.png", "--classes", "Rickets") == 0
    assert "no label Rickets" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ heat maps


def test_the_score_of_a_cell_is_its_own_cosine_row_by_row(run):
    picture = Image.fromarray(data.phantom("16", "test")[0].image)
    texts = evaluate.encode_findings(run, {name: [name] for name in ("Edema", "Atelectasis")})
    whole, cells = evaluate.image_scores(run, picture, texts, "mean-embedding")
    images = data.normalise(data.evaluation_transform(16)(picture)[None])
    with torch.no_grad():
        features = run.model.project_image(run.model.image_encoder.cells(images))[0].numpy()
    np.testing.assert_allclose(cells[0, 1], [features[1] @ text[0] for text in texts], rtol=0, atol=1e-5)
    np.testing.assert_allclose(cells[1, 0], [features[2] @ text[0] for text in texts], rtol=0, atol=1e-5)
    own = evaluate.encode_images(run, [picture])[0]
    np.testing.assert_allclose(whole, [own @ text[0] for text in texts], rtol=0, atol=1e-5)


def corners(path, column):
    """Mean colours of the corners of a map in the first row of a picture -> (2, 2, 3)."""
    left, top = 4 + column * 232, 48 + 40
    pixels = np.asarray(Image.open(path))[top : top + 224, left : left + 224].astype(float)
    return pixels[::223][:, ::223]


def test_a_map_is_red_where_cells_are_near_blue_where_far_and_of_one_scale(tmp_path):
    Image.new("L", (40, 40), 100).save(tmp_path / "grey.png")
    cells = np.zeros((2, 2, 3))
    cells[0, 1], cells[1, 0] = (0.4, 0.2, 9), (-0.4, -0.2, -9)  # of three classes
    found = [(tmp_path / "grey.png", np.zeros(3), cells)]
    evaluate.heatmaps(["A", "B", "C"], found, tmp_path / "map.png")
    assert (corners(tmp_path / "map.png", 0) == 100).all()
    strong, weak, most = (corners(tmp_path / "map.png", i) for i in (1, 2, 3))
    assert (strong[0, 0] == 100).all() and (strong[1, 1] == 100).all()
    for (red, _, blue), (weak_red, _, weak_blue), (most_red, _, most_blue) in (
        (strong[0, 1], weak[0, 1], most[0, 1]),
        (strong[1, 0][::-1], weak[1, 0][::-1], most[1, 0][::-1]),
    ):
        assert most_red > red > weak_red > 100 > weak_blue > blue > most_blue


def test_maps_of_colour_images_are_in_colour(own, tmp_path, capsys):
    Image.new("RGB", (40, 20), (0, 200, 0)).save(tmp_path / "green.png")
    out = tmp_path / "map.png"
    assert own(tmp_path / "green.png", "--classes", "Edema", "--heatmap", out) == 0
    assert tuple(np.asarray(Image.open(out))[48 + 40 + 112, 4 + 112]) == (0, 200, 0)
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {out}"


def test_a_picture_of_maps_has_a_row_an_image_a_column_a_class_and_a_bound(
    own, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "MAPPED", 2)
    sizes = []
    for images in (["a.png"], ["a.png", "b.png"], ["a.png", "broken.png", "b.png", "below/c.png"]):
        assert own(*(folder / name for name in images), "--heatmap", tmp_path / "map.png") == 0
        sizes.append(Image.open(tmp_path / "map.png").size)
    assert sizes[0] == (7 * 232, 2 * 48 + 272) and sizes[1] == sizes[2] == (7 * 232, 2 * 48 + 2 * 272)


def test_a_heat_map_needs_images(tiny_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--checkpoint", str(tiny_run), "--heatmap", "x.png"])
    assert "--heatmap needs --images" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- tables of scores


def test_zero_shot_as_a_table_has_scores_and_three_states_of_each_image(tiny_run, tmp_path, monkeypatch):
    pictures = [record.image for record in data.phantom("16", "test")[:3]]
    labels = [{"Edema": 1, "Fracture": 0}, {"Edema": 0, "Fracture": 1}, {"Edema": 1}]
    records = [
        data.Record(picture, "a secret report", label, str(i), "given", id=f"image {i}")
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    monkeypatch.setitem(data.DATASETS, "given", lambda root, split: records)
    flags = ["--checkpoint", tiny_run, "--data", f"given={tmp_path}", "--task", "zero-shot"]
    assert evaluate.main([*map(str, flags), "--out", str(tmp_path / "s.csv")]) == 0
    rows = table(tmp_path / "s.csv")
    assert [row["id"] for row in rows] == [f"image {i}" for i in range(3)]
    assert [(row["Edema label"], row["Fracture label"]) for row in rows] == [
        ("1", "0"),
        ("0", "1"),
        ("1", ""),
    ]
    run = evaluate.load_run(tiny_run)
    cosines = evaluate.encode_images(run, pictures) @ evaluate.encode_prompts(run, ["Edema", "Fracture"]).T
    scores = [[float(row[f"{name} score"]) for name in ("Edema", "Fracture")] for row in rows]
    np.testing.assert_allclose(scores, cosines, rtol=0, atol=1e-5)
    assert "secret" not in (tmp_path / "s.csv").read_text()


# --------------------------------------------------------------------------------------------------- drawings


def colours(path):
    """{colour: number of pixels} of a picture."""
    return {colour: count for count, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}


BLUE, RED = (31, 119, 180), (214, 39, 40)


def test_curves_of_several_runs_are_in_one_picture(tiny_run, tmp_path, capsys):
    sizes = []
    for runs in ([tiny_run], [tiny_run, tiny_run]):
        assert evaluate.main(["--curves", *map(str, runs), "--out", str(tmp_path / "c.png")]) == 0
        sizes.append(Image.open(tmp_path / "c.png").size)
        assert BLUE in colours(tmp_path / "c.png")
    assert (
        sizes[0] == sizes[1] and capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path / 'c.png'}"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 4, "loss": 3}\n')
    assert evaluate.main(["--curves", str(tiny_run), str(other), "--out", str(tmp_path / "c.png")]) == 0
    assert {BLUE, RED} <= colours(tmp_path / "c.png").keys()
    assert Image.open(tmp_path / "c.png").height > sizes[0][1]  # the legend names both


def test_a_log_has_losses_by_step_and_scores_by_epoch_and_its_last_line_may_be_cut(tmp_path):
    lines = [
        {"step": 10, "epoch": 1, "lr": 1, "loss": 2.5, "loss_report": 2, "gradient_norm": 1},
        {"step": 20, "epoch": 1, "lr": 1, "loss": None, "loss_report": 1, "gradient_norm": 1},
        {"step": 20, "epoch": 1, "AUROC mean": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    assert evaluate.read_log(tmp_path) == {
        "loss": [(10, 2.5), (20, None)],
        "loss_report": [(10, 2), (20, 1)],
        "AUROC mean": [(20, 0.5)],
    }


def test_a_loss_that_was_not_finite_leaves_a_gap(tmp_path):
    steps, blue = range(100), []
    for name, missing in (("whole", ()), ("gap", range(20, 80))):
        curve = [(step, None if step in missing else 1.0) for step in steps]
        evaluate.draw_curves({"a run": {"loss": curve}}, tmp_path / f"{name}.png")
        blue.append(colours(tmp_path / f"{name}.png")[BLUE])
    assert blue[1] < 0.6 * blue[0]


@pytest.mark.parametrize(
    "content", [None, "", "no json\n", "[1]\n", '{"loss": 1}\n', '{"step": "a", "loss": 1}\n', "\x00\n"]
)
def test_what_is_no_log_is_one_sentence(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert evaluate.main(["--curves", str(tmp_path), "--out", str(tmp_path / "c.png")]) == 2
    assert "log.jsonl" in refusal(capsys) and not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    "flags", ["", "--out x.json", "--out x.png --task retrieval", "--out x.png --images a"]
)
def test_curves_need_a_picture_to_draw_and_nothing_else(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--curves", "run", *flags.split()])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.04), (12, 1234), (1e-6, 3e-6), (0, 1)])
def test_ticks_are_few_within_the_bounds_and_evenly_apart(low, high):
    found = evaluate.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_a_forest_plot_marks_intervals_without_0_and_leaves_missing_metrics_empty(tmp_path):
    rows = [("one", {"P@1": (0.1, 0.05, 0.2)}), ("two", {"P@1": (-0.1, -0.3, 0.1), "AUROC": (0, 0, 0)})]
    seen, sizes = [], []
    for part in (rows[:1], rows[1:], rows):
        evaluate.forest_plot(part, tmp_path / "f.png")
        seen.append(colours(tmp_path / "f.png").keys() & {BLUE, RED})
        sizes.append(Image.open(tmp_path / "f.png").size)
    assert seen == [{RED}, {BLUE}, {RED, BLUE}]
    assert sizes[1][0] == sizes[2][0] == sizes[0][0] + 300 and sizes[2][1] == sizes[0][1] + 40


# ---------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_shows_equal_reports_once_and_a_query_its_own(tmp_path, monkeypatch):
    picture, shown = np.zeros((16, 16), np.uint8), []
    texts = ["clear lungs", "clear  lungs", "fluid", "clear lungs"]
    records = [data.Record(picture, text, {"A": 1}, str(i), "test") for i, text in enumerate(texts)]
    images, reports = np.eye(2, dtype=np.float32)[[0, 0, 0, 0]], np.eye(2, dtype=np.float32)[[0, 0, 1, 0]]
    known = np.ones((4, 1), bool)
    encoded = evaluate.Encoded(records, ["A"], images, reports, np.arange(4), known, ~known, images, images)
    monkeypatch.setattr(
        evaluate.ImageDraw.ImageDraw, "multiline_text", lambda self, at, text, *_: shown.append(text)
    )
    evaluate.gallery(encoded, tmp_path / "g.png", rows=4, columns=4)
    assert sum("fluid" in text for text in shown) == 4 and len(shown) == 8  # two texts for each query
    own = [text for text in shown if "its own report" in text]
    assert len(own) == 4 and sum("clear" in text for text in own) == 3


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_one_path_is_one_image(run, folder, kind):
    one, listed = (
        evaluate.encode_images(run, images) for images in (kind(folder / "a.png"), [folder / "a.png"])
    )
    assert np.array_equal(one, listed) and len(one) == 1


# ------------------------------------------------------------------------------------------------- comparison


@pytest.fixture(scope="module")
def two_runs(tiny_run, tmp_path_factory):
    """Two runs that differ in a flag, and a third that differs from the first in the seed alone."""
    folders = [tmp_path_factory.mktemp("compared") / name for name in ("first", "other", "seed")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        saved = torch.load(tiny_run / "best.pt", weights_only=True)
        saved["args"] |= ({}, {"label_mask": "none"}, {"seed": 5})[i]
        saved["model"]["image_projection.weight"] += i * torch.eye(16, 32)
        torch.save(saved, folder / "best.pt")
    return [str(folder) for folder in folders]


COMPARED = ["--task", "zero-shot", "--limit", "20"]


def test_a_comparison_is_a_table_of_all_runs_and_metrics_and_a_picture_of_the_differences(two_runs, tmp_path):
    files = ["--out", str(tmp_path / "c.csv"), "--plot", str(tmp_path / "f.png")]
    drawn, forest_plot = [], evaluate.forest_plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "forest_plot", lambda *all: (drawn.append(all[0]), forest_plot(*all)))
        assert evaluate.main(["--compare", *two_runs, *COMPARED, *files]) == 0
    rows = table(tmp_path / "c.csv")
    of = {}
    for row in rows:
        of.setdefault(row["run"].split("/")[-2], {})[row["metric"]] = row
    assert list(of) == ["first", "other", "seed"] and len(of["first"]) == len(of["other"]) > 5
    assert [of[name]["accuracy"]["label_mask"] for name in of] == ["both", "none", "both"]
    assert [of[name]["accuracy"]["seed"] for name in of] == ["0", "0", "5"]
    assert all(row["task"] == "zero-shot" and row["commit"] and row["low"] <= row["high"] for row in rows)
    ((label, differences),) = drawn[0]
    assert "--label-mask none" in label and Image.open(tmp_path / "f.png").width > 300
    values = [float(of[name]["accuracy"]["value"]) for name in ("other", "first")]
    value, low, high = differences["zero-shot accuracy"]
    assert low <= value <= high and value == pytest.approx(values[0] - values[1])


def test_runs_that_differ_in_the_seed_alone_have_no_difference_to_draw(two_runs, tmp_path, capsys):
    flags = ["--compare", two_runs[0], two_runs[2], *COMPARED, "--plot", str(tmp_path / "f.png")]
    assert evaluate.main(flags) == 2
    assert "differ in the seed alone" in refusal(capsys) and not (tmp_path / "f.png").exists()


@pytest.mark.parametrize("flags", ["--plot x.png", "--compare a b --plot x.pdf", "--compare a b --out x.png"])
def test_a_plot_needs_a_comparison_and_files_their_endings(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(flags.split())
    assert len(capsys.readouterr().err.splitlines()) == 1
