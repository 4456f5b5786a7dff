"""14. official.py: the original's checkpoints compute here what they compute there, and files are read safely."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import barleria
import detris
import evaluate
import predict
from clip_model import CLIP, Size, UserError, build_clip, fill_by_name, load_clip, tokenize
from etris import assemble, build
from official import from_official, load_checkpoint, restore_tuned, to_official

GOLDEN = Path(__file__).parent / "golden"


def fill(name, shape):
    """The golden weights: numbers that follow from a tensor's name alone (tests/golden/README.md)."""
    dice = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    x, leaf = np.asarray(dice.standard_normal(shape, dtype=np.float32)), name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(1)
    if leaf == "running_var":
        return torch.from_numpy(np.clip(1 + 0.1 * x, 0.5, 1.5).astype(np.float32))
    if leaf == "logit_scale":
        return torch.tensor(4.6052)
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        embeddings = ("positional_embedding", "pos_embed", "cls_token", "register_tokens", "mask_token")
        if leaf in embeddings or "token_embedding" in name:
            fan_in = shape[-1]
        if leaf in ("text_projection", "proj"):
            fan_in = shape[0]
        return torch.from_numpy(x * np.float32(fan_in**-0.5))
    return torch.from_numpy(((1 + 0.1 * x) if leaf == "weight" else 0.1 * x).astype(np.float32)).reshape(shape)


def golden_state(name):
    shapes = json.loads((GOLDEN / f"{name}.shapes.json").read_text())
    return {key: fill(key, tuple(shape)) for key, shape in shapes.items()}


@pytest.fixture(scope="module", params=["etris_RN101", "etris_ViT-B-16"])
def original(request):
    state = golden_state(request.param)
    return request.param, state, from_official(state)


@pytest.mark.parametrize("which", ["a", "c"])
@torch.no_grad()
def test_the_golden_outputs_of_the_original_are_met(original, which):
    """Logits to 3e-5 of the largest, sentence and word features to 1e-5, map means to 5e-6 (tests/golden)."""
    name, _, model = original
    expected = np.load(GOLDEN / f"{name}_{which}.npz")
    dice = np.random.Generator(np.random.PCG64(zlib.crc32(f"image-{which}".encode())))
    images = torch.from_numpy(dice.standard_normal((2, 3, 416, 416), dtype=np.float32))
    tokens = torch.from_numpy(expected["tokens"]).long()
    maps, words, sentence = model.encode(images, tokens)
    seen = {"logits": (model(images, tokens), 3e-5), "word": (words, 1e-5), "state": (sentence, 1e-5)}
    seen |= {f"vis{i}_mean": (x.mean((2, 3)), 5e-6) for i, x in enumerate(maps)}
    for key, (mine, bound) in seen.items():
        theirs = torch.from_numpy(expected[key])
        error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        assert error <= bound, f"{key}: {error:.1e} of the largest"


@pytest.fixture(scope="module", params=[("barleria", 416), ("detris_base", 448)], ids=lambda pair: pair[0])
def another(request):
    """BarLeRIa and DETRIS as their files are: wrapped, beside an epoch, names prefixed."""
    name, size = request.param
    state = golden_state(name)
    file = {"epoch": 50, "state_dict": {f"module.{n}": x for n, x in state.items()}}
    return name, size, state, from_official(file)


