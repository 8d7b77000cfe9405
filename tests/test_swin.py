"""The Swin Transformer against torchvision's and transformers', its weights, its windows and its shift."""

import re

import pytest
import torch
import torch.nn as nn
from torchvision.models import swin_t
from torchvision.ops import StochasticDepth
from transformers import SwinConfig, SwinModel

from umcl import DropPath, SwinBlock, SwinTransformer, from_windows, load_swin_weights, to_windows

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


def assert_equal(ours, theirs, images):
    """Same features, and same gradient of their sum under fixed weights with respect to the images."""
    found = []
    for encode in (ours, theirs):
        inputs = images.clone().requires_grad_()
        features = encode(inputs)
        (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
        found.append((features.detach(), inputs.grad))
    torch.testing.assert_close(*found, **CLOSE)


def random_images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ the peers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_swin_equals_torchvision_for_the_same_weights(training):
    theirs, ours = shaken(swin_t()).train(training), SwinTransformer(in_chans=3).train(training)
    load_swin_weights(ours, theirs.state_dict())
    theirs.head = nn.Identity()
    for module in theirs.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    assert_equal(ours, theirs, random_images(1, 3, 224, 224))


def test_swin_equals_transformers_for_the_same_weights():
    sizes, images = SMALL | dict(depths=(2, 2), num_heads=(1, 2)), random_images(2, 3, 32, 32)
    theirs = shaken(SwinModel(SwinConfig(**sizes, drop_path_rate=0.0)))
    ours = SwinTransformer(**sizes, in_chans=3)
    load_swin_weights(ours, theirs.state_dict())
    assert_equal(ours, lambda images: theirs(images).pooler_output, images)
    torch.testing.assert_close(ours.cells(images), theirs(images).last_hidden_state, **CLOSE)


def test_swin_tiny_has_as_many_parameters_as_the_original():
    assert sum(weight.numel() for weight in SwinTransformer(in_chans=3).parameters()) == 27_519_354


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
    """The same weights under other names; transformers has query, key and value each by itself."""
    if names is TRANSFORMERS_4:
        for key in [key for key in weights if ".qkv." in key]:
            parts = zip("qkv", weights.pop(key).chunk(3), strict=True)
            weights |= {key.replace("qkv", name): part for name, part in parts}
    for ours, theirs in names:
        weights = {re.sub(ours, theirs, key): value for key, value in weights.items()}
    return weights


def ones(*names):
    return {name: torch.ones(3) for name in names}


@pytest.mark.parametrize(
    ("names", "more"),
    [
        ([], {}),
        (MICROSOFT, {}),
        (TIMM, {}),
        (TRANSFORMERS_4, {}),
        ([], ones("head.weight", "head.bias")),
        ([], ones("head.fc.weight", "head.fc.bias")),
        ([], ones("classifier.weight", "classifier.bias")),
        (MICROSOFT, ones("layers.0.blocks.1.attn.relative_position_index", "layers.0.blocks.1.attn_mask")),
    ],
    ids="ours Microsoft timm transformers head head.fc classifier tables".split(),
)
def test_weights_load_under_all_names_without_heads_and_derived_tables(names, more):
    swin, expected = SwinTransformer(**SMALL), small_weights()
    load_swin_weights(swin, renamed(small_weights(), names) | more)
    assert all(torch.equal(value, expected[key]) for key, value in swin.state_dict().items())


def test_summed_rgb_weights_see_a_grey_image_as_three_equal_channels():
    colour, grey = shaken(SwinTransformer(**SMALL, in_chans=3)), SwinTransformer(**SMALL)
    load_swin_weights(grey, colour.state_dict())
    images = random_images(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), **CLOSE)


