"""12. detris.py: DINOv2 with registers, Dense Aligners, text adapters; and how its frozen weights arrive."""

import hashlib
import io
import json

import pytest
import torch
import torch.nn.functional as F

import detris
import evaluate
import prepare
import pretrain
import train
import tuning
from clip_model import CLIP, SIZES, Size, UserError, build_clip, fill_by_name, load_clip, tokenize
from detris import DINO, DenseAligner, DenseBranches, DinoSize, TextAdapter, assemble, build, build_dino, load_dino
from etris import set_fast, text_to_pixel_loss
from official import load_checkpoint, read_checkpoint, read_weights
from tests.server import Server

TEXT, SMALL = Size(32, 64, 3, 64, 16, 64, 3, 20), DinoSize(96, 6, 16, 64)
WHERE = {"aligners": (1, 3, 5), "adapters": (1, 2), "width": 32, "text_rank": 16}


def dino(size=SMALL, seed=0):
    return build_dino(fill_by_name(DINO(size).state_dict(), seed))


def small(**options):
    torch.manual_seed(0)
    clip = build_clip(fill_by_name(CLIP(TEXT).state_dict()))
    return assemble(clip, dino(), 64, 8, dropout=0.0, **WHERE | options)


def inputs(count=2, side=64):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)), tokenize(texts, 8)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# ---- counts: SPEC 5.3, to the last parameter
COUNTS = {  # aligners, adapters, DINOv2, text tower, neck, decoder, projector, all trainable, everything
    "dinov2-base": (2_297_376, 418_320, 86_583_552, 63_428_097, 10_114_560, 25_518_129, 175_529_778),
    "dinov2-large": (2_692_128, 418_320, 304_372_736, 63_428_097, 10_507_776, 26_306_097, 394_106_930),
    "dinov2-large-mixed": (27_638_640, 5_692_720, 304_372_736, 63_428_097, 10_507_776, 56_527_009, 424_327_842),
}


def on_paper(name):
    with torch.device("meta"):
        clip, rank = CLIP(SIZES[detris.TEXTS[name]]).requires_grad_(False), detris.PRESETS[name]["width"]
        return assemble(clip, DINO(detris.SIZES[name]), 448, 17, width=rank, **detris.WHERE[name])


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_configurations_have_the_counts_of_the_original(name):
    """Base 2,715,696 in the encoders, large 3,110,448, mixed 33,331,360: 1.8, 0.85 and 9.1 % of what is frozen."""
    model, visual = on_paper(name), None
    visual = count(model.clip.visual)
    parts = [count(model.aligners), count(model.adapters), visual, count(model.clip) - visual]
    assert (count(model.global_), count(model.projector)) == (7_899_136, 4_788_737)
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (*parts, count(model.hierarchical), tuned, count(model)) == COUNTS[name]


def test_one_aligner_and_one_text_adapter_by_hand():
    """SPEC 5.3: 382,896 at rank 128 on width 768, of it 164,736 for asking the words; 69,720 at rank 64 on 512."""
    aligner, adapter = DenseAligner(768, 512, 128), TextAdapter(512, 64)
    assert count(aligner.image, aligner.text, aligner.back, aligner.cross_attn) == 164_736
    branches = (count(aligner.branches.branch1), count(aligner.branches.branch2), count(aligner.branches.branch3))
    assert branches == (8_384, 3_960, 8_312)
    assert (count(aligner), count(adapter)) == (382_896, 69_720)


# ---- DINOv2
def test_the_names_are_those_of_the_published_files():
    """Every tensor of dinov2_vitb14_reg4_pretrain.pth, as the golden file of DETRIS base lists it."""
    with torch.device("meta"):
        ours = {f"dinov2.{name}": list(x.shape) for name, x in DINO(detris.BASE).state_dict().items()}
    shapes = json.loads((detris.HERE / "tests" / "golden" / "detris_base.shapes.json").read_text())
    assert ours == {name: s for name, s in shapes.items() if name.startswith("dinov2.") and ".adapter." not in name}


