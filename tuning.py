"""9. What the paper compares with: other ways to tune a frozen CLIP (Table 2), and ETRIS with a part swapped (4 to 7).

    python train.py --tuning lora                 python train.py --tuning adapter+bridger
    build("tiny", tuning="bridger+no-ga", weights="random")

Each method is a function that changes a finished model from outside: a forward hook, a parametrisation or another
module in a part's place; clip_model.py and etris.py know nothing of them. What a method adds stands where it works
(`clip.transformer.resblocks.0.attn.out_proj.adapter.down.weight`), learns, and is all that a checkpoint holds of CLIP.
The paper published none of these; where its words leave room, the docstring says what was chosen. Methods that promise
it start as the identity: the first logits are those of the model without them, bit for bit.

B batch · L words · D text width · C channels · H W grid · p inner width of a ResNet's bottleneck
"""

import importlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from clip_model import Attention, AttentionPool, Bottleneck, ResidualBlock
from command import UserError

SYSTEMS = ("etris", "barleria", "detris")
REDUCTION = 4  # section 5.1: "we standardized the reduction factor to 4"


def build(*backbone, system="etris", tuning="bridger", **config) -> nn.Module:
    """`system`'s own build(backbone, **config), then the methods that `tuning` joins by +, applied to it.

    Without the word bridger ETRIS has no bridges. `model.config` rebuilds the model. UserError for an unknown name.
    """
    names = parse(tuning)
    if system not in SYSTEMS:
        raise UserError(f"unknown --system {system!r}: choose one of {', '.join(SYSTEMS)}")
    if system != "etris" and "bridger" not in names:
        raise UserError(f"--tuning {tuning}: {system} always has its own tuned parts: write bridger+{tuning}")
    bridges = {} if "bridger" in names else {"stages": ()}
    model = apply(importlib.import_module(system).build(*backbone, **config | bridges), names)
    model.config = model.config | {"system": system, "tuning": "+".join(names)}
    return model


def parse(tuning: str) -> list[str]:
    """The names that `tuning` joins by +, in the order of METHODS; UserError names those there are."""
    names = [name.strip() for name in tuning.split("+")]
    wrong = [name for name in names if name not in METHODS or names.count(name) > 1]
    if wrong or {"frozen", "bridger"} <= set(names):
        raise UserError(f"--tuning {tuning!r}: {(wrong or names)[0]!r} is unknown, twice there or against another: "
                        f"join some of {', '.join(METHODS)} by +")  # fmt: skip
    return [name for name in METHODS if name in names]


def apply(model: nn.Module, names) -> nn.Module:
    """The model with these METHODS applied, still in training mode."""
    for name in names:
        METHODS[name](model)
    return model.train()


def as_it_is(model):
    """frozen and bridger: nothing to add. Which of the two it is, `build` has decided."""


# ------------------------------------------------------------------------------------- all of CLIP, or some of it
def full(model):
    """Fine-tuning: every number of CLIP learns but `logit_scale`, which segmentation never uses.

    BatchNorm stays in evaluation mode (its scale and shift learn, its statistics do not move), for a model must not
    depend on its neighbours in the batch. As in CRIS, whose score the paper prints, CLIP learns at a tenth of the rate.
    """
    for name, parameter in model.frozen.named_parameters():
        parameter.requires_grad_(name != "logit_scale")
        parameter.pace = 0.1


def bitfit(model):
    """BitFit (Ben Zaken et al. 2022): of CLIP only what is called bias learns, BatchNorm's and LayerNorm's included."""
    for name, parameter in model.frozen.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------- adapters
class Adapter(nn.Module):
    """x + up(GELU(down(x))) over the channels, which stand in `dim`: (B, L, D) with −1, maps (B, C, H, W) with 1.

    `up` starts at zero, so the whole as the identity (Houlsby et al. 2019 start it near zero).
    """

    def __init__(self, down, up, dim: int):
        super().__init__()
        self.down, self.up, self.dim = down, up, dim

    def forward(self, x):
        inner = F.gelu(self.down(x.movedim(self.dim, -1)))
        return x + self.up(inner).movedim(-1, self.dim)


