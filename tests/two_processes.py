"""Run by torchrun in test_distributed.py: gradients and scores of a run in several processes.

torchrun --nproc_per_node 2 tests/two_processes.py OUT.pt
"""

import sys
from pathlib import Path

import torch

from checkpoint import build_model
from data import TrainDataset, open_dataset, to_device, train_loader
from evaluate import evaluate, rank_range
from train import train_step
from utils import distributed

CASES = [(4, 1), (4, 2), (2, 2), (8, 3)]  # objects of a batch, micro-batches


class KeepGradients:
    """An optimizer that changes nothing."""

    def step(self):
        pass

    def zero_grad(self, set_to_none):
        pass


def gradients():
    """By case: loss and all gradients of one step with BatchNorm in evaluation mode."""
    dataset = open_dataset("scenes", "train", limit=8, side=64)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = []
    for objects, accumulate in CASES:
        torch.manual_seed(distributed.rank())  # the parameters of rank 0 count
        model = build_model("tiny", weights="random", size=64, dropout=0.0, width=32).eval()
        wrapped = distributed.wrap(model)
        loader = train_loader(TrainDataset(dataset, 64, 17), objects, epoch=0)
        batch = to_device(next(iter(loader)), "cpu")
        loss = train_step(wrapped, batch, KeepGradients(), scaler, torch.float32, accumulate)
        [loss] = distributed.all_reduce_mean(loss)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss, torch.cat(grads)))
    return found


def scores():
    """evaluate's answer for seven scenes, with BatchNorm statistics that only rank 0 has."""
    torch.manual_seed(0)
    model = build_model("tiny", weights="random", size=64, width=32)
    model.hierarchical_alignment.merge[1].running_mean.fill_(float(distributed.rank()))
    distributed.broadcast(model.buffers())
    dataset = open_dataset("scenes", "val", limit=7, side=64)
    return evaluate(model, dataset, progress=False, threshold=0.5)


def gloo_threads() -> int:
    """Linux names a process's threads there; elsewhere 0."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def main():
    distributed.start(torch.device("cpu"))
    own = rank_range(7, distributed.rank(), distributed.world_size())
    found = {
        "gradients": gradients(),
        "scores": scores(),
        "ranges": distributed.all_gather_rows(list(own)),
        "processes": distributed.world_size(),
    }
    rank = distributed.rank()
    found["threads"] = gloo_threads()
    distributed.stop()
    found["threads_at_the_end"] = gloo_threads()
    if rank == 0:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
