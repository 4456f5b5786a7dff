"""BarLeRIa, the second system: flows in shortcuts, prompts between encoders, a side network.

    x ← flow(x) + attention(LN x);  x ← flow(x) + MLP(LN x)      in every block of both encoders
    image tokens = class token, prompts written by the words, patches
    features = hierarchical_alignment(maps, sentence) + side(images, maps, words)
    logits = projector(global_alignment(features, words), sentence)

BarLeRIa (Wang et al. 2024) shares ETRIS' decoder, projector, loss and training. Where its paper and
its authors' code disagree, we follow the code, and `# differs:` says so.

B batch · L words · D text width · C image width · h w patch grid · N = h·w patches
Q learned queries of the side network · d its width · T = Q + L + N, its tokens
"""

import torch
import torch.nn.functional as F
from torch import nn

from clip_model import CLIP, resize_positions
from etris import (
    ETRIS,
    GlobalAlignment,
    HierarchicalAlignment,
    Projector,
    check_size,
    positional_embeddings,
    scale_down_init,
)
from methods.dinov2 import ViTBlock
from utils.common import UserError
from utils.tokenizer import padding_mask

FLOW_LENGTH = 4  # planar flows in a row
PROMPT_WIDTH = 32  # the hidden layer of the prompt MLPs
SIDE_HEADS = 3  # attention heads of the side network
SIDE_QUERIES = 128  # its learned queries


# --------------------------------------------------------------------------- flows in the shortcuts
class Planar(nn.Module):
    """y + u·tanh(wᵀy + b): bends space along one direction.

    Rezende and Mohamed 2015, equation 10.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))
        self.scale = nn.Parameter(torch.empty(1, width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.01, 0.01)

    def forward(self, y):
        """(…, width) → the same shape."""
        return y + self.scale * torch.tanh(F.linear(y, self.weight, self.bias))


class Flow(nn.Module):
    """Replaces a residual block's identity: μ + σ ⊙ x, then planar flows.

    It starts near the identity. 10·width + 4 parameters. There is no likelihood: the original
    computes one log-determinant and does not use it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(width))
        self.logsigma = nn.Parameter(torch.zeros(width))
        self.planes = nn.Sequential(*[Planar(width) for _ in range(FLOW_LENGTH)])

    def forward(self, x):
        """(…, width) → the same shape."""
        return self.planes(self.mu + self.logsigma.exp() * x)


def build_flows(transformer) -> nn.ModuleList:
    """Two flows for each block of a frozen transformer: beside its attention, beside its MLP."""
    flows = nn.ModuleList()
    for block in transformer.resblocks:
        width = block.ln_1.weight.numel()
        flows.append(nn.ModuleList([Flow(width), Flow(width)]))
    return flows


def block_with_flows(block, flows, x):
    """A frozen residual block whose two shortcuts pass through `flows`: (B, N, C) → (B, N, C)."""
    x = flows[0](x) + block.attn(block.ln_1(x), causal=block.causal)
    return flows[1](x) + block.mlp(block.ln_2(x))


def prompt_mlp(in_features: int, out_features: int) -> nn.Sequential:
    """in → 32 → out features: turns the tokens of one encoder into prompts for another."""
    down = nn.Linear(in_features, PROMPT_WIDTH)
    up = nn.Linear(PROMPT_WIDTH, out_features)
    for linear in (down, up):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(down, nn.ReLU(), up)


