"""4. train.py: the loop, its settings, and a run that stops and goes on as if it never had."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import config
import data
import train
from checkpoint import build_model, load_checkpoint, read_checkpoint
from clip_model import CLIP, CLIP_CONFIGS
from conftest import grefer_tables, record, write_folder, write_refer
from data import (
    REFCOCO_FILES,
    Letterbox,
    TrainDataset,
    letterbox_mask,
    open_dataset,
    to_device,
    train_loader,
)
from etris import check_size, positional_embeddings, text_to_pixel_loss
from utils.common import ROOT, StopFlag, UserError
from utils.tokenizer import tokenize

FAST = ["--weights", "random", "--limit", "8", "--batch-size", "4", "--device", "cpu"]
FAST += ["--size", "64"]


@pytest.fixture(autouse=True)
def leave_torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


def run(out, *more):
    train.main([*FAST, "--out", str(out), *map(str, more)])
    return read_checkpoint(out / "last.pt")


def same(a, b):
    """Whether two checkpoints hold bit-identical tensors, optimizer, random states and counters."""
    for name, tensor in a["tuned"].items():
        if not torch.equal(tensor, b["tuned"][name]):
            return False
    ours, theirs = a["training"], b["training"]
    for i, moments in ours["optimizer"]["state"].items():
        for key, tensor in moments.items():
            if not torch.equal(tensor, theirs["optimizer"]["state"][i][key]):
                return False
    counters = ("epoch", "batch_in_epoch", "global_step", "best_miou", "running_loss")
    if any(ours["state"][key] != theirs["state"][key] for key in counters):
        return False
    if not torch.equal(ours["random"]["torch"], theirs["random"]["torch"]):
        return False
    return all(ours[key] == theirs[key] for key in ("scheduler", "scaler"))


def step_of(checkpoint):
    return checkpoint["training"]["state"]["global_step"]


def call_in_step(monkeypatch, number, action):
    """Call `action` at the beginning of the optimizer step with that number, from 1."""
    real = train.train_step
    calls = []

    def spy(*args):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*args)

    monkeypatch.setattr(train, "train_step", spy)


def send(kind):
    return lambda: os.kill(os.getpid(), kind)


def one_batch(args, model, count=4):
    """The first batch of the training set, as train_step takes it."""
    samples = TrainDataset(train.open_train_and_val(args)[0], model.size, model.max_tokens)
    return to_device(next(iter(train_loader(samples, count, epoch=0))), "cpu")


def small_model(**options):
    return build_model("tiny", weights="random", size=64, width=32, **options)


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


class NoUpdate:
    """An optimizer that keeps the gradients and changes nothing."""

    def step(self):
        pass

    def zero_grad(self, set_to_none):
        pass


def test_a_run_leaves_the_folder_that_the_readme_promises(tmp_path):
    """args, log with provenance first, checkpoints, curves, predictions by epoch, result with
    metrics and minutes.
    """
    checkpoint = run(tmp_path / "a", "--steps", 4)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "args.json",
        "log.jsonl",
        "last.pt",
        "best.pt",
        "curves.png",
        "result.json",
        "predictions_01.png",
        "predictions_02.png",
    }
    first, *epochs = [
        json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    ]
    assert {"command", "commit", "torch", "hardware", "seed", "frozen"} <= set(first)
    assert [line["step"] for line in epochs] == [2, 4] and "mIoU" in epochs[0]["val"]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert {"oIoU", "mIoU", "Pr@0.5", "Pr@0.9", "minutes", "sentences", "refs", "images"} <= set(
        result
    )
    assert result["split"] == "test" and result["refs"] == 8
    of_clip = {
        name for name in checkpoint["tuned"] if name.startswith("clip.")
    }  # never the frozen tensors
    assert of_clip == {"clip.positional_embedding", "clip.visual.attnpool.positional_embedding"}
    assert (
        read_checkpoint(tmp_path / "a" / "best.pt")["training"] is None
    )  # and to share, no optimiser


def test_three_and_three_steps_are_six(tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch and resumed: bit-identical, dropout included."""
    more = ("--steps", 6, "--dropout", "0.1")
    whole = run(tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        call_in_step(patch, 3, send(signal.SIGTERM))  # arrives in a step, which ends first
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "parts", *more)
    assert stop.value.code == 130
    stopped = read_checkpoint(tmp_path / "parts" / "last.pt")
    assert (step_of(stopped), stopped["training"]["state"]["batch_in_epoch"]) == (3, 1)
    assert same(whole, run(tmp_path / "parts", *more, "--resume"))
    losses = []
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(tmp_path, capsys):
    run(tmp_path / "new", "--steps", 1, "--resume")
    assert "does not exist: starting fresh" in capsys.readouterr().out


