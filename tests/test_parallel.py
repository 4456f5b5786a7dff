"""4b. Several processes, one run: the same losses, gradients and numbers as one, and nobody stays behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_train import FAST, run, same
from torch import nn

import parallel
import train
from clip_model import HERE
from data import open_dataset
from evaluate import evaluate
from official import read_checkpoint

CASES = [(4, 1), (5, 1), (5, 2), (2, 2)]  # objects of a batch, micro-batches: equal and unequal shares, one each


def gradients(world, out):
    """By case: loss, IoU and all gradients of one step with BatchNorm in evaluation mode."""
    args, found = train.arguments([*FAST, "--out", out, "--dropout", "0"]), []
    source = train.open_sources(args)[0]
    for objects, args.accumulate in CASES:
        torch.manual_seed(world.rank)  # rank 0's parameters count
        model = train.build("tiny", weights="random", size=64, dropout=0.0, width=32).eval()
        state = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
        state.join(world)
        state.forget = lambda: None  # keep what has been added up
        loader = train.train_loader(train.TrainSet(source, 64, 17), objects, 0, share=world.share)
        numbers = train.step(state, next(iter(loader)))
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((torch.tensor(numbers), torch.cat(grads)))
    return found


@pytest.mark.parametrize("count, size, accumulate, wanted", [(32, 5, 4, 4), (32, 3, 8, 8), (5, 2, 8, 2), (7, 1, 3, 3)])
def test_every_rank_takes_as_many_micro_batches(count, size, accumulate, wanted, tmp_path):
    """Shares of a batch differ by one object; ranks that wait for each other in every forward pass must not differ."""
    args = train.arguments([*FAST, "--out", str(tmp_path), "--accumulate", str(accumulate)])
    model, taken = train.build("tiny", weights="random", size=64, width=32), []
    state = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
    objective = state.objective
    state.objective = lambda *batch: taken.append(len(batch[0])) or objective(*batch)
    source = open_dataset("scenes", "train", limit=count, side=64)
    for rank in range(size):
        state.world = parallel.World(rank, size)
        state.world.total = lambda *numbers: [count] if len(numbers) == 1 else list(numbers)  # nobody else is there
        state.world.hold = lambda *_, **__: contextlib.nullcontext()
        taken.clear()
        share = slice(rank, None, size)
        train.step(state, next(iter(train.train_loader(train.TrainSet(source, 64, 17), count, 0, share=share))))
        assert len(taken) == wanted and sum(taken) == len(range(rank, count, size))


def scores(world):
    """evaluate's whole answer for seven scenes, on a model with BatchNorm statistics that only rank 0 has."""
    torch.manual_seed(world.rank)
    model = train.build("tiny", weights="random", size=64, width=32)
    model.hierarchical.merge[1].running_mean.fill_(world.rank)
    world.copy_first(tensor for _, tensor in model.tuned())
    source = open_dataset("scenes", "val", limit=7, side=64)
    return evaluate(model, source, progress=False, threshold=0.5, world=world)


def both(world, out):
    return gradients(world, out), scores(world)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """What `both` gives in one process, and in the first of two."""
    out = str(tmp_path_factory.mktemp("run"))
    alone = both(parallel.ALONE, out)
    with parallel.companions(parallel.ALONE, 2, both, out) as world:
        assert (world.rank, world.size) == (0, 2)
        together = both(world, out)
    return alone, together


def test_two_processes_give_the_loss_and_gradients_of_one(one_and_two):
    """To 1e-5 of the largest, whether the shares are equal (2 + 2 of 4) or not (3 + 2 of 5), in micro-batches too."""
    (alone, _), (together, _) = one_and_two
    for (numbers, gradient), (numbers_of_two, gradient_of_two) in zip(alone, together, strict=True):
        assert torch.allclose(numbers, numbers_of_two, rtol=1e-5)
        assert (gradient - gradient_of_two).abs().max() <= 1e-5 * gradient.abs().max()
        assert gradient.abs().max() > 0


def test_evaluation_counts_every_object_once(one_and_two):
    """Seven objects, three here and four there: the same rows in the same order, the same result."""
    (_, (result, rows)), (_, (result_of_two, rows_of_two)) = one_and_two
    same = ("ref_id", "sent_id", "sentence", "kind")
    assert [[row[key] for key in same] for row in rows_of_two] == [[row[key] for key in same] for row in rows]
    assert [row["I"] for row in rows_of_two] == pytest.approx([row["I"] for row in rows], abs=2)  # pixels at the edge
    assert {key: result_of_two[key] for key in ("refs", "sentences", "images", "cut")} == {
        "refs": 7, "sentences": len(rows), "images": result["images"], "cut": result["cut"]}  # fmt: skip
    assert len({row["I"] for row in rows}) > 3 and result_of_two["mIoU"] == pytest.approx(result["mIoU"], abs=0.1)


