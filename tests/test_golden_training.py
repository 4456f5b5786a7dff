"""The original's training steps (tests/golden/README.md): it learns here as it learns there.

Float64, dropout off. The bounds are those of the golden files; found were 5e-14 for the loss,
6e-14 for gradients and 2e-12 for steps.
"""

import json

import numpy as np
import pytest
import torch

import train
from clip_model import CLIP, CLIPConfig
from etris import build_etris
from fast import set_fast
from methods.published import load_by_name, original_name, strip_prefix
from tests.golden import inputs
from utils.common import ROOT

GOLDEN = ROOT / "tests" / "golden"
POSITIONS = "backbone.visual.positional_embedding"
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
PATHS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


class Original:
    """Numbers of the original's run, and our released model where that run began."""

    def __init__(self, backbone):
        self.backbone = backbone
        self.golden = np.load(GOLDEN / f"train_etris_{backbone}_a.npz")
        self.side = int(self.golden["side"])
        shapes = json.loads((GOLDEN / f"etris_{backbone}.shapes.json").read_text())
        if POSITIONS in shapes:  # a ViT's positions have the grid of the run's images
            shapes[POSITIONS][0] = (self.side // 16) ** 2 + 1
        state = {name: inputs.fill(name, tuple(shape)) for name, shape in shapes.items()}
        config = CLIPConfig.from_state_dict(strip_prefix(state, "backbone.", without="connect"))
        clip = CLIP(config).requires_grad_(False)
        max_tokens = int(self.golden["words"])
        self.model = build_etris(clip, self.side, max_tokens, released=True, dropout=0.0)
        load_by_name(self.model, state)
        self.model.double()
        self.start = {
            name: x.detach().clone() for name, x in self.model.trainable_state_dict().items()
        }
        self.batch = {
            "image": inputs.images("a", self.side).double(),
            "tokens": torch.from_numpy(self.golden["tokens"]).long(),
            "mask": torch.from_numpy(self.golden["mask"])[:, None].double() / 255,
        }

    def begin(self, fast, training):
        """The model as the run began. training: the batch's statistics, but of what is frozen."""
        self.model.load_state_dict(self.start, strict=False)
        self.model.zero_grad()
        set_fast(self.model, fast).train(training)
        if self.model.connect is not None:
            self.model.connect.eval()
        return self.model

    def by_name(self, tensors):
        """The tensors of (our name, tensor) pairs under the original's names."""
        return {original_name(name, self.model): x.detach() for name, x in tensors}

    def trained(self):
        """Trained tensors under the original's names."""
        return self.by_name((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def gradients(self):
        """Their gradients, under the same names."""
        named = self.model.named_parameters()
        return self.by_name((n, p.grad) for n, p in named if p.grad is not None)

    def check(self, kind, tensors, bound=1e-6):
        """Norm, largest and first four numbers of every tensor, to `bound` of the largest."""
        names = self.golden["names"].tolist()
        assert tensors.keys() == set(names)
        for i, name in enumerate(names):
            x = tensors[name].flatten()
            norm = self.golden[f"{kind}_norm"][i]
            largest = self.golden[f"{kind}_max"][i]
            first = self.golden[f"{kind}_first4"][i]
            assert x.norm().item() == pytest.approx(norm, rel=bound, abs=0), name
            assert x.abs().max().item() == pytest.approx(largest, rel=bound, abs=0), name
            assert x[:4].tolist() == pytest.approx(first, rel=0, abs=bound * largest), name


class GradientsAlone:
    """In the optimizer's place: gradients stay, nothing moves."""

    def step(self):
        pass

    def zero_grad(self, set_to_none):
        pass


@pytest.fixture(scope="module", params=["RN101", "ViT-B-16"])
def original(request):
    return Original(request.param)


@pytest.mark.parametrize("backbone", ["RN101", "ViT-B-16"])
def test_the_masks_are_those_of_the_originals_run(backbone):
    golden = np.load(GOLDEN / f"train_etris_{backbone}_a.npz")
    assert np.array_equal(inputs.masks("a", int(golden["side"])), golden["mask"])


@PATHS
def test_loss_and_gradients_are_the_originals(original, fast):
    """Every BatchNorm by its running statistics: loss to 1e-7, all gradients to 1e-6."""
    model = original.begin(fast, training=False)
    loss = train.train_step(model, original.batch, GradientsAlone(), NO_SCALER, torch.float32)
    assert loss == pytest.approx(original.golden["eval_loss"].item(), abs=1e-7)
    original.check("eval_grad", original.gradients())


@pytest.mark.parametrize(
    "original, fast, steps",
    [
        pytest.param("RN101", False, 1, id="RN101-plain"),
        pytest.param("RN101", True, 5, id="RN101-fast"),
        pytest.param("ViT-B-16", False, 5, id="ViT-B-16-plain"),
        pytest.param("ViT-B-16", True, 1, id="ViT-B-16-fast"),
    ],
    indirect=["original"],
)
def test_steps_of_adam_are_the_originals(original, fast, steps):
    """Losses, the first gradients, BatchNorm's statistics, and where the weights have gone after
    two and five steps: to 1e-6. train.py's own step, groups and optimizer, at 1e-4 for all.

    The other path of each backbone makes the first step only, for five take minutes.
    """
    golden = original.golden
    model = original.begin(fast, training=True)
    start = {name: x.clone() for name, x in original.trained().items()}
    args = train.arguments(["--backbone", original.backbone])
    args.bridge_lr = args.lr  # the paper's rate for a ViT's Bridger is another (ledger 11)
    optimizer = train.make_optimizer(model, args, torch.device("cpu"))
    gradients = []
    losses = []

    def keep_gradients(optimizer, *_):
        gradients.append(original.gradients())

    optimizer.register_step_pre_hook(keep_gradients)
    for i in range(steps):
        losses.append(train.train_step(model, original.batch, optimizer, NO_SCALER, torch.float32))
        moved = {name: x - start[name] for name, x in original.trained().items()}
        if i == 0:
            assert losses[0] == pytest.approx(golden["head_loss"].item(), abs=1e-7)
            original.check("head_grad", gradients[0])
            check_statistics(original)
        if i == 1:
            original.check("update2", moved)
    if steps == 5:
        original.check("update", moved)
    assert losses == pytest.approx(golden["losses"][:steps].tolist(), rel=1e-6)


def check_statistics(original):
    """The original's BatchNorms have moved, no others, and to where the original's have."""
    before = original.by_name(original.start.items())
    after = original.by_name(original.model.named_buffers())
    moved = {}
    for name, x in after.items():
        if "running" in name and name in before and not torch.equal(x, before[name]):
            moved[name] = x.norm().item()
    expected = dict(zip(original.golden["bn_names"], original.golden["bn_norm"], strict=True))
    assert moved == pytest.approx(expected, rel=1e-6)