def test_resume_refuses_another_backbone_and_names_it(tmp_path, capsys):
    run(tmp_path / "a", "--steps", 1)
    with pytest.raises(SystemExit):
        run(tmp_path / "a", "--steps", 1, "--resume", "--backbone", "tiny-vit")
    assert "was trained with --backbone tiny, not tiny-vit" in capsys.readouterr().err


def test_resume_refuses_another_batch_size(tmp_path, capsys):
    """Where a run stands in its epoch is counted in batches."""
    run(tmp_path / "a", "--steps", 1)
    with pytest.raises(SystemExit):
        run(tmp_path / "a", "--steps", 1, "--resume", "--batch-size", 3)
    assert "was trained with --batch-size 4, not 3" in capsys.readouterr().err


def test_a_new_rate_takes_effect_on_resume_in_every_group(tmp_path):
    """--resume --lr X: the next step uses X, and what the checkpoint says is X too."""
    run(tmp_path / "a", "--epochs", 2, "--schedule", "step", "--lr", "1e-3")
    more = ("--epochs", 4, "--schedule", "step", "--lr", "1e-6", "--resume")
    resumed = run(tmp_path / "a", *more)
    groups = resumed["training"]["optimizer"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([1e-6, 1e-6])
    assert resumed["training"]["scheduler"]["base_lrs"] == pytest.approx([1e-6, 1e-6])
    rates = [
        json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()[1:]
    ]
    assert [line["rate"][0] for line in rates] == pytest.approx([1e-3, 1e-4, 1e-7, 1e-7])


def test_a_resumed_optimizer_is_that_of_todays_machine(tmp_path):
    """A run of a Mac goes on elsewhere: the stored groups said that Adam is not fused."""
    run(tmp_path / "a", "--epochs", 1)
    path = tmp_path / "a" / "last.pt"
    file = read_checkpoint(path)
    for group in file["training"]["optimizer"]["param_groups"]:
        group.update(fused=False, eps=1.0)
    torch.save(file, path)
    resumed = run(tmp_path / "a", "--epochs", 2, "--resume")
    groups = resumed["training"]["optimizer"]["param_groups"]
    assert [(group["fused"], group["eps"]) for group in groups] == [(True, 1e-8)] * 2


def test_the_first_resumed_step_uses_the_new_rate(tmp_path, monkeypatch):
    run(tmp_path / "a", "--epochs", 2, "--lr", "1e-3")
    seen = []
    real = train.train_step

    def spy(model, batch, optimizer, *rest):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return real(model, batch, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", spy)
    run(tmp_path / "a", "--epochs", 4, "--lr", "1e-6", "--resume")
    expected = 1e-6 * train.cosine_with_warmup(4, 8)
    assert seen[0] == pytest.approx([expected, expected])


def test_a_finished_run_is_moved_aside_not_overwritten(tmp_path):
    run(tmp_path / "a", "--steps", 1)
    before = (tmp_path / "a" / "best.pt").read_bytes()
    run(tmp_path / "a", "--steps", 1)
    assert (tmp_path / "a-1" / "best.pt").read_bytes() == before


def test_the_checkpoint_gives_the_model_that_was_trained(tmp_path):
    """Loading builds the frozen CLIP anew and adds the trained tensors: the same logits."""
    run(tmp_path / "a", "--steps", 2)
    model = load_checkpoint(tmp_path / "a" / "last.pt")
    again = load_checkpoint(tmp_path / "a" / "last.pt")
    images, tokens = torch.randn(1, 3, 64, 64), torch.tensor([[49406, 736, 49407, 0]])
    with torch.no_grad():
        assert torch.equal(model(images, tokens), again(images, tokens))
    assert not model.training and (model.size, model.max_tokens) == (64, 17)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    """With BatchNorm in evaluation mode, four refs at once and two times two: the same gradient."""
    args = train.arguments([*FAST, "--out", str(tmp_path)])
    gradients = []
    for accumulate in (1, 2, 3):
        torch.manual_seed(0)
        model = small_model(dropout=0.0).eval()
        batch = one_batch(args, model)
        train.train_step(model, batch, NoUpdate(), no_scaler(), torch.float32, accumulate)
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    for gradient in gradients[1:]:
        assert torch.allclose(gradients[0], gradient, atol=1e-5 * gradients[0].abs().max())


def test_the_papers_settings_are_the_presets():
    """Section 4.2: 416, 50 epochs, batch 32, Adam 1e-4, the Bridger 1e-3 on a ViT, 0.1 after epoch
    35.
    """
    args = train.arguments(["--backbone", "RN101", "--dataset", "refcoco"])
    assert (args.size, args.epochs, args.batch_size, args.words) == (416, 50, 32, 17)
    assert (args.lr, args.bridge_lr, args.beta2) == (1e-4, 1e-4, 0.999)
    args = train.arguments(["--backbone", "ViT-B-16", "--dataset", "refcocog-umd"])
    assert (args.lr, args.bridge_lr, args.words) == (1e-4, 1e-3, 22)
    drops = config.SCHEDULE_DROPS[args.schedule]
    before, after = (
        train.step_decay(step, 50 * 1325, drops) for step in (35 * 1325 - 1, 35 * 1325)
    )
    assert (before, after) == (1.0, 0.1)
    for backbone, preset in config.ETRIS_PRESETS.items():
        if backbone not in config.OWN_BACKBONES:
            assert preset.bridge_lr == (1e-3 if backbone.startswith("ViT") else 1e-4), backbone


def test_a_laptops_settings_are_the_presets_of_the_tiny_clip():
    """Row 28 of the ledger: 9 epochs of batches of 32 at 128 pixels, Adam 1.2e-3 with β₂ 0.98, a
    cosine, no dropout.
    """
    args = train.arguments([])
    assert (args.backbone, args.size, args.epochs, args.batch_size, args.width) == (
        "tiny",
        128,
        9,
        32,
        32,
    )
    assert (args.lr, args.bridge_lr, args.beta2, args.schedule) == (1.2e-3, 1.2e-3, 0.98, "cosine")
    assert args.dropout == 0


def test_of_drawn_scenes_200_validate_and_500_test():
    """Unless --limit says another number, or the data set has an end of its own."""
    counts = [len(train.open_split(train.arguments([]), split, None)) for split in ("val", "test")]
    assert counts == [200, 500]
    assert len(train.open_split(train.arguments(["--limit", "7"]), "test", None)) == 7


def test_a_folders_split_is_validated_whole(tmp_path):
    folder = write_folder(tmp_path, [record(0, split="val") for _ in range(201)])
    assert len(train.open_split(train.arguments(["--dataset", str(folder)]), "val", None)) == 201


def test_only_a_split_that_is_not_there_is_replaced(refer_tree, capsys):
    """RefCOCO without testA: tested on val, and said. With an image of val missing: an error
    before any training.
    """
    args = train.arguments(["--dataset", "refcoco", "--data", str(refer_tree)])
    val = open_dataset("refcoco", "val", refer_tree)
    assert train.open_split(args, "val", None).split == "val"
    args.dataset = str(write_folder(refer_tree / "own", [record(0, split="train")]))
    assert train.open_split(args, "test", val) is val
    assert "testing on the val split" in capsys.readouterr().out
    args.dataset = "refcoco"
    for item in (refer_tree / "images" / "train2014").iterdir():
        item.unlink()
    with pytest.raises(UserError, match="is missing"):
        train.open_split(args, "val", None)


@pytest.mark.parametrize(
    "system, backbone, umd, google",
    [
        ("etris", "RN101", 22, 22),
        ("detris", "dinov2-base", 22, 17),
        ("barleria", "ViT-B-16", 17, 17),
    ],
)
def test_refcocogs_words_are_those_of_the_systems_configuration(system, backbone, umd, google):
    """The released configurations' word_len; 17 on RefCOCO in all three."""
    found = []
    for dataset in ("refcocog-umd", "refcocog-google", "refcoco"):
        args = ["--system", system, "--backbone", backbone, "--dataset", dataset]
        found.append(train.arguments(args).words)
    assert found == [umd, google, 17]
    args = ["--system", system, "--backbone", backbone, "--dataset", "grefcoco"]
    assert train.arguments(args).words == 22


def test_a_mix_has_the_words_of_its_longest_set(tmp_path):
    assert train.arguments(["--dataset", "scenes,scenes-g"]).words == 22
    assert train.arguments(["--dataset", "scenes,scenes+"]).words == 17


def test_every_backbones_size_fits_its_strides():
    """Patches of 14 do not divide 416: those two are trained at 420."""
    sizes = {name: train.arguments(["--backbone", name]).size for name in CLIP_CONFIGS}
    assert (sizes["ViT-L-14"], sizes["RN101"], sizes["tiny"]) == (420, 416, 128)
    for name, size in sizes.items():
        with torch.device("meta"):
            check_size(CLIP(CLIP_CONFIGS[name]), size)


def test_words_are_at_least_start_one_piece_and_end():
    """And at most what the frozen CLIP has positions for."""
    assert [train.arguments(["--words", str(words)]).words for words in (3, 24)] == [3, 24]
    for words in (2, 25):
        with pytest.raises(UserError, match=f"--words {words}: choose 3 to 24"):
            train.arguments(["--words", str(words)])


def test_what_is_trained_and_what_is_frozen_is_counted_by_part(tmp_path, capsys):
    """One line a part, the sums below: of CLIP only its positions train, of everything else
    all.
    """
    run(tmp_path / "a", "--steps", 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " trainable" in line]
    found = {
        name: (int(trainable.replace(",", "")), int(frozen.replace(",", "")))
        for name, trainable, _, frozen, _ in lines
    }
    model = load_checkpoint(tmp_path / "a" / "last.pt")
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    counts = {name: count for name, count in counts.items() if count}
    positions = sum(p.numel() for p in positional_embeddings(model.clip))
    expected = {name: (count, 0) for name, count in counts.items()} | {
        "clip": (positions, counts["clip"] - positions)
    }
    assert found == expected | {"all": tuple(map(sum, zip(*expected.values(), strict=True)))}
    assert list(found)[-1] == "all" and {
        "bridger",
        "hierarchical_alignment",
        "global_alignment",
        "projector",
    } < set(found)


def test_detris_base_falls_twice():
    """The original's: base 65 epochs, 0.1 after 35 and again after 55.

    Large and mixed 50 epochs, once after 35.
    """
    args = train.arguments(["--system", "detris", "--backbone", "dinov2-base"])
    drops = config.SCHEDULE_DROPS[args.schedule]
    found = [
        train.step_decay(step, 65 * 1325, drops)
        for step in (0, 35 * 1325 - 1, 35 * 1325, 55 * 1325 - 1, 55 * 1325)
    ]
    assert args.epochs == 65 and found == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    large = train.arguments(["--system", "detris", "--backbone", "dinov2-large-mixed"])
    assert (large.epochs, large.schedule) == (50, "step")


def test_the_bridger_has_its_own_rate(tmp_path):
    args = train.arguments(["--backbone", "ViT-B-16", "--lr", "2e-4", "--out", str(tmp_path)])
    model = build_model("tiny-vit", weights="random", size=64, width=32)
    groups = train.parameter_groups(model, args)
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-3])
    bridger = sum(p.numel() for p in model.bridger.parameters())
    assert sum(p.numel() for p in groups[1]["params"]) == bridger
    every = sum(len(group["params"]) for group in groups)
    assert every == sum(p.requires_grad for p in model.parameters())


