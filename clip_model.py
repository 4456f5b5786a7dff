"""1. The frozen CLIP: tokenizer, two encoders as stem → stages → head, official weights.

CLIP (Radford et al. 2021) is a picture encoder and a text encoder trained so that a picture and its caption land on the
same direction. ETRIS never trains it; it only lets the two encoders talk between their stages, so both are written here
as a stem, three stages and a head. Parameter names are OpenAI's, so the official files load with strict=True.

B batch · L words · D text width · C channels · H W grid · N = H·W places
"""

import functools
import gzip
import hashlib
import html
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import UserError

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """CLIP's byte-pair encoding: text → ids of 49,408 pieces. The merge table is OpenAI's data (weights/README.md)."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, table=HERE / "weights" / "bpe_simple_vocab_16e6.txt.gz"):
        lines = gzip.decompress(Path(table).read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
        merges = [tuple(line.split()) for line in lines]
        # every byte gets a printable character, so that no piece holds a space or a control character
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]
        self.letter = dict(zip(shown + hidden, letters, strict=True))
        self.byte = {letter: byte for byte, letter in self.letter.items()}
        pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
        self.pieces = [*pieces, "<|startoftext|>", "<|endoftext|>"]
        self.id = {piece: i for i, piece in enumerate(self.pieces)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.sot, self.eot = len(pieces), len(pieces) + 1
        self.merge = functools.lru_cache(maxsize=65536)(self.merge)

    def merge(self, word: str) -> tuple[int, ...]:
        """One word's ids: start from letters, join the neighbours of the lowest rank until none is in the table."""
        parts = [self.letter[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: self.rank.get(pair, float("inf")))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                pair = tuple(parts[i : i + 2]) == best
                joined.append("".join(best) if pair else parts[i])
                i += 2 if pair else 1
            parts = joined
        return tuple(self.id[part] for part in parts)

    def encode(self, text: str) -> list[int]:
        """Ids without start and end: mojibake mended, HTML entities read twice, spaces joined, lower case."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        return [i for word in self.WORDS.findall(text) for i in self.merge(word)]

    def decode(self, ids) -> str:
        """The text of ids, start and end marks included: the inverse of `encode` up to spaces and case."""
        text = "".join(self.pieces[i] for i in ids)  # the marks' own letters are bytes that stand for themselves
        return bytes(self.byte[letter] for letter in text).decode("utf-8", errors="replace").replace("</w>", " ")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(sentences, words: int = 77) -> Tensor:
    """Sentences → (B, words) ids: start, pieces, end, then zeros. Too long: cut, the last id is the end mark."""
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    tokens, bpe = torch.zeros(len(sentences), words, dtype=torch.long), tokenizer()
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = [bpe.sot, *bpe.encode(sentence)[: words - 2], bpe.eot]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def is_blank(sentence: str) -> bool:
    """Whether there is nothing to read in it: no character but spaces, control characters and those without width."""
    return not any(letter.isprintable() and not letter.isspace() for letter in sentence)


def padding(tokens: Tensor) -> Tensor:
    """(B, L) ids → (B, L) True after the end mark. Not `tokens == 0`: id 0 is the real word "!" (differs: ledger)."""
    return torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------- attention
def attend(q, k, v, heads, allowed=None, fast=False):
    """softmax(q kᵀ / √d) v per head: q (B, N, D), k v (B, M, D) → (B, N, D) and the map (B, heads, N, M) or None.

    allowed: bool, True where a query may look, broadcastable to (B, heads, N, M). The fast path never writes the map.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, d)
    if fast:
        weights, out = None, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    else:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        weights = scores.softmax(-1)
        out = weights.to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), weights


