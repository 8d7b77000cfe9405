"""A run that was stopped, or broke, ends where the unbroken one does, and its files survive."""

import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import types

import pytest
import torch
from conftest import FORKS, TINY

import data
import evaluate
import train

CLOCK = ("seconds", "images_per_second")


@pytest.fixture
def flags(cases):
    """Two epochs of three steps with stochastic depth and dropout."""
    return [*TINY, *cases, "--epochs", "2", "--drop-path", "0.2"]


@pytest.fixture(autouse=True)
def dropout(monkeypatch):
    for module in (train, evaluate):
        monkeypatch.setattr(module, "BertConfig", with_dropout)


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


@pytest.mark.parametrize("change", ["a row less", "rows reversed", "labels", "a report", "an image"])
def test_other_data_are_refused(flags, tmp_path, capsys, change):
    train.main([*flags, "--out", str(tmp_path / "run")])
    table = tmp_path / "cases" / "splitted_dataset" / "descriptions_train.jsonl"
    rows = table.read_text().splitlines()
    if change == "an image":
        image = tmp_path / "cases" / "images" / "train0.png"
        image.write_bytes(image.read_bytes() + b"0")
    table.write_text(
        {
            "a row less": "\n".join(rows[:-1]),
            "rows reversed": "\n".join(rows[::-1]),
            "labels": table.read_text().replace('"Head"', '"Other"'),
            "a report": table.read_text().replace("Image 5", "Image 55"),
            "an image": table.read_text(),
        }[change]
    )
    assert train.main(["--resume", str(tmp_path / "run")]) == 2 and "data have changed" in refusal(capsys)


