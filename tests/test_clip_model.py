"""1. clip_model.py: the two encoders, and how their weights are loaded."""

import pytest
import torch

from clip_model import (
    CLIP,
    CLIP_CONFIGS,
    PIXEL_MEAN,
    PIXEL_STD,
    Attention,
    CLIPConfig,
    build_clip,
    load_clip,
    resize_positions,
)
from fast import set_fast
from utils.clip_weights import init_by_name, read_weights
from utils.common import UserError
from utils.tokenizer import tokenize

SMALL = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(1, 1, 1, 1),
    vision_width=8,
    text_width=64,
    text_layers=3,
    context_length=20,
)
SMALL_VIT = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=3,
    vision_width=64,
    text_width=64,
    patch_size=16,
    text_layers=3,
    context_length=20,
)


def small(config=SMALL):
    clip = CLIP(config)
    return build_clip(init_by_name(clip.state_dict(), 0))


@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_every_size_can_be_read_off_its_weights(name):
    """All nine official models and our own three, on the meta device: shapes tell the sizes."""
    with torch.device("meta"):
        config = CLIP_CONFIGS[name]
        assert CLIPConfig.from_state_dict(CLIP(config).state_dict()) == config


ORACLES = {"RN50": "RN50-quickgelu", "RN101": "RN101-quickgelu", "ViT-B-16": "ViT-B-16-quickgelu"}


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_embeddings_agree_with_open_clip(name):
    """From one random state dict, loaded strictly on both sides: max|Δ| / max|·| ≤ 1e-4."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    ours = load_clip(name, "random")
    oracle = open_clip.create_model(ORACLES[name]).eval()
    extra = {}
    for n, x in oracle.state_dict().items():
        if n.endswith(("num_batches_tracked", "attn_mask")):
            extra[n] = x
    oracle.load_state_dict(ours.state_dict() | extra, strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["the man in red", "second giraffe from the right"])
    pairs = [
        (ours.encode_image(images), oracle.encode_image(images)),
        (ours.encode_text(tokens), oracle.encode_text(tokens)),
    ]
    for mine, theirs in pairs:
        error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        assert error <= 1e-4, f"{error:.1e}"


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT], ids=["ResNet", "ViT"])
@torch.no_grad()
def test_stem_stages_head_is_the_whole_encoder_at_any_size_the_strides_divide(config):
    """96 × 64 is not the native 64 × 64: positions are resized; stage maps have their strides."""
    clip = small(config)
    visual = clip.visual
    image = torch.randn(2, 3, 96, 64)
    v = visual.stem(image)
    for stage, stride, channels in zip(visual.stages, visual.strides, visual.channels, strict=True):
        v = stage(v)
        assert visual.to_map(v).shape == (2, channels, 96 // stride, 64 // stride)
    assert torch.equal(visual.pool(v), clip.encode_image(image))
    assert visual.head(v).shape == (2, 32, 96 // visual.stride, 64 // visual.stride)


def test_positions_keep_their_class_row_and_stay_themselves_at_their_own_size():
    positions = torch.randn(1 + 16, 8)
    assert resize_positions(positions, 4, 4) is positions
    larger = resize_positions(positions, 6, 5)
    assert larger.shape == (31, 8) and torch.equal(larger[0], positions[0])


@torch.no_grad()
def test_a_word_never_sees_the_words_after_it():
    """Change the last word: the features of all earlier ones stay the same (the causal mask)."""
    clip = small()
    a = word_features(clip, tokenize("a red cat", 9))
    b = word_features(clip, tokenize("a red dog", 9))
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3], b[:, 3])


def word_features(clip, tokens):
    t = clip.stem(tokens)
    for stage in clip.stages:
        t = stage(t)
    words, sentence = clip.head(t, tokens)
    return words


@torch.no_grad()
def test_attention_is_a_weighted_mean_written_as_a_loop():
    """One query, one head at a time, against the module, plain and fast."""
    torch.manual_seed(0)
    module = Attention(8, 2)
    x = torch.randn(1, 3, 8)
    y = torch.randn(1, 4, 8)
    padding = torch.tensor([[False, False, True, False]])
    wq, wk, wv = module.in_proj_weight.chunk(3)
    expected = []
    for q in x[0]:
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = [((wq @ q)[h] @ (wk @ k)[h] / 2).exp() for k in y[0]]
            scores[2] = 0  # padding
            heads.append(
                sum(s * (wv @ k)[h] for s, k in zip(scores, y[0], strict=True)) / sum(scores)
            )
        expected.append(module.out_proj(torch.cat(heads)))
    for on in (False, True):
        set_fast(module, on)
        out = module(x, y, key_padding_mask=padding)[0]
        assert torch.allclose(out, torch.stack(expected), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("on", [False, True], ids=["plain", "fast"])
def test_attention_weights_are_saved_on_request(on):
    """Each query's weights sum to 1, later keys get none; without the request nothing is kept."""
    module = set_fast(Attention(8, 2), on)
    x = torch.randn(1, 3, 8)
    module.save_attention = True
    module(x, causal=True)
    weights = module.attention_weights
    assert weights.shape == (1, 2, 3, 3) and weights.triu(1).abs().max() == 0
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 3))
    module.save_attention = False
    module(x, causal=True)
    assert module.attention_weights is None


