"""11. BarLeRIa, the second system: adapted shortcuts, intertwined prompts, and a side network with a global prior.

    x ← flow(x) + attention(LN x);  x ← flow(x) + MLP(LN x)           in every block of both frozen encoders
    picture tokens = class, prompts written by the words, patches     (and, if both ways, words = picture prompt, words)
    logits = projector(global_alignment(hierarchical_alignment(maps, sentence) + side(image, maps, words), words), …)

BarLeRIa (Wang et al. 2024) shares ETRIS' decoder, projector, loss and training. Where its paper and its code part, the
code wins and `# differs:` says so. B batch · L words · D text width · C picture width · N = h·w patches · w side width
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from clip_model import CLIP, Attention, attend, load_clip, padding, resize_positions
from command import UserError
from etris import ETRIS, GlobalAlignment, HierarchicalAlignment, Projector, check_size, positions, start_small

PAPER = {"size": 416, "epochs": 50, "batch_size": 32, "lr": 1e-4, "bridge_lr": 1e-4, "schedule": "step", "width": 144,
         "dropout": 0.1, "beta2": 0.999, "words": 17}  # 17 on RefCOCOg too # fmt: skip
TINY = {"size": 96, "epochs": 3, "batch_size": 16, "lr": 1.5e-3, "bridge_lr": 1.5e-3, "schedule": "cosine",
        "width": 48, "dropout": 0.0, "beta2": 0.98}  # fmt: skip
PRESETS = {"ViT-B-16": PAPER, "tiny-vit": TINY}  # width: the side network's
NARROW, HEADS, QUERIES, PLANES = 32, 3, 128, 4  # inside of the prompt MLPs; side network; planar flows in a row


# ------------------------------------------------------------------------------------------ the shortcuts' flows
class Planar(nn.Module):
    """y + u·tanh(wᵀy + b): bends space along one direction (Rezende and Mohamed 2015, equation 10)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias, self.scale = (nn.Parameter(torch.empty(n)) for n in ((1, width), 1, (1, width)))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.01, 0.01)

    def forward(self, y):
        return y + self.scale * torch.tanh(F.linear(y, self.weight, self.bias))


class Flow(nn.Module):
    """What stands in for a residual block's identity: μ + σ ⊙ x, then planar flows; at the start nearly the identity.

    10·width + 4 parameters. No likelihood: the original computes one log-determinant and drops it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mu, self.logsigma = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.planes = nn.Sequential(*[Planar(width) for _ in range(PLANES)])

    def forward(self, x):
        """(…, width) → the same shape."""
        return self.planes(self.mu + self.logsigma.exp() * x)


def flows(transformer) -> nn.ModuleList:
    """For each block of a frozen transformer one flow beside its attention and one beside its MLP."""
    widths = [block.ln_1.weight.numel() for block in transformer.resblocks]
    return nn.ModuleList(nn.ModuleList([Flow(width), Flow(width)]) for width in widths)


def adapted(block, pair, x):
    """A frozen residual block whose two shortcuts pass through flows."""
    x = pair[0](x) + block.attn(block.ln_1(x), causal=block.causal)
    return pair[1](x) + block.mlp(block.ln_2(x))


def prompter(inside: int, outside: int) -> nn.Sequential:
    """inside → 32 → outside: writes one side's tokens as prompts for another."""
    layers = nn.Sequential(nn.Linear(inside, NARROW), nn.ReLU(), nn.Linear(NARROW, outside))
    for linear in layers[::2]:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return layers


# ---------------------------------------------------------------------------------------------- the side network
class FusedAttention(Attention):
    """Self-attention under timm's names, `qkv` and `proj`. prior (B, N, w): its values are added to the tokens' own."""

    def __init__(self, width: int, heads: int):
        nn.Module.__init__(self)
        if width % heads:
            raise UserError(f"--width {width}: {heads} attention heads do not divide it: choose a multiple of {heads}")
        self.heads, self.map = heads, None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, prior=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if prior is not None:
            v = v + F.linear(prior, self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2])
        out, weights = attend(q, k, v, self.heads, fast=self.fast and not self.keep)
        self.map = weights.detach() if self.keep else None
        return self.proj(out)


class Block(nn.Module):
    """A ViT block under timm's names; unlike CLIP's, exact GELU and ε 1e-6."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = FusedAttention(width, heads)
        parts = ("fc1", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("fc2", nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, prior=None):
        x = x + self.attn(self.norm1(x), prior)
        return x + self.mlp(self.norm2(x))


class Feedback(nn.Module):
    """One step down the side network: `linear` guesses a block's input from its output, `linear2` makes its prior."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.linear2 = (nn.Linear(width, width, bias=False) for _ in range(2))