def test_a_folder_in_which_a_run_is_going_on_is_locked(flags, stop_at, tmp_path, capsys):
    run = tmp_path / "run"
    assert stop_at(2, signal.SIGTERM, *flags, "--out", run) == 143
    before = (run / "last.pt").read_bytes()
    with open(run / "log.jsonl", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert train.main(["--resume", str(run)]) == 2 and "another process" in refusal(capsys)
    assert (run / "last.pt").read_bytes() == before


def test_a_resumed_run_records_the_commits_of_both_programs(flags, stop_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "commit", lambda: "one")
    assert stop_at(1, signal.SIGTERM, *flags, "--out", tmp_path / "run") == 143
    monkeypatch.setattr(evaluate, "commit", lambda: "two")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert "one then two" in capsys.readouterr().out
    assert evaluate.load_run(tmp_path / "run").args.commit == "one then two"


def test_a_finished_run_that_is_resumed_says_so(flags, tmp_path, monkeypatch, capsys):
    train.main([*flags, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(evaluate, "quick_scores", lambda *_: pytest.fail("it is validated again"))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert "is finished" in capsys.readouterr().out


def test_lines_after_the_checkpoint_are_not_there_twice(flags, stop_at, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    assert stop_at(4, signal.SIGTERM, *flags, "--out", run) == 143
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert train.main(["--resume", str(run)]) == 0 and same(run, whole)


# -------------------------------------------------------------------------------------------- what breaks it


def quietly(*arguments):
    """What a process of its own does."""
    torch.set_num_threads(1)
    train.BertConfig = evaluate.BertConfig = with_dropout
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(train.main(list(arguments)))


def saved_step(run):
    return evaluate.read_checkpoint(run / "last.pt")["progress"]["step"]


def test_a_run_survives_being_killed_fifty_times(flags, tmp_path):
    flags += ["--epochs", "20", "--save-every", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    run, chance, killed, reached = tmp_path / "run", random.Random(0), 0, set()
    process = FORKS.Process(target=int)  # the first one waits for what all are copied from
    process.start()
    process.join()
    since = time.time()
    process = FORKS.Process(target=quietly, args=[*flags, "--out", str(run)])
    process.start()
    while not (run / "last.pt").exists():
        time.sleep(0.01)
    start = time.time() - since  # seconds until there is something to lose; more on a busy machine
    while killed < 50:
        before = saved_step(run)
        while killed % 5 == 0 and process.is_alive() and saved_step(run) == before:
            time.sleep(0.01)  # one in five gets on before it dies, however busy the machine is
        process.join(chance.uniform(0, start))
        killed += process.is_alive()
        process.kill()
        process.join()
        reached.add(saved_step(run))
        assert max(reached) < 60  # the end, where there is nothing left to kill
        process = FORKS.Process(target=quietly, args=["--resume", str(run)])
        process.start()
    process.kill()
    process.join()
    assert len(reached) > 5  # else most died before they had done anything
    assert train.main(["--resume", str(run)]) == 0 and same(tmp_path / "whole", run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_answered_with_one_sentence_and_a_state_to_go_on_from(
    flags, stop_at, tmp_path, capsys, number
):
    assert stop_at(2, number, *flags, "--out", tmp_path / "run") == 128 + number
    printed, name = capsys.readouterr(), train.STOP_SIGNALS[number]
    assert printed.out.splitlines()[-1].startswith(f"stopped by {name} after 2 of 6 steps")
    assert "Traceback" not in printed.err
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


def test_a_second_ctrl_c_does_not_wait_for_the_step(flags, stop_at, tmp_path, monkeypatch, capsys):
    training_step = train.training_step

    def stubborn(*inputs):
        signal.raise_signal(signal.SIGINT)
        return training_step(*inputs)

    monkeypatch.setattr(train, "training_step", stubborn)
    assert stop_at(1, signal.SIGINT, *flags, "--out", tmp_path / "run") == 130
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["step"] == 0


@pytest.fixture
def small_disk(monkeypatch):
    """From a step on, no file of this process may grow beyond 100 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    training_step = train.training_step

    def fill(step):
        count = []

        def filling(*inputs):
            count.append(1)
            if len(count) == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            return training_step(*inputs)

        monkeypatch.setattr(train, "training_step", filling)

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_ends_with_one_sentence_and_the_checkpoint_before(
    flags, small_disk, tmp_path, monkeypatch, capsys
):
    small_disk(5)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train.main([*flags, "--out", str(run)]) == 2
    sentence = refusal(capsys)
    assert str(run / "last.pt") in sentence and "disk" in sentence
    assert sorted(path.name for path in run.iterdir()) == ["best.pt", "config.json", "last.pt", "log.jsonl"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    monkeypatch.undo()
    for module in (train, evaluate):
        monkeypatch.setattr(module, "BertConfig", with_dropout)
    assert train.main(["--resume", str(run)]) == 0
    assert train.main([*flags, "--out", str(whole)]) == 0 and same(run, whole)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "training_step", lambda *_: pytest.fail("a step was taken"))
    (tmp_path / "file").touch()
    assert train.main([*flags, "--out", str(tmp_path / "file" / "run")]) == 2
    assert str(tmp_path / "file") in refusal(capsys)


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_old_one(flags, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(place):
        done.append(os.readlink(f"/proc/self/fd/{place}"))
        fsync(place)

    def replaced(old, new):
        done.append((str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "run")])
    run = tmp_path / "run"
    last = [f"{run / 'last.pt'}.tmp", (f"{run / 'last.pt'}.tmp", str(run / "last.pt")), str(run)]
    assert done[:4] == [str(run / "log.jsonl"), *last]  # the start's, and then that of the epoch
    assert done[4:8] == [str(run / "log.jsonl"), *last]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_checkpoint_with_code_in_it_is_refused_unrun(tiny_run, tmp_path, capsys, name):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    state = torch.load(tiny_run / name, weights_only=True)
    torch.save(state | {"progress": Code()}, tmp_path / "last.pt")
    assert train.main(["--resume", str(tmp_path)]) == 2 and "last.pt" in refusal(capsys)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_holds_no_optimizer_is_not_resumed(tiny_run, tmp_path, capsys):
    shutil.copy(tiny_run / "best.pt", tmp_path / "last.pt")
    assert train.main(["--resume", str(tmp_path)]) == 2 and "last.pt" in refusal(capsys)


def test_a_worker_that_dies_ends_the_run_with_one_sentence(flags, tmp_path, monkeypatch, capsys):
    training_step = train.training_step

    def murderous(*inputs):
        for child in multiprocessing.active_children():
            if child.daemon:  # the workers
                os.kill(child.pid, signal.SIGKILL)
        return training_step(*inputs)

    monkeypatch.setattr(train, "training_step", murderous)
    assert train.main([*flags, "--epochs", "9", "--out", str(tmp_path / "run"), "--workers", "1"]) == 2
    assert "DataLoader worker" in refusal(capsys)
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


def test_images_that_do_not_come_end_the_run_with_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PATIENCE", 1)
    monkeypatch.setattr(data, "read_image", lambda _: time.sleep(3))
    assert train.main([*flags, "--out", str(tmp_path / "run"), "--workers", "1"]) == 2
    assert "timed out" in refusal(capsys)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_data_folder_that_vanishes_ends_the_run_with_one_sentence(
    flags, tmp_path, monkeypatch, capsys, workers
):
    training_step = train.training_step

    def vanishing(*inputs):
        shutil.rmtree(tmp_path / "cases" / "images", ignore_errors=True)
        return training_step(*inputs)

    monkeypatch.setattr(train, "training_step", vanishing)
    run = tmp_path / "run"
    assert train.main([*flags, "--epochs", "9", "--out", str(run), "--workers", workers]) == 2
    assert str(tmp_path / "cases" / "images") in refusal(capsys)
    assert evaluate.load_run(run / "last.pt").findings


# ---------------------------------------------------------------------------------------------------- the log


def test_the_log_counts_the_negatives_that_are_left(flags, tmp_path, monkeypatch):
    parts, training_step = [], train.training_step

    def spy(*inputs):
        result = training_step(*inputs)
        parts.append(result[-1])
        return result

    monkeypatch.setattr(train, "training_step", spy)
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in content(tmp_path / "run")[0] if "loss" in line]
    for line, found in zip(lines, parts, strict=True):
        for name, (_, removed, n) in found.items():
            left = [sum(not removed[i, j] for j in range(n) if j != i) for i in range(n)]
            assert line[f"mean_negatives_{name}"] == pytest.approx(sum(left) / n)
            assert line[f"rows_without_negatives_{name}"] == left.count(0)
            assert line[f"removed_{name}"] == n * (n - 1) - sum(left)


def test_a_row_without_negatives_is_counted(options):
    run = types.SimpleNamespace(model=types.SimpleNamespace(logit_scale=lambda: torch.tensor(1.0)))
    removed = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    line = train.measures(
        run, torch.tensor(1.0), torch.tensor(1.0), {"report": (torch.tensor(1.0), removed, 3)}
    )
    assert line["rows_without_negatives_report"] == 1
    assert (line["removed_report"], line["mean_negatives_report"]) == (3, 1)


def test_without_a_mask_every_other_row_is_a_negative(flags, tmp_path):
    assert train.main([*flags, "--no-label-mask", "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in content(tmp_path / "run")[0] if "loss" in line]
    assert {line["mean_negatives_prompt"] for line in lines} == {7}


def test_each_line_of_the_log_is_on_the_disk_at_once(flags, tmp_path, monkeypatch):
    seen, training_step = [], train.training_step

    def counting(*inputs):
        log = tmp_path / "run" / "log.jsonl"
        seen.append(len(log.read_text().splitlines()))
        return training_step(*inputs)

    monkeypatch.setattr(train, "training_step", counting)
    assert train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert seen == [0, 1, 2]
