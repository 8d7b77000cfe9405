"""Packs: what goes in comes out, wherever the work was stopped."""

import os
import shutil
import stat
import time
from itertools import chain
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from layouts import READERS, build, contents, everything, table_of
from PIL import Image

import data
from data import BadInput

SIDE = 8


def source(root, bad=(), count=40):
    """A table of images of several sizes and kinds, each unlike the others -> its spec."""
    rows = ["image,report,patient,split,view,Edema,Mass"]
    for n in range(count):
        view, split = ("PA", "LATERAL", "")[n % 3], data.SPLITS[n // 3 % 3]
        rows.append(f"{n}.png,Film {n}: clear.,{n},{split},{view},{n % 2},{('', '0', '-1')[n % 3]}")
    spec = table_of(root, *rows)
    for n in range(count):
        pixels = np.random.RandomState(n).randint(0, 256, (7 + n % 5, 12 - n % 4), np.uint8)
        Image.fromarray(pixels).convert(("L", "RGB", "RGBA")[n % 3]).save(root / f"{n}.png")
        if n in bad:
            (root / f"{n}.png").write_bytes(b"")
    return spec


def pack(spec, out, **options):
    return data.pack([spec], out, **{"side": SIDE, "views": data.VIEWS, "workers": 0, **options})


def content(out):
    """{file: bytes} of a pack."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A sound table; nobody writes beside it."""
    return source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """Its pack, made without a break; nobody writes into it."""
    out = tmp_path_factory.mktemp("whole") / "pack"
    pack(spec, out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the pack, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "pack"))


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


# ------------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("name", READERS)
def test_a_pack_gives_back_every_record_in_its_order(name, tmp_path):
    original = build(name, tmp_path / "source")
    pack(original, tmp_path / "pack")
    after = contents(f"csv={tmp_path / 'pack'}")[1]
    assert after == contents(original)[1] and len(after) > 2


@pytest.mark.parametrize(
    "report", ["1. ___ M (XXXX)", "two\r\nlines, one\u2028more", 'a "quote", a comma', None]
)
def test_a_report_comes_out_of_a_pack_word_for_word(report, tmp_path, monkeypatch):
    r = data.Record(np.zeros((4, 4), np.uint8), report, {"Mass": 1}, "1", "rsna", id="1")
    monkeypatch.setitem(data.DATASETS, "phantom", lambda root, split: [r] if split == "test" else [])
    pack("phantom", tmp_path / "pack")
    (found,) = everything(f"csv={tmp_path / 'pack'}")
    assert (found.report, found.source) == (report, "rsna")


def test_several_data_sets_in_one_pack_keep_what_each_annotates(tmp_path):
    specs = [build(name, tmp_path / name) for name in ("rsna", "chexpert")]
    data.pack(specs, tmp_path / "pack", side=SIDE, workers=0)

    def states(specs):
        found = [data.read_records(specs, split) for split in data.SPLITS]
        records = [r for part in found for r in chain(*part.values()) if r.view in data.FRONTAL]
        return [(r.id, r.labels) for r in records]

    assert states([f"csv={tmp_path / 'pack'}"]) == states(specs)


def test_several_processes_make_the_same_pack(spec, whole, tmp_path):
    pack(spec, tmp_path / "pack", workers=2)
    assert content(tmp_path / "pack") == content(whole)


def test_a_pack_keeps_colour_where_it_is_asked_to_also_over_a_grey_one(tmp_path, program):
    spec = source(tmp_path / "source", count=9)
    colour = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "source" / "0.png")
    for channels, expected in ((1, Image.fromarray(colour).convert("L")), (3, colour)):
        program(*options(spec, tmp_path / "pack", "--views", *data.VIEWS, "--channels", channels))
        packed = {r.id: r.image for r in everything(f"csv={tmp_path / 'pack'}")}["0.png"]
        assert np.array_equal(np.asarray(Image.open(packed)), np.asarray(expected))


