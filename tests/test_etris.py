"""2. etris.py: Bridger (3.2), hierarchical and global alignment, projector (3.3), loss (3.4), and
what is trained.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from checkpoint import build_model
from clip_model import CLIP, CLIP_CONFIGS, CLIPConfig, build_clip, load_clip
from etris import (
    Gate,
    GatedInteractor,
    Interactor,
    Projector,
    build_bridger,
    build_etris,
    positional_embeddings,
    sine_grid,
    sine_positions,
    text_to_pixel_loss,
    zoom_layer,
)
from fast import set_fast
from utils.clip_weights import init_by_name
from utils.common import UserError
from utils.tokenizer import padding_mask, tokenize

RESNET = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(1, 1, 1, 1),
    vision_width=8,
    text_width=64,
    text_layers=3,
    context_length=20,
)
VIT = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=3,
    vision_width=64,
    patch_size=16,
    text_width=64,
    text_layers=3,
    context_length=20,
)
KINDS = pytest.mark.parametrize("config", [RESNET, VIT], ids=["ResNet", "ViT"])


def small(config=RESNET, **options):
    torch.manual_seed(0)
    clip = CLIP(config)
    clip = build_clip(init_by_name(clip.state_dict()))
    return build_etris(clip, 64, 8, width=16, dropout=0.0, **options)


def inputs(count=2, side=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator)
    sentences = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    return images, tokenize(sentences, 8)


# ---- counts of the original instantiated, to the last parameter
COUNTS = {  # Bridger, HA, GA, projector, positions, all trainable, backbone with connect
    "RN50": (1_942_080, 12_867_072, 7_899_136, 5_968_897, 141_824, 28_819_009, 104_106_337),
    "RN101": (1_942_080, 11_556_352, 7_899_136, 4_788_737, 141_824, 26_328_129, 120_737_633),
    "ViT-B-16": (598_592, 9_983_488, 7_899_136, 4_788_737, 559_360, 23_829_313, 149_989_377),
}


def count(module, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def on_paper(name, **options):
    with torch.device("meta"):
        clip = CLIP(CLIP_CONFIGS[name]).requires_grad_(False)
        return build_etris(clip, 416, 17, **options)


@pytest.mark.parametrize("name", COUNTS)
def test_the_released_model_has_the_counts_of_the_original(name):
    """Measured by instantiating the original; nothing is left over."""
    model = on_paper(name, released=True)
    found = (
        count(model.bridger),
        count(model.hierarchical_alignment),
        count(model.global_alignment),
        count(model.projector),
        sum(p.numel() for p in positional_embeddings(model.clip)),
        count(model, trainable=True),
        count(model.clip) + (count(model.connect) if model.connect else 0),
    )
    assert found == COUNTS[name]


def test_bridges_can_stand_at_chosen_stages():
    """Table 4: 2→n with one bridge 428,736, n/2→n with one 297,664, the last one 1,215,168, and so
    on.
    """
    table = {
        (0,): 428_736,
        (1,): 297_664,
        (2,): 1_215_168,
        (0, 1): 726_656,
        (1, 2): 1_513_088,
        (0, 1, 2): 1_942_080,
    }
    found = {stages: count(on_paper("RN101", stages=stages).bridger) for stages in table}
    assert found == table


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128])
def test_the_bridgers_count_by_hand(width):
    """zoom 2d·ΣCk² + linears 3(1024d + d + 512) + six interactors + norms 8d, against the module
    (table 7's widths).
    """
    d = width
    zooms = 2 * d * (512 * 4 + 1024 + 2048 * 4)
    linears = 3 * (1024 * d + d + 512)
    interactors = 6 * (2 * (4 * d * d + 4 * d) + 256 * d + 128 + d + 6 * d)
    bridger = on_paper("RN101", width=d, heads=4).bridger
    assert count(bridger) == zooms + linears + interactors + 8 * d


# ---- section 3.2: the Bridger
def test_zoom_layers_shrink_grow_and_come_back():
    """Equation 4: 2×2 stride 2 both ways; the ViT's carry BatchNorm and ReLU, the ResNet's not."""
    x = torch.randn(2, 8, 12, 12)
    assert zoom_layer(8, 4, 2, up=False, norm=False)(x).shape == (2, 4, 6, 6)
    assert zoom_layer(8, 4, 2, up=True, norm=False)(x).shape == (2, 4, 24, 24)
    layers = [type(m).__name__ for m in zoom_layer(8, 4, 1, up=True, norm=True)]
    assert layers == ["ConvTranspose2d", "BatchNorm2d", "ReLU"]


@torch.no_grad()
def test_the_interactor_is_three_branches_each_added_then_normalized():
    """Equation 5 line by line, for both streams of unequal length."""
    torch.manual_seed(0)
    m = Interactor(8, 2, dropout=0.0)
    x = torch.randn(2, 5, 8)
    other = torch.randn(2, 3, 8)
    y = F.layer_norm(x + m.self_attn(x), (8,))
    y = F.layer_norm(y + m.cross_attn(y, other, other), (8,))
    y = F.layer_norm(y + m.linear2(m.linear1(y).relu()), (8,))
    assert torch.allclose(m(x, other), y, atol=1e-6)
    gated = GatedInteractor(8, 2)
    assert torch.allclose(gated(x, other), x * gated.cross_attn(x, other, other))


@KINDS
@torch.no_grad()
def test_without_bridges_the_encoders_are_plain_clip_bit_for_bit(config):
    """Stage maps, word and sentence features; with bridges they differ from the first bridge on."""
    model = small(config, stages=()).eval()
    images, tokens = inputs()
    found = model.activations(images, tokens)
    clip = model.clip
    v = clip.visual.stem(images)
    t = clip.stem(tokens)
    for i in range(3):
        v = clip.visual.stages[i](v)
        t = clip.stages[i](t)
        assert torch.equal(found[f"visual{i}.after"], clip.visual.to_map(v))
        assert torch.equal(found[f"text{i}.after"], t)
    words, sentence = clip.head(t, tokens)
    assert torch.equal(found["words"], words)
    assert torch.equal(found["sentence"], sentence)
    bridged = small(config).eval().activations(images, tokens)
    assert torch.equal(bridged["visual0.before"], found["visual0.before"])
    assert not torch.equal(bridged["visual0.after"], found["visual0.after"])


@torch.no_grad()
def test_previous_is_the_interactors_input_normalized_with_the_next():
    """differs from equation 2: what bridge 1 reads is LN(zoomed-in + what bridge 0 read)."""
    model = small().eval()
    images, tokens = inputs()
    found = model.activations(images, tokens)
    bridger = model.bridger
    x0 = bridger["0"].zoom_in(found["visual0.before"]).flatten(2).mT
    x1 = bridger["1"].zoom_in(found["visual1.before"]).flatten(2).mT
    previous = x0, torch.zeros(2, 8, 16)
    mask = padding_mask(tokens)
    _, _, (x, _) = bridger["1"](found["visual1.before"], found["text1.before"], previous, mask)
    assert torch.allclose(x, F.layer_norm(x0 + x1, (16,)), atol=1e-6)


@KINDS
@torch.no_grad()
def test_what_follows_the_end_of_the_sentence_changes_nothing(config):
    """Masked padding: any ids after the end mark (below it) give the same logits; the original's
    do move.
    """
    images, tokens = inputs()
    other = torch.where(padding_mask(tokens), 77, tokens)
    model = small(config).eval()
    assert torch.allclose(model(images, tokens), model(images, other), atol=1e-6)
    model.mask_padding = False
    assert not torch.allclose(model(images, tokens), model(images, other), atol=1e-6)


# ---- section 3.3: the decoder
@torch.no_grad()
def test_attention_over_one_key_is_a_gate():
    """The softmax of one score is 1, whatever query and key say: W_o(W_v s + b_v) + b_o, the fast
    path.
    """
    torch.manual_seed(0)
    gate = Gate(16, 4)
    features = torch.randn(2, 9, 16)
    sentence = torch.randn(2, 16)
    plain = gate(features, sentence)
    gate.in_proj_weight[:32] = torch.randn(32, 16)
    assert torch.allclose(gate(features, sentence), plain, atol=1e-6)
    set_fast(gate)
    assert torch.allclose(gate(features, sentence), plain, atol=1e-6)


def test_sine_positions_interleave_and_split_the_axes():
    """Position 1, first pair: sin 1, cos 1. On the grid, channel 0 follows x, channel C/2 y."""
    positions = sine_positions(3, 8)
    assert positions[1, :2].tolist() == pytest.approx([math.sin(1), math.cos(1)])
    assert positions[2, 2].item() == pytest.approx(math.sin(2 * 10000 ** (-2 / 8)))
    grid = sine_grid(2, 3, 8).view(2, 3, 8)
    assert torch.allclose(grid[:, :, 0], torch.arange(3.0).sin().expand(2, 3))
    assert torch.allclose(grid[:, :, 4], torch.arange(2.0).sin()[:, None].expand(2, 3))


@torch.no_grad()
def test_the_projector_convolves_each_image_with_its_own_sentences_kernel():
    """A slow loop over the batch, against both paths (equation 9)."""
    torch.manual_seed(0)
    projector = Projector(small().clip).eval()
    features = torch.randn(3, 64, 4, 4)
    sentence = torch.randn(3, 32)
    x = projector.vis(features)
    kernel, bias = projector.kernel(sentence)
    slow = []
    for i in range(3):
        slow.append(F.conv2d(x[i : i + 1], kernel[i : i + 1], bias[i : i + 1], padding=1))
    slow = torch.cat(slow)
    for on in (False, True):
        logits = set_fast(projector, on)(features, sentence)
        assert torch.allclose(logits, slow, atol=1e-4 * slow.abs().max())


# ---- section 3.4: the loss
def test_the_loss_by_hand_on_a_two_by_two_image():
    """Equations 10 and 11: the object at the top left, logit 2 there and −1 elsewhere."""
    logits = torch.tensor([[[[2.0, -1.0], [-1.0, -1.0]]]])
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :4] = 1

    def sigma(z):
        return 1 / (1 + math.exp(-z))

    by_hand = (-math.log(sigma(2)) - 3 * math.log(1 - sigma(-1))) / 4
    assert text_to_pixel_loss(logits, mask).item() == pytest.approx(by_hand, rel=1e-6)
    # a part of the object leaves the first logit's pixels
    shifted = mask.roll((1, 1), (2, 3))
    loss = text_to_pixel_loss(logits, shifted).item()
    assert loss != pytest.approx(by_hand, rel=1e-3)
    assert text_to_pixel_loss(logits, shifted, nearest=True).item() > loss


def test_the_loss_leaves_half_precision_and_keeps_float64():
    """bf16 logits: the loss in float32, of their exact values. Float64: to the fifteenth digit."""
    logits = torch.full((1, 1, 2, 2), 1.5)
    masks = torch.ones(1, 1, 8, 8)
    exact = math.log(1 + math.exp(-1.5))
    for dtype, bound in ((torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-15)):
        loss = text_to_pixel_loss(logits.to(dtype), masks)
        assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert loss.item() == pytest.approx(exact, rel=bound)


def test_the_loss_is_all_that_etris_learns_from():
    """`auxiliary_loss` is the place of another system's regularizer: here nothing is added."""
    assert small().auxiliary_loss() == 0


# ---- the whole
@KINDS
@torch.no_grad()
def test_logits_are_a_quarter_of_the_image_and_samples_do_not_touch(config):
    """(B, 1, S/4, S/4); each sample alone gives what it gives in a batch, at another size than the
    native one too.
    """
    model = small(config).eval()
    for side in (64, 96):
        images, tokens = inputs(4, side)
        together = model(images, tokens)
        assert together.shape == (4, 1, side // 4, side // 4)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5 * together.abs().max())


@KINDS
def test_the_fast_path_gives_the_same_outputs_and_gradients(config):
    """float64: max|Δ| / max|·| ≤ 1e-10."""
    model = small(config).double().eval()
    images, tokens = inputs()
    results = []
    for on in (False, True):
        set_fast(model, on).zero_grad()
        logits = model(images.double(), tokens)
        logits.square().mean().backward()
        gradients = []
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and "gates" not in name:
                gradients.append(parameter.grad)
        results.append([logits, *gradients])
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-10 * plain.abs().max().clamp(min=1e-30)


def train_a_little(model, steps=2):
    images, tokens = inputs()
    generator = torch.Generator().manual_seed(2)
    masks = (torch.rand(2, 1, 64, 64, generator=generator) > 0.8).float()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        text_to_pixel_loss(model(images, tokens), masks).backward()
        optimizer.step()
    return model


@KINDS
@pytest.mark.parametrize(
    "options", [{}, {"train_positions": False}, {"stages": ()}, {"released": True}], ids=str
)
def test_frozen_means_frozen(config, options):
    """After training steps CLIP's tensors, BatchNorm's statistics included, are bit-identical but
    for those named.
    """
    model = small(config, **options)
    before = {n: x.clone() for n, x in model.clip.state_dict().items()}
    head = model.projector.txt.weight.clone()
    train_a_little(model)
    moved = {n for n, x in model.clip.state_dict().items() if not torch.equal(x, before[n])}
    holder = "visual." if config.patch_size else "visual.attnpool."
    named = set()
    if options in ({}, {"released": True}):
        named = {"positional_embedding", f"{holder}positional_embedding"}
    assert moved == named
    assert not torch.equal(model.projector.txt.weight, head)
    assert model.projector.training and not model.clip.training


@KINDS
def test_every_trained_parameter_gets_a_gradient_but_the_gates_queries_and_keys(config):
    """In three gates of width D the 2·(D² + D) numbers of queries and keys stay at zero, at any
    width.
    """
    model = train_a_little(small(config, connect=True), steps=1)
    dead = []
    slices = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None
        elif "gates" in name and "in_proj" in name:
            third = len(p) // 3
            assert p.grad[: 2 * third].abs().max() <= 1e-9 < p.grad[2 * third :].abs().max()
            slices += p[: 2 * third].numel()
        elif p.grad is None or not p.grad.abs().max() > 0:
            dead.append(name)
    assert dead == [] and slices == 3 * 2 * (64 * 64 + 64)
    assert 3 * 2 * (512 * 512 + 512) == 1_575_936  # what that is at the paper's size


def test_heads_are_the_originals_at_its_width_and_fewer_where_they_would_be_narrower():
    """4 of 16 numbers (ResNet), 8 of 8 (ViT) at width 64; at 128 as many; at 32 half as many; never
    none.
    """
    for config, most in ((RESNET, 4), (VIT, 8)):
        clip = CLIP(config)
        widths = {128: most, 64: most, 32: most // 2, 16: most // 4, 8: max(1, most // 8)}
        for width, heads in widths.items():
            bridge = build_bridger(clip, width, None, (1,))["1"]
            assert bridge.interact_v.cross_attn.heads == heads
        assert build_bridger(clip, 16, 2, (1,))["1"].interact_t.cross_attn.heads == 2


def test_the_trainable_state_is_what_training_changes_with_its_buffers():
    """Parameters that move and BatchNorm's statistics of trained modules; nothing of the frozen
    CLIP.
    """
    state = small().trainable_state_dict()
    assert "bridger.0.zoom_in.0.weight" in state
    assert "hierarchical_alignment.merge.1.running_mean" in state
    trained = [name for name in state if name.startswith("clip.")]
    assert trained == ["clip.positional_embedding", "clip.visual.attnpool.positional_embedding"]
    state = small(train_positions=False).trainable_state_dict()
    assert not any(name.startswith("clip.") for name in state)


@KINDS
def test_activations_name_what_a_notebook_asks_for(config):
    """Stage maps before and after each bridge, attention weights that sum to one, the sentence's
    kernel.
    """
    model = small(config).eval()
    images, tokens = inputs()
    found = model.activations(images, tokens)
    assert found["kernel"].shape == (2, 32, 3, 3)
    assert found["logits"].shape == (2, 1, 16, 16)
    attention = found["bridger.1.interact_v.cross_attn"]
    heads = 2 if config.patch_size else 1  # of a Bridger of width 16
    assert attention.shape == (2, heads, 16, 8)
    assert torch.allclose(attention.sum(-1), torch.ones(2, heads, 16))
    # "dog" is start, dog, end: no pixel position looks at its padding
    assert attention[1, :, :, 3:].max() == 0
    assert torch.equal(found["logits"], model(images, tokens))
    assert model.recorded is None
    saved = [m.attention_weights for m in model.modules() if hasattr(m, "attention_weights")]
    assert saved and all(weights is None for weights in saved)


def test_only_connects_norm_moves_of_what_the_released_model_freezes():
    """One forward pass in training: CLIP's statistics stay, those of `connect` move."""
    model = small(released=True)
    frozen = {}
    for name, x in model.named_buffers():
        if name.startswith(("clip.", "connect.")):
            frozen[name] = x.clone()
    model(*inputs())
    moved = {name for name, x in model.named_buffers() if not torch.equal(x, frozen.get(name, x))}
    parts = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"connect.1.{part}" for part in parts}
    assert not any(p.requires_grad for p in model.connect.parameters())


def test_ours_starts_small_and_the_released_as_the_original():
    """A tenth where bridges join, where decoder branches join, and in the layer that writes
    kernels: logits near 0.
    """
    images, tokens = inputs()
    logits = {}
    for name, options in {"ours": {}, "released": {"released": True}}.items():
        model = small(**options).eval()
        norms = [layer.cross_norm.weight.mean().item() for layer in model.global_alignment.layers]
        assert norms == pytest.approx([0.1 if name == "ours" else 1.0] * 3)
        logits[name] = model(images, tokens).std().item()
    assert logits["ours"] < 0.4 * logits["released"]


def test_a_size_the_strides_do_not_divide_is_said():
    with pytest.raises(UserError, match="image size 80×80: choose --size a multiple of 32"):
        small()(torch.randn(1, 3, 80, 80), tokenize("a", 8))


def test_the_same_seed_builds_the_same_decoder_with_and_without_bridges():
    """Rows of an experiment share their decoder's initial values."""
    bridged = small()
    plain = small(stages=())
    assert torch.equal(bridged.projector.txt.weight, plain.projector.txt.weight)


@pytest.mark.parametrize("name", ["tiny", "tiny-vit"])
def test_the_tiny_presets_go_through_the_same_loop(name):
    clip = load_clip(name, "random")
    model = build_etris(clip, 128, 17, width=32).eval()
    logits = model(torch.randn(1, 3, 128, 128), tokenize("a red ring", 17))
    assert logits.shape == (1, 1, 32, 32)


def test_a_checkpoints_config_says_what_a_later_version_may_decide_otherwise():
    """The defaults that were decided by measurement, so that old files keep loading when one is
    decided anew.
    """
    config = build_model("tiny", size=64, weights="random", connect=True).config
    decided = config["train_positions"], config["connect"], config["mask_padding"]
    assert decided == (True, True, True)
    assert build_model(**config).config == config
    assert not build_model(**config | {"stages": ()}).bridger
