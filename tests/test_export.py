"""What `predict.py export` promises: a file that runs without this code and gives the same logits.

Tracing the model takes most of the time, so all tests share one traced program.
"""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from checkpoint import load_checkpoint
from methods import export
from predict import segment
from toy.scenes import draw_scene
from utils.common import ROOT
from utils.tokenizer import tokenize

CHECKPOINT = str(ROOT / "weights" / "etris-tiny.pt")
SENTENCES = ["white circle", "star", "the red one on the left", "digit", "the blue heart"]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
TOKENS, THIRTY_LINES, WITH_TORCH = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def model():
    return load_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def program(model):
    return export.export_program(model)


@pytest.fixture(scope="module")
def loaded(program, tmp_path_factory):
    """The program after a way through a .pt2 file."""
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    path.write_bytes(export.program_bytes(program))
    return torch.export.load(path)


@pytest.fixture(scope="module")
def onnx_file(program, tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: no ONNX here")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(export.onnx_bytes(program))
    return path


def batch(model, count):
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, model.size, model.size, generator=generator)
    return images, tokenize(SENTENCES[:count], model.max_tokens)


def assert_same_logits(found, model, images, tokens):
    with torch.no_grad():
        logits = model(images, tokens)
    difference = (found - logits).abs()
    assert difference.max() <= 1e-5 * logits.abs().max(), f"mean {difference.mean()}"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_program_gives_the_models_logits_for_any_number_of_pairs(model, loaded, count):
    images, tokens = batch(model, count)
    with torch.no_grad():
        found = loaded.module()(images, tokens)
    assert_same_logits(found, model, images, tokens)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_onnx_file_gives_them_in_another_runtime(model, onnx_file, count):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file)
    images, tokens = batch(model, count)
    [found] = session.run(["logits"], {"images": images.numpy(), "tokens": tokens.numpy()})
    assert_same_logits(torch.from_numpy(found), model, images, tokens)


def test_exporting_leaves_the_model_as_it_was(model, program):
    assert program.range_constraints
    assert "forward" not in vars(model.projector)


def test_the_projector_without_groups_is_the_projector(model):
    generator = torch.Generator().manual_seed(0)
    width = model.clip.config.text_width
    features = torch.randn(3, width, 8, 10, generator=generator)
    sentence = torch.randn(3, model.clip.config.embed_dim, generator=generator)
    with torch.no_grad():
        found = export.projector_without_groups(model.projector, features, sentence)
        torch.testing.assert_close(found, model.projector(features, sentence), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- the page
def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A drawn scene, wider than high, where the page's code looks for it."""
    monkeypatch.chdir(tmp_path)
    scene = Image.fromarray(draw_scene("scenes", "test", 2).image)
    scene.crop((0, 10, 160, 140)).resize((320, 260)).save("photo.png")
    return tmp_path / "photo.png"


def test_the_pages_code_gives_our_masks_without_our_code(
    model, loaded, onnx_file, photo, monkeypatch
):
    """In a process that cannot import the project; then with torch in place of ONNX Runtime."""
    exec(TOKENS, {})
    photo.with_name("model.onnx").write_bytes(onnx_file.read_bytes())
    lines = [line for line in THIRTY_LINES.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 34
    done = subprocess.run(
        [sys.executable, "-I", "-c", THIRTY_LINES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    expected = segment(model, photo, ["white circle", "star"])
    for number, mask in enumerate(expected, start=1):
        found = np.asarray(Image.open(f"mask_{number}.png")) > 0
        assert mask.any()
        assert iou(found, mask) > 0.97

    names = {}
    exec(THIRTY_LINES, names)
    by_onnx = names["logits"]
    monkeypatch.setattr(torch.export, "load", {"model.pt2": loaded}.get)  # loading takes a while
    exec(WITH_TORCH, names)
    np.testing.assert_allclose(names["logits"], by_onnx, atol=1e-4)


def test_open_clips_tokens_are_ours():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    found = open_clip.tokenize(SENTENCES, context_length=17)
    assert torch.equal(found.long(), tokenize(SENTENCES, 17))


# ------------------------------------------------------------------------------------- the command
def test_the_command_writes_the_file_and_says_what_goes_in(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export_program", lambda model: program)
    predict.main(["export", CHECKPOINT, "--out", str(tmp_path / "deep" / "model.pt2")])
    out = capsys.readouterr().out
    assert "images float32 (pairs, 3, 128, 128) and tokens int64 (pairs, 17)" in out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt2"]
    assert zipfile.is_zipfile(tmp_path / "deep" / "model.pt2")


@pytest.mark.parametrize(
    "argv, says",
    [
        ([CHECKPOINT, "--out", "model.bin"], "model.bin: name it .pt2"),
        ([CHECKPOINT, "--out", "file/model.pt2"], "cannot be written"),
        (["none.pt", "--out", "model.pt2"], "none.pt: no such checkpoint"),
        ([CHECKPOINT], "--out"),
        ([CHECKPOINT, "--out", "model.pt2", "--image", "x.png"], "--image"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        predict.main(["export", *argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_onnx_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        predict.main(["export", CHECKPOINT, "--out", str(tmp_path / "model.onnx")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "needs `pip install onnx onnxscript`; .pt2 does without" in error
    assert not any(tmp_path.iterdir())


def test_every_option_of_export_is_explained():
    for action in predict.export_parser()._actions:
        assert action.help, action.dest
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        predict.main(["export", "--help"])
    assert "model.onnx" in out.getvalue()
    assert "--image" not in out.getvalue()
