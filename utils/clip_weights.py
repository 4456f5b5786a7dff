"""The shapes and weights of CLIP: read a file safely, fetch an official one once, identify it.

The official files come from OpenAI, whose SHA-256 is published, or from a mirror, whose is not. In
the cache lies a plain float32 state dict.
"""

import hashlib
import pickle
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.common import READ_ERRORS, UserError, as_user_error
from utils.download import CACHE_REMEDY, cache_folder, fetch, sha256

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
MIRROR_URL = "https://huggingface.co/timm/{mirror}.openai/resolve/main/open_clip_pytorch_model.bin"
CLIP_FILES = {  # name: SHA-256 of OpenAI's file, name on the mirror
    "RN50": (
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        "resnet50_clip",
    ),
    "RN101": (
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        "resnet101_clip",
    ),
    "RN50x4": (
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        "resnet50x4_clip",
    ),
    "RN50x16": (
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        "resnet50x16_clip",
    ),
    "RN50x64": (
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        "resnet50x64_clip",
    ),
    "ViT-B-32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "vit_base_patch32_clip_224",
    ),
    "ViT-B-16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "vit_base_patch16_clip_224",
    ),
    "ViT-L-14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "vit_large_patch14_clip_224",
    ),
    "ViT-L-14-336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "vit_large_patch14_clip_336",
    ),
}
# what torch.load and torch.jit.load raise over a damaged, hostile or foreign file
LOAD_ERRORS = (
    *READ_ERRORS,
    RuntimeError,
    AttributeError,
    AssertionError,
    MemoryError,
    pickle.UnpicklingError,
)


# ------------------------------------------------------------------------------------------ shapes
@dataclass(frozen=True)
class CLIPConfig:
    """The shape of a CLIP. patch_size None: a ResNet, with four counts of bottlenecks as layers."""

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    text_width: int
    patch_size: int | None = None
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408

    @classmethod
    def from_state_dict(cls, state: dict) -> "CLIPConfig":
        """Read the configuration off the tensors' shapes; KeyError where it is no CLIP."""
        conv1 = state["visual.conv1.weight"]
        vocab_size, text_width = state["token_embedding.weight"].shape
        if "visual.proj" in state:
            patch_size = conv1.shape[-1]
            stride = patch_size
            vision_width = conv1.shape[0]
            vision_layers = count_blocks(state, "visual.transformer.resblocks.")
            positions = state["visual.positional_embedding"]
        else:
            patch_size = None
            stride = 32
            vision_width = 2 * conv1.shape[0]
            vision_layers = tuple(count_blocks(state, f"visual.layer{i}.") for i in (1, 2, 3, 4))
            positions = state["visual.attnpool.positional_embedding"]
        return cls(
            embed_dim=state["text_projection"].shape[1],
            image_size=stride * round((positions.shape[0] - 1) ** 0.5),
            vision_layers=vision_layers,
            vision_width=vision_width,
            text_width=text_width,
            patch_size=patch_size,
            text_layers=count_blocks(state, "transformer.resblocks."),
            context_length=state["positional_embedding"].shape[0],
            vocab_size=vocab_size,
        )