def test_only_the_chosen_views_and_those_not_said_are_packed(spec, tmp_path):
    pack(spec, tmp_path / "pack", views=data.FRONTAL)
    assert {r.view for r in everything(f"csv={tmp_path / 'pack'}")} == {"PA", ""}


def test_everything_in_a_pack_is_for_its_owner_alone(spec, tmp_path, program):
    before = os.umask(0)
    program(*options(spec, tmp_path / "pack"))
    os.umask(before)
    found = list((tmp_path / "pack").rglob("*"))
    assert found and not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in found)


def test_what_cannot_be_written_leaves_the_old_file_and_no_link_is_written_through(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(BadInput, match="a.txt cannot be written; is the disk full"):
        with data.replacing(tmp_path / "a.txt") as file:
            file.write("new")
            raise OSError("No space left on device")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
    (tmp_path / "ids.txt.tmp").symlink_to(tmp_path / "a.txt")
    with data.replacing(tmp_path / "ids.txt") as file:
        file.write("new")
    assert (tmp_path / "a.txt").read_text() == "old" and data.read_ids(tmp_path / "ids.txt") == ["new"]


@pytest.mark.parametrize(
    ("end", "way_out"),
    [
        ("os.kill(os.getpid(), 9)", "try fewer --workers"),
        ("time.sleep(600)", "copy the images to a faster disk"),
    ],
    ids=["killed", "stalled"],
)
def test_a_loading_process_that_is_killed_or_stalls_ends_pack_in_one_sentence_with_its_own_way_out(
    end, way_out, spec, tmp_path, monkeypatch, program
):
    monkeypatch.setattr(data, "check_images", lambda *_: None)  # it reads in the main process
    monkeypatch.setattr(data, "read_image", lambda *_: exec(end))
    monkeypatch.setattr(data, "PATIENCE", 2)
    start = time.monotonic()
    status, _, errors = program(*options(spec, tmp_path / "pack", "--workers", 2))
    assert status == 2 and "reading images stopped" in errors[0] and way_out in errors[0]
    assert time.monotonic() - start < 60 and not active_children()


# ---------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("stopped", range(0, 40, 13))
def test_a_pack_stopped_anywhere_ends_as_the_unbroken_one(spec, whole, tmp_path, monkeypatch, stopped):
    reads, original = [], data.read_image

    def read(image, *channels):
        reads.extend([image] if "images" not in str(image) else [])  # not those of the pack
        if len(reads) > stopped:
            raise KeyboardInterrupt
        return original(image, *channels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "read_image", read)
        pack(spec, tmp_path / "pack")
    pack(spec, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(whole)


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "no image", "missing"])
def test_only_what_is_not_there_and_whole_is_made_again(spec, whole, copy, monkeypatch, damage):
    image = sorted((copy / "images").rglob("*.png"))[5]
    image.unlink() if damage is None else image.write_bytes(damage)
    read, original = [], data.read_image
    monkeypatch.setattr(data, "check_images", lambda *_: None)  # it reads the first ones
    monkeypatch.setattr(
        data, "read_image", lambda image, *rest: read.append(str(image)) or original(image, *rest)
    )
    pack(spec, copy)
    assert len([path for path in read if "images" not in path]) == 1
    assert content(copy) == content(whole)


def test_ctrl_c_says_that_the_same_command_goes_on(spec, tmp_path, monkeypatch, program):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_image", interrupted)
    status, _, errors = program(*options(spec, tmp_path / "pack"))
    assert status == 130 and "the same command goes on" in errors[0]


# ------------------------------------------------------------------------------------------------- bad images