@torch.no_grad()
def test_a_dinov2_step_by_step():
    """Class token with its position, registers without, patches; LayerScale; the last norm, patches only."""
    net, image = dino(), torch.randn(2, 3, 64, 64)
    patches = F.conv2d(image, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=16).flatten(2).mT
    first = torch.cat([net.cls_token + net.pos_embed[:, :1], net.register_tokens], 1).expand(2, -1, -1)
    x = torch.cat([first, patches + net.pos_embed[:, 1:]], 1)
    assert torch.allclose(net.stem(image), x, atol=1e-6) and x.shape == (2, 5 + 16, 96)
    for block in net.blocks:
        block.ls1.gamma.mul_(0.5), block.ls2.gamma.mul_(0.3)
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    assert torch.allclose(net(image), x, atol=1e-5)
    last = F.layer_norm(x[:, 5:], (96,), net.norm.weight, net.norm.bias, 1e-6)
    assert torch.allclose(net.head(net(image)), last.mT.unflatten(2, (4, 4)), atol=1e-5)


@torch.no_grad()
def test_its_stages_are_the_blocks_up_to_the_taps():
    """0-based outputs 4 and 8 of twelve, 8 and 16 of 24 (SPEC 2.1), 2 and 4 of six; run as stages, the same stream."""
    net, image = dino(), torch.randn(1, 3, 64, 64)
    v = net.stem(image)
    for stage in net.stages:
        v = stage(v)
    assert torch.equal(v, net(image)) and [len(stage) for stage in net.stages] == [3, 2, 1] and net.taps == (2, 4, 5)
    with torch.device("meta"):
        assert DINO(detris.BASE).taps[:2] == (4, 8) and DINO(detris.LARGE).taps[:2] == (8, 16)


@torch.no_grad()
def test_positions_are_resized_as_dinov2_does_it():
    """4² → 6²: as if the wanted side were 6.1; at the native grid nothing is touched. 448 / 14 = 32 of 37 comes out."""
    net = dino()
    grid = net.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    size = {"scale_factor": (6.1 / 4, 6.1 / 4), "mode": "bicubic", "align_corners": False, "antialias": False}
    expected = F.interpolate(grid, **size).flatten(2).mT
    plain = F.interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT
    found = net.positions(6, 6)
    assert torch.equal(found[:, 1:], expected) and not torch.allclose(expected, plain, atol=1e-4)
    assert torch.equal(found[:, :1], net.pos_embed[:, :1]) and net.positions(4, 4) is net.pos_embed
    assert dino(DinoSize(64, 1, 14, 518)).positions(32, 32).shape == (1, 1 + 32 * 32, 64)


@torch.no_grad()
def test_the_mask_token_hides_patches():
    """Where `hidden` is True the picture cannot be seen; elsewhere nothing changes."""
    net, image = dino(), torch.randn(1, 3, 64, 64)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 3] = True
    one, other = net.stem(image, hidden), net.stem(image, ~hidden)
    other_picture = net.stem(-image, hidden)
    assert torch.equal(one[0, 8], other_picture[0, 8]) and not torch.equal(one[0, 9], other_picture[0, 9])
    assert torch.equal(one[0, 9], net.stem(image)[0, 9]) and torch.equal(other[0, 8], net.stem(image)[0, 8])


def test_weights_of_another_kind_are_refused():
    state = dino().state_dict()
    for wrong in ({n: x for n, x in state.items() if n != "register_tokens"}, state | {"extra": torch.zeros(1)},
                  CLIP(TEXT).state_dict()):  # fmt: skip
        with pytest.raises(UserError, match="x.pth: not a DINOv2 with registers"):
            build_dino(wrong, "x.pth")


