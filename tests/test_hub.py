"""What hubconf.py promises: torch.hub loads the same models, from this folder, without network."""

import importlib.util

import pytest
import torch

import hubconf
from checkpoint import load_checkpoint
from clip_model import load_clip
from utils.common import ROOT, UserError
from utils.tokenizer import tokenize

CHECKPOINT = ROOT / "weights" / "etris-tiny.pt"


def hub(entry, *args, **options):
    return torch.hub.load(str(ROOT), entry, *args, source="local", **options)


@torch.no_grad()
def test_hub_loads_a_checkpoint_as_load_checkpoint_does():
    model = hub("etris", checkpoint=CHECKPOINT, device="cpu")
    plain = load_checkpoint(CHECKPOINT)
    images = torch.randn(1, 3, model.size, model.size, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["the red circle"], model.max_tokens)
    assert not model.training
    torch.testing.assert_close(model(images, tokens), plain(images, tokens), atol=1e-4, rtol=1e-4)


def test_without_a_checkpoint_hub_loads_the_shipped_one():
    model = hub("etris", device="cpu")
    shipped = load_checkpoint(CHECKPOINT).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, shipped[name]), name


def test_hub_loads_clip():
    clip = hub("clip", "tiny")
    tokens = tokenize(["the red circle"], clip.config.context_length)
    torch.testing.assert_close(clip.encode_text(tokens), load_clip("tiny").encode_text(tokens))


def test_hub_has_two_entries_and_explains_them():
    entries = {name for name, value in vars(hubconf).items() if callable(value)}
    assert entries == {"etris", "clip"}
    for entry in entries:
        assert "in evaluation mode" in getattr(hubconf, entry).__doc__


def test_a_checkpoint_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="none.pt: no such checkpoint"):
        hub("etris", checkpoint="none.pt")


def test_the_named_dependencies_are_what_requirements_ask_for():
    names = {"PIL": "pillow"}
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for module in hubconf.dependencies:
        assert importlib.util.find_spec(module), module
        assert f"\n{names.get(module, module)}>=" in required, module
