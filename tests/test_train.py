"""Options, schedule, ablations, checkpoints, and what a run does with bad input."""

import itertools
import json
import math
import os
import shutil
import signal
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from transformers import BertConfig, BertModel

import data
import evaluate
import prompts
import train


@pytest.fixture
def steps(monkeypatch):
    """Run and batch of each training step to come."""
    seen, step = [], train.training_step

    def spy(run, batch, *rest):
        seen.append((run, batch))
        return step(run, batch, *rest)

    monkeypatch.setattr(train, "training_step", spy)
    return seen


@pytest.fixture
def model(options):
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))

    def build(*flags):
        args = options(*flags)
        return evaluate.build_model(args, bert, args.prompt_length)

    return build


def log(folder):
    """The lines about steps and the lines about epochs."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def state(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)


def weights(folder):
    return state(folder)["model"]


def refusal(capsys):
    """The last line on stderr, behind the name of the script."""
    script, _, sentence = capsys.readouterr().err.strip().splitlines()[-1].partition(": ")
    assert script in ("train.py", "evaluate.py")
    return sentence


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "umcl"),
        (["--no-continuous-prompt"], "umcl-no-continuous-prompt"),
        (["--no-label-mask"], "umcl-label-mask-none"),
        (["--data", "csv=/some/where/a.csv", "--text-model", "/some/where/bert"], "umcl-csv-text-model-bert"),
        (["--template", "x" * 300 + " {}"], "umcl-template-" + "x" * 186),
        (["--prompt-length", "16"], "umcl-prompt-length-16"),
        (["--no-image-text", "--seed", "3"], "umcl-seed-3-no-image-text"),
        (["--horizontal-flip"], "umcl-horizontal-flip"),
        (["--lr", "1e-4", "--preset", "small"], "umcl-lr-0.0001"),
        (["--data", "medpix2=FOLDER"], "umcl-medpix2"),
        (["--template", "caption", "--device", "cpu", "--workers", "0"], "umcl"),
    ],
)
def test_a_run_is_named_after_the_flags_that_differ(flags, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(train.parse_args(flags).out) == Path("runs", name)


def test_a_second_run_of_the_same_name_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(train.parse_args([]).out)
        Path(names[-1]).mkdir(parents=True)
        Path(names[-1], "last.pt").touch()
    assert [Path(name).name for name in names] == ["umcl", "umcl-2", "umcl-3"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.jsonl"])
def test_a_run_that_is_there_is_not_written_over(pretrain, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    assert pretrain() == 2 and "--out" in refusal(capsys)
    assert [(p.name, p.read_text()) for p in (tmp_path / "run").iterdir()] == [(name, "precious")]


def test_options_that_differ_are_printed_first_and_all_of_them_kept(pretrain, tmp_path, capsys):
    assert pretrain("--precision", "auto", "--device", "auto", "--prompt-length", 5) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["prompt-length", "5"] for line in printed[:12])
    assert not any(line.strip().startswith("template") for line in printed)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["template"] == "caption" and config["torch"] == torch.__version__
    assert "auto" not in (config["precision"], config["device"])


@pytest.mark.parametrize("flag", ["--no-label", "--prompt-len=8", "--epoch=1"])
def test_options_cannot_be_abbreviated(flag):
    with pytest.raises(SystemExit, match="2"):
        train.main([flag])


@pytest.mark.parametrize(
    ("data_sets", "text_model"), [("phantom phantom=32", "small"), ("phantom medpix2=F", "Bio_ClinicalBERT")]
)
def test_real_data_get_the_towers_of_the_paper(data_sets, text_model):
    assert text_model in train.parse_args(["--data", *data_sets.split()]).text_model


def test_a_flag_wins_over_the_preset():
    assert train.parse_args(["--preset", "paper", "--image-size", "448"]).image_size == 448


# ------------------------------------------------------------------------------------- schedule and decay


def test_learning_rate_rises_over_the_warmup_and_falls_as_a_cosine():
    rates = [train.lr_at(step, steps=10, warmup=4, peak=8.0) for step in (0, 1, 2, 3, 4, 6, 7, 8)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, 6, 4, 2])


def test_learning_rate_ends_near_zero():
    assert 0 < train.lr_at(999, steps=1000, warmup=100, peak=1.0) < 1e-5


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert train.lr_at(0, steps=10, warmup=0, peak=1.0) == 1


def test_the_optimizer_steps_at_the_scheduled_rate(pretrain, monkeypatch, tmp_path):
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    pretrain("--lr", 1, "--warmup", 0.5)
    assert rates == [[rate, rate] for rate in (0.5, 1, 1, 0.5)]
    assert [line["lr"] for line in log(tmp_path / "run")[0]] == [0.5, 1, 1, 0.5]


def decays(model):
    decayed, free = train.parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0)
    return {id(p): group is decayed for group in (decayed, free) for p in group["params"]}


def test_every_parameter_is_in_one_group(model):
    model = model()
    groups = train.parameter_groups(model, 0.3)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())


def test_matrices_decay(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    model = model()
    assert all(decays(model)[id(m.weight)] for m in model.modules() if isinstance(m, kinds))


def test_norms_and_biases_do_not_decay(model):
    model = model()
    free = [m.weight for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    free += [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert not any(decays(model)[id(p)] for p in free)


def test_temperature_prompt_and_position_bias_do_not_decay(model):
    model = model()
    free = [model.log_scale, model.prompt.context]
    free += [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(free) == 4 and not any(decays(model)[id(p)] for p in free)


# ------------------------------------------------------------------------------------------------ ablations


@pytest.mark.parametrize("length", [4, 7])
def test_prompt_length_is_the_number_of_vectors(model, length):
    assert model("--prompt-length", length).prompt.context.shape == (length, 16)


@pytest.mark.parametrize(
    "flags",
    [["--no-continuous-prompt"], ["--prompt-length", 0], ["--no-image-label"], ["--prompt-weight", 0]],
)
def test_a_model_whose_prompts_are_not_trained_has_no_vectors(options, flags):
    args = options(*flags)
    assert train.new_run(args, train.load_splits(args)[0]).model.prompt is None


def test_no_continuous_prompt_still_trains_label_prompts(pretrain, steps):
    assert pretrain("--no-continuous-prompt") == 0
    assert all(run.model.prompt is None and len(batch.prompt_rows) for run, batch in steps)


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_template_is_the_text_of_the_label_prompts(pretrain, steps, template):
    pretrain("--template", template)
    for run, batch in steps:
        named = [run.findings[row.nonzero().item()] for row in batch.prompt_labels]
        texts = [prompts.label_prompt(finding, template) for finding in named]
        length = run.prompt_tokens(texts).input_ids.shape[1]  # those that were not drawn may be longer
        assert torch.equal(batch.prompts.input_ids[:, :length], run.prompt_tokens(texts).input_ids)
        assert not batch.prompts.attention_mask[:, length:].any()


def double_loop(batch, texts):
    """Numbers of pairs, of reports and of prompts: (of equal texts, these and those that the labels fit).

    texts: the report of each of the batch's reports, in their order.
    """
    disease = [name != "No Finding" for name in sorted([*data.PHANTOM_FINDINGS, "No Finding"])]
    labels = batch.present[batch.report_rows].tolist()
    ill = [any(has and is_one for has, is_one in zip(row, disease, strict=True)) for row in labels]
    named = batch.prompt_labels[batch.prompt_index].int().argmax(1).tolist()
    images = batch.present[batch.prompt_rows].tolist()
    rows = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
    prompts = [(i, j) for i in range(len(named)) for j in range(len(named)) if i != j]
    same = {(i, j) for i, j in rows if texts[i] == texts[j]}
    fits = {(i, j) for i, j in rows if labels[i] == labels[j] and ill[i]}
    same_prompt = {(i, j) for i, j in prompts if named[i] == named[j]}
    fits_prompt = {(i, j) for i, j in prompts if images[i][named[j]]}
    return (len(same), len(same | fits)), (len(same_prompt), len(same_prompt | fits_prompt))


@pytest.mark.parametrize(
    ("mask", "report", "prompt"),
    [("both", 1, 1), ("reports", 1, 0), ("prompts", 0, 1), ("identical", 0, 0), ("none", None, None)],
)
def test_each_mask_removes_the_pairs_that_a_double_loop_finds(
    pretrain, steps, tmp_path, monkeypatch, mask, report, prompt
):
    """0: only equal texts, 1: those that the labels fit, too, None: no pair."""
    loaded = train.training_records
    kept = []

    def with_twins(args, records):  # two reports of other labels that are equal word for word
        records = [
            replace(r, report="The same words.") if i in (1, 3, 5) else r for i, r in enumerate(records)
        ]
        kept.extend(loaded(args, records))
        return kept

    monkeypatch.setattr(train, "training_records", with_twins)
    assert pretrain("--label-mask", mask) == 0
    for line, (_, batch) in zip(log(tmp_path / "run")[0], steps, strict=True):
        texts = [kept[row].report for row in batch.rows[batch.report_rows].tolist()]
        of_reports, of_prompts = double_loop(batch, texts)
        assert line["removed_report"] == (0 if report is None else of_reports[report])
        assert line["removed_prompt"] == (0 if prompt is None else of_prompts[prompt])


def test_no_label_mask_is_the_mask_none():
    assert train.parse_args(["--no-label-mask"]).label_mask == "none"


def binary(count):
    """Records without reports of one finding, present in every third and known to be absent in the others."""
    image = np.zeros((16, 16), np.uint8)
    states = ({"findings": frozenset({"Pneumonia"})}, {"absent": frozenset({"Pneumonia"})})
    return [
        data.Record(
            image + i,
            None,
            patient=str(i),
            source="made",
            id=str(i),
            **{"findings": frozenset()} | states[i % 3 > 0],
        )
        for i in range(count)
    ]


def test_images_whose_findings_are_known_to_be_absent_teach(options, pretrain, monkeypatch, tmp_path):
    monkeypatch.setitem(data.DATASETS, "phantom", lambda root, split, limit=None: binary(24))
    assert pretrain("--lr", 1e-3) == 0
    steps, epochs = log(tmp_path / "run")
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in steps)
    assert all("AUROC mean" in line for line in epochs)


def test_an_image_is_a_negative_only_of_findings_that_it_is_known_not_to_have(options):
    labels = torch.eye(2, dtype=torch.bool)
    batch = types.SimpleNamespace(
        rows=torch.arange(4),
        present=torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.bool),
        absent=torch.tensor([[0, 1], [1, 0], [1, 0], [0, 0]], dtype=torch.bool),
    )
    more = train.without_finding(batch, torch.arange(4.0)[:, None], labels)
    assert more["more_images"].tolist() == [[2.0]]  # the last is unknown altogether
    assert more["more_removed"].tolist() == [[False, True]]


def test_labels_that_tell_nothing_apart_are_refused(pretrain, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "phantom", lambda root, split, limit=None: binary(24)[::3])
    assert pretrain() == 2 and "nothing to learn" in refusal(capsys)


def test_what_is_left_out_is_counted(pretrain, monkeypatch, capsys):
    bare = [replace(r, absent=frozenset()) for r in binary(24)]
    monkeypatch.setitem(
        data.DATASETS,
        "phantom",
        lambda root, split, limit=None: binary(24) + [replace(r, id="b" + r.id) for r in bare],
    )
    assert pretrain("--limit", 48) == 0
    assert "16 of 48 images left out" in capsys.readouterr().out


def test_steps_that_teach_nothing_end_a_run(pretrain, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAX_IDLE", 3)
    monkeypatch.setattr(train, "contrastive_loss", lambda images, texts, scale, *_, **__: 0 * scale)
    assert pretrain() == 2 and "exactly 0 in the last 3 steps" in refusal(capsys)


def test_label_noise_gives_a_share_of_the_records_the_labels_of_others(options):
    args = options("--limit", 400)
    whole = train.load_splits(args)[0]
    noisy = train.training_records(options("--limit", 400, "--label-noise", 0.5), whole)
    others = sum(a.findings != b.findings for a, b in zip(whole, noisy, strict=True))
    same = sum((Counter(r.findings for r in whole)[r.findings] - 1) / 399 for r in whole) / 400
    assert others / 400 == pytest.approx(0.5 * (1 - same), abs=0.1)  # 4 standard errors
    assert all((a.report, a.id) == (b.report, b.id) for a, b in zip(whole, noisy, strict=True))
    assert {(r.findings, r.absent) for r in noisy} <= {(r.findings, r.absent) for r in whole}


def test_without_image_text_no_report_is_read(pretrain, steps):
    assert pretrain("--no-image-text") == 0
    assert all(batch.reports == [] and len(batch.prompt_rows) == 8 for _, batch in steps)


def test_without_image_label_no_prompt_is_drawn(pretrain, steps):
    assert pretrain("--no-image-label") == 0
    assert all(len(batch.prompt_rows) == 0 and len(batch.report_rows) == 8 for _, batch in steps)


def test_chosen_findings_keep_what_the_others_say_of_them(options, monkeypatch):
    sets = ("No Finding", "Edema", "Fracture")
    image = np.zeros((16, 16), np.uint8)
    records = [data.Record(image, "", frozenset({name}), name, "made", id=name) for name in sets]
    monkeypatch.setitem(data.DATASETS, "phantom", lambda root, split, limit=None: records)
    normal, edema, fracture = train.load_splits(options("--findings", "Edema", "No Finding"))[0]
    assert normal.findings == {"No Finding"} and normal.absent == {"Edema"}
    assert edema.findings == {"Edema"} and edema.absent == {"No Finding"}
    assert fracture.findings == frozenset() and fracture.absent == {"No Finding"}


def test_a_run_that_nothing_can_validate_says_so(pretrain, monkeypatch, capsys):
    splits = train.load_splits
    unknown = {"report": None, "findings": frozenset(), "absent": frozenset()}

    def bare(args):
        records, valid = splits(args)
        return records, [replace(record, **unknown) for record in valid]

    monkeypatch.setattr(train, "load_splits", bare)
    assert pretrain() == 0 and "nothing to validate by" in capsys.readouterr().out


def test_only_the_chosen_findings_are_learned(options, steps, pretrain):
    assert pretrain("--findings", "Cardiomegaly", "Edema", "--limit", 64) == 0
    assert steps[0][0].findings == ["Cardiomegaly", "Edema"]


def test_a_template_of_ones_own_is_what_is_trained_and_evaluated(pretrain, steps, tmp_path):
    assert pretrain("--template", "a street at night, {}") == 0
    run, batch = steps[0]
    texts = run.tokenizer.batch_decode(batch.prompts.input_ids, skip_special_tokens=True)
    assert all("a street at night" in text for text in texts)
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--task", "zero-shot"]) == 0


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_the_reports_and_the_weighted_prompts(pretrain, tmp_path, weight):
    pretrain("--prompt-weight", weight)
    for line in log(tmp_path / "run")[0]:
        assert line["loss"] == pytest.approx(line["loss_report"] + weight * line["loss_prompt"])


# ------------------------------------------------------------------------------------------------- training


def test_a_step_is_logged_with_what_it_did(tiny_run):
    lines, _ = log(tiny_run)
    keys = (
        "step epoch lr loss loss_report loss_prompt removed_report removed_prompt gradient_norm logit_scale"
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() >= {*keys.split(), "seconds"} for line in lines)


def test_an_epoch_is_logged_with_zero_shot_accuracy_and_retrieval(tiny_run):
    (line,) = log(tiny_run)[1]
    assert line.keys() >= {"step", "epoch", "balanced accuracy", "i2t_P@1"}


def test_a_run_leaves_its_options_its_log_and_two_checkpoints(pretrain, tmp_path):
    pretrain()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best.pt", "config.json", "last.pt", "log.jsonl"]


def test_best_is_the_epoch_with_the_best_scores(pretrain, monkeypatch, tmp_path):
    scores = iter([0.2, 0.7, 0.4])
    monkeypatch.setattr(evaluate, "quick_scores", lambda *_: {"balanced accuracy": next(scores)})
    pretrain("--epochs", 3)
    assert state(tmp_path / "run", "best.pt")["progress"]["epoch"] == 2
    assert state(tmp_path / "run", "last.pt")["progress"]["epoch"] == 3


def test_the_loss_falls_on_a_batch_seen_again_and_again(pretrain, tmp_path):
    pretrain("--limit", 8, "--epochs", 20, "--lr", 3e-3)
    losses = [line["loss"] for line in log(tmp_path / "run")[0]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])  # about 0.5, a little apart from version to version


def test_training_moves_every_weight(pretrain, tiny_run, tmp_path):
    pretrain("--lr", 0)
    before, after = weights(tmp_path / "run"), weights(tiny_run)
    assert [name for name in after if torch.equal(before[name], after[name])] == []


def test_same_seed_gives_the_same_weights_bit_for_bit(pretrain, tiny_run, tmp_path):
    pretrain()
    one, other = weights(tiny_run), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_weights(pretrain, tiny_run, tmp_path):
    pretrain("--seed", 1)
    assert not torch.equal(weights(tiny_run)["log_scale"], weights(tmp_path / "run")["log_scale"])


def test_every_epoch_is_in_training_mode(pretrain, monkeypatch):
    modes, step = [], train.training_step

    def spy(run, *rest):
        modes.append(run.model.training)
        return step(run, *rest)

    monkeypatch.setattr(train, "training_step", spy)
    pretrain("--epochs", 2)
    assert modes == [True] * 8


def test_limit_makes_a_smoke_run(pretrain, steps):
    pretrain("--limit", 16)
    assert [len(batch.rows) for _, batch in steps] == [8, 8]


def test_the_gradient_is_clipped(pretrain, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [
            p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(torch.stack(gradients).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    pretrain("--clip", 0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)  # torch divides by the norm plus 1e-6


def test_the_temperature_stays_below_its_bound(pretrain, tmp_path, monkeypatch):
    step = train.training_step

    def hot(run, *rest):
        run.model.log_scale.data.fill_(9.0)
        return step(run, *rest)

    monkeypatch.setattr(train, "training_step", hot)
    pretrain()
    assert weights(tmp_path / "run")["log_scale"] <= math.log(100)


# ----------------------------------------------------------------------------------------------- tokenizer

TEXTS = ["Mild left pleural effusion.", "Moderate effusions; no edema.", "The heart is enlarged, mildly."] * 3


def test_the_learned_vocabulary_is_the_same_every_time():
    assert len({train.learn_tokenizer(TEXTS, size=40).to_str() for _ in range(5)}) == 1


def test_the_learned_vocabulary_covers_its_texts():
    tokenizer = train.wrap_tokenizer(train.learn_tokenizer(TEXTS, size=40).to_str())
    assert tokenizer.unk_token_id not in {i for row in tokenizer(TEXTS)["input_ids"] for i in row}


def test_the_learned_vocabulary_gives_the_text_back():
    tokenizer = train.wrap_tokenizer(train.learn_tokenizer(TEXTS, size=40).to_str())
    decoded = tokenizer.batch_decode(tokenizer(TEXTS)["input_ids"], skip_special_tokens=True)
    assert ["".join(text.split()) for text in decoded] == ["".join(text.lower().split()) for text in TEXTS]


def test_the_tokenizer_comes_back_from_a_checkpoint(pretrain, steps, tmp_path):
    pretrain()
    tokenizer, loaded = steps[0][0].tokenizer, evaluate.load_run(tmp_path / "run" / "last.pt").tokenizer
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded(TEXTS) == tokenizer(TEXTS)


# ---------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_weights_options_findings_and_tokenizer(tiny_run):
    assert state(tiny_run).keys() >= {"model", "args", "findings", "tokenizer"}


def test_a_loaded_checkpoint_gives_the_same_features(pretrain, steps, tmp_path):
    pretrain()
    run, batch = steps[-1]
    model, loaded = run.model.eval(), evaluate.load_run(tmp_path / "run" / "last.pt").model
    images = data.normalise(batch.images)
    assert torch.equal(model.encode_image(images), loaded.encode_image(images))
    assert torch.equal(model.encode_text(*batch.reports[0]), loaded.encode_text(*batch.reports[0]))
    assert torch.equal(model.encode_prompt(*batch.prompts), loaded.encode_prompt(*batch.prompts))


def test_a_checkpoint_needs_no_other_file(tiny_run, tmp_path, monkeypatch):
    shutil.copy(tiny_run / "best.pt", tmp_path / "alone.pt")
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--checkpoint", "alone.pt", "--limit", "5"]) == 0


class Pickled:
    """Code that a careless loader would run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "text", "hello", "tensors", "code"])
