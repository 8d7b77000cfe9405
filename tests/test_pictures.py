"""One's own images, and the pictures and tables that evaluate.py makes on demand."""

import csv

import numpy as np
import pytest
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
