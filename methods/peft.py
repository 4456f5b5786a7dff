"""What the paper compares with: other ways to tune a frozen CLIP, and ETRIS with a part swapped.

    python train.py --tuning lora                 python train.py --tuning adapter+bridger
    build_model("tiny", tuning="bridger+no-ga", weights="random")

The former are the paper's Table 2, the latter its Tables 4 to 7. Each method is a function that
changes a finished model from outside: by a forward hook, a parametrization, or another module in a
part's place. clip_model.py and etris.py know nothing of them. What a method adds learns, is all
that a checkpoint stores of CLIP, and is named after the module it works on
(`clip.transformer.resblocks.0.attn.out_proj.adapter.down.weight`).

The authors published none of these. Where the paper leaves a choice open, the docstring says what
was chosen. Methods that are meant to start as the identity do: the first logits are those of the
model without them, bit for bit.

B batch · L words · D text width · C channels · H W grid · p inner width of a ResNet's bottleneck
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from clip_model import Attention, AttentionPool, Bottleneck, ResidualBlock
from methods.arms import ARMS
from methods.conditions import CONDITIONS
from methods.dinov2 import FusedAttention
from utils.common import UserError

REDUCTION = 4  # section 5.1: "we standardized the reduction factor to 4"


# ----------------------------------------------------------------------- all of CLIP, or its biases
def no_change(model):
    """bridger and frozen: there is nothing to add. `checkpoint.build_model` leaves bridges out."""


def full(model):
    """Full fine-tuning: all of CLIP learns but `logit_scale`, which segmentation never uses.

    BatchNorm stays in evaluation mode: its scale and shift learn, but its statistics do not move,
    so that a result does not depend on the other images of its batch. CLIP learns at a tenth of
    the learning rate, as in CRIS, whose score the paper prints.
    """
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(name != "logit_scale")
        parameter.lr_scale = 0.1


def bitfit(model):
    """BitFit (Ben Zaken et al. 2022): of CLIP only the biases learn, those of norms included."""
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)


# ---------------------------------------------------------------------------------------- adapters
class Adapter(nn.Module):
    """x + up(GELU(down(x))) over the channels, which are dimension `dim`.

    dim: -1 for a sequence (B, L, D), 1 for a map (B, C, H, W). `up` starts at zero, so the adapter
    starts as the identity (Houlsby et al. 2019 start it near the identity).
    """

    def __init__(self, down, up, dim: int):
        super().__init__()
        self.down = down
        self.up = up
        self.dim = dim

    def forward(self, x):
        """The same shape."""
        hidden = F.gelu(self.down(x.movedim(self.dim, -1)))
        return x + self.up(hidden).movedim(-1, self.dim)


def linear_adapter(width: int, dim: int) -> Adapter:
    """width → width / 4 → width, with biases. On maps these are 1×1 convolutions."""
    down = nn.Linear(width, width // REDUCTION)
    up = nn.Linear(width // REDUCTION, width)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return Adapter(down, up, dim)


def attach_adapter(module, name: str, adapter: Adapter):
    """Make the adapter a child of `module`, whose output then passes through it."""

    def pass_through(module, inputs, output):
        return getattr(module, name)(output)

    module.add_module(name, adapter)
    module.register_forward_hook(pass_through)


def adapter_sites(clip):
    """(module, width, dim) after which both encoders get an adapter: two in every block.

    Text and ViT blocks: after the last layer of the attention and of the MLP, before the shortcut
    is added (Houlsby et al. 2019, figure 2). They have no ResNet: there, after the BatchNorm of a
    bottleneck's two narrow convolutions, 1×1 and 3×3.
    """
    sites = []
    for block in clip.modules():
        if isinstance(block, ResidualBlock):
            for linear in (block.attn.out_proj, block.mlp.c_proj):
                sites.append((linear, linear.out_features, -1))
        elif isinstance(block, Bottleneck):
            for norm in (block.bn1, block.bn2):
                sites.append((norm, norm.num_features, 1))
    return sites


def adapter(model):
    """Bottleneck adapters (Houlsby et al. 2019) in both encoders (section 5.1), at `adapter_sites`.

    RN101: 2,391,904 parameters in the image encoder, which alone are the printed 2.39M, and
    3,161,088 in the text encoder.
    """
    for module, width, dim in adapter_sites(model.backbone):
        attach_adapter(module, "adapter", linear_adapter(width, dim))


def conv_adapter(model):
    """Conv Adapter, for which the paper cites VL-Adapter (Sung et al. 2022).

    The paper says only: "inserting the adapter into the visual encoder". Here, one bottleneck of
    1×1 convolutions in each of a ResNet's blocks, after its 3×3 convolution. This choice gives the
    printed 1.20M (1,195,952 with RN101). UserError on a ViT, which has no convolutions.
    """
    blocks = [module for module in model.backbone.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        message = "--tuning conv-adapter: made for a ResNet's convolutions"
        raise UserError(f"{message}: choose adapter for this backbone")
    for block in blocks:
        width = block.bn2.num_features
        attach_adapter(block.bn2, "conv_adapter", linear_adapter(width, dim=1))


class HypercomplexLinear(nn.Module):
    """x Wᵀ + b with W = Σᵢ Aᵢ ⊗ (sᵢ tᵢ), i = 1 … n: Compacter's layer.

    rule: A (n, n, n), shared by all layers. Each layer has its own s (n, out/n, rank) and
    t (n, rank, in/n). zero: start with W = 0.
    """

    def __init__(
        self, rule, in_features: int, out_features: int, rank: int = 1, zero: bool = False
    ):
        super().__init__()
        n = len(rule)
        right = torch.randn(n, rank, in_features // n) * (in_features // n) ** -0.5
        self.rule = rule
        self.left = nn.Parameter(torch.zeros(n, out_features // n, rank))
        self.right = nn.Parameter(right)
        self.bias = nn.Parameter(torch.zeros(out_features))
        if not zero:
            nn.init.normal_(self.left, std=rank**-0.5)

    def weight(self):
        """(out, in), made of n² times fewer parameters, not counting A."""
        products = self.left @ self.right  # (n, out/n, in/n)
        blocks = torch.einsum("iab,icd->acbd", self.rule, products)  # (n, out/n, n, in/n)
        return blocks.flatten(2).flatten(0, 1)

    def forward(self, x):
        """(…, in) → (…, out)."""
        return F.linear(x, self.weight(), self.bias)


def compacter(model, n: int = 4):
    """Compacter (Karimi Mahabadi et al. 2021): adapters whose matrices are Kronecker products.

    In both encoders, at `adapter_sites`; n = 4 and rank 1 as in its section 5, one A for the whole
    model. 107,104 parameters with RN101; the paper prints 0.19M and gives neither n nor rank.
    """
    rule = nn.Parameter(torch.randn(n, n, n) / n)
    for module, width, dim in adapter_sites(model.backbone):
        hidden = width // REDUCTION
        down = HypercomplexLinear(rule, width, hidden)
        up = HypercomplexLinear(rule, hidden, width, zero=True)
        attach_adapter(module, "compacter", Adapter(down, up, dim))


# -------------------------------------------------------------------------------------------- LoRA
class LowRank(nn.Module):
    """W → W + B A in some of the equal blocks of rows that W consists of; B starts at zero.

    blocks: which of the `count` blocks change. down: A (blocks, rank, in), up: B (blocks, rows,
    rank).
    """

    def __init__(self, weight, blocks, count: int, rank: int):
        super().__init__()
        in_features = weight.shape[1]
        self.blocks = blocks
        self.rows = weight.shape[0] // count
        down = torch.randn(len(blocks), rank, in_features) * in_features**-0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(len(blocks), self.rows, rank))

    def forward(self, weight):
        """(out, in) → (out, in)."""
        changes = self.up @ self.down  # (blocks, rows, in)
        new_rows = list(weight.split(self.rows))
        for block, change in zip(self.blocks, changes, strict=True):
            new_rows[block] = new_rows[block] + change
        return torch.cat(new_rows)


def lora(model, rank: int = 4):
    """LoRA (Hu et al. 2022) on the projections of queries and values, in both encoders.

    The paper says only "following the primary approach". In every attention of the text encoder's
    (and a ViT's) blocks it changes the first and last third of `in_proj_weight`, in a ResNet's
    attention pool q_proj and v_proj. α = rank, so B A is not scaled. 131,072 parameters with RN101;
    the attention pool's share alone is 32,768, the printed 0.03M.
    `torch.nn.utils.parametrize.remove_parametrizations` merges it into the weights.
    """
    for module in list(model.backbone.modules()):
        if isinstance(module, FusedAttention):  # a DINOv2's
            add_low_rank(module.qkv, "weight", (0, 2), 3, rank)
        elif isinstance(module, Attention):
            add_low_rank(module, "in_proj_weight", (0, 2), 3, rank)
        elif isinstance(module, AttentionPool):
            add_low_rank(module.q_proj, "weight", (0,), 1, rank)
            add_low_rank(module.v_proj, "weight", (0,), 1, rank)


def add_low_rank(module, name: str, blocks, count: int, rank: int):
    """Give the weight `name` of a module a LowRank change in `blocks` of its `count` blocks."""
    change = LowRank(getattr(module, name), blocks, count, rank)
    parametrize.register_parametrization(module, name, change)


# -------------------------------------------------------------------------------------------- CoOp
class Prompt(nn.Module):
    """Learned vectors between a sentence's start mark and its first word."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, embedded):
        """embedded (B, L, D) with slots at 1 … count → the same, with the vectors in the slots."""
        count = len(self.vectors)
        vectors = self.vectors.expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :1], vectors, embedded[:, 1 + count :]], dim=1)


