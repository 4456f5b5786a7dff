"""13. Checkpoint files → models: our own (tuned tensors only) and those of the three originals, and the way back.

ETRIS, BarLeRIa and DETRIS save whole state dicts, frozen parts included, under their own names. One function says what
each of our tensors is called there; reading and writing both go through it, so nothing is left over or made up.
"""

import re
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import barleria
import detris
from clip_model import CLIP, Size
from command import UserError
from data import blame
from etris import ETRIS, assemble
from tuning import build

VERSION = 1  # of our own checkpoints' layout
SCALAR = np.float64(0).__reduce__()[0]  # numpy renamed its home: files written before have the old name
NUMBERS = [np.dtype, type(np.dtype("f8")), SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]

ETRIS_NAMES = [  # ours → the original's, tried in order on the whole name
    (r"^clip\.", "backbone."),
    (r"^connect\.", "backbone.visual.attnpool.connect."),
    (r"^bridger\.(\d)\.interact_([vt])\.cross_attn\.", r"bridger.fusion_\2.\1.multihead_attn."),
    (r"^bridger\.(\d)\.interact_([vt])\.", r"bridger.fusion_\2.\1."),
    (r"^bridger\.(\d)\.(zoom_in|zoom_out)\.", r"bridger.\2.\1."),
    (r"^bridger\.(\d)\.linear_in\.", r"bridger.linear1.\1."),
    (r"^bridger\.(\d)\.linear_out\.", r"bridger.linear2.\1."),
]
BARLERIA_NAMES = [
    (r"^clip\.", "backbone."),
    (r"^prompt_v\.", "intertwiner.proj."),
    (r"^side_out\.", "side_linear."),
    (r"^side\.fusions\.(\d)\.", r"side_adapter_network.fusion_layers.layer_\1.input_proj."),
    (r"^side\.prompt\.", "side_adapter_network.proj."),
    (r"^side\.queries$", "side_adapter_network.query_embed"),
    (r"^side\.query_positions$", "side_adapter_network.query_pos_embed"),
    (r"^side\.positions$", "side_adapter_network.vit_model.pos_embed"),
    (r"^side\.patch\.", "side_adapter_network.vit_model.patch_embed.proj."),
    (r"^side\.blocks\.", "side_adapter_network.vit_model.blocks."),
    (r"^side\.feedback\.", "side_adapter_network.vit_model.decoders."),
]
ALIGNER_NAMES = [
    (r"^(\d+)\.down\.", r"\1.adapter.D_fc1."),
    (r"^(\d+)\.up\.", r"\1.adapter.D_fc2."),
    (r"^(\d+)\.branches\.branch(\d)\.", r"\1.adapter.dense_branch\2."),
    (r"^(\d+)\.(image|text|back)\.", r"\1.adapter.cross.\2_proj."),
    (r"^(\d+)\.cross_attn\.", r"\1.adapter.cross.multihead_attn."),
]
DETRIS_NAMES = [
    (r"^clip\.visual\.", "dinov2."),
    (r"^clip\.", "txt_backbone."),
    *((ours.replace("^", r"^aligners\."), f"dinov2.blocks.{theirs}") for ours, theirs in ALIGNER_NAMES),
    *((o.replace("^", r"^adapters\."), f"txt_backbone.transformer.resblocks.{t}") for o, t in ALIGNER_NAMES),
]
DECODER_NAMES = [  # the decoder all three share
    (r"^hierarchical\.sentence\.", "neck.txt_proj."),
    (r"^hierarchical\.merge\.", "neck.aggr."),
    (r"^hierarchical\.coordinates\.0\.", "neck.coordconv.0.conv1."),
    (r"^hierarchical\.coordinates\.1\.", "neck.coordconv.1."),
    (r"^global_\.layers\.(\d)\.cross_attn\.", r"decoder.layers.\1.multihead_attn."),
    (r"^global_\.layers\.(\d)\.(self|cross)_norm\.", r"decoder.layers.\1.\2_attn_norm."),
    (r"^global_\.", "decoder."),
    (r"^projector\.", "proj."),
]
NAMES = {"etris": ETRIS_NAMES, "barleria": BARLERIA_NAMES, "detris": DETRIS_NAMES}
TITLES = {"etris": "ETRIS", "barleria": "BarLeRIa", "detris": "DETRIS"}


