"""Readers: the same questions to all, on small folders laid out as their sources do; then each alone.

All tables and reports here are invented.
"""

import csv
import gzip
import io
import json
import shutil
import sys
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import umcl
from data import BadInput, Record

SHARED = Path(__file__).parents[2] / "shared" / "data" / "metadata"
MARKER = "zebrafish"  # in every invented report, in none of our messages

# ------------------------------------------------------------------------------------------------- folders


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


def write_table(path, header, rows):
    """header: names; rows: {name: cell}, blank where a name is missing."""
    text = io.StringIO()
    table = csv.DictWriter(text, header, restval="", lineterminator="\n")
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
LAYOUTS = {  # name: (prefix in the tables, folder of the tables, folders of the images by split)
    "the folder": ("CheXpert-v1.0-small", "", {}),
    "its parent": ("CheXpert-v1.0-small", "CheXpert-v1.0-small", {}),
    "no folder in the table": ("", "", {}),
    "full size": ("CheXpert-v1.0", "CheXpert-v1.0", {}),
    "batches": ("CheXpert-v1.0", FULL, {"train": "CheXpert-v1.0 batch 2 (train 1)"}),
    "val": ("CheXpert-v1.0", "", {"valid": "val"}),
}


def chexpert(root, layout="its parent"):
    prefix, tables, places = LAYOUTS[layout]
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *data.CHEXPERT]
    for split, images in (("train", CHEXPERT_TRAIN), ("valid", CHEXPERT_VALID)):
        rows = []
        for image, (view, labels) in images.items():
            draw(root / (places.get(split) or Path(tables, split)) / image)
            more = {"Sex": "Female", "Age": "50", "Frontal/Lateral": "Frontal", "AP/PA": view}
            rows.append({"Path": f"{prefix}/{split}/{image}".lstrip("/"), **more, **labels})
        write_table(root / tables / f"{split}.csv", header, rows)
    rows = [{"Path": f"CheXpert-v1.0/test/{image}", **labels} for image, (_, labels) in CHEXPERT_TEST.items()]
    write_table(root / tables / "test_labels.csv", ["Path", *data.CHEXPERT], rows)
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
    tables = root / images
    ids = ["dicom_id", "subject_id", "study_id"]
    rows = [dict(zip(ids, row, strict=False)) for row in MIMIC]
    views = [row | {"ViewPosition": more[3]} for row, more in zip(rows, MIMIC, strict=True)]
    write_table(tables / "mimic-cxr-2.0.0-metadata.csv", [*ids, "ViewPosition", "Rows"], views)
    splits = [row | {"split": more[4]} for row, more in zip(rows, MIMIC, strict=True)]
    write_table(tables / "mimic-cxr-2.0.0-split.csv", ["dicom_id", "study_id", "subject_id", "split"], splits)
    labels = {row[2]: {"subject_id": row[1], "study_id": row[2], **row[5]} for row in MIMIC if row[5]}
    header = ["subject_id", "study_id", *sorted(data.CHEXPERT)]
    write_table(tables / "mimic-cxr-2.0.0-chexpert.csv", header, labels.values())
    for name, patient, study, *_ in MIMIC:
        draw(tables / of_study(patient, study) / (name + ending))
    texts = {f"{of_study(p, s)}.txt": f"{' ' * 33}FINAL REPORT\n{REPORTS[s]}" for _, p, s, *_ in MIMIC}
    if reports.endswith(".zip"):
        with zipfile.ZipFile(root / reports, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in texts.items():
                archive.writestr(file, text)
    else:
        for file, text in texts.items():
            write(root / reports / file, text)
    return root


RSNA = ["patientId", "x", "y", "width", "height", "Target"]


def rsna(root, ending=".png"):
    """20 images; the first six show pneumonia, the second of these in two boxes."""
    rows = []
    for n in range(20):
        row = {"patientId": f"{n:02}", "Target": int(n < 6)}
        box = {"x": "256.0", "y": "128.0", "width": "512.0", "height": "256.0"} if n < 6 else {}
        rows += [row | box, *([row | box | {"x": "0.0"}] if n == 1 else [])]
        draw(root / "stage_2_train_images" / f"{n:02}{ending}", grey=n)
    write_table(root / "stage_2_train_labels.csv", RSNA, rows)
    classes = ["Lung Opacity"] * 6 + ["Normal"] * 4 + ["No Lung Opacity / Not Normal"] * 10
    rows = [{"patientId": f"{n:02}", "class": name} for n, name in enumerate(classes)]
    write_table(root / "stage_2_detailed_class_info.csv", ["patientId", "class"], rows[1:2] + rows)
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


def openi_kaggle(root):
    """The same reports in Kaggle's two tables."""
    reports, images = [], []
    for number in range(1, 13):
        words = number != 2
        row = {"uid": number, "MeSH": "Opacity/lung;Catheters, Indwelling" if number == 4 else "normal"}
        row["impression"] = f"Normal chest x-XXXX, {MARKER}." if words else ""
        reports.append(row | {"findings": "Lungs are clear." if words else ""})
        if number != 3:
            name = f"{number}_IM-0001-4001.dcm.png"
            images.append({"uid": number, "filename": name, "projection": "Frontal"})
            draw(root / "images" / "images_normalized" / name)
    header = ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]
    write_table(root / "indiana_reports.csv", header, reports)
    write_table(root / "indiana_projections.csv", ["uid", "filename", "projection"], images)
    return root


def covid_radiography(root, names=("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"), images="images"):
    for name in names:
        for n in range(1, 4):
            draw(root / "COVID-19_Radiography_Dataset" / name / images / f"{name}-{n}.png")
            if images:
                draw(root / "COVID-19_Radiography_Dataset" / name / "masks" / f"{name}-{n}.png")
    return root


def nih(root):
    header = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    header += ["OriginalImage[Width", "Height]"]
    named = ["No Finding", "Cardiomegaly|Effusion", "Pleural_Thickening", "Effusion|Mass|Edema"]
    rows = []
    for n in range(10):
        cells = [f"{n:08}_000.png", named[n % 4], n, "PA"]
        rows.append(dict(zip(header, cells, strict=False)))
        draw(root / "images_001" / "images" / f"{n:08}_000.png")
    write_table(root / "Data_Entry_2017_v2020.csv", header, rows)
    return root


def covid_chestxray(root):
    header = ["patientid", "finding", "view", "modality", "folder", "filename", "clinical_notes"]
    rows = []
    for n in range(10):
        cells = [n, "Pneumonia/Viral/COVID-19", "PA", "X-ray", "images", f"{n}.png", f"Case {n}, {MARKER}."]
        rows.append(dict(zip(header, cells, strict=True)))
        draw(root / "images" / f"{n}.png")
    write_table(root / "metadata.csv", header, rows)
    return root


def medpix(root):
    for n, file in enumerate(("train", "dev", "test")):
        row = {"U_id": f"MPX{n}", "image": f"MPX{n}_1", "Location Category": "Head"}
        row["Description"] = {"Caption": f"A {MARKER}."}
        write(root / "splitted_dataset" / f"descriptions_{file}.jsonl", json.dumps(row) + "\n")
        draw(root / "images" / f"MPX{n}_1.png")
    return root


