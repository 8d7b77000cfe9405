"""Pre-trains UMCL, or one of its ablations.

    python train.py                                             phantoms, minutes on two cores
    python train.py --no-continuous-prompt                      one flag for each ablation
    python train.py --data csv=FILE --preset small              real images, small towers from scratch
    python train.py --data chexpert=FOLDER mimic-cxr=FOLDER     Swin-T and Bio_ClinicalBERT
    python train.py --resume RUN                                goes on where a run was stopped or broke
    python train.py --init RUN --data csv=FILE --fraction 10    fine-tunes on other data, here a tenth of it
    torchrun --nproc-per-node=4 train.py                        four GPUs; the batch stays what it was

A run leaves RUN/log.jsonl (one JSON object a line), RUN/last.pt, RUN/best.pt, RUN/config.json and
RUN/patients.txt (hashes of those it was trained on).
"""

import os
import signal

# Answers Ctrl-C while the imports below take their seconds, and when all is done.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import operator
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is imported; see data.py

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import prompts
from data import BadInput, Parser, number_type
from evaluate import MACHINE_OPTIONS, Run, build_model, read_checkpoint, wrap_tokenizer
from umcl import (
    MAX_LOGIT_SCALE,
    attracting_loss,
    contrastive_loss,
    load_swin_weights,
    prompt_mask,
    report_mask,
)

SMALL_BERT = "small"  # --text-model: a BERT trained from scratch, with a vocabulary of its own
TIMEOUT = timedelta(hours=2)  # of a silent process; long, since the others wait while the first validates
STOP_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "a closed terminal"}


# ------------------------------------------------------------------------------------------------- one step