def test_what_is_no_checkpoint_is_refused_by_name(tiny_run, tmp_path, capsys, kind):
    path = tmp_path / "other.pt"
    if kind == "tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "code":
        torch.save(Pickled(tmp_path / "ran"), path)
    elif kind != "missing":
        whole = (tiny_run / "best.pt").read_bytes()
        contents = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"# UMCL\n", "hello": b"hello"}
        path.write_bytes(contents[kind])
    assert evaluate.main(["--checkpoint", str(path)]) == 2 and "other.pt" in refusal(capsys)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cut_while_it_is_written_leaves_the_old_one(pretrain, tmp_path, monkeypatch):
    saved, save = [], torch.save

    def fail_at_the_third(content, path):
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_text("half a file")
            raise OSError("no space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", fail_at_the_third)  # after the start's and the first epoch's
    assert pretrain("--epochs", 2) == 2
    assert state(tmp_path / "run")["progress"]["epoch"] == 1


# ------------------------------------------------------------------------------------- a run that goes wrong


def finite(folder):
    return all(torch.isfinite(value).all() for value in weights(folder).values())


@pytest.fixture
def spoil(monkeypatch):
    """Spoils the loss of some steps, or with `gradient` only what it carries back."""

    def prepare(*steps, bad=math.nan, gradient=False):
        calls, loss = [], train.contrastive_loss

        def spoilt(*inputs, **more):
            calls.append(1)
            value = loss(*inputs, **more)
            if (len(calls) + 1) // 2 not in steps:  # two losses a step
                return value
            if not gradient:
                return value * bad
            value.register_hook(lambda gradient: gradient * bad)
            return value

        monkeypatch.setattr(train, "contrastive_loss", spoilt)

    return prepare


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_one_after_the_other_stop_a_run(pretrain, spoil, tmp_path, capsys, bad):
    spoil(5, 6, 7, 8, 9, bad=bad)
    assert pretrain("--epochs", 3) == 2 and str(tmp_path / "run" / "last.pt") in refusal(capsys)
    assert state(tmp_path / "run")["progress"]["epoch"] == 1 and finite(tmp_path / "run")
    assert [line["skipped"] for line in log(tmp_path / "run")[0]] == [0, 0, 0, 0, 1, 2, 3]


