"""methods/arms.py: in each arm, what may not cross does not, and what may cross does."""

import pytest
import torch

from checkpoint import build_model
from methods.arms import ARMS, ArmBridge
from utils.common import UserError

# arm: (words change Δv, image changes Δt, Δv is written, Δt is written)
CROSSES = {
    "mute": (False, False, True, True),
    "text-only": (False, False, False, True),
    "image-only": (False, False, True, False),
    "text-to-image": (True, False, True, True),
    "image-to-text": (False, True, True, True),
}


def arm_model(arm, backbone="tiny"):
    torch.manual_seed(0)
    options = {"weights": "random", "size": 64, "width": 32, "dropout": 0.0}
    return build_model(backbone, tuning=f"bridger+{arm}", **options).eval()


def deltas(model, stage, images, tokens):
    """What a stage's bridge adds: Δv and Δt."""
    found = model.activations(images, tokens)
    delta_v = found[f"visual{stage}.after"] - found[f"visual{stage}.before"]
    return delta_v, found[f"text{stage}.after"] - found[f"text{stage}.before"]


@pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
@pytest.mark.parametrize("arm", CROSSES)
def test_what_may_not_cross_does_not(arm, backbone):
    """The first bridge: with another sentence Δv changes, or not; with another image, Δt."""
    model = arm_model(arm, backbone)
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[49406, 736, 49407, 0], [49406, 320, 539, 49407]])
    words_reach, image_reaches, image_writes, text_writes = CROSSES[arm]
    delta_v, delta_t = deltas(model, 0, images, tokens)
    assert bool(delta_v.abs().max() > 0) == image_writes
    assert bool(delta_t.abs().max() > 0) == text_writes
    with_other_words, _ = deltas(model, 0, images, tokens.flip(0))
    _, with_other_image = deltas(model, 0, images.flip(0), tokens)
    assert torch.equal(with_other_words, delta_v) != words_reach
    assert torch.equal(with_other_image, delta_t) != image_reaches


@pytest.mark.parametrize("arm", ["mute", "text-to-image", "image-to-text"])
def test_arms_that_write_both_streams_have_etris_own_parameters(arm):
    model = arm_model(arm)
    etris = arm_model("no-ga")  # with plain bridges
    count = sum(p.numel() for p in etris.bridger.parameters())
    assert sum(p.numel() for p in model.bridger.parameters()) == count
    assert all(isinstance(bridge, ArmBridge) for bridge in model.bridger.values())


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_of_an_arm_learns(arm):
    """Nothing is left over: each one gets a gradient."""
    model = arm_model(arm)
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[49406, 736, 49407, 0], [49406, 320, 539, 49407]])
    model(images, tokens).square().sum().backward()
    assert [name for name, p in model.bridger.named_parameters() if p.grad is None] == []


def test_text_only_needs_no_gradient_through_the_image_encoder():
    model = arm_model("text-only")
    seen = []
    stage = model.clip.visual.layer3
    stage.register_forward_hook(lambda module, inputs, out: seen.append(out.requires_grad))
    tokens = torch.tensor([[49406, 736, 49407, 0]])
    model(torch.randn(1, 3, 64, 64), tokens)
    assert seen == [False]


def test_the_config_of_an_arm_builds_its_twin():
    model = arm_model("text-only")
    twin = build_model(**model.config)
    twin.load_state_dict(model.state_dict())
    assert twin.config["tuning"] == "bridger+text-only"


@pytest.mark.parametrize("tuning", ["mute", "bridger+mute+text-only"])
def test_an_arm_needs_bridges_and_no_second_arm(tuning):
    with pytest.raises(UserError, match="takes exactly one of mute"):
        build_model("tiny", weights="random", size=64, tuning=tuning)
