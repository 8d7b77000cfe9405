"""Readers: the same questions to all, on small folders laid out as their sources do; then each alone."""

import csv
import io
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import MARKER, READERS, build, contents, everything, real, refused, table_of, tables
from PIL import Image, ImageOps

import data
import train
from data import BadInput

LISTED = ["chexpert", "mimic-cxr", "rsna", "nih-chestxray14", "covid-chestxray", "csv"]
WITHOUT_REPORTS = (
    "chexpert", "rsna", "covid-radiography", "nih-chestxray14", "folder", "folder of classes",
)  # fmt: skip


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """{layout: spec} of folders into which nobody writes."""
    return {name: build(name, tmp_path_factory.mktemp(name)) for name in READERS}


def turn(path):
    """Writes the columns of a table in the opposite order."""
    rows = [row[::-1] for row in csv.reader(path.read_text().splitlines())]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def summary(spec):
    return data.main(["summary", "--data", str(spec), "--workers", "0"])


def by_id(spec):
    return {r.id: r for r in everything(spec)}


# ----------------------------------------------------------------------------------------- all readers: sound


@pytest.mark.parametrize("name", READERS)
def test_each_split_has_its_images(specs, name):
    counts = tuple(len(data.read_records([specs[name]], split)[specs[name]]) for split in data.SPLITS)
    assert counts == READERS[name][2]


@pytest.mark.parametrize("name", READERS)
def test_every_record_is_sound(specs, name):
    for r in everything(specs[name]):
        assert r.id and not Path(r.id).is_absolute()  # the same wherever the folder lies
        assert r.source == READERS[name][0] and r.view in {*data.VIEWS, ""}
        assert {*r.labels.values()} <= {*data.STATES} and all(isinstance(name, str) for name in r.labels)
        assert data.read_image(r.image).size == ((8, 8) if name == "pack" else (6, 5))


@pytest.mark.parametrize("name", READERS)
def test_no_two_images_have_one_id_and_no_two_splits_one_patient(specs, name):
    ids = [r.id for r in everything(specs[name])]
    owners = [{r.patient for r in data.read_records([specs[name]], s)[specs[name]]} for s in data.SPLITS]
    assert len(set(ids)) == len(ids) and sum(map(len, owners)) == len(set().union(*owners)) > 1


@pytest.mark.parametrize("name", READERS)
def test_reports_are_read_where_there_are_any_without_redaction_marks(specs, name):
    reports = [r.report for r in everything(specs[name]) if r.report]
    assert bool(reports) == (name not in WITHOUT_REPORTS)
    assert all(MARKER in text and "XXXX" not in text and "___" not in text for text in reports)


@pytest.mark.parametrize("name", READERS)
def test_a_sound_set_passes_its_summary_which_shows_no_word_of_a_report(specs, name, capsys):
    assert summary(specs[name]) == 0
    assert MARKER not in "".join(capsys.readouterr())


BLANK = dict.fromkeys(data.CHEXPERT)
FOUR = BLANK | {"Edema": 1, "Fracture": 0, "Pneumonia": -1}
SAID = [  # layout, id, what the record says
    ("chexpert", "train/patient00001/study1/view1_frontal.jpg",
     {"patient": "patient00001", "view": "AP", "labels": BLANK | {"No Finding": 1, "Support Devices": 1}}),
    ("chexpert", "train/patient00001/study2/view1_frontal.jpg",
     {"patient": "patient00001", "view": "PA", "labels": FOUR}),
    ("chexpert", "train/patient00001/study2/view3_lateral.jpg",
     {"patient": "patient00001", "view": "LATERAL", "labels": FOUR}),
    ("chexpert", "train/patient00003/study1/view1_frontal.jpg",  # LL in the table
     {"view": "FRONTAL", "labels": BLANK}),
    ("chexpert", "test/patient64741/study1/view1_frontal.jpg", {"view": "FRONTAL"}),
    ("mimic-cxr", "files/p10/p10000001/s50000001/b.jpg",  # impression before findings
     {"report": f"No acute process. The lungs are clear, {MARKER}.", "view": "LATERAL"}),
    ("mimic-cxr", "files/p10/p10000001/s50000002/c.jpg",  # empty sections
     {"report": None, "view": "UNKNOWN", "labels": FOUR}),
    ("mimic-cxr", "files/p10/p10000002/s50000003/d.jpg",  # the last paragraph; a study without labels
     {"report": f"Compared to, the {MARKER} was removed.", "view": "AP", "labels": {}}),
    ("mimic-cxr", "files/p11/p11000003/s50000004/e.jpg",  # one section for both; LL in the table
     {"report": f"Mild {MARKER}.", "view": "LATERAL"}),
    ("rsna", "01", {"labels": {"Pneumonia": 1}}),  # two boxes
    ("rsna", "06", {"labels": {"No Finding": 1, "Pneumonia": 0}}),
    ("rsna", "10", {"labels": {"Pneumonia": 0}}),
    ("openi", "CXR6_IM-00-01", {"report": f"Normal chest, {MARKER}. Lungs are clear.", "view": ""}),
    ("openi", "CXR2_IM-00-01", {"report": None}),  # empty sections
    ("openi", "CXR4_IM-00-01",
     {"labels": dict.fromkeys(data.MESH) | {"Lung Opacity": 1, "Support Devices": 1}}),
    ("nih-chestxray14", "00000001_000.png",
     {"labels": {"Cardiomegaly": 1, "Pleural Effusion": 1,
                 "No Finding": 0, "Edema": 0, "Mass": 0, "Pleural Thickening": 0}}),
    ("covid-chestxray", "images/3.png",
     {"report": f"Case 3, {MARKER}.", "patient": "3", "labels": {"COVID-19": 1}}),
    ("medpix2", "MPX1_1",
     {"labels": dict.fromkeys(data.MEDPIX_PLACES, 0) | {"Head": 1}, "patient": "MPX1"}),
    ("csv", "pictures/3.png",
     {"report": f"Film 3 shows a {MARKER}.", "patient": "1", "view": "PA",
      "labels": {"Edema": 1, "Hernia": -1}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "id", "said"), SAID)
def test_a_record_says_what_its_source_does(specs, name, id, said):
    r = by_id(specs[name])[id]
    assert {field: getattr(r, field) for field in said} == said


@pytest.mark.parametrize("name", LISTED)
def test_columns_are_found_by_name_not_by_place(name, tmp_path):
    spec = build(name, tmp_path)
    before = contents(spec)
    for path in tables(tmp_path):
        turn(path)
    assert contents(spec) == before


@pytest.mark.parametrize("ending", [".gz", ".zip"])
@pytest.mark.parametrize("name", LISTED)
def test_a_compressed_table_gives_the_same_records(name, ending, tmp_path):
    spec = build(name, tmp_path)
    before = contents(spec)
    assert contents(layouts.compress(spec, tmp_path, ending)) == before


@pytest.mark.parametrize(
    ("name", "above", "below"),
    [("chexpert", "folder", "folder/CheXpert-v1.0-small"), ("rsna", "", "folder"),
     ("covid-radiography", "folder", "folder/COVID-19_Radiography_Dataset")],
)  # fmt: skip
def test_the_folder_above_gives_the_same_records(name, above, below, tmp_path):
    build(name, tmp_path / "folder")
    assert contents(f"{name}={tmp_path / above}") == contents(f"{name}={tmp_path / below}")


# ------------------------------------------------------------------------------------- all readers: bad input


@pytest.mark.parametrize("name", LISTED)
def test_a_missing_image_fails_the_summary(name, tmp_path, capsys):
    spec = build(name, tmp_path)
    everything(spec)[0].image.unlink()
    assert summary(spec) == 1 and "missing files: 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", LISTED)
