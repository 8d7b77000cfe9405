"""Readers of the free data sets and of folders of classes, each alone; test_readers.py asks all the same."""

import json
import shutil
import tarfile
from argparse import Namespace
from collections import Counter
from itertools import product

import layouts
import numpy as np
import pytest
from layouts import build, everything, real, refused
from PIL import Image

import data
import evaluate
from data import BadInput


def by_id(spec):
    return {r.id: r for r in everything(spec)}


# ----------------------------------------------------------------------------------------------------- openi


def test_openi_headings_end_at_their_slash_and_views_are_those_of_the_dicom_table(tmp_path):
    opacity = dict.fromkeys(data.MESH) | {"Lung Opacity": 1}
    assert data.mesh_labels(["Opacity /lung", "Lung/opacity"]) == opacity
    assert data.mesh_labels(["No Indexing"]) == {}
    rows = [("CXR1_IM-0001-3001", "PA"), ("CXR4_IM-00-01", "LL"), ("CXR6_IM-00-01", ""), ("x", "RL")]
    table = [dict(zip(("imageid", "View Position"), row, strict=True)) for row in rows]
    layouts.write_table(tmp_path / "nlmcxr_dicom_metadata.csv", table)
    views = {id: r.view for id, r in by_id(build("openi", tmp_path)).items()}
    assert (views["CXR1_1_IM-0001-3001"], views["CXR4_IM-00-01"]) == ("PA", "LATERAL")
    assert views["CXR6_IM-00-01"] == views["CXR7_IM-00-01"] == ""


def archived(root):
    """The folder of reports becomes the published archive."""
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(root / "ecgen-radiology", "ecgen-radiology")
    shutil.rmtree(root / "ecgen-radiology")
    return root / "NLMCXR_reports.tgz"


def test_openi_reads_its_reports_out_of_the_archive_too(tmp_path):
    spec = build("openi", tmp_path)
    before = layouts.contents(spec)
    archived(tmp_path)
    assert layouts.contents(spec) == before


def test_a_damaged_report_in_the_archive_is_named_and_so_is_a_damaged_archive(tmp_path):
    spec = build("openi", tmp_path)
    (tmp_path / "ecgen-radiology" / "7.xml").write_text("<eCitation><uId")
    archive = archived(tmp_path)
    assert f"{archive}, 7.xml is cut short or damaged" in refused(spec)
    archive.write_bytes(archive.read_bytes()[:100])
    assert f"{archive} is cut short or damaged" in refused(spec)


# ------------------------------------------------------------------------------------------- nih-chestxray14


def test_nih_official_test_list_is_honoured_and_the_rest_is_split(tmp_path):
    (tmp_path / "test_list.txt").write_text("00000003_000.png\n00000001_000.png\n")
    spec = build("nih-chestxray14", tmp_path)
    train, valid, test = ([r.patient for r in data.read_split(spec, s)] for s in data.SPLITS)
    assert test == ["1", "3"] and (len(train), len(valid)) == (6, 2)


# ------------------------------------------------------------------------------------------- covid-chestxray


def covid(root, *rows):
    header = "patientid,finding,view,modality,folder,filename,clinical_notes"
    layouts.write(root / "metadata.csv", "\n".join([header, *rows]) + "\n")
    return by_id(f"covid-chestxray={root}")


def test_covid_findings_are_read_from_new_and_from_old_releases(tmp_path):
    rows = ["5,Pneumonia/Viral/COVID-19,AP,X-ray,images,a.jpg,", '6,"COVID-19, ARDS",AP,X-ray,images,b.jpg,']
    a, b = (covid(tmp_path, *rows)[f"images/{name}.jpg"] for name in "ab")
    assert (data.present(a), data.present(b)) == ({"COVID-19"}, {"COVID-19", "ARDS"})


def test_patients_who_share_a_covid_file_are_one(tmp_path):
    names = ((5, "a"), (5, "c"), (6, "b"), (6, "a"), (6, "c"))
    found = covid(tmp_path, *(f"{patient},COVID-19,PA,X-ray,images,{name}.jpg," for patient, name in names))
    assert {record.patient for record in found.values()} == {"5"} and len(found) == 3


