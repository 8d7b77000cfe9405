"""Measurements by hand: `python tests/bench_data.py` and `python tests/bench_data.py train.csv`.

With CheXpert's table: what the label mask is expected to remove from random batches, and what it leaves to an
image among label prompts. Without: how long one loading process takes for a full-size radiograph (2544 x
3056, grey JPEG, quality 95, as in MIMIC-CXR-JPG), and for the same image in a pack.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

IMAGES, ROUNDS, SIDE = 16, 7, 224


def expected_pairs(records, batch_size):
    """What the label mask is expected to remove from a random batch -> three float.

    Pairs of images with the same findings, a disease among them (their reports); pairs of an image and a
    label prompt of another that fits it; the share of labelled images that every prompt fits.
    """
    labelled = [record for record in records if record.findings]
    ill = Counter(record.findings for record in labelled if record.findings - data.NON_DISEASES)
    pairs, share = batch_size * (batch_size - 1), len(labelled) / len(records)
    present, absent = data.label_matrices(labelled, data.vocabulary(labelled))
    drawn = (present / present.sum(1, keepdim=True)).mean(0)
    fits = (~absent).float() @ drawn  # the chance that the prompt of another labelled image fits this one
    same = sum((times / len(records)) ** 2 for times in ill.values())
    starved = float((1 - share * (1 - fits)).pow(batch_size - 1).mean())
    return pairs / 2 * same, pairs * float(fits.mean()) * share**2, starved


def masked(table):
    """Frontal images: a line for each policy, then for each choice of findings and batch size ("ignore")."""
    frontal = [r for r in data.chexpert_table(table) if r.view in data.FRONTAL]
    for policy in data.UNCERTAIN:
        records = [data.settle(r, policy) for r in frontal]
        labelled = [r for r in records if r.findings]
        each = sum(len(r.findings) for r in labelled) / len(labelled)
        reports, texts, _ = expected_pairs(records, 100)
        print(
            f"{policy}: {len(labelled):,} labelled images, {each:.2f} findings each; in a batch of 100 the "
            f"mask removes {reports:.1f} pairs among reports and {texts:,.0f} among prompts"
        )
    rows = [data.settle(r, "ignore") for r in frontal]
    for names in (("Edema", "Pleural Effusion"), data.COMPETITION, data.CHEXPERT):
        records = [r for r in data.restricted(rows, frozenset(names)) if r.findings or r.absent]
        labelled = sum(bool(r.findings) for r in records) / len(records)
        for batch in (16, 256):
            _, removed, starved = expected_pairs(records, batch)
            left = 1 - removed / (batch * (batch - 1) * labelled**2)
            print(
                f"{len(names)} findings, batch {batch}: {batch * labelled:.0f} images with a prompt, "
                f"{left:.0%} negatives left, {starved:.2%} of them without any"
            )


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


if __name__ == "__main__":
    masked(*sys.argv[1:]) if sys.argv[1:] else reading()
