"""Data sets as records, and records as batches.

Name               Access                         What is read of it
phantom            drawn here from a seed         image, report, findings; no file, nothing clinical
medpix2            MedPix 2.0, free with citation CT and MR images, captions, location category
nih-chestxray14    NIH, free with citation        chest X-rays, 14 findings and "No Finding"
covid-chestxray    github.com/ieee8023            chest X-rays, clinical notes, COVID-19 and others

A finding of a record is present, absent, or, where its source does not annotate it, unknown. Unknown is
neither: such an image is no negative for that finding's prompt. "No Finding" is a finding of its own and
excludes all others.
"""

import csv
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2

SPLITS = ("train", "valid", "test")
NO_FINDING = "No Finding"


class BadInput(Exception):
    """Something that the user gave cannot be used; the message is one sentence with the way out."""


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and what its source says of it.

    image: path of the file, or the grey image itself as (H, W) uint8.
    report: text about the whole image, or None.
    findings: those present. absent: those that the source rules out. All others are unknown.
    patient: no patient is in two splits. source: name of the data set.
    """

    image: Path | np.ndarray
    report: str | None
    findings: frozenset
    patient: str
    source: str
    absent: frozenset = frozenset()


# ------------------------------------------------------------------------------------------------- records


def load_records(data, split, limit=None):
    """Records of several data sets, one after the other.

    Args:
        data: ["NAME" or "NAME=ROOT", ...] with names of DATASETS. split: one of SPLITS.
        limit: keep the first so many of each data set (smoke runs).

    Raises:
        BadInput: an unknown name, a root that cannot be read, or nothing left.
    """
    records = []
    for spec in data:
        name, _, root = spec.partition("=")
        if name not in DATASETS:
            raise BadInput(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
        if name != "phantom":
            if not root:
                raise BadInput(f"{name} needs its folder: --data {name}=FOLDER")
            if not Path(root).is_dir():
                raise BadInput(f"the folder {root} of {name} is not there")
        found = DATASETS[name](root, split)
        if not found:
            raise BadInput(f"{name} has no record in its split {split!r}")
        records += found[:limit]
    return records


def vocabulary(records):
    """The findings that are present in a record at least once -> sorted list of str."""
    return sorted(set().union(*(record.findings for record in records)))


def label_matrices(records, findings):
    """What is known of each finding in each record.

    Args:
        findings: C names, the columns; others are left out.

    Returns:
        present, absent: two (N, C) bool tensors; where both are False the finding is unknown. A record with
        "No Finding" has no other finding, and the reverse.
    """
    present = torch.tensor([[name in record.findings for name in findings] for record in records])
    absent = torch.tensor([[name in record.absent for name in findings] for record in records])
    present, absent = present.view(len(records), -1), absent.view(len(records), -1)
    for column, name in enumerate(findings):
        healthy = torch.tensor([NO_FINDING in record.findings for record in records])
        other = torch.tensor([bool(record.findings - {NO_FINDING}) for record in records])
        absent[:, column] |= (other if name == NO_FINDING else healthy) & ~present[:, column]
    return present, absent


def pick_split(splits, split):
    """One of {split: records}, after a check that no patient is in two of them."""
    owner = {}
    for name, records in splits.items():
        for record in records:
            if owner.setdefault(record.patient, name) != name:
                raise BadInput(
                    f"patient {record.patient} of {record.source} is in the splits {owner[record.patient]!r} "
                    f"and {name!r}; each patient belongs in one"
                )
    return splits[split]


def split_by_patient(records, shares=(0.7, 0.1, 0.2), seed=0):
    """Splits for a data set without official ones: patients shuffled by the seed, cut by the shares (ours).

    Returns:
        {split: records}, in the order of SPLITS.
    """
    patients = np.array(sorted({record.patient for record in records}))
    np.random.RandomState(seed).shuffle(patients)
    cuts = np.cumsum(np.array(shares[:-1]) * len(patients)).round().astype(int)
    split_of = {p: split for split, part in zip(SPLITS, np.split(patients, cuts), strict=True) for p in part}
    splits = {split: [] for split in SPLITS}
    for record in records:
        splits[split_of[record.patient]].append(record)
    return splits


def read_table(path, columns):
    """Rows of a CSV file as dicts; the file and the columns must be there."""
    if not path.is_file():
        raise BadInput(f"{path} is not there; it is the table of this data set")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise BadInput(f"{path} has no column {missing[0]!r}; it has {', '.join(rows.fieldnames or ())}")
        return list(rows)


def medpix2(root, split):
    """MedPix 2.0: image, caption and location category, in its official splits; a patient is one case."""
    categories = {"Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax"}
    files = {"train": "train", "valid": "dev", "test": "test"}
    splits = {}
    for name, file in files.items():
        path = Path(root, "splitted_dataset", f"descriptions_{file}.jsonl")
        if not path.is_file():
            raise BadInput(f"{path} is not there; medpix2 needs it and images/ beside splitted_dataset/")
        splits[name] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            try:
                row = json.loads(line)
                image = Path(root, "images", row["image"] + ".png")
                caption, category, case = row["Description"]["Caption"], row["Location Category"], row["U_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path}, line {number}, is not a MedPix description: {error!r}") from error
            report, absent = (caption or "").strip() or None, frozenset(categories - {category})
            splits[name].append(Record(image, report, frozenset({category}), case, "medpix2", absent))
    return pick_split(splits, split)


def nih_chestxray14(root, split):
    """NIH ChestX-ray14: image and findings; the official test list if it is there, else splits by patient."""
    needed = ("Image Index", "Finding Labels", "Patient ID")
    rows = read_table(Path(root, "Data_Entry_2017_v2020.csv"), needed)
    # One folder, or images_001/images to images_012/images in Kaggle's copy.
    folders = [Path(root, "images"), *sorted(Path(root).glob("images_*/images"))]
    places = {entry.name: folder for folder in folders if folder.is_dir() for entry in os.scandir(folder)}
    named = [frozenset(row["Finding Labels"].split("|")) for row in rows]
    annotated = frozenset().union(*named)
    records = []
    for row, present in zip(rows, named, strict=True):
        image = places.get(row["Image Index"], folders[0]) / row["Image Index"]
        patient = row["Patient ID"]
        records.append(Record(image, None, present, patient, "nih-chestxray14", annotated - present))
    official = Path(root, "test_list.txt")
    if not official.is_file():
        return pick_split(split_by_patient(records), split)
    test = set(official.read_text().split())
    splits = split_by_patient([r for r in records if r.image.name not in test], shares=(0.9, 0.1, 0.0))
    return pick_split({**splits, "test": [r for r in records if r.image.name in test]}, split)


def covid_chestxray(root, split):
    """ieee8023/covid-chestxray-dataset: frontal X-rays, clinical notes as reports; splits by patient."""
    needed = ("patientid", "finding", "view", "modality", "folder", "filename", "clinical_notes")
    records = []
    for row in read_table(Path(root, "metadata.csv"), needed):
        # "Pneumonia/Viral/COVID-19" in later releases, "COVID-19, ARDS" in earlier: the most exact names.
        names = {name.strip().rsplit("/", 1)[-1] for name in row["finding"].split(",")}
        names -= {"", "todo", "Unknown"}
        if row["modality"] != "X-ray" or not row["view"].startswith(("PA", "AP")) or not names:
            continue
        image = Path(root, row["folder"], row["filename"])
        notes = row["clinical_notes"].strip() or None
        records.append(Record(image, notes, frozenset(names), row["patientid"], "covid-chestxray"))
    return pick_split(split_by_patient(records), split)


# -------------------------------------------------------------------------------------------------- images

MEAN, STD = 0.5, 0.25  # of grey values in 0 ... 1 (ours)


def read_image(image):
    """A path, or (H, W) uint8 -> Pillow image of mode "L".

    Raises:
        BadInput: the file is missing, empty, cut short, or no image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(image) as file:
            if not file.mode.startswith("I"):
                return file.convert("L")
            grey = np.asarray(file).astype(np.float32) / 257  # 16 bits, which Pillow would clip at 255
            return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        way_out = "repair it or use --skip-bad-images"
        raise BadInput(f"the image {image} cannot be read ({error}); {way_out}") from error