def test_steps_that_are_not_finite_now_and_then_do_not_stop_a_run(pretrain, spoil, tmp_path):
    spoil(2, 3, 5, 6)
    assert pretrain("--epochs", 2) == 0
    lines = log(tmp_path / "run")[0]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 4]
    assert [line["loss"] is None for line in lines] == [False, True, True, False, True, True, False, False]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(
    pretrain, spoil, monkeypatch, gradient
):
    kept, step = [], train.training_step

    def copying(run, batch, model, optimizer, *rest):
        result = step(run, batch, model, optimizer, *rest)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        kept.append([value.detach().clone() for value in (*run.model.parameters(), *moments)])
        return result

    monkeypatch.setattr(train, "training_step", copying)
    spoil(3, gradient=gradient)
    pretrain()
    same = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(kept)]
    assert same == [False, True, False]


def test_a_learning_rate_far_too_high_is_one_sentence(pretrain, capsys):
    assert pretrain("--lr", 1e20) == 2 and "--lr" in refusal(capsys)


def test_ctrl_c_saves_and_says_so(pretrain, monkeypatch, tmp_path, capsys):
    calls, step = [], train.training_step

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*inputs)

    monkeypatch.setattr(train, "training_step", interrupted)
    assert pretrain() == 130 and "--resume" in capsys.readouterr().out
    assert state(tmp_path / "run")["progress"]["step"] == 3
    assert evaluate.load_run(tmp_path / "run" / "last.pt").findings


