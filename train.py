"""Pre-trains UMCL, or one of its ablations.

    python train.py                                             phantoms, minutes on two cores
    python train.py --no-continuous-prompt                      one flag for each ablation
    python train.py --data medpix2=FOLDER --preset small        real images, small towers from scratch
    python train.py --data nih-chestxray14=FOLDER covid-chestxray=FOLDER
                                                                Swin-T and Bio_ClinicalBERT

A run leaves RUN/log.jsonl (one JSON object a line), RUN/last.pt and RUN/best.pt.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import data
import evaluate
import prompts
from data import BadInput
from umcl import (
    MAX_LOGIT_SCALE,
    UMCL,
    SwinTransformer,
    TextEncoder,
    contrastive_loss,
    label_mask,
    load_swin_weights,
)

SMALL_BERT = "small"  # --text-model: a BERT trained from scratch, with a vocabulary of its own

# fmt: off
PRESETS = {  # REPRODUCE.md compares the values of "paper" with those of the family; all are ours
    "small": dict(  # minutes on two cores, both towers from scratch: phantoms and small data sets
        image_size=64, patch_size=8, swin_dim=64, swin_depths=[2, 2], swin_heads=[2, 4], window_size=4,
        drop_path=0.0, text_model=SMALL_BERT, max_length=96, embed_dim=128,
        batch_size=32, epochs=10, lr=7e-4, weight_decay=0.05, workers=1,
    ),
    "paper": dict(  # Swin-T and Bio_ClinicalBERT
        image_size=224, patch_size=4, swin_dim=96, swin_depths=[2, 2, 6, 2], swin_heads=[3, 6, 12, 24],
        window_size=7, drop_path=0.1, text_model="emilyalsentzer/Bio_ClinicalBERT", max_length=128,
        embed_dim=512, batch_size=128, epochs=15, lr=5e-5, weight_decay=1e-4, workers=4,
    ),
}


def build_parser():
    on_off = argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description="Pre-train UMCL or one of its ablations.", allow_abbrev=False,
                                epilog="Options without a default here have one in the preset.")
    p.add_argument("--data", nargs="+", default=["phantom"], metavar="NAME[=ROOT]",
                   help=f"data sets to mix: {', '.join(data.DATASETS)}")
    p.add_argument("--limit", type=int, help="only the first N records of each data set (smoke runs)")
    p.add_argument("--views", nargs="+", choices=data.VIEWS, default=list(data.FRONTAL),
                   help="images to keep, where their data set says the view; default the frontal ones")
    p.add_argument("--uncertain", choices=data.UNCERTAIN, default="ignore",
                   help="what a labeler's -1 becomes: unknown, 0, 1, or each of the two by finding")
    p.add_argument("--hold-out", nargs="+", default=[], metavar="FILE",
                   help="lists of `data.py protocol`; the patients of their images are kept out")
    p.add_argument("--preset", choices=PRESETS, help="without it small for phantoms, paper for other data")
    p.add_argument("--out", help="folder of the run; default runs/umcl and the flags that differ")
    p.add_argument("--seed", type=int, default=0)

    a = p.add_argument_group("ablations")
    a.add_argument("--continuous-prompt", action=on_off, default=True, help="off: the template alone")
    a.add_argument("--prompt-length", type=int, default=32, help="paper: 16 and 64 are worse than in between")
    a.add_argument("--template", choices=prompts.TEMPLATES, default="caption", help="text around the finding")
    a.add_argument("--label-mask", action=on_off, default=True, help="off: same-label pairs are negatives")
    a.add_argument("--image-text", action=on_off, default=True, help="off: no report is read")
    a.add_argument("--image-label", action=on_off, default=True, help="off: no label prompt is made")
    a.add_argument("--prompt-weight", type=float, default=1.0, help="λ, of the label prompts' loss (ours)")

    m = p.add_argument_group("model")
    m.add_argument("--image-size", type=int, help="pixels a side; more helps fine findings and costs squared")
    m.add_argument("--patch-size", type=int, help="pixels a side of a patch; larger is faster and coarser")
    m.add_argument("--swin-dim", type=int, help="channels of the first stage")
    m.add_argument("--swin-depths", type=int, nargs="+", help="blocks of each stage")
    m.add_argument("--swin-heads", type=int, nargs="+", help="attention heads of each stage")
    m.add_argument("--window-size", type=int, help="must divide the side of each map that is larger")
    m.add_argument("--drop-path", type=float, help="stochastic depth; 0.1 to 0.2 for long runs")
    m.add_argument("--image-weights", metavar="FILE",
                   help="pre-trained Swin with torchvision's, Microsoft's, timm's or transformers' key names")
    m.add_argument("--text-model", metavar="NAME_OR_FOLDER",
                   help=f'a pre-trained BERT, or "{SMALL_BERT}" for a small one from scratch')
    m.add_argument("--max-length", type=int, help="word pieces of a text; what is longer is cut off")
    m.add_argument("--embed-dim", type=int, help="size of the shared space")

    t = p.add_argument_group("training")
    t.add_argument("--batch-size", type=int, help="images a step; all are each other's negatives")
    t.add_argument("--epochs", type=int)
    t.add_argument("--lr", type=float, help="peak; 7e-4 suits small towers from scratch, 5e-5 pre-trained")
    t.add_argument("--weight-decay", type=float, help="none on norms, biases, temperature, prompt")
    t.add_argument("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate")
    t.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    t.add_argument("--horizontal-flip", action=on_off, default=False, help='contradicts "left" in a report')
    t.add_argument("--skip-bad-images", action="store_true", help="count unreadable images and go on")

    e = p.add_argument_group("machine")
    e.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    e.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                   help="auto: bf16 autocast where the processor has units for it")
    e.add_argument("--workers", type=int, help="processes that read images; 0 for none")
    e.add_argument("--log-every", type=int, default=10, help="steps between two lines of log.jsonl")
    return p
# fmt: on


def parse_args(argv=None):
    """Command line -> Namespace with every option resolved, `out` among them."""
    parser = build_parser()
    first = parser.parse_args(argv)
    phantoms_only = all(spec.partition("=")[0] == "phantom" for spec in first.data)
    preset = first.preset or ("small" if phantoms_only else "paper")
    parser.set_defaults(preset=preset, **PRESETS[preset])
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = run_folder(parser, args)
    elif Path(args.out, "last.pt").exists():
        raise BadInput(f"{args.out} already holds a run; give another --out or move it away")
    args.held_out = [data.fingerprint(data.read_ids(file)) for file in args.hold_out]
    return args


def run_folder(parser, args):
    """runs/umcl and the flags that change the result, with a number behind it if that folder holds a run."""
    parts = ["umcl"]
    if args.data != parser.get_default("data"):
        parts += [spec.partition("=")[0] for spec in args.data]
    for name, value in vars(args).items():
        apart = name in ("data", "preset", "out", "device", "workers", "log_every")
        if apart or value == parser.get_default(name):
            continue
        flag = name.replace("_", "-")
        text = {True: flag, False: f"no-{flag}"}.get(value) if isinstance(value, bool) else f"{flag}-{value}"
        parts.append(re.sub(r"[^\w.]+", "-", text).strip("-"))
    folder = Path("runs", "-".join(parts))
    folders = [folder, *(Path(f"{folder}-{n}") for n in range(2, 1000))]
    return str(next(folder for folder in folders if not (folder / "last.pt").exists()))


# --------------------------------------------------------------------------------------------------- model


class Run(NamedTuple):
    """A model and what it needs to be used: all of it is in the checkpoint."""

    model: UMCL
    tokenizer: PreTrainedTokenizerFast
    findings: list
    args: argparse.Namespace

    @property
    def device(self):
        return self.model.log_scale.device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def prompt_tokens(self, texts):
        """Label prompts -> Tokens, cut so that the continuous prompt still fits into BERT's positions."""
        positions = self.model.text_encoder.bert.config.max_position_embeddings
        room = positions - (len(self.model.prompt.context) if self.model.prompt else 0)
        return data.tokenize(self.tokenizer, texts, min(self.args.max_length, room))


