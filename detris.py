"""12. DETRIS, the third system: a picture encoder that never saw a word, DINOv2, made to listen by Dense Aligners.

    t = block(t) + 0.2·adapter(t)                    the frozen text tower of CLIP runs first, and wholly
    v = v + LS(MLP(n) + 0.2·aligner(n, words)),  n = LN v          then the frozen DINOv2, block by block
    logits = projector(global_alignment(hierarchical_alignment(maps, sentence), words), sentence)

DETRIS (Huang et al., AAAI 2025) shares ETRIS' decoder, projector, loss and training. DINOv2 (Oquab et al. 2023) with
registers (Darcet et al. 2023) keeps its authors' parameter names, so the published files load with strict=True.
B batch · L words · D text width · C picture width · N = h·w patches · r an aligner's rank
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from barleria import Block as PlainBlock
from clip_model import CLIP, HERE, Attention, fill_by_name, fingerprint, load_clip
from command import UserError
from etris import ETRIS, GlobalAlignment, HierarchicalAlignment, Projector, check_size, conv_bn, start_small


# ---------------------------------------------------------------------------------------------------- DINOv2
@dataclass(frozen=True)
class DinoSize:
    """What a DINOv2's weights are shaped like; heads are 64 wide."""

    width: int
    layers: int
    patch: int
    picture: int
    registers: int = 4

    @classmethod
    def of(cls, state: dict) -> "DinoSize":
        """Read the sizes off a state dict's shapes; KeyError where it is no DINOv2 with registers."""
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        return cls(width, layers, patch, side * patch, state["register_tokens"].shape[1])


class LayerScale(nn.Module):
    """x ⊙ γ, a factor for each channel of a branch."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(PlainBlock):
    """x + LS1(attention(LN x)), then x + LS2(MLP(LN x)); `extra` joins the MLP's output before LS2."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def attention(self, x):
        return x + self.ls1(self.attn(self.norm1(x)))

    def forward(self, x):
        x = self.attention(x)
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINO(nn.Module):
    """DINOv2 with registers, as a stem, three stages and a head like CLIP's encoders, so it can stand in for one.

    The stream is (B, 5 + N, C): class token, four registers, patches row by row; maps leave out the first five.
    """

    def __init__(self, size: DinoSize):
        super().__init__()
        C, grid = size.width, size.picture // size.patch
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, C))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid**2, C))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, size.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))  # stands for hidden patches in pre-training
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, C, size.patch, stride=size.patch)))
        self.blocks = nn.ModuleList([Block(C, max(1, C // 64)) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.size, self.patch, self.first = size, size.patch, 1 + size.registers
        self.channels, self.strides, self.stride = (C,) * 3, (size.patch,) * 3, size.patch
        self.taps = size.layers // 3, 2 * size.layers // 3, size.layers - 1  # maps for the decoder: after these blocks

    @property
    def stages(self):
        a, b, _ = self.taps
        return [nn.Sequential(*self.blocks[i:j]) for i, j in ((0, a + 1), (a + 1, b + 1), (b + 1, None))]

    def positions(self, h, w):
        """(1, 1 + h·w, C): learned positions, bicubic; 0.1 is added to the wanted sides, as DINOv2 does since it was
        trained, and the factor itself places the samples."""
        side = self.size.picture // self.patch
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side)).float()
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)

    def stem(self, image, hidden=None):
        """(B, 3, S, S) → (B, 5 + N, C). hidden (B, N): True where the mask token takes a patch's place."""
        x = self.patch_embed(image)
        B, _, h, w = x.shape
        self.grid, x, place = (h, w), x.flatten(2).mT, self.positions(h, w)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask_token, x)
        first = torch.cat([self.cls_token + place[:, :1], self.register_tokens], dim=1)  # registers have no position
        return torch.cat([first.expand(B, -1, -1), x + place[:, 1:]], dim=1)

    def as_map(self, v):
        return v[:, self.first :].mT.unflatten(2, self.grid)  # (B, C, h, w)

    def add_map(self, v, delta):
        return torch.cat([v[:, : self.first], v[:, self.first :] + delta.flatten(2).mT], dim=1)

    def head(self, v):
        """Every patch after the last norm: (B, 5 + N, C) → (B, C, h, w)."""
        return self.as_map(self.norm(v))

    def forward(self, image, hidden=None):
        v = self.stem(image, hidden)
        for block in self.blocks:
            v = block(v)
        return v


