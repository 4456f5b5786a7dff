"""0. What every command shares: mistakes end in one line on stderr and exit status 2; types for the command line."""

import argparse
import contextlib
import ctypes
import functools
import sys

import torch


class UserError(Exception):
    """What a user did wrong: one line that names the file or value and the way out."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line as all others are; no option may be shortened."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}: --help lists what there is\n")


def integer(low=1, high=10**9):
    """argparse's type of a whole number from `low` to `high`."""

    def read(text) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high:,}")
        return int(text)

    return read


SEED = integer(0, 2**32 - 1)  # what all dice take


def keep_memory(on: bool = True):
    """Whether freed memory stays with the process, for the next step, or goes back to the system as is usual.

    glibc hands large blocks back, and the system empties every page before it lends it again: some 3 % of RN101's step
    on a CPU. Off: the limits that glibc comes to by itself. Without glibc (Windows, macOS) nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
    with contextlib.suppress(AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0 if on else 65536)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, -1 if on else 64 * 2**20)


def command(main):
    """Wrap a command's `main(argv=None)`: a UserError becomes one line on stderr and exit status 2, no traceback.

    So does what the system refuses: a full disk, a read-only folder, a file that is gone, more memory.
    """

    @functools.wraps(main)
    def run(argv=None):
        with contextlib.suppress(AttributeError):  # a notebook's stdout; elsewhere a name it cannot print is spelt out
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:  # from a loading process it comes with torch's traceback
            line = str(error).rpartition("command.UserError: ")[2]
        except OSError as error:
            line = f"{error.filename or 'a file'}: {error.strerror or error}: check the path and the room on the disk"
        except (MemoryError, torch.OutOfMemoryError) as error:
            line = f"{str(error).partition('. ')[0]}: --batch-size, --size, --accumulate or --limit need less memory"
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        raise SystemExit(2)

    return run
