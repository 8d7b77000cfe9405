"""How fast a training step and its parts are, each beside the same thing built otherwise. Run by hand.

    python tests/bench_step.py --rows step --batch-sizes 32 --repeats 3  one row
    python tests/bench_step.py --device cuda --batch-sizes 256 --compile --profile

The sides of a row take turns in one run, each in a process of its own, so that its peak memory is its own.
Trust the ratios, taken round by round, not the seconds: the speed of a machine changes under a long run.
"""

import argparse
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from umcl import SwinTransformer

C = 14  # findings, as CheXpert has
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------- what is timed: make(..., device=) -> a function without arguments


def matmul(precision, device):
    """The device's rate: a matrix product so large that nothing else counts."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return lambda: a @ b


def through(model, inputs, precision, backward, device):
    """Forward, or forward and backward, of a module in evaluation mode, where no side drops anything."""
    model.to(device).eval()
    inputs = data.to_device(inputs, torch.device(device))

    def call():
        with torch.autocast(device, DTYPES[precision], precision != "fp32"), torch.set_grad_enabled(backward):
            features = model(*inputs)
        if backward:
            model.zero_grad()
            features.float().square().sum().backward()

    return call


class PooledSwin(SwinModel):
    def forward(self, images):
        return super().forward(images).pooler_output


def swin(kind, precision, backward, device, batch=16):
    makers = {"ours, grey": SwinTransformer, "ours, RGB": partial(SwinTransformer, in_chans=3)}
    makers |= {"transformers": lambda: PooledSwin(SwinConfig()), "torchvision": torchvision.models.swin_t}
    model = makers[kind]()
    if kind == "torchvision":
        model.head = nn.Identity()
    images = torch.randn(batch, 1 if "grey" in kind else 3, 224, 224)
    return through(model, [images], precision, backward, device)


class Products(TorchDispatchMode):
    """Collects the matrix products and convolutions that run under it, with what they are given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        if operation.overloadpacket in flop_registry:
            self.calls.append(partial(operation, *inputs, **options or {}))
        return operation(*inputs, **options or {})


def swin_products(precision, backward, device):
    """The matrix products of our Swin-T alone: no Swin-T made of them can be faster."""
    with Products() as products:
        swin("ours, grey", precision, backward, device)()

    @torch.no_grad()
    def call():
        for product in products.calls:
            product()

    return call


def texts(lengths):
    """Random texts of these lengths -> Tokens, padded to the longest."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return data.Tokens(torch.randint(5, 30000, mask.shape) * mask, mask)


def our_step(batch, precision, device, compiled=False):
    """Our Swin-T and BERT-base, random; images with 1 to 3 of C findings and no report, batched as usual."""
    flags = f"--preset paper --device {device} --precision {precision} --workers 0 --out none"
    args, names = train.parse_args(flags.split()), [f"finding {i}" for i in range(C)]
    bert = BertModel(BertConfig(), add_pooling_layer=False)
    tokenizer = train.wrap_tokenizer(train.learn_tokenizer(names).to_str())
    model = train.build_model(args, bert, args.prompt_length).to(device).train()
    run = train.Run(model, tokenizer, names, args)
    present = [torch.randperm(C)[: 1 + i % 3].tolist() for i in range(batch)]
    labels = [{name: int(j in some) for j, name in enumerate(names)} for some in present]
    records = [data.Record(None, None, each, "", "random") for each in labels]
    collate = train.training_loader(run, records, []).dataset.collate
    images = torch.randint(0, 256, (batch, 1, args.image_size, args.image_size), dtype=torch.uint8)
    batch = data.to_device(collate(list(enumerate(images))), torch.device(device))
    if compiled:
        model.image_encoder.compile()
        model.text_encoder.compile()
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args.weight_decay), lr=args.lr, fused=True)
    return lambda: train.training_step(run, batch, model, optimizer, args.lr, seed=0)


class MedClipStyle(nn.Module):
    """The towers as MedCLIP has them: colour images; layers 1, 2 and last, their mean over all positions."""

    def __init__(self):
        super().__init__()
        self.swin, self.bert = PooledSwin(SwinConfig()), BertModel(BertConfig())
        self.image_projection, self.text_projection = (nn.Linear(768, 512, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, tokens):
        layers = self.bert(tokens[0], attention_mask=tokens[1], output_hidden_states=True).hidden_states
        text = torch.stack([layers[1], layers[2], layers[-1]]).mean(dim=(0, 2))
        v = F.normalize(self.image_projection(self.swin(images)), dim=-1)
        u = F.normalize(self.text_projection(text), dim=-1)
        return v @ u.T * self.log_scale.exp()


def medclip_style_step(batch, precision, device):
    """Every pair's own text, padded to 77; targets softmax(y yᵀ). Its second text view is left out."""
    model = MedClipStyle().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=1e-4)
    tokens = texts(torch.cat([torch.tensor([77]), torch.randint(10, 40, (batch - 1,))]))
    tokens, images = data.to_device(tokens, device), torch.randn(batch, 3, 224, 224, device=device)
    labels = (torch.rand(batch, C, device=device) < 2 / C).float()
    target = (labels @ labels.T).softmax(1)

    def call():
        with torch.autocast(device, DTYPES[precision], precision != "fp32"):
            logits = model(images, tokens).float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