def test_a_table_whose_ids_match_no_file_shows_one_path_expected_and_one_found(name, tmp_path):
    spec = build(name, tmp_path)
    for r in everything(spec):
        r.image.rename(r.image.with_name(f"renamed{r.image.suffix}"))
    expected = everything(spec)[0].image
    with pytest.raises(BadInput, match=f"{expected} is not there, and what .* holds is .*/renamed"):
        data.check_images(everything(spec), 8)
    for path in list(data.image_files(tmp_path)):
        path.unlink()
    with pytest.raises(BadInput, match="holds is no image"):
        data.check_images(everything(spec), 8)


@pytest.mark.parametrize("name", sorted({reader for reader, *_ in READERS.values()}))
def test_an_empty_folder_is_refused(name, tmp_path, capsys):
    assert summary(f"{name}={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.py: ") and str(tmp_path) in line


NEEDED = [  # layout, table, column
    ("chexpert", "train.csv", "Edema"),
    ("chexpert", "valid.csv", "Path"),
    ("mimic-cxr", "mimic-cxr-2.0.0-metadata.csv", "ViewPosition"),
    ("mimic-cxr", "mimic-cxr-2.0.0-split.csv", "split"),
    ("mimic-cxr", "mimic-cxr-2.0.0-chexpert.csv", "Edema"),
    ("rsna", "stage_2_train_labels.csv", "Target"),
    ("rsna", "stage_2_detailed_class_info.csv", "class"),
    ("csv", "table.csv", "image"),
]


@pytest.mark.parametrize(("name", "table", "column"), NEEDED)
def test_a_missing_column_is_named_beside_those_there_and_a_missing_table_is_named(
    name, table, column, tmp_path
):
    spec = build(name, tmp_path)
    path = next(tmp_path.rglob(table))
    header, _, rows = path.read_text().partition("\n")
    path.write_text(f"{header.replace(column, 'something')}\n{rows}")
    assert f"{table} has no column {column!r}; it has " in refused(spec)
    path.unlink()
    if table != "stage_2_detailed_class_info.csv":  # which may be absent
        assert table in refused(spec) and "is not there" in refused(spec)


@pytest.mark.parametrize("name", ["chexpert", "mimic-cxr", "csv"])
def test_an_image_that_stands_twice_is_refused(name, tmp_path):
    spec = build(name, tmp_path)
    (path, *_) = [path for path in tables(tmp_path) if "chexpert.csv" not in path.name]
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert "2 times; keep one" in refused(spec)


def cut(part):
    return lambda whole: whole[: int(part * len(whole))]


def swap(old, new):
    return lambda whole: whole.replace(old, new, 1)


