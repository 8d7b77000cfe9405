"""How fast a training step and its parts are, each beside the same thing built otherwise. Run by hand.

    python tests/bench_step.py                                           every row
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from umcl import SwinTransformer, TextEncoder, contrastive_loss, label_mask

C = 14  # findings, as CheXpert has
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


class EncodeTexts(TextEncoder):
    """Pieces of Tokens through BERT-base, then the features put together and picked by row."""

    def forward(self, pieces, rows):
        return torch.cat([TextEncoder.forward(self, *piece) for piece in pieces])[rows]


def texts(lengths):
    """Random texts of these lengths -> Tokens, padded to the longest."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return data.Tokens(torch.randint(5, 30000, mask.shape) * mask, mask)


def label_prompts(distinct, batch, precision, device):
    """Prompts of 44 word pieces: each distinct one once, and gathered; or that of every pair."""
    tokens, rows = texts(torch.full((C,), 44)), torch.randint(C, (batch,))
    if not distinct:
        tokens, rows = data.Tokens(*(t[rows] for t in tokens)), torch.arange(batch)
    encoder = EncodeTexts(BertModel(BertConfig(), add_pooling_layer=False))
    return through(encoder, [[tokens], rows], precision, True, device)


def reports(pieces, batch, precision, device):
    """Reports of median 59, mean 65 and at most 128 word pieces, in pieces of like length."""
    tokens = texts((59 * torch.exp(0.44 * torch.randn(batch))).long().clamp(8, 128))
    order, cut = data.in_pieces(tokens, pieces)
    encoder = EncodeTexts(BertModel(BertConfig(), add_pooling_layer=False))
    return through(encoder, [cut, order.argsort()], precision, True, device)


def run_and_batch(batch, precision, device):
    """Our Swin-T and BERT-base, random, and images with 1 to 3 of C findings, batched as training does it."""
    flags = f"--preset paper --device {device} --precision {precision} --out not-written"
    args, names = train.parse_args(flags.split()), [f"finding {i}" for i in range(C)]
    bert = BertModel(BertConfig(), add_pooling_layer=False)
    tokenizer = train.wrap_tokenizer(train.learn_tokenizer(names).to_str())
    model = train.build_model(args, bert, args.prompt_length).to(device).train()
    run = train.Run(model, tokenizer, names, args)
    present = [frozenset(names[j] for j in torch.randperm(C)[: 1 + i % 3].tolist()) for i in range(batch)]
    records = [data.Record(None, None, some, "", "random", frozenset(names) - some) for some in present]
    prompts = run.prompt_tokens([train.prompts.label_prompt(name, args.template) for name in names])
    collate = data.Collate(records, names, prompts, tokenizer, args.max_length)
    images = torch.randint(0, 256, (batch, 1, args.image_size, args.image_size), dtype=torch.uint8)
    return run, data.to_device(collate(list(enumerate(images))), torch.device(device))


def our_step(batch, precision, device, compiled=False):
    run, batch = run_and_batch(batch, precision, device)
    if compiled:
        run.model.image_encoder.compile()
        run.model.text_encoder.compile()
    groups = train.parameter_groups(run.model, run.args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.args.lr, fused=True)
    return lambda: train.training_step(run, batch, run.model, optimizer, run.args.lr, seed=0)


def around_the_loss(batch, device):
    """Label mask, loss, its gradient up to the features, a line of the log: all that is neither tower."""
    run, batch = run_and_batch(batch, "fp32", device)
    shape = len(batch.rows), 512
    features = [F.normalize(torch.randn(shape, device=device)).requires_grad_() for _ in range(2)]

    def call():
        possible = ~batch.absent[batch.prompt_rows]
        removed = label_mask(possible, batch.prompt_labels[batch.prompt_index], "subset")
        loss = contrastive_loss(*features, run.model.logit_scale(), removed)
        loss.backward()
        train.measures(run, loss, loss, {"prompt": (loss, removed, len(removed))})

    return call


def loss_alone(rows, device):
    """Label mask, loss and gradient of so many pairs."""
    labels = torch.eye(C, device=device).bool()[torch.arange(rows, device=device) % C]
    features = [F.normalize(torch.randn(rows, 512, device=device)).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.0, device=device)
    return lambda: contrastive_loss(*features, scale, label_mask(labels, labels, "subset")).backward()


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
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    tokens = data.to_device(
        texts(torch.cat([torch.tensor([77]), torch.randint(10, 40, (batch - 1,))])), device
    )
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = (torch.rand(batch, C, device=device) < 2 / C).float()
    target = (labels @ labels.T).softmax(1)

    def call():
        model.log_scale.data.clamp_(0, math.log(100))
        with torch.autocast(device, DTYPES[precision], precision != "fp32"):
            logits = model(images, tokens).float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return call


# ------------------------------------------------------------------------------------------- how it is timed


def serve(connection, make, args):
    """One side in its process: says the FLOP of a call, the seconds of each call asked for, its memory."""
    cuda = args.device == "cuda"
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    wait, peak = torch.cuda.synchronize if cuda else lambda: None, torch.cuda.max_memory_allocated
    if not cuda:
        torch.set_num_threads(args.threads)
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory * 2**30),) * 2)
    torch.manual_seed(0)
    try:
        call = make(device=args.device)
        with FlopCounterMode(display=False) as counter:
            call()
        if cuda or args.compile:
            call()  # once more without the counter, under which nothing is compiled
        connection.send(counter.get_total_flops())
        while connection.recv():
            wait()
            start = clock()
            call()
            wait()
            connection.send(clock() - start)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        connection.send((peak() if cuda else rss) / 2**30)
    except (RuntimeError, MemoryError) as error:  # torch has no one error for too little memory
        connection.send(str(error).splitlines()[0][:60])