def build_dino(state: dict, source="these weights") -> DINO:
    """A DINO of the sizes the state dict shows, loaded strictly."""
    try:
        dino = DINO(DinoSize.of(state))
        dino.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: not a DINOv2 with registers ({reason}): give another --weights FILE") from error
    return dino


# --------------------------------------------------------------------------------- what is tuned in the encoders
def convolve(inside: int, outside: int, kernel: int, planar: bool) -> nn.Sequential:
    """Convolution over the grid (planar) or along the words, BatchNorm (ε 1e-3), ReLU; it keeps the size."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if planar else (nn.Conv1d, nn.BatchNorm1d)
    conv = conv(inside, outside, kernel, padding=kernel // 2)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm(outside, eps=1e-3), relu=nn.ReLU()))


class DenseBranches(nn.Module):
    """Three branches, 1×1, 3×3 and 5×5 wide, each reading z and all branches before it: the "dense" in the name.

    differs: the paper speaks of dense links between layers; in its code they stay inside one aligner (ledger D1).
    """

    def __init__(self, rank: int, planar: bool):
        super().__init__()
        if rank % 16:
            raise UserError(f"--width {rank}: an aligner's rank is a multiple of 16")
        half, quarter, thin = rank // 2, rank // 4, rank // 16
        self.branch1 = convolve(rank, half, 1, planar)
        self.branch2, self.branch3 = (
            nn.Sequential(convolve(inside, thin, 1, planar), convolve(thin, quarter, kernel, planar))
            for inside, kernel in ((rank + half, 3), (rank + half + quarter, 5))
        )

    def forward(self, z):
        """z (B, r, h, w) or (B, r, L) → the branches side by side, the same shape."""
        one = self.branch1(z)
        two = self.branch2(torch.cat([z, one], dim=1))
        return torch.cat([one, two, self.branch3(torch.cat([z, one, two], dim=1))], dim=1)


class DenseAligner(nn.Module):
    """Beside a frozen MLP: into rank r, dense branches over the grid, then every patch asks the words.

    The class token and the registers pass the middle unchanged (and so come out as up(2z)). differs: the original
    also drops one in ten attention weights in training; our attention has no such dropout.
    """

    def __init__(self, channels: int, text_width: int, rank: int, first: int = 5, width: int = 128, heads: int = 8):
        super().__init__()
        self.first, self.down, self.up = first, nn.Linear(channels, rank), nn.Linear(rank, channels)
        self.branches = DenseBranches(rank, planar=True)
        self.image, self.text, self.back = nn.Linear(rank, width), nn.Linear(text_width, width), nn.Linear(width, rank)
        self.cross_attn = Attention(width, heads)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)

    def forward(self, n, words, grid):
        """n (B, 5 + N, C), words (B, L, D) → (B, 5 + N, C)."""
        z = F.relu(self.down(n))  # (B, 5 + N, r)
        first, patches = z[:, : self.first], z[:, self.first :]
        m = self.branches(patches.mT.unflatten(2, grid)).flatten(2).mT + patches
        m = self.back(self.cross_attn(self.image(m), self.text(words)))  # no shortcut past the words; padding is seen
        return self.up(torch.cat([first, m], dim=1) + z)


class TextAdapter(nn.Module):
    """Beside a frozen text MLP: into rank r, dense branches along the words; the start mark passes unchanged.

    Not causal: a later word reaches an earlier one here, unlike in CLIP.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up, self.branches = nn.Linear(width, rank), nn.Linear(rank, width), DenseBranches(rank, False)

    def forward(self, x):
        """(B, L, D) → (B, L, D)."""
        z = F.relu(self.down(x))
        return self.up(torch.cat([z[:, :1], self.branches(z[:, 1:].mT).mT], dim=1) + z)


