"""11. barleria.py: flows in the shortcuts, prompts between the encoders, the side network and its prior."""

import json

import pytest
import torch
import torch.nn.functional as F

import barleria
import evaluate
import train
from barleria import Block, Flow, FusedAttention, Planar, adapted, assemble, build, flows
from clip_model import CLIP, SIZES, Size, UserError, build_clip, fill_by_name, tokenize
from etris import set_fast, text_to_pixel_loss
from official import load_checkpoint, read_checkpoint

VIT = Size(32, 64, 6, 64, 16, 64, 3, 20)


def small(width=24, **options):
    torch.manual_seed(0)
    clip = build_clip(fill_by_name(CLIP(VIT).state_dict()))
    return assemble(clip, 64, 8, width=width, dropout=0.0, **options)


def inputs(count=2, side=64):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)), tokenize(texts, 8)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_paper(**options):
    with torch.device("meta"):
        return assemble(CLIP(SIZES["ViT-B-16"]).requires_grad_(False), 416, 17, released=True, **options)


# ---- counts: SPEC 5.4, to the last parameter
def test_the_released_model_has_the_counts_of_the_original():
    """Flows 184,416 + 122,976, prompts 41,760, side network 3,052,608 + 74,240: 3,476,000 (the paper prints 2.21M)."""
    model = on_paper()
    parts = [count(part) for part in (*model.flows.values(), model.prompt_v, model.side, model.side_out)]
    assert parts == [184_416, 122_976, 41_760, 3_052_608, 74_240] and sum(parts) == 3_476_000
    head = count(model.hierarchical, model.global_, model.projector)
    positions = sum(p.numel() for p in model.clip.parameters() if p.requires_grad)
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (head, positions, tuned) == (22_671_361, 559_360, 26_706_721)


def test_only_both_ways_without_global_gives_the_printed_039():
    """SNF and LIM: 349,152 as released, 390,656 with the direction that the original cannot run (paper: 0.39M)."""
    one = on_paper(global_prior=False)
    both = on_paper(global_prior=False, both_ways=True)
    assert count(one.flows, one.prompt_v) == 349_152 and one.side is None
    assert count(both.flows, both.prompt_v, both.prompt_t) == 390_656


# ---- the flows
@torch.no_grad()
def test_a_planar_flow_by_hand():
    """y + u·tanh(wᵀy + b) with w = (1, 2), u = (3, 4), b = 0.5 at y = (0.1, −0.2): tanh(0.2) times u is added."""
    flow, y = Planar(2), torch.tensor([[0.1, -0.2]])
    flow.weight[:], flow.scale[:], flow.bias[:] = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), 0.5
    bend = torch.tensor(0.2).tanh()
    assert torch.allclose(flow(y), torch.tensor([[0.1, -0.2]]) + bend * torch.tensor([[3.0, 4.0]]))


@torch.no_grad()
def test_a_flow_is_an_affine_map_then_four_planes_and_starts_near_the_identity():
    torch.manual_seed(0)
    flow, x = Flow(8), torch.randn(3, 5, 8)
    assert count(flow) == 10 * 8 + 4 and (flow(x) - x).abs().max() < 0.01
    flow.mu[:], flow.logsigma[:] = 1.0, 2.0
    y = 1 + x * torch.tensor(2.0).exp()
    for plane in flow.planes:
        y = plane(y)
    assert len(flow.planes) == 4 and torch.equal(flow(x), y)


@torch.no_grad()
def test_with_flows_that_do_nothing_a_block_is_the_frozen_block_bit_for_bit():
    """Both encoders: the flow stands in the shortcut and nowhere else."""
    clip = small().clip
    for transformer in (clip.visual.transformer, clip.transformer):
        pairs, x = flows(transformer), torch.randn(2, 8, 64)
        for plane in (p for pair in pairs for flow in pair for p in flow.planes):
            plane.scale.zero_()
        block = transformer.resblocks[0]
        assert torch.equal(adapted(block, pairs[0], x), block(x))
        pairs[0][1].mu += 1  # the second flow shifts the output, and only by its μ
        assert torch.allclose(adapted(block, pairs[0], x), block(x) + 1, atol=1e-5)


