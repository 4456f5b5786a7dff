"""Models for torch.hub: torch.hub.load(DIR or "OWNER/REPO", "etris" or "clip", …).

    model = torch.hub.load(".", "etris", source="local", checkpoint="runs/x/best.pt")

The calling program must have no modules of its own named `data`, `train` or `utils`.
"""

import clip_model  # as modules: torch.hub takes every function here for an entry
import predict
from utils.common import ROOT

dependencies = ["torch", "numpy", "PIL", "ftfy", "regex", "tqdm", "pycocotools"]


def etris(checkpoint=None, weights=None, device=None, max_tokens=None):
    """A trained model in evaluation mode: images (B, 3, S, S), tokens (B, L) → logits.

    checkpoint: a file of train.py, or a published one; without it the shipped tiny model, which
    knows drawn shapes only. weights: the frozen CLIP's file, where it is not in the cache.
    device: cpu, cuda or mps (the best available). max_tokens: where a sentence is cut.
    """
    checkpoint = checkpoint or ROOT / "weights" / "etris-tiny.pt"
    return predict.load(checkpoint, weights, device, max_tokens)


def clip(name="tiny", weights=None):
    """A frozen CLIP with `encode_image` and `encode_text`, in evaluation mode, on the CPU.

    name: tiny, small, tiny-vit, RN50, RN101, ViT-B-16 … (the official ones are downloaded once).
    weights: a file to read instead, or "random".
    """
    return clip_model.load_clip(name, weights)
