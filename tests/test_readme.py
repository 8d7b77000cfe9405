"""What the documents name is there: commands, flags, definitions, files; and the requirements."""

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from transformers import BertConfig, BertModel

import data
import evaluate
import train
import umcl

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "REPRODUCE.md"]
SCRIPTS = {"train": train, "evaluate": evaluate, "data": data}


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def commands(document):
    """(script, words) of each call of a script; a shell variable stands for a number."""
    text = re.sub(r"\$\{?\w+\}?", "1", read(document).replace("\\\n", " "))
    calls = re.findall(r"\b(?:python|torchrun)\b[^\n`&|;]*?\b(train|evaluate|data)\.py\b([^\n`&|;>]*)", text)
    return [(script, shlex.split(words, comments=True)) for script, words in calls]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_readme_commands_are_accepted(document):
    assert commands(document)
    for script, words in commands(document):
        if len(words) > 1:  # not "--help" nor a command that is only named
            args = SCRIPTS[script].build_parser().parse_args(words)
            specs = getattr(args, "data", None) or []
            assert {spec.partition("=")[0] for spec in specs} <= data.DATASETS.keys()


def python_blocks(document):
    return re.findall(r"```python\n(.*?)```", read(document), re.DOTALL)


def test_python_in_the_readme_runs(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "runs" / "umcl")
    Image.fromarray(data.phantom("64", "valid")[0].image).save(tmp_path / "chest.png")
    features = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    given = {"labels": torch.rand(6, 3) > 0.5, "logit_scale": torch.tensor(1.0)}
    given |= {"image_features": features, "text_features": features}
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    given["bert"] = BertModel(BertConfig(vocab_size=9, max_position_embeddings=64, **sizes))
    given |= {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}
    for block in python_blocks("README.md"):
        exec(block, given)
    assert given["loss"] > 0 and given["hidden"].shape == (2, 16)
    printed = capsys.readouterr().out
    assert given["run"].findings and all(finding in printed for finding in given["run"].findings)


@pytest.mark.parametrize(("photometric", "left", "right"), [("MONOCHROME1", 255, 0), ("MONOCHROME2", 0, 255)])
def test_the_recipe_for_dicom_files_writes_16_bits_and_knows_monochrome1(
    tmp_path, monkeypatch, photometric, left, right
):
    """pydicom, which is the user's, is stood in for by a rescale slope and no window."""
    pixels = SimpleNamespace(apply_modality_lut=lambda p, d: p * 2 - 1024, apply_voi_lut=lambda p, d: p)
    monkeypatch.setitem(sys.modules, "pydicom", SimpleNamespace(pixels=pixels))
    monkeypatch.setitem(sys.modules, "pydicom.pixels", pixels)
    given = {}
    exec(next(block for block in python_blocks("README.md") if "pydicom" in block), given)
    ramp = np.tile(np.linspace(0, 4095, 64).astype(np.int32), (8, 1))
    dicom = SimpleNamespace(pixel_array=ramp, PhotometricInterpretation=photometric)
    given["to_png"](dicom, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode.startswith("I")
    read = np.asarray(data.read_image(tmp_path / "x.png"))
    assert read[0, 0] == left and read[0, -1] == right


def test_another_data_set_of_reproduce_is_trained_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    exec(python_blocks("REPRODUCE.md")[1], {"__name__": "clinic"})
    for split in data.SPLITS:
        (tmp_path / "FOLDER" / split).mkdir(parents=True)
        for i, record in enumerate(data.phantom("16", split, 12)):
            Image.fromarray(record.image).save(tmp_path / "FOLDER" / split / f"{split}{i}.png")
            (tmp_path / "FOLDER" / split / f"{split}{i}.txt").write_text(record.report or "Nothing new.")
    assert train.main([*TINY[2:], "--data", "clinic=FOLDER", "--out", "runs/clinic"]) == 0
    assert evaluate.main(["--task", "retrieval"]) == 0


def test_mask_and_loss_are_those_of_the_plain_python_in_reproduce():
    """200 random batches, some with images that have no text of their own."""
    plain = {}
    exec(python_blocks("REPRODUCE.md")[0], plain)
    generator = torch.Generator().manual_seed(0)
    for batch in range(200):
        n, more = 1 + batch % 7, batch % 3
        labels = torch.rand(n + more, 4, generator=generator) < 0.4
        sets = [set(row.nonzero()[:, 0].tolist()) for row in labels]
        features = torch.randn(2, n + more, 5, generator=generator, dtype=torch.float64)
        images, texts = torch.nn.functional.normalize(features, dim=-1)
        rule = ("equal", "subset")[batch % 2]
        removed = umcl.label_mask(labels, labels[:n], rule)
        assert plain["removed_pairs"](sets, sets[:n], rule) == removed.tolist()
        ids = torch.randint(3, (n,), generator=generator)
        same = removed | torch.cat([ids[:, None] == ids, torch.zeros(more, n, dtype=torch.bool)])
        wanted = plain["loss"](images.tolist(), texts[:n].tolist(), 20.0, same.tolist(), ids.tolist())
        loss = umcl.contrastive_loss(images, texts[:n], torch.tensor(20.0), same, ids)
        assert loss.item() == pytest.approx(wanted, abs=1e-10)


def test_readme_shows_how_to_use_each_script():
    assert {script for script, _ in commands("README.md")} == SCRIPTS.keys()


@pytest.mark.parametrize(
    ("document", "section", "names"),
    [("README.md", "## Data\n", data.DATASETS), ("REPRODUCE.md", "## Evaluation sets\n", data.PROTOCOLS)],
)
def test_tables_list_every_data_set_and_protocol(document, section, names):
    text = read(document).partition(section)[2].partition("\n## ")[0].partition("\n### ")[0]
    rows = re.findall(r"^\| `(\w[\w-]*)[=`]", text, re.MULTILINE)
    assert sorted(rows) == sorted(names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_the_documents_exist(document, capsys):
    for call in ("train", "evaluate", "data summary", "data protocol", "data pack"):
        script, *command = call.split()
        with pytest.raises(SystemExit):
            SCRIPTS[script].build_parser().parse_args([*command, "--help"])
    known = capsys.readouterr().out
    flags = re.findall(r"`(?:train\.py |evaluate\.py )?(--[a-z-]+)", read(document))
    assert [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)] == []


def test_names_in_the_documents_exist():
    names = [name for document in DOCUMENTS for name in re.findall(r"(\w+)\.py::([\w.]+\w)", read(document))]
    assert names
    for module, name in names:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_the_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", read(document))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_requirements_are_the_seven_packages_of_the_card():
    lines = [line.partition("#")[0].strip() for line in read("requirements.txt").splitlines()]
    names = sorted(re.match(r"[\w.-]+", line)[0].lower() for line in lines if line)
    assert names == ["numpy", "pillow", "pytest", "torch", "torchvision", "tqdm", "transformers"]
