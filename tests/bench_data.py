"""Measurements by hand: `python tests/bench_data.py`, with `train.csv`, or with `copies [FOLDER]`.

With CheXpert's table: what the label mask removes from random batches, and what it leaves to an image among
label prompts. Without: how long one loading process takes for a full-size radiograph (2544 x
3056, grey JPEG, quality 95, as in MIMIC-CXR-JPG), and for the same image in a pack. With "copies": after
which changes a copy is still found, of phantoms or of the images in FOLDER, and how many pairs of others are.
"""

import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from umcl import prompt_mask, report_mask

IMAGES, ROUNDS, SIDE = 16, 7, 224


def masked_pairs(records, batch_size, batches=1000):
    """What the label mask does to random batches -> four float, means over the batches.

    Pairs removed among the reports, and of an image with another's label prompt; the share of such pairs of
    image and prompt that is left; the share of the labelled images that have none left.
    """
    findings = data.vocabulary(records)
    present, absent = data.label_matrices(records, findings)
    disease, found = torch.tensor([name not in data.NON_DISEASES for name in findings]), []
    for _ in range(batches):
        rows = torch.randint(len(records), (batch_size,))
        labelled = rows[present[rows].any(1)]
        n = len(labelled)
        drawn = torch.multinomial(present[labelled].float(), 1)[:, 0]
        every = torch.arange(n)  # no two reports, and no two images, are the same
        same = report_mask(present[labelled], absent[labelled], disease, every, every)
        reports, fits = same.sum().item() - n, prompt_mask(absent[labelled], drawn)
        prompts = fits.sum().item() - n
        found.append([reports / 2, prompts, 1 - prompts / (n * (n - 1)), fits.all(1).float().mean().item()])
    return np.mean(found, axis=0)


def masked(table):
    """Frontal images: a line for each policy, then for each choice of findings and batch size ("ignore")."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for tensors this small two only wait for each other
    frontal = [r for r in data.chexpert_table(table) if r.view in data.FRONTAL]
    for policy in data.UNCERTAIN:
        records = [data.settle(r, policy) for r in frontal]
        each = [len(data.present(r)) for r in records if data.present(r)]
        reports, texts, *_ = masked_pairs(records, 100)
        print(
            f"{policy}: {len(each):,} labelled images, {np.mean(each):.2f} findings each; in a batch of 100 "
            f"the mask removes {reports:.0f} pairs among reports and {texts:,.0f} among prompts"
        )
    rows = [data.settle(r, "ignore") for r in frontal]
    share, of_image = Counter(), [data.present(r) for r in rows if data.present(r)]
    for names in of_image:
        share.update({name: 1 / len(names) / len(of_image) for name in names})
    print("label prompts drawn:", ", ".join(f"{name} {part:.1%}" for name, part in share.most_common()))
    for names in (("Edema", "Pleural Effusion"), data.COMPETITION, data.CHEXPERT):
        records = [r for r in data.restricted(rows, frozenset(names)) if r.labels]
        for batch in (16, 256):
            *_, left, none = masked_pairs(records, batch)
            print(f"{len(names)} findings, batch {batch}: {left:.0%} negatives left, {none:.1%} have none")


def milliseconds(records):
    """Of an image, from the record to the tensor that the model is given: the median over rounds."""
    images, times = data.Images(records, data.training_transform(SIDE)), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for i in range(len(images)):
            images[i]
        times.append((time.perf_counter() - start) * 1000 / len(images))
    return np.median(times)


def reading():
    torch.set_num_threads(1)  # as in a loading process
    with tempfile.TemporaryDirectory() as folder:
        for n in range(IMAGES):
            phantom, _ = data.draw_phantom(np.random.default_rng(n), {"Edema"}, 3056)
            Image.fromarray(phantom[:, 256:-256]).save(Path(folder, f"{n}.jpg"), quality=95)
        table = Path(folder, "table.csv")
        table.write_text("image,split\n" + "".join(f"{n}.jpg,train\n" for n in range(IMAGES)))
        data.pack([f"csv={table}"], f"{folder}/pack", side=SIDE, workers=0)
        for name, spec in (("full size", f"csv={table}"), ("packed", f"csv={folder}/pack")):
            print(f"{name}: {milliseconds(data.load_records([spec], 'train')):.1f} ms an image")


CHANGES = {
    "half the size": lambda image: image.reduce(2),
    "JPEG of quality 30": lambda image: as_jpeg(image, 30),
    "crop 2 % a side": lambda image: ImageOps.crop(image, round(image.width * 0.02)),
    "crop 5 % a side": lambda image: ImageOps.crop(image, round(image.width * 0.05)),
    "crop 10 % a side": lambda image: ImageOps.crop(image, round(image.width * 0.1)),
    "rotation 2 degrees": lambda image: image.rotate(2, Image.Resampling.BILINEAR),
    "rotation 5 degrees": lambda image: image.rotate(5, Image.Resampling.BILINEAR),
    "white border": lambda image: ImageOps.expand(image, image.width // 12, 255),
    "black border": lambda image: ImageOps.expand(image, image.width // 12, 0),
    "gamma 0.7": lambda image: image.point([255 * (grey / 255) ** 0.7 for grey in range(256)]),
    "mirror": ImageOps.mirror,
    "negative": ImageOps.invert,
}


def as_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("L")


def copies(folder=None, count=200):
    """Prints, for each change, the share of images of which the changed copy is found."""
    if folder:
        images = [data.read_image(path) for path in sorted(data.image_files(folder))[:count]]
    else:
        images = [data.draw_phantom(np.random.default_rng(n), {"Edema"}, 256)[0] for n in range(count)]
        images = list(map(Image.fromarray, images))

    def views_and_hash(image):
        return data.picture_views(np.asarray(image)), data.picture_hash(np.asarray(image))

    originals = list(map(views_and_hash, images))
    for name, change in CHANGES.items():
        changed = [views_and_hash(change(image)) for image in images]
        found = [
            any(len(rows) for rows, _ in data.near_pairs(h[None], other[None])) and data.alike(views, seen)
            for (views, h), (seen, other) in zip(originals, changed, strict=True)
        ]
        print(f"{name:20} {np.mean(found):.2f}")
    records = [data.Record(np.asarray(image), None, {}, "", "") for image in images]
    print(f"{len(list(data.copied_pairs(records, records)))} pairs among the {len(images)} originals")


if __name__ == "__main__":
    if sys.argv[1:2] == ["copies"]:
        copies(*sys.argv[2:])
    else:
        masked(*sys.argv[1:]) if sys.argv[1:] else reading()