def broken(chests, split):
    """Cuts one image of the split -> its path."""
    path = data.load_records([f"nih-chestxray14={chests}"], split)[0].image
    path.write_bytes(path.read_bytes()[:50])
    return path


def test_an_unreadable_image_is_refused_by_name(pretrain, chests, capsys):
    bad = broken(chests, "train")
    assert pretrain("--data", f"nih-chestxray14={chests}", "--batch-size", 14) == 2
    assert str(bad) in refusal(capsys)


def test_an_unreadable_validation_image_costs_no_training(pretrain, chests, steps, tmp_path, capsys):
    bad = broken(chests, "valid")
    assert pretrain("--data", f"nih-chestxray14={chests}") == 2 and str(bad) in refusal(capsys)
    assert not steps or (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data mimic", "phantom, chexpert, mimic-cxr"),
        ("--data medpix2=nowhere", "nowhere"),
        ("--no-image-text --no-image-label", "nothing to learn"),
        ("--image-size 18", "18"),
        ("--swin-depths 1 1 1", "heads"),
        ("--device nonsense", "nonsense"),
        ("--findings Edema Gout", "Gout"),
        ("--image-weights nowhere.pt", "nowhere.pt"),
        ("--swin-heads 1 3", "heads"),
        ("--device meta", "meta"),
        ("--data phantom=0", "phantom=0"),
        ("--data phantom=²", "phantom=²"),
    ],
)
def test_bad_options_are_one_sentence(pretrain, capsys, flags, named):
    assert pretrain(*flags.split()) == 2 and named in refusal(capsys)


