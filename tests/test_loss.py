"""The label mask and the loss: what labels remove, and that they change nothing else."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from umcl import UMCL, attracting_loss, contrastive_loss, label_mask, prompt_mask, report_mask

SCALE = torch.tensor(5.0, dtype=torch.float64)
EXACT = dict(rtol=0, atol=1e-12)  # float64 rounds at 1e-16, and these sums have some hundred terms of size 1


def random_batch(n, seed=0):
    """(n, 6) image and text features, float64 and unit length, and an (n, n) bool mask."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = F.normalize(torch.randn(2, n, 6, dtype=torch.float64, generator=generator), dim=-1)
    removed = torch.rand(n, n, generator=generator) < 0.4
    return images.requires_grad_(), texts.requires_grad_(), removed


def double_loop(images, texts, scale, removed):
    """The loss read aloud: image i among the texts, text i among all images, one exponential at a time."""
    n, total = len(texts), 0
    for i in range(n):
        own = torch.exp(scale * images[i] @ texts[i])
        row = [torch.exp(scale * images[i] @ texts[j]) for j in range(n) if j != i and not removed[i, j]]
        others = [j for j in range(len(images)) if j != i and not removed[j, i]]
        column = [torch.exp(scale * images[j] @ texts[i]) for j in others]
        total = total - torch.log(own / (own + sum(row))) - torch.log(own / (own + sum(column)))
    return total / (2 * n)


def pair_gradient(removed):
    """(N, N): how the loss answers to each cosine; with one-hot texts the image features are the cosines."""
    n = len(removed)
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(n, n, generator=generator).requires_grad_()
    contrastive_loss(cosines, torch.eye(n), torch.tensor(1.0), removed).backward()
    return cosines.grad


def findings(*rows):
    """(N, 3) bool, a row for each of "edema effusion", "pneumonia", ""."""
    return torch.tensor(
        [[name in row.split() for name in ("edema", "effusion", "pneumonia")] for row in rows]
    )


@pytest.mark.parametrize("n, more", [(1, 0), (2, 3), (7, 0), (16, 4)])
def test_loss_equals_the_double_loop(n, more):
    """Also where images without a text of their own are negatives of the texts alone."""
    images, texts, removed = random_batch(n + more)
    inputs, removed = (images, texts[:n], SCALE.clone().requires_grad_()), removed[:, :n]
    ours, slow = contrastive_loss(*inputs, removed), double_loop(*inputs, removed)
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs)
    torch.testing.assert_close((ours, *gradients[0]), (slow, *gradients[1]), **EXACT)


def test_gradients_match_finite_differences():
    images, texts, removed = random_batch(5)
    scale = SCALE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, removed), (images, texts, scale))


@pytest.mark.parametrize(
    "labels", [None, torch.zeros(6, 4, dtype=torch.bool)], ids=["no mask", "all unknown"]
)
def test_without_labels_it_is_the_clip_loss(labels):
    images, texts, _ = random_batch(6)
    removed = None if labels is None else label_mask(labels, labels, "equal")
    logits = SCALE * images @ texts.T
    clip = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, SCALE, removed), clip, **EXACT)


def test_same_label_pair_costs_nothing():
    removed = torch.zeros(4, 4, dtype=torch.bool)
    removed[0, 1] = True
    assert torch.equal(pair_gradient(removed) == 0, removed)


def test_a_row_whose_every_other_pair_is_removed_costs_nothing_and_spoils_no_other():
    images, texts, removed = random_batch(5)
    removed[0, :] = removed[:, 0] = True
    loss = contrastive_loss(images, texts, SCALE, removed)
    loss_of_the_others = contrastive_loss(images[1:], texts[1:], SCALE, removed[1:, 1:])
    torch.testing.assert_close(5 * loss, 4 * loss_of_the_others, **EXACT)
    loss.backward()
    for gradient in images.grad, texts.grad:
        assert not gradient[0].any() and gradient[1:].isfinite().all()


def test_the_diagonal_is_never_removed():
    images, texts, removed = random_batch(5)
    with_it, without_it = removed.clone().fill_diagonal_(True), removed.clone().fill_diagonal_(False)
    kept = contrastive_loss(images, texts, SCALE, without_it)
    assert torch.equal(contrastive_loss(images, texts, SCALE, with_it), kept)


