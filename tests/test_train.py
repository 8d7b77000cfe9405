"""Options, schedule, ablations, checkpoints, and what a run does with bad input."""

import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import log, refusal, state
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import data
import evaluate
import prompts
import train
import umcl


@pytest.fixture
def steps(before_step):
    """Run and batch of each training step to come."""
    seen = []
    before_step(lambda _, run, batch: seen.append((run, batch)))
    return seen


@pytest.fixture
def updates(monkeypatch):
    """(learning rates of the groups, norm of the gradient) at each step of the optimizer to come."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self):
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        seen.append(([group["lr"] for group in self.param_groups], torch.stack(gradients).norm().item()))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


@pytest.fixture
def phantoms(monkeypatch):
    """Puts these records in the place of the phantoms of every split."""
    return lambda records: monkeypatch.setitem(data.DATASETS, "phantom", lambda *_, **__: records)


def weights(folder):
    return state(folder)["model"]


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "umcl"),
        (["--no-continuous-prompt"], "umcl-no-continuous-prompt"),
        (["--no-label-mask"], "umcl-no-label-mask"),
        (["--data", "csv=/some/where/a.csv", "--lr", "1e-4"], "umcl-data-csv-a.csv-lr-1e-4"),
        (["--data", "chexpert=/a/b/", "rsna=../c"], "umcl-data-chexpert-b-rsna-c"),
        (
            ["--template", "x" * 300 + " {}", "--seed", "1"],
            f"umcl-template-{'x' * 36}...{'x' * 40}-seed-1",
        ),
    ],
)
def test_a_run_is_named_after_its_flags(flags, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run is
    assert train.parse_args(flags).out == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last.pt", "{out} already holds a run; give another --out, or go on with --resume {out}"),
        ("best.pt", "{out} holds what is left of a run, without last.pt; give another --out"),
        ("log.jsonl", "{out} holds what is left of a run, without last.pt; give another --out"),
    ],
)
def test_a_run_that_is_there_is_not_written_over(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.chdir(tmp_path)
    out = Path("runs", "umcl-seed-3")
    out.mkdir(parents=True)
    (out / name).write_text("precious")
    for flags in (["--seed", "3"], ["--out", str(out)]):
        assert train.main(flags) == 2
        assert refusal(capsys) == said.format(out=out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "precious")]


def test_help_shows_the_values_of_both_presets(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, value in train.PRESETS["small"].items():
        other = train.PRESETS["paper"][name]
        shown = f"(small {value}; paper {other})"
        assert shown in said and f"--{name.replace('_', '-')} " in said


def test_no_progress_bar_is_written_where_nobody_looks(pretrain, capsys):
    assert pretrain("--max-length", 96) == 0  # no report is cut, so there is no note either
    printed = capsys.readouterr()
    assert printed.err == "" and "epoch 1: " in printed.out


def test_the_machine_is_printed_first_and_all_options_are_kept(pretrain, tmp_path, capsys):
    assert pretrain("--precision", "auto", "--device", "auto", "--prompt-length", 5) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, cpu, " in first and "1 threads, 1 processes" in second
    assert f"{tmp_path}/run/config.json has all options" in others
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["template"], config["prompt_length"]) == ("caption", 5)
    assert config["torch"] == torch.__version__ and "auto" not in (config["precision"], config["device"])


@pytest.mark.parametrize(
    ("flags", "text_model", "image_size", "threads"),
    [
        ("--data phantom phantom=32", "small", 64, 1),
        ("--data phantom csv=F", train.PRESETS["paper"]["text_model"], 224, torch.get_num_threads()),
        ("--preset paper --image-size 448 --text-model bert --threads 7", "bert", 448, 7),
    ],
)
def test_real_data_get_the_towers_of_the_paper_and_a_flag_wins(flags, text_model, image_size, threads):
    args = train.parse_args(flags.split())
    assert (args.text_model, args.image_size, args.threads) == (text_model, image_size, threads)


# ------------------------------------------------------------------------------------- schedule and decay


def test_learning_rate_rises_over_the_warmup_and_falls_as_a_cosine_to_zero():
    rates = [train.lr_at(step, steps=10, warmup=4, peak=8.0) for step in (0, 1, 2, 3, 4, 6, 7, 8)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, 6, 4, 2])
    assert 0 < train.lr_at(999, steps=1000, warmup=100, peak=1.0) < 1e-5
    assert train.lr_at(0, steps=10, warmup=0, peak=1.0) == 1


def test_the_optimizer_steps_at_the_scheduled_rate_with_a_clipped_gradient(pretrain, updates, tmp_path):
    pretrain("--lr", 0.002, "--warmup", 0.5, "--clip", 0.01)
    assert [rates for rates, _ in updates] == [[rate, rate] for rate in (0.001, 0.002, 0.002, 0.001)]
    assert [line["lr"] for line in log(tmp_path / "run")[0]] == [0.001, 0.002, 0.002, 0.001]
    # torch divides by the norm plus 1e-6
    assert [norm for _, norm in updates] == pytest.approx([0.01] * 4, rel=1e-3)


def test_matrices_alone_decay(options):
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model = evaluate.build_model(options(), bert, 4)
    decayed, free = train.parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    assert {id(p) for p in decayed["params"]} == matrices
    others = {name for name, p in model.named_parameters() if id(p) not in matrices}
    assert {id(p) for p in free["params"]} == {id(model.get_parameter(name)) for name in others}
    assert {"log_scale", "prompt.context", "image_encoder.norm.weight"} <= others
    assert any(name.endswith("relative_position_bias_table") for name in others)


# ------------------------------------------------------------------------------------------------ ablations


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        (["--prompt-length", 4], 4),
        (["--prompt-length", 7], 7),
        (["--prompt-length", 0], None),
        (["--no-continuous-prompt"], None),
        (["--no-image-label"], None),
        (["--prompt-weight", 0], None),
    ],
)
def test_a_model_has_the_chosen_number_of_vectors_and_none_that_is_not_trained(options, flags, length):
    args = options(*flags)
    prompt = train.new_run(args, train.load_splits(args)[0]).model.prompt
    assert prompt is None if length is None else prompt.context.shape[0] == length


@pytest.mark.parametrize("template", [*prompts.TEMPLATES, "a street at night, {}"])
def test_template_is_the_text_of_the_label_prompts_and_is_kept_for_evaluation(
    pretrain, steps, tmp_path, template
):
    assert pretrain("--template", template, "--limit", 16) == 0
    for run, batch in steps:
        named = [run.findings[number] for number in batch.prompt_pairs.text_ids.unique()]
        tokens = run.prompt_tokens([prompts.label_prompt(finding, template) for finding in named])
        length = tokens.input_ids.shape[1]  # those that were not drawn may be longer
        assert torch.equal(batch.prompts.input_ids[:, :length], tokens.input_ids)
        assert not batch.prompts.attention_mask[:, length:].any()
    assert evaluate.load_run(tmp_path / "run").args.template == template
    evaluation = ["--checkpoint", str(tmp_path / "run"), "--task", "zero-shot", "--limit", "20"]
    assert evaluate.main(evaluation) == 0


def double_loop(batch, texts):
    """Numbers of pairs, of reports and of prompts: (of equal texts, these and those that the labels fit).

    texts: the report of each of the batch's reports, in their order.
    """
    disease = [name != "No Finding" for name in sorted([*data.PHANTOM_FINDINGS, "No Finding"])]
    labels = batch.present[batch.report_pairs.images].tolist()
    ill = [any(has and is_one for has, is_one in zip(row, disease, strict=True)) for row in labels]
    named = batch.prompt_pairs.text_ids.tolist()
    images = batch.present[batch.prompt_pairs.images].tolist()
    rows = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
    prompts = [(i, j) for i in range(len(named)) for j in range(len(named)) if i != j]
    same = {(i, j) for i, j in rows if texts[i] == texts[j]}
    alike = {(i, j) for i, j in rows if labels[i] == labels[j] and ill[i]}
    fits = {
        (i, j) for i, j in rows if any((i, k) in alike and texts[k] == texts[j] for k in range(len(texts)))
    }
    fits |= alike
    same_prompt = {(i, j) for i, j in prompts if named[i] == named[j]}
    fits_prompt = {(i, j) for i, j in prompts if images[i][named[j]]}
    return (len(same), len(same | fits)), (len(same_prompt), len(same_prompt | fits_prompt))


@pytest.mark.parametrize(
    ("flags", "report", "prompt"),
    [
        ("--label-mask both", 1, 1),
        ("--label-mask reports", 1, 0),
        ("--label-mask prompts", 0, 1),
        ("--label-mask identical", 0, 0),
        ("--no-label-mask", None, None),
    ],
)
def test_each_mask_removes_the_pairs_that_a_double_loop_finds(
    pretrain, steps, tmp_path, monkeypatch, flags, report, prompt
):
    """0: only equal texts, 1: those that the labels fit, too, None: no pair."""
    loaded, kept = train.training_records, []

    def with_twins(args, records):  # two reports of other labels that are equal word for word
        for i in (1, 3, 5):
            records[i] = replace(records[i], report="The same words.")
        kept.extend(loaded(args, records))
        return kept

    monkeypatch.setattr(train, "training_records", with_twins)
    assert pretrain(*flags.split()) == 0
    for line, (_, batch) in zip(log(tmp_path / "run")[0], steps, strict=True):
        texts = [kept[row].report for row in batch.rows[batch.report_pairs.images].tolist()]
        of_reports, of_prompts = double_loop(batch, texts)
        assert line["removed_report"] == (0 if report is None else of_reports[report])
        assert line["removed_prompt"] == (0 if prompt is None else of_prompts[prompt])


def binary(count):
    """Records without reports of one finding, present in every third and known to be absent in the others."""
    image, found = np.zeros((16, 16), np.uint8), []
    for i in range(count):
        labels = {"Pneumonia": int(i % 3 == 0)}
        found.append(data.Record(image + i, None, labels, str(i), "made", id=str(i)))
    return found


def test_images_of_which_a_finding_is_known_to_be_absent_teach_and_those_without_any_are_left_out(
    pretrain, phantoms, tmp_path, capsys
):
    bare = [replace(r, labels=dict.fromkeys(data.present(r), 1), id=f"b{r.id}") for r in binary(24)]
    phantoms([*binary(24), *bare])  # every third of the bare is found to be ill
    assert pretrain("--limit", 48) == 0
    assert "32 of 48 training images have something to learn from" in capsys.readouterr().out
    lines, epochs = log(tmp_path / "run")
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)
    assert all("AUROC mean" in line for line in epochs)


def prompt_loss(args):
    """The prompts' loss of four images, its features and pairs: A and B; B, not A; not A; unknown."""
    labels = [{"A": 1, "B": 1}, {"A": 0, "B": 1}, {"A": 0}, {}]
    made = [data.Record(Path(), None, each, "", "") for each in labels]
    prompts = data.Tokens(*torch.ones(2, 2, 3, dtype=torch.long))
    torch.manual_seed(0)
    batch = data.Collate(made, ["A", "B"], prompts, None, 8)([(i, torch.zeros(1, 4, 4)) for i in range(4)])
    features = torch.nn.functional.normalize(torch.randn(4 + len(batch.prompts[0]), 5), dim=1)
    loss, _ = train.losses(args, batch, features, torch.tensor(5.0))["prompt"]
    return loss, features[:4], features[4:][batch.prompt_pairs.texts], batch.prompt_pairs.text_ids


