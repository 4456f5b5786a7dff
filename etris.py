"""2. ETRIS: a frozen CLIP, the Bridger and a light decoder (arXiv 2307.11545, section 3).

The Bridger is meant to let the two frozen encoders exchange information between their stages:

    v, t, previous = visual.stem(images), text.stem(tokens), None
    for each stage:  v, t = visual.stage(v), text.stage(t)
                     Δv, Δt, previous = bridge(v, t, previous)
                     v, t = v + Δv, t + Δt
    logits = projector(global_alignment(hierarchical_alignment(maps, sentence), words), sentence)

B batch · L words · D text width (also the decoder's) · E joint space · C channels · S image side ·
h w the decoder's grid (S/16 each way, a ViT's S/patch) · N = h·w pixel positions · d bridge width.
Where the paper and the authors' code disagree, we follow the code; `# differs:` says so, and
"ledger n" is row n of docs/differences.md. docs/architecture.md lists the shapes of a real model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_model import CLIP, Attention, MultiHeadAttention, resize_positions
from utils.common import UserError
from utils.tokenizer import padding_mask


# ------------------------------------------------------------------------ the Bridger, section 3.2
class Interactor(nn.Module):
    """ITA, equation 5: self-attention, cross-attention, feed-forward; added, then normalized."""

    def __init__(self, width: int, heads: int, hidden: int = 128, dropout: float = 0.1):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, other, key_padding_mask=None, other_padding_mask=None):
        """x (B, N, d), other (B, M, d), masks (B, N) and (B, M), True at padding → (B, N, d)."""
        attended = self.self_attn(x, key_padding_mask=key_padding_mask)
        x = self.norm1(x + self.dropout(attended))
        # differs: in equation 5 `other` has passed its own self-attention, in the code it has not
        attended = self.cross_attn(x, other, key_padding_mask=other_padding_mask)
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class GatedInteractor(nn.Module):
    """The ViT's: x ⊙ attention(x → other). differs: the paper draws equation 5 here (ledger 2)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):  # unused, as in the original
        super().__init__()
        self.cross_attn = Attention(width, heads)

    def forward(self, x, other, key_padding_mask=None, other_padding_mask=None):
        """Shapes as above."""
        return x * self.cross_attn(x, other, key_padding_mask=other_padding_mask)


