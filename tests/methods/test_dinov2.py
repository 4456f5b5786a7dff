"""methods/dinov2.py: DINOv2 with registers, how its weights arrive, its small pre-training."""

import hashlib
import io
import json

import pytest
import torch
import torch.nn.functional as F

from clip_model import CLIP, CLIPConfig, load_clip
from methods import detris, dinov2
from methods.dinov2 import DINO, DINO_CONFIGS, DinoConfig, build_dino, load_dino
from tests.robustness.server import Server
from toy import pretrain
from utils.clip_weights import init_by_name, read_weights
from utils.common import ROOT, UserError

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


def small_dino(config=SMALL, seed=0):
    return build_dino(init_by_name(DINO(config).state_dict(), seed))


# -------------------------------------------------- the encoder
def test_the_names_are_those_of_the_published_files():
    """Every tensor of dinov2_vitb14_reg4_pretrain.pth, as DETRIS base's golden file lists it."""
    with torch.device("meta"):
        state = DINO(DINO_CONFIGS["dinov2-base"]).state_dict()
    ours = {f"dinov2.{name}": list(x.shape) for name, x in state.items()}
    golden = ROOT / "tests" / "golden" / "detris_base.shapes.json"
    published = {}
    for name, shape in json.loads(golden.read_text()).items():
        if name.startswith("dinov2.") and ".adapter." not in name:
            published[name] = shape
    assert ours == published


@torch.no_grad()
def test_a_dinov2_step_by_step():
    """Class token with its position, registers without, patches; LayerScale; the last norm."""
    net = small_dino()
    images = torch.randn(2, 3, 64, 64)
    conv = net.patch_embed.proj
    patches = F.conv2d(images, conv.weight, conv.bias, stride=16).flatten(2).mT
    class_token = net.cls_token + net.pos_embed[:, :1]
    prefix = torch.cat([class_token, net.register_tokens], 1).expand(2, -1, -1)
    x = torch.cat([prefix, patches + net.pos_embed[:, 1:]], 1)
    assert torch.allclose(net.stem(images), x, atol=1e-6)
    assert x.shape == (2, 5 + 16, 96)
    for block in net.blocks:
        block.ls1.gamma.mul_(0.5)
        block.ls2.gamma.mul_(0.3)
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    assert torch.allclose(net(images), x, atol=1e-5)
    last = F.layer_norm(x[:, 5:], (96,), net.norm.weight, net.norm.bias, 1e-6)
    assert torch.allclose(net.head(net(images)), last.mT.unflatten(2, (4, 4)), atol=1e-5)


@torch.no_grad()
def test_its_stages_end_where_the_decoder_reads_maps():
    """0-based outputs 4 and 8 of twelve, 8 and 16 of 24 (the original's settings), 2 and 4 of six.

    Run as stages, the blocks give the same stream.
    """
    net = small_dino()
    images = torch.randn(1, 3, 64, 64)
    v = net.stem(images)
    for stage in net.stages:
        v = stage(v)
    assert torch.equal(v, net(images))
    assert [len(stage) for stage in net.stages] == [3, 2, 1]
    assert net.stage_ends == (2, 4, 5)
    with torch.device("meta"):
        assert DINO(DINO_CONFIGS["dinov2-base"]).stage_ends[:2] == (4, 8)
        assert DINO(DINO_CONFIGS["dinov2-large"]).stage_ends[:2] == (8, 16)


@torch.no_grad()
def test_positions_are_resized_as_dinov2_does_it():
    """4² → 6²: as if the wanted side were 6.1; at the native grid nothing changes.

    448 / 14 = 32 comes out of 37.
    """
    net = small_dino()
    grid = net.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    options = {"mode": "bicubic", "align_corners": False, "antialias": False}
    expected = F.interpolate(grid, scale_factor=(6.1 / 4, 6.1 / 4), **options).flatten(2).mT
    plain = F.interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT
    found = net.positions(6, 6)
    assert torch.equal(found[:, 1:], expected)
    assert not torch.allclose(expected, plain, atol=1e-4)
    assert torch.equal(found[:, :1], net.pos_embed[:, :1])
    assert net.positions(4, 4) is net.pos_embed
    one_block = DinoConfig(width=64, layers=1, patch_size=14, image_size=518)
    assert small_dino(one_block).positions(32, 32).shape == (1, 1 + 32 * 32, 64)


@torch.no_grad()
def test_the_mask_token_hides_patches():
    """Where `masked` is True the image cannot be seen; elsewhere nothing changes."""
    net = small_dino()
    images = torch.randn(1, 3, 64, 64)
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, 3] = True
    one = net.stem(images, masked)
    other = net.stem(images, ~masked)
    other_image = net.stem(-images, masked)
    plain = net.stem(images)
    assert torch.equal(one[0, 8], other_image[0, 8])
    assert not torch.equal(one[0, 9], other_image[0, 9])
    assert torch.equal(one[0, 9], plain[0, 9])
    assert torch.equal(other[0, 8], plain[0, 8])


def test_weights_of_another_kind_are_refused():
    state = small_dino().state_dict()
    without_registers = {name: x for name, x in state.items() if name != "register_tokens"}
    with_more = {**state, "extra": torch.zeros(1)}
    for wrong in (without_registers, with_more, CLIP(TEXT).state_dict()):
        with pytest.raises(UserError, match="x.pth: not a DINOv2 with registers"):
            build_dino(wrong, "x.pth")


