"""Presets by system and backbone, as plain rows. The command line overrides every value.

A row of an official backbone is what the authors' papers and released configurations say
(ETRIS section 4.2); CLIPs that they did not train have RN101's or ViT-B-16's, at a size that fits.
A row of a tiny backbone is minutes on two CPU cores, `small` nearly two hours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The settings of a training run that a backbone decides."""

    size: int  # side of the square the model sees, in pixels
    epochs: int
    batch_size: int
    lr: float  # of the decoder
    bridge_lr: float  # of the Bridger
    schedule: str  # a key of SCHEDULE_DROPS, or "cosine"
    width: int  # of the Bridger; of BarLeRIa's side network; rank of DETRIS' aligners
    dropout: float = 0.1
    beta2: float = 0.999  # of Adam


def etris(size=416, bridge_lr=1e-4):
    """Section 4.2: 50 epochs of 32, Adam at 1e-4, a tenth of it after epoch 35."""
    return Preset(
        size=size, epochs=50, batch_size=32, lr=1e-4, bridge_lr=bridge_lr, schedule="step", width=64
    )


def tiny(size, epochs, batch_size, lr, width):
    """Ours, chosen on val (docs/results.md): a cosine, no dropout, β₂ 0.98."""
    return Preset(
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        bridge_lr=lr,
        schedule="cosine",
        width=width,
        dropout=0.0,
        beta2=0.98,
    )


def detris(epochs, schedule, width):
    """DETRIS' released configurations."""
    return Preset(
        size=448,
        epochs=epochs,
        batch_size=32,
        lr=1e-4,
        bridge_lr=1e-4,
        schedule=schedule,
        width=width,
    )


ETRIS_PRESETS = {
    "RN50": etris(),
    "RN101": etris(),
    "RN50x4": etris(),
    "RN50x16": etris(),
    "RN50x64": etris(),
    "ViT-B-32": etris(bridge_lr=1e-3),
    "ViT-B-16": etris(bridge_lr=1e-3),
    "ViT-L-14": etris(size=420, bridge_lr=1e-3),  # 14 does not divide 416
    "ViT-L-14-336px": etris(size=420, bridge_lr=1e-3),
    "tiny": tiny(size=128, epochs=9, batch_size=32, lr=1.2e-3, width=32),
    "small": tiny(size=192, epochs=24, batch_size=32, lr=1.2e-3, width=32),
    "tiny-vit": tiny(size=96, epochs=9, batch_size=32, lr=1.2e-3, width=32),
}
BARLERIA_PRESETS = {
    "ViT-B-16": Preset(
        size=416,
        epochs=50,
        batch_size=32,
        lr=1e-4,
        bridge_lr=1e-4,
        schedule="step",
        width=144,
    ),
    "tiny-vit": tiny(size=96, epochs=3, batch_size=16, lr=1.5e-3, width=48),
}
DETRIS_PRESETS = {
    "tiny-dino": tiny(size=96, epochs=3, batch_size=16, lr=1.5e-3, width=32),
    "dinov2-base": detris(epochs=65, schedule="two-step", width=128),
    "dinov2-large": detris(epochs=50, schedule="step", width=128),
    "dinov2-large-mixed": detris(epochs=50, schedule="step", width=384),
}
PRESETS = {"etris": ETRIS_PRESETS, "barleria": BARLERIA_PRESETS, "detris": DETRIS_PRESETS}
# toy/pretrain.py makes these, weights/ ships them; all others are official
OWN_BACKBONES = ("tiny", "small", "tiny-vit", "tiny-dino")
DEFAULT_BACKBONES = {"etris": "tiny", "barleria": "tiny-vit", "detris": "tiny-dino"}

# Where the learning rate falls to a tenth, as shares of the run: ETRIS (section 4.2), DETRIS base
SCHEDULE_DROPS = {"step": (35 / 50,), "two-step": (35 / 65, 55 / 65)}

# Tokens per sentence, start and end included: ETRIS section 4.2, and the released configurations
# of the others; 17 for every other data set. Of gRefCOCO none has one: 22 is our choice
MAX_TOKENS = {
    "etris": {"refcocog-umd": 22, "refcocog-google": 22, "scenes-g": 22, "grefcoco": 22},
    "barleria": {"grefcoco": 22},
    "detris": {"refcocog-umd": 22, "scenes-g": 22, "grefcoco": 22},
}

# Objects to evaluate of drawn scenes, whose number has no natural limit
SCENE_LIMITS = {"val": 200, "test": 500}

# The split on which a finished run is tested; "test" for every other data set
TEST_SPLITS = {
    "refcoco": "testA",
    "refcoco+": "testA",
    "refcocog-google": "val",
    "grefcoco": "testA",
}

# Pixels below which a prediction says "nothing" (gIoU, cIoU, N-acc, T-acc), of the data sets with
# sentences that fit nothing: 50 of a photograph, as published; of a drawn scene the same
NOTHING_BELOW = {"grefcoco": 50, "scenes-any": 50}
