"""BERT as text tower, with the continuous prompt and without, and the features of all three encoders."""

import pytest
import torch
from transformers import BertConfig, BertModel

from prompts import ContinuousPrompt
from umcl import UMCL, SwinTransformer, TextEncoder

LENGTHS = (9, 6, 3)
CLOSE = dict(rtol=0, atol=1e-5)  # values of size 1; float32 summed in another order differs by some 1e-6


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,  # so that attention is far from a plain mean
    )
    return BertModel(config).eval()


def model(prompt):
    image_encoder = SwinTransformer(image_size=16, embed_dim=4, depths=(1,), num_heads=(1,), window_size=4)
    return UMCL(image_encoder, TextEncoder(bert()), prompt, embed_dim=8).eval()


def prompt():
    torch.manual_seed(1)
    made = ContinuousPrompt(5, 16)
    made.context.data.normal_()
    return made


def texts():
    """(3, 9) int64 and (3, 9): texts of 9, 6 and 3 tokens."""
    torch.manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(5, 50, mask.shape) * mask, mask.long()


@pytest.mark.parametrize("make", [lambda: None, prompt], ids=["plain", "prompt"])
def test_it_is_bert_run_by_hand_over_each_text_alone_without_padding(make):
    encoder, vectors, (input_ids, mask) = TextEncoder(bert()), make(), texts()
    words, context = bert().embeddings.word_embeddings, vectors.context if vectors else torch.empty(0, 16)
    by_hand = []
    for ids, length in zip(input_ids, LENGTHS, strict=True):
        inputs = torch.cat([words(ids[:1]), context, words(ids[1:length])])
        positions = torch.arange(len(context) + length)
        hidden = bert()(inputs_embeds=inputs[None], position_ids=positions[None]).last_hidden_state[0]
        by_hand.append(torch.cat([hidden[:1], hidden[len(context) + 1 :]]).mean(0))  # of the text alone
    torch.testing.assert_close(encoder(input_ids, mask, vectors), torch.stack(by_hand), **CLOSE)


def test_every_context_vector_receives_gradient_and_changes_the_feature():
    umcl = model(prompt())
    before = umcl.encode_prompt(*texts())
    before[:, 0].sum().backward()
    assert umcl.prompt.context.grad.any(1).all()
    for vector in umcl.prompt.context.data:
        vector.neg_()
        change = umcl.encode_prompt(*texts()) - before
        assert change.abs().max() > 1e-2  # a thousand times what rounding does
        vector.neg_()


def test_reports_receive_no_context():
    umcl = model(prompt())
    before = umcl.encode_text(*texts())
    umcl.prompt.context.data.neg_()
    assert torch.equal(umcl.encode_text(*texts()), before)


def test_without_continuous_prompt_a_label_prompt_is_encoded_as_a_report():
    umcl = model(None)
    assert torch.equal(umcl.encode_prompt(*texts()), umcl.encode_text(*texts()))


@pytest.mark.parametrize("bf16", [False, True])
def test_features_are_float32_of_unit_length_also_under_bf16_autocast(bf16):
    umcl, images = model(prompt()), torch.rand(3, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = umcl.encode_image(images), umcl.encode_text(*texts()), umcl.encode_prompt(*texts())
    for features in found:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))  # default: float32 rounding