def lr_at(step, steps, warmup, peak):
    """Learning rate of a step in 0 ... steps - 1: 1) a straight rise for `warmup` steps, 2) a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, weight_decay):
    """Decay for matrices; none for norms, biases, the temperature, the prompt and position bias tables."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of a frozen text tower
            continue
        table = name.endswith(("relative_position_bias_table", "prompt.context"))
        (free if parameter.ndim < 2 or table else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def pieces_of(batch, args):
    """What there is to encode, at most --micro-batch-size at a time: images, reports, prompts, in order.

    DistributedDataParallel wants every parameter used in every process. So where a process's share of the
    batch lacks images or prompts, one blank is encoded in their place, last, and losses ignores it.
    """
    inputs = [("image", data.normalise(batch.images))] if len(batch.rows) else []
    inputs += [("text", *tokens) for tokens in batch.reports]
    inputs += [("prompt", *batch.prompts)] if len(batch.prompt_pairs.texts) else []
    if not len(batch.rows):
        sides = args.image_size, args.image_size
        inputs.append(("image", batch.images.new_zeros(1, args.channels, *sides).float()))
    if not len(batch.prompt_pairs.texts) and (batch.prompts is not None or not batch.reports):
        inputs.append(("prompt", batch.rows.new_zeros(1, 3), batch.rows.new_ones(1, 3)))
    pieces = []
    for kind, *tensors in inputs:
        cut = (tensor.split(args.micro_batch_size or len(tensor)) for tensor in tensors)
        pieces += [(kind, *piece) for piece in zip(*cut, strict=True)]
    return pieces


def losses(args, batch, features, scale):
    """L(image, report) and L(image, label prompt) of a batch (REPRODUCE.md, the loss).

    features: (B + R + P, D) float, of the images, the reports and the distinct prompts; further rows are
    ignored. scale: τ.
    Returns {"report" or "prompt": (() float loss, (N, N) bool F)}, those that the batch has.
    """
    counts = [len(batch.rows), len(batch.report_pairs.texts), len(batch.prompts[0]) if batch.prompts else 0]
    images, reports, distinct = features[: sum(counts)].split(counts)  # (B, D), (R, D), (P, D)
    found = {}

    rows, texts, ids = batch.report_pairs
    known = batch.present[rows], batch.absent[rows], ids, batch.image_ids[rows]
    v, u, present, absent, ids, image_ids = gather_rows(images[rows], reports[texts], *known)
    if len(u):
        diseases = batch.diseases & (args.label_mask in ("both", "reports"))  # without any no labels count
        removed = report_mask(present, absent, diseases, ids, image_ids)
        found["report"] = contrast(args.objective, v, u, scale, removed, ids)

    rows, texts, ids = batch.prompt_pairs
    v, u, absent, ids = gather_rows(images[rows], distinct[texts], batch.absent[rows], ids)
    if len(u):
        removed = ids[:, None] == ids
        if args.label_mask in ("both", "prompts"):
            # An image of which only absent findings are known has no prompt: a negative of these findings'.
            rows = (~batch.present.any(1) & batch.absent.any(1)).nonzero()[:, 0]
            more, lacking = gather_rows(images[rows], batch.absent[rows])
            v, removed = torch.cat([v, more]), prompt_mask(torch.cat([absent, lacking]), ids)
        found["prompt"] = contrast(args.objective, v, u, scale, removed, ids)
    return found


def contrast(objective, v, u, scale, same, text_ids):
    """The loss that --objective names, and the pairs that it removes -> () float, (N, N) bool.

    v: (N + E, D) and u: (N, D) float, unit length. same: (N + E, N) bool, F. text_ids: (N,) int64.
    """
    n, nothing = len(u), torch.zeros_like(same[: len(u)])
    if objective == "mask":
        return contrastive_loss(v, u, scale, same, text_ids), same[:n]
    if objective == "repeated":
        return contrastive_loss(v, u, scale, same), same[:n]
    if objective == "clip":
        return contrastive_loss(v[:n], u, scale), nothing
    return attracting_loss(v, u, scale, same, objective), nothing


def backward(run, batch, model, seed):
    """Adds up the gradients of L = L(image, report) + λ L(image, label prompt) -> L, and its parts.

    With --micro-batch-size the towers run over one piece at a time and once more on the way back, so that
    memory holds the inner layers of one piece alone; the loss still has the whole batch for negatives.

    model: run.model, or the DistributedDataParallel around it. seed: of dropout and stochastic depth.
    """
    torch.manual_seed(seed)
    with run.autocast():
        features, scale = model(pieces_of(batch, run.args), recompute=run.args.micro_batch_size is not None)
    # Every process computes the whole batch's loss, and DistributedDataParallel averages the gradients. That
    # is right for τ. A tower's gradient is one share of a sum, so it is multiplied by the number of shares.
    if processes() > 1:
        features.register_hook(lambda gradient: gradient * processes())
    parts = losses(run.args, batch, features, scale)
    weight = {"report": 1.0, "prompt": run.args.prompt_weight}
    nothing = 0 * (scale + features.sum())  # gives every weight a gradient where a batch has neither part
    loss = sum((weight[kind] * part for kind, (part, _) in parts.items()), nothing)
    loss.backward()
    return loss.detach(), parts


def training_step(run, batch, model, optimizer, lr, seed):
    """One step, from a batch to new weights -> loss and gradient norm, each () float; the loss's parts."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss, parts = backward(run, batch, model, seed)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip)
    optimizer.step()
    run.model.log_scale.data.clamp_(max=math.log(0.999 * MAX_LOGIT_SCALE))  # at the bound τ gets no gradient
    return loss, norm, parts


# -------------------------------------------------------------------------------------------------- options

# fmt: off
PRESETS = {  # REPRODUCE.md compares the values of "paper" with those of the family; all are ours
    "small": dict(  # minutes on two cores, both towers from scratch: phantoms and small data sets
        image_size=64, patch_size=8, swin_dim=64, swin_depths=[2, 2], swin_heads=[2, 4], window_size=4,
        drop_path=0.0, text_model=SMALL_BERT, max_length=96, embed_dim=128,
        batch_size=32, epochs=6, lr=1e-3, weight_decay=0.05, workers=1, precision="auto",
        threads=1,  # two are no faster at these sizes, and far slower where other programs run
    ),
    "paper": dict(  # Swin-T and Bio_ClinicalBERT
        image_size=224, patch_size=4, swin_dim=96, swin_depths=[2, 2, 6, 2], swin_heads=[3, 6, 12, 24],
        window_size=7, drop_path=0.1, text_model="emilyalsentzer/Bio_ClinicalBERT", max_length=128,
        embed_dim=512, batch_size=128, epochs=15, lr=5e-5, weight_decay=1e-4, workers=4, precision="auto",
        threads=torch.get_num_threads(),
    ),
}


def build_parser():
    on_off = argparse.BooleanOptionalAction
    positive, natural = number_type(int, 1, 10**9), number_type(int, 0, 4096)
    size, share = number_type(int, 1, 4096), number_type(float, 0, 1)
    p = Parser(description="Pre-train UMCL or one of its ablations.", allow_abbrev=False,
                       epilog="Presets set the sizes and the schedule; RUN/config.json has all values.")
    add = p.add_argument
    add("--data", nargs="+", default=["phantom"], metavar="NAME[=ROOT]", help=", ".join(data.DATASETS))
    add("--limit", type=positive, help="only N records of each data set, by a fixed shuffle (smoke runs)")
    add("--views", nargs="+", choices=data.VIEWS, default=list(data.FRONTAL),
        help="images to keep, where their data set says the view; default the frontal ones")
    add("--uncertain", choices=data.UNCERTAIN, default="ignore",
        help="what a labeler's -1 becomes: unknown, 0, 1, or each of the two by finding")
    add("--section", choices=data.SECTIONS, default="both", help=data.SECTION_HELP)
    add("--findings", nargs="+", type=data.text, metavar="NAME",
        help="labels to learn from; the mask sees no others either")
    add("--hold-out", nargs="+", default=[], metavar="FILE",
        help="lists of `data.py protocol`; their images' patients and near copies are kept out")
    add("--hold-out-data", nargs="+", default=[], metavar="NAME=ROOT",
        help="further data sets in which listed images are; nothing else is read of them")
    add("--preset", choices=PRESETS, help="without it small for phantoms, paper for other data")
    add("--out", help="folder of the run; default runs/umcl and the flags that are given")
    add("--resume", metavar="RUN", help="go on with a run; device, threads, workers and the like may change")
    add("--init", metavar="RUN",
        help="a new run from another's weights, tokenizer, vectors and sizes, with data of its own")
    add("--fraction", type=number_type(float, 1e-9, 100), metavar="PERCENT",
        help="of the training patients, drawn by the seed as linear-probe does")
    add("--seed", type=number_type(int, 0, 2**63 - 1), default=0)

    add = p.add_argument_group("ablations").add_argument
    add("--continuous-prompt", action=on_off, default=True, help="off: the template alone")
    add("--prompt-length", type=natural, default=32, help="vectors; the paper has 16 and 64 as worse")
    add("--template", type=data.text, default="caption",
        help=f"around the finding: {', '.join(prompts.TEMPLATES)}, or a text of yours with {{}}")
    add("--objective", choices=("mask", "repeated", "clip", "unicl", "multi-positive", "soft"),
        default="mask", help="mask: same-label pairs are no negatives; repeated: and equal texts count as "
        "often as they come; clip: they are negatives; the others draw them together, as peers do")
    add("--no-label-mask", dest="objective", action="store_const", const="clip", help="--objective clip")
    add("--label-mask", choices=("both", "reports", "prompts", "identical"), default="both",
        help="texts whose labels say which pairs those are; identical: none, only equal texts are the same")
    add("--image-text", action=on_off, default=True, help="off: no report is read")
    add("--image-label", action=on_off, default=True, help="off: no label prompt is made")
    add("--prompt-weight", type=number_type(float, 0), default=1.0, help="lambda of the prompts' loss (ours)")

    add("--label-noise", type=share, default=0.0, metavar="SHARE",
        help="of the labelled training images get the labels of others")

    add = p.add_argument_group("model").add_argument
    add("--image-size", type=size, help="pixels a side; the cost grows with its square")
    add("--channels", type=int, choices=data.MODES, default=1, help="1 reads all images as grey, 3 in colour")
    add("--patch-size", type=size, help="pixels a side of a patch; larger is faster and coarser")
    add("--swin-dim", type=size, help="channels of the first stage")
    add("--swin-depths", type=number_type(int, 0, 100), nargs="+", help="blocks of each stage")
    add("--swin-heads", type=size, nargs="+", help="attention heads of each stage")
    add("--window-size", type=size, help="must divide the side of each map that is larger")
    add("--drop-path", type=number_type(float, 0, 0.9), help="stochastic depth; 0.1 to 0.2 for long runs")
    add("--image-weights", metavar="FILE",
        help="pre-trained Swin with torchvision's, Microsoft's, timm's or transformers' key names")
    add("--text-model", metavar="NAME_OR_FOLDER", help=f'a pre-trained BERT, or "{SMALL_BERT}" from scratch')
    add("--freeze-text", action=on_off, default=False,
        help="train the image tower, the projections and the vectors alone, BERT stays as it was")
    add("--max-length", type=number_type(int, 3, 4096), help="longest text in tokens; the rest is cut off")
    add("--embed-dim", type=number_type(int, 1, 2**16), help="size of the shared space")

    add = p.add_argument_group("training").add_argument
    add("--batch-size", type=positive, help="images a step, over all processes; each other's negatives")
    add("--epochs", type=positive)
    add("--lr", type=number_type(float, 0), help="peak; small towers from scratch take more than pre-trained")
    add("--weight-decay", type=share, help="none on norms, biases, temperature, prompt")
    add("--warmup", type=share, default=0.1, help="share of the steps with a rising learning rate")
    add("--clip", type=number_type(float, 1e-9), default=1.0, help="clip the gradient to this norm")
    add("--horizontal-flip", action=on_off, default=False,
        help='mirror half of the training images; contradicts "left" in a report')

    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 if the processor has units for it")
    add("--threads", type=number_type(int, 1, 1024), help="on the CPU")
    add("--micro-batch-size", type=positive, metavar="N",
        help="for a small device: encode N images or texts at a time, twice; the loss has the whole batch")
    add("--workers", type=number_type(int, 0, 256), help="processes that read images; 0 for none")
    add("--log-every", type=positive, default=10, help="steps between two lines of log.jsonl")
    add("--save-every", type=positive, default=1000, help="steps between two saves beside the epochs' ends")
    for action in p._actions:
        if action.dest in PRESETS["small"]:
            values = (f"{name} {preset[action.dest]}" for name, preset in PRESETS.items())
            action.help = f"{action.help or ''} ({'; '.join(values)})".strip()
    return p
# fmt: on

# What --init takes from its run.
SIZES = (
    "image_size channels patch_size swin_dim swin_depths swin_heads window_size text_model max_length "
    "embed_dim continuous_prompt prompt_length"
).split()


def parse_args(argv=None):
    """Command line -> Namespace with every option resolved, `out` among them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    first = parser.parse_args(argv)
    if first.resume is not None:
        return resumed_args(parser, argv, first.resume)
    phantoms_only = all(spec.partition("=")[0] == "phantom" for spec in first.data)
    saved = saved_options(evaluate.run_file(first.init)) if first.init is not None else {}
    preset = first.preset or saved.get("preset") or ("small" if phantoms_only else "paper")
    parser.set_defaults(preset=preset, **PRESETS[preset])
    parser.set_defaults(**{name: saved[name] for name in [*SIZES, "template"] if saved})
    args = parser.parse_args(argv)
    if other := [name for name in SIZES if saved and getattr(args, name) != saved[name]]:
        raise BadInput(f"--init {args.init} brings its own {flags(other)}; leave out what differs")
    if saved and args.image_weights:
        raise BadInput(f"--init {args.init} brings the image tower's weights, too; leave out --image-weights")
    if args.template not in prompts.TEMPLATES and "{}" not in args.template:
        parser.error(f"--template {args.template!r} is none of {', '.join(prompts.TEMPLATES)} and lacks {{}}")
    if args.freeze_text and args.text_model == SMALL_BERT and not saved:
        raise BadInput("--freeze-text keeps a pre-trained text tower; name it by --text-model")
    data.check_section(args.section, args.data)
    if args.hold_out_data and not args.hold_out:
        raise BadInput("--hold-out-data says where the images of --hold-out are; name their list")
    if args.out is None:
        args.out = f"runs/{name_of(argv)}"
    refuse_a_run(args.out)
    args.commit = evaluate.commit()
    args.held_out = held_out(args)
    return args


def flags(names):
    """Names of options as they are written -> str."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def name_of(argv):
    """The name of a run by its flags -> str: of paths the last part, of a long name its two ends."""
    words = [re.sub(r"[^ =]*/(?=[^/ =])", "", word.rstrip("/")) for word in argv]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(["umcl", *words])).strip("-")
    return name if len(name) <= 100 else f"{name[:50]}...{name[-47:]}"


def refuse_a_run(folder):
    """Refuses a folder in which a new run would write over an old one; what has saved nothing is none."""
    out = Path(folder)
    if (out / "last.pt").exists():
        raise BadInput(f"{out} already holds a run; give another --out, or go on with --resume {out}")
    lines = (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0
    if lines or (out / "best.pt").exists():
        raise BadInput(f"{out} holds what is left of a run, without last.pt; give another --out")


def in_words(action, value):
    """The value of an option as it would be given on the command line -> list of str."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[not value]]
    if isinstance(value, list):
        return [action.option_strings[0], *map(str, value)]
    return [f"{action.option_strings[0]}={value}"]


def saved_options(path):
    """The options that a checkpoint holds, looked through -> dict.

    One that came after its program is what it is by default, if that turns something off, and refused else.
    """
    parser, state = build_parser(), read_checkpoint(path)

    def refuse(message):
        raise ValueError(message)

    with evaluate.refusing(path):
        saved, parser.error = evaluate.LATER | state["args"], refuse
        on_off = argparse.BooleanOptionalAction
        actions = {a.dest: a for a in parser._actions if a.nargs != 0 or isinstance(a, on_off)}
        for name, action in actions.items():
            needed = name in PRESETS["small"]
            if name in saved:
                lacks = saved[name] is None and (needed or action.default is not None)
            else:
                lacks = needed or action.default and name not in MACHINE_OPTIONS
            if lacks:
                refuse(f"it has no {action.option_strings[0]}; is it of an older version?")
        given = {name: action for name, action in actions.items() if saved.get(name) not in (None, [])}
        parsed = parser.parse_args([word for n, a in given.items() for word in in_words(a, saved[n])])
        for name, action in given.items():
            if getattr(parsed, name) != saved[name] or type(saved[name]) in (tuple, bytes):
                refuse(f"its {action.option_strings[0]} is of another type")
        return {"commit": "unknown"} | vars(parsed) | saved


def resumed_args(parser, argv, folder):
    """Options of the run in a folder, and those of the command line, if they do not alter its result."""
    saved = saved_options(Path(folder, "last.pt")) | {"device": "auto", "resume": folder, "out": folder}
    args = parser.parse_args(argv, argparse.Namespace(**saved))  # what is not given stays as it was saved
    # Data may have moved: that they are the same is shown by their hash, in begin.
    free = ("data", "hold_out", "hold_out_data", *MACHINE_OPTIONS)
    if args.hold_out != saved["hold_out"]:
        args.held_out = held_out(args)
    differ = [name for name, value in saved.items() if name not in free and getattr(args, name) != value]
    if differ:
        way_out = f"start a new run for that, from its weights by --init {folder}"
        raise BadInput(f"{flags(differ)} would alter the result of {folder}; {way_out}")
    return args


def held_out(args):
    """SHA-256 of the lists of --hold-out -> list of str."""
    return [data.ids_sha256(data.read_ids(file)) for file in args.hold_out]


# --------------------------------------------------------------------------------------------------- model


MAX_PIECE = 16  # characters of a piece of the vocabulary, the mark of a word's start among them


def learn_tokenizer(texts, size=2000):
    """A lower-case word-piece vocabulary learned from texts -> tokenizers.Tokenizer.

    The library's own word-piece trainer breaks ties at random, so two runs would differ. Its byte-pair
    trainer does not: it learns the pieces here, and those that do not start a word get BERT's "##".

    A checkpoint may be given away, so no report stands in it: a piece is one character, or it is at most 16
    long and in two different texts. Some scripts put no blank into a whole report.
    """
    options = {"lowercase": True, "strip_accents": False}  # Thai writes vowels as accents
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.BertNormalizer(**options)
    start_words = pre_tokenizers.Metaspace(prepend_scheme="always")  # with "▁"
    learned.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), start_words])
    longest = {"max_token_length": MAX_PIECE + 1}  # which the library itself no longer takes
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **longest))
    vocabulary = learned.get_vocab()
    normal = dict.fromkeys(learned.normalizer.normalize_str(text) for text in texts)
    words = [" ".join(word for word, _ in learned.pre_tokenizer.pre_tokenize_str(text)) for text in normal]
    pieces = sorted(vocabulary.keys() - {"▁"}, key=vocabulary.get)
    pieces = [p for p in pieces if len(p) == 1 or len(p) <= MAX_PIECE and in_two(p, words)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(piece for piece in pieces if len(piece) == 1)]
    names += [piece[1:] if piece.startswith("▁") else f"##{piece}" for piece in pieces]
    tokenizer = BertWordPieceTokenizer({name: i for i, name in enumerate(dict.fromkeys(names))}, **options)
    tokenizer._tokenizer.model.max_input_chars_per_word = 10**6  # longer words would be [UNK]
    return tokenizer


