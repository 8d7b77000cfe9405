"""Images: every kind of file is read to its picture, or refused; images as tensors."""

import os
import re
import resource
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FORKS
from PIL import Image

import data
import evaluate
from data import BadInput

GREY = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (2, 2))


def palette_image():
    """Place i of the palette is the grey 255 - i."""
    image = Image.fromarray(255 - GREY)
    image.putpalette([255 - i for i in range(256) for _ in "rgb"])
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(GREY).convert("RGB"), GREY),
        (Image.fromarray(GREY).convert("RGBA"), GREY),
        (Image.fromarray(GREY).convert("LA"), GREY),
        (palette_image(), GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        (Image.fromarray(GREY.astype(np.uint16) * 16 + GREY // 16), GREY),
        (Image.fromarray(GREY > 100), np.where(GREY > 100, 255, 0)),
    ],
    ids=["grey", "RGB", "RGBA", "LA", "palette", "16-bit", "12-bit", "1-bit"],
)
def test_png_of_every_kind_is_read_to_its_grey_values(image, expected, tmp_path):
    image.save(tmp_path / "image.png")
    assert np.array_equal(data.read_image(tmp_path / "image.png"), expected)


def tiff(values, *, white=1, kind=1):
    """(H, W) array -> bytes of a TIFF; white: 0 where 0 is white, else 1; kind: 1 unsigned, 2 signed."""
    pixels, (height, width) = values.astype(values.dtype.newbyteorder("<")).tobytes(), values.shape
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: white, 273: 8, 277: 1}
    tags |= {278: height, 279: len(pixels), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ends = struct.pack("<I", 8 + len(pixels)), struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + ends[0] + pixels + ends[1]


WIDE = GREY.astype(np.uint16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(GREY, white=0), 255 - GREY),
        (tiff(WIDE * 257, white=0), 255 - GREY),
        (tiff(WIDE * 16 + WIDE // 16, white=0), 255 - GREY),
        (tiff(WIDE.astype(np.int16) * 16 - 1024, kind=2), GREY),
        (tiff(WIDE.astype(np.int32) * 16 - 1024, kind=2), GREY),
        (tiff(WIDE.astype(np.uint32) * (2**32 // 255)), GREY),
    ],
    ids=["8 bits", "16 bits", "12 bits", "CT of 16 bits", "CT of 32 bits", "32 bits"],
)
def test_tiff_of_every_kind_is_read_to_its_grey_values(content, expected, tmp_path):
    (tmp_path / "image.tif").write_bytes(content)
    assert np.array_equal(data.read_image(tmp_path / "image.tif"), expected)


@pytest.mark.parametrize("odd", [0, 65535])
@pytest.mark.parametrize("white", [0, 1])
def test_one_pixel_does_not_set_the_exposure_of_an_image_of_16_bits(odd, white, tmp_path):
    for name, pixel in (("a.tif", 2000), ("b.tif", odd)):
        values = np.random.default_rng(0).integers(1000, 4096, (64, 64), dtype=np.uint16)
        values[5, 5] = pixel
        (tmp_path / name).write_bytes(tiff(values, white=white))
    one, other = (np.asarray(data.read_image(tmp_path / name), int) for name in ("a.tif", "b.tif"))
    one[5, 5] = other[5, 5]
    assert np.abs(one - other).max() <= 1 and other[5, 5] == (255 if (odd > 0) == (white == 1) else 0)


def test_a_dark_image_of_16_bits_stays_dark_below_the_greys_of_8_bits():
    assert np.array_equal(data.upright(Image.fromarray(WIDE // 2)), GREY // 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_an_image_is_read_as_a_viewer_shows_it(kind, orientation, tmp_path):
    exif, ramp = Image.Exif(), np.zeros((16, 32), np.uint8)
    exif[274], ramp[:8, :8] = orientation, 255  # white in the stored top left corner
    Image.fromarray(ramp).save(tmp_path / f"image.{kind}", exif=exif)
    shown = np.asarray(data.read_image(tmp_path / f"image.{kind}"))
    assert shown.shape == ((16, 32) if orientation < 5 else (32, 16))
    top, left = orientation in (1, 2, 5, 6), orientation in (1, 4, 5, 8)
    assert shown[0 if top else -1, 0 if left else -1] > 250 and shown.mean() < 40


def png16(values):
    """(H, W, 2 or 3) uint16 -> bytes of a PNG, which Pillow cannot write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2}[bands], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    framed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("bands", [2, 3])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_colour_of_16_bits_is_read_where_it_uses_them_and_refused_where_the_rest_is_lost(
    bands, bits, tmp_path
):
    values = np.repeat(WIDE[..., None] * 257 >> 16 - bits, bands, 2)
    values[..., -1] = 65535 if bands == 2 else values[..., -1]  # an opaque alpha channel
    (tmp_path / "image.png").write_bytes(png16(values))
    if bits == 16:
        assert np.array_equal(data.read_image(tmp_path / "image.png"), GREY)
    else:
        with pytest.raises(BadInput, match="image.png cannot be read .*save it as grey with 16 bits"):
            data.read_image(tmp_path / "image.png")


def in_alpha(mode):
    """The picture is in the alpha channel, all else is black."""
    black, alpha = Image.new("L", (32, 32)), Image.fromarray(GREY)
    return Image.merge(mode, [black] * (len(mode) - 1) + [alpha])


def in_palette():
    """Every place of the palette is black, and transparent by its number."""
    image = Image.fromarray(GREY)
    image.putpalette(bytes(768))
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize("image", [in_alpha("LA"), in_alpha("RGBA"), in_palette()], ids=["LA", "RGBA", "P"])
def test_a_picture_that_is_in_the_alpha_channel_alone_is_refused(image, tmp_path):
    image.save(tmp_path / "image.png")
    with pytest.raises(BadInput, match="alpha channel alone; save it without transparency"):
        data.read_image(tmp_path / "image.png")


@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_floating_point_greys_are_refused_with_the_way_out(scale, tmp_path):
    Image.fromarray(GREY.astype(np.float32) * np.float32(scale)).save(tmp_path / "image.tif")
    with pytest.raises(BadInput, match="floating-point .* save it with 8 or 16 bits"):
        data.read_image(tmp_path / "image.tif")


def test_signed_greys_of_8_bits_are_refused(tmp_path):
    (tmp_path / "image.tif").write_bytes(tiff(GREY.astype(np.int8), kind=2))
    with pytest.raises(BadInput, match="signed numbers of 8 bits; save it"):
        data.read_image(tmp_path / "image.tif")


def test_a_tiff_of_several_pages_is_refused_by_their_number(tmp_path):
    Image.fromarray(GREY).save(
        tmp_path / "a.tif", save_all=True, append_images=[Image.new("L", (32, 32))] * 2
    )
    with pytest.raises(BadInput, match="it has 3 pages; save the page that is meant"):
        data.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a\0.png", f"{'a' * 300}.png"])
def test_a_name_that_no_file_can_have_is_a_missing_image(name, tmp_path):
    records = [SimpleNamespace(image=tmp_path / name, source="own")]
    for read in (lambda: data.read_image(tmp_path / name), lambda: data.check_images(records, 8)):
        with pytest.raises(BadInput, match="a.*png") as caught:
            read()
        assert "\0" not in str(caught.value)


WHOLE = {
    "png": Image.fromarray(GREY),
    "16-bit.png": Image.fromarray(GREY.astype(np.uint16) * 257),
    "jpg": Image.fromarray(GREY).resize((64, 64)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_an_image_that_is_cut_short_is_named_wherever_it_is_cut(kind, tmp_path):
    path = tmp_path / f"image.{kind}"
    WHOLE[kind].save(path)
    whole = path.read_bytes()
    for length in range(0, whole.rindex(b"IDAT") if b"IDAT" in whole else len(whole) * 3 // 4, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=f"image.{kind} cannot be read"):
            data.read_image(path)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"no image", bytes(128) + b"DICM"])
def test_an_image_that_cannot_be_read_is_named_once_with_the_way_out(tmp_path, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        list(data.readable(data.Images([SimpleNamespace(image=bad)], data.evaluation_transform(8))))
    error = str(caught.value)
    assert error.startswith(f"the image {bad} cannot be read (") and error.count(str(bad)) == 1
    assert error.endswith("; repair it, or leave it out by `python data.py pack`")


def test_an_image_made_to_fill_the_memory_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("1", (40, 60)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadInput, match="image.png cannot be read .*2400 pixels"):
        data.read_image(tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["pipe", "folder", "gif"])
def test_what_is_no_image_file_of_the_data_sets_is_refused_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "image.png"
    Image.new("L", (4, 4)).save(path, "GIF")
    if kind != "gif":
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(BadInput, match="image.png cannot be read"):
        data.read_image(path)


def test_a_long_strip_takes_no_more_memory_than_a_large_image():
    assert data.pad_to_square(Image.new("L", (40_000, 900))).shape == (1, data.SIDE, data.SIDE)


def test_padding_keeps_the_content_in_the_centre():
    expected = torch.zeros(6, 6, dtype=torch.uint8)
    expected[2:4] = 255
    assert torch.equal(data.pad_to_square(Image.new("L", (6, 2), 255))[0], expected)
    assert torch.equal(data.pad_to_square(Image.new("L", (2, 6), 255))[0], expected.T)


def test_evaluation_transform_shows_the_whole_image():
    image = np.zeros((20, 10), np.uint8)
    image[:4], image[-4:] = 255, 255
    shown = data.evaluation_transform(10)(Image.fromarray(image))[0]
    assert shown.shape == (10, 10) and shown[0, 5] == shown[-1, 5] == 255


def test_the_evaluation_transform_is_deterministic_and_the_training_transform_varies():
    image = Image.fromarray(GREY)
    for transform, same in ((data.evaluation_transform(10), True), (data.training_transform(16), False)):
        assert torch.equal(transform(image), transform(image)) == same


@pytest.mark.parametrize(("horizontal_flip", "seen"), [(False, {True}), (True, {True, False})])
def test_training_keeps_left_and_right_unless_it_is_told_to_flip(horizontal_flip, seen):
    transform = data.training_transform(16, horizontal_flip)
    image = Image.fromarray(np.repeat(np.uint8([[255, 0]]), 8, axis=1).repeat(16, axis=0))
    torch.manual_seed(0)
    drawn = [transform(image).float() for _ in range(30)]
    assert {bool(t[..., :8].sum() > t[..., 8:].sum()) for t in drawn} == seen


COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)


@pytest.mark.parametrize("kind", ["png", "tif", "bmp"])
def test_three_channels_keep_colours_and_one_makes_them_grey(kind, tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / f"a.{kind}")
    assert np.array_equal(data.read_image(tmp_path / f"a.{kind}", 3), COLOUR)
    expected = np.asarray(Image.fromarray(COLOUR).convert("L"))
    assert np.array_equal(data.read_image(tmp_path / f"a.{kind}"), expected)


@pytest.mark.parametrize("image", [GREY, Image.fromarray(GREY), Image.fromarray(WIDE * 257)])
def test_a_grey_image_has_three_equal_channels_where_colour_is_wanted(image):
    read = data.read_image(image, 3) if isinstance(image, np.ndarray) else data.upright(image, 3)
    assert np.array_equal(read, np.stack([GREY] * 3, axis=2))


@pytest.mark.parametrize("make", [data.evaluation_transform, data.training_transform])
def test_the_transforms_keep_each_channel_in_its_place(make):
    image = Image.merge("RGB", [Image.new("L", (20, 20), value) for value in (60, 100, 140)])
    inside = make(10)(image)[:, 4:6, 4:6].float().mean((1, 2))
    assert make(10)(image).shape == (3, 10, 10) and inside[0] + 20 < inside[1] < inside[2] - 20


@pytest.mark.parametrize(("channels", "tint", "noted"), [(1, 60, True), (1, 8, False), (3, 60, False)])
def test_colour_images_for_a_grey_model_are_noted_but_no_tinted_film(channels, tint, noted, tmp_path, capsys):
    Image.fromarray(np.stack([GREY, GREY, np.maximum(GREY, tint) - tint], axis=2)).save(tmp_path / "a.png")
    data.check_images([SimpleNamespace(image=tmp_path / "a.png", source="own")], 8, channels)
    assert ("is in colour and is read as grey; --channels 3" in capsys.readouterr().err) == noted


def test_a_colour_model_learns_is_saved_and_encodes_paths_pictures_and_arrays_alike(
    pretrain, cases, tmp_path, capsys
):
    for path in (tmp_path / "cases").glob("*.png"):
        grey = np.asarray(Image.open(path))
        Image.fromarray(np.stack([grey, grey.T, 255 - grey], axis=2)).save(path)
    assert pretrain(*cases, "--channels", 3) == 0
    run = evaluate.load_run(tmp_path / "run")
    assert run.model.image_encoder.patch_embed.in_channels == run.args.channels == 3
    paths = sorted((tmp_path / "cases").glob("*.png"))[:4]
    pictures = [Image.open(path) for path in paths]
    features = evaluate.encode_images(run, paths)
    assert np.allclose(features, evaluate.encode_images(run, pictures), atol=1e-6)
    assert np.allclose(features, evaluate.encode_images(run, list(map(np.asarray, pictures))), atol=1e-6)
    greys = evaluate.encode_images(run, [picture.convert("L") for picture in pictures])
    assert not np.allclose(features, greys, atol=1e-3)
    evaluate.gallery(evaluate.encode(run, data.load_records(cases[1:], "test")), tmp_path / "gallery.png", 1)
    drawn = np.asarray(Image.open(tmp_path / "gallery.png"), int)[40:200, 20:200]
    assert np.ptp(drawn, axis=2).mean() > data.COLOURED


def test_a_run_from_before_there_was_colour_is_a_grey_one(tiny_run, tmp_path):
    state = torch.load(tiny_run / "best.pt", weights_only=True)
    del state["args"]["channels"]
    torch.save(state, tmp_path / "old.pt")
    assert evaluate.load_run(tmp_path / "old.pt").args.channels == 1


# -------------------------------------------------------------------------------------- the first of a source


@pytest.mark.parametrize(
    ("greys", "noted"),
    [((0, 0), True), ((255, 255), True), ((100, 120), True), ((0, 30), False), ((0, 255), False)],
)
def test_the_first_images_are_noted_where_next_to_nothing_can_be_seen(greys, noted, tmp_path, capsys):
    values = np.linspace(*greys, 4096).astype(np.uint8).reshape(64, 64)
    values[3, 3] = 255  # of one bright pixel nothing can be seen
    Image.fromarray(values).save(tmp_path / "a.png")
    data.check_images([SimpleNamespace(image=tmp_path / "a.png", source="own")], 8)
    assert ("a.png has greys from" in capsys.readouterr().err) == noted


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    records = [SimpleNamespace(image=tmp_path / f"{n}.png", source="own") for n in range(5)]
    for n in (0, 1, 4):
        Image.fromarray(GREY).save(tmp_path / f"{n}.png")
    with pytest.raises(BadInput, match="2 of the 5 images of own are missing, the first is .*/2.png; "):
        data.check_images(records, 8)
    data.check_images(records, 0)  # pack leaves them out


# ----------------------------------------------------------------------------------------- loading processes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine's cores
def test_too_little_shared_memory_is_refused_before_loading_by_its_name_and_the_way_out(monkeypatch):
    free = SimpleNamespace(free=64 * 2**20)  # as Docker gives
    monkeypatch.setattr(data.shutil, "disk_usage", {"/dev/shm": free}.get)
    data.loader([0], 4, 128 * 128**2)
    data.loader([0], 0, 128 * 1024**2)
    with pytest.raises(BadInput, match="/dev/shm has 67.1 MB free, and 4 .*--workers 0.*--shm-size"):
        data.loader([0], 4, 128 * 1024**2)


def bounded(soft, hard, workers):
    """In a process with these bounds -> the soft one after a loader is made, or the sentence."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        data.loader([0], workers, 1)
    except BadInput as error:
        return str(error)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(
    ("workers", "outcome"), [(0, "64"), (1, "256"), (16, "at most 256 files .* fewer --workers, .*ulimit -n")]
)
def test_loading_processes_get_all_files_they_may_open_and_too_few_are_refused(workers, outcome):
    with FORKS.Pool(1) as pool:
        assert re.match(outcome, str(pool.apply(bounded, (64, 256, workers))))


FULL = (OSError(24, "Too many open files"), RuntimeError("received 0 items of ancdata"))


@pytest.mark.parametrize("error", FULL)
def test_too_many_open_files_are_called_that(error):
    def batches():
        yield 0
        raise error

    with pytest.raises(BadInput, match="too many open files; take fewer --workers"):
        list(data.readable(batches()))
