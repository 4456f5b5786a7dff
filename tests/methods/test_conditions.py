"""methods/conditions.py: what is taken from the decoder is gone, and the rest is as before."""

import pytest
import torch

from checkpoint import build_model
from experiments.probe import set_strength, tapped
from fast import set_fast
from methods.conditions import CONDITIONS
from utils.tokenizer import tokenize

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def condition_model(name, **options):
    torch.manual_seed(0)
    tuning = f"bridger+{name}" if name else "bridger"
    options = {"weights": "random", "size": 64, "width": 32, "dropout": 0.0, **options}
    return build_model("tiny", tuning=tuning, **options).eval()


@torch.no_grad()
def logits_of_two_sentences(model, strength):
    tokens = tokenize(["a red circle", "the star at the top"], model.max_tokens)
    with tapped(model) as taps:
        set_strength(taps, strength, strength)
        return model(IMAGES.expand(2, -1, -1, -1), tokens)


def test_without_language_the_sentence_comes_through_the_bridges_alone():
    """At strength 0 every sentence gets the same mask, at 1 another one."""
    model = condition_model("no-language")
    first, second = logits_of_two_sentences(model, 0)
    torch.testing.assert_close(first, second)
    first, second = logits_of_two_sentences(model, 1)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["no-words", "no-gates"])
def test_other_decoders_still_read_the_sentence(name):
    first, second = logits_of_two_sentences(condition_model(name), 0)
    assert not torch.allclose(first, second)


def test_no_words_no_attention_to_them():
    model = condition_model("no-words")
    tokens = tokenize(["a red circle"], model.max_tokens)
    names = model.activations(IMAGES, tokens)
    assert not any("global_alignment" in name and "cross_attn" in name for name in names)
    assert any("global_alignment" in name and "self_attn" in name for name in names)


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_parameter_of_a_condition_learns(name):
    """None is left behind that no mask depends on.

    Without language nobody reads the words' last Δt: what makes it stays, unused.
    """
    model = condition_model(name).train()
    tokens = tokenize(["a red circle"], model.max_tokens)
    model(IMAGES, tokens).square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if name == "no-language":
        idle = [
            n for n in idle if not n.startswith(("bridger.2.linear_out", "bridger.2.interact_t"))
        ]
    assert idle == []


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_fast_path_is_the_plain_one(name):
    model = condition_model(name)
    tokens = tokenize(["a red circle"], model.max_tokens)
    with torch.no_grad():
        expected = model(IMAGES, tokens)
        torch.testing.assert_close(set_fast(model)(IMAGES, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, factor", [("joins-3", 3), ("joins-10", 10)])
def test_joins_start_louder_and_nothing_else_changes(name, factor):
    usual = condition_model("").state_dict()
    for key, x in condition_model(name).state_dict().items():
        join = key.startswith("bridger.") and ("linear_out.weight" in key or "zoom_out.0" in key)
        torch.testing.assert_close(x, factor * usual[key] if join else usual[key])