DAMAGES = {  # what happens: (layout, file, what becomes of its bytes, what the one sentence says)
    "a NUL": ("csv", "table.csv", swap(b"/3.png", b"/3\0.png"), ", line 5, holds a NUL character"),
    "a long name": ("csv", "table.csv", swap(b"/3", b"x" * 300), "row 5: the image's name is longer than"),
    "not UTF-8": ("csv", "table.csv", lambda whole: whole + b"5.png,\xe4", ", line 12, is not UTF-8 text"),
    "UTF-16": ("csv", "table.csv", lambda whole: whole.decode().encode("utf-16"), "not UTF-8 text"),
    "too few cells": ("csv", "table.csv", lambda whole: whole + b"cut", "row 12, has not as many cells"),
    "too many cells": ("csv", "table.csv", lambda whole: whole + b"x," * 9, "row 12, has not as many cells"),
    "one name twice": ("csv", "table.csv", swap(b"Hernia", b"Edema"), "has the column 'Edema' 2 times"),
    "cell too long": ("csv", "table.csv", lambda whole: whole + b"x" * 200_000,
        ", after row 11, has a cell of over 131,072 characters; shorten it, or close its quotation mark"),
    "gzip cut short": ("csv.gz", "table.csv.gz", cut(0.7), "cut short or damaged"),
    "gzip without its end": ("csv.gz", "table.csv.gz", lambda whole: whole[:-9], "cut short or damaged"),
    "no gzip": ("csv.gz", "table.csv.gz", lambda whole: b"image\n", "cut short or damaged"),
    "zip cut short": ("csv.zip", "table.csv.zip", cut(0.7), "cut short or damaged"),
    "zip encrypted": ("csv.zip", "table.csv.zip", lambda z: z[:6] + b"\1" + z[7:].replace(
        b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"), "cut short or damaged"),
    "zip of nothing": ("csv.zip", "table.csv.zip", lambda _: b"PK\5\6" + bytes(18), "cut short or damaged"),
    "reports cut short": ("mimic-zip", "*reports.zip", lambda z: z[:-30], "cut short or damaged"),
    "report damaged": ("mimic-zip", "*reports.zip", lambda z: z[:90] + bytes(10) + z[100:], "is cut short"),
    "Target 2": ("rsna", "*labels.csv", swap(b",1\n", b",2\n"), "row 2: the Target is neither 0 nor 1"),
    "no path": ("chexpert", "train.csv", swap(b"/study1/view1_f", b""), "row 2: the path 'CheXpert"),
    "no split": ("csv", "table.csv", swap(b",train,", b",exam,"), "row 2: the split is none of train"),
    "blank split": ("csv", "table.csv", swap(b",train,", b",,"), "row 2: the split is none of train"),
    "no view": ("csv", "table.csv", swap(b",pa,", b",up,"), "row 2: the view is none of"),
    "no image": ("csv", "table.csv", swap(b"pictures/0.png", b""), "row 2: the image does not end with"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_ends_in_one_sentence_without_a_word_of_a_report(damage, tmp_path, capsys):
    name, file, change, sentence = DAMAGES[damage]
    name, _, ending = name.partition(".")
    spec = build(name, tmp_path)
    spec = layouts.compress(spec, tmp_path, f".{ending}") if ending else spec
    path = next(tmp_path.rglob(file))
    path.write_bytes(change(path.read_bytes()))
    assert summary(spec) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.py: ") and path.name in line and sentence in line and MARKER not in line


@pytest.mark.parametrize("name", ["chexpert", "mimic-cxr"])
@pytest.mark.parametrize("value", ["2", "0.5", "yes", "nan", "-", ".0"])
def test_a_label_outside_the_four_states_is_named_by_row_and_column(name, value, tmp_path):
    spec = build(name, tmp_path)
    names = ("train.csv", "mimic-cxr-2.0.0-chexpert.csv")
    path = next(path for path in tables(tmp_path) if path.name in names)
    path.write_text(path.read_text().replace("1.0", value))
    assert re.match(f"{path}, row .: column '.*' has the value {value!r}, which is none of", refused(spec))


# -------------------------------------------------------------------------------------------- which data sets


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [("mimic", "'mimic'.*phantom, chexpert, mimic-cxr"), ("rsna", "rsna=FOLDER"),
     ("rsna=nowhere", "folder nowhere"), (os.curdir, "write NAME=. or csv=TABLE")],
)  # fmt: skip
def test_a_data_set_that_is_not_there_is_refused(spec, sentence):
    with pytest.raises(BadInput, match=sentence):
        data.load_records([spec], "train")


def test_limit_takes_some_of_each_data_set_wherever_a_table_has_its_classes_and_more_keep_the_fewer(
    specs, tmp_path
):
    ids = [r.id for r in data.load_records([specs["csv"], specs["rsna"]], "train", 2)]
    assert len(ids) == 4 and {*ids} <= {r.id for name in ("csv", "rsna") for r in everything(specs[name])}
    spec = table_of(tmp_path, "image,split,Edema", *(f"{n}.png,train,{n // 100}" for n in range(200)))
    whole, some, few = (data.load_records([spec], "train", limit) for limit in (None, 32, 16))
    assert 4 < sum(r.labels["Edema"] for r in few) < 12
    places = [[r.id for r in whole].index(r.id) for r in some]
    assert places == sorted(places) and len(places) == 32 and {r.id for r in few} < {r.id for r in some}


# --------------------------------------------------------------------------------------------------- chexpert


@pytest.mark.parametrize("layout", layouts.UNPACKED)
def test_chexpert_is_found_however_it_was_unpacked_with_ids_without_prefix(layout, tmp_path):
    records = everything(f"chexpert={layouts.chexpert(tmp_path, layout)}")
    assert all(r.image.is_file() for r in records)
    images = {"train": layouts.CHEXPERT_TRAIN, "valid": layouts.CHEXPERT_VALID, "test": layouts.CHEXPERT_TEST}
    assert [r.id for r in records] == [f"{split}/{image}" for split in images for image in images[split]]


def test_views_are_chosen_and_one_that_no_image_has_is_refused(specs):
    for views, word in ((data.FRONTAL, "frontal"), (["LATERAL"], "lateral")):
        ids = [r.id for r in data.load_records([specs["chexpert"]], "train", views=views)]
        assert ids == [f"train/{image}" for image in layouts.CHEXPERT_TRAIN if word in image]
    with pytest.raises(BadInput, match="chexpert has no record in its split 'train' with the view UNKNOWN"):
        data.load_records([specs["chexpert"]], "train", views=["UNKNOWN"])


def test_chexpert_without_test_labels_has_no_test_records(tmp_path):
    (layouts.chexpert(tmp_path) / "CheXpert-v1.0-small" / "test_labels.csv").unlink()
    spec = f"chexpert={tmp_path}"
    assert data.read_records([spec], "test")[spec] == []


# -------------------------------------------------------------------------------------------------- mimic-cxr


SECTIONS = {  # report: (findings, impression, last paragraph)
    " INDICATION:  ___\n \n FINDINGS: \n \n Clear.\n \n IMPRESSION: \n \n Normal.\n": (
        "Clear.", "Normal.", None),
    " CHEST RADIOGRAPH\n \n COMPARISON:  ___.\n \n As before.\n": (None, None, "As before."),
    " HISTORY:  Dyspnea.\n \n FINDINGS AND IMPRESSION:  Mild edema.\n": (None, "Mild edema.", None),
    " One line.\n \n Another line.\n": (None, None, "Another line."),
    " FINDINGS: One.\n FINDINGS: Two.\n": ("Two.", None, None),
    " FINDINGS: One.\n CHEST, PA AND LATERAL:\n \n IMPRESSION: Two.\n": ("One.", "Two.", None),
    " FINDINGS: One NOTE: two.\n COMPARISON: None.\n": ("One NOTE: two.", None, None),
}  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("body", SECTIONS)
def test_mimic_sections_are_those_of_the_official_parser(body, end):
    text = f"{' ' * 33}FINAL REPORT\n{body}".replace("\n", end)
    found = {name: section.strip() for name, section in data.report_sections(text).items()}
    names = ("findings", "impression", "last_paragraph")
    assert tuple(found.get(name) for name in names) == SECTIONS[body]


TITLES = {  # as they stand in MIMIC-CXR, and titles of the same kind
    "impression": (
        "IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "FINDINGS/IMPRESSION", "IMPRESSON",
        "FINDINGS AND IMPRESSION", "FINDINGS/ IMPRESSION", "IMPRRESSION", "IMORESSION", "IMPRESSOIN",
        "IMPRSSION", "IMPRESION", "IMPERSSION", "MPRESSION", "IMPESSION", "IMPRESSION(S)", "IMPRESSIO",
        "FINAL IMPRESSION", "CONCLUSON"),
    "findings": (
        "FINDINGS", "FINDING", "FINDINS", "FINDINDGS", "FINDGINGS", "FINDNGS", "FINDNINGS", "FINIDNGS",
        "REFERENCE FINDINGS", "CHEST, TWO VIEWS", "CHEST", "PORTABLE AP CHEST", "PORTABLE", "PA AND LATERAL",
        "AP AND LATERAL VIEWS OF THE CHEST", "FRONTAL AND LATERAL VIEWS", "TWO VIEWS", "SINGLE VIEW"),
    None: (  # neither
        "COMPARISON", "COMPARISION", "INDICATION", "REASON FOR EXAM", "HISTORY", "CLINICAL INFORMATION",
        "TECHNIQUE", "EXAMINATION", "WET READ", "NOTIFICATION", "RECOMMENDATION(S)", "ADDENDUM", "PFI",
        "COMPRESSION", "SPINAL CORD COMPRESSION", "DEPRESSION", "EXPRESSION", "SUPPRESSION", "PROGRESSION",
        "REGRESSION", "OPPRESSION", "OCCLUSION", "CONFUSION", "CONTUSION", "CONCUSSION", "INCLUSION",
        "EXCLUSION", "EFFUSION", "ADMISSION", "PROCEDURE", "PACEMAKER", "APPENDIX"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "title"), [(name, title) for name in TITLES for title in TITLES[name]])
def test_a_mimic_title_is_known_under_one_slip_and_for_no_other_word(name, title):
    assert data.section_name(title) == (name or title.lower())


def test_a_compression_does_not_replace_the_impression():
    sections = data.report_sections("FINAL\n IMPRESSION: Edema.\n COMPRESSION: None.\n DEPRESSION: No.\n")
    assert sections["impression"].strip() == "Edema."


@pytest.mark.parametrize(
    ("images", "reports"),
    [("", ""), ("", "mimic-cxr-reports.zip"), ("jpg", "mimic-cxr-reports.zip"), ("jpg/2.0.0", "txt/2.0.0"),
     ("physionet.org/files/mimic-cxr-jpg/2.0.0", "physionet.org/files/mimic-cxr/2.1.0"),
     ("physionet.org/files/mimic-cxr-jpg/2.0.0", "physionet.org/files/mimic-cxr/mimic-cxr-reports.zip")],
)  # fmt: skip
def test_mimic_is_found_in_one_folder_or_two_with_reports_as_files_or_zip(specs, images, reports, tmp_path):
    spec = f"mimic-cxr={layouts.mimic(tmp_path, images, reports)}"
    assert contents(spec)[1] == contents(specs["mimic-cxr"])[1]
    assert all(r.image.is_file() for r in everything(spec))


def test_a_search_enters_no_folder_of_a_patient_and_follows_links_without_end(tmp_path):
    root = layouts.mimic(tmp_path / "root")
    (root / "loop").symlink_to(root, target_is_directory=True)
    names = {path.name for path in data.folders(root, 6)}
    assert {"mimic-cxr-jpg", "files", "loop"} <= names and not names & {"p10", "p11", "s50000001"}


PARTS = {  # layout, id: what each section gives
    ("mimic-cxr", "files/p10/p10000001/s50000001/b.jpg"): {
        "both": f"No acute process. The lungs are clear, {MARKER}.", "impression": "No acute process.",
        "findings": f"The lungs are clear, {MARKER}."},
    ("mimic-cxr", "files/p10/p10000002/s50000003/d.jpg"): {  # the last paragraph alone
        "both": f"Compared to, the {MARKER} was removed.", "impression": None, "findings": None},
    ("mimic-zip", "files/p11/p11000003/s50000004/e.jpg"): {  # one section for both
        "both": f"Mild {MARKER}.", "impression": f"Mild {MARKER}.", "findings": None},
    ("openi", "CXR6_IM-00-01"): {
        "both": f"Normal chest, {MARKER}. Lungs are clear.", "impression": f"Normal chest, {MARKER}.",
        "findings": "Lungs are clear."},
}  # fmt: skip


@pytest.mark.parametrize("section", data.SECTIONS)
@pytest.mark.parametrize(("name", "id"), PARTS)
def test_a_report_is_the_chosen_section(specs, name, id, section):
    found = data.read_records([specs[name]], "all", section=section)[specs[name]]
    assert {r.id: r.report for r in found}[id] == PARTS[name, id][section]


def test_a_pack_has_the_section_that_it_was_made_with(specs, tmp_path):
    run = ["pack", "--data", specs["openi"], "--workers", "0", "--image-size", "8", "--section", "findings"]
    assert data.main([*run, "--out", str(tmp_path / "pack")]) == 0
    assert {r.report for r in everything(f"csv={tmp_path / 'pack'}")} == {"Lungs are clear.", None}


def test_a_section_is_refused_where_no_report_has_any(specs, tmp_path, capsys):
    flags = ["--data", specs["csv"], "--section", "impression", "--out", str(tmp_path / "run")]
    for main in (train.main, lambda flags: data.main(["pack", *flags])):
        assert main(flags) == 2
        assert "--section impression is for mimic-cxr and openi" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mimic-cxr", "openi"])
def test_training_without_any_report_of_a_set_that_has_them_is_refused(specs, name):
    found = data.read_records([specs[name], specs["chexpert"]], "train")
    data.check_reports(found)
    found[specs[name]] = [replace(r, report=None) for r in found[specs[name]]]
    with pytest.raises(BadInput, match=f"training images of {name} has a report.*--no-image-text trains"):
        data.check_reports(found)


def test_mimic_reports_may_be_absent(tmp_path, capsys):
    shutil.rmtree(layouts.mimic(tmp_path) / "mimic-cxr")
    assert {r.report for r in everything(f"mimic-cxr={tmp_path}")} == {None}
    assert f"{tmp_path} has no report of the split 'train'" in capsys.readouterr().err


def test_mimic_without_reports_is_trained_when_told_that_there_are_none(tmp_path, pretrain, capsys):
    shutil.rmtree(layouts.mimic(tmp_path) / "mimic-cxr")
    train_split = ["--data", f"mimic-cxr={tmp_path}", "--views", *data.VIEWS]
    assert pretrain(*train_split) == 2
    assert "--no-image-text trains on labels alone" in capsys.readouterr().err
    assert pretrain(*train_split, "--no-image-text") == 0


# ------------------------------------------------------------------------------------------------------- rsna


def test_rsna_without_the_details_has_no_normal_image(tmp_path):
    (layouts.rsna(tmp_path) / "stage_2_detailed_class_info.csv").unlink()
    assert Counter(str(r.labels) for r in everything(f"rsna={tmp_path}")) == {
        "{'Pneumonia': 1}": 6,
        "{'Pneumonia': 0}": 14,
    }


# ------------------------------------------------------------------------------------------ covid-radiography


def classes(records):
    """{finding: number of its images}, each image having one."""
    return Counter(*zip(*map(data.present, records), strict=True))


def test_covid_radiography_has_four_classes_of_which_three_rule_out_covid(specs):
    records = everything(specs["covid-radiography"])
    assert classes(records) == dict.fromkeys(data.COVID_CLASSES.values(), 3)
    assert all(
        data.absent(r) == {"COVID-19"} - data.present(r) and r.image.parent.name == "images" for r in records
    )


@pytest.mark.parametrize("images", ["images", ""], ids=["folder of images", "older release without it"])
def test_covid_radiography_folders_may_differ_in_case(images, tmp_path):
    names = ("Covid", "lung_opacity", "NORMAL", "Viral Pneumonia")
    records = everything(f"covid-radiography={layouts.covid_radiography(tmp_path, names, images)}")
    assert classes(records) == dict.fromkeys(data.COVID_CLASSES.values(), 3)


def test_covid_radiography_may_have_two_of_its_folders(tmp_path, capsys):
    spec = f"covid-radiography={layouts.covid_radiography(tmp_path, ('COVID',))}"
    assert "has COVID of the class folders COVID or COVID-19, Lung_Opacity, Normal" in refused(spec)
    layouts.covid_radiography(tmp_path, ("COVID", "Normal"))
    assert classes(everything(spec)) == {"COVID-19": 3, "No Finding": 3}
    assert "has COVID and Normal of the class folders" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["COVID-19", "Covid-19", "covid_19", "COVID"])
def test_covid_radiography_knows_the_names_of_its_versions(name, tmp_path):
    spec = f"covid-radiography={layouts.covid_radiography(tmp_path, (name, 'NORMAL'))}"
    assert classes(everything(spec)) == {"COVID-19": 3, "No Finding": 3}


@pytest.mark.parametrize(
    "copies", [("train/COVID", "val/COVID"), ("COVID", "COVID-19"), ("COVID", "old/covid")]
)
def test_a_covid_class_that_is_met_twice_is_refused(copies, tmp_path):
    for folder in ("Normal", *copies):
        layouts.draw(tmp_path / folder / "1.png")
    said = refused(f"covid-radiography={tmp_path}")
    assert "has the class COVID-19 in " in said and all(str(tmp_path / folder) in said for folder in copies)
    assert f"--data folder={tmp_path}" in said
    assert f"--data folder={tmp_path}" in said


def test_class_folders_and_folders_of_images_behind_links_are_found_and_no_loop_is_endless(tmp_path):
    layouts.covid_radiography(tmp_path / "disk")
    (published,) = (tmp_path / "disk").iterdir()
    for name in ("COVID", "Normal"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "images").symlink_to(published / name / "images")
        (published / name / "images" / "back").symlink_to(published / name / "images")
    (tmp_path / "data" / "Viral Pneumonia").symlink_to(published / "Viral Pneumonia")
    found = classes(everything(f"covid-radiography={tmp_path / 'data'}"))
    assert found == {"COVID-19": 3, "No Finding": 3, "Viral Pneumonia": 3}


# -------------------------------------------------------------------------------------------------------- csv


def test_csv_needs_no_column_but_image_and_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "table.csv").write_text("image\na/b.png\n/elsewhere/c.png\n", encoding="utf-8-sig")
    records = sorted(everything(f"csv={tmp_path / 'table.csv'}"), key=lambda r: r.id, reverse=True)
    assert [r.image for r in records] == [tmp_path / "a" / "b.png", Path("/elsewhere/c.png")]
    assert [r.patient for r in records] == ["a/b.png", "/elsewhere/c.png"]
    assert all((r.report, r.labels, r.view) == (None, {}, "") for r in records)


def test_csv_without_splits_is_split_by_patient(tmp_path):
    spec = table_of(tmp_path, "image,patient", *(f"{n}.png,{n % 40}" for n in range(60)))
    owners = [{r.patient for r in data.read_records([spec], split)[spec]} for split in data.SPLITS]
    assert all(owners) and sum(map(len, owners)) == len(set().union(*owners)) == 40


def test_csv_knows_the_names_of_the_validation_split(tmp_path):
    names = ["valid", "validate", "validation", "val", "dev", "Valid"]
    spec = table_of(tmp_path, "image,split", *(f"{name}.png,{name}" for name in names))
    assert len(data.read_records([spec], "valid")[spec]) == len(names)


CSV_SAYS = [  # lines of a table, what its first record says
    (["image, id, source,split", "a.png,7,rsna,train"], {"id": "7", "source": "rsna"}),
    (["image,id,source,split", "a.png,,,train"], {"id": "a.png", "source": "csv"}),
    (["image,split,Edema,Mass", "a.png,train,unknown,1"], {"labels": {"Mass": 1}}),
    (["image,report", "a.png,"], {"report": None}),
    (["image,report", "a.png,..."], {"report": None}),
    (["image,report", "a.png,___"], {"report": None}),
    (["image,report", "a.png,1. 2."], {"report": None}),
    (["image,report", "a.png, 1. Clear. "], {"report": "1. Clear."}),
    (["image,report", 'a.png," 1. ___\r\nclear "'], {"report": "1. ___\r\nclear"}),
    (["image,report", 'a.png,"One line.', "", 'Another, with a comma, see Fig. 1."'],
     {"report": "One line.\n\nAnother, with a comma, see Fig. 1."}),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "said"), CSV_SAYS)
