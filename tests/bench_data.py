"""Two measurements by hand: `python tests/bench_data.py` and `python tests/bench_data.py train.csv`.

With CheXpert's table: what the label mask leaves to an image among label prompts, in random batches.

Without: reading images.
Full-size radiographs (2544 x 3056, grey JPEG, quality 95, as MIMIC-CXR-JPG has them) against the same images
in a pack (PNG): what one loading process needs from the record to the tensor that the model is given. Both
take turns; the medians and the range of the ratio are over the rounds.
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


def milliseconds(images):
    start = time.perf_counter()
    for i in range(len(images)):
        images[i]
    return (time.perf_counter() - start) * 1000 / len(images)


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


def main():
    torch.set_num_threads(1)  # as in a loading process
    with tempfile.TemporaryDirectory() as folder:
        for n in range(IMAGES):
            phantom, _ = data.draw_phantom(np.random.default_rng(n), {"Edema"}, 3056)
            Image.fromarray(phantom[:, 256:-256]).save(Path(folder, f"{n}.jpg"), quality=95)
        table = Path(folder, "table.csv")
        table.write_text("image,split\n" + "".join(f"{n}.jpg,train\n" for n in range(IMAGES)))
        megabytes = sum(path.stat().st_size for path in Path(folder).glob("*.jpg")) / IMAGES / 2**20
        print(f"{IMAGES} images of {megabytes:.1f} MiB, {SIDE} pixels, torch {torch.__version__}")
        data.pack([f"csv={table}"], f"{folder}/pack", side=SIDE, workers=0)
        decoded = data.load_records([f"csv={table}"], "train")
        packed = data.load_records([f"csv={folder}/pack"], "train")
        for name, transform in (
            ("evaluation", data.evaluation_transform(SIDE)),
            ("training", data.training_transform(SIDE)),
        ):
            sides = [data.Images(records, transform) for records in (decoded, packed)]
            if name == "evaluation":
                same = all(torch.equal(a[1], b[1]) for a, b in zip(*sides, strict=True))
                print(f"packed and decoded images are {'equal' if same else 'NOT EQUAL'}")
            times = np.array([[milliseconds(images) for images in sides] for _ in range(ROUNDS)])
            ratios = times[:, 0] / times[:, 1]
            print(
                f"{name} transform: decoded {np.median(times[:, 0]):.1f} ms, packed "
                f"{np.median(times[:, 1]):.2f} ms, {np.median(ratios):.0f} times as fast "
                f"({ratios.min():.0f} to {ratios.max():.0f})"
            )


if __name__ == "__main__":
    negatives(*sys.argv[1:]) if sys.argv[1:] else main()
