"""2. ETRIS: a frozen CLIP, the Bridger that lets its encoders talk, and a light decoder (arXiv 2307.11545, section 3).

    v, t, carry = visual.stem(image), text.stem(tokens), None
    for each stage:  v, t = stage(v), stage(t);  Δv, Δt, carry = bridge(v, t, carry);  v, t = v + Δv, t + Δt
    logits = projector(global_alignment(hierarchical_alignment(maps, sentence), words), sentence)

B batch · L words · D text width (also the decoder's) · E joint space · C channels · N = h·w places of the decoder's
grid (S/16 each way) · d bridge width. Where paper and original code part, the code wins and `# differs:` says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_model import CLIP, Attention, load_clip, padding, resize_positions
from command import UserError, keep_memory


# ---------------------------------------------------------------------------------------- the Bridger, section 3.2
class Interactor(nn.Module):
    """ITA, equation 5: attend to itself, attend to the other encoder, feed forward; each added, then normalised."""

    def __init__(self, width: int, heads: int, hidden: int = 128, dropout: float = 0.1):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, other, ignore=None, ignore_other=None):
        """x (B, N, d), other (B, M, d), paddings (B, ·) True where there is no word → (B, N, d)."""
        x = self.norm1(x + self.dropout(self.self_attn(x, ignore=ignore)))
        # differs: equation 5 attends to the other side *after* its self-attention, the code to it as it came in
        x = self.norm2(x + self.dropout(self.cross_attn(x, other, ignore=ignore_other)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class GatedInteractor(nn.Module):
    """The ViT's interactor: x ⊙ attention(x → other). differs: the paper draws equation 5 here too (ledger 2)."""

    def __init__(self, width: int, heads: int, **_):
        super().__init__()
        self.cross_attn = Attention(width, heads)

    def forward(self, x, other, ignore=None, ignore_other=None):
        return x * self.cross_attn(x, other, ignore=ignore_other)


def zoom(inside: int, outside: int, factor: int, transposed: bool, activated: bool) -> nn.Sequential:
    """Equation 4: a convolution shrinks a map by `factor`, a transposed one grows it; kernel = stride: no overlap."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(inside, outside, factor, stride=factor, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)) if activated else nn.Sequential(conv)


class Bridge(nn.Module):
    """One stage's bridge, equations 1-3: both streams into width d, through the interactors, and back as residuals."""

    def __init__(self, channels, text_width, width, heads, factor, last, first, gated):
        super().__init__()
        kind = GatedInteractor if gated else Interactor
        self.zoom_in = zoom(channels, width, factor, last, gated)
        self.zoom_out = zoom(width, channels, factor, not last, gated)
        self.linear_in, self.linear_out = nn.Linear(text_width, width), nn.Linear(width, text_width)
        self.interact_v, self.interact_t = kind(width, heads), kind(width, heads)
        self.norm_v, self.norm_t = (nn.Identity() if first else nn.LayerNorm(width) for _ in range(2))
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, v, t, carry=None, ignore=None):
        """v (B, C, H, W), t (B, L, D) → Δv, Δt of the same shapes and the carry for the next bridge."""
        x = self.zoom_in(v)
        grid, x, y = x.shape[2:], x.flatten(2).mT, self.linear_in(t)  # (B, N, d), (B, L, d)
        if carry is not None:  # differs: equation 2 carries the interactors' output, the code their input, and norms
            x, y = self.norm_v(x + carry[0]), self.norm_t(y + carry[1])
        new_x = self.interact_v(x, y, ignore_other=ignore)
        new_y = self.interact_t(y, x, ignore=ignore)
        # differs: equation 3 adds to the *next* stage's output, the code to this stage's before the next one runs
        return self.zoom_out(new_x.mT.unflatten(2, grid)), self.linear_out(new_y), (x, y)