class Residual(nn.Sequential):
    """HA's last convolutions with their input added; of it the two coordinates are left out (DETRIS alone)."""

    def forward(self, x):
        return super().forward(x) + x[:, :-2]


# ------------------------------------------------------------------------------------------------------ the whole
class DETRIS(ETRIS):
    """`clip` is a CLIP whose picture encoder is a DINO. aligners and adapters by the number of their block."""

    def __init__(self, clip, aligners, adapters, hierarchical, global_, projector, size=448, words=17):
        super().__init__(clip, nn.ModuleDict(), hierarchical, global_, projector, None, size, words)
        self.aligners, self.adapters = nn.ModuleDict(aligners), nn.ModuleDict(adapters)
        self.scale, self.system = 0.2, "detris"

    def read_words(self, tokens):
        """(B, L) → word features (B, L, D) and the sentence (B, E)."""
        t = self.clip.stem(tokens)
        for i, block in enumerate(self.clip.transformer.resblocks):
            t = t + block.attn(block.ln_1(t), causal=block.causal)
            extra = self.scale * self.adapters[str(i)](t) if str(i) in self.adapters else 0.0
            t = t + block.mlp(block.ln_2(t)) + extra  # differs: the adapter reads t before its LN, the aligner after
        return self.clip.head(t, tokens)

    def encode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) → three maps (B, C, h, w), words (B, L, D), sentence (B, E)."""
        visual, (words, sentence) = self.clip.visual, self.read_words(tokens)
        v, maps = visual.stem(images), []
        for i, block in enumerate(visual.blocks):
            v = self.run(block.attention, v)
            n = block.norm2(v)
            out = self.run(block.mlp, n)
            if str(i) in self.aligners:  # never computed twice: its BatchNorm would count every picture twice
                out = out + self.scale * self.note(f"aligner{i}", self.aligners[str(i)](n, words, visual.grid))
            v = v + block.ls2(out)
            if i in visual.taps:
                maps.append(visual.as_map(v))
        maps[2] = visual.head(v)
        for i, x in enumerate(maps):
            self.note(f"visual{i}.after", x)
        return maps, words, sentence


def join(clip: CLIP, dino: DINO) -> CLIP:
    """The CLIP with this frozen DINO in its picture encoder's place."""
    clip.visual, size = dino.requires_grad_(False), dino.size
    clip.size = replace(clip.size, picture=size.picture, layers=size.layers, width=size.width, patch=size.patch)
    return clip