# ---- aligners and adapters
@pytest.mark.parametrize("planar", [True, False], ids=["grid", "words"])
@torch.no_grad()
def test_every_branch_reads_all_branches_before_it(planar):
    """r/2, r/4, r/4 channels side by side; a change in the first branch alone moves the other two."""
    torch.manual_seed(0)
    m, z = DenseBranches(32, planar).eval(), torch.randn(2, 32, *((5, 5) if planar else (7,)))
    out = m(z)
    assert out.shape == z.shape
    m.branch1.conv.bias += 1
    moved = [not torch.allclose(a, b) for a, b in zip(out.split((16, 8, 8), 1), m(z).split((16, 8, 8), 1), strict=True)]
    assert moved == [True, True, True]
    before = m(z)
    m.branch3[1].conv.bias += 1  # and one in the last moves the last only
    assert torch.equal(m(z)[:, :24], before[:, :24]) and not torch.equal(m(z), before)
    assert {b.eps for b in m.modules() if isinstance(b, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)} == {1e-3}


@torch.no_grad()
def test_an_aligner_by_hand():
    """Class token and registers come out as up(2z); patches ask the words, and z is added before and after."""
    torch.manual_seed(0)
    m, n, words = DenseAligner(24, 12, 32).eval(), torch.randn(2, 5 + 6, 24), torch.randn(2, 4, 12)
    z = m.down(n).relu()
    patches = m.branches(z[:, 5:].mT.reshape(2, 32, 2, 3)).flatten(2).mT + z[:, 5:]
    asked = m.back(m.cross_attn(m.image(patches), m.text(words), m.text(words)))
    out = m(n, words, (2, 3))
    assert torch.allclose(out[:, :5], m.up(2 * z[:, :5]), atol=1e-6)
    assert torch.allclose(out[:, 5:], m.up(asked + z[:, 5:]), atol=1e-6)


@torch.no_grad()
def test_a_text_adapter_by_hand():
    """The start mark comes out as up(2z), the words as up(branches + z), with z added once."""
    torch.manual_seed(0)
    m, x = TextAdapter(12, 16).eval(), torch.randn(2, 6, 12)
    z, out = m.down(x).relu(), m(x)
    assert torch.allclose(out[:, 0], m.up(2 * z[:, 0]), atol=1e-6)
    assert torch.allclose(out[:, 1:], m.up(m.branches(z[:, 1:].mT).mT + z[:, 1:]), atol=1e-6)


@torch.no_grad()
def test_without_aligners_and_adapters_the_encoders_are_the_frozen_ones_bit_for_bit():
    """Maps, word and sentence features of plain DINOv2 and plain CLIP; with them both differ."""
    images, tokens = inputs()
    model = small(aligners=(), adapters=()).eval()
    maps, words, sentence = model.encode(images, tokens)
    net, t, v = model.clip.visual, model.clip.stem(tokens), model.clip.visual.stem(images)
    for i in range(3):
        v, t = net.stages[i](v), model.clip.stages[i](t)
        assert torch.equal(maps[i], net.as_map(v) if i < 2 else net.head(v))
    assert torch.equal(words, model.clip.head(t, tokens)[0])
    assert torch.equal(sentence, model.clip.head(t, tokens)[1])
    other = small().eval().encode(images, tokens)
    assert not torch.equal(other[0][0], maps[0]) and not torch.equal(other[1], words)


@torch.no_grad()
def test_aligner_and_adapter_join_at_a_fifth_where_they_should():
    """x + LS2(MLP(n) + 0.2·DA(n, words)), inside the LayerScale; x + MLP(LN x) + 0.2·TA(x), from x without the norm."""
    model, (images, tokens) = small(aligners=(0,), adapters=(0,)).eval(), inputs()
    model.clip.visual.blocks[0].ls2.gamma.mul_(0.5)
    words, net = model.read_words(tokens)[0], model.clip.visual
    block, aligner = net.blocks[0], model.aligners["0"]
    v = block.attention(net.stem(images))
    n = block.norm2(v)
    v = v + 0.5 * (block.mlp(n) + 0.2 * aligner(n, words, net.grid))
    for later in net.blocks[1:]:
        v = later(v)
    assert torch.allclose(model.encode(images, tokens)[0][2], net.head(v), atol=1e-5)
    first, *rest = model.clip.transformer.resblocks
    t = model.clip.stem(tokens)
    t = t + first.attn(first.ln_1(t), causal=True)
    t = t + first.mlp(first.ln_2(t)) + 0.2 * model.adapters["0"](t)
    for later in rest:
        t = later(t)
    assert torch.allclose(words, model.clip.ln_final(t), atol=1e-5)


