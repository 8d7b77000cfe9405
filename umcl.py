"""UMCL: Unified Medical Image-Text-Label Contrastive Learning With Continuous Prompt.

Wang, arXiv 2307.05920, BIBM 2023. The paper has no code; each choice below is marked *paper* (stated by its
abstract or a summary of it), *family* (what the papers it builds on do) or *ours*. REPRODUCE.md has the
equations and lists all of these choices.

Symbol            Name here                        Shape and type
B                 -                                images of a batch
N, E              -                                those that have a text; those that have none
H, W, D, L        -                                height, width, embedding, tokens
C                 -                                findings, "No Finding" among them
x_i               images                           (B, 1, H, W) float
t_i               input_ids, attention_mask        (B, L) int64
y_i               labels                           (B, C) bool; a row without any is unknown
v_i, u_j          image_features, text_features    (N, D) float, unit length
τ                 logit_scale                      () float, at most 100, multiplies the cosine
s_ij              logits                           (N, N) float, row = image, column = text
F_ij              false_negatives                  (N + E, N) bool, True = text j could be image i's as well
p_1 ... p_M       ContinuousPrompt.context         (prompt_length, hidden) float, in prompts.py
M (Swin)          window_size                      positions a side of one attention window

In reading order: which pairs are false negatives and the loss without them, the paper's idea; the model;
BERT's wrapper; the Swin Transformer.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_SCALE = 100.0  # family: CLIP


# ------------------------------------------------------------------------ image-text-label contrast


def label_mask(image_labels, text_labels, rule):
    """Which texts could as well have been written for which images, by their labels.

    That labels tell the false negatives is the paper's; that the same labels do is family (UniCL).
    A report speaks of the whole image, so it fits the images with exactly its findings: rule "equal",
    y_j = y_i. A label prompt states only what it names, so it fits every image that has it all: rule
    "subset", y_j ⊆ y_i. With one finding an image both say "same label"; the two rules are ours.

    Args:
        image_labels: (N, C) bool, the findings that each image has, or may have.
        text_labels: (T, C) bool, the findings that each text stands for.
        rule: "equal" or "subset".

    Returns:
        (N, T) bool. A row without any label is unknown and is never True.

    Raises:
        ValueError: another rule, or labels that are not bool (of integers, ~ flips the bits).
    """
    if image_labels.dtype != torch.bool or text_labels.dtype != torch.bool:
        raise ValueError(f"labels have to be bool, not {image_labels.dtype} and {text_labels.dtype}")
    if rule not in ("equal", "subset"):
        raise ValueError(f'the rule is "equal" or "subset", not {rule!r}')
    # Counts of the findings that one side has and the other lacks; only whether they are 0 is used.
    fits = (~image_labels).float() @ text_labels.float().T == 0
    if rule == "equal":
        fits &= image_labels.float() @ (~text_labels).float().T == 0
    return fits & image_labels.any(1)[:, None] & text_labels.any(1)[None, :]


def report_mask(present, absent, diseases, text_ids, image_ids):
    """F_ij of reports: a report equal to report j is of image i, or of an image with the same labels.

    The same are those that know the same: what is unknown of one image alone may make its report another
    (ours). Reports of two normal chests can differ, so they stay each other's negatives, and so do those of
    two chests with devices alone: labels count only where a disease is among them (ours).

    Args:
        present, absent: (N, C) bool, what is known of each report's image. diseases: (C,) bool, which are.
        text_ids, image_ids: (N,) int64, alike where two reports, or their images, are the same.

    Returns:
        (N, N) bool, True = report j is no negative of image i.
    """
    known = torch.cat([present, absent], dim=1) & (present & diseases).any(1, keepdim=True)
    fits = label_mask(known, known, "equal") | (image_ids[:, None] == image_ids)
    equal_texts = (text_ids[:, None] == text_ids).float()
    return fits.float() @ equal_texts > 0


def prompt_mask(absent, named):
    """F_ij of label prompts: image i may have the finding that prompt j names (ours).

    It may unless it is known not to: a finding that nobody looked for makes no negative.

    Args:
        absent: (N + E, C) bool, the findings that each image is known not to have.
        named: (N,) int64, the finding that each prompt names.

    Returns:
        (N + E, N) bool, True = prompt j is no negative of image i.
    """
    return label_mask(~absent, F.one_hot(named, absent.shape[1]).bool(), "subset")


def contrastive_loss(image_features, text_features, logit_scale, false_negatives=None, text_ids=None):
    """L = ½ (L_i→t + L_t→i) without the pairs that are false negatives (REPRODUCE.md, the loss).

    The paper mitigates false negatives; that they leave the sums, and are not drawn together, is ours.

    Args:
        image_features, text_features: (N, D) float, unit length; row i of one belongs to row i of the other.
            Further images, (N + E, D), have no text of their own: negatives of the N texts alone (ours).
        logit_scale: () float, multiplies the cosine.
        false_negatives: (N + E, N) bool, F: True removes the pair. The diagonal always counts. None removes
            nothing; without text_ids and further images that is CLIP's loss.
        text_ids: (N,) int64, alike where two texts are equal. Given them, an image meets each different text
            once, however often the batch has it; else it learns how frequent the texts are (ours).

    Returns:
        () float in nats, mean of image-to-text and text-to-image.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, n = len(image_features), len(text_features)
    check_shapes(image_features, text_features, false_negatives)
    logits = logit_scale * image_features @ text_features.T  # s_ij
    own = torch.eye(rows, n, dtype=torch.bool, device=logits.device)
    if false_negatives is not None:
        logits = logits.masked_fill(false_negatives & ~own, -math.inf)
    of_images = logits[:n]  # s_ij of the sum over j
    if text_ids is not None:
        repeated = (text_ids[:, None] == text_ids).tril(-1).any(1)  # an equal text stands before it
        of_images = of_images.masked_fill(repeated & ~own[:n], -math.inf)
    target = torch.arange(n, device=logits.device)
    loss_i2t = F.cross_entropy(of_images, target)
    loss_t2i = F.cross_entropy(logits.T, target)
    return (loss_i2t + loss_t2i) / 2


