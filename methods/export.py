"""A trained model as one file that runs without this code: torch.export or ONNX (docs/deploy.md).

    python predict.py export runs/x/best.pt --out model.pt2

B pairs of an image and a sentence · S the image's side · L tokens · H W the logits' grid
"""

import importlib.util
import io
import logging
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from etris import Projector
from utils.common import UserError, check_writable
from utils.tokenizer import tokenize


def projector_without_groups(self, features, sentence):
    """Projector.forward without its grouped convolution: ONNX wants a fixed number of groups.

    Each of the nine cells of the sentence's kernel is a dot product at every position; `fold` adds
    them where they point.
    """
    kernel, bias = self.kernel(sentence)  # (B, D/2, 3, 3), (B,)
    x = self.vis(features)
    B, C, H, W = x.shape
    cells = kernel.flip(2, 3)
    cells = cells.flatten(2).mT  # (B, 9, D/2)
    dots = cells @ x.flatten(2)  # (B, 9, H·W)
    logits = F.fold(dots, (H, W), kernel_size=3, padding=1)  # (B, 1, H, W)
    return logits + bias[:, None, None, None]


@torch.no_grad()
def export_program(model) -> torch.export.ExportedProgram:
    """A model on its plain path as a program: images (B, 3, S, S), tokens (B, L) → logits.

    B, an image and a sentence each, is free; S and L are the model's own.
    """
    images = torch.zeros(2, 3, model.size, model.size)
    tokens = tokenize(["red", "the left one"], model.max_tokens)
    pairs = torch.export.Dim("pairs")
    projectors = [module for module in model.modules() if type(module) is Projector]
    for projector in projectors:
        projector.forward = types.MethodType(projector_without_groups, projector)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that attention weights are not kept is as wanted
            # strict: otherwise len(x) is taken for a constant
            return torch.export.export(
                model.eval(), (images, tokens), dynamic_shapes=({0: pairs}, {0: pairs}), strict=True
            )
    finally:
        for projector in projectors:
            del projector.forward


def program_bytes(program) -> bytes:
    """The content of a .pt2 file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_bytes(program) -> bytes:
    """The content of an .onnx file; its inputs are `images` and `tokens`, its output `logits`."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images", "tokens"],
            output_names=["logits"],
            verbose=False,
        )
    return converted.model_proto.SerializeToString()


def check_export(out):
    """UserError, before any work, where the file's ending, a package or the folder is wrong."""
    ending = Path(out).suffix.lower()
    if ending not in (".pt2", ".onnx"):
        raise UserError(f"--out {out}: name it .pt2 for torch.export, or .onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if ending == ".onnx" and missing:
        packages = " ".join(missing)
        raise UserError(f"--out {out}: needs `pip install {packages}`; .pt2 does without")
    check_writable(out)


def export_bytes(model, out) -> bytes:
    """The content of the file `out`, by its ending."""
    program = export_program(model)
    return onnx_bytes(program) if Path(out).suffix.lower() == ".onnx" else program_bytes(program)