def pad_to_square(image):
    """Pillow image -> (1, S, S) uint8 tensor, black beside the shorter side."""
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    margins = [left, top, side - width - left, side - height - top]
    return v2.functional.pad(v2.functional.pil_to_tensor(image), margins)


def evaluation_transform(size):
    """Pillow image -> (1, size, size) uint8 tensor."""
    return v2.Compose([pad_to_square, v2.Resize((size, size), antialias=True)])


def training_transform(size, horizontal_flip=False):
    """The same, varied: crop, rotation and shift, brightness and contrast (family: MedCLIP's, milder).

    horizontal_flip: mirrors half of the images; that puts hearts on the wrong side and contradicts "left".
    """
    return v2.Compose(
        [
            pad_to_square,
            v2.RandomResizedCrop((size, size), scale=(0.75, 1.0), ratio=(0.9, 1.1), antialias=True),
            v2.RandomAffine(degrees=8, translate=(0.05, 0.05), interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.RandomHorizontalFlip(0.5 if horizontal_flip else 0.0),
        ]
    )


class Images(torch.utils.data.Dataset):
    """Records as (place in the list, (1, S, S) uint8 tensor or the BadInput of an unreadable image)."""

    def __init__(self, records, transform):
        self.records = records
        self.transform = transform

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return i, self.transform(read_image(self.records[i].image))
        except BadInput as error:
            return i, error


# ------------------------------------------------------------------------------------------------- batches


class Tokens(NamedTuple):
    """input_ids, attention_mask: (B, L) int64 each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Batch(NamedTuple):
    """What one training step sees: B images, R reports, Q images with labels, P distinct label prompts.

    rows: (B,) int64, which records these are.
    images: (B, 1, S, S) float.
    present, absent: (B, C) bool.
    reports: pieces of Tokens, R reports in all, in order of length, each piece padded to its longest.
    report_rows: (R,) int64, the row of each report's image.
    prompts: Tokens of the P distinct prompts drawn in this batch.
    prompt_labels: (P, C) bool, the one finding that each prompt names.
    prompt_index, prompt_rows: (Q,) int64, the prompt and the row of each image with labels.
    unreadable: one sentence for each image left out because it cannot be read.
    """

    rows: torch.Tensor
    images: torch.Tensor
    present: torch.Tensor
    absent: torch.Tensor
    reports: list
    report_rows: torch.Tensor
    prompts: Tokens
    prompt_labels: torch.Tensor
    prompt_index: torch.Tensor
    prompt_rows: torch.Tensor
    unreadable: list


def tokenize(tokenizer, texts, max_length):
    """Texts -> Tokens, padded to the longest; longer ones are cut to max_length, [CLS] and [SEP] included."""
    ids = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    ids = [torch.tensor(row) for row in ids]
    padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(row) for row in ids])
    return Tokens(padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long())


def in_pieces(tokens, pieces):
    """Tokens -> (order, [Tokens, ...]): sorted by length, in pieces that are no wider than their longest."""
    lengths = tokens.attention_mask.sum(1)
    order = lengths.argsort(stable=True)
    cut = [Tokens(*(t[rows, : int(lengths[rows].max())] for t in tokens)) for rows in order.chunk(pieces)]
    return order, cut


class Collate:
    """Makes a Batch of what Images yields; each labelled image draws one of its findings as its prompt.

    Args:
        records: the same list as that of Images. findings: C names.
        prompts: Tokens of C label prompts, in the order of findings; None draws none.
        tokenizer, max_length: for the reports.
        pieces: number of pieces that the reports of a batch are encoded in.
    """

    def __init__(self, records, findings, prompts, tokenizer, max_length, pieces=4):
        self.records = records
        self.present, self.absent = label_matrices(records, findings)
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pieces = pieces

    def __call__(self, items):
        unreadable = [str(image) for _, image in items if isinstance(image, BadInput)]
        items = [(row, image) for row, image in items if not isinstance(image, BadInput)]
        rows = torch.tensor([row for row, _ in items], dtype=torch.long)
        images = torch.stack([image for _, image in items]) if items else torch.zeros(0, 1, 1, 1)
        present = self.present[rows]

        texts = [self.records[row].report for row in rows.tolist()]
        report_rows = torch.tensor([i for i, text in enumerate(texts) if text is not None], dtype=torch.long)
        reports = []
        if len(report_rows):
            tokens = tokenize(self.tokenizer, [text for text in texts if text is not None], self.max_length)
            order, reports = in_pieces(tokens, self.pieces)
            report_rows = report_rows[order]

        prompt_rows = present.any(1).nonzero()[:, 0] if self.prompts else torch.zeros(0, dtype=torch.long)
        drawn = present[prompt_rows].float().multinomial(1)[:, 0] if len(prompt_rows) else prompt_rows
        distinct, prompt_index = drawn.unique(return_inverse=True)
        return Batch(
            rows=rows,
            images=(images.float() / 255 - MEAN) / STD,
            present=present,
            absent=self.absent[rows],
            reports=reports,
            report_rows=report_rows,
            prompts=Tokens(*(t[distinct] for t in self.prompts)) if self.prompts else None,
            prompt_labels=torch.eye(present.shape[1], dtype=torch.bool)[distinct],
            prompt_index=prompt_index,
            prompt_rows=prompt_rows,
            unreadable=unreadable,
        )


def to_device(batch, device):
    """A Batch, or anything in it, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        return type(batch)(*(to_device(item, device) for item in batch))
    return [to_device(item, device) for item in batch] if isinstance(batch, list) else batch


def count_unreadable(batch, skip):
    """How many images of a batch could not be read; the first is refused unless they are to be skipped."""
    if batch.unreadable and not skip:
        raise BadInput(batch.unreadable[0])
    return len(batch.unreadable)


# ------------------------------------------------------------------------------------------------- phantoms
#
# Drawn chest radiographs with known findings, and the reports that describe them. A radiograph adds up what
# the rays meet, so a phantom does too: brightness is 1 - exp(-attenuation). Tissue attenuates, bone adds to
# it, air does not; a finding takes the place of air. The shapes are not clinical: they have to be told apart
# by the signs that a radiologist looks for, and no more.
#
# Anatomy is drawn in the patient's frame: x and y from -1 to 1, y downwards, x to the right of the image,
# which is the patient's left. `out` = |x| is the distance from the midline, so one formula draws both lungs.

PHANTOM_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")

# How hard the phantoms are.
CONTRAST = 1.0  # size and density of every finding
TRACE = 0.08  # a healthy chest is not blank: each absent finding is drawn at a strength of up to this
NOISE = 0.03  # standard deviation of the film grain, white being 1
VARIETY = 1.0  # how much build, breath and position differ between patients
DEVICES = 0.3  # share of patients with a tube, a pacemaker or leads
LEFT_OUT = 0.05  # share of the drawn findings that their report does not mention

# Each patient's own strength is within 0.1 of these, so TRACE above 0.2 makes some mild cases undecidable.
STRENGTH = {"mild": 0.3, "moderate": 0.6, "severe": 0.9}
SIDES = {
    "Atelectasis": ("left", "right", "bilateral"),
    "Cardiomegaly": ("",),
    "Consolidation": ("left", "right"),
    "Edema": ("bilateral",),
    "Pleural Effusion": ("left", "right", "bilateral"),
}
ZONES = {"upper": -0.42, "middle": -0.1, "lower": 0.22}  # y of the middle of each third of a lung
DEVICE_NAMES = ("endotracheal tube", "pacemaker", "leads")


class Drawn(NamedTuple):
    """One thing in the image, in the words that its report may use, and where it came to lie."""

    severity: str  # mild, moderate or severe; "" for a device
    side: str  # the patient's left or right, bilateral, or ""
    place: str  # upper, middle or lower for a consolidation, the name of a device, else ""
    box: tuple[float, float, float, float]  # left, top, right, bottom in fractions of the image


def pick(rng, options):
    return options[rng.integers(len(options))]


def soft(distance, edge=0.02):
    """1 inside (distance > 0), 0 outside, a smooth edge between: small images get no stairs."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * edge))


def line(distance, width):
    return np.exp(-((distance / width) ** 2))


@lru_cache
def grids(size):
    """Pixel centres x and y, (size, size) from -1 to 1, and the (size, 12) bumps that clouds are made of."""
    ticks = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    bumps = line(ticks[:, None] - np.linspace(-1, 1, 12, dtype=np.float32), 0.15)
    return *np.meshgrid(ticks, ticks), bumps


def clouds(rng, size):
    """(size, size) smooth random texture, mean 0 and standard deviation about 1."""
    bumps = grids(size)[2]
    return bumps @ rng.standard_normal((12, 12), dtype=np.float32) @ bumps.T


def box_around(shadow):
    """Left, top, right, bottom, in fractions of the image, of all above a third of the highest value."""
    seen = shadow >= shadow.max() / 3
    columns, rows = (np.flatnonzero(seen.any(axis)).tolist() for axis in (0, 1))
    size = len(shadow)
    return columns[0] / size, rows[0] / size, (columns[-1] + 1) / size, (rows[-1] + 1) / size


def place_patient(rng, size, heart_ratio, lift):
    """One patient's build: maps (size, size) of coordinates and of organs from 0 to 1, and a few lengths.

    heart_ratio: width of the heart over that of the chest; above 0.5 it is enlarged.
    lift: how far lost volume pulls up the diaphragm, {"left": length, "right": length}.
    """

    def vary(mean, spread):
        return mean + VARIETY * spread * rng.uniform(-1, 1)

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
    vessels = line(np.sin(5 * angle + 5 * from_hilum + vary(0, 3) + left), 0.35 + 0.02 / (from_hilum + 0.1))
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
    haze = 0.7 * line(p.from_hilum, 0.3 + 0.2 * strength) * (1 + 0.25 * clouds(rng, p.size))
    swollen = p.vessels * line(p.from_hilum, 0.35 + 0.3 * strength)
    septal = line(np.sin(40 * p.y), 0.5) * soft(p.across - 0.55, 0.05) * soft(p.y, 0.05)
    return strength * (haze + 0.4 * swollen + 0.3 * septal)


def atelectasis(rng, p, strength, zone):
    """Plates of collapsed lung above the diaphragm, which is drawn up (see `lift`)."""
    plates = 0
    for _ in range(1 + round(2 * strength)):
        y = p.floor - rng.uniform(0.02, 0.3) + rng.uniform(-0.4, 0.4) * p.half * p.across
        ends = soft(rng.uniform(0.5, 0.8) - np.abs(p.across - rng.uniform(-0.2, 0.4)), 0.08)
        plates = np.maximum(plates, line(p.y - y, 0.02 + 0.03 * strength) * ends)
    return np.tanh(2 * strength) * plates


SHADOWS = {
    "Atelectasis": atelectasis,
    "Consolidation": consolidation,
    "Edema": edema,
    "Pleural Effusion": effusion,
}


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
        return 0.8 * line(p.x - 0.02, 0.025) * soft(-0.3 - p.y)
    if name == "pacemaker":
        lead = line(p.x - 0.1 - 0.45 * np.cos(2.2 * (p.y + 0.5)), 0.02) * soft(0.3 - np.abs(p.y + 0.15))
        return 1.5 * soft(0.11 - np.maximum(np.abs(p.x - 0.55), np.abs(p.y + 0.52))) + lead
    wires = line(p.out - 0.5 + 0.25 * np.sin(2.5 * p.y + 0.8), 0.018) * soft(0.5 - np.abs(p.y))
    return 0.5 * wires + 1.2 * soft(0.045 - np.hypot(p.out - 0.6, np.abs(p.y) - 0.5))


def draw_phantom(rng, findings, size=64):
    """Draw one chest.

    Args:
        rng: numpy Generator, the only source of chance.
        findings: names out of PHANTOM_FINDINGS; any other, such as "No Finding", draws nothing.
        size: pixels a side. The same state of `rng` gives the same patient at every size.

    Returns:
        (size, size) uint8, and {finding: Drawn}, with "Support Devices" among them if a device was drawn.
    """
    severity = {f: pick(rng, list(STRENGTH)) for f in PHANTOM_FINDINGS}
    side = {f: pick(rng, SIDES[f]) for f in PHANTOM_FINDINGS}
    strength = {f: rng.uniform(0, TRACE) for f in PHANTOM_FINDINGS}
    for f in (
        PHANTOM_FINDINGS
    ):  # in this order: the same seed is the same patient, whatever the order of `findings`
        if f in findings:
            strength[f] = CONTRAST * (STRENGTH[severity[f]] + rng.uniform(-0.1, 0.1))

    lost = 0.15 * strength["Atelectasis"]
    lift = {s: lost if side["Atelectasis"] in (s, "bilateral") else 0.0 for s in ("left", "right")}
    p = place_patient(rng, size, rng.uniform(0.42, 0.44) + 0.3 * strength["Cardiomegaly"], lift)

    drawn = {}
    air = p.lung * (1 - p.heart) * (1 - p.middle) * (1 - 0.45 * p.vessels * line(p.from_hilum, 0.35))
    for finding in PHANTOM_FINDINGS:
        zone, shadow = "", p.heart
        if finding in SHADOWS:
            zone = pick(rng, list(ZONES)) if finding == "Consolidation" else ""
            shadow = SHADOWS[finding](rng, p, strength[finding], zone) * p.lung
            shadow = shadow * {"left": p.left, "right": 1 - p.left}.get(side[finding], 1)
            air = air * (1 - np.clip(shadow, 0, 0.95))
        if finding in findings:
            drawn[finding] = Drawn(severity[finding], side[finding], zone, box_around(shadow))

    body = soft(0.93 + 0.1 * p.y - 0.75 * np.maximum(-0.62 - p.y, 0) - p.out, 0.03)
    breasts = soft(0.3 - np.hypot(p.out - 0.42, 0.9 * (p.y - 0.3)), 0.03) * soft(0.5 - p.y, 0.1)
    thickness = 1.1 + 0.3 * soft(p.y - 0.5, 0.2) + rng.uniform(0, 0.25) * breasts
    tissue = body * (thickness + VARIETY * 0.04 * clouds(rng, size))
    attenuation = tissue * (1 - 0.85 * air) + body * (bones(rng, p) + 0.3 * p.middle + 0.15 * p.heart)
    if rng.random() < DEVICES:
        name = pick(rng, DEVICE_NAMES)
        metal = device(p, name)
        attenuation = attenuation + metal
        drawn["Support Devices"] = Drawn("", "", name, box_around(metal))

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
        "{severity} subsegmental collapse at the {side} base{s}.",
    ),
    "Cardiomegaly": (
        "{severity} cardiomegaly.",
        "The heart is enlarged, to a {severity} degree.",
        "{severity} enlargement of the cardiac silhouette.",
        "The cardiothoracic ratio is increased, with {severity} cardiac enlargement.",
    ),
    "Consolidation": (
        "{severity} consolidation in the {side} {place} lung zone.",
        "Patchy {severity} opacity in the {side} {place} lung, concerning for pneumonia.",
        "{severity} airspace disease in the {place} {side} lung.",
        "There is {severity} focal opacification of the {side} {place} zone, consistent with consolidation.",
    ),
    "Edema": (
        "{severity} pulmonary edema.",
        "{severity} vascular congestion with bilateral perihilar haze.",
        "Engorged pulmonary vessels and septal lines, in keeping with {severity} interstitial edema.",
        "{severity} bilateral perihilar opacities, suggesting fluid overload.",
    ),
    "Pleural Effusion": (
        "{severity} {side} pleural effusion{s}.",
        "Blunting of the {side} costophrenic angle{s} by {severity} pleural fluid.",
        "{severity} amount of fluid at the {side} lung base{s}.",
        "{severity} {side} effusion{s}, layering with a meniscus.",
        "{severity} fluid collection{s} in the {side} pleural space{s}.",
    ),
}
DEGREES = {
    "mild": ("mild", "slight", "minimal"),
    "moderate": ("moderate", "medium-grade"),
    "severe": ("severe", "marked", "pronounced"),
}
AMOUNTS = {"mild": ("small", "minor"), "moderate": ("moderate", "medium"), "severe": ("large", "massive")}
ABSENT = {  # a pneumothorax is never drawn
    "Atelectasis": ("atelectasis", "lobar collapse"),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Consolidation": ("focal consolidation", "focal airspace disease"),
    "Edema": ("pulmonary edema", "vascular congestion"),
    "Pleural Effusion": ("pleural effusion", "pleural fluid"),
    "Pneumothorax": ("pneumothorax",),
}
NORMAL = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "The lungs are clear and the heart is of normal size.",
    "Clear lungs; cardiomediastinal contours within normal limits.",
    "Unremarkable frontal view of the chest.",
)
HARMLESS = (
    "The bones are intact.",
    "No acute osseous abnormality.",
    "The trachea is midline.",
    "Single frontal view of the chest.",
    "The aortic arch is unremarkable.",
    "Comparison is made to the prior study.",
    "Upper abdomen is unremarkable.",
)
DEVICE_SENTENCES = ("{place} in place.", "Unchanged {place}.", "{place} noted, as before.")


def write_report(rng, drawn):
    """Report of 2 to 6 sentences on what `draw_phantom` drew: mostly complete, never wrong.

    Now and then a finding goes unmentioned, but no report denies one that is there.
    """
    found = [f for f in PHANTOM_FINDINGS if f in drawn]
    sentences = [] if found else [pick(rng, NORMAL)]
    for finding in found:
        severity, side, place, _ = drawn[finding]
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


def phantom(root, split):
    """Phantoms; root, if given, is their size in pixels. Half of the training images have no report.

    Training images have 0 to 3 findings. Those of the other splits have exactly one, each as often as the
    others, as in CheXpert-5x200.
    """
    if root and not root.isdigit():
        raise BadInput(f"phantom={root}: what may follow the name is a size in pixels, such as phantom=224")
    size = int(root or 64)
    count = {"train": 6000, "valid": 500, "test": 1000}[split]
    records = []
    for i in range(count):
        rng = np.random.default_rng([SPLITS.index(split), i])
        if split == "train":
            number = rng.choice(4, p=(0.15, 0.6, 0.2, 0.05))
            present = set(rng.choice(PHANTOM_FINDINGS, number, replace=False).tolist())
        else:
            present = {PHANTOM_FINDINGS[i % len(PHANTOM_FINDINGS)]}
        image, drawn = draw_phantom(rng, present, size)
        report = write_report(rng, drawn) if split != "train" or i % 2 else None
        present = frozenset(present or {NO_FINDING})
        absent = frozenset({*PHANTOM_FINDINGS, NO_FINDING} - present)
        records.append(Record(image, report, present, f"{split}-{i}", "phantom", absent))
    return records


DATASETS = {
    "phantom": phantom,
    "medpix2": medpix2,
    "nih-chestxray14": nih_chestxray14,
    "covid-chestxray": covid_chestxray,
}