def check_shapes(image_features, text_features, pairs):
    """Refuses what contrastive_loss and attracting_loss cannot compare, by a ValueError."""
    rows, n = len(image_features), len(text_features)
    alike = image_features.shape[1:] == text_features.shape[1:] and text_features.ndim == 2
    if not alike or n == 0 or rows < n or (rows > n and pairs is None):
        both = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        raise ValueError(f"image and text features need one and the same shape (N, D) with N > 0, not {both}")
    if pairs is not None and pairs.shape != (rows, n):
        raise ValueError(f"the pairs need the shape {(rows, n)}, not {tuple(pairs.shape)}")


def attracting_loss(image_features, text_features, logit_scale, same, kind):
    """Peers' objectives, for comparison: same-label pairs are drawn together, not left out (family).

    Args:
        image_features, text_features, logit_scale: as for contrastive_loss.
        same: (N + E, N) bool, F: the pairs that are positives beside the diagonal.
        kind: "unicl", the mean over an image's positives outside the logarithm (UniCL 2204.03610);
            "multi-positive", their sum inside it (MIL-NCE 1912.06430); "soft", cross-entropy with the softmax
            of label similarity as target (MedCLIP 2210.10163; here it is 1 or 0, divided by 0.25, ours).

    Returns:
        () float in nats, mean of both directions.
    """
    check_shapes(image_features, text_features, same)
    n, logits = len(text_features), logit_scale * image_features @ text_features.T
    same = same | torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)

    def one_way(logits, same):
        log_p = logits.log_softmax(1)
        if kind == "multi-positive":
            return -log_p.masked_fill(~same, -math.inf).logsumexp(1).mean()
        alike = same.to(log_p.dtype)
        target = alike / alike.sum(1, keepdim=True) if kind == "unicl" else (alike / 0.25).softmax(1)
        return -(target * log_p).sum(1).mean()

    return (one_way(logits[:n], same[:n]) + one_way(logits.T, same.T)) / 2