def in_two(piece, texts):
    """Whether two of the texts have the piece; looks no further than the second."""
    return sum(1 for _ in itertools.islice((1 for text in texts if piece in text), 2)) == 2


def load_text_model(name):
    """A pre-trained BERT by hub name or folder -> (BertModel without pooling layer, tokenizer).

    Refuses one that is no BERT or lacks weights, or whose tokenizer is another model's. Runs no code of its.
    """
    from transformers import (  # a second, see evaluate.wrap_tokenizer
        AutoTokenizer,
        BertModel,
        PretrainedConfig,
    )

    try:
        if os.path.lexists(name) and not Path(name).is_dir():
            raise ValueError("it is no folder")
        local = Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
        if not local:
            HfApi().model_info(name, timeout=3)  # from_pretrained would try for a minute
        options = {"local_files_only": local, "trust_remote_code": False}
        kind = PretrainedConfig.get_config_dict(name, **options)[0].get("model_type")
        if kind != "bert":  # RoBERTa's weights have the same names, but its positions begin at 2
            raise ValueError(f'its config.json says model_type {json.dumps(kind)}, and "bert" is needed')
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        options |= {"add_pooling_layer": False, "attn_implementation": "sdpa"}
        bert, info = BertModel.from_pretrained(name, output_loading_info=True, **options)
        bert.float()
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
        if not evaluate.finite(bert):
            raise ValueError("its weights are not finite")
        pieces, embeddings = len(tokenizer), bert.config.vocab_size
        if tokenizer.pad_token_id is None or not embeddings / 2 <= pieces <= embeddings:
            raise ValueError(f"its tokenizer, of {pieces} pieces, is not that of its {embeddings} embeddings")
    except Exception as error:  # the library has no one error for what it cannot read
        raise BadInput(
            f"the text model {name} cannot be used; --text-model FOLDER takes a BERT and its tokenizer as "
            f"save_pretrained or `hf download` writes them, --preset small needs none ({error})"
        ) from error
    return bert, tokenizer


