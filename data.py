"""Data sets as records, and records as batches.

Name               Access                          What is read of it
phantom            drawn here from a seed          image, report, findings; no file, nothing clinical
chexpert           Stanford AIMI, registration     chest X-rays, 14 findings in four states
mimic-cxr          PhysioNet, credentialed         chest X-rays, reports, 14 findings in four states
rsna               Kaggle, competition rules       chest X-rays, pneumonia or none
covid-radiography  Kaggle, licence by source       chest X-rays, COVID-19 and three other classes
openi              NLM, free                       chest X-rays, reports, 12 findings from MeSH headings
nih-chestxray14    NIH, free with citation         chest X-rays, 14 findings or none
covid-chestxray    GitHub, licence by image        chest X-rays, clinical notes, kinds of pneumonia
medpix2            GitHub, free with citation      CT and MR images, captions, five places of the body
roco               GitHub, licence by image        figures of articles, captions, modality and region
folder             your own images                 a folder for each class
csv                your own table, or a pack       images and the columns that README.md lists

    python data.py summary --data chexpert=FOLDER           counts what is there and checks it
    python data.py protocol chexpert-5x200 --table FOLDER/train.csv --out ids.txt
    python data.py pack --data chexpert=FOLDER --out PACK   shrinks all images; then --data csv=PACK

A labeler gives each finding one of four states: present (1), absent (0), uncertain (-1), or not mentioned
(blank). Readers keep all four. `settle` maps them to three: present, absent, unknown. "No Finding" is a
finding, too; it rules out all others but "Support Devices".
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # see train.py
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import csv
import errno
import gzip
import hashlib
import json
import re
import resource
import shutil
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import chain, islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

# Waiting threads spin so often, then sleep; libgomp's 300,000 is slower on a crowded machine (REPRODUCE.md).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
import torch
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {  # as they are called elsewhere
    **dict(zip(SPLITS, SPLITS, strict=True)), "training": "train", "testing": "test",
    **dict.fromkeys(("validate", "validation", "val", "dev"), "valid"),
}  # fmt: skip
VIEWS = ("PA", "AP", "FRONTAL", "LATERAL", "UNKNOWN")
FRONTAL = ("PA", "AP", "FRONTAL")
STATES = (1, 0, -1, None)  # of a finding: present, absent, uncertain, not mentioned
UNCERTAIN = ("ignore", "zeros", "ones", "competition")
NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"
NON_DISEASES = frozenset({NO_FINDING, SUPPORT_DEVICES})
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT = (
    NO_FINDING, "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip


class BadInput(Exception):
    """What the user gave cannot be used; the message is one sentence with the way out."""


class Lacking(BadInput):
    """The data have nothing of what is asked for."""


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and what its source says about it."""

    image: Path | np.ndarray  # path of the file, or the grey image itself as (H, W) uint8
    report: str | None  # text about the whole image
    labels: dict  # {finding: one of STATES}, after `settle` 1 or 0; others are unknown; records may share it
    patient: str  # of its source; no patient is in two splits
    source: str  # name of the data set
    id: str = ""  # the image's name in lists of protocols
    view: str = ""  # one of VIEWS, or "" where the source never says it


# -------------------------------------------------------------------------------------------------- labels


PARENTS = {  # of the tree of CheXpert's labels (Irvin et al. 2019): who has a finding has its parents
    "Cardiomegaly": {"Enlarged Cardiomediastinum"}, "Pneumonia": {"Consolidation", "Lung Opacity"},
    **dict.fromkeys(("Atelectasis", "Consolidation", "Edema", "Lung Lesion"), {"Lung Opacity"}),
}  # fmt: skip


def settle(record, policy):
    """Maps the four states of a record's findings to three by a policy for uncertain ones (--uncertain).

    in the table                 ignore   zeros    ones     competition
    1                            present  present  present  present
    0                            absent   absent   absent   absent
    -1                           unknown  absent   present  present: atelectasis, edema, effusion; else absent
    blank, beside a present one  absent   absent   absent   absent
    a blank parent of that one   unknown  unknown  unknown  unknown
    blank, nothing present       unknown  unknown  unknown  unknown

    "zeros" is MedCLIP's policy, "competition" is GLoRIA's, "ignore" is ours: the loss and the metrics skip
    what is unknown. A device counts as nothing present: whoever names a tube alone has not said that the
    lungs are clear (ours). A blank parent (see PARENTS) of what may be present is unknown: no negative, and
    no positive that no labeler gave (ours). An image without findings is not normal; its source has to say
    "No Finding".
    """
    return replace(record, labels=settled(tuple(record.labels.items()), policy))


@cache  # a data set has few different label sets
def settled(labels, policy):
    """Record.labels.items() as a tuple -> {finding: 1 or 0}, see `settle`."""
    if policy != "ignore":
        some = {"competition": {"Atelectasis", "Edema", "Pleural Effusion"}, "ones": dict(labels)}
        positive = some.get(policy, ())
        labels = [(name, int(name in positive) if value == -1 else value) for name, value in labels]
    parents = set().union(*(PARENTS.get(name, ()) for name, value in labels if value in (1, -1)))
    if any(value == 1 and name != SUPPORT_DEVICES for name, value in labels):
        labels = [(name, 0 if value is None and name not in parents else value) for name, value in labels]
    return {name: value for name, value in labels if value in (1, 0)}


def present(record):
    """The findings that an image has -> set of names."""
    return {name for name, value in record.labels.items() if value == 1}


def absent(record):
    """The findings that are ruled out by label -> set of names."""
    return {name for name, value in record.labels.items() if value == 0}


@cache
def known(labels, findings):
    """What settled labels say of these findings, by themselves and by implication -> {finding: 1 or 0}.

    "No Finding" rules out all others but devices; any of those others rules out "No Finding".
    """
    present = {name for name, value in labels if value == 1}
    implied = {}
    if NO_FINDING in present:
        implied = dict.fromkeys(sorted(findings - NON_DISEASES), 0)
    elif present - NON_DISEASES:
        implied = {NO_FINDING: 0}
    return {name: value for name, value in (implied | dict(labels)).items() if name in findings}


def restricted(records, findings):
    """The records with what is known of these findings alone, including what other findings imply."""
    return [replace(r, labels=known(tuple(r.labels.items()), findings)) for r in records]


def plain(name):
    """A name without case, blanks and underscores; names that are then alike mean one thing."""
    return re.sub(r"[\s_]+", "", name).casefold()


def spellings(names):
    """Names of findings -> {name: its spelling here}: CheXpert's, else the first of those that are alike."""
    spelling = {plain(name): name for name in (*sorted(names, reverse=True), *CHEXPERT)}
    return {name: spelling[plain(name)] for name in names}


def vocabulary(records):
    """The findings that are present in at least one record -> sorted list of str."""
    return sorted(set().union(*map(present, records)))


def label_matrices(records, findings):
    """What is known of each finding in each settled record -> present, absent: two (N, C) bool tensors.

    findings: C names, the columns; others are left out. A finding is unknown where both are False.
    """
    kinds = {}  # few different label sets, many records
    kind = [kinds.setdefault(tuple(record.labels.items()), len(kinds)) for record in records]
    told = [known(labels, frozenset(findings)) for labels in kinds]
    cells = torch.tensor([[each.get(name, -1) for name in findings] for each in told], dtype=torch.int8)
    cells = cells.view(len(kinds), len(findings))[kind]
    return cells == 1, cells == 0


def patient_hashes(records):
    """Patients of the records -> set of str, 16 digits that tell one from another and do not name it."""
    known = {(record.source, record.patient) for record in records}
    return {hashlib.sha256("\t".join(each).encode("utf-8", "replace")).hexdigest()[:16] for each in known}


def hold_out(records, listed):
    """Drops every record of a patient who has a listed image."""
    patients = {(record.source, record.patient) for record in listed}
    return [record for record in records if (record.source, record.patient) not in patients]


# -------------------------------------------------------------------------------------------------- images

MEAN, STD = 0.5, 0.25  # of grey values in 0 ... 1 (ours)
SIDE = 4096  # longer images are shrunk to it
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PHOTOMETRIC, WHITE_IS_ZERO, SAMPLE_FORMAT = 262, 0, 339  # tags of TIFF


COLOURED = 12  # of 255: mean difference of the brightest and the darkest channel; tinted films have less
MODES = {1: "L", 3: "RGB"}  # Pillow's name for so many channels


def read_image(image, channels=1, about=None):
    """The image of a Record -> Pillow image of mode "L", or of mode "RGB" for 3 channels, upright.

    about: pixels a side that are enough; a JPEG is then read at some size above, which is faster.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert(MODES[channels])
    name = str(image).replace("\0", "\\0")
    try:
        if os.path.exists(image) and not os.path.isfile(image):
            raise ValueError("no regular file")
        # Of a path Pillow maps the file into memory, and scrambles a TIFF that has to be turned.
        with open(image, "rb") as opened, Image.open(opened, formats=("PNG", "JPEG", "TIFF", "BMP")) as file:
            if about:
                file.draft(MODES[channels], (about, about))
            return upright(file, channels)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        why = getattr(error, "strerror", None) or re.sub(r" <_io\.\w+ .*>", "", str(error))
        raise BadInput(f"the image {name} cannot be read ({' '.join(why.split())})") from error


def upright(image, channels=1):
    """Any Pillow image -> what read_image gives; a BadInput where its greys or colours cannot be told."""
    unclear = what_is_unclear(image)
    if unclear:
        raise BadInput(unclear)
    turned, tags = ImageOps.exif_transpose(image), getattr(image, "tag_v2", {})
    if not image.mode.startswith("I"):
        return turned.convert(MODES[channels])
    values = np.asarray(turned)  # greys of 10 to 32 bits, which Pillow would clip at 255
    if values.dtype == np.int32 and tags.get(SAMPLE_FORMAT) == (1,):
        values = values.view(np.uint32)
    # A few bright pixels, or dead ones, must not set the exposure. Hounsfield units are negative.
    few = min(values.size // 1000 + 1, (values.size - 1) // 2)
    low, high = map(float, np.partition(values, (few, -1 - few), axis=None)[[few, -1 - few]])
    black = min(0, low)
    values = ((values.astype(np.float32) - black) * (255 / max(255, high - black))).clip(0, 255)
    values = 255 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
    return Image.fromarray(values.round().astype(np.uint8)).convert(MODES[channels])


def what_is_unclear(image):
    """Why the greys of a Pillow image cannot be told -> a sentence with the way out, or None."""
    deep = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)  # known until its pixels are read
    if image.format in ("PNG", "TIFF") and image.n_frames > 1:
        return f"it has {image.n_frames} pages; save the page that is meant as a file of its own"
    if image.mode == "F":
        return "its greys are floating-point numbers with no white level; save it with 8 or 16 bits"
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT) == (2,):
        return "its greys are signed numbers of 8 bits; save it with 8 bits without a sign, or with 16"
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        *colours, alpha = image.convert("RGBA").getextrema()
        if alpha[0] < alpha[1] and all(low == high for low, high in colours):
            return "its picture is in the alpha channel alone; save it without transparency"
    if deep and len(image.getbands()) > 1:  # Pillow keeps the upper 8 of the 16 bits
        upper = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
        if np.percentile(upper, 99.9, method="lower") < 128:
            return "it has less than 16 bits in 16-bit colour; save it as grey with 16 bits, or with 8 bits"


def pad_to_square(image):
    """Pillow image -> (channels, S, S) uint8 tensor, black on both sides of the shorter dimension."""
    side = min(max(image.size), SIDE)  # a long strip would fill the memory
    pixels = torch.from_numpy(np.array(ImageOps.pad(image, (side, side))))
    return pixels.view(side, side, -1).permute(2, 0, 1).contiguous()


def to_pillow(pixels):
    """(channels, H, W) uint8 tensor -> Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def normalise(images):
    """(B, channels, S, S) uint8 -> float with a mean of about 0 and a deviation of about 1, for the tower."""
    return (images.float() / 255 - MEAN) / STD


def evaluation_transform(size):
    """Pillow image -> (channels, size, size) uint8 tensor."""
    from torchvision.transforms import v2  # seconds to import, which --help and summary need not wait for

    return v2.Compose([pad_to_square, v2.Resize((size, size), antialias=True)])


def training_transform(size, horizontal_flip=False):
    """The same with random crop, rotation, shift, brightness and contrast (MedCLIP's kinds, milder).

    horizontal_flip: mirrors half of the images; that moves the heart to the right and contradicts "left".
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            pad_to_square,
            v2.RandomResizedCrop((size, size), scale=(0.75, 1.0), ratio=(0.9, 1.1), antialias=True),
            v2.RandomAffine(degrees=8, translate=(0.05, 0.05), interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.RandomHorizontalFlip(0.5 if horizontal_flip else 0.0),
        ]
    )


def image_files(root, folders=None):
    """Yields the paths of all image files below root, or of those in the first so many folders."""
    seen = set()
    for folder, below, names in islice(os.walk(root, followlinks=True), folders):
        if (place := os.path.realpath(folder)) in seen:  # links are followed, and this one leads back
            below.clear()
            continue
        seen.add(place)
        paths = (Path(folder, name) for name in names if name[0] != ".")  # ._ of macOS
        yield from (path for path in paths if path.suffix.lower() in ENDINGS)


def check_images(records, image_size, channels=1):
    """Refuses a data set of which images are missing; notes what is odd about its first ones.

    image_size: pixels a side of the model's images; 0 takes a data set with missing images, as pack does.
    channels: of the model, or of the pack.
    """
    for source in dict.fromkeys(record.source for record in records):
        paths = [r.image for r in records if r.source == source and isinstance(r.image, Path)]
        missing = [path for path in paths if not os.path.exists(path)]
        first = str(*missing[:1]).replace("\0", "\\0")
        if missing and len(missing) == len(paths):
            folder = next(parent for parent in paths[0].parents if os.path.isdir(parent))
            raise BadInput(
                f"none of the images of {source} is where its table says: {first} is not there, and what "
                f"{folder} holds is {next(image_files(folder, 1000), 'no image')}"
            )
        if missing and image_size:
            raise BadInput(
                f"{len(missing):,} of the {len(paths):,} images of {source} are missing, the first is "
                f"{first}; get them again, or leave them out by `python data.py pack`"
            )
        for path in paths[:3]:
            with suppress(BadInput):
                note_oddities(path, read_image(path, 3), image_size, channels)


def note_oddities(path, image, image_size, channels):
    """Notes an image in RGB that is smaller than the model's, loses its colours, or shows next to nothing."""
    if max(image.size) < image_size:
        note(f"{path} has {max(image.size)} pixels a side, the model takes {image_size} and will blur it")
    if channels == 1 and np.ptp(image.resize((64, 64)), axis=2).mean() > COLOURED:
        note(f"{path} is in colour and is read as grey; --channels 3 keeps colours")
    greys = np.flatnonzero(np.array(image.convert("L").histogram()) > image.width * image.height / 1000)
    if greys[-1] - greys[0] < 256 / 10:
        note(f"{path} has greys from {greys[0]} to {greys[-1]} of 255: next to nothing can be seen on it")


