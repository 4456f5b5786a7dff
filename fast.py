"""Optional reading: the same numbers sooner. `set_fast(model)` swaps methods, `False` swaps back.

The book writes every step out. Here is what computes the same with less work: `FAST` says which
class's method is replaced by which function. The functions are set on the instances, so deleting
them leaves the plain path, bit for bit; parameters, buffers and their names stay as they are.
tests/test_fast.py holds both paths together: 1e-10 in float64, 1e-4 in float32, outputs and
gradients.

What each trick buys: seconds of a training step of RN101 at 416 pixels with two objects, on two
cores of an AMD EPYC, each row with all before it (`python -m experiments.benchmark --quick`):

    plain                                                          4.71
    attention without its weights in memory                        4.31
    gates without queries and keys                                 4.14
    the sentence's kernel without a grouped convolution            3.80
    channels mixed before a map is upsampled                       3.05
    frozen BatchNorm folded into its convolution                   2.97

B batch · L words · D text width · N pixel positions · C, O input and output channels · H W map
"""

import functools
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from clip_model import Attention, AttentionPool, Bottleneck, ModifiedResNet
from etris import DecoderLayer, Gate, Projector
from methods.dinov2 import FusedAttention


# --------------------------------------------------------------------------------------- attention
def attend(self, q, k, v, attn_mask=None, causal=False):
    """MultiHeadAttention.attend by torch's kernel, which never stores the weights (B, heads, N, M),
    except on a CPU in training with dropout.

    Where somebody asks for the weights (save_attention), the plain path runs; and where a sentence
    has a mask and is causal too, for the kernel takes only one of them.
    """
    if self.save_attention or (causal and attn_mask is not None):
        return type(self).attend(self, q, k, v, attn_mask, causal)
    self.attention_weights = None
    q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
    k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, d)
    v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    dropout_p = self.dropout if self.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal=causal)
    return out.transpose(1, 2).flatten(2)  # (B, N, D)


def gate_forward(self, features, sentence):
    """Gate.forward: the softmax over one key is 1, so only the value is computed."""
    if self.save_attention:
        return type(self).forward(self, features, sentence)
    B, D = sentence.shape
    weight = self.in_proj_weight[-D:]
    bias = self.in_proj_bias[-D:]
    value = F.linear(sentence, weight, bias)  # (B, D)
    gate = self.out_proj(value)
    return features * gate[:, None]


# --------------------------------------------------------------------------------------- projector
def upsample_matrix(n: int, like: Tensor) -> Tensor:
    """Bilinear upsampling of n positions to 2n, as the three taps of a 3-wide convolution see it.

    (3, 2n, n): row y of matrix k holds what tap k meets at output y; beyond the border, zeros.
    """
    identity = torch.eye(n, device=like.device)[None]
    columns = F.interpolate(identity, scale_factor=2, mode="linear")[0]  # (n, 2n)
    rows = columns.T.to(like.dtype)  # (2n, n)
    rows = F.pad(rows, (0, 0, 1, 1))  # the convolution's padding: (2n + 2, n)
    taps = [rows[k : k + 2 * n] for k in range(3)]
    return torch.stack(taps)


