"""14. official.py: the original's checkpoints compute here what they compute there, and files are read safely."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_model import UserError
from official import from_official, load_checkpoint, to_official

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
        if leaf == "positional_embedding" or "token_embedding" in name:
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