def test_bad_images_are_left_out_three_are_shown_and_all_are_in_a_file(tmp_path, program):
    spec = source(tmp_path / "source", bad=(0, 9, 11, 30))
    status, printed, _ = program(*options(spec, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 0 and f"36 images packed; use them by --data csv={tmp_path / 'pack'}\n" in printed
    assert f"4 images cannot be read and are left out; {tmp_path / 'pack'}/bad.txt names all:" in printed
    named = (tmp_path / "pack" / "bad.txt").read_text().splitlines()
    assert printed.splitlines()[1:4] == named[:3]
    names = [f"the image {tmp_path}/source/{name}.png cannot be read (" for name in (0, 9, 11, 30)]
    assert all(map(str.startswith, sorted(named), sorted(names)))


def test_beside_bad_images_each_record_keeps_its_own(tmp_path):
    spec = source(tmp_path / "source", bad=(0, 9, 11))
    pack(spec, tmp_path / "pack")
    own, found = ({r.id: r for r in everything(s)} for s in (spec, f"csv={tmp_path / 'pack'}"))
    assert found.keys() == own.keys() - {"0.png", "9.png", "11.png"}
    for id, r in found.items():
        expected = data.evaluation_transform(SIDE)(data.read_image(own[id].image))[0]
        assert r.report == own[id].report and np.array_equal(data.read_image(r.image), expected)


def test_a_set_without_one_readable_image_is_refused(tmp_path, program):
    spec = source(tmp_path / "source", bad=range(3), count=3)
    status, _, errors = program(*options(spec, tmp_path / "pack", "--views", *data.VIEWS))
    assert status == 2 and "none of the 3 images can be read" in errors[0]


def test_images_that_are_nowhere_are_refused_before_the_work_and_by_training(pretrain, tmp_path, program):
    spec = source(tmp_path / "source", count=9)
    for image in (tmp_path / "source").glob("*.png"):
        image.unlink()
    status, _, (error,) = program(*options(spec, tmp_path / "pack"))
    assert status == 2 and not (tmp_path / "pack").exists()
    assert f"{tmp_path / 'source' / '0.png'} is not there" in error and error.endswith("holds is no image")
    assert pretrain("--data", spec) == 2


# ------------------------------------------------------------------------------------------------- in the way


def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_is(spec, tmp_path, program):
    own = Path(source(tmp_path / "own", count=3).removeprefix("csv=")).parent
    before = content(own)
    status, _, (error,) = program(*options(spec, own))
    assert status == 2 and f"{own} holds files and is no pack; give another --out" in error
    assert content(own) == before


@pytest.mark.parametrize("change", ["a new image", "the size", "a repaired image", "a changed image"])
def test_a_pack_follows_its_source_by_the_same_command(change, copy, tmp_path):
    side, count = SIDE + (change == "the size"), 40 + (change == "a new image")
    if change == "a repaired image":
        shutil.rmtree(copy)
        pack(source(tmp_path / "source", bad=[7]), copy)
        assert "7.png" in (copy / "bad.txt").read_text()
    if change == "a changed image":
        old, other = list(copy.rglob("*.png"))[:2]
        shutil.copy(other, old)
        os.utime(old, (0, 0))
    for out in (copy, tmp_path / "new"):
        pack(source(tmp_path / "source", count=count), out, side=side)
    assert content(copy) == content(tmp_path / "new")


def test_one_id_for_two_images_is_refused_before_the_work(spec, tmp_path):
    with pytest.raises(BadInput, match="has the image .* 2 times"):
        data.pack([spec, source(tmp_path / "other")], tmp_path / "new", side=SIDE, workers=0)
    assert not (tmp_path / "new").exists()


def test_images_smaller_than_what_the_model_takes_are_noted(whole, capsys):
    for size in (SIDE, SIDE + 1):
        data.check_images(everything(f"csv={whole}"), size)
    assert "8 pixels a side, the model takes 9 and will blur it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ packs in training


def test_phantoms_are_looked_through_for_no_copies(capsys, monkeypatch):
    monkeypatch.setattr(data, "copied_pairs", lambda one, other, workers: [(r, r) for r in one])
    assert data.main(["summary", "--data", "phantom=16"]) == 0
    assert "0 pairs" in capsys.readouterr().out
