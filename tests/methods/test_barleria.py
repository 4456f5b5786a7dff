"""methods/barleria.py: flows in the shortcuts, prompts between the encoders, the side network."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from checkpoint import build_model, load_checkpoint, read_checkpoint
from clip_model import CLIP, CLIP_CONFIGS, CLIPConfig, build_clip
from etris import build_etris, text_to_pixel_loss
from fast import set_fast
from methods.barleria import (
    SIDE_HEADS,
    Flow,
    Planar,
    block_with_flows,
    build_barleria,
    build_flows,
)
from methods.dinov2 import FusedAttention, ViTBlock
from utils.clip_weights import init_by_name
from utils.common import UserError
from utils.tokenizer import tokenize

VIT = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=6,
    vision_width=64,
    patch_size=16,
    text_width=64,
    text_layers=3,
    context_length=20,
)


def small_clip():
    return build_clip(init_by_name(CLIP(VIT).state_dict()))


def small(width=24, **options):
    torch.manual_seed(0)
    return build_barleria(small_clip(), 64, 8, width=width, dropout=0.0, **options)


def inputs(count=2, side=64):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, tokenize(texts, 8)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_paper(**options):
    with torch.device("meta"):
        clip = CLIP(CLIP_CONFIGS["ViT-B-16"]).requires_grad_(False)
        return build_barleria(clip, 416, 17, released=True, **options)


# ---------------------------- counts of the original instantiated, to the last parameter
def test_the_released_model_has_the_counts_of_the_original():
    """Flows 184,416 + 122,976, prompts 41,760, side network 3,052,608 + 74,240.

    Together 3,476,000; the paper prints 2.21M.
    """
    model = on_paper()
    modules = [*model.flows.values(), model.prompt_v, model.side, model.side_out]
    counts = [count(module) for module in modules]
    assert counts == [184_416, 122_976, 41_760, 3_052_608, 74_240]
    assert sum(counts) == 3_476_000
    head = count(model.hierarchical_alignment, model.global_alignment, model.projector)
    positions = sum(p.numel() for p in model.clip.parameters() if p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (head, positions, trainable) == (22_671_361, 559_360, 26_706_721)


def test_only_both_ways_without_global_gives_the_printed_039():
    """349,152 as released; 390,656 (the paper: 0.39M) both ways, which the original cannot run."""
    one = on_paper(global_prior=False)
    both = on_paper(global_prior=False, both_ways=True)
    assert count(one.flows, one.prompt_v) == 349_152
    assert one.side is None
    assert count(both.flows, both.prompt_v, both.prompt_t) == 390_656


def side_of(released):
    """A side network as large as the published one, at 64 pixels."""
    config = replace(CLIP_CONFIGS["ViT-B-16"], text_layers=1, vision_layers=3, vocab_size=8)
    torch.manual_seed(0)
    clip = CLIP(config).requires_grad_(False)
    return build_barleria(clip, 64, 17, released=released).side


def test_the_released_side_network_starts_as_the_originals():
    """Linear layers N(0, 0.02), fusions uniform in ±√(3 / 768), biases zero; the prompt's torch's:
    uniform in ±√(1 / 512) and ±√(1 / 32). Ours: torch's everywhere, the prompt's N(0, 0.02).
    """
    side = side_of(released=True)
    linears = [x for part in (side.blocks, side.feedback) for x in part.modules()]
    linears = [x for x in linears if isinstance(x, torch.nn.Linear)]
    weights = torch.cat([x.weight.flatten() for x in linears])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert weights.abs().max() > 0.06  # a normal's tail, not a uniform's end
    fusions = torch.cat([conv.weight.flatten() for _, conv in side.fusions])
    assert fusions.abs().max().item() == pytest.approx((3 / 768) ** 0.5, rel=1e-3)
    assert fusions.std().item() == pytest.approx(768**-0.5, rel=0.01)
    biased = [x for x in linears if x.bias is not None] + [conv for _, conv in side.fusions]
    assert len(biased) == 4 * len(side.blocks) + 4
    assert all(x.bias.abs().max() == 0 for x in biased)
    for i, fan_in in ((0, 512), (2, 32)):
        for x in (side.prompt[i].weight, side.prompt[i].bias):
            assert 0.9 * fan_in**-0.5 < x.abs().max().item() <= fan_in**-0.5

    ours = side_of(released=False)
    assert ours.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(1 / 12, rel=0.01)
    assert ours.blocks[0].mlp.fc1.bias.abs().max() > 0
    assert ours.fusions[0][1].bias.abs().max() > 0
    assert ours.prompt[2].weight.std().item() == pytest.approx(0.02, rel=0.05)


# -------------------------------------------------- flows
@torch.no_grad()
def test_a_planar_flow_by_hand():
    """y + u·tanh(wᵀy + b) with w = (1, 2), u = (3, 4), b = 0.5 at y = (0.1, −0.2).

    wᵀy + b = 0.1 − 0.4 + 0.5 = 0.2, so tanh(0.2) times u is added.
    """
    flow = Planar(2)
    y = torch.tensor([[0.1, -0.2]])
    flow.weight[:] = torch.tensor([[1.0, 2.0]])
    flow.scale[:] = torch.tensor([[3.0, 4.0]])
    flow.bias[:] = 0.5
    expected = y + torch.tensor(0.2).tanh() * torch.tensor([[3.0, 4.0]])
    assert torch.allclose(flow(y), expected)


@torch.no_grad()
def test_a_flow_is_an_affine_map_then_four_planes_and_starts_near_the_identity():
    torch.manual_seed(0)
    flow = Flow(8)
    x = torch.randn(3, 5, 8)
    assert count(flow) == 10 * 8 + 4
    assert (flow(x) - x).abs().max() < 0.01
    flow.mu[:] = 1.0
    flow.logsigma[:] = 2.0
    y = 1 + x * torch.tensor(2.0).exp()
    for plane in flow.planes:
        y = plane(y)
    assert len(flow.planes) == 4
    assert torch.equal(flow(x), y)


@torch.no_grad()
def test_with_flows_that_do_nothing_a_block_is_the_frozen_block_bit_for_bit():
    """Both encoders: the flow stands in the shortcut and nowhere else."""
    clip = small().clip
    for transformer in (clip.visual.transformer, clip.transformer):
        flows = build_flows(transformer)
        x = torch.randn(2, 8, 64)
        for module in flows.modules():
            if isinstance(module, Planar):
                module.scale.zero_()
        block = transformer.resblocks[0]
        assert torch.equal(block_with_flows(block, flows[0], x), block(x))
        flows[0][1].mu += 1  # the second flow shifts the output, and only by its μ
        assert torch.allclose(block_with_flows(block, flows[0], x), block(x) + 1, atol=1e-5)


# -------------------------------------------------- the local intertwined module
@torch.no_grad()
def test_prompts_stand_between_class_token_and_patches():
    """1 + 8 words + 16 patches; the prompts are the MLP of the words' embeddings, padding too."""
    model = small().eval()
    images, tokens = inputs()
    v = model.clip.visual.stem(images)
    t = model.clip.stem(tokens)
    longer, same = model.intertwine(v, t)
    assert longer.shape == (2, 1 + 8 + 16, 64)
    assert torch.equal(same, t)
    assert torch.equal(longer[:, :1], v[:, :1])
    assert torch.equal(longer[:, 9:], v[:, 1:])
    assert torch.equal(longer[:, 1:9], model.prompt_v(t))


