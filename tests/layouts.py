"""Small copies of the data sets, laid out as their sources do. All tables and reports here are invented.

The real ones are looked for in the folder of the environment variable UMCL_DATA; tests skip without it.
"""

import csv
import gzip
import io
import json
import os
import zipfile
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import BadInput, Record

MARKER = "zebrafish"  # in every invented report, in none of our messages


def real(*parts):
    """A file or folder of the real data."""
    path = Path(os.environ.get("UMCL_DATA", "nowhere"), *parts)
    if not path.exists():
        pytest.skip(f"{Path(*parts)} is not in the folder UMCL_DATA")
    return path


def draw(path, grey=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 5), grey).save(path)


def write(path, text):
    """A text file, plain or by its ending as .gz or .zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.stem, text)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_table(path, rows, header=None):
    """rows: {name: cell}, blank where a name of the header is missing."""
    text = io.StringIO()
    table = csv.DictWriter(text, header or rows[0], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue())


FOUR = {"Edema": "1.0", "Fracture": "0.0", "Pneumonia": "-1.0"}  # all others are blank
CHEXPERT_TRAIN = {
    "patient00001/study1/view1_frontal.jpg": ("AP", {"No Finding": "1.0", "Support Devices": "1.0"}),
    "patient00001/study2/view1_frontal.jpg": ("PA", FOUR),
    "patient00001/study2/view2_frontal.jpg": ("AP", FOUR),
    "patient00001/study2/view3_lateral.jpg": ("", FOUR),
    "patient00002/study1/view1_lateral.jpg": ("", {"Pleural Effusion": "0.0"}),
    "patient00003/study1/view1_frontal.jpg": ("LL", {}),
    "patient00003/study2/view1_frontal.jpg": ("RL", {"Edema": "-1.0"}),
}
CHEXPERT_VALID = {"patient64541/study1/view1_frontal.jpg": ("AP", {"Edema": "1.0", "Fracture": "0.0"})}
CHEXPERT_TEST = {
    "patient64741/study1/view1_frontal.jpg": ("", {"Edema": "1.0"}),
    "patient64741/study1/view2_lateral.jpg": ("", {"Edema": "1.0"}),
}
FULL = "CheXpert-v1.0 batch 1 (validate & csv)"
UNPACKED = {  # name: (prefix in the tables, folder of the tables, folders of the images by split)
    "the folder": ("CheXpert-v1.0-small", "", {}),
    "its parent": ("CheXpert-v1.0-small", "CheXpert-v1.0-small", {}),
    "no folder in the table": ("", "", {}),
    "full size": ("CheXpert-v1.0", "CheXpert-v1.0", {}),
    "batches": ("CheXpert-v1.0", FULL, {"train": "CheXpert-v1.0 batch 2 (train 1)"}),
    "val": ("CheXpert-v1.0", "", {"valid": "val"}),
}


def chexpert(root, layout="its parent"):
    prefix, tables, places = UNPACKED[layout]
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *data.CHEXPERT]
    for split, images in (("train", CHEXPERT_TRAIN), ("valid", CHEXPERT_VALID)):
        rows = []
        for image, (view, labels) in images.items():
            draw(root / (places.get(split) or Path(tables, split)) / image)
            rows.append({"Path": f"{prefix}/{split}/{image}".lstrip("/"), "AP/PA": view, **labels})
        write_table(root / tables / f"{split}.csv", rows, header)
    rows = [{"Path": f"CheXpert-v1.0/test/{image}", **labels} for image, (_, labels) in CHEXPERT_TEST.items()]
    write_table(root / tables / "test_labels.csv", rows, ["Path", *data.CHEXPERT])
    for image in CHEXPERT_TEST:
        draw(root / tables / "test" / image)
    return root


REPORTS = {  # study: report; the rules are those of the official parser
    50000001: f" FINDINGS: \n \n The lungs are clear, {MARKER}.\n \n IMPRESSION: \n \n No acute process.\n",
    50000002: " HISTORY:  Cough.\n \n IMPRESSION: \n \n",
    50000003: f" CHEST RADIOGRAPH\n \n COMPARISON:  ___.\n \n Compared to ___, the {MARKER} was removed.\n",
    50000004: f" HISTORY:  Dyspnea.\n \n FINDINGS AND IMPRESSION:  Mild {MARKER}.\n",
}
MIMIC = [  # image, patient, study, view, split, labels; the third study has no row in the table of labels
    ("a", 10000001, 50000001, "PA", "train", {"No Finding": "1.0"}),
    ("b", 10000001, 50000001, "LATERAL", "train", {"No Finding": "1.0"}),
    ("c", 10000001, 50000002, "", "train", FOUR),
    ("d", 10000002, 50000003, "AP", "validate", None),
    ("e", 11000003, 50000004, "LL", "test", {"Edema": "1.0"}),
]


def of_study(patient, study):
    return f"files/p{str(patient)[:2]}/p{patient}/s{study}"


def mimic(root, images="mimic-cxr-jpg/2.1.0", reports="mimic-cxr/2.1.0", ending=".jpg"):
    stem, texts, views, splits, labels = root / images / "mimic-cxr-2.0.0", {}, [], [], {}
    for name, patient, study, view, split, states in MIMIC:
        ids = {"dicom_id": name, "subject_id": patient, "study_id": study}
        views.append(ids | {"ViewPosition": view, "Rows": ""})
        splits.append(ids | {"split": split})
        if states:
            labels[study] = {"subject_id": patient, "study_id": study, **states}
        draw(root / images / of_study(patient, study) / (name + ending))
        texts[f"{of_study(patient, study)}.txt"] = f"{' ' * 33}FINAL REPORT\n{REPORTS[study]}"
    write_table(Path(f"{stem}-metadata.csv"), views)
    write_table(Path(f"{stem}-split.csv"), splits)
    write_table(
        Path(f"{stem}-chexpert.csv"), labels.values(), ["subject_id", "study_id", *sorted(data.CHEXPERT)]
    )
    if reports.endswith(".zip"):
        (root / reports).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(root / reports, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in texts.items():
                archive.writestr(file, text)
    else:
        for file, text in texts.items():
            write(root / reports / file, text)
    return root


def rsna(root):
    """20 images; the first six show pneumonia, the second of these in two boxes."""
    rows, classes = [], ["Lung Opacity"] * 6 + ["Normal"] * 4 + ["No Lung Opacity / Not Normal"] * 10
    for n in range(20):
        row = {"patientId": f"{n:02}", "x": "256.0" if n < 6 else "", "Target": int(n < 6)}
        rows += [row, row | {"x": "0.0"}] if n == 1 else [row]
        draw(root / "stage_2_train_images" / f"{n:02}.png", grey=n)
    write_table(root / "stage_2_train_labels.csv", rows)
    rows = [{"patientId": f"{n:02}", "class": name} for n, name in enumerate(classes)]
    write_table(root / "stage_2_detailed_class_info.csv", rows[1:2] + rows)
    return root


def xml(number, images, findings, impression, headings=("normal",)):
    def section(label, text):
        label = f'AbstractText Label="{label}"'
        return f"<{label}>{text}</AbstractText>" if text else f"<{label}/>"

    parts = [f'<uId id="CXR{number}"/>', section("COMPARISON", ""), section("INDICATION", "Cough")]
    parts += [section("FINDINGS", findings), section("IMPRESSION", impression)]
    parts += [f"<major>{heading}</major>" for heading in headings]
    parts += [f'<parentImage id="{id}"><caption>Chest</caption></parentImage>' for id in images]
    return f"<eCitation>{''.join(parts)}</eCitation>"


def openi(root):
    """12 reports: the first has the odd id, the second no words, the third no image."""
    for number in range(1, 13):
        id = {1: "CXR1_1_IM-0001-3001", 5: "CXR5_IM-2117-1003002"}.get(number, f"CXR{number}_IM-00-01")
        images = [] if number == 3 else [id]
        impression = "" if number == 2 else f"Normal chest x-XXXX, {MARKER}."
        headings = ["Opacity/lung/base/left", "Catheters, Indwelling"] if number == 4 else ["normal"]
        text = xml(number, images, "" if number == 2 else "Lungs are clear.", impression, headings)
        write(root / "ecgen-radiology" / f"{number}.xml", text)
        for id in images:
            draw(root / "images" / f"{id}.png")
    return root


def covid_radiography(root, names=("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"), images="images"):
    for name in names:
        for n in range(1, 4):
            draw(root / "COVID-19_Radiography_Dataset" / name / images / f"{name}-{n}.png")
            if images:
                draw(root / "COVID-19_Radiography_Dataset" / name / "masks" / f"{name}-{n}.png")
    return root


def nih(root):
    named, rows = ("No Finding", "Cardiomegaly|Effusion", "Pleural_Thickening", "Effusion|Mass|Edema"), []
    for n in range(10):
        row = {"Image Index": f"{n:08}_000.png", "Finding Labels": named[n % 4], "Patient ID": n}
        rows.append(row | {"View Position": "PA"})
        draw(root / "images_001" / "images" / f"{n:08}_000.png")
    write_table(root / "Data_Entry_2017_v2020.csv", rows)
    return root


def covid_chestxray(root):
    rows = []
    for n in range(10):
        row = {"patientid": n, "finding": "Pneumonia/Viral/COVID-19", "view": "PA", "modality": "X-ray"}
        row |= {"folder": "images", "filename": f"{n}.png", "clinical_notes": f"Case {n}, {MARKER}."}
        rows.append(row)
        draw(root / "images" / f"{n}.png")
    write_table(root / "metadata.csv", rows)
    return root


def medpix(root, caption=f"A {MARKER}."):
    for n, file in enumerate(("train", "dev", "test")):
        row = {"U_id": f"MPX{n}", "image": f"MPX{n}_1", "Location Category": "Head"}
        text = json.dumps(row | {"Description": {"Caption": caption}}, ensure_ascii=False) + "\n"
        write(root / "splitted_dataset" / f"descriptions_{file}.jsonl", text)
        draw(root / "images" / f"MPX{n}_1.png")
    return root


def roco(root):
    """Ten figures of nine articles in two parts, the last one not fetched, and one that is no radiology."""
    lines = {f"ROCO_{n:05}": f" Chest CT, figure {n}: a {MARKER}." for n in range(10)}
    for part, ids in (("train", [*lines][:6]), ("test", [*lines][6:])):
        names = {id: f"PMC{max(int(id[5:]), 1)}_a-{id[-1]}.b.jpg" for id in ids}
        place = root / "data" / part / "radiology"
        write(place / "captions.txt", "".join(f"{id}\t{lines[id]}\n" for id in ids))
        write_table(
            place / "licences.txt",
            [{"ROCO_ID": i, "PMC_ID": name, "CC": "CC BY"} for i, name in names.items()],
        )
        for name in [*names.values()][:-1] if part == "test" else names.values():
            draw(place / "images" / name)
    write(root / "data" / "test" / "non-radiology" / "captions.txt", "ROCO_00010\t A diagram.\n")
    draw(root / "data" / "test" / "non-radiology" / "images" / "ROCO_00010.jpg")
    return root


def folder(root, splits=("train", "val", "test")):
    """Two images of each of two classes in each split, or ten of each without splits."""
    for split, name, n in product(splits, ("Viral_Pneumonia", "No Finding"), range(2 if splits[0] else 10)):
        draw(root / split / name / f"{split}{n}.png")
    return root


def one_finding(root, number=2800):
    """Chests with the labels of RSNA's data set: 7 : 4 : 3 normal, with another finding, with consolidation.

    The consolidation is called Pneumonia, which is present or absent; there are no reports.
    """
    others, rows = [name for name in data.PHANTOM_FINDINGS if name != "Consolidation"], []
    (root / "images").mkdir(parents=True)
    for i in range(number):
        rng = np.random.default_rng(i)
        kind = rng.choice(["normal", "other", "Consolidation"], p=[7 / 14, 4 / 14, 3 / 14])
        found = {"normal": [], "other": [rng.choice(others)]}.get(kind, [kind])
        Image.fromarray(data.draw_phantom(rng, found)[0]).save(root / f"images/{i}.png")
        split = "train" if i < 0.5 * number else "valid" if i < 0.6 * number else "test"
        rows.append({"image": f"images/{i}.png", "split": split, "Pneumonia": int(kind == "Consolidation")})
    write_table(root / "table.csv", rows)
    return root


def own(root):
    """A user's own table, with every column that it may have."""
    rows = []
    for n in range(10):
        row = {"image": f"pictures/{n}.png", "patient": n // 2, "split": ("train", "val", "test")[n // 2 % 3]}
        row |= {"view": "pa", "report": f"Film {n} shows a {MARKER}.", "Edema": n % 2, "Hernia": "-1"}
        rows.append(row)
        draw(root / "pictures" / f"{n}.png", grey=n)
    write_table(root / "table.csv", rows)
    return root / "table.csv"


def pack(root):
    data.pack([f"csv={own(root / 'source')}"], root / "pack", side=8, workers=0)
    return root / "pack"


READERS = {  # layout: (reader, what writes its folder, images in its three splits)
    "chexpert": ("chexpert", chexpert, (7, 1, 2)),
    "mimic-cxr": ("mimic-cxr", mimic, (3, 1, 1)),
    "mimic-zip": ("mimic-cxr", lambda root: mimic(root, reports="mimic-cxr-reports.zip"), (3, 1, 1)),
    "rsna": ("rsna", rsna, (14, 3, 3)),
    "covid-radiography": ("covid-radiography", covid_radiography, (8, 1, 3)),
    "openi": ("openi", openi, (8, 0, 3)),
    "nih-chestxray14": ("nih-chestxray14", nih, (7, 0, 3)),
    "covid-chestxray": ("covid-chestxray", covid_chestxray, (7, 0, 3)),
    "medpix2": ("medpix2", medpix, (1, 1, 1)),
    "roco": ("roco", roco, (8, 0, 1)),
    "folder": ("folder", folder, (4, 4, 4)),
    "folder of classes": ("folder", partial(folder, splits=("",)), (13, 4, 3)),
    "csv": ("csv", own, (4, 4, 2)),
    "pack": ("csv", pack, (4, 4, 2)),
}


def build(name, root):
    """The folder of a layout -> its spec."""
    reader, write_folder, _ = READERS[name]
    return f"{reader}={write_folder(root)}"


def everything(spec):
    """The records of all splits -> list."""
    return [r for split in data.SPLITS for r in data.read_records([spec], split)[spec]]


def contents(spec, root=None):
    """All fields of all records; the path of an image is relative to the root."""
    names = [field.name for field in fields(Record) if field.name != "image"]
    where = [str(r.image).replace(str(root), "") for r in everything(spec)]
    return where, [[getattr(r, name) for name in names] for r in everything(spec)]


def tables(root):
    return sorted(path for path in root.rglob("*.csv*") if path.is_file())


def compress(spec, root, ending):
    """Replaces each table below root by its .gz or .zip -> the spec, which may name one of them."""
    for path in tables(root):
        write(Path(f"{path}{ending}"), path.read_text())
        path.unlink()
    return spec.replace("table.csv", f"table.csv{ending}")


def refused(spec):
    """The sentence by which the reader refuses its folder."""
    with pytest.raises(BadInput) as caught:
        everything(spec)
    return str(caught.value)


def table_of(folder, *rows):
    """A table of the user's own from its lines -> its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return f"csv={folder / 'table.csv'}"