def learn_tokenizer(texts, size=2000):
    """A lower-case word-piece vocabulary learned from texts -> tokenizers.Tokenizer.

    The library's own word-piece trainer breaks ties at random, so two runs would differ. Its byte-pair
    trainer does not: it learns the pieces here, and those that do not start a word get BERT's "##".
    """
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.BertNormalizer(lowercase=True)
    start_words = pre_tokenizers.Metaspace(prepend_scheme="always")  # with "▁"
    learned.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), start_words])
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocabulary = learned.get_vocab()
    pieces = sorted(vocabulary.keys() - {"▁"}, key=vocabulary.get)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(piece for piece in pieces if len(piece) == 1)]
    names += [piece[1:] if piece.startswith("▁") else f"##{piece}" for piece in pieces]
    return BertWordPieceTokenizer({name: i for i, name in enumerate(dict.fromkeys(names))}, lowercase=True)


def wrap_tokenizer(tokenizer_json):
    """The text form that a checkpoint holds -> transformers tokenizer."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **special)


def load_text_model(name):
    """A pre-trained BERT by hub name or folder -> (BertModel without pooling layer, tokenizer)."""
    fault = "holds no BERT checkpoint with its tokenizer; save both there with save_pretrained"
    if not Path(name).is_dir():
        fault = (
            "is neither a folder nor reachable on the Hugging Face hub; where there is a connection, "
            f"`hf download {name} --local-dir FOLDER`, then --text-model FOLDER"
        )
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "bert":
            raise BadInput(f"the text model {name} is of the kind {kind!r}; only BERT is supported")
        tokenizer = AutoTokenizer.from_pretrained(name)
        bert, info = BertModel.from_pretrained(name, add_pooling_layer=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the text model {name} {fault} ({str(error).splitlines()[0]})") from error
    if info["missing_keys"]:
        raise BadInput(f"the text model {name} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    return bert, tokenizer


def build_text(args, texts):
    """The text tower's parts -> (BertModel, tokenizer). A small one learns its vocabulary from texts."""
    if args.text_model != SMALL_BERT:
        return load_text_model(args.text_model)
    tokenizer = wrap_tokenizer(learn_tokenizer(texts).to_str())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=args.max_length + args.prompt_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False), tokenizer


