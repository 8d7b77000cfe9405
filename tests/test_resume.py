"""A run that was stopped, or broke, ends where the unbroken one does, and its files survive."""

import json
import os
import random
import shutil
import signal
import sys

import pytest
import torch
from conftest import FORKS, TINY

import train

CLOCK = ("seconds", "images_per_second")


@pytest.fixture
def flags(cases):
    """Two epochs of three steps with stochastic depth and dropout."""
    return [*TINY, *cases, "--epochs", "2", "--drop-path", "0.2"]


@pytest.fixture(autouse=True)
def dropout(monkeypatch):
    monkeypatch.setattr(train, "BertConfig", with_dropout)


def with_dropout(**sizes):
    return BertConfig(**sizes | {"hidden_dropout_prob": 0.1})


BertConfig = train.BertConfig
with_dropout.from_dict = BertConfig.from_dict


@pytest.fixture
def stop_at(monkeypatch):
    """Sends a signal to this process within a step, and takes that back afterwards."""

    def run(step, number, *arguments):
        count, training_step = [], train.training_step

        def stopped(*inputs):
            count.append(1)
            if len(count) == step:
                signal.raise_signal(number)
            return training_step(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(train, "training_step", stopped)
            return train.main([str(argument) for argument in arguments])

    return run


def content(folder):
    """All that a finished run leaves, but for times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    moments = [last["optimizer"]["state"][i][name] for i in range(5) for name in ("exp_avg", "exp_avg_sq")]
    return lines, [*last["model"].values(), *best["model"].values(), *moments], best["progress"]


def same(one, other):
    (lines, tensors, progress), (others, other_tensors, other_progress) = content(one), content(other)
    assert lines == others and progress == other_progress
    return all(map(torch.equal, tensors, other_tensors)) and len(tensors) == len(other_tensors)


def refusal(capsys):
    """The one line on stderr, behind the name of the script and beside the progress bar."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_resumed_run_ends_where_the_unbroken_one_does(flags, stop_at, tmp_path, step, workers):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags += ["--workers", workers]
    assert stop_at(0, None, *flags, "--out", whole) == 0
    assert stop_at(step, signal.SIGTERM, *flags, "--out", broken) == 143
    assert torch.load(broken / "last.pt", weights_only=True)["progress"]["step"] == step
    assert train.main(["--resume", str(broken)]) == 0
    assert same(whole, broken)


def test_workers_do_not_change_a_run(flags, tmp_path):
    for workers in "02":
        train.main([*flags, "--out", str(tmp_path / workers), "--workers", workers])
    assert same(tmp_path / "0", tmp_path / "2")


def test_saving_within_an_epoch_does_not_change_a_run(flags, tmp_path):
    for every in "12":
        train.main([*flags, "--out", str(tmp_path / every), "--save-every", every])
    assert same(tmp_path / "1", tmp_path / "2")


def test_a_finished_run_that_is_resumed_stays_as_it_is(flags, tmp_path):
    train.main([*flags, "--out", str(tmp_path / "run")])
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert same(tmp_path / "run", tmp_path / "before")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--lr 0.5", "--lr"),
        ("--epochs 9 --no-label-mask", "--label-mask, --epochs"),
        ("--data phantom", "--data"),
        ("--precision bf16", "--precision"),
    ],
)
def test_options_that_would_alter_the_result_are_refused_by_name(tiny_run, capsys, given, named):
    assert train.main(["--resume", str(tiny_run), *given.split()]) == 2 and named in refusal(capsys)


@pytest.mark.parametrize(
    "given", ["--lr 1e-3", "--workers 1", "--log-every 3", "--device cpu", "--preset small"]
)
def test_options_that_leave_the_result_are_accepted(tiny_run, given):
    args = train.parse_args(["--resume", str(tiny_run), *given.split()])
    assert (args.lr, args.preset, args.out, args.embed_dim) == (1e-3, "small", str(tiny_run), 16)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, capsys):
    assert train.main(["--resume", str(tmp_path)]) == 2 and str(tmp_path) in refusal(capsys)


def test_other_data_are_refused(flags, cases, tmp_path, capsys):
    train.main([*flags, "--out", str(tmp_path / "run")])
    table = tmp_path / "cases" / "splitted_dataset" / "descriptions_train.jsonl"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    assert train.main(["--resume", str(tmp_path / "run")]) == 2 and "data have changed" in refusal(capsys)


def test_lines_after_the_checkpoint_are_not_there_twice(flags, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    shutil.copytree(whole, run)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train.main(["--resume", str(run)]) == 0 and same(run, whole)


# -------------------------------------------------------------------------------------------- what breaks it


def quietly(*arguments):
    """What a process of its own does."""
    torch.set_num_threads(1)
    train.BertConfig = with_dropout
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(train.main(list(arguments)))


def test_a_run_survives_being_killed_fifty_times(flags, tmp_path):
    flags += ["--epochs", "60", "--save-every", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    run, chance, killed, reached = tmp_path / "run", random.Random(0), 0, set()
    while killed < 50:
        begun = (run / "last.pt").exists()
        process = FORKS.Process(
            target=quietly, args=["--resume", str(run)] if begun else [*flags, "--out", str(run)]
        )
        process.start()
        process.join(chance.uniform(0.3, 1.0))
        killed += process.is_alive()
        process.kill()
        process.join()
        if (run / "last.pt").exists():
            reached.add(torch.load(run / "last.pt", weights_only=True)["progress"]["step"])
    print(len(reached), reached)
    assert train.main(["--resume", str(run)]) == 0
    assert same(tmp_path / "whole", run)