class UMCL(nn.Module):
    """Two towers and one space for images, reports and label prompts (paper).

    Args:
        image_encoder: images -> (B, image_encoder.num_features), a SwinTransformer.
        text_encoder: a TextEncoder.
        prompt: a ContinuousPrompt, or None to encode label prompts as plain text.
        embed_dim: D (not in the paper; MedCLIP uses 512).
    """

    def __init__(self, image_encoder, text_encoder, prompt, *, embed_dim=512):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.prompt = prompt
        self.image_projection = nn.Linear(image_encoder.num_features, embed_dim, bias=False)  # W_v
        self.text_projection = nn.Linear(text_encoder.num_features, embed_dim, bias=False)  # W_u
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # family: CLIP's temperature
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # family: CLIP

    def forward(self, pieces, recompute=False):
        """All features of a batch, from one call, since DistributedDataParallel allows one.

        They come in pieces, since --micro-batch-size cuts them.

        Args:
            pieces: any number of ("image", images) and of ("text" or "prompt", input_ids, attention_mask).
            recompute: keep no activations of a piece, and compute them again in the backward pass.

        Returns:
            the pieces' features one below the other, (N, D) float32, unit length; logit_scale, () float.
        """
        encode = {"image": self.encode_image, "text": self.encode_text, "prompt": self.encode_prompt}
        features = [
            checkpoint(encode[kind], *inputs, use_reentrant=False) if recompute else encode[kind](*inputs)
            for kind, *inputs in pieces
        ]
        return torch.cat(features), self.logit_scale()

    def project_image(self, features):
        """(..., F) float, features of the image tower -> (..., D) float32, unit length."""
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def encode_image(self, images):
        """(B, in_chans, H, W) float -> v (B, D) float32, unit length."""
        return self.project_image(self.image_encoder(images))

    def encode_text(self, input_ids, attention_mask, prompt=None):
        """Reports: (B, L) int64, (B, L) -> u (B, D) float32, unit length."""
        hidden = self.text_encoder(input_ids, attention_mask, prompt)
        return F.normalize(self.text_projection(hidden).float(), dim=-1)

    def encode_prompt(self, input_ids, attention_mask):
        """Label prompts, continuous prompt put in: (B, L) int64, (B, L) -> u (B, D) float32, unit length."""
        return self.encode_text(input_ids, attention_mask, self.prompt)

    def logit_scale(self):
        """τ: () float, exp of the learned log-scale, at most 100 (family: CLIP)."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)


class TextEncoder(nn.Module):
    """BERT (paper: BioClinicalBERT) whose input embeddings may receive a continuous prompt.

    Args:
        bert: any transformers BertModel; a pooling layer, if it has one, is not used.
        frozen: BERT stays as it is and without dropout (family: LiT, ConVIRT); gradients pass through it to
            the continuous prompt.
    """

    def __init__(self, bert, frozen=False):
        super().__init__()
        self.bert = bert.requires_grad_(not frozen)
        self.frozen = frozen
        self.num_features = bert.config.hidden_size

    def train(self, mode=True):
        super().train(mode)
        self.bert.train(mode and not self.frozen)
        return self

    def forward(self, input_ids, attention_mask, prompt=None):
        """(B, L) int64, (B, L) -> (B, hidden) float, the last layer's mean over the text's own tokens (ours).

        prompt: a ContinuousPrompt, put between [CLS] and the text before BERT adds its positions; None is
            plain BERT. Its vectors act on the text by attention; in the mean they would outvote it.
        """
        embeddings, real = self.bert.get_input_embeddings()(input_ids), attention_mask
        if prompt is not None:
            embeddings, attention_mask = prompt(embeddings, attention_mask)
        hidden = self.bert(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
        if prompt is not None:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + len(prompt.context) :]], dim=1)
        real = real[:, :, None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)


# ------------------------------------------------------------------------------- Swin Transformer
#
# Liu et al., arXiv 2103.14030. Maps are (B, H, W, C) throughout.


def to_windows(x, side):
    """(B, H, W, C) -> (B, windows, side², C), windows row by row."""
    B, H, W, C = x.shape
    return x.view(B, H // side, side, W // side, side, C).transpose(2, 3).reshape(B, -1, side * side, C)


def from_windows(x, H):
    """The inverse of to_windows -> (B, H, H, C)."""
    B, n, area, C = x.shape
    n, side = math.isqrt(n), math.isqrt(area)
    return x.view(B, n, n, side, side, C).transpose(2, 3).reshape(B, H, H, C)


class WindowAttention(nn.Module):
    """Softmax(q kᵀ / √d + bias) v in each window; the bias goes by relative position (Swin, eq. 4).

    Args:
        blocked: (windows, window_size², window_size²) bool, True where a query must not see a key because the
            shift brought them into one window from opposite edges; None without a shift.
    """

    def __init__(self, dim, num_heads, window_size, blocked=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(window_size), torch.arange(window_size))  # (area, 2)
        offset = place[:, None] - place[None, :] + window_size - 1  # (area, area, 2), none below 0
        index = offset[..., 0] * (2 * window_size - 1) + offset[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_buffer("blocked", blocked, persistent=False)

    def bias(self):
        """(heads, area, area) without a shift, (windows, heads, area, area) with one."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return bias if self.blocked is None else bias.masked_fill(self.blocked[:, None], -math.inf)

    def forward(self, x):
        B, n, area, C = x.shape
        qkv = self.qkv(x).view(B, n, area, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, area, C / heads)
        attention = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.bias().to(q.dtype)
        out = attention.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(2, 3).reshape(B, n, area, C))