def test_an_image_is_a_negative_only_of_findings_that_it_is_known_not_to_have(options):
    loss, images, texts, drawn = prompt_loss(options())
    removed = torch.stack([torch.ones(2).bool(), drawn != 0, drawn != 0])  # 0 is A
    assert torch.equal(loss, umcl.contrastive_loss(images[:3], texts, torch.tensor(5.0), removed, drawn))


@pytest.mark.parametrize("flags", ["--no-label-mask", "--label-mask identical", "--label-mask reports"])
def test_without_the_prompts_labels_no_absent_finding_enters_their_loss(options, flags):
    loss, images, texts, drawn = prompt_loss(options(*flags.split()))
    same = None if flags == "--no-label-mask" else drawn[:, None] == drawn
    ids = None if flags == "--no-label-mask" else drawn
    assert torch.equal(loss, umcl.contrastive_loss(images[:2], texts, torch.tensor(5.0), same, ids))


def test_reports_teach_without_any_finding(pretrain, phantoms, tmp_path):
    phantoms([replace(record, report=record.id, labels={}) for record in binary(24)[1::3]])
    assert pretrain() == 0
    lines, _ = log(tmp_path / "run")
    assert all(line["loss"] == line["loss_report"] > 0 < line["gradient_norm"] for line in lines)
    assert not any("loss_prompt" in line for line in lines)