# ---- the local intertwined module
@torch.no_grad()
def test_prompts_stand_between_class_token_and_patches():
    """1 + 8 words + 16 patches; the prompts are the MLP of the words' embeddings, padding's included."""
    model, (images, tokens) = small().eval(), inputs()
    v, t = model.clip.visual.stem(images), model.clip.stem(tokens)
    longer, same = model.intertwine(v, t)
    assert longer.shape == (2, 1 + 8 + 16, 64) and torch.equal(same, t)
    assert torch.equal(longer[:, :1], v[:, :1]) and torch.equal(longer[:, 9:], v[:, 1:])
    assert torch.equal(longer[:, 1:9], model.prompt_v(t))


def features(model, images, tokens):
    maps, words, *_ = model.encode(images, tokens)
    return maps[2], words


@pytest.mark.parametrize("both_ways", [False, True])
@torch.no_grad()
def test_words_reach_the_picture_and_only_both_ways_the_picture_the_words(both_ways):
    """One sentence changed: the maps move. One picture changed: the words move if it is told to go both ways."""
    model, (images, tokens) = small(both_ways=both_ways).eval(), inputs()
    maps, words = features(model, images, tokens)
    assert maps.shape == (2, 32, 4, 4) and words.shape == (2, 8, 64)
    assert not torch.allclose(features(model, images, tokens.flip(0))[0], maps, atol=1e-6)
    moved = not torch.allclose(features(model, images.flip(0), tokens)[1], words, atol=1e-6)
    assert moved == both_ways


@torch.no_grad()
def test_both_ways_the_sentence_is_still_read_at_its_end_mark():
    """The picture's prompt goes before the words and is taken off: only words up to the end mark count."""
    model, (images, tokens) = small(both_ways=True).eval(), inputs()
    _, words, sentence, _ = model.encode(images, tokens)
    ends = tokens.argmax(-1)
    assert torch.allclose(sentence, words[[0, 1], ends] @ model.clip.text_projection, atol=1e-6)
    changed = tokens.clone()
    changed[1, 1] = 1000  # "dog" becomes another word: the start mark before it stays what it was, what follows not
    other = model.encode(images, changed)[1]
    assert torch.allclose(other[1, 0], words[1, 0], atol=1e-6) and not torch.allclose(other[1, 2], words[1, 2])


# ---- the side network
@torch.no_grad()
def test_the_prior_joins_the_values_and_leaves_the_attention_map_alone():
    """out = softmax(q kᵀ/√d) (v + v_prior), v_prior read raw through the same qkv, its bias included."""
    torch.manual_seed(0)
    attention, x, prior = FusedAttention(6, 1), torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    attention.keep = True
    attention(x)
    plain = attention.map
    q, k, v = attention.qkv(x).chunk(3, -1)
    weights = (q @ k.mT / 6**0.5).softmax(-1)
    by_hand = attention.proj(weights @ (v + attention.qkv(prior)[..., 12:]))
    assert torch.allclose(attention(x, prior), by_hand, atol=1e-6) and torch.equal(attention.map, plain)


@torch.no_grad()
def test_resemblance_is_the_cosine_or_nothing():
    """Tokens along the prior (1), at 60° (0.5), across it (0), against it (0, not −1); lengths do not count."""
    side = small().side
    x = torch.tensor([[[2.0, 0], [0.5, 0.75**0.5], [0, 3.0], [-1.0, 0]]])
    assert side.resemblance(x, torch.tensor([[7.0, 0]]))[0, :, 0].tolist() == pytest.approx([1, 0.5, 0, 0])