def original_name(name: str, model: ETRIS) -> str:
    """What the original of `model` calls our tensor `name`."""
    if match := re.match(r"hierarchical\.(gates|project)\.(\d)\.(.*)", name):
        number, rest = int(match[2]) + 3, match[3]  # it counts layer2, layer3, layer4 as features 3, 4, 5
        return f"neck.fusion{number}.multihead_attn.{rest}" if match[1] == "gates" else f"neck.f{number}_proj.{rest}"
    if match := re.match(r"bridger\.(\d)\.norm_([vt])\.(.*)", name):  # it counts them from the second bridge on
        return f"bridger.ln_{match[2]}.{list(model.bridger).index(match[1]) - 1}.{match[3]}"
    if match := re.match(r"flows\.(visual|text)\.(\d+)\.(\d)\.(.*)", name):
        tower, flow = {"visual": "visual.", "text": ""}[match[1]], {"0": "flow", "1": "flow2"}[match[3]]
        rest = re.sub(r"^(mu|logsigma)$", r"affine_transform.\1", match[4]).replace("planes.", "transforms.")
        return f"backbone.{tower}transformer.resblocks.{match[2]}.{flow}.{rest}"
    if model.clip.size.patch is None:  # a ResNet's zoom layers are bare convolutions there, one-element sequences here
        name = re.sub(r"^(bridger\.\d\.zoom_(?:in|out))\.0\.", r"\1.", name)
    for ours, theirs in NAMES[model.system] + DECODER_NAMES:
        new, hit = re.subn(ours, theirs, name)
        if hit:
            return new
    raise UserError(f"{name}: the original {TITLES[model.system]} has no such part: nothing can be named after it")


def names(model: ETRIS) -> dict[str, str]:
    """Our name → the original's, for every tensor of the model."""
    return {name: original_name(name, model) for name in model.state_dict()}


