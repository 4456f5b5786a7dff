"""4b. Several processes, one run: each takes its share of every batch, and what they found is averaged.

    python train.py --processes 2                       two processes of one thread each instead of one of two
    torchrun --nproc_per_node 4 train.py …              four GPUs (nccl), or four processes on a CPU (gloo)

The first process (rank 0) prints, writes and hears Ctrl-C; the others take the same steps in silence and leave with it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from command import UserError

SIGNALS = signal.SIGINT, signal.SIGTERM


class World:
    """The processes of one run, and what they exchange. Alone, a process is rank 0 of 1 and exchanges nothing."""

    def __init__(self, rank=0, size=1, device="cpu"):
        self.rank, self.size, self.device = rank, size, device
        self.first, self.share = rank == 0, slice(rank, None, size)  # share: this rank's items of a batch

    def total(self, *numbers) -> list:
        """Each number, summed over the ranks."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, rows: list) -> list:
        """The lists of all ranks, one after the other, on every rank."""
        parts = [rows] * self.size
        if self.size > 1:
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def part(self, count: int) -> range:
        """This rank's piece of range(count); the pieces in the ranks' order are the whole."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @torch.no_grad()
    def copy_first(self, tensors):
        """Every tensor becomes rank 0's."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(whole := tensor.contiguous(), 0)  # a convolution's weight may lie channels-last
            tensor.copy_(whole)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over the ranks; buffers stay each rank's own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch calls the option forward_sync_buffers
            return DistributedDataParallel(module, broadcast_buffers=False) if self.size > 1 else module

    def hold(self, wrapped, last: bool):
        """Of several micro-batches only the last exchanges gradients: the sum of all."""
        return contextlib.nullcontext() if last or self.size == 1 else wrapped.no_sync()


ALONE = World()


def sync_batch_norm(model):
    """On several GPUs the tuned parts' BatchNorm takes its statistics from the whole batch; the frozen towers' never.

    gloo has none: on CPUs every process normalises by its own share, and the checkpoint holds rank 0's statistics.
    """
    for name, child in model.named_children():
        if child is not model.frozen:
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def torchrun(pick_device) -> World:
    """The world that torchrun started this process in (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one."""
    if "LOCAL_RANK" not in os.environ:
        return ALONE
    device, rank, size = pick_device(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


@contextlib.contextmanager
def companions(world, count, follow, *args):
    """`count` processes on this computer: this one, first, and helpers that run follow(world, *args) and end with it.

    Where torchrun started the processes, or one is enough, there is nothing to start.
    """
    if world.size > 1 or count == 1:
        yield world
        return
    threads = torch.get_num_threads()
    helpers, store = start_helpers(count, max(1, threads // count), follow, args)
    try:
        torch.set_num_threads(max(1, threads // count))
        dist.init_process_group("gloo", store=store, rank=0, world_size=count)
        yield World(0, count)
        for helper in helpers:
            helper.join()
    except RuntimeError as error:
        if not lost(error):
            raise
        why = "a helper process ended early (too little memory?): go on with --processes 1"
        raise UserError(store.get("wrong").decode() if store.check(["wrong"]) else why) from error
    finally:
        for helper in helpers:
            helper.kill()  # they hold nothing worth saving
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def start_helpers(count, threads, follow, args):
    """Processes 1 … count − 1, and the store where all of them meet, on a port the system chose."""
    store = dist.TCPStore("127.0.0.1", 0, count, True, timedelta(minutes=5), wait_for_workers=False)
    spawn, before = multiprocessing.get_context("spawn"), [signal.signal(kind, signal.SIG_IGN) for kind in SIGNALS]
    helpers = []
    try:  # a helper inherits deaf ears: Ctrl-C reaches it too, and its first seconds are Python's own
        for rank in range(1, count):
            helpers.append(spawn.Process(target=helper, args=(rank, count, store.port, threads, follow, args)))
            helpers[-1].start()
    finally:
        for kind, handler in zip(SIGNALS, before, strict=True):
            signal.signal(kind, handler)
    return helpers, store


def helper(rank, count, port, threads, follow, args):
    """The whole life of a helper process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one of the system's, which a killed process leaves behind
    torch.set_num_threads(threads)
    with following():
        store = dist.TCPStore("127.0.0.1", port, count, False, timedelta(minutes=5))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        try:
            follow(World(rank, count), *args)
        except UserError as error:  # such as a damaged picture in this rank's share: the first one says it
            store.set("wrong", str(error))


def end_with_parent():
    """Even kill -9 of the parent ends this process at once, whatever it is doing."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def following():
    """A rank other than the first: silent, deaf to signals, and gone without a word once the first is gone."""
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        if not lost(error):
            raise
        os._exit(1)


def lost(error) -> bool:
    """Whether it says that another process is gone."""
    return isinstance(error, dist.DistError) or "peer" in str(error)
