"""A run that was stopped, or broke, ends where the unbroken one does, and its files survive."""

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import FORKS, TINY, log, refusal, state

import data
import evaluate
import train
from data import BadInput


@pytest.fixture
def flags(cases):
    """Two epochs of three steps in bf16 with stochastic depth."""
    return [*TINY, *cases, "--epochs", "2", "--drop-path", "0.2", "--precision", "bf16"]


@pytest.fixture
def run(flags, tmp_path):
    """A run in tmp_path/NAME with these flags and more -> exit status."""
    return lambda name, *more: train.main([*flags, *map(str, more), "--out", str(tmp_path / name)])


def resume(folder):
    return train.main(["--resume", str(folder)])


@pytest.fixture
def signal_at(before_step):
    """This process gets a signal within a step."""

    def prepare(step, number):
        before_step(lambda n, *_: signal.raise_signal(number) if n == step else None)

    return prepare


def content(folder):
    """All that a finished run leaves, but for times."""
    steps, epochs = log(folder)
    for line in steps:
        del line["seconds"]
    last, best = state(folder), state(folder, "best.pt")
    moments = [last["optimizer"]["state"][i][name] for i in range(5) for name in ("exp_avg", "exp_avg_sq")]
    return (steps, epochs, best["progress"]), [*last["model"].values(), *best["model"].values(), *moments]


def same(one, other):
    (lines, tensors), (others, other_tensors) = content(one), content(other)
    assert lines == others
    return all(map(torch.equal, tensors, other_tensors)) and len(tensors) == len(other_tensors)


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 2), (3, 0), (3, 2), (5, 2)])
def test_resumed_run_ends_where_the_unbroken_one_does_whatever_its_workers_and_saves(
    run, signal_at, tmp_path, step, workers
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("whole") == 0
    signal_at(step, signal.SIGTERM)
    assert run("broken", "--workers", workers, "--save-every", 2) == 143
    assert state(broken)["progress"]["step"] == step
    with open(broken / "log.jsonl", "a") as lines:  # what a kill could leave after the last save
        lines.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    saved = state(broken)
    saved["progress"]["skipped"] = 0  # as older programs wrote it
    torch.save(saved, broken / "last.pt")
    assert resume(broken) == 0 and same(whole, broken)


def test_a_finished_run_that_is_resumed_says_so_and_stays_as_it_is(run, tmp_path, monkeypatch, capsys):
    run("run")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    monkeypatch.setattr(evaluate, "quick_scores", lambda *_: pytest.fail("it is validated again"))
    assert resume(tmp_path / "run") == 0 and "is finished" in capsys.readouterr().out
    assert same(tmp_path / "run", tmp_path / "before")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--lr 0.5", "--lr"),
        ("--epochs 9 --no-label-mask", "--objective, --epochs"),
        ("--template caption-of-{}", "--template"),
        ("--precision bf16", "--precision"),
    ],
)
def test_options_that_would_alter_the_result_are_refused_by_name(tiny_run, capsys, given, named):
    assert train.main(["--resume", str(tiny_run), *given.split()]) == 2 and named in refusal(capsys)


def test_options_that_leave_the_result_are_accepted(tiny_run):
    given = "--lr 1e-3 --workers 1 --log-every 3 --device cpu --preset small".split()
    args = train.parse_args(["--resume", str(tiny_run), *given])
    assert (args.lr, args.preset, args.out, args.embed_dim) == (1e-3, "small", str(tiny_run), 16)


@pytest.mark.parametrize("copied", [True, False])
def test_a_run_goes_on_with_data_that_have_moved_if_they_are_the_same(
    run, signal_at, tmp_path, capsys, copied
):
    assert run("whole") == 0
    signal_at(2, signal.SIGTERM)
    assert run("broken") == 143
    shutil.move(tmp_path / "cases", tmp_path / "moved")
    if not copied:
        (tmp_path / "moved" / "valid0.png").write_bytes(b"0")
    resumed = train.main(["--resume", str(tmp_path / "broken"), "--data", f"csv={tmp_path / 'moved'}"])
    if copied:
        assert resumed == 0 and same(tmp_path / "whole", tmp_path / "broken")
        assert state(tmp_path / "broken")["args"]["data"] == [f"csv={tmp_path / 'moved'}"]
    else:
        assert resumed == 2 and "data have changed" in refusal(capsys)