class Images(torch.utils.data.Dataset):
    """Records as (place in the list, (channels, S, S) uint8 tensor); an unreadable image is a BadInput."""

    def __init__(self, records, transform, channels=1):
        self.records = records
        self.transform = transform
        self.channels = channels

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return i, self.transform(read_image(self.records[i].image, self.channels))


# ------------------------------------------------------------------------------------------------- batches


class Tokens(NamedTuple):
    """input_ids, attention_mask: (B, L) int64 each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Pairs(NamedTuple):
    """N images of a batch, each with a text of its own."""

    images: torch.Tensor  # (N,) int64, rows of the batch's images
    texts: torch.Tensor  # (N,) int64, rows of its reports, or of its distinct prompts
    text_ids: torch.Tensor  # (N,) int64, alike where two texts are equal; of prompts the finding they name


class Batch(NamedTuple):
    """The input of one training step: B images, R reports, P distinct label prompts, their pairs."""

    rows: torch.Tensor  # (B,) int64, the places of these records in their list
    images: torch.Tensor  # (B, channels, S, S) uint8, a quarter of a float's bytes on the way to the device
    image_ids: torch.Tensor  # (B,) int64, alike where two records have the same image
    present: torch.Tensor  # (B, C) bool
    absent: torch.Tensor  # (B, C) bool
    diseases: torch.Tensor  # (C,) bool, which findings are diseases
    reports: list  # of Tokens, R rows in all, sorted by length; each piece is padded to its longest
    prompts: Tokens  # P rows, the distinct prompts drawn in this batch; None where none are trained
    report_pairs: Pairs  # R
    prompt_pairs: Pairs  # Q, one for each labelled image


def tokenize(tokenizer, texts, max_length):
    """Texts -> Tokens, padded to the longest and cut to max_length tokens, [CLS] and [SEP] included."""
    padding = {"padding": True, "return_tensors": "pt", "return_attention_mask": True}
    tokens = tokenizer(texts, truncation=True, max_length=max_length, **padding)
    return Tokens(tokens["input_ids"], tokens["attention_mask"])


def in_pieces(tokens, pieces):
    """Tokens -> (order, [Tokens, ...]): sorted by length and cut into pieces as wide as their longest row."""
    lengths = tokens.attention_mask.sum(1)
    order = lengths.argsort(stable=True)
    cut = [Tokens(*(t[rows, : int(lengths[rows].max())] for t in tokens)) for rows in order.chunk(pieces)]
    return order, cut


def numbered(names):
    """Names -> (N,) int64, one number for each different name, in order of appearance."""
    number = {}
    return torch.tensor([number.setdefault(name, len(number)) for name in names], dtype=torch.long)


class Collate:
    """Makes a Batch of what Images gives; each labelled image draws one of its findings as its prompt.

    records: the same list as that of Images. findings: C names. prompts: Tokens of C label prompts, in the
    order of findings; None draws none. tokenizer, max_length: for the reports. pieces: number of pieces into
    which the reports of a batch are cut.
    """

    def __init__(self, records, findings, prompts, tokenizer, max_length, pieces=4):
        self.records = records
        self.present, self.absent = label_matrices(records, findings)
        self.report_ids = numbered(r.report and " ".join(r.report.lower().split()) for r in records)
        self.image_ids = numbered(r.image if isinstance(r.image, Path) else id(r.image) for r in records)
        self.diseases = torch.tensor([name not in NON_DISEASES for name in findings], dtype=torch.bool)
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pieces = pieces

    def __call__(self, items):
        rows = torch.tensor([row for row, _ in items], dtype=torch.long)  # of a process without a share: none
        present = self.present[rows]

        texts = [self.records[row].report for row in rows.tolist()]
        report_rows = torch.tensor([i for i, text in enumerate(texts) if text is not None], dtype=torch.long)
        reports = []
        if len(report_rows):
            tokens = tokenize(self.tokenizer, [text for text in texts if text is not None], self.max_length)
            order, reports = in_pieces(tokens, self.pieces)
            report_rows = report_rows[order]

        every_report = torch.arange(len(report_rows))
        prompt_rows = present.any(1).nonzero()[:, 0] if self.prompts else torch.zeros(0, dtype=torch.long)
        # An image's draw depends on this number and on the image, not on the others in its batch.
        seed = int(torch.randint(2**31, ()))
        drawn = [
            np.random.default_rng((seed, row)).choice(np.flatnonzero(labels))
            for row, labels in zip(rows[prompt_rows].tolist(), present[prompt_rows].numpy(), strict=True)
        ]
        drawn = torch.tensor(drawn, dtype=torch.long)
        distinct, prompt_index = drawn.unique(return_inverse=True)
        return Batch(
            rows=rows,
            images=torch.stack([image for _, image in items]) if items else torch.zeros(0, 1, 1, 1),
            image_ids=self.image_ids[rows],
            present=present,
            absent=self.absent[rows],
            diseases=self.diseases,
            reports=reports,
            prompts=Tokens(*(t[distinct] for t in self.prompts)) if self.prompts else None,
            report_pairs=Pairs(report_rows, every_report, self.report_ids[rows][report_rows]),
            prompt_pairs=Pairs(prompt_rows, prompt_index, drawn),
        )


PATIENCE = 300  # seconds for one batch


def ignore_signals(_worker):
    """For loading processes: the main process alone answers Ctrl-C and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def check_machine(workers, batch_bytes):
    """Refuses more loading processes than shared memory and open files suffice for."""
    ahead = 2 * workers  # batches that torch's DataLoader keeps ready; one more is being used, one is made
    with suppress(OSError):  # Linux alone has the folder
        needed = (ahead + 2) * (batch_bytes + 2**17)  # and labels and tokens, small, but whole pages each
        free = shutil.disk_usage("/dev/shm").free
        if free < needed:
            raise BadInput(
                f"/dev/shm has {free / 1e6:,.1f} MB free, and {workers} loading processes need about "
                f"{needed / 1e6:,.1f}; take --workers 0, or enlarge it (docker run --shm-size=2g)"
            )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says "unlimited" and does not mean it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = 100 + 25 * ahead  # each tensor of a batch is an open file on its way
    if batch_bytes and 0 <= hard < needed:
        raise BadInput(
            f"at most {hard:,} files may be open here, and {workers} loading processes need about "
            f"{needed:,}; take fewer --workers, or raise the bound (ulimit -n {needed})"
        )


def loader(items, workers, batch_bytes=0, **options):
    """DataLoader whose processes leave signals to the main one; a batch that takes too long is an error.

    batch_bytes: of the images of a batch, which get from process to process through shared memory.
    """
    if workers:
        check_machine(workers, batch_bytes)
    options |= {"num_workers": workers, "worker_init_fn": ignore_signals}
    return torch.utils.data.DataLoader(items, timeout=PATIENCE if workers else 0, **options)


def readable(loader):
    """The batches of a loader; whoever stops early, or is stopped, leaves no loading process behind."""
    batches = iter(loader)
    try:
        yield from batches
    except BaseException as error:
        end_workers(batches)
        if isinstance(error, BadInput):  # of a loading process it is a traceback, with the sentence last
            sentence = str(error).strip().rpartition("BadInput: ")[2]
            raise BadInput(f"{sentence}; repair it, or leave it out by `python data.py pack`") from None
        if "timed out" in str(error):
            way_out = "copy the images to a faster disk, or shrink them once by `python data.py pack`"
            raise BadInput(
                f"reading images stopped: one batch took more than {PATIENCE} seconds; {way_out}"
            ) from error
        if "ancdata" in str(error) or getattr(error, "errno", None) == errno.EMFILE:
            way_out = "take fewer --workers, or raise the bound (ulimit -n)"
            raise BadInput(f"reading images stopped: too many open files; {way_out}") from error
        # OSError, EOFError: a loading process ended while it handed a batch over.
        if isinstance(error, (OSError, EOFError)) or str(error).startswith("DataLoader"):
            way_out = "the memory or the disk may be the reason; try fewer --workers"
            raise BadInput(f"reading images stopped ({error}); {way_out}") from error
        raise


def end_workers(batches):
    """Kills the loading processes of an iterator: they ignore SIGTERM, and one that is stuck never ends."""
    handler = signal.getsignal(signal.SIGCHLD)
    with suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report killed workers as a crash
    for worker in getattr(batches, "_workers", ()):
        worker.kill()
        worker.join(1)
    with suppress(ValueError):
        signal.signal(signal.SIGCHLD, handler)


def to_device(batch, device):
    """A Batch, or anything in it, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        return type(batch)(*(to_device(item, device) for item in batch))
    return [to_device(item, device) for item in batch] if isinstance(batch, list) else batch


# ==========================================================================================================
# If you read this beside the paper, you can stop here. The rest draws phantoms and reads real data sets.
# ==========================================================================================================

# ------------------------------------------------------------------------------------------------- phantoms
#
# Drawn chest radiographs with known findings, and the reports that describe them. A radiograph adds up what
# the rays meet, so a phantom does too: brightness is 1 - exp(-attenuation). Tissue attenuates, bone adds to
# it, air does not; a finding takes the place of air. The shapes are not clinical: they have to be told apart
# by the signs that a radiologist looks for, and no more.
#
# Anatomy is drawn in the patient's frame: x and y from -1 to 1, y downwards, x to the right of the image,
# which is the patient's left. `out` = |x| is the distance from the midline, so one formula draws both lungs.

PHANTOM_FINDINGS = COMPETITION

# How hard the phantoms are.
TRACE = 0.08  # a healthy chest is not blank: each absent finding is drawn at a strength of up to this
NOISE = 0.03  # standard deviation of the film grain, white being 1
DEVICES = 0.3  # share of patients with a tube, a pacemaker or leads
LEFT_OUT = 0.05  # share of the drawn findings that reports omit

# Each patient's own strength is within 0.1 of these, so TRACE above 0.2 makes some mild cases undecidable.
STRENGTH = {"mild": 0.3, "moderate": 0.6, "severe": 0.9}
BOTH = ("left", "right", "bilateral")
SIDES = dict(zip(PHANTOM_FINDINGS, (BOTH, ("",), ("left", "right"), ("bilateral",), BOTH), strict=True))
ZONES = {"upper": -0.42, "middle": -0.1, "lower": 0.22}  # y of the middle of each third of a lung
DEVICE_NAMES = ("endotracheal tube", "pacemaker", "leads")


class Drawn(NamedTuple):
    """One thing in the image, in the words that its report may use."""

    severity: str  # mild, moderate or severe; "" for a device
    side: str  # the patient's left or right, bilateral, or ""
    place: str  # upper, middle or lower for a consolidation, the name of a device, else ""


def pick(rng, options):
    return options[rng.integers(len(options))]


def soft(distance, edge=0.02):
    """1 inside (distance > 0), 0 outside, a smooth edge between: small images get no stairs."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * edge))


def ridge(distance, width):
    return np.exp(-((distance / width) ** 2))


@lru_cache
def grids(size):
    """Pixel centres x and y, (size, size) from -1 to 1, and the (size, 12) bumps that clouds are made of."""
    ticks = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    bumps = ridge(ticks[:, None] - np.linspace(-1, 1, 12, dtype=np.float32), 0.15)
    return *np.meshgrid(ticks, ticks), bumps


def clouds(rng, size):
    """(size, size) smooth random texture, mean 0 and standard deviation about 1."""
    bumps = grids(size)[2]
    return bumps @ rng.standard_normal((12, 12), dtype=np.float32) @ bumps.T


def place_patient(rng, size, heart_ratio, lift):
    """One patient's build: maps (size, size) of coordinates and of organs from 0 to 1, and a few lengths.

    heart_ratio: width of the heart over that of the chest; above 0.5 it is enlarged.
    lift: how far lost volume pulls up the diaphragm, {"left": length, "right": length}.
    """

    def vary(mean, spread):
        return mean + spread * rng.uniform(-1, 1)

    x, y, _ = grids(size)
    turn, zoom = vary(0, 0.08), vary(1, 0.07)
    cos, sin = np.cos(turn).item() / zoom, np.sin(turn).item() / zoom
    x, y = cos * x + sin * y + vary(0, 0.06), cos * y - sin * x + vary(0, 0.06)
    out, left = np.abs(x), (x > 0).astype(np.float32)

    # A lung: upright walls, a rounded apex and, below, a dome that the liver lifts on the right.
    chest, breath = vary(0.76, 0.05), vary(0.36, 0.08)
    half = (chest - 0.08) / 2
    across = (out - 0.08 - half) / half  # -1 at the mediastinum, 1 at the chest wall
    above = np.minimum(y + 0.05, 0) / vary(0.76, 0.05)
    floor = breath + left * (vary(0.07, 0.03) - lift["left"]) + (1 - left) * (vary(0, 0.03) - lift["right"])
    dome = floor + 0.25 * np.where(across > 0, across, 0.4 * across) ** 2  # steep only towards the chest wall
    lung = soft(half * (1 - np.hypot(across, above)), 0.03) * soft(dome - y)

    # A third of the heart lies right of the midline, two thirds left, and its axis leans.
    wide, tall = heart_ratio * chest, vary(0.27, 0.03) + 0.3 * (heart_ratio - 0.45)
    down = y - (breath + 0.15 - tall)
    lean = (x - vary(0.32, 0.03) * wide - 0.35 * down) / (wide**2 - (0.35 * tall) ** 2) ** 0.5
    heart = soft(tall * (1 - np.hypot(lean, down / tall)))

    aorta = soft(0.09 - np.hypot(x - 0.1, y + 0.36))
    middle = np.maximum(soft(vary(0.13, 0.02) - out + 0.1 * np.maximum(-0.5 - y, 0)), aorta)

    # Vessels leave each hilum like spokes, bending and thinning on the way.
    hilum_x, hilum_y = out - 0.17, y + 0.04 + 0.05 * left
    from_hilum = np.hypot(hilum_x, hilum_y)
    angle = np.arctan2(hilum_y, hilum_x)
    vessels = ridge(np.sin(5 * angle + 5 * from_hilum + vary(0, 3) + left), 0.35 + 0.02 / (from_hilum + 0.1))
    return SimpleNamespace(
        size=size, x=x, y=y, out=out, left=left, chest=chest, half=half, across=across, floor=floor,
        lung=lung, heart=heart, middle=middle, from_hilum=from_hilum, vessels=vessels,
    )  # fmt: skip


