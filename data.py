"""Data sets as records, and records as batches.

Name               Access                          What is read of it
phantom            drawn here from a seed          image, report, findings; no file, nothing clinical
chexpert           Stanford AIMI, registration     chest X-rays, 14 findings in four states
mimic-cxr          PhysioNet, credentialed         chest X-rays, reports, 14 findings in four states
rsna               Kaggle, competition rules       chest X-rays, pneumonia and its boxes
openi              Indiana University, open        chest X-rays, reports, findings out of MeSH headings
covid-radiography  Kaggle, licence by source       chest X-rays, COVID-19 and three other classes
nih-chestxray14    NIH, free with citation         chest X-rays, 14 findings and "No Finding"
covid-chestxray    github.com/ieee8023             chest X-rays, clinical notes, COVID-19 and others
medpix2            MedPix 2.0, free with citation  CT and MR images, captions, location category
csv                your own table                  image, and any of report, patient, split, view, findings
packed             `python data.py pack`           any of these, decoded and shrunk once

    python data.py summary --data chexpert=FOLDER           what is there, and what is wrong with it
    python data.py protocol chexpert-5x200 --table FOLDER/train.csv --out ids.txt
    python data.py pack --data chexpert=FOLDER --out packs/chexpert

A reader keeps the four states of a labeler: a finding is present (1), absent (0), uncertain (-1) or was not
mentioned (blank). `settle` maps them once to three: present, absent, unknown. Unknown is neither: such an
image is no negative for that finding's prompt. "No Finding" is a finding of its own and excludes all others
but "Support Devices".
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import signal
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import v2
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
VIEWS = ("PA", "AP", "FRONTAL", "LATERAL", "UNKNOWN")
FRONTAL = ("PA", "AP", "FRONTAL")
STATES = ("findings", "absent", "uncertain", "blank")  # of Record; 1, 0, -1 and blank in a labeler's table
UNCERTAIN = ("ignore", "zeros", "ones", "competition")
NO_FINDING = "No Finding"
HEALTHY = frozenset({NO_FINDING})
NO_DISEASE = frozenset({NO_FINDING, "Support Devices"})
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT = (
    NO_FINDING, "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip


class BadInput(Exception):
    """Something that the user gave cannot be used; the message is one sentence with the way out."""


class SharedPatient(BadInput):
    """A patient is in two splits."""


class Lacking(BadInput):
    """The data have nothing of what is asked for."""


class Packed(NamedTuple):
    """An image in a pack: a row of FOLDER/images.npy."""

    file: str
    row: int


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One image and what its source says of it.

    image: path of the file, or the grey image itself as (H, W) uint8, or its place in a pack.
    report: text about the whole image, or None.
    findings: those present. absent: those that the source rules out. uncertain: those it hedges on. blank:
        those it looks for and does not mention. All others are unknown; after `settle` so are these two.
    patient: no patient is in two splits. source: name of the data set.
    id: what lists of protocols call the image. view: one of VIEWS, or "" where the source never says.
    boxes: (left, top, right, bottom) of its findings in fractions of the image, where the source has them.
    """

    image: Path | np.ndarray | Packed
    report: str | None
    findings: frozenset
    patient: str
    source: str
    absent: frozenset = frozenset()
    uncertain: frozenset = frozenset()
    blank: frozenset = frozenset()
    id: str = ""
    view: str = ""
    boxes: tuple = ()


# ------------------------------------------------------------------------------------------------- records