def build_model(args, bert):
    """The parts put together; what an ablation takes away is taken away here or in train -> UMCL."""
    try:
        swin = SwinTransformer(
            image_size=args.image_size,
            patch_size=args.patch_size,
            embed_dim=args.swin_dim,
            depths=args.swin_depths,
            num_heads=args.swin_heads,
            window_size=args.window_size,
            drop_path=args.drop_path,
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    # Without label prompts nothing would train the vectors, and random ones would only disturb zero-shot.
    with_prompt = args.continuous_prompt and args.image_label and args.prompt_length > 0
    prompt = prompts.ContinuousPrompt(args.prompt_length, bert.config.hidden_size) if with_prompt else None
    if with_prompt and bert.config.max_position_embeddings - args.prompt_length < 8:
        raise BadInput(
            f"--prompt-length {args.prompt_length} leaves no room for text: the text model has "
            f"{bert.config.max_position_embeddings} positions"
        )
    return UMCL(swin, TextEncoder(bert), prompt, embed_dim=args.embed_dim)


def load_image_weights(swin, file):
    """Puts pre-trained Swin weights from a .pt, .pth or .safetensors file into a SwinTransformer."""
    safetensors = file.endswith(".safetensors")
    try:
        weights = load_file(file) if safetensors else torch.load(file, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):  # Microsoft's files, and others, wrap the weights
            weights = weights.get(key, weights)
        load_swin_weights(swin, weights)
    except ValueError as error:
        raise BadInput(f"--image-weights {file}: {error}") from error
    except Exception as error:  # neither loader has one error for what it cannot read
        raise BadInput(f"--image-weights {file} cannot be read as weights ({error!r:.80})") from error


def save_checkpoint(path, run, progress):
    """Writes a whole file beside the old one, then puts it in its place; it holds tensors and plain data."""
    state = {
        "kind": "umcl",
        "model": run.model.state_dict(),
        "args": vars(run.args),
        "findings": run.findings,
        "tokenizer": run.tokenizer.backend_tokenizer.to_str(),
        "bert": run.model.text_encoder.bert.config.to_json_string(),
        "progress": progress,
    }
    temporary = Path(f"{path}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path, device="cpu"):
    """RUN/best.pt or RUN/last.pt -> Run in evaluation mode; no text model and no network is needed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"the checkpoint {path} is not there; `python train.py` makes one") from error
    except Exception as error:  # torch.load has no error of its own for what it cannot read
        raise BadInput(f"the checkpoint {path} is cut short or no checkpoint at all") from error
    if not isinstance(state, dict) or state.get("kind") != "umcl":
        raise BadInput(f"{path} is no checkpoint of this program")
    args = argparse.Namespace(**state["args"])
    # "_" marks the library's own state, by which older versions would choose another form of attention.
    fields = {name: value for name, value in json.loads(state["bert"]).items() if name[0] != "_"}
    bert = BertModel(BertConfig.from_dict(fields), add_pooling_layer=False)
    model = build_model(args, bert)
    model.load_state_dict(state["model"])
    return Run(model.to(device).eval(), wrap_tokenizer(state["tokenizer"]), state["findings"], args)


# ------------------------------------------------------------------------------------------------ training


def lr_at(step, steps, warmup, peak):
    """Learning rate of a step in 0 ... steps - 1: 1) a straight rise for `warmup` steps, 2) a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, weight_decay):
    """Decay for matrices; none for norms, biases, the temperature, the prompt and position bias tables."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        table = name.endswith(("relative_position_bias_table", "prompt.context"))
        (free if parameter.ndim < 2 or table else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def losses(run, batch, mask):
    """L(image, report) and L(image, label prompt) of a batch (REPRODUCE.md, the loss).

    Args:
        mask: label_mask, or without it a function that gives None.

    Returns:
        {"report" or "prompt": (() float loss, (N, N) bool pairs removed or None)}, those that the batch has.
    """
    model, found = run.model, {}
    scale = model.logit_scale()
    with run.autocast():
        image_features = model.encode_image(batch.images)
        if batch.reports:
            report_features = torch.cat([model.encode_text(*piece) for piece in batch.reports])
        if len(batch.prompt_rows):
            prompt_features = model.encode_prompt(*batch.prompts)[batch.prompt_index]
    if batch.reports:
        removed = mask(batch.report_labels, batch.report_labels, "equal")
        own_images = image_features[batch.report_rows]
        found["report"] = contrastive_loss(own_images, report_features, scale, removed), removed
    if len(batch.prompt_rows):
        possible = ~batch.absent[batch.prompt_rows]  # an unknown finding makes no negative for its prompt
        removed = mask(possible, batch.prompt_labels[batch.prompt_index], "subset")
        own_images = image_features[batch.prompt_rows]
        found["prompt"] = contrastive_loss(own_images, prompt_features, scale, removed), removed
    return found


def training_step(run, batch, optimizer, mask, lr):
    """One step, from a batch to new weights: L = L(image, report) + λ L(image, label prompt).

    Returns:
        loss and gradient norm, () float each, and the parts as losses gives them.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = losses(run, batch, mask)
    weight = {"report": 1.0, "prompt": run.args.prompt_weight}
    loss = sum(weight[name] * part for name, (part, _) in parts.items())
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip)
    optimizer.step()
    run.model.log_scale.data.clamp_(max=math.log(0.999 * MAX_LOGIT_SCALE))  # none flows at the bound
    return loss, norm, parts


