"""Micro-batches and several processes: the loss and every gradient of one whole batch.

Sums in another order differ by rounding. In float32 that is up to 1e-6 of the gradient where τ is 1, as here,
and τ multiplies it. So every case is computed in float64, too, where nothing but rounding could be as small.
"""

import json
import os
import re
import signal
import socket
import sys
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import FORKS, TINY
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
    "absent alone": ([[24, 0, 8, 16], [25, 17], [1, 26, 27]], None),
    "absent alone, micro-batches": ([[24, 0, 8, 16], [], [1, 26, 27]], 2),
}


def records():
    found = []
    for i in range(24):
        image = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        report = None if i in LABELS_ONLY else f"Report {i} of a heart and {i % 5} lungs."
        findings = frozenset() if i in REPORTS_ONLY else frozenset(FINDINGS[i % 4])
        found.append(data.Record(image, report, findings, str(i), "made"))
    for i in range(24, 28):  # without Edema, and with nothing else that is known
        absent = {"absent": frozenset({"Edema"})}
        found.append(data.Record(found[i - 24].image, None, frozenset(), str(i), "made", **absent))
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


def gradients(run, loss):
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad()
    return {"loss": loss, **found}


def distance(got, want, floor=1.0):
    """The largest difference of a tensor, over its own size or over `floor` of the whole gradient's.

    Some gradients are zero but for rounding: a softmax does not change with the bias of its keys.
    """
    assert got.keys() == want.keys()
    size = torch.stack([value.norm() for name, value in want.items() if name != "loss"]).norm()
    return max(((got[n] - want[n]).norm() / max(want[n].norm(), floor * size)).item() for n in want)


def compute(rank, world, port, path):
    """What one of `world` processes does: all cases in both precisions, into a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.join_processes(torch.device("cpu"))
    results = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        torch.Tensor.float = partialmethod(torch.Tensor.to, dtype)
        run, batch_of = build(dtype)
        model = run.model
        if world > 1:
            model = DistributedDataParallel(model)
        for name, (shares, micro) in CASES.items():
            shares = [shares, [shares[0], shares[1] + shares[2]], [sum(shares, [])]][3 - world]
            run.args.micro_batch_size = micro if world > 1 else None
            run.args.label_mask = "identical" if name == "identical" else "both"
            loss, parts = train.backward(run, batch_of(shares[rank]), model, seed=5)
            results[name, dtype] = gradients(run, loss)
            results[name, "removed"] = [int(mask.sum()) for _, mask, _ in parts.values() if mask is not None]
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
        process.join(60)
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


@pytest.mark.parametrize(
    ("dtype", "floor", "tolerance"), [(torch.float32, 1, 1e-6), (torch.float64, 1e-3, 1e-14)]
)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_loss_and_every_gradient_of_one(computed, case, world, dtype, floor, tolerance):
    for rank in range(world):
        d = distance(computed[world, rank][case, dtype], computed[1, 0][case, dtype])
        print(d)
        assert d <= tolerance


def test_the_mask_goes_over_the_rows_of_all_processes(computed):
    removed = [{case: computed[key][case, "removed"] for case in CASES} for key in computed]
    assert all(each == removed[0] for each in removed) and sum(removed[0]["uneven"]) > 0


ROWS = [0, 8, 16, 17, 3, 22, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_give_the_loss_and_every_gradient_of_the_whole_batch(size):
    run, batch_of = build(torch.float32)
    loss, _ = train.backward(run, batch_of(ROWS), run.model, seed=5)
    whole = gradients(run, loss)
    run.args.micro_batch_size = size
    loss, _ = train.backward(run, batch_of(ROWS), run.model, seed=5)
    assert distance(gradients(run, loss), whole) <= 1e-6


def test_micro_batches_with_dropout_and_stochastic_depth_give_the_gradient_of_their_forward():
    """The slow twin keeps the graphs of all pieces, and so encodes each of them once."""
    run, batch_of = build(torch.float32, "--drop-path", "0.5", "--micro-batch-size", "2")
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch, parts = batch_of(ROWS), {}
    loss, _ = train.backward(run, batch, run.model, seed=5)
    cached = gradients(run, loss)
    for seed in (5, 6):
        torch.manual_seed(seed)
        encoded = [run.model([piece]) for piece in train.pieces_of(batch, run.args)]
        features = torch.cat([features for features, _ in encoded])
        parts = train.losses(run.args, batch, features, encoded[-1][1])
        loss = sum(part for part, _, _ in parts.values())
        loss.backward()
        near = distance(gradients(run, loss.detach()), cached) <= 1e-6
        assert near == (seed == 5)  # another seed drops something else


@pytest.fixture
def encoded(monkeypatch):
    """Sizes of what the two towers encode from now on."""
    sizes = []
    for tower in (umcl.SwinTransformer, umcl.TextEncoder):
        forward = tower.forward

        def spy(self, rows, *rest, forward=forward):
            sizes.append(len(rows))
            return forward(self, rows, *rest)

        monkeypatch.setattr(tower, "forward", spy)
    return sizes


def test_no_more_than_a_micro_batch_is_encoded_at_once(encoded):
    run, batch_of = build(torch.float32, "--micro-batch-size", "2")
    batch = batch_of(ROWS)
    train.backward(run, batch, run.model, seed=5)
    assert max(encoded) == 2
    assert sum(encoded) == 2 * (len(ROWS) + len(batch.report_rows) + len(batch.prompt_labels))


def test_a_whole_batch_is_encoded_once(encoded):
    run, batch_of = build(torch.float32)
    batch = batch_of(ROWS)
    train.backward(run, batch, run.model, seed=5)
    assert encoded == [len(ROWS), *(len(ids) for ids, _ in batch.reports), len(batch.prompt_labels)]


# ---------------------------------------------------------------------------------------------- whole runs


def run_main(rank, world, port, path, *arguments):
    """train.main as torchrun would start it; what it prints goes into a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(f"{path}.{rank}", "w")
    if "SIGTERM" in arguments and rank == 1:  # to one of them alone
        step = train.training_step
        train.training_step = lambda *inputs: signal.raise_signal(signal.SIGTERM) or step(*inputs)
    sys.exit(train.main([argument for argument in arguments if argument != "SIGTERM"]))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def flags(cases):
    return [*TINY, *cases, "--epochs", "2"]


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_in_several_processes_is_the_run_of_one(flags, tmp_path, world):
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert launch(run_main, world, tmp_path / "out", *flags, "--out", str(tmp_path / "many")) == [0] * world
    one, many = lines(tmp_path / "one"), lines(tmp_path / "many")
    assert [line.keys() for line in one] == [line.keys() for line in many]
    for line, other in zip(one, many, strict=True):
        for name in line.keys() - {"seconds", "images_per_second"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4)  # rounding, after six steps of Adam
    printed = [(tmp_path / f"out.{rank}").read_text() for rank in range(world)]
    assert "the best epoch is in" in printed[0] and not any("epoch" in text for text in printed[1:])