def bridger(clip: CLIP, width: int, heads: int | None, stages) -> nn.ModuleDict:
    """Bridges for the given stages, by stage number. A ResNet's maps zoom to the middle one; a ViT's are alike."""
    visual, gated = clip.visual, clip.size.patch is not None
    factors = [max(s, visual.strides[1]) // min(s, visual.strides[1]) for s in visual.strides]
    most = 8 if gated else 4  # the original's, at width 64; fewer where a head would have fewer numbers than there
    heads = heads or min(most, max(1, most * width // 64))
    return nn.ModuleDict(
        {
            str(i): Bridge(visual.channels[i], clip.size.text_width, width, heads, factors[i], i == 2, n == 0, gated)
            for n, i in enumerate(stages)
        }
    )


# -------------------------------------------------------------------------------------------- the decoder, section 3.3
def conv_bn(inside: int, outside: int, kernel: int = 1, stride: int = 1, kind=nn.Conv2d) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU; a 3×3 keeps the size."""
    conv = kind(inside, outside, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Gate(Attention):
    """features ⊙ attention(features → one sentence token), equation 6.

    With one key the softmax is 1: every place gets W_o(W_v s + b_v) + b_o, and what makes queries and keys never learns
    (2·(d² + d) parameters, 1,575,936 in three gates of width 512). The fast path computes that gate and nothing else,
    and the optimiser leaves out the dead rows.
    """

    def forward(self, features, sentence):
        """features (B, N, D), sentence (B, D) → (B, N, D)."""
        if not self.fast:
            return features * super().forward(features, sentence[:, None])
        d = sentence.shape[-1]
        return features * self.out_proj(F.linear(sentence, self.in_proj_weight[-d:], self.in_proj_bias[-d:]))[:, None]


class HierarchicalAlignment(nn.Module):
    """HA, equations 6 and 7: three stage maps, gated by the sentence, on one grid, then mixed with coordinates."""

    def __init__(self, clip: CLIP, heads: int = 8):
        super().__init__()
        width, (c2, c3, _), embed = clip.size.text_width, clip.visual.channels, clip.size.embed
        two = 2 if clip.size.patch is None else 1
        self.sentence = nn.Linear(embed, width)
        down, up = conv_bn(c2, width, two, two), conv_bn(embed, width, two, two, kind=nn.ConvTranspose2d)
        self.project = nn.ModuleList([down, conv_bn(c3, width), up])
        self.gates = nn.ModuleList([Gate(width, heads) for _ in range(3)])
        self.merge = conv_bn(3 * width, width)
        self.coordinates = nn.Sequential(conv_bn(width + 2, width, 3), conv_bn(width, width, 3))

    def forward(self, maps, sentence):
        """maps of three stages, sentence (B, E) → F_v (B, D, h, w)."""
        sentence, gated = self.sentence(sentence), []
        for feature, project, gate in zip(maps, self.project, self.gates, strict=True):
            f = project(feature)  # (B, D, h, w)
            gated.append(gate(f.flatten(2).mT, sentence).mT.unflatten(2, f.shape[2:]))
        merged = self.merge(torch.cat(gated, dim=1))
        B, _, h, w = merged.shape
        y, x = (torch.linspace(-1, 1, n, device=merged.device, dtype=merged.dtype) for n in (h, w))
        xy = torch.stack([x.expand(h, w), y[:, None].expand(h, w)]).expand(B, 2, h, w)
        return self.coordinates(torch.cat([merged, xy], dim=1))


def sine(count: int, width: int, device=None) -> Tensor:
    """(count, width): sin and cos interleaved, frequencies 10000^(−2k/width), positions 0, 1, 2, …"""
    k = torch.arange(0, width, 2, device=device)
    angles = torch.arange(count, device=device)[:, None] * 10000.0 ** (-k / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def sine_grid(height: int, width: int, channels: int, device=None) -> Tensor:
    """(H·W, channels): the first half of the channels counts columns (x), the second rows (y)."""
    x, y = (sine(n, channels // 2, device) for n in (width, height))
    return torch.cat([x.repeat(height, 1), y.repeat_interleave(width, dim=0)], dim=1)


class DecoderLayer(nn.Module):
    """Equation 8: places attend to places, then to words, then feed forward; norms before and after each branch."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_norm, self.cross_norm, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        middle = nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(width)
        self.ffn = nn.Sequential(*middle, nn.Linear(width, width))

    def forward(self, x, words, ignore, places, order):
        """x (B, N, D), words (B, L, D), ignore (B, L), positions places (N, D) and order (L, D) → (B, N, D)."""
        q = self.norm1(x)
        x = x + self.dropout(self.self_norm(self.self_attn(q + places, q + places, q)))
        q = self.norm2(x) + places
        x = x + self.dropout(self.cross_norm(self.cross_attn(q, words + order, words, ignore=ignore)))
        return x + self.dropout(self.ffn(self.norm3(x)))


class GlobalAlignment(nn.Module):
    """GA, equation 8. differs: the paper lets places attend to the sentence F_s, the code to the words, padding cut."""

    def __init__(self, clip: CLIP, layers: int = 3):
        super().__init__()
        width = clip.size.text_width
        heads = max(1, min(8, width // 32))  # the original's 8; fewer where a head would have under 32 numbers
        self.layers = nn.ModuleList([DecoderLayer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, features, words, ignore):
        """features (B, D, h, w), words (B, L, D), ignore (B, L) → F_c (B, D, h, w)."""
        B, D, h, w = features.shape
        places, order = sine_grid(h, w, D, features.device), sine(words.shape[1], D, features.device)
        x = features.flatten(2).mT
        for layer in self.layers:
            x = layer(x, words, ignore, places, order)
        return self.norm(x).mT.unflatten(2, (h, w))


def doubling(n: int, like) -> Tensor:
    """(3, 2n, n): bilinear enlargement ×2 of n places as a matrix, shifted as each tap of a padded 3-convolution sees
    it: row y of slice k says what the k-th tap meets at output y."""
    rows = F.interpolate(torch.eye(n, device=like.device)[None], scale_factor=2, mode="linear")[0].T
    rows = F.pad(rows.to(like.dtype), (0, 0, 1, 1))  # the convolution's zeros
    return torch.stack([rows[k : k + 2 * n] for k in range(3)])


def convolve_doubled(x, weight):
    """A 3×3 convolution, weight (O, C, 3, 3), of x (B, C, h, w) enlarged ×2 → (B, O, 2h, 2w).

    Enlarging leaves channels alone, so they are mixed before it, at a quarter of the places: a quarter of the work, and
    something for the two matrices that enlarge. Below is, so laid out that nothing is copied,
        x = einsum("bchw,ockl->bkhwlo", x, weight)
        x = einsum("kyh,bkhwlo->bywlo", doubling(h, x), x)
        x = einsum("lxw,bywlo->boyx", doubling(w, x), x)
    In bf16 nine rounded numbers are added where a convolution rounds their sum: about twice its error.
    """
    B, _, h, w = x.shape
    x, taps = x.permute(0, 2, 3, 1).flatten(1, 2), weight.permute(2, 1, 3, 0).flatten(2)  # (B, N, C), (3, C, 3·O)
    x = torch.stack([x @ tap for tap in taps], dim=1).view(B, 3 * h, -1)  # a row of the kernel each
    x = doubling(h, x).transpose(0, 1).flatten(1) @ x  # (B, 2h, w·3·O)
    x = doubling(w, x).permute(1, 2, 0).flatten(1) @ x.view(B, 2 * h, 3 * w, -1)
    return x.permute(0, 3, 1, 2)


class Enlarge(nn.Sequential):
    """Twice: ×2, 3×3 convolution, BatchNorm, ReLU; then a 1×1 convolution. (B, D, h, w) → (B, D/2, 4h, 4w)"""

    fast = False

    def __init__(self, width: int):
        up1, up2 = (nn.Upsample(scale_factor=2, mode="bilinear") for _ in range(2))
        half = width // 2
        super().__init__(up1, conv_bn(width, width, 3), up2, conv_bn(width, half, 3), nn.Conv2d(half, half, 1))

    def all_but_last(self, x):
        for up, (conv, norm, relu) in ((self[0], self[1]), (self[2], self[3])):
            x = convolve_doubled(x, conv.weight) if self.fast else conv(up(x))
            x = relu(norm(x))
        return x

    def forward(self, x):
        return self[4](self.all_but_last(x))


class Projector(nn.Module):
    """Equation 9: features to S/4, and one 3×3 convolution whose kernel and bias the sentence writes."""

    fast = False

    def __init__(self, clip: CLIP):
        super().__init__()
        self.half, self.vis = clip.size.text_width // 2, Enlarge(clip.size.text_width)
        self.txt = nn.Linear(clip.size.embed, self.half * 9 + 1)

    def kernel(self, sentence):
        """(B, E) → kernels (B, D/2, 3, 3) and biases (B,). differs: the paper has D biases, the code one scalar."""
        written = self.txt(sentence)
        return written[:, :-1].unflatten(1, (self.half, 3, 3)), written[:, -1]

    def forward(self, features, sentence):
        """features (B, D, h, w), sentence (B, E) → logits (B, 1, 4h, 4w)."""
        kernel, bias = self.kernel(sentence)
        if self.fast:
            logits = self.shifted(self.vis.all_but_last(features), kernel)
        else:
            x = self.vis(features)
            B, C, H, W = x.shape
            logits = F.conv2d(x.reshape(1, B * C, H, W), kernel, padding=1, groups=B).transpose(0, 1)
        return logits + bias[:, None, None, None]

    def shifted(self, x, kernel):
        """The same without a grouped convolution, the last 1×1 one taken into the kernel: nine dot products at each
        place of x (B, D/2, H, W), each then shifted to where its kernel cell points."""
        cells, mix = kernel.flip(2, 3).flatten(2).mT, self.vis[4]  # (B, 9, D/2)
        matrix = mix.weight.permute(0, 2, 3, 1).flatten(1)  # so its gradient lies as DDP wants it, channels last
        dots = cells @ matrix @ x.flatten(2) + (cells @ mix.bias)[:, :, None]  # (B, 9, H·W)
        return F.fold(dots, x.shape[2:], 3, padding=1)


def text_to_pixel_loss(logits: Tensor, masks: Tensor, nearest: bool = False) -> Tensor:
    """Equations 10 and 11: −log σ(z) on the object, −log(1 − σ(z)) elsewhere, mean over all places: BCE.

    logits (B, 1, h, w), masks (B, 1, S, S) in 0..1. differs: a logit's target is the mask's mean over its 4×4 pixels;
    the original takes the top-left pixel (nearest=True), which draws everything up to 3 pixels off (ledger).
    """
    mode = "nearest" if nearest else "area"
    return F.binary_cross_entropy_with_logits(logits.float(), F.interpolate(masks, logits.shape[2:], mode=mode))


# ------------------------------------------------------------------------------------------------------ the whole
def check_size(clip, *sides):
    """UserError where the encoder's strides do not divide a picture's sides."""
    if any(side % clip.visual.stride or side > 4096 for side in sides):
        shape = "×".join(map(str, sides))
        raise UserError(f"picture size {shape}: choose --size a multiple of {clip.visual.stride}, at most 4096")


class ETRIS(nn.Module):
    """The parts are passed in, so that an experiment swaps one. `connect` is the attention pool's extra branch.

    size: pixels each way the model was made for. words: tokens per sentence, start and end included. mask_padding:
    whether padding is hidden from the Bridger (always from the decoder). align_corners: how logits are enlarged.
    """

    def __init__(self, clip, bridger, hierarchical, global_, projector, connect=None, size=416, words=17):
        super().__init__()
        self.clip, self.bridger, self.connect = clip, bridger, connect
        self.hierarchical, self.global_, self.projector = hierarchical, global_, projector
        self.size, self.words, self.mask_padding, self.align_corners = size, words, True, False
        self.seen, self.recompute, self.system, self.config = None, False, "etris", {}

    @property
    def frozen(self) -> CLIP:
        return self.clip

    def train(self, mode: bool = True):
        """Frozen means frozen: CLIP stays in evaluation mode, so that no BatchNorm statistic moves."""
        super().train(mode)
        self.clip.eval()
        return self

    def tuned(self):
        """(name, tensor) of all that training changes, buffers of tuned modules included; what a checkpoint holds."""
        for name, x in self.state_dict(keep_vars=True).items():
            if not name.startswith("clip.") or x.requires_grad:
                yield name, x

    def extra_loss(self):
        return 0.0

    def note(self, name: str, x: Tensor):
        if self.seen is not None:
            self.seen[name] = x.detach()
        return x

    def run(self, stage, x):
        """A frozen stage; `recompute` forgets its activations and computes them again in the backward pass."""
        again = self.recompute and torch.is_grad_enabled() and x.requires_grad
        return checkpoint(stage, x, use_reentrant=False) if again else stage(x)

    def encode(self, images, tokens, owner=None):
        """images (B, 3, S, S), tokens (B, L) → three maps (B, C_i, H_i, W_i), words (B, L, D), sentence (B, E).

        owner (B,): the number of each sentence's picture, where there are fewer pictures than sentences: what lies
        below the first bridge then sees each picture once.
        """
        visual, text = self.clip.visual, self.clip
        ignore = padding(tokens) if self.mask_padding else None
        v, t, carry, maps, shared = visual.stem(images), text.stem(tokens), None, [], owner is not None
        for i in range(3):
            v, t = self.run(visual.stages[i], v), self.run(text.stages[i], t)
            if shared and str(i) in self.bridger:  # from here on a sentence changes what is seen
                v, maps, shared = v[owner], [x[owner] for x in maps], False
            self.note(f"visual{i}.before", visual.as_map(v)), self.note(f"text{i}.before", t)
            if str(i) in self.bridger:
                dv, dt, carry = self.bridger[str(i)](visual.as_map(v), t, carry, ignore)
                v, t = visual.add_map(v, dv), t + dt
            maps.append(self.note(f"visual{i}.after", visual.as_map(v))), self.note(f"text{i}.after", t)
        maps[2] = visual.head(v)
        if self.clip.size.patch is None:
            maps[2] = F.relu(maps[2] + self.connect(v) if self.connect else maps[2])
        return [x[owner] for x in maps] if shared else maps, *text.head(t, tokens)

    def forward(self, images, tokens, **owner):  # not the other systems': there pictures hear words from the start
        """images (B, 3, S, S) normalised, tokens (B, L) → logits (B, 1, S/4, S/4); owner: see `encode`."""
        check_size(self.clip, *images.shape[2:])
        maps, words, sentence = self.encode(images, tokens, **owner)
        features = self.hierarchical(maps, sentence)
        features = self.global_(features, words, padding(tokens))
        self.note("features", features), self.note("words", words), self.note("sentence", sentence)
        return self.projector(features, sentence)

    @torch.no_grad()
    def look(self, images, tokens) -> dict[str, Tensor]:
        """Every intermediate by name: visual0.before … text2.after, features, kernel, logits, attention by module."""
        attentions = {n: m for n, m in self.named_modules() if isinstance(m, Attention)}
        self.seen = {}
        for module in attentions.values():
            module.keep = True
        try:
            logits = self(images, tokens)
            seen = self.seen | {"logits": logits, "kernel": self.projector.kernel(self.seen["sentence"])[0]}
            return seen | {name: module.map for name, module in attentions.items() if module.map is not None}
        finally:
            self.seen = None
            for module in attentions.values():
                module.keep, module.map = False, None


def positions(clip: CLIP) -> list[nn.Parameter]:
    """The positional embeddings, text's and picture's: the original trains them though it calls CLIP frozen."""
    holder = clip.visual if clip.size.patch else clip.visual.attnpool
    return [clip.positional_embedding, holder.positional_embedding]


def start_small(model):
    """Ours: what joins the frozen streams, and the sentence's kernel, start at a tenth (ledger).

    The first model is then nearly plain CLIP, its decoder passes features on and its logits are near zero.
    """
    bridges = list(model.bridger.values())
    joins = [b.linear_out for b in bridges] + [b.zoom_out[min(1, len(b.zoom_out) - 1)] for b in bridges]
    norms = [norm for layer in model.global_.layers for norm in (layer.self_norm, layer.cross_norm)]
    for part in (*joins, *norms, model.projector.txt):
        part.weight.data.mul_(0.1)


def assemble(clip, size=416, words=17, *, width=64, heads=None, stages=(0, 1, 2), dropout=0.1, released=False,
             **ours) -> ETRIS:  # fmt: skip
    """ETRIS around a frozen CLIP. released=True: parameters and wiring of what the original released; else ours, with
    train_positions (on with any bridge), connect, mask_padding to override the defaults that the ledger measured."""
    check_size(clip, size)
    options = {"train_positions": bool(stages), "connect": False, "mask_padding": True}
    if unknown := set(ours) - set(options):
        raise UserError(f"ETRIS has no option {min(unknown)!r}: choose of {', '.join(options)}")
    options |= ours
    if released:
        options = {"train_positions": True, "connect": True, "mask_padding": False}
        if clip.size.patch:  # the original resizes a ViT's positions once, and trains them at that size
            side, grid = clip.visual, size // clip.size.patch
            side.positional_embedding = nn.Parameter(resize_positions(side.positional_embedding.data, grid, grid))
    head = HierarchicalAlignment(clip), GlobalAlignment(clip), Projector(clip)
    resnet, embed = clip.size.patch is None, clip.size.embed
    connect = conv_bn(clip.visual.channels[2], embed)[:2] if options["connect"] and resnet else None
    model = ETRIS(clip, bridger(clip, width, heads, stages), *head, connect, size, words)
    for parameter in positions(clip):
        parameter.requires_grad_(options["train_positions"])
    if not released:
        start_small(model)
    elif connect:
        connect.requires_grad_(False)  # random and never trained: ledger 10c
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.mask_padding, model.align_corners, model.options = options["mask_padding"], released, options
    return model.train()


def build(backbone="tiny", size=128, words=17, weights=None, seed=0, **options) -> ETRIS:
    """A model from plain values, which a checkpoint carries as `config`, with the defaults that a version may change.

    seed matters for weights="random" only.
    """
    model = assemble(load_clip(backbone, weights, seed), size, words, **options)
    values = {"backbone": backbone, "size": size, "words": words, "seed": seed, **options, **model.options}
    model.config = {"weights": "random", **values} if weights == "random" else values
    return model


def set_fast(model: nn.Module, on: bool = True) -> nn.Module:
    """The only switch between the plain path, which writes everything out, and the fast one; both compute the same."""
    keep_memory(on)  # the whole process's
    for module in model.modules():
        if hasattr(module, "fast"):
            module.fast = on
    return model
