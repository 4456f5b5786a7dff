"""4. Numbers going wrong in training: what is not finite stops the run or the step, and is never saved."""

import shutil

import numpy as np
import pytest
import torch
from conftest import record, write_folder
from test_train import FAST, run, same

import train
from clip_model import UserError, tokenize
from data import Box, letterbox_mask
from etris import text_to_pixel_loss
from official import read_checkpoint
from tuning import build


def spoil(monkeypatch, number, value=1.0, gradient=1.0):
    """The loss of the step with that number, from 0, is multiplied by `value`, its gradient by `gradient`."""
    calls = []

    def loss(logits, masks, **more):
        calls.append(1)
        if len(calls) == number + 1:
            logits.register_hook(lambda g: g * gradient)
            return text_to_pixel_loss(logits, masks, **more) * value
        return text_to_pixel_loss(logits, masks, **more)

    monkeypatch.setattr(train, "text_to_pixel_loss", loss)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps in which all is well."""
    return run(tmp_path_factory.mktemp("whole"), "--steps", 4)


@pytest.mark.parametrize("wrong", [{"value": float("nan")}, {"gradient": float("inf")}, {"gradient": float("nan")}])
def test_what_is_not_finite_ends_the_run_as_it_was_before_that_step(whole, tmp_path, monkeypatch, capsys, wrong):
    """Step, rate, refs are said; resumed with good numbers, the run is bit for bit the one that met none."""
    spoil(monkeypatch, 3, **wrong)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 4)
    error = capsys.readouterr().err
    what = f"the loss is {wrong['value']}" if "value" in wrong else "the largest gradient is "
    assert stop.value.code == 2 and what in error and "at step 3 (rate [0.00" in error and "refs [" in error
    saved = read_checkpoint(tmp_path / "a" / "last.pt")
    assert saved["training"]["steps"] == 3 and all(x.isfinite().all() for x in saved["tuned"].values())
    assert same(whole, run(tmp_path / "a", "--steps", 4, "--resume"))


def scaled_run(tmp_path, scale):
    """A run in float32 with fp16's scaler, and one batch for it."""
    args = train.arguments([*FAST, "--out", str(tmp_path), "--dropout", "0", "--workers", "0"])
    model = build("tiny", weights="random", size=64, dropout=0.0, width=32)
    state = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return state, next(iter(train.train_loader(train.TrainSet(train.open_sources(args)[0], 64, 17), 4, 0)))


def test_a_scale_too_high_for_fp16_skips_the_step_and_is_counted(tmp_path, monkeypatch):
    """Nothing moves but the scale, BatchNorm's statistics included; the next step is taken."""
    state, batch = scaled_run(tmp_path, 16.0)
    before = {name: x.clone() for name, x in state.model.tuned()}
    spoil(monkeypatch, 0, gradient=float("inf"))
    train.step(state, batch)
    assert (state.skipped, state.scaler.get_scale(), state.rate.last_epoch) == (1, 8.0, 0)
    assert all(torch.equal(x, before[name]) for name, x in state.model.tuned())
    train.step(state, batch)
    assert (state.skipped, state.rate.last_epoch) == (1, 1)
    assert not all(torch.equal(x, before[name]) for name, x in state.model.tuned())


def test_the_bar_shows_the_steps_skipped(tmp_path, monkeypatch):
    class Bar:
        format_dict, shown = {"rate": 1.0}, []

        def set_postfix(self, **more):
            self.shown.append(more)

        def update(self):
            pass

    state, _ = scaled_run(tmp_path, 16.0)
    spoil(monkeypatch, 1, gradient=float("inf"))
    train.train_epoch(state, train.open_sources(state.args)[0], Bar())
    assert ["skipped" in line for line in Bar.shown] == [False, True] and Bar.shown[1]["skipped"] == 1


def test_a_gradient_that_overflows_at_any_scale_ends_the_run(tmp_path, monkeypatch):
    state, batch = scaled_run(tmp_path, 0.5)
    (tmp_path / "last.pt").unlink(missing_ok=True)
    spoil(monkeypatch, 0, gradient=float("inf"))
    with pytest.raises(UserError, match="the largest gradient is inf at step 0"):
        train.step(state, batch)
    assert read_checkpoint(tmp_path / "last.pt")["training"]["steps"] == 0


SYSTEMS = [("etris", "tiny"), ("etris", "tiny-vit"), ("barleria", "tiny-vit"), ("detris", "tiny-dino")]


@pytest.mark.parametrize("system, backbone", SYSTEMS)
def test_empty_masks_and_sentences_of_padding_make_no_nan(system, backbone):
    """Masks: none, one that the letterbox makes vanish, all. Tokens: start and end alone; padding alone."""
    size, model = 64, build(backbone, system=system, weights="random", size=64)
    speck = np.zeros((3000, 2000), bool)
    speck[1500, 1000] = True
    small = letterbox_mask(speck, Box(size, speck.shape))
    assert 0 <= small.sum() < 1
    masks = torch.stack([torch.zeros(1, size, size), small, torch.ones(1, size, size), torch.zeros(1, size, size)])
    tokens = torch.cat([tokenize(["", "\x07", "\u200b"], 17), torch.zeros(1, 17, dtype=torch.long)])
    logits = model(torch.randn(4, 3, size, size), tokens)
    loss = text_to_pixel_loss(logits, masks) + model.extra_loss()
    loss.backward()
    assert loss.isfinite() and logits.isfinite().all() and np.isfinite(train.grid_iou(logits.detach(), masks))
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


def test_data_that_vanish_while_training_end_it_with_one_line(tmp_path, monkeypatch, capsys):
    """The pictures go after the first epoch: its checkpoint stays, whole, and can be gone on with."""
    folder, real, calls = write_folder(tmp_path / "own", [record(0), record(1)]), train.step, []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 3:  # the first of the second epoch
            shutil.rmtree(folder / "images")
        return real(state, batch)

    monkeypatch.setattr(train, "step", step)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--dataset", folder, "--steps", 9, "--batch-size", 1)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "own/images/" in error
    assert read_checkpoint(tmp_path / "a" / "last.pt")["training"]["epoch"] == 1


def test_what_a_helper_process_cannot_read_is_named_by_the_first(tmp_path, capfd):
    """Two objects, two processes, one damaged picture: that of the helper's share of the first batch."""
    folder = write_folder(tmp_path / "own", [record(0), record(1)])
    bad = train.epoch_batches(2, 2, seed=0, epoch=0)[0][1]
    (folder / "images" / f"{bad}.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--dataset", folder, "--steps", 1, "--batch-size", 2, "--processes", 2)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and f"own/images/{bad}.png" in error.splitlines()[-1]