@torch.no_grad()
def test_the_prior_goes_down_from_the_last_block_to_the_first():
    """x ← 5·x·(p pᵀ) where it resembles p; then for each block from the deepest on: x ← L1 x, prior = L2 x."""
    side, x, p = small().side, torch.randn(2, 5, 24), torch.randn(2, 24)
    down, y = side.priors(x, p), x * side.resemblance(x, p)
    y = torch.stack([5 * y[i] @ torch.outer(p[i], p[i]) for i in range(2)])
    for i in (3, 2, 1, 0):
        y = y @ side.feedback[i].linear.weight.T
        assert torch.allclose(down[i], y @ side.feedback[i].linear2.weight.T, atol=1e-4)
    assert len(side.blocks) == 4


@torch.no_grad()
def test_the_first_reading_is_plain_and_the_second_has_prior_and_fusions():
    """The whole side network again, slowly; CLIP's maps join at the start (both times) and after blocks 1, 2, 3."""
    model, (images, tokens) = small().eval(), inputs()
    _, words, _, taps = model.encode(images, tokens)
    side, out = model.side, model.side(images, taps, words)
    join = [
        F.conv2d(
            F.layer_norm(tap.movedim(1, -1), (64,), *fusion[0].parameters(), 1e-6).movedim(-1, 1),
            *fusion[1].parameters(),
        )
        .flatten(2)
        .mT
        for tap, fusion in zip(taps, side.fusions, strict=True)
    ]
    prompts = side.prompt(words)
    patches = side.patch(images).flatten(2).mT + side.positions + join[0]
    start = torch.cat([(side.queries + side.query_positions).expand(2, -1, -1), prompts, patches], 1)
    x = start
    for block in side.blocks:
        x = block(x)
    down, x = side.priors(x, prompts.mean(1)), start
    for i, block in enumerate(side.blocks):
        x = block(x, down[i])
        x[:, -16:] += join[i + 1] if i < 3 else 0
    assert torch.allclose(out, x[:, -16:].mT.unflatten(2, (4, 4)), atol=1e-4)


def test_the_side_network_reads_clips_blocks_at_four_heights():
    """Of twelve blocks the outputs of 0, 3, 6, 9; here of six 0, 1, 3, 4; the decoder reads after the thirds."""
    model, (images, tokens) = small(global_prior=False).eval(), inputs()
    seen = []
    for i, block in enumerate(model.clip.visual.transformer.resblocks):
        block.mlp.register_forward_hook(lambda *_, i=i: seen.append(i))
    maps, _, _, taps = model.encode(images, tokens)
    assert seen == [*range(6)] and [int(i * 12 / 4) for i in range(4)] == [0, 3, 6, 9]
    assert torch.equal(maps[0], taps[1]) and torch.equal(maps[1], taps[2])  # 1 and 3 of six: both lists have them
    assert not torch.equal(taps[3], taps[2])


@torch.no_grad()
def test_a_result_hangs_on_its_neighbours_in_the_released_model_only():
    """The original normalises the prior over the batch (SPEC 6.3, 4)."""
    images, tokens = inputs(4)
    for over_batch in (False, True):
        model = small(released=True, over_batch=over_batch).eval()
        together = model(images, tokens)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5 * together.abs().max()) != over_batch
    assert small(released=True).side.over_batch and not small().side.over_batch


# ---- the whole
def loss(model, count=2):
    images, tokens = inputs(count)
    masks = (torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.8).float()
    return text_to_pixel_loss(model(images, tokens), masks)


def test_reconstruction_trains_the_guessing_layers_and_nothing_else():
    """Σ over blocks of the mean squared error between L1(block's output) and its input, both cut off; eval: 0."""
    model = small()
    loss(model)
    model.extra_loss().backward()
    hit = {name for name, p in model.named_parameters() if p.grad is not None}
    assert hit == {f"side.feedback.{i}.linear.weight" for i in range(4)}
    assert model.extra_loss().item() > 0
    model.eval()
    loss(model)
    assert model.extra_loss() == 0.0 and small(global_prior=False).extra_loss() == 0.0