# --------------------------------------------------------------------------------- the side network
class FeedbackStep(nn.Module):
    """One step down the side network, for one of its blocks.

    `linear` predicts the block's input from its output. `linear2` turns that into its prior.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.linear2 = nn.Linear(width, width, bias=False)


class SideNetwork(nn.Module):
    """Global shortcut tuning: a small ViT beside CLIP reads the image twice, then with a prior.

    Its tokens are learned queries, prompts written by the words, and patches. The first pass is a
    plain ViT. Its output is filtered by its similarity with p, the mean of the prompts, and goes
    down a chain of linear maps, from the last block to the first. In the second pass the result is
    added to every block's values (analysis by synthesis: Shi et al. 2023).

    over_batch: normalize p over the batch, as the original does (see `similarity`).
    differs: the outputs of the queries are not used, as in the original's code.
    """

    def __init__(self, clip: CLIP, size: int, width: int = 144, over_batch: bool = False):
        super().__init__()
        patch_size = clip.config.patch_size
        channels = clip.config.vision_width
        depth = max(4, 2 * clip.config.vision_layers // 3)  # ViT-B/16: 8 blocks beside CLIP's 12
        patches = (size // patch_size) ** 2
        queries = min(SIDE_QUERIES, patches)
        self.patch = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, patches, width))
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.query_positions = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.prompt = prompt_mlp(clip.config.text_width, width)
        self.blocks = nn.ModuleList([ViTBlock(width, SIDE_HEADS) for _ in range(depth)])
        self.feedback = nn.ModuleList([FeedbackStep(width) for _ in range(depth)])
        self.fusions = nn.ModuleList()
        for _ in range(4):
            norm = nn.LayerNorm(channels, eps=1e-6)
            self.fusions.append(nn.Sequential(norm, nn.Conv2d(channels, width, 1)))
        self.over_batch = over_batch
        self.reconstruction = 0.0  # the auxiliary loss of the last forward pass

    def fuse(self, i: int, tokens, clip_maps):
        """Add CLIP's map i, (B, C, h, w), to the patches, which are the last h·w tokens."""
        norm, conv = self.fusions[i]
        v = norm(clip_maps[i].movedim(1, -1)).movedim(-1, 1)  # over the channels
        v = conv(v).flatten(2).mT  # (B, N, d)
        N = v.shape[1]
        return torch.cat([tokens[:, :-N], tokens[:, -N:] + v], dim=1)

    def first_tokens(self, images, prompts, clip_maps):
        """Queries, prompts, and patches with CLIP's first map added: (B, T, d)."""
        x = self.patch(images)
        B, _, h, w = x.shape
        # resize_positions expects a row for a class token, and our positions have none
        positions = resize_positions(F.pad(self.positions[0], (0, 0, 1, 0)), h, w)[1:]
        patches = x.flatten(2).mT + positions  # (B, N, d)
        queries = (self.queries + self.query_positions).expand(B, -1, -1)
        return self.fuse(0, torch.cat([queries, prompts, patches], dim=1), clip_maps)

    def similarity(self, x, p):
        """max(0, cos) of every token x (B, T, d) with the prior p (B, d) → (B, T, 1).

        differs: the original's code normalizes p over the batch (over_batch), so an image's result
        depends on the other images of its batch. Over the channels it is the cosine that the paper
        means (docs/differences.md, B2).
        """
        p = F.normalize(p, dim=0 if self.over_batch else 1)
        return (F.normalize(x, dim=-1) @ p[:, :, None]).clamp(0, 1)

    def block_priors(self, x, p):
        """Tokens x (B, T, d) after the first pass, prior p (B, d) → (B, T, d) for every block."""
        x = x * self.similarity(x, p)
        x = 5 * (x @ p[:, :, None]) * p[:, None]  # 5·x·(p pᵀ)
        priors = []
        for step in reversed(self.feedback):
            x = step.linear(x)
            priors.append(step.linear2(x))
        return priors[::-1]  # first block first

    def forward(self, images, clip_maps, words):
        """images (B, 3, S, S), four of CLIP's maps (B, C, h, w), words (B, L, D) → (B, d, h, w)."""
        h, w = clip_maps[0].shape[2:]
        prompts = self.prompt(words)  # (B, L, d)
        tokens = self.first_tokens(images, prompts, clip_maps)  # (B, T, d)

        # first pass: a plain ViT
        x = tokens
        for block in self.blocks:
            x = block(x)
        priors = self.block_priors(x, prompts.mean(1))

        # second pass: with priors, and CLIP's other maps after the first three blocks
        x = tokens
        reconstruction = 0.0
        for i, block in enumerate(self.blocks):
            out = block(x, priors[i])
            if self.training:  # both ends are detached: this trains `linear` alone
                predicted = self.feedback[i].linear(out.detach())
                dtype = torch.promote_types(x.dtype, torch.float32)  # out of half precision
                error = F.mse_loss(predicted.to(dtype), x.detach().to(dtype))
                reconstruction = reconstruction + error
            x = self.fuse(i + 1, out, clip_maps) if i < 3 else out
        self.reconstruction = reconstruction
        return x[:, -h * w :].mT.unflatten(2, (h, w))