def test_label_noise_gives_a_share_of_the_records_the_labels_of_others(options):
    whole = train.load_splits(options("--limit", 400))[0]
    args = options("--limit", 400, "--label-noise", 0.5)
    noisy = train.training_records(args, whole)
    others = sum(a.labels != b.labels for a, b in zip(whole, noisy, strict=True))
    same = sum(sum(a.labels == b.labels for b in whole) for a in whole) / 400 / 400
    assert others / 400 == pytest.approx(0.5 * (1 - same), abs=0.1)  # 4 standard errors
    assert all(
        (a.report, a.id, a.image is b.image) == (b.report, b.id, True)
        for a, b in zip(whole, noisy, strict=True)
    )
    assert all(any(one.labels == record.labels for record in whole) for one in noisy)


def test_which_labels_are_wrong_is_decided_by_the_seed_and_the_record_alone(options):
    whole = train.load_splits(options("--limit", 100))[0]
    found = [
        {record.id: record.labels for record in train.mislabelled(records, 0.3, seed)}
        for records, seed in [(whole, 0), (whole, 0), (whole[::-1], 0), (whole, 1)]
    ]
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize("percent", [10, 50, 100])
def test_a_fraction_of_the_training_patients_is_the_one_that_linear_probe_draws(options, percent):
    args = options("--limit", 200, "--fraction", percent, "--seed", 3)
    whole = train.load_splits(args)[0]
    drawn = [whole[row] for row in evaluate.drawn_by_patient(whole, percent, 3)]
    assert train.training_records(args, whole) == drawn
    assert len({r.patient for r in drawn}) == round(percent / 100 * len({r.patient for r in whole}))