def small_text_model(args, texts):
    """A BERT to train from scratch, with a vocabulary learned from texts -> (BertModel, tokenizer)."""
    from transformers import BertConfig, BertModel

    tokenizer = wrap_tokenizer(learn_tokenizer(texts).to_str())
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": args.max_length + args.prompt_length}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False), tokenizer


def load_image_weights(swin, file):
    """Puts pre-trained Swin weights from a .pt, .pth or .safetensors file into a SwinTransformer."""
    try:
        data.refuse_no_file(file)
        safetensors = file.endswith(".safetensors")
        weights = load_file(file) if safetensors else torch.load(file, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):  # Microsoft's files, and others, wrap the weights
            weights = weights.get(key, weights)
        load_swin_weights(swin, weights)
        if not evaluate.finite(swin):
            raise ValueError("they are not finite")
    except Exception as error:  # neither library has one error for what it cannot read
        raise BadInput(f"--image-weights {file} is no Swin of these sizes ({error})") from error


# ----------------------------------------------------------------------------------------------- processes


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def print_once(sentence):
    """Prints in the first process alone."""
    if rank() == 0:
        print(sentence, flush=True)


def number_of_processes():
    """What torchrun tells each process in the environment, looked through -> int; 1 without it."""
    told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if told["WORLD_SIZE"] in (None, "", "1"):
        return 1
    try:
        world, port = int(told["WORLD_SIZE"]), int(told["MASTER_PORT"] or "")
        if int(told["RANK"] or "") in range(world) and port in range(1, 2**16) and told["MASTER_ADDR"]:
            return world
    except ValueError:
        pass
    said = ", ".join(f"{name}={value!a}" for name, value in told.items())
    raise BadInput(f"{said}: torchrun sets these for several processes; unset WORLD_SIZE to train in one")