def test_covid_rows_without_a_frontal_film_or_a_finding_are_left_out(tmp_path):
    others = ["COVID-19,PA,CT", "COVID-19,L,X-ray", "todo,PA,X-ray", "Unknown,PA,X-ray", ",PA,X-ray"]
    rows = [f"{n},{row},images,{n}.jpg," for n, row in enumerate([*others, "COVID-19,AP Supine,X-ray"])]
    assert covid(tmp_path, *rows).keys() == {"images/5.jpg"}


# ----------------------------------------------------------------------------------------------------- roco

CAPTIONS = {  # caption: the findings that it names
    "Axial MRI (coronal view).": "Magnetic Resonance",
    "Panoramic X ray of the left ramus": "Radiograph, Teeth and Jaw",
    "Chest x-ray: left pneumothorax.": "Radiograph, Chest",
    "Arterial phase dynamic CT of the right adrenal gland": "Computed Tomography, Abdomen",
    "CT angiography of the knee": "Computed Tomography, Angiography, Limbs",
    "T2-weighted image of the spine": "Magnetic Resonance, Spine",
    "Computerized tomography of the gallbladder": "Computed Tomography, Abdomen",  # no "uter", no bladder
    "MRI, turbo spin echo sequence": "Magnetic Resonance",  # no spine, no ultrasound
    "Relationship of grid and duct; the cyst": "",  # no hip, no CT
    "Nasogastric tube": "",
    "Head CT. Cerebrospinal fluid": "Computed Tomography, Head",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_names_modalities_and_regions_by_whole_words(caption):
    said = {name for name, value in data.caption_labels(caption).items() if value == 1}
    assert said == set(filter(None, CAPTIONS[caption].split(", ")))


def test_what_a_caption_does_not_speak_of_is_unknown():
    regions, modalities = data.caption_labels("Femoral fracture"), data.caption_labels("Ultrasound")
    assert regions == dict.fromkeys(data.ROCO_WORDS[1]) | {"Limbs": 1}
    assert modalities == dict.fromkeys(data.ROCO_WORDS[0]) | {"Ultrasound": 1}
    assert data.caption_labels("Postoperative decreased size of the cyst") == {}


def test_roco_is_split_by_article_and_has_the_images_that_were_fetched(tmp_path, capsys):
    layouts.roco(tmp_path)
    found = by_id(f"roco={tmp_path}")
    assert sorted(found) == [f"ROCO_{n:05}" for n in range(9)]
    assert found["ROCO_00000"].patient == found["ROCO_00001"].patient == "PMC1"
    assert "1 captions have no image" in capsys.readouterr().err
    part = tmp_path / "data" / "train" / "radiology"
    for path in (part / "images").iterdir():  # as another copy calls them
        path.rename(part / "images" / f"ROCO_0000{path.name[-7]}.jpg")
    assert sorted(by_id(f"roco={part}")) == [f"ROCO_{n:05}" for n in range(6)]


def test_roco_without_any_image_is_refused(tmp_path):
    shutil.rmtree(layouts.roco(tmp_path) / "data" / "test")
    shutil.rmtree(tmp_path / "data" / "train" / "radiology" / "images")
    assert "no image of 6 captions" in refused(f"roco={tmp_path}")


def test_the_words_of_real_captions_agree_with_the_labels_that_were_made_of_them():
    names = [name for group in data.ROCO_WORDS for name in group]
    rows = [row for _, row in data.read_table(real("roco-test", "table.csv"))]
    agree = [
        (row[name] == "1") == (data.caption_labels(row["report"]).get(name) == 1)
        for row in rows
        for name in names
    ]
    assert sum(agree) / len(agree) > 0.98


# ------------------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize(("name", "file"), [("openi", "7.xml"), ("medpix2", "*dev.jsonl")])
def test_a_damaged_source_is_refused_by_name(name, file, tmp_path):
    spec = build(name, tmp_path)
    path = next(tmp_path.rglob(file))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=f"{path.name}.* is cut short or damaged"):
        everything(spec)


