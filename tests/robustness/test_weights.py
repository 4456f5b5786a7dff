"""Official weights: clip_file fetches them, load_clip reads them, whatever the network does."""

import hashlib
import io
import os
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import clip_model
from clip_model import CLIP, CLIP_CONFIGS, CLIPConfig, load_clip
from config import OWN_BACKBONES
from robustness.server import Server
from utils import clip_weights, download
from utils.clip_weights import CLIP_FILES, init_by_name, read_weights
from utils.common import UserError

SMALL = {  # official names, small sizes
    "RN50": CLIPConfig(
        embed_dim=32,
        image_size=64,
        vision_layers=(1, 2, 1, 1),
        vision_width=8,
        text_width=64,
        text_layers=1,
        context_length=8,
        vocab_size=50,
    ),
    "ViT-B-16": CLIPConfig(
        embed_dim=32,
        image_size=32,
        vision_layers=2,
        vision_width=64,
        text_width=64,
        patch_size=16,
        text_layers=1,
        context_length=8,
        vocab_size=50,
    ),
}


def weights(name, seed=0):
    """A small CLIP's state dict in OpenAI's precision: fp16, BatchNorm's counters as integers."""
    state = init_by_name(CLIP(SMALL[name]).state_dict(), seed)
    return {key: x.half() if x.is_floating_point() else x for key, x in state.items()}