class Photo(SimpleNamespace):
    """A sample; of a bare SimpleNamespace nobody can ask whether it lives."""


class Living:
    """A data set that counts how many of its samples are in memory at once."""

    name = split = "living"

    def __init__(self):
        self.given = []
        self.most = 0

    def __len__(self):
        return 12

    def __getitem__(self, i):
        number = range(12)[i]  # IndexError where a list has it
        mask = np.arange(16).reshape(4, 4) < [1, 9][number in (8, 9, 11)]
        image = np.zeros((4, 4, 3), np.uint8)
        sample = Photo(number=number, mask=mask, image=image, sentences=["a line"])
        self.given.append(weakref.ref(sample))
        self.most = max(self.most, sum(alive() is not None for alive in self.given))
        return sample

    def counts(self):
        return {"refs": len(self)}


def test_overfit_takes_the_largest_masks(tmp_path, capsys):
    """--overfit 2: of eight objects the two that cover most, repeated for training, once for
    validation.
    """
    args = train.arguments([*FAST, "--overfit", "2"])
    training, validation = train.open_train_and_val(args)
    shares = sorted(
        np.mean(item.mask) for item in open_dataset("scenes", "train", limit=8, side=64).samples
    )
    assert sorted(np.mean(item.mask) for item in validation.samples) == shares[-2:]
    assert len(training) == 80 and training[79].image.shape == (64, 64, 3)
    train.main([*FAST, "--overfit", "2", "--epochs", "1", "--out", str(tmp_path / "a")])
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["refs"] == 2 and "the logit grid's ceiling: mIoU" in capsys.readouterr().out
    assert result["steps"] == 80 // 4


