"""The Swin Transformer against torchvision's and transformers', its weights, its windows and its shift."""

import re

import pytest
import torch
import torch.nn as nn
from torchvision.models import swin_t
from torchvision.ops import StochasticDepth
from transformers import SwinConfig, SwinModel

from umcl import (
    DropPath,
    Permutation,
    SwinBlock,
    SwinTransformer,
    load_swin_weights,
    swin_tiny,
    window_order,
)

CLOSE = dict(rtol=0, atol=1e-5)  # float32 in another order of summation; the values are of size 1
# Maps of 8, 4 and 2 positions a side in windows of 2: the last map is one window.
SMALL = dict(image_size=32, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=2)


def shaken(model):
    """The model with every weight moved, norms and bias tables too, so that each one shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = 1 if "bias_table" in name else 0.05
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


def output_and_gradient(encode, images):
    """Features, and the gradient of their sum under fixed weights with respect to the images."""
    images = images.clone().requires_grad_()
    features = encode(images)
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
    return features.detach(), images.grad


def random_images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ the peers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_swin_equals_torchvision_for_the_same_weights(training):
    theirs, ours = shaken(swin_t()).train(training), swin_tiny(in_chans=3).train(training)
    load_swin_weights(ours, theirs.state_dict())
    theirs.head = nn.Identity()
    for module in theirs.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    images = random_images(1, 3, 224, 224)
    expected = output_and_gradient(theirs, images)
    torch.testing.assert_close(output_and_gradient(ours, images), expected, **CLOSE)


def test_swin_equals_transformers_for_the_same_weights():
    theirs = shaken(SwinModel(SwinConfig(**SMALL, drop_path_rate=0.0)))
    ours = SwinTransformer(**SMALL, in_chans=3)
    load_swin_weights(ours, theirs.state_dict())
    images = random_images(2, 3, 32, 32)
    expected = output_and_gradient(lambda images: theirs(images).pooler_output, images)
    torch.testing.assert_close(output_and_gradient(ours, images), expected, **CLOSE)


def test_swin_tiny_has_as_many_parameters_as_the_original():
    assert sum(weight.numel() for weight in swin_tiny(in_chans=3).parameters()) == 27_519_354


def test_linear_layers_start_by_the_number_of_their_inputs():
    torch.manual_seed(0)
    layer = SwinTransformer(**SMALL | dict(embed_dim=64)).stages[0][0].mlp[0]
    assert layer.weight.std().item() == pytest.approx(1 / 8, rel=0.03)  # 5 standard errors of 16,384 draws
    assert not layer.bias.any()


# -------------------------------------------------------------------------------------- weights

MICROSOFT = [
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^patch_norm\.", "patch_embed.norm."),
    (r"^stages\.(\d)\.", r"layers.\1.blocks."),
    (r"^merges\.1\.", "layers.0.downsample."),
    (r"^merges\.2\.", "layers.1.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
]
TIMM = [(r"^merges\.(\d)\.", r"layers.\1.downsample."), *MICROSOFT]
TRANSFORMERS_4 = [
    (r"^patch_embed\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_norm\.", "swin.embeddings.norm."),
    (r"^stages\.(\d)\.", r"swin.encoder.layers.\1.blocks."),
    (r"^merges\.1\.", "swin.encoder.layers.0.downsample."),
    (r"^merges\.2\.", "swin.encoder.layers.1.downsample."),
    (r"^norm\.", "swin.layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.0\.", ".intermediate.dense."),
    (r"\.mlp\.2\.", ".output.dense."),
    (r"\.attn\.q\.", ".attention.self.query."),
    (r"\.attn\.k\.", ".attention.self.key."),
    (r"\.attn\.v\.", ".attention.self.value."),
    (r"\.attn\.relative", ".attention.self.relative"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
]


def small_weights():
    torch.manual_seed(0)
    return shaken(SwinTransformer(**SMALL)).state_dict()


def renamed(weights, names):
    """The same weights under other names."""
    for ours, theirs in names:
        weights = {re.sub(ours, theirs, key): value for key, value in weights.items()}
    return weights


def apart(weights):
    """The same weights with query, key and value each by itself."""
    split = {}
    for key, value in weights.items():
        parts = dict(zip("qkv", value.chunk(3), strict=True)) if ".qkv." in key else {"": value}
        split |= {key.replace("qkv", name): part for name, part in parts.items()}
    return split


def assert_loads(weights, expected):
    swin = SwinTransformer(**SMALL)
    load_swin_weights(swin, weights)
    assert all(torch.equal(value, expected[key]) for key, value in swin.state_dict().items())


def test_own_weights_load():
    assert_loads(small_weights(), small_weights())


def test_microsoft_weights_load():
    assert_loads(renamed(small_weights(), MICROSOFT), small_weights())


def test_timm_weights_load():
    assert_loads(renamed(small_weights(), TIMM), small_weights())


def test_weights_of_older_transformers_load():
    assert_loads(renamed(apart(small_weights()), TRANSFORMERS_4), small_weights())


def test_summed_rgb_weights_see_a_grey_image_as_three_equal_channels():
    colour, grey = shaken(SwinTransformer(**SMALL, in_chans=3)), SwinTransformer(**SMALL)
    load_swin_weights(grey, colour.state_dict())
    images = random_images(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), **CLOSE)


@pytest.mark.parametrize("head", ["head", "head.fc", "classifier"])
def test_classifier_head_is_dropped(head):
    extra = {f"{head}.weight": torch.ones(10, 32), f"{head}.bias": torch.ones(10)}
    assert_loads(small_weights() | extra, small_weights())


@pytest.mark.parametrize("table", ["attn.relative_position_index", "attn_mask"])
def test_derived_tables_are_dropped(table):
    weights = renamed(small_weights(), MICROSOFT)
    assert_loads(weights | {f"layers.0.blocks.1.{table}": torch.ones(16, 4, 4)}, small_weights())


@pytest.mark.parametrize(
    "change, fault",
    [
        [lambda weights: weights.pop("norm.weight"), "norm.weight is missing"],
        [lambda weights: weights.update({"norm.gain": torch.ones(32)}), "norm.gain is left over"],
        [lambda weights: weights.update({"norm.bias": torch.ones(31)}), r"norm.bias is \(31,\) instead of"],
    ],
    ids=["missing", "left over", "other shape"],
)
def test_weights_that_do_not_fit_are_a_value_error_that_names_them(change, fault):
    weights = small_weights()
    change(weights)
    with pytest.raises(ValueError, match=fault):
        load_swin_weights(SwinTransformer(**SMALL), weights)


def test_a_missing_key_projection_is_a_value_error():
    weights = renamed(apart(small_weights()), TRANSFORMERS_4)
    del weights["swin.encoder.layers.1.blocks.0.attention.self.key.weight"]
    with pytest.raises(ValueError, match=r"stages.1.0.attn.qkv.weight is missing"):
        load_swin_weights(SwinTransformer(**SMALL), weights)


def test_state_dict_holds_parameters_only():
    swin = SwinTransformer(**SMALL)
    assert list(swin.state_dict()) == [name for name, _ in swin.named_parameters()]


# ---------------------------------------------------------------------------- windows and shift


def block(shift):
    torch.manual_seed(0)
    return SwinBlock(8, 2, side=6, window_size=3, shift=shift, drop_path=0.0)


def touched(block, row, column):
    """(6, 6) bool: where on the map the block's output changes when the input changes at one place."""
    token = window_order(6, 3).argsort()  # of each place
    x = random_images(1, 36, 8)
    y = x.clone()
    y[:, token[6 * row + column]].neg_()
    return (block(x) != block(y)).any(-1)[0, token].view(6, 6)