def test_labels_that_tell_nothing_apart_are_refused(pretrain, phantoms, capsys):
    phantoms(binary(24)[::3])
    assert pretrain() == 2 and "no training record is left" in refusal(capsys)


@pytest.mark.parametrize(
    ("flag", "reports", "labels"),
    [
        ("--no-image-text", False, True),
        ("--no-image-label", True, False),
        ("--no-continuous-prompt", True, True),
    ],
)
def test_every_batch_has_the_reports_and_the_labels_that_the_losses_want(
    pretrain, steps, flag, reports, labels
):
    assert pretrain(flag) == 0
    found = {(len(b.report_pairs.texts) > 0, len(b.prompt_pairs.texts) > 0) for _, b in steps}
    assert found == {(reports, labels)}


def test_chosen_findings_are_learned_and_keep_what_the_others_say_of_them(options, phantoms):
    sets = ("No Finding", "Edema", "Fracture")
    image = np.zeros((16, 16), np.uint8)
    phantoms([data.Record(image, "", {name: 1}, name, "made", id=name) for name in sets])
    args = options("--findings", "Edema", "No Finding")
    records = train.load_splits(args)[0]
    normal, edema = {"No Finding": 1, "Edema": 0}, {"No Finding": 0, "Edema": 1}
    assert [record.labels for record in records] == [normal, edema, {"No Finding": 0}]
    assert train.new_run(args, records).findings == ["Edema", "No Finding"]


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_the_reports_and_the_weighted_prompts(pretrain, tmp_path, weight):
    pretrain("--prompt-weight", weight)
    for line in log(tmp_path / "run")[0]:
        assert line["loss"] == pytest.approx(line["loss_report"] + weight * line["loss_prompt"])


# ------------------------------------------------------------------------------------------------- training


def test_a_run_leaves_two_checkpoints_its_options_and_a_log_of_its_steps_and_epochs(tiny_run):
    names = {path.name for path in tiny_run.iterdir()} - {"results.json"}  # of other tests
    assert names == {"best.pt", "config.json", "last.pt", "log.jsonl", "patients.txt"}
    lines, (epoch,) = log(tiny_run)
    keys = "step epoch lr seconds loss loss_report loss_prompt removed_report removed_prompt gradient_norm "
    keys += "logit_scale rows_without_negatives_prompt mean_negatives_report"
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() >= set(keys.split()) for line in lines)
    assert epoch.keys() >= {"step", "epoch", "AUROC mean", "i2t_R@10"}
    assert state(tiny_run).keys() >= {"model", "args", "findings", "tokenizer"}


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


@pytest.mark.parametrize(("flags", "alike"), [([], "all"), (["--seed", 1], "not all"), (["--lr", 0], "none")])
def test_a_seed_gives_the_same_weights_bit_for_bit_and_training_moves_each(
    pretrain, tiny_run, tmp_path, flags, alike
):
    pretrain(*flags)
    one, other = weights(tiny_run), weights(tmp_path / "run")
    same = [torch.equal(one[name], other[name]) for name in one]
    assert {"all": all(same), "not all": not all(same), "none": not any(same)}[alike]


def test_every_epoch_trains_and_the_temperature_stays_below_its_bound(pretrain, before_step, tmp_path):
    modes = []
    before_step(lambda _, run, batch: modes.append(run.model.training) or run.model.log_scale.data.fill_(9))
    pretrain("--epochs", 2, "--limit", 16)
    assert modes == [True] * 4 and weights(tmp_path / "run")["log_scale"] <= math.log(100)


# ----------------------------------------------------------------------------- tokenizer and checkpoints

