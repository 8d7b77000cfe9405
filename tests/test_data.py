"""Records and labels, images as tensors, records as batches, phantoms."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import data
import evaluate
import prompts
import train
from data import BadInput, Record
from umcl import UMCL, SwinTransformer, TextEncoder


def record(findings=(), report=None, patient="1", absent=(), image=None):
    image = np.full((8, 8), 100, np.uint8) if image is None else image
    labels = dict.fromkeys(sorted(absent), 0) | dict.fromkeys(sorted(findings), 1)
    return Record(image, report, labels, patient, "test")


# -------------------------------------------------------------------------------------------- labels, settled


def settled(policy, **values):
    """Cells of a row -> what the policy makes of them."""
    labels = data.read_labels(tuple(values), tuple(values.values()))
    r = data.settle(Record(Path("a.png"), None, labels, patient="1", source="test"), policy)
    assert not r.labels.keys() - values.keys()
    return {
        name: {1: "present", 0: "absent"}[r.labels[name]] if name in r.labels else "unknown"
        for name in values
    }


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


def test_of_an_uncertain_finding_the_competition_keeps_three():
    outcomes = {name: settled("competition", **{name: "-1"})[name] for name in data.CHEXPERT[1:]}
    present = dict.fromkeys(("Atelectasis", "Edema", "Pleural Effusion"), "present")
    assert outcomes == dict.fromkeys(data.CHEXPERT[1:], "absent") | present


@pytest.mark.parametrize("policy", data.UNCERTAIN)
def test_settling_keeps_all_but_the_states_and_makes_no_blank_image_normal(policy):
    names = {"image": Path("a"), "report": "text", "patient": "1", "source": "s", "id": "i", "view": "PA"}
    r = data.settle(Record(**names, labels={str(state): state for state in data.STATES}), policy)
    assert {name: getattr(r, name) for name in names} == names and {*r.labels.values()} == {1, 0}
    assert set(settled(policy, **dict.fromkeys(data.CHEXPERT, "")).values()) == {"unknown"}


@pytest.mark.parametrize(
    ("policy", "outcome"), [("ignore", "unknown"), ("zeros", "unknown"), ("ones", "absent")]
)
def test_beside_an_uncertain_finding_a_blank_is_absent_where_that_counts_as_present(policy, outcome):
    assert settled(policy, Edema="-1", Fracture="")["Fracture"] == outcome


TREE = {  # label, another one's cell: what a blank parent is
    ("Lung Opacity", "Edema", "1"): "unknown",
    ("Lung Opacity", "Pneumonia", "1"): "unknown",
    ("Consolidation", "Pneumonia", "1"): "unknown",
    ("Enlarged Cardiomediastinum", "Cardiomegaly", "1"): "unknown",
    ("Lung Opacity", "Atelectasis", "-1"): "unknown",
    ("Lung Opacity", "Edema", "0"): "unknown",
    ("Lung Opacity", "Fracture", "1"): "absent",
    ("Edema", "Lung Opacity", "1"): "absent",
}


@pytest.mark.parametrize("case", TREE)
def test_a_blank_parent_of_a_finding_that_may_be_present_is_unknown_unless_its_absence_is_said(case):
    parent, child, cell = case
    assert settled("ignore", **{parent: "", child: cell, "Support Devices": "1"})[parent] == TREE[case]
    assert settled("ignore", **{parent: "0", child: cell, "Support Devices": "1"})[parent] == "absent"


@pytest.mark.parametrize("policy", data.UNCERTAIN)
def test_a_device_alone_rules_nothing_out(policy):
    beside = {
        name: settled(policy, **{"Support Devices": "1", name: ""})[name] for name in data.CHEXPERT[:-1]
    }
    assert beside == dict.fromkeys(data.CHEXPERT[:-1], "unknown")


NAMES = ["Cardiomegaly", "Edema", "No Finding", "Support Devices"]
KNOWN = {  # what an image shows, and what is ruled out beside it: (present, absent), in the order of NAMES
    ("Edema",): ("0100", "0010"),
    ("Edema", "Support Devices"): ("0101", "0010"),
    ("Edema", "-Cardiomegaly", "-Hernia"): ("0100", "1010"),
    ("Hernia",): ("0000", "0010"),
    ("No Finding",): ("0010", "1100"),
    ("Support Devices",): ("0001", "0000"),
    (): ("0000", "0000"),
}


@pytest.mark.parametrize("names", KNOWN, ids=lambda names: " ".join(names) or "nothing")
def test_what_is_known_of_each_finding_follows_from_the_labels(names):
    absent = [name[1:] for name in names if name[0] == "-"]
    matrices = data.label_matrices([record([n for n in names if n[0] != "-"], absent=absent)], NAMES)
    assert tuple("".join(str(int(cell)) for cell in matrix[0]) for matrix in matrices) == KNOWN[names]


def test_vocabulary_is_what_is_present_at_least_once():
    records = [record({"Mass", "Edema"}), record({"Edema"}, absent={"Hernia"})]
    assert data.vocabulary(records) == ["Edema", "Mass"]


# ----------------------------------------------------------------------------------------------------- splits


def patients(records, **options):
    splits = data.split_by_patient(records, **options)
    return {split: {r.patient for r in part} for split, part in splits.items()}


def test_splits_keep_every_record_and_each_patient_in_one():
    cohort = [record(patient=str(n % 500)) for n in range(1500)]
    kept = [r for part in data.split_by_patient(cohort).values() for r in part]
    assert sorted(map(id, kept)) == sorted(map(id, cohort))
    assert sum(map(len, patients(cohort).values())) == 500
    assert patients(cohort) == patients(cohort[::-1])


def test_a_new_patient_changes_nobodys_split():
    cohort = [record(patient=f"patient {n}") for n in range(50)]
    before = patients(cohort)
    after = patients([record(patient="another"), *cohort])
    assert {split: part - {"another"} for split, part in after.items()} == before
    assert patients([record(patient="Zoë")])["valid"] == {"Zoë"}  # on every machine, in every version


def test_a_split_into_which_no_patient_falls_is_named(capsys):
    data.note.cache_clear()
    patients([record(patient="Zoë")])
    assert "of 1 patients none is drawn into train or test" in capsys.readouterr().err
    patients([record(patient=str(n)) for n in range(60)], cuts=(0.9, 1.0))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("cuts", [(0.7, 0.8), (0.9, 1.0), (0.6, 0.9)])
def test_the_cuts_are_shares_of_the_patients(cuts):
    found = patients([record(patient=f"p{n}") for n in range(4000)], cuts=cuts)
    shares = {"train": cuts[0], "valid": cuts[1] - cuts[0], "test": 1 - cuts[1]}
    assert {split: len(part) / 4000 for split, part in found.items()} == pytest.approx(shares, abs=0.02)


# ---------------------------------------------------------------------------------------------------- batches


MIXED = [
    record({"Edema"}, "The hila are hazy on both sides and the vessels are wide."),
    record({"Edema"}),
    record({"Cardiomegaly", "Edema"}, "Big heart."),
    record((), "A film of which nobody said anything else than this."),
    record({"No Finding"}, "Normal heart, normal lungs."),
    record({"Cardiomegaly"}),
]
TEXTS = [r.report for r in MIXED if r.report] + [prompts.label_prompt(name, "caption") for name in NAMES]
TOKENIZER = evaluate.wrap_tokenizer(train.learn_tokenizer(TEXTS).to_str())


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
    present, absent = data.label_matrices(MIXED, NAMES)
    assert torch.equal(collate().present, present) and torch.equal(collate().absent, absent)


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
    features = model.encode_prompt(*batch.prompts)[batch.prompt_pairs.texts]
    for feature, finding in zip(features, batch.prompt_pairs.text_ids, strict=True):
        text = prompts.label_prompt(NAMES[finding], "caption")
        alone = model.encode_prompt(*data.tokenize(TOKENIZER, [text], 32))[0]
        assert torch.allclose(feature, alone, atol=1e-6)  # padding changes the order of float32 sums, no more


def test_a_prompt_names_a_finding_that_its_image_has_and_each_gets_its_turn():
    torch.manual_seed(0)
    drawn = set()
    for _ in range(20):
        batch = collate()
        named = batch.prompt_pairs.text_ids
        assert batch.present[batch.prompt_pairs.images, named].all()
        drawn.add(named[2].item())  # of the image with cardiomegaly and edema
    assert drawn == {0, 1}


def test_what_an_image_lacks_does_not_enter():
    assert collate().prompt_pairs.images.tolist() == [0, 1, 2, 4, 5]
    assert len(collate([record(report="Unknown.")] * 3).prompt_pairs.images) == 0
    assert collate([record({"Edema"})] * 3).reports == []
    batch = collate(label_prompts=False)
    assert batch.prompts is None and len(batch.prompt_pairs.images) == 0


def test_every_report_enters_once_and_its_row_points_to_its_image():
    batch = collate()
    assert sorted(batch.report_pairs.images.tolist()) == [0, 2, 3, 4]
    texts = [MIXED[row].report for row in batch.report_pairs.images]
    assert [t for piece in batch.reports for t in read(piece)] == read(data.tokenize(TOKENIZER, texts, 32))


@pytest.mark.parametrize("pieces", [1, 2, 4, 9])
def test_reports_come_in_order_of_length_and_each_piece_is_padded_to_its_longest(pieces):
    lengths = [piece.attention_mask.sum(1) for piece in collate(pieces=pieces).reports]
    assert torch.cat(lengths).tolist() == sorted(torch.cat(lengths).tolist()) and len(torch.cat(lengths)) == 4
    for piece, found in zip(collate(pieces=pieces).reports, lengths, strict=True):
        assert piece.input_ids.shape[1] == found.max()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_a_loop_over_batches_by_its_sentence(tmp_path, workers):
    records = [*MIXED[:2], record(image=tmp_path / "bad.png")]
    items = data.Images(records, data.evaluation_transform(8))
    collate_fn = data.Collate(records, NAMES, None, TOKENIZER, 32)
    loader, seen = torch.utils.data.DataLoader(items, 1, collate_fn=collate_fn, num_workers=workers), []
    with pytest.raises(BadInput, match="bad.png cannot be read .*`python data.py pack`"):
        for batch in data.readable(loader):
            seen += batch.rows.tolist()
    assert seen == [0, 1]


def test_long_texts_are_cut_but_end_in_sep_and_short_ones_are_padded_and_masked():
    ids, mask = data.tokenize(TOKENIZER, ["edema", TEXTS[0]], 99)
    assert mask[0].sum() < mask[1].sum() == ids.shape[1]
    assert torch.equal(mask == 0, ids == TOKENIZER.pad_token_id)
    short = data.tokenize(TOKENIZER, [TEXTS[0]], 6).input_ids[0]
    assert short.tolist() == [*ids[1, :5].tolist(), TOKENIZER.sep_token_id]


# --------------------------------------------------------------------------------------------------- phantoms


def phantoms(split):
    return data.load_records(["phantom=16"], split)


def content(records):
    return [(r.image.tobytes(), r.report, r.labels, r.patient) for r in records]


def test_phantoms_are_a_pure_function_whatever_the_order_of_their_findings():
    assert content(data.phantom("16", "valid")) == content(phantoms("valid"))
    names = ["Edema", "Cardiomegaly", "Pleural Effusion"]
    one, other = (data.draw_phantom(np.random.default_rng(0), n, 16)[0] for n in (names, names[::-1]))
    assert np.array_equal(one, other)


def test_a_phantom_is_the_same_patient_at_every_size():
    small, large = (data.phantom(size, "valid") for size in ("8", "24"))
    assert [(r.report, r.labels) for r in small] == [(r.report, r.labels) for r in large]


@pytest.mark.parametrize("size", ["0", "2049", "9" * 19, "x", "-1"])
def test_what_follows_phantom_is_its_size_if_that_makes_sense(size):
    assert phantoms("valid")[0].image.shape == (16, 16)
    with pytest.raises(BadInput, match=f"phantom={size}: .*at most phantom=2048"):
        data.load_records([f"phantom={size}"], "train")


def test_no_two_phantoms_are_alike_within_a_split_or_across():
    images = [r.image.tobytes() for split in data.SPLITS for r in phantoms(split)]
    assert len(set(images)) == len(images)


def test_each_finding_shows_in_the_mean_of_its_images():
    images = np.array([r.image for r in phantoms("test")], float)
    for finding in data.PHANTOM_FINDINGS:
        has = np.array([r.labels[finding] == 1 for r in phantoms("test")])
        error = images.std(0) * (1 / has.sum() + 1 / (~has).sum()) ** 0.5
        deviations = np.abs(images[has].mean(0) - images[~has].mean(0)) / error
        assert deviations.max() > 6  # in standard errors; chance gives 4 among 256 pixels


def test_each_test_phantom_has_one_finding_and_each_finding_200():
    counts = Counter(tuple(data.present(r)) for r in phantoms("test"))
    assert counts == {(finding,): 200 for finding in data.PHANTOM_FINDINGS}


def test_all_test_phantoms_and_half_of_those_for_training_have_a_report():
    assert all(r.report for r in phantoms("test"))
    assert sum(r.report is not None for r in phantoms("train")) == len(phantoms("train")) / 2


def test_training_phantoms_show_none_to_three_findings_and_all_others_are_absent():
    assert {len(data.present(r) - {"No Finding"}) for r in phantoms("train")} == {0, 1, 2, 3}
    names = [*data.PHANTOM_FINDINGS, "No Finding"]
    assert all(sorted(r.labels) == sorted(names) for r in phantoms("train"))


def test_no_report_denies_a_drawn_finding():
    for r in phantoms("train") + phantoms("test"):
        if r.report and not r.labels["No Finding"]:
            denials = [sentence for sentence in r.report.lower().split(".") if "no " in sentence]
            names = [name for finding in data.present(r) for name in data.ABSENT[finding]]
            assert not any(name in denial for name in names for denial in denials)
            assert not any(sentence in r.report for sentence in data.NORMAL)


def test_most_reports_mention_what_was_drawn():
    words = {"Cardiomegaly": ("heart", "cardi"), "Edema": ("edema", "congestion", "perihilar", "septal")}
    for finding, own in words.items():
        reports = [r.report.lower() for r in phantoms("test") if data.present(r) == {finding}]
        assert np.mean([any(word in report for word in own) for report in reports]) > 0.9


def test_no_more_phantoms_are_drawn_than_asked_for(monkeypatch):
    drawn, draw = [], data.draw_phantom
    monkeypatch.setitem(data.DATASETS, "phantom", data.phantom)
    monkeypatch.setattr(data, "draw_phantom", lambda *args: drawn.append(1) or draw(*args))
    assert len(data.load_records(["phantom=16"], "train", 5)) == len(drawn) == 5
