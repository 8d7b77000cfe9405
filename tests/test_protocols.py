"""Protocols: lists that anyone can rebuild, and runs that keep their patients out."""

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from layouts import covid_radiography, real, rsna, write_table

import data
import evaluate
from data import BadInput, Record


def record(findings=(), uncertain=(), view="PA", absent=(), id="", patient="1", source="test"):
    labels = dict.fromkeys(absent, 0) | dict.fromkeys(uncertain, -1) | dict.fromkeys(findings, 1)
    return Record(Path(id), None, labels, patient=patient, source=source, id=id, view=view)


@pytest.fixture
def program(capsys):
    """data.py with these arguments -> (exit status, lines printed, the one line of errors or None)."""

    def run(*arguments):
        status = data.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        errors = printed.err.splitlines()
        assert len(errors) == bool(status)  # a refusal is one sentence
        return status, printed.out.splitlines(), errors[0] if errors else None

    return run


# ----------------------------------------------------------------------------------------- the rules of 5x200


KINDS = {  # what an image shows: (record, GLoRIA's rule takes it as edema, MedCLIP's does)
    "edema alone": (record({"Edema"}), True, True),
    "others ruled out": (record({"Edema"}, absent=set(data.CHEXPERT) - {"Edema"}), True, True),
    "the word normal": (record({"Edema", "No Finding"}), True, True),
    "a film from the front": (record({"Edema"}, view="FRONTAL"), True, True),
    "another perhaps": (record({"Edema"}, uncertain={"Fracture"}), False, True),
    "another task perhaps": (record({"Edema"}, uncertain={"Atelectasis"}), False, True),
    "a device perhaps": (record({"Edema"}, uncertain={"Support Devices"}), False, True),
    "a lateral film": (record({"Edema"}, view="LATERAL"), False, True),
    "a film of unknown view": (record({"Edema"}, view="UNKNOWN"), False, True),
    "a device, too": (record({"Edema", "Support Devices"}), False, False),
    "another task, too": (record({"Edema", "Atelectasis"}), False, False),
    "another finding, too": (record({"Edema", "Fracture"}), False, False),
    "edema perhaps": (record(uncertain={"Edema"}), False, False),
    "a device alone": (record({"Support Devices"}), False, False),
    "nothing": (record(), False, False),
}
RULES = {"gloria": (data.gloria_5x200, 200), "medclip": (data.medclip_5x200, 400)}