SENSELESS = """
    --label-noise=1.5 --warmup=2 --warmup=nan --clip=-1 --lr=nan --lr=inf
    --weight-decay=-1 --drop-path=2 --prompt-weight=-1 --limit=-63 --epochs=0 --epochs=1.5 --batch-size=0
    --embed-dim=0 --prompt-length=-1 --max-length=2 --workers=-1 --seed=99999999999999999999 --image-size=0
    --patch-size=0 --window-size=0 --swin-heads=0 --swin-depths=-1
"""


@pytest.mark.parametrize("flag", SENSELESS.split())
def test_numbers_that_make_no_sense_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([flag])
    name, value = flag.split("=")
    last = capsys.readouterr().err.splitlines()[-1]
    assert name in last and value in last


def test_an_empty_folder_name_is_no_new_run(pretrain, capsys):
    assert pretrain("--resume", "") == 2 and "last.pt" in refusal(capsys)


def test_an_unknown_template_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--template", "poem"])
    message = capsys.readouterr().err
    assert all(template in message for template in prompts.TEMPLATES)


# ----------------------------------------------------------------------------------------- pre-trained towers


@pytest.fixture
def text_model(tmp_path):
    """A folder with a BERT and its tokenizer, as save_pretrained leaves them."""

    def save(positions=64, without=""):
        tokenizer = train.wrap_tokenizer(train.learn_tokenizer(TEXTS).to_str())
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes))
        kept = {
            name: value for name, value in bert.state_dict().items() if not without or without not in name
        }
        bert.save_pretrained(tmp_path / "bert", state_dict=kept)
        tokenizer.save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    return save