@pytest.mark.parametrize("change", ["a row less", "rows reversed", "labels", "a report", "an image"])
def test_other_data_are_refused(run, tmp_path, capsys, change):
    run("run")
    table = tmp_path / "cases" / "table.csv"
    text, (head, *rows) = table.read_text(), table.read_text().splitlines()
    if change == "an image":
        image = tmp_path / "cases" / "train0.png"
        image.write_bytes(image.read_bytes() + b"0")
    changed = {"a row less": "\n".join([head, *rows[1:]]), "rows reversed": "\n".join([head, *rows[::-1]])}
    changed |= {"labels": text.replace(",Head,", ",Other,"), "a report": text.replace("Image 5", "Image 55")}
    table.write_text(changed.get(change, text))
    assert resume(tmp_path / "run") == 2 and "data have changed" in refusal(capsys)


def test_a_run_that_another_program_began_says_so_and_goes_on(run, signal_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "commit", lambda: "one")
    signal_at(1, signal.SIGTERM)
    assert run("run") == 143 and "has changed" not in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "commit", lambda: "two")
    assert resume(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "commit two" in printed and "the program has changed since commit one" in printed


# -------------------------------------------------------------------------------------------- what breaks it


def quietly(*arguments):
    """What a process of its own does."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(train.main(list(arguments)))


def started(*arguments):
    process = FORKS.Process(target=quietly, args=arguments)
    process.start()
    return process


def saved_step(folder):
    return evaluate.read_checkpoint(folder / "last.pt")["progress"]["step"]


def hold(args, held):
    """Has the folder of a run until it is killed."""
    with train.locked_log(args):
        held.set()
        time.sleep(100)


@pytest.fixture
def holder(flags, tmp_path):
    """Another process that has tmp_path/run."""
    held = FORKS.Event()
    args = train.parse_args([*flags, "--out", str(tmp_path / "run")])
    process = FORKS.Process(target=hold, args=(args, held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_of_two_programs_that_want_one_folder_the_second_is_refused_until_the_first_has_ended(
    run, holder, tmp_path, capsys
):
    folder = tmp_path / "run"
    assert run("run") == 2 and f"another train.py is writing into {folder}" in refusal(capsys)
    assert run("other") == 0  # another folder is free
    shutil.copy(tmp_path / "other" / "last.pt", folder)
    before = state(folder)
    assert resume(folder) == 2 and "another train.py" in refusal(capsys)
    assert {path.name for path in folder.iterdir()} == {"last.pt", "log.jsonl"}
    assert state(folder)["progress"] == before["progress"] and not (folder / "log.jsonl").read_text()
    holder.kill()
    holder.join()
    assert resume(folder) == 0


def test_a_lock_is_not_handed_on_to_loading_processes(run, before_step, tmp_path):
    locks = []

    def look(*_):
        children = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.daemon)]
        held = {int(line.split()[4]) for line in open("/proc/locks") if " POSIX " in line}
        locks.append([pid in held for pid in children])

    before_step(look)
    assert run("run", "--epochs", 1, "--workers", 1) == 0 and locks == [[True, False]] * 3


def test_what_has_no_checkpoint_is_no_run(run, tmp_path):
    """What a kill before the first save leaves."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.jsonl", "last.pt.tmp", "config.json"):
        (folder / name).touch()
    assert run("run", "--epochs", 1) == 0 and len(log(folder)[0]) == 3


@pytest.mark.parametrize("fault", ["--findings Gout", "--image-size 18"])
def test_what_ends_before_it_is_a_run_leaves_no_folder(run, tmp_path, fault):
    assert run("run", *fault.split()) == 2 and not (tmp_path / "run").exists()


def test_a_run_that_breaks_twice_before_its_next_save_has_each_step_once_in_its_log(
    run, before_step, tmp_path
):
    def broken(n, *_):
        if n in (5, 6, 8):  # the fifth step, after the save at the third; then the fourth and the fifth again
            raise BadInput("broken")

    folder = tmp_path / "run"
    assert run("whole") == 0
    before_step(broken)
    assert run("run") == resume(folder) == resume(folder) == 2
    assert resume(folder) == 0 and same(folder, tmp_path / "whole")


