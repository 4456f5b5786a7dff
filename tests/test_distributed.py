"""Several processes, one run: the same losses, gradients and numbers as one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import train
from checkpoint import build_model, read_checkpoint
from data import epoch_batches
from evaluate import rank_range
from test_train import FAST, run, same, step_of
from utils import distributed
from utils.common import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """What tests/two_processes.py finds in one process and in two."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = []
    for launcher in ([], TORCHRUN):
        out = folder / f"{len(launcher)}.pt"
        script = str(ROOT / "tests" / "two_processes.py")
        command = [sys.executable, *launcher, script, str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out, weights_only=True))
    return found


def test_two_processes_give_the_loss_and_gradients_of_one(one_and_two):
    """To 1e-5 of the largest gradient, in micro-batches too."""
    alone, together = one_and_two
    assert (alone["processes"], together["processes"]) == (1, 2)
    pairs = zip(alone["gradients"], together["gradients"], strict=True)
    for (loss, gradient), (loss_of_two, gradient_of_two) in pairs:
        assert loss_of_two == pytest.approx(loss, rel=1e-5)
        assert (gradient - gradient_of_two).abs().max() <= 1e-5 * gradient.abs().max()
        assert gradient.abs().max() > 0


def test_evaluation_counts_every_object_once(one_and_two):
    """Seven objects, three and four: the same rows in the same order, the same result."""
    (result, rows), (result_of_two, rows_of_two) = (found["scores"] for found in one_and_two)
    for row, row_of_two in zip(rows, rows_of_two, strict=True):
        for key in ("ref_id", "sent_id", "sentence", "kind"):
            assert row[key] == row_of_two[key]
        assert row_of_two["I"] == pytest.approx(row["I"], abs=2)  # pixels at the edge
    for key in ("refs", "sentences", "images", "cut"):
        assert result[key] == result_of_two[key]
    assert len({row["I"] for row in rows}) > 3
    assert result_of_two["mIoU"] == pytest.approx(result["mIoU"], abs=0.1)


def test_ranges_of_the_ranks_are_the_whole(one_and_two):
    assert one_and_two[1]["ranges"] == list(range(7))


def test_no_thread_of_the_group_outlives_it(one_and_two):
    """One that wakes while Python ends aborts a process whose work is done."""
    if sys.platform == "linux":
        assert one_and_two[1]["threads"] > 0
    assert one_and_two[1]["threads_at_the_end"] == 0


def test_shares_of_an_epoch_are_all_of_it_once():
    for batch in epoch_batches(20, 6, seed=0, epoch=1):
        shares = [batch[rank::3] for rank in range(3)]
        assert sorted(i for share in shares for i in share) == sorted(batch)
        assert {len(share) for share in shares} == {2}


def test_without_torchrun_nothing_is_exchanged():
    model = nn.Linear(2, 2)
    distributed.start(torch.device("cpu"))
    assert distributed.wrap(model) is model and distributed.rank() == 0
    assert distributed.all_reduce_mean(1.5, True) == [1.5, True]
    assert distributed.all_gather_rows([1]) == [1]
    assert list(rank_range(3, rank=0, world_size=1)) == [0, 1, 2]


@contextlib.contextmanager
def started(out, *more):
    """train.py in two processes and a session of its own, of which nothing is left afterwards."""
    command = [sys.executable, *TORCHRUN, str(ROOT / "train.py"), *FAST, "--out", str(out), *more]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_torchrun_trains_one_run(tmp_path):
    """Two gloo processes: one folder, one log, and the number of processes in it."""
    with started(tmp_path / "run", "--steps", "2") as process:
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    first, *epochs = [json.loads(line) for line in lines]
    assert first["processes"] == 2 and [line["step"] for line in epochs] == [2]
    assert output.count("try it:") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["refs"] == 8


def interrupt_after_first_save(process, last):
    """Wait for last.pt, send Ctrl-C to all processes; returns their output and errors."""
    end = time.time() + 240
    while not last.exists() and time.time() < end:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=120)


def test_ctrl_c_stops_all_processes_after_the_same_step(tmp_path):
    last = tmp_path / "run" / "last.pt"
    with started(tmp_path / "run", "--steps", "5000") as process:
        output, errors = interrupt_after_first_save(process, last)
    assert read_checkpoint(last)["training"]["state"]["global_step"] >= 2
    assert output.count("go on with --resume") == 1 and "Traceback" not in output, errors


def test_a_run_of_two_processes_stopped_and_resumed_is_the_whole_one(tmp_path):
    """Bit-identical, wherever the signal arrives; one process can go on with it."""
    more = ("--steps", "8")
    parts = tmp_path / "parts"
    with started(tmp_path / "whole", *more) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    with started(parts, *more) as process:
        interrupt_after_first_save(process, parts / "last.pt")
    with started(parts, *more, "--resume") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    whole = read_checkpoint(tmp_path / "whole" / "last.pt")
    assert same(whole, read_checkpoint(parts / "last.pt"))
    assert step_of(run(parts, "--steps", 10, "--resume")) == 10
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert lines[0]["processes"] == 2
    assert [line["step"] for line in lines[1:]] == [2, 4, 6, 8, 10]


class Enough(Exception):
    pass


def always(value):
    return lambda: value


def test_each_process_has_its_own_dropout(tmp_path, monkeypatch):
    """A million seeds for every rank, one for each step that a run may be resumed at."""
    run(tmp_path, "--steps", 2)
    seeds = []

    def first_step(*args):
        seeds.append(torch.initial_seed())
        raise Enough

    monkeypatch.setattr(train, "train_step", first_step)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back: ranks above 0 silence it
    for rank in (1, 2):
        monkeypatch.setattr(distributed, "rank", always(rank))
        for more in (["--out", str(tmp_path / "new")], ["--out", str(tmp_path), "--resume"]):
            with pytest.raises(Enough):
                train.main([*FAST, "--steps", "4", *more])
    assert seeds == [1_000_000, 1_000_002, 2_000_000, 2_000_002]


def test_a_batch_that_processes_cannot_share_equally_is_one_line(tmp_path):
    with started(tmp_path / "run", "--steps", "2", "--batch-size", "3") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "a batch of 3 is not divisible by 2 processes" in errors


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(distributed.UserError, match="2 processes, fewer GPUs"):
        distributed.start(torch.device("cuda"))


def test_several_processes_on_a_mac_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(distributed.UserError, match="give --device cpu"):
        distributed.start(torch.device("mps"))


def test_on_gpus_tuned_norms_see_the_whole_batch_and_frozen_ones_stay(monkeypatch):
    """Every BatchNorm2d outside CLIP becomes a SyncBatchNorm with the same tensors."""
    model = build_model("tiny", weights="random", size=64, width=32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trained = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    trained = [name for name in trained if not name.startswith("clip.")]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    distributed.wrap(model)
    found = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert found == trained and trained
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