def test_batch_order_does_not_matter():
    images, texts, removed = random_batch(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = contrastive_loss(images[order], texts[order], SCALE, removed[order][:, order])
    torch.testing.assert_close(shuffled, contrastive_loss(images, texts, SCALE, removed), **EXACT)


def test_an_image_meets_equal_texts_once():
    images, texts, _ = random_batch(6)
    ids = torch.tensor([0, 1, 0, 2, 1, 0])
    texts = texts[ids]
    removed, once = ids[:, None] == ids, [0, 1, 3]
    ours = contrastive_loss(images, texts, SCALE, removed, ids)
    logits = SCALE * images @ texts[once].T  # (6, 3), of the different texts
    of_images = F.cross_entropy(logits, ids)
    of_texts = 2 * contrastive_loss(images, texts, SCALE, removed) - F.cross_entropy(
        (SCALE * images @ texts.T).masked_fill(removed & ~torch.eye(6).bool(), -torch.inf), torch.arange(6)
    )
    torch.testing.assert_close(2 * ours, of_images + of_texts, **EXACT)


def learned_bias(n, share, text_ids):
    """How far apart two prompts' scores come to lie on images that say nothing, by their loss alone.

    n images, `share` of them of class 0; one score for each class, the same for all images.
    """
    classes = (torch.arange(n) >= round(share * n)).long()
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")
    removed = classes[:, None] == classes
    images = torch.ones(n, 1, dtype=torch.float64)

    def loss():
        optimizer.zero_grad()
        scores = torch.stack([bias, torch.zeros_like(bias)])
        value = contrastive_loss(
            images, scores[classes][:, None], 1.0, removed, classes if text_ids else None
        )
        value.backward()
        return value

    optimizer.step(loss)
    return bias.item()


@pytest.mark.parametrize("n", [20, 40, 200])
def test_images_that_say_nothing_teach_the_log_prior_whatever_the_batch(n):
    assert learned_bias(n, 0.9, text_ids=True) == pytest.approx(math.log(0.9 / 0.1), abs=1e-4)


@pytest.mark.parametrize("n", [20, 40, 200])
def test_repeated_texts_teach_more_than_the_prior_and_more_the_larger_the_batch(n):
    assert learned_bias(n, 0.9, text_ids=False) == pytest.approx(math.asinh(n * 0.8 / 2), abs=1e-4)


def test_removing_pairs_never_raises_the_loss():
    images, texts, _ = random_batch(5)
    removed, losses = torch.zeros(25, dtype=torch.bool), []
    for pair in torch.randperm(25, generator=torch.Generator().manual_seed(1)):
        removed[pair] = True
        losses.append(contrastive_loss(images, texts, SCALE, removed.view(5, 5)).item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


@pytest.mark.parametrize(
    "images, texts, removed",
    [
        [(3, 4), (2, 4), None],
        [(3, 4), (3, 5), None],
        [(3,), (3,), None],
        [(0, 4), (0, 4), None],
        [(3, 4), (3, 4), (3, 2)],
        [(3, 4), (3, 4), (1, 3)],  # would broadcast
    ],
)
def test_wrong_shapes_are_a_value_error(images, texts, removed):
    mask = None if removed is None else torch.zeros(removed, dtype=torch.bool)
    with pytest.raises(ValueError, match="shape"):
        contrastive_loss(torch.ones(images), torch.ones(texts), SCALE, mask)


LABELS = findings("edema", "edema effusion", "pneumonia", "")


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("equal", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),  # exactly its findings
        ("subset", [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),  # all that the text names
    ],
)
def test_a_text_fits_the_images_by_rule_and_one_without_labels_none(rule, expected):
    assert label_mask(LABELS, LABELS, rule).int().tolist() == expected


@pytest.mark.parametrize(
    "images, texts, rule, said",
    [
        (LABELS, LABELS, "overlap", "overlap"),
        *((LABELS.to(kind), LABELS, "equal", "bool") for kind in (torch.int64, torch.uint8, torch.float32)),
        (LABELS, LABELS.long(), "equal", "bool"),
    ],
)
def test_an_unknown_rule_and_labels_that_are_not_bool_are_refused(images, texts, rule, said):
    with pytest.raises(ValueError, match=said):
        label_mask(images, texts, rule)


@pytest.mark.parametrize("rule, expected", [("equal", [1, 0, 0]), ("subset", [1, 0, 1])])
def test_label_mask_is_right_under_bf16_autocast(rule, expected):
    image = torch.arange(1000)[None] < 600  # bf16 does not tell 600 from its neighbours
    texts = torch.arange(1000)[None] < torch.tensor([600, 601, 599])[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        assert label_mask(image, texts, rule).int().tolist() == [expected]


def test_images_with_the_same_finding_do_not_push_each_others_prompts():
    images, prompts = findings("edema effusion", "edema", "effusion"), findings("edema", "edema", "effusion")
    push = pair_gradient(label_mask(images, prompts, "subset")) > 0
    assert push.int().tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 0]]


