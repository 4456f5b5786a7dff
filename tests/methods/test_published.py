"""methods/published.py: the authors' checkpoints compute here what they compute there."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
from checkpoint import load_checkpoint
from clip_model import CLIP, CLIPConfig, build_clip, load_clip
from etris import build_etris
from methods.barleria import build_barleria
from methods.detris import build_detris
from methods.dinov2 import DINO, DinoConfig
from methods.published import from_official, to_official
from tests.golden.inputs import fill
from tests.golden.inputs import images as golden_images
from utils.clip_weights import init_by_name
from utils.common import ROOT, UserError
from utils.tokenizer import tokenize

GOLDEN = ROOT / "tests" / "golden"
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
RESNET = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(1, 1, 1, 1),
    vision_width=8,
    text_width=64,
    text_layers=3,
    context_length=20,
)


def golden_state(name):
    shapes = json.loads((GOLDEN / f"{name}.shapes.json").read_text())
    return {key: fill(key, tuple(shape)) for key, shape in shapes.items()}


def golden_inputs(name, which, size):
    """Images, tokens and the original's outputs."""
    expected = np.load(GOLDEN / f"{name}_{which}.npz")
    tokens = torch.from_numpy(expected["tokens"]).long()
    return golden_images(which, size), tokens, expected


def relative_error(ours, theirs):
    """The largest difference, of the largest number."""
    theirs = torch.from_numpy(theirs)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module", params=["etris_RN101", "etris_ViT-B-16"])
def original(request):
    state = golden_state(request.param)
    return request.param, state, from_official(state)


@pytest.mark.parametrize("which", ["a", "c"])
@torch.no_grad()
def test_the_golden_outputs_of_the_original_are_met(original, which):
    """Logits to 3e-5 of the largest, sentence and word features to 1e-5, map means to 5e-6."""
    name, _, model = original
    images, tokens, expected = golden_inputs(name, which, 416)
    maps, words, sentence = model.encode(images, tokens)
    found = {"logits": model(images, tokens), "word": words, "state": sentence}
    bounds = {"logits": 3e-5, "word": 1e-5, "state": 1e-5}
    for i, x in enumerate(maps):
        found[f"vis{i}_mean"] = x.mean((2, 3))
        bounds[f"vis{i}_mean"] = 5e-6
    for key, bound in bounds.items():
        error = relative_error(found[key], expected[key])
        assert error <= bound, f"{key}: {error:.1e} of the largest"


@pytest.fixture(
    scope="module", params=[("barleria", 416), ("detris_base", 448)], ids=lambda p: p[0]
)
def another(request):
    """BarLeRIa and DETRIS as their files are: wrapped, beside an epoch, names prefixed."""
    name, size = request.param
    state = golden_state(name)
    file = {"epoch": 50, "state_dict": {f"module.{key}": x for key, x in state.items()}}
    return name, size, state, from_official(file)


@pytest.mark.parametrize("which", ["a", "c"])
@torch.no_grad()
def test_the_golden_outputs_of_the_other_two_originals_are_met(another, which):
    """Logits to 3e-5 of the largest; size, system and enlargement follow from the file."""
    name, size, _, model = another
    images, tokens, expected = golden_inputs(name, which, size)
    error = relative_error(model(images, tokens), expected["logits"])
    assert error <= 3e-5, f"logits: {error:.1e} of the largest"
    assert (model.size, model.max_tokens) == (size, 17)
    assert (model.align_corners, model.training) == (True, False)
    assert model.system == name.split("_")[0]


def test_the_way_back_of_the_other_two_ends_where_it_began(another):
    """The same names; BarLeRIa's flows have two, and it computes with the second one's numbers."""
    _, _, state, model = another
    back = to_official(model)
    assert set(back) == set(state)
    for name in state:
        loaded_last = name.replace(".transforms.", ".log_jacobians.")
        assert torch.equal(back[name], state[loaded_last]), name


def small_of(system, **options):
    """What the originals would have saved, in small, under their names."""
    clip = build_clip(init_by_name(CLIP(VIT).state_dict()))
    if system == "barleria":
        return to_official(build_barleria(clip, 64, 17, width=24, released=True, **options))
    dino = DINO(DinoConfig(width=96, layers=6, patch_size=16, image_size=64))
    blocks = {"aligners": (1,), "adapters": (1,), "width": 32, "text_rank": 16}
    return to_official(build_detris(clip, dino, 64, 17, released=True, **{**blocks, **options}))


def test_a_published_file_is_read_with_as_many_tokens_as_it_was_trained_with(tmp_path):
    """17 unless told; 22 for RefCOCOg's; never more than the frozen CLIP reads, 20 here."""
    path = tmp_path / "best_model.pth"
    torch.save(small_of("barleria"), path)
    assert load_checkpoint(path).max_tokens == 17
    assert load_checkpoint(path, max_tokens=20).max_tokens == 20
    with pytest.raises(UserError, match="--words 22: choose 3 to 20"):
        load_checkpoint(path, max_tokens=22)


def wrong_versions(state, name):
    """The state dict without `name`, with an unknown tensor, and with `name` in another shape."""
    return [
        {key: x for key, x in state.items() if key != name},
        {**state, "neck.zzz": torch.zeros(1)},
        {**state, name: torch.zeros(1)},
    ]