def init_as_released(side: SideNetwork):
    """The side network's initial values as in the original (docs/differences.md, B7)."""
    for module in [*side.blocks.modules(), *side.feedback.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for _, conv in side.fusions:
        nn.init.kaiming_uniform_(conv.weight, a=1)  # Caffe2's Xavier: ±√(3 / fan in)
        nn.init.zeros_(conv.bias)
    for i in (0, 2):
        side.prompt[i].reset_parameters()  # torch's default


# ------------------------------------------------------------------------------------- whole model
class BarLeRIa(ETRIS):
    """ETRIS' decoder behind a CLIP ViT with flows in its shortcuts, prompts and a side network.

    side: a SideNetwork, or None, the paper's "No Global". both_ways: prompts for the text encoder
    too, which the original has but cannot run (docs/differences.md, B1).
    """

    def __init__(
        self,
        clip,
        hierarchical_alignment,
        global_alignment,
        projector,
        side=None,
        both_ways=False,
        size=416,
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
        visual_flows = build_flows(clip.visual.transformer)
        text_flows = build_flows(clip.transformer)
        self.flows = nn.ModuleDict({"visual": visual_flows, "text": text_flows})
        text_width = clip.config.text_width
        vision_width = clip.config.vision_width
        self.prompt_v = prompt_mlp(text_width, vision_width)
        self.prompt_t = prompt_mlp(vision_width, text_width) if both_ways else None
        self.side = side
        if side:
            self.side_out = nn.Linear(side.positions.shape[-1], text_width)
        self.system = "barleria"

    def auxiliary_loss(self):
        """The side network's reconstruction loss of the last forward pass in train mode, else 0."""
        return self.side.reconstruction if self.side else 0.0

    def intertwine(self, v, t):
        """The local intertwined module: each encoder's first tokens write prompts for the other.

        v (B, 1 + N, C), t (B, L, D) → (B, 1 + L + N, C) and (B, L, D). With both_ways the latter is
        (B, 1 + L, D).

        differs: the paper's text prompt comes from the class token, which has not seen the image at
        this point; ours comes from the mean of the patches. It stands before the words and is
        removed after the last block, so the end mark keeps its position.
        """
        visual_prompts = self.prompt_v(t)  # (B, L, C)
        if self.prompt_t:
            text_prompt = self.prompt_t(v[:, 1:].mean(1, keepdim=True))  # (B, 1, D)
            t = torch.cat([text_prompt, t], dim=1)
        v = torch.cat([v[:, :1], visual_prompts, v[:, 1:]], dim=1)
        return v, t

    def run_blocks(self, transformer, flows, x):
        """Run all blocks of a frozen encoder with their flows → the output of every block."""
        streams = []
        for block, pair in zip(transformer.resblocks, flows, strict=True):
            x = block_with_flows(block, pair, x)
            streams.append(x)
        return streams

    def encode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) → maps, words, sentence, clip_maps.

        Three maps for the decoder, words (B, L, D), sentence (B, E), and the four maps
        (B, C, h, w) that the side network reads.
        """
        visual = self.clip.visual
        L = tokens.shape[1]
        v, t = self.intertwine(visual.stem(images), self.clip.stem(tokens))
        v = self.run_blocks(visual.transformer, self.flows["visual"], v)
        t = self.run_blocks(self.clip.transformer, self.flows["text"], t)

        # image: remove the prompts from the output of every block, so (B, 1 + N, C) is left
        v = [torch.cat([x[:, :1], x[:, 1 + L :]], dim=1) for x in v]
        depth = len(v)
        clip_maps = [visual.to_map(v[i * depth // 4]) for i in range(4)]  # of 12: blocks 0, 3, 6, 9
        maps = [
            visual.to_map(v[depth // 3 - 1]),  # of 12 blocks: after the fourth
            visual.to_map(v[2 * (depth // 3) - 1]),  # after the eighth
            visual.head(v[-1]),
        ]
        for i, x in enumerate(maps):
            self.record(f"visual{i}.after", x)

        # text: the last L tokens are the words
        words, sentence = self.clip.head(t[-1][:, -L:], tokens)
        return maps, words, sentence, clip_maps

    def forward(self, images, tokens):
        """images (B, 3, S, S) normalized, tokens (B, L) → logits (B, 1, S/4, S/4)."""
        check_size(self.clip, *images.shape[2:])
        maps, words, sentence, clip_maps = self.encode(images, tokens)
        features = self.hierarchical_alignment(maps, sentence)  # (B, D, h, w)
        self.record("neck", features)
        if self.side:
            shortcut = self.side(images, clip_maps, words).movedim(1, -1)  # (B, h, w, d)
            shortcut = self.side_out(shortcut).movedim(-1, 1)  # (B, D, h, w)
            self.record("side", shortcut)
            features = features + shortcut
        features = self.global_alignment(features, words, padding_mask(tokens))
        self.record("features", features)
        self.record("words", words)
        self.record("sentence", sentence)
        return self.projector(features, sentence)


def build_barleria(
    clip: CLIP,
    size=416,
    max_tokens=17,
    *,
    width=144,
    dropout=0.1,
    global_prior=True,
    both_ways=False,
    released=False,
    over_batch=None,
) -> BarLeRIa:
    """BarLeRIa around a frozen CLIP ViT.

    width: of the side network. global_prior=False: no side network. released=True: what the
    original released, including its initial values, and its cosine over the batch unless
    over_batch=False.
    """
    config = clip.config
    if config.patch_size is None or config.vision_layers % 3:
        message = "--system barleria: its prompts need a ViT"
        raise UserError(f"{message}: choose --backbone ViT-B-16 or tiny-vit")
    check_size(clip, size)
    if released:  # as in ETRIS: the positions are resized once, and trained at that size
        grid = size // config.patch_size
        positions = resize_positions(clip.visual.positional_embedding.data, grid, grid)
        clip.visual.positional_embedding = nn.Parameter(positions)
    if over_batch is None:
        over_batch = released

    # the decoder first: a seed gives it the same initial weights as in ETRIS
    decoder = HierarchicalAlignment(clip), GlobalAlignment(clip, dropout), Projector(clip)
    side = SideNetwork(clip, size, width, over_batch) if global_prior else None
    model = BarLeRIa(clip, *decoder, side, both_ways, size, max_tokens)
    for parameter in positional_embeddings(clip):
        parameter.requires_grad_(released)
    if not released:
        scale_down_init(model)
    elif global_prior:
        init_as_released(side)
    model.align_corners = released
    return model.train()
