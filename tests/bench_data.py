"""Two measurements by hand: `python tests/bench_data.py` and `python tests/bench_data.py train.csv`.

With CheXpert's table: what the label mask leaves to an image among label prompts, in random batches.
Without: how long one loading process takes for a full-size radiograph (2544 x 3056, grey JPEG, quality 95, as
in MIMIC-CXR-JPG), and for the same image in a pack.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

IMAGES, ROUNDS, SIDE = 16, 7, 224


def negatives(table):
    """Prints a line for each choice of findings and batch size; `--uncertain ignore`, frontal images."""
    rows = [data.settle(r, "ignore") for r in data.chexpert_table(table) if r.view in data.FRONTAL]
    for names in (("Edema", "Pleural Effusion"), data.COMPETITION, data.CHEXPERT):
        records = [r for r in data.restricted(rows, frozenset(names)) if r.findings or r.absent]
        labelled = sum(bool(r.findings) for r in records) / len(records)
        for batch in (16, 256):
            _, removed, starved = data.expected_pairs(records, batch)
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
    negatives(*sys.argv[1:]) if sys.argv[1:] else reading()