def assemble(clip, dino, size=448, words=17, *, aligners, adapters, width=128, text_rank=64, dropout=0.1,
             released=False) -> DETRIS:  # fmt: skip
    """DETRIS around a frozen CLIP's text tower and a frozen DINO. aligners, adapters: the numbers of the blocks that
    get one; width, text_rank: their ranks. released=True: parameters start as the original's do."""
    check_size(join(clip, dino), size)
    D, C = clip.size.text_width, dino.size.width
    hierarchical, *head = HierarchicalAlignment(clip), GlobalAlignment(clip), Projector(clip)  # ETRIS' by seed
    hierarchical.project[2] = conv_bn(C, D, kind=nn.ConvTranspose2d)  # DINO's last map is not in the joint space
    hierarchical.coordinates = Residual(*hierarchical.coordinates)
    aligners = {str(i): DenseAligner(C, D, width, dino.first) for i in aligners}
    adapters = {str(i): TextAdapter(D, text_rank) for i in adapters}
    model = DETRIS(clip, aligners, adapters, hierarchical, *head, size, words)
    if not released:
        start_small(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.align_corners = released
    return model.train()


PAPER = {"size": 448, "epochs": 65, "batch_size": 32, "lr": 1e-4, "bridge_lr": 1e-4, "schedule": "two-step",
         "width": 128, "dropout": 0.1, "beta2": 0.999}  # fmt: skip
TINY = {"size": 96, "epochs": 3, "batch_size": 16, "lr": 1.5e-3, "bridge_lr": 1.5e-3, "schedule": "cosine",
        "width": 32, "dropout": 0.0, "beta2": 0.98}  # fmt: skip
LARGE_PAPER = PAPER | {"epochs": 50, "schedule": "step"}
PRESETS = {"tiny-dino": TINY, "dinov2-base": PAPER, "dinov2-large": LARGE_PAPER,
           "dinov2-large-mixed": LARGE_PAPER | {"width": 384}}  # width: the aligners' rank # fmt: skip
BASE, LARGE = DinoSize(768, 12, 14, 518), DinoSize(1024, 24, 14, 518)
SIZES = {
    "tiny-dino": DinoSize(128, 6, 16, 96),
    "dinov2-base": BASE,
    "dinov2-large": LARGE,
    "dinov2-large-mixed": LARGE,
}
TEXTS = dict.fromkeys(SIZES, "ViT-B-16") | {"tiny-dino": "tiny"}  # whose text tower
WHERE = {  # blocks with an aligner; text blocks with an adapter, and the adapters' rank, as released
    "tiny-dino": {"aligners": range(1, 6, 2), "adapters": range(1, 3), "text_rank": 32},
    "dinov2-base": {"aligners": range(1, 12, 2), "adapters": range(1, 12, 2), "text_rank": 64},
    "dinov2-large": {"aligners": range(2, 24, 4), "adapters": range(1, 12, 2), "text_rank": 64},
    "dinov2-large-mixed": {"aligners": range(1, 24), "adapters": range(1, 12), "text_rank": 384},
}


def load_dino(name: str, weights=None, seed: int = 0) -> tuple[DINO, str]:
    """The frozen DINOv2 `name` and where it comes from; weights: a FILE, "random", or None: shipped, cache, network."""
    from official import read_weights  # the one file that reads files from outside

    shipped = HERE / "weights" / f"{name}.pt"
    if weights == "random":
        dino, source = build_dino(fill_by_name(DINO(SIZES[name]).state_dict(), seed)), f"random, seed {seed}"
    else:
        if not weights and not shipped.exists():
            from prepare import dino_file  # the one file that talks to the network

            weights = dino_file(name.removesuffix("-mixed"))
        dino, source = build_dino(read_weights(weights or shipped), weights or shipped), Path(weights or shipped).name
    if dino.size != SIZES[name]:
        raise UserError(f"{source}: holds a DINOv2 of other sizes than {name}: give the --backbone it belongs to")
    return dino, source


def load_frozen(name: str, weights=None, seed: int = 0) -> tuple[CLIP, DINO]:
    """CLIP's text tower and DINOv2, frozen; weights: random, or a FILE of DINOv2's, a comma, and one of CLIP's."""
    first, _, second = (str(weights) if weights else "").partition(",")
    dino, source = load_dino(name, first or None, seed)
    clip = load_clip(TEXTS[name], "random" if first == "random" else second or None, seed)
    source = f"{source} and, for text, {TEXTS[name]}'s {clip.identity['weights']}"
    join(clip, dino)
    clip.identity = {"name": name, "weights": source, "sha256": fingerprint(clip.state_dict())}
    return clip, dino


def build(backbone="tiny-dino", size=96, words=17, weights=None, seed=0, **options) -> DETRIS:
    """A model from plain values, which a checkpoint carries as `config` (options: those of `assemble`)."""
    if backbone not in PRESETS:
        raise UserError(f"--system detris with --backbone {backbone}: choose one of {', '.join(PRESETS)}")
    options, (clip, dino) = {"width": PRESETS[backbone]["width"]} | options, load_frozen(backbone, weights, seed)
    if words > clip.size.context:
        raise UserError(f"--words {words}: the frozen text tower reads {clip.size.context} at most")
    model = assemble(clip, dino, size, words, **WHERE[backbone] | options)
    values = {"backbone": backbone, "size": size, "words": words, "seed": seed, **options}
    model.config = {"weights": "random", **values} if weights == "random" else values
    return model