BARE = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
TEXTS = ["Mild left pleural effusion.", "Moderate effusions; no edema.", "The heart is enlarged, mildly."] * 3
ALL_LETTERS = [*TEXTS, "abcdefghijklmnopqrstuvwxyz"]  # no finding is unknown to it


def test_the_learned_vocabulary_is_the_same_every_time_and_gives_the_texts_back():
    (learned,) = {train.learn_tokenizer(TEXTS, size=40).to_str() for _ in range(5)}
    tokenizer = train.wrap_tokenizer(learned)
    ids = tokenizer(TEXTS)["input_ids"]
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert ["".join(text.split()) for text in decoded] == ["".join(text.lower().split()) for text in TEXTS]


SCRIPTS = {  # two words that reports share, and letters to make others of
    "Latin": ("consolidation", "effusion", "abcdefghijklmnopqrstuvwxyz"),
    "Thai": ("หัวใจโต", "ปอดปกติ", "กขคฆงจฉชซฌญฎฏฐดตถทธนบปผฝพฟภมยรลวศษสหอฮ"),
    "Japanese": (
        "はいにかげ",
        "しんかくだい",
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほ",
    ),
    "Korean": ("심비대", "흉수", "가나다라마바사아자차카타파하거너더러머버서어저처"),
}


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_report_and_no_word_of_one_alone_stands_in_the_vocabulary(script, blank):
    one, other, letters = SCRIPTS[script]
    made = np.random.default_rng(0).choice(list(letters), (40, 12))
    secrets = ["".join(row) for row in made]
    texts = [blank.join([one, secret, other]) for secret in secrets]
    learned = train.learn_tokenizer(texts * 3)  # three images of a study have one report
    pieces = [piece.removeprefix("##") for piece in learned.get_vocab() if len(piece) > 1 and piece[0] != "["]
    assert max(map(len, pieces)) <= 16
    assert all(sum(piece in text for text in texts) > 1 for piece in pieces)
    assert one in pieces or any(len(piece) > 2 and piece in one for piece in pieces)  # it still learns
    tokenizer = train.wrap_tokenizer(learned.to_str())
    assert tokenizer.unk_token_id not in tokenizer(texts[0] * 20)["input_ids"]  # nor is a long word one
    decoded = tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(texts[0].split())


def test_a_loaded_checkpoint_gives_the_same_tokens_and_features(pretrain, steps, tmp_path):
    pretrain()
    run, batch = steps[-1]
    loaded = evaluate.load_run(tmp_path / "run" / "last.pt")
    assert loaded.tokenizer.get_vocab() == run.tokenizer.get_vocab()
    assert loaded.tokenizer(TEXTS) == run.tokenizer(TEXTS)
    model, images = run.model.eval(), data.normalise(batch.images)
    assert torch.equal(model.encode_image(images), loaded.model.encode_image(images))
    assert torch.equal(model.encode_text(*batch.reports[0]), loaded.model.encode_text(*batch.reports[0]))
    assert torch.equal(model.encode_prompt(*batch.prompts), loaded.model.encode_prompt(*batch.prompts))


# ------------------------------------------------------------------------------------- a run that goes wrong


class Looks(TorchDispatchMode):
    """Whether the value of a tensor was read while it was on."""

    seen = False

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        self.seen |= operation is torch.ops.aten._local_scalar_dense.default
        return operation(*inputs, **options or {})


@pytest.fixture
def spoil(monkeypatch):
    """Spoils the loss of a step, or with `gradient` only what it carries back."""

    def prepare(step, bad=math.nan, gradient=False):
        calls, loss = itertools.count(2), train.contrastive_loss

        def spoilt(*inputs, **more):
            value = loss(*inputs, **more)
            if next(calls) // 2 != step:  # two losses a step
                return value
            if not gradient:
                return value * bad
            value.register_hook(lambda gradient: gradient * bad)
            return value

        monkeypatch.setattr(train, "contrastive_loss", spoilt)

    return prepare


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_ends_the_run_and_is_in_no_checkpoint(
    pretrain, spoil, tmp_path, capsys, bad, gradient
):
    spoil(6, bad=bad, gradient=gradient)
    run = tmp_path / "run"
    assert pretrain("--epochs", 3) == 2
    sentence = refusal(capsys)
    assert all(part in sentence for part in ("by step 6", str(run / "last.pt"), "--lr", "--precision fp32"))
    assert [line["gradient_norm"] is None for line in log(run)[0]] == [False] * 5 + [True]
    assert state(run)["progress"]["step"] == 4
    for file in ("last.pt", "best.pt"):
        assert all(torch.isfinite(value).all() for value in state(run, file)["model"].values())