def own(root):
    """A user's own table, with every column that it may have."""
    rows = []
    for n in range(10):
        row = {"image": f"pictures/{n}.png", "patient": n // 2, "split": ("train", "val", "test")[n // 2 % 3]}
        row |= {"view": "pa", "report": f"Film {n} shows a {MARKER}.", "Edema": n % 2, "Hernia": "-1"}
        rows.append(row)
        draw(root / "pictures" / f"{n}.png", grey=n)
    write_table(root / "table.csv", rows[0], rows)
    return root / "table.csv"


def pack(root):
    data.pack([f"csv={own(root / 'source')}"], root / "pack", side=8, workers=0)
    return root / "pack"


READERS = {  # reader: (what writes its folder, images in its three splits)
    "chexpert": (chexpert, (7, 1, 2)),
    "mimic-cxr": (mimic, (3, 1, 1)),
    "rsna": (rsna, (14, 3, 3)),
    "openi": (openi, (8, 1, 2)),
    "covid-radiography": (covid_radiography, (8, 2, 2)),
    "nih-chestxray14": (nih, (7, 1, 2)),
    "covid-chestxray": (covid_chestxray, (7, 1, 2)),
    "medpix2": (medpix, (1, 1, 1)),
    "csv": (own, (4, 4, 2)),
    "packed": (pack, (4, 4, 2)),
}
FILES = [name for name in READERS if name != "packed"]
LISTED = [name for name in FILES if name != "covid-radiography"]  # a table says which images there are
TABLES = [("openi-kaggle" if name == "openi" else name) for name in LISTED if name != "medpix2"]
WITH_REPORTS = ["mimic-cxr", "openi", "covid-chestxray", "medpix2", "csv", "packed"]


def build(name, root):
    """The folder of a reader -> its spec."""
    if name == "openi-kaggle":
        return f"openi={openi_kaggle(root)}"
    return f"{name}={READERS[name][0](root)}"


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """{reader: spec} of folders into which nobody writes."""
    return {name: build(name, tmp_path_factory.mktemp(name)) for name in READERS}


def everything(spec):
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


def turn(path):
    """Writes the columns of a table in the opposite order."""
    with path.open(newline="") as file:
        rows = [row[::-1] for row in csv.reader(file)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def refused(spec):
    """The sentence by which the reader refuses its folder."""
    with pytest.raises(BadInput) as caught:
        everything(spec)
    return str(caught.value)


def summary(spec):
    return data.main(["summary", "--data", str(spec), "--batch-size", "4"])


# --------------------------------------------------------------------------------------- all readers: sound


@pytest.mark.parametrize("name", READERS)
def test_each_split_has_its_images(specs, name):
    counts = tuple(len(data.read_records([specs[name]], split)[specs[name]]) for split in data.SPLITS)
    assert counts == READERS[name][1]


@pytest.mark.parametrize("name", READERS)
def test_every_image_can_be_read(specs, name):
    sizes = {data.read_image(r.image).size for r in everything(specs[name])}
    assert sizes == {(8, 8) if name == "packed" else (6, 5)}


@pytest.mark.parametrize("name", READERS)
def test_no_patient_is_in_two_splits(specs, name):
    owners = [{r.patient for r in data.read_records([specs[name]], s)[specs[name]]} for s in data.SPLITS]
    assert sum(map(len, owners)) == len(set().union(*owners)) > 1


@pytest.mark.parametrize("name", READERS)
def test_no_two_images_have_the_same_id(specs, name):
    assert max(Counter(r.id for r in everything(specs[name])).values()) == 1


@pytest.mark.parametrize("name", READERS)
def test_an_id_does_not_depend_on_where_the_folder_lies(specs, name):
    assert all(r.id and not Path(r.id).is_absolute() for r in everything(specs[name]))


@pytest.mark.parametrize("name", READERS)
def test_the_source_is_the_name_of_the_data_set(specs, name):
    assert {r.source for r in everything(specs[name])} == {"csv" if name == "packed" else name}


@pytest.mark.parametrize("name", READERS)
def test_a_view_is_one_of_the_five_or_not_said(specs, name):
    assert {r.view for r in everything(specs[name])} <= {*data.VIEWS, ""}


@pytest.mark.parametrize("name", READERS)
def test_a_finding_is_in_one_state(specs, name):
    for r in everything(specs[name]):
        states = [getattr(r, state) for state in data.STATES]
        assert sum(map(len, states)) == len(frozenset().union(*states))


@pytest.mark.parametrize("name", WITH_REPORTS)
def test_reports_are_read_and_their_redaction_marks_are_not(specs, name):
    reports = [r.report for r in everything(specs[name]) if r.report]
    assert reports and all(MARKER in text and "XXXX" not in text and "___" not in text for text in reports)


@pytest.mark.parametrize("name", sorted(READERS.keys() - WITH_REPORTS))
def test_data_without_reports_get_none(specs, name):
    assert {r.report for r in everything(specs[name])} == {None}


@pytest.mark.parametrize("name", READERS)
def test_a_sound_set_passes_its_summary(specs, name):
    assert summary(specs[name]) == 0


@pytest.mark.parametrize("name", WITH_REPORTS)
def test_a_summary_shows_no_word_of_a_report(specs, name, capsys):
    summary(specs[name])
    assert MARKER not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_found_by_name_not_by_place(name, tmp_path):
    spec = build(name, tmp_path)
    before = contents(spec)
    for path in tables(tmp_path):
        turn(path)
    assert contents(spec) == before


@pytest.mark.parametrize("ending", [".gz", ".zip"])
@pytest.mark.parametrize("name", sorted({*TABLES} - {"covid-chestxray"}))
def test_a_compressed_table_gives_the_same_records(name, ending, tmp_path):
    spec = build(name, tmp_path)
    before = contents(spec)
    assert contents(compress(spec, tmp_path, ending)) == before


@pytest.mark.parametrize("name", ["chexpert", "mimic-cxr", "rsna", "openi", "covid-radiography"])
def test_the_folder_above_gives_the_same_records(name, tmp_path):
    below = build(name, tmp_path / "above" / "folder")
    above = f"{name}={tmp_path / 'above'}"
    if name in ("chexpert", "mimic-cxr", "covid-radiography"):  # built one or two folders deep as it is
        inner = {"chexpert": "CheXpert-v1.0-small", "covid-radiography": "COVID-19_Radiography_Dataset"}
        below = f"{name}={tmp_path / 'above' / 'folder' / inner.get(name, '')}"
        above = f"{name}={tmp_path / 'above' / 'folder'}"
    assert contents(above) == contents(below)


# ------------------------------------------------------------------------------------ all readers: bad input


@pytest.mark.parametrize("name", LISTED)
def test_a_missing_image_fails_the_summary(name, tmp_path, capsys):
    spec = build(name, tmp_path)
    everything(spec)[0].image.unlink()
    assert summary(spec) == 1 and "missing files:                  1\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", LISTED)
def test_one_missing_image_among_others_does_not_stop_a_run(name, tmp_path):
    records = everything(build(name, tmp_path))
    records[0].image.unlink()
    data.check_images(records, 8)
    with pytest.raises(BadInput, match=f"{records[0].image.name}.*--skip-bad-images"):
        data.read_image(records[0].image)


@pytest.mark.parametrize("name", LISTED)
def test_a_table_whose_ids_match_no_file_shows_one_path_expected_and_one_found(name, tmp_path):
    spec = build(name, tmp_path)
    for r in everything(spec):
        r.image.rename(r.image.with_name(f"renamed{r.image.suffix}"))
    records = everything(spec)
    with pytest.raises(BadInput) as caught:
        data.check_images(records, 8)
    assert str(records[0].image) in str(caught.value) and "/renamed." in str(caught.value)


@pytest.mark.parametrize("name", LISTED)
def test_without_any_image_the_folder_is_said_to_hold_none(name, tmp_path):
    spec = build(name, tmp_path)
    for r in everything(spec):
        r.image.unlink()
    with pytest.raises(BadInput, match="holds is no image"):
        data.check_images(everything(spec), 8)


def test_the_look_for_an_image_to_show_ends_at_the_first(monkeypatch):
    def walk(root):
        yield root, [], ["notes.txt", "first.JPG"]
        raise AssertionError("looked on")

    monkeypatch.setattr("os.walk", walk)
    assert data.an_image_under("folder") == Path("folder", "first.JPG")


@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder_is_refused(name, tmp_path, capsys):
    assert summary(f"{name}={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.py: ") and str(tmp_path) in line


@pytest.mark.parametrize("name", TABLES)
def test_a_row_with_too_few_cells_is_named_in_whichever_table_it_is(name, tmp_path):
    spec = build(name, tmp_path)
    for path in tables(tmp_path):
        whole = path.read_text()
        path.write_text(whole + "cut")
        assert f"{path}, row {len(whole.splitlines()) + 1}, has not as many cells" in refused(spec)
        path.write_text(whole)


@pytest.mark.parametrize("name", sorted({*TABLES} - {"covid-chestxray"}))
@pytest.mark.parametrize("ending", [".gz", ".zip"])
def test_a_compressed_table_that_is_cut_short_is_named(name, ending, tmp_path):
    spec = compress(build(name, tmp_path), tmp_path, ending)
    for path in tables(tmp_path):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        assert f"{path} is cut short" in refused(spec)
        path.write_bytes(whole)


NEEDED = {
    "chexpert": ["Edema"],
    "mimic-cxr": ["dicom_id", "split", "ViewPosition", "Edema"],
    "rsna": ["patientId", "Target", "width", "class"],
    "openi-kaggle": ["uid", "projection", "findings"],
    "nih-chestxray14": ["Finding Labels"],
    "covid-chestxray": ["modality"],
    "csv": ["image"],
}


@pytest.mark.parametrize(("name", "column"), [(name, c) for name in NEEDED for c in NEEDED[name]])
def test_a_missing_column_is_named_beside_those_there(name, column, tmp_path):
    spec = build(name, tmp_path)
    for path in tables(tmp_path):
        header, _, rows = path.read_text().partition("\n")
        path.write_text(f"{header.replace(column, 'something')}\n{rows}")
    assert f"has no column {column!r}; it has " in refused(spec)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("chexpert", "train.csv"),
        ("chexpert", "valid.csv"),
        ("mimic-cxr", "mimic-cxr-2.0.0-metadata.csv"),
        ("mimic-cxr", "mimic-cxr-2.0.0-split.csv"),
        ("mimic-cxr", "mimic-cxr-2.0.0-chexpert.csv"),
        ("rsna", "stage_2_train_labels.csv"),
        ("openi-kaggle", "indiana_projections.csv"),
        ("nih-chestxray14", "Data_Entry_2017_v2020.csv"),
        ("covid-chestxray", "metadata.csv"),
        ("csv", "table.csv"),
    ],
)
def test_a_missing_table_is_named(name, table, tmp_path):
    spec = build(name, tmp_path)
    next(tmp_path.rglob(table)).unlink()
    assert table in refused(spec) and "is not there" in refused(spec)


