"""4. train.py: the loop, its settings, and a run that stops and goes on as if it never had."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import record, write_folder

import train
from clip_model import CLIP, HERE, SIZES
from command import UserError
from data import open_dataset
from etris import check_size, positions
from official import load_checkpoint, read_checkpoint

FAST = ["--weights", "random", "--limit", "8", "--batch-size", "4", "--device", "cpu", "--size", "64",
        "--processes", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def leave_torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


def run(out, *more):
    train.main([*FAST, "--out", str(out), *map(str, more)])
    return read_checkpoint(out / "last.pt")


def same(a, b):
    """Whether two checkpoints hold bit-identical tensors, optimiser, dice and counters."""
    tensors = [torch.equal(a["tuned"][n], b["tuned"][n]) for n in a["tuned"]]
    moments = [torch.equal(x, b["training"]["adam"]["state"][i][k])
               for i, state in a["training"]["adam"]["state"].items() for k, x in state.items()]  # fmt: skip
    rest = [a["training"][k] == b["training"][k] for k in ("epoch", "done", "steps", "best", "rate", "scaler")]
    return all(tensors) and all(moments) and all(rest)


def test_a_run_leaves_the_folder_that_the_readme_promises(tmp_path):
    """args, log with provenance first, checkpoints, curves, pictures by epoch, result with metrics and minutes."""
    checkpoint = run(tmp_path / "a", "--steps", 4)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"args.json", "log.jsonl", "last.pt", "best.pt", "curves.png", "result.json",
                     "predictions_01.png", "predictions_02.png"}  # fmt: skip
    first, *epochs = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"command", "commit", "torch", "hardware", "seed", "frozen"} <= set(first)
    assert [line["step"] for line in epochs] == [2, 4] and "mIoU" in epochs[0]["val"]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert {"oIoU", "mIoU", "Pr@0.5", "Pr@0.9", "minutes", "sentences", "refs", "images"} <= set(result)
    assert result["split"] == "test" and result["refs"] == 8
    of_clip = {name for name in checkpoint["tuned"] if name.startswith("clip.")}  # never the frozen tensors
    assert of_clip == {"clip.positional_embedding", "clip.visual.attnpool.positional_embedding"}
    assert read_checkpoint(tmp_path / "a" / "best.pt")["training"] is None  # and to share, no optimiser


def test_two_and_two_steps_are_four(tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch and resumed: bit-identical, dropout's dice included."""
    whole = run(tmp_path / "whole", "--steps", 6, "--dropout", "0.1")
    real, calls = train.step, []

    def interrupted(run, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # arrives in a step, waits for its end
        return real(run, batch)

    monkeypatch.setattr(train, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", "--steps", 6, "--dropout", "0.1")
    assert stop.value.code == 130 and read_checkpoint(tmp_path / "parts" / "last.pt")["training"]["done"] == 1
    monkeypatch.setattr(train, "step", real)
    assert same(whole, run(tmp_path / "parts", "--steps", 6, "--dropout", "0.1", "--resume"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[1:] for name in ("whole", "parts")]
    assert [[json.loads(line)["loss"] for line in log] for log in logs][0] == pytest.approx(
        [json.loads(line)["loss"] for line in logs[1]])  # fmt: skip


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(tmp_path, capsys):
    run(tmp_path / "new", "--steps", 1, "--resume")
    assert "is not there: starting fresh" in capsys.readouterr().out


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


def test_resume_refuses_an_optimiser_that_knew_the_gates_dead_rows(tmp_path, capsys):
    run(tmp_path / "a", "--steps", 1)
    path = tmp_path / "a" / "last.pt"
    file = torch.load(path, weights_only=True)
    moment = next(x for x in file["training"]["adam"]["state"].values() if x["exp_avg"].ndim == 2)
    moment["exp_avg"] = torch.cat([moment["exp_avg"]] * 3)
    torch.save(file, path)
    with pytest.raises(SystemExit):
        run(tmp_path / "a", "--steps", 2, "--resume")
    assert "its optimiser is an older train.py's: move" in capsys.readouterr().err


def test_a_finished_run_is_moved_aside_not_overwritten(tmp_path):
    run(tmp_path / "a", "--steps", 1)
    before = (tmp_path / "a" / "best.pt").read_bytes()
    run(tmp_path / "a", "--steps", 1)
    assert (tmp_path / "a-1" / "best.pt").read_bytes() == before


def test_the_checkpoint_gives_the_model_that_was_trained(tmp_path):
    """Loading builds the frozen CLIP anew and adds the tuned tensors: the same logits."""
    run(tmp_path / "a", "--steps", 2)
    model = load_checkpoint(tmp_path / "a" / "last.pt")
    again = load_checkpoint(tmp_path / "a" / "last.pt")
    images, tokens = torch.randn(1, 3, 64, 64), torch.tensor([[49406, 736, 49407, 0]])
    with torch.no_grad():
        assert torch.equal(model(images, tokens), again(images, tokens))
    assert not model.training and (model.size, model.words) == (64, 17)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    """With BatchNorm in evaluation mode, four refs at once and two times two give the same gradient."""
    args = train.arguments([*FAST, "--out", str(tmp_path), "--dropout", "0"])
    batch = next(iter(train.train_loader(train.TrainSet(train.open_sources(args)[0], 64, 17), 4, 0)))
    gradients = []
    for args.accumulate in (1, 2):
        torch.manual_seed(0)
        model = train.build("tiny", weights="random", size=64, dropout=0.0, width=32).eval()
        state = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
        state.forget = lambda: None  # keep what has been added up
        train.step(state, batch)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max())


def test_the_papers_settings_are_the_presets():
    """Section 4.2: 416, 50 epochs, batch 32, Adam 1e-4, the Bridger 1e-3 on a ViT, 0.1 after epoch 35."""
    args = train.arguments(["--backbone", "RN101", "--dataset", "refcoco"])
    assert (args.size, args.epochs, args.batch_size, args.words) == (416, 50, 32, 17)
    assert (args.lr, args.bridge_lr, args.beta2, args.processes) == (1e-4, 1e-4, 0.999, 1)
    args = train.arguments(["--backbone", "ViT-B-16", "--dataset", "refcocog-umd"])
    assert (args.lr, args.bridge_lr, args.words) == (1e-4, 1e-3, 22)
    factor = train.schedule("step", 50 * 1325)
    assert (factor(35 * 1325 - 1), factor(35 * 1325)) == (1.0, 0.1)


def test_a_laptops_settings_are_the_presets_of_the_tiny_clip():
    """The README's row 28: 9 epochs of batches of 32 at 128 pixels, Adam 1.2e-3 with β₂ 0.98, a cosine, no dropout."""
    args = train.arguments([])
    assert (args.backbone, args.size, args.epochs, args.batch_size, args.width) == ("tiny", 128, 9, 32, 32)
    assert (args.lr, args.bridge_lr, args.beta2, args.schedule) == (1.2e-3, 1.2e-3, 0.98, "cosine")
    assert (args.dropout, args.processes) == (0, 2)


def test_of_drawn_scenes_200_validate_and_500_test():
    """Unless --limit says another number, or the data set has an end of its own."""
    counts = [len(train.open_evaluation(train.arguments([]), split, None)) for split in ("val", "test")]
    assert counts == [200, 500]
    assert len(train.open_evaluation(train.arguments(["--limit", "7"]), "test", None)) == 7


def test_a_folders_split_is_validated_whole(tmp_path):
    folder = write_folder(tmp_path, [record(0, split="val") for _ in range(201)])
    assert len(train.open_evaluation(train.arguments(["--dataset", str(folder)]), "val", None)) == 201


def test_only_a_split_that_is_not_there_is_replaced(refer_tree, capsys):
    """RefCOCO without testA: tested on val, and said. With a picture of val missing: an error before any training."""
    args = train.arguments(["--dataset", "refcoco", "--data", str(refer_tree)])
    val = open_dataset("refcoco", "val", refer_tree)
    assert train.open_evaluation(args, "val", None).split == "val"
    args.dataset = str(write_folder(refer_tree / "own", [record(0, split="train")]))
    assert train.open_evaluation(args, "test", val) is val
    assert "testing on the val split" in capsys.readouterr().out
    args.dataset = "refcoco"
    for item in (refer_tree / "images" / "train2014").iterdir():
        item.unlink()
    with pytest.raises(UserError, match="is missing"):
        train.open_evaluation(args, "val", None)


def test_a_mix_has_the_words_of_its_longest_set(tmp_path):
    assert train.arguments(["--dataset", "scenes,scenes-g"]).words == 22
    assert train.arguments(["--dataset", "scenes,scenes+"]).words == 17


def test_every_backbones_size_fits_its_strides():
    """Patches of 14 do not divide 416: those two are trained at 420."""
    sizes = {name: train.arguments(["--backbone", name]).size for name in SIZES}
    assert (sizes["ViT-L-14"], sizes["RN101"], sizes["tiny"]) == (420, 416, 128)
    for name, size in sizes.items():
        with torch.device("meta"):
            check_size(CLIP(SIZES[name]), size)


def test_words_are_at_least_start_one_piece_and_end():
    """And at most what the frozen CLIP has positions for."""
    assert [train.arguments(["--words", str(words)]).words for words in (3, 24)] == [3, 24]
    for words in (2, 25):
        with pytest.raises(UserError, match=f"--words {words}: choose 3 to 24"):
            train.arguments(["--words", str(words)])


def test_what_is_trained_and_what_is_frozen_is_counted_by_part(tmp_path, capsys):
    """One line a part, the sums below: of CLIP only its positions are tuned, of everything else all."""
    run(tmp_path / "a", "--steps", 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " tuned" in line]
    found = {name: (int(tuned.replace(",", "")), int(frozen.replace(",", ""))) for name, tuned, _, frozen, _ in lines}
    model = load_checkpoint(tmp_path / "a" / "last.pt")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counts = {name: count for name, count in counts.items() if count}
    places = sum(p.numel() for p in positions(model.clip))
    expected = {name: (count, 0) for name, count in counts.items()} | {"clip": (places, counts["clip"] - places)}
    assert found == expected | {"all": tuple(map(sum, zip(*expected.values(), strict=True)))}
    assert list(found)[-1] == "all" and {"bridger", "hierarchical", "global_", "projector"} < set(found)


def test_detris_base_falls_twice():
    """SPEC 2.4: base 65 epochs, 0.1 after 35 and again after 55; large and mixed 50 epochs, once after 35."""
    args = train.arguments(["--system", "detris", "--backbone", "dinov2-base"])
    factor = train.schedule(args.schedule, 65 * 1325)
    found = [factor(step) for step in (0, 35 * 1325 - 1, 35 * 1325, 55 * 1325 - 1, 55 * 1325)]
    assert args.epochs == 65 and found == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    large = train.arguments(["--system", "detris", "--backbone", "dinov2-large-mixed"])
    assert (large.epochs, large.schedule) == (50, "step")


def test_the_bridger_has_its_own_rate(tmp_path):
    args = train.arguments(["--backbone", "ViT-B-16", "--lr", "2e-4", "--out", str(tmp_path)])
    model = train.build("tiny-vit", weights="random", size=64, width=32)
    groups = train.Run(args, model, torch.device("cpu"), torch.float32, 10).adam.param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([2e-4, 2e-3])
    bridger = sum(p.numel() for p in model.bridger.parameters())
    assert sum(p.numel() for p in groups[1]["params"]) == bridger


def test_overfit_takes_the_largest_masks(tmp_path, capsys):
    """--overfit 2: of eight objects the two that cover most, repeated for training, once for validation."""
    args = train.arguments([*FAST, "--overfit", "2"])
    training, validation = train.open_sources(args)
    shares = sorted(np.mean(item.mask) for item in open_dataset("scenes", "train", limit=8, side=64).items)
    assert sorted(np.mean(item.mask) for item in validation.items) == shares[-2:]
    assert len(training) == 80 and training[79].picture.shape == (64, 64, 3)
    train.main([*FAST, "--overfit", "2", "--epochs", "1", "--out", str(tmp_path / "a")])
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["refs"] == 2 and "the logit grid's ceiling: mIoU" in capsys.readouterr().out
    assert result["steps"] == 80 // 4


def test_a_folder_without_val_is_validated_on_train_and_that_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "own", [record(0), record(1)])
    train.main([*FAST, "--dataset", str(folder), "--steps", "1", "--out", str(tmp_path / "run")])
    assert "validating on the train split" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_with_step_rate_and_refs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "text_to_pixel_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
    with pytest.raises(SystemExit):
        run(tmp_path / "a", "--steps", 1)
    error = capsys.readouterr().err
    assert "the loss is nan at step 0" in error and "refs [" in error


def test_the_real_sample_trains_and_every_split_is_evaluated(refer_sample, tmp_path, capsys):
    """Tiny CLIP on real photographs: plumbing, not a benchmark; the google sample has no train split, and says so."""
    from evaluate import main as evaluate

    train.main([*FAST[:2], "--dataset", "refcoco", "--data", str(refer_sample), "--size", "64", "--steps", "2",
                "--batch-size", "8", "--processes", "1", "--out", str(tmp_path / "a")])  # fmt: skip
    sets = [("refcoco", "val"), ("refcoco", "testA"), ("refcoco", "testB"), ("refcocog-google", "val")]
    for name, split in sets:
        evaluate([str(tmp_path / "a" / "best.pt"), "--dataset", name, "--split", split, "--data", str(refer_sample),
                  "--json", str(tmp_path / f"{name}-{split}.json")])  # fmt: skip
        result = json.loads((tmp_path / f"{name}-{split}.json").read_text())
        assert result["split"] == split and result["sentences"] > 0
    with pytest.raises(SystemExit):
        train.main(["--dataset", "refcocog-google", "--data", str(refer_sample), "--out", str(tmp_path / "b")])
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
    command = [sys.executable, str(HERE / "train.py"), "--steps", "1", "--limit", "4", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=HERE)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and named in lines[0], done.stderr
    assert not (tmp_path / "out").exists() or case == "a checkpoint that is none"


def test_no_network_and_no_weights_names_the_three_ways_out(tmp_path):
    environment = os.environ | {"ETRIS_CACHE": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9",
                                "https_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}  # fmt: skip
    command = [sys.executable, str(HERE / "train.py"), "--backbone", "RN101", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and all(way in last for way in ("--weights FILE", "--weights random", "network"))


def test_a_step_in_bf16_goes_through(tmp_path):
    assert run(tmp_path / "a", "--steps", 1, "--amp", "bf16")["training"]["steps"] == 1


def test_two_deterministic_runs_are_the_same(tmp_path):
    """Three steps: they end in the middle of the second epoch."""
    a, b = (run(tmp_path / name, "--steps", 3, "--deterministic") for name in ("b", "c"))
    assert same(a, b) and torch.are_deterministic_algorithms_enabled()
    assert a["training"]["steps"] == 3


def test_no_steps_and_an_unknown_backbone_are_refused():
    with pytest.raises(SystemExit):
        train.arguments(["--steps", "0"])
    with pytest.raises(UserError):
        train.arguments(["--backbone", "?"])


def test_the_rates_rise_and_fall_as_a_cosine():
    """A thousand steps: the first 50 warm up; half way (1 + 99 / 2) %, at the end 1 % of the rate is left."""
    factor = train.schedule("cosine", 1000)
    assert [factor(step) for step in (500, 1000)] == pytest.approx([0.505, 0.01])
    assert factor(0) == pytest.approx(1 / 51) and factor(49) == pytest.approx(50 / 51, rel=0.01)
    rates = [factor(step) for step in range(50, 1001)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1, rel=0.01)


def test_what_is_not_asked_for_is_the_plain_case():
    args = train.arguments([])
    assert (args.seed, args.accumulate, args.words) == (0, 1, 17)
    assert (args.out, args.recompute, args.compile, args.deterministic) == ("runs/latest", False, False, False)


def test_the_log_begins_with_the_command_as_it_was_typed(tmp_path, monkeypatch):
    """And a run folder may lie deeper than what is there."""
    out = tmp_path / "deep" / "down"
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--steps", "1"])
    run(out, "--steps", 1)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["command"] == "python train.py --steps 1" and first["seed"] == 0
    assert read_checkpoint(out / "last.pt")["training"]["minutes"] > 0
    assert json.loads((out / "args.json").read_text())["workers"] == 0  # a CPU has better use for its cores


def test_an_epochs_end_is_whole_though_a_signal_comes_while_its_best_is_saved(tmp_path, monkeypatch):
    """The signal waits: best.pt, the log and last.pt tell of the same epoch; resumed, all is as if never stopped."""
    whole, save = run(tmp_path / "whole", "--steps", 4), train.Run.save

    def interrupted(state, name, **more):
        if name == "best.pt":
            monkeypatch.setattr(train.Run, "save", save)
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, name, **more)

    monkeypatch.setattr(train.Run, "save", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", "--steps", 4)
    last, best = (read_checkpoint(tmp_path / "parts" / f"{name}.pt") for name in ("last", "best"))
    assert stop.value.code == 130 and (last["training"]["epoch"], last["training"]["done"]) == (1, 0)
    assert all(torch.equal(best["tuned"][name], x) for name, x in last["tuned"].items())
    assert same(whole, run(tmp_path / "parts", "--steps", 4, "--resume"))


def test_a_second_signal_does_not_break_what_the_first_one_saves(tmp_path, monkeypatch):
    """Impatience: Ctrl-C again while last.pt is written."""
    step, save = train.step, train.Run.save

    def interrupted(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return step(state, batch)

    def again(state, name, **more):
        os.kill(os.getpid(), signal.SIGINT)
        save(state, name, **more)

    monkeypatch.setattr(train, "step", interrupted)
    monkeypatch.setattr(train.Run, "save", again)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", "--steps", 4)
    assert stop.value.code == 130 and read_checkpoint(tmp_path / "a" / "last.pt")["training"]["steps"] == 1


def test_a_step_says_the_loss_and_the_overlap_of_its_batch(tmp_path):
    """In one piece or two: the loss of all four, a system's own part (here 0.5) added to it, and the mean of each

    one's IoU, counted cell by cell.
    """
    args = train.arguments([*FAST, "--out", str(tmp_path), "--dropout", "0"])
    batch = next(iter(train.train_loader(train.TrainSet(train.open_sources(args)[0], 64, 17), 4, 0)))
    for args.accumulate in (1, 2):
        torch.manual_seed(0)
        model = train.build("tiny", weights="random", size=64, dropout=0.0, width=32, released=True).eval()
        model.align_corners = False
        with torch.no_grad():
            logits = model(batch["image"], batch["tokens"])
        loss = train.text_to_pixel_loss(logits, batch["mask"]).item()
        cells = batch["mask"].unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5)) > 0.5
        found = 1 / (1 + (-logits).exp()) > 0.35
        each = [(t & f).sum().item() / max(1, (t | f).sum().item()) for t, f in zip(cells, found, strict=True)]
        model.extra_loss = lambda: 0.5
        said = train.step(train.Run(args, model, torch.device("cpu"), torch.float32, 10), batch)
        assert said == pytest.approx((loss + 0.5, 100 * np.mean(each)), rel=1e-4) and np.mean(each) > 0


def test_an_epochs_line_holds_the_means_of_its_own_steps(tmp_path, monkeypatch):
    """Two epochs of two steps: losses 1 and 2, then 3 and 4."""
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(train, "step", lambda run, batch: (next(losses), 10.0))
    run(tmp_path / "a", "--steps", 4)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()[1:]]
    assert [(line["loss"], line["train_IoU"]) for line in lines] == [(1.5, 10), (3.5, 10)]