def square(first, last):
    """(6, 6) bool: rows and columns first ... last."""
    side = (torch.arange(6) >= first) & (torch.arange(6) <= last)
    return side[:, None] & side


def test_attention_stays_within_its_window():
    assert torch.equal(touched(block(shift=0), 0, 0), square(0, 2))


def test_shift_joins_neighbours_across_the_border_of_windows():
    assert torch.equal(touched(block(shift=1), 3, 3), square(1, 3))


@pytest.mark.parametrize("corner, near", [(0, square(0, 0)), (5, square(4, 5))])
def test_shift_never_joins_opposite_edges(corner, near):
    assert torch.equal(touched(block(shift=1), corner, corner), near)


def test_every_second_block_is_shifted_but_not_where_one_window_covers_the_map():
    stages = SwinTransformer(**SMALL).stages
    shifted = [[isinstance(block.shift, Permutation) for block in stage] for stage in stages]
    assert shifted == [[False, True], [False, True], [False, False]]


def test_a_window_larger_than_the_map_is_the_map():
    small = dict(image_size=16, embed_dim=8, depths=(2,), num_heads=(2,))
    images = random_images(2, 1, 16, 16)
    larger, equal = (shaken(SwinTransformer(**small, window_size=size)) for size in (7, 4))
    equal.load_state_dict(larger.state_dict())
    assert torch.equal(larger(images), equal(images))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=34),  # half a patch is left
        dict(image_size=40, window_size=5),  # maps of 10, 5 and 2.5
        dict(image_size=48),  # maps of 12, 6 and 3, windows of 2
        dict(image_size=8),  # smaller than one position of the last map
    ],
)
def test_an_image_size_that_does_not_divide_is_a_value_error(sizes):
    with pytest.raises(ValueError, match="do not divide"):
        SwinTransformer(**SMALL | sizes)


