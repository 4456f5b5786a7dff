"""1. The frozen CLIP: two encoders as stem → stages → head, and its weights.

CLIP (Radford et al. 2021) is an image encoder and a text encoder, trained so that an image and its
caption get the same direction in a joint embedding space. ETRIS freezes both and works between
their stages, so each encoder is written as a stem, three stages and a head. Parameter names are
OpenAI's: the official files load with strict=True.

B batch · L words · D text width · C channels · H W grid · N = H·W pixel positions · E joint space
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import clip_weights
from utils.clip_weights import CLIP_CONFIGS, CLIPConfig
from utils.common import ROOT, UserError, as_user_error

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


# --------------------------------------------------------------------------------------- attention
class MultiHeadAttention(nn.Module):
    """softmax(q kᵀ / √d) v in several heads; subclasses own the projections.

    dropout: the probability that training drops an attention weight.
    save_attention = True leaves the last attention weights, (B, heads, N, M), in attention_weights.
    """

    def __init__(self, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.save_attention = False
        self.attention_weights = None

    def attend(self, q, k, v, attn_mask=None, causal=False):
        """q (B, N, D), k and v (B, M, D) → (B, N, D).

        attn_mask: bool, True where a query may look (broadcast). causal: look at no later key.
        """
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, d)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5  # (B, heads, N, M)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        if causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        weights = scores.softmax(-1)
        self.attention_weights = weights.detach() if self.save_attention else None
        weights = F.dropout(weights, self.dropout, self.training)
        out = weights.to(v.dtype) @ v
        return out.transpose(1, 2).flatten(2)  # (B, N, D)


class Attention(MultiHeadAttention):
    """Multi-head attention with the parameter names of torch.nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        if width % heads:
            reason = f"{heads} attention heads do not divide a width of {width}"
            raise UserError(f"{reason}: choose another --width")
        super().__init__(heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, key=None, value=None, key_padding_mask=None, causal=False):
        """query (B, N, D), key and value (B, M, D) → (B, N, D).

        key: the query unless given. value: the key unless given.
        key_padding_mask: (B, M), True where a key is padding. causal: look at no later key.
        """
        key = query if key is None else key
        value = key if value is None else value
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = F.linear(query, w_q, b_q)
        k = F.linear(key, w_k, b_k)
        v = F.linear(value, w_v, b_v)
        attn_mask = None
        if key_padding_mask is not None:
            attn_mask = ~key_padding_mask[:, None, None, :]
        return self.out_proj(self.attend(q, k, v, attn_mask, causal))


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """(1 + n², D) position embeddings → (1 + H·W, D): the class row stays, the grid is resized."""
    side = round((positions.shape[0] - 1) ** 0.5)
    if (side, side) == (height, width):
        return positions
    # bicubic, by two matrices: on a GPU interpolate's backward pass differs from run to run
    identity = torch.eye(side, dtype=positions.dtype, device=positions.device)[None, :, :, None]
    rows = F.interpolate(identity, (height, 1), mode="bicubic")[0]  # (n, H, 1)
    columns = F.interpolate(identity, (width, 1), mode="bicubic")[0]  # (n, W, 1)
    grid = positions[1:].unflatten(0, (side, side))  # (n, n, D)
    grid = (grid[:, None] * rows[..., None]).sum(0)  # (H, n, D)
    grid = (grid[:, :, None] * columns).sum(1)  # (H, W, D)
    return torch.cat([positions[:1], grid.flatten(0, 1)])


# ---------------------------------------------------------------------------- image encoder: ResNet
class Bottleneck(nn.Module):
    """1×1 → 3×3 → 1×1 convolutions and a shortcut; both stride by average pooling."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential()  # the identity
        if stride > 1 or in_channels != out_channels:
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out_channels))

    def forward(self, x):
        """(B, in_channels, H, W) → (B, 4·width, H/stride, W/stride)."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        out = self.avgpool(out)
        out = self.bn3(self.conv3(out))
        shortcut = self.downsample(x)
        return out.add_(shortcut).relu_()