def insert_prompt_slots(tokens, count: int, max_length: int):
    """(B, L) ids → (B, min(L + count, max_length)), with `count` empty slots after the start mark.

    A sentence that is then too long is cut and ends in its end mark, as the tokenizer does it.
    """
    slots = tokens.new_zeros(len(tokens), count)
    longer = torch.cat([tokens[:, :1], slots, tokens[:, 1:]], dim=1)
    kept = longer[:, :max_length].clone()
    end_position = longer.argmax(-1)  # the end mark is the largest id
    end_lost = end_position >= max_length
    kept[:, -1] = torch.where(end_lost, longer.amax(-1), kept[:, -1])
    return kept


def coop(model, count: int = 8):
    """CoOp (Zhou et al. 2022): 8 learned vectors before the sentence's words (section 5.1).

    Nothing else of CLIP learns: 8 · 512 = 4,096 parameters with RN101, the printed 4.10K. Bridger
    and decoder see the vectors as words. The tiny CLIPs read 24 tokens: there a sentence of 17
    loses its last word, one of 22 (`scenes-g`) its last six.
    """
    clip = model.backbone
    max_length, width = clip.positional_embedding.shape

    def lengthen_sentence(module, inputs):
        images, tokens = inputs
        return images, insert_prompt_slots(tokens, count, max_length)

    def fill_slots(module, inputs, output):
        return module.prompt(output)

    clip.token_embedding.add_module("prompt", Prompt(count, width))
    clip.token_embedding.register_forward_hook(fill_slots)
    model.register_forward_pre_hook(lengthen_sentence)


