"""Micro-batches and several processes: the loss and every gradient of one whole batch.

Sums in another order differ by rounding. In float32 that is up to 2e-6 of the gradient where τ is 1, as here,
and τ multiplies it. So every case is computed in float64, too, where nothing but rounding could be as small.
"""

import os
import re
import signal
import socket
import sys
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import FORKS, TINY, log, refusal
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import train
import umcl

FINDINGS = ({"Edema"}, {"Effusion"}, {"Edema", "Effusion"}, {"No Finding"})
LABELS_ONLY, REPORTS_ONLY, BOTH = range(0, 8), range(8, 16), range(16, 24)

# name: (the records of each process, one after the other; --micro-batch-size); "identical" is the mask, too
CASES = {
    "even": ([[0, 8, 16, 17], [1, 9, 18, 19], [2, 10, 20, 21]], None),
    "uneven": ([[0, 8, 16, 17, 3], [1, 9, 18, 19], [2, 10, 20]], None),
    "micro-batches": ([[0, 8, 16, 17], [1, 9, 18, 19], [2, 10, 20, 21]], 2),
    "uneven micro-batches": ([[0, 8, 16, 17, 3, 4, 22], [1, 9], [2]], 2),
    "other prompts in each": ([[0, 4, 16], [1, 5, 17], [3, 7, 19]], None),
    "one without a prompt": ([[0, 1, 2, 16], [8, 9, 10], [11, 3]], None),
    "one without a report": ([[16, 17, 8], [0, 1, 2, 3], [9, 4]], None),
    "one with nothing": ([[0, 8, 16, 17], [], [1, 9]], None),
    "one with nothing, micro-batches": ([[0, 8, 16, 17], [], [1, 9]], 1),
    "only the last with anything": ([[], [], [0, 8, 16, 17, 18]], 3),
    "no report at all": ([[0, 1], [2, 3, 4], [5]], None),
    "no prompt at all": ([[8, 9], [10, 11], [12, 13]], None),
    "identical": ([[0, 8, 16, 17, 3], [1, 9, 18, 19], [2, 10, 20]], None),
    "neither reports nor prompts": ([[24], [25], [26]], None),
    "absent alone": ([[24, 0, 8, 16], [25, 17], [1, 26, 27]], None),
    "absent alone, micro-batches": ([[24, 0, 8, 16], [], [1, 26, 27]], 2),
}


def records():
    found = []
    for i in range(24):
        image = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        report = None if i in LABELS_ONLY else f"Report {i} of a heart and {i % 5} lungs."
        labels = {} if i in REPORTS_ONLY else dict.fromkeys(FINDINGS[i % 4], 1)
        found.append(data.Record(image, report, labels, str(i), "made"))
    for i in range(24, 28):  # without Edema, and with nothing else that is known
        found.append(data.Record(found[i - 24].image, None, {"Edema": 0}, str(i), "made"))
    return found


def build(dtype, *flags):
    """Run and batch maker of the tiny model; the batch of some rows is the same wherever it is made."""
    torch.manual_seed(0)
    run = train.new_run(train.parse_args([*TINY, *flags]), records())
    run.model.to(dtype).train()
    run.model.log_scale.data.zero_()
    batches = train.training_loader(run, records(), [0]).dataset

    def batch_of(rows):
        batches.rows = lambda step: (0, rows)
        return batches[0]

    return run, batch_of


def gradients(run, batch, model=None):
    """{name: gradient of the loss, "loss": loss}, and the loss's parts."""
    run.model.zero_grad()
    loss, parts = train.backward(run, batch, model or run.model, seed=5)
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    return {"loss": loss, **found}, parts


def distance(got, want):
    """The largest difference of a tensor, over its own size or, if that is larger, the whole gradient's.

    Some gradients are zero but for rounding: a softmax does not change with the bias of its keys.
    """
    assert got.keys() == want.keys()
    size = torch.stack([v.norm() for name, v in want.items() if name != "loss"]).norm().clamp(min=1e-30)
    return max(((got[name] - want[name]).norm() / max(want[name].norm(), size)).item() for name in want)