def test_a_run_survives_being_killed_twenty_times(flags, tmp_path):
    flags += ["--epochs", "20", "--save-every", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    folder, chance = tmp_path / "run", random.Random(0)
    process = started(*flags, "--out", str(folder))
    while not (folder / "last.pt").exists():
        time.sleep(0.01)
    for i in range(20):
        before = saved_step(folder)
        while i % 2 and process.is_alive() and saved_step(folder) == before:
            time.sleep(0.01)  # every other one gets on before it dies, however busy the machine is
        process.join(chance.uniform(0, 0.1))
        assert process.is_alive()  # else there is nothing left to kill
        process.kill()
        process.join()
        process = started("--resume", str(folder))
    process.kill()
    process.join()
    assert resume(folder) == 0 and same(tmp_path / "whole", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_answered_with_one_sentence_and_a_state_to_go_on_from(
    run, signal_at, tmp_path, capsys, number
):
    signal_at(2, number)
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup makes its programs ignore SIGHUP
    assert run("run") == 128 + number and signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, inherited)
    printed, name = capsys.readouterr(), train.STOP_SIGNALS[number]
    assert printed.out.splitlines()[-1].startswith(f"stopped by {name} after 2 of 6 steps; --resume")
    assert "Traceback" not in printed.err
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


def test_what_nohup_ignores_stops_no_run(run, signal_at, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_at(2, signal.SIGHUP)
    assert run("run", "--epochs", 1) == 0
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert [line["step"] for line in log(tmp_path / "run")[0]] == [1, 2, 3]


def test_a_second_ctrl_c_does_not_wait_for_the_step(run, before_step, tmp_path):
    before_step(lambda *_: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT))
    assert run("run") == 130
    assert state(tmp_path / "run")["progress"]["step"] == 0


@pytest.mark.parametrize("script", ["data.py", "evaluate.py", "train.py"])
def test_ctrl_c_while_a_program_imports_is_answered_without_a_traceback(script):
    root = Path(train.__file__).parent
    command = [sys.executable, "-X", "importtime", root / script, "--help"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams) as process:
        for line in process.stderr:
            if "argparse" in line:  # all that takes long comes after it
                process.send_signal(signal.SIGINT)
                break
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130


def interrupted_twice():
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            time.sleep(100)

    data.run_program("train.py", work, "")


def test_a_second_ctrl_c_ends_a_program_that_is_ending_at_once():
    process = FORKS.Process(target=interrupted_twice)
    process.start()
    process.join(60)
    assert process.exitcode == 130


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_program_leaves_the_answer_to_ctrl_c_as_it_was_and_ignores_what_was_ignored(handler):
    before = signal.signal(signal.SIGINT, handler)
    status = data.run_program("train.py", lambda: signal.raise_signal(signal.SIGINT), "")
    assert signal.signal(signal.SIGINT, before) == handler
    assert status == (0 if handler == signal.SIG_IGN else 130)


def test_what_a_terminal_cannot_show_is_shown_in_another_way(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert data.run_program("train.py", lambda: print("0.9 ± 0.1 of \udcff"), "") == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"0.9 \\xb1 0.1 of \\udcff\n"


@pytest.mark.parametrize("flag", ["--template={}\udcff", "--findings=\udcff"])
def test_texts_that_are_not_utf8_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([flag])
    assert flag.partition("=")[0] in capsys.readouterr().err


@pytest.fixture
def file_size():
    """Sets the size in bytes that no file of this process may exceed, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size=limits[1]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_ends_with_one_sentence_and_the_checkpoint_before(
    run, before_step, file_size, tmp_path, capsys
):
    before_step(lambda n, *_: file_size(100_000) if n == 5 else None)
    folder = tmp_path / "run"
    assert run("run") == 2
    sentence = refusal(capsys)
    assert str(folder / "last.pt") in sentence and "disk" in sentence
    assert {path.name for path in folder.iterdir()} == set(
        "best.pt config.json last.pt log.jsonl patients.txt".split()
    )
    file_size()
    assert resume(folder) == run("whole") == 0 and same(folder, tmp_path / "whole")


def pipe(path):
    path.parent.mkdir(exist_ok=True, parents=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "place",
    [
        "--out",
        "log.jsonl",
        "config.json",
        "last.pt",
        "--image-weights",
        "--checkpoint",
        "--prompts",
        "results",
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(run, tiny_run, tmp_path, capsys, place):
    path, folder = tmp_path / "pipe.json", tmp_path / "run"
    if place in ("--checkpoint", "--prompts", "results"):
        pipe(path)
        flags = {"--checkpoint": path} if place == "--checkpoint" else {"--checkpoint": tiny_run}
        flags |= {"results": {"--out": path}, "--prompts": {"--prompts": path}}.get(place, {})
        words = [str(word) for pair in flags.items() for word in pair]
        assert evaluate.main([*words, "--task", "zero-shot", "--limit", "20"]) == 2
    elif place == "--image-weights":
        assert run("run", place, pipe(path)) == 2
    else:
        pipe(folder if place == "--out" else folder / place)
        assert (resume(folder) if place == "last.pt" else run("run")) == 2
    assert ("cannot be written" if place == "--out" else "a pipe or a device") in refusal(capsys)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is the disk full?"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "is the disk full?"),
        (RuntimeError("PytorchStreamWriter failed"), "is the disk full?"),
        (PermissionError(errno.EACCES, "Permission denied"), "may its folder be written"),
        (OSError(errno.EROFS, "Read-only file system"), "may its folder be written"),
        ("its temporary file goes", "may its folder be written"),
        ("a folder has its name", "is a folder, a pipe or a device"),
        ("a folder has its temporary name", "may its folder be written"),
    ],
)
def test_what_cannot_be_written_says_why_and_leaves_nothing_behind(tmp_path, fault, said):
    path, temporary = tmp_path / "file", tmp_path / "file.tmp"
    if fault == "a folder has its name":
        path.mkdir()
    elif fault == "a folder has its temporary name":
        temporary.mkdir()
    with pytest.raises(data.BadInput) as refused, data.replacing(path) as file:
        file.write("half")
        if fault == "its temporary file goes":
            temporary.unlink()
        elif isinstance(fault, Exception):
            raise fault
    assert said in str(refused.value) and str(path) in str(refused.value)
    assert not path.is_file() and not temporary.is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(run, before_step, tmp_path, capsys):
    before_step(lambda *_: pytest.fail("a step was taken"))
    (tmp_path / "file").touch()
    assert run("file/run") == 2 and str(tmp_path / "file") in refusal(capsys)


@pytest.mark.parametrize("kind", ["nothing", "no optimizer", "no step", "code"])
def test_what_no_run_can_go_on_from_is_refused_unrun(tiny_run, tmp_path, capsys, kind):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path, last = tmp_path / "last.pt", state(tiny_run, "best.pt" if kind == "no optimizer" else "last.pt")
    changed = {"no step": {"progress": {}}, "code": {"progress": Code()}}.get(kind, {})
    if kind != "nothing":
        torch.save(last | changed, path)
    assert resume(tmp_path) == 2 and str(path) in refusal(capsys)
    assert not (tmp_path / "ran").exists()


def changes(names, *values):
    return [pytest.param(part, name, value, id=f"{name}-{value}") for part, name in names for value in values]


OF_EVALUATION = changes(
    [("args", name) for name in "image_size swin_depths batch_size template data seed".split()],
    *("missing", None, "x", [None], 0.5, -3, {}, torch.zeros(2)),
)
OF_EVALUATION += changes([(None, "findings")], "missing", None, "Edema", 5, [1, 2], [["Edema"]], {"Edema": 1})
OF_EVALUATION += changes([(None, "args")], None, [], "x") + changes(
    [(None, "tokenizer")], None, "{}", "beyond"
)
OF_EVALUATION += changes([("args", "findings")], "Edema", 5, [1])
OF_RESUMING = changes(
    [(None, "optimizer")], "missing", None, {}, {"state": None}, {"state": {0: {"step": 1}}}
)
OF_RESUMING += changes([("args", "lr")], "missing", None, "0.001", -1.0)
OF_RESUMING += changes([("args", "objective")], "missing", None, "made up", 1)
OF_RESUMING += changes([("args", "continuous_prompt")], "missing", None, "yes", 5)
OF_RESUMING += changes([("progress", "step"), ("progress", "log_size")], "missing", None, "1", -9, 0.5, [])
OF_RESUMING += changes([("progress", "best"), ("progress", "records")], "missing", None, [])


def changed_checkpoint(folder, part, name, value):
    """last.pt of a run with one change: an option, a part of its progress, or something else."""
    last = state(folder)
    part = last if part is None else last[part]
    if isinstance(value, str) and value == "missing":
        del part[name]
    elif isinstance(value, str) and value == "beyond":  # the embeddings
        tokenizer = json.loads(part[name])
        tokenizer["model"]["vocab"]["a"] = 10**6
        part[name] = json.dumps(tokenizer)
    else:
        part[name] = value
    return last


@pytest.mark.parametrize(("part", "name", "value"), OF_EVALUATION + OF_RESUMING)
def test_no_run_goes_on_from_a_checkpoint_that_was_changed_by_hand(
    tiny_run, tmp_path, capsys, part, name, value
):
    torch.save(changed_checkpoint(tiny_run, part, name, value), tmp_path / "last.pt")
    assert resume(tmp_path) == 2 and f"{tmp_path}/last.pt is cut short or no checkpoint" in refusal(capsys)


@pytest.mark.parametrize(("part", "name", "value"), OF_EVALUATION)
def test_no_checkpoint_that_was_changed_by_hand_is_evaluated(tiny_run, tmp_path, part, name, value):
    torch.save(changed_checkpoint(tiny_run, part, name, value), tmp_path / "last.pt")
    with pytest.raises(BadInput, match="is cut short or no checkpoint"):
        evaluate.load_run(tmp_path / "last.pt")


@pytest.mark.parametrize("name", ["channels", "freeze_text", "held_out", "micro_batch_size", "findings"])
def test_a_run_of_an_older_program_that_lacked_an_option_goes_on_without_it(tiny_run, tmp_path, name):
    last = state(tiny_run)
    del last["args"][name]
    torch.save(last, tmp_path / "last.pt")
    assert resume(tmp_path) == 0
    assert evaluate.load_run(tmp_path / "last.pt").args.__dict__.keys() >= {"channels", "freeze_text"}


def test_a_worker_that_dies_ends_the_run_with_one_sentence(run, before_step, tmp_path, capsys):
    def kill_workers(*_):
        for child in multiprocessing.active_children():
            if child.daemon:
                os.kill(child.pid, signal.SIGKILL)

    before_step(kill_workers)
    assert run("run", "--epochs", 9, "--workers", 1) == 2 and "fewer --workers" in refusal(capsys)
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


def test_images_that_do_not_come_end_the_run_with_one_sentence(run, monkeypatch, capsys):
    monkeypatch.setattr(data, "PATIENCE", 1)
    monkeypatch.setattr(data.Images, "__getitem__", lambda *_: time.sleep(3))
    assert run("run", "--workers", 1) == 2 and "took more than 1 seconds" in refusal(capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_vanishes_ends_the_run_with_one_sentence(
    run, before_step, tmp_path, capsys, workers
):
    images = tmp_path / "cases"
    before_step(lambda *_: shutil.rmtree(images, ignore_errors=True))
    assert run("run", "--epochs", 9, "--workers", workers) == 2 and str(images) in refusal(capsys)
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


# ---------------------------------------------------------------------------------------------------- the log


def test_the_log_counts_the_pairs_removed_and_the_negatives_left():
    removed = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    one = torch.tensor(1.0)
    run = types.SimpleNamespace(model=types.SimpleNamespace(logit_scale=lambda: one))
    line = train.measures(
        run, one, one, {"report": (one, removed), "prompt": (one, torch.zeros(8, 8, dtype=torch.bool))}
    )
    assert (line["removed_report"], line["removed_prompt"]) == (3, 0)
    assert (line["mean_negatives_report"], line["mean_negatives_prompt"]) == (1, 7)
    assert (line["rows_without_negatives_report"], line["rows_without_negatives_prompt"]) == (1, 0)


def test_each_line_of_the_log_is_on_the_disk_at_once(run, before_step, tmp_path):
    seen = []
    before_step(lambda *_: seen.append(len(log(tmp_path / "run")[0])))
    assert run("run", "--epochs", 1) == 0 and seen == [0, 1, 2]