class Attention(nn.Module):
    """Multi-head attention with torch's parameter names. `keep = True` leaves the last map in `.map` (plain path)."""

    fast, keep = False, False

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} attention heads do not divide a width of {width}: choose another --heads")
        self.heads, self.map = heads, None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, key=None, value=None, ignore=None, causal=False):
        """query (B, N, D), key and value (B, M, D), ignore (B, M) True where a key is padding → (B, N, D)."""
        key = query if key is None else key
        value = key if value is None else value
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        allowed = None if ignore is None else ~ignore[:, None, None, :]
        if causal:
            allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        out, weights = attend(q, k, v, self.heads, allowed, self.fast and not self.keep)
        self.map = weights.detach() if self.keep else None
        return self.out_proj(out)


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """(1 + n², D) learned positions → (1 + H·W, D): the class row stays, the grid is resized bicubically."""
    side = round((positions.shape[0] - 1) ** 0.5)
    if (side, side) == (height, width):
        return positions
    grid = positions[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].mT.to(positions.dtype)])


# ------------------------------------------------------------------------------------------- the picture encoders
class Norm(nn.BatchNorm2d):
    """BatchNorm behind a convolution: γ (w∗x − μ) / √(σ² + ε) + β; fast, where neither learns: (a w)∗x + β − a μ."""

    fast = False

    def forward(self, conv, x):
        learns = self.training or any(p.requires_grad for p in (conv.weight, self.weight, self.bias))
        if learns or not self.fast:
            return super().forward(conv(x))
        a = self.weight * (self.running_var + self.eps).rsqrt()
        return F.conv2d(x, conv.weight * a[:, None, None, None], self.bias - a * self.running_mean,
                        conv.stride, conv.padding)  # fmt: skip


class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 with a shortcut; strides by average pooling, on both ways (CLIP's "anti-aliased" ResNet)."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), Norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), Norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), Norm(4 * width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        parts = [nn.AvgPool2d(stride), nn.Conv2d(inside, 4 * width, 1, bias=False), Norm(4 * width)]
        named = OrderedDict(zip(("-1", "0", "1"), parts, strict=True))
        self.downsample = nn.ModuleDict(named if stride > 1 or inside != 4 * width else {})

    def forward(self, x):
        out = self.bn1(self.conv1, x).relu_()
        out = self.avgpool(self.bn2(self.conv2, out).relu_())
        out = self.bn3(self.conv3, out)
        if self.downsample:
            pool, conv, norm = self.downsample.values()
            x = norm(conv, pool(x))
        return out.add_(x).relu_()


class AttentionPool(nn.Module):
    """CLIP's last layer: attention in place of average pooling. `forward` pools, `dense` keeps every place."""

    fast = False

    def __init__(self, side: int, width: int, heads: int, embed: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed)

    def tokens(self, x):
        """(B, C, H, W) → (B, 1 + N, C): the mean first, then the places row by row, positions added."""
        places = x.flatten(2).mT
        places = torch.cat([places.mean(1, keepdim=True), places], dim=1)
        return places + resize_positions(self.positional_embedding, *x.shape[2:]).to(x.dtype)

    def forward(self, x):
        """(B, C, H, W) → (B, E): only the mean asks."""
        x = self.tokens(x)
        out, _ = attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads, fast=self.fast)
        return self.c_proj(out)[:, 0]

    def dense(self, x):
        """(B, C, H, W) → (B, E, H, W): every place asks every place; no mean token (ETRIS' own change)."""
        height, width = x.shape[2:]
        x = self.tokens(x)[:, 1:].contiguous()  # else F.linear multiplies picture by picture
        out, _ = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, fast=self.fast)
        return self.c_proj(out).mT.unflatten(2, (height, width))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet. Stem: three convolutions, pool, layer1 (stride 4); stages: layer2, layer3, layer4."""

    def __init__(self, layers, width: int, embed: int, picture: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), Norm(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), Norm(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), Norm(width)
        inside = width
        for i, blocks in enumerate(layers):
            out, stride = width * 2**i, 1 if i == 0 else 2
            rest = [Bottleneck(4 * out, out, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(Bottleneck(inside, out, stride), *rest))
            inside = 4 * out
        self.attnpool = AttentionPool(picture // 32, inside, inside // 64, embed)
        self.channels, self.strides, self.stride = (8 * width, 16 * width, 32 * width), (8, 16, 32), 32

    @property
    def stages(self):
        return [self.layer2, self.layer3, self.layer4]

    def stem(self, x):
        """(B, 3, S, S) → (B, 4·width, S/4, S/4)."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv, x).relu_()
        return self.layer1(F.avg_pool2d(x, 2))

    def as_map(self, v):
        return v

    def add_map(self, v, delta):
        return v + delta

    def head(self, v):
        """Every place in the joint space: (B, C, H, W) → (B, E, H, W)."""
        return self.attnpool.dense(v)

    def pool(self, v):
        """The picture in the joint space: (B, C, H, W) → (B, E)."""
        return self.attnpool(v)