@pytest.mark.parametrize("name", ["chexpert", "mimic-cxr", "nih-chestxray14", "covid-chestxray", "csv"])
def test_an_image_that_stands_twice_is_refused(name, tmp_path):
    spec = build(name, tmp_path)
    (path, *_) = [path for path in tables(tmp_path) if "chexpert.csv" not in path.name]
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert "2 times; keep one" in refused(spec)


@pytest.mark.parametrize(
    ("name", "table"),
    [("chexpert", "train.csv"), ("mimic-cxr", "mimic-cxr-2.0.0-chexpert.csv"), ("csv", "table.csv")],
)
@pytest.mark.parametrize("value", ["2", "0.5", "yes", "nan", "-", ".0"])
def test_a_label_outside_the_four_states_is_named_by_row_and_column(name, table, value, tmp_path):
    spec = build(name, tmp_path)
    path = next(tmp_path.rglob(table))
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[2][rows[0].index("Edema")] = value
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    assert refused(spec).startswith(f"{path}, row 3: column 'Edema' has the value {value!r}")


# -------------------------------------------------------------------------------------- four states, settled


def settled(policy, **values):
    """Cells of a row -> what the policy makes of them."""
    states = data.four_states(tuple(values), tuple(values.values()))
    r = data.settle(Record(Path("a.png"), None, patient="1", source="test", **states), policy)
    outcome = {name: "unknown" for name in values}
    return outcome | dict.fromkeys(r.findings, "present") | dict.fromkeys(r.absent, "absent")


TRUTH = {  # cell, another present: ignore, zeros, ones, competition of edema, of fracture
    ("1", False): ("present", "present", "present", "present", "present"),
    ("1.0", True): ("present", "present", "present", "present", "present"),
    ("0", False): ("absent", "absent", "absent", "absent", "absent"),
    ("0.0", True): ("absent", "absent", "absent", "absent", "absent"),
    ("-1", False): ("unknown", "absent", "present", "present", "absent"),
    ("-1.0", True): ("unknown", "absent", "present", "present", "absent"),
    ("", True): ("absent", "absent", "absent", "absent", "absent"),
    (" ", False): ("unknown", "unknown", "unknown", "unknown", "unknown"),
}


@pytest.mark.parametrize("column", range(5), ids=["ignore", "zeros", "ones", "competition", "other"])
@pytest.mark.parametrize("cell", TRUTH)
def test_the_policy_is_its_truth_table(cell, column):
    value, beside = cell
    policy, finding = [*data.UNCERTAIN, "competition"][column], "Fracture" if column == 4 else "Edema"
    assert settled(policy, **{finding: value, "Mass": str(int(beside))})[finding] == TRUTH[cell][column]


@pytest.mark.parametrize("finding", data.CHEXPERT[1:])
def test_of_an_uncertain_finding_the_competition_keeps_three(finding):
    kept = finding in ("Atelectasis", "Edema", "Pleural Effusion")
    assert settled("competition", **{finding: "-1"})[finding] == ("present" if kept else "absent")


@pytest.mark.parametrize(
    ("policy", "outcome"), [("ignore", "unknown"), ("zeros", "unknown"), ("ones", "absent")]
)
def test_beside_an_uncertain_finding_a_blank_is_absent_where_that_counts_as_present(policy, outcome):
    assert settled(policy, Edema="-1", Fracture="")["Fracture"] == outcome