@torch.no_grad()
def test_words_reach_the_picture_and_no_picture_the_words():
    model, (images, tokens) = small().eval(), inputs()
    maps, words, _ = model.encode(images, tokens)
    assert not torch.allclose(model.encode(images, tokens.flip(0))[0][2], maps[2], atol=1e-6)
    assert torch.equal(model.encode(images.flip(0), tokens)[1], words)


@torch.no_grad()
def test_the_neck_adds_its_input_to_the_last_convolutions():
    """coordconv(f) + f, f without the two coordinates (DETRIS alone)."""
    model = small().eval()
    x = torch.randn(2, 64 + 2, 4, 4)
    both = model.hierarchical.coordinates
    assert torch.allclose(both(x), both[1](both[0](x)) + x[:, :64], atol=1e-6)


# ---- the whole
def loss(model, count=2):
    images, tokens = inputs(count)
    masks = (torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.8).float()
    return text_to_pixel_loss(model(images, tokens), masks)


def test_all_that_is_tuned_gets_a_gradient_and_nothing_frozen_moves():
    """No trained positions, unlike ETRIS; BatchNorm of aligners moves, nothing of DINOv2 or CLIP does.

    The biases that stand before a BatchNorm are the exception: it takes them off again, their gradient is rounding.
    """
    model = small()
    before = {name: x.clone() for name, x in model.clip.state_dict().items()}
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    loss(model).backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    adam.step()
    assert [name for name in dead if not name.endswith(".conv.bias")] == []
    assert all(torch.equal(x, before[name]) for name, x in model.clip.state_dict().items())
    names = [name for name, _ in model.tuned()]
    assert "aligners.1.branches.branch1.bn.running_mean" in names and not any(n.startswith("clip.") for n in names)
    assert not model.clip.visual.training and model.aligners.training and model.extra_loss() == 0.0


def test_the_fast_path_gives_the_same_logits_and_gradients():
    """float64: max|Δ| / max|·| ≤ 1e-10."""
    model, (images, tokens) = small().double().eval(), inputs()
    results = []
    for on in (False, True):
        set_fast(model, on).zero_grad()
        logits = model(images.double(), tokens)
        logits.square().mean().backward()
        results.append([logits, *(p.grad for n, p in model.named_parameters()
                                  if p.grad is not None and "gates" not in n)])  # fmt: skip
    for plain, fast in zip(*results, strict=True):
        assert (plain - fast).abs().max() <= 1e-10 * plain.abs().max().clamp(min=1e-30)