def count_blocks(state: dict, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return len({name.split(".")[0] for name in names})


CLIP_CONFIGS = {  # the last three are ours: toy/pretrain.py trained them, weights/ ships them
    "RN50": CLIPConfig(embed_dim=1024, image_size=224, vision_layers=(3, 4, 6, 3),
                       vision_width=64, text_width=512),
    "RN101": CLIPConfig(embed_dim=512, image_size=224, vision_layers=(3, 4, 23, 3),
                        vision_width=64, text_width=512),
    "RN50x4": CLIPConfig(embed_dim=640, image_size=288, vision_layers=(4, 6, 10, 6),
                         vision_width=80, text_width=640),
    "RN50x16": CLIPConfig(embed_dim=768, image_size=384, vision_layers=(6, 8, 18, 8),
                          vision_width=96, text_width=768),
    "RN50x64": CLIPConfig(embed_dim=1024, image_size=448, vision_layers=(3, 15, 36, 10),
                          vision_width=128, text_width=1024),
    "ViT-B-32": CLIPConfig(embed_dim=512, image_size=224, vision_layers=12,
                           vision_width=768, text_width=512, patch_size=32),
    "ViT-B-16": CLIPConfig(embed_dim=512, image_size=224, vision_layers=12,
                           vision_width=768, text_width=512, patch_size=16),
    "ViT-L-14": CLIPConfig(embed_dim=768, image_size=224, vision_layers=24,
                           vision_width=1024, text_width=768, patch_size=14),
    "ViT-L-14-336px": CLIPConfig(embed_dim=768, image_size=336, vision_layers=24,
                                 vision_width=1024, text_width=768, patch_size=14),
    "tiny": CLIPConfig(embed_dim=128, image_size=128, vision_layers=(1, 1, 1, 1), vision_width=16,
                       text_width=64, text_layers=3, context_length=24),
    "small": CLIPConfig(embed_dim=128, image_size=192, vision_layers=(1, 1, 1, 1), vision_width=16,
                        text_width=64, text_layers=3, context_length=24),
    "tiny-vit": CLIPConfig(embed_dim=128, image_size=96, vision_layers=6, vision_width=128,
                           text_width=128, patch_size=16, text_layers=3, context_length=24),
}  # fmt: skip


# ----------------------------------------------------------------------------------- read and check
def read_weights(path) -> dict:
    """A TorchScript archive or a plain state dict → tensors under their own names, in float32.

    Runs no code of the file's. UserError where the file is missing or cannot be read safely.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: give another --weights FILE")
    try:
        state = load_state_dict(path)
        rows = state.pop("token_rows", None)
        for name in ("input_resolution", "context_length", "vocab_size"):
            state.pop(name, None)  # numbers of OpenAI's archives, not tensors of the model
        for name, x in state.items():
            state[name] = x.float() if x.is_floating_point() else x
        if rows is not None:
            fill_token_embedding(state, rows)
    except LOAD_ERRORS as error:
        reason = f"no weights that can be read safely ({type(error).__name__})"
        remedy = "give another --weights FILE, OpenAI's archive or a plain state dict"
        raise UserError(f"{path}: {reason}: {remedy}") from error
    return state


def load_state_dict(path) -> dict:
    """The state dict in either format, on the CPU."""
    is_archive = False
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        is_archive = any(name.endswith("constants.pkl") for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated, but reads OpenAI's archives
        if is_archive:
            with open(path, "rb") as file:  # by name, Windows fails for letters such as ç and 流
                return dict(torch.jit.load(file, map_location="cpu").state_dict())
        return dict(torch.load(str(path), map_location="cpu", weights_only=True))


def fill_token_embedding(state: dict, rows):
    """Our tiny files hold the rows that pre-training saw: draw the others from a fixed seed."""
    known = state["token_embedding.weight"]
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(49408, known.shape[1], generator=generator) * known.std()
    state["token_embedding.weight"] = embedding.index_copy(0, rows, known)


# ------------------------------------------------------------------------------------------- fetch
def clip_file(name: str, check) -> Path:
    """The official CLIP `name` in the cache, downloaded from OpenAI or the mirror if need be.

    check(state, url) raises a UserError where the tensors are not those of `name`.
    """
    path = cache_folder() / f"{name}.pt"
    if path.exists():
        return path
    if name not in CLIP_FILES:
        remedy = f"make it by `python -m toy.pretrain {name}`, or use --weights random"
        raise UserError(f"weights/{name}.pt is not there: {remedy}")
    digest, mirror = CLIP_FILES[name]
    openai_url = OPENAI_URL.format(sha256=digest, name=name)
    mirror_url = MIRROR_URL.format(mirror=mirror)
    reasons = []
    for url, expected in ((openai_url, digest), (mirror_url, None)):
        try:
            return fetch_clip(url, path, check, expected)
        except UserError as error:
            reasons.append(str(error) if url in str(error) else f"{url}: {error}")
    raise UserError(
        f"no weights of {name}: {'; '.join(reasons)}. Three ways out: connect to a network; fetch "
        "one of these files elsewhere and give it by --weights FILE; or do without, by --weights "
        "random or --backbone tiny"
    )


def fetch_clip(url, path: Path, check, expected=None) -> Path:
    """Download a CLIP, check it, keep it at `path` as a plain float32 state dict.

    expected: its SHA-256, where one is published.
    """
    with as_user_error(path.parent, CACHE_REMEDY, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
            archive = Path(folder, "archive")
            fetch(url, archive, expected)
            print(f"{url}: SHA-256 {sha256(archive)}, {'as' if expected else 'none is'} published")
            state = read_weights(archive)
            check(state, url)
            plain = Path(folder, "plain")
            torch.save(state, plain)
            return plain.replace(path)


# -------------------------------------------------------------------------------------- state dicts
def state_dict_sha256(state: dict) -> str:
    """SHA-256 over names and numbers: identifies a frozen backbone whatever file it came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def init_by_name(state: dict, seed: int = 0) -> dict:
    """Fill `state` with random weights that depend on name and seed alone, and return it.

    Matrices and kernels ~ N(0, 1/fan-in); norms start as the identity; biases are 0.
    """
    for name, x in state.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if x.ndim > 1:
            x.copy_(torch.randn(x.shape, generator=generator) * x[0].numel() ** -0.5)
        elif x.ndim == 1:
            x.fill_(float(name.endswith(("weight", "gamma", "running_var"))))
    return state