def test_random_weights_keep_the_size_of_what_passes_through():
    """N(0, 1/fan-in): 64 inputs, a standard deviation of 1/8; norms are the identity, biases 0."""
    state = {
        "a.weight": torch.empty(500, 4, 4, 4),
        "ln.weight": torch.empty(9),
        "b.bias": torch.ones(9),
    }
    init_by_name(state)
    assert state["a.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert state["ln.weight"].unique().tolist() == [1]
    assert state["b.bias"].unique().tolist() == [0]
    assert load_clip("tiny", "random").identity["weights"] == "random, seed 0"


def test_random_weights_depend_on_name_and_seed_alone():
    a, b, c = (load_clip("tiny", "random", seed).state_dict() for seed in (0, 0, 1))
    name = "visual.layer2.0.conv2.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_a_plain_file_round_trips_and_half_precision_becomes_single(tmp_path):
    state = small().state_dict()
    state = {n: x.half() if x.is_floating_point() else x for n, x in state.items()}
    torch.save(state, tmp_path / "small.pt")
    read = read_weights(tmp_path / "small.pt")
    assert all(x.dtype in (torch.float32, torch.int64) for x in read.values())
    assert build_clip(read).config == SMALL


def test_loading_is_strict_and_says_what_is_wrong():
    state = small().state_dict()
    with pytest.raises(UserError, match="ln_final.bias"):
        build_clip({n: x for n, x in state.items() if n != "ln_final.bias"})
    with pytest.raises(UserError, match="stranger"):
        build_clip(state | {"stranger": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown backbone 'RN99'"):
        load_clip("RN99")


def test_the_frozen_part_is_frozen_and_has_an_identity():
    clip = small()
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training
    assert len(clip.identity["sha256"]) == 64


def test_images_are_normalized_as_openai_did():
    """open_clip writes the same six numbers."""
    constants = pytest.importorskip(
        "open_clip.constants", reason="open_clip_torch is not installed"
    )
    theirs = [*constants.OPENAI_DATASET_MEAN, *constants.OPENAI_DATASET_STD]
    assert [*PIXEL_MEAN, *PIXEL_STD] == pytest.approx(theirs)


@pytest.mark.parametrize("name", ["tiny", "small", "tiny-vit"])
def test_a_clip_to_be_trained_starts_at_clips_own_scales(name):
    """Projections and class token at 1/√width, text positions at 0.01, temperature at ln 100."""
    torch.manual_seed(0)
    config = CLIP_CONFIGS[name]
    clip = CLIP(config)
    scales = {clip.text_projection: config.text_width**-0.5, clip.positional_embedding: 0.01}
    if config.patch_size:
        scales[clip.visual.proj] = config.vision_width**-0.5
        scales[clip.visual.positional_embedding] = config.vision_width**-0.5
        scales[clip.visual.class_embedding] = config.vision_width**-0.5
    else:
        scales[clip.visual.attnpool.positional_embedding] = (32 * config.vision_width) ** -0.5
    for tensor, scale in scales.items():
        assert tensor.std().item() == pytest.approx(scale, rel=0.2)
    assert clip.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)