class AttentionPool(MultiHeadAttention):
    """CLIP's last layer: attention in place of average pooling."""

    def __init__(self, side: int, width: int, heads: int, embed_dim: int):
        super().__init__(heads)
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def tokens(self, x):
        """(B, C, H, W) → (B, 1 + N, C): the mean, then every position; embeddings added."""
        B, C, H, W = x.shape
        x = x.flatten(2).mT  # (B, N, C)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)  # (B, 1 + N, C)
        return x + resize_positions(self.positional_embedding, H, W).to(x.dtype)

    def forward(self, x):
        """(B, C, H, W) → (B, E): the query is the mean token alone."""
        x = self.tokens(x)
        out = self.attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        return self.c_proj(out)[:, 0]

    def forward_dense(self, x):
        """(B, C, H, W) → (B, E, H, W): every position is a query; no mean token (ETRIS' change)."""
        B, C, H, W = x.shape
        x = self.tokens(x)[:, 1:].contiguous()  # otherwise F.linear multiplies image by image
        out = self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.c_proj(out).mT.unflatten(2, (H, W))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet. Stem: three convolutions, pool, layer1; stages: layer2, layer3, layer4."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.vision_width
        layers = config.vision_layers  # how many bottlenecks each layer has
        self.channels = (8 * width, 16 * width, 32 * width)  # of the stages
        self.strides = (8, 16, 32)
        self.stride = 32
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.make_layer(width, width, layers[0], stride=1)
        self.layer2 = self.make_layer(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self.make_layer(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self.make_layer(16 * width, 8 * width, layers[3], stride=2)
        side = config.image_size // 32
        self.attnpool = AttentionPool(side, 32 * width, width // 2, config.embed_dim)

    @staticmethod
    def make_layer(in_channels: int, width: int, blocks: int, stride: int):
        """`blocks` bottlenecks; the first one strides."""
        first = Bottleneck(in_channels, width, stride)
        others = [Bottleneck(4 * width, width, stride=1) for _ in range(blocks - 1)]
        return nn.Sequential(first, *others)

    @property
    def stages(self):
        return [self.layer2, self.layer3, self.layer4]

    def stem(self, images):
        """(B, 3, S, S) → (B, 4·width, S/4, S/4)."""
        x = self.bn1(self.conv1(images)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(x)).relu_()
        return self.layer1(F.avg_pool2d(x, 2))

    def to_map(self, v):
        """A stage's output as (B, C, H, W)."""
        return v

    def add_to_map(self, v, delta):
        """Add (B, C, H, W) to a stage's output."""
        return v + delta

    def head(self, v):
        """Every position in the joint space: (B, C, H, W) → (B, E, H, W)."""
        return self.attnpool.forward_dense(v)

    def pool(self, v):
        """The image in the joint space: (B, C, H, W) → (B, E)."""
        return self.attnpool(v)


# ------------------------------------------------------- transformers: the ViT and the text encoder
class QuickGELU(nn.Module):
    """x · σ(1.702 x), the activation OpenAI trained with; torch's GELU is another function."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x). causal: no word sees a later word."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), causal=self.causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Residual blocks under OpenAI's name `resblocks`; `stages` are its thirds, the same blocks."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool):
        super().__init__()
        blocks = [ResidualBlock(width, heads, causal) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    @property
    def stages(self):
        blocks = self.resblocks
        third = len(blocks) // 3
        return [blocks[:third], blocks[third : 2 * third], blocks[2 * third :]]


class VisionTransformer(nn.Module):
    """CLIP's ViT on (B, 1 + N, C): a class token, which maps leave out, then patches by row."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.vision_width
        patch = config.patch_size
        side = config.image_size // patch
        scale = width**-0.5
        self.channels = (width, width, width)  # of the stages
        self.strides = (patch, patch, patch)
        self.stride = patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(side**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        heads = max(1, width // 64)
        self.transformer = Transformer(width, config.vision_layers, heads, causal=False)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    @property
    def stages(self):
        return self.transformer.stages

    def stem(self, images):
        """(B, 3, S, S) → (B, 1 + N, C)."""
        x = self.conv1(images)  # (B, C, H, W)
        self.grid = x.shape[2:]  # for to_map
        x = x.flatten(2).mT  # (B, N, C)
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1)  # (B, 1 + N, C)
        return self.ln_pre(x + resize_positions(self.positional_embedding, *self.grid))

    def to_map(self, v):
        """The patches of a stage's output as (B, C, H, W)."""
        return v[:, 1:].mT.unflatten(2, self.grid)

    def add_to_map(self, v, delta):
        """Add (B, C, H, W) to the patches of a stage's output."""
        patches = v[:, 1:] + delta.flatten(2).mT
        return torch.cat([v[:, :1], patches], dim=1)

    def head(self, v):
        """Every patch in the joint space: (B, 1 + N, C) → (B, E, H, W)."""
        return self.to_map(self.ln_post(v) @ self.proj)

    def pool(self, v):
        """The image in the joint space, from the class token: (B, 1 + N, C) → (B, E)."""
        return self.ln_post(v[:, 0]) @ self.proj


# --------------------------------------------------------------------------------------------- CLIP
class CLIP(nn.Module):
    """The text encoder, which holds the image encoder `visual`: so OpenAI's names have it."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.identity = {}
        image_encoder = ModifiedResNet if config.patch_size is None else VisionTransformer
        self.visual = image_encoder(config)
        width = config.text_width
        heads = max(1, width // 64)
        self.transformer = Transformer(width, config.text_layers, heads, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))

    @property
    def stages(self):
        return self.transformer.stages

    def stem(self, tokens):
        """(B, L) ids → (B, L, D)."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def head(self, t, tokens):
        """(B, L, D) → word features (B, L, D) and the sentence feature (B, E)."""
        words = self.ln_final(t)
        end = tokens.argmax(-1)  # the end mark has the largest id
        sentence = words[torch.arange(len(words), device=t.device), end]  # (B, D)
        return words, sentence @ self.text_projection

    def encode_image(self, images):
        """(B, 3, S, S) → (B, E), not normalized."""
        v = self.visual.stem(images)
        for stage in self.visual.stages:
            v = stage(v)
        return self.visual.pool(v)

    def encode_text(self, tokens):
        """(B, L) → (B, E), not normalized."""
        t = self.stem(tokens)
        for stage in self.stages:
            t = stage(t)
        return self.head(t, tokens)[1]


# ------------------------------------------------------------------------------------------ weights
def build_clip(state: dict, source="these weights", name: str | None = None) -> CLIP:
    """A CLIP of the shape that `state` shows, loaded strictly, frozen, in evaluation mode.

    UserError, naming `source`, where `state` is no CLIP, or not of the shape that `name` has.
    """
    errors = (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError)
    remedy = "not a CLIP under OpenAI's names: give another --weights FILE"
    with as_user_error(source, remedy, errors):
        clip = CLIP(CLIPConfig.from_state_dict(state))
        clip.load_state_dict(state, strict=True)
    if name and clip.config != CLIP_CONFIGS[name]:
        reason = f"holds a CLIP of other sizes than {name}"
        raise UserError(f"{source}: {reason}: give the --backbone it belongs to")
    clip.identity = {"sha256": clip_weights.state_dict_sha256(state)}
    return clip.eval().requires_grad_(False)


def load_clip(name: str, weights=None, seed: int = 0) -> CLIP:
    """The frozen CLIP `name`.

    weights: a FILE, "random" (by name and `seed`), or None: from weights/, else the official file.
    UserError for an unknown name, an unreadable file, or weights of another shape than `name` has.
    """
    if name not in CLIP_CONFIGS:
        raise UserError(f"unknown backbone {name!r}: choose one of {', '.join(CLIP_CONFIGS)}")
    if weights == "random":
        source = f"random, seed {seed}"
        state = clip_weights.init_by_name(CLIP(CLIP_CONFIGS[name]).state_dict(), seed)
    else:
        shipped = ROOT / "weights" / f"{name}.pt"
        if weights:
            source = weights
        elif shipped.exists():
            source = shipped
        else:
            source = clip_weights.clip_file(name, check=functools.partial(build_clip, name=name))
        state = clip_weights.read_weights(source)
    clip = build_clip(state, source, name)
    clip.identity = {"name": name, "weights": Path(source).name, **clip.identity}
    return clip