# -------------------------------------------------- how the weights arrive
def file_of(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """DINOv2's authors, in small, and an empty cache."""
    monkeypatch.setenv("ETRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("utils.download.RETRY_DELAYS", (0,))
    monkeypatch.setitem(DINO_CONFIGS, "dinov2-base", SMALL)
    with Server({"/vitb14.pth": file_of(small_dino().state_dict())}) as server:
        monkeypatch.setattr(dinov2, "DINO_URL", f"{server.url}/{{kind}}.pth")
        yield server


def test_the_published_file_comes_once_and_its_hash_is_kept(server, tmp_path, capsys):
    """The hash is written beside the file and printed; the second time nothing is downloaded."""
    net, source = load_dino("dinov2-base")
    digest = hashlib.sha256(server.files["/vitb14.pth"]).hexdigest()
    note = tmp_path / "cache" / "dinov2-base.sha256"
    assert note.read_text().split() == [digest, "dinov2-base.pth"]
    assert digest in capsys.readouterr().out
    assert source == "dinov2-base.pth"
    state = net.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in small_dino().state_dict().items())
    load_dino("dinov2-base")
    assert len(server.requests) == 1


def test_a_file_that_changed_since_is_refused(server, tmp_path):
    """Another DINOv2 under the same name: readable, of the right sizes, not the one that came."""
    load_dino("dinov2-base")
    path = tmp_path / "cache" / "dinov2-base.pth"
    path.write_bytes(file_of(small_dino(seed=1).state_dict()))
    with pytest.raises(UserError, match="dinov2-base.pth: changed since it was downloaded"):
        load_dino("dinov2-base")
    path.unlink()  # the way out that the message names
    load_dino("dinov2-base")


OTHER_SIZE = DinoConfig(width=64, layers=2, patch_size=16, image_size=64)
WRONG_FILES = {
    "away": None,
    "a page": b"<html>sorry</html>",
    "another size": file_of(DINO(OTHER_SIZE).state_dict()),
    "a CLIP": file_of(CLIP(TEXT).state_dict()),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_what_is_no_dinov2_of_that_size_never_gets_into_the_cache(server, tmp_path, case):
    server.files["/vitb14.pth"] = WRONG_FILES[case]
    with pytest.raises(UserError, match=f"no weights of dinov2-base: {server.url}/vitb14.pth"):
        load_dino("dinov2-base")
    assert not list((tmp_path / "cache").glob("dinov2*"))


def test_a_download_that_breaks_off_never_gets_into_the_cache(server, tmp_path):
    """torch.hub does not notice it; reading the file does. The next attempt works."""
    server.faults["/vitb14.pth"] = ["truncate"]
    with pytest.raises(UserError, match=f"no weights of dinov2-base: {server.url}/vitb14.pth"):
        load_dino("dinov2-base")
    assert not list((tmp_path / "cache").glob("dinov2*"))
    load_dino("dinov2-base")


def test_files_of_ones_own_and_what_is_not_there_yet(server, tmp_path, monkeypatch):
    """--weights DINO[,CLIP]; tiny-dino says how to make it; sizes must be those of the name."""
    monkeypatch.setattr(dinov2, "ROOT", tmp_path)
    mine = tmp_path / "mine.pth"
    mine.write_bytes(server.files["/vitb14.pth"])
    _, source = load_dino("dinov2-base", mine)
    assert source == "mine.pth"
    assert not server.requests
    with pytest.raises(UserError, match="python -m toy.pretrain tiny-dino"):
        load_dino("tiny-dino")
    with pytest.raises(UserError, match="mine.pth: holds a DINOv2 of other sizes than tiny-dino"):
        load_dino("tiny-dino", mine)
    monkeypatch.setitem(detris.TEXT_TOWERS, "dinov2-base", "tiny")
    torch.save(load_clip("tiny", "random", 7).state_dict(), tmp_path / "clip.pt")
    clip, _ = detris.load_backbones("dinov2-base", f"{mine},{tmp_path / 'clip.pt'}")
    assert clip.identity["weights"] == "mine.pth and, for text, tiny's clip.pt"
    assert clip.visual.config == SMALL


# -------------------------------------------------- pre-training without text
def test_masked_patches_are_the_ones_that_count():
    """60 % of each image; the loss is the mean |prediction − pixels| over masked patches only."""
    torch.manual_seed(0)
    masked = pretrain.hide(3, 20)
    assert masked.sum(1).tolist() == [12, 12, 12]
    assert not torch.equal(masked[0], masked[1])
    net = small_dino()
    images = torch.randn(2, 3, 64, 64)
    masked = pretrain.hide(2, 16)
    head = torch.nn.Linear(96, 3 * 16 * 16)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    errors = []
    for i, patch in masked.nonzero().tolist():
        top = 16 * (patch // 4)
        left = 16 * (patch % 4)
        errors.append(images[i, :, top : top + 16, left : left + 16].abs().mean())
    expected = torch.stack(errors).mean().item()
    assert pretrain.masked_loss(net, head, images, masked).item() == pytest.approx(expected)


def test_tiny_dino_is_made_by_three_steps_and_fits(tmp_path):
    """`toy.pretrain tiny-dino`: half precision, under 6 MB, read by load_dino, with its record."""
    path = tmp_path / "tiny-dino.pt"
    command = ["tiny-dino", "--steps", "3", "--batch-size", "8", "--out"]
    with pytest.raises(SystemExit):
        pretrain.main([*command, str(tmp_path / "no" / "x.pt")])
    pretrain.main([*command, str(path)])
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size == record["bytes"] < 6_000_000
    assert {"loss", "val_loss", "of_the_mean"} <= set(record)
    net, _ = load_dino("tiny-dino", path)
    assert net.config == DINO_CONFIGS["tiny-dino"]
    assert all(x.dtype == torch.float32 for x in read_weights(path).values())
    assert net.mask_token.abs().max() > 0  # it starts at zero, and was trained