@pytest.mark.parametrize("name", ["openi", "nih-chestxray14", "covid-chestxray", "medpix2", "roco"])
def test_the_folder_above_gives_the_same_records(name, tmp_path):
    build(name, tmp_path / "above" / "set")
    above, below = (layouts.contents(f"{name}={tmp_path / place}") for place in ("above", "above/set"))
    assert above == below and above[0]


@pytest.mark.parametrize(
    ("name", "folder", "count"),
    [("medpix2", "medpix2", 2050), ("nih-chestxray14", "nih-chestxray14-1000", 1000),
     ("covid-chestxray", "covid-chestxray", 531)],
)  # fmt: skip
def test_every_image_of_the_real_data_is_found(name, folder, count):
    records = everything(f"{name}={real(folder)}")
    assert len(records) == count and all(r.image.is_file() and data.present(r) for r in records)


def test_real_openi_has_its_images_and_findings(tmp_path):
    (tmp_path / "NLMCXR_reports.tgz").symlink_to(real("metadata", "NLMCXR_reports.tgz"))
    records = everything(f"openi={tmp_path}")
    of_patient = {record.patient: record for record in records}
    assert Counter(Counter(r.patient for r in records).values()) == {1: 446, 2: 3208, 3: 181, 4: 15, 5: 1}
    assert sum(data.present(r) == {"No Finding"} for r in of_patient.values()) > 1300
    assert sum(r.report is None for r in of_patient.values()) < 28


# --------------------------------------------------------------------------------------------------- folders


def images(root, *names):
    for name in names:
        layouts.draw(root / name)
    return f"folder={root}"


def splits(spec):
    return {split: [r.id for r in data.read_split(spec, split)] for split in data.SPLITS}


def test_a_folder_is_a_class_and_an_image_has_its_own_alone(tmp_path):
    spec = images(tmp_path, "train/Viral_Pneumonia/a.png", "train/Normal/b.png", "test/Third/deep/er/c.png")
    labels = {r.id: r.labels for r in everything(spec)}
    none = {"Normal": 0, "Third": 0, "Viral Pneumonia": 0}
    assert labels == {
        "train/Viral_Pneumonia/a.png": none | {"Viral Pneumonia": 1},
        "train/Normal/b.png": none | {"Normal": 1},
        "test/Third/deep/er/c.png": none | {"Third": 1},  # below its class, however deep
    }


@pytest.mark.parametrize("name", ["valid", "val", "Validation", "dev", "VALIDATE"])
def test_folders_of_splits_may_be_called_otherwise(name, tmp_path):
    spec = images(tmp_path, "Train/A/1.png", "Train/B/2.png", f"{name}/A/3.png", "TEST/B/4.png")
    assert splits(spec)["valid"] == [f"{name}/A/3.png"] and splits(spec)["test"] == ["TEST/B/4.png"]
    assert sorted(splits(spec)["train"]) == ["Train/A/1.png", "Train/B/2.png"]


def test_without_folders_of_splits_a_hash_draws_them(tmp_path):
    spec = images(tmp_path, *(f"{name}/{n}.png" for name in "AB" for n in range(30)))
    before = splits(spec)
    assert all(before.values()) and sum(map(len, before.values())) == 60
    images(tmp_path, "A/another.png")
    assert {split: set(part) - {"A/another.png"} for split, part in splits(spec).items()} == {
        split: set(part) for split, part in before.items()
    }


def test_without_a_folder_of_validation_a_tenth_of_train_takes_its_place(tmp_path, capsys):
    spec = images(
        tmp_path,
        *(f"{split}/{name}/{n}.png" for split in ("train", "test") for name in "AB" for n in range(40)),
    )
    found = splits(spec)
    assert len(found["test"]) == 80 and 1 <= len(found["valid"]) <= 20
    assert {id.split("/")[0] for id in found["train"] + found["valid"]} == {"train"}
    assert "no folder of validation" in capsys.readouterr().err