def archive(state):
    """OpenAI's format: a TorchScript archive with three numbers beside the model's tensors."""
    root = nn.Module()
    numbers = {"input_resolution": 64, "context_length": 8, "vocab_size": 50}
    for name, x in (state | numbers).items():
        module, *path = root, *name.split(".")
        for part in path[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(path[-1], torch.as_tensor(x))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the format of the official files
        torch.jit.save(torch.jit.script(root), file)
    return file.getvalue()


def plain(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def archives():
    return {name: archive(weights(name)) for name in SMALL}


@pytest.fixture
def server(monkeypatch, tmp_path, archives):
    """OpenAI's address and the mirror on one local server, two small models, an empty cache."""
    with Server() as server:
        for name, content in archives.items():
            digest = hashlib.sha256(content).hexdigest()
            monkeypatch.setitem(CLIP_CONFIGS, name, SMALL[name])
            monkeypatch.setitem(CLIP_FILES, name, (digest, name))
            server.files[f"/openai/{digest}/{name}.pt"] = content
            server.files[f"/mirror/{name}.bin"] = plain(weights(name))
        openai_url = server.url + "/openai/{sha256}/{name}.pt"
        monkeypatch.setattr(clip_weights, "OPENAI_URL", openai_url)
        monkeypatch.setattr(clip_weights, "MIRROR_URL", server.url + "/mirror/{mirror}.bin")
        monkeypatch.setattr(download, "RETRY_DELAYS", (0, 0, 0))
        monkeypatch.setattr(clip_model, "ROOT", tmp_path)  # no shipped weights
        monkeypatch.setenv("ETRIS_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """A fifth of a second of silence is enough, for tests whose server stalls."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)


def official(name="RN50"):
    return f"/openai/{CLIP_FILES[name][0]}/{name}.pt"


MIRROR = "/mirror/RN50.bin"


def test_an_archive_is_opened_by_python_whatever_its_name(tmp_path, monkeypatch, archives):
    """torch.jit.load takes a name as bytes of its own: on Windows it fails for ç, ü and 流."""
    path = tmp_path / "çü流.pt"
    path.write_bytes(archives["RN50"])
    load = torch.jit.load

    def windows_load(file, *args, **options):
        assert not isinstance(file, str | Path)
        return load(file, *args, **options)

    monkeypatch.setattr(torch.jit, "load", windows_load)
    state = clip_weights.read_weights(path)
    for name, x in weights("RN50").items():
        assert torch.equal(state[name], x.float() if x.is_floating_point() else x)


def assert_loaded(clip, name, tmp_path):
    """The weights served, in fp32 to the last bit; the cache holds one plain file of them alone."""
    expected = {key: x.float() if x.is_floating_point() else x for key, x in weights(name).items()}
    assert clip.state_dict().keys() == expected.keys()
    for kept in (
        clip.state_dict(),
        torch.load(tmp_path / "cache" / f"{name}.pt", weights_only=True),
    ):
        assert all(
            torch.equal(kept[key], x) and kept[key].dtype == x.dtype for key, x in expected.items()
        )
    assert os.listdir(tmp_path / "cache") == [f"{name}.pt"]


@pytest.mark.parametrize("name", SMALL)
def test_openai_s_archive_is_fetched_once_and_kept_as_plain_fp32(server, tmp_path, name, capsys):
    """The first load asks OpenAI's address once and prints the hash; the second asks nobody."""
    clip = load_clip(name)
    assert_loaded(clip, name, tmp_path)
    assert server.requests == [(official(name), None)]
    assert CLIP_FILES[name][0] in capsys.readouterr().out
    assert clip.identity["name"] == name and not clip.training
    again = load_clip(name)
    assert server.requests == [(official(name), None)] and again.identity == clip.identity
    assert_loaded(again, name, tmp_path)


@pytest.mark.parametrize("fault", ["truncate", "stall", "redirect", 500])
def test_a_passing_fault_does_not_send_anyone_to_the_mirror(server, tmp_path, impatient, fault):
    """OpenAI's address fails once in each way, and is asked again."""
    server.faults[official()] = [fault]
    assert_loaded(load_clip("RN50"), "RN50", tmp_path)
    assert MIRROR not in [path for path, _ in server.requests]


@pytest.mark.parametrize("fault", [404, "wrong", "stall", "truncate", 500])
def test_the_mirror_stands_in_for_openai(server, tmp_path, impatient, capsys, fault):
    """OpenAI's address fails for good; the mirror gives the same CLIP, its hash is printed."""
    server.faults[official()] = [fault, "…"]
    assert_loaded(load_clip("RN50"), "RN50", tmp_path)
    assert hashlib.sha256(server.files[MIRROR]).hexdigest() in capsys.readouterr().out


def test_another_hash_is_not_openai_s_file(server, tmp_path):
    """A perfect archive of other weights: only its SHA-256 tells; the mirror is asked instead."""
    server.files[official()] = archive(weights("RN50", seed=1))
    assert_loaded(load_clip("RN50"), "RN50", tmp_path)
    assert (MIRROR, None) in server.requests


def refusal(tmp_path, name="RN50"):
    """The one line with which loading gives up, an empty cache behind it."""
    with pytest.raises(UserError) as refused:
        load_clip(name)
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("fault", [404, "wrong", "truncate", "stall"])
def test_without_any_network_the_three_ways_out_are_named(server, tmp_path, impatient, fault):
    """Both addresses fail for good: one line names both and the three options."""
    server.faults = {official(): [fault, "…"], MIRROR: [fault, "…"]}
    line = refusal(tmp_path)
    for part in (official(), MIRROR, "--weights FILE", "--weights random", "--backbone tiny"):
        assert part in line


def without(state, name):
    return {key: x for key, x in state.items() if key != name}


@pytest.mark.parametrize(
    "state, said",
    [
        (weights("ViT-B-16"), "other sizes than RN50"),
        (without(weights("RN50"), "visual.bn1.running_mean"), "visual.bn1.running_mean"),
        (weights("RN50") | {"visual.connect.weight": torch.zeros(1)}, "visual.connect.weight"),
        (weights("RN50") | {"ln_final.weight": torch.ones(65)}, "ln_final.weight"),
    ],
    ids=["another backbone", "a tensor less", "a tensor more", "a tensor of another shape"],
)
def test_names_and_shapes_of_the_mirror_s_file_are_checked_strictly(server, tmp_path, state, said):
    """No hash of the mirror's file is known, so it must be the CLIP asked for, tensor by tensor."""
    server.faults[official()] = [404, "…"]
    server.files[MIRROR] = plain(state)
    assert said in refusal(tmp_path)


class Hostile:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_mirror_that_wants_to_run_code_is_refused(server, tmp_path):
    """Its pickle would call os.mkdir: weights_only refuses, the folder does not come to be."""
    server.faults[official()] = [404, "…"]
    server.files[MIRROR] = plain(weights("RN50") | {"extra": Hostile(tmp_path / "pwned")})
    assert MIRROR in refusal(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("make", [archive, plain])
def test_a_file_of_ones_own_is_read_in_both_formats(server, tmp_path, make):
    """--weights FILE: nobody is asked, nothing is cached."""
    (tmp_path / "own.pt").write_bytes(make(weights("RN50")))
    clip = load_clip("RN50", tmp_path / "own.pt")
    assert all(
        torch.equal(clip.state_dict()[key], x.to(clip.state_dict()[key]))
        for key, x in weights("RN50").items()
    )
    assert (
        clip.identity["weights"] == "own.pt"
        and server.requests == []
        and not (tmp_path / "cache").exists()
    )


@pytest.mark.parametrize("cut", [0, 1, 1000, -1000])
@pytest.mark.parametrize("make", [archive, plain])
def test_a_cut_file_of_ones_own_is_one_line_with_its_name(tmp_path, make, cut):
    """Nothing, one byte, a thousand, all but the last thousand of each format."""
    (tmp_path / "own.pt").write_bytes(make(weights("RN50"))[:cut])
    with pytest.raises(UserError, match="own.pt"):
        load_clip("RN50", tmp_path / "own.pt")


def test_hostile_things_in_a_file_of_ones_own_are_refused(tmp_path):
    """A pickle that calls os.mkdir; a zip that calls itself TorchScript and is empty."""
    (tmp_path / "own.pt").write_bytes(plain({"x": Hostile(tmp_path / "pwned")}))
    with zipfile.ZipFile(tmp_path / "hollow.pt", "w") as hollow:
        hollow.writestr("model/constants.pkl", b"")
    for name in ("own.pt", "hollow.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            load_clip("RN50", tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_file_of_another_backbone_is_named(server, tmp_path):
    """A ViT's weights given for RN50: the line names the file and the backbone."""
    (tmp_path / "own.pt").write_bytes(plain(weights("ViT-B-16")))
    with pytest.raises(UserError, match="own.pt.*RN50"):
        load_clip("RN50", tmp_path / "own.pt")


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    """ETRIS_CACHE below a file: the line names the folder and the variable that chooses another."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETRIS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="file/cache.*ETRIS_CACHE"):
        load_clip("RN50")


def test_every_official_model_has_its_address_and_its_sizes():
    """Nine names with a full SHA-256 each, no two alike; all but our own are official."""
    assert CLIP_FILES.keys() == set(CLIP_CONFIGS) - set(OWN_BACKBONES)
    hashes = {sha256 for sha256, _ in CLIP_FILES.values()}
    assert len(hashes) == 9 and all(len(bytes.fromhex(sha256)) == 32 for sha256 in hashes)


def test_extra_numbers_of_the_archive_are_left_out_and_integers_stay(tmp_path):
    """input_resolution, context_length, vocab_size are no tensors; BatchNorm's counter is int64."""
    (tmp_path / "own.pt").write_bytes(archive(weights("RN50")))
    state = read_weights(tmp_path / "own.pt")
    assert state.keys() == weights("RN50").keys()
    kinds = {key.rpartition(".")[2]: x.dtype for key, x in state.items()}
    assert (
        kinds["num_batches_tracked"] == torch.int64
        and kinds["weight"] == kinds["running_var"] == torch.float32
    )


def test_a_tiny_clip_that_is_not_shipped_names_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(clip_model, "ROOT", tmp_path)
    with pytest.raises(UserError, match="python -m toy.pretrain tiny-vit"):
        load_clip("tiny-vit")
