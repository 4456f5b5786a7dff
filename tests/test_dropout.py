"""Dropout on attention weights: where the original has it, in training, on both paths."""

from collections import Counter

import pytest
import torch
from torch import nn

import config
import train
from checkpoint import build_model
from clip_model import CLIP, CLIP_CONFIGS, Attention, CLIPConfig, MultiHeadAttention, build_clip
from etris import build_etris, text_to_pixel_loss
from fast import set_fast
from methods.barleria import build_barleria
from methods.detris import ALIGNED_BLOCKS, build_detris
from methods.dinov2 import DINO, DINO_CONFIGS
from methods.published import from_official, to_official
from utils.clip_weights import init_by_name
from utils.tokenizer import tokenize

RESNET = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(1, 1, 1, 1),
    vision_width=8,
    text_width=64,
    text_layers=3,
    context_length=20,
)
# The original's attentions with dropout, by part. All others have none, the gates included.
ORIGINALS = {
    "RN50": {"bridger": 12, "global_alignment": 6},
    "RN101": {"bridger": 12, "global_alignment": 6},
    "ViT-B-16": {"global_alignment": 6},
    "barleria": {"global_alignment": 6},
    "dinov2-base": {"global_alignment": 6, "aligners": 6},
    "dinov2-large": {"global_alignment": 6, "aligners": 6},
}
PATHS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def small(**options):
    torch.manual_seed(0)
    clip = build_clip(init_by_name(CLIP(RESNET).state_dict()))
    return build_etris(clip, 64, 8, width=16, **options)


def inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    masks = (torch.rand(2, 1, 64, 64, generator=generator) > 0.7).float()
    return images, tokenize(["the red cat on the left", "dog"], 8), masks


def on_paper(name, **options):
    """The model without memory for its numbers."""
    with torch.device("meta"):
        if name in CLIP_CONFIGS:
            return build_etris(CLIP(CLIP_CONFIGS[name]), **options)
        clip = CLIP(CLIP_CONFIGS["ViT-B-16"])
        if name == "barleria":
            return build_barleria(clip, **options)
        dino = DINO(DINO_CONFIGS[name])
        return build_detris(clip, dino, **ALIGNED_BLOCKS[name], **options)


def attention_dropouts(model):
    """{(part, p): how many attentions drop their weights with that probability}."""
    found = Counter()
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention) and module.dropout != 0:
            found[name.split(".")[0], module.dropout] += 1
    return found


@pytest.mark.parametrize("released", [True, False], ids=["released", "ours"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_attention_weights_are_dropped_where_the_original_drops_them(name, released):
    expected = {(part, 0.1): count for part, count in ORIGINALS[name].items()}
    assert attention_dropouts(on_paper(name, released=released)) == expected


def test_official_backbones_train_with_dropout_and_the_tiny_ones_without():
    """In the presets, and from the command line into the model: a tiny ResNet has all 18."""
    for presets in config.PRESETS.values():
        for name, preset in presets.items():
            assert preset.dropout == (0.0 if name in config.OWN_BACKBONES else 0.1), name
    device = torch.device("cpu")
    assert attention_dropouts(train.make_model(train.arguments([]), device)) == {}
    model = train.make_model(train.arguments(["--dropout", "0.2"]), device)
    assert attention_dropouts(model) == {("bridger", 0.2): 12, ("global_alignment", 0.2): 6}


def test_the_bridgers_dropout_can_be_set_on_its_own():
    """The original fixes it at 0.1, whatever the decoder's; a checkpoint rebuilds both."""
    options = {"weights": "random", "size": 64, "dropout": 0.3, "bridge_dropout": 0.1}
    model = build_model(**build_model(**options).config)
    assert attention_dropouts(model) == {("bridger", 0.1): 12, ("global_alignment", 0.3): 6}
    branches = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            branches[name.split(".")[0], module.p] += 1
    assert branches == {("bridger", 0.1): 6, ("global_alignment", 0.3): 6}


def test_a_published_file_trains_on_with_the_originals_dropout():
    model = from_official(to_official(small(released=True)), size=64)
    assert attention_dropouts(model) == {("bridger", 0.1): 12, ("global_alignment", 0.1): 6}


@PATHS
@torch.no_grad()
def test_a_dropped_weight_is_zero_and_the_others_make_up_for_it(fast):
    """With the identity as values, an attention's output is its weights."""
    torch.manual_seed(0)
    attention = Attention(64, 1, dropout=0.25).eval()
    set_fast(attention, fast)
    q = torch.randn(8, 64, 64)
    k = torch.randn(8, 64, 64)
    v = torch.eye(64).expand(8, 64, 64)
    weights = attention.attend(q, k, v)
    found = attention.train().attend(q, k, v)
    dropped = found == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = torch.where(dropped, 0, weights / 0.75)
    assert torch.allclose(found, kept, atol=1e-6)


@PATHS
def test_without_dropout_and_in_evaluation_no_random_number_is_drawn(fast):
    """Training with p = 0, evaluation with p = 0.1; in training with p = 0.1 some are."""
    images, tokens, _ = inputs()
    drawn = []
    for dropout, training in ((0.0, True), (0.1, False), (0.1, True)):
        model = set_fast(small(dropout=dropout), fast).train(training)
        before = torch.get_rng_state()
        model(images, tokens)
        drawn.append(not torch.equal(before, torch.get_rng_state()))
    assert drawn == [False, False, True]


def test_both_paths_drop_the_same_weights_from_the_same_seed():
    """Float64: logits and all gradients to 1e-10."""
    images, tokens, masks = inputs()
    model = small(dropout=0.3).double()
    results = []
    for fast in (False, True):
        set_fast(model, fast).zero_grad()
        torch.manual_seed(2)
        logits = model(images.double(), tokens)
        text_to_pixel_loss(logits, masks.double()).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), torch.cat(gradients)))
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-10 * plain.abs().max()


def test_the_frozen_encoders_never_drop_anything():
    """In training, the maps of a model without bridges are those of evaluation, bit for bit."""
    images, tokens, _ = inputs()
    model = small(dropout=0.5, stages=())
    in_training = model.train().encode(images, tokens)
    in_evaluation = model.eval().encode(images, tokens)
    for x, y in zip(in_training[0], in_evaluation[0], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(in_training[1], in_evaluation[1])
    assert torch.equal(in_training[2], in_evaluation[2])
