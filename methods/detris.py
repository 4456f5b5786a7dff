"""DETRIS, the third system: DINOv2, trained without text, attends to words through Dense Aligners.

    t = t + attention(LN t);  t = t + MLP(LN t) + 0.2·adapter(t)     CLIP's text encoder, run first
    v = v + LS(attention(LN v));  n = LN v
    v = v + LS(MLP(n) + 0.2·aligner(n, words))                       then DINOv2, block by block
    logits = projector(global_alignment(hierarchical_alignment(maps, sentence), words), sentence)

DETRIS (Huang et al., AAAI 2025) shares ETRIS' decoder, projector, loss and training. Both encoders
are frozen. Where its paper and its authors' code disagree, we follow the code, and `# differs:`
says so.

B batch · L words · D text width · C image width · h w patch grid · N = h·w patches
R registers · r rank of an aligner or adapter
"""

from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from clip_model import CLIP, Attention, load_clip
from etris import (
    ETRIS,
    GlobalAlignment,
    HierarchicalAlignment,
    Projector,
    check_size,
    conv_bn,
    scale_down_init,
)
from methods.dinov2 import DINO, load_dino
from utils.clip_weights import state_dict_sha256
from utils.common import UserError

# Blocks with an aligner, text blocks with an adapter, adapters' rank: ours, then the released ones
ALIGNED_BLOCKS = {
    "tiny-dino": {
        "aligners": (1, 3, 5),
        "adapters": (1, 2),
        "text_rank": 32,
    },
    "dinov2-base": {
        "aligners": (1, 3, 5, 7, 9, 11),
        "adapters": (1, 3, 5, 7, 9, 11),
        "text_rank": 64,
    },
    "dinov2-large": {
        "aligners": (2, 6, 10, 14, 18, 22),
        "adapters": (1, 3, 5, 7, 9, 11),
        "text_rank": 64,
    },
    "dinov2-large-mixed": {
        "aligners": tuple(range(1, 24)),
        "adapters": tuple(range(1, 12)),
        "text_rank": 384,
    },
}
# The CLIP whose text encoder goes with a DINOv2
TEXT_TOWERS = {
    "tiny-dino": "tiny",
    "dinov2-base": "ViT-B-16",
    "dinov2-large": "ViT-B-16",
    "dinov2-large-mixed": "ViT-B-16",
}


# ---------------------------------------------------------------------------- aligners and adapters
def conv_layer(in_channels, out_channels, kernel_size, planar) -> nn.Sequential:
    """Convolution, BatchNorm (ε = 1e-3), ReLU; the size stays.

    planar: over the grid, (B, C, h, w); else along the words, (B, C, L).
    """
    if planar:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        norm = nn.BatchNorm2d(out_channels, eps=1e-3)
    else:
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        norm = nn.BatchNorm1d(out_channels, eps=1e-3)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU()))


class DenseBranches(nn.Module):
    """Three branches with 1×1, 3×3 and 5×5 kernels; each reads z and all branches before it.

    Along the words (planar=False) the kernels are 1, 3 and 5 long.

    differs: the paper describes dense links between layers; in its code they are all inside one
    aligner (docs/differences.md, D1).
    """

    def __init__(self, rank: int, planar: bool):
        super().__init__()
        if rank % 16:
            raise UserError(f"--width {rank}: an aligner's rank is a multiple of 16")
        half = rank // 2
        quarter = rank // 4
        hidden = rank // 16
        self.branch1 = conv_layer(rank, half, 1, planar)
        self.branch2 = nn.Sequential(
            conv_layer(rank + half, hidden, 1, planar),
            conv_layer(hidden, quarter, 3, planar),
        )
        self.branch3 = nn.Sequential(
            conv_layer(rank + half + quarter, hidden, 1, planar),
            conv_layer(hidden, quarter, 5, planar),
        )

    def forward(self, z):
        """z (B, r, h, w) or (B, r, L) → the branches concatenated, the same shape."""
        out1 = self.branch1(z)
        out2 = self.branch2(torch.cat([z, out1], dim=1))
        out3 = self.branch3(torch.cat([z, out1, out2], dim=1))
        return torch.cat([out1, out2, out3], dim=1)


