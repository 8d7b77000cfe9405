"""Trains and evaluates the runs behind REPRODUCE.md's evidence; docs/results.csv gets every figure of each.

    python tests/run_evidence.py phantoms --jobs 2
    python tests/run_evidence.py roco --data csv=packs/roco/table.csv --jobs 2
    python tests/run_evidence.py noise --rows "default 20" "clip 20" --seeds 3
    python tests/run_evidence.py report                   docs/results.csv, docs/ablations.png and the tables

What is in the table for this commit is not run again, and a run that was stopped goes on. `report` adds what
was run here to docs/results.csv, and prints and draws what stands there.
"""

import argparse
import csv
import fcntl
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "runs" / "evidence" / "results.csv"
KEPT = ROOT / "docs" / "results.csv"
COLUMNS = "experiment row seed commit precision torch task metric value low high chance n".split()

OBJECTIVES = {name: f"--objective {name}" for name in ("repeated", "unicl", "multi-positive", "soft")}
MASKS = ("reports", "prompts", "identical")
PARTS = {
    "default": "",
    "no vectors": "--no-continuous-prompt",
    "clip": "--no-label-mask",
    "no reports": "--no-image-text",
    "no label prompts": "--no-image-label",
}
MODALITIES = ["Angiography", "Computed Tomography", "Magnetic Resonance", "Radiograph", "Ultrasound"]


class Experiment(NamedTuple):
    """Runs on the same data with the same schedule, which differ in a row's flags and in the seed."""

    seeds: int
    train: str  # flags of every run
    rows: dict  # name: flags
    tasks: str = "zero-shot retrieval prompt-sensitivity"
    classes: tuple = ()  # of zero-shot, where not all findings


EXPERIMENTS = {
    "phantoms": Experiment(
        6,
        "",
        PARTS
        | OBJECTIVES
        | {f"mask {name}": f"--label-mask {name}" for name in ("reports", "prompts", "identical")},
    ),
    "batch 128": Experiment(
        3, "--batch-size 128 --lr 2e-3", {"default": "", "repeated": "--objective repeated"}
    ),
    "noise": Experiment(
        6,
        "",
        {
            f"{row} {share}": f"{flags} --label-noise {share}"
            for share in (20, 40)
            for row, flags in {"default": "", "soft": "--objective soft", "clip": "--no-label-mask"}.items()
        },
    ),
    "roco": Experiment(5, "--preset small --epochs 12", PARTS | OBJECTIVES, classes=MODALITIES),
    "mix": Experiment(5, "--preset small --epochs 12", PARTS | OBJECTIVES, classes=MODALITIES),
    "frozen": Experiment(
        3,
        "--preset small --epochs 8 --freeze-text",
        {f"{length} vectors": f"--prompt-length {length}" for length in (0, 4, 16, 32, 64)},
        classes=MODALITIES,
    ),
}