def read_records(data, split):
    """Records of several data sets, one after the other, as their sources have them: all views, four states.

    Args:
        data: ["NAME" or "NAME=ROOT", ...] with names of DATASETS. split: one of SPLITS.

    Returns:
        {spec: records}, some perhaps empty.

    Raises:
        BadInput: an unknown name, a root that cannot be read, one id for two images.
    """
    records = {}
    for spec in data:
        name, _, root = spec.partition("=")
        if name not in DATASETS:
            raise BadInput(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
        if name != "phantom":
            if not root:
                raise BadInput(f"{name} needs its folder: --data {name}=FOLDER")
            if not (Path(root).is_dir() or name == "csv"):
                raise BadInput(f"the folder {root} of {name} is not there")
        records[spec] = DATASETS[name](root, split)
        refuse_repeats(records[spec], f"{name} in its split {split!r}")
    return records


def refuse_repeats(records, where):
    for id, count in Counter(record.id for record in records if record.id).most_common(1):
        if count > 1:
            raise BadInput(f"{where} has the image {id} {count} times; keep one")


def load_records(data, split, limit=None, *, views=FRONTAL, uncertain="ignore"):
    """The records to train on or to evaluate, settled.

    Args:
        data, split: as for read_records. limit: keep the first so many of each data set (smoke runs).
        views: those to keep, of VIEWS; images of data sets that never say the view are kept.
        uncertain: one of UNCERTAIN, see settle.

    Raises:
        BadInput: as read_records; Lacking where nothing is left of a data set.
    """
    records = []
    for spec, found in read_records(data, split).items():
        kept = [settle(record, uncertain) for record in found if not record.view or record.view in views]
        if not kept:
            name = spec.partition("=")[0]
            without = f" with the view {' or '.join(views)}" if found else ""
            raise Lacking(f"{name} has no record in its split {split!r}{without}")
        records += kept[:limit]
    return records


def listed_records(data, ids, uncertain="ignore"):
    """The records with these ids, in the order of the list, whatever their split and view.

    Raises:
        BadInput: an id that no image has, or that two have.
    """
    listed = set(ids)
    records = [r for split in SPLITS for found in read_records(data, split).values() for r in found]
    refuse_repeats([record for record in records if record.id in listed], " and ".join(data))
    of_id = {record.id: record for record in records}
    missing = [id for id in ids if id not in of_id]
    if missing:
        raise BadInput(
            f"{len(missing)} of the {len(ids)} listed ids are not in {', '.join(data)}, such as "
            f"{missing[0]!r}; an id there looks like {next(iter(of_id), None)!r}"
        )
    return [settle(of_id[id], uncertain) for id in ids]


def hold_out(records, listed):
    """The records without those of the patients who have a listed one."""
    patients = {(record.source, record.patient) for record in listed}
    return [record for record in records if (record.source, record.patient) not in patients]


@cache  # the data sets have few different label sets, so images share them
def settle_states(present, absent, uncertain, blank, policy):
    positive = {"ones": uncertain, "competition": {"Atelectasis", "Edema", "Pleural Effusion"}}
    present |= uncertain & positive.get(policy, frozenset())
    if policy != "ignore":
        absent |= uncertain - present
    return present, absent | blank if present else absent


def settle(record, policy):
    """Maps the four states of a record to three, by the one policy for uncertain findings (--uncertain).

    in the table                 ignore   zeros    ones     competition
    1                            present  present  present  present
    0                            absent   absent   absent   absent
    -1                           unknown  absent   present  present: atelectasis, edema, effusion; else absent
    blank, beside a present one  absent   absent   absent   absent
    blank, nothing present       unknown  unknown  unknown  unknown

    "zeros" is MedCLIP's policy, "competition" GLoRIA's; "ignore" is ours: the loss and the metrics leave out
    what is unknown. An image without any finding is not normal by that; "No Finding" has to be said.
    """
    if not record.uncertain and not record.blank:
        return record
    states = (record.findings, record.absent, record.uncertain, record.blank)
    present, absent = settle_states(*states, policy)
    r, more = record, {"id": record.id, "view": record.view, "boxes": record.boxes}
    # dataclasses.replace takes ten times as long, and there are hundreds of thousands of records
    return Record(r.image, r.report, present, r.patient, r.source, absent, **more)


def ruled_out(present, absent, findings):
    """Those of the findings that are absent, said to be or implied: three frozensets -> frozenset.

    With "No Finding" there is no other finding but devices, and with one of the others no "No Finding".
    """
    if NO_FINDING in present:
        absent |= findings - NO_DISEASE
    elif present - NO_DISEASE:
        absent |= HEALTHY
    return (absent - present) & findings


def restricted(records, findings):
    """The records with what is known of these findings alone, what the others imply of them included."""
    return [
        replace(r, findings=r.findings & findings, absent=ruled_out(r.findings, r.absent, findings))
        for r in records
    ]


def vocabulary(records):
    """The findings that are present in a record at least once -> sorted list of str."""
    return sorted(set().union(*(record.findings for record in records)))


def label_matrices(records, findings):
    """What is known of each finding in each record.

    Args:
        findings: C names, the columns; others are left out.

    Returns:
        present, absent: two (N, C) bool tensors; where both are False the finding is unknown.
    """

    def table(sets):
        cells = [[name in names for name in findings] for names in sets]
        return torch.tensor(cells, dtype=torch.bool).view(len(sets), len(findings))

    kinds = {}  # few different label sets, many records
    kind = [kinds.setdefault((record.findings, record.absent), len(kinds)) for record in records]
    present = table([has for has, _ in kinds])
    absent = table([ruled_out(*each, frozenset(findings)) for each in kinds])
    return present[kind], absent[kind]


def pick_split(splits, split):
    """One of {split: records}, after a check that no patient is in two of them."""
    owner = {}
    for name, records in splits.items():
        for record in records:
            if owner.setdefault(record.patient, name) != name:
                raise SharedPatient(
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


# -------------------------------------------------------------------------------- tables, files and reports


def open_table(path):
    """A text file, plain or as .gz or .zip."""
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return io.TextIOWrapper(archive.open(archive.namelist()[0]), "utf-8-sig", "replace", newline="")
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="")


def read_table(path, columns=()):
    """Rows of a CSV file, plain or as .gz or .zip, as dicts; file, columns and every cell must be there."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is not there; it is the table of this data set")
    try:
        with open_table(path) as file:
            rows = csv.DictReader(file)
            missing = [column for column in columns if column not in (rows.fieldnames or ())]
            if missing:
                raise BadInput(
                    f"{path} has no column {missing[0]!r}; it has {', '.join(rows.fieldnames or ())}"
                )
            for name, count in Counter(filter(None, rows.fieldnames or ())).most_common(1):
                if count > 1:
                    raise BadInput(f"{path} has {count} columns {name!r}; keep one")
            for number, row in enumerate(rows, 2):
                if None in row or None in row.values():
                    raise BadInput(f"{path}, row {number}, has not as many cells as the header")
                yield row
    except (EOFError, OSError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path} is cut short or no CSV table ({error}); get it again") from error


def find(root, *patterns, deep=2):
    """The first path that fits one of the patterns in root, or up to so many folders below, or None."""
    for depth in range(deep + 1):
        for pattern in patterns:
            found = sorted(Path(root).glob("*/" * depth + pattern))
            if found:
                return found[0]
    return None


def find_table(root, name, *others):
    """The table of a data set, plain or as .gz or .zip, in its folder or one below."""
    patterns = [each + ending for each in (name, *others) for ending in ("", ".gz", ".zip")]
    return find(root, *patterns, deep=1) or Path(root, name)


def images_under(root):
    """{name without ending: path} of all image files below root; a converted image goes before its DICOM."""
    files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() in (".png", ".jpg", ".jpeg") or ending.lower() == ".dcm" and stem not in files:
                files[stem] = Path(folder, name)
    return files


@cache
def four_states(names, values):
    """Cells of a labeler's table -> {"findings", "absent", "uncertain", "blank": frozenset of names}."""
    state_of = dict(zip(("1", "0", "-1", "", "1.0", "0.0", "-1.0"), STATES + STATES[:3], strict=True))
    states = {state: set() for state in STATES}
    for name, value in zip(names, values, strict=True):
        state = state_of.get(value.strip())
        if state is None:
            value = repr(value) if len(value) < 12 else f"of {len(value)} letters"  # it may be a report
            raise BadInput(f"column {name!r} has the value {value}, which is none of 1, 0, -1 and blank")
        states[state].add(name)
    return {state: shared(frozenset(group)) for state, group in states.items()}


@cache
def shared(names):
    """The first frozenset equal to this one: a few thousand serve hundreds of thousands of records."""
    return names


def row_states(table, number, row, names):
    """The four states in a row of a table, for its record."""
    try:
        return four_states(names, tuple([row[name] for name in names]))
    except BadInput as error:
        raise BadInput(f"{table}, row {number}: {error}") from None


def clean(text):
    """A report as one line without redaction marks (___ of MIMIC-CXR, XXXX of Open-I) and list numbers.

    Returns:
        str, or None where no word is left: an image without usable text has no report.
    """
    text = re.sub(r"(?:^|(?<=[.:;])\s)\s*\d{1,2}[.)]\s", " ", text or "", flags=re.MULTILINE)
    text = re.sub(r"[\w/'-]*(?:XXXX|___)[\w/'-]*", " ", text)
    text = " ".join(re.sub(r"\(\s*\)", " ", text).split())
    text = re.sub(r"\s+(?=[.,;:)])", "", text).lstrip(" .,;:-")
    return text if re.search(r"[^\W\d_]{2}", text) else None


def join(*sections):
    """What `clean` leaves of the sections, in this order, as one report, or None."""
    return " ".join(filter(None, map(clean, sections))) or None


TITLE = re.compile(r"\n ([A-Z ()/,-]+):\s")
FINDINGS_TITLE = re.compile(
    r"findings?\b|(chest|portable|bedside|upright|supine|single|two|frontal|views?|pa|ap)\b"
)


@cache
def section_name(title):
    """A section's title in MIMIC-CXR -> "impression", "findings" or the title, misspellings included."""
    title = title.lower().strip()
    words = re.findall("[a-z]+", title)
    if get_close_matches("impression", words, 1, 0.8) or get_close_matches("conclusion", words, 1, 0.8):
        return "impression"
    if FINDINGS_TITLE.match(title) or get_close_matches("findings", words, 1, 0.8):
        return "findings"
    return title


def sections(text):
    """Sections of a MIMIC-CXR report by the rules of its official parser -> {name: text}, the last of a name.

    A title is upper case, one space into its line, before a colon; what else stands on that line is no title.
    Empty findings and impressions are dropped. Where neither is left, all that follows the first blank line
    of the last section is the "last_paragraph".
    """
    text = text.replace("\r\n", "\n")
    parts, name, start, place = [], "preamble", 0, 0
    while title := TITLE.search(text, place):
        parts.append((name, text[start : title.start()]))
        name, start = section_name(title[1]), title.end()
        place = start - 1 + len(text[start - 1 :].partition("\n")[0])
    parts.append((name if parts else "full report", text[start:]))
    kept = {name: body for name, body in parts if body.strip() or name not in ("findings", "impression")}
    if not {"findings", "impression"} & kept.keys():
        kept["last_paragraph"] = "".join(re.split(r"\n\s*\n", parts[-1][1], maxsplit=1)[1:])
    return kept


# ------------------------------------------------------------------------------------------------- readers


def chexpert(root, split):
    """CheXpert, v1.0 or -small: train.csv, valid.csv and, where they were added, labels of the test set."""
    # A patient's folder is unique, so neither the prefix in the table nor the folder that the archives unpack
    # to matters: CheXpert-v1.0-small/train, train, or "CheXpert-v1.0 batch 2 (train 1)".
    depths = (Path(root).glob("*/" * depth + "patient*") for depth in range(3))
    found = next((folders for folders in map(list, depths) if folders), ())
    places = {folder.name: folder for folder in found}
    tables = {"train": [], "valid": ["val_labels.csv"], "test": ["test_labels.csv", "groundtruth.csv"]}
    table = find_table(root, f"{split}.csv", *tables[split])
    return chexpert_table(table, places) if split != "test" or table.exists() else []


def chexpert_table(table, places=None):
    """Records of one of CheXpert's tables; the test set's may name studies in place of images.

    places: {patient: folder}, where to look for the images; None for the table alone.
    """
    table, records = Path(table), []
    for number, row in enumerate(read_table(table, CHEXPERT), 2):
        states = row_states(table, number, row, CHEXPERT)
        parts = (row.get("Path") or row.get("Study") or "").split("/")
        depth = 4 if "Path" in row else 3
        if len(parts) < depth:
            raise BadInput(f"{table}, row {number}: {'/'.join(parts)!r} is no path of CheXpert")
        split, patient, study, *file = parts[-depth:]
        folder = f"{(places or {}).get(patient, f'{table.parent}/{split}/{patient}')}/{study}"
        if not file and not os.path.isdir(folder):
            raise BadInput(f"{table}, row {number}: the study {folder} is not there; unpack the test images")
        for name in file or sorted(os.listdir(folder)):
            view = row.get("AP/PA", "")
            if view not in ("PA", "AP"):  # blank for laterals; of the frontal ones 17 are marked LL or RL
                view = "FRONTAL" if "frontal" in name else "LATERAL"
            image, id = Path(f"{folder}/{name}"), f"{split}/{patient}/{study}/{name}"
            records.append(
                Record(image, None, patient=patient, source="chexpert", id=id, view=view, **states)
            )
    return records


def mimic_cxr(root, split):
    """MIMIC-CXR-JPG and the reports of MIMIC-CXR, files/ or mimic-cxr-reports.zip, in the official splits."""
    metadata = find(root, "mimic-cxr-2.*-metadata.csv*") or Path(root, "mimic-cxr-2.0.0-metadata.csv.gz")
    records = mimic_table(metadata, {"valid": "validate"}.get(split, split))
    reports = mimic_reports(root, list(dict.fromkeys(os.path.dirname(record.id) for record in records)))
    some = [record.id[:-4] for record in records[:: len(records) // 50 + 1]]
    places = {ending: base_of(root, [id + ending for id in some]) for ending in (".jpg", ".png")}
    ending, base = next(((e, base) for e, base in places.items() if base), (".jpg", root))
    return [
        replace(r, image=Path(base, r.id[:-4] + ending), report=reports.get(os.path.dirname(r.id)))
        for r in records
    ]


def mimic_table(metadata, *splits):
    """Records of the images in these official splits, without report; the other two tables lie beside."""
    metadata = Path(metadata)
    table = {
        name: find(metadata.parent, f"mimic-cxr-2.*-{name}.csv*", deep=0)
        or Path(metadata.parent, f"mimic-cxr-2.0.0-{name}.csv.gz")
        for name in ("split", "chexpert")
    }
    next(read_table(metadata), None)  # the others lie beside it, so it is the first to be missed
    rows = read_table(table["split"], ("dicom_id", "split"))
    chosen = {row["dicom_id"] for row in rows if row["split"] in splits}
    labels = {}
    for number, row in enumerate(read_table(table["chexpert"], ("study_id", *CHEXPERT)), 2):
        labels[row["study_id"]] = row_states(table["chexpert"], number, row, CHEXPERT)
    records = []
    for row in read_table(metadata, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        if row["dicom_id"] not in chosen:
            continue
        patient, study, view = f"p{row['subject_id']}", f"s{row['study_id']}", row["ViewPosition"]
        if view not in ("PA", "AP"):  # what is neither frontal nor lateral is oblique or not noted
            view = "LATERAL" if "LATERAL" in view or view in ("LL", "RL") else "UNKNOWN"
        id = f"files/{patient[:3]}/{patient}/{study}/{row['dicom_id']}.jpg"
        states = labels.get(row["study_id"], {"findings": frozenset()})  # a few studies have no labels
        records.append(
            Record(Path(id), None, patient=patient, source="mimic-cxr", id=id, view=view, **states)
        )
    return records


def mimic_reports(root, studies):
    """{study: text} for those of files/p10/p10000032/s50414267, ... that have usable text.

    Impression before findings, so that cutting a long text does not cut the conclusion (ours).
    """
    archive = find(root, "mimic-cxr-reports.zip")
    base = base_of(root, [f"{study}.txt" for study in studies[:: len(studies) // 50 + 1]])
    if not archive and not base:
        return {}
    reports, files = {}, None
    for study in studies:
        try:
            files = files or archive and zipfile.ZipFile(archive)
            text = files.read(f"{study}.txt") if files else Path(base, f"{study}.txt").read_bytes()
        except (KeyError, FileNotFoundError):
            continue
        except (zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"{archive} is cut short or damaged ({error}); get it again") from error
        part = sections(text.decode("utf-8", "replace")).get
        reports[study] = join(part("impression"), part("findings")) or join(part("last_paragraph"))
    return reports


def base_of(root, relatives):
    """The folder, root or up to two below it, in which one of the relative paths is a file, or None."""
    for depth in range(3):
        for base in sorted(Path(root).glob("*/" * depth)) if depth else [Path(root)]:
            if any((base / relative).is_file() for relative in relatives):
                return base
    return None


def rsna(root, split):
    """RSNA Pneumonia Detection Challenge, stage 2, in GLoRIA's splits; an image is a patient.

    Target 0 is no pneumonia, not "No Finding": stage_2_detailed_class_info.csv, where it is, tells which is.
    """
    details, normal = find_table(root, "stage_2_detailed_class_info.csv"), set()
    if details.exists():
        rows = read_table(details, ("patientId", "class"))
        normal = {row["patientId"] for row in rows if row["class"] == "Normal"}
    images, records = images_under(root), []
    for r in gloria_split(rsna_table(find_table(root, "stage_2_train_labels.csv")))[split]:
        image = images.get(r.id, Path(root, "stage_2_train_images", f"{r.id}.dcm"))
        records.append(replace(r, image=image, findings=HEALTHY if r.id in normal else r.findings))
    return records


def rsna_table(table):
    """Records of stage_2_train_labels.csv, which has a row for each box, in order of their ids."""
    edges, boxes = ("x", "y", "width", "height"), {}
    for number, row in enumerate(read_table(table, ("patientId", *edges, "Target")), 2):
        found = boxes.setdefault(row["patientId"], [])
        try:
            if {"0": False, "1": True}[row["Target"]]:
                x, y, width, height = (float(row[edge]) / 1024 for edge in edges)  # of 1024 pixels a side
                found.append((x, y, x + width, y + height))
        except (KeyError, ValueError) as error:
            raise BadInput(f"{table}, row {number}, is no label of RSNA: {error}") from error
    states = {True: (frozenset({"Pneumonia"}), frozenset()), False: (frozenset(), frozenset({"Pneumonia"}))}
    records = []
    for id in sorted(boxes):
        present, absent = states[bool(boxes[id])]
        of_image = {"id": id, "view": "FRONTAL", "boxes": tuple(boxes[id])}
        records.append(Record(Path(id), None, present, id, "rsna", absent, **of_image))
    return records


def openi(root, split):
    """Open-I: reports and MeSH headings from the XML or Kaggle's tables; splits by patient, one a report."""
    images, records = images_under(root), []
    for report in openi_reports(root):
        states = mesh_states(report["headings"])
        text = join(report["impression"], report["findings"])
        for id, view in report["images"].items():
            image, patient = images.get(id, Path(root, f"{id}.png")), report["id"]
            records.append(Record(image, text, patient=patient, source="openi", id=id, view=view, **states))
    return pick_split(split_by_patient(records), split)


def openi_reports(root):
    """Reports of Open-I, from ecgen-radiology/, NLMCXR_reports.tgz or indiana_reports.csv.

    Returns:
        [{"id", "findings", "impression": str, "headings": list of str, "images": {name: view}}, ...]; an
        image's name is its file's without ending, and the XML does not say the view.
    """
    table, texts = find_table(root, "indiana_reports.csv"), {}
    if table.exists():
        images = {}
        columns = ("uid", "filename", "projection")
        for row in read_table(find_table(root, "indiana_projections.csv"), columns):
            name = os.path.splitext(row["filename"])[0]
            images.setdefault(row["uid"], {})[name] = row["projection"].upper()
        reports = []
        for row in read_table(table, ("uid", "MeSH", "findings", "impression")):
            text = {name: row[name].strip() for name in ("findings", "impression")}
            more = {"headings": row["MeSH"].split(";"), "images": images.get(row["uid"], {})}
            reports.append({"id": row["uid"], **text, **more})
        return reports
    if folder := find(root, "ecgen-radiology"):
        texts = {path.name: path.read_bytes() for path in folder.glob("*.xml")}
    elif archive := find(root, "NLMCXR_reports.tgz"):
        try:
            with tarfile.open(archive) as files:
                for file in (file for file in files if file.name.endswith(".xml")):
                    texts[os.path.basename(file.name)] = files.extractfile(file).read()
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise BadInput(f"{archive} is cut short or damaged ({error}); get it again") from error
    else:
        raise BadInput(
            f"{root} has neither ecgen-radiology/ nor NLMCXR_reports.tgz nor indiana_reports.csv; "
            "openi needs one of them"
        )
    reports = []
    for name in sorted(texts, key=lambda name: (len(name), name)):  # 2.xml before 10.xml
        try:
            tree = ElementTree.fromstring(texts[name])
        except ElementTree.ParseError as error:
            raise BadInput(f"{name} of Open-I is no XML ({error}); unpack it again") from error
        text = {part.get("Label"): (part.text or "").strip() for part in tree.iter("AbstractText")}
        reports.append(
            {
                "id": os.path.splitext(name)[0],
                "findings": text.get("FINDINGS", ""),
                "impression": text.get("IMPRESSION", ""),
                "headings": [heading.text or "" for heading in tree.iter("major")],
                "images": {image.get("id"): "" for image in tree.iter("parentImage")},
            }
        )
    return reports


MESH = {  # MeSH heading -> finding; other headings say nothing that the chest X-ray data sets share
    "normal": NO_FINDING,
    "Airspace Disease": "Lung Opacity",
    "Cardiomegaly": "Cardiomegaly",
    "Catheters, Indwelling": "Support Devices",
    "Consolidation": "Consolidation",
    "Fractures, Bone": "Fracture",
    "Implanted Medical Device": "Support Devices",
    "Infiltrate": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Medical Device": "Support Devices",
    "Nodule": "Lung Lesion",
    "Opacity": "Lung Opacity",
    "Pleural Effusion": "Pleural Effusion",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Pulmonary Atelectasis": "Atelectasis",
    "Pulmonary Edema": "Edema",
    "Tube, Inserted": "Support Devices",
}


def mesh_states(headings):
    """Headings such as "Opacity/lung/base/left" -> states; a report that was not indexed has none."""
    main = {heading.split("/")[0].strip() for heading in headings} - {"", "No Indexing"}
    present = frozenset(MESH[heading] for heading in main & MESH.keys())
    return {"findings": present, "blank": frozenset(MESH.values()) - present if main else frozenset()}


COVID_CLASSES = {  # folder -> finding
    "COVID": "COVID-19",
    "Lung_Opacity": "Lung Opacity",
    "Normal": NO_FINDING,
    "Viral Pneumonia": "Viral Pneumonia",
}


def covid_radiography(root, split):
    """COVID-19 Radiography Database: four folders, four classes; an image is a patient; splits by a seed."""
    return pick_split(split_by_patient(covid_folders(root)), split)


def covid_folders(root):
    """Records of all four classes, each in the order of the numbers of its images."""

    def letters(name):  # releases differ in case, blank and underscore
        return re.sub("[^a-z]", "", name.lower())

    folders = {letters(path.name): path for path in (*Path(root).glob("*/*/"), *Path(root).glob("*/"))}
    records = []
    for name, finding in COVID_CLASSES.items():
        folder = folders.get(letters(name), Path(root, name))
        if not folder.is_dir():
            raise BadInput(f"{root} has no folder {name!r}; covid-radiography needs its four class folders")
        images = images_under(folder / "images" if (folder / "images").is_dir() else folder)
        # All may show an opacity or a viral pneumonia; known is only that the other three are not COVID-19.
        known = {"absent": frozenset({"COVID-19"} - {finding}), "view": "FRONTAL"}
        for id in sorted(images, key=lambda id: (len(id), id)):
            records.append(
                Record(images[id], None, frozenset({finding}), id, "covid-radiography", id=id, **known)
            )
    return records


def nih_chestxray14(root, split):
    """NIH ChestX-ray14: image and findings; the official test list if it is there, else splits by patient."""
    needed = ("Image Index", "Finding Labels", "Patient ID")
    rows = list(read_table(find_table(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"), needed))
    places = images_under(root)  # images/, or images_001/images to images_012/images in Kaggle's copy
    called = {
        "Effusion": "Pleural Effusion",
        "Pleural_Thickening": "Pleural Thickening",
    }  # by other data sets
    named = [shared(frozenset(called.get(n, n) for n in row["Finding Labels"].split("|"))) for row in rows]
    annotated = frozenset().union(*named)
    records = []
    for row, present in zip(rows, named, strict=True):
        id, patient, absent = row["Image Index"], row["Patient ID"], shared(annotated - present)
        image = places.get(os.path.splitext(id)[0], Path(root, "images", id))
        view = row.get("View Position") or "FRONTAL"  # all are frontal
        records.append(Record(image, None, present, patient, "nih-chestxray14", absent, id=id, view=view))
    official = Path(root, "test_list.txt")
    if not official.is_file():
        return pick_split(split_by_patient(records), split)
    test = set(official.read_text().split())
    splits = split_by_patient([r for r in records if r.id not in test], shares=(0.9, 0.1, 0.0))
    return pick_split({**splits, "test": [r for r in records if r.id in test]}, split)


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
        id, notes = f"{row['folder']}/{row['filename']}", row["clinical_notes"].strip() or None
        known = {"patient": row["patientid"], "source": "covid-chestxray", "id": id, "view": row["view"][:2]}
        records.append(Record(Path(root, id), notes, frozenset(names), **known))
    return pick_split(split_by_patient(records), split)


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
                id, case = row["image"], row["U_id"]
                caption, category = row["Description"]["Caption"], row["Location Category"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{path}, line {number}, is not a MedPix description: {error!r}") from error
            image, report = Path(root, "images", id + ".png"), (caption or "").strip() or None
            absent = frozenset(categories - {category})
            splits[name].append(Record(image, report, frozenset({category}), case, "medpix2", absent, id=id))
    return pick_split(splits, split)


def csv_table(table, split):
    """A table of the user's own: `image`, and any of report, patient, split, view and columns of findings.

    Paths are relative to the table. A finding is 1, 0, -1 or blank. Without patients an image is one; without
    splits they are made by patient.
    """
    known = ("image", "report", "patient", "split", "view")
    table, splits = Path(table), {name: [] for name in SPLITS}
    rows = list(read_table(table, known[:1]))
    names = tuple(name for name in rows[0] if name not in known) if rows else ()
    called = {"validate": "valid", "validation": "valid", "val": "valid", "dev": "valid"}
    records = []
    for number, row in enumerate(rows, 2):
        cell = {name: row.get(name, "").strip() for name in known}
        if not cell["image"]:
            raise BadInput(f"{table}, row {number}, names no image")
        if cell["view"] and cell["view"].upper() not in VIEWS:
            raise BadInput(f"{table}, row {number}: the view {cell['view']!r} is none of {', '.join(VIEWS)}")
        image, states = cell["image"], row_states(table, number, row, names)
        told = {
            "patient": cell["patient"] or image,
            "view": cell["view"].upper(),
            "source": "csv",
            "id": image,
        }
        record = Record(Path(table.parent, image), clean(cell["report"]), **told, **states)
        records.append(record)
        part = called.get(cell["split"].lower(), cell["split"].lower())
        if part in splits:
            splits[part].append(record)
        elif "split" in row:
            raise BadInput(
                f"{table}, row {number}: the split {cell['split']!r} is none of {', '.join(SPLITS)}"
            )
    return pick_split(splits if rows and "split" in rows[0] else split_by_patient(records), split)


def packed(root, split):
    """A pack made by `python data.py pack`: the records of the data sets in it."""
    records = []
    file, row = str(Path(root, "images.npy")), 0
    for line in pack_index(root):
        if "bad" in line:
            continue
        if line["split"] == split:
            known = {state: shared(frozenset(line[state])) for state in STATES}
            known |= {name: line[name] for name in ("report", "patient", "source", "id", "view")}
            records.append(Record(Packed(file, row), boxes=tuple(map(tuple, line["boxes"])), **known))
        row += 1
    return records


# ----------------------------------------------------------------------------------------------- protocols
#
# Evaluation sets that anyone can rebuild: each is a function of records and a seed. Two people compare the
# SHA-256 of their lists and need not share data.


def only_finding(record):
    """The one finding that an image shows besides "No Finding", or None."""
    findings = record.findings - {NO_FINDING}
    return next(iter(findings)) if len(findings) == 1 else None


def five_by(number, records, rng):
    """So many records of each of the five competition tasks, drawn from those that show nothing else."""
    drawn = []
    for task in COMPETITION:
        candidates = [record for record in records if only_finding(record) == task]
        if len(candidates) < number:
            raise BadInput(f"only {len(candidates)} images show {task} and nothing else; {number} are needed")
        drawn += [candidates[i] for i in rng.choice(len(candidates), number, replace=False)]
    return drawn


def gloria_5x200(records, seed):
    """GLoRIA's rule: frontal, one of the five tasks and nothing else, not even uncertain or a device."""
    certain = [r for r in records if r.view in FRONTAL and not r.uncertain - {NO_FINDING}]
    return five_by(200, certain, np.random.RandomState(seed))


def medclip_5x200(records, seed):
    """MedCLIP's rule: all views, uncertain is absent; 400 of each task, and of these 2,000 a random half."""
    rng = np.random.RandomState(seed)
    drawn = five_by(400, records, rng)
    return [drawn[i] for i in rng.choice(len(drawn), len(drawn) // 2, replace=False)]


def gloria_split(records, seed=0):
    """GLoRIA's 70/15/15 of RSNA: the draws of scikit-learn's train_test_split -> {split: records}."""

    def cut(items, share):
        order = np.random.RandomState(seed).permutation(len(items))
        size = int(np.ceil(share * len(items)))
        return [items[i] for i in order[size:]], [items[i] for i in order[:size]]

    train, rest = cut(records, 0.3)
    test, valid = cut(rest, 0.5)
    return {"train": train, "valid": valid, "test": test}


def balanced(records, finding, seed, number=None):
    """As many records without the finding as with it; of these, if asked, a number at random (MedCLIP)."""
    rng = np.random.RandomState(seed)
    present = [record for record in records if finding in record.findings]
    others = [record for record in records if finding not in record.findings]
    if len(others) < len(present):
        raise BadInput(
            f"{len(present)} images show {finding} and only {len(others)} do not; as many are needed"
        )
    drawn = present + [others[i] for i in rng.choice(len(others), len(present), replace=False)]
    if number is None:
        return drawn
    if len(drawn) < number:
        raise BadInput(f"{len(drawn)} images are too few; {number} are needed")
    return [drawn[i] for i in rng.choice(len(drawn), number, replace=False)]


class Protocol(NamedTuple):
    read: object  # what --table names -> all records
    rule: object  # these and a seed -> those of the list
    seed: int  # of the published list where there is one
    table: str  # what --table has to name


def rsna_protocol(rule):
    return Protocol(rsna_table, rule, 0, "RSNA's stage_2_train_labels.csv")


PROTOCOLS = {
    "chexpert-5x200": Protocol(chexpert_table, gloria_5x200, 0, "CheXpert's train.csv"),
    "chexpert-5x200-medclip": Protocol(chexpert_table, medclip_5x200, 42, "CheXpert's train.csv"),
    "mimic-5x200": Protocol(
        lambda table: mimic_table(table, "validate", "test"),
        gloria_5x200,
        0,
        "MIMIC-CXR-JPG's metadata.csv.gz, with the split and the chexpert table beside it",
    ),
    "rsna-all": rsna_protocol(lambda records, seed: records),
    "rsna-balanced": rsna_protocol(lambda records, seed: balanced(records, "Pneumonia", seed)),
    "rsna-gloria-train": rsna_protocol(lambda records, seed: gloria_split(records, seed)["train"]),
    "rsna-gloria-valid": rsna_protocol(lambda records, seed: gloria_split(records, seed)["valid"]),
    "rsna-gloria-test": rsna_protocol(lambda records, seed: gloria_split(records, seed)["test"]),
    "covid-normal": Protocol(
        lambda folder: [r for r in covid_folders(folder) if r.findings & {"COVID-19", NO_FINDING}],
        lambda records, seed: balanced(records, "COVID-19", seed, 3000),
        42,
        "the folder of COVID-19 Radiography",
    ),
}


def fingerprint(ids):
    """SHA-256 of a list of ids joined by newlines: what `sha256sum` says of the file by write_ids."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def write_ids(path, ids):
    temporary = Path(f"{path}.tmp")
    temporary.write_text("\n".join(ids), newline="")
    os.replace(temporary, path)


def read_ids(path):
    """Ids of a protocol's list."""
    try:
        ids = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the list {path} cannot be read ({error}); `python data.py protocol` writes one"
        ) from error
    ids = [id.strip() for id in ids if id.strip()]
    if not ids:
        raise BadInput(f"the list {path} is empty; `python data.py protocol` writes one")
    return ids


# -------------------------------------------------------------------------------------------------- images

MEAN, STD = 0.5, 0.25  # of grey values in 0 ... 1 (ours)


def read_image(image):
    """The image of a Record -> Pillow image of mode "L".

    Raises:
        BadInput: the file is missing, empty, cut short, or no image.
    """
    image = Path(image) if isinstance(image, str) else image
    if isinstance(image, Packed):
        image = open_pack(image.file)[image.row]
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        if image.suffix.lower() == ".dcm":
            return read_dicom(image)
        with Image.open(image) as file:
            if not file.mode.startswith("I"):
                return file.convert("L")
            grey = np.asarray(file).astype(np.float32) / 257  # 16 bits, which Pillow would clip at 255
            return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    except BadInput:
        raise
    except Exception as error:  # neither library has one error for what it cannot read
        way_out = "repair it or use --skip-bad-images"
        raise BadInput(f"the image {image} cannot be read ({error}); {way_out}") from error


def read_dicom(path):
    """A DICOM file, its window applied and bone bright -> Pillow image of mode "L"."""
    try:
        import pydicom  # for those who have DICOM files; no requirement
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise BadInput(f"{path} is a DICOM file: `pip install 'pydicom>=3'`, or convert it to PNG") from error
    file = pydicom.dcmread(path)
    grey = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file).astype(np.float32)
    grey -= grey.min()
    grey *= 255 / max(grey.max(), 1e-6)
    if file.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey.round().astype(np.uint8))


def pad_to_square(image):
    """Pillow image -> (1, S, S) uint8 tensor, black beside the shorter side."""
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    margins = [left, top, side - width - left, side - height - top]
    return v2.functional.pad(v2.functional.pil_to_tensor(image), margins)


def normalise(images):
    """(B, 1, S, S) uint8 -> float, about 0 with a deviation of about 1, as the image tower takes it."""
    return (images.float() / 255 - MEAN) / STD


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


def an_image_under(root):
    names = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    endings = (".png", ".jpg", ".jpeg", ".dcm")
    return next((path for path in names if path.suffix.lower() in endings), "no image")


def check_images(records, image_size):
    """A look before the long run: some images have to be there, and packs to be large enough.

    Raises:
        BadInput: none of a sample of a data set's images is a file, or a pack's images are smaller than
            image_size, the side that the model takes.
    """
    for source in dict.fromkeys(record.source for record in records):
        images = [record.image for record in records if record.source == source]
        paths = [image for image in images[:: len(images) // 20 + 1] if isinstance(image, Path)]
        if paths and not any(path.exists() for path in paths):
            folder = next(parent for parent in paths[0].parents if parent.is_dir())
            raise BadInput(
                f"none of the images of {source} is where its table says: {paths[0]} is not there, and what "
                f"{folder} holds is {an_image_under(folder)}"
            )
    for file in {record.image.file for record in records if isinstance(record.image, Packed)}:
        side = open_pack(file).shape[1]
        if side < image_size:
            raise BadInput(
                f"{file} was packed at {side} pixels, the model takes {image_size}: pack again with "
                f"--image-size {image_size}, or train with --image-size {side}"
            )


def ignore_signals(_worker):
    """For loading processes: Ctrl-C and SIGTERM are the main process's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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


# --------------------------------------------------------------------------------------------------- packs
#
# A pack is a folder: images.npy, (N, S, S) uint8, and index.jsonl, a line of JSON for each image that says
# what Record says of it, where it came from, its size there and the CRC-32 of its pixels, or why it is bad.


@lru_cache
def open_pack(file):
    """(N, S, S) uint8, read from the disk as it is used."""
    return np.load(file, mmap_mode="r")


def pack_index(root):
    """The lines of a pack's index as dicts, after a check that every good one has its pixels."""
    try:
        lines = [index_fields(line) for line in Path(root, "index.jsonl").read_text().split("\n")[:-1]]
        rows = len(open_pack(str(Path(root, "images.npy"))))
    except FileNotFoundError as error:
        raise BadInput(f"{root} is no finished pack: {error.filename} is not there") from error
    except (ValueError, EOFError) as error:
        raise BadInput(
            f"the pack {root} is cut short or damaged ({error}); delete it and pack again"
        ) from error
    good = sum("bad" not in line for line in lines)
    if rows != good:
        raise BadInput(f"the pack {root} has {rows} images and an index of {good}; delete it and pack again")
    return lines


def npy_header(rows, side):
    """What an .npy file begins with; its length does not depend on the number of rows."""
    header = io.BytesIO()
    array = {"descr": "|u1", "fortran_order": False, "shape": (rows, side, side)}
    np.lib.format.write_array_header_1_0(header, array)
    return header.getvalue()


def shrink(side, image):
    """Pillow image -> (1, side, side) uint8 tensor and the size it had."""
    return evaluation_transform(side)(image), image.size


def pack(data, out, *, side, views=FRONTAL, workers=2, max_bad=100):
    """Decodes, squares and shrinks every image of the data sets into a pack; goes on where it was stopped.

    Args:
        data: as for read_records. out: folder; out.tmp holds what is not finished.
        side: pixels a side. workers: processes that read images. max_bad: images that may be unreadable.

    Returns:
        (number of images packed, sentences on those that could not be read).

    Raises:
        BadInput: there is a pack, or an unfinished one of something else, or too much is unreadable.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} already holds something; give another --out or delete it")
    chosen = [
        (split, record)
        for split in SPLITS
        for found in read_records(data, split).values()
        for record in found
        if not record.view or record.view in views
    ]
    for part in SPLITS:
        refuse_repeats([record for split, record in chosen if split == part], " and ".join(data))
    begun = Path(f"{out}.tmp")
    begun.mkdir(parents=True, exist_ok=True)
    lines = packed_before(begun, npy_header(len(chosen), side), side)
    if [(line["split"], line["id"]) for line in lines] != [(s, r.id) for s, r in chosen[: len(lines)]]:
        raise BadInput(f"{begun} holds an unfinished pack of other data; delete it or give another --out")
    bad, rest = [line["bad"] for line in lines if "bad" in line], chosen[len(lines) :]
    loader = torch.utils.data.DataLoader(
        Images([record for _, record in rest], partial(shrink, side)),
        batch_size=16,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )
    with (
        open(begun / "images.npy", "ab") as pixels,
        open(begun / "index.jsonl", "a") as index,
        tqdm(total=len(chosen), initial=len(lines), unit="image", mininterval=1) as bar,
    ):
        for items in chain([()], loader):  # before the first, look at what an earlier run left
            for i, item in items:
                line = index_line(*rest[i])
                if isinstance(item, BadInput):
                    bad.append(str(item))
                    line["bad"] = str(item)
                else:
                    row = item[0].numpy().tobytes()
                    pixels.write(row)
                    line |= {"width": item[1][0], "height": item[1][1], "crc32": zlib.crc32(row)}
                index.write(json.dumps(line) + "\n")
            pixels.flush()
            index.flush()
            bar.update(len(items))
            if len(bad) > max_bad:
                listed = "\n".join(bad)
                raise BadInput(
                    f"{len(bad)} images cannot be read, more than --max-bad {max_bad}; with a larger one the "
                    f"same command goes on from here:\n{listed}"
                )
    good = len(chosen) - len(bad)
    if not good:
        raise BadInput(f"there is nothing to pack: none of the {len(chosen)} images can be read")
    for file in ("images.npy", "index.jsonl"):
        with open(begun / file, "r+b") as written:
            written.write(npy_header(good, side) if file == "images.npy" else b"")
            os.fsync(written.fileno())
    os.replace(begun, out)
    return good, bad


def packed_before(begun, header, side):
    """Makes the two files of an unfinished pack end with the same image -> lines of its index.

    The last line may be cut, and lines may lack their pixels: only the kernel knows what it wrote first.
    """
    pixels, index, lines, rows, end = begun / "images.npy", begun / "index.jsonl", [], 0, 0
    index.touch()
    if not pixels.exists() or pixels.stat().st_size < len(header):
        pixels.write_bytes(header)
    try:
        with open(pixels, "rb") as file:
            np.lib.format.read_magic(file)
            sides = np.lib.format.read_array_header_1_0(file)[0][1:]
        texts = [text for text in index.read_text().splitlines(keepends=True) if text.endswith("\n")]
        written = [index_fields(text) for text in texts]
    except ValueError as error:
        raise BadInput(f"the unfinished pack {begun} is damaged ({error}); delete it") from error
    if sides != (side, side):
        raise BadInput(f"{begun} holds an unfinished pack of another size; delete it or give another --out")
    for text, line in zip(texts, written, strict=True):
        if len(header) + (rows + ("bad" not in line)) * side * side > pixels.stat().st_size:
            break
        lines.append(line)
        rows += "bad" not in line
        end += len(text)
    os.truncate(index, end)
    os.truncate(pixels, len(header) + rows * side * side)
    return lines


INDEXED = ("id", "report", "patient", "source", "view", "boxes")  # and the states, of a Record


def index_line(split, record):
    """What a pack's index says of a record."""
    line = {"split": split, "path": str(record.image) if isinstance(record.image, Path) else None}
    line |= {name: getattr(record, name) for name in INDEXED}
    return line | {state: sorted(getattr(record, state)) for state in STATES}


def index_fields(text):
    """A line of a pack's index -> dict, or ValueError."""
    line = json.loads(text)
    if not isinstance(line, dict) or not line.keys() >= {"split", *INDEXED, *STATES}:
        raise ValueError("a line of its index says too little")
    return line


# ------------------------------------------------------------------------------------------------- batches


class Tokens(NamedTuple):
    """input_ids, attention_mask: (B, L) int64 each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Batch(NamedTuple):
    """What one training step sees: B images, R reports, Q images with labels, P distinct label prompts.

    rows: (B,) int64, which records these are.
    images: (B, 1, S, S) uint8, a quarter of what floats would take on the way to the device; see normalise.
    present, absent: (B, C) bool.
    reports: pieces of Tokens, R reports in all, in order of length, each piece padded to its longest.
    report_rows: (R,) int64, the row of each report's image.
    report_labels: (R, C) bool, what each report stands for in the label mask: the findings of its image, or
        none where no disease is among them. Two normal chests, or two with nothing but a pacemaker, are not
        the same patient's picture in words; a label prompt says no more than they share (ours).
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
    report_labels: torch.Tensor
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
        self.disease = torch.tensor([name not in NO_DISEASE for name in findings], dtype=torch.bool)
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pieces = pieces

    def __call__(self, items):
        unreadable = [str(image) for _, image in items if isinstance(image, BadInput)]
        items = [(row, image) for row, image in items if not isinstance(image, BadInput)]
        rows = torch.tensor([row for row, _ in items], dtype=torch.long)
        images = (
            torch.stack([image for _, image in items])
            if items
            else torch.zeros(0, 1, 1, 1, dtype=torch.uint8)
        )
        present = self.present[rows]

        texts = [self.records[row].report for row in rows.tolist()]
        report_rows = torch.tensor([i for i, text in enumerate(texts) if text is not None], dtype=torch.long)
        reports = []
        if len(report_rows):
            tokens = tokenize(self.tokenizer, [text for text in texts if text is not None], self.max_length)
            order, reports = in_pieces(tokens, self.pieces)
            report_rows = report_rows[order]

        report_labels = present[report_rows]
        report_labels &= (report_labels & self.disease).any(1, keepdim=True)

        prompt_rows = present.any(1).nonzero()[:, 0] if self.prompts else torch.zeros(0, dtype=torch.long)
        # What an image draws depends on this number and on the image, not on the others in its batch.
        chance = int(torch.randint(2**31, ()))
        drawn = [
            np.random.default_rng((chance, row)).choice(np.flatnonzero(found))
            for row, found in zip(rows[prompt_rows].tolist(), present[prompt_rows].numpy(), strict=True)
        ]
        distinct, prompt_index = torch.tensor(drawn, dtype=torch.long).unique(return_inverse=True)
        return Batch(
            rows=rows,
            images=images,
            present=present,
            absent=self.absent[rows],
            reports=reports,
            report_rows=report_rows,
            report_labels=report_labels,
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


def readable(loader):
    for batch in loader:
        refuse_unreadable(batch.unreadable, 0)
        yield batch


def refuse_unreadable(sentences, budget):
    """Refuses more than a budget of images that cannot be read; sentences: one for each, as in a Batch."""
    if len(sentences) > budget:
        others = f"; with {budget} others it is over the budget of --skip-bad-images" if budget else ""
        raise BadInput(sentences[-1] + others)


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
    for f in PHANTOM_FINDINGS:  # in this order: the same seed, the same patient, in whatever order they come
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
    if root and not (root.isdecimal() and int(root) > 0):
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
        boxes = tuple(drawn[finding].box for finding in present) if len(present) == 1 else ()
        present = frozenset(present or {NO_FINDING})
        absent = frozenset({*PHANTOM_FINDINGS, NO_FINDING} - present)
        id = f"{split}-{i}"
        records.append(Record(image, report, present, id, "phantom", absent, id=id, boxes=boxes))
    return records


# Of those that have reports, which text is an image's report; evaluate.py writes it into its results.
REPORTS = {
    "phantom": "drawn up with the image",
    "mimic-cxr": "impression and findings, else the last paragraph; nothing of indication or technique",
    "openi": "impression and findings",
    "covid-chestxray": "clinical notes",
    "medpix2": "caption",
    "csv": "the column report",
}
DATASETS = {
    "phantom": phantom,
    "chexpert": chexpert,
    "mimic-cxr": mimic_cxr,
    "rsna": rsna,
    "openi": openi,
    "covid-radiography": covid_radiography,
    "nih-chestxray14": nih_chestxray14,
    "covid-chestxray": covid_chestxray,
    "medpix2": medpix2,
    "csv": csv_table,
    "packed": packed,
}


# ------------------------------------------------------------------------------------------------- program


def summary(args):
    """Prints what data sets hold and what is wrong with them, no word of any report -> exit status."""
    faults = 0
    for spec in args.data:
        try:
            splits = {split: read_records([spec], split)[spec] for split in SPLITS}
        except SharedPatient as error:
            print(f"{spec}\n{error}\n")
            faults += 1
            continue
        faults += sum(describe(spec, splits, args).values())
    return 1 if faults else 0


def describe(spec, splits, args):
    """Prints the summary of one data set -> {check: number of faults}."""
    records = [record for found in splits.values() for record in found]
    print(f"{spec}\n{'':28}{'images':>9}{'patients':>10}{'reports':>9}{'labelled':>10}")
    for split, found in splits.items():
        patients, reports = len({r.patient for r in found}), sum(r.report is not None for r in found)
        print(
            f"{split:28}{len(found):9,}{patients:10,}{reports:9,}{sum(bool(r.findings) for r in found):10,}"
        )
    views = Counter(record.view or "not said" for record in records)
    print(f"views: {', '.join(f'{view} {count:,}' for view, count in views.most_common())}\n")

    counts = {state: Counter(name for r in records for name in getattr(r, state)) for state in STATES}
    print(f"{'':28}{'1':>10}{'0':>10}{'-1':>10}{'blank':>10}")
    for name in sorted(set().union(*counts.values())):
        print(f"{name:28}" + "".join(f"{counts[state][name]:10,}" for state in STATES))

    reports = [record.report for record in records if record.report is not None]
    if reports:
        words = np.array([len(report.split()) for report in reports])
        print(f"\nwords of a report: mean {words.mean():.1f}, median {np.median(words):.0f}, ", end="")
        print(f"95 % up to {np.percentile(words, 95):.0f}, longest {words.max()}")
        twice = sum(count for count in Counter(reports).values() if count > 1)
        print(f"reports that stand more than once, word for word: {twice:,} of {len(reports):,}")
    train = [settle(r, args.uncertain) for r in splits["train"] if not r.view or r.view in args.views]
    if vocabulary(train):
        same, masked, fitting = expected_pairs(train, args.batch_size)
        print(f"in a training batch of {args.batch_size}: {same:.1f} pairs of images with the same findings,")
        print(f"  {masked:.1f} of them with a disease, which the mask removes among reports, and")
        print(f"  {fitting:.1f} label prompts that fit another image, which it removes among those")

    owners = {(split, r.source, r.patient) for split, found in splits.items() for r in found}
    times = Counter((source, patient) for _, source, patient in owners)
    paths = [record.image for record in records if isinstance(record.image, Path)]
    checks = {
        "missing files": sum(not path.exists() for path in paths),
        "patients in two splits": sum(count > 1 for count in times.values()),
        "packed images that are damaged": damaged(spec.partition("=")[2])
        if spec.startswith("packed=")
        else 0,
    }
    print("\n" + "\n".join(f"{check + ':':32}{faults:,}" for check, faults in checks.items()) + "\n")
    return checks


def damaged(root):
    """How many images of a pack differ from what was packed."""
    good = [line for line in pack_index(root) if "bad" not in line]
    rows = open_pack(str(Path(root, "images.npy")))
    return sum(zlib.crc32(row.tobytes()) != line["crc32"] for row, line in zip(rows, good, strict=True))


def expected_pairs(records, batch_size):
    """Expected numbers of false-negative pairs in a random batch.

    Returns:
        pairs of images whose known findings are the same; those of them with a disease, which the label mask
        removes among reports; and pairs (image, another image's label prompt) that fit.
    """
    pairs = batch_size * (batch_size - 1) / 2
    sets = Counter(record.findings for record in records if record.findings)
    chance = {names: (count / len(records)) ** 2 for names, count in sets.items()}
    ill = sum(chance[names] for names in sets if names - NO_DISEASE)
    labelled = [record for record in records if record.findings]
    present, absent = label_matrices(labelled, vocabulary(labelled))
    drawn = (present / present.sum(1, keepdim=True)).mean(0)
    fitting = float(drawn @ (~absent).float().mean(0)) * (len(labelled) / len(records)) ** 2
    return pairs * sum(chance.values()), pairs * ill, 2 * pairs * fitting


def protocol(args):
    """Writes the list of a protocol and prints its SHA-256 -> exit status."""
    read, rule, seed, _ = PROTOCOLS[args.name]
    seed = seed if args.seed is None else args.seed
    records = read(args.table)
    refuse_repeats(records, args.table)
    chosen = rule(records, seed)
    ids, patients = [record.id for record in chosen], len({record.patient for record in chosen})
    left = hold_out(records, chosen)
    shown = Counter(only_finding(r) or "none or several" for r in chosen)
    write_ids(args.out, ids)
    print(f"{args.name}, seed {seed}: {len(ids):,} ids of {patients:,} patients in {args.out}")
    print("  " + ", ".join(f"{name} {count:,}" for name, count in sorted(shown.items())))
    print(f"left without these patients: {len(left):,} images of {len({r.patient for r in left}):,} patients")
    print(f"SHA-256 {fingerprint(ids)}")
    return 0


def run_pack(args):
    """Packs data sets -> exit status."""
    options = {"side": args.image_size, "views": args.views, "workers": args.workers, "max_bad": args.max_bad}
    good, bad = pack(args.data, args.out, **options)
    print("".join(f"{sentence}\n" for sentence in bad), end="")
    print(f"{good:,} images packed, {len(bad)} could not be read; use them by --data packed={args.out}")
    return 0


def number(kind, low, high=sys.float_info.max):
    """A type for argparse: int or float, from `low` to `high`."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:  # nan is not, either
            bounds = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is no number {bounds}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # in argparse's own words
    return read


def build_parser():
    p = argparse.ArgumentParser(
        description="Look into data sets, rebuild protocols, pack images.", allow_abbrev=False
    )
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def command(run, name, help):
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    def data_options(parser):
        parser.add_argument("--data", nargs="+", required=True, metavar="NAME=ROOT", help=", ".join(DATASETS))
        parser.add_argument("--views", nargs="+", choices=VIEWS, default=FRONTAL, help="images to keep")

    s = command(summary, "summary", "count what is there and check it; status 1 where a check fails")
    data_options(s)
    s.add_argument("--uncertain", choices=UNCERTAIN, default="ignore", help="what -1 becomes in training")
    s.add_argument("--batch-size", type=number(int, 1), default=128, help="for the expected false negatives")
    r = command(protocol, "protocol", "write the list of ids of an evaluation set and print its SHA-256")
    r.add_argument(
        "name", choices=PROTOCOLS, help="; ".join(f"{n}: table is {p.table}" for n, p in PROTOCOLS.items())
    )
    r.add_argument("--table", required=True, metavar="FILE", help="the published table, plain, .gz or .zip")
    r.add_argument("--out", required=True, metavar="FILE")
    r.add_argument("--seed", type=number(int, 0, 2**32 - 1), help="default: that of the published list")
    k = command(run_pack, "pack", "decode, square and shrink every image once; goes on where it was stopped")
    data_options(k)
    k.add_argument("--out", required=True, metavar="FOLDER")
    k.add_argument(
        "--image-size", type=number(int, 1), default=256, help="pixels a side; at least that of the model"
    )
    k.add_argument(
        "--workers", type=number(int, 0), default=os.cpu_count(), help="processes that read images"
    )
    k.add_argument(
        "--max-bad", type=number(int, 0), default=100, help="stop when more images than this cannot be read"
    )
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (BadInput, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: stopped by Ctrl-C; the same command goes on with an unfinished pack", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