@pytest.mark.parametrize(("flags", "step"), [([], 8), (["--save-every", 5], 5)])
def test_every_step_is_looked_at_before_the_next_line_of_the_log_or_save(
    pretrain, spoil, tmp_path, capsys, flags, step
):
    spoil(3)
    assert pretrain("--epochs", 4, "--limit", 64, "--log-every", 8, *flags) == 2
    assert f"by step {step}" in refusal(capsys) and state(tmp_path / "run")["progress"]["step"] == 0


def test_a_step_is_not_waited_for_between_two_lines_of_the_log(pretrain, monkeypatch):
    """On a GPU to look at a number is to wait for it."""
    record, looked = train.Recorder.record, {}

    def spy(self, step, *rest):
        with Looks() as looks:
            record(self, step, *rest)
        looked[step] = looks.seen

    monkeypatch.setattr(train.Recorder, "record", spy)
    assert pretrain("--log-every", 3) == 0
    assert looked == {1: False, 2: False, 3: True, 4: True}  # 4 ends the epoch


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_unreadable_image_is_refused_by_name_and_costs_no_training(
    pretrain, cases, steps, tmp_path, capsys, split
):
    bad = data.load_records(cases[1:], split)[0].image
    bad.write_bytes(bad.read_bytes()[:50])
    assert pretrain(*cases, "--batch-size", 24) == 2
    assert str(bad) in refusal(capsys)
    assert len(steps) == state(tmp_path / "run")["progress"]["step"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data mimic", "phantom, chexpert, mimic-cxr"),
        ("--data rsna=nowhere", "nowhere"),
        ("--no-image-text --no-image-label", "no training record is left"),
        ("--image-size 18", "18"),
        ("--swin-depths 1 1 1", "heads"),
        ("--device nonsense", "nonsense"),
        ("--findings Edema Gout", "Gout"),
        ("--image-weights nowhere.pt", "nowhere.pt"),
        ("--swin-heads 1 3", "heads"),
        ("--device meta", "meta"),
        ("--data phantom=0", "phantom=0"),
        ("--data phantom=²", "phantom=²"),
        ("--resume=", "last.pt"),
        ("--lr 1e20", "--lr"),
    ],
)
def test_bad_options_are_one_sentence(pretrain, capsys, flags, named):
    assert pretrain(*flags.split()) == 2 and named in refusal(capsys)


SENSELESS = """
    --label-noise=1.5 --label-noise=-1 --fraction=0 --fraction=101
    --warmup=2 --warmup=nan --clip=-1 --lr=nan --lr=inf
    --weight-decay=-1 --drop-path=2 --prompt-weight=-1 --limit=-63 --epochs=0 --epochs=1.5 --batch-size=0
    --embed-dim=0 --prompt-length=-1 --max-length=2 --workers=-1 --seed=99999999999999999999 --image-size=0
    --patch-size=0 --window-size=0 --swin-heads=0 --swin-depths=-1 --template=poem --no-label= --prompt-len=8
"""


@pytest.mark.parametrize("flag", SENSELESS.split())
def test_senseless_numbers_unknown_templates_and_abbreviations_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args([flag])
    name, value = flag.split("=")
    last = capsys.readouterr().err.splitlines()[-1]
    assert name in last and value in last
    assert name != "--template" or all(template in last for template in prompts.TEMPLATES)


# ------------------------------------------------------------------------------------------ from another run


def test_a_run_starts_from_the_weights_tokenizer_and_vectors_of_another_on_other_data(
    tiny_run, cases, tmp_path
):
    out = tmp_path / "run"
    argv = [
        "--init",
        str(tiny_run),
        *cases,
        "--out",
        str(out),
        "--lr",
        "0",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert train.main([*argv, "--epochs", "1", "--precision", "fp32"]) == 0
    old, new = state(tiny_run, "best.pt"), state(out)
    assert old["model"].keys() == new["model"].keys() and old["tokenizer"] == new["tokenizer"]
    assert all(torch.equal(value, new["model"][name]) for name, value in old["model"].items())
    assert new["findings"] == ["Abdomen", "Head", "Thorax"] != old["findings"]
    assert json.loads((out / "config.json").read_text())["init"] == str(tiny_run)
    assert new["args"]["image_size"] == 16  # not the preset's


def test_a_run_from_another_learns_and_goes_on_without_the_other(tiny_run, cases, before_step, tmp_path):
    other, out = shutil.copytree(tiny_run, tmp_path / "other"), tmp_path / "run"
    before_step(lambda n, *_: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
    argv = ["--init", str(other), *cases, "--batch-size", "8", "--workers", "0", "--epochs", "1"]
    assert train.main([*argv, "--freeze-text", "--drop-path", "0.1", "--out", str(out)]) == 143
    seen = [set((folder / "patients.txt").read_text().split()) for folder in (other, out)]
    assert seen[0] < seen[1] and len(seen[1]) == len(seen[0]) + 24  # those of both data sets
    shutil.rmtree(other)
    assert train.main(["--resume", str(out)]) == 0
    assert set((out / "patients.txt").read_text().split()) == seen[1]
    for name, value in weights(tiny_run).items():
        if name.startswith("image_encoder") and value.is_floating_point():
            assert not torch.equal(value, weights(out)[name]), name


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--embed-dim 8", "its own --embed-dim"),
        ("--prompt-length 5 --swin-depths 1 1 1", "its own --swin-depths, --prompt-length"),
        ("--image-weights file", "--image-weights"),
    ],
)
def test_what_another_run_brings_cannot_be_given(tiny_run, capsys, given, named):
    assert train.main(["--init", str(tiny_run), *given.split()]) == 2 and named in refusal(capsys)