@pytest.mark.parametrize("policy", data.UNCERTAIN)
def test_an_image_without_any_finding_is_unknown_not_normal(policy):
    assert set(settled(policy, **dict.fromkeys(data.CHEXPERT, "")).values()) == {"unknown"}


@pytest.mark.parametrize("policy", data.UNCERTAIN)
def test_a_settled_record_has_no_uncertain_and_no_blank_finding(policy):
    states = {state: frozenset({state}) for state in data.STATES}
    r = data.settle(Record(Path("a"), "text", patient="1", source="s", **states, id="i", view="PA"), policy)
    assert not r.uncertain and not r.blank


def test_settling_keeps_all_but_the_states():
    names = {"image": Path("a"), "report": "text", "patient": "1", "source": "s", "id": "i", "view": "PA"}
    r = data.settle(
        Record(**names, boxes=((0, 0, 1, 1),), findings=frozenset(), blank=frozenset("B")), "ones"
    )
    assert {name: getattr(r, name) for name in [*names, "boxes"]} == names | {"boxes": ((0, 0, 1, 1),)}


def known(*findings, columns=("Edema", "No Finding", "Support Devices")):
    """(present, absent) of an image with these findings."""
    r = Record(Path("a"), None, frozenset(findings), "1", "test")
    return [matrix[0].tolist() for matrix in data.label_matrices([r], columns)]


def test_no_finding_excludes_all_but_devices():
    assert known("No Finding") == [[False, True, False], [True, False, False]]


def test_a_device_does_not_exclude_no_finding():
    assert known("Support Devices") == [[False, False, True], [False, False, False]]


def test_a_disease_excludes_no_finding_and_leaves_devices_open():
    assert known("Edema") == [[True, False, False], [False, True, False]]


# ------------------------------------------------------------------------------------------------- chexpert


def by_id(spec):
    return {r.id: r for r in everything(spec)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chexpert_is_found_however_it_was_unpacked(layout, tmp_path):
    records = everything(f"chexpert={chexpert(tmp_path, layout)}")
    assert len(records) == 10 and all(r.image.is_file() for r in records)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chexpert_ids_are_the_paths_without_their_prefix(layout, tmp_path):
    ids = [r.id for r in everything(f"chexpert={chexpert(tmp_path, layout)}")]
    assert ids[:7] == [f"train/{image}" for image in CHEXPERT_TRAIN]
    assert ids[7:] == ["valid/" + [*CHEXPERT_VALID][0], *(f"test/{image}" for image in CHEXPERT_TEST)]


def test_chexpert_views_are_said_by_the_table_and_else_by_the_file(specs):
    views = [r.view for r in everything(specs["chexpert"])]
    train = ["AP", "PA", "AP", "LATERAL", "LATERAL", "FRONTAL", "FRONTAL"]  # the last two are LL and RL
    assert views == [*train, "AP", "FRONTAL", "LATERAL"]


def test_chexpert_keeps_all_four_states(specs):
    r = by_id(specs["chexpert"])["train/patient00001/study2/view1_frontal.jpg"]
    rest = set(data.CHEXPERT) - FOUR.keys()
    assert (r.findings, r.absent, r.uncertain, r.blank) == ({"Edema"}, {"Fracture"}, {"Pneumonia"}, rest)


def test_chexpert_row_of_blanks_is_blank(specs):
    r = by_id(specs["chexpert"])["train/patient00003/study1/view1_frontal.jpg"]
    assert r.blank == set(data.CHEXPERT)


def test_chexpert_no_finding_stands_beside_devices(specs):
    r = by_id(specs["chexpert"])["train/patient00001/study1/view1_frontal.jpg"]
    assert r.findings == {"No Finding", "Support Devices"}


def test_chexpert_images_of_a_study_share_patient_and_labels(specs):
    frontal, second, lateral = (r for r in everything(specs["chexpert"]) if "00001/study2" in r.id)
    assert frontal.patient == second.patient == lateral.patient == "patient00001"
    assert frontal.findings == second.findings == lateral.findings


def test_chexpert_is_frontal_by_default(specs):
    ids = [r.id for r in data.load_records([specs["chexpert"]], "train")]
    assert ids == [f"train/{image}" for image in CHEXPERT_TRAIN if "frontal" in image]


def test_chexpert_laterals_are_there_on_demand(specs):
    ids = [r.id for r in data.load_records([specs["chexpert"]], "train", views=["LATERAL"])]
    assert ids == [f"train/{image}" for image in CHEXPERT_TRAIN if "lateral" in image]


def test_a_view_that_no_image_has_is_refused(specs):
    with pytest.raises(BadInput, match="chexpert has no record in its split 'train' with the view UNKNOWN"):
        data.load_records([specs["chexpert"]], "train", views=["UNKNOWN"])


@pytest.fixture
def studies(tmp_path):
    """CheXpert whose test labels are by study: groundtruth.csv -> its spec."""
    root = chexpert(tmp_path) / "CheXpert-v1.0-small"
    (root / "test_labels.csv").unlink()
    row = {"Study": "CheXpert-v1.0/test/patient64741/study1", "Edema": "1"}
    write_table(root / "groundtruth.csv", ["Study", *data.CHEXPERT], [row])
    return f"chexpert={tmp_path}"


def test_chexpert_test_labels_by_study_give_the_records_of_those_by_path(specs, studies):
    both = [data.read_records([spec], "test")[spec] for spec in (specs["chexpert"], studies)]
    by_path, by_study = ([(r.id, r.view, r.findings, r.absent, r.blank) for r in found] for found in both)
    assert by_study == by_path


def test_chexpert_test_study_without_its_folder_is_named(studies):
    shutil.rmtree(Path(studies.partition("=")[2], "CheXpert-v1.0-small", "test"))
    assert "row 2: the study " in refused(studies) and "patient64741/study1 is not there" in refused(studies)


def test_chexpert_without_test_labels_has_no_test_records(studies):
    Path(studies.partition("=")[2], "CheXpert-v1.0-small", "groundtruth.csv").unlink()
    assert data.read_records([studies], "test")[studies] == []


def test_chexpert_valid_labels_may_have_the_name_of_chexlocalize(tmp_path):
    root = chexpert(tmp_path, "val")
    before = contents(f"chexpert={root}")
    (root / "valid.csv").rename(root / "val_labels.csv")
    assert contents(f"chexpert={root}") == before


def test_chexpert_path_that_is_none_is_named_by_its_row(tmp_path):
    table = chexpert(tmp_path) / "CheXpert-v1.0-small" / "train.csv"
    table.write_text(table.read_text().replace("CheXpert-v1.0-small/train/patient00002/study1/", ""))
    assert f"{table}, row 6: 'view1_lateral.jpg' is no path of CheXpert" in refused(f"chexpert={tmp_path}")


def test_a_patient_in_two_official_splits_fails_the_summary(tmp_path, capsys):
    root = chexpert(tmp_path) / "CheXpert-v1.0-small"
    table = (root / "valid.csv").read_text()
    (root / "valid.csv").write_text(table.replace("patient64541", "patient00002"))
    draw(root / "train" / "patient00002" / "study1" / "view1_frontal.jpg")
    assert summary(f"chexpert={tmp_path}") == 1
    assert "patients in two splits:         1\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ mimic-cxr


def report(body):
    return f"{' ' * 33}FINAL REPORT\n{body}"


def test_mimic_report_with_both_sections_gives_both():
    text = (
        " EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ year old woman with cough\n \n"
        " FINDINGS: \n \n The lungs are clear.\n \n IMPRESSION: \n \n No acute process.\n"
    )
    found = data.sections(report(text))
    assert found["findings"].strip() == "The lungs are clear."
    assert found["impression"].strip() == "No acute process." and "last_paragraph" not in found


def test_mimic_report_with_neither_section_gives_its_last_paragraph():
    text = (
        " CHEST RADIOGRAPH\n \n COMPARISON:  ___.\n \n"
        " As compared to the previous radiograph, the tube was removed.\n"
    )
    found = data.sections(report(text))
    last = found.pop("last_paragraph").strip()
    assert last == "As compared to the previous radiograph, the tube was removed."
    assert not {"findings", "impression"} & found.keys()


def test_mimic_report_with_one_section_for_both_gives_the_impression():
    found = data.sections(report(" HISTORY:  Dyspnea.\n \n FINDINGS AND IMPRESSION:  Mild edema.\n"))
    assert found["impression"].strip() == "Mild edema."
    assert not {"findings", "last_paragraph"} & found.keys()


def test_mimic_report_without_any_title_is_its_last_paragraph():
    found = data.sections("One line.\n \n Another line.\n")
    assert found["last_paragraph"].strip() == "Another line." and "preamble" not in found


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("IMPRESSION", "impression"),
        ("IMPRESSON", "impression"),
        ("CONCLUSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("FINDINGS", "findings"),
        ("FINDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PORTABLE", "findings"),
        ("PA AND LATERAL", "findings"),
        ("COMPARISON", "comparison"),
        ("REASON FOR EXAM", "reason for exam"),
    ],
)
def test_mimic_titles_are_known_under_their_variants(title, name):
    assert data.section_name(title) == name


