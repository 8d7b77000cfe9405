"""Makes FOLDER/table.csv of a public data set, to be used as `--data csv=FOLDER`.

    python tests/make_table.py openi FOLDER             Open-I: images and ecgen-radiology/, unpacked
    python tests/make_table.py nih-chestxray14 FOLDER   Data_Entry_2017_v2020.csv and images, in any folders
    python tests/make_table.py covid-chestxray FOLDER   github.com/ieee8023/covid-chestxray-dataset
    python tests/make_table.py medpix2 FOLDER           MedPix 2.0: images/ and splitted_dataset/

Each function below takes the folder and gives [(split, Record), ...]; all splits are by patient.
"""

import argparse
import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from data import NO_FINDING, BadInput, Record

MESH = {  # finding -> MeSH headings; other headings say nothing that the chest X-ray data sets share
    NO_FINDING: ["normal"], "Atelectasis": ["Pulmonary Atelectasis"], "Cardiomegaly": ["Cardiomegaly"],
    "Consolidation": ["Consolidation"], "Edema": ["Pulmonary Edema"], "Fracture": ["Fractures, Bone"],
    "Lung Lesion": ["Mass", "Nodule"], "Lung Opacity": ["Airspace Disease", "Infiltrate", "Opacity"],
    "Pleural Effusion": ["Pleural Effusion"], "Pneumonia": ["Pneumonia"], "Pneumothorax": ["Pneumothorax"],
    "Support Devices": [
        "Catheters, Indwelling", "Implanted Medical Device", "Medical Device", "Tube, Inserted",
    ],
}  # fmt: skip


def by_patient(records, **cuts):
    splits = data.split_by_patient(records, **cuts)
    return [(split, record) for split in data.SPLITS for record in splits[split]]


def mesh_labels(headings):
    """Headings such as "Opacity/lung/base/left" -> labels; a report that was not indexed has none."""
    main = {heading.split("/")[0].strip() for heading in headings} - {"", "No Indexing"}
    return {name: 1 if main.intersection(known) else None for name, known in MESH.items()} if main else {}


def openi(root):
    """Reports and MeSH headings; the views come from torchxrayvision's table, where it is there."""
    folder, records = data.find(root, "ecgen-radiology"), []
    if not folder:
        raise BadInput(f"{root} has no folder ecgen-radiology; unpack NLMCXR_reports.tgz there")
    table, images = data.find_table(root, "nlmcxr_dicom_metadata.csv"), data.images_under(root)
    rows = data.read_table(table, ("imageid", "View Position")) if table.exists() else ()
    positions = {row["imageid"]: row["View Position"] for _, row in rows}
    for path in sorted(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem)):  # 2 before 10
        with data.reading(path):
            tree = ElementTree.parse(path)
            section = {part.get("Label"): part.text for part in tree.iter("AbstractText")}
            labels = mesh_labels(heading.text or "" for heading in tree.iter("major"))
            ids = [image.attrib["id"] for image in tree.iter("parentImage")]
        text = data.join(section.get("IMPRESSION"), section.get("FINDINGS"))
        for id in ids:
            # The first report alone has one number more in the XML than in the table.
            position = positions.get(id.replace("CXR1_1_", "CXR1_"))
            view = data.dicom_view(position) if position else ""
            image = images.get(id, root / f"{id}.png")
            records.append(Record(image, text, labels, patient=path.stem, source="openi", id=id, view=view))
    return by_patient(records)


def nih_chestxray14(root):
    """The official test list where it is there, the rest split by patient."""
    table = data.find_table(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    rows = [row for _, row in data.read_table(table, ("Image Index", "Finding Labels", "Patient ID"))]
    places, records = data.images_under(root), []
    elsewhere = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}
    named = [{elsewhere.get(n, n) for n in row["Finding Labels"].split("|")} for row in rows]
    annotated = sorted(set().union(*named))
    for row, present in zip(rows, named, strict=True):
        id, patient = row["Image Index"], row["Patient ID"]
        image = places.get(os.path.splitext(id)[0], root / "images" / id)
        labels, view = (
            {name: int(name in present) for name in annotated},
            row.get("View Position") or "FRONTAL",
        )
        records.append(Record(image, None, labels, patient, "nih-chestxray14", id=id, view=view))
    official = root / "test_list.txt"
    if not official.exists():
        return by_patient(records)
    listed = {line.strip() for _, line in data.read_lines(official)}
    test = [("test", r) for r in records if r.id in listed]
    return by_patient([r for r in records if r.id not in listed], cuts=(0.9, 1.0)) + test


def covid_chestxray(root):
    """Frontal X-rays with a finding; the clinical notes are the reports.

    The table lists some files twice, under two numbers of a patient: the first row counts, for both numbers.
    """
    needed = ("patientid", "finding", "view", "modality", "folder", "filename", "clinical_notes")
    records, owner, alias = [], {}, {}
    for _, row in data.read_table(root / "metadata.csv", needed):
        # "Pneumonia/Viral/COVID-19" in later releases, "COVID-19, ARDS" in earlier: the most exact names.
        names = {name.strip().rsplit("/", 1)[-1] for name in row["finding"].split(",")}
        names -= {"", "todo", "Unknown"}
        if row["modality"] != "X-ray" or not row["view"].startswith(("PA", "AP")) or not names:
            continue
        id, notes, patient = f"{row['folder']}/{row['filename']}", row["clinical_notes"], row["patientid"]
        if owner.setdefault(id, patient) != patient:
            alias[patient] = owner[id]
            continue
        known = {"patient": patient, "source": "covid-chestxray", "id": id, "view": row["view"][:2]}
        records.append(Record(root / id, data.as_written(notes), dict.fromkeys(sorted(names), 1), **known))
    return by_patient([replace(r, patient=alias.get(r.patient, r.patient)) for r in records])


CATEGORIES = ("Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles", "Thorax")


def medpix2(root):
    """CT and MR images, captions and location category; a patient is one case, the splits are official."""
    found = []
    for split, file in {"train": "train", "valid": "dev", "test": "test"}.items():
        path = root / "splitted_dataset" / f"descriptions_{file}.jsonl"
        for number, line in data.read_lines(path):
            with data.reading(path, f", line {number},"):
                row = json.loads(line)
                id, labels = row["image"], dict.fromkeys(CATEGORIES, 0) | {row["Location Category"]: 1}
                caption = data.as_written(row["Description"]["Caption"] or "")
                known = {"patient": row["U_id"], "source": "medpix2", "id": id}
            found.append((split, Record(root / "images" / f"{id}.png", caption, labels, **known)))
    return found


READERS = {f.__name__.replace("_", "-"): f for f in (openi, nih_chestxray14, covid_chestxray, medpix2)}


def make_table(name, root):
    """Writes root/table.csv -> number of images."""
    chosen = READERS[name](Path(root))
    if not chosen:
        raise BadInput(f"{root} has no image of {name}")
    images = [os.path.relpath(record.image, root) for _, record in chosen]
    with data.replacing(Path(root, "table.csv")) as file:
        csv.writer(file).writerows(data.table_rows(chosen, images))
    return len(chosen)


if __name__ == "__main__":
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=READERS)
    parser.add_argument("folder")
    args = parser.parse_args()
    try:
        print(f"{make_table(args.name, args.folder):,} images in {args.folder}/table.csv")
    except (BadInput, OSError) as error:
        parser.exit(2, f"make_table.py: {error}\n")