def join_processes(device):
    """Under torchrun: the process group. With GPUs, too, tensors on the CPU go over gloo."""
    if number_of_processes() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)


def from_all_ranks(value):
    """A small value of each process -> list in the order of their ranks."""
    values = [value] * processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def refuse_other_work(args, known):
    """Ends all processes, with one sentence, where one was given other options or other records.

    known: SHA-256 of the records. It stands for the paths of the data, which may differ between machines.
    """
    free = ("data", "hold_out", "hold_out_data", "held_out", "commit", *MACHINE_OPTIONS)
    mine = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in free}
    first, *others = from_all_ranks(mine | {"the records of --data": known})
    differ = [name for name in first if any(each.get(name) != first[name] for each in others)]
    if differ:
        raise BadInput(f"the processes do not do the same work, but differ in {', '.join(differ)}")


def gather_rows(*tensors):
    """The rows of all processes, in the order of their ranks -> as many tensors; only the own have a graph.

    tensors: (n, ...) each; n may differ between processes, and may be 0.
    """
    counts = from_all_ranks(len(tensors[0]))
    if len(counts) == 1 or max(counts) == 0:
        return tensors
    whole = []
    for own in tensors:
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        parts[rank()] = own
        whole.append(torch.cat(parts))
    return whole


# ---------------------------------------------------------------------------------------- records and batches


def load_splits(args):
    """The records to train on and to validate -> two lists; says how many images --hold-out leaves out.

    It leaves out the patients of the listed images, and those of near copies of these.
    """
    names = data.SPLITS if args.hold_out else data.SPLITS[:2]
    read = {split: data.read_records(args.data, split, args.limit, args.section) for split in names}
    if args.image_text:
        data.check_reports(read["train"], args.section)
    listed, splits = [], []
    if args.hold_out:
        found = [*read.values(), data.read_records(args.hold_out_data, "all")]
        known = itertools.chain(*(records for each in found for records in each.values()))
        ids = [id for file in args.hold_out for id in data.read_ids(file)]
        listed = data.pick_listed([*known], ids, " and ".join([*args.data, *args.hold_out_data]))
    for split in data.SPLITS[:2]:
        chosen = {"views": args.views, "uncertain": args.uncertain}
        records = data.load_records(read[split], split, args.limit, **chosen)
        data.check_images(records, args.image_size, args.channels)
        if args.findings:
            missing = set(args.findings) - set(data.vocabulary(records))
            if split == "train" and missing:
                raise BadInput(f"--findings {', '.join(sorted(missing))}: no training record has it")
            records = data.restricted(records, frozenset(args.findings))
        splits.append(records)
    if not listed:
        return splits
    others = [data.hold_out(records, listed) for records in splits]
    copies = data.near_copies([*itertools.chain(*others)], listed, args.workers)
    kept = [data.hold_out(records, copies) for records in others]
    for split, *parts in zip(data.SPLITS[:2], splits, others, kept, strict=True):
        whole, by_patient, left = map(len, parts)
        held_out = f"{whole - by_patient:,} are held out by patient and {by_patient - left:,} more by picture"
        print_once(f"{split}: of {whole:,} images {held_out}")
    return kept


def mislabelled(records, noise, seed):
    """The records, a share of the labelled ones with labels of others, by the seed and the record -> list."""
    name = operator.attrgetter("source", "patient", "id")
    labelled, found = sorted(filter(data.present, records), key=name), []
    for record in records:
        chance = random.Random(seed_for(seed, "labels", name(record)))
        wrong = data.present(record) and chance.random() < noise
        found.append(replace(record, labels=chance.choice(labelled).labels) if wrong else record)
    return found