def test_mimic_last_section_of_a_name_counts():
    assert data.sections(report(" FINDINGS: One.\n FINDINGS: Two.\n"))["findings"].strip() == "Two."


def test_mimic_empty_section_does_not_hide_a_full_one_of_its_name():
    found = data.sections(report(" FINDINGS: One.\n CHEST, PA AND LATERAL:\n \n IMPRESSION: Two.\n"))
    assert found["findings"].strip() == "One."


def test_mimic_title_ends_at_its_line():
    found = data.sections(report(" FINDINGS: One NOTE: two.\n COMPARISON: None.\n"))
    assert found["findings"].strip() == "One NOTE: two." and "note" not in found


def test_mimic_report_with_other_line_ends_is_the_same():
    assert data.sections(report(REPORTS[50000001]).replace("\n", "\r\n")) == data.sections(
        report(REPORTS[50000001])
    )


def studies_of(spec):
    return {r.id.split("/")[3]: r for r in everything(spec)}


def test_mimic_text_is_the_impression_then_the_findings(specs):
    text = f"No acute process. The lungs are clear, {MARKER}."
    assert studies_of(specs["mimic-cxr"])["s50000001"].report == text


def test_mimic_study_with_empty_sections_has_no_report(specs):
    assert studies_of(specs["mimic-cxr"])["s50000002"].report is None


def test_mimic_text_may_be_the_last_paragraph_without_its_marks(specs):
    text = f"Compared to, the {MARKER} was removed."
    assert studies_of(specs["mimic-cxr"])["s50000003"].report == text


def test_mimic_text_may_be_the_section_for_both(specs):
    assert studies_of(specs["mimic-cxr"])["s50000004"].report == f"Mild {MARKER}."


def test_mimic_study_without_a_row_of_labels_has_none(specs):
    r = studies_of(specs["mimic-cxr"])["s50000003"]
    assert not r.findings | r.absent | r.uncertain | r.blank


def test_mimic_image_has_the_labels_of_its_study(specs):
    r = studies_of(specs["mimic-cxr"])["s50000002"]
    assert (r.findings, r.absent, r.uncertain) == ({"Edema"}, {"Fracture"}, {"Pneumonia"})


def test_mimic_views_are_frontal_lateral_or_unknown(specs):
    views = [r.view for r in everything(specs["mimic-cxr"])]
    assert views == ["PA", "LATERAL", "UNKNOWN", "AP", "LATERAL"]


def test_mimic_id_is_the_official_path(specs):
    assert everything(specs["mimic-cxr"])[-1].id == "files/p11/p11000003/s50000004/e.jpg"


@pytest.mark.parametrize(
    ("images", "reports"),
    [("", ""), ("", "mimic-cxr-reports.zip"), ("jpg", "mimic-cxr-reports.zip"), ("jpg/2.0.0", "txt/2.0.0")],
)
def test_mimic_is_found_in_one_folder_or_two_with_reports_as_files_or_zip(specs, images, reports, tmp_path):
    spec = f"mimic-cxr={mimic(tmp_path, images, reports)}"
    assert contents(spec)[1] == contents(specs["mimic-cxr"])[1]
    assert all(r.image.is_file() for r in everything(spec))


def test_mimic_images_may_have_been_converted(tmp_path):
    records = everything(f"mimic-cxr={mimic(tmp_path, ending='.png')}")
    assert {r.image.suffix for r in records} == {".png"} and all(r.image.is_file() for r in records)


def test_mimic_id_of_a_converted_image_is_the_official_one(specs, tmp_path):
    spec = f"mimic-cxr={mimic(tmp_path, ending='.png')}"
    assert [r.id for r in everything(spec)] == [r.id for r in everything(specs["mimic-cxr"])]


def test_mimic_without_reports_is_images_and_labels(tmp_path):
    shutil.rmtree(mimic(tmp_path) / "mimic-cxr")
    assert {r.report for r in everything(f"mimic-cxr={tmp_path}")} == {None}


def test_mimic_archive_of_reports_that_is_cut_short_is_named(tmp_path):
    archive = mimic(tmp_path, reports="mimic-cxr-reports.zip") / "mimic-cxr-reports.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    assert f"{archive} is cut short or damaged" in refused(f"mimic-cxr={tmp_path}")


def test_mimic_archive_with_a_damaged_report_is_named(tmp_path):
    archive = mimic(tmp_path, reports="mimic-cxr-reports.zip") / "mimic-cxr-reports.zip"
    content = bytearray(archive.read_bytes())
    content[90:100] = bytes(10)  # in the first report, behind its local header
    archive.write_bytes(content)
    assert f"{archive} is cut short or damaged" in refused(f"mimic-cxr={tmp_path}")


# ----------------------------------------------------------------------------------------------------- rsna


def test_rsna_rows_of_an_image_are_one_record(specs):
    assert sorted(r.id for r in everything(specs["rsna"])) == [f"{n:02}" for n in range(20)]


def test_rsna_boxes_are_folded_in_fractions_of_the_image(specs):
    assert by_id(specs["rsna"])["01"].boxes == ((0.25, 0.125, 0.75, 0.375), (0.0, 0.125, 0.5, 0.375))