def test_overfit_holds_one_candidate_at_a_time(capsys):
    """Two hundred photographs of 12 megapixels would be ten gigabytes."""
    living = Living()
    training, validation = train.largest_objects(living, 2)
    assert [sample.number for sample in validation.samples] == [8, 9]  # the first of equals
    assert len(training) == 80 and living.most <= 2


def test_a_sheet_of_large_photographs_holds_one_at_a_time(tmp_path, monkeypatch, capsys):
    living = Living()
    monkeypatch.setattr(data, "open_dataset", lambda *_: living)
    data.main(["show", "scenes", "--number", "8", "--out", str(tmp_path / "sheet.png")])
    assert living.most <= 2 and (tmp_path / "sheet.png").exists()


def test_a_folder_without_val_is_validated_on_train_and_that_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "own", [record(0), record(1)])
    train.main([*FAST, "--dataset", str(folder), "--steps", "1", "--out", str(tmp_path / "run")])
    assert "validating on the train split" in capsys.readouterr().out


def spoil(monkeypatch, number, value=1.0, gradient=1.0):
    """Multiply the loss of the step with that number, from 0, by `value`, its gradient by
    `gradient`.
    """
    calls = []

    def loss(logits, masks, **more):
        calls.append(1)
        if len(calls) != number + 1:
            return text_to_pixel_loss(logits, masks, **more)
        logits.register_hook(lambda grad: grad * gradient)
        return text_to_pixel_loss(logits, masks, **more) * value

    monkeypatch.setattr(train, "text_to_pixel_loss", loss)