def test_shares_of_an_epoch_are_all_of_it_once():
    worlds = [parallel.World(rank, 3) for rank in range(3)]
    for batch in train.epoch_batches(20, 5, seed=0, epoch=1):
        assert sorted(i for world in worlds for i in batch[world.share]) == sorted(batch)
        assert min(len(batch[world.share]) for world in worlds) > 0
    assert [i for world in worlds for i in world.part(7)] == list(range(7))


def test_no_two_ranks_throw_the_same_dice(tmp_path):
    """Dropout's: a rank has a million seeds of its own, one for each step that a run may be resumed at."""
    args, blocks = train.arguments([*FAST, "--out", str(tmp_path)]), []
    model = train.build("tiny", weights="random", size=64, width=32)
    state = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
    for rank in range(1, 4):
        for state.steps in (0, 10**6 - 1):
            state.join(parallel.World(rank))  # of one process: nothing to exchange
            blocks.append(torch.initial_seed() // 10**6)
    assert blocks == [1, 1, 2, 2, 3, 3]


def test_two_and_two_steps_are_four_in_two_processes(tmp_path, monkeypatch):
    """A signal to the first stops both after the step; resumed, bit-identical. Then on with one process, and back."""
    more = ("--steps", 4, "--processes", 2)
    whole = run(tmp_path / "whole", *more)
    real, calls = train.step, []

    def interrupted(state, batch):
        calls.append(len(batch["image"]))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, batch)

    monkeypatch.setattr(train, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", *more)
    assert stop.value.code == 130 and calls == [2, 2, 2]
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["training"]["steps"] == 3
    assert same(whole, run(tmp_path / "parts", *more, "--resume"))
    for processes, steps in ((1, 6), (2, 8)):
        on = run(tmp_path / "parts", "--steps", steps, "--processes", processes, "--resume")
        assert on["training"]["steps"] == steps
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["processes"] == 2 and [line["step"] for line in lines[1:]] == [2, 4, 6, 8]


def test_no_more_processes_than_objects_in_a_batch(tmp_path):
    assert run(tmp_path, "--steps", 1, "--limit", 1, "--processes", 2)["args"]["processes"] == 1


@contextlib.contextmanager
def started(out, *more, launcher=()):
    """train.py in a session of its own, of which nothing is left afterwards."""
    command = [sys.executable, *launcher, str(HERE / "train.py"), *FAST, "--out", str(out), *more]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        for pid in session(process):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.2)
    return condition()


def session(process) -> list[int]:
    """Who lives in the process's session: itself, its helpers, their helpers."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True).stdout.splitlines()
    return [int(pid) for pid, leader, state in map(str.split, lines) if leader == str(process.pid) and state[0] != "Z"]


@pytest.mark.parametrize("kind", ["INT", "KILL"])
def test_nobody_stays_behind(kind, tmp_path):
    """Ctrl-C, which a terminal sends to every process, saves and exits with 130; kill -9 of the first ends all."""
    with started(tmp_path / "run", "--processes", "2", "--steps", "5000") as process:
        assert wait_for((tmp_path / "run" / "last.pt").exists) and len(session(process)) > 1
        if kind == "INT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if kind == "INT" else -9), errors
        assert (
            "Traceback" not in errors
            and "resource_tracker" not in errors
            and wait_for(lambda: not session(process), 20)
        )
    assert kind == "KILL" or read_checkpoint(tmp_path / "run" / "last.pt")["training"]["steps"] >= 2


def test_a_helper_that_dies_is_one_line(tmp_path):
    with started(tmp_path / "run", "--processes", "2", "--steps", "5000") as process:
        assert wait_for((tmp_path / "run" / "last.pt").exists)
        command = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        helpers = [line.split() for line in command.splitlines() if "spawn_main" in line]
        [helper] = [int(pid) for pid, parent, *_ in helpers if parent == str(process.pid)]
        os.kill(helper, signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and "Traceback" not in errors
        assert "a helper process ended early" in errors and "leaked" not in errors, errors


def test_torchrun_trains_one_run(tmp_path):
    """Two gloo processes under torchrun: one folder, one log, and the number of processes in it."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with started(tmp_path / "run", "--steps", "2", launcher=launcher) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    first, *epochs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert first["processes"] == 2 and [line["step"] for line in epochs] == [2]
    assert output.count("try it:") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["refs"] == 8


def test_a_users_mistake_is_found_before_helpers_start(tmp_path):
    with started(tmp_path / "run", "--processes", "2", "--weights", "nowhere.pt") as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and errors.count("\n") == 1 and "nowhere.pt" in errors


def test_on_gpus_tuned_norms_see_the_whole_batch_and_frozen_ones_stay():
    """Every BatchNorm2d outside CLIP becomes a SyncBatchNorm with the same tensors; CLIP's stay as they are."""
    model = train.build("tiny", weights="random", size=64, width=32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    count = sum(isinstance(m, nn.BatchNorm2d) for n, m in model.named_modules() if not n.startswith("clip."))
    parallel.sync_batch_norm(model)
    converted = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(converted) == count > 0 and not any(name.startswith("clip.") for name in converted)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