def dense_pair(width: int) -> tuple[nn.Linear, nn.Linear]:
    """width → width / 4 → width, with biases, the second one zero. On maps these are 1×1 convolutions."""
    down, up = nn.Linear(width, width // REDUCTION), nn.Linear(width // REDUCTION, width)
    nn.init.zeros_(up.weight), nn.init.zeros_(up.bias)
    return down, up


def insert(module, name: str, adapter: Adapter):
    """Hang the adapter under `module`, whose output then passes through it."""
    module.add_module(name, adapter)
    module.register_forward_hook(lambda module, _, out: getattr(module, name)(out))


def places(clip):
    """(module, width, dim) behind which both encoders take an adapter, two in every block.

    Text and ViT blocks: after the attention's and after the MLP's last layer, before each is added (Houlsby et al.,
    figure 2). They know no ResNet: there, after the BatchNorm of a bottleneck's two narrow convolutions, 1×1 and 3×3.
    """
    for block in clip.modules():
        if isinstance(block, ResidualBlock):
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                yield layer, layer.out_features, -1
        elif isinstance(block, Bottleneck):
            for norm in (block.bn1, block.bn2):
                yield norm, norm.num_features, 1


def adapter(model):
    """Bottleneck adapters (Houlsby et al. 2019) in both encoders, as section 5.1 says; at each of `places`.

    RN101: 2,391,904 in the picture encoder, which is the printed 2.39M by itself, and 3,161,088 in the text encoder.
    """
    for module, width, dim in places(model.frozen):
        insert(module, "adapter", Adapter(*dense_pair(width), dim))


def conv_adapter(model):
    """Conv Adapter, for which the paper cites VL-Adapter (Sung et al. 2022): "inserted into the visual encoder".

    One bottleneck of 1×1 convolutions in each of a ResNet's blocks, after its 3×3 convolution. Paper and citation do
    not say more; this place and size give the printed 1.20M (1,195,952 at RN101). UserError on a ViT, which has none.
    """
    blocks = [module for module in model.frozen.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise UserError("--tuning conv-adapter: made for a ResNet's convolutions: choose adapter for this backbone")
    for block in blocks:
        insert(block.bn2, "conv_adapter", Adapter(*dense_pair(block.bn2.num_features), 1))


class HypercomplexLinear(nn.Module):
    """x Wᵀ + b with W = Σᵢ Aᵢ ⊗ (sᵢ tᵢ), i = 1 … n: A (n, n, n) is shared, s (n, out/n, r), t (n, r, in/n) are own."""

    def __init__(self, rule, inside: int, outside: int, rank: int = 1, zero: bool = False):
        super().__init__()
        n = len(rule)
        self.rule = rule
        self.left = nn.Parameter(torch.zeros(n, outside // n, rank))
        self.right = nn.Parameter(torch.randn(n, rank, inside // n) * (inside // n) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(outside))
        if not zero:
            nn.init.normal_(self.left, std=rank**-0.5)

    def weight(self):
        """(out, in): n² times fewer numbers than it has entries, but for A."""
        blocks = torch.einsum("iab,icd->acbd", self.rule, self.left @ self.right)  # (n, out/n, n, in/n)
        return blocks.flatten(2).flatten(0, 1)

    def forward(self, x):
        return F.linear(x, self.weight(), self.bias)


def compacter(model, n: int = 4):
    """Compacter (Karimi Mahabadi et al. 2021): adapters in both encoders whose matrices are sums of Kronecker products.

    The places of `adapter`; n = 4 and rank 1 as in its section 5, one A for the whole model. 107,104 at RN101, the
    paper prints 0.19M and gives neither n nor rank.
    """
    rule = nn.Parameter(torch.randn(n, n, n) / n)
    for module, width, dim in places(model.frozen):
        inner = width // REDUCTION
        pair = HypercomplexLinear(rule, width, inner), HypercomplexLinear(rule, inner, width, zero=True)
        insert(module, "compacter", Adapter(*pair, dim))


# ---------------------------------------------------------------------------------------------------- LoRA
class LowRank(nn.Module):
    """W → W + B A in some of W's blocks of rows: A (blocks, rank, in), B (blocks, rows, rank), B zero at first."""

    def __init__(self, weight, blocks, of: int, rank: int):
        super().__init__()
        rows, inside = weight.shape[0] // of, weight.shape[1]
        self.blocks, self.rows = blocks, rows
        self.down = nn.Parameter(torch.randn(len(blocks), rank, inside) * inside**-0.5)
        self.up = nn.Parameter(torch.zeros(len(blocks), rows, rank))

    def forward(self, weight):
        change = dict(zip(self.blocks, self.up @ self.down, strict=True))
        return torch.cat([rows + change.get(i, 0.0) for i, rows in enumerate(weight.split(self.rows))])


def lora(model, rank: int = 4):
    """LoRA (Hu et al. 2022) on what makes queries and values, the paper's "primary approach", in both encoders.

    Every attention: of the text (and a ViT's) blocks the first and last third of `in_proj_weight`, of a ResNet's
    attention pool q_proj and v_proj. α = rank, so B A is not scaled. 131,072 at RN101; the attention pool's share alone
    is 32,768, the printed 0.03M. `torch.nn.utils.parametrize.remove_parametrizations` merges it into the weight.
    """
    found = []
    for module in model.frozen.modules():
        if hasattr(module, "qkv"):  # a DINOv2's
            found.append((module.qkv, "weight", (0, 2), 3))
        elif isinstance(module, Attention):
            found.append((module, "in_proj_weight", (0, 2), 3))
        elif isinstance(module, AttentionPool):
            found += [(module.q_proj, "weight", (0,), 1), (module.v_proj, "weight", (0,), 1)]
    for module, name, blocks, of in found:
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name), blocks, of, rank))


# ---------------------------------------------------------------------------------------------------- CoOp
class Prompt(nn.Module):
    """Learned words between a sentence's start mark and its first word, in place of what stands there."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, embedded):
        """(B, L, D) with empty places 1 … count → the same with the learned vectors there."""
        count = len(self.vectors)
        return torch.cat([embedded[:, :1], self.vectors.expand(len(embedded), -1, -1), embedded[:, 1 + count :]], dim=1)


def make_room(tokens, count: int, longest: int):
    """(B, L) ids → (B, min(L + count, longest)), `count` empty places after the start mark.

    A sentence that is then too long for CLIP's context is cut and ends in its end mark, as the tokenizer does it.
    """
    empty = tokens.new_zeros(len(tokens), count)
    longer = torch.cat([tokens[:, :1], empty, tokens[:, 1:]], dim=1)
    kept, lost = longer[:, :longest].clone(), longer.argmax(-1) >= longest
    kept[lost, -1] = longer.amax(-1)[lost]
    return kept


def coop(model, count: int = 8):
    """CoOp (Zhou et al. 2022): 8 learned vectors before the sentence's words (section 5.1), the only thing tuned.

    8 · 512 = 4,096 at RN101, the printed 4.10K. Bridger and decoder see them as words. The tiny CLIPs read 24 tokens:
    there a sentence of 17, the longest, loses its last word.
    """
    clip = model.frozen
    longest, width = clip.positional_embedding.shape
    clip.token_embedding.add_module("prompt", Prompt(count, width))
    clip.token_embedding.register_forward_hook(lambda module, _, out: module.prompt(out))
    model.register_forward_pre_hook(lambda _, given: (given[0], make_room(given[1], count, longest)))


# ------------------------------------------------------------------------------------------- ETRIS with a part swapped
class DeepestMap(nn.Module):
    """Instead of HA: the last stage's map, brought to the decoder's grid and width; no other level, no sentence."""

    def __init__(self, project):
        super().__init__()
        self.project = project

    def forward(self, maps, sentence):
        return self.project(maps[2])


class NoGlobalAlignment(nn.Module):
    """Instead of GA: nothing, F_c = F_v; the words reach the logits through the sentence alone."""

    def forward(self, features, words, ignore):
        return features


def no_ha(model):
    """Table 6 without HA. The paper says "removing"; as GA needs a map of one size, the last stage's is projected."""
    model.hierarchical = DeepestMap(model.hierarchical.project[2])


def no_ga(model):
    """Table 6 without GA: HA's features go straight to the projector."""
    model.global_ = NoGlobalAlignment()


class DenseZoom(nn.Module):
    """Table 5 (a) and (c): a Linear over channels, then one over the flattened places (a), or an MLP (c), with biases.

    (B, C, n, n) → (B, C', m, m). The places' weights fit one picture size only.
    """

    def __init__(self, inside: int, outside: int, side: int, new_side: int, hidden: int | None = None):
        super().__init__()
        self.channels, self.side = nn.Linear(inside, outside), new_side
        first = nn.Linear(side**2, hidden or new_side**2)
        self.places = nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, new_side**2)) if hidden else first

    def forward(self, x):
        x = self.channels(x.flatten(2).mT).mT  # (B, C', N)
        return self.places(x).unflatten(2, (self.side, self.side))


def interpolating_zoom(inside: int, outside: int, side: int, new_side: int) -> nn.Sequential:
    """Table 5 (b): where the map shrinks, the 2×2 convolution as it was; where it grows, 1×1 and interpolation."""
    factor = max(1, side // new_side)
    conv = nn.Conv2d(inside, outside, factor, stride=factor, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    grow = nn.Upsample(scale_factor=new_side / side, mode="bilinear") if new_side > side else nn.Identity()
    return nn.Sequential(conv, grow)


def swap_zooms(model, make):
    """make(channels in, out, side of the map, new side) in place of every bridge's two zoom layers.

    As with the layers they replace, what leaves for the frozen stream starts at a tenth (`etris.start_small`).
    """
    visual = model.frozen.visual
    sides = [model.size // stride for stride in visual.strides]
    for i, bridge in model.bridger.items():
        channels, width, side = visual.channels[int(i)], bridge.linear_in.out_features, sides[int(i)]
        bridge.zoom_in, bridge.zoom_out = make(channels, width, side, sides[1]), make(width, channels, sides[1], side)
        for parameter in next(iter(bridge.zoom_out.children())).parameters():
            parameter.data.mul_(0.1)


def zoom_linear(model):
    """Table 5 (a): 5,766,641 in RN101's Bridger at 416 pixels."""
    swap_zooms(model, DenseZoom)


def zoom_mlp(model):
    """Table 5 (c), hidden width 64 whatever the Bridger's: 1,682,633 in RN101's Bridger at 416 pixels."""
    swap_zooms(model, lambda *sizes: DenseZoom(*sizes, hidden=64))


def zoom_interpolate(model):
    """Table 5 (b): 1,450,560 in RN101's Bridger."""
    swap_zooms(model, interpolating_zoom)


METHODS = {
    "bridger": as_it_is, "frozen": as_it_is, "full": full, "bitfit": bitfit, "adapter": adapter,
    "conv-adapter": conv_adapter, "compacter": compacter, "coop": coop, "lora": lora, "no-ha": no_ha, "no-ga": no_ga,
    "zoom-linear": zoom_linear, "zoom-interpolate": zoom_interpolate, "zoom-mlp": zoom_mlp,
}  # fmt: skip
