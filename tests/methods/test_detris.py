"""methods/detris.py: Dense Aligners in DINOv2, text adapters in CLIP, and the whole model."""

import json

import pytest
import torch

import evaluate
import train
from checkpoint import build_model, load_checkpoint, read_checkpoint
from clip_model import CLIP, CLIP_CONFIGS, CLIPConfig, build_clip
from config import DETRIS_PRESETS
from etris import text_to_pixel_loss
from fast import set_fast
from methods.detris import (
    ALIGNED_BLOCKS,
    TEXT_TOWERS,
    DenseAligner,
    DenseBranches,
    TextAdapter,
    build_detris,
    load_backbones,
)
from methods.dinov2 import DINO, DINO_CONFIGS, DinoConfig, build_dino
from utils.clip_weights import init_by_name
from utils.common import UserError
from utils.tokenizer import tokenize

SMALL = DinoConfig(width=96, layers=6, patch_size=16, image_size=64)
TEXT = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=3,
    vision_width=64,
    patch_size=16,
    text_width=64,
    text_layers=3,
    context_length=20,
)
BLOCKS = {"aligners": (1, 3, 5), "adapters": (1, 2), "width": 32, "text_rank": 16}


def small(**options):
    torch.manual_seed(0)
    clip = build_clip(init_by_name(CLIP(TEXT).state_dict()))
    dino = build_dino(init_by_name(DINO(SMALL).state_dict()))
    return build_detris(clip, dino, 64, 8, dropout=0.0, **{**BLOCKS, **options})


def inputs(count=2, side=64):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, tokenize(texts, 8)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# ---------------------------- counts of the original instantiated, to the last parameter
COUNTS = {
    "dinov2-base": {
        "aligners": 2_297_376,
        "adapters": 418_320,
        "DINOv2": 86_583_552,
        "text encoder": 63_428_097,
        "hierarchical alignment": 10_114_560,
        "trainable": 25_518_129,
        "all": 175_529_778,
    },
    "dinov2-large": {
        "aligners": 2_692_128,
        "adapters": 418_320,
        "DINOv2": 304_372_736,
        "text encoder": 63_428_097,
        "hierarchical alignment": 10_507_776,
        "trainable": 26_306_097,
        "all": 394_106_930,
    },
    "dinov2-large-mixed": {
        "aligners": 27_638_640,
        "adapters": 5_692_720,
        "DINOv2": 304_372_736,
        "text encoder": 63_428_097,
        "hierarchical alignment": 10_507_776,
        "trainable": 56_527_009,
        "all": 424_327_842,
    },
}


