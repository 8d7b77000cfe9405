"""Findings as text, and the vectors that go before it."""

import pytest
import torch

from prompts import TEMPLATES, WORDINGS, ContinuousPrompt, label_prompt, negations, prompt_set, wordings

UNLISTED = "Pleural_Thickening"
FINDINGS = [*WORDINGS, UNLISTED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_come_right_after_cls_and_leave_the_text_whole_and_in_order(dtype):
    prompt, embeddings = ContinuousPrompt(3, 4), torch.randn(2, 6, 4).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    longer, longer_mask = prompt(embeddings, mask)
    assert torch.equal(longer[:, 1:4], prompt.context.to(dtype).expand(2, 3, 4))
    assert torch.equal(torch.cat([longer[:, :1], longer[:, 4:]], dim=1), embeddings)
    assert longer_mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]


def test_vectors_start_as_small_as_berts_word_embeddings():
    torch.manual_seed(0)
    context = ContinuousPrompt(64, 256).context
    assert context.std().item() == pytest.approx(0.02, rel=0.03)  # 5 standard errors of 16,384 draws


def test_no_two_findings_share_a_wording():
    texts = [text.lower() for finding in FINDINGS for text in wordings(finding)]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("template", TEMPLATES)
def test_label_prompts_are_the_first_wording_in_the_template_and_those_of_zero_shot(template):
    before, after = TEMPLATES[template].split("{}")
    expected = {finding: [before + wordings(finding)[0] + after] for finding in FINDINGS}
    assert {finding: [label_prompt(finding, template)] for finding in FINDINGS} == expected
    assert prompt_set(FINDINGS, template) == expected


def test_a_template_may_be_a_text_of_ones_own():
    expected = "a street at night, pulmonary edema and 100% {x}"
    assert label_prompt("Edema", "a street at night, {} and 100% {x}") == expected


@pytest.mark.parametrize("finding", FINDINGS)
def test_ensemble_has_every_wording_in_every_template(finding):
    texts = prompt_set([finding], "ensemble")[finding]
    every = {template.replace("{}", text) for template in TEMPLATES.values() for text in wordings(finding)}
    assert sorted(texts) == sorted(every)  # and none twice


def test_an_unlisted_finding_is_worded_by_its_own_name():
    assert wordings(UNLISTED) == ("Pleural Thickening",)


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_can_be_denied_in_as_many_ways_as_it_can_be_said(finding):
    assert len(negations(finding)) == len(wordings(finding))
    assert not set(negations(finding)) & set(wordings(finding))


def test_a_denial_has_no_article_and_denies_nothing_twice():
    assert negations("Cardiomegaly") == ("no cardiomegaly", "no enlarged heart")
    assert not any("no" in text.split() for text in negations("No Finding"))
    expected = {"Edema": ["a medical image showing no pulmonary edema"]}
    assert prompt_set(["Edema"], "caption", negations) == expected
