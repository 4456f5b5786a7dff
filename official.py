"""14. Checkpoint files → models: our own (tuned tensors only) and those the original ETRIS published, and the way back.

The original saves its whole state dict, frozen CLIP included, under its own names. One function says what each of our
tensors is called there; reading and writing both go through it, so nothing can be left over or made up.
"""

import re
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_model import CLIP, Size, UserError
from etris import ETRIS, assemble, build

VERSION = 1  # of our own checkpoints' layout
SCALAR = np.float64(0).__reduce__()[0]  # numpy renamed its home: files written before have the old name
NUMBERS = [np.dtype, type(np.dtype("f8")), SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]

RENAMES = [  # ours → the original's, tried in order on the whole name
    (r"^clip\.", "backbone."),
    (r"^connect\.", "backbone.visual.attnpool.connect."),
    (r"^bridger\.(\d)\.interact_([vt])\.cross_attn\.", r"bridger.fusion_\2.\1.multihead_attn."),
    (r"^bridger\.(\d)\.interact_([vt])\.", r"bridger.fusion_\2.\1."),
    (r"^bridger\.(\d)\.(zoom_in|zoom_out)\.", r"bridger.\2.\1."),
    (r"^bridger\.(\d)\.linear_in\.", r"bridger.linear1.\1."),
    (r"^bridger\.(\d)\.linear_out\.", r"bridger.linear2.\1."),
    (r"^hierarchical\.sentence\.", "neck.txt_proj."),
    (r"^hierarchical\.merge\.", "neck.aggr."),
    (r"^hierarchical\.coordinates\.0\.", "neck.coordconv.0.conv1."),
    (r"^hierarchical\.coordinates\.1\.", "neck.coordconv.1."),
    (r"^global_\.layers\.(\d)\.cross_attn\.", r"decoder.layers.\1.multihead_attn."),
    (r"^global_\.layers\.(\d)\.(self|cross)_norm\.", r"decoder.layers.\1.\2_attn_norm."),
    (r"^global_\.", "decoder."),
    (r"^projector\.", "proj."),
]


def original_name(name: str, vit: bool, stages: list[str]) -> str:
    """What the original ETRIS calls our tensor `name`. stages: the bridges there are, in order."""
    if match := re.match(r"hierarchical\.(gates|project)\.(\d)\.(.*)", name):
        number, rest = int(match[2]) + 3, match[3]  # it counts layer2, layer3, layer4 as features 3, 4, 5
        return f"neck.fusion{number}.multihead_attn.{rest}" if match[1] == "gates" else f"neck.f{number}_proj.{rest}"
    if match := re.match(r"bridger\.(\d)\.norm_([vt])\.(.*)", name):
        return f"bridger.ln_{match[2]}.{stages.index(match[1]) - 1}.{match[3]}"
    if not vit:  # a ResNet's zoom layers are bare convolutions there, one-element sequences here
        name = re.sub(r"^(bridger\.\d\.zoom_(?:in|out))\.0\.", r"\1.", name)
    for ours, theirs in RENAMES:
        new, hit = re.subn(ours, theirs, name)
        if hit:
            return new
    raise KeyError(name)


def names(model: ETRIS) -> dict[str, str]:
    """Our name → the original's, for every tensor of the model."""
    vit, stages = model.clip.size.patch is not None, list(model.bridger)
    return {name: original_name(name, vit, stages) for name in model.state_dict()}