def test_recompute_gives_the_same_gradients_and_statistics():
    """Only frozen parts are computed twice: an aligner's BatchNorm counts each picture once."""
    results = []
    for recompute in (False, True):
        model = small()
        model.recompute = recompute
        loss(model).backward()
        moved = [x for name, x in model.state_dict().items() if "running" in name]
        results.append([p.grad for p in model.parameters() if p.grad is not None] + moved)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_logits_are_a_quarter_of_sixteen_a_patch_and_items_do_not_touch():
    """(B, 1, 4h, 4w), h the grid; each item alone gives what it gives in a batch; look names the aligners."""
    model = small().eval()
    for side in (64, 96):
        images, tokens = inputs(4, side)
        together = model(images, tokens)
        assert together.shape == (4, 1, side // 4, side // 4)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5 * together.abs().max())
    seen = model.look(images, tokens)
    assert seen["aligner3"].shape == (4, 5 + 36, 96) and seen["aligners.3.cross_attn"].shape == (4, 8, 36, 8)
    assert seen["clip.visual.blocks.0.attn"].shape == (4, 1, 41, 41)


def test_wrong_values_are_said():
    with pytest.raises(UserError, match="tiny: choose one of tiny-dino, dinov2-base"):
        build("tiny", weights="random")
    with pytest.raises(UserError, match="--width 40: an aligner's rank is a multiple of 16"):
        build("tiny-dino", weights="random", width=40)
    with pytest.raises(UserError, match="--words 30: the frozen text tower reads 24"):
        build("tiny-dino", words=30, weights="random")
    with pytest.raises(UserError, match="picture size 100: choose --size a multiple of 16"):
        build("tiny-dino", 100, weights="random")


def test_train_evaluate_and_predict_take_it_as_any_other(tmp_path):
    """train.py --system detris: two steps, a checkpoint without frozen tensors, and evaluate.py reads it."""
    out = tmp_path / "run"
    line = f"--system detris --backbone tiny-dino --weights random --limit 4 --batch-size 2 --size 64 --out {out}"
    train.main([*line.split(), "--steps", "2", "--device", "cpu"])
    file = read_checkpoint(out / "last.pt")
    assert file["system"] == "detris" and not any(name.startswith("clip.") for name in file["tuned"])
    assert file["identity"]["name"] == "tiny-dino" and list(load_checkpoint(out / "best.pt").adapters) == ["1", "2"]
    evaluate.main([str(out / "best.pt"), "--limit", "2", "--json", str(tmp_path / "j"), "--device", "cpu"])
    assert json.loads((tmp_path / "j").read_text())["refs"] == 2


def test_lora_joins_dinov2s_attention_too():
    """tuning.py's methods apply to this system: six blocks of width 128, three of text, 64 wide; rank 4, q and v."""
    values = {"size": 64, "words": 8, "weights": "random", "system": "detris"}
    model = tuning.build("tiny-dino", tuning="bridger+lora", **values).eval()
    qkv = [name for name, _ in model.tuned() if name.startswith("clip.visual.blocks") and ".qkv." in name]
    assert len(qkv) == 12 and all("parametrizations" in name for name in qkv)
    low_rank = [x for name, x in model.tuned() if name.startswith("clip.")]
    assert sum(x.numel() for x in low_rank) == 4 * 2 * (6 * (128 + 128) + 3 * (64 + 64))


# ---- how the frozen weights arrive
def file_of(size, seed=0):
    torch.save(dino(size, seed).state_dict(), stream := io.BytesIO())
    return stream.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """DINOv2's authors, in small, and an empty cache."""
    monkeypatch.setenv("ETRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "WAITS", (0,))
    monkeypatch.setitem(detris.SIZES, "dinov2-base", SMALL)
    with Server({"/vitb14.pth": file_of(SMALL)}) as server:
        monkeypatch.setattr(prepare, "DINOV2", f"{server.url}/{{kind}}.pth")
        yield server


def test_the_published_file_comes_once_and_its_hash_is_kept(server, tmp_path, capsys):
    """The hash goes beside the file at the first download and is printed; the second time nothing is fetched."""
    net, source = load_dino("dinov2-base")
    digest = hashlib.sha256(server.files["/vitb14.pth"]).hexdigest()
    assert (tmp_path / "cache" / "dinov2-base.sha256").read_text().split() == [digest, "dinov2-base.pth"]
    assert digest in capsys.readouterr().out and source == "dinov2-base.pth"
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in dino().state_dict().items())
    load_dino("dinov2-base")
    assert len(server.requests) == 1


def test_a_file_that_changed_since_is_refused(server, tmp_path):
    """Another DINOv2 under the same name: readable, of the right sizes, and not the one that came."""
    load_dino("dinov2-base")
    path = tmp_path / "cache" / "dinov2-base.pth"
    path.write_bytes(file_of(SMALL, seed=1))
    with pytest.raises(UserError, match="dinov2-base.pth: changed since it came"):
        load_dino("dinov2-base")
    path.unlink()  # the way out that the message names
    load_dino("dinov2-base")


@pytest.mark.parametrize("case", ["away", "a page", "another size", "a CLIP"])
def test_what_is_no_dinov2_of_that_size_never_gets_into_the_cache(server, tmp_path, case):
    clip = io.BytesIO()
    torch.save(CLIP(TEXT).state_dict(), clip)
    files = {"away": None, "a page": b"<html>sorry</html>", "another size": file_of(DinoSize(64, 2, 16, 64)),
             "a CLIP": clip.getvalue()}  # fmt: skip
    server.files["/vitb14.pth"] = files[case]
    with pytest.raises(UserError, match=f"no weights of dinov2-base: {server.url}/vitb14.pth"):
        load_dino("dinov2-base")
    assert not list((tmp_path / "cache").glob("dinov2*"))


def test_files_of_ones_own_and_what_is_not_there_yet(server, tmp_path, monkeypatch):
    """--weights DINO[,CLIP]; tiny-dino says how to make it; sizes must be those of the name."""
    monkeypatch.setattr(detris, "HERE", tmp_path)
    (tmp_path / "mine.pth").write_bytes(server.files["/vitb14.pth"])
    net, source = load_dino("dinov2-base", tmp_path / "mine.pth")
    assert source == "mine.pth" and not server.requests
    with pytest.raises(UserError, match="python pretrain.py tiny-dino"):
        load_dino("tiny-dino")
    with pytest.raises(UserError, match="mine.pth: holds a DINOv2 of other sizes than tiny-dino"):
        load_dino("tiny-dino", tmp_path / "mine.pth")
    monkeypatch.setitem(detris.TEXTS, "dinov2-base", "tiny")
    torch.save(load_clip("tiny", "random", 7).state_dict(), tmp_path / "clip.pt")
    clip, _ = detris.load_frozen("dinov2-base", f"{tmp_path / 'mine.pth'},{tmp_path / 'clip.pt'}")
    assert clip.identity["weights"] == "mine.pth and, for text, tiny's clip.pt" and clip.visual.size == SMALL


def test_two_backbones_with_another_text_tower_have_another_identity():
    a, b = (detris.load_frozen("tiny-dino", "random", seed)[0].identity for seed in (0, 1))
    assert a["sha256"] != b["sha256"] and a["name"] == "tiny-dino"


# ---- pre-training without words
def test_masked_patches_are_the_ones_that_count():
    """60 % of each picture; the loss is the mean |guess − pixels| of hidden patches, whatever is guessed elsewhere."""
    torch.manual_seed(0)
    hidden = pretrain.hide(3, 20)
    assert hidden.sum(1).tolist() == [12, 12, 12] and not torch.equal(hidden[0], hidden[1])
    net, images, hidden = dino(), torch.randn(2, 3, 64, 64), pretrain.hide(2, 16)
    head = torch.nn.Linear(96, 3 * 16 * 16)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    each = [
        images[i, :, 16 * (p // 4) :, 16 * (p % 4) :][:, :16, :16].abs().mean() for i, p in hidden.nonzero().tolist()
    ]
    assert pretrain.masked_loss(net, head, images, hidden).item() == pytest.approx(torch.stack(each).mean().item())


def test_tiny_dino_is_made_by_three_steps_and_fits(tmp_path):
    """python pretrain.py tiny-dino: half precision, under 6 MB, read back by load_dino, the record beside it."""
    path = tmp_path / "tiny-dino.pt"
    with pytest.raises(SystemExit):
        pretrain.main(["tiny-dino", "--steps", "3", "--batch-size", "8", "--out", str(tmp_path / "no" / "x.pt")])
    pretrain.main(["tiny-dino", "--steps", "3", "--batch-size", "8", "--out", str(path)])
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size == record["bytes"] < 6_000_000 and {"loss", "val_loss", "of_the_mean"} <= set(record)
    net, _ = load_dino("tiny-dino", path)
    fresh = DINO(detris.SIZES["tiny-dino"])
    assert net.size == fresh.size and all(x.dtype == torch.float32 for x in read_weights(path).values())
    assert net.mask_token.abs().max() > 0  # it starts at zero, and was trained