class QuickGELU(nn.Module):
    """x · σ(1.702 x), the activation OpenAI trained with; torch's GELU is not the same function."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x). Text blocks are causal: a word sees itself and the words before it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.attn, self.causal = Attention(width, heads), causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), causal=self.causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Residual blocks under OpenAI's name `resblocks`; `stages` are its thirds (they share the blocks)."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool):
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualBlock(width, heads, causal) for _ in range(layers)])

    @property
    def stages(self):
        third = len(self.resblocks) // 3
        return [self.resblocks[:third], self.resblocks[third : 2 * third], self.resblocks[2 * third :]]


class VisionTransformer(nn.Module):
    """CLIP's ViT. The stream is (B, 1 + N, C): class token, then patches row by row; maps leave out the class token."""

    def __init__(self, patch: int, width: int, layers: int, heads: int, embed: int, picture: int):
        super().__init__()
        scale, self.patch = width**-0.5, patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((picture // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False)
        self.proj = nn.Parameter(scale * torch.randn(width, embed))
        self.channels, self.strides, self.stride = (width,) * 3, (patch,) * 3, patch

    @property
    def stages(self):
        return self.transformer.stages

    def stem(self, image):
        """(B, 3, S, S) → (B, 1 + N, C)."""
        self.grid = image.shape[2] // self.patch, image.shape[3] // self.patch
        patches = self.conv1(image).flatten(2).mT
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([cls, patches], 1) + resize_positions(self.positional_embedding, *self.grid))

    def as_map(self, v):
        return v[:, 1:].mT.unflatten(2, self.grid)  # (B, C, H, W)

    def add_map(self, v, delta):
        return torch.cat([v[:, :1], v[:, 1:] + delta.flatten(2).mT], dim=1)

    def head(self, v):
        """Every patch in the joint space: (B, 1 + N, C) → (B, E, H, W)."""
        return self.as_map(self.ln_post(v) @ self.proj)

    def pool(self, v):
        """The picture in the joint space, read off the class token: (B, 1 + N, C) → (B, E)."""
        return self.ln_post(v[:, 0]) @ self.proj


# ---------------------------------------------------------------------------------------------------- both together
@dataclass(frozen=True)
class Size:
    """What a CLIP's weights are shaped like. patch None: a ResNet, whose layers are four counts of bottlenecks."""

    embed: int
    picture: int
    layers: int | tuple[int, ...]
    width: int
    patch: int | None
    text_width: int
    text_layers: int = 12
    context: int = 77
    vocabulary: int = 49408

    @classmethod
    def of(cls, state: dict) -> "Size":
        """Read the sizes off a state dict's shapes; KeyError where it is no CLIP."""

        def count(prefix):
            return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

        first = state["visual.conv1.weight"].shape
        if "visual.proj" in state:
            side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
            visual = side * first[-1], count("visual.transformer.resblocks."), first[0], first[-1]
        else:
            side = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
            visual = 32 * side, tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4)), 2 * first[0], None
        text, words = state["token_embedding.weight"].shape[::-1], state["positional_embedding"].shape[0]
        return cls(state["text_projection"].shape[1], *visual, text[0], count("transformer.resblocks."), words, text[1])