def effusion(rng, p, strength, zone):
    """Fluid that levels out the angle between diaphragm and chest wall, and climbs the wall in a meniscus."""
    height = 0.05 + 0.8 * strength
    return 0.9 * soft(p.y - (p.floor + 0.25) + height * (0.75 + 0.25 * p.across * np.abs(p.across)), 0.035)


def consolidation(rng, p, strength, zone):
    """A patch with an irregular, cloudy outline in one zone of a lung."""
    radius = 0.1 + 0.2 * strength
    x, y = 0.08 + p.half * rng.uniform(0.8, 1.4), ZONES[zone] + rng.uniform(-0.06, 0.06)
    outline = 1 - np.hypot(p.out - x, 0.8 * (p.y - y)) / radius + 0.35 * clouds(rng, p.size)
    return np.tanh(2 * strength) * soft(outline, 0.2)


def edema(rng, p, strength, zone):
    """Haze like the wings of a bat around both hila, swollen vessels, and septal lines at the chest wall."""
    haze = 0.7 * ridge(p.from_hilum, 0.3 + 0.2 * strength) * (1 + 0.25 * clouds(rng, p.size))
    swollen = p.vessels * ridge(p.from_hilum, 0.35 + 0.3 * strength)
    septal = ridge(np.sin(40 * p.y), 0.5) * soft(p.across - 0.55, 0.05) * soft(p.y, 0.05)
    return strength * (haze + 0.4 * swollen + 0.3 * septal)


def atelectasis(rng, p, strength, zone):
    """Plates of collapsed lung above the diaphragm, which is drawn up (see `lift`)."""
    plates = 0
    for _ in range(1 + round(2 * strength)):
        y = p.floor - rng.uniform(0.02, 0.3) + rng.uniform(-0.4, 0.4) * p.half * p.across
        ends = soft(rng.uniform(0.5, 0.8) - np.abs(p.across - rng.uniform(-0.2, 0.4)), 0.08)
        plates = np.maximum(plates, ridge(p.y - y, 0.02 + 0.03 * strength) * ends)
    return np.tanh(2 * strength) * plates


SHADOWS = {
    "Atelectasis": atelectasis, "Consolidation": consolidation, "Edema": edema, "Pleural Effusion": effusion,
}  # fmt: skip


def bones(rng, p):
    """Attenuation of the spine, the ribs and the clavicles."""
    spine = soft(0.08 - p.out) * (0.4 + 0.1 * np.cos(2 * np.pi * p.y / 0.13))
    cage = soft(p.chest + 0.03 - p.out) * soft(p.out - 0.1, 0.04) * soft(0.75 - p.y, 0.1)
    first = rng.uniform(0, 1)
    behind = soft(np.cos(2 * np.pi * (first + (p.y - 0.1 * p.out - 0.45 * p.out**2) / 0.19)) - 0.3, 0.2)
    before = soft(np.cos(2 * np.pi * (first + (p.y + 0.5 * p.out) / 0.21)) - 0.5, 0.2) * soft(p.across, 0.2)
    collar = p.y + 0.62 + 0.22 * p.out - 0.05 * np.sin(7 * p.out)
    clavicles = soft(0.03 - np.abs(collar), 0.012) * soft(p.out - 0.1) * soft(0.85 - p.out)
    return spine + cage * (0.16 * behind + 0.07 * before) + 0.25 * clavicles


def device(p, name):
    """Attenuation of a device: a distraction, as it goes with no finding."""
    if name == "endotracheal tube":
        return 0.8 * ridge(p.x - 0.02, 0.025) * soft(-0.3 - p.y)
    if name == "pacemaker":
        lead = ridge(p.x - 0.1 - 0.45 * np.cos(2.2 * (p.y + 0.5)), 0.02) * soft(0.3 - np.abs(p.y + 0.15))
        return 1.5 * soft(0.11 - np.maximum(np.abs(p.x - 0.55), np.abs(p.y + 0.52))) + lead
    wires = ridge(p.out - 0.5 + 0.25 * np.sin(2.5 * p.y + 0.8), 0.018) * soft(0.5 - np.abs(p.y))
    return 0.5 * wires + 1.2 * soft(0.045 - np.hypot(p.out - 0.6, np.abs(p.y) - 0.5))


def draw_phantom(rng, findings, size=64):
    """One chest -> (size, size) uint8 and {finding: Drawn}, "Support Devices" included if one was drawn.

    rng: numpy Generator, the only source of chance. The same state gives the same patient at every size.
    findings: names out of PHANTOM_FINDINGS; others, such as "No Finding", draw nothing. size: pixels a side.
    """
    severity = {f: pick(rng, list(STRENGTH)) for f in PHANTOM_FINDINGS}
    side = {f: pick(rng, SIDES[f]) for f in PHANTOM_FINDINGS}
    strength = {f: rng.uniform(0, TRACE) for f in PHANTOM_FINDINGS}
    for f in PHANTOM_FINDINGS:  # in this order: the same seed, the same patient, in whatever order they come
        if f in findings:
            strength[f] = STRENGTH[severity[f]] + rng.uniform(-0.1, 0.1)

    lost = 0.15 * strength["Atelectasis"]
    lift = {s: lost if side["Atelectasis"] in (s, "bilateral") else 0.0 for s in ("left", "right")}
    p = place_patient(rng, size, rng.uniform(0.42, 0.44) + 0.3 * strength["Cardiomegaly"], lift)

    drawn = {}
    air = p.lung * (1 - p.heart) * (1 - p.middle) * (1 - 0.45 * p.vessels * ridge(p.from_hilum, 0.35))
    for finding in PHANTOM_FINDINGS:
        zone = pick(rng, list(ZONES)) if finding == "Consolidation" else ""
        if finding in SHADOWS:
            shadow = SHADOWS[finding](rng, p, strength[finding], zone) * p.lung
            shadow = shadow * {"left": p.left, "right": 1 - p.left}.get(side[finding], 1)
            air = air * (1 - np.clip(shadow, 0, 0.95))
        if finding in findings:
            drawn[finding] = Drawn(severity[finding], side[finding], zone)

    body = soft(0.93 + 0.1 * p.y - 0.75 * np.maximum(-0.62 - p.y, 0) - p.out, 0.03)
    breasts = soft(0.3 - np.hypot(p.out - 0.42, 0.9 * (p.y - 0.3)), 0.03) * soft(0.5 - p.y, 0.1)
    thickness = 1.1 + 0.3 * soft(p.y - 0.5, 0.2) + rng.uniform(0, 0.25) * breasts
    tissue = body * (thickness + 0.04 * clouds(rng, size))
    attenuation = tissue * (1 - 0.85 * air) + body * (bones(rng, p) + 0.3 * p.middle + 0.15 * p.heart)
    if rng.random() < DEVICES:
        name = pick(rng, DEVICE_NAMES)
        attenuation = attenuation + device(p, name)
        drawn["Support Devices"] = Drawn("", "", name)

    film = 1 - np.exp(-attenuation * rng.uniform(0.8, 1.2))
    film = rng.uniform(0.9, 1.05) * film ** rng.uniform(0.8, 1.3)
    # The grain has a stream of its own: what is drawn from rng afterwards must not depend on the size.
    grain = np.random.default_rng(rng.integers(2**63)).standard_normal((size, size), dtype=np.float32)
    return np.clip(255 * (film + NOISE * grain), 0, 255).astype(np.uint8), drawn


# {s} is a plural ending, for what is on both sides.
SENTENCES = {
    "Atelectasis": (
        "{severity} {side} basilar atelectasis.",
        "Linear opacities at the {side} lung base{s}, {severity}, likely atelectasis.",
        "{severity} plate-like atelectasis in the {side} lower lung{s}.",
        "{severity} {side} basal volume loss with elevation of the hemidiaphragm{s}.",
        "{severity} subsegmental collapse at the {side} base{s}."),
    "Cardiomegaly": (
        "{severity} cardiomegaly.", "The heart is enlarged, to a {severity} degree.",
        "{severity} enlargement of the cardiac silhouette.",
        "The cardiothoracic ratio is increased, with {severity} cardiac enlargement."),
    "Consolidation": (
        "{severity} consolidation in the {side} {place} lung zone.",
        "Patchy {severity} opacity in the {side} {place} lung, concerning for pneumonia.",
        "{severity} airspace disease in the {place} {side} lung.",
        "There is {severity} focal opacification of the {side} {place} zone, consistent with consolidation."),
    "Edema": (
        "{severity} pulmonary edema.", "{severity} vascular congestion with bilateral perihilar haze.",
        "Engorged pulmonary vessels and septal lines, in keeping with {severity} interstitial edema.",
        "{severity} bilateral perihilar opacities, suggesting fluid overload."),
    "Pleural Effusion": (
        "{severity} {side} pleural effusion{s}.",
        "Blunting of the {side} costophrenic angle{s} by {severity} pleural fluid.",
        "{severity} amount of fluid at the {side} lung base{s}.",
        "{severity} {side} effusion{s}, layering with a meniscus.",
        "{severity} fluid collection{s} in the {side} pleural space{s}."),
}  # fmt: skip
DEGREES = {
    "mild": ("mild", "slight", "minimal"), "moderate": ("moderate", "medium-grade"),
    "severe": ("severe", "marked", "pronounced"),
}  # fmt: skip
AMOUNTS = {"mild": ("small", "minor"), "moderate": ("moderate", "medium"), "severe": ("large", "massive")}
ABSENT = {  # a pneumothorax is never drawn
    "Atelectasis": ("atelectasis", "lobar collapse"), "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Consolidation": ("focal consolidation", "focal airspace disease"),
    "Edema": ("pulmonary edema", "vascular congestion"),
    "Pleural Effusion": ("pleural effusion", "pleural fluid"), "Pneumothorax": ("pneumothorax",),
}  # fmt: skip
NORMAL = (
    "No acute cardiopulmonary process.", "Normal chest radiograph.",
    "The lungs are clear and the heart is of normal size.",
    "Clear lungs; cardiomediastinal contours within normal limits.",
    "Unremarkable frontal view of the chest.",
)  # fmt: skip
HARMLESS = (
    "The bones are intact.", "No acute osseous abnormality.", "The trachea is midline.",
    "Single frontal view of the chest.", "The aortic arch is unremarkable.",
    "Comparison is made to the prior study.", "Upper abdomen is unremarkable.",
)  # fmt: skip
DEVICE_SENTENCES = ("{place} in place.", "Unchanged {place}.", "{place} noted, as before.")


def write_report(rng, drawn):
    """Report of 2 to 6 sentences on what `draw_phantom` drew. It may omit a finding but never denies one."""
    found = [f for f in PHANTOM_FINDINGS if f in drawn]
    sentences = [] if found else [pick(rng, NORMAL)]
    for finding in found:
        severity, side, place = drawn[finding]
        degree = pick(rng, (AMOUNTS if finding == "Pleural Effusion" else DEGREES)[severity])
        plural = "s" if side == "bilateral" else ""
        sentence = pick(rng, SENTENCES[finding]).format(severity=degree, side=side, place=place, s=plural)
        if rng.random() >= LEFT_OUT:
            sentences.append(sentence)
    denied = [pick(rng, names) for finding, names in ABSENT.items() if finding not in drawn]
    denied = [denied[i] for i in rng.permutation(len(denied))[:3]]
    opening = pick(rng, ("No ", "No evidence of ", "There is no "))
    sentences.append(opening + " or ".join(", ".join(denied).rsplit(", ", 1)) + ".")
    if "Support Devices" in drawn and rng.random() < 0.7:
        sentences.append(pick(rng, DEVICE_SENTENCES).format(place=drawn["Support Devices"].place))
    for _ in range(rng.integers(1, 3)):
        sentences.append(pick(rng, HARMLESS))
    sentences = list(dict.fromkeys(sentences))[:6]
    return " ".join(sentences[i][0].upper() + sentences[i][1:] for i in rng.permutation(len(sentences)))


def phantom(root, split, limit=None):
    """Phantoms; root, if given, is their size in pixels, or "mixed".

    Training images have 0 to 3 findings, and half of them no report. Images of the other splits have exactly
    one finding, each as often as the others, as in CheXpert-5x200; with "mixed" 0 to 3, too.
    """
    mixed = root == "mixed"
    if root and not mixed and not (root.isdecimal() and len(root) < 5 and 0 < int(root) <= 2048):
        way_out = "what may follow the name is a size in pixels, at most phantom=2048, or phantom=mixed"
        raise BadInput(f"phantom={root}: {way_out}")
    size = 64 if mixed else int(root or 64)
    number = {"train": 6000, "valid": 500, "test": 1000}[split]
    records = []
    rows = range(min(number, limit or number))
    for i in tqdm(rows, "drawing phantoms", leave=False, delay=2, disable=None):
        rng = np.random.default_rng([SPLITS.index(split) + 2 * (mixed and split != "train"), i])
        if split == "train" or mixed:
            count = rng.choice(4, p=(0.15, 0.6, 0.2, 0.05))
            present = set(rng.choice(PHANTOM_FINDINGS, count, replace=False).tolist())
        else:
            present = {PHANTOM_FINDINGS[i % len(PHANTOM_FINDINGS)]}
        image, drawn = draw_phantom(rng, present, size)
        report = write_report(rng, drawn) if split != "train" or i % 2 else None
        labels = {name: int(name in (present or {NO_FINDING})) for name in (*PHANTOM_FINDINGS, NO_FINDING)}
        id = f"{'mixed-' if mixed and split != 'train' else ''}{split}-{i}"
        records.append(Record(image, report, labels, patient=id, source="phantom", id=id))
    return records