def training_records(args, records):
    """Those of the records that are drawn and that the chosen losses can use; says how many they cannot."""
    if args.fraction is not None:
        drawn = evaluate.drawn_by_patient(records, args.fraction, args.seed)
        print_once(f"{len(drawn):,} of {len(records):,} training images are drawn by --fraction")
        records = [records[row] for row in drawn]
    if args.label_noise:
        records = mislabelled(records, args.label_noise, args.seed)
    if not args.image_text:
        records = [replace(record, report=None) for record in records]
    reports = torch.tensor([record.report is not None for record in records], dtype=torch.bool)
    present, absent = data.label_matrices(records, data.vocabulary(records) if args.image_label else [])
    if not reports.any() and not (present.any(0) & absent.any(0)).any():
        raise BadInput("no training record is left: none has a report to use, and no finding tells two apart")
    kept = list(itertools.compress(records, (reports | (present | absent).any(1)).tolist()))
    numbers = f"{reports.sum():,} with a report and {present.any(1).sum():,} with a finding"
    print_once(f"{len(kept):,} of {len(records):,} training images have something to learn from: {numbers}")
    return kept


def seed_for(*key):
    """Seed for the random numbers of one purpose, which the key tells from all others -> int below 2³²."""
    return zlib.crc32(repr(key).encode())


@functools.lru_cache(maxsize=1)  # the batches of an epoch share it
def shuffled(count, seed, epoch):
    """The images of an epoch in its order -> (count,) int64."""
    shuffler = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    return torch.randperm(count, generator=shuffler)


class Batches(torch.utils.data.Dataset):
    """Step, from 0 -> this process's share of its Batch.

    Every epoch shuffles anew and drops what does not fill a batch; records that fill none are one batch.
    What is random in a batch is a function of the seed, the epoch and the record: the same for any number of
    workers and processes, and wherever a run was stopped.
    """

    def __init__(self, args, images, collate):
        self.images, self.collate, self.seed, self.size = images, collate, args.seed, args.batch_size
        self.share = slice(rank(), None, processes())

    def rows(self, step):
        """The epoch of a step, and the images that this process takes of it."""
        epoch, place = divmod(step, steps_per_epoch(self.size, self.images))
        batch = shuffled(len(self.images), self.seed, epoch)[place * self.size : (place + 1) * self.size]
        return epoch, batch[self.share].tolist()

    def __getitem__(self, step):
        epoch, rows = self.rows(step)
        items = []
        for row in rows:
            torch.default_generator.manual_seed(seed_for(self.seed, "image", epoch, row))
            items.append(self.images[row])
        torch.default_generator.manual_seed(seed_for(self.seed, "prompts", epoch))
        return self.collate(items)