def run(*command):
    """One of the project's programs; its output goes to ours where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def lines_of(file):
    """Lines of a table of results -> list of dict, empty where there is none."""
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def known(commit):
    """(experiment, row, seed) of the runs of this commit that the table has."""
    lines = [line for line in lines_of(TABLE) if line["commit"] == commit]
    return {(line["experiment"], line["row"], line["seed"]) for line in lines}


def measure(experiment, row, seed, data, text_model):
    """Trains, evaluates and adds the figures of one run to the table."""
    about = EXPERIMENTS[experiment]
    out = ROOT / "runs" / "evidence" / f"{experiment} {row} {seed}".replace(" ", "-")
    flags = [*about.train.split(), *about.rows[row].split(), "--workers", "0", "--seed", str(seed)]
    flags += ["--data", *data] if data else []
    flags += ["--text-model", text_model] if text_model else []
    resumed = (out / "last.pt").exists()
    run("train.py", *(["--resume", str(out)] if resumed else [*flags, "--out", str(out)]))
    classes = ["--classes", *about.classes] if about.classes else []
    run("evaluate.py", "--checkpoint", str(out), "--task", *about.tasks.split(), "--all-metrics", *classes)
    entries = json.loads((out / "results.json").read_text()).values()
    options = json.loads((out / "config.json").read_text())
    lines = []
    for entry in entries:
        start = [
            experiment,
            row,
            seed,
            options["commit"],
            options["precision"],
            options["torch"],
            entry["task"],
        ]
        for metric, found in entry["metrics"].items():
            numbers = [found.get(name) for name in ("value", "low", "high", "chance")]
            rounded = ["" if number is None else f"{number:.5g}" for number in numbers]
            lines.append([*start, metric, *rounded, found["n"]])
    with TABLE.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerows(lines)
    print(f"{experiment}, {row}, seed {seed}", flush=True)


# Named before the runs: claim, the row that it is about, the row that it is compared with, task, metric.
CLAIMS = [
    ("the mask beats CLIP's loss, by class", "default", "clip", "zero-shot", "balanced accuracy"),
    ("the mask beats CLIP's loss, by instance", "default", "clip", "retrieval", "i2t_R@10"),
    ("each text once beats repeated texts", "default", "repeated", "zero-shot", "AUROC mean"),
    ("removing keeps more of the instance than soft targets", "default", "soft", "retrieval", "i2t_R@10"),
    ("the vectors make wording matter less", "default", "no vectors", "prompt-sensitivity", "drop"),
    ("reports teach retrieval", "default", "no reports", "retrieval", "i2t_R@10"),
    ("label prompts teach zero-shot", "default", "no label prompts", "zero-shot", "balanced accuracy"),
]
MAIN = {
    "accuracy": ("zero-shot", "accuracy"),
    "balanced accuracy": ("zero-shot", "balanced accuracy"),
    "AUROC": ("zero-shot", "AUROC mean"),
    "P@1 i2t": ("retrieval", "i2t_P@1"),
    "R@10 i2t": ("retrieval", "i2t_R@10"),
    "drop": ("prompt-sensitivity", "drop"),
}


def report():
    """Adds new figures to docs/results.csv; prints its tables and the claims; draws docs/ablations.png."""
    lines = {
        tuple(line[c] for c in (*COLUMNS[:4], "task", "metric")): line
        for line in lines_of(KEPT) + lines_of(TABLE)
    }
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[key] for key in sorted(lines))
    values = {}  # {(experiment, row, task, metric): {seed: value}}
    for line in lines.values():
        key = line["experiment"], line["row"], line["task"], line["metric"]
        values.setdefault(key, {})[line["seed"]] = float(line["value"])

    def differences(experiment, row, other, *what):
        one, two = (values.get((experiment, each, *what), {}) for each in (row, other))
        return [one[seed] - two[seed] for seed in one if seed in two]

    panels = {}
    for experiment, about in EXPERIMENTS.items():
        rows = [row for row in about.rows if (experiment, row, *MAIN["AUROC"]) in values]
        if rows:
            print(f"\n| {experiment} (seeds) | " + " | ".join(MAIN) + " |\n|" + " --- |" * (len(MAIN) + 1))
        for row in rows:
            cells = [list(values.get((experiment, row, *what), {}).values()) for what in MAIN.values()]
            means = [evaluate.mean_over_seeds(each) if each else "–" for each in cells]
            print(f"| {row} ({max(map(len, cells))}) | " + " | ".join(means) + " |")
            for name, what in MAIN.items():
                each = differences(experiment, row, "default", *what)
                if row != "default" and len(each) > 1:
                    mean, half = float(np.mean(each)), evaluate.half_width(each)
                    interval = mean, mean - half, mean + half
                    panels.setdefault(row, {})[f"{name}, {experiment}"] = interval
    claims = {
        (c, e): each for e in EXPERIMENTS for c, *row in CLAIMS if len(each := differences(e, *row)) > 1
    }
    corrected = evaluate.holm({claim: evaluate.t_test(each) for claim, each in claims.items()})
    print("\n| claim | data (seeds) | difference | p, corrected |\n| --- | --- | --- | --- |")
    for (claim, experiment), each in claims.items():
        numbers = f"{evaluate.mean_over_seeds(each)} | {corrected[claim, experiment]:.3f}"
        print(f"| {claim} | {experiment} ({len(each)}) | {numbers} |")
    if panels:
        evaluate.forest_plot(list(panels.items()), ROOT / "docs" / "ablations.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=[*EXPERIMENTS, "report"])
    p.add_argument("--rows", nargs="+", help="default all")
    p.add_argument("--seeds", type=int, help="the first so many; default those that REPRODUCE.md names")
    p.add_argument("--data", nargs="+", help="as for train.py; phantoms where it is not given")
    p.add_argument("--text-model", help="as for train.py")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = p.parse_args()
    if args.experiment == "report":
        return report()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    done, about = known(git.stdout.strip()), EXPERIMENTS[args.experiment]
    wanted = [
        (args.experiment, row, seed)
        for seed in range(args.seeds or about.seeds)  # all rows of a seed before the next seed
        for row in args.rows or about.rows
        if (args.experiment, row, str(seed)) not in done
    ]
    with ThreadPoolExecutor(args.jobs) as jobs:
        list(jobs.map(lambda each: measure(*each, args.data, args.text_model), wanted))


if __name__ == "__main__":
    main()