# ------------------------------------------------------------------------------------- tables and reports


@contextmanager
def reading(path, place=""):
    """Turns every error of reading a file into a BadInput: file, place in it, what is wrong, way out."""
    at = SimpleNamespace(place=place)  # the caller updates it while reading
    try:
        yield at
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there") from error
    except UnicodeError as error:
        raise BadInput(f"{path}{at.place} is not UTF-8 text ({error}); save it as UTF-8") from error
    except Exception as error:  # whatever unpacks or parses has errors of its own, and no list is complete
        if getattr(error, "errno", None):
            raise BadInput(f"{path} cannot be read ({error.strerror})") from error
        if isinstance(error, csv.Error) and "field limit" in str(error):
            cell = f"a cell of over {csv.field_size_limit():,} characters"
            raise BadInput(f"{path}{at.place} has {cell}; shorten it, or close its quotation mark") from error
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"{path}{at.place} is cut short or damaged ({what}); get it again") from error


def refuse_no_file(path):
    """Refuses what is there and is no file: a pipe would be waited for, a device be written over."""
    if Path(path).exists() and not Path(path).is_file():
        raise BadInput(f"{path} is a folder, a pipe or a device; a file is needed")


def open_file(path):
    """A file, plain or as .gz or .zip, to read its bytes."""
    refuse_no_file(path)
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return archive.open(archive.namelist()[0])
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def header_shown(header, columns):
    """The names in a table's first line, in an error; without one of the columns it may be no header.

    Then only the names that we know are shown.
    """
    sure = set(header) & set(columns)
    names = [name for name in header if sure or name in CHEXPERT or plain(name) in KNOWN_COLUMNS]
    others = [f"{len(header) - len(names)} others"] if len(names) < len(header) else []
    return ", ".join([*map(repr, names), *others])


def read_lines(path):
    """Lines of a UTF-8 text file, plain or as .gz or .zip -> yields (number, line)."""
    with reading(path) as at, open_file(Path(path)) as file:
        for number, line in enumerate(file, 1):
            at.place = f", line {number},"
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if "\0" in text:
                raise BadInput(f"{path}{at.place} holds a NUL character, which no text has; save it as UTF-8")
            yield number, text


def shown(id):
    """An id in an error, where it looks like a path or a number. Anything else may be a report."""
    plain = re.fullmatch(r"[\w.~+=:@/-]{1,60}", id, re.ASCII)
    looks = plain and (re.search(r"[\d/]", id) or id.lower().endswith(ENDINGS))
    return repr(id) if looks else f"of {len(id)} characters"


def refuse_repeats(names, where):
    for name, times in Counter(filter(None, names)).most_common(1):
        if times > 1:
            raise BadInput(f"{where} {shown(name)} {times} times; keep one")


SWALLOWED = re.compile(
    r"\n[^\n]*\.(?:png|jpe?g|dcm|tiff?|bmp)[ \"]*(?:[,;\t]|$)", re.IGNORECASE | re.MULTILINE
)


def read_table(path, columns=()):
    """Rows of a CSV file, plain or as .gz or .zip -> yields ("PATH, row N", {column: cell}).

    Its cells are separated by commas; where its first line has none, by semicolons or tabs.
    Refuses a missing or repeated column, a row of another length, and a quotation mark that swallows rows.
    """
    lines = (line for _, line in read_lines(path))
    first = next(lines, "")
    separator = next((sign for sign in ",;\t" if sign in first), ",")
    rows = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    with reading(path) as at:
        header = [name.strip() for name in next(rows, [])]
        lacking = [name for name in columns if name not in header]
        if lacking:
            raise BadInput(f"{path} has no column {lacking[0]!r}; it has {header_shown(header, columns)}")
        for name, times in Counter(filter(None, header)).items():
            if times > 1:
                name = header_shown([name], ())
                raise BadInput(f"{path} has the column {name} {times} times; keep one")
        line = rows.line_num
        for number, cells in enumerate(rows, 2):
            where = f"{path}, row {number}"
            if cells and len(cells) != len(header):
                raise BadInput(f"{where}, has not as many cells as the header")
            if rows.line_num > line + 1 and any(map(SWALLOWED.search, cells)):
                raise BadInput(f"{where}, goes on over the next rows: close its quotation mark")
            line, at.place = rows.line_num, f", after row {number},"
            if cells:
                yield where, dict(zip(header, cells, strict=True))


def subfolders(folder):
    """The folders right below one, links to folders included, by name; none where it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir())
    return []


def folders(root, deep):
    """Yields root and the folders at most `deep` below it, nearest first; those of patients are left out."""
    level = [Path(root)]
    yield from level
    for _ in range(deep):
        level = [path for folder in level for path in subfolders(folder)]
        level = [path for path in level if not re.fullmatch(r"p1\d|patient\d+", path.name)]
        yield from level


def find(root, *patterns, deep=2):
    """The first path that fits one of the patterns in root, or up to `deep` folders below, or None."""
    found = (sorted(folder.glob(p)) for folder in folders(root, deep) for p in patterns)
    return next(chain.from_iterable(found), None)


def find_table(root, name, *others):
    """The table of a data set, plain or as .gz or .zip, in its folder or one below."""
    names = [each + ending for each in (name, *others) for ending in ("", ".gz", ".zip")]
    return find(root, *names, deep=1) or Path(root, name)


def images_under(root):
    """{name without ending: path} of all image files below root."""
    return {path.stem: path for path in image_files(root)}


NOT_ANNOTATED = "unknown"  # the cell of a finding that the image's source does not look for
VALUES = {"1": 1, "0": 0, "-1": -1, "": None, "1.0": 1, "0.0": 0, "-1.0": -1, "true": 1, "false": 0}


@cache  # so that the records of a data set share few dicts
def read_labels(names, cells):
    """Cells of a labeler's table, in the order of its columns' names -> Record.labels."""
    labels = {}
    for name, cell in zip(names, map(str.strip, cells), strict=True):
        if cell.lower() in VALUES:
            labels[name] = VALUES[cell.lower()]
        elif cell != NOT_ANNOTATED:
            states = f"1, 0, -1, {NOT_ANNOTATED} and blank"
            value = f"value {cell!r}, which" if len(cell) <= 12 and cell.isascii() else "a value that"
            raise BadInput(f"column {name!r} has the {value} is none of {states}")
    return labels


def row_labels(where, row, names):
    """The labels in a row of a table."""
    try:
        return read_labels(names, tuple([row[name] for name in names]))
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def clean(text):
    """A report as one line without redaction marks (___ of MIMIC-CXR, XXXX of Open-I) and list numbers."""
    text = re.sub(r"(?:\A|(?<=[.:;])\s)\s*\d{1,2}[.)]\s", " ", text)
    text = re.sub(r"[\w/'-]+", lambda word: " " if re.search("XXXX|___", word[0]) else word[0], text)
    text = " ".join(re.sub(r"\(\s*\)", " ", text).split())
    return as_written(re.sub(r"\s+(?=[.,;:)])", "", text).lstrip(" .,;:-"))


NO_VALUE = {"nan", "none", "null", "na", "nat", "nil", "missing", "undefined", "notavailable", "noreport"}


def is_missing(cell):
    """Whether a cell is blank, or says like "nan", "<NA>" or "N/A" that its program had no value."""
    cell = cell.strip()
    short = len(cell) < 20 and cell[:1] not in "-01"  # most cells are states
    return not cell or (short and re.sub(r"[\W_]+", "", cell.lower()) in NO_VALUE)


def as_written(text):
    """A text without the blanks around it, or None where it has no word: then there is no report."""
    return text.strip() if re.search(r"[^\W\d_]{2}", text) and not is_missing(text) else None


def join(*sections):
    """The cleaned sections, in this order, as one report, or None."""
    return " ".join(filter(None, map(clean, filter(None, sections)))) or None


def check_patients(splits):
    """Refuses {split: records} in which a patient of a source is in two splits."""
    owner = {}
    for name, records in splits.items():
        for r in records:
            first = owner.setdefault((r.source, r.patient), name)
            if first != name:
                where = f"the splits {first!r} and {name!r}; each patient belongs in one"
                raise BadInput(f"patient {shown(r.patient)} of {r.source} is in {where}")


def split_by_patient(records, cuts=(0.7, 0.8)):
    """{split: records} for a data set without official splits (ours).

    A hash puts each patient's name between 0 and 1; below the first cut is train, from the second on test. So
    a patient's split depends on no other patient, and data that come later move nobody.
    """
    splits = {split: [] for split in SPLITS}
    for record in records:
        digest = hashlib.sha256(record.patient.encode(errors="surrogateescape")).digest()
        place = int.from_bytes(digest[:4], "big") / 2**32
        splits[SPLITS[sum(place >= cut for cut in cuts)]].append(record)
    empty = [split for split in SPLITS if records and not splits[split] and (split != "test" or cuts[-1] < 1)]
    if empty:
        few = len({record.patient for record in records})
        note(
            f"of {few:,} patients none is drawn into {' or '.join(empty)}; say yourself who is in which split"
        )
    return splits


# ------------------------------------------------------------------------------------------------- readers


def chexpert(root, split):
    """CheXpert, v1.0 or -small: train.csv, valid.csv and, where it was added, test_labels.csv."""
    # A patient's folder is unique, so neither the prefix in the table nor the folder that the archives unpack
    # to matters: CheXpert-v1.0-small/train, train, or "CheXpert-v1.0 batch 2 (train 1)".
    depths = (list(Path(root).glob("*/" * depth + "patient*")) for depth in range(3))
    places = {folder.name: folder for folder in next(filter(None, depths), ())}
    table = find_table(root, f"{split}.csv", f"{split}_labels.csv")
    return [] if split == "test" and not table.exists() else chexpert_table(table, places)


def chexpert_table(table, places=None):
    """Records of one of CheXpert's tables; places: {patient: folder of the images}, if they are there."""
    table, places, records = Path(table), places or {}, []
    for where, row in read_table(table, ("Path", *CHEXPERT)):
        path, view = row["Path"].split("/")[-4:], row.get("AP/PA", "")
        if len(path) < 4:
            raise BadInput(f"{where}: the path {shown(row['Path'])} is none of CheXpert's")
        split, patient, study, name = path
        folder = places.get(patient, f"{table.parent}/{split}/{patient}")
        if view not in ("PA", "AP"):  # blank for laterals; 17 of the frontal ones are marked LL or RL
            view = "FRONTAL" if "frontal" in name else "LATERAL"
        known = {"patient": patient, "source": "chexpert", "id": "/".join(path), "view": view}
        image, labels = Path(f"{folder}/{study}/{name}"), row_labels(where, row, CHEXPERT)
        records.append(Record(image, None, labels, **known))
    return records


def dicom_view(position):
    """View Position of a DICOM file -> one of VIEWS; it may be oblique or blank."""
    if position in ("PA", "AP"):
        return position
    return "LATERAL" if "LATERAL" in position or position in ("LL", "RL") else "UNKNOWN"


def mimic_cxr(root, split, section="both"):
    """MIMIC-CXR-JPG and the reports of MIMIC-CXR, files/ or mimic-cxr-reports.zip, in the official splits.

    Both are found up to four folders below root: physionet.org/files/mimic-cxr-jpg/2.0.0 after `wget -r`.
    """
    metadata = find(root, "mimic-cxr-2.*-metadata.csv*", deep=4) or Path(
        root, "mimic-cxr-2.0.0-metadata.csv.gz"
    )
    records = mimic_table(metadata, {"valid": "validate"}.get(split, split))
    studies = list(dict.fromkeys(os.path.dirname(record.id) for record in records))
    reports = mimic_reports(root, studies, section)
    texts = [reports.get(os.path.dirname(r.id)) for r in records]
    if records and not any(texts):
        note(f"{root} has no report of the split {split!r}")
    return [replace(r, image=metadata.parent / r.id, report=t) for r, t in zip(records, texts, strict=True)]


