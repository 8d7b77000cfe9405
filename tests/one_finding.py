"""Draws chests with the labels of RSNA's data set, one finding that is present or absent; run by hand.

    python tests/one_finding.py FOLDER

Writes 2,800 images and table.csv for `--data csv=FOLDER/table.csv`: 7 : 4 : 3 are normal, have another
finding, or consolidation, which is called Pneumonia. There are no reports.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import PHANTOM_FINDINGS, draw_phantom

folder = Path(sys.argv[1])
folder.joinpath("images").mkdir(parents=True)
others = [name for name in PHANTOM_FINDINGS if name != "Consolidation"]
with open(folder / "table.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["image", "split", "Pneumonia"])
    for i in range(2800):
        rng = np.random.default_rng(i)
        kind = rng.choice(["normal", "other", "Consolidation"], p=[7 / 14, 4 / 14, 3 / 14])
        found = {"normal": [], "other": [rng.choice(others)]}.get(kind, [kind])
        Image.fromarray(draw_phantom(rng, found)[0]).save(folder / f"images/{i}.png")
        split = "train" if i < 1400 else "valid" if i < 1680 else "test"
        table.writerow([f"images/{i}.png", split, int(kind == "Consolidation")])