def on_paper(name):
    with torch.device("meta"):
        clip = CLIP(CLIP_CONFIGS[TEXT_TOWERS[name]]).requires_grad_(False)
        dino = DINO(DINO_CONFIGS[name])
        width = DETRIS_PRESETS[name].width
        return build_detris(clip, dino, 448, 17, width=width, **ALIGNED_BLOCKS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_configurations_have_the_counts_of_the_original(name):
    """In the encoders base 2,715,696, large 3,110,448, mixed 33,331,360.

    That is 1.8, 0.85 and 9.1 % of what is frozen.
    """
    model = on_paper(name)
    visual = count(model.clip.visual)
    found = {
        "aligners": count(model.aligners),
        "adapters": count(model.adapters),
        "DINOv2": visual,
        "text encoder": count(model.clip) - visual,
        "hierarchical alignment": count(model.hierarchical_alignment),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all": count(model),
    }
    assert found == COUNTS[name]
    assert count(model.global_alignment) == 7_899_136
    assert count(model.projector) == 4_788_737


def test_one_aligner_and_one_text_adapter_by_hand():
    """As in the original: 382,896 at rank 128 on width 768, 69,720 at rank 64 on 512.

    Of the 382,896 the attention to the words has 164,736.
    """
    aligner = DenseAligner(768, 512, 128)
    adapter = TextAdapter(512, 64)
    assert count(aligner.image, aligner.text, aligner.back, aligner.cross_attn) == 164_736
    branches = aligner.branches
    counts = [count(b) for b in (branches.branch1, branches.branch2, branches.branch3)]
    assert counts == [8_384, 3_960, 8_312]
    assert (count(aligner), count(adapter)) == (382_896, 69_720)


# -------------------------------------------------- aligners and adapters
@pytest.mark.parametrize("planar", [True, False], ids=["grid", "words"])
@torch.no_grad()
def test_every_branch_reads_all_branches_before_it(planar):
    """r/2, r/4, r/4 channels side by side; a change in the first branch alone moves all three."""
    torch.manual_seed(0)
    branches = DenseBranches(32, planar).eval()
    z = torch.randn(2, 32, 5, 5) if planar else torch.randn(2, 32, 7)
    out = branches(z)
    assert out.shape == z.shape
    branches.branch1.conv.bias += 1
    before = branches(z)
    pairs = zip(out.split((16, 8, 8), 1), before.split((16, 8, 8), 1), strict=True)
    assert [not torch.allclose(a, b) for a, b in pairs] == [True, True, True]
    branches.branch3[1].conv.bias += 1  # and one in the last branch moves the last only
    after = branches(z)
    assert torch.equal(after[:, :24], before[:, :24])
    assert not torch.equal(after, before)
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    assert {norm.eps for norm in branches.modules() if isinstance(norm, kinds)} == {1e-3}


@torch.no_grad()
def test_an_aligner_by_hand():
    """Class token and registers: up(2z). Patches attend to words; z is added before and after."""
    torch.manual_seed(0)
    aligner = DenseAligner(24, 12, 32).eval()
    n = torch.randn(2, 5 + 6, 24)
    words = torch.randn(2, 4, 12)
    z = aligner.down(n).relu()
    grid = z[:, 5:].mT.reshape(2, 32, 2, 3)
    patches = aligner.branches(grid).flatten(2).mT + z[:, 5:]
    text = aligner.text(words)
    attended = aligner.back(aligner.cross_attn(aligner.image(patches), text, text))
    out = aligner(n, words, (2, 3))
    assert torch.allclose(out[:, :5], aligner.up(2 * z[:, :5]), atol=1e-6)
    assert torch.allclose(out[:, 5:], aligner.up(attended + z[:, 5:]), atol=1e-6)


@torch.no_grad()
def test_a_text_adapter_by_hand():
    """The start mark comes out as up(2z), the words as up(branches + z), with z added once."""
    torch.manual_seed(0)
    adapter = TextAdapter(12, 16).eval()
    x = torch.randn(2, 6, 12)
    z = adapter.down(x).relu()
    out = adapter(x)
    assert torch.allclose(out[:, 0], adapter.up(2 * z[:, 0]), atol=1e-6)
    expected = adapter.up(adapter.branches(z[:, 1:].mT).mT + z[:, 1:])
    assert torch.allclose(out[:, 1:], expected, atol=1e-6)


@torch.no_grad()
def test_without_aligners_and_adapters_the_encoders_are_the_frozen_ones_bit_for_bit():
    """Maps, word and sentence features of plain DINOv2 and plain CLIP; with them both differ."""
    images, tokens = inputs()
    model = small(aligners=(), adapters=()).eval()
    maps, words, sentence = model.encode(images, tokens)
    visual = model.clip.visual
    v = visual.stem(images)
    t = model.clip.stem(tokens)
    for i in range(3):
        v = visual.stages[i](v)
        t = model.clip.stages[i](t)
        assert torch.equal(maps[i], visual.to_map(v) if i < 2 else visual.head(v))
    plain_words, plain_sentence = model.clip.head(t, tokens)
    assert torch.equal(words, plain_words)
    assert torch.equal(sentence, plain_sentence)
    other_maps, other_words, _ = small().eval().encode(images, tokens)
    assert not torch.equal(other_maps[0], maps[0])
    assert not torch.equal(other_words, words)


@torch.no_grad()
def test_aligner_and_adapter_join_at_a_fifth_where_they_should():
    """x + LS2(MLP(n) + 0.2·DA(n, words)), inside the LayerScale.

    x + MLP(LN x) + 0.2·TA(x), from x without the norm.
    """
    model = small(aligners=(0,), adapters=(0,)).eval()
    images, tokens = inputs()
    visual = model.clip.visual
    visual.blocks[0].ls2.gamma.mul_(0.5)
    maps, words, _ = model.encode(images, tokens)
    block = visual.blocks[0]
    v = block.attention(visual.stem(images))
    n = block.norm2(v)
    v = v + 0.5 * (block.mlp(n) + 0.2 * model.aligners["0"](n, words, visual.grid))
    for later in visual.blocks[1:]:
        v = later(v)
    assert torch.allclose(maps[2], visual.head(v), atol=1e-5)
    first, *rest = model.clip.transformer.resblocks
    t = model.clip.stem(tokens)
    t = t + first.attn(first.ln_1(t), causal=True)
    t = t + first.mlp(first.ln_2(t)) + 0.2 * model.adapters["0"](t)
    for later in rest:
        t = later(t)
    assert torch.allclose(words, model.clip.ln_final(t), atol=1e-5)


@torch.no_grad()
def test_words_reach_the_image_and_no_image_the_words():
    model = small().eval()
    images, tokens = inputs()
    maps, words, _ = model.encode(images, tokens)
    other_maps, _, _ = model.encode(images, tokens.flip(0))
    assert not torch.allclose(other_maps[2], maps[2], atol=1e-6)
    _, same_words, _ = model.encode(images.flip(0), tokens)
    assert torch.equal(same_words, words)


@torch.no_grad()
def test_the_neck_adds_its_input_to_the_last_convolutions():
    """coordconv(f) + f, f without the two coordinates (DETRIS alone)."""
    model = small().eval()
    x = torch.randn(2, 64 + 2, 4, 4)
    both = model.hierarchical_alignment.coordinates
    assert torch.allclose(both(x), both[1](both[0](x)) + x[:, :64], atol=1e-6)


# -------------------------------------------------- the whole
def loss(model, count=2):
    images, tokens = inputs(count)
    generator = torch.Generator().manual_seed(2)
    masks = (torch.rand(count, 1, 64, 64, generator=generator) > 0.8).float()
    return text_to_pixel_loss(model(images, tokens), masks)


def test_all_that_is_trainable_gets_a_gradient_and_nothing_frozen_moves():
    """No trained positions, unlike ETRIS; BatchNorm of aligners moves, DINOv2 and CLIP do not.

    Biases before a BatchNorm are the exception: it subtracts them, their gradient is rounding.
    """
    model = small()
    before = {name: x.clone() for name, x in model.clip.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss(model).backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dead = [name for name, p in trainable if not p.grad.abs().max() > 0]
    optimizer.step()
    assert [name for name in dead if not name.endswith(".conv.bias")] == []
    assert all(torch.equal(x, before[name]) for name, x in model.clip.state_dict().items())
    stored = model.trainable_state_dict()
    assert "aligners.1.branches.branch1.bn.running_mean" in stored
    assert not any(name.startswith("clip.") for name in stored)
    assert not model.clip.visual.training
    assert model.aligners.training
    assert model.auxiliary_loss() == 0.0


def test_the_fast_path_gives_the_same_logits_and_gradients():
    """float64: max|Δ| / max|·| ≤ 1e-10."""
    model = small().double().eval()
    images, tokens = inputs()
    results = []
    for on in (False, True):
        set_fast(model, on).zero_grad()
        logits = model(images.double(), tokens)
        logits.square().mean().backward()
        gradients = [
            p.grad
            for name, p in model.named_parameters()
            if p.grad is not None and "gates" not in name
        ]
        results.append([logits, *gradients])
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-10 * plain.abs().max().clamp(min=1e-30)


@torch.no_grad()
def test_logits_are_a_quarter_of_sixteen_a_patch_and_items_do_not_touch():
    """(B, 1, 4h, 4w), h the grid; each image alone gives what it gives in a batch."""
    model = small().eval()
    for side in (64, 96):
        images, tokens = inputs(4, side)
        together = model(images, tokens)
        assert together.shape == (4, 1, side // 4, side // 4)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5 * together.abs().max())
    found = model.activations(images, tokens)
    assert found["aligner3"].shape == (4, 5 + 36, 96)
    assert found["aligners.3.cross_attn"].shape == (4, 8, 36, 8)
    assert found["clip.visual.blocks.0.attn"].shape == (4, 1, 41, 41)


def test_wrong_values_are_said():
    options = {"system": "detris", "weights": "random", "size": 96}
    with pytest.raises(UserError, match="tiny: choose one of tiny-dino, dinov2-base"):
        build_model("tiny", **options)
    with pytest.raises(UserError, match="--width 40: an aligner's rank is a multiple of 16"):
        build_model("tiny-dino", width=40, **options)
    with pytest.raises(UserError, match="--words 30: choose 3 to 24"):
        build_model("tiny-dino", max_tokens=30, **options)
    with pytest.raises(UserError, match="image size 100: choose --size a multiple of 16"):
        build_model("tiny-dino", **{**options, "size": 100})


def test_train_evaluate_and_predict_take_it_as_any_other(tmp_path):
    """train.py: two steps, a checkpoint without frozen tensors, and evaluate.py reads it."""
    out = tmp_path / "run"
    command = ["--system", "detris", "--backbone", "tiny-dino", "--weights", "random"]
    command += ["--limit", "4", "--batch-size", "2", "--size", "64", "--device", "cpu"]
    train.main([*command, "--steps", "2", "--out", str(out)])
    file = read_checkpoint(out / "last.pt")
    assert file["system"] == "detris"
    assert not any(name.startswith("clip.") for name in file["tuned"])
    assert file["identity"]["name"] == "tiny-dino"
    assert list(load_checkpoint(out / "best.pt").adapters) == ["1", "2"]
    json_path = tmp_path / "result.json"
    best = str(out / "best.pt")
    evaluate.main([best, "--limit", "2", "--json", str(json_path), "--device", "cpu"])
    assert json.loads(json_path.read_text())["refs"] == 2


def test_lora_joins_dinov2s_attention_too():
    """Six blocks of width 128, three of text, 64 wide; rank 4, queries and values."""
    model = build_model(
        "tiny-dino",
        system="detris",
        tuning="bridger+lora",
        size=64,
        max_tokens=8,
        weights="random",
    )
    stored = model.eval().trainable_state_dict()
    qkv = [name for name in stored if name.startswith("clip.visual.blocks") and ".qkv." in name]
    assert len(qkv) == 12
    assert all("parametrizations" in name for name in qkv)
    low_rank = [x for name, x in stored.items() if name.startswith("clip.")]
    assert sum(x.numel() for x in low_rank) == 4 * 2 * (6 * (128 + 128) + 3 * (64 + 64))


def test_two_backbones_with_another_text_tower_have_another_identity():
    first, second = (load_backbones("tiny-dino", "random", seed)[0].identity for seed in (0, 1))
    assert first["sha256"] != second["sha256"]
    assert first["name"] == "tiny-dino"
