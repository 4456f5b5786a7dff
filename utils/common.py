"""What every command shares: one-line errors, command-line types, whole files, device, dtype."""

import argparse
import contextlib
import functools
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent  # the project's folder

# What reading a damaged or hostile file raises. Anything else is our bug: a traceback.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,  # with UnicodeError and json.JSONDecodeError
    LookupError,  # a missing key or index
    TypeError,  # a list where a dict was expected
    SyntaxError,  # Pillow's word for a broken PNG
    OverflowError,
    RecursionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


# ------------------------------------------------------------------------------------------ errors
class UserError(Exception):
    """A mistake of the user's: one line that names the file or value and the way out."""


@contextlib.contextmanager
def as_user_error(thing, remedy, errors=READ_ERRORS, skipped=None):
    """Turn what reading a damaged file raises into one line: `thing`: reason: `remedy`.

    skipped: a list that takes the line. Without it the line is raised as a UserError.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, KeyError):
            reason = f"no {error}"
        else:
            reason = str(error) or type(error).__name__
        reason = " ".join(reason.split())[:200]
        line = f"{thing}: {reason}: {remedy}"
        if skipped is None:
            raise UserError(line) from error
        skipped.append(line)


def warn(message) -> str:
    """Print that something is skipped, on stderr, and return the message."""
    print(f"skipped: {message}", file=sys.stderr)
    return str(message)


def command(main):
    """Wrap a command's `main(argv=None)`: a UserError becomes one line on stderr, exit status 2.

    What the system refuses is told the same way: a full disk, a read-only folder, no memory left.
    """

    @functools.wraps(main)
    def run(argv=None):
        with contextlib.suppress(AttributeError):  # a notebook's stdout cannot be reconfigured
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:
            # an error of a loading process arrives with that process's traceback before it
            line = str(error).rpartition("UserError: ")[2]
        except OSError as error:
            reason = error.strerror or error
            line = f"{error.filename or 'a file'}: {reason}: check the path and the free disk space"
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = str(error).partition(". ")[0] or "out of memory"
            line = f"{reason}: lower --batch-size, --size or --limit, or raise --accumulate"
        except RuntimeError as error:
            line = f"{error}: give fewer --workers, or 0; in a container, more shared memory"
            if not line.startswith("DataLoader worker"):  # one that the system has killed
                raise
        finally:
            if torch.distributed.is_initialized():  # it ended before its loop, for want of data
                torch.distributed.destroy_process_group()
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        raise SystemExit(2)

    return run


# ------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; options cannot be abbreviated."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}: --help lists the options\n")


def integer(low=1, high=10**9):
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            message = f"{text} is not a whole number from {low} to {high:,}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


SEED = integer(0, 2**32 - 1)  # the range that numpy's and torch's generators accept


# ----------------------------------------------------------------------------------------- signals
class StopFlag:
    """Set by Ctrl-C and SIGTERM; the loop looks at it after each step.

    A second signal, `PATIENCE` seconds later, stops at once. (torchrun doubles every signal.)
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    PATIENCE = 2.0

    def __init__(self):
        self.requested = False
        self.time = 0.0
        self.handlers = [signal.signal(kind, self.set) for kind in self.SIGNALS]

    def set(self, signum, frame):
        now = time.monotonic()
        if not self.requested:
            self.time = now
        elif now >= self.time + self.PATIENCE:
            raise KeyboardInterrupt
        self.requested = True

    def ignore_signals(self):
        for kind in self.SIGNALS:
            signal.signal(kind, signal.SIG_IGN)

    def restore_handlers(self):
        for kind, handler in zip(self.SIGNALS, self.handlers, strict=True):
            signal.signal(kind, handler)


# ------------------------------------------------------------------------------------------- files
def check_writable(path, folder=False):
    """UserError, before any work is done, where `path` cannot become a file (a folder)."""
    path = Path(path)
    existing = next((p for p in (path, *path.parents) if p.exists()), Path())
    must_be_folder = folder or existing != path
    if existing.is_dir() != must_be_folder or not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: {existing} is in the way: choose another name")