def test_a_text_model_is_where_training_starts(pretrain, text_model, tmp_path):
    folder = text_model()
    assert pretrain("--text-model", folder, "--lr", 0) == 0
    trained = weights(tmp_path / "run")
    for name, value in BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict().items():
        assert torch.equal(trained[f"text_encoder.bert.{name}"], value)


def test_a_run_from_a_text_model_is_evaluated_without_its_folder(pretrain, text_model, tmp_path):
    folder = text_model()
    assert pretrain("--text-model", folder) == 0
    shutil.rmtree(folder)
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--limit", "5"]) == 0


def test_an_unreachable_text_model_is_refused_with_the_ways_out_before_any_data(
    pretrain, monkeypatch, capsys
):
    monkeypatch.setattr(data, "read_records", lambda *_: pytest.fail("data were read"))
    assert pretrain("--text-model", "nobody/nothing") == 2
    sentence = refusal(capsys)
    assert all(each in sentence for each in ("nobody/nothing", "--text-model FOLDER", "--preset small"))


@pytest.mark.parametrize("pieces", [5, 60])
def test_a_text_model_without_its_own_tokenizer_is_refused(pretrain, text_model, capsys, pieces):
    folder = text_model()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"x{i}" for i in range(pieces - 5))]
    other = train.BertWordPieceTokenizer({name: i for i, name in enumerate(vocabulary)}, lowercase=True)
    train.wrap_tokenizer(other.to_str()).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    assert pretrain("--text-model", folder) == 2
    assert "its tokenizer, of" in (said := refusal(capsys)) or "less than half" in said