class SideNetwork(nn.Module):
    """Global shortcut tuning: a small ViT beside CLIP that reads the picture twice, the second time with a prior.

    Tokens: learned queries, prompts written by the words, patches. The first reading is plain. What in it points the
    way of p, the prompts' mean, goes down a chain of linear maps and is added to every block's values in the second
    (analysis by synthesis: Shi et al. 2023). differs: the queries' outputs are unused, as in the original's code.
    """

    def __init__(self, clip: CLIP, size: int, width: int = 144, over_batch: bool = False):
        super().__init__()
        patch, channels, depth = clip.visual.patch, clip.size.width, max(4, 2 * clip.size.layers // 3)  # 12 → 8
        places = (size // patch) ** 2
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.queries, self.query_positions = (
            nn.Parameter(0.02 * torch.randn(1, min(QUERIES, places), width)) for _ in range(2)
        )
        self.prompt = prompter(clip.size.text_width, width)
        self.blocks = nn.ModuleList([Block(width, HEADS) for _ in range(depth)])
        self.feedback = nn.ModuleList([Feedback(width) for _ in range(depth)])
        joins = [(nn.LayerNorm(channels, eps=1e-6), nn.Conv2d(channels, width, 1)) for _ in range(4)]
        self.fusions = nn.ModuleList([nn.Sequential(*pair) for pair in joins])
        self.over_batch, self.reconstruction = over_batch, 0.0

    def fuse(self, i, tokens, taps):
        """Add CLIP's map number i, (B, C, h, w), to the patches, which are the last h·w tokens."""
        norm, conv = self.fusions[i]
        v = conv(norm(taps[i].movedim(1, -1)).movedim(-1, 1)).flatten(2).mT  # (B, N, w)
        return torch.cat([tokens[:, : -v.shape[1]], tokens[:, -v.shape[1] :] + v], dim=1)

    def start(self, images, prompts, taps):
        """Queries, prompts, patches with CLIP's first map: (B, Q + L + N, w)."""
        x = self.patch(images)
        places = resize_positions(F.pad(self.positions[0], (0, 0, 1, 0)), *x.shape[2:])[1:]  # it skips a class row
        queries = (self.queries + self.query_positions).expand(len(x), -1, -1)
        return self.fuse(0, torch.cat([queries, prompts, x.flatten(2).mT + places], dim=1), taps)

    def resemblance(self, x, p):
        """max(0, cos) of every token x (B, T, w) with the prior p (B, w) → (B, T, 1).

        differs: the original's code normalises p over the batch (over_batch), so that a picture's result hangs on
        its neighbours; over the channels it is the cosine the paper means (ledger B2).
        """
        p = F.normalize(p, dim=0 if self.over_batch else 1)
        return (F.normalize(x, dim=-1) @ p[:, :, None]).clamp(0, 1)

    def priors(self, x, p):
        """The first reading's tokens x and the prior p → what each block's values gain, first block first."""
        x = x * self.resemblance(x, p)
        x, down = 5 * (x @ p[:, :, None]) * p[:, None], []
        for step in reversed(self.feedback):
            x = step.linear(x)
            down.insert(0, step.linear2(x))
        return down

    def forward(self, images, taps, words):
        """images (B, 3, S, S), four maps of CLIP's (B, C, h, w), words (B, L, D) → (B, w, h, w')."""
        prompts, lost = self.prompt(words), 0.0
        start = x = self.start(images, prompts, taps)
        for block in self.blocks:
            x = block(x)
        down, x = self.priors(x, prompts.mean(1)), start
        for i, (block, step) in enumerate(zip(self.blocks, self.feedback, strict=True)):
            out = block(x, down[i])
            if self.training:  # trains `linear` alone: both ends are cut off
                lost = lost + F.mse_loss(step.linear(out.detach()).float(), x.detach().float())
            x = self.fuse(i + 1, out, taps) if i < 3 else out
        self.reconstruction = lost
        h, w = taps[0].shape[2:]
        return x[:, -h * w :].mT.unflatten(2, (h, w))


# ------------------------------------------------------------------------------------------------------ the whole
class BarLeRIa(ETRIS):
    """ETRIS' decoder behind a CLIP ViT with adapted shortcuts. side None: "No Global". both_ways: prompts for the text
    too, which the original has but cannot run (ledger B1)."""

    def __init__(self, clip, hierarchical, global_, projector, side=None, both_ways=False, size=416, words=17):
        super().__init__(clip, nn.ModuleDict(), hierarchical, global_, projector, None, size, words)
        self.flows = nn.ModuleDict({"visual": flows(clip.visual.transformer), "text": flows(clip.transformer)})
        self.prompt_v = prompter(clip.size.text_width, clip.size.width)
        self.prompt_t = prompter(clip.size.width, clip.size.text_width) if both_ways else None
        self.side, self.system = side, "barleria"
        if side:
            self.side_out = nn.Linear(side.positions.shape[-1], clip.size.text_width)

    def extra_loss(self):
        """How badly the side network guesses its blocks' inputs, of the last forward in train mode; else 0."""
        return self.side.reconstruction if self.side else 0.0

    def intertwine(self, v, t):
        """Prompts from each encoder's first tokens into the other: v (B, 1 + N, C), t (B, L, D) → both, longer.

        differs: the paper's text prompt comes from the class token, which no picture has touched yet; ours is written
        by the patches' mean. It stands before the words and is taken off again, so the end mark keeps its place.
        """
        prompts = self.prompt_v(t)
        if self.prompt_t:
            t = torch.cat([self.prompt_t(v[:, 1:].mean(1, keepdim=True)), t], dim=1)
        return torch.cat([v[:, :1], prompts, v[:, 1:]], dim=1), t

    def read(self, name, transformer, x):
        """All blocks of one frozen encoder with their flows → the stream after each block."""
        streams = []
        for block, pair in zip(transformer.resblocks, self.flows[name], strict=True):
            x = self.run(lambda x, block=block, pair=pair: adapted(block, pair, x), x)
            streams.append(x)
        return streams

    def encode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) → three maps, words (B, L, D), sentence (B, E), the side's four maps."""
        visual, text, L = self.clip.visual, self.clip, tokens.shape[1]
        v, t = self.intertwine(visual.stem(images), text.stem(tokens))
        v, t = self.read("visual", visual.transformer, v), self.read("text", text.transformer, t)
        v = [torch.cat([x[:, :1], x[:, 1 + L :]], dim=1) for x in v]  # without prompts
        third, fourth = len(v) // 3, len(v) / 4
        taps = [visual.as_map(v[int(i * fourth)]) for i in range(4)]
        maps = [visual.as_map(v[third - 1]), visual.as_map(v[2 * third - 1]), visual.head(v[-1])]
        for i, x in enumerate(maps):
            self.note(f"visual{i}.after", x)
        return maps, *text.head(t[-1][:, -L:], tokens), taps

    def forward(self, images, tokens):
        """images (B, 3, S, S) normalised, tokens (B, L) → logits (B, 1, S/4, S/4)."""
        check_size(self.clip, *images.shape[2:])
        maps, words, sentence, taps = self.encode(images, tokens)
        features = self.note("neck", self.hierarchical(maps, sentence))
        if self.side:
            shortcut = self.side_out(self.side(images, taps, words).movedim(1, -1)).movedim(-1, 1)
            features = features + self.note("side", shortcut)
        features = self.global_(features, words, padding(tokens))
        self.note("features", features), self.note("words", words), self.note("sentence", sentence)
        return self.projector(features, sentence)


def assemble(clip, size=416, words=17, *, width=144, dropout=0.1, global_prior=True, both_ways=False, released=False,
             over_batch=None) -> BarLeRIa:  # fmt: skip
    """BarLeRIa around a frozen CLIP ViT. released=True: what the original released, its cosine over the batch included
    unless over_batch=False. global_prior=False leaves the side network out."""
    if clip.size.patch is None or clip.size.layers % 3:
        raise UserError("--system barleria: its prompts need a ViT: choose --backbone ViT-B-16 or tiny-vit")
    check_size(clip, size)
    if released:  # as ETRIS: the positions are resized once, and trained at that size
        visual, grid = clip.visual, size // clip.size.patch
        visual.positional_embedding = nn.Parameter(resize_positions(visual.positional_embedding.data, grid, grid))
    head = HierarchicalAlignment(clip), GlobalAlignment(clip), Projector(clip)  # first: the same as ETRIS' by seed
    side = SideNetwork(clip, size, width, released if over_batch is None else over_batch) if global_prior else None
    model = BarLeRIa(clip, *head, side, both_ways, size, words)
    for parameter in positions(clip):
        parameter.requires_grad_(released)
    if not released:
        start_small(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.align_corners = released
    return model.train()


def build(backbone="tiny-vit", size=96, words=17, weights=None, seed=0, **options) -> BarLeRIa:
    """A model from plain values, which a checkpoint carries as `config` (options: those of `assemble`)."""
    if backbone not in PRESETS:
        raise UserError(f"--system barleria with --backbone {backbone}: choose one of {', '.join(PRESETS)}")
    options = {"width": PRESETS[backbone]["width"]} | options
    model = assemble(load_clip(backbone, weights, seed), size, words, **options)
    values = {"backbone": backbone, "size": size, "words": words, "seed": seed, **options}
    model.config = {"weights": "random", **values} if weights == "random" else values
    return model