def test_the_image_size_that_the_error_suggests_fits():
    with pytest.raises(ValueError) as error:
        SwinTransformer(**SMALL | dict(image_size=48))
    suggested = re.search(r"(\d+) pixels would fit", str(error.value))[1]
    SwinTransformer(**SMALL | dict(image_size=int(suggested)))


def test_depths_and_heads_of_unlike_number_are_a_value_error():
    with pytest.raises(ValueError, match="heads"):
        SwinTransformer(**SMALL | dict(num_heads=(1, 2)))


@pytest.mark.parametrize("side, window_size, shift", [(8, 4, 0), (8, 4, 2), (6, 3, 1), (7, 7, 0)])
def test_window_order_is_a_permutation(side, window_size, shift):
    assert window_order(side, window_size, shift).sort().values.tolist() == list(range(side**2))


def test_window_order_goes_window_by_window():
    assert window_order(4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_gradient_of_a_permutation_is_that_of_indexing():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    gradients = []
    for reorder in Permutation(order), lambda x: x[:, order]:
        x = random_images(2, 9, 4).requires_grad_()
        (reorder(x) * torch.arange(9.0)[:, None]).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


# ----------------------------------------------------------------------------- stochastic depth


def dropped(rate):
    torch.manual_seed(0)
    return DropPath(rate).train()(torch.ones(10_000, 2, 3))


def test_drop_path_keeps_the_mean():
    mean = dropped(0.3).mean().item()
    assert mean == pytest.approx(1, abs=0.033)  # 5 standard errors, √(0.3 / 0.7 / 10,000)


def test_drop_path_drops_its_share():
    share = (dropped(0.3) == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.023)  # 5 standard errors, √(0.3 × 0.7 / 10,000)


def test_drop_path_drops_whole_samples():
    samples = dropped(0.3).flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1)) and samples.unique().numel() == 2


def test_drop_path_drops_nothing_in_evaluation():
    x = random_images(50, 2, 3)
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_stochastic_depth_grows_in_equal_steps():
    stages = SwinTransformer(**SMALL, drop_path=0.5).stages
    rates = [block.drop_path.rate for stage in stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