def load_split(args, split):
    """Records of a split without the patients who are held out; says how many images that costs."""
    records = data.load_records(args.data, split, args.limit, views=args.views, uncertain=args.uncertain)
    data.check_images(records, args.image_size)
    if args.hold_out:
        listed = data.listed_records(args.data, [id for file in args.hold_out for id in data.read_ids(file)])
        kept = data.hold_out(records, listed)
        print(f"{split}: {len(records) - len(kept):,} of {len(records):,} images are of held-out patients")
        records = kept
    return records


def training_records(args):
    """The records that the chosen losses can use."""
    records = load_split(args, "train")
    if not args.image_text:
        records = [replace(record, report=None) for record in records]
    records = [r for r in records if r.report is not None or (args.image_label and r.findings)]
    if not records:
        raise BadInput("no training record is left: these data have no report or label that this run uses")
    return records


def measures(run, loss, norm, parts):
    """What a line of log.jsonl says of a step; `removed_...` counts the false-negative pairs masked out."""
    line = {"loss": loss.item(), "gradient_norm": norm.item(), "logit_scale": run.model.logit_scale().item()}
    for name, (part, removed) in parts.items():
        pairs = 0 if removed is None else int(removed.sum() - removed.diagonal().sum())
        line |= {f"loss_{name}": part.item(), f"removed_{name}": pairs}
    return line


def resolve_machine(args):
    """Fills in --device auto and --precision auto -> torch.device."""
    if args.device == "auto":
        found = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
        args.device = (found + ["cpu"])[0]
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    if args.precision == "auto":
        units = {  # torch has no public question for a processor's bf16 units in the oldest version supported
            "cuda": lambda: torch.cuda.is_bf16_supported(),
            "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        }.get(device.type, lambda: False)
        args.precision = "bf16" if units() else "fp32"
    return device


def training_loader(run, records):
    """Shuffled batches of records, alike for the same seed and number of workers -> DataLoader of Batch."""
    args, label_prompts = run.args, None
    if args.image_label and run.findings:
        label_prompts = run.prompt_tokens(
            [prompts.label_prompt(name, args.template) for name in run.findings]
        )
    return torch.utils.data.DataLoader(
        data.Images(records, data.training_transform(args.image_size, args.horizontal_flip)),
        args.batch_size,
        shuffle=True,
        drop_last=len(records) > args.batch_size,
        collate_fn=data.Collate(records, run.findings, label_prompts, run.tokenizer, args.max_length),
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        worker_init_fn=data.ignore_interrupts,
        pin_memory=run.device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed),
    )


