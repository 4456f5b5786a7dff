"""DINOv2 with registers: an image encoder trained without any text, and its weights.

DINOv2 (Oquab et al. 2023) with registers (Darcet et al. 2023) keeps its authors' parameter names,
so the published files load with strict=True. DETRIS uses it in place of CLIP's image encoder.
BarLeRIa's side network uses the same kind of block without LayerScale.

B batch · C channels · h w patch grid · N = h·w patches · R registers
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from clip_model import MultiHeadAttention
from utils.clip_weights import init_by_name, read_weights
from utils.common import ROOT, UserError, as_user_error
from utils.download import CACHE_REMEDY, cache_folder, fetch, sha256


# --------------------------------------------------------------------------------------- ViT block
class FusedAttention(MultiHeadAttention):
    """Self-attention under timm's names: `qkv` makes queries, keys and values."""

    def __init__(self, width: int, heads: int):
        if width % heads:
            message = f"--width {width}: {heads} attention heads do not divide it"
            raise UserError(f"{message}: choose a multiple of {heads}")
        super().__init__(heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, prior=None):
        """x (B, N, C) → (B, N, C). prior (B, N, C): its values are added to those of x."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if prior is not None:
            weight = self.qkv.weight.chunk(3)[2]
            bias = self.qkv.bias.chunk(3)[2]
            v = v + F.linear(prior, weight, bias)
        return self.proj(self.attend(q, k, v))


class ViTBlock(nn.Module):
    """A ViT block under timm's names. Unlike CLIP's it has the exact GELU and ε = 1e-6."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = FusedAttention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width),
                gelu=nn.GELU(),
                fc2=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x, prior=None):
        """x (B, N, C) → (B, N, C); prior: see FusedAttention."""
        x = x + self.attn(self.norm1(x), prior)
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------ DINOv2
@dataclass(frozen=True)
class DinoConfig:
    """The sizes of a DINOv2. Its attention heads are 64 wide."""

    width: int
    layers: int
    patch_size: int
    image_size: int
    registers: int = 4

    @classmethod
    def from_state_dict(cls, state: dict) -> "DinoConfig":
        """Read the sizes off a state dict's shapes; KeyError if it is no DINOv2 with registers."""
        width, _, _, patch_size = state["patch_embed.proj.weight"].shape
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        registers = state["register_tokens"].shape[1]
        return cls(width, len(blocks), patch_size, side * patch_size, registers)


DINO_CONFIGS = {
    "tiny-dino": DinoConfig(width=128, layers=6, patch_size=16, image_size=96),
    "dinov2-base": DinoConfig(width=768, layers=12, patch_size=14, image_size=518),
    "dinov2-large": DinoConfig(width=1024, layers=24, patch_size=14, image_size=518),
    # the same encoder; DETRIS' model for mixed training has larger adapters around it
    "dinov2-large-mixed": DinoConfig(width=1024, layers=24, patch_size=14, image_size=518),
}