def test_a_loss_that_is_not_finite_is_one_line_with_step_and_refs(tmp_path, monkeypatch, capsys):
    """Nothing of a broken run is saved: last.pt stays the end of the first epoch."""
    spoil(monkeypatch, 3, value=float("nan"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 6)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert "the loss is nan at step 3, refs [" in error and "--resume" in error
    assert step_of(read_checkpoint(tmp_path / "a" / "last.pt")) == 2


def test_gradients_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """The epoch's last gradient is broken, its loss is not: last.pt and best.pt stay whole."""
    spoil(monkeypatch, 3, gradient=float("nan"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 4)
    assert stop.value.code == 2 and "is not finite any more" in capsys.readouterr().err
    assert step_of(read_checkpoint(tmp_path / "a" / "last.pt")) == 2


def test_a_scale_too_high_for_fp16_skips_the_step(tmp_path, monkeypatch):
    """Nothing moves but the scale; the next step is taken."""
    args = train.arguments([*FAST, "--out", str(tmp_path)])
    model = small_model(dropout=0.0).eval()
    batch = one_batch(args, model)
    optimizer = train.make_optimizer(model, args, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    spoil(monkeypatch, 0, gradient=float("inf"))
    train.train_step(model, batch, optimizer, scaler, torch.float32)
    assert scaler.get_scale() == 8.0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    train.train_step(model, batch, optimizer, scaler, torch.float32)
    assert not all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_fp16_gradients_that_overflow_at_every_scale_end_the_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    batch = {"ref_id": torch.tensor([7, 8])}
    with pytest.raises(UserError, match=r"fp16 gradients overflow at step 0, refs \[7, 8\]"):
        train.check_numbers(0.3, scaler, checkpoint.TrainState(), batch)


def test_the_real_sample_trains_and_every_split_is_evaluated(refer_sample, tmp_path, capsys):
    """Tiny CLIP on real photographs: plumbing, not a benchmark; the google sample has no train
    split, and says so.
    """
    from evaluate import main as evaluate

    train.main(
        [
            *FAST[:2],
            "--dataset",
            "refcoco",
            "--data",
            str(refer_sample),
            "--size",
            "64",
            "--steps",
            "2",
            "--batch-size",
            "8",
            "--out",
            str(tmp_path / "a"),
        ]
    )
    sets = [
        ("refcoco", "val"),
        ("refcoco", "testA"),
        ("refcoco", "testB"),
        ("refcocog-google", "val"),
    ]
    for name, split in sets:
        evaluate(
            [
                str(tmp_path / "a" / "best.pt"),
                "--dataset",
                name,
                "--split",
                split,
                "--data",
                str(refer_sample),
                "--json",
                str(tmp_path / f"{name}-{split}.json"),
            ]
        )
        result = json.loads((tmp_path / f"{name}-{split}.json").read_text())
        assert result["split"] == split and result["sentences"] > 0
    with pytest.raises(SystemExit):
        train.main(
            [
                "--dataset",
                "refcocog-google",
                "--data",
                str(refer_sample),
                "--out",
                str(tmp_path / "b"),
            ]
        )
    assert "split train has no refs" in capsys.readouterr().err and not (tmp_path / "b").exists()


BAD = {
    "unknown backbone": (["--backbone", "RN99"], "unknown backbone 'RN99'"),
    "unknown data set": (["--dataset", "cococo"], "cococo"),
    "missing folder": (["--dataset", "refcoco", "--data", "nowhere"], "prepare.py refcoco"),
    "a size the strides do not divide": (["--size", "100"], "multiple of 32"),
    "a rate below zero": (["--lr", "-1"], "--lr -1.0"),
    "too many words": (["--words", "90"], "--words 90"),
    "missing weights": (["--weights", "nowhere.pt"], "nowhere.pt"),
    "a checkpoint that is none": (["--resume", "pyproject.toml"], "pyproject.toml"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_did_wrong_is_one_line_and_exit_status_2(case, tmp_path):
    """The real command in its own process: nothing half-written."""
    arguments, named = BAD[case]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--steps",
        "1",
        "--limit",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and named in lines[0], done.stderr
    assert not (tmp_path / "out").exists() or case == "a checkpoint that is none"


def test_no_network_and_no_weights_names_the_three_ways_out(tmp_path):
    environment = os.environ | {
        "ETRIS_CACHE": str(tmp_path / "cache"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
        "NO_PROXY": "",
    }
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--backbone",
        "RN101",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and all(
        way in last for way in ("--weights FILE", "--weights random", "network")
    )


def test_a_step_in_bf16_goes_through(tmp_path):
    assert (
        run(tmp_path / "a", "--steps", 1, "--amp", "bf16")["training"]["state"]["global_step"] == 1
    )


def test_two_deterministic_runs_are_the_same(tmp_path):
    """Three steps: they end in the middle of the second epoch."""
    a, b = (run(tmp_path / name, "--steps", 3, "--deterministic") for name in ("b", "c"))
    assert same(a, b) and torch.are_deterministic_algorithms_enabled()
    assert step_of(a) == 3


def test_no_steps_and_an_unknown_backbone_are_refused():
    with pytest.raises(SystemExit):
        train.arguments(["--steps", "0"])
    with pytest.raises(UserError):
        train.arguments(["--backbone", "?"])


def test_the_rates_rise_and_fall_as_a_cosine():
    """A thousand steps: the first 50 warm up; half way (1 + 99 / 2) %, at the end 1 % is left."""

    def factor(step):
        return train.cosine_with_warmup(step, 1000)

    assert [factor(step) for step in (500, 1000)] == pytest.approx([0.505, 0.01])
    assert factor(0) == pytest.approx(1 / 51) and factor(49) == pytest.approx(50 / 51, rel=0.01)
    rates = [factor(step) for step in range(50, 1001)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1, rel=0.01)


def test_what_is_not_asked_for_is_the_plain_case():
    args = train.arguments([])
    assert (args.seed, args.accumulate, args.words) == (0, 1, 17)
    assert (args.out, args.compile, args.deterministic) == ("runs/latest", False, False)


def test_the_log_begins_with_the_command_as_it_was_typed(tmp_path, monkeypatch):
    """And a run folder may lie deeper than what is there."""
    out = tmp_path / "deep" / "down"
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--steps", "1"])
    run(out, "--steps", 1)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["command"] == "python train.py --steps 1" and first["seed"] == 0
    assert read_checkpoint(out / "last.pt")["training"]["state"]["minutes"] > 0
    assert (
        json.loads((out / "args.json").read_text())["workers"] == 0
    )  # a CPU has better use for its cores


def test_an_epochs_end_is_whole_though_a_signal_comes_while_its_best_is_saved(
    tmp_path, monkeypatch
):
    """The run stops once the epoch is saved; resumed, all is as if never stopped."""
    whole = run(tmp_path / "whole", "--steps", 4)
    save = checkpoint.save_checkpoint

    def interrupted(path, *rest):
        if path.name == "best.pt":
            monkeypatch.setattr(checkpoint, "save_checkpoint", save)
            os.kill(os.getpid(), signal.SIGTERM)
        save(path, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", "--steps", 4)
    assert stop.value.code == 130
    last = read_checkpoint(tmp_path / "parts" / "last.pt")
    assert step_of(last) == 2
    assert same(whole, run(tmp_path / "parts", "--steps", 4, "--resume"))


def test_a_second_signal_does_not_break_what_the_first_one_saves(tmp_path, monkeypatch):
    """Impatience: Ctrl-C again while last.pt is written."""
    save = checkpoint.save_training

    def again(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    call_in_step(monkeypatch, 1, send(signal.SIGINT))
    monkeypatch.setattr(checkpoint, "save_training", again)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 4)
    assert stop.value.code == 130
    assert step_of(read_checkpoint(tmp_path / "a" / "last.pt")) == 1


def test_a_second_signal_a_little_later_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(StopFlag, "PATIENCE", 0.0)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    call_in_step(monkeypatch, 1, twice)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 4)
    assert stop.value.code == 130 and not (tmp_path / "a" / "last.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_between_main_and_the_optimizer_stands_one_function(tmp_path, monkeypatch):
    """The command wrapper, main, train_step: nothing else of the project is on the stack."""
    frames = []
    real = torch.optim.Adam.step

    def spy(self, *args, **more):
        if not frames:
            for frame in inspect.stack()[1:]:
                path = Path(frame.filename)
                others = (ROOT / "tests", Path(sys.prefix))  # README's .venv lies in the project
                if path.is_relative_to(ROOT) and not any(map(path.is_relative_to, others)):
                    frames.append((path.name, frame.function))
        return real(self, *args, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run(tmp_path / "a", "--steps", 1)
    assert frames == [("train.py", "train_step"), ("train.py", "main"), ("common.py", "run")]


def test_a_step_returns_the_mean_loss_of_its_batch(tmp_path):
    """In one piece or two: the loss of all four, with a system's own part (here 0.5) added."""
    args = train.arguments([*FAST, "--out", str(tmp_path)])
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = small_model(dropout=0.0).eval()
        batch = one_batch(args, model)
        with torch.no_grad():
            logits = model(batch["image"], batch["tokens"])
        loss = text_to_pixel_loss(logits, batch["mask"]).item()
        model.auxiliary_loss = lambda: 0.5
        found = train.train_step(model, batch, NoUpdate(), no_scaler(), torch.float32, accumulate)
        assert found == pytest.approx(loss + 0.5, rel=1e-4)


def test_a_released_model_learns_from_the_top_left_pixel_as_the_original(tmp_path):
    """align_corners marks what the original released: its mask is resized by nearest."""
    args = train.arguments([*FAST, "--out", str(tmp_path)])
    model = small_model(dropout=0.0, released=True).eval()
    batch = one_batch(args, model)
    with torch.no_grad():
        logits = model(batch["image"], batch["tokens"])
    nearest = text_to_pixel_loss(logits, batch["mask"], nearest=True).item()
    area = text_to_pixel_loss(logits, batch["mask"]).item()
    found = train.train_step(model, batch, NoUpdate(), no_scaler(), torch.float32)
    assert found == pytest.approx(nearest, rel=1e-5) and nearest != pytest.approx(area, rel=1e-5)


def test_an_epochs_line_holds_the_means_of_its_own_steps(tmp_path, monkeypatch):
    """Two epochs of two steps: losses 1 and 2, then 3 and 4."""
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(train, "train_step", lambda *_: next(losses))
    run(tmp_path / "a", "--steps", 4)
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["loss"] for line in lines] == [1.5, 3.5]


SYSTEMS = [
    ("etris", "tiny"),
    ("etris", "tiny-vit"),
    ("barleria", "tiny-vit"),
    ("detris", "tiny-dino"),
]


@pytest.mark.parametrize("system, backbone", SYSTEMS)
def test_empty_masks_and_sentences_of_padding_make_no_nan(system, backbone):
    """Masks: none, one that the letterbox makes vanish, all. Tokens: start and end; padding."""
    size = 64
    model = build_model(backbone, system=system, weights="random", size=size)
    speck = np.zeros((3000, 2000), bool)
    speck[1500, 1000] = True
    small = letterbox_mask(speck, Letterbox(size, speck.shape)).float() / 255
    assert 0 <= small.sum() < 1
    nothing = torch.zeros(1, size, size)
    masks = torch.stack([nothing, small, torch.ones(1, size, size), nothing])
    tokens = tokenize(["", "\x07", "\u200b"], 17)
    tokens = torch.cat([tokens, torch.zeros(1, 17, dtype=torch.long)])
    logits = model(torch.randn(4, 3, size, size), tokens)
    loss = text_to_pixel_loss(logits, masks) + model.auxiliary_loss()
    loss.backward()
    assert loss.isfinite() and logits.isfinite().all()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


def test_sentences_that_fit_several_things_or_none_train(tmp_path, capsys):
    """Scenes and gRefCOCO from the command line to result.json, the four scores among it."""
    refs, instances = grefer_tables()
    refs[2]["split"] = "testA"
    write_refer(tmp_path, REFCOCO_FILES["grefcoco"], (refs, instances))
    for name in ("scenes-any", "grefcoco"):
        out = tmp_path / name
        run(out, "--dataset", name, "--data", tmp_path, "--steps", 2)
        result = json.loads((out / "result.json").read_text())
        assert {"oIoU", "mIoU", "gIoU", "cIoU", "N-acc", "T-acc"} <= result.keys()
        assert result["nothing_below"] == 50
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert np.isfinite(log[-1]["loss"]) and "gIoU" in log[-1]["val"]
        assert f"{name} test" in capsys.readouterr().out
    assert result["N-acc"] is None  # the only ref of testA names an object


def test_an_image_that_vanishes_while_training_costs_no_step(tmp_path, monkeypatch, capsys):
    """One line; last.pt holds the step before, in the middle of the epoch, and can be resumed."""
    folder = write_folder(tmp_path / "own", [record(0), record(1)])
    call_in_step(monkeypatch, 3, lambda: shutil.rmtree(folder / "images"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--dataset", folder, "--steps", 9, "--batch-size", 1)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "own/images/" in error
    stopped = read_checkpoint(tmp_path / "a" / "last.pt")["training"]["state"]
    assert (stopped["epoch"], stopped["global_step"]) == (1, 3)


@pytest.mark.parametrize("text", ["DataLoader worker (pid 7) is killed by signal: Killed.", "else"])
def test_whatever_ends_a_run_costs_no_step(tmp_path, monkeypatch, capsys, text):
    """A loading process that the system kills is one line; another error keeps its traceback."""

    def fail():
        raise RuntimeError(text)

    call_in_step(monkeypatch, 4, fail)  # in the middle of the second epoch
    is_killed = text.startswith("DataLoader")
    with pytest.raises(SystemExit if is_killed else RuntimeError):
        run(tmp_path / "a", "--steps", 9)
    error = capsys.readouterr().err
    assert (len(error.splitlines()) == 1 and "fewer --workers" in error) == is_killed
    assert step_of(read_checkpoint(tmp_path / "a" / "last.pt")) == 3