def test_csv_says_what_its_owner_wrote(lines, said, tmp_path):
    r = everything(table_of(tmp_path, *lines))[0]
    assert {field: getattr(r, field) for field in said} == said


EFFUSION = "Pleural Effusion"
COLUMNS = [  # lines of a table, what its first record says
    (["Image", "a.png"], {"id": "a.png"}),
    (["filename,PatientID,Split", "a.png,7,TRAIN"], {"patient": "7", "labels": {}}),
    (["Image Path,subject_id,fold", "a.png,7,training"], {"patient": "7"}),
    (["image,path,Patient_ID,patient", "a.png,b.png,7,8"], {"patient": "8"}),
    (["image,View Position", "a.png,LL"], {"view": "LATERAL"}),
    (["image,impression", "a.png,Clear."], {"report": "Clear."}),
    (["image,findings,impression", "a.png,Lungs are clear.,Normal."],
     {"report": "Normal. Lungs are clear.", "labels": {}}),
    (["image,Caption,findings", "a.png,A film.,Edema"], {"report": "A film.", "labels": {"Edema": 1}}),
    (["image;Edema;report", "a.png;1;Clear, now."], {"labels": {"Edema": 1}, "report": "Clear, now."}),
    (["image\tEdema", "a.png\t0"], {"labels": {"Edema": 0}}),
    (["image,Edema,Mass", "a.png,True,FALSE"], {"labels": {"Edema": 1, "Mass": 0}}),
    (["image,Edema,Mass", "a.png,nan,1"], {"labels": {"Edema": None, "Mass": 1}}),
    (["image,patient", "a.png,<NA>"], {"patient": "a.png"}),
    (["image,pleural_effusion,No finding,mass", "a.png,1,0,0"],
     {"labels": {EFFUSION: 1, "No Finding": 0, "mass": 0}}),
    (["image,sex,Age,patient sex,Unnamed: 0,studyID,Hemorrhage", "a.png,1,1,0,0,1,1"],
     {"labels": {"Hemorrhage": 1}}),
    (["image,Finding Labels", "a.png,Edema|Mass", "b.png,No finding", "c.png,mass ; hernia"],
     {"labels": {"Edema": 1, "Mass": 1, "No Finding": 0, "hernia": 0}}),
    (["image,label", "a.png,no_finding", "b.png,Edema"], {"labels": {"No Finding": 1, "Edema": 0}}),
    (["image,labels", "a.png,", "b.png,Edema"], {"labels": {}}),
    (["image,labels,Edema,Mass", "a.png,Edema|Hernia,0,", "b.png,Mass,,"],
     {"labels": {"Edema": 0, "Mass": 0, "Hernia": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "said"), COLUMNS, ids=[lines[0] for lines, _ in COLUMNS])
def test_columns_are_known_by_their_usual_names_and_cells_by_their_usual_words(lines, said, tmp_path):
    r = by_id(table_of(tmp_path, *lines))["a.png"]
    found = {field: getattr(r, field) for field in said}
    assert found == said and r.image == tmp_path / "a.png"


UNCLEAR = [  # lines of a table, what the refusal says
    (
        ["image,findings", "a.png,Edema|Mass", "b.png,The heart is big."],
        "row 3: the column 'findings' may hold",
    ),
    (
        ["image,finding", "a.png,Edema; Mass", "b.png,Edema: mild"],
        "row 3: the column 'finding'",
    ),
    (["image,labels", 'a.png,"Edema, Mass"'], "row 2: the column 'labels' may hold names"),
    (["image,label", "a.png,3"], "row 2: the column 'label' may hold names"),
    (["image,findings", *(f"{n}.png,small shadow {n}" for n in range(30))], "the column 'findings' may hold"),
    (
        ["path,filename", "a,a.png"],
        "has the columns 'path', 'filename'; name the one that is the image 'image'",
    ),
    (["image,PatientID,subject_id", "a.png,1,2"], "has the columns 'PatientID', 'subject_id'; name the one"),
    (["image,fold", "a.png,3"], "row 2: the split is none of train, valid, test (column 'fold')"),
    (["image,Edema,edema", "a.png,1,0"], "has 2 columns of the finding 'Edema'; keep one"),
    (["image,Edema"], "has no row below its header"),
    (
        ["photo,patient,Edema,HIV", "a.png,1,1,0"],
        "has no column 'image'; it has 'patient', 'Edema', 2 others",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), UNCLEAR, ids=[sentence for _, sentence in UNCLEAR])
def test_a_column_that_may_be_two_things_is_refused_with_the_way_out(lines, sentence, tmp_path):
    assert sentence in refused(table_of(tmp_path, *lines))


@pytest.mark.parametrize(
    "report", ["nan", "NaN", "None", "NULL", "<NA>", "N/A", "#N/A", "n.a.", "not available"]
)
def test_a_cell_that_says_that_there_is_no_report_is_none(report, tmp_path):
    (r,) = everything(table_of(tmp_path, "image,report", f"a.png,{report}"))
    assert r.report is None


def test_what_a_table_does_not_say_is_said_once(tmp_path, capsys):
    spec = table_of(tmp_path, "image,Edema", "a.png,1")
    for _ in range(2):
        everything(spec)
    printed = capsys.readouterr().err
    assert printed.count("has no column 'patient': each image counts as a patient") == 1
    assert printed.count("has no column 'split': the splits are drawn by patient") == 1


def test_findings_of_mixed_data_sets_have_one_spelling_however_they_are_written(specs, tmp_path):
    header = "image,split,pleural effusion,Pleural_Thickening,No finding"
    one = table_of(tmp_path / "one", header, "a.png,train,1,1,0")
    other = table_of(tmp_path / "other", header.replace("_T", " t"), "b.png,train,1,1,0")
    found = data.read_records([one, other, specs["chexpert"]], "train")
    names = [{name for record in records for name in record.labels} for records in found.values()]
    assert names[0] == names[1] == {EFFUSION, "Pleural thickening", "No Finding"}
    assert names[2] == {*data.CHEXPERT}


def test_one_table_under_two_spellings_is_read_once(specs, tmp_path):
    table = Path(specs["csv"].partition("=")[2])
    (tmp_path / "link").symlink_to(table.parent)
    spellings = [f"csv={path}" for path in (table, table.parent, f"{table.parent}/../{table.parent.name}")]
    assert len(data.load_records([*spellings, f"csv={tmp_path}/link"], "train")) == READERS["csv"][2][0]


def test_csv_patients_of_two_sources_may_have_the_same_number(tmp_path):
    rows = ["image,source,patient,split", "a.png,rsna,7,train", "b.png,openi,7,test"]
    assert len(everything(table_of(tmp_path, *rows))) == 2


@pytest.mark.parametrize(
    "rows",
    [["image,patient,split", "a.png,7,train", "b.png,7,test"], ["image,split", "7.png,train", "7.png,test"]],
    ids=["patient", "image"],
)
def test_csv_patient_in_two_splits_is_refused(rows, tmp_path, capsys):
    spec, sentence = table_of(tmp_path, *rows), "of csv is in the splits 'train' and 'test'"
    assert summary(spec) == 2 and sentence in capsys.readouterr().err
    assert data.main(["pack", "--data", spec, "--out", str(tmp_path / "pack")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "pack").exists()


CLEANED = [
    ("1. No edema.\n2. Clear.", "No edema. Clear."),
    ("Seen on ___ at ___:  stable .", "Seen on at: stable."),
    ("Normal chest x-XXXX.", "Normal chest."),
    ("A 3.5 cm mass, 2 nodules.", "A 3.5 cm mass, 2 nodules."),
    ("___ M with cough (XXXX)", "M with cough"),
    ("two\n \n lines", "two lines"),
    ("12 to\n15. No edema", "12 to 15. No edema"),
]


@pytest.mark.parametrize(("text", "cleaned"), CLEANED)
def test_a_report_is_cleaned_to_its_words(text, cleaned):
    assert data.clean(text) == cleaned


# ---------------------------------------------------------------------------------------------------- summary


def test_the_summary_counts_what_is_there(specs, capsys):
    summary(specs["chexpert"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "7", "3", "0", "4"] in lines  # images, patients, reports, labelled
    assert ["valid", "1", "1", "0", "1"] in lines and ["test", "2", "1", "0", "2"] in lines
    assert ["views:", "AP", "3,", "LATERAL", "3,", "FRONTAL", "3,", "PA", "1"] in lines
    assert ["Edema", "6", "0", "1", "3"] in lines  # 1, 0, -1, blank
    assert ["Fracture", "0", "4", "0", "6"] in lines
    assert "of 123 blanks 74 count as absent, beside a finding; the others are unknown".split() in lines


def test_the_summary_says_what_the_columns_are_and_names_three_missing_files(tmp_path, capsys):
    header = "filename,subject_id,Finding Labels,Edema,age,impression"
    assert summary(table_of(tmp_path, header, *(f"{n}.png,{n % 9},Mass,0,70,Clear." for n in range(20)))) == 1
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in ("image     'filename'", "patient   'subject_id'", "split     -", "report    'impression'"):
        assert line in lines
    assert "findings  'Edema', those named in 'Finding Labels'" in lines and "left out  'age'" in lines
    place = lines.index("missing files: 20")
    assert all(line.startswith(f"    {tmp_path}/") for line in lines[place + 1 : place + 4])
    assert not lines[place + 4]


# -------------------------------------------------------------------------------------------------- real data


def test_every_image_of_the_real_covid_radiography_is_found():
    records = everything(f"covid-radiography={real('covid-radiography')}")
    assert len(records) == 13808 and all(r.image.is_file() and data.present(r) for r in records)


# ---------------------------------------------------------------------------------------- what breaks readers


WORDS = "Hyperinflated lungs without any consolidation"
LEAKS = {  # a table's lines, with a report where another cell belongs
    "no header": [f"a.png,{WORDS}", f"b.png,{WORDS}"],
    "one word of a header": [f"image,{WORDS.split()[0]},{WORDS.split()[0]}", "a.png,1,1"],
    "as the image": ["image,report", f"{WORDS},a.png"],
    "one word as the view": ["image,view", f"a.png,{WORDS.split()[2]}"],
    "one word as the split": ["image,split", f"a.png,{WORDS.split()[2]}"],
    "one word as the patient": [
        "image,patient,split",
        *(f"{s}.png,{WORDS.split()[2]},{s}" for s in data.SPLITS),
    ],
    "one word as the id": [
        "image,id,split",
        *(f"{s}.png,{WORDS.split()[2]},{s}" for s in ("test", "valid") * 2),
    ],
    "one word of no header": [f"a.png,{WORDS.split()[2]}", f"b.png,{WORDS.split()[2]}"],
    "as the view": ["image,view", f"a.png,{WORDS}"],
    "as the split": ["image,split", f"a.png,{WORDS}"],
    "as a label": ["image,split,Edema,Mass", f"a.png,train,{WORDS},1"],
    "as a header": [f"image,{WORDS},{WORDS}", "a.png,1,1"],
    "as the id": ["image,id,split", f"a.png,{WORDS},train", f"b.png,{WORDS},train"],
    "as the patient": ["image,patient,split", f"a.png,{WORDS},train", f"b.png,{WORDS},test"],
    "an unquoted comma": ["image,report", f"a.png,{WORDS}, {WORDS}"],
    "a stray quote": ["image,report", f'a.png,"{WORDS}', f"b.png,{WORDS}"],
}


@pytest.mark.parametrize("leak", LEAKS)
def test_no_message_about_a_table_holds_a_word_of_a_report(leak, tmp_path, capsys):
    spec = table_of(tmp_path, *LEAKS[leak])
    summary(spec)
    data.main(["pack", "--data", spec, "--out", str(tmp_path / "pack"), "--workers", "0"])
    printed = "".join(capsys.readouterr())
    assert printed and not any(word in printed for word in WORDS.split()[::2])


NAMELESS = "\u0e1b\u0e2d\u0e14\u0e1b\u0e01\u0e15\u0e34" * 9  # a report of a script without blanks


@pytest.mark.parametrize("words", [WORDS, "HIV-positive", NAMELESS, "a1," + WORDS, "x" * 61 + "1"])
def test_a_list_that_is_a_report_by_mistake_is_never_shown(words, tmp_path, capsys):
    spec = table_of(tmp_path, "image", "a.png")
    (record,) = everything(spec)
    with pytest.raises(BadInput) as caught:
        data.pick_listed([record], [words], "csv")
    assert words not in str(caught.value) and "an id there looks like 'a.png'" in str(caught.value)


@pytest.mark.parametrize("rows", [2, 3, 12])
def test_a_quotation_mark_that_swallows_rows_is_refused(rows, tmp_path):
    lines = [f"{n}.png,Film {n} is clear." for n in range(20)]
    lines[3] = '3.png,"Film 3 is clear.'
    lines[3 + rows] += '"'
    assert "row 5, goes on over the next rows" in refused(table_of(tmp_path, "image,report", *lines))


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, tmp_path):
    spec = build("chexpert", tmp_path)
    path = next(tmp_path.rglob("train.csv"))
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert path.name in refused(spec)


# ------------------------------------------------------------------------------------- a user's own table


def test_csv_columns_with_other_cells_than_labels_are_left_out_and_named_once_and_whole(tmp_path, capsys):
    header = "image,split,years of the patient,Edema,what else was seen"
    spec = table_of(tmp_path, header, "a.png,train,63,1,Fluid", "b.png,train,,0,HIV-positive")
    records = [*everything(spec), *everything(spec)]
    assert {name for r in records for name in r.labels} == {"Edema"}
    printed = capsys.readouterr().err
    assert printed.count("2 columns are left out") == 1
    assert "'years of the patient', 'what else was seen'" in printed and "HIV" not in printed


def test_a_data_set_without_a_split_is_noted_where_another_has_it(specs, tmp_path, capsys):
    spec = table_of(tmp_path, "image,split", "a.png,train")
    assert len(data.load_records([spec, specs["rsna"]], "valid")) == 3
    assert "csv has no record in its split 'valid'; the others are used" in capsys.readouterr().err
    with pytest.raises(data.Lacking, match="another split or another data set"):
        data.load_records([spec], "valid")


def test_a_patient_in_two_splits_of_two_tables_is_refused(tmp_path, capsys):
    header, row = "image,source,patient,split", "a.png,rsna,7,"
    specs = [table_of(tmp_path / split, header, row + split) for split in ("train", "test")]
    sentence = "patient '7' of rsna is in the splits 'train' and 'test'"
    with pytest.raises(BadInput, match=sentence):
        data.read_records(specs, "train")
    assert data.main(["summary", "--no-copies", "--data", *specs]) == 2
    assert sentence in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- copies


def picture(n, size=160):
    return Image.fromarray(data.draw_phantom(np.random.default_rng(n), {"Edema"}, size)[0])


def jpeg(image, quality=40):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = {
    "resized": lambda image: image.resize((70, 80)),
    "recompressed": jpeg,
    "cropped": lambda image: image.crop((2, 1, 159, 158)),
    "cropped by 5 % a side": lambda image: image.crop((8, 8, 152, 152)),
    "cropped by 10 % a side": lambda image: image.crop((16, 16, 144, 144)),
    "turned by 1 degree": lambda image: image.rotate(1, Image.Resampling.BILINEAR),
    "framed in white": lambda image: ImageOps.expand(image, 15, 255),
    "framed in black": lambda image: ImageOps.expand(image, (30, 5), 0),
    "framed twice": lambda image: ImageOps.expand(ImageOps.expand(image, (30, 5), 0), 15, 255),
    "brighter": lambda image: image.point(lambda grey: min(255, int(grey * 1.15) + 10)),
}


def as_records(images, patient="1"):
    return [
        data.Record(np.asarray(image.convert("L")), None, {}, f"{patient}-{n}", "test")
        for n, image in enumerate(images)
    ]


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(kind):
    records = as_records(map(picture, range(8)))
    copied = as_records([COPIES[kind](picture(n)) for n in (2, 5)])
    assert data.near_copies(records, copied) == [records[2], records[5]]


def test_other_patients_in_the_same_pose_are_no_copies():
    records = as_records(map(picture, range(40)))
    assert list(data.copied_pairs(records, records)) == []


def test_look_alikes_within_the_hash_are_no_copies_by_their_details():
    """Lesions: a dark blob on bright skin, each with a texture of its own."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    shape, images = 200 - 120 * np.exp(-2 * ((x - 0.1) ** 2 + y**2)) - 30 * x, []
    for n in range(6):
        texture = Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 24), np.uint8)).resize(
            (128, 128)
        )
        images.append(Image.fromarray((shape + np.asarray(texture) / 20).astype(np.uint8)))
    records = as_records(images)
    hashes = data.hashes_of(records)
    assert sum(len(rows) for rows, _ in data.near_pairs(hashes, hashes)) > 0
    assert list(data.copied_pairs(records, records)) == []
    assert data.near_copies(records, as_records(images[2:3])) == records[2:3]


def test_pairs_of_one_set_are_those_of_two_equal_sets_each_once():
    rng = np.random.default_rng(0)
    hashes = rng.choice(np.int8([-1, 1]), (2100, 1, 256)).repeat(len(data.MARGINS), axis=1)  # two blocks
    hashes[[7, 1500, 2099]] = hashes[3]
    once, twice = (
        {(i, j) for rows, columns in found for i, j in zip(rows.tolist(), columns.tolist(), strict=True)}
        for found in (data.near_pairs(hashes, hashes), data.near_pairs(hashes, hashes.copy()))
    )
    assert once == {(i, j) for i, j in twice if i < j} and len(once) == 6


def test_an_image_of_one_grey_or_none_is_nobodys_copy(tmp_path):
    records = as_records([Image.new("L", (9, 9), grey) for grey in (0, 90, 255)])
    missing = [data.Record(tmp_path / "a.png", None, {}, "1", "test")] * 2
    assert data.near_copies(records, records) == data.near_copies(missing, missing) == []


@pytest.mark.parametrize(
    ("splits", "status"), [(("train", "train"), 0), (("train", "valid"), 0), (("test", "train"), 1)]
)
def test_the_summary_fails_where_a_copy_lies_in_train_and_test(splits, status, tmp_path, capsys):
    specs = []
    for n, split in enumerate(splits):
        specs.append(table_of(tmp_path / str(n), "image,source,split", f"a.png,{n},{split}"))
        picture(3, 100 + 9 * n).save(tmp_path / str(n) / "a.png")
    assert data.main(["summary", "--workers", "0", "--data", *specs]) == status
    printed = capsys.readouterr().out
    assert ": 1 pairs\n  1 in csv=" in printed and f"    {tmp_path}/0/a.png = {tmp_path}/1/a.png" in printed
