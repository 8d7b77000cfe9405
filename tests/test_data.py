"""Data sets as records, images as tensors, and records as batches."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

import data
import prompts
import train
from data import BadInput, Record
from umcl import UMCL, SwinTransformer, TextEncoder

SHARED = Path(__file__).parents[2] / "shared" / "data"


def record(findings=(), report=None, patient="1", absent=(), image=None):
    image = np.full((8, 8), 100, np.uint8) if image is None else image
    return Record(image, report, frozenset(findings), patient, "test", frozenset(absent))


# ------------------------------------------------------------------------------------------------- phantoms


def phantoms(split):
    return data.load_records(["phantom=16"], split)


def content(records):
    return [(r.image.tobytes(), r.report, r.findings, r.absent, r.patient) for r in records]


def test_phantoms_are_a_pure_function():
    assert content(data.phantom("16", "valid")) == content(data.phantom("16", "valid"))


def test_the_order_of_findings_does_not_change_a_phantom():
    names = ["Edema", "Cardiomegaly", "Pleural Effusion"]
    one, other = (data.draw_phantom(np.random.default_rng(0), n, 16)[0] for n in (names, names[::-1]))
    assert np.array_equal(one, other)


def test_a_phantom_is_the_same_patient_at_every_size():
    small, large = (data.phantom(size, "valid") for size in ("8", "24"))
    assert [(r.report, r.findings) for r in small] == [(r.report, r.findings) for r in large]


def test_what_follows_phantom_is_its_size():
    assert phantoms("valid")[0].image.shape == (16, 16)


def test_a_phantom_size_that_is_no_number_is_refused():
    with pytest.raises(BadInput, match="phantom=large"):
        data.load_records(["phantom=large"], "valid")


def test_no_two_phantoms_are_alike_within_a_split_or_across():
    images = [r.image.tobytes() for split in data.SPLITS for r in phantoms(split)]
    assert len(set(images)) == len(images)


def test_each_finding_shows_in_the_mean_of_its_images():
    images = np.array([r.image for r in phantoms("test")], float)
    for finding in data.PHANTOM_FINDINGS:
        has = np.array([finding in r.findings for r in phantoms("test")])
        error = images.std(0) * (1 / has.sum() + 1 / (~has).sum()) ** 0.5
        deviations = np.abs(images[has].mean(0) - images[~has].mean(0)) / error
        assert deviations.max() > 6  # in standard errors; chance gives 4 among 256 pixels


def test_each_test_phantom_has_one_finding_and_each_finding_200():
    counts = Counter(r.findings for r in phantoms("test"))
    assert counts == {frozenset({finding}): 200 for finding in data.PHANTOM_FINDINGS}


def test_all_test_phantoms_have_a_report():
    assert all(r.report for r in phantoms("test"))


def test_half_of_the_training_phantoms_have_a_report():
    assert sum(r.report is not None for r in phantoms("train")) == len(phantoms("train")) / 2


def test_training_phantoms_show_none_to_three_findings():
    assert {len(r.findings - {"No Finding"}) for r in phantoms("train")} == {0, 1, 2, 3}


def test_every_finding_of_a_phantom_is_known():
    names = [*data.PHANTOM_FINDINGS, "No Finding"]
    assert all(sorted([*r.findings, *r.absent]) == sorted(names) for r in phantoms("train"))


def test_no_report_denies_a_drawn_finding():
    for r in phantoms("train") + phantoms("test"):
        if r.report and "No Finding" not in r.findings:
            denials = [sentence for sentence in r.report.lower().split(".") if "no " in sentence]
            names = [name for finding in r.findings for name in data.ABSENT[finding]]
            assert not any(name in denial for name in names for denial in denials)
            assert not any(sentence in r.report for sentence in data.NORMAL)


def test_most_reports_mention_what_was_drawn():
    words = {"Cardiomegaly": ("heart", "cardi"), "Edema": ("edema", "congestion", "perihilar", "septal")}
    for finding, own in words.items():
        reports = [r.report.lower() for r in phantoms("test") if r.findings == {finding}]
        assert np.mean([any(word in report for word in own) for report in reports]) > 0.9


# --------------------------------------------------------------------------------------------------- splits


def cohort():
    """50 patients with 3 images each."""
    return [record(patient=str(n % 50)) for n in range(150)]


def patients(records, **options):
    splits = data.split_by_patient(records, **options)
    return {split: {r.patient for r in part} for split, part in splits.items()}


def test_no_patient_falls_into_two_splits():
    assert sum(map(len, patients(cohort()).values())) == 50


def test_splits_keep_every_record():
    records = cohort()
    kept = [r for part in data.split_by_patient(records).values() for r in part]
    assert sorted(map(id, kept)) == sorted(map(id, records))


def test_splits_have_their_shares_of_the_patients():
    found = patients(cohort(), shares=(0.6, 0.3, 0.1))
    assert {split: len(part) for split, part in found.items()} == {"train": 30, "valid": 15, "test": 5}


def test_same_seed_same_split_in_whatever_order_the_records_come():
    assert patients(cohort(), seed=3) == patients(cohort()[::-1], seed=3)


def test_another_seed_is_another_split():
    assert patients(cohort(), seed=3) != patients(cohort(), seed=4)


def test_a_patient_in_two_splits_is_refused():
    with pytest.raises(BadInput, match="patient 7 .*'train'.*'test'"):
        data.pick_split({"train": [record(patient="7")], "test": [record(patient="7")]}, "train")


# -------------------------------------------------------------------------------------------------- readers


def described(case, category="Head", caption="A caption."):
    """One line of MedPix 2.0."""
    row = {"U_id": case, "image": f"{case}_1", "Location Category": category}
    return json.dumps(row | {"Description": {"Caption": caption}}, ensure_ascii=False)


def medpix(root, **lines):
    """Writes {file: [line, ...]}, and one case into each file that is not named."""
    (root / "splitted_dataset").mkdir()
    for file in ("train", "dev", "test"):
        text = "\n".join(lines.get(file, [described(f"case-{file}")])) + "\n"
        (root / "splitted_dataset" / f"descriptions_{file}.jsonl").write_text(text, encoding="utf-8")
    return [f"medpix2={root}"]


def write_table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def nih(root, *rows):
    write_table(root / "Data_Entry_2017_v2020.csv", "Image Index,Finding Labels,Patient ID", *rows)
    return [f"nih-chestxray14={root}"]


def covid(root, *rows):
    header = "patientid,finding,view,modality,folder,filename,clinical_notes"
    write_table(root / "metadata.csv", header, *rows)
    return [f"covid-chestxray={root}"]


def everything(specs):
    """The records of all splits by the name of their image."""
    found = {}
    for split in data.SPLITS:
        try:
            found |= {r.image.name: r for r in data.load_records(specs, split)}
        except BadInput as error:
            assert "no record" in str(error)  # a split of so few patients may be empty
    return found


def test_medpix_gives_image_caption_category_and_case(tmp_path):
    (r,) = data.load_records(medpix(tmp_path, test=[described("MPX7", "Thorax", "A cyst.")]), "test")
    image = tmp_path / "images" / "MPX7_1.png"
    assert (r.image, r.report, r.findings, r.patient) == (image, "A cyst.", {"Thorax"}, "MPX7")


def test_medpix_rules_out_the_other_four_categories(tmp_path):
    (r,) = data.load_records(medpix(tmp_path, test=[described("MPX7", "Thorax")]), "test")
    assert r.absent == {"Abdomen", "Head", "Reproductive and Urinary System", "Spine and Muscles"}


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("valid", "dev"), ("test", "test")])
def test_medpix_splits_are_the_official_ones(tmp_path, split, file):
    assert [r.patient for r in data.load_records(medpix(tmp_path), split)] == [f"case-{file}"]


@pytest.mark.parametrize("caption", ["", " ", None])
def test_medpix_caption_without_a_word_is_no_report(tmp_path, caption):
    (r,) = data.load_records(medpix(tmp_path, test=[described("MPX7", caption=caption)]), "test")
    assert r.report is None


def test_medpix_caption_may_hold_a_unicode_line_break(tmp_path):
    caption = "One line\u2028and another."
    (r,) = data.load_records(medpix(tmp_path, test=[described("MPX7", caption=caption)]), "test")
    assert r.report == caption


@pytest.mark.parametrize(
    "bad",
    ['{"U_id": "MPX7", ', '{"U_id": "MPX7"}', "[1]"],
    ids=["cut", "without caption", "no object"],
)
def test_medpix_line_that_is_no_description_is_named_by_its_number(tmp_path, bad):
    with pytest.raises(BadInput, match="descriptions_dev.jsonl.*line 2"):
        data.load_records(medpix(tmp_path, dev=[described("MPX1"), bad]), "train")


def test_medpix_case_in_two_splits_is_refused(tmp_path):
    with pytest.raises(BadInput, match="MPX7"):
        data.load_records(medpix(tmp_path, train=[described("MPX7")], test=[described("MPX7")]), "test")


def test_nih_findings_are_split_at_the_bars(tmp_path):
    found = everything(nih(tmp_path, "a.png,Edema|Hernia,1", "b.png,No Finding,2"))
    assert found["a.png"].findings == {"Edema", "Hernia"} and found["b.png"].findings == {"No Finding"}


def test_nih_findings_that_an_image_does_not_name_are_absent(tmp_path):
    found = everything(nih(tmp_path, "a.png,Edema|Hernia,1", "b.png,No Finding,2", "c.png,Mass,3"))
    assert found["a.png"].absent == {"No Finding", "Mass"}


def test_nih_images_of_a_patient_stay_in_one_split(tmp_path):
    specs = nih(tmp_path, *(f"{n}.png,Mass,{n % 20}" for n in range(60)))
    owners = [{r.patient for r in data.load_records(specs, split)} for split in data.SPLITS]
    assert sum(map(len, owners)) == 20


@pytest.mark.parametrize("folder", ["images", "images_001/images", "images_012/images"])
def test_nih_images_are_found_in_one_folder_or_in_many(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "a.png").touch()
    assert everything(nih(tmp_path, "a.png,Mass,1"))["a.png"].image == tmp_path / folder / "a.png"


def test_nih_official_test_list_is_honoured(tmp_path):
    specs = nih(tmp_path, *(f"{n}.png,Mass,{n}" for n in range(40)))
    (tmp_path / "test_list.txt").write_text("3.png\n11.png\n")
    assert [r.image.name for r in data.load_records(specs, "test")] == ["3.png", "11.png"]


def test_nih_images_outside_the_test_list_are_for_training_and_validation(tmp_path):
    specs = nih(tmp_path, *(f"{n}.png,Mass,{n}" for n in range(40)))
    (tmp_path / "test_list.txt").write_text("3.png\n11.png\n")
    assert [len(data.load_records(specs, split)) for split in ("train", "valid")] == [34, 4]


def test_nih_patient_on_both_sides_of_the_test_list_is_refused(tmp_path):
    specs = nih(tmp_path, "a.png,Mass,1", "b.png,Mass,1")
    (tmp_path / "test_list.txt").write_text("b.png\n")
    with pytest.raises(BadInput, match="patient 1 "):
        data.load_records(specs, "test")


def test_covid_gives_image_notes_and_patient(tmp_path):
    r = everything(covid(tmp_path, "5,COVID-19,PA,X-ray,images,a.jpg,Fever."))["a.jpg"]
    assert (r.image, r.report, r.patient) == (tmp_path / "images" / "a.jpg", "Fever.", "5")


def test_covid_image_without_notes_has_no_report(tmp_path):
    assert everything(covid(tmp_path, "5,COVID-19,PA,X-ray,images,a.jpg, "))["a.jpg"].report is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Pneumonia/Viral/COVID-19", {"COVID-19"}),
        ("COVID-19", {"COVID-19"}),
        ('"COVID-19, ARDS"', {"COVID-19", "ARDS"}),
        ("No Finding", {"No Finding"}),
    ],
)
def test_covid_findings_are_read_from_new_and_from_old_releases(tmp_path, written, read):
    assert everything(covid(tmp_path, f"5,{written},AP,X-ray,images,a.jpg,"))["a.jpg"].findings == read


def test_covid_findings_that_an_image_does_not_name_are_unknown(tmp_path):
    found = everything(covid(tmp_path, "5,COVID-19,PA,X-ray,images,a.jpg,", "6,SARS,PA,X-ray,images,b.jpg,"))
    assert found["a.jpg"].absent == set()


@pytest.mark.parametrize(
    "row", ["COVID-19,PA,CT", "COVID-19,L,X-ray", "todo,PA,X-ray", "Unknown,PA,X-ray", ",PA,X-ray"]
)
def test_covid_rows_without_a_frontal_film_or_a_finding_are_left_out(tmp_path, row):
    specs = covid(tmp_path, f"5,{row},images,a.jpg,", "6,COVID-19,AP Supine,X-ray,images,b.jpg,")
    assert everything(specs).keys() == {"b.jpg"}


@pytest.mark.parametrize(
    ("name", "folder", "count"),
    [
        ("medpix2", "medpix2", 2050),
        ("nih-chestxray14", "nih-chestxray14-1000", 1000),
        ("covid-chestxray", "covid-chestxray-124", 124),
    ],
)
def test_every_image_of_the_real_data_is_found(name, folder, count):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the shared copy of {name} is not here")
    records = [r for split in data.SPLITS for r in data.load_records([f"{name}={SHARED / folder}"], split)]
    assert len(records) == count and all(r.image.is_file() and r.findings for r in records)


# ------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(BadInput, match="'mimic'.*phantom, chexpert, mimic-cxr"):
        data.load_records(["mimic"], "train")


FILES = [
    ("medpix2", "descriptions_train.jsonl"),
    ("nih-chestxray14", "Data_Entry_2017_v2020.csv"),
    ("covid-chestxray", "metadata.csv"),
]


@pytest.mark.parametrize(("name", "table"), FILES)
def test_a_data_set_without_a_folder_is_refused(name, table):
    with pytest.raises(BadInput, match=f"{name}=FOLDER"):
        data.load_records([name], "train")


@pytest.mark.parametrize(("name", "table"), FILES)
def test_a_missing_folder_is_named(tmp_path, name, table):
    with pytest.raises(BadInput, match="folder .*nowhere"):
        data.load_records([f"{name}={tmp_path / 'nowhere'}"], "train")


@pytest.mark.parametrize(("name", "table"), FILES)
def test_a_missing_table_is_named(tmp_path, name, table):
    with pytest.raises(BadInput, match=table):
        data.load_records([f"{name}={tmp_path}"], "train")


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [(*FILES[1], "Patient ID"), (*FILES[2], "finding"), (*FILES[2], "clinical_notes")],
)
def test_a_missing_column_is_named(tmp_path, name, table, column):
    header = ["Image Index", "Finding Labels", "Patient ID", "patientid", "finding", "view"]
    header += ["modality", "folder", "filename", "clinical_notes"]
    write_table(tmp_path / table, ",".join(h for h in header if h != column))
    with pytest.raises(BadInput, match=f"{table} has no column '{column}'"):
        data.load_records([f"{name}={tmp_path}"], "train")


def test_no_record_left_is_refused(tmp_path):
    with pytest.raises(BadInput, match="covid-chestxray.*'train'"):
        data.load_records(covid(tmp_path, "5,COVID-19,Axial,CT,images,a.jpg,"), "train")


def test_limit_takes_the_first_records_of_each_data_set(chests):
    specs = ["phantom=16", f"nih-chestxray14={chests}"]
    first, second = (data.load_records([spec], "train") for spec in specs)
    limited = data.load_records(specs, "train", 3)
    assert [r.patient for r in limited] == [r.patient for r in first[:3] + second[:3]]


# -------------------------------------------------------------------------------------------------- images

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def palette_image():
    """Place i of the palette is the grey 255 - i."""
    image = Image.fromarray(255 - GREY)
    image.putpalette([255 - i for i in range(256) for _ in "rgb"])
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("RGB"),
        Image.fromarray(GREY).convert("RGBA"),
        Image.fromarray(GREY).convert("LA"),
        palette_image(),
        Image.fromarray(GREY.astype(np.uint16) * 257),
    ],
    ids=["grey", "RGB", "RGBA", "LA", "palette", "16-bit"],
)
def test_png_of_every_kind_is_read_to_its_grey_values(image, tmp_path):
    image.save(tmp_path / "image.png")
    assert np.array_equal(data.read_image(tmp_path / "image.png"), GREY)


def test_one_bit_png_is_black_and_white(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "image.png")
    assert np.array_equal(data.read_image(tmp_path / "image.png"), np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_truncated_png_is_refused_wherever_it_is_cut(tmp_path, bits):
    Image.fromarray(GREY.astype(np.uint16) * 257 if bits == 16 else GREY).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for length in range(0, whole.rindex(b"IDAT"), 10):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(BadInput, match="cut.png"):
            data.read_image(tmp_path / "cut.png")


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"no image at all"])
def test_an_image_that_cannot_be_read_is_named_with_the_way_out(tmp_path, content):
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(BadInput, match="bad.png.*--skip-bad-images"):
        data.read_image(tmp_path / "bad.png")


@pytest.mark.parametrize("size", [(6, 2), (2, 6)], ids=["wide", "tall"])
def test_padding_keeps_the_content_in_the_centre(size):
    square = data.pad_to_square(Image.new("L", size, 255))[0]
    expected = torch.zeros(6, 6, dtype=torch.uint8)
    expected[2:4] = 255
    assert torch.equal(square, expected if size == (6, 2) else expected.T)


def test_evaluation_transform_shows_the_whole_image():
    image = np.zeros((20, 10), np.uint8)
    image[:4], image[-4:] = 255, 255
    shown = data.evaluation_transform(10)(Image.fromarray(image))[0]
    assert shown.shape == (10, 10) and shown[0, 5] == shown[-1, 5] == 255


def test_evaluation_transform_is_deterministic():
    transform, image = data.evaluation_transform(10), Image.fromarray(GREY)
    assert torch.equal(transform(image), transform(image))


def brighter_on_the_left(horizontal_flip):
    transform = data.training_transform(16, horizontal_flip)
    image = Image.fromarray(np.repeat(np.uint8([[255, 0]]), 8, axis=1).repeat(16, axis=0))
    torch.manual_seed(0)
    return {bool(t[..., :8].sum() > t[..., 8:].sum()) for t in (transform(image).float() for _ in range(30))}


def test_training_transform_keeps_left_and_right():
    assert brighter_on_the_left(horizontal_flip=False) == {True}


def test_horizontal_flip_swaps_them_now_and_then():
    assert brighter_on_the_left(horizontal_flip=True) == {True, False}


def test_training_transform_varies():
    transform, image = data.training_transform(16), Image.fromarray(GREY)
    assert not torch.equal(transform(image), transform(image))


# -------------------------------------------------------------------------------------------------- labels

NAMES = ["Cardiomegaly", "Edema", "No Finding"]


def labels(*findings, absent=()):
    present, ruled_out = data.label_matrices([record(findings, absent=absent)], NAMES)
    return present[0].tolist(), ruled_out[0].tolist()


def test_vocabulary_is_what_is_present_at_least_once():
    records = [record({"Mass", "Edema"}), record({"Edema"}, absent={"Hernia"})]
    assert data.vocabulary(records) == ["Edema", "Mass"]


def test_a_finding_that_its_source_does_not_annotate_is_neither_present_nor_absent():
    assert labels("Edema", absent=["Hernia"]) == ([False, True, False], [False, False, True])


def test_a_finding_that_its_source_rules_out_is_absent():
    assert labels("Edema", absent=["Cardiomegaly"]) == ([False, True, False], [True, False, True])


def test_no_finding_excludes_every_finding():
    assert labels("No Finding") == ([False, False, True], [True, True, False])


def test_every_finding_excludes_no_finding():
    assert labels("Hernia")[1] == [False, False, True]


def test_of_an_image_without_labels_nothing_is_known():
    assert labels() == ([False] * 3, [False] * 3)


# ------------------------------------------------------------------------------------------------- batches

MIXED = [
    record({"Edema"}, "The hila are hazy on both sides and the vessels are wide."),
    record({"Edema"}),
    record({"Cardiomegaly", "Edema"}, "Big heart."),
    record((), "A film of which nobody said anything else than this."),
    record({"No Finding"}, "Normal heart, normal lungs."),
    record({"Cardiomegaly"}),
]
TEXTS = [r.report for r in MIXED if r.report] + [prompts.label_prompt(name, "caption") for name in NAMES]
TOKENIZER = train.wrap_tokenizer(train.learn_tokenizer(TEXTS).to_str())


def prompt_tokens():
    return data.tokenize(TOKENIZER, [prompts.label_prompt(name, "caption") for name in NAMES], 32)


def collate(records=MIXED, label_prompts=True, pieces=4):
    images = data.Images(records, data.evaluation_transform(8))
    label_prompts = prompt_tokens() if label_prompts else None
    made = data.Collate(records, NAMES, label_prompts, TOKENIZER, 32, pieces)
    return made([images[i] for i in range(len(records))])


def read(tokens):
    return TOKENIZER.batch_decode(tokens.input_ids, skip_special_tokens=True)


def test_black_is_minus_two_and_white_two():
    batch = collate([record(image=np.full((8, 8), grey, np.uint8)) for grey in (0, 255)])
    images = data.normalise(batch.images)
    assert images.amin((1, 2, 3)).tolist() == images.amax((1, 2, 3)).tolist() == [-2, 2]


def test_a_batch_holds_the_labels_of_its_images():
    batch = collate()
    present, absent = data.label_matrices(MIXED, NAMES)
    assert torch.equal(batch.present, present) and torch.equal(batch.absent, absent)


def test_each_distinct_prompt_enters_once():
    batch = collate([record({"Edema"})] * 5 + [record({"Cardiomegaly"})] * 3)
    cardiomegaly, edema = (prompts.label_prompt(name, "caption") for name in NAMES[:2])
    assert read(batch.prompts) == [cardiomegaly, edema]


def test_distinct_prompts_give_the_features_of_encoding_each_pair():
    torch.manual_seed(0)
    swin = SwinTransformer(image_size=8, embed_dim=4, depths=(1,), num_heads=(1,), window_size=2)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = BertModel(BertConfig(vocab_size=len(TOKENIZER), **sizes))
    model = UMCL(swin, TextEncoder(bert), prompts.ContinuousPrompt(3, 8), embed_dim=8).eval()

    batch = collate()
    features = model.encode_prompt(*batch.prompts)[batch.prompt_index]
    for feature, finding in zip(features, batch.prompt_labels[batch.prompt_index], strict=True):
        text = prompts.label_prompt(NAMES[finding.nonzero().item()], "caption")
        alone = model.encode_prompt(*data.tokenize(TOKENIZER, [text], 32))[0]
        assert torch.allclose(feature, alone, atol=1e-6)  # padding changes the order of float32 sums, no more


def test_a_prompt_names_a_finding_that_its_image_has():
    for _ in range(20):
        batch = collate()
        assert (batch.prompt_labels[batch.prompt_index] & batch.present[batch.prompt_rows]).sum(1).eq(1).all()


def test_every_finding_of_an_image_gets_its_turn():
    torch.manual_seed(0)
    drawn = {tuple(collate([record({"Cardiomegaly", "Edema"})]).prompt_labels[0].tolist()) for _ in range(50)}
    assert drawn == {(True, False, False), (False, True, False)}


def test_the_prompt_of_an_unlabelled_image_never_enters():
    assert collate().prompt_rows.tolist() == [0, 1, 2, 4, 5]


def test_a_batch_without_labels_has_no_prompt():
    assert len(collate([record(report="Unknown.")] * 3).prompt_rows) == 0


def test_without_label_prompts_none_is_drawn():
    batch = collate(label_prompts=False)
    assert batch.prompts is None and len(batch.prompt_rows) == 0


def test_report_rows_point_to_the_image_of_each_report():
    batch = collate()
    texts = [MIXED[row].report for row in batch.report_rows]
    assert [t for piece in batch.reports for t in read(piece)] == read(data.tokenize(TOKENIZER, texts, 32))


def test_every_report_enters_once():
    assert sorted(collate().report_rows.tolist()) == [0, 2, 3, 4]


@pytest.mark.parametrize("pieces", [1, 2, 4, 9])
def test_reports_come_in_order_of_length(pieces):
    lengths = [n for piece in collate(pieces=pieces).reports for n in piece.attention_mask.sum(1).tolist()]
    assert lengths == sorted(lengths) and len(lengths) == 4


@pytest.mark.parametrize("pieces", [1, 2, 4, 9])
def test_each_piece_is_padded_to_its_longest(pieces):
    for piece in collate(pieces=pieces).reports:
        assert piece.input_ids.shape[1] == piece.attention_mask.sum(1).max()


def test_a_batch_without_reports_has_no_piece():
    assert collate([record({"Edema"})] * 3).reports == []


def test_unreadable_images_are_left_out(tmp_path):
    bad = record({"Edema"}, "Bad.", image=tmp_path / "bad.png")
    batch = collate([MIXED[0], bad, MIXED[2]])
    assert batch.rows.tolist() == [0, 2] and len(batch.images) == len(batch.present) == 2


def test_unreadable_images_are_named(tmp_path):
    (sentence,) = collate([MIXED[0], record(image=tmp_path / "bad.png")]).unreadable
    assert "bad.png" in sentence


def test_texts_of_what_is_left_belong_to_it(tmp_path):
    batch = collate([record({"Edema"}, "Bad.", image=tmp_path / "bad.png"), MIXED[4], MIXED[2]])
    assert batch.report_rows.tolist() == [1, 0] and batch.prompt_rows.tolist() == [0, 1]


def test_a_batch_of_unreadable_images_is_empty(tmp_path):
    batch = collate([record({"Edema"}, "Bad.", image=tmp_path / "bad.png")] * 3)
    assert len(batch.rows) == len(batch.images) == len(batch.prompt_rows) == len(batch.reports) == 0


def test_long_texts_are_cut_but_end_in_sep():
    ids = data.tokenize(TOKENIZER, [TEXTS[0]], 6).input_ids[0]
    whole = data.tokenize(TOKENIZER, [TEXTS[0]], 99).input_ids[0]
    assert ids.tolist() == [*whole[:5].tolist(), TOKENIZER.sep_token_id]


def test_short_texts_are_padded_and_masked():
    ids, mask = data.tokenize(TOKENIZER, ["edema", TEXTS[0]], 99)
    assert mask[0].sum() < mask[1].sum() == ids.shape[1]
    assert torch.equal(mask == 0, ids == TOKENIZER.pad_token_id)