# ------------------------------------------------------------------------------------------- how it is timed


def serve(connection, make, args):
    """One side in its process: says the FLOP of a call, the seconds of each call asked for, its memory."""
    cuda = args.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.set_num_threads(args.threads)
    train.evaluate.resolve_machine(argparse.Namespace(device=args.device, precision="auto"))  # as a run does
    torch.manual_seed(0)
    call = make(device=args.device)
    with FlopCounterMode(display=False) as counter:
        call()
    if cuda or args.compile:
        call()  # once more without the counter, under which nothing is compiled
    connection.send(counter.get_total_flops())
    while connection.recv():
        wait()
        start = time.perf_counter()
        call()
        wait()
        connection.send(time.perf_counter() - start)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    connection.send((torch.cuda.max_memory_allocated() if cuda else rss) / 2**30)


def measure(sides, args):
    """{name: make}, in turns -> {name: (seconds of each round, GiB, FLOP)}."""
    # A fork has all imports done; but a process that is to use CUDA cannot be one.
    context = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    ends, flop, seconds = {}, {}, {name: [] for name in sides}
    for name, make in sides.items():
        ends[name], end = context.Pipe()
        context.Process(target=serve, args=(end, make, args), daemon=True).start()
        end.close()  # so that the death of the process is an EOFError here, not a wait without end
        flop[name] = ends[name].recv()
    for i in range(args.repeats):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            ends[name].send(True)
            seconds[name].append(ends[name].recv())
    for end in ends.values():
        end.send(False)
    return {name: (seconds[name], ends[name].recv(), flop[name]) for name in sides}


def report(title, sides, args, items):
    """Prints one line a side; the last is the one that the others are compared with."""
    try:
        found = measure(sides, args)
    except EOFError:  # its own message says why
        print(f"| {title} | a side has failed |", flush=True)
        return
    *_, (reference, _, _) = found.values()
    for name, (seconds, memory, flop) in found.items():
        median = statistics.median(seconds)
        gains = [r / s for s, r in zip(seconds, reference, strict=True)]
        gain = f"{statistics.median(gains):.3g} ({min(gains):.3g} .. {max(gains):.3g})"
        share = flop / median / args.rates[name.split()[-1]]
        line = f"{median:.4g} | {items / median:.3g} | {memory:.2f} | {gain} | {share:.0%}"
        print(f"| {title} | {name} | {line} |", flush=True)


def swin_rows(args):
    for p in DTYPES:
        for backward, title in ((False, "Swin-T forward"), (True, "Swin-T forward + backward")):
            kinds = ("ours, grey", "ours, RGB", "transformers", "torchvision")
            sides = {f"{kind} {p}": partial(swin, kind, p, backward) for kind in kinds}
            report(title, sides, args, 16)
            sides = {f"its matrix products alone {p}": partial(swin_products, p, backward)}
            sides[f"ours, grey {p}"] = partial(swin, "ours, grey", p, backward)
            report(f"{title}, bound", sides, args, 16)


def step_rows(args):
    for batch in args.batch_sizes:
        for ours, theirs in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            sides = {f"ours {ours}": partial(our_step, batch, ours)}
            if args.compile and ours == "bf16":
                sides = {"ours, compiled bf16": partial(our_step, batch, ours, compiled=True)} | sides
            sides[f"MedCLIP-style {theirs}"] = partial(medclip_style_step, batch, theirs)
            report(f"training step, batch {batch}", sides, args, batch)


def profile(args):
    """The ten operations of our step that cost most."""
    step = our_step(args.batch_sizes[0], "bf16", args.device)
    step()
    with torch.profiler.profile() as found:
        step()
    print(found.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=10))


ROWS = {"swin": swin_rows, "step": step_rows}


def main():
    p = argparse.ArgumentParser(description="Times a training step and its parts beside other builds.")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    p.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    p.add_argument("--rows", choices=ROWS, nargs="*", default=list(ROWS))
    p.add_argument("--compile", action="store_true", help="our step also under torch.compile")
    p.add_argument("--profile", action="store_true", help="also the ten costliest operations of our step")
    args = p.parse_args()

    rates = measure({name: partial(matmul, name) for name in DTYPES}, args)
    args.rates = {name: flop / statistics.median(seconds) for name, (seconds, _, flop) in rates.items()}
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; matrix products in TFLOP/s:")
    print(", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in args.rates.items()))
    print("| what | side | seconds | items/s | peak GiB | times as fast (least .. most) | of matmul rate |")
    print("|---|---|---|---|---|---|---|")
    for name in args.rows:
        ROWS[name](args)
    if args.profile:
        profile(args)


if __name__ == "__main__":
    main()