@pytest.mark.parametrize(
    ("names", "lost", "more", "fault"),
    [
        ([], "norm.weight", {}, "norm.weight is missing"),
        ([], "norm.bias", {"norm.gain": torch.ones(32)}, "norm.gain is left over"),
        ([], "norm.bias", {"norm.bias": torch.ones(31)}, r"norm.bias is \(31,\) instead of"),
        (
            TRANSFORMERS_4,
            "swin.encoder.layers.1.blocks.0.attention.self.key.weight",
            {},
            "stages.1.0.attn.qkv.weight is missing",
        ),
    ],
    ids=["missing", "left over", "other shape", "no key projection"],
)
def test_weights_that_do_not_fit_are_a_value_error_that_names_them(names, lost, more, fault):
    weights = renamed(small_weights(), names)
    del weights[lost]
    with pytest.raises(ValueError, match=fault):
        load_swin_weights(SwinTransformer(**SMALL), weights | more)


# ---------------------------------------------------------------------------- windows and shift


def touched(shift, row, column):
    """(6, 6) bool: where on the map a block's output changes when the input changes at one place."""
    torch.manual_seed(0)
    block = SwinBlock(8, 2, side=6, window_size=3, shift=shift, drop_path=0.0)
    x = random_images(1, 6, 6, 8)
    y = x.clone()
    y[:, row, column].neg_()
    return (block(x) != block(y)).any(-1)[0]


@pytest.mark.parametrize(
    ("shift", "place", "first", "last"),
    [(0, 0, 0, 2), (1, 3, 1, 3), (1, 0, 0, 0), (1, 5, 4, 5)],
    ids=["its window", "across a border", "not the opposite edge", "nor from there"],
)
def test_attention_stays_within_its_window_which_a_shift_moves(shift, place, first, last):
    """The window has the rows and columns first ... last."""
    side = (torch.arange(6) >= first) & (torch.arange(6) <= last)
    assert torch.equal(touched(shift, place, place), side[:, None] & side)


def test_every_second_block_is_shifted_but_not_where_one_window_covers_the_map():
    stages = SwinTransformer(**SMALL).stages
    shifted = [[block.shift > 0 for block in stage] for stage in stages]
    assert shifted == [[False, True], [False, True], [False, False]]


def test_a_window_larger_than_the_map_is_the_map():
    small = dict(image_size=16, embed_dim=8, depths=(2,), num_heads=(2,))
    images = random_images(2, 1, 16, 16)
    larger, equal = (shaken(SwinTransformer(**small, window_size=size)) for size in (7, 4))
    equal.load_state_dict(larger.state_dict())
    assert torch.equal(larger(images), equal(images))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(image_size=34), "do not divide"),  # half a patch is left
        (dict(image_size=40, window_size=5), "do not divide"),  # maps of 10, 5 and 2.5
        (dict(image_size=48), "do not divide"),  # maps of 12, 6 and 3, windows of 2
        (dict(image_size=8), "do not divide"),  # smaller than one position of the last map
        (dict(num_heads=(1, 2)), "heads"),
        (dict(num_heads=(1, 3, 4)), "heads"),
    ],
)
def test_sizes_that_do_not_fit_are_a_value_error_with_a_size_that_does(sizes, said):
    with pytest.raises(ValueError, match=said) as error:
        SwinTransformer(**SMALL | sizes)
    if suggested := re.search(r"(\d+) pixels would fit", str(error.value)):
        SwinTransformer(**SMALL | sizes | dict(image_size=int(suggested[1])))


def test_windows_are_cut_row_by_row_and_put_together_again():
    places = torch.arange(16).view(1, 4, 4, 1)
    windows = to_windows(places, 2)
    assert windows.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(from_windows(windows, 4), places)


# ----------------------------------------------------------------------------- stochastic depth


def test_drop_path_drops_its_share_of_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    samples = DropPath(0.3).train()(torch.ones(10_000, 2, 3)).flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1)) and samples.unique().numel() == 2
    # 5 standard errors: √(0.3 × 0.7 / 10,000) and √(0.3 / 0.7 / 10,000)
    assert (samples == 0).float().mean().item() == pytest.approx(0.3, abs=0.023)
    assert samples.mean().item() == pytest.approx(1, abs=0.033)


def test_drop_path_drops_nothing_in_evaluation():
    x = random_images(50, 2, 3)
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_stochastic_depth_grows_in_equal_steps():
    stages = SwinTransformer(**SMALL, drop_path=0.5).stages
    rates = [block.drop_path.rate for stage in stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
