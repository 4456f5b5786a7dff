"""A pool of processes for work that needs no model, such as reading and drawing images."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from utils.common import UserError


class SerialExecutor(Executor):
    """A pool without processes: does the work where it is asked for."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def worker_pool(workers):
    """A pool of that many processes; with 0 this process does the work.

    Open it before a model is loaded: on Linux workers are forks.
    """
    if workers == 0:
        yield SerialExecutor()
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed: give fewer --workers, or 0") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Begin a worker: one thread, for there are many workers; Ctrl-C is for the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this worker when the main process was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