def zoom_layer(in_channels: int, out_channels: int, factor: int, up: bool, norm: bool):
    """Equation 4: shrink a map by `factor`, or grow it (up), with a convolution without overlap."""
    conv_type = nn.ConvTranspose2d if up else nn.Conv2d
    conv = conv_type(in_channels, out_channels, factor, stride=factor, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if not norm:
        return nn.Sequential(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Bridge(nn.Module):
    """One stage's bridge, equations 1–3: both streams → width d → interactors → residuals."""

    def __init__(self, clip: CLIP, stage: int, width: int, heads: int, first: bool, dropout=0.1):
        super().__init__()
        channels = clip.visual.channels[stage]
        strides = clip.visual.strides[stage], clip.visual.strides[1]
        factor = max(strides) // min(strides)  # to the middle stage's grid, which bridges share
        up = stage == 2  # the last stage's own grid is smaller
        is_vit = clip.config.patch_size is not None
        interactor = GatedInteractor if is_vit else Interactor
        self.zoom_in = zoom_layer(channels, width, factor, up=up, norm=is_vit)
        self.zoom_out = zoom_layer(width, channels, factor, up=not up, norm=is_vit)
        self.linear_in = nn.Linear(clip.config.text_width, width)
        self.linear_out = nn.Linear(width, clip.config.text_width)
        self.interact_v = interactor(width, heads, dropout=dropout)
        self.interact_t = interactor(width, heads, dropout=dropout)
        self.norm_v = nn.Identity() if first else nn.LayerNorm(width)
        self.norm_t = nn.Identity() if first else nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, v, t, previous=None, key_padding_mask=None):
        """v (B, C, H, W), t (B, L, D), mask (B, L) → Δv, Δt, and `previous` of the next bridge."""
        x = self.zoom_in(v)
        B, d, h, w = x.shape
        x = x.flatten(2).mT  # (B, N, d)
        y = self.linear_in(t)  # (B, L, d)
        # differs: equation 2 adds the interactors' last output, the code their input, normalized
        if previous is not None:
            x = self.norm_v(x + previous[0])
            y = self.norm_t(y + previous[1])
        new_x = self.interact_v(x, y, other_padding_mask=key_padding_mask)  # (B, N, d)
        new_y = self.interact_t(y, x, key_padding_mask=key_padding_mask)  # (B, L, d)
        # differs: equation 3 adds these to the *next* stage's output, the code to this stage's
        delta_v = self.zoom_out(new_x.mT.unflatten(2, (h, w)))  # (B, C, H, W)
        delta_t = self.linear_out(new_y)  # (B, L, D)
        return delta_v, delta_t, (x, y)


def build_bridger(clip: CLIP, width: int, heads: int | None, stages, dropout=0.1):
    """Bridges for the given stages, by stage number."""
    if heads is None:  # the authors', at width 64; fewer where a head would be narrower than theirs
        most = 4 if clip.config.patch_size is None else 8
        heads = min(most, max(1, most * width // 64))
    bridger = nn.ModuleDict()
    for stage in stages:
        first = stage == stages[0]
        bridger[str(stage)] = Bridge(clip, stage, width, heads, first, dropout)
    return bridger


# ------------------------------------------------------------------------ the decoder, section 3.3
def conv_bn(in_channels: int, out_channels: int, kernel_size=1, stride=1, conv=nn.Conv2d):
    """Convolution without bias, BatchNorm, ReLU; at stride 1 the map keeps its size."""
    padding = kernel_size // 2 if stride == 1 else 0
    layer = conv(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Gate(Attention):
    """Equation 6: features ⊙ attention(features → one sentence token).

    The softmax over one key is 1: every position gets W_o(W_v s + b_v) + b_o. What makes queries
    and keys never learns: 2·(D² + D) parameters, 1,575,936 in three gates of width 512.
    """

    def forward(self, features, sentence):
        """features (B, N, D), sentence (B, D) → (B, N, D)."""
        return features * super().forward(features, sentence[:, None])


class HierarchicalAlignment(nn.Module):
    """HA, equations 6 and 7: three stage maps on one grid, gated by the sentence, merged."""

    def __init__(self, clip: CLIP, heads: int = 8):
        super().__init__()
        width = clip.config.text_width
        low, middle, _ = clip.visual.channels
        factor = 2 if clip.config.patch_size is None else 1  # between a ResNet's stages
        self.sentence = nn.Linear(clip.config.embed_dim, width)
        down = conv_bn(low, width, factor, factor)
        up = conv_bn(clip.config.embed_dim, width, factor, factor, conv=nn.ConvTranspose2d)
        self.project = nn.ModuleList([down, conv_bn(middle, width), up])
        self.gates = nn.ModuleList([Gate(width, heads) for _ in range(3)])
        self.merge = conv_bn(3 * width, width)
        self.coordinates = nn.Sequential(conv_bn(width + 2, width, 3), conv_bn(width, width, 3))

    def forward(self, maps, sentence):
        """Three stage maps, sentence (B, E) → F_v (B, D, h, w)."""
        sentence = self.sentence(sentence)  # (B, D)
        gated = []
        for feature, project, gate in zip(maps, self.project, self.gates, strict=True):
            x = project(feature)  # (B, D, h, w)
            B, D, h, w = x.shape
            x = gate(x.flatten(2).mT, sentence)  # (B, N, D)
            gated.append(x.mT.unflatten(2, (h, w)))
        merged = self.merge(torch.cat(gated, dim=1))  # (B, D, h, w)

        # two channels more tell the convolutions where they are
        columns = torch.linspace(-1, 1, w, device=merged.device)
        rows = torch.linspace(-1, 1, h, device=merged.device)
        coordinates = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)])
        coordinates = coordinates.to(merged.dtype).expand(B, 2, h, w)
        coordinates = coordinates.contiguous(memory_format=torch.channels_last)
        return self.coordinates(torch.cat([merged, coordinates], dim=1))


def sine_positions(count: int, width: int, device=None) -> Tensor:
    """(count, width): sin and cos alternating, frequencies 10000^(−2k/width), positions 0, 1, …"""
    positions = torch.arange(count, device=device)
    exponents = torch.arange(0, width, 2, device=device) / width
    frequencies = torch.exp(-math.log(10000) * exponents)  # rounded as the original's
    angles = positions[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def sine_grid(height: int, width: int, channels: int, device=None) -> Tensor:
    """(H·W, channels): the first half of the channels counts columns (x), the second rows (y)."""
    x = sine_positions(width, channels // 2, device)
    y = sine_positions(height, channels // 2, device)
    return torch.cat([x.repeat(height, 1), y.repeat_interleave(width, dim=0)], dim=1)


class DecoderLayer(nn.Module):
    """Equation 8: self-attention, attention to words, feed-forward; norms before and after each."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.self_norm = nn.LayerNorm(width)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        hidden = [nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(width)]
        self.ffn = nn.Sequential(*hidden, nn.Linear(width, width))

    def forward(self, x, words, key_padding_mask, pixel_positions, word_positions):
        """x (B, N, D), words (B, L, D), mask (B, L), positions (N, D) and (L, D) → (B, N, D)."""
        value = self.norm1(x)
        attended = self.self_attn(value + pixel_positions, value + pixel_positions, value)
        x = x + self.dropout(self.self_norm(attended))
        query = self.norm2(x) + pixel_positions
        key = words + word_positions
        attended = self.cross_attn(query, key, words, key_padding_mask=key_padding_mask)
        x = x + self.dropout(self.cross_norm(attended))
        return x + self.dropout(self.ffn(self.norm3(x)))


class GlobalAlignment(nn.Module):
    """GA, equation 8. differs: the paper attends to the sentence F_s, the code to the words."""

    def __init__(self, clip: CLIP, dropout: float = 0.1, layers: int = 3):
        super().__init__()
        width = clip.config.text_width
        heads = max(1, min(8, width // 32))  # the authors' 8; fewer where a head would be narrow
        self.layers = nn.ModuleList([DecoderLayer(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, features, words, key_padding_mask):
        """features (B, D, h, w), words (B, L, D), key_padding_mask (B, L) → F_c (B, D, h, w)."""
        B, D, h, w = features.shape
        pixel_positions = sine_grid(h, w, D, features.device)  # (N, D)
        word_positions = sine_positions(words.shape[1], D, features.device)  # (L, D)
        x = features.flatten(2).mT  # (B, N, D)
        for layer in self.layers:
            x = layer(x, words, key_padding_mask, pixel_positions, word_positions)
        return self.norm(x).mT.unflatten(2, (h, w))


class Projector(nn.Module):
    """Equation 9: features at S/4, then one 3×3 convolution whose kernel the sentence writes."""

    def __init__(self, clip: CLIP):
        super().__init__()
        width = clip.config.text_width
        half = width // 2
        up = nn.Upsample(scale_factor=2, mode="bilinear")
        conv1 = conv_bn(width, width, 3)
        conv2 = conv_bn(width, half, 3)
        self.vis = nn.Sequential(up, conv1, up, conv2, nn.Conv2d(half, half, 1))
        self.txt = nn.Linear(clip.config.embed_dim, half * 9 + 1)

    def kernel(self, sentence):
        """(B, E) → kernels (B, D/2, 3, 3), biases (B,). differs: the paper has D biases, not 1."""
        written = self.txt(sentence)
        return written[:, :-1].unflatten(1, (-1, 3, 3)), written[:, -1]

    def forward(self, features, sentence):
        """features (B, D, h, w), sentence (B, E) → logits (B, 1, 4h, 4w)."""
        kernel, bias = self.kernel(sentence)
        x = self.vis(features)
        B, C, H, W = x.shape
        x = x.reshape(1, B * C, H, W)  # a group of channels is an image with a kernel of its own
        logits = F.conv2d(x, kernel, padding=1, groups=B)  # (1, B, H, W)
        return logits.transpose(0, 1) + bias[:, None, None, None]


def text_to_pixel_loss(logits: Tensor, masks: Tensor, nearest: bool = False) -> Tensor:
    """Equations 10 and 11: −log σ(z) on the object, −log(1 − σ(z)) elsewhere, averaged: BCE.

    logits (B, 1, h, w), masks (B, 1, S, S) in 0..1. differs: a target is the mask's mean over 4×4
    pixels, in the original the top-left one (nearest=True), up to 3 pixels off (ledger).
    """
    targets = F.interpolate(masks, logits.shape[2:], mode="nearest" if nearest else "area")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # out of half precision
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


# ---------------------------------------------------------------------------------- the whole model
def check_size(clip: CLIP, *sides: int):
    """UserError where the image encoder's stride does not divide a side, or one is over 4096."""
    stride = clip.visual.stride
    if any(side % stride or side > 4096 for side in sides):
        shape = "×".join(map(str, sides))
        raise UserError(f"image size {shape}: choose --size a multiple of {stride}, at most 4096")


class ETRIS(nn.Module):
    """The parts are passed in, so that an experiment can swap one.

    connect: an extra branch beside the attention pool, as in the released models.
    size: the image side the model is made for. max_tokens: of a sentence, marks included.
    """

    def __init__(
        self,
        clip,
        bridger,
        hierarchical_alignment,
        global_alignment,
        projector,
        connect=None,
        size=416,
        max_tokens=17,
    ):
        super().__init__()
        self.clip = clip
        self.bridger = bridger
        self.connect = connect
        self.hierarchical_alignment = hierarchical_alignment
        self.global_alignment = global_alignment
        self.projector = projector
        self.size = size
        self.max_tokens = max_tokens
        self.mask_padding = True  # from the Bridger too, not from the decoder alone
        self.align_corners = False  # how logits are enlarged to the image's size
        self.system = "etris"
        self.config = {}  # the values that rebuild this model
        self.options = {}  # those of them that `build_etris` decided
        self.recorded = None  # a dict while `activations` runs

    @property
    def backbone(self) -> CLIP:
        return self.clip

    def train(self, mode: bool = True):
        """Frozen means frozen: CLIP stays in eval mode, so its BatchNorm statistics do not move."""
        super().train(mode)
        self.clip.eval()
        return self

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """All that training changes, buffers of trained modules included; a checkpoint holds it."""
        state = self.state_dict(keep_vars=True).items()
        return {name: x for name, x in state if not name.startswith("clip.") or x.requires_grad}

    def auxiliary_loss(self):
        """What training adds to the loss: here nothing; another system has a regularizer."""
        return 0.0

    def encode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) → three maps, words (B, L, D), sentence (B, E)."""
        visual = self.clip.visual
        text = self.clip
        key_padding_mask = padding_mask(tokens) if self.mask_padding else None
        v = visual.stem(images)
        t = text.stem(tokens)
        previous = None
        maps = []
        stages = zip(visual.stages, text.stages, strict=True)
        for i, (visual_stage, text_stage) in enumerate(stages):
            v = visual_stage(v)
            t = text_stage(t)
            self.record(f"visual{i}.before", visual.to_map(v))
            self.record(f"text{i}.before", t)
            if str(i) in self.bridger:
                bridge = self.bridger[str(i)]
                delta_v, delta_t, previous = bridge(visual.to_map(v), t, previous, key_padding_mask)
                v = visual.add_to_map(v, delta_v)
                t = t + delta_t
            maps.append(visual.to_map(v))  # (B, C_i, H_i, W_i)
            self.record(f"visual{i}.after", maps[i])
            self.record(f"text{i}.after", t)

        # the decoder reads the last map in the joint space, a ResNet's through a ReLU as released
        last = visual.head(v)  # (B, E, H, W)
        if self.connect is not None:
            last = last + self.connect(v)
        if self.clip.config.patch_size is None:
            last = F.relu(last)
        words, sentence = text.head(t, tokens)
        return [*maps[:2], last], words, sentence

    def forward(self, images, tokens):
        """images (B, 3, S, S) normalized, tokens (B, L) → logits (B, 1, S/4, S/4)."""
        check_size(self.clip, *images.shape[2:])
        maps, words, sentence = self.encode(images, tokens)
        features = self.hierarchical_alignment(maps, sentence)  # (B, D, h, w)
        features = self.global_alignment(features, words, padding_mask(tokens))
        self.record("features", features)
        self.record("words", words)
        self.record("sentence", sentence)
        return self.projector(features, sentence)

    def record(self, name: str, x: Tensor):
        """Keep an intermediate result for `activations`."""
        if self.recorded is not None:
            self.recorded[name] = x.detach()

    @torch.no_grad()
    def activations(self, images, tokens) -> dict[str, Tensor]:
        """Intermediate results by name: visual0.before … text2.after, features, words, sentence,
        kernel, logits, and attention weights (B, heads, N, M) by their module's name."""
        attentions = {n: m for n, m in self.named_modules() if isinstance(m, MultiHeadAttention)}
        self.recorded = {}
        for module in attentions.values():
            module.save_attention = True
        try:
            self.record("logits", self(images, tokens))
            self.record("kernel", self.projector.kernel(self.recorded["sentence"])[0])
            for name, module in attentions.items():
                if module.attention_weights is not None:
                    self.record(name, module.attention_weights)
            return self.recorded
        finally:
            self.recorded = None
            for module in attentions.values():
                module.save_attention = False
                module.attention_weights = None


def positional_embeddings(clip: CLIP) -> list[nn.Parameter]:
    """Text's and image's. The authors train them, though they call CLIP frozen."""
    holder = clip.visual if clip.config.patch_size else clip.visual.attnpool
    return [clip.positional_embedding, holder.positional_embedding]


def scale_down_init(model):
    """Ours: small initial weights where bridges and decoder branches join and kernels are written.

    A tenth of torch's: the first model is closer to plain CLIP, and its logits are smaller (ledger
    29, measured).
    """
    layers = [model.projector.txt]
    for bridge in model.bridger.values():
        weighted = [layer for layer in bridge.zoom_out if hasattr(layer, "weight")]
        layers += [bridge.linear_out, weighted[-1]]  # the last: a ViT's is a BatchNorm
    for decoder_layer in model.global_alignment.layers:
        layers += [decoder_layer.self_norm, decoder_layer.cross_norm]
    for layer in layers:
        layer.weight.data.mul_(0.1)


def build_etris(
    clip: CLIP,
    size: int = 416,
    max_tokens: int = 17,
    *,
    width: int = 64,
    heads: int | None = None,
    stages: tuple[int, ...] = (0, 1, 2),
    dropout: float = 0.1,
    bridge_dropout: float | None = None,
    released: bool = False,
    train_positions: bool | None = None,
    connect: bool = False,
    mask_padding: bool = True,
) -> ETRIS:
    """ETRIS around a frozen CLIP, in training mode; width, heads and stages are the Bridger's.

    bridge_dropout: the Bridger's, 0.1 in the original; as `dropout`, the decoder's, unless given.
    released: what the authors released; else the last three, whose defaults are ours (ledger).
    """
    check_size(clip, size)
    is_vit = clip.config.patch_size is not None
    if train_positions is None:
        train_positions = bool(stages)  # without bridges, CLIP stays plain CLIP
    if released:
        train_positions = True
        connect = True
        mask_padding = False
        if is_vit:  # the authors resize a ViT's positions once, and train them at that size
            side = size // clip.config.patch_size
            positions = resize_positions(clip.visual.positional_embedding.data, side, side)
            clip.visual.positional_embedding = nn.Parameter(positions)

    # the decoder before the Bridger, so that a seed gives the same decoder with and without one
    hierarchical_alignment = HierarchicalAlignment(clip)
    global_alignment = GlobalAlignment(clip, dropout)
    projector = Projector(clip)
    branch = None
    if connect and not is_vit:
        branch = conv_bn(clip.visual.channels[2], clip.config.embed_dim)[:2]  # without the ReLU
    if bridge_dropout is None:
        bridge_dropout = dropout
    bridger = build_bridger(clip, width, heads, stages, bridge_dropout)
    model = ETRIS(
        clip, bridger, hierarchical_alignment, global_alignment, projector, branch, size, max_tokens
    )

    for parameter in positional_embeddings(clip):
        parameter.requires_grad_(train_positions)
    if not released:
        scale_down_init(model)
    elif branch is not None:
        branch.requires_grad_(False)  # random and never trained: ledger 10c
    model.align_corners = released
    model.mask_padding = mask_padding
    options = {"train_positions": train_positions, "connect": connect, "mask_padding": mask_padding}
    model.options = options
    return model.train()
