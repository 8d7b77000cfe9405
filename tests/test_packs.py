"""Packs: what goes in comes out, wherever the work was stopped."""

import gzip
import json
import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BadInput

SIDE = 8
FILES = ("images.npy", "index.jsonl")


def table(root, bad=(), count=40):
    """A table of images of several sizes and kinds, each unlike the others -> its spec."""
    root.mkdir(parents=True, exist_ok=True)
    rows = ["image,report,patient,split,view,Edema,Mass"]
    for n in range(count):
        pixels = np.random.RandomState(n).randint(0, 256, (7 + n % 5, 12 - n % 4), np.uint8)
        image = Image.fromarray(pixels).convert(("L", "RGB", "RGBA")[n % 3])
        image.save(root / f"{n}.png")
        if n in bad:
            (root / f"{n}.png").write_bytes(b"")
        view, split = ("PA", "LATERAL", "")[n % 3], data.SPLITS[n // 3 % 3]
        rows.append(f"{n}.png,Film {n}: clear.,{n},{split},{view},{n % 2},{('', '0', '-1')[n % 3]}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    return f"csv={root / 'table.csv'}"


def pack(spec, out, **options):
    return data.pack([spec], out, **{"side": SIDE, "views": data.VIEWS, "workers": 0, **options})


def content(out):
    return [Path(out, file).read_bytes() for file in FILES]


def index(out):
    return [json.loads(line) for line in Path(out, "index.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A sound table; nobody writes beside it."""
    return table(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """Its pack, made without a break; nobody writes into it."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    pack(spec, out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the pack, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def program(capsys):
    """data.py with these arguments -> (exit status, what it prints, its lines of errors)."""

    def run(*arguments):
        status = data.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("data.py: ")]
        return status, printed.out, errors

    return run


def options(spec, out, *more):
    return ["pack", "--data", spec, "--out", out, "--image-size", SIDE, "--workers", 0, *more]


# ----------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("split", data.SPLITS)
def test_packed_and_unpacked_images_give_the_same_tensor(spec, whole, split):
    transform = data.evaluation_transform(SIDE)
    unpacked, packed = (data.load_records([s], split, views=data.VIEWS) for s in (spec, f"packed={whole}"))
    assert len(packed) == len(unpacked) > 10
    for one, other in zip(unpacked, packed, strict=True):
        assert torch.equal(transform(data.read_image(one.image)), transform(data.read_image(other.image)))


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("field", [f for f in data.Record.__dataclass_fields__ if f != "image"])
def test_a_record_comes_out_of_a_pack_as_it_went_in(spec, whole, split, field):
    unpacked, packed = (data.read_records([s], split)[s] for s in (spec, f"packed={whole}"))
    assert [getattr(r, field) for r in packed] == [getattr(r, field) for r in unpacked]


def test_boxes_come_out_of_a_pack_as_they_went_in(tmp_path):
    box = (0.125, 0.25, 0.5, 1 / 3)
    image = np.zeros((4, 4), np.uint8)
    r = data.Record(image, None, frozenset({"Pneumonia"}), "1", "rsna", id="1", boxes=(box, box))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "phantom", lambda root, split: [r] if split == "test" else [])
        pack("phantom", tmp_path / "pack")
    (found,) = data.packed(tmp_path / "pack", "test")
    assert found.boxes == (box, box)


def test_the_index_says_where_an_image_came_from_its_size_and_its_checksum(spec, whole):
    source = Path(spec.partition("=")[2]).parent
    for line in index(whole):
        with Image.open(line["path"]) as image:
            assert (line["width"], line["height"]) == image.size and Path(line["path"]).parent == source
        assert line["crc32"] >= 0


def test_a_pack_is_square_and_grey(whole):
    images = np.load(whole / "images.npy")
    assert images.shape == (40, SIDE, SIDE) and images.dtype == np.uint8


def test_several_processes_make_the_same_pack(spec, whole, tmp_path):
    pack(spec, tmp_path / "pack", workers=2)
    assert content(tmp_path / "pack") == content(whole)


def test_only_the_chosen_views_and_those_not_said_are_packed(spec, tmp_path):
    pack(spec, tmp_path / "pack", views=data.FRONTAL)
    assert {line["view"] for line in index(tmp_path / "pack")} == {"PA", ""}


def test_a_pack_of_a_pack_holds_the_same_pixels(whole, tmp_path):
    pack(f"packed={whole}", tmp_path / "pack")
    assert content(tmp_path / "pack")[0] == content(whole)[0]


def test_phantoms_can_be_packed(tmp_path, monkeypatch):
    few = data.DATASETS["phantom"]("16", "valid")[:3]
    monkeypatch.setitem(data.DATASETS, "phantom", lambda root, split: few if split == "valid" else [])
    assert pack("phantom=16", tmp_path / "pack", side=16) == (3, [])
    assert np.array_equal(np.load(tmp_path / "pack" / "images.npy"), [r.image for r in few])


def test_nothing_unfinished_is_left_behind(spec, tmp_path):
    pack(spec, tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_the_command_says_how_to_use_the_pack(spec, tmp_path, program):
    status, printed, _ = program(*options(spec, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 0
    assert f"40 images packed, 0 could not be read; use them by --data packed={tmp_path / 'pack'}" in printed


# ------------------------------------------------------------------------------------------------- stopped


def unfinished(whole, tmp_path, images, index):
    """The pack as it lies when the work stops after so many bytes of each file."""
    begun = tmp_path / "pack.tmp"
    begun.mkdir()
    header = data.npy_header(40, SIDE)
    pixels = (whole / "images.npy").read_bytes()
    (begun / "images.npy").write_bytes((header + pixels[len(header) :])[:images])
    (begun / "index.jsonl").write_bytes((whole / "index.jsonl").read_bytes()[:index])


@pytest.mark.parametrize("seed", range(12))
def test_a_pack_stopped_anywhere_ends_as_the_unbroken_one(spec, whole, tmp_path, seed):
    rng = np.random.RandomState(seed)
    unfinished(whole, tmp_path, *(rng.randint(len(part) + 1) for part in content(whole)))
    pack(spec, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(whole)


@pytest.mark.parametrize(
    ("images", "index"), [(0, 0), (1, 0), (127, 999), (128, 0), (10**9, 0), (128, 10**9), (10**9, 10**9)]
)
def test_a_pack_stopped_at_an_edge_ends_as_the_unbroken_one(spec, whole, tmp_path, images, index):
    unfinished(whole, tmp_path, images, index)
    pack(spec, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(whole)


@pytest.mark.parametrize("missing", [(), FILES[:1], FILES[1:], FILES])
def test_a_pack_stopped_before_its_files_are_there_ends_as_the_unbroken_one(spec, whole, tmp_path, missing):
    unfinished(whole, tmp_path, 1000, 1000)
    for file in missing:
        (tmp_path / "pack.tmp" / file).unlink()
    pack(spec, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(whole)


@pytest.mark.parametrize("call", [1, 2])
def test_a_pack_with_bad_images_goes_on_after_a_stop_in_its_last_moments(tmp_path, monkeypatch, call):
    source = table(tmp_path / "source", bad=(3, 39))
    pack(source, tmp_path / "unbroken")
    calls = []

    def stop(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        pack(source, tmp_path / "pack")
    assert len(pack(source, tmp_path / "pack")[1]) == 2
    assert content(tmp_path / "pack") == content(tmp_path / "unbroken")


@pytest.mark.parametrize("seed", range(4))
def test_bad_images_are_remembered_after_a_stop(tmp_path, seed):
    source = table(tmp_path / "source", bad=range(0, 40, 3))
    _, bad = pack(source, tmp_path / "unbroken")
    rng = np.random.RandomState(seed)
    unfinished(
        tmp_path / "unbroken", tmp_path, *(rng.randint(len(p)) for p in content(tmp_path / "unbroken"))
    )
    assert pack(source, tmp_path / "pack")[1] == bad
    assert content(tmp_path / "pack") == content(tmp_path / "unbroken")


def test_images_that_were_packed_before_a_stop_are_not_read_again(spec, whole, tmp_path, monkeypatch):
    unfinished(whole, tmp_path, 128 + 25 * SIDE * SIDE, 10**9)
    read, original = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda image: read.append(image) or original(image))
    pack(spec, tmp_path / "pack")
    assert len(read) == 40 - 25


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(spec, whole, tmp_path, monkeypatch):
    original = data.read_image
    monkeypatch.setattr(data, "read_image", lambda image: time.sleep(0.02) or original(image))
    process = get_context("fork").Process(target=pack, args=(spec, tmp_path / "pack"))
    process.start()
    begun, deadline = tmp_path / "pack.tmp" / "index.jsonl", time.monotonic() + 60
    while not (begun.exists() and begun.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "pack").exists()
    assert 0 < begun.stat().st_size < (whole / "index.jsonl").stat().st_size
    monkeypatch.undo()
    pack(spec, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(whole)


def test_ctrl_c_says_that_the_same_command_goes_on(spec, tmp_path, monkeypatch, program):
    def interrupted(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_image", interrupted)
    status, _, errors = program(*options(spec, tmp_path / "pack"))
    assert status == 130 and "the same command goes on" in errors[0]


# --------------------------------------------------------------------------------------------- bad images


def test_bad_images_within_the_budget_are_listed_and_left_out(tmp_path, program):
    source = table(tmp_path / "source", bad=(0, 9))
    status, printed, _ = program(*options(source, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 0 and "38 images packed, 2 could not be read" in printed
    assert all(
        f"the image {tmp_path / 'source' / name} cannot be read" in printed for name in ("0.png", "9.png")
    )


def test_the_index_says_what_is_wrong_with_a_bad_image(tmp_path):
    pack(table(tmp_path / "source", bad=[9]), tmp_path / "pack")
    assert {line["id"] for line in index(tmp_path / "pack") if "cannot be read" in line.get("bad", "")} == {
        "9.png"
    }


def test_beside_bad_images_each_record_keeps_its_own(tmp_path):
    source = table(tmp_path / "source", bad=(0, 9, 11))
    pack(source, tmp_path / "pack")
    own = {r.id: r for split in data.SPLITS for r in data.read_records([source], split)[source]}
    found = [r for split in data.SPLITS for r in data.packed(tmp_path / "pack", split)]
    assert {r.id for r in found} == own.keys() - {"0.png", "9.png", "11.png"}
    for r in found:
        expected = data.evaluation_transform(SIDE)(data.read_image(own[r.id].image))[0]
        assert np.array_equal(data.read_image(r.image), expected)


def test_more_bad_images_than_the_budget_stop_the_work(tmp_path, program):
    source = table(tmp_path / "source", bad=range(5))
    status, _, errors = program(*options(source, tmp_path / "pack", "--max-bad", 2))
    assert status == 2 and not (tmp_path / "pack").exists()
    assert "more than --max-bad 2; with a larger one the same command goes on from here" in errors[0]


@pytest.mark.parametrize("count", [5, 40], ids=["all read before the stop", "some not"])
def test_the_same_budget_stops_the_work_again(tmp_path, program, count):
    source = table(tmp_path / "source", bad=range(4), count=count)
    command = options(source, tmp_path / "pack", "--max-bad", 1, "--views", *data.VIEWS)
    assert [program(*command)[0] for _ in range(2)] == [2, 2]


def test_a_larger_budget_goes_on_to_the_same_pack(tmp_path, program):
    source = table(tmp_path / "source", bad=range(5))
    pack(source, tmp_path / "unbroken")
    command = options(source, tmp_path / "pack", "--views", *data.VIEWS, "--max-bad")
    assert [program(*command, budget)[0] for budget in (3, 5)] == [2, 0]
    assert content(tmp_path / "pack") == content(tmp_path / "unbroken")


def test_a_set_without_one_readable_image_is_refused(tmp_path, program):
    source = table(tmp_path / "source", bad=range(3), count=3)
    status, _, errors = program(*options(source, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 2 and "none of the 3 images can be read" in errors[0]


def test_images_that_are_nowhere_are_refused_before_the_work(tmp_path, program):
    source = table(tmp_path / "source", count=3)
    for image in (tmp_path / "source").glob("*.png"):
        image.unlink()
    status, _, errors = program(*options(source, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 2 and len(errors) == 1


# -------------------------------------------------------------------------------------------- in the way


def test_a_pack_that_is_there_is_not_overwritten(spec, copy, program):
    before = content(copy)
    status, _, (error,) = program(*options(spec, copy))
    assert status == 2 and "already holds something; give another --out or delete it" in error
    assert content(copy) == before


def test_an_unfinished_pack_of_other_data_is_refused(whole, tmp_path, program):
    unfinished(whole, tmp_path, 10**9, 10**9)
    other = table(tmp_path / "source", count=3)
    status, _, (error,) = program(*options(other, tmp_path / "pack"))
    assert status == 2 and "pack.tmp holds an unfinished pack of other data; delete it" in error


def test_an_unfinished_pack_of_another_size_is_refused(spec, whole, tmp_path, program):
    unfinished(whole, tmp_path, 1000, 1000)
    command = options(spec, tmp_path / "pack", "--image-size", SIDE + 1, "--views", *data.VIEWS)
    status, _, (error,) = program(*command)
    assert status == 2 and "pack.tmp holds an unfinished pack of another size; delete it" in error


def test_an_unfinished_pack_that_is_refused_stays_as_it_is(spec, whole, tmp_path):
    unfinished(whole, tmp_path, 1000, 1000)
    before = content(tmp_path / "pack.tmp")
    with pytest.raises(BadInput):
        pack(spec, tmp_path / "pack", side=SIDE + 1)
    assert content(tmp_path / "pack.tmp") == before


# -------------------------------------------------------------------------------------------- damaged packs


def summary(program, folder):
    return program("summary", "--data", f"packed={folder}", "--batch-size", 4)


def test_a_sound_pack_passes_its_summary(whole, program):
    assert summary(program, whole)[0] == 0


def test_a_summary_of_a_pack_shows_no_word_of_a_report(whole, program):
    assert "clear" not in str(summary(program, whole))


@pytest.mark.parametrize("place", [128, 1500, -1], ids=["first pixel", "in between", "last pixel"])
def test_a_damaged_pixel_fails_the_summary(copy, program, place):
    pixels = bytearray((copy / "images.npy").read_bytes())
    pixels[place] ^= 1
    (copy / "images.npy").write_bytes(pixels)
    status, printed, _ = summary(program, copy)
    assert status == 1 and "packed images that are damaged: 1\n" in printed


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_pack_cut_short_is_refused_with_the_way_out(copy, program, file, kept):
    size = (copy / file).stat().st_size
    os.truncate(copy / file, int(kept * size))
    status, _, (error,) = summary(program, copy)
    assert status == 2 and str(copy) in error and error.endswith("delete it and pack again")


@pytest.mark.parametrize("file", FILES)
def test_a_pack_without_one_of_its_files_is_no_finished_pack(copy, program, file):
    (copy / file).unlink()
    status, _, (error,) = summary(program, copy)
    assert status == 2 and "is no finished pack" in error and file in error


@pytest.mark.parametrize("line", ["garbage", "3", "{}"])
def test_a_pack_with_a_line_that_is_none_is_refused(copy, line):
    lines = (copy / "index.jsonl").read_text().splitlines()
    (copy / "index.jsonl").write_text("\n".join([line, *lines[1:]]) + "\n")
    with pytest.raises(BadInput, match="delete it and pack again"):
        data.packed(copy, "train")


@pytest.mark.parametrize("damaged", FILES)
def test_an_unfinished_pack_that_is_damaged_is_refused(spec, copy, tmp_path, damaged):
    copy.rename(tmp_path / "new.tmp")
    (tmp_path / "new.tmp" / damaged).write_bytes(b"garbage\n" * 100)
    with pytest.raises(BadInput, match="new.tmp is damaged"):
        pack(spec, tmp_path / "new")


def test_the_folder_of_a_pack_may_end_in_a_slash(spec, whole, tmp_path):
    pack(spec, f"{tmp_path / 'new'}/")
    assert content(tmp_path / "new") == content(whole)


def test_one_id_for_two_images_is_refused_before_the_work(spec, tmp_path):
    other = table(tmp_path / "other")
    with pytest.raises(BadInput, match="has the image .* 2 times"):
        data.pack([spec, other], tmp_path / "new", side=SIDE, views=data.VIEWS, workers=0)
    assert not (tmp_path / "new.tmp").exists()


def test_a_pack_with_a_line_too_many_is_refused(copy):
    lines = (copy / "index.jsonl").read_text()
    (copy / "index.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.raises(BadInput, match="has 40 images and an index of 41; delete it and pack again"):
        data.packed(copy, "train")


def test_a_pack_smaller_than_what_the_model_takes_is_refused(whole):
    with pytest.raises(
        BadInput, match="packed at 8 pixels, the model takes 9: pack again with --image-size 9"
    ):
        data.check_images(data.packed(whole, "train"), SIDE + 1)


@pytest.mark.parametrize("size", [SIDE, SIDE - 1])
def test_a_pack_as_large_as_the_model_takes_or_larger_is_welcome(whole, size):
    assert data.check_images(data.packed(whole, "train"), size) is None


# ---------------------------------------------------------------------------------------- packs in training


@pytest.fixture(scope="module")
def chest_pack(tmp_path_factory):
    """A pack at the size of the tiny model."""
    root = tmp_path_factory.mktemp("chests")
    pack(table(root / "source"), root / "pack", side=16)
    return root / "pack"


def test_training_takes_a_pack(pretrain, chest_pack):
    assert pretrain("--data", f"packed={chest_pack}") == 0


def test_training_refuses_a_pack_that_is_too_small(pretrain, whole, capsys):
    assert pretrain("--data", f"packed={whole}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and line.endswith("or train with --image-size 8")


def test_training_refuses_a_pack_cut_short(pretrain, copy, capsys):
    os.truncate(copy / "images.npy", 500)
    assert pretrain("--data", f"packed={copy}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and "is cut short or damaged" in line


def test_training_refuses_a_set_whose_images_are_nowhere(pretrain, tmp_path, capsys):
    source = table(tmp_path / "source", count=9)
    (tmp_path / "source").rename(tmp_path / "moved")
    (tmp_path / "source").mkdir()
    shutil.copy(tmp_path / "moved" / "table.csv", tmp_path / "source")
    assert pretrain("--data", source) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'source' / '0.png'} is not there" in line and line.endswith("holds is no image")


def test_training_refuses_a_table_cut_short(pretrain, tmp_path, capsys):
    path = Path(table(tmp_path / "source").partition("=")[2])
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    assert pretrain("--data", f"csv={path}.gz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and f"{path}.gz is cut short" in line
