"""What the tests share: no network, one thread, phantoms drawn once, and one tiny run."""

import itertools
import json
import multiprocessing
import signal
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train

TINY = (
    "--data phantom=16 --limit 32 --preset small --image-size 16 --patch-size 4 --window-size 2 "
    "--swin-dim 16 --swin-depths 1 1 --swin-heads 1 2 --embed-dim 16 --max-length 48 --prompt-length 4 "
    "--batch-size 8 --epochs 1 --lr 1e-3 --log-every 1 --workers 0 --device cpu --precision fp32"
).split()

# Processes copied from one that has imported torch and the rest, which takes seconds, and has done nothing
# yet: copies of the process that runs the tests could not use autograd where there is a GPU.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "train"])


def log(folder):
    """The lines of a run's log about steps, and those about epochs."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def state(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)


def refusal(capsys):
    """The one line on stderr beside the progress bar, behind the name of the script."""
    lines = [line.partition(": ") for line in capsys.readouterr().err.splitlines()]
    (said,) = [sentence for script, _, sentence in lines if script in ("train.py", "evaluate.py")]
    return said


@pytest.fixture(scope="session", autouse=True)
def frugal():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    torch.set_num_threads(1)  # for tensors this small threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setitem(data.DATASETS, "phantom", lru_cache(data.phantom))
        yield


@pytest.fixture(autouse=True)
def notes_anew():
    """A note that an earlier test has caused is said again."""
    data.note.cache_clear()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder of a finished run; nobody writes into it."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert train.main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def run(tiny_run):
    """The same, loaded; nobody changes its weights."""
    return evaluate.load_run(tiny_run)


@pytest.fixture
def pretrain(tmp_path):
    """The same with further flags, into tmp_path/run -> exit status."""
    return lambda *flags: train.main([*TINY, "--out", str(tmp_path / "run"), *map(str, flags)])


@pytest.fixture
def options():
    """Flags on top of the tiny ones -> the Namespace that train wants."""
    return lambda *flags: train.parse_args([*TINY, *map(str, flags)])


@pytest.fixture
def before_step(monkeypatch):
    """Has a function called before each training step to come: with its number, from 1, run and batch."""

    def prepare(act):
        numbers, training_step = itertools.count(1), train.training_step

        def step(run, batch, *rest):
            act(next(numbers), run, batch)
            return training_step(run, batch, *rest)

        monkeypatch.setattr(train, "training_step", step)

    return prepare


@pytest.fixture
def cases(tmp_path):
    """A table of 24 images to train on, most with a caption, and 6 to validate and to test -> its flags."""
    root, rows = tmp_path / "cases", ["image,split,report,Head,Thorax,Abdomen"]
    root.mkdir()
    for split, count in (("train", 24), ("valid", 6), ("test", 6)):
        for i in range(count):
            category = ("Head", "Thorax", "Abdomen")[i % 3]
            caption = f"Image {i} of the {category}; {'large' if i % 2 else 'small'}." if i % 6 else ""
            labels = ",".join(str(int(i % 3 == n)) for n in range(3))
            rows.append(f"{split}{i}.png,{split},{caption},{labels}")
            grey = np.random.default_rng([count, i]).integers(80 * (i % 3), 256, (16, 16), np.uint8)
            Image.fromarray(grey).save(root / f"{split}{i}.png")
    (root / "table.csv").write_text("\n".join(rows))
    return ["--data", f"csv={root}"]