def conv3x3_after_upsample(x, weight):
    """conv2d(upsample ×2 of x, weight, padding=1): x (B, C, h, w), weight (O, C, 3, 3)
    → (B, O, 2h, 2w).

    Upsampling leaves channels alone. So they are mixed before it, on a quarter of the positions,
    which is a quarter of the work; two small matrices then upsample rows and columns:

        x = einsum("bchw,ockl->bkhwlo", x, weight)
        x = einsum("kyh,bkhwlo->bywlo", upsample_matrix(h, x), x)
        x = einsum("lxw,bywlo->boyx", upsample_matrix(w, x), x)

    Below are the same three products, in an order of axes in which nothing is copied. In bf16, nine
    rounded numbers are added where a convolution rounds their sum: about twice its error.
    """
    B, C, h, w = x.shape
    # mix channels, for each row of the kernel
    x = x.permute(0, 2, 3, 1)
    x = x.flatten(1, 2)  # (B, h·w, C)
    kernel_rows = weight.permute(2, 1, 3, 0)
    kernel_rows = kernel_rows.flatten(2)  # (3, C, 3·O)
    products = [x @ row for row in kernel_rows]
    x = torch.stack(products, dim=1)  # (B, 3, h·w, 3·O)

    # upsample rows, and add up those of the kernel
    matrix = upsample_matrix(h, x).transpose(0, 1)
    matrix = matrix.flatten(1)  # (2h, 3·h)
    x = x.view(B, 3 * h, -1)
    x = matrix @ x  # (B, 2h, w·3·O)

    # upsample columns, and add up those of the kernel
    matrix = upsample_matrix(w, x).permute(1, 2, 0)
    matrix = matrix.flatten(1)  # (2w, w·3)
    x = x.view(B, 2 * h, 3 * w, -1)
    x = matrix @ x  # (B, 2h, 2w, O)
    return x.permute(0, 3, 1, 2)


def projector_forward(self, features, sentence):
    """Projector.forward without a map of more than its 3×3 convolutions' outputs.

    The last 1×1 convolution is taken into the sentence's kernel: (kernel ∗ (W x + b)) has 9 cells,
    each a dot product with x. Instead of a grouped convolution, which is slow, these nine numbers
    are computed at each position, and `fold` adds each where its cell points.
    """
    kernel, bias = self.kernel(sentence)  # (B, D/2, 3, 3), (B,)
    x = features
    for conv, norm, relu in (self.vis[1], self.vis[3]):
        x = conv3x3_after_upsample(x, conv.weight)
        x = norm(x)
        x = relu(x)
    B, C, H, W = x.shape
    x = x.flatten(2)  # (B, D/2, H·W)

    last = self.vis[4]
    cells = kernel.flip(2, 3)
    cells = cells.flatten(2).mT  # (B, 9, D/2)
    # the weight as a matrix, in an order that keeps its gradient channels-last, as DDP wants it
    matrix = last.weight.permute(0, 2, 3, 1)
    matrix = matrix.flatten(1)  # (D/2, D/2)
    constant = cells @ last.bias  # (B, 9)
    dots = cells @ matrix @ x + constant[:, :, None]  # (B, 9, H·W)
    logits = F.fold(dots, (H, W), kernel_size=3, padding=1)  # (B, 1, H, W)
    return logits + bias[:, None, None, None]