def last_map_and_words(model, images, tokens):
    maps, words, _, _ = model.encode(images, tokens)
    return maps[2], words


@pytest.mark.parametrize("both_ways", [False, True])
@torch.no_grad()
def test_words_reach_the_image_and_only_both_ways_the_image_the_words(both_ways):
    """One sentence changed: the maps move. One image changed: the words move only both ways."""
    model = small(both_ways=both_ways).eval()
    images, tokens = inputs()
    last_map, words = last_map_and_words(model, images, tokens)
    assert last_map.shape == (2, 32, 4, 4)
    assert words.shape == (2, 8, 64)
    other_map, _ = last_map_and_words(model, images, tokens.flip(0))
    assert not torch.allclose(other_map, last_map, atol=1e-6)
    _, other_words = last_map_and_words(model, images.flip(0), tokens)
    moved = not torch.allclose(other_words, words, atol=1e-6)
    assert moved == both_ways


@torch.no_grad()
def test_both_ways_the_sentence_is_still_read_at_its_end_mark():
    """The image's prompt stands before the words and is removed: the words keep their positions."""
    model = small(both_ways=True).eval()
    images, tokens = inputs()
    _, words, sentence, _ = model.encode(images, tokens)
    ends = tokens.argmax(-1)
    expected = words[[0, 1], ends] @ model.clip.text_projection
    assert torch.allclose(sentence, expected, atol=1e-6)
    changed = tokens.clone()
    changed[1, 1] = 1000  # another word for "dog": the start mark before it stays, what follows not
    _, other, _, _ = model.encode(images, changed)
    assert torch.allclose(other[1, 0], words[1, 0], atol=1e-6)
    assert not torch.allclose(other[1, 2], words[1, 2])