def write_file(path, content: bytes):
    """Write a file whole or not at all: into a temporary file beside it, then renamed."""
    path = Path(path)
    tmp_path = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp_path.write_bytes(content)
        os.replace(tmp_path, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp_path.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


# -------------------------------------------------------------------------------- device and dtype
DEVICE_CHOICES = ("auto", "cpu", "cuda", "mps")
AMP_CHOICES = ("auto", "bf16", "fp16", "off")


def pick_device(name=None) -> tuple[torch.device, str]:
    """The device asked for, or the best available one, and why. UserError if it is missing.

    On a GPU, float32 matrix products are TF32 from here on, as its convolutions are anyway.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    reason = "as asked"
    if name in (None, "auto"):
        name = available[0]
        reason = "the best available; --device chooses another"
    if name not in available:
        choices = " or ".join(available)
        raise UserError(f"--device {name}: not available on this machine: choose {choices}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name), reason


def pick_dtype(device: torch.device, amp: str) -> tuple[torch.dtype, str]:
    """The number format of autocast, and why. amp: auto, bf16, fp16 or off.

    auto: bf16 where the GPU has it, fp16 with a loss scaler on older GPUs, float32 elsewhere.
    """
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    if amp == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        slow = "it emulates it, many times slower than --amp off"
        return torch.bfloat16, f"--amp bf16, but this processor has no instructions for it: {slow}"
    if amp == "bf16" and device.type == "cuda" and not gpu_has_bf16():
        slow = "it emulates it, slower than --amp fp16 or off"
        return torch.bfloat16, f"--amp bf16, but this GPU has no bf16: {slow}"
    if amp != "auto":
        return named[amp], f"--amp {amp}"
    if device.type != "cuda":
        return torch.float32, f"lower precision is not reliably faster on {device.type}"
    if gpu_has_bf16():
        return torch.bfloat16, "this GPU has bf16, which needs no loss scaler"
    return torch.float16, "this GPU has no bf16, so the loss is scaled"


def gpu_has_bf16() -> bool:
    """Whether the GPU multiplies in bf16. T4 and V100 only emulate it, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)  # without it, True for them too


def has_bf16_instructions(cpu_info="/proc/cpuinfo") -> bool:
    """Whether the processor multiplies in bf16 (avx512_bf16, amx_bf16, ARM's bf16).

    True as well where the system does not say it: on Windows and macOS.
    """
    try:
        return "bf16" in Path(cpu_info).read_text(encoding="utf-8")
    except OSError:
        return True


def default_workers(device: torch.device) -> int:
    """Loading processes where the command line names no number: a GPU should never wait."""
    return min(8, os.cpu_count()) if device.type == "cuda" else 0


# ------------------------------------------------------------------------------------- provenance
def seed_all(seed: int):
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # the range that numpy accepts
    random.seed(seed)


def git_commit() -> str:
    """This project's commit, with -dirty where files changed; "unknown" outside its own repository.

    A copy without .git (a ZIP) may lie inside another repository, whose commit would be wrong.
    """
    if not (ROOT / ".git").exists():
        return "unknown"
    # named, lest git takes another one: above this folder, or of a hook's GIT_DIR
    repository = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    describe = ["git", *repository, "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return result.stdout.strip() or "unknown"


def command_line() -> str:
    """The command as it was typed: python train.py …, or python -m experiments.reproduce …"""
    path = Path(sys.argv[0])
    program = path.name
    if path.is_relative_to(ROOT) and path.parent != ROOT and path.suffix == ".py":
        module = path.relative_to(ROOT).with_suffix("").parts
        program = f"-m {'.'.join(module)}"
    return " ".join(["python", program, *sys.argv[1:]])


def provenance(seed: int, backbone: dict) -> dict:
    """Where numbers come from: command, commit, versions, hardware, seed, backbone identity."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": command_line(),
        "commit": git_commit(),
        "torch": torch.__version__,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {gpu}",
        "seed": seed,
        "frozen": backbone,
    }


def print_parameters(model):
    """Print trainable and frozen parameter counts per module."""
    rows = {}
    for name, parameter in model.named_parameters():
        module = name.split(".")[0]
        trainable, frozen = rows.get(module, (0, 0))
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        rows[module] = (trainable, frozen)
    rows["all"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    for module, (trainable, frozen) in rows.items():
        print(f"  {module:<24}{trainable:>14,} trainable{frozen:>14,} frozen")