# ------------------------------------------------------------------------------- frozen BatchNorm
class FoldedPair:
    """A convolution and the BatchNorm behind it: one convolution while both are frozen.

        γ (w ∗ x − μ) / √(σ² + ε) + β  =  (a w) ∗ x + β − a μ      with a = γ / √(σ² + ε)

    The convolution computes this, BatchNorm passes it on. Both modules are still called, so what
    methods/peft.py hooks behind them runs. The folded weights are made and cast once, and again
    after one of the five tensors was written to (not through .data, which torch does not count),
    moved or replaced.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d):
        self.conv = conv
        self.bn = bn
        self.sources = []  # the five tensors' memory, held, so that its address means no other
        self.key = None  # where they lay and how often they had been written to
        self.folded = None  # weight and bias

    def is_frozen(self) -> bool:
        """Whether no parameter of the pair learns and BatchNorm's statistics stand still."""
        learns = [
            self.conv.weight.requires_grad,
            self.bn.weight.requires_grad,
            self.bn.bias.requires_grad,
            self.bn.training,
        ]
        return not any(learns)

    def fold(self, dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution."""
        bn = self.bn
        inverse_std = (bn.running_var + bn.eps).rsqrt()
        scale = bn.weight * inverse_std
        weight = self.conv.weight * scale[:, None, None, None]
        bias = bn.bias - scale * bn.running_mean
        return weight.to(dtype), bias.to(dtype)

    def fold_once(self, dtype) -> tuple[Tensor, Tensor]:
        """The same, from the last call if nothing has changed since."""
        bn = self.bn
        tensors = [self.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        if torch.compiler.is_compiling() or any(x.is_inference() for x in tensors):
            return self.fold(dtype)  # no versions are counted
        key = [dtype]
        for x in tensors:
            key += [x.untyped_storage()._cdata, x.stride(), x._version]
        if key != self.key:
            with torch.inference_mode(False), torch.no_grad():  # of use in training, too
                self.folded = self.fold(dtype)
                self.sources = [x.detach() for x in tensors]
            self.key = key
        return self.folded

    def conv_forward(self, x):
        conv = self.conv
        if not self.is_frozen():
            return type(conv).forward(conv, x)
        dtype = conv.weight.dtype
        kind = x.device.type
        can_cast = dtype is torch.float32 and torch.amp.is_autocast_available(kind)  # not on "meta"
        if can_cast and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        weight, bias = self.fold_once(dtype)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)

    def bn_forward(self, x):
        bn = self.bn
        if not self.is_frozen():
            return type(bn).forward(bn, x)
        return x


def conv_bn_pairs(module):
    """The (convolution, BatchNorm) pairs that a Bottleneck or a ResNet's stem owns."""
    pairs = [
        (module.conv1, module.bn1),
        (module.conv2, module.bn2),
        (module.conv3, module.bn3),
    ]
    if isinstance(module, Bottleneck) and len(module.downsample) > 0:
        pool, conv, bn = module.downsample
        pairs.append((conv, bn))
    return pairs


# ------------------------------------------------------------------------------------- the switch
FAST = {  # class: {its method: the fast function}
    Attention: {"attend": attend},
    AttentionPool: {"attend": attend},
    FusedAttention: {"attend": attend},
    Gate: {"forward": gate_forward},
    Projector: {"forward": projector_forward},
}
FOLDED = (Bottleneck, ModifiedResNet)  # classes whose pairs of convolution and BatchNorm are folded


def set_fast(model: nn.Module, on: bool = True, classes=(*FAST, *FOLDED)) -> nn.Module:
    """Put all modules of `model` on the fast path, or back on the plain one; returns the model.

    classes: those whose tricks are switched, for an experiment. A class's tricks do not hold for
    its subclasses, which may compute something else (Gate is an Attention).
    """
    for module in model.modules():
        # LoRA's parametrization makes a module an instance of a new class
        module_class = parametrize.type_before_parametrizations(module)
        if module_class not in classes:
            continue
        for name, function in FAST.get(module_class, {}).items():
            swap(module, name, types.MethodType(function, module), on)
        if module_class in FOLDED:
            for conv, bn in conv_bn_pairs(module):
                pair = FoldedPair(conv, bn)
                swap(conv, "forward", pair.conv_forward, on)
                swap(bn, "forward", pair.bn_forward, on)
    return model


def swap(module: nn.Module, name: str, method, on: bool):
    """Hide the class's method of this name behind another on this instance, or show it again."""
    if on:
        setattr(module, name, method)
    else:
        vars(module).pop(name, None)


# ------------------------------------------------------------------------------------------- memory
def recompute_decoder(model: nn.Module) -> nn.Module:
    """Keep only the inputs of the decoder's layers; the backward pass computes each layer again."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return model


# ------------------------------------------------------------------------------------ torch.compile
def compile_if_possible(model: nn.Module, device) -> nn.Module:
    """torch.compile(model); where this machine has no working compiler, `model`, said in a line."""

    def small(x):
        return (x.sin() + 1).sum()

    try:
        torch.compile(small)(torch.ones(8, device=device))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        print(f"--compile: no working compiler on this machine ({reason}): going on without")
        return model
    return torch.compile(model)