def unwrap(file: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: out of `state_dict` where wrapped, without DataParallel's `module.`.

    BarLeRIa's planar flows stand there under two names; the second is what its code would have loaded last, and stays.
    """
    state = file.get("state_dict", file)
    state = {name.removeprefix("module."): x for name, x in state.items()}
    twins = {name: x for name, x in state.items() if ".log_jacobians." in name}
    state = {name: x for name, x in state.items() if name not in twins}
    return state | {name.replace(".log_jacobians.", ".transforms."): x for name, x in twins.items()}


def is_official(file) -> bool:
    """Whether a loaded file looks like a checkpoint of one of the three originals."""
    marks = ("backbone.", "dinov2.")
    state = file.get("state_dict", file) if isinstance(file, dict) else None
    texts = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    return texts and any(name.startswith(marks) for name in unwrap(file))


def system_of(state: dict) -> str:
    """Which of the three a checkpoint's names belong to."""
    if any(name.startswith("dinov2.") for name in state):
        return "detris"
    return "barleria" if any(".flow." in name or name.startswith("intertwiner.") for name in state) else "etris"


def part(state: dict, prefix: str, without: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it, but for those with `without` in their names."""
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix) and without not in n}


def empty_etris(state, size, words, heads) -> ETRIS:
    """An ETRIS of the sizes the state's shapes show."""
    clip = CLIP(Size.of(part(state, "backbone.", "connect"))).requires_grad_(False)
    width = state["bridger.linear1.0.weight"].shape[0] if "bridger.linear1.0.weight" in state else 64
    stages = sorted({int(n.split(".")[2]) for n in state if n.startswith("bridger.linear1.")})
    size = clip.size.picture if clip.size.patch else size or 416
    return assemble(clip, size, words, width=width, heads=heads, stages=stages, released=True)


def empty_barleria(state, size, words, heads) -> barleria.BarLeRIa:
    """A BarLeRIa of the state's sizes; its prior is normalised over channels, so no result hangs on its batch."""
    clip = CLIP(Size.of(part(state, "backbone.", ".flow"))).requires_grad_(False)
    side = state.get("side_linear.weight")
    options = {"global_prior": False} if side is None else {"width": side.shape[1]}
    return barleria.assemble(clip, clip.size.picture, words, released=True, over_batch=False, **options)


def empty_detris(state, size, words, heads) -> detris.DETRIS:
    """A DETRIS of the state's sizes: which blocks have an aligner or an adapter, and of which rank."""
    text = part(state, "txt_backbone.", ".adapter.")
    (vocabulary, width), blocks = text["token_embedding.weight"].shape, [n.split(".")[2] for n in text if "resb" in n]
    visual = {"picture": 16, "layers": 0, "width": 64, "patch": 16}  # of a CLIP's picture encoder, which is replaced
    context, embed = len(text["positional_embedding"]), text["text_projection"].shape[1]
    clip = CLIP(Size(embed, **visual, text_width=width, text_layers=len({*blocks}), context=context,
                     vocabulary=vocabulary)).requires_grad_(False)  # fmt: skip
    dino = detris.DINO(detris.DinoSize.of(part(state, "dinov2.", ".adapter.")))
    found = {}
    for prefix, where, rank in (("dinov2.blocks.", "aligners", "width"),
                                ("txt_backbone.transformer.resblocks.", "adapters", "text_rank")):  # fmt: skip
        downs = {n: x for n, x in part(state, prefix, "#").items() if n.endswith(".adapter.D_fc1.weight")}
        found[where] = sorted(int(n.split(".")[0]) for n in downs)
        found |= {rank: len(next(iter(downs.values())))} if downs else {}
    return detris.assemble(clip, dino, size or 448, words, released=True, **found)


EMPTY = {"etris": empty_etris, "barleria": empty_barleria, "detris": empty_detris}


def from_official(file: dict, size: int | None = None, words: int = 17, heads: int | None = None) -> ETRIS:
    """A checkpoint of one of the three originals, wrapped or bare, prefixed or not → the model, eval, plain path.

    size: the picture side it was trained at (416, DETRIS 448); a CLIP ViT's positions say it themselves. heads: of
    ETRIS' Bridger. UserError names what is missing, unknown or of another shape.
    """
    state = unwrap(file)
    system = system_of(state)
    try:
        model = EMPTY[system](state, size, words, heads)
    except KeyError as error:
        what = f"not a checkpoint of the original {TITLES[system]}"
        raise UserError(f"{what}: {error.args[0]} is missing: give the file as it was published") from error
    return fill(model, state).eval()


def fill(model: ETRIS, state: dict) -> ETRIS:
    """Copy every tensor by its original name; UserError where names or shapes do not agree exactly."""
    ours, table = model.state_dict(), names(model)
    missing, unknown = set(table.values()) - set(state), set(state) - set(table.values())
    shapes = [t for n, t in table.items() if t in state and state[t].shape != ours[n].shape]
    what = f"not a checkpoint of the original {TITLES[model.system]}"
    for kind, wrong in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if wrong:
            raise UserError(f"{what}: {len(wrong)} tensors {kind}, {min(wrong)} first: give the file as published")
    model.load_state_dict({n: state[t] for n, t in table.items()}, strict=True)
    return model


def to_official(model: ETRIS) -> dict[str, Tensor]:
    """The model's tensors under the original's names: what `from_official` reads, and the original code too."""
    state = model.state_dict()
    state = {theirs: state[ours] for ours, theirs in names(model).items()}
    return state | {n.replace(".transforms.", ".log_jacobians."): x for n, x in state.items() if ".transforms." in n}


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
        raise UserError(f"{path}: no weights that can be read safely ({type(error).__name__}): give another "
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
        with torch.serialization.safe_globals(NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the file, the next line says
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
    """Copy a checkpoint's tuned tensors into the model; UserError where they are not those of such a model."""
    theirs, ours = file["identity"], model.frozen.identity
    if theirs["sha256"] != ours["sha256"]:
        raise UserError(f"{path}: was tuned on a frozen {theirs['name']} {theirs['sha256'][:12]}…, this one is "
                        f"{ours['name']} {ours['sha256'][:12]}…: give its --weights FILE")  # fmt: skip
    tuned, want = file["tuned"], dict(model.tuned())
    wrong = set(tuned) ^ set(want) or {n for n in tuned if tuned[n].shape != want[n].shape}
    wrong = wrong or {n for n in tuned if not tuned[n].isfinite().all()}
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit this model or are not finite, {min(wrong)} first: "
                        "give another file")  # fmt: skip
    model.load_state_dict(tuned, strict=False)
    return model


def load_checkpoint(path, weights=None, device="cpu", words=None) -> ETRIS:
    """A checkpoint file, ours or the original's → the model in eval mode on `device`.

    words: tokens a sentence is cut at; ours knows its own, an original of RefCOCOg was trained with 22 and not with 17.

    Ours holds the tuned tensors only: the frozen CLIP comes from `weights`, the shipped file, the cache or the network,
    and must be the one it was tuned on (SHA-256).
    """
    file = read_checkpoint(path)
    try:
        with blame(path, "it is damaged: give another file"):
            if is_official(file):
                model = from_official(file)
            else:
                model = build(**file["config"] | ({"weights": str(weights)} if weights else {}))
                size, frozen = sum(x.numel() for x in file["tuned"].values()), model.frozen.identity
                print(f"{Path(path).name}: {size:,} tuned numbers; the frozen {frozen['name']} is {frozen['weights']}")
                restore_tuned(model, file, path)
    except UserError as error:  # whatever it is about, it came from the file
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    if words and words > (most := model.frozen.size.context):
        raise UserError(f"--words {words}: choose 3 to {most}, the frozen CLIP's limit")
    model.words = words or model.words
    return model.eval().to(device)


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
