"""The checkpoints that the authors of ETRIS, BarLeRIa and DETRIS published → our models, and back.

    from checkpoint import read_checkpoint
    model = from_official(read_checkpoint("best_model.pth"))

The originals save whole state dicts, frozen modules included, under their own names. One function,
`original_name`, says what each of our tensors is called there. Reading and writing both use it, so
no tensor is left over or missing.
"""

import re

import numpy as np
from torch import Tensor

from clip_model import CLIP, CLIPConfig
from etris import ETRIS, build_etris
from methods.barleria import BarLeRIa, build_barleria
from methods.detris import DETRIS, build_detris
from methods.dinov2 import DINO, DinoConfig
from utils.common import UserError

# numpy's types in the originals' files. A scalar's constructor has moved within numpy: files
# written earlier name its former home.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_TYPES = [
    np.dtype,
    type(np.dtype("f8")),
    NUMPY_SCALAR,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]

# ------------------------------------------------------------------------------------------- names
# Our name → the original's, as regular expressions; tried in order, the first match counts
ETRIS_NAMES = [
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
TEXT_BLOCKS = "txt_backbone.transformer.resblocks"
DETRIS_NAMES = [
    (r"^clip\.visual\.", "dinov2."),
    (r"^clip\.", "txt_backbone."),
    (r"^aligners\.(\d+)\.down\.", r"dinov2.blocks.\1.adapter.D_fc1."),
    (r"^aligners\.(\d+)\.up\.", r"dinov2.blocks.\1.adapter.D_fc2."),
    (r"^aligners\.(\d+)\.branches\.branch(\d)\.", r"dinov2.blocks.\1.adapter.dense_branch\2."),
    (r"^aligners\.(\d+)\.(image|text|back)\.", r"dinov2.blocks.\1.adapter.cross.\2_proj."),
    (r"^aligners\.(\d+)\.cross_attn\.", r"dinov2.blocks.\1.adapter.cross.multihead_attn."),
    (r"^adapters\.(\d+)\.down\.", rf"{TEXT_BLOCKS}.\1.adapter.D_fc1."),
    (r"^adapters\.(\d+)\.up\.", rf"{TEXT_BLOCKS}.\1.adapter.D_fc2."),
    (r"^adapters\.(\d+)\.branches\.branch(\d)\.", rf"{TEXT_BLOCKS}.\1.adapter.dense_branch\2."),
]
DECODER_NAMES = [  # the decoder that all three share
    (r"^hierarchical_alignment\.sentence\.", "neck.txt_proj."),
    (r"^hierarchical_alignment\.merge\.", "neck.aggr."),
    (r"^hierarchical_alignment\.coordinates\.0\.", "neck.coordconv.0.conv1."),
    (r"^hierarchical_alignment\.coordinates\.1\.", "neck.coordconv.1."),
    (r"^global_alignment\.layers\.(\d)\.cross_attn\.", r"decoder.layers.\1.multihead_attn."),
    (r"^global_alignment\.layers\.(\d)\.(self|cross)_norm\.", r"decoder.layers.\1.\2_attn_norm."),
    (r"^global_alignment\.", "decoder."),
    (r"^projector\.", "proj."),
]
NAMES = {
    "etris": ETRIS_NAMES + DECODER_NAMES,
    "barleria": BARLERIA_NAMES + DECODER_NAMES,
    "detris": DETRIS_NAMES + DECODER_NAMES,
}
TITLES = {"etris": "ETRIS", "barleria": "BarLeRIa", "detris": "DETRIS"}


def original_name(name: str, model: ETRIS) -> str:
    """What the original of `model` calls our tensor `name`; UserError if it has no such tensor."""
    # the neck counts the stages as features 3, 4, 5, after CLIP's layer2, layer3, layer4
    match = re.match(r"hierarchical_alignment\.(gates|project)\.(\d)\.(.*)", name)
    if match:
        kind, stage, rest = match.groups()
        feature = int(stage) + 3
        if kind == "gates":
            return f"neck.fusion{feature}.multihead_attn.{rest}"
        return f"neck.f{feature}_proj.{rest}"

    # the first bridge has no norms, so the original counts them from the second bridge on
    match = re.match(r"bridger\.(\d)\.norm_([vt])\.(.*)", name)
    if match:
        stage, side, rest = match.groups()
        number = list(model.bridger).index(stage) - 1
        return f"bridger.ln_{side}.{number}.{rest}"

    match = re.match(r"flows\.(visual|text)\.(\d+)\.(\d)\.(.*)", name)
    if match:
        encoder, block, number, rest = match.groups()
        encoder = "visual." if encoder == "visual" else ""
        flow = "flow" if number == "0" else "flow2"
        rest = re.sub(r"^(mu|logsigma)$", r"affine_transform.\1", rest)
        rest = rest.replace("planes.", "transforms.")
        return f"backbone.{encoder}transformer.resblocks.{block}.{flow}.{rest}"

    # a ResNet's zoom layers are sequences of one convolution here, bare convolutions there
    if model.clip.config.patch_size is None:
        name = re.sub(r"^(bridger\.\d\.zoom_(?:in|out))\.0\.", r"\1.", name)
    for ours, theirs in NAMES[model.system]:
        if re.search(ours, name):
            return re.sub(ours, theirs, name)
    title = TITLES[model.system]
    raise UserError(f"{name}: the original {title} has no such part: it cannot be exported")


def name_map(model: ETRIS) -> dict[str, str]:
    """Our name → the original's, for every tensor of the model."""
    return {name: original_name(name, model) for name in model.state_dict()}


# ------------------------------------------------------------------------------------------- files
def tensors_of(file: dict) -> dict[str, Tensor]:
    """The tensors of an original's file: out of `state_dict` if wrapped, without `module.`.

    BarLeRIa's planar flows are saved under two names, transforms and log_jacobians. The original
    code loads the second one last, so it counts.
    """
    state = file.get("state_dict", file)
    state = {name.removeprefix("module."): x for name, x in state.items()}
    tensors = {name: x for name, x in state.items() if ".log_jacobians." not in name}
    for name, x in state.items():
        if ".log_jacobians." in name:
            tensors[name.replace(".log_jacobians.", ".transforms.")] = x
    return tensors


def is_official(file) -> bool:
    """Whether a loaded file looks like a checkpoint of one of the three originals."""
    state = file.get("state_dict", file) if isinstance(file, dict) else None
    if not isinstance(state, dict):
        return False
    if not all(isinstance(name, str) for name in state):
        return False
    return any(name.startswith(("backbone.", "dinov2.")) for name in tensors_of(file))


def system_of(state: dict) -> str:
    """Which of the three systems a checkpoint's names belong to."""
    if any(name.startswith("dinov2.") for name in state):
        return "detris"
    if any(".flow." in name or name.startswith("intertwiner.") for name in state):
        return "barleria"
    return "etris"


def strip_prefix(state: dict, prefix: str, without: str | None = None) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, named without it; none with `without` in it."""
    found = {}
    for name, x in state.items():
        if name.startswith(prefix) and (without is None or without not in name):
            found[name.removeprefix(prefix)] = x
    return found


# ------------------------------------------------------------------- models of a state dict's sizes
def etris_of(state: dict, size, max_tokens, heads) -> ETRIS:
    """An ETRIS of the sizes that the state dict's shapes show."""
    config = CLIPConfig.from_state_dict(strip_prefix(state, "backbone.", without="connect"))
    clip = CLIP(config).requires_grad_(False)
    first_linear = state.get("bridger.linear1.0.weight")
    width = 64 if first_linear is None else first_linear.shape[0]
    stages = {int(name.split(".")[2]) for name in state if name.startswith("bridger.linear1.")}
    return build_etris(
        clip,
        config.image_size if config.patch_size else size or 416,
        max_tokens,
        width=width,
        heads=heads,
        stages=sorted(stages),
        released=True,
    )


def barleria_of(state: dict, size, max_tokens, heads) -> BarLeRIa:
    """A BarLeRIa of the state dict's sizes.

    Its prior is normalized over the channels, so no result depends on the other images of a batch.
    """
    config = CLIPConfig.from_state_dict(strip_prefix(state, "backbone.", without=".flow"))
    clip = CLIP(config).requires_grad_(False)
    options = {"released": True, "over_batch": False}
    if "side_linear.weight" in state:
        options["width"] = state["side_linear.weight"].shape[1]
    else:
        options["global_prior"] = False
    return build_barleria(clip, config.image_size, max_tokens, **options)


def blocks_and_rank(state: dict, prefix: str) -> tuple[list[int], int | None]:
    """DETRIS: which of the blocks below `prefix` have an adapter, and the adapters' rank."""
    blocks = []
    rank = None
    for name, x in strip_prefix(state, prefix).items():
        if name.endswith(".adapter.D_fc1.weight"):
            blocks.append(int(name.split(".")[0]))
            rank = x.shape[0]
    return sorted(blocks), rank


def detris_of(state: dict, size, max_tokens, heads) -> DETRIS:
    """A DETRIS of the state dict's sizes, with its aligners and adapters."""
    text = strip_prefix(state, "txt_backbone.", without=".adapter.")
    vocab_size, text_width = text["token_embedding.weight"].shape
    resblocks = strip_prefix(text, "transformer.resblocks.")
    config = CLIPConfig(
        embed_dim=text["text_projection"].shape[1],
        text_width=text_width,
        text_layers=len({name.split(".")[0] for name in resblocks}),
        context_length=text["positional_embedding"].shape[0],
        vocab_size=vocab_size,
        # of an image encoder without blocks, which DINOv2 replaces
        image_size=16,
        vision_layers=0,
        vision_width=64,
        patch_size=16,
    )
    clip = CLIP(config).requires_grad_(False)
    dino = DINO(DinoConfig.from_state_dict(strip_prefix(state, "dinov2.", without=".adapter.")))
    aligners, width = blocks_and_rank(state, "dinov2.blocks.")
    adapters, text_rank = blocks_and_rank(state, f"{TEXT_BLOCKS}.")
    ranks = {}
    if width:
        ranks["width"] = width
    if text_rank:
        ranks["text_rank"] = text_rank
    return build_detris(
        clip,
        dino,
        size or 448,
        max_tokens,
        aligners=aligners,
        adapters=adapters,
        released=True,
        **ranks,
    )


BUILDERS = {"etris": etris_of, "barleria": barleria_of, "detris": detris_of}


# ----------------------------------------------------------------------------------- read and write
def from_official(
    file: dict, size: int | None = None, max_tokens: int = 17, heads: int | None = None
) -> ETRIS:
    """A checkpoint of one of the three originals → our model in evaluation mode, on the plain path.

    file: the loaded file's dict, or its state dict; names with or without `module.`. size: the
    image size it was trained at (416, DETRIS 448); a CLIP ViT's positions tell their own. heads: of
    ETRIS' Bridger (4 with a ResNet, 8 with a ViT). UserError names what is missing, unknown or of
    another shape.
    """
    state = tensors_of(file)
    system = system_of(state)
    try:
        model = BUILDERS[system](state, size, max_tokens, heads)
    except KeyError as error:
        message = f"not a checkpoint of the original {TITLES[system]}: {error.args[0]} is missing"
        raise UserError(f"{message}: give the file as it was published") from error
    load_by_name(model, state)
    return model.eval()


def load_by_name(model: ETRIS, state: dict):
    """Copy every tensor by its original name; UserError unless names and shapes agree exactly."""
    ours = model.state_dict()
    names = name_map(model)
    expected = set(names.values())
    other_shape = set()
    for name, original in names.items():
        if original in state and state[original].shape != ours[name].shape:
            other_shape.add(original)
    problems = {
        "missing": expected - set(state),
        "unknown": set(state) - expected,
        "of another shape": other_shape,
    }
    for problem, tensors in problems.items():
        if tensors:
            message = f"{len(tensors)} tensors {problem}, {min(tensors)} first"
            title = TITLES[model.system]
            raise UserError(
                f"not a checkpoint of the original {title}: {message}: give the file as published"
            )
    tensors = {name: state[original] for name, original in names.items()}
    model.load_state_dict(tensors, strict=True)


def to_official(model: ETRIS) -> dict[str, Tensor]:
    """The model's tensors under the original's names: the original code can load them.

    BarLeRIa's planar flows get both of their names (see `tensors_of`).
    """
    ours = model.state_dict()
    state = {original: ours[name] for name, original in name_map(model).items()}
    for name in list(state):
        if ".transforms." in name:
            state[name.replace(".transforms.", ".log_jacobians.")] = state[name]
    return state
