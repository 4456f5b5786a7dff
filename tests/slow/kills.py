"""Killed at random moments and resumed each time: bit for bit what a run straight through gives, or the script fails.

    python tests/slow/kills.py --kills 30 --json results/kills.json

One process imports everything and forks a child for each start of train.py, always with --resume. A child gets kill -9,
SIGTERM or SIGINT after a random time, or within 3 ms of the moment when it begins to write last.pt or best.pt. A run
that ends before its kill is compared, and the next one begins in a folder of its own. Compared are last.pt whole (tuned
tensors, Adam, rates, random states, best score, counters), best.pt, every epoch's line of the log, the test's result
and the names in the folder; not the minutes.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

import train  # noqa: E402
from official import read_checkpoint  # noqa: E402

SMALL = ["--weights", "random", "--limit", "4", "--batch-size", "2", "--size", "64", "--width", "16", "--device", "cpu",
         "--dropout", "0.1", "--lr", "0.005", "--processes", "1", "--resume"]  # fmt: skip
KINDS, MOMENTS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT), ("any", "any", "last.pt", "best.pt")


def start(out, steps) -> int:
    """A child that trains in `out` until it ends or is ended; its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(f"{out}.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                train.main([*SMALL, "--steps", str(steps), "--out", str(out)])
                status = 0
            except SystemExit as left:
                status = left.code
            except KeyboardInterrupt:  # before training begins, or after
                status = 130
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def stamp(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


def ended(pid, block=False):
    """None while the child lives, then its exit status, or minus the signal that ended it."""
    done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill(pid, out, kind, moment, seconds) -> dict:
    """Wait for the moment, send the signal, wait for the end."""
    part = out / f"{moment}.part"
    begin, before = time.time(), stamp(part)
    while (status := ended(pid)) is None:
        if stamp(part) != before if moment != "any" else time.time() - begin > seconds:
            time.sleep(seconds % 0.003)
            os.kill(pid, kind)
            status = ended(pid, block=True)
            break
        time.sleep(0.0005)
    at = read_checkpoint(out / "last.pt")["training"]["steps"] if (out / "last.pt").exists() else 0
    return {"signal": kind.name, "moment": moment, "seconds": round(time.time() - begin, 2), "status": status,
            "steps_saved": at, "half_written": stamp(part) is not None}  # fmt: skip


def leaves(x, name="") -> dict:
    """Nested dicts and lists as one dict of tensors and plain values."""
    if not isinstance(x, dict | list | tuple):
        return {name: x}
    pairs = x.items() if isinstance(x, dict) else enumerate(x)
    return {path: leaf for key, value in pairs for path, leaf in leaves(value, f"{name}/{key}").items()}


def memory(out) -> dict:
    """All that a run leaves, but for names of folders and minutes."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    epochs = {line["step"]: {k: x for k, x in line.items() if k != "seconds"} for line in log if "step" in line}
    best = {"tuned": read_checkpoint(out / "best.pt")["tuned"], "result": json.loads((out / "result.json").read_text())}
    whole = leaves({"last": read_checkpoint(out / "last.pt"), "best": best, "epochs": epochs,
                    "names": sorted(path.name for path in out.iterdir())})  # fmt: skip
    return {name: x for name, x in whole.items() if not name.endswith(("/minutes", "/args/out"))}


def differences(a, b) -> list[str]:
    """Names of what is not bit for bit the same."""
    return sorted(set(a) ^ set(b)) + [name for name in a if name in b and not same(a[name], b[name])]


def same(x, y) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def stress(room, kills, steps, dice) -> dict:
    """The straight run, then runs that are killed and resumed until all kills are spent; what happened."""
    begin = time.time()
    pid = start(room / "straight", steps)
    while ended(pid) is None:
        if (room / "straight" / "last.pt").exists():
            break
        time.sleep(0.01)
    patience = min(20, 2 * (time.time() - begin))  # twice what the first checkpoint takes on this machine
    assert ended(pid, block=True) == 0, (room / "straight.txt").read_text()
    straight, done, runs, wrong = memory(room / "straight"), [], 0, []
    while len(done) < kills or (room / f"{runs}").exists():
        out = room / f"{runs}"
        pid = start(out, steps)
        one = None
        if len(done) < kills:
            one = kill(pid, out, dice.choice(KINDS), dice.choice(MOMENTS), dice.uniform(0, patience))
        status = one["status"] if one else ended(pid, block=True)
        if one and status != 0:
            done.append(one)
            print(one, flush=True)
        if status == 0:
            wrong += differences(straight, memory(out))
            runs += 1
        elif status not in (130, -signal.SIGKILL, -signal.SIGTERM):
            wrong.append((room / f"{runs}.txt").read_text()[-2000:])
            runs += 1
    return {"kills": done, "runs": runs, "steps": steps, "differences": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a child of a process with threads may hang in them
    with tempfile.TemporaryDirectory() as room:
        result = stress(Path(room), args.kills, args.steps, random.Random(args.seed))
    print(f"{len(result['kills'])} kills in {result['runs']} runs, {len(result['differences'])} differences")
    print(*result["differences"][:20], sep="\n")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    if args.json:
        command = f"python tests/slow/kills.py --kills {args.kills} --seed {args.seed}"
        result = {"command": command, "commit": commit.stdout.strip(), **result}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(result["differences"]))


if __name__ == "__main__":
    main()