def test_rsna_target_is_pneumonia_present_or_absent(specs):
    found = by_id(specs["rsna"])
    assert all(found[f"{n:02}"].findings == {"Pneumonia"} for n in range(6))
    assert all(found[f"{n:02}"].absent == {"Pneumonia"} for n in range(6, 20))


def test_rsna_image_without_pneumonia_is_normal_only_where_the_details_say_so(specs):
    healthy = [id for id, r in by_id(specs["rsna"]).items() if r.findings == {"No Finding"}]
    assert sorted(healthy) == ["06", "07", "08", "09"]


def test_rsna_without_the_details_has_no_normal_image(tmp_path):
    (rsna(tmp_path) / "stage_2_detailed_class_info.csv").unlink()
    findings = Counter(r.findings for r in everything(f"rsna={tmp_path}"))
    assert findings == {frozenset({"Pneumonia"}): 6, frozenset(): 14}


@pytest.mark.parametrize("order", ["as published", "reversed"])
def test_rsna_split_does_not_depend_on_the_order_of_the_rows(specs, order, tmp_path):
    table = rsna(tmp_path) / "stage_2_train_labels.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *(rows[::-1] if order == "reversed" else rows)]) + "\n")
    assert [r.id for r in everything(f"rsna={tmp_path}")] == [r.id for r in everything(specs["rsna"])]


@pytest.mark.parametrize(
    "change", [("256.0,128.0", "wide,128.0"), (",1\n", ",2\n"), ("256.0,128.0", ",128.0")],
    ids=["no number", "no target", "no edge"],
)  # fmt: skip
def test_rsna_row_that_is_no_label_is_named(change, tmp_path):
    table = rsna(tmp_path) / "stage_2_train_labels.csv"
    table.write_text(table.read_text().replace(*change, 1))
    assert f"{table}, row 2, is no label of RSNA" in refused(f"rsna={tmp_path}")


# ---------------------------------------------------------------------------------------------------- openi


def test_openi_text_is_the_impression_then_the_findings(specs):
    assert by_id(specs["openi"])["CXR6_IM-00-01"].report == f"Normal chest, {MARKER}. Lungs are clear."


def test_openi_self_closing_sections_are_no_report(specs):
    assert by_id(specs["openi"])["CXR2_IM-00-01"].report is None


def test_openi_report_without_image_gives_no_record(specs):
    assert {r.patient for r in everything(specs["openi"])} == {str(n) for n in range(1, 13)} - {"3"}


def test_openi_image_ids_are_opaque(specs):
    found = by_id(specs["openi"])
    for id in ("CXR1_1_IM-0001-3001", "CXR5_IM-2117-1003002"):
        assert found[id].image.name == f"{id}.png" and found[id].image.is_file()


def test_openi_findings_are_the_headings_that_others_share(specs):
    r = by_id(specs["openi"])["CXR4_IM-00-01"]
    assert r.findings == {"Lung Opacity", "Support Devices"} and "Edema" in r.blank


def test_openi_report_that_was_not_indexed_has_no_state():
    assert data.mesh_states(["No Indexing"]) == {"findings": frozenset(), "blank": frozenset()}


def test_openi_heading_is_what_stands_before_the_first_slash():
    assert data.mesh_states(["Opacity /lung", "Lung/opacity"])["findings"] == {"Lung Opacity"}


def test_openi_from_the_archive_is_openi_from_the_folder(specs, tmp_path):
    shutil.make_archive(tmp_path / "NLMCXR_reports", "gztar", openi(tmp_path), "ecgen-radiology")
    shutil.rmtree(tmp_path / "ecgen-radiology")
    (tmp_path / "NLMCXR_reports.tar.gz").rename(tmp_path / "NLMCXR_reports.tgz")
    assert contents(f"openi={tmp_path}")[1] == contents(specs["openi"])[1]


def test_openi_archive_that_is_cut_short_is_named(tmp_path):
    shutil.make_archive(tmp_path / "NLMCXR_reports", "gztar", openi(tmp_path), "ecgen-radiology")
    shutil.rmtree(tmp_path / "ecgen-radiology")
    whole = (tmp_path / "NLMCXR_reports.tar.gz").read_bytes()
    for length in range(0, len(whole), 100):
        (tmp_path / "NLMCXR_reports.tgz").write_bytes(whole[:length])
        assert "NLMCXR_reports.tgz is cut short" in refused(f"openi={tmp_path}")


def test_openi_xml_that_is_none_is_named(tmp_path):
    file = openi(tmp_path) / "ecgen-radiology" / "7.xml"
    file.write_text(file.read_text()[:-20])
    assert "7.xml of Open-I is no XML" in refused(f"openi={tmp_path}")


@pytest.mark.parametrize("what", ["report", "findings", "patient"])
def test_openi_from_the_tables_is_openi_from_the_xml(specs, what, tmp_path):
    spec = build("openi-kaggle", tmp_path)
    both = ([(r.patient, getattr(r, what)) for r in everything(each)] for each in (spec, specs["openi"]))
    one, other = map(sorted, both) if what == "patient" else map(dict, both)
    assert one == other


def test_openi_tables_say_the_view(tmp_path):
    assert {r.view for r in everything(build("openi-kaggle", tmp_path))} == {"FRONTAL"}


# ---------------------------------------------------------------------------------------- covid-radiography


def test_covid_radiography_has_four_classes(specs):
    counts = Counter(tuple(r.findings) for r in everything(specs["covid-radiography"]))
    assert counts == {("COVID-19",): 3, ("Lung Opacity",): 3, ("No Finding",): 3, ("Viral Pneumonia",): 3}


def test_covid_radiography_rules_out_covid_and_nothing_else(specs):
    for r in everything(specs["covid-radiography"]):
        assert r.absent == (set() if r.findings == {"COVID-19"} else {"COVID-19"})


def test_covid_radiography_leaves_the_masks_out(specs):
    assert {r.image.parent.name for r in everything(specs["covid-radiography"])} == {"images"}


@pytest.mark.parametrize(
    "names",
    [
        ("Covid", "lung_opacity", "NORMAL", "Viral Pneumonia"),
        ("COVID-19", "Lung Opacity", "normal", "Viral_Pneumonia"),
        ("covid", "LUNG_OPACITY", "Normal", "viral pneumonia"),
    ],
)
def test_covid_radiography_folders_may_differ_in_case_and_blanks(names, tmp_path):
    found = everything(f"covid-radiography={covid_radiography(tmp_path, names)}")
    assert Counter(r.findings for r in found) == {
        frozenset({finding}): 3 for finding in data.COVID_CLASSES.values()
    }


def test_covid_radiography_of_an_older_release_has_no_folder_of_images(tmp_path):
    assert len(everything(f"covid-radiography={covid_radiography(tmp_path, images='')}")) == 12


def test_covid_radiography_goes_by_number(tmp_path):
    root = covid_radiography(tmp_path)
    draw(root / "COVID-19_Radiography_Dataset" / "COVID" / "images" / "COVID-10.png")
    ids = [r.id for r in data.covid_folders(root) if r.id.startswith("COVID")]
    assert ids == ["COVID-1", "COVID-2", "COVID-3", "COVID-10"]


def test_covid_radiography_without_one_of_its_folders_is_refused(tmp_path):
    shutil.rmtree(covid_radiography(tmp_path) / "COVID-19_Radiography_Dataset" / "Normal")
    assert "no folder 'Normal'" in refused(f"covid-radiography={tmp_path}")