def unwrap(file: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: out of `state_dict` where wrapped, without DataParallel's `module.`."""
    state = file.get("state_dict", file)
    return {name.removeprefix("module."): x for name, x in state.items()}


def is_official(file) -> bool:
    """Whether a loaded file looks like a checkpoint of the original ETRIS."""
    return isinstance(file, dict) and any(n.startswith("backbone.") for n in unwrap(file) if isinstance(n, str))


def from_official(file: dict, size: int = 416, words: int = 17, heads: int | None = None) -> ETRIS:
    """A checkpoint of the original ETRIS, wrapped or bare, prefixed or not → the model, in eval mode, plain path.

    size: the picture side it was trained at; a ViT's positions say it themselves. UserError names what is missing,
    unknown or of another shape.
    """
    state = unwrap(file)
    clip_state = {n.removeprefix("backbone."): x.float() for n, x in state.items() if n.startswith("backbone.")}
    connect = {n: clip_state.pop(n) for n in list(clip_state) if "connect" in n}
    try:
        clip = CLIP(Size.of(clip_state)).requires_grad_(False)
    except KeyError as error:
        raise UserError(f"not a checkpoint of the original ETRIS: backbone.{error.args[0]} is missing") from error
    width = state["bridger.linear1.0.weight"].shape[0] if "bridger.linear1.0.weight" in state else 64
    stages = sorted({int(n.split(".")[2]) for n in state if n.startswith("bridger.linear1.")})
    size = clip.size.picture if clip.size.patch else size
    model = assemble(clip, size, words, width=width, heads=heads, stages=stages, released=True)
    if clip.size.patch is None and not connect:
        raise UserError("not a checkpoint of the original ETRIS: backbone.visual.attnpool.connect is missing")
    return fill(model, state).eval()


def fill(model: ETRIS, state: dict) -> ETRIS:
    """Copy every tensor by its original name; UserError where names or shapes do not agree exactly."""
    ours, table = model.state_dict(), names(model)
    missing, unknown = set(table.values()) - set(state), set(state) - set(table.values())
    shapes = [t for n, t in table.items() if t in state and state[t].shape != ours[n].shape]
    for kind, wrong in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if wrong:
            raise UserError(f"not a checkpoint of the original ETRIS: {len(wrong)} tensors {kind}, {min(wrong)} first")
    model.load_state_dict({n: state[t] for n, t in table.items()}, strict=True)
    return model


def to_official(model: ETRIS) -> dict[str, Tensor]:
    """The model's tensors under the original's names: what `from_official` reads, and the original code too."""
    state = model.state_dict()
    return {theirs: state[ours] for ours, theirs in names(model).items()}


# ---------------------------------------------------------------------------------------------------- files
def read_weights(path) -> dict:
    """A TorchScript archive or a plain state dict → CLIP's tensors under OpenAI's names, in fp32.

    Our own tiny files hold only the token rows that occur in pre-training; the rest are drawn from a fixed seed.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: give another --weights FILE")
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        archive = any(name.endswith("constants.pkl") for name in names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated, and the only reader of OpenAI's archives
            load = torch.jit.load if archive else partial(torch.load, weights_only=True)
            state = load(str(path), map_location="cpu")
        state = dict(state.state_dict() if archive else state)
        rows = state.pop("token_rows", None)
        skip = ("input_resolution", "context_length", "vocab_size")
        state = {name: x.float() if x.is_floating_point() else x for name, x in state.items() if name not in skip}
    except Exception as error:  # torch raises a dozen kinds here, pickle more: all mean the same to the user
        raise UserError(f"{path}: no CLIP weights that can be read safely ({type(error).__name__}): give another "
                        "--weights FILE, OpenAI's archive or a plain state dict") from error  # fmt: skip
    if rows is not None:
        known = state["token_embedding.weight"]
        drawn = torch.randn(49408, known.shape[1], generator=torch.Generator().manual_seed(0)) * known.std()
        state["token_embedding.weight"] = drawn.index_copy(0, rows, known)
    return state


def read_checkpoint(path) -> dict:
    """A checkpoint file's dict, read without running anything in it; UserError where it is none, or of another version.

    The original's files hold numbers of numpy's beside the tensors; those few types are let through by name.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint: train one with `python train.py --out DIR`, it is DIR/best.pt")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, cut off, hostile: torch and pickle raise a dozen kinds
        reason = f"no checkpoint that can be read safely ({type(error).__name__})"
        raise UserError(f"{path}: {reason}: give another file") from None
    if not isinstance(file, dict) or not (is_official(file) or {"version", "config", "tuned"} <= set(file)):
        raise UserError(f"{path}: holds no ETRIS checkpoint, ours or the original's: give another file")
    if not is_official(file) and file["version"] != VERSION:
        raise UserError(f"{path}: checkpoint version {file['version']}, this code reads {VERSION}: train it again")
    return file


def restore_tuned(model: ETRIS, file: dict, path) -> ETRIS:
    """Copy a checkpoint's tuned tensors into the model; UserError where backbone, names or shapes do not agree."""
    theirs, ours = file["identity"], model.frozen.identity
    if theirs["sha256"] != ours["sha256"]:
        raise UserError(f"{path}: was tuned on a frozen {theirs['name']} {theirs['sha256'][:12]}…, this one is "
                        f"{ours['name']} {ours['sha256'][:12]}…: give its --weights FILE")  # fmt: skip
    tuned, want = file["tuned"], dict(model.tuned())
    wrong = set(tuned) ^ set(want) or {n for n in tuned if tuned[n].shape != want[n].shape}
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit this model, {min(wrong)} first: give another file")
    model.load_state_dict(tuned, strict=False)
    return model


def load_checkpoint(path, weights=None, device="cpu") -> ETRIS:
    """A checkpoint file, ours or the original's → the model in eval mode on `device`.

    Ours holds the tuned tensors only: the frozen CLIP comes from `weights`, the shipped file, the cache or the network,
    and must be the one it was tuned on (SHA-256).
    """
    file = read_checkpoint(path)
    if is_official(file):
        return from_official(file).to(device)
    config = dict(file["config"])
    model = build(**config | ({"weights": str(weights)} if weights else {}))
    size, source = sum(x.numel() for x in file["tuned"].values()), model.frozen.identity["weights"]
    print(f"{Path(path).name}: {size:,} tuned numbers; the frozen {config['backbone']} comes from {source}")
    return restore_tuned(model, file, path).eval().to(device)


def pick_device(wish=None) -> tuple[torch.device, str]:
    """The device asked for, or the best there is, and why; UserError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish in (None, "auto"):
        name = next(name for name, usable in there.items() if usable)
        return torch.device(name), "the best there is; --device chooses another"
    if not there.get(wish):
        raise UserError(f"--device {wish}: not there; choose {' or '.join(n for n, usable in there.items() if usable)}")
    return torch.device(wish), "as asked"


def pick_dtype(device, wish):
    """bf16 where the device has it, else fp16 with a scaler, fp32 on a CPU → dtype and the reason."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    if wish != "auto":
        return named[wish], f"--amp {wish}"
    if device.type != "cuda":
        return torch.float32, f"a {device.type} gains nothing sure from less"
    if torch.cuda.is_bf16_supported():
        return torch.bfloat16, "this GPU has bf16, which needs no scaler"
    return torch.float16, "this GPU has no bf16; the loss is scaled"