WRONG_FOLDERS = {  # images: what the refusal says
    ("A/1.png",): "has images of 1 classes, two are needed",
    ("train/A/1.png", "test/A/2.png"): "has images of 1 classes",
    ("A/1.dcm", "B/1.dcm"): "has images of 0 classes",
    ("1.png", "2.png"): "has images of 0 classes",
    ("train/A/1.png", "train/B/2.png", "extra/A/3.png"): "has folders of splits and others (extra)",
}


@pytest.mark.parametrize("names", WRONG_FOLDERS)
def test_a_folder_that_is_none_of_classes_is_refused(names, tmp_path):
    for name in names:
        layouts.write(tmp_path / name, "")
    said = refused(f"folder={tmp_path}")
    assert WRONG_FOLDERS[names] in said and str(tmp_path) in said


def test_what_archivers_and_systems_add_is_no_class(tmp_path):
    spec = images(tmp_path, "A/1.png", "B/1.png", "__MACOSX/A/1.png", ".git/x.png", "A/._1.png", "A/.x/2.png")
    (tmp_path / "notes").mkdir()
    assert sorted(by_id(spec)) == ["A/.x/2.png", "A/1.png", "B/1.png"]


def test_links_to_folders_are_followed_and_none_without_end(tmp_path):
    images(tmp_path / "disk", "A/1.png", "B/sub/2.png")
    (tmp_path / "data").mkdir()
    for name in "AB":
        (tmp_path / "data" / name).symlink_to(tmp_path / "disk" / name, target_is_directory=True)
    (tmp_path / "disk" / "B" / "back").symlink_to(tmp_path / "disk" / "B", target_is_directory=True)
    assert sorted(by_id(f"folder={tmp_path / 'data'}")) == ["A/1.png", "B/sub/2.png"]


# --------------------------------------------------------------------- no reports: trained and evaluated


def noise_in_folders(root, splits=data.SPLITS):
    for split, name, n in product(splits, ("Bright", "Dark", "Grey"), range(8)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        grey = np.random.default_rng(n).integers({"Bright": 128, "Dark": 0, "Grey": 64}[name], 192, (16, 16))
        Image.fromarray(grey.astype(np.uint8)).save(root / split / name / f"{n}.png")
    return f"folder={root}"


IMAGES_ALONE = {
    "folders of classes": noise_in_folders,
    "one finding, present or absent": lambda root: f"csv={layouts.one_finding(root, 40)}",
}


@pytest.mark.parametrize("kind", IMAGES_ALONE)
def test_images_and_labels_without_reports_are_trained_and_evaluated(kind, pretrain, tmp_path, capsys):
    assert pretrain("--data", IMAGES_ALONE[kind](tmp_path / "images")) == 0
    assert evaluate.main(["--checkpoint", str(tmp_path / "run")]) == 0
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text()).values()
    assert result["task"] == "zero-shot" and result["counts"]["reports"] == 0


def test_evaluation_reads_the_section_of_the_run_and_older_runs_read_both(tiny_run, run, tmp_path):
    state = evaluate.read_checkpoint(tiny_run / "last.pt")
    assert state["args"].pop("section") == "both"
    assert evaluate.run_from_checkpoint(state, "cpu").args.section == "both"
    args = Namespace(**{**vars(run.args), "section": "findings"})
    records = evaluate.load_split(
        Namespace(limit=None), run._replace(args=args), [build("openi", tmp_path)], "test"
    )
    assert {r.report for r in records if r.report} == {"Lungs are clear."}


def test_without_a_test_split_the_valid_split_is_evaluated_which_is_said(tiny_run, tmp_path, capsys):
    spec = noise_in_folders(tmp_path / "images", ("train", "valid"))
    run = ["--checkpoint", str(tiny_run), "--data", spec, "--out", str(tmp_path / "results.json")]
    assert evaluate.main([*run, "--task", "zero-shot"]) == 0
    assert "no test split; the valid split is used" in capsys.readouterr().err
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert result["chosen"] == "valid split" and result["counts"]["images"] == 24
    assert evaluate.main([*run, "--split", "test"]) == 2
    assert "no record in its split 'test'" in capsys.readouterr().err