def test_sigterm_to_one_process_stops_all_and_the_run_goes_on_from_there(flags, tmp_path):
    flags += ["--out", str(tmp_path / "run")]
    assert launch(run_main, 2, tmp_path / "out", *flags, "SIGTERM") == [143, 143]
    assert evaluate.read_checkpoint(tmp_path / "run" / "last.pt")["progress"]["step"] == 1
    assert launch(run_main, 2, tmp_path / "out", "--resume", str(tmp_path / "run")) == [0, 0]
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_one_of_several_processes_is_said_and_ends_all(flags, tmp_path):
    (tmp_path / "cases" / "images" / "train0.png").write_bytes(b"")
    assert launch(run_main, 2, tmp_path / "out", *flags, "--out", str(tmp_path / "run")) == [2, 2]
    said = sorted(re.findall("train.py: (.*)", (tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert "another process" in said[0][0] and "train0.png" in said[1][0] and len(sum(said, [])) == 2


def batch_rows(args, count):
    """What each of the steps of two epochs takes of so many records: [(epoch, rows), ...]."""
    batches = train.Batches(args, range(count), None)
    return [batches.rows(step) for step in range(2 * (count // 4))]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_out_every_batch(options, monkeypatch, world):
    args, each = options("--batch-size", 4), []
    whole = batch_rows(args, 14)
    monkeypatch.setattr(train, "processes", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        each.append(batch_rows(args, 14))
    for (epoch, rows), *shares in zip(whole, *each, strict=True):
        assert {share[0] for share in shares} == {epoch}
        assert sorted(sum((share[1] for share in shares), [])) == sorted(rows)


def test_an_epoch_sees_no_record_twice_and_another_order_each_time(options):
    steps = batch_rows(options("--batch-size", 4), 12)
    epochs = [sum((rows for e, rows in steps if e == epoch), []) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