class LayerScale(nn.Module):
    """x ⊙ γ: one factor for each channel of a branch."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class DinoBlock(ViTBlock):
    """x + LS1(attention(LN x)), then x + LS2(MLP(LN x))."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.ls1 = LayerScale(width)
        self.ls2 = LayerScale(width)

    def attention(self, x):
        """The first half of the block; DETRIS adds its aligner in the second."""
        return x + self.ls1(self.attn(self.norm1(x)))

    def forward(self, x):
        x = self.attention(x)
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINO(nn.Module):
    """DINOv2 with registers as a stem, three stages and a head: CLIP's encoder interface.

    The stream is (B, 1 + R + N, C): class token, registers, then patches row by row. Maps leave
    out the class token and the registers.
    """

    def __init__(self, config: DinoConfig):
        super().__init__()
        C = config.width
        side = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, C))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + side**2, C))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, config.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))  # replaces masked patches in pre-training
        conv = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))
        heads = max(1, C // 64)
        self.blocks = nn.ModuleList([DinoBlock(C, heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(C, eps=1e-6)

        self.config = config
        self.patch_size = config.patch_size
        self.prefix_tokens = 1 + config.registers  # before the patches: class token and registers
        self.channels = (C, C, C)
        self.strides = (config.patch_size, config.patch_size, config.patch_size)
        self.stride = config.patch_size
        # the last block of each stage; the decoder reads its map
        self.stage_ends = (config.layers // 3, 2 * config.layers // 3, config.layers - 1)

    @property
    def stages(self):
        first, second, _ = self.stage_ends
        return [
            nn.Sequential(*self.blocks[: first + 1]),
            nn.Sequential(*self.blocks[first + 1 : second + 1]),
            nn.Sequential(*self.blocks[second + 1 :]),
        ]

    def positions(self, h: int, w: int):
        """Learned positions, resized bicubically to an h × w grid → (1, 1 + h·w, C).

        As DINOv2's own code does it: 0.1 is added to the wanted sides, and the scale factor itself
        (not the output's size) places the samples.
        """
        side = self.config.image_size // self.patch_size
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))  # (1, C, side, side)
        scale_factor = ((h + 0.1) / side, (w + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale_factor, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)

    def stem(self, images, masked=None):
        """(B, 3, S, S) → (B, 1 + R + N, C). masked (B, N): True where the mask token stands."""
        x = self.patch_embed(images)
        B, _, h, w = x.shape
        self.grid = (h, w)
        x = x.flatten(2).mT  # (B, N, C)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token, x)
        positions = self.positions(h, w)
        class_token = self.cls_token + positions[:, :1]
        prefix = torch.cat([class_token, self.register_tokens], dim=1)  # registers have no position
        return torch.cat([prefix.expand(B, -1, -1), x + positions[:, 1:]], dim=1)

    def to_map(self, v):
        """(B, 1 + R + N, C) → (B, C, h, w)."""
        return v[:, self.prefix_tokens :].mT.unflatten(2, self.grid)

    def add_to_map(self, v, delta):
        """Add delta (B, C, h, w) to the patches of the stream."""
        patches = v[:, self.prefix_tokens :] + delta.flatten(2).mT
        return torch.cat([v[:, : self.prefix_tokens], patches], dim=1)

    def head(self, v):
        """All patches after the last norm: (B, 1 + R + N, C) → (B, C, h, w)."""
        return self.to_map(self.norm(v))

    def forward(self, images, masked=None):
        """(B, 3, S, S) → the stream after the last block, (B, 1 + R + N, C)."""
        v = self.stem(images, masked)
        for block in self.blocks:
            v = block(v)
        return v


# ----------------------------------------------------------------------------------------- weights
# The authors publish no hashes of these files.
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{kind}/dinov2_{kind}_reg4_pretrain.pth"
DINO_FILES = {"dinov2-base": "vitb14", "dinov2-large": "vitl14"}


def build_dino(state: dict, source="these weights", name: str | None = None) -> DINO:
    """A DINO of the sizes that `state` shows, loaded strictly.

    UserError, naming `source`, where `state` is no DINOv2 with registers, or not of the sizes that
    `name` has.
    """
    errors = (LookupError, RuntimeError, ValueError, TypeError, AttributeError)
    problem = f"{source}: not a DINOv2 with registers"
    with as_user_error(problem, "give another --weights FILE", errors):
        dino = DINO(DinoConfig.from_state_dict(state))
        dino.load_state_dict(state, strict=True)
    if name and dino.config != DINO_CONFIGS[name]:
        reason = f"holds a DINOv2 of other sizes than {name}"
        raise UserError(f"{source}: {reason}: give the --backbone it belongs to")
    return dino


def fetch_dino(name: str, path: Path):
    """Download DINOv2 `name` to `path`; only a file of the right names and shapes gets there."""
    url = DINO_URL.format(kind=DINO_FILES[name])
    tmp_path = path.with_name(f"{path.name}.part")
    try:
        fetch(url, tmp_path)
        build_dino(read_weights(tmp_path), url, name)
        tmp_path.replace(path)
    except UserError as error:
        reason = str(error).replace(str(tmp_path), url)
        raise UserError(
            f"no weights of {name}: {reason}; or fetch it elsewhere and give it by --weights FILE, "
            "or do without, by --weights random or --backbone tiny-dino"
        ) from error
    finally:
        tmp_path.unlink(missing_ok=True)


def dino_file(name: str) -> Path:
    """DINOv2 `name` in the cache (see utils.download), downloaded if it is missing.

    The authors publish no hash. So the file's own hash is written beside it after the download, and
    compared whenever the file is used. UserError if the file has changed or cannot be had.
    """
    if name not in DINO_FILES:
        remedy = f"make it by `python -m toy.pretrain {name}`, or use --weights random"
        raise UserError(f"weights/{name}.pt is not there: {remedy}")
    path = cache_folder() / f"{name}.pth"
    hash_path = path.with_suffix(".sha256")
    with as_user_error(path.parent, CACHE_REMEDY, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            hash_path.unlink(missing_ok=True)
            fetch_dino(name, path)
        digest = sha256(path)
        if not hash_path.exists():
            hash_path.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
            print(f"{path.name}: SHA-256 {digest}, none is published; kept in {hash_path}")
        if hash_path.read_text(encoding="utf-8").split() != [digest, path.name]:
            found = f"SHA-256 {digest[:12]}…, {hash_path.name} says otherwise"
            raise UserError(f"{path}: changed since it was downloaded ({found}): remove it")
    return path


def load_dino(name: str, weights=None, seed: int = 0) -> tuple[DINO, str]:
    """The DINOv2 `name`, and the name of its weights' file.

    weights: a FILE, "random" (by name and `seed`), or None: from weights/, else the published file.
    UserError for an unreadable file, or weights of other sizes than `name` has.
    """
    if weights == "random":
        source = f"random, seed {seed}"
        state = init_by_name(DINO(DINO_CONFIGS[name]).state_dict(), seed)
    else:
        shipped = ROOT / "weights" / f"{name}.pt"
        if weights:
            source = weights
        elif shipped.exists():
            source = shipped
        else:
            source = dino_file(name.removesuffix("-mixed"))
        state = read_weights(source)
    return build_dino(state, source, name), Path(source).name