# ------------------------------------------------------------------------------------------ nih-chestxray14


def test_nih_names_are_those_of_the_other_data_sets(specs):
    found = set().union(*(r.findings | r.absent for r in everything(specs["nih-chestxray14"])))
    shared = {"No Finding", "Cardiomegaly", "Pleural Effusion", "Edema"}
    assert found == shared | {"Pleural Thickening", "Mass"}


def test_nih_string_of_several_labels_is_several_findings(specs):
    r = by_id(specs["nih-chestxray14"])["00000001_000.png"]
    assert r.findings == {"Cardiomegaly", "Pleural Effusion"}


# ------------------------------------------------------------------------------------------------------ csv


def table_of(tmp_path, *rows):
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return f"csv={tmp_path / 'table.csv'}"


def test_csv_gives_all_that_its_columns_say(specs):
    r = by_id(specs["csv"])["pictures/3.png"]
    said = (r.report, r.patient, r.view, r.findings, r.uncertain)
    assert said == (f"Film 3 shows a {MARKER}.", "1", "PA", {"Edema"}, {"Hernia"})


def test_csv_needs_no_column_but_image(tmp_path):
    records = everything(table_of(tmp_path, "image", *(f"{n}.png" for n in range(10))))
    empty = (None, frozenset(), "")
    assert len(records) == 10 and {(r.report, r.findings, r.view) for r in records} == {empty}


def test_csv_images_are_relative_to_their_table(tmp_path):
    records = everything(table_of(tmp_path, "image,split", "a/b.png,train", "/elsewhere/c.png,train"))
    assert [r.image for r in records] == [tmp_path / "a" / "b.png", Path("/elsewhere/c.png")]


def test_csv_without_patients_has_one_an_image(tmp_path):
    records = everything(table_of(tmp_path, "image,patient", "a.png,", "b.png,7"))
    assert sorted(r.patient for r in records) == ["7", "a.png"]


def test_csv_without_splits_is_split_by_patient(tmp_path):
    spec = table_of(tmp_path, "image,patient", *(f"{n}.png,{n % 20}" for n in range(60)))
    owners = [{r.patient for r in data.read_records([spec], split)[spec]} for split in data.SPLITS]
    assert [len(patients) for patients in owners] == [14, 2, 4]


@pytest.mark.parametrize("name", ["valid", "validate", "validation", "val", "dev", "Valid"])
def test_csv_knows_the_names_of_the_validation_split(name, tmp_path):
    spec = table_of(tmp_path, "image,split", f"a.png,{name}")
    assert len(data.read_records([spec], "valid")[spec]) == 1


@pytest.mark.parametrize("text", ["", " ", "...", "___", "1. 2.", "XXXX."])
def test_csv_report_without_a_word_is_none(text, tmp_path):
    assert everything(table_of(tmp_path, "image,report", f"a.png,{text}"))[0].report is None


def test_csv_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "table.csv").write_text("image,Edema\na.png,1\n", encoding="utf-8-sig")
    assert [r.id for r in everything(f"csv={tmp_path / 'table.csv'}")] == ["a.png"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            ["image,split", "a.png,train", "b.png,exam"],
            "row 3: the split 'exam' is none of train, valid, test",
        ),
        (["image,split", "a.png,"], "row 2: the split '' is none of train, valid, test"),
        (["image,view", "a.png,oblique"], "row 2: the view 'oblique' is none of PA, AP, FRONTAL"),
        (["image,report", ",Text."], "row 2, names no image"),
    ],
    ids=["split", "no split", "view", "no image"],
)
def test_csv_row_that_cannot_be_used_is_named(rows, sentence, tmp_path, capsys):
    assert summary(table_of(tmp_path, *rows)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.py: ") and sentence in line


@pytest.mark.parametrize(
    ("rows", "patient"),
    [
        (["image,patient,split", "a.png,7,train", "b.png,7,test"], "7"),
        (["image,split", "a.png,train", "a.png,test"], "a.png"),
    ],
    ids=["patient", "image"],
)
def test_csv_patient_in_two_splits_fails_the_summary_and_is_refused_elsewhere(
    rows, patient, tmp_path, capsys
):
    spec, sentence = (
        table_of(tmp_path, *rows),
        f"patient {patient} of csv is in the splits 'train' and 'test'",
    )
    assert summary(spec) == 1 and sentence in capsys.readouterr().out
    assert data.main(["pack", "--data", spec, "--out", str(tmp_path / "pack")]) == 2
    assert sentence in capsys.readouterr().err


def test_csv_report_in_a_column_of_another_name_is_not_repeated_in_the_error(tmp_path):
    sentence = refused(table_of(tmp_path, "image,text", f"a.png,The {MARKER} is large."))
    assert "row 2: column 'text'" in sentence and MARKER not in sentence


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("1. No edema.\n2. Clear.", "No edema. Clear."),
        ("Seen on ___ at ___:  stable .", "Seen on at: stable."),
        ("Normal chest x-XXXX.", "Normal chest."),
        ("A 3.5 cm mass, 2 nodules.", "A 3.5 cm mass, 2 nodules."),
        ("___ M with cough (XXXX)", "M with cough"),
        ("two\n \n lines", "two lines"),
    ],
)
def test_a_report_is_cleaned_to_its_words(text, cleaned):
    assert data.clean(text) == cleaned


# ----------------------------------------------------------------------------------------------- image files

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
KINDS = {
    "L": Image.fromarray(GREY),
    "RGB": Image.fromarray(GREY).convert("RGB"),
    "RGBA": Image.fromarray(GREY).convert("RGBA"),
    "16": Image.fromarray(GREY.astype(np.uint16) * 257),
}


def test_pngs_of_every_kind_are_the_same_image_to_a_reader(tmp_path):
    for kind, image in KINDS.items():
        image.save(tmp_path / f"{kind}.png")
    records = everything(table_of(tmp_path, "image", *(f"{kind}.png" for kind in KINDS)))
    assert len(records) == 4 and all(np.array_equal(data.read_image(r.image), GREY) for r in records)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.7])