@pytest.mark.parametrize("options", [{}, {"both_ways": True}, {"global_prior": False}, {"released": True}], ids=str)
def test_all_that_is_tuned_gets_a_gradient_and_nothing_frozen_moves(options):
    model = small(**options)
    before = {name: x.clone() for name, x in model.clip.state_dict().items()}
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    (loss(model) + model.extra_loss()).backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    adam.step()
    moved = {name for name, x in model.clip.state_dict().items() if not torch.equal(x, before[name])}
    positions = {"positional_embedding", "visual.positional_embedding"}
    assert dead == [] and moved == (positions if "released" in options else set())
    assert not model.clip.training and model.global_.training


def test_the_fast_path_gives_the_same_logits_and_gradients():
    """float64: max|Δ| / max|·| ≤ 1e-10."""
    model, (images, tokens) = small(both_ways=True).double().eval(), inputs()
    results = []
    for on in (False, True):
        set_fast(model, on).zero_grad()
        logits = model(images.double(), tokens)
        logits.square().mean().backward()
        results.append([logits, *(p.grad for n, p in model.named_parameters()
                                  if p.grad is not None and "gates" not in n)])  # fmt: skip
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-10 * plain.abs().max().clamp(min=1e-30)


def test_recompute_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = small()
        model.recompute = recompute
        (loss(model) + model.extra_loss()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_logits_are_a_quarter_of_the_picture_at_another_size_too():
    """The side network's positions are resized as CLIP's are."""
    model = small().eval()
    assert [model(*inputs(2, side)).shape[2:] for side in (64, 96)] == [(16, 16), (24, 24)]


@torch.no_grad()
def test_look_shows_the_side_networks_attention_and_its_shortcut():
    model, (images, tokens) = small().eval(), inputs()
    seen = model.look(images, tokens)
    assert seen["side"].shape == seen["neck"].shape == (2, 64, 4, 4)
    tokens_seen = 16 + 8 + 16  # queries, as many as patches here, prompts, patches
    assert seen["side.blocks.3.attn"].shape == (2, 3, tokens_seen, tokens_seen)
    assert torch.equal(seen["logits"], model(images, tokens))


def test_the_decoder_starts_as_etris_does_from_the_same_seed():
    """Rows of a comparison share their decoder's initial values."""
    from etris import assemble as assemble_etris

    torch.manual_seed(0)
    other = assemble_etris(build_clip(fill_by_name(CLIP(VIT).state_dict())), 64, 8, width=16)
    ours = small()
    for name in ("hierarchical", "global_", "projector"):
        a, b = getattr(ours, name).state_dict(), getattr(other, name).state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("backbone", ["tiny", "RN101", "ViT-L-14"])
def test_another_backbone_is_refused_with_those_there_are(backbone):
    with pytest.raises(UserError, match=f"{backbone}: choose one of ViT-B-16, tiny-vit"):
        build(backbone, weights="random")


def test_wrong_sizes_are_said():
    with pytest.raises(UserError, match="picture size 72: choose --size a multiple of 16"):
        build("tiny-vit", 72, weights="random")
    with pytest.raises(UserError, match="--width 50: 3 attention heads do not divide it"):
        Block(50, barleria.HEADS)


def test_train_evaluate_and_predict_take_it_as_any_other(tmp_path):
    """train.py --system barleria: two steps, a checkpoint without frozen tensors, and evaluate.py reads it."""
    out = tmp_path / "run"
    line = f"--system barleria --backbone tiny-vit --weights random --limit 4 --batch-size 2 --size 64 --out {out}"
    train.main([*line.split(), "--steps", "2", "--device", "cpu"])
    file = read_checkpoint(out / "last.pt")
    assert file["system"] == "barleria" and not any(name.startswith("clip.") for name in file["tuned"])
    assert load_checkpoint(out / "best.pt").side.blocks[0].attn.heads == 3
    evaluate.main([str(out / "best.pt"), "--limit", "2", "--json", str(tmp_path / "j"), "--device", "cpu"])
    assert json.loads((tmp_path / "j").read_text())["refs"] == 2