def steps_per_epoch(batch_size, records):
    return max(1, len(records) // batch_size)


def note_cut_reports(run, records):
    """Says how many reports are longer than --max-length, which cuts them."""
    longest = run.args.max_length
    texts = [record.report for record in records if record.report is not None]
    longer = [text for text in texts if len(text) > longest - 2]  # a token has a character or more
    cut = sum(len(ids) > longest for ids in run.tokenizer(longer)["input_ids"]) if longer else 0
    if cut:
        data.note(f"{cut:,} of {len(texts):,} reports are longer than --max-length {longest} and are cut")


def training_loader(run, records, steps):
    """This process's share of the batches of these steps -> DataLoader of Batch."""
    args = run.args
    texts = [prompts.label_prompt(finding, args.template) for finding in run.findings]
    label_prompts = run.prompt_tokens(texts) if args.image_label and texts else None
    if label_prompts:
        named = zip(run.findings, texts, strict=True)
        evaluate.refuse_equal_prompts(run, {name: [text] for name, text in named})
    transform = data.training_transform(args.image_size, args.horizontal_flip)
    images = data.Images(records, transform, args.channels)
    pieces = 1 if args.text_model == SMALL_BERT else 4  # a small BERT's calls cost more than padding does
    collate = data.Collate(records, run.findings, label_prompts, run.tokenizer, args.max_length, pieces)
    options = {"sampler": steps, "pin_memory": run.device.type == "cuda"}
    batches = Batches(args, images, collate)  # an item is a whole batch
    # What all processes need, and once more, as validation reads images of its own beside these.
    batch_bytes = 2 * args.batch_size * args.channels * args.image_size**2
    return data.loader(batches, args.workers, batch_bytes, batch_size=None, **options)


# ------------------------------------------------------------------------------------------------ the loop


def start_of(args):
    """What a run starts from, read before the records are: a checkpoint, BERT and tokenizer, or None."""
    if args.resume is not None:
        return read_checkpoint(Path(args.resume, "last.pt"))
    if args.init is not None:
        return read_checkpoint(evaluate.run_file(args.init))
    return load_text_model(args.text_model) if args.text_model != SMALL_BERT else None


def seen_before(args):
    """Hashes of the patients that the run of --resume or --init was trained on -> set of str."""
    before = args.init if args.resume is None else args.resume
    file = evaluate.run_file(before).parent / "patients.txt" if before is not None else None
    return {line.strip() for _, line in data.read_lines(file)} if file and file.exists() else set()


def new_run(args, records, start=None):
    """A model for these records, on its device -> Run.

    start: what start_of gives, the checkpoint of --init or a pre-trained BERT and its tokenizer; None makes a
    small BERT.
    """
    findings = data.vocabulary(records)
    if args.init is not None:
        return evaluate.run_from_checkpoint(start | {"args": vars(args), "findings": findings}, args.device)
    # Without label prompts nothing trains the vectors, and random ones would only disturb zero-shot.
    vectors = args.continuous_prompt and args.image_label and args.prompt_weight > 0 and findings
    if start is None:
        texts = [record.report for record in records if record.report is not None]
        texts += itertools.chain(*prompts.prompt_set(findings, "ensemble").values())
        if args.template not in prompts.TEMPLATES:
            texts += [prompts.label_prompt(finding, args.template) for finding in findings]
        start = small_text_model(args, texts)
    bert, tokenizer = start
    model = build_model(args, bert, args.prompt_length if vectors else 0)
    if args.image_weights:
        load_image_weights(model.image_encoder, args.image_weights)
    return Run(model.to(args.device), tokenizer, findings, args)


def training_sha256(records, valid=()):
    """Of all that is known of the records and of the sizes of their images, in order -> str."""
    digest = hashlib.sha256()
    for r in [*records, *valid]:
        image = str(r.image.stat().st_size).encode() if isinstance(r.image, Path) else r.image.tobytes()
        known = r.id, r.report, sorted(data.present(r)), sorted(data.absent(r))
        digest.update(image + repr(known).encode())
    return digest.hexdigest()


@dataclass
class Progress:
    """How far a run has come: what a checkpoint keeps beside weights, moments and options.

    No generator state is saved: every random number is a function of the seed and of what it is for.
    """

    step: int = 0
    epoch: int = 0
    validated: int = 0  # the last epoch that was scored on the validation split
    best: float = -1.0  # the highest sum of validation scores
    seconds: float = 0.0
    records: str = ""  # SHA-256 of what is trained on, in order
    log_size: int = 0  # bytes of log.jsonl


def saved_progress(saved):
    """Progress as a checkpoint holds it -> Progress; a value that cannot be is refused."""
    progress, first = Progress(*(saved[field.name] for field in fields(Progress))), Progress()
    for field in fields(Progress):
        value, least = getattr(progress, field.name), getattr(first, field.name)
        if type(value) is not type(least) or not value >= least:
            raise ValueError(f"its progress has no {field.name}")
    return progress


def load_moments(optimizer, moments):
    """Puts AdamW's saved moments into a new optimizer, whose options stay as they are."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    for parameter, held in optimizer.state.items():
        if any(held[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")) or held["step"] < 1:
            raise ValueError("its optimizer is that of other weights")


def begin(args, records, valid, start):
    """A new run, or with --resume the saved one -> Run, its optimizer, its Progress. start: of start_of."""
    state = start if args.resume is not None else None
    run = evaluate.run_from_checkpoint(state, args.device) if state else new_run(args, records, start)
    groups = parameter_groups(run.model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=run.device.type != "mps")
    known = training_sha256(records, valid)
    progress = Progress(records=known)
    if state:
        with evaluate.refusing(state["path"]):
            progress = saved_progress(state["progress"])
            load_moments(optimizer, state["optimizer"]["state"])
        if progress.records != known:
            raise BadInput(
                f"the data have changed since {args.resume} was begun, and it cannot go on with others; "
                "where they have only moved, --data says where they are now"
            )
        if args.commit != evaluate.commit():
            print_once(f"the program has changed since commit {args.commit}, with which this run was begun")
    return run._replace(args=args), optimizer, progress


@contextlib.contextmanager
def signals_noted():
    """Collects STOP_SIGNALS that are not ignored, as by nohup; after the first, Ctrl-C interrupts at once."""
    noted = []

    def note(number, _frame):
        noted.append(number)
        signal.signal(signal.SIGINT, data.interrupt)

    before = {n: signal.signal(n, note) for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measures(run, loss, norm, parts):
    """What a line of log.jsonl says of a step: losses, and how many negatives the mask leaves to an image."""
    line = {"loss": loss, "gradient_norm": norm, "logit_scale": run.model.logit_scale()}
    for kind, (part, removed) in parts.items():
        n, pairs = len(removed), removed.sum(1) - removed.diagonal().long()
        line |= {
            f"loss_{kind}": part,
            f"removed_{kind}": pairs.sum().int(),  # false-negative pairs
            f"mean_negatives_{kind}": (n - 1 - pairs).float().mean(),
            f"rows_without_negatives_{kind}": (pairs == n - 1).sum(),
        }
    return {name: value.item() for name, value in line.items()}


@contextlib.contextmanager
def locked_log(args):
    """RUN/log.jsonl, open to append; as long as it is, no other program can have the run.

    In processes other than the first, which write nothing, None.
    """
    if rank() != 0:
        yield None
        return
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        data.refuse_no_file(out / "log.jsonl")
        log = open(out / "log.jsonl", "a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the run cannot be written into {out} ({error}); give another --out") from error
    with log:
        try:
            # Unlike flock's, not handed on to loading processes, which outlive a kill by seconds.
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(log.fileno()).st_nlink:  # the other has ended without a run just now
                raise BlockingIOError
        except (BlockingIOError, PermissionError) as error:
            way_out = "wait for its end, or give another --out"
            raise BadInput(f"another train.py is writing into {out}; {way_out}") from error
        except OSError:
            data.note(f"{out} is on a disk without locks; start no second train.py with this --out")
        if args.resume is None:
            refuse_a_run(out)  # that another program has ended since the options were read
        try:
            yield log
        finally:
            if not log.tell() and not (out / "last.pt").exists():  # it ended before there was a run
                (out / "log.jsonl").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    out.rmdir()


class Recorder:
    """What a run leaves in its folder, and its progress bar; the first process has it."""

    def __init__(self, run, optimizer, progress, patients, valid, steps, per_epoch, log):
        self.run, self.optimizer, self.progress, self.valid = run, optimizer, progress, valid
        self.per_epoch, self.out, self.finite, self.log = per_epoch, Path(run.args.out), True, log
        log.truncate(min(progress.log_size, log.seek(0, os.SEEK_END)))  # what came after the last save
        log.seek(0, os.SEEK_END)
        config = {**vars(run.args), "processes": processes(), "torch": torch.__version__}
        with data.replacing(self.out / "config.json") as file:
            file.write(json.dumps(config, indent=1) + "\n")
        with data.replacing(self.out / "patients.txt") as file:  # evaluate.py asks whom it has seen
            file.write("".join(f"{each}\n" for each in sorted(patients)))
        # disable=None: no bar where stderr is no terminal
        self.bar = tqdm(total=steps, initial=progress.step, unit="step", mininterval=1, disable=None)
        self.started = time.time() - progress.seconds
        if progress.step == 0:
            self.save()  # a full disk shows before the first step
        elif progress.step % per_epoch == 0 and progress.validated < progress.epoch:
            self.validate()

    def write(self, line):
        """One object into log.jsonl; NaN and infinity, which JSON lacks, become null."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    def save(self):
        """last.pt. At an epoch's end that is before its validation, so a resumed run validates again."""
        self.refuse_what_is_not_finite()
        os.fsync(self.log.fileno())
        self.progress.seconds, self.progress.log_size = time.time() - self.started, self.log.tell()
        moments = self.optimizer.state_dict()
        evaluate.save_checkpoint(self.out / "last.pt", self.run, vars(self.progress), optimizer=moments)

    def validate(self):
        """Scores the epoch and keeps it in best.pt if none was better."""
        progress, where = self.progress, {"step": self.progress.step, "epoch": self.progress.epoch}
        scores = evaluate.quick_scores(self.run, self.valid)
        self.run.model.train()
        self.write(where | scores)
        progress.validated, score = progress.epoch, sum(scores.values())
        if score >= progress.best:
            progress.best = score
            evaluate.save_checkpoint(self.out / "best.pt", self.run, where | scores)
        told = [f"{name} {value:.3f}" for name, value in scores.items()] or ["nothing to validate by"]
        self.bar.write(f"epoch {progress.epoch}: {', '.join(told)}")

    def refuse_what_is_not_finite(self):
        """Ends the run before it saves weights that a broken step has made."""
        if not self.finite:
            where = f"by step {self.progress.step}; {self.out}/last.pt is as it was saved before"
            raise BadInput(f"loss or gradient was not finite {where}; try a lower --lr, or --precision fp32")

    def record(self, step, lr, loss, norm, parts):
        """Takes in a step; logs, saves and validates when it is time."""
        progress, args = self.progress, self.run.args
        progress.step, progress.epoch = step, math.ceil(step / self.per_epoch)
        self.finite &= (loss + norm).isfinite()  # stays on the device: to look at it is to wait for the step
        self.bar.update()
        epoch_ends = step % self.per_epoch == 0
        if epoch_ends or step % args.log_every == 0:
            seconds = round(time.time() - self.started, 2)
            line = measures(self.run, loss, norm, parts)
            self.write({"step": step, "epoch": progress.epoch, "lr": lr, "seconds": seconds} | line)
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            self.refuse_what_is_not_finite()
        if epoch_ends or step % args.save_every == 0:
            self.save()
        if epoch_ends:
            self.validate()

    def close(self):
        self.bar.close()


def train(args):
    """Trains as the options say, see Recorder for what it leaves -> exit status, 128 + a signal's number."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = evaluate.resolve_machine(args)
    join_processes(device)
    print_once(f"commit {evaluate.commit()}, torch {torch.__version__}, {args.device}, {args.precision}")
    print_once(f"{args.threads} threads, {processes()} processes")
    with locked_log(args) as log:
        status = train_in(args, device, log)
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()
    return status


def train_in(args, device, log):
    """Trains in a folder that is this program's own, log: its log.jsonl -> exit status."""
    start = start_of(args)
    records, valid = load_splits(args)
    records = training_records(args, records)
    run, optimizer, progress = begin(args, records, valid, start)
    refuse_other_work(args, progress.records)
    print_once(f"{len(valid):,} images to validate, {len(run.findings)} findings")
    run.model.train()
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}  # tables alike; a copy less
    model = DistributedDataParallel(run.model, **options) if processes() > 1 else run.model
    per_epoch = steps_per_epoch(args.batch_size, records)
    steps, done, stop = args.epochs * per_epoch, progress.step, 0
    if done == steps and progress.validated == args.epochs:
        print_once(f"{args.out} is finished; another --out starts a new run")
        return 0
    warmup = math.ceil(args.warmup * steps)
    loader = training_loader(run, records, range(done, steps))
    note_cut_reports(run, records)
    patients = data.patient_hashes(records) | seen_before(args)
    recorder = Recorder(run, optimizer, progress, patients, valid, steps, per_epoch, log) if log else None
    print_once(f"{args.out}/config.json has all options")

    with signals_noted() as noted, contextlib.closing(recorder) if recorder else contextlib.nullcontext():
        for step, batch in enumerate(data.readable(loader), done + 1):
            stop = max(sum(from_all_ranks(noted), []), default=0)  # waits while the first process validates
            if stop:
                break
            lr, seed = lr_at(step - 1, steps, warmup, args.lr), seed_for(args.seed, "step", step, rank())
            result = training_step(run, data.to_device(batch, device), model, optimizer, lr, seed)
            if recorder:
                recorder.record(step, lr, *result)
        if recorder:
            recorder.save()

    if stop:
        where = f"after {progress.step} of {steps} steps"
        print_once(f"stopped by {STOP_SIGNALS[stop]} {where}; --resume {args.out} goes on from there")
    else:
        print_once(f"{progress.seconds / 60:.1f} minutes; the best epoch is in {Path(args.out, 'best.pt')}")
    return 128 + stop if stop else 0


def main(argv=None):
    return data.run_program("train.py", lambda: train(parse_args(argv)), "what was saved before is as it was")


if __name__ == "__main__":
    sys.exit(main())