@pytest.mark.parametrize("which", ["a", "c"])
@torch.no_grad()
def test_the_golden_outputs_of_the_other_two_originals_are_met(another, which):
    """Logits to 3e-5 of the largest; size, system and enlargement follow from the file."""
    name, size, _, model = another
    expected = np.load(GOLDEN / f"{name}_{which}.npz")
    dice = np.random.Generator(np.random.PCG64(zlib.crc32(f"image-{which}".encode())))
    images = torch.from_numpy(dice.standard_normal((2, 3, size, size), dtype=np.float32))
    logits, theirs = model(images, torch.from_numpy(expected["tokens"]).long()), torch.from_numpy(expected["logits"])
    error = ((logits - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= 3e-5, f"logits: {error:.1e} of the largest"
    assert (model.size, model.words, model.align_corners, model.training) == (size, 17, True, False)
    assert model.system == name.split("_")[0]


def test_the_way_back_of_the_other_two_ends_where_it_began(another):
    """The same names; BarLeRIa's flows stand there twice, and it computes with the numbers under the second name."""
    _, _, state, model = another
    back = to_official(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[n], state[n.replace(".transforms.", ".log_jacobians.")]) for n in state)


def test_a_published_file_is_read_with_as_many_words_as_it_was_trained_with(tmp_path):
    """17 unless told; 22 for RefCOCOg's; never more than the frozen CLIP reads, 20 here."""
    path = tmp_path / "best_model.pth"
    torch.save(small_of("barleria"), path)
    assert [load_checkpoint(path, words=n).words for n in (None, 20)] == [17, 20]
    with pytest.raises(UserError, match="--words 22: choose 3 to 20"):
        load_checkpoint(path, words=22)


@pytest.mark.parametrize("system", ["barleria", "detris"])
def test_a_wrong_file_of_the_other_two_is_named_as_theirs(system):
    """One tensor less, one more, one of another shape, and one that sizes are read from."""
    state = small_of(system)
    title = {"barleria": "BarLeRIa", "detris": "DETRIS"}[system]
    first = "neck.aggr.0.weight"
    for wrong in ({n: x for n, x in state.items() if n != first}, state | {"neck.zzz": torch.zeros(1)},
                  state | {first: torch.zeros(1)}):  # fmt: skip
        with pytest.raises(UserError, match=f"original {title}: 1 tensors (missing|unknown|of another shape), neck"):
            from_official(wrong)
    conv = {"barleria": "backbone.visual.conv1.weight", "detris": "dinov2.patch_embed.proj.weight"}[system]
    with pytest.raises(UserError, match=f"original {title}: .*{conv.split('.', 1)[1]} is missing"):
        from_official({n: x for n, x in state.items() if n != conv})


def small_of(system, **options):
    """What the originals would have saved, in small, under their names."""
    clip = build_clip(fill_by_name(CLIP(Size(32, 64, 6, 64, 16, 64, 3, 20)).state_dict()))
    if system == "barleria":
        return to_official(barleria.assemble(clip, 64, 17, width=24, released=True, **options))
    dino = detris.DINO(detris.DinoSize(96, 6, 16, 64))
    where = {"aligners": (1,), "adapters": (1,), "width": 32, "text_rank": 16} | options
    return to_official(detris.assemble(clip, dino, 64, 17, released=True, **where))


@torch.no_grad()
def test_other_configurations_are_read_off_the_file():
    """DETRIS: any blocks, ranks and none at all. BarLeRIa: without its side network; both ways has no original."""
    where = {"aligners": (1, 2, 4), "adapters": (0,), "width": 48, "text_rank": 16}
    model = from_official(small_of("detris", **where), size=64)
    assert list(model.aligners) == ["1", "2", "4"] and list(model.adapters) == ["0"] and model.size == 64
    assert (model.aligners["1"].down.out_features, model.adapters["0"].down.out_features) == (48, 16)
    bare = from_official(small_of("detris", aligners=(), adapters=()), size=64)
    assert len(bare.aligners) == len(bare.adapters) == 0
    local = from_official(small_of("barleria", global_prior=False))
    assert local.side is None and local.size == 64 and not from_official(small_of("barleria")).side.over_batch
    with pytest.raises(UserError, match="prompt_t.* the original BarLeRIa has no such part"):
        small_of("barleria", both_ways=True)


def test_the_way_back_gives_the_same_tensors_under_the_same_names(original):
    _, state, model = original
    back = to_official(model)
    assert set(back) == set(state) and all(torch.equal(back[n], state[n]) for n in state)


def test_wrapped_and_prefixed_files_load_directly(original, tmp_path):
    """The original's files: state_dict beside epoch and optimizer, names prefixed module."""
    _, state, model = original
    file = {"epoch": 50, "best_iou": np.float64(0.7), "state_dict": {f"module.{n}": x for n, x in state.items()}}
    torch.save(file, tmp_path / "best_model.pth")
    loaded = load_checkpoint(tmp_path / "best_model.pth").state_dict()
    assert all(torch.equal(loaded[n], x) for n, x in model.state_dict().items())


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(original):
    _, state, _ = original
    first = "neck.aggr.0.weight"
    for wrong in ({n: x for n, x in state.items() if n != first}, state | {"neck.zzz": torch.zeros(1)},
                  state | {first: torch.zeros(1)}):  # fmt: skip
        with pytest.raises(UserError, match="1 tensors (missing|unknown|of another shape), neck"):
            from_official(wrong)


def small_official_file(path):
    """What the original would have saved, in small: a ResNet CLIP of width 8 in its wiring, under its names."""
    clip = CLIP(Size(32, 64, (1, 1, 1, 1), 8, None, 64, 3, 20))
    model = assemble(build_clip(fill_by_name(clip.state_dict())), 416, 17, released=True)
    torch.save({"state_dict": to_official(model), "epoch": 1}, path)
    return model.eval()


@pytest.mark.parametrize("system", ["etris", "barleria", "detris"])
def test_evaluate_and_predict_take_an_official_file_as_it_is(system, tmp_path, capsys):
    """python evaluate.py best_model.pth …, python predict.py best_model.pth …: no conversion in between."""
    if system == "etris":
        small_official_file(tmp_path / "best_model.pth")
    else:
        torch.save({"state_dict": small_of(system), "epoch": 1}, tmp_path / "best_model.pth")
    file = str(tmp_path / "best_model.pth")
    evaluate.main([file, "--dataset", "scenes", "--limit", "2", "--json", str(tmp_path / "j")])
    assert json.loads((tmp_path / "j").read_text())["refs"] == 2
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "x.png")
    names = {name: str(tmp_path / f"{name}.png") for name in ("x", "o", "m")}
    predict.main([file, "--image", names["x"], "--text", "left dog", "--out", names["o"], "--mask", names["m"]])
    assert Image.open(tmp_path / "m.png").convert("L").size == (30, 20)