def mimic_table(table, *splits):
    """Records of the images in these official splits, without report; table: any of the three."""
    folder, stem = Path(table).parent, re.sub(r"(metadata|split|chexpert)\.csv.*", "", Path(table).name)
    metadata, records = find_table(folder, stem + "metadata.csv"), []
    next(read_table(metadata), None)  # where the folder is wrong, name this table, not those beside it
    rows = read_table(find_table(folder, stem + "split.csv"), ("dicom_id", "split"))
    chosen = {row["dicom_id"] for _, row in rows if row["split"] in splits}
    rows = read_table(find_table(folder, stem + "chexpert.csv"), ("study_id", *CHEXPERT))
    labels = {row["study_id"]: row_labels(where, row, CHEXPERT) for where, row in rows}
    for _, row in read_table(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        if row["dicom_id"] in chosen:
            patient, study = f"p{row['subject_id']}", f"s{row['study_id']}"
            id = f"files/{patient[:3]}/{patient}/{study}/{row['dicom_id']}.jpg"
            known = {"source": "mimic-cxr", "id": id, "view": dicom_view(row["ViewPosition"])}
            of_study = labels.get(row["study_id"], {})  # a few studies have none
            records.append(Record(Path(id), None, of_study, patient=patient, **known))
    return records


SECTIONS = {  # --section: impression before findings, so that cutting does not cut the conclusion (ours)
    "both": ("impression", "findings"), "impression": ("impression",), "findings": ("findings",),
}  # fmt: skip
WITH_SECTIONS = ("mimic-cxr", "openi")
SECTION_HELP = (
    f"what to read of the reports of {' and '.join(WITH_SECTIONS)}; both begins with the impression"
)


def mimic_reports(root, studies, section="both"):
    """{study: text} for those of files/p10/p10000032/s50414267, ... that have usable text in the section.

    Where a report has neither section, "both" takes its last paragraph, as the official parser does.
    """
    archive, reports = find(root, "mimic-cxr-reports.zip", deep=4), {}
    with reading(archive or root) as at:
        if archive:
            base = zipfile.Path(archive)
        else:
            bases = [folder for folder in folders(root, 4) if (folder / "files").is_dir()]
            base = next((b for study in studies for b in bases if (b / f"{study}.txt").is_file()), None)
        for study in studies if base else ():
            file, at.place = base / f"{study}.txt", f", {study}.txt,"
            if file.is_file():
                with file.open("rb") as text:
                    part = report_sections(text.read().decode())
                last = part.get("last_paragraph") if section == "both" else None
                reports[study] = join(*map(part.get, SECTIONS[section])) or join(last)
    return reports


SECTION_TITLE = re.compile(r"\n ([A-Z ()/,-]+):\s")


def misspelt(name):
    """Pattern of a word in which at most one letter is missing, too many, wrong or swapped with the next."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    slips = [f"{a}[a-z]?{b}|{a}[a-z]?{b[1:]}" for a, b in cuts]
    return "|".join(slips + [a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1])


# Fuzzier matches take COMPRESSION or DEPRESSION for an impression; what is misspelt in MIMIC-CXR is one slip.
IMPRESSION_TITLE = re.compile(rf"\b({misspelt('impression')}|{misspelt('conclusion')})s?\b")
FINDINGS_TITLE = re.compile(
    r"^(chest|portable|bedside|upright|supine|single|two|frontal|views?|pa|ap)\b"
    rf"|\b({misspelt('findings')})\b"
)


@cache
def section_name(title):
    """A section's title in MIMIC-CXR -> "impression", "findings" or the title, misspellings included."""
    title = title.lower().strip()
    if IMPRESSION_TITLE.search(title):
        return "impression"
    return "findings" if FINDINGS_TITLE.search(title) else title


def report_sections(text):
    """Sections of a MIMIC-CXR report by the rules of its official parser -> {name: text}, the last of a name.

    A title is upper case, one space into its line, before a colon; the rest of its line holds no other title.
    Empty findings and impressions are dropped. Where neither is left, all that follows the first blank line
    of the last section is the "last_paragraph".
    """
    text = text.replace("\r\n", "\n")
    parts, name, start, place = [], "preamble", 0, 0
    while title := SECTION_TITLE.search(text, place):
        parts.append((name, text[start : title.start()]))
        name, start = section_name(title[1]), title.end()
        place = start - 1 + len(text[start - 1 :].partition("\n")[0])
    parts.append((name if parts else "full report", text[start:]))
    kept = {name: body for name, body in parts if body.strip() or name not in ("findings", "impression")}
    if not {"findings", "impression"} & kept.keys():
        kept["last_paragraph"] = "".join(re.split(r"\n\s*\n", parts[-1][1], maxsplit=1)[1:])
    return kept


def rsna(root, split):
    """RSNA Pneumonia Detection Challenge, stage 2, in GLoRIA's splits; an image is a patient.

    Target 0 is no pneumonia, which is not "No Finding"; stage_2_detailed_class_info.csv says which is.
    """
    details, records = find_table(root, "stage_2_detailed_class_info.csv"), []
    images = images_under(root) | images_under(Path(root, "stage_2_train_images"))
    rows = read_table(details, ("patientId", "class")) if details.exists() else ()
    normal = {row["patientId"] for _, row in rows if row["class"] == "Normal"}
    for r in gloria_split(rsna_table(find_table(root, "stage_2_train_labels.csv")))[split]:
        image = images.get(r.id, Path(root, "stage_2_train_images", f"{r.id}.png"))
        labels = r.labels | {NO_FINDING: 1} if r.id in normal else r.labels
        records.append(replace(r, image=image, labels=labels))
    return records


def rsna_table(table):
    """Records of stage_2_train_labels.csv, which has a row for each box, in order of their ids."""
    target = {}
    for where, row in read_table(table, ("patientId", "Target")):
        if row["Target"] not in ("0", "1"):
            raise BadInput(f"{where}: the Target is neither 0 nor 1")
        target[row["patientId"]] = max(row["Target"], target.get(row["patientId"], "0"))
    labels = {each: {"Pneumonia": int(each)} for each in "01"}
    known = {"source": "rsna", "view": "FRONTAL"}
    return [Record(Path(id), None, labels[target[id]], patient=id, id=id, **known) for id in sorted(target)]


COVID_CLASSES = {  # folder, of which case, blanks, _ and - do not count -> finding
    "covid": "COVID-19", "covid19": "COVID-19", "lungopacity": "Lung Opacity", "normal": NO_FINDING,
    "viralpneumonia": "Viral Pneumonia",
}  # fmt: skip


def covid_radiography(root, split):
    """COVID-19 Radiography Database: a class is a folder, an image is a patient; splits by a hash."""
    return split_by_patient(covid_folders(root))[split]


def covid_folders(root):
    """Records of all class folders that are there, each in the order of the numbers of its images."""
    place = {}  # {finding: folder}
    for path in islice(folders(root, 2), 1, None):
        finding = COVID_CLASSES.get(re.sub("[ _-]", "", path.name.lower()))
        if finding and place.setdefault(finding, path) != path:
            raise BadInput(
                f"{root} has the class {finding} in {place[finding]} and in {path}; name the folder of one "
                f"set, or read folders of splits by --data folder={root}"
            )
    called = " and ".join(path.name for path in place.values()) or "none"
    there = (
        f"{root} has {called} of the class folders COVID or COVID-19, Lung_Opacity, Normal, Viral Pneumonia"
    )
    if len(place) < 2:
        raise BadInput(f"{there}; covid-radiography needs at least two")
    names = dict.fromkeys(COVID_CLASSES.values())
    if len(place) < len(names):
        note(f"{there}; these are used")
    records = []
    for finding in filter(place.get, names):
        folder = place[finding]
        images = images_under(folder / "images" if (folder / "images").is_dir() else folder)
        # Any of them may show an opacity or a viral pneumonia. All we know: the other three show no COVID-19.
        labels = {"COVID-19": 0} | {finding: 1}
        known = {"source": "covid-radiography", "view": "FRONTAL"}
        for id in sorted(images, key=lambda id: (len(id), id)):
            records.append(Record(images[id], None, labels, patient=id, id=id, **known))
    return records


def class_folders(root):
    """{name: folder} of the folders right below root with an image, but for hidden and archivers' ones."""
    shown = (path for path in subfolders(root) if path.name[0] not in "._")
    return {path.name: path for path in shown if next(image_files(path), None)}


def class_folder_images(root, split):
    """Images of your own as torchvision's ImageFolder has them: CLASS/*, or train/, valid/ and test/CLASS/*.

    The classes are the findings: an image has its own and none of the others. It is a patient of its own.
    Without folders of splits, or with none of validation, a hash draws them.
    """
    root, tops = Path(root), class_folders(root)
    named = [SPLIT_NAMES.get(name.lower()) for name in tops]
    if any(named) and not all(named):
        others = ", ".join(name for name in tops if name.lower() not in SPLIT_NAMES)
        raise BadInput(f"{root} has folders of splits and others ({others}); all or none may be splits")
    found = []  # (split, class, image)
    for part, top in zip(named, tops.values(), strict=True):
        for name, folder in class_folders(top).items() if part else [(top.name, top)]:
            found += [(part, name.replace("_", " "), path) for path in sorted(image_files(folder))]
    names = sorted({name for _, name, _ in found})
    if len(names) < 2:
        raise BadInput(
            f"{root} has images of {len(names)} classes, two are needed; folder=FOLDER takes FOLDER/CLASS/* "
            f"or FOLDER/train/CLASS/* and the like in valid and test; images end with {', '.join(ENDINGS)}"
        )
    labels, parts = {name: {each: int(each == name) for each in names} for name in names}, {}
    for part, name, path in found:
        id = path.relative_to(root).as_posix()
        record = Record(path, None, labels[name], patient=id, source="folder", id=id)
        parts.setdefault(part, []).append(record)
    if None in parts:
        parts = split_by_patient(parts[None])
    elif "valid" not in parts and "train" in parts:
        note(f"{root} has no folder of validation; a hash takes a tenth of train")
        parts |= {**split_by_patient(parts["train"], cuts=(0.9, 1.0)), "test": parts.get("test", [])}
    return parts.get(split, [])


MESH = {  # finding -> MeSH headings; other headings say nothing that the chest X-ray data sets share
    NO_FINDING: ["normal"], "Atelectasis": ["Pulmonary Atelectasis"], "Cardiomegaly": ["Cardiomegaly"],
    "Consolidation": ["Consolidation"], "Edema": ["Pulmonary Edema"], "Fracture": ["Fractures, Bone"],
    "Lung Lesion": ["Mass", "Nodule"], "Lung Opacity": ["Airspace Disease", "Infiltrate", "Opacity"],
    "Pleural Effusion": ["Pleural Effusion"], "Pneumonia": ["Pneumonia"], "Pneumothorax": ["Pneumothorax"],
    "Support Devices": [
        "Catheters, Indwelling", "Implanted Medical Device", "Medical Device", "Tube, Inserted",
    ],
}  # fmt: skip


def mesh_labels(headings):
    """Headings such as "Opacity/lung/base/left" -> labels; a report that was not indexed has none."""
    main = {heading.split("/")[0].strip() for heading in headings} - {"", "No Indexing"}
    return {name: 1 if main.intersection(known) else None for name, known in MESH.items()} if main else {}


def openi_reports(root):
    """Yields (number of the report, its XML element) from ecgen-radiology/ or NLMCXR_reports.tgz."""
    folder, archive = find(root, "ecgen-radiology"), find(root, "NLMCXR_reports.tgz")
    if not folder and not archive:
        raise BadInput(f"{root} has neither NLMCXR_reports.tgz nor its folder ecgen-radiology")
    if folder:
        texts = {path.stem: path for path in folder.glob("*.xml")}
    else:
        refuse_no_file(archive)
        with reading(archive), tarfile.open(archive) as file:
            texts = {Path(m.name).stem: file.extractfile(m).read() for m in file if m.name.endswith(".xml")}
    for number, text in sorted(texts.items(), key=lambda item: (len(item[0]), item[0])):  # 2 before 10
        with reading(text if folder else f"{archive}, {number}.xml"):
            if folder:
                with open_file(text) as file:
                    text = file.read()
            yield number, ElementTree.fromstring(text)


def openi(root, split, section="both"):
    """Open-I: images, reports, MeSH headings; views where torchxrayvision's table is; split by report."""
    table, images, records = find_table(root, "nlmcxr_dicom_metadata.csv"), images_under(root), []
    rows = read_table(table, ("imageid", "View Position")) if table.exists() else ()
    positions = {row["imageid"]: row["View Position"] for _, row in rows}
    for number, report in openi_reports(root):
        part = {each.get("Label", "").lower(): each.text for each in report.iter("AbstractText")}
        labels = mesh_labels(heading.text or "" for heading in report.iter("major"))
        text = join(*map(part.get, SECTIONS[section]))
        for id in (image.get("id", "") for image in report.iter("parentImage")):
            # The first report alone has one number more in the XML than in the table.
            position = positions.get(id.replace("CXR1_1_", "CXR1_"))
            known = {"id": id, "view": dicom_view(position) if position else ""}
            image = images.get(id, Path(root, f"{id}.png"))
            records.append(Record(image, text, labels, patient=number, source="openi", **known))
    return split_by_patient(records)[split]


def nih_chestxray14(root, split):
    """NIH ChestX-ray14: the official test list where it is there; the rest, or all, is split by a hash."""
    table = find_table(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    rows = [row for _, row in read_table(table, ("Image Index", "Finding Labels", "Patient ID"))]
    places, records = images_under(root), []
    elsewhere = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}
    named = [{elsewhere.get(name, name) for name in row["Finding Labels"].split("|")} for row in rows]
    annotated = sorted(set().union(*named))
    for row, present in zip(rows, named, strict=True):
        id, labels = row["Image Index"], {name: int(name in present) for name in annotated}
        image = places.get(os.path.splitext(id)[0], Path(root, "images", id))
        known = {"source": "nih-chestxray14", "id": id, "view": row.get("View Position") or "FRONTAL"}
        records.append(Record(image, None, labels, patient=row["Patient ID"], **known))
    official = find_table(root, "test_list.txt")
    if not official.exists():
        return split_by_patient(records)[split]
    listed = {line.strip() for _, line in read_lines(official)}
    if split == "test":
        return [r for r in records if r.id in listed]
    return split_by_patient([r for r in records if r.id not in listed], cuts=(0.9, 1.0))[split]


def covid_chestxray(root, split):
    """covid-chestxray-dataset of ieee8023: frontal X-rays with a finding; the clinical notes are the reports.

    The table lists some files twice, under two numbers of a patient: the first row counts, for both numbers.
    Splits by a hash of the patient.
    """
    needed = ("patientid", "finding", "view", "modality", "folder", "filename", "clinical_notes")
    table, records, owner, alias = find_table(root, "metadata.csv"), [], {}, {}
    for _, row in read_table(table, needed):
        # "Pneumonia/Viral/COVID-19" in later releases, "COVID-19, ARDS" in earlier: the most exact names.
        names = {name.strip().rsplit("/", 1)[-1] for name in row["finding"].split(",")}
        names -= {"", "todo", "Unknown"}
        if row["modality"] != "X-ray" or not row["view"].startswith(("PA", "AP")) or not names:
            continue
        id, notes, patient = f"{row['folder']}/{row['filename']}", row["clinical_notes"], row["patientid"]
        if owner.setdefault(id, patient) != patient:
            alias[patient] = owner[id]
            continue
        image, labels = table.parent / id, dict.fromkeys(sorted(names), 1)
        known = {"patient": patient, "source": "covid-chestxray", "id": id, "view": row["view"][:2]}
        records.append(Record(image, as_written(notes), labels, **known))
    return split_by_patient([replace(r, patient=alias.get(r.patient, r.patient)) for r in records])[split]


MEDPIX_FILES = {"train": "train", "valid": "dev", "test": "test"}
MEDPIX_PLACES = ("Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax")


def medpix2(root, split):
    """MedPix 2.0: CT and MR images, captions, location category; a patient is a case; official splits."""
    folder, records = find(root, "splitted_dataset") or Path(root, "splitted_dataset"), []
    path = folder / f"descriptions_{MEDPIX_FILES[split]}.jsonl"
    for number, line in read_lines(path):
        with reading(path, f", line {number},"):
            row = json.loads(line)
            id, labels = row["image"], dict.fromkeys(MEDPIX_PLACES, 0) | {row["Location Category"]: 1}
            caption = as_written(row["Description"]["Caption"] or "")
            image, known = (
                folder.parent / "images" / f"{id}.png",
                {"patient": row["U_id"], "source": "medpix2"},
            )
        records.append(Record(image, caption, labels, id=id, **known))
    return records


ROCO_WORDS = [  # modalities, then regions, {finding: words}; * is any ending, _ a blank
    {
        "Angiography": "angiogra* aortogra* arteriogra* venogra* phlebogra* ventriculogra* dsa",
        "Computed Tomography": "ct cts hrct cect ncct mdct cbct computed_tomogra* computed_axial_tomogra* "
            "computer_tomogra* computerized_tomogra* computerised_tomogra*",
        "Magnetic Resonance": "mr mri mris fmri mra mrcp magnetic_resonance flair t1-weighted t2-weighted "
            "t1_w* t2_w* t1w* t2w*",
        "Radiograph": "radiogra* teleradiogra* x-ray* x_ray* xray* cxr opg orthopan* panoramic roentgen*",
        "Ultrasound": "ultraso* sonogra* endosono* echocardio* doppler tte tee eus",
    },
    {
        "Abdomen": "abdom* liver* hepat* intrahepatic kidney* renal adrenal bowel pancrea* colon colonic "
            "gastric gastroint* stomach spleen splen* duoden* gallbladder bile biliary jejun* ileum ileal "
            "ileus mesenter* intestin* appendix appendic* periton* retroperiton*",
        "Chest": "chest cxr lung* pulmon* thora* hemithorax intrathoracic upper_lobe* middle_lobe* "
            "lower_lobe* pleura* mediastin* pneumo* bronch* trachea* atelecta* hilar",
        "Head": "brain* head_ct head_mri head_computed ct_head ct_of_the_head skull cerebr* cerebell* "
            "cranial cranium intracranial pituitary orbit* head_and_neck maxillary_sinus* ethmoid* "
            "sphenoid* sinuses sinusitis paranasal nasal nasophar* frontal_lobe* temporal_lobe* "
            "parietal_lobe* occipital_lobe* hemisphere*",
        "Heart": "heart* cardiac cardiomeg* echocardio* endocard* myocard* pericard* left_ventric* "
            "right_ventric* ventricular interventricular atrium atria atrial aort* coronar* valve* mitral "
            "tricuspid",
        "Limbs": "femur femoral tibia* fibula* humer* radius ulna ulnar knee* hip hips shoulder* elbow* "
            "wrist* hand hands finger* thumb* foot feet ankle* leg legs thigh* upper_arm* left_arm* "
            "right_arm* forearm* patella* metacarp* metatars* phalan*",
        "Pelvis": "pelvi* abdominopelvi* bladder rectum rectal perirectal uterus uterine ovar* prostat* "
            "testic* testis vagina* transvaginal endometri* myometri*",
        "Spine": "spine spinal vertebra* intervertebral lumbar lumbosacral thoracolumbar cervical disc "
            "discs disk disks sacral sacrum spondyl* scolio*",
        "Teeth and Jaw": "tooth teeth molar* premolar* incisor* canine* maxill* mandib* dental periapical "
            "panoramic orthopan* opg intraoral root_canal* odonto* jaw jaws",
    },
]  # fmt: skip


def one_of(words):
    """Pattern of any of ROCO's words."""
    return re.compile(rf"\b(?:{'|'.join(words.split())})\b".replace("*", r"\w*").replace("_", r"\s"))


ROCO_PATTERNS = [{name: one_of(words) for name, words in group.items()} for group in ROCO_WORDS]


@cache  # for the other splits
def caption_labels(caption):
    """Findings that a caption names -> labels; where it names no modality or no region, these are unknown."""
    labels = {}
    for group in ROCO_PATTERNS:
        said = {name for name, pattern in group.items() if pattern.search(caption.lower())}
        labels |= {name: 1 if name in said else None for name in group} if said else {}
    return labels


def roco(root, split):
    """ROCO's radiology images that were fetched; labels are words of their captions; split by article.

    root: the published repository, or one of its folders with captions.txt and licences.txt. Its own split is
    by image, so articles are in two of its parts; a hash of the article takes its place.
    """
    records, missing = [], 0
    for folder in folders(root, 4):
        if folder.name == "non-radiology" or not (folder / "captions.txt").is_file():
            continue
        images, rows = images_under(folder), read_table(folder / "licences.txt", ("ROCO_ID", "PMC_ID"))
        name_of = {row["ROCO_ID"]: row["PMC_ID"] for _, row in rows}  # PMC4608653_cro-0008-0385-g01.jpg
        for _, line in read_lines(folder / "captions.txt"):
            id, _, caption = line.partition("\t")
            name = name_of.get(id, id)
            image = images.get(id) or images.get(os.path.splitext(name)[0])
            known = {"patient": name.partition("_")[0], "source": "roco", "id": id}
            if image:
                records.append(Record(image, as_written(caption), caption_labels(caption), **known))
            missing += not image
    if not records:
        raise BadInput(
            f"{root} has no image of {missing:,} captions in captions.txt; ROCO's fetch.py gets them"
        )
    if missing:
        note(f"{root}: {missing:,} captions have no image and are left out")
    return split_by_patient(records)[split]


COLUMNS = {  # of a user's table, and the other names that are taken for them, see `plain`
    "image": {"filename", "file", "path", "filepath", "imagepath", "imagefile", "imagename", "imageindex"},
    "id": {"imageid"},
    "source": set(),
    "patient": {"patientid", "subject", "subjectid"},
    "split": {"fold", "set", "subset", "partition"},
    "view": {"viewposition", "projection"},
    "report": {"reporttext", "text", "caption", "impression"},
}
CSV_COLUMNS = tuple(COLUMNS)
KNOWN_COLUMNS = COLUMNS.keys() | set().union(*COLUMNS.values())
# These hold names of findings; "finding" and "findings" may hold reports instead.
OF_NAMES = {"finding", "findings", "label", "labels", "findinglabel", "findinglabels"}
NO_FINDINGS = {"height", "weight", "year", "index", "patientage", "patientsex", "patientgender"}
NO_FINDING_WORDS = {"id", "uid", "age", "sex", "gender", "race", "ethnicity", "bmi", "date", "unnamed"}


class Columns(NamedTuple):
    """What the columns of a user's table are."""

    known: dict  # {one of CSV_COLUMNS: [column, ...]}; a report may stand in two
    states: dict  # {column of states: finding}
    names: list  # columns whose cells name findings
    spelling: dict  # {name in such a cell: finding}
    left_out: list


def csv_table(table, split):
    """A table of your own, or FOLDER for FOLDER/table.csv; README.md says what its columns may hold.

    Where the cells are blank, the id and the patient of an image are its path and its source is csv; without
    a column of splits, they are drawn by patient. Columns with other cells are left out, which a note says.
    """
    table, parts, records = csv_file(table), {name: [] for name in SPLITS}, []
    columns = csv_columns(table)
    findings, spelling = tuple(columns.states.values()), columns.spelling
    named = tuple(sorted(set(spelling.values())))
    for where, row in read_table(table):
        cell = {role: row[found[0]].strip() if found else "" for role, found in columns.known.items()}
        cell = {role: "" if is_missing(text) else text for role, text in cell.items()}
        report = " ".join(filter(None, (as_written(row[column]) for column in columns.known["report"])))
        image, view, part = cell["image"], cell["view"].upper(), SPLIT_NAMES.get(cell["split"].lower())
        if Path(image).suffix.lower() not in ENDINGS:
            raise BadInput(f"{where}: the image does not end with {', '.join(ENDINGS)}")
        if len(image) > 80 and max(map(len, map(os.fsencode, Path(image).parts))) > 255:
            raise BadInput(f"{where}: the image's name is longer than that of any file")
        if view and view not in VIEWS:
            view = dicom_view(view)
            if view == "UNKNOWN":
                raise BadInput(f"{where}: the view is none of {', '.join(VIEWS)}")
        if columns.known["split"] and not part:
            column = columns.known["split"][0]
            raise BadInput(f"{where}: the split is none of {', '.join(SPLITS)} (column {column!r})")
        known = {"patient": cell["patient"] or image, "source": cell["source"] or "csv"}
        texts = (row[column] for column in columns.names if not is_missing(row[column]))
        found = frozenset(spelling[name] for text in texts for name in names_in(text))
        labels = csv_labels(findings, tuple([row[column] for column in columns.states]), named, found)
        known |= {"id": cell["id"] or image, "view": view, "labels": labels}
        records.append(Record(Path(table.parent, image), report or None, **known))
        if part:
            parts[part].append(records[-1])
    check_patients(parts)
    return (parts if any(parts.values()) else split_by_patient(records))[split]


@cache
def csv_labels(findings, cells, named, found):
    """Cells of these findings, and of all `named` in the table those found in this row -> Record.labels."""
    labels = read_labels(findings, tuple(["" if is_missing(cell) else cell for cell in cells]))
    if not found:
        return labels
    said = {name: value for name, value in labels.items() if value is not None}
    return labels | {name: int(name in found) for name in named} | said


def csv_file(table):
    """The file of csv=TABLE or csv=FOLDER."""
    table = Path(table, "table.csv") if Path(table).is_dir() else Path(table)
    if not table.is_file():
        raise BadInput(f"{table} is not there; write csv=TABLE, or csv=FOLDER for FOLDER/table.csv")
    return table


def names_in(cell):
    """A cell such as "Edema|Pleural Effusion" -> list of names."""
    return [name for part in re.split("[|;]", cell) if (name := part.strip())]


def looks_like(cell):
    """What a cell of text is -> "names", separated by | or ;, or "report", or "neither"."""
    if re.search(r"[.!?](\s|$)", cell) or len(cell.split()) > 12:
        return "report"
    # Commas and brackets separate names in other tables; taking them for one name would be a silent fault.
    names = all(re.fullmatch(r"(?=.*[^\W\d_])[^,.:\[\]{}\"]{1,60}", name) for name in names_in(cell))
    return "names" if names and all(len(name.split()) <= 6 for name in names_in(cell)) else "neither"


def csv_columns(table):
    """What the columns of a user's table are -> Columns; notes say what is left out and what is drawn.

    A column of a finding has states in all its cells. One of OF_NAMES has the names of findings; or, if it is
    called findings, a report. Where its cells do not say which, it is refused.
    """
    header, maybe, odd, kinds, names, unclear = (), [], set(), Counter(), {}, {}
    for where, row in read_table(table):
        if not header:
            header = maybe = [*row]
        for column in maybe:
            cell = row[column]
            if cell.strip().lower() in VALUES or cell.strip() == NOT_ANNOTATED or is_missing(cell):
                continue
            odd.add(column)
            if plain(column) not in OF_NAMES:
                maybe = [name for name in maybe if name != column]
            else:
                kinds[column, looks_like(cell)] += 1
                if looks_like(cell) == "names":
                    names.setdefault(column, set()).update(names_in(cell))
                else:
                    unclear.setdefault(column, where)
    if not header:
        raise BadInput(f"{table} has no row below its header")
    known = {role: one_column(table, header, role) for role in COLUMNS}
    if not known["image"]:
        raise BadInput(f"{table} has no column 'image'; it has {header_shown(header, ())}")
    of_names = [column for column in header if column in odd and plain(column) in OF_NAMES]
    for column in [*of_names]:
        number = {kind: kinds[column, kind] for kind in ("names", "report", "neither")}
        may_be_report = plain(column) in ("finding", "findings")
        if may_be_report and number["report"] > number["names"] + number["neither"]:
            of_names.remove(column)
            if all(plain(name) == "impression" for name in known["report"]):
                known["report"] = [*known["report"], column]
        elif column in unclear or (may_be_report and 20 <= number["names"] < 2 * len(names[column])):
            raise BadInput(
                f"{unclear.get(column, table)}: the column {column!r} may hold names of findings or reports; "
                "separate names by | or ; and call the column 'finding_labels', or call it 'report'"
            )
    used = {*chain(*known.values()), *of_names}
    states = [name for name in header if name not in odd and name not in used and may_be_finding(name)]
    names = set().union(*(names[column] for column in of_names))
    spelling = spellings([*names, *states])
    states = {column: spelling[column] for column in states}
    for finding, times in Counter(states.values()).items():
        if times > 1:
            raise BadInput(f"{table} has {times} columns of the finding {finding!r}; keep one")
    left_out = [name for name in header if name and name not in used and name not in states]
    if left_out:
        note(f"{table}: {len(left_out)} columns are left out, as they are no labels: {quoted(left_out)}")
    if not known["patient"]:
        note(f"{table} has no column 'patient': each image counts as a patient of its own")
    if not known["split"]:
        note(f"{table} has no column 'split': the splits are drawn by patient")
    return Columns(known, states, of_names, {name: spelling[name] for name in names}, left_out)


def one_column(table, header, role):
    """The column of one of COLUMNS, by its own or by another name -> list of one or none."""
    found = [name for name in header if plain(name) == role]
    found = found or [name for name in header if plain(name) in COLUMNS[role]]
    if len(found) > 1:
        raise BadInput(f"{table} has the columns {quoted(found)}; name the one that is the {role} {role!r}")
    return found


def may_be_finding(column):
    """Whether a column of states is one of a finding, by its name: age and sex, say, are none."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", column)
    known = plain(column) in KNOWN_COLUMNS | NO_FINDINGS
    return bool(column) and not known and not NO_FINDING_WORDS.intersection(map(str.lower, words))


def quoted(names):
    return ", ".join(map(repr, names))


@cache
def note(sentence):
    """Says something once, and only in the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------- protocols
#
# Evaluation sets that anyone can rebuild: each is a rule with a fixed seed. Two people compare the SHA-256 of
# their lists and need not share data.


def only_finding(record):
    """The one finding of an image besides "No Finding", or None."""
    findings = present(record) - {NO_FINDING}
    return next(iter(findings)) if len(findings) == 1 else None


def sample(rng, records, number, what="are there"):
    """So many of the records, drawn at random, each at most once."""
    if len(records) < number:
        raise BadInput(f"only {len(records)} images {what}; {number} are needed")
    return [records[i] for i in rng.choice(len(records), number, replace=False)]


def five_by(number, records, rng):
    """So many records of each of the five competition tasks, drawn from those that show nothing else."""
    drawn = []
    for task in COMPETITION:
        candidates = [record for record in records if only_finding(record) == task]
        drawn += sample(rng, candidates, number, f"show {task} and nothing else")
    return drawn


def gloria_5x200(records, seed=0):
    """GLoRIA's rule: frontal, one of the five tasks and nothing else, not even uncertain or a device."""
    frontal = [record for record in records if record.view in FRONTAL]
    certain = [r for r in frontal if -1 not in (r.labels | {NO_FINDING: None}).values()]
    return five_by(200, certain, np.random.RandomState(seed))


def medclip_5x200(records, seed=42):
    """MedCLIP's rule: all views, uncertain is absent; 400 of each task, and of these 2,000 a random half."""
    rng = np.random.RandomState(seed)
    return sample(rng, five_by(400, records, rng), 1000)


def gloria_split(records, seed=0):
    """GLoRIA's 70/15/15 of RSNA: the draws of scikit-learn's train_test_split -> {split: records}."""

    def cut(items, share):
        order = np.random.RandomState(seed).permutation(len(items))
        size = int(np.ceil(share * len(items)))
        return [items[i] for i in order[size:]], [items[i] for i in order[:size]]

    train, rest = cut(records, 0.3)
    test, valid = cut(rest, 0.5)
    return {"train": train, "valid": valid, "test": test}


def balanced(records, finding, seed=0, number=None):
    """As many records without the finding as with it; with `number`, so many of these at random (MedCLIP)."""
    rng = np.random.RandomState(seed)
    positive = [record for record in records if finding in present(record)]
    others = [record for record in records if finding not in present(record)]
    drawn = positive + sample(rng, others, len(positive), f"show no {finding}")
    return drawn if number is None else sample(rng, drawn, number)


class Protocol(NamedTuple):
    table: str  # what --table takes, for the help text
    read: object  # function: --table -> all records
    rule: object  # function: all records -> the chosen ones, by the published list's seed if there is one


CHEXPERT_TABLE, RSNA_TABLE = "CheXpert's train.csv", "RSNA's stage_2_train_labels.csv"
PROTOCOLS = {
    "chexpert-5x200": Protocol(CHEXPERT_TABLE, chexpert_table, gloria_5x200),
    "chexpert-5x200-medclip": Protocol(CHEXPERT_TABLE, chexpert_table, medclip_5x200),
    "mimic-5x200": Protocol(
        "MIMIC-CXR-JPG's metadata, split or chexpert table, with the other two beside it",
        lambda table: mimic_table(table, "validate", "test"),
        gloria_5x200,
    ),
    "rsna-all": Protocol(RSNA_TABLE, rsna_table, list),
    "rsna-balanced": Protocol(RSNA_TABLE, rsna_table, lambda records: balanced(records, "Pneumonia")),
    "rsna-gloria-train": Protocol(RSNA_TABLE, rsna_table, lambda records: gloria_split(records)["train"]),
    "rsna-gloria-valid": Protocol(RSNA_TABLE, rsna_table, lambda records: gloria_split(records)["valid"]),
    "rsna-gloria-test": Protocol(RSNA_TABLE, rsna_table, lambda records: gloria_split(records)["test"]),
    "covid-normal": Protocol(
        "the folder of COVID-19 Radiography",
        lambda folder: [r for r in covid_folders(folder) if present(r) & {"COVID-19", NO_FINDING}],
        lambda records: balanced(records, "COVID-19", 42, 3000),
    ),
}


def ids_sha256(ids):
    """SHA-256 of a list of ids joined by newlines: what `sha256sum` says of the file."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


@contextmanager
def replacing(path, mode="x"):
    """A file to write, "x" as text or "xb", that takes the place of the old one when it is whole.

    A crash or a full disk leaves the old file or the new one; a link is replaced, not followed.
    """
    temporary, text = Path(f"{path}.tmp"), {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    refuse_no_file(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save's own error, a RuntimeError, does not say that the disk is full.
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "is the disk full?" if full else "may its folder be written, and does no other program do it?"
        raise BadInput(f"{path} cannot be written; {why} ({error})") from error


def read_ids(path):
    ids = [id for _, line in read_lines(path) if (id := line.strip())]
    if not ids:
        raise BadInput(f"{path} is empty; `python data.py protocol` writes a list")
    return ids


# ---------------------------------------------------------------------------------------------------- pack
#
# A pack is a folder that holds images/, PNG files; table.csv in the form that `csv_table` reads; and
# bad.txt, a line for each image that could not be read and is not in the table.


def call_each(work, jobs):
    return [work(job) for job in jobs]


def in_processes(work, jobs, workers):
    """Calls work(job) for each job in loading processes, with a bar; yields the results in order."""
    batches = loader(jobs, workers, batch_size=16, collate_fn=partial(call_each, work))
    with tqdm(total=len(jobs), unit="image", mininterval=1, delay=2, disable=None) as bar:
        for results in readable(batches):
            yield from results
            bar.update(len(results))


def pack_image(side, channels, job):
    """Writes the image of a Record as a PNG file of side x side pixels, unless it is up to date.

    job: (image, file). Returns None or the error: those of loading processes would arrive as tracebacks.
    """
    image, file = job
    with suppress(BadInput, OSError):  # not there, or cut short when an earlier run was stopped
        changed = (
            isinstance(image, Path) and os.path.exists(image) and image.stat().st_mtime > file.stat().st_mtime
        )
        with Image.open(file) as packed:
            alike = packed.size == (side, side) and packed.mode == MODES[channels]
        if not changed and alike and read_image(file, channels):
            return None
    try:
        pixels = evaluation_transform(side)(read_image(image, channels))
        file.parent.mkdir(exist_ok=True, parents=True)
        to_pillow(pixels).save(file, "PNG")
    except (BadInput, OSError) as error:
        return error


def table_rows(chosen, images):
    """[(split, record), ...] and the names of their images -> rows of a table for csv_table, header first."""
    names = sorted(set().union(*(r.labels for _, r in chosen)))
    rows = [[*CSV_COLUMNS, *names]]
    for (split, r), image in zip(chosen, images, strict=True):
        labels = [r.labels.get(name, NOT_ANNOTATED) for name in names]  # None becomes blank
        rows.append([image, r.id, r.source, r.patient, split, r.view, r.report or "", *labels])
    return rows


def pack(data, out, *, side, channels=1, views=FRONTAL, section="both", workers=2):
    """Shrinks every image to `side` pixels a side, once, and writes a table; goes on where it was stopped.

    An image that is there, whole, of that size and newer than its source stays. Returns (number of images in
    the table, sentences on those that cannot be read, also in bad.txt).
    """
    out = Path(out)
    found = {(s, spec): read_split(spec, s, section=section) for s in SPLITS for spec in distinct(data)}
    splits = {s: [] for s in SPLITS}
    for (s, _), records in in_one_spelling(found).items():
        splits[s] += records
    check_patients(splits)
    refuse_repeats([r.id for r in chain(*splits.values())], f"{' and '.join(data)} has the image")
    chosen = [(split, r) for split, records in splits.items() for r in records if r.view in ("", *views)]
    check_images([r for _, r in chosen], 0, channels)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / "bad.txt").is_file():
        raise BadInput(f"{out} holds files and is no pack; give another --out")
    (out / "bad.txt").touch()
    names = [hashlib.sha256(f"{r.source} {r.id}".encode()).hexdigest()[:20] for _, r in chosen]
    images = [f"images/{name[:2]}/{name}.png" for name in names]
    header, *rows = table_rows(chosen, images)
    jobs = [(r.image, out / image) for (_, r), image in zip(chosen, images, strict=True)]
    kept, bad = [], []
    errors = in_processes(partial(pack_image, side, channels), jobs, workers)
    for row, error in zip(rows, errors, strict=True):
        if isinstance(error, OSError):  # a full disk
            raise error
        if error:
            bad.append(str(error))
        else:
            kept.append(row)
    if not kept:
        raise BadInput(f"there is nothing to pack: none of the {len(jobs)} images can be read")
    with replacing(out / "bad.txt") as file:
        file.write("".join(f"{sentence}\n" for sentence in bad))
    with replacing(out / "table.csv") as file:
        csv.writer(file).writerows([header, *kept])
    return len(kept), bad


# -------------------------------------------------------------------------------------------------- copies
#
# Collections are made out of each other. A difference hash finds an image again that was shrunk, compressed,
# brightened, framed or cropped a little: is each cell of a 16 x 16 grid brighter than its left neighbour?
# A second look at the details of both pictures tells copies from look-alikes. Neither finds a mirrored or
# inverted copy.

SAME, ALIKE = 22, 0.91  # bits of 256 that may differ, and how details have to correlate; see REPRODUCE.md
MARGINS = (0, 0.025, 0.05, 0.1)  # shares that are cut off each side, as a copy may lack them


def without_borders(grey):
    """(H, W) uint8 -> its part inside of borders that are black or white."""
    for _ in range(3):  # one border may lie in another
        dark, light = int(grey.min()) + 16, int(grey.max()) - 16
        for _axis in (0, 1):
            shown = np.flatnonzero((grey.max(1) > dark) & (grey.min(1) < light))
            if 16 <= len(shown) < len(grey):  # one line more on each side, as resizing has mixed it
                grey = grey[shown[0] + 1 : shown[-1]]
            grey = grey.T
    return grey


def picture_views(image):
    """Image of a Record -> (V, 64, 64) uint8: without borders, and without each of V margins."""
    small = read_image(image, about=128).resize((128, 128), Image.Resampling.BILINEAR)
    grey = without_borders(np.asarray(small))
    cuts = [(round(grey.shape[0] * share), round(grey.shape[1] * share)) for share in MARGINS]
    parts = [grey[y : grey.shape[0] - y, x : grey.shape[1] - x] for y, x in cuts]
    return np.stack([Image.fromarray(part).resize((64, 64), Image.Resampling.BILINEAR) for part in parts])


def picture_hash(image):
    """Image of a Record -> (V, 256) int8 of 1 and -1, a row for each view; 0: nothing to compare."""
    try:
        return hashes_of_views(picture_views(image))
    except BadInput:
        return np.zeros((len(MARGINS), 256), np.int8)


def hashes_of_views(views):
    """What picture_views gives -> what picture_hash gives."""
    views = map(Image.fromarray, views)
    cells = np.stack([view.resize((17, 16), Image.Resampling.LANCZOS) for view in views]).astype(np.int16)
    bits = np.where(np.diff(cells) > 0, 1, -1).astype(np.int8).reshape(len(cells), 256)
    return bits * (abs(bits.sum(1, keepdims=True)) <= 256 - 2 * SAME)


def near_pairs(one, other):
    """Hashes of N and of M images -> yields (rows, columns) of those that are near, for a block at a time.

    The whole of one picture is compared with all views of the other. Of one set with itself, row < column.
    """
    of_one, of_other = (np.flatnonzero(hashes[:, 0].any(1)) for hashes in (one, other))
    for i, j in product(range(0, len(of_one), 2048), range(0, len(of_other), 2048)):
        if one is other and j < i:
            continue
        rows, columns = of_one[i : i + 2048], of_other[j : j + 2048]
        left, right = (h.astype(np.float32).swapaxes(0, 1) for h in (one[rows], other[columns]))
        # The product is the number of equal bits less that of different ones.
        equal = left[0] @ right[0].T
        for view in range(1, len(MARGINS)):
            np.maximum(equal, left[0] @ right[view].T, out=equal)
            np.maximum(equal, left[view] @ right[0].T, out=equal)
        near_row, near_column = np.nonzero(equal >= 256 - 2 * SAME)
        rows, columns = rows[near_row], columns[near_column]
        once = (rows < columns) | (one is not other)
        yield rows[once], columns[once]


def correlation(one, other):
    """Of the details of two (64, 64) uint8 pictures, the best over shifts of up to three pixels -> float."""
    spectra = []
    for picture in (Image.fromarray(one), Image.fromarray(other)):
        details = np.subtract(picture, picture.filter(ImageFilter.GaussianBlur(6)), dtype=np.float32)
        details -= details.mean()
        spectra.append(np.fft.fft2(details / (np.linalg.norm(details) + 1e-6)))
    shifts = np.arange(-3, 4)
    return np.fft.ifft2(spectra[0] * spectra[1].conj()).real[np.ix_(shifts, shifts)].max()


def alike(one, other):
    """Whether two pictures show the same, by the views of both: hash and details of one pair of views."""
    equal = hashes_of_views(one).astype(int) @ hashes_of_views(other).T.astype(int)
    near = [(i, j) for i, j in np.argwhere(equal >= 256 - 2 * SAME) if i == 0 or j == 0]
    return any(correlation(one[i], other[j]) >= ALIKE for i, j in near)


def hashes_of(records, workers=0):
    images = [record.image for record in records]
    return np.reshape(list(in_processes(picture_hash, images, workers)), (-1, len(MARGINS), 256))


def copied_pairs(records, others, workers=0):
    """Yields (record, other) for near copies; of one list with itself each pair once."""
    hashes = hashes_of(records, workers)
    views = lru_cache(4096)(lambda record: picture_views(record.image))
    for rows, columns in near_pairs(hashes, hashes if others is records else hashes_of(others, workers)):
        for one, other in ((records[i], others[j]) for i, j in zip(rows, columns, strict=True)):
            if alike(views(one), views(other)):
                yield one, other


def near_copies(records, listed, workers=0):
    """The records whose image is a near copy of a listed one, the listed ones included -> list."""
    copies = {one for one, _ in copied_pairs(records, [*listed], workers)}
    return [record for record in records if record in copies]


def print_copies(found, workers):
    """Prints near copies among [(data set, split, record), ...] -> whether one is in train and test."""
    places, number, examples = {record: place for *place, record in found}, Counter(), []
    records = [*places]
    for one, other in copied_pairs(records, records, workers):
        number[tuple(places[one]), tuple(places[other])] += 1
        if len(examples) < 3:
            examples.append(f"    {one.image} = {other.image}")
    rule = f"{SAME} of 256 bits may differ, details correlate by {ALIKE} or more"
    print(f"near copies ({rule}): {number.total():,} pairs")
    for both, times in number.items():
        print(f"  {times:,} in {' and '.join(map(' '.join, dict.fromkeys(both)))}")
    print("\n".join(examples))
    return any({one[1], other[1]} == {"train", "test"} for one, other in number)


# ----------------------------------------------------------------------------------------------- data sets

DATASETS = {
    "phantom": phantom, "chexpert": chexpert, "mimic-cxr": mimic_cxr, "rsna": rsna,
    "covid-radiography": covid_radiography, "openi": openi, "nih-chestxray14": nih_chestxray14,
    "covid-chestxray": covid_chestxray, "medpix2": medpix2, "roco": roco,
    "folder": class_folder_images, "csv": csv_table,
}  # fmt: skip


def read_split(spec, split, limit=None, section="both"):
    """The records of one split of "NAME" or "NAME=ROOT", see read_records; no two have one id."""
    name, _, root = spec.partition("=")
    if name not in DATASETS:
        way_out = f"; write NAME={name} or csv=TABLE" if os.path.exists(name) else ""
        raise BadInput(f"unknown data set {name!r}; known are {', '.join(DATASETS)}{way_out}")
    if name != "phantom" and not root:
        raise BadInput(f"{name} needs its folder: --data {name}=FOLDER")
    if name not in ("phantom", "csv") and not Path(root).is_dir():
        raise BadInput(f"the folder {root} of {name} is not there")
    options = {"limit": limit} if name == "phantom" and limit else {}
    options |= {"section": section} if name in WITH_SECTIONS else {}
    records = DATASETS[name](root, split, **options)
    refuse_repeats([r.id for r in records], f"{name} in its split {split!r} has the image")
    return records


def distinct(data):
    """The specs without those that name the data of an earlier one by another path -> list."""
    spec_of = {}
    for spec in data:
        name, _, root = spec.partition("=")
        file = Path(root, "table.csv") if name == "csv" and Path(root).is_dir() else root
        spec_of.setdefault((name, root and os.path.realpath(file)), spec)
    return [*spec_of.values()]


def in_one_spelling(found):
    """{key: records}, with one spelling for names of findings that are alike, see `plain`."""
    labels = {id(record.labels): record.labels for records in found.values() for record in records}
    spelling = spellings(set().union(*labels.values()))
    if all(name == here for name, here in spelling.items()):
        return found
    labels = {key: {spelling[name]: value for name, value in each.items()} for key, each in labels.items()}
    return {s: [replace(r, labels=labels[id(r.labels)]) for r in records] for s, records in found.items()}


def read_records(data, split, limit=None, section="both"):
    """Records of several data sets as their sources have them, all views, four states -> {spec: records}.

    data: ["NAME" or "NAME=ROOT", ...] with names of DATASETS. split: one of SPLITS, or "all".
    limit: of phantoms, which have to be drawn, the first so many alone. section: one of SECTIONS.
    Refuses a patient in two of the splits that are read. Where a csv table is mixed with other data these are
    all splits, since both may have the same patients.
    """
    wanted, found, data = SPLITS if split == "all" else (split,), {}, distinct(data)
    mixed = len(data) > 1 and any(spec.startswith("csv=") for spec in data)
    for part in SPLITS if mixed else wanted:
        specs = data if part in wanted else [spec for spec in data if not spec.startswith("phantom")]
        found[part] = {spec: read_split(spec, part, limit, section) for spec in specs}
    check_patients({part: [*chain(*records.values())] for part, records in found.items()})
    return in_one_spelling({spec: [*chain(*(found[part][spec] for part in wanted))] for spec in data})


def first(limit, records):
    """The first so many in a fixed shuffle, since tables may be sorted by class; kept in their order."""
    rows = np.random.default_rng(0).permutation(len(records))[:limit]
    return [records[row] for row in sorted(rows)]


def check_section(section, data):
    """Refuses a choice of section for data sets whose reports have none."""
    if section != "both" and not any(spec.partition("=")[0] in WITH_SECTIONS for spec in data):
        way_out = "; a pack has the section that it was made with" if "csv" in "".join(data) else ""
        raise BadInput(
            f"--section {section} is for {' and '.join(WITH_SECTIONS)}, and none is in --data{way_out}"
        )


def check_reports(found, section="both"):
    """Refuses training data, as read_records found them, in which a set that has reports shows none."""
    records = [*chain(*found.values())]
    for source in WITH_SECTIONS:
        reports = [record.report for record in records if record.source == source]
        if reports and not any(reports):
            raise BadInput(
                f"none of {len(reports):,} training images of {source} has a report (--section {section}); "
                "its reports belong below the folder that --data names, beside the images, and "
                "--no-image-text trains on labels alone"
            )


def load_records(data, split, limit=None, *, views=FRONTAL, uncertain="ignore", section="both"):
    """The records of a split to train on or to evaluate, settled.

    data: as for read_records, or what it found. views: to keep, beside images whose source never says it.
    limit: keep so many of each data set (smoke runs), see `first`. Data sets of which nothing is left are
    named in a note; where this is so of all, Lacking is raised.
    """
    found = data if isinstance(data, dict) else read_records(data, split, limit, section)
    records, lacking = [], []
    for spec, read in found.items():
        kept = first(limit, [record for record in read if record.view in ("", *views)])
        kept = [settle(record, uncertain) for record in kept]
        records += kept
        if not kept:
            without = f" with the view {' or '.join(views)}, see --views" if read else ""
            lacking.append(f"{spec.partition('=')[0]} has no record in its split {split!r}{without}")
    if not records:
        raise Lacking(f"{' and '.join(lacking)}; another split or another data set has to be named")
    for sentence in lacking:
        note(f"{sentence}; the others are used")
    return records


def pick_listed(records, ids, where):
    """The records with these ids, each once, in the order of the list; an id must have one image."""
    ids = dict.fromkeys(ids)
    refuse_repeats([record.id for record in records if record.id in ids], f"{where} has the image")
    of_id = {record.id: record for record in records}
    missing = [id for id in ids if id not in of_id]
    if missing:
        there = f"; an id there looks like {shown(next(iter(of_id)))}" if of_id else ""
        some = f"{len(missing)} of the {len(ids)} listed ids are not in {where}"
        raise BadInput(f"{some}, such as {shown(missing[0])}{there}")
    return [of_id[id] for id in ids]


# ------------------------------------------------------------------------------------------------- program


def summary(args):
    """Prints what data sets hold and what is wrong with them, no word of any report -> exit status."""
    missing, found = 0, []
    for spec in distinct(args.data):
        splits = {split: read_split(spec, split) for split in SPLITS}
        missing += print_summary(spec, splits)
        found += [(spec, split, record) for split in SPLITS for record in splits[split]]
    check_patients({split: [r for _, s, r in found if s == split] for split in SPLITS})
    files = [each for each in found if isinstance(each[2].image, Path)]  # phantoms are alike, and no copies
    copied = args.copies and print_copies(files, args.workers)
    return 1 if missing or copied else 0


def print_columns(columns):
    """Prints what the columns of a user's table are taken for."""
    for role, found in columns.known.items():
        print(f"{role:10}{' and '.join(map(repr, found)) or '-'}")
    named = [f"those named in {column!r}" for column in columns.names]
    print(f"{'findings':10}{', '.join([*map(repr, columns.states), *named]) or '-'}")
    print(f"{'left out':10}{quoted(columns.left_out) or '-'}\n")


def print_summary(spec, splits):
    """Prints the summary of one data set -> number of files that are missing."""
    records = list(chain(*splits.values()))
    print(spec)
    if spec.startswith("csv="):
        print_columns(csv_columns(csv_file(spec.partition("=")[2])))
    print(f"{'':28}{'images':>10}{'patients':>10}{'reports':>10}{'labelled':>10}")
    for split, found in splits.items():
        patients, reports = len({r.patient for r in found}), sum(r.report is not None for r in found)
        labelled = sum(1 in r.labels.values() for r in found)
        print(f"{split:28}{len(found):10,}{patients:10,}{reports:10,}{labelled:10,}")
    views = Counter(record.view or "not said" for record in records)
    print(f"views: {', '.join(f'{view} {count:,}' for view, count in views.most_common())}")

    counts, absent = Counter(), 0
    for labels, times in Counter(tuple(r.labels.items()) for r in records).items():
        counts.update(dict.fromkeys(labels, times))
        absent += times * sum(value is None and name in settled(labels, "ignore") for name, value in labels)
    print(f"\n{'':28}{'1':>10}{'0':>10}{'-1':>10}{'blank':>10}")
    for name in sorted({name for name, _ in counts}):
        print(f"{name:28}" + "".join(f"{counts[name, value]:10,}" for value in STATES))
    blank = sum(times for (_, value), times in counts.items() if value is None)
    if blank:
        print(f"of {blank:,} blanks {absent:,} count as absent, beside a finding; the others are unknown")

    missing = [r.image for r in records if isinstance(r.image, Path) and not os.path.exists(r.image)]
    print(f"\nmissing files: {len(missing):,}")
    print("".join(f"    {path}\n" for path in missing[:3]))
    return len(missing)


def protocol(args):
    """Writes the list of a protocol and prints its SHA-256 -> exit status."""
    known, out = PROTOCOLS[args.name], Path(args.out)
    records = known.read(args.table)
    refuse_repeats([record.id for record in records], f"{args.table} has the image")
    chosen = known.rule(records)
    if not chosen:
        raise BadInput(f"{args.table} has no image for {args.name}")
    ids, patients = [record.id for record in chosen], len({record.patient for record in chosen})
    if os.path.lexists(out) and not (out.is_file() and out.read_bytes() == "\n".join(ids).encode()):
        raise BadInput(f"{out} is there and is not this list; give another --out or delete it")
    with replacing(out) as file:
        file.write("\n".join(ids))
    left = hold_out(records, chosen)
    print(f"{args.name}: {len(ids):,} ids of {patients:,} patients in {out}")
    print(f"left without these patients: {len(left):,} images of {len({r.patient for r in left}):,} patients")
    print(f"SHA-256 {ids_sha256(ids)}")
    return 0


def run_pack(args):
    """Packs data sets -> exit status."""
    os.umask(0o077)  # a pack holds reports and pictures of patients
    check_section(args.section, args.data)
    options = {"channels": args.channels, "views": args.views, "section": args.section}
    good, bad = pack(args.data, args.out, side=args.image_size, workers=args.workers, **options)
    if bad:
        print(f"{len(bad):,} images cannot be read and are left out; {args.out}/bad.txt names all:")
        print("\n".join(bad[:3]))
    print(f"{good:,} images packed; use them by --data csv={args.out}")
    return 0


def number_type(kind, low, high=sys.float_info.max):
    """A type for argparse: int or float, from `low` to `high`."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            bounds = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is no number {bounds}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse puts it into its own errors
    return read


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options\n")


def build_parser():
    about = "Look into data sets, rebuild protocols, pack images."
    p = Parser(description=about, allow_abbrev=False)
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    amount, size = number_type(int, 0, 256), number_type(int, 1, 4096)

    def command(run, name, help):
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added.add_argument

    def data_options(add):
        add("--data", nargs="+", required=True, metavar="NAME=ROOT", help=", ".join(DATASETS))
        add("--workers", type=amount, default=min(os.cpu_count(), 16), help="processes that read images")

    add = command(summary, "summary", "count what is there and check it; status 1 where a check fails")
    data_options(add)
    add("--copies", action=argparse.BooleanOptionalAction, default=True, help="look for near copies")
    add = command(protocol, "protocol", "write the list of ids of an evaluation set and print its SHA-256")
    needed = "; ".join(f"{name}: --table names {known.table}" for name, known in PROTOCOLS.items())
    add("name", choices=PROTOCOLS, help=needed)
    add("--table", required=True, metavar="FILE", help="the published table, or what NAME says, above")
    add("--out", required=True, metavar="FILE")
    add = command(run_pack, "pack", "shrink every image to a PNG file once; goes on where it was stopped")
    data_options(add)
    add("--out", required=True, metavar="FOLDER")
    add("--views", nargs="+", choices=VIEWS, default=FRONTAL, help="images to keep")
    add("--section", choices=SECTIONS, default="both", help=SECTION_HELP)
    add("--image-size", type=size, default=256, help="pixels a side, the model's or more")
    add("--channels", type=int, choices=MODES, default=1, help="1 packs grey, 3 colour")
    return p


def text(given):
    """A type for argparse: text that can be written as UTF-8. What a shell hands over need not be."""
    given.encode()
    return given


def interrupt(*_):
    """Answers Ctrl-C: the first one ends the work, a second does not even wait for that end."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


@contextmanager
def interruptible():
    """While it lasts, Ctrl-C is answered by `interrupt`, if it is not ignored and this is the main thread."""
    before = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):
        signal.signal(signal.SIGINT, before if before is signal.SIG_IGN else interrupt)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def run_program(name, work, stopped):
    """Runs work() -> its exit status; 2, after one sentence, for what a user can mend; 130 at Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a notebook
            stream.reconfigure(errors="backslashreplace")  # a name, or a terminal, need not be UTF-8
    try:
        with interruptible():
            return work() or 0
    except UnicodeEncodeError:
        said = "a name of a file, or a text, is not UTF-8, and is needed as text; rename it"
    except (BadInput, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        said = error
    except (RuntimeError, MemoryError) as error:  # torch's, for a lost process and for want of memory
        if re.search("gloo|NCCL|Connection", str(error), re.I):
            said = f"another process has ended or does not answer; its message says why ({error})"
        elif re.search("memory|DataLoader", repr(error), re.I):
            said = f"it failed, maybe for want of memory; try --micro-batch-size or fewer --workers ({error})"
        else:
            raise
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; {stopped}", file=sys.stderr)
        return 130
    print(f"{name}: {textwrap.shorten(str(said), 1000)}", file=sys.stderr)  # a library's has many lines
    return 2


def main(argv=None):
    args = build_parser().parse_args(argv)
    return run_program("data.py", lambda: args.run(args), "the same command goes on with an unfinished pack")


if __name__ == "__main__":
    sys.exit(main())