# -------------------------------------------------- the side network
@torch.no_grad()
def test_the_prior_joins_the_values_and_leaves_the_attention_weights_alone():
    """out = softmax(q kᵀ/√d) (v + v_prior), v_prior raw through the same qkv, bias included."""
    torch.manual_seed(0)
    attention = FusedAttention(6, 1)
    x = torch.randn(1, 4, 6)
    prior = torch.randn(1, 4, 6)
    attention.save_attention = True
    attention(x)
    plain = attention.attention_weights
    q, k, v = attention.qkv(x).chunk(3, -1)
    weights = (q @ k.mT / 6**0.5).softmax(-1)
    by_hand = attention.proj(weights @ (v + attention.qkv(prior)[..., 12:]))
    assert torch.allclose(attention(x, prior), by_hand, atol=1e-6)
    assert torch.equal(attention.attention_weights, plain)


@torch.no_grad()
def test_similarity_is_the_cosine_or_nothing():
    """Tokens along the prior (1), at 60° (0.5), across it (0), against it (0, not −1)."""
    side = small().side
    x = torch.tensor([[[2.0, 0], [0.5, 0.75**0.5], [0, 3.0], [-1.0, 0]]])
    similarity = side.similarity(x, torch.tensor([[7.0, 0]]))  # lengths do not count
    assert similarity[0, :, 0].tolist() == pytest.approx([1, 0.5, 0, 0])


@torch.no_grad()
def test_the_prior_goes_down_from_the_last_block_to_the_first():
    """x ← 5·x·(p pᵀ) where similar to p; then per block, last first: x ← L1 x, prior = L2 x."""
    side = small().side
    x = torch.randn(2, 5, 24)
    p = torch.randn(2, 24)
    priors = side.block_priors(x, p)
    y = x * side.similarity(x, p)
    y = torch.stack([5 * y[i] @ torch.outer(p[i], p[i]) for i in range(2)])
    for i in (3, 2, 1, 0):
        y = y @ side.feedback[i].linear.weight.T
        assert torch.allclose(priors[i], y @ side.feedback[i].linear2.weight.T, atol=1e-4)
    assert len(side.blocks) == 4


@torch.no_grad()
def test_the_first_reading_is_plain_and_the_second_has_prior_and_fusions():
    """The whole side network again, slowly.

    CLIP's maps join at the start of both passes, and after blocks 1, 2, 3 of the second.
    """
    model = small().eval()
    images, tokens = inputs()
    _, words, _, clip_maps = model.encode(images, tokens)
    side = model.side
    out = side(images, clip_maps, words)
    joined = []
    for clip_map, (norm, conv) in zip(clip_maps, side.fusions, strict=True):
        x = F.layer_norm(clip_map.movedim(1, -1), (64,), norm.weight, norm.bias, 1e-6)
        x = F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias)
        joined.append(x.flatten(2).mT)
    prompts = side.prompt(words)
    queries = (side.queries + side.query_positions).expand(2, -1, -1)
    patches = side.patch(images).flatten(2).mT + side.positions + joined[0]
    start = torch.cat([queries, prompts, patches], 1)
    x = start
    for block in side.blocks:
        x = block(x)
    priors = side.block_priors(x, prompts.mean(1))
    x = start
    for i, block in enumerate(side.blocks):
        x = block(x, priors[i])
        if i < 3:
            x[:, -16:] += joined[i + 1]
    assert torch.allclose(out, x[:, -16:].mT.unflatten(2, (4, 4)), atol=1e-4)


def test_the_side_network_reads_clips_blocks_at_four_heights():
    """Of twelve blocks the outputs of 0, 3, 6, 9; here of six 0, 1, 3, 4; the decoder's thirds."""
    model = small(global_prior=False).eval()
    images, tokens = inputs()
    order = []
    for i, block in enumerate(model.clip.visual.transformer.resblocks):
        block.mlp.register_forward_hook(lambda *_, i=i: order.append(i))
    maps, _, _, clip_maps = model.encode(images, tokens)
    assert order == [*range(6)]
    assert [i * 12 // 4 for i in range(4)] == [0, 3, 6, 9]
    # 1 and 3 of six: both lists have them
    assert torch.equal(maps[0], clip_maps[1])
    assert torch.equal(maps[1], clip_maps[2])
    assert not torch.equal(clip_maps[3], clip_maps[2])


@torch.no_grad()
def test_a_result_depends_on_its_neighbours_in_the_released_model_only():
    """The original normalizes the prior over the batch (ledger B2). Its initial feedback is so
    small that five digits do not show it, so it is enlarged.
    """
    images, tokens = inputs(4)
    for over_batch in (False, True):
        model = small(released=True, over_batch=over_batch).eval()
        for parameter in model.side.feedback.parameters():
            parameter.mul_(10)
        together = model(images, tokens)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(4)])
        same = torch.allclose(together, alone, atol=1e-5 * together.abs().max())
        assert same != over_batch
    assert small(released=True).side.over_batch
    assert not small().side.over_batch