# ------------------------------------------------------------------------ ETRIS with a part swapped
class DeepestMap(nn.Module):
    """In place of HA: the last stage's map alone, projected to the decoder's grid and width."""

    def __init__(self, project):
        super().__init__()
        self.project = project

    def forward(self, maps, sentence):
        """Three stage maps → (B, D, h, w); the sentence is not used."""
        return self.project(maps[2])


class NoGlobalAlignment(nn.Module):
    """In place of GA: F_c = F_v. Words reach the logits only through the sentence feature."""

    def forward(self, features, words, key_padding_mask):
        return features


def no_ha(model):
    """Table 6 without HA.

    The paper says "removing"; GA needs a map of one size, so the last stage's map is projected.
    """
    model.hierarchical_alignment = DeepestMap(model.hierarchical_alignment.project[2])


def no_ga(model):
    """Table 6 without GA: HA's features go straight to the projector."""
    model.global_alignment = NoGlobalAlignment()


class DenseZoom(nn.Module):
    """Table 5 (a) and (c): a Linear over the channels, then one over the flattened grid.

    (B, C, side, side) → (B, C', new_side, new_side), with biases. hidden: an MLP of that hidden
    width over the grid (c) instead of the Linear (a). The weights fit one image size only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        side: int,
        new_side: int,
        hidden: int | None = None,
    ):
        super().__init__()
        self.new_side = new_side
        self.channels = nn.Linear(in_channels, out_channels)
        if hidden is None:
            self.places = nn.Linear(side**2, new_side**2)
        else:
            self.places = nn.Sequential(
                nn.Linear(side**2, hidden),
                nn.ReLU(),
                nn.Linear(hidden, new_side**2),
            )

    def forward(self, x):
        """(B, C, side, side) → (B, C', new_side, new_side)."""
        x = self.channels(x.flatten(2).mT).mT  # (B, C', side²)
        x = self.places(x)  # (B, C', new_side²)
        return x.unflatten(2, (self.new_side, self.new_side))


def mlp_zoom(in_channels: int, out_channels: int, side: int, new_side: int) -> DenseZoom:
    """Table 5 (c): hidden width 64."""
    return DenseZoom(in_channels, out_channels, side, new_side, hidden=64)


def interpolating_zoom(
    in_channels: int, out_channels: int, side: int, new_side: int
) -> nn.Sequential:
    """Table 5 (b): a 2×2 convolution to shrink a map, a 1×1 and interpolation to enlarge it."""
    factor = max(1, side // new_side)
    conv = nn.Conv2d(in_channels, out_channels, factor, stride=factor, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if new_side > side:
        resize = nn.Upsample(scale_factor=new_side / side, mode="bilinear")
    else:
        resize = nn.Identity()
    return nn.Sequential(conv, resize)


def swap_zooms(model, make_zoom):
    """Put make_zoom(in_channels, out_channels, side, new_side) in place of all zoom layers.

    As in the layers that they replace, what joins the frozen stream starts at a tenth (see
    `etris.scale_down_init`).
    """
    visual = model.backbone.visual
    sides = [model.size // stride for stride in visual.strides]
    bridge_side = sides[1]  # of the grid inside the Bridger
    for i, bridge in model.bridger.items():
        channels = visual.channels[int(i)]
        side = sides[int(i)]
        width = bridge.linear_in.out_features
        bridge.zoom_in = make_zoom(channels, width, side, bridge_side)
        bridge.zoom_out = make_zoom(width, channels, bridge_side, side)
        first_layer = next(bridge.zoom_out.children())
        for parameter in first_layer.parameters():
            parameter.data.mul_(0.1)


def zoom_linear(model):
    """Table 5 (a): 5,766,641 parameters in RN101's Bridger at 416 pixels."""
    swap_zooms(model, DenseZoom)


def zoom_interpolate(model):
    """Table 5 (b): 1,450,560 parameters in RN101's Bridger."""
    swap_zooms(model, interpolating_zoom)


def zoom_mlp(model):
    """Table 5 (c), hidden width 64 for any Bridger.

    1,682,633 parameters in RN101's Bridger at 416 pixels.
    """
    swap_zooms(model, mlp_zoom)


# -------------------------------------------------------------------------------- names and choices
METHODS = {
    "bridger": no_change,
    "frozen": no_change,
    "full": full,
    "bitfit": bitfit,
    "adapter": adapter,
    "conv-adapter": conv_adapter,
    "compacter": compacter,
    "coop": coop,
    "lora": lora,
    "no-ha": no_ha,
    "no-ga": no_ga,
    "zoom-linear": zoom_linear,
    "zoom-interpolate": zoom_interpolate,
    "zoom-mlp": zoom_mlp,
    **CONDITIONS,
    **ARMS,
}


def parse_tuning(tuning: str) -> list[str]:
    """The names that `tuning` joins by +, in the order of METHODS; UserError for a wrong one."""
    names = [name.strip() for name in tuning.split("+")]
    choices = ", ".join(METHODS)
    for name in names:
        if name not in METHODS:
            reason = f"{name!r} is unknown"
        elif names.count(name) > 1:
            reason = f"{name!r} is given twice"
        elif name == "frozen" and "bridger" in names:
            reason = "'frozen' means without 'bridger'"
        else:
            continue
        raise UserError(f"--tuning {tuning!r}: {reason}: join some of {choices} by +")
    return [name for name in METHODS if name in names]


def apply_tuning(model: nn.Module, names) -> nn.Module:
    """Apply the METHODS of these names to the model; returns it in training mode."""
    for name in names:
        METHODS[name](model)
    return model.train()