def measure(sides, args):
    """{name: make}, in turns -> {name: (seconds of each round, GiB, FLOP), or a sentence where it failed}."""
    # A fork has all imports done; but a process that is to use CUDA cannot be one.
    context = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    found, ends, seconds = {}, {}, {name: [] for name in sides}
    for name, make in sides.items():
        ends[name], end = context.Pipe()
        context.Process(target=serve, args=(end, make, args), daemon=True).start()
        end.close()  # so that the death of the process is an EOFError here, not a wait without end
        found[name] = ends[name].recv()
    running = [name for name in sides if not isinstance(found[name], str)]
    for i in range(args.repeats):
        for name in running[:: -1 if i % 2 else 1]:
            ends[name].send(True)
            seconds[name].append(ends[name].recv())
    for name in running:
        ends[name].send(False)
        found[name] = seconds[name], ends[name].recv(), found[name]
    return found


def report(title, sides, args, items=None):
    """Prints one line a side; the last is the one that the others are compared with."""
    found = measure(sides, args)
    *_, reference = found.values()
    for name, result in found.items():
        rate = gain = share = ""
        if isinstance(result, str):
            print(f"| {title} | {name} | {result} |", flush=True)
            continue
        seconds, memory, flop = result
        median = statistics.median(seconds)
        if items:
            rate = f"{items / median:.3g}"
        if result is not reference and not isinstance(reference, str):
            gains = [r / s for s, r in zip(seconds, reference[0], strict=True)]
            gain = f"{statistics.median(gains):.3g} ({min(gains):.3g} .. {max(gains):.3g})"
        if (precision := name.split()[-1]) in args.rates:
            share = f"{flop / median / args.rates[precision]:.0%}"
        print(f"| {title} | {name} | {median:.4g} | {rate} | {memory:.2f} | {gain} | {share} |", flush=True)


def swin_rows(args):
    for p in ("fp32", "bf16"):
        for backward, title in ((False, "Swin-T forward"), (True, "Swin-T forward + backward")):
            kinds = ("ours, grey", "ours, RGB", "transformers", "torchvision")
            report(title, {f"{kind} {p}": partial(swin, kind, p, backward) for kind in kinds}, args, 16)


def text_rows(args):
    for p in ("fp32", "bf16"):
        for batch in args.batch_sizes:
            make = partial(label_prompts, batch=batch, precision=p)
            sides = {
                f"distinct, gathered {p}": partial(make, True),
                f"every pair's {p}": partial(make, False),
            }
            report(f"{C} label prompts, batch {batch}", sides, args, batch)
            make = partial(reports, batch=batch, precision=p)
            sides = {f"4 pieces {p}": partial(make, 4), f"to the longest {p}": partial(make, 1)}
            report(f"reports, batch {batch}", sides, args, batch)


def step_rows(args):
    usual = "fp16" if args.device == "cuda" else "fp32"  # MedCLIP: fp16 with a scaled loss
    pairs = [("bf16", usual), ("bf16", "bf16")]
    for batch in args.batch_sizes:
        for ours, theirs in pairs if args.device == "cuda" else [("fp32", "fp32"), *pairs]:
            sides = {f"ours {ours}": partial(our_step, batch, ours)}
            if args.compile and ours == "bf16":
                sides = {"ours, compiled bf16": partial(our_step, batch, ours, compiled=True)} | sides
            sides[f"MedCLIP-style {theirs}"] = partial(medclip_style_step, batch, theirs)
            report(f"training step, batch {batch}", sides, args, batch)


def mask_rows(args):
    for batch in args.batch_sizes:
        sides = {"step": partial(our_step, batch, "bf16"), "around the loss": partial(around_the_loss, batch)}
        report(f"mask, loss and log line, batch {batch}", dict(reversed(sides.items())), args)


def growth_rows(args):
    for batch in (32, 64, 128, 256):
        report(f"growth, batch {batch}", {"ours bf16": partial(our_step, batch, "bf16")}, args, batch)
    for rows in (1024, 4096, 16384):
        report(f"mask and loss, {rows} rows", {"ours": partial(loss_alone, rows)}, args)


def profile(args):
    """The ten operations of our step that cost most."""
    kind = torch.profiler.ProfilerActivity
    step = our_step(args.batch_sizes[0], "bf16", args.device)
    step()
    with torch.profiler.profile(activities=[kind.CPU] + [kind.CUDA] * (args.device == "cuda")) as found:
        step()
    print(found.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=10))


ROWS = {"swin": swin_rows, "text": text_rows, "step": step_rows, "mask": mask_rows, "growth": growth_rows}


def main():
    p = argparse.ArgumentParser(
        description="Times a training step and its parts beside other builds of them."
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    p.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, with --threads 1 for a machine that is not idle",
    )
    p.add_argument("--memory", type=float, default=20.0, help="GiB of a CPU's memory that a side may take")
    p.add_argument("--rows", choices=ROWS, nargs="*", default=list(ROWS))
    p.add_argument("--compile", action="store_true", help="our step also under torch.compile")
    p.add_argument("--profile", action="store_true", help="also the ten costliest operations of our step")
    args = p.parse_args()

    precisions = list(DTYPES)[: 3 if args.device == "cuda" else 2]  # a CPU has no fast fp16
    rates = measure({name: partial(matmul, name) for name in precisions}, args)
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