def test_weights_that_are_not_finite_are_refused_by_name(pretrain, text_model, tmp_path, capsys):
    folder = text_model()
    bert = BertModel.from_pretrained(folder)
    bert.embeddings.word_embeddings.weight.data[0, 0] = math.nan
    bert.save_pretrained(folder)
    assert pretrain("--text-model", folder) == 2 and "not finite" in refusal(capsys)
    swin = torchvision_swin(16)
    swin["norm.weight"][0] = math.inf
    torch.save(swin, tmp_path / "swin.pt")
    assert pretrain("--image-weights", tmp_path / "swin.pt") == 2 and "swin.pt" in refusal(capsys)


# ------------------------------------------------------------------------------------------------- --init


def test_a_new_run_starts_from_the_weights_of_another_on_other_data(tiny_run, cases, tmp_path):
    flags = ["--init", str(tiny_run), *cases, "--lr", "0", "--epochs", "1", "--batch-size", "8"]
    assert train.main([*flags, "--workers", "0", "--out", str(tmp_path / "new")]) == 0
    old, new = state(tiny_run, "best.pt"), state(tmp_path / "new")
    assert all(torch.equal(old["model"][name], value) for name, value in new["model"].items())
    assert new["findings"] == ["Abdomen", "Head", "Thorax"] != old["findings"]
    assert new["args"]["init"] == str(tiny_run) and new["args"]["image_size"] == 16