@torch.no_grad()
def test_rn50_goes_to_the_originals_names_and_back():
    """RN50, whose joint space is 1024 wide, has no golden outputs: the same logits after the round trip."""
    model = assemble(load_clip("RN50", "random"), 64, 17, released=True).eval()
    again = from_official({"state_dict": to_official(model)}, size=64)
    images, tokens = torch.randn(1, 3, 64, 64), tokenize("the man in red", 17)
    assert torch.equal(model(images, tokens), again(images, tokens)) and again.align_corners


HOSTILE = {
    "a pickle with code": None,
    "cut off": None,
    "empty": None,
    "another version": {"version": 99, "config": {}, "tuned": {}},
    "something else": {"weights": torch.zeros(1)},
}


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_that_is_none_is_refused_and_nothing_in_it_runs(case, tmp_path):
    path = tmp_path / "x.pt"
    if case == "a pickle with code":
        torch.save({"version": 1, "config": {}, "tuned": Runs(tmp_path / "ran")}, path)
    elif case == "cut off":
        torch.save({"version": 1}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "empty":
        path.write_bytes(b"")
    else:
        torch.save(HOSTILE[case], path)
    with pytest.raises(UserError, match="x.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_frozen_clip_is_refused():
    """The tuned tensors fit, the backbone is not the one they were tuned on: SHA-256 tells."""
    ours, other = (build("tiny", 64, weights="random", seed=seed, width=32) for seed in (0, 1))
    file = {"tuned": dict(ours.tuned()), "identity": ours.frozen.identity}
    with pytest.raises(UserError, match="was tuned on a frozen tiny"):
        restore_tuned(other, file, "x.pt")
    restore_tuned(ours, file, "x.pt")