def test_a_run_that_is_not_there_starts_none(tmp_path, capsys):
    assert train.main(["--init", str(tmp_path / "nowhere")]) == 2 and "nowhere" in refusal(capsys)


def test_more_epochs_name_the_way_from_a_run_to_a_new_one(tiny_run, capsys):
    assert train.main(["--resume", str(tiny_run), "--epochs", "9"]) == 2
    assert f"--epochs would alter the result of {tiny_run}; " in (said := refusal(capsys))
    assert f"--init {tiny_run}" in said


# ----------------------------------------------------------------------------------------- pre-trained towers


@pytest.fixture
def text_model(tmp_path):
    """A folder with a BERT and its tokenizer, as save_pretrained leaves them."""

    def save(positions=64, without="no such name", broken=False, names=None, kind="bert"):
        learned = train.BertWordPieceTokenizer(names) if names else train.learn_tokenizer(ALL_LETTERS)
        tokenizer = train.wrap_tokenizer(learned.to_str())
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        bert = BertModel(BertConfig(vocab_size=100, max_position_embeddings=positions, **sizes))
        if broken:
            bert.embeddings.word_embeddings.weight.data[0, 0] = math.nan
        kept = {name: value for name, value in bert.state_dict().items() if without not in name}
        bert.save_pretrained(tmp_path / "bert", state_dict=kept)
        tokenizer.save_pretrained(tmp_path / "bert")
        config = tmp_path / "bert" / "config.json"
        config.write_text(config.read_text().replace('"model_type": "bert"', f'"model_type": "{kind}"'))
        return tmp_path / "bert"

    return save


def test_a_run_starts_from_a_text_model_and_is_evaluated_without_it(pretrain, text_model, tmp_path):
    folder = text_model()
    assert pretrain("--text-model", folder, "--lr", 0) == 0
    trained = weights(tmp_path / "run")
    for name, value in BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict().items():
        assert torch.equal(trained[f"text_encoder.bert.{name}"], value)
    shutil.rmtree(folder)
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--limit", "5"]) == 0


def test_a_frozen_text_model_stays_as_it_was_and_all_else_learns(pretrain, text_model, tmp_path):
    folder = text_model()
    assert pretrain("--text-model", folder, "--freeze-text", "--lr", 0, "--out", tmp_path / "start") == 0
    assert pretrain("--text-model", folder, "--freeze-text") == 0
    start, trained = weights(tmp_path / "start"), weights(tmp_path / "run")
    for name, value in trained.items():
        frozen = name.startswith("text_encoder.")
        assert torch.equal(value, start[name]) == (frozen or not value.is_floating_point()), name
    model = evaluate.load_run(tmp_path / "run").model.train()
    assert not model.text_encoder.bert.training and model.image_encoder.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_text_model_of_another_precision_trains_in_float32(pretrain, text_model, tmp_path, dtype):
    folder = text_model()
    BertModel.from_pretrained(folder).to(dtype).save_pretrained(folder)
    assert pretrain("--text-model", folder, "--limit", 8) == 0
    assert {value.dtype for value in weights(tmp_path / "run").values() if value.is_floating_point()} == {
        torch.float32
    }