def join(rank, world, port):
    """What torchrun tells a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def compute(rank, world, port, path):
    """What one of `world` processes does: all cases in both precisions, into a file."""
    join(rank, world, port)
    train.join_processes(torch.device("cpu"))
    results = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        torch.Tensor.float = partialmethod(torch.Tensor.to, dtype)
        run, batch_of = build(dtype)
        model = DistributedDataParallel(run.model) if world > 1 else run.model
        for name, (shares, micro) in CASES.items():
            shares = [shares, [shares[0], shares[1] + shares[2]], [sum(shares, [])]][3 - world]
            run.args.micro_batch_size = micro if world > 1 else None
            run.args.label_mask = "identical" if name == "identical" else "both"
            found, parts = gradients(run, batch_of(shares[rank]), model)
            results[name, dtype] = found
            results[name, "removed"] = [int(mask.sum()) for _, mask in parts.values()]
    torch.save(results, f"{path}.{rank}")


def launch(target, world, *arguments):
    """Runs target(rank, world, port, *arguments) in as many processes -> their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=target, args=(rank, world, port, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)  # far longer than it takes, since a busy machine is slow
        process.kill()  # one that hangs
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{(number of processes, rank): what compute has found}"""
    path, found = tmp_path_factory.mktemp("gradients") / "of", {}
    for world in (1, 2, 3):
        assert launch(compute, world, path) == [0] * world
        found |= {(world, rank): torch.load(f"{path}.{rank}") for rank in range(world)}
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_loss_and_every_gradient_of_one(computed, case, world, dtype, tolerance):
    for rank in range(world):
        found, alone = computed[world, rank], computed[1, 0]
        assert distance(found[case, dtype], alone[case, dtype]) <= tolerance
        assert found[case, "removed"] == alone[case, "removed"]  # the mask goes over the rows of all


ROWS = [0, 8, 16, 17, 3, 22, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_give_the_loss_and_every_gradient_of_the_whole_batch(size):
    run, batch_of = build(torch.float32)
    whole, _ = gradients(run, batch_of(ROWS))
    run.args.micro_batch_size = size
    assert distance(gradients(run, batch_of(ROWS))[0], whole) <= 2e-6


def test_micro_batches_with_dropout_and_stochastic_depth_give_the_gradient_of_their_forward():
    """The slow twin keeps the graphs of all pieces, and so encodes each of them once."""
    run, batch_of = build(torch.float32, "--drop-path", "0.5", "--micro-batch-size", "2")
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = batch_of(ROWS)
    ours, _ = gradients(run, batch)
    for seed in (5, 6):
        run.model.zero_grad()
        torch.manual_seed(seed)
        encoded = [run.model([piece]) for piece in train.pieces_of(batch, run.args)]
        features = torch.cat([features for features, _ in encoded])
        parts = train.losses(run.args, batch, features, encoded[-1][1])
        loss = sum(part for part, _ in parts.values())
        loss.backward()
        slow = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        near = distance({"loss": loss.detach(), **slow}, ours) <= 2e-6
        assert near == (seed == 5)  # another seed drops something else


@pytest.mark.parametrize("size", [None, 2])
def test_a_whole_batch_is_encoded_once_and_no_more_than_a_micro_batch_at_a_time(monkeypatch, size):
    run, batch_of = build(torch.float32)
    run.args.micro_batch_size, batch, sizes = size, batch_of(ROWS), []
    for tower in (umcl.SwinTransformer, umcl.TextEncoder):
        forward = tower.forward

        def spy(self, rows, *rest, forward=forward):
            sizes.append(len(rows))
            return forward(self, rows, *rest)

        monkeypatch.setattr(tower, "forward", spy)
    gradients(run, batch)
    whole = [len(ROWS), *(len(ids) for ids, _ in batch.reports), len(batch.prompts.input_ids)]
    if size is None:
        assert sizes == whole
    else:
        assert max(sizes) == size and sum(sizes) == 2 * sum(whole)


# ---------------------------------------------------------------------------------------------- whole runs


def run_main(rank, world, port, path, *arguments):
    """train.main as torchrun would start it; what it prints goes into a file."""
    join(rank, world, port)
    sys.stdout = sys.stderr = open(f"{path}.{rank}", "w")
    if "SIGTERM" in arguments and rank == 1:  # to one of them alone
        step = train.training_step
        train.training_step = lambda *inputs: signal.raise_signal(signal.SIGTERM) or step(*inputs)
    if "OTHER" in arguments and rank == 1:
        arguments += ("--lr", "0.1", "--epochs", "9", "--findings", "Head")
    sys.exit(train.main([argument for argument in arguments if argument not in ("SIGTERM", "OTHER")]))


@pytest.fixture
def flags(cases):
    return [*TINY, *cases, "--epochs", "2"]


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_in_several_processes_is_the_run_of_one(flags, tmp_path, world):
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert launch(run_main, world, tmp_path / "out", *flags, "--out", str(tmp_path / "many")) == [0] * world
    one, many = (sum(log(tmp_path / name), []) for name in ("one", "many"))
    assert [line.keys() for line in one] == [line.keys() for line in many]
    for line, other in zip(one, many, strict=True):
        for name in line.keys() - {"seconds"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4)  # rounding, after six steps of Adam
    printed = [(tmp_path / f"out.{rank}").read_text() for rank in range(world)]
    assert "the best epoch is in" in printed[0] and not any("epoch" in text for text in printed[1:])


def test_sigterm_to_one_process_stops_all_and_the_run_goes_on_from_there(flags, tmp_path):
    flags += ["--out", str(tmp_path / "run")]
    assert launch(run_main, 2, tmp_path / "out", *flags, "SIGTERM") == [143, 143]
    assert evaluate.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 1
    assert launch(run_main, 2, tmp_path / "out", "--resume", str(tmp_path / "run")) == [0, 0]
    assert [line["step"] for line in log(tmp_path / "run")[0]] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_one_of_several_processes_is_said_and_ends_all(flags, tmp_path):
    (tmp_path / "cases" / "train0.png").write_bytes(b"")
    assert launch(run_main, 2, tmp_path / "out", *flags, "--out", str(tmp_path / "run")) == [2, 2]
    said = sorted(re.findall("train.py: (.*)", (tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert "another process" in said[0][0] and "train0.png" in said[1][0] and len(sum(said, [])) == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr 0.1", ["--lr"]),
        ("--seed 5 --epochs 3", ["--seed", "--epochs"]),
        ("--label-mask reports", ["--label-mask"]),
        ("--workers 1 --device cpu", []),
        ("--limit 8", ["--limit", "the records of --data"]),
    ],
)
def test_processes_that_would_do_other_work_are_told_in_what_they_differ(
    options, monkeypatch, capsys, flags, named
):
    """The second process is given these flags, too."""
    seen = []
    monkeypatch.setattr(train, "from_all_ranks", lambda mine: seen.append(mine) or [mine])
    for more in ([], flags.split()):
        args = options("--out", "run", *more)
        train.refuse_other_work(args, train.training_sha256(train.load_splits(args)[0]))
    monkeypatch.setattr(train, "from_all_ranks", lambda _: seen)
    if not named:
        return train.refuse_other_work(args, "")
    with pytest.raises(data.BadInput) as refused:
        train.refuse_other_work(args, "")
    assert str(refused.value).endswith(f"differ in {', '.join(named)}")


def test_other_work_in_one_process_ends_all_before_the_first_step(flags, tmp_path):
    flags += ["--out", str(tmp_path / "run"), "OTHER"]
    assert launch(run_main, 2, tmp_path / "out", *flags) == [2, 2]
    for rank in range(2):
        assert "differ in --findings, --epochs, --lr, the records" in (tmp_path / f"out.{rank}").read_text()
    assert not (tmp_path / "run").exists()


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-2"},
        {"WORLD_SIZE": "2.5"},
        {"RANK": "5"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": None},
        {"RANK": "x"},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": None},
        {"MASTER_PORT": "99999"},
        {"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
    ],
)
def test_an_environment_that_torchrun_does_not_leave_is_refused_at_once(monkeypatch, capsys, tmp_path, wrong):
    for name, value in (TORCHRUN | wrong).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    name, value = next(iter(wrong.items()))
    assert f"{name}={value!r}" in refusal(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("world", [None, "", "1"])
def test_one_process_needs_nothing_of_torchrun(monkeypatch, world):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", world) if world is not None else monkeypatch.delenv("WORLD_SIZE", False)
    assert train.number_of_processes() == 1


def test_an_epoch_sees_no_record_twice_and_another_order_each_time(options):
    batches = train.Batches(options("--batch-size", 4), range(12), None)
    epochs = [sum((batches.rows(step)[1] for step in steps), []) for steps in (range(3), range(3, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