# -------------------------------------------------- the whole
def loss(model, count=2):
    images, tokens = inputs(count)
    generator = torch.Generator().manual_seed(2)
    masks = (torch.rand(count, 1, 64, 64, generator=generator) > 0.8).float()
    return text_to_pixel_loss(model(images, tokens), masks)


def test_reconstruction_trains_the_predicting_layers_and_nothing_else():
    """Σ over blocks of the squared error between L1(output) and input, both detached; eval: 0."""
    model = small()
    loss(model)
    model.auxiliary_loss().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"side.feedback.{i}.linear.weight" for i in range(4)}
    assert model.auxiliary_loss().item() > 0
    model.eval()
    loss(model)
    assert model.auxiliary_loss() == 0.0
    assert small(global_prior=False).auxiliary_loss() == 0.0


OPTIONS = [{}, {"both_ways": True}, {"global_prior": False}, {"released": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_that_is_trainable_gets_a_gradient_and_nothing_frozen_moves(options):
    model = small(**options)
    before = {name: x.clone() for name, x in model.clip.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    (loss(model) + model.auxiliary_loss()).backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dead = [name for name, p in trainable if not p.grad.abs().max() > 0]
    optimizer.step()
    after = model.clip.state_dict()
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    positions = {"positional_embedding", "visual.positional_embedding"}
    assert dead == []
    assert moved == (positions if "released" in options else set())
    assert not model.clip.training
    assert model.global_alignment.training


def test_the_fast_path_gives_the_same_logits_and_gradients():
    """float64: max|Δ| / max|·| ≤ 1e-10."""
    model = small(both_ways=True).double().eval()
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
def test_logits_are_a_quarter_of_the_image_at_another_size_too():
    """The side network's positions are resized as CLIP's are."""
    model = small().eval()
    sides = [model(*inputs(2, side)).shape[2:] for side in (64, 96)]
    assert sides == [(16, 16), (24, 24)]


@torch.no_grad()
def test_activations_show_the_side_networks_attention_and_its_shortcut():
    model = small().eval()
    images, tokens = inputs()
    found = model.activations(images, tokens)
    assert found["side"].shape == found["neck"].shape == (2, 64, 4, 4)
    side_tokens = 16 + 8 + 16  # queries (as many as patches here), prompts, patches
    assert found["side.blocks.3.attn"].shape == (2, 3, side_tokens, side_tokens)
    assert torch.equal(found["logits"], model(images, tokens))


def test_the_decoder_starts_as_etris_does_from_the_same_seed():
    """Rows of a comparison share their decoder's initial values."""
    torch.manual_seed(0)
    other = build_etris(small_clip(), 64, 8, width=16)
    ours = small()
    for name in ("hierarchical_alignment", "global_alignment", "projector"):
        a = getattr(ours, name).state_dict()
        b = getattr(other, name).state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("backbone", ["tiny", "RN101", "ViT-L-14"])
def test_another_backbone_is_refused_with_those_there_are(backbone):
    with pytest.raises(UserError, match=f"{backbone}: choose one of ViT-B-16, tiny-vit"):
        build_model(backbone, system="barleria", weights="random")


def test_wrong_sizes_are_said():
    with pytest.raises(UserError, match="image size 72: choose --size a multiple of 16"):
        build_model("tiny-vit", system="barleria", size=72, weights="random")
    with pytest.raises(UserError, match="--width 50: 3 attention heads do not divide it"):
        ViTBlock(50, SIDE_HEADS)


def test_train_evaluate_and_predict_take_it_as_any_other(tmp_path):
    """train.py: two steps, a checkpoint without frozen tensors, and evaluate.py reads it."""
    out = tmp_path / "run"
    command = ["--system", "barleria", "--backbone", "tiny-vit", "--weights", "random"]
    command += ["--limit", "4", "--batch-size", "2", "--size", "64", "--device", "cpu"]
    train.main([*command, "--steps", "2", "--out", str(out)])
    file = read_checkpoint(out / "last.pt")
    assert file["system"] == "barleria"
    assert not any(name.startswith("clip.") for name in file["tuned"])
    assert load_checkpoint(out / "best.pt").side.blocks[0].attn.heads == 3
    json_path = tmp_path / "result.json"
    best = str(out / "best.pt")
    evaluate.main([best, "--limit", "2", "--json", str(json_path), "--device", "cpu"])
    assert json.loads(json_path.read_text())["refs"] == 2