class DenseAligner(nn.Module):
    """Beside a frozen MLP: down to rank r, dense branches over the grid, attention to words, up.

    The class token and the registers skip the middle, so they come out as up(2z).
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        rank: int,
        prefix_tokens: int = 5,
        width: int = 128,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.down = nn.Linear(channels, rank)
        self.up = nn.Linear(rank, channels)
        self.branches = DenseBranches(rank, planar=True)
        self.image = nn.Linear(rank, width)
        self.text = nn.Linear(text_width, width)
        self.back = nn.Linear(width, rank)
        self.cross_attn = Attention(width, heads, dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, n, words, grid):
        """n (B, 1 + R + N, C), words (B, L, D), grid (h, w) → (B, 1 + R + N, C)."""
        z = F.relu(self.down(n))  # (B, 1 + R + N, r)
        prefix = z[:, : self.prefix_tokens]
        patches = z[:, self.prefix_tokens :]

        # dense branches over the grid
        z_map = patches.mT.unflatten(2, grid)  # (B, r, h, w)
        m = self.branches(z_map).flatten(2).mT + patches  # (B, N, r)

        # patches attend to words: no shortcut around the attention, and padding is not masked
        m = self.cross_attn(self.image(m), self.text(words))  # (B, N, 128)
        m = self.back(m)  # (B, N, r)
        return self.up(torch.cat([prefix, m], dim=1) + z)


class TextAdapter(nn.Module):
    """Beside a frozen text MLP: down to rank r, dense branches along the words, up.

    The start mark skips the middle. The branches are not causal: unlike in CLIP, a later word
    changes an earlier one.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.branches = DenseBranches(rank, planar=False)

    def forward(self, x):
        """(B, L, D) → (B, L, D)."""
        z = F.relu(self.down(x))  # (B, L, r)
        m = self.branches(z[:, 1:].mT).mT  # (B, L - 1, r)
        return self.up(torch.cat([z[:, :1], m], dim=1) + z)


class ResidualCoordinates(nn.Sequential):
    """HA's last convolutions with a shortcut, which leaves out the two coordinate channels.

    Only DETRIS has this shortcut.
    """

    def forward(self, x):
        """(B, D + 2, h, w) → (B, D, h, w)."""
        return super().forward(x) + x[:, :-2]


# ------------------------------------------------------------------------------------- whole model
class DETRIS(ETRIS):
    """ETRIS' decoder behind a DINOv2 with aligners and CLIP's text encoder with adapters.

    clip: a CLIP whose image encoder is a DINO. aligners, adapters: {block number as str: module}.
    """

    def __init__(
        self,
        clip,
        aligners,
        adapters,
        hierarchical_alignment,
        global_alignment,
        projector,
        size=448,
        max_tokens=17,
    ):
        super().__init__(
            clip,
            nn.ModuleDict(),  # no Bridger
            hierarchical_alignment,
            global_alignment,
            projector,
            size=size,
            max_tokens=max_tokens,
        )
        self.aligners = nn.ModuleDict(aligners)
        self.adapters = nn.ModuleDict(adapters)
        self.scale = 0.2  # of what aligners and adapters add
        self.system = "detris"

    def encode_text(self, tokens):
        """(B, L) → word features (B, L, D) and the sentence feature (B, E)."""
        t = self.clip.stem(tokens)
        for i, block in enumerate(self.clip.transformer.resblocks):
            t = t + block.attn(block.ln_1(t), causal=block.causal)
            out = t + block.mlp(block.ln_2(t))
            if str(i) in self.adapters:
                # differs: an adapter reads t before the block's LayerNorm, an aligner after it
                out = out + self.scale * self.adapters[str(i)](t)
            t = out
        return self.clip.head(t, tokens)

    def encode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) → three maps (B, C, h, w), words (B, L, D), sentence
        (B, E)."""
        visual = self.clip.visual
        words, sentence = self.encode_text(tokens)
        v = visual.stem(images)  # (B, 1 + R + N, C)
        maps = []
        for i, block in enumerate(visual.blocks):
            v = block.attention(v)
            n = block.norm2(v)
            out = block.mlp(n)
            if str(i) in self.aligners:
                aligned = self.aligners[str(i)](n, words, visual.grid)
                self.record(f"aligner{i}", aligned)
                out = out + self.scale * aligned
            v = v + block.ls2(out)
            if i in visual.stage_ends:
                maps.append(visual.to_map(v))
        maps[2] = visual.head(v)
        for i, x in enumerate(maps):
            self.record(f"visual{i}.after", x)
        return maps, words, sentence


def replace_image_encoder(clip: CLIP, dino: DINO) -> CLIP:
    """Put a frozen DINO in the place of the CLIP's image encoder; changes `clip` and returns it."""
    clip.visual = dino.requires_grad_(False)
    clip.config = replace(
        clip.config,
        image_size=dino.config.image_size,
        vision_layers=dino.config.layers,
        vision_width=dino.config.width,
        patch_size=dino.config.patch_size,
    )
    return clip