class DropPath(nn.Module):
    """Stochastic depth: drops the branch for a share of the samples and scales the others up to match."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class SwinBlock(nn.Module):
    """(B, H, W, C) -> the same: W-MSA, or with a shift SW-MSA, and an MLP, each a branch after a norm."""

    def __init__(self, dim, num_heads, side, window_size, shift, drop_path):
        super().__init__()
        self.window_size, self.shift = window_size, shift
        blocked = None
        if shift:
            wrapped = (torch.arange(side) >= side - shift).long()  # the roll brings these round from the edge
            region = (2 * wrapped[:, None] + wrapped)[None, :, :, None]
            region = to_windows(region, window_size)[0, :, :, 0]
            blocked = region[:, :, None] != region[:, None, :]
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, blocked)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = from_windows(self.attn(to_windows(y, self.window_size)), x.shape[1])
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2C): each 2 x 2 patch of the map becomes one token."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, H, W, C = x.shape
        quads = x.view(B, H // 2, 2, W // 2, 2, C)
        quads = quads.permute(0, 1, 3, 4, 2, 5)  # down a column first, the original's order
        return self.reduction(self.norm(quads.reshape(B, H // 2, W // 2, 4 * C)))


class SwinTransformer(nn.Module):
    """Swin Transformer on square images (paper: the image encoder); the defaults are Swin-T for grey images.

    Where a map is no larger than the window, the window is the map and nothing is shifted.

    Args:
        drop_path: stochastic depth of the last block; it grows from 0 in equal steps.

    Raises:
        ValueError: the image cannot be cut into whole patches, windows and merges, or channels into heads.
    """

    def __init__(
        self,
        *,
        image_size=224,
        in_chans=1,
        patch_size=4,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path=0.0,
    ):
        super().__init__()
        stages = len(depths)
        sides = [image_size // (patch_size * 2**i) for i in range(stages)]
        windows = [min(window_size, side) for side in sides]
        if len(num_heads) != stages:
            raise ValueError(f"{stages} depths need as many numbers of heads, not {len(num_heads)}")
        if any(embed_dim * 2**i % heads for i, heads in enumerate(num_heads)):
            raise ValueError(f"{embed_dim} channels, doubled by each merge, do not fit heads {num_heads}")
        if sides[-1] * patch_size * 2 ** (stages - 1) != image_size or any(
            side % window for side, window in zip(sides, windows, strict=True)
        ):
            fits = patch_size * 2 ** (stages - 1) * window_size
            raise ValueError(
                f"an image of {image_size} pixels gives maps of {sides} positions a side, which do not "
                f"divide into windows of {window_size}; {fits} pixels would fit"
            )
        self.num_features = embed_dim * 2 ** (stages - 1)
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_norm = nn.LayerNorm(embed_dim)
        self.merges = nn.ModuleList()  # merges[i] leads into stages[i]
        self.stages = nn.ModuleList()
        for i, (side, window, depth, heads) in enumerate(zip(sides, windows, depths, num_heads, strict=True)):
            dim = embed_dim * 2**i
            shifts = [window // 2 if j % 2 == 1 and window < side else 0 for j in range(depth)]
            blocks = [SwinBlock(dim, heads, side, window, shift, rates.pop(0)) for shift in shifts]
            self.merges.append(PatchMerging(dim // 2) if i > 0 else nn.Identity())
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(self.num_features)
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):  # ours: with Swin's own 0.02 narrow towers learn half as fast
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def cells(self, images):
        """(B, in_chans, H, W) float -> (B, S * S, num_features), the last map after its norm, row by row."""
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))  # (B, H, W, C)
        for merge, blocks in zip(self.merges, self.stages, strict=True):
            x = blocks(merge(x))
        return self.norm(x).flatten(1, 2)

    def forward(self, images):
        """(B, in_chans, H, W) float -> (B, num_features), mean over the cells of the last map."""
        return self.cells(images).mean(1)


_SWIN_NAMES = (  # torchvision | Microsoft, timm | transformers before 5 | transformers from 5 -> ours
    (r"^(module\.|swin\.|encoder\.)+", ""),
    (r"^(features\.0\.0|patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.", "patch_embed."),
    (r"^(features\.0\.2|patch_embed\.norm|embeddings\.norm)\.", "patch_norm."),
    (r"^features\.(\d+)\.(?=\d)", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"^features\.(\d+)\.", lambda m: f"merges.{int(m[1]) // 2}."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.)?(query|key|value|q_proj|k_proj|v_proj)\.", lambda m: f".attn.{m[1][0]}."),
    (r"\.attention\..*relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(mlp\.fc1|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(mlp\.fc2|mlp\.3|output\.dense)\.", ".mlp.2."),
    (r"^layernorm\.", "norm."),
)
# Classifier heads and derived tables.
_NOT_OURS = re.compile(r"^(head|classifier)\.|relative_position_index$|attn_mask$")


def load_swin_weights(swin, state_dict):
    """Puts pre-trained weights into a SwinTransformer, in place.

    Args:
        swin: a SwinTransformer of the same sizes.
        state_dict: with torchvision's, Microsoft's, timm's, transformers' or our own key names. RGB patch
            weights are summed onto one channel when the model takes one: the same as showing it the grey
            image three times.

    Raises:
        ValueError: something other than a classifier head is missing, left over or of another shape.
    """
    # Microsoft keeps a merge at the end of a stage, timm at the start of the next, under the same name.
    ends_a_stage = any(re.search(r"layers\.0\.downsample\.", key) for key in state_dict)
    weights = {}
    for key, value in state_dict.items():
        for pattern, ours in _SWIN_NAMES:
            key = re.sub(pattern, ours, key)
        if ends_a_stage:
            key = re.sub(r"^merges\.(\d+)\.", lambda m: f"merges.{int(m[1]) + 1}.", key)
        if not _NOT_OURS.search(key):
            weights[key] = value
    for key in [key for key in weights if ".attn.q." in key]:  # transformers keeps the three apart
        parts = [weights.pop(key.replace(".attn.q.", f".attn.{name}."), torch.empty(0)) for name in "qkv"]
        if len({part.shape for part in parts}) == 1:
            weights[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    patches = weights.get("patch_embed.weight", torch.empty(0))
    if patches.shape[1:2] == (3,) and swin.patch_embed.in_channels == 1:
        weights["patch_embed.weight"] = patches.sum(1, keepdim=True)

    expected = swin.state_dict()
    faults = [f"{key} is missing" for key in expected.keys() - weights.keys()]
    faults += [f"{key} is left over" for key in weights.keys() - expected.keys()]
    for key in expected.keys() & weights.keys():
        if weights[key].shape != expected[key].shape:
            faults.append(f"{key} is {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}")
    if faults:
        first = "; ".join(sorted(faults)[:4])
        raise ValueError(f"not the weights of this Swin Transformer: {first} ({len(faults)} faults in all)")
    swin.load_state_dict(weights)