def test_reports_of_equal_words_of_one_image_or_of_equal_diseases_are_no_negatives():
    present = findings("edema", "edema", "pneumonia", "effusion", "effusion pneumonia", "effusion")
    absent = ~present
    diseases = torch.tensor([True, False, True])  # effusion stands for a device
    words, image = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 0])
    ours = report_mask(present, absent, diseases, words, image)
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(6):
        for j in range(6):
            fits = [image[k] == image[i] or present[k].equal(present[i]) and (present[i] & diseases).any()
                    for k in range(6) if words[k] == words[j]]  # fmt: skip
            wanted[i, j] = any(fits)
    assert torch.equal(ours, wanted) and ours[0, 2] and not ours[3, 5]


def test_a_finding_that_is_unknown_of_one_image_alone_keeps_its_report_a_negative():
    present, absent = findings("edema", "edema", "edema"), findings("pneumonia", "pneumonia", "")
    every, one = torch.ones(3, dtype=torch.bool), torch.arange(3)
    removed = report_mask(present, absent, every, one, one)
    assert removed.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_an_image_is_no_negative_of_a_prompt_unless_it_is_known_to_lack_the_finding():
    absent = findings("edema", "effusion pneumonia", "", "edema effusion pneumonia")
    assert prompt_mask(absent, torch.tensor([0, 1])).int().tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]


def attracted_by_loop(images, texts, same, kind):
    """The peers' objectives read aloud, one direction and one row at a time."""

    def one_way(s, same, rows):
        total = 0
        for i in range(rows):
            p = torch.exp(s[i]) / torch.exp(s[i]).sum()
            own = [j for j in range(len(p)) if same[i, j]]
            if kind == "unicl":
                total -= sum(p[j].log() for j in own) / len(own)
            elif kind == "multi-positive":
                total -= sum(p[j] for j in own).log()
            else:
                weight = torch.exp(same[i].double() / 0.25)
                total -= (weight / weight.sum() * p.log()).sum()
        return total / rows

    same, s = same | torch.eye(*same.shape).bool(), SCALE * images @ texts.T
    return (one_way(s, same, len(texts)) + one_way(s.T, same.T, len(texts))) / 2


@pytest.mark.parametrize("kind", ["unicl", "multi-positive", "soft"])
@pytest.mark.parametrize("n, more", [(6, 0), (5, 3)])
def test_peers_objectives_equal_their_loops(kind, n, more):
    images, texts, same = random_batch(n + more)
    texts, same = texts[:n], same[:, :n]
    ours = attracting_loss(images, texts, SCALE, same, kind)
    torch.testing.assert_close(ours, attracted_by_loop(images, texts, same, kind), **EXACT)


@pytest.mark.parametrize("kind", ["unicl", "multi-positive", "soft"])
def test_without_labels_peers_objectives_are_clips_or_its_smoothed_form(kind):
    images, texts, _ = random_batch(5)
    ours = attracting_loss(images, texts, SCALE, torch.zeros(5, 5, dtype=torch.bool), kind)
    clip = contrastive_loss(images, texts, SCALE)
    assert torch.isclose(ours, clip) == (kind != "soft")


def test_logit_scale_starts_at_clips_and_never_exceeds_a_hundred():
    tower = SimpleNamespace(num_features=4)
    model = UMCL(tower, tower, None)
    assert model.logit_scale().item() == pytest.approx(1 / 0.07)  # to 1e-6: float32
    model.log_scale.data.fill_(50.0)
    assert model.logit_scale() == 100
