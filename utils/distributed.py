"""One run in several processes, started by torchrun: torch's own DistributedDataParallel."""

import contextlib
import gc
import os

import torch
import torch.distributed as dist

from utils.common import UserError


def start(device):
    """Join the processes that torchrun started.

    UserError for more processes than GPUs, and on a Mac's GPU, which no backend serves.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", -1))
    if local_rank < 0:
        return
    if device.type == "mps":
        raise UserError("several processes cannot share a Mac's GPU: give --device cpu")
    torch.compiler.reset()  # loads the compiler; loaded later, by wrap, it keeps the group alive
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} processes, fewer GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local_rank)  # what "cuda" means from here on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop():
    """Leave the group. Its threads end here, or one might wake while Python ends, and abort it."""
    gc.collect()  # what is left of DistributedDataParallel holds them
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model that averages gradients; on GPUs its tuned BatchNorms see the whole batch."""
    if world_size() == 1:
        return model
    if dist.get_backend() == "nccl":
        for name, child in model.named_children():
            if child is not model.backbone:
                setattr(model, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return torch.nn.parallel.DistributedDataParallel(model)


def no_sync(model: torch.nn.Module, last: bool):
    """Of several micro-batches only the last one exchanges gradients."""
    return contextlib.nullcontext() if last or world_size() == 1 else model.no_sync()


def all_reduce_mean(*numbers: float) -> list[float]:
    """Each number, averaged over the processes."""
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return (sums / world_size()).tolist()


def all_gather_rows(rows: list) -> list:
    """The lists of all processes in the order of their ranks, on every process."""
    gathered = [rows] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, rows)
    return sum(gathered, [])


def broadcast(tensors):
    """Every process gets the tensors of rank 0."""
    for tensor in tensors if world_size() > 1 else ():
        whole = tensor.detach().contiguous()  # a convolution's weight may lie channels-last
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)