def new_run(args, records):
    """An untrained model for these records, on its device -> Run."""
    findings = data.vocabulary(records)
    texts = [record.report for record in records if record.report is not None]
    texts += [text for each in prompts.prompt_set(findings, "ensemble").values() for text in each]
    bert, tokenizer = build_text(args, texts)
    model = build_model(args, bert)
    if args.image_weights:
        load_image_weights(model.image_encoder, args.image_weights)
    return Run(model.to(args.device), tokenizer, findings, args)


def train(args):
    """Trains as the options say; leaves log.jsonl, last.pt and best.pt in args.out.

    Returns:
        exit status, 130 where Ctrl-C ended it.
    """
    torch.manual_seed(args.seed)
    device = resolve_machine(args)
    print(json.dumps({**vars(args), "torch": torch.__version__}))
    records, valid = training_records(args), load_split(args, "valid")
    run = new_run(args, records)
    loader = training_loader(run, records)
    groups = parameter_groups(run.model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type != "mps")
    steps = args.epochs * len(loader)
    warmup = math.ceil(args.warmup * steps)
    mask = label_mask if args.label_mask else lambda *_: None

    reports, labelled = sum(r.report is not None for r in records), sum(bool(r.findings) for r in records)
    print(f"{len(records):,} images to train on, {reports:,} with a report and {labelled:,} with a label")
    print(f"{len(valid):,} to validate, {len(run.findings)} findings")
    for name, part in run.model.named_children():
        print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")

    out, step, best, unreadable, started = Path(args.out), 0, -1.0, 0, time.time()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w") as log, tqdm(total=steps, unit="step", mininterval=1) as bar:
        try:
            for epoch in range(1, args.epochs + 1):
                run.model.train()
                for batch in loader:
                    step += 1
                    bar.update()
                    unreadable += data.count_unreadable(batch, args.skip_bad_images)
                    if not len(batch.rows):
                        continue
                    lr = lr_at(step - 1, steps, warmup, args.lr)
                    loss, norm, parts = training_step(run, data.to_device(batch, device), optimizer, mask, lr)
                    if step % args.log_every and step % len(loader):
                        continue
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "lr": lr,
                        "seconds": round(time.time() - started, 2),
                    }
                    line |= measures(run, loss, norm, parts)
                    log.write(json.dumps(line) + "\n")
                    if not math.isfinite(line["loss"] + line["gradient_norm"]):
                        raise BadInput(f"loss or gradient is not finite at step {step}; {what_is_saved(out)}")
                    shown = {name: value for name, value in line.items() if name.startswith("removed")}
                    bar.set_postfix(loss=f"{line['loss']:.3f}", **shown, refresh=False)
                save_checkpoint(out / "last.pt", run, {"step": step, "epoch": epoch})
                scores = evaluate.quick_scores(run, valid)
                progress = {"step": step, "epoch": epoch, **scores}
                log.write(json.dumps(progress) + "\n")
                log.flush()
                bar.write(f"epoch {epoch}: {', '.join(f'{name} {v:.3f}' for name, v in scores.items())}")
                if sum(scores.values()) >= best:
                    best = sum(scores.values())
                    save_checkpoint(out / "best.pt", run, progress)
        except KeyboardInterrupt:
            save_checkpoint(out / "last.pt", run, {"step": step, "epoch": epoch})
            bar.close()
            print(f"stopped by Ctrl-C after {step} of {steps} steps; {out / 'last.pt'} has the weights")
            return 130
    if unreadable:
        print(f"images that could not be read were left out {unreadable} times")
    print(f"{(time.time() - started) / 60:.1f} minutes; the best epoch is in {out / 'best.pt'}")
    return 0


def what_is_saved(out):
    """What to say of a run that cannot go on."""
    saved = (
        f"{out / 'last.pt'} holds the last good epoch" if (out / "last.pt").exists() else "nothing is saved"
    )
    return f"{saved}; try a lower --lr, or --precision fp32"


def main(argv=None):
    try:
        return train(parse_args(argv))
    except (BadInput, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped by Ctrl-C before the first step", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