@pytest.mark.parametrize("system", ["barleria", "detris"])
def test_a_wrong_file_of_the_other_two_is_named_as_theirs(system):
    """One tensor less, one more, one of another shape, and one that sizes are read from."""
    state = small_of(system)
    title = {"barleria": "BarLeRIa", "detris": "DETRIS"}[system]
    problem = "1 tensors (missing|unknown|of another shape), neck"
    for wrong in wrong_versions(state, "neck.aggr.0.weight"):
        with pytest.raises(UserError, match=f"original {title}: {problem}"):
            from_official(wrong)
    convs = {"barleria": "backbone.visual.conv1.weight", "detris": "dinov2.patch_embed.proj.weight"}
    conv = convs[system]
    without_conv = {name: x for name, x in state.items() if name != conv}
    with pytest.raises(UserError, match=f"original {title}: .*{conv.split('.', 1)[1]} is missing"):
        from_official(without_conv)


@torch.no_grad()
def test_other_configurations_are_read_off_the_file():
    """DETRIS: any blocks, ranks and none at all.

    BarLeRIa: without its side network; both ways has no original.
    """
    blocks = {"aligners": (1, 2, 4), "adapters": (0,), "width": 48, "text_rank": 16}
    model = from_official(small_of("detris", **blocks), size=64)
    assert list(model.aligners) == ["1", "2", "4"]
    assert list(model.adapters) == ["0"]
    assert model.size == 64
    assert model.aligners["1"].down.out_features == 48
    assert model.adapters["0"].down.out_features == 16
    bare = from_official(small_of("detris", aligners=(), adapters=()), size=64)
    assert len(bare.aligners) == len(bare.adapters) == 0
    local = from_official(small_of("barleria", global_prior=False))
    assert local.side is None
    assert local.size == 64
    assert not from_official(small_of("barleria")).side.over_batch
    with pytest.raises(UserError, match="prompt_t.* the original BarLeRIa has no such part"):
        small_of("barleria", both_ways=True)


def test_the_way_back_gives_the_same_tensors_under_the_same_names(original):
    _, state, model = original
    back = to_official(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_wrapped_and_prefixed_files_load_directly(original, tmp_path):
    """The original's files: state_dict beside epoch and optimizer, names prefixed module."""
    _, state, model = original
    file = {
        "epoch": 50,
        "best_iou": np.float64(0.7),
        "state_dict": {f"module.{name}": x for name, x in state.items()},
    }
    torch.save(file, tmp_path / "best_model.pth")
    loaded = load_checkpoint(tmp_path / "best_model.pth").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(original):
    _, state, _ = original
    for wrong in wrong_versions(state, "neck.aggr.0.weight"):
        with pytest.raises(UserError, match="1 tensors (missing|unknown|of another shape), neck"):
            from_official(wrong)


def small_of_etris():
    """A ResNet CLIP of width 8 in the original's wiring."""
    clip = build_clip(init_by_name(CLIP(RESNET).state_dict()))
    return to_official(build_etris(clip, 416, 17, released=True))


@pytest.mark.parametrize("system", ["etris", "barleria", "detris"])
def test_evaluate_and_predict_take_an_official_file_as_it_is(system, tmp_path):
    """python evaluate.py best_model.pth …, python predict.py best_model.pth …: no conversion."""
    state = small_of_etris() if system == "etris" else small_of(system)
    path = tmp_path / "best_model.pth"
    torch.save({"state_dict": state, "epoch": 1}, path)
    json_path = tmp_path / "result.json"
    command = [str(path), "--dataset", "scenes", "--limit", "2", "--json", str(json_path)]
    evaluate.main(command)
    assert json.loads(json_path.read_text())["refs"] == 2
    image = tmp_path / "image.png"
    mask = tmp_path / "mask.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(image)
    command = [str(path), "--image", str(image), "--text", "left dog"]
    predict.main([*command, "--out", str(tmp_path / "out.png"), "--mask", str(mask)])
    assert Image.open(mask).convert("L").size == (30, 20)


@torch.no_grad()
def test_rn50_goes_to_the_originals_names_and_back():
    """RN50, whose joint space is 1024 wide, has no golden outputs: equal logits after the trip."""
    model = build_etris(load_clip("RN50", "random"), 64, 17, released=True).eval()
    again = from_official({"state_dict": to_official(model)}, size=64)
    images = torch.randn(1, 3, 64, 64)
    tokens = tokenize("the man in red", 17)
    assert torch.equal(model(images, tokens), again(images, tokens))
    assert again.align_corners


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


HOSTILE = ["a pickle with code", "cut off", "empty", "another version", "something else"]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_that_is_none_is_refused_and_nothing_in_it_runs(case, tmp_path):
    path = tmp_path / "x.pt"
    if case == "a pickle with code":
        attack = Attack(tmp_path / "ran")
        torch.save({"version": 1, "config": {}, "tuned": attack}, path)
    elif case == "cut off":
        torch.save({"version": 1}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "another version":
        torch.save({"version": 99, "config": {}, "tuned": {}}, path)
    else:
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="x.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