def test_a_jpeg_that_is_cut_short_is_named(kept, tmp_path):
    Image.fromarray(GREY).resize((64, 64)).save(tmp_path / "image.jpg")
    whole = (tmp_path / "image.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: kept if kept >= 1 else int(kept * len(whole))])
    with pytest.raises(BadInput, match="cut.jpg cannot be read .*--skip-bad-images"):
        data.read_image(tmp_path / "cut.jpg")


# -------------------------------------------------------------------------------------------------- dicom


def save_dicom(path, pixels, photometric="MONOCHROME2", jpeg=False, **tags):
    """A DICOM file of (H, W) uint8 or uint16 pixels."""
    pydicom = pytest.importorskip("pydicom", minversion="3", reason="pydicom is not installed")
    from pydicom.encaps import encapsulate
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit

    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["invented"])
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, photometric, 0
    file.BitsAllocated = file.BitsStored = 8 * pixels.itemsize
    file.HighBit = file.BitsStored - 1
    for name, value in tags.items():
        setattr(file, name, value)
    if jpeg:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=95)
        file.PixelData = encapsulate([content.getvalue()])
        file["PixelData"].VR = "OB"
    else:
        file.PixelData = pixels.tobytes()
        file["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_read_to_its_grey_values(tmp_path):
    assert np.array_equal(data.read_image(save_dicom(tmp_path / "a.dcm", GREY)), GREY)


def test_dicom_monochrome1_is_read_with_bone_bright(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", 255 - GREY, "MONOCHROME1")
    assert np.array_equal(data.read_image(path), GREY)


def test_dicom_of_12_bits_is_scaled_to_8(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint16) * 16, BitsStored=12, HighBit=11)
    assert np.array_equal(data.read_image(path), GREY)


def test_dicom_compressed_as_jpeg_is_read(tmp_path):
    shades = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(64, 0)  # smooth, as JPEG wants it
    found = np.asarray(data.read_image(save_dicom(tmp_path / "a.dcm", shades, jpeg=True)), int)
    assert np.abs(found - shades).max() < 6  # JPEG loses some grey levels


def test_dicom_window_is_applied(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", GREY, WindowCenter=128, WindowWidth=64)
    found = np.asarray(data.read_image(path)).reshape(-1)
    assert (found[:95] == 0).all() and (found[161:] == 255).all() and 0 < found[128] < 255


def test_dicom_that_is_cut_short_is_named(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", GREY)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="a.dcm cannot be read"):
        data.read_image(path)


def test_dicom_images_are_found_and_read_by_the_reader(tmp_path):
    for n in range(20):
        save_dicom(tmp_path / "stage_2_train_images" / f"{n:02}.dcm", GREY)
    shutil.copytree(rsna(tmp_path / "made"), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "made")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    records = everything(f"rsna={tmp_path}")
    assert {r.image.suffix for r in records} == {".dcm"} and len(records) == 20
    assert np.array_equal(data.read_image(records[0].image), GREY)


def test_a_converted_image_goes_before_its_dicom(tmp_path):
    rsna(tmp_path)
    for path in [*tmp_path.rglob("*.png")]:
        path.with_suffix(".dcm").touch()
    assert {r.image.suffix for r in everything(f"rsna={tmp_path}")} == {".png"}


def test_without_pydicom_a_dicom_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadInput, match="a.dcm is a DICOM file: `pip install 'pydicom>=3'`"):
        data.read_image(tmp_path / "a.dcm")


# -------------------------------------------------------------------------------------------------- summary


def test_the_summary_counts_what_is_there(specs, capsys):
    summary(specs["chexpert"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "7", "3", "0", "4"] in lines  # images, patients, reports, labelled
    assert ["valid", "1", "1", "0", "1"] in lines and ["test", "2", "1", "0", "2"] in lines
    assert ["views:", "AP", "3,", "LATERAL", "3,", "FRONTAL", "3,", "PA", "1"] in lines
    assert ["Edema", "6", "0", "1", "3"] in lines  # 1, 0, -1, blank
    assert ["Fracture", "0", "4", "0", "6"] in lines


def test_the_summary_counts_words_and_repeated_reports(specs, capsys):
    summary(specs["mimic-cxr"])
    printed = capsys.readouterr().out
    assert "words of a report: mean 6.0, median 7, 95 % up to 8, longest 8" in printed
    assert "more than once, word for word: 2 of 4" in printed  # two images of one study


def test_the_summary_names_each_data_set(specs, capsys):
    data.main(["summary", "--data", specs["rsna"], specs["openi"], "--batch-size", "4"])
    printed = capsys.readouterr().out.splitlines()
    assert specs["rsna"] in printed and specs["openi"] in printed


def test_one_unsound_set_among_others_fails_the_summary(specs, tmp_path):
    spec = build("csv", tmp_path)
    everything(spec)[0].image.unlink()
    assert data.main(["summary", "--data", spec, specs["rsna"]]) == 1


SETS = [
    {"Edema"}, {"Edema"}, {"Edema", "Mass"}, {"Edema", "Mass"}, {"Mass"}, {"No Finding"}, {"No Finding"},
    {"No Finding", "Support Devices"}, {"Support Devices"}, {"Support Devices"}, set(), set(),
]  # fmt: skip


def labelled(findings, absent=()):
    return Record(Path("a"), None, frozenset(findings), "1", "test", frozenset(absent))


SAMPLE = [
    labelled(findings, {"Hernia", *({"Mass"} - findings)} if n % 2 else ()) for n, findings in enumerate(SETS)
]


def slow_pairs(records, batch_size):
    """The double loop over all pairs that a batch may hold, and all findings that a prompt may name."""
    same = ill = fits = 0
    findings = sorted(set().union(*(r.findings for r in records)))
    for one in records:
        for other in records:
            if one.findings and one.findings == other.findings:
                same += 1
                ill += bool(one.findings - {"No Finding", "Support Devices"})
            for drawn in one.findings if other.findings else ():
                absent = data.label_matrices([other], findings)[1][0, findings.index(drawn)]
                fits += (not absent) / len(one.findings)
    pairs = batch_size * (batch_size - 1) / len(records) ** 2
    return pairs / 2 * same, pairs / 2 * ill, pairs * fits


@pytest.mark.parametrize("batch_size", [2, 7, 100])
def test_expected_pairs_equal_the_double_loop(batch_size):
    assert data.expected_pairs(SAMPLE, batch_size) == pytest.approx(slow_pairs(SAMPLE, batch_size), rel=1e-5)


def test_the_mask_of_a_batch_removes_as_many_pairs_as_expected():
    findings = data.vocabulary(SAMPLE)
    present, absent = data.label_matrices(SAMPLE, findings)
    ill = present & present[:, [name not in data.NO_DISEASE for name in findings]].any(1, keepdim=True)
    rng, removed = np.random.RandomState(0), []
    for _ in range(2000):
        rows = rng.randint(len(SAMPLE), size=6)
        mask = umcl.label_mask(ill[rows], ill[rows], "equal")
        removed.append((int(mask.sum()) - int(mask.diagonal().sum())) / 2)
    error = np.std(removed) / len(removed) ** 0.5
    assert abs(np.mean(removed) - data.expected_pairs(SAMPLE, 6)[1]) < 4 * error


# --------------------------------------------------------------------------------------------- real tables


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared copy of {name} is not here")
    return path


@pytest.fixture(scope="module")
def real_openi(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    (root / "NLMCXR_reports.tgz").symlink_to(real("NLMCXR_reports.tgz").resolve())
    return data.openi_reports(root)


def test_real_openi_has_its_reports_and_sections(real_openi):
    has = Counter((bool(report["findings"]), bool(report["impression"])) for report in real_openi)
    assert has == {(True, True): 3419, (True, False): 6, (False, True): 502, (False, False): 28}


def test_real_openi_has_its_images(real_openi):
    numbers = Counter(len(report["images"]) for report in real_openi)
    assert numbers == {0: 104, 1: 446, 2: 3208, 3: 181, 4: 15, 5: 1}


def test_real_openi_headings_are_counted_as_findings(real_openi):
    found = [data.mesh_states(report["headings"])["findings"] for report in real_openi]
    assert sum(states == {"No Finding"} for states in found) == 1391
    assert sum("Cardiomegaly" in states for states in found) == 375