class CLIP(nn.Module):
    """OpenAI's names put the text tensors on top: CLIP itself is the text encoder and holds the picture encoder."""

    def __init__(self, size: Size):
        super().__init__()
        self.size, self.identity = size, {}
        heads, common = max(1, size.width // 64), (size.embed, size.picture)
        if size.patch is None:
            self.visual = ModifiedResNet(size.layers, size.width, *common)
        else:
            self.visual = VisionTransformer(size.patch, size.width, size.layers, heads, *common)
        self.transformer = Transformer(size.text_width, size.text_layers, max(1, size.text_width // 64), causal=True)
        self.token_embedding = nn.Embedding(size.vocabulary, size.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(size.context, size.text_width))
        self.ln_final = nn.LayerNorm(size.text_width)
        self.text_projection = nn.Parameter(torch.randn(size.text_width, size.embed) * size.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))

    @property
    def stages(self):
        return self.transformer.stages

    def stem(self, tokens):
        """(B, L) ids → (B, L, D)."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def head(self, t, tokens):
        """(B, L, D) → word features (B, L, D) and the sentence feature (B, E), read off the end mark (largest id)."""
        words = self.ln_final(t)
        return words, words[torch.arange(len(words), device=t.device), tokens.argmax(-1)] @ self.text_projection

    def encode_image(self, images):
        """(B, 3, S, S) → (B, E), not normalised."""
        v = self.visual.stem(images)
        for stage in self.visual.stages:
            v = stage(v)
        return self.visual.pool(v)

    def encode_text(self, tokens):
        """(B, L) → (B, E), not normalised."""
        t = self.stem(tokens)
        for stage in self.stages:
            t = stage(t)
        return self.head(t, tokens)[1]


# ---------------------------------------------------------------------------------------------------- weights
SIZES = {
    "RN50": Size(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": Size(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": Size(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": Size(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": Size(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B-32": Size(512, 224, 12, 768, 32, 512),
    "ViT-B-16": Size(512, 224, 12, 768, 16, 512),
    "ViT-L-14": Size(768, 224, 24, 1024, 14, 768),
    "ViT-L-14-336px": Size(768, 336, 24, 1024, 14, 768),
    "tiny": Size(128, 128, (1, 1, 1, 1), 16, None, 64, 3, 24),  # ours: pretrain.py made them, weights/ ships them
    "tiny-vit": Size(128, 96, 6, 128, 16, 128, 3, 24),
}


def fingerprint(state: dict) -> str:
    """SHA-256 over names and numbers: tells two frozen backbones apart whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fill_by_name(state: dict, seed: int = 0) -> dict:
    """Random weights that depend on name and seed alone: norms start as the identity, the rest ~ N(0, 1/fan-in)."""
    for name, x in state.items():
        dice = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if x.ndim > 1:
            x.copy_(torch.randn(x.shape, generator=dice) * x[0].numel() ** -0.5)
        elif x.ndim == 1:
            x.fill_(float(name.endswith(("weight", "gamma", "running_var"))))
    return state


def build_clip(state: dict, source="these weights") -> CLIP:
    """A CLIP of the sizes the state dict shows, loaded strictly, frozen, in evaluation mode."""
    try:
        clip = CLIP(Size.of(state))
        clip.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: not a CLIP under OpenAI's names ({reason}): give another --weights FILE") from error
    clip.identity = {"sha256": fingerprint(state)}
    return clip.eval().requires_grad_(False)


def load_clip(name: str, weights=None, seed: int = 0) -> CLIP:
    """The frozen CLIP `name`; weights: a FILE, "random" (by name and `seed`), or None: shipped, cache, OpenAI, mirror.

    UserError for an unknown name, a file that cannot be read, or weights of another size than `name` has.
    """
    if name not in SIZES:
        raise UserError(f"unknown backbone {name!r}: choose one of {', '.join(SIZES)}")
    from official import read_weights  # the one file that reads files from outside

    shipped = HERE / "weights" / f"{name}.pt"
    if weights == "random":
        clip, weights = build_clip(fill_by_name(CLIP(SIZES[name]).state_dict(), seed)), f"random, seed {seed}"
    else:
        if not weights and not shipped.exists():
            from prepare import clip_file  # the one file that talks to the network

            weights = clip_file(name)
        clip = build_clip(read_weights(weights or shipped), weights or shipped)
    if clip.size != SIZES[name]:
        raise UserError(f"{weights}: holds a CLIP of other sizes than {name}: give the --backbone it belongs to")
    clip.identity = {"name": name, "weights": Path(weights or shipped).name, **clip.identity}
    return clip