def build_detris(
    clip: CLIP,
    dino: DINO,
    size=448,
    max_tokens=17,
    *,
    aligners,
    adapters,
    width=128,
    text_rank=64,
    dropout=0.1,
    released=False,
) -> DETRIS:
    """DETRIS around a frozen CLIP's text encoder and a frozen DINO.

    aligners, adapters: the numbers of the blocks that get one. width, text_rank: their ranks.
    released=True: parameters start as the original's do.
    """
    replace_image_encoder(clip, dino)
    check_size(clip, size)
    D = clip.config.text_width
    C = dino.config.width

    # the decoder first: a seed gives it the same initial weights as in ETRIS
    hierarchical_alignment = HierarchicalAlignment(clip)
    global_alignment = GlobalAlignment(clip, dropout)
    projector = Projector(clip)
    # DINO's last map is not in the joint space, so it has C channels, not E
    hierarchical_alignment.project[2] = conv_bn(C, D, conv=nn.ConvTranspose2d)
    coordinates = hierarchical_alignment.coordinates
    hierarchical_alignment.coordinates = ResidualCoordinates(*coordinates)

    aligner_options = {"prefix_tokens": dino.prefix_tokens, "dropout": dropout}
    model = DETRIS(
        clip,
        {str(i): DenseAligner(C, D, width, **aligner_options) for i in aligners},
        {str(i): TextAdapter(D, text_rank) for i in adapters},
        hierarchical_alignment,
        global_alignment,
        projector,
        size,
        max_tokens,
    )
    if not released:
        scale_down_init(model)
    model.align_corners = released
    return model.train()


# ----------------------------------------------------------------------------------------- weights
def load_backbones(name: str, weights=None, seed: int = 0) -> tuple[CLIP, DINO]:
    """CLIP's text encoder and DINOv2 `name`, frozen.

    weights: "random", or a FILE of DINOv2's, or both encoders' files, joined by a comma, DINOv2's
    first. Without a file: shipped, cache or download.
    """
    dino_weights, _, clip_weights = str(weights or "").partition(",")
    if dino_weights == "random":
        clip_weights = "random"
    dino, dino_source = load_dino(name, dino_weights or None, seed)
    clip = load_clip(TEXT_TOWERS[name], clip_weights or None, seed)
    clip_source = clip.identity["weights"]
    replace_image_encoder(clip, dino)
    clip.identity = {
        "name": name,
        "weights": f"{dino_source} and, for text, {TEXT_TOWERS[name]}'s {clip_source}",
        "sha256": state_dict_sha256(clip.state_dict()),
    }
    return clip, dino