def test_no_code_of_a_text_model_is_run_whatever_is_answered(pretrain, text_model, tmp_path, monkeypatch):
    folder, ran = text_model(kind="own"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    for file, code in (("config.json", {"AutoConfig": "own.Own"}), ("tokenizer_config.json", {})):
        code["AutoTokenizer"] = ["own.Own", "own.Own"]
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(held | {"auto_map": code, "tokenizer_class": "Own"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert pretrain("--text-model", folder, "--limit", 8) == 2
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_text_model_that_is_no_folder_is_refused_unasked(pretrain, tmp_path, monkeypatch, capsys, kind):
    path = tmp_path / "model"
    path.touch() if kind == "file" else os.mkfifo(path)
    monkeypatch.setattr(train.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub is asked"))
    assert pretrain("--text-model", path) == 2 and "it is no folder" in refusal(capsys)


def test_what_is_wrong_with_a_text_model_is_said_before_records_are_read(pretrain, monkeypatch, capsys):
    monkeypatch.setattr(data, "read_records", lambda *_: pytest.fail("records are read"))
    assert pretrain("--text-model", "nobody/nothing") == 2 and "nobody/nothing" in refusal(capsys)


def test_only_a_pretrained_text_model_can_be_frozen(pretrain, capsys):
    assert pretrain("--freeze-text") == 2 and "--text-model" in refusal(capsys)


@pytest.mark.parametrize(
    ("fault", "flags", "named"),
    [
        ({"names": BARE}, [], "its tokenizer, of 5 pieces"),
        ({"broken": True}, [], "not finite"),
        ({"without": "query.weight"}, [], "query.weight"),
        ({"kind": "roberta"}, [], 'model_type "roberta"'),
        ({"kind": "my-own"}, [], 'model_type "my-own"'),
        ({}, ["--max-length", 600], "--max-length 600"),
        ({}, ["--prompt-length", 60], "--prompt-length 60"),
    ],
)
def test_text_models_that_do_not_fit_are_refused(pretrain, text_model, capsys, fault, flags, named):
    assert pretrain("--text-model", text_model(**fault), *flags) == 2 and named in refusal(capsys)


@pytest.mark.parametrize(
    "config", [None, "", '{"model_type": "gpt2"}'], ids=["unreachable", "empty", "GPT-2"]
)
def test_what_is_no_text_model_is_refused_with_the_ways_out(pretrain, tmp_path, monkeypatch, capsys, config):
    monkeypatch.chdir(tmp_path)
    if config is not None:
        Path("nobody", "nothing").mkdir(parents=True)
        Path("nobody", "nothing", "config.json").write_text(config)
    assert pretrain("--text-model", "nobody/nothing") == 2
    said = refusal(capsys)
    assert all(part in said for part in ("nobody/nothing", "FOLDER", "save_pretrained", "--preset small"))


def test_label_prompts_are_cut_to_the_room_that_is_left(pretrain, text_model, steps):
    flags = ["--template", "{} of the heart and the left lung", "--findings", "Edema", "Pleural Effusion"]
    assert pretrain("--text-model", text_model(positions=64), "--prompt-length", 56, *flags) == 0
    assert all(batch.prompts.input_ids.shape[1] == 8 for _, batch in steps)


def test_training_says_how_many_reports_are_cut(pretrain, phantoms, capsys):
    image, tokens = np.zeros((16, 16), np.uint8), [5, 10, 11, 40, 12, 9]  # [CLS] and [SEP] among them
    phantoms([data.Record(image, "a " * (n - 2), {}, str(n), "made", str(n)) for n in tokens])
    assert pretrain("--max-length", 10) == 0
    assert "note: 3 of 6 reports are longer than --max-length 10 and are cut" in capsys.readouterr().err


def test_training_says_nothing_of_reports_that_fit(pretrain, capsys):
    assert pretrain("--limit", 8, "--max-length", 300) == 0 and "cut" not in capsys.readouterr().err


def test_two_findings_whose_prompts_are_cut_to_the_same_are_refused(pretrain, steps, capsys):
    template = "a long text before that which " * 20 + "{}"
    assert pretrain("--template", template) == 2 and not steps
    printed = capsys.readouterr().err
    assert "prompts are longer than" in printed and "are the same to this run" in printed


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


@pytest.mark.parametrize("kind", ["another size", "not finite", "empty", "text", "hello"])
def test_wrong_image_weights_are_refused_by_name(pretrain, tmp_path, capsys, kind):
    path, swin = tmp_path / "swin.pt", torchvision_swin(8 if kind == "another size" else 16)
    swin["norm.weight"][0] = math.inf
    torch.save(swin, path)
    contents = {"empty": b"", "text": b"# UMCL\n", "hello": b"hello"}
    path.write_bytes(contents.get(kind, path.read_bytes()))
    assert pretrain("--image-weights", path) == 2 and "swin.pt" in refusal(capsys)