def cohort(number, short=0):
    """So many images of each task and nothing else; of edema some fewer."""
    tasks = [task for task in data.COMPETITION for _ in range(number - short * (task == "Edema"))]
    return [record({task}, id=f"{n}.png", patient=str(n)) for n, task in enumerate(tasks)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_takes_an_image_or_does_not(kind, rule):
    draw, number = RULES[rule]
    shown, *taken = KINDS[kind]
    records = [*cohort(number, short=1), shown]
    if taken[rule == "medclip"]:
        assert len(draw(records, 0)) == 1000
        return
    with pytest.raises(BadInput, match=f"only {number - 1} images show Edema and nothing else; {number} are"):
        draw(records, 0)


def test_gloria_draws_200_of_each_task_by_one_generator_over_the_candidates_in_their_order():
    records, rng = cohort(250), np.random.RandomState(3)
    places = [250 * task + place for task in range(5) for place in rng.choice(250, 200, replace=False)]
    assert data.gloria_5x200(records, 3) == [records[place] for place in places]


# --------------------------------------------------------------------------------------------- rsna and covid


def pneumonia(positive, negative):
    kinds = [{"Pneumonia"}] * positive + [set()] * negative
    return [record(findings, id=f"{n:05}") for n, findings in enumerate(kinds)]


@pytest.mark.parametrize("number", [3, 7, 20, 101])
def test_gloria_split_leaves_no_image_out_and_none_in_two_parts(number):
    records = pneumonia(number, 0)
    parts = data.gloria_split(records).values()
    assert sorted(r.id for part in parts for r in part) == [r.id for r in records]


def test_balanced_takes_every_image_with_the_finding_and_as_many_without_or_a_number_of_these():
    drawn = data.balanced(pneumonia(6, 14), "Pneumonia", 0)
    assert len({r.id for r in drawn}) == 12 and sum("Pneumonia" in r.labels for r in drawn) == 6
    drawn = data.balanced(pneumonia(60, 140), "Pneumonia", 0, 50)
    assert len({r.id for r in drawn}) == 50 and 10 < sum("Pneumonia" in r.labels for r in drawn) < 40


@pytest.mark.parametrize(
    ("others", "number", "sentence"),
    [(5, None, "only 5 images show no Pneumonia; 6 are needed"),
     (14, 13, "only 12 images are there; 13 are needed")],
)  # fmt: skip
def test_balanced_of_too_few_images_is_refused(others, number, sentence):
    with pytest.raises(BadInput, match=sentence):
        data.balanced(pneumonia(6, others), "Pneumonia", 0, number)


def test_rsna_has_lists_of_all_of_as_many_without_pneumonia_and_of_its_splits(tmp_path, program):
    table, ids = rsna(tmp_path) / "stage_2_train_labels.csv", {}
    for name in ("all", "balanced", *(f"gloria-{split}" for split in data.SPLITS)):
        assert program("protocol", f"rsna-{name}", "--table", table, "--out", tmp_path / name)[0] == 0
        ids[name] = data.read_ids(tmp_path / name)
    assert len(set(ids["all"])) == len(ids["all"]) == 20
    assert len(set(ids["balanced"])) == len(ids["balanced"]) == 12
    for split in data.SPLITS:
        assert ids[f"gloria-{split}"] == [r.id for r in data.rsna(tmp_path, split)] != []
    table.write_text("patientId,Target\n")
    assert "no image for rsna-all" in program("protocol", "rsna-all", "--table", table, "--out", "no")[2]


def test_covid_normal_reads_two_of_the_four_classes(tmp_path):
    covid_radiography(tmp_path)
    records = data.PROTOCOLS["covid-normal"].read(tmp_path)
    assert {r.id.partition("-")[0] for r in records} == {"COVID", "Normal"} and len(records) == 6


# ----------------------------------------------------------------------------------------------- command line


def chexpert_table(path, per_task=201):
    """CheXpert's table with so many patients of each task, each with a lateral film, too."""
    rows = []
    for n, task in enumerate(task for task in data.COMPETITION for _ in range(per_task)):
        for view, file in (("AP", "view1_frontal"), ("", "view2_lateral")):
            image = f"CheXpert-v1.0-small/train/patient{n:05}/study1/{file}.jpg"
            rows.append({"Path": image, "AP/PA": view, task: "1.0"})
    write_table(path, rows, ["Path", "AP/PA", *data.CHEXPERT])
    return path


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    """A table of 2,010 images; nobody writes beside it."""
    return chexpert_table(tmp_path_factory.mktemp("chexpert") / "train.csv")


def draw_list(program, table, out, *flags, name="chexpert-5x200"):
    return program("protocol", name, "--table", table, "--out", out, *flags)


def sha256(printed):
    return printed[-1].removeprefix("SHA-256 ")


def test_the_command_says_how_many_are_listed_and_left_and_the_sha256(chexpert, tmp_path, program):
    _, printed, _ = draw_list(program, chexpert, tmp_path / "ids.txt")
    assert sha256(printed) == hashlib.sha256((tmp_path / "ids.txt").read_bytes()).hexdigest()
    assert printed[0] == f"chexpert-5x200: 1,000 ids of 1,000 patients in {tmp_path / 'ids.txt'}"
    assert printed[1] == "left without these patients: 10 images of 5 patients"


@pytest.mark.parametrize("out", ["train.csv", "another list"])
def test_a_file_that_is_not_this_list_is_never_replaced(chexpert, tmp_path, program, out):
    table = Path(shutil.copy(chexpert, tmp_path / "train.csv"))
    (tmp_path / "another list").write_text("x.png")
    before = (tmp_path / out).read_bytes()
    status, _, error = draw_list(program, table, tmp_path / out)
    assert status == 2 and "is there and is not this list" in error
    assert (tmp_path / out).read_bytes() == before


def mimic(folder):
    """MIMIC-CXR-JPG's three tables: 200 validate or test images of each task and as many for training."""
    rows = []
    for n, task in enumerate(task for task in data.COMPETITION for _ in range(400)):
        split = "train" if n % 2 else ("validate", "test")[n % 4 // 2]
        row = {"dicom_id": f"d{n}", "subject_id": 10**7 + n, "study_id": 5 * 10**7 + n, "split": split}
        rows.append(row | {"ViewPosition": "PA", task: "1.0"})
    header = ["dicom_id", "subject_id", "study_id", "split", "ViewPosition", *data.CHEXPERT]
    for name in ("split", "chexpert", "metadata"):  # each needs some of the columns
        write_table(folder / f"mimic-cxr-2.0.0-{name}.csv", rows, header)
    return folder / "mimic-cxr-2.0.0-metadata.csv"


@pytest.mark.parametrize("table", ["metadata", "split", "chexpert"])
def test_mimic_5x200_takes_official_validate_and_test_studies_alone(table, tmp_path, program):
    table = mimic(tmp_path).with_name(f"mimic-cxr-2.0.0-{table}.csv")
    draw_list(program, table, tmp_path / "ids.txt", name="mimic-5x200")
    numbers = {int(id.split("/d")[1].removesuffix(".jpg")) for id in data.read_ids(tmp_path / "ids.txt")}
    assert numbers == set(range(0, 2000, 2))


# ------------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("text", ["b/1\na", "b/1\na\n", "b/1\r\na\r\n", "b/1\n\na"])
def test_a_list_is_read_whatever_ends_its_lines(tmp_path, text):
    (tmp_path / "ids.txt").write_bytes(text.encode())
    assert data.read_ids(tmp_path / "ids.txt") == ["b/1", "a"]
    assert data.ids_sha256(["b/1", "a"]) != data.ids_sha256(["a", "b/1"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "is not there"), (b"\xff\xfe\0", "not UTF-8"), (b"", "is empty"), (b"\n \n", "is empty")],
)
def test_a_list_that_is_none_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(BadInput, match=f"ids.txt.* {sentence}"):
        data.read_ids(tmp_path / "ids.txt")


def test_hold_out_drops_every_image_of_a_listed_patient_and_keeps_those_of_other_data_sets():
    records = [record(id=str(n), patient=str(n % 4)) for n in range(12)]
    others = [record(id=f"other-{n}", patient=str(n % 4), source="openi") for n in range(4)]
    kept = data.hold_out([*records, *others], records[1:3])
    assert [r.id for r in kept] == ["0", "3", "4", "7", "8", "11", *(r.id for r in others)]


# -------------------------------------------------------------------------------- lists in train and evaluate


@pytest.fixture
def films(tmp_path):
    """A table of 10 patients with three images each, one of them lateral; drawn nowhere -> its spec."""
    rows = ["image,patient,view,split,Edema,No Finding"]
    for n in range(30):
        split = ("train", "train", "train", "valid", "test")[n % 10 % 5]
        view = "LATERAL" if n >= 20 else "PA"
        rows.append(f"{n}.png,{n % 10},{view},{split},{('1', '-1')[n % 2]},{('', '1')[n % 2]}")
        data.Image.new("L", (8, 8), 8 * n).save(tmp_path / f"{n}.png")
    (tmp_path / "films.csv").write_text("\n".join(rows) + "\n")
    return f"csv={tmp_path / 'films.csv'}"


@pytest.fixture
def listing(tmp_path):
    """Ids -> the file of their list."""

    def write(*ids):
        (tmp_path / "ids.txt").write_text("\n".join(ids))
        return tmp_path / "ids.txt"

    return write


def listed(specs, ids):
    records = [r for found in data.read_records(specs, "all").values() for r in found]
    return data.pick_listed(records, ids, "the films")


def test_listed_records_come_in_the_order_of_the_list_from_all_splits_and_views(films):
    ids = ["24.png", "0.png", "3.png"]  # test and lateral, train, valid
    assert [r.id for r in listed([films], ids)] == ids


def test_an_id_that_no_image_has_is_shown_beside_one_that_an_image_has(films):
    sentence = r"2 of the 3 listed ids are not in the films.*'x/0.png'.*looks like '0.png'"
    with pytest.raises(BadInput, match=sentence):
        listed([films], ["0.png", "x/0.png", "x/1.png"])


def test_a_run_leaves_out_the_patients_of_several_lists_and_says_how_many_images_that_costs(
    films, listing, pretrain, capsys, tmp_path
):
    (tmp_path / "more.txt").write_text("3.png")
    assert pretrain("--data", films, "--hold-out", listing("0.png", "24.png"), tmp_path / "more.txt") == 0
    printed = capsys.readouterr().out
    assert "train: of 12 images 2 are held out by patient" in printed
    assert "valid: of 4 images 2 are held out by patient" in printed


def test_the_data_of_a_list_are_refused_without_the_list(films, pretrain, capsys):
    assert pretrain("--data", films, "--hold-out-data", films) == 2
    assert "--hold-out-data says where the images of --hold-out are" in capsys.readouterr().err


def test_a_list_of_another_data_set_keeps_the_patients_of_its_copies_out(
    films, listing, pretrain, tmp_path, capsys
):
    """The patient of the copy has another frontal image."""
    chest = data.Image.fromarray(data.draw_phantom(np.random.default_rng(0), (), 160)[0])
    chest.save(tmp_path / "0.png")
    chest.resize((100, 100)).save(tmp_path / "copy.png")
    (tmp_path / "others.csv").write_text("image\ncopy.png\n")
    flags = ["--hold-out", listing("copy.png"), "--hold-out-data", f"csv={tmp_path / 'others.csv'}"]
    assert pretrain("--data", films, *flags) == 0
    assert "train: of 12 images 0 are held out by patient and 2 more by picture" in capsys.readouterr().out


def test_a_run_may_hold_out_all_that_would_choose_the_epoch(films, listing, pretrain, capsys):
    assert pretrain("--data", films, "--hold-out", listing("3.png", "8.png")) == 0
    assert "nothing to validate by" in capsys.readouterr().out


def test_a_list_that_a_run_cannot_hold_out_is_refused(films, listing, pretrain, capsys, tmp_path):
    unknown, everybody = ["x.png"], [f"{n}.png" for n in range(10)]
    for ids, sentence in ((unknown, "1 of the 1 listed ids are not"), (everybody, "no training record")):
        assert pretrain("--data", films, "--hold-out", listing(*ids)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("train.py: ") and sentence in line
    (tmp_path / "ids.txt").unlink()
    assert pretrain("--hold-out", tmp_path / "ids.txt") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"train.py: {tmp_path / 'ids.txt'} is not there"


def test_a_listed_id_of_two_images_is_refused(films, tmp_path):
    copied = tmp_path / "copy" / "films.csv"
    copied.parent.mkdir()
    copied.write_bytes(Path(films.partition("=")[2]).read_bytes())
    with pytest.raises(data.BadInput, match="has the image '0.png' 2 times"):
        listed([films, f"csv={copied}"], ["0.png"])


@pytest.fixture
def assess(tiny_run, films):
    """evaluate.py on the films, with further flags -> exit status."""
    flags = ["--checkpoint", tiny_run, "--data", films, "--task", "zero-shot"]
    return lambda *more: evaluate.main([str(flag) for flag in (*flags, *more)])


def test_evaluation_takes_exactly_the_listed_images_and_notes_that_they_were_not_held_out(
    assess, listing, films, capsys
):
    ids = listing("24.png", "1.png", "3.png")
    assert assess("--ids", ids) == 0
    printed = capsys.readouterr()
    assert f"list {ids} of {films}, 3 images" in printed.out
    assert "best.pt did not hold out the patients of" in printed.err


def test_evaluation_of_a_held_out_list_has_no_note(films, listing, pretrain, tmp_path, capsys):
    ids = listing("0.png", "1.png")
    pretrain("--data", films, "--hold-out", ids)
    capsys.readouterr()
    flags = ["--checkpoint", tmp_path / "run", "--task", "zero-shot", "--ids", ids, "--device", "cpu"]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    assert "note:" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ real tables


@pytest.fixture(scope="module")
def real_chexpert():
    return data.chexpert_table(real("metadata", "chexpert_train.csv.gz"))


@pytest.fixture(scope="module")
def real_rsna():
    return data.rsna_table(real("metadata", "kaggle_stage_2_train_labels.csv.zip"))


COUNTS = """
No Finding: 22381 0 0 201033, 16974 0 0
Enlarged Cardiomediastinum: 10798 21638 12403 178575, 9187 15345 10286
Cardiomegaly: 27000 11116 8087 177211, 23385 7869 6707
Lung Opacity: 105581 6599 5598 105636, 94211 5051 4431
Lung Lesion: 9186 1270 1488 211470, 7040 776 1108
Edema: 52246 20726 12984 137458, 49675 15915 11818
Consolidation: 14783 28097 27742 152792, 12983 19608 24381
Pneumonia: 6039 2799 18770 195806, 4675 1875 15981
Atelectasis: 33376 1328 33739 154971, 29720 1025 29863
Pneumothorax: 19448 56341 3145 144480, 17693 47823 2708
Pleural Effusion: 86187 35396 11628 90203, 76899 25299 9578
Pleural Other: 3523 316 2653 216922, 2505 209 1812
Fracture: 9040 2512 642 211220, 7436 1993 499
Support Devices: 116001 6137 1079 100197, 107170 5340 915
"""  # 1, 0, -1 and blank in all images; 1, 0 and -1 in the frontal ones


def test_real_chexpert_has_its_labels_by_state(real_chexpert):
    frontal = [r for r in real_chexpert if r.view in data.FRONTAL]
    counts = [
        Counter(label for r in records for label in r.labels.items()) for records in (real_chexpert, frontal)
    ]
    for line in COUNTS.strip().splitlines():
        name, _, figures = line.partition(": ")
        found = [" ".join(str(count[name, state]) for state in data.STATES) for count in counts]
        found[1] = found[1].rpartition(" ")[0]
        assert f"{name}: {', '.join(found)}" == f"{name}: {figures}"


def test_real_chexpert_has_its_patients_and_views(real_chexpert):
    assert len(real_chexpert) == 223414 and len({r.patient for r in real_chexpert}) == 64540
    views = {"AP": 161590, "PA": 29420, "FRONTAL": 17, "LATERAL": 32387}
    assert Counter(r.view for r in real_chexpert) == views


LISTS = {  # protocol: SHA-256 in REPRODUCE.md
    "chexpert-5x200": "acd963617683c7dfeab92be9d00c2aade67e4ea33d04e1b5738274d196068f65",
    "chexpert-5x200-medclip": "30b034fbc9407bdd95c94dc83432cd28842f5d1ad98b1873f620abdbaaae5592",
    "rsna-gloria-train": "3636029f7e38baf996884513a1671f4298c33582e59b01358aca9a8ee5a966e1",
    "rsna-gloria-valid": "5c1f9790ea1d2a2eac0dea3ea12b61226ca079af771207ae5cbfe065319a90da",
    "rsna-gloria-test": "03176609aaf3ffe0219f67bd5ddb62217c857aed7d386572d77cc414e9547f77",
    "rsna-all": "6966677a13e865c1a2c39331ba5053080540fbbe267905d539760c97c7005ea7",
    "rsna-balanced": "759f1af35db6974b5540849d3283c296858da04a717f24831bc01d166f63e75e",
    "covid-normal": "b2876d7a43b91039aba58a43e2aa1276040e1044ef6a5b60fb2a52d03193244f",
}


@pytest.mark.parametrize("name", LISTS)
def test_real_tables_give_the_published_lists(name, real_chexpert, real_rsna):
    protocol = data.PROTOCOLS[name]
    tables = {"chexpert": lambda: real_chexpert, "rsna": lambda: real_rsna}
    tables["covid"] = lambda: protocol.read(real("covid-radiography"))  # in the order of the images' numbers
    chosen = protocol.rule(tables[name.partition("-")[0]]())
    assert data.ids_sha256([r.id for r in chosen]) == LISTS[name]


def test_real_chexpert_without_the_patients_of_5x200_is_what_is_left(real_chexpert):
    chosen = data.gloria_5x200(real_chexpert, 0)
    left = data.hold_out(real_chexpert, chosen)
    numbers = (len({r.patient for r in chosen}), len(left), len({r.patient for r in left}))
    assert numbers == (966, 216_478, 63_574)