def test_init_takes_no_other_sizes(tiny_run, capsys):
    assert train.main(["--init", str(tiny_run), "--swin-dim", "32"]) == 2 and "--swin-dim" in refusal(capsys)


def test_a_folder_without_a_text_model_is_refused(pretrain, tmp_path, capsys):
    (tmp_path / "bert").mkdir()
    assert pretrain("--text-model", tmp_path / "bert") == 2 and str(tmp_path / "bert") in refusal(capsys)


def test_a_text_model_that_is_no_bert_is_refused(pretrain, tmp_path, capsys):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "gpt2"}')
    assert pretrain("--text-model", tmp_path / "bert") == 2 and "save_pretrained" in refusal(capsys)


def test_a_text_model_that_lacks_weights_is_refused(pretrain, text_model, capsys):
    assert pretrain("--text-model", text_model(without="query.weight")) == 2
    assert "query.weight" in refusal(capsys)


def test_texts_longer_than_the_text_model_takes_are_refused(pretrain, text_model, capsys):
    assert pretrain("--text-model", text_model(), "--max-length", 600) == 2
    assert "--max-length 600" in refusal(capsys)


def test_a_prompt_that_leaves_no_room_for_text_is_refused(pretrain, text_model, capsys):
    assert pretrain("--text-model", text_model(positions=64), "--prompt-length", 60) == 2
    assert "--prompt-length 60" in refusal(capsys)


def test_label_prompts_are_cut_to_the_room_that_is_left(pretrain, text_model, steps):
    assert pretrain("--text-model", text_model(positions=64), "--prompt-length", 56) == 0
    assert all(batch.prompts.input_ids.shape[1] == 8 for _, batch in steps)


def torchvision_swin(dim):
    """The tiny Swin as torchvision writes it, for RGB and with a classifier's head."""
    sizes = dict(patch_size=[4, 4], depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=3)
    return torchvision.models.SwinTransformer(embed_dim=dim, **sizes).state_dict()


def test_image_weights_are_where_training_starts(pretrain, tmp_path):
    swin = torchvision_swin(16)
    torch.save(swin, tmp_path / "swin.pt")
    assert pretrain("--image-weights", tmp_path / "swin.pt", "--lr", 0) == 0
    trained = weights(tmp_path / "run")
    patches = swin["features.0.0.weight"].sum(1, keepdim=True)
    assert torch.equal(trained["image_encoder.patch_embed.weight"], patches)
    assert torch.equal(trained["image_encoder.norm.weight"], swin["norm.weight"])


@pytest.mark.parametrize("kind", ["another size", "empty", "text", "hello"])
def test_wrong_image_weights_are_refused_by_name(pretrain, tmp_path, capsys, kind):
    path = tmp_path / "swin.pt"
    if kind == "another size":
        torch.save(torchvision_swin(8), path)
    else:
        path.write_bytes({"empty": b"", "text": b"# UMCL\n", "hello": b"hello"}[kind])
    assert pretrain("--image-weights", path) == 2 and "swin.pt" in refusal(capsys)
