"""Membership: how well a run tells the reports that it has seen from others of the same source, by hand.

    python train.py --limit 3000 --out runs/half && python tests/bench_privacy.py runs/half

Prints the AUROC of a pair's cosine, and of its loss among the pairs of its kind, with 95 % intervals over the
pairs; 0.5 tells nothing. As a control the others are halved at random and told apart as well.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate


def pairs(run, records):
    """Cosine of each image with its report, and its loss among these reports -> two (R,) float."""
    encoded = evaluate.encode(run, records)
    images, reports = encoded.image_features[encoded.report_rows], encoded.report_features
    scale = run.model.logit_scale().item()
    logits = scale * images @ reports.T
    cosine = (images * reports).sum(1)
    loss = np.logaddexp.reduce(logits, axis=1) - scale * cosine
    return cosine, loss


def told_apart(seen, others):
    """AUROC with its interval, of scores that should be higher for the seen -> str."""
    scores, labels = np.concatenate([seen, others]), np.arange(len(seen) + len(others)) < len(seen)
    low, high = evaluate.bootstrap_ci(evaluate.auroc, scores, labels)
    return f"{evaluate.auroc(scores, labels):.3f} ({low:.3f} to {high:.3f})"


def main(folder):
    run = evaluate.load_run(folder)
    options = {"views": run.args.views, "uncertain": run.args.uncertain}
    records = [r for r in data.load_records(run.args.data, "train", **options) if r.report]
    known = set(Path(folder, "patients.txt").read_text().split())
    seen = [record for record in records if data.patient_hashes([record]) <= known]
    others = [record for record in records if not data.patient_hashes([record]) <= known]
    count = min(len(seen), len(others), 5000)
    print(f"{count:,} seen pairs and {count:,} others of {folder}")
    half = np.random.default_rng(0).permutation(count) < count // 2
    scores = zip(pairs(run, seen[:count]), pairs(run, others[:count]), strict=True)
    for name, (of_seen, of_others) in zip(("cosine", "loss"), scores, strict=True):
        sign = 1 if name == "cosine" else -1  # what was seen has the lower loss
        control = told_apart(of_others[half], of_others[~half])
        print(f"{name:8}{told_apart(sign * of_seen, sign * of_others)}   control {control}")


if __name__ == "__main__":
    main(sys.argv[1])
