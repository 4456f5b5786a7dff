"""Kill training at random moments, resume it each time, compare with a run straight through.

    python tests/slow/kills.py --kills 30 --json results/kills.json

One process imports everything and forks a child for each start of train.py, always with --resume. A
child gets kill -9, SIGTERM or SIGINT after a random time, or within 3 ms of the moment when it
begins to write last.pt or best.pt. A run that ends before its kill is compared, and the next one
begins in a folder of its own.

Compared bit for bit are last.pt whole (trained tensors, optimizer, scheduler, random states, best
score, counters), best.pt, every epoch's line of the log, the test's result and the names in the
folder; not the clock. The script fails where anything differs.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from checkpoint import read_checkpoint  # noqa: E402

OPTIONS = (
    "--weights random --limit 4 --batch-size 2 --size 64 --width 16 --device cpu --dropout 0.1 "
    "--lr 0.005 --resume"
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("any", "any", "last.pt", "best.pt")
CLOCK = ("/minutes", "/started", "/args/out")  # endings of what may differ


def start(out, steps) -> int:
    """Fork a child that trains in `out` until it ends or is ended; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = train_child(out, steps)
    finally:
        os._exit(status)


def train_child(out, steps) -> int:
    """Run train.py, its output in `out`.txt; returns the exit status."""
    argv = [*OPTIONS.split(), "--steps", str(steps), "--out", str(out)]
    with (
        open(f"{out}.txt", "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            train.main(argv)
            return 0
        except SystemExit as error:
            return error.code
        except KeyboardInterrupt:  # before training begins, or after
            return 130
        except BaseException:
            traceback.print_exc()
            return 1


def write_time(path):
    """When the file was last written, None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


def exit_status(child, block=False):
    """None while the child lives, then its exit status, or minus the signal that ended it."""
    done, status = os.waitpid(child, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def saved_steps(out) -> int:
    if not (out / "last.pt").exists():
        return 0
    return read_checkpoint(out / "last.pt")["training"]["state"]["global_step"]


def kill(child, out, kind, moment, seconds) -> dict:
    """Wait for the moment, send the signal, wait for the end; returns what happened."""
    part = out / f"{moment}.part"
    begin = time.time()
    before = write_time(part)
    status = exit_status(child)
    while status is None:
        if moment == "any":
            due = time.time() - begin > seconds
        else:
            due = write_time(part) != before
        if due:
            time.sleep(seconds % 0.003)
            os.kill(child, kind)
            status = exit_status(child, block=True)
        else:
            time.sleep(0.0005)
            status = exit_status(child)
    return {
        "signal": kind.name,
        "moment": moment,
        "seconds": round(time.time() - begin, 2),
        "status": status,
        "steps_saved": saved_steps(out),
        "half_written": write_time(part) is not None,
    }


# --------------------------------------------------------------------------------------- comparing
def leaves(x, name="") -> dict:
    """Nested dicts and lists as one dict of tensors and plain values."""
    if not isinstance(x, dict | list | tuple):
        return {name: x}
    found = {}
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        found.update(leaves(value, f"{name}/{key}"))
    return found


def outcome(out) -> dict:
    """All that a run leaves, but for its folder's name and the clock."""
    epochs = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "step" in line:  # a killed run may log an epoch twice
            epochs[line["step"]] = line
    whole = {
        "last": read_checkpoint(out / "last.pt"),
        "best": read_checkpoint(out / "best.pt")["tuned"],
        "result": json.loads((out / "result.json").read_text()),
        "epochs": epochs,
        "names": sorted(path.name for path in out.iterdir()),
    }
    return {name: x for name, x in leaves(whole).items() if not name.endswith(CLOCK)}


def same(x, y) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def differences(a, b) -> list[str]:
    """Names of what is not bit for bit the same."""
    changed = [name for name in a if name in b and not same(a[name], b[name])]
    return sorted(set(a) ^ set(b)) + changed


def run_straight(out, steps) -> float:
    """A run that nobody kills; returns the seconds until its first checkpoint."""
    begin = time.time()
    child = start(out, steps)
    status = None
    while status is None and not (out / "last.pt").exists():
        time.sleep(0.01)
        status = exit_status(child)
    seconds = time.time() - begin
    if status is None:
        status = exit_status(child, block=True)
    assert status == 0, Path(f"{out}.txt").read_text()
    return seconds


def stress(folder, kills, steps, rng) -> dict:
    """The straight run, then runs that are killed and resumed until all kills are spent."""
    longest = min(20, 2 * run_straight(folder / "straight", steps))
    straight = outcome(folder / "straight")
    done = []
    runs = 0
    wrong = []
    while len(done) < kills or (folder / f"{runs}").exists():
        out = folder / f"{runs}"
        child = start(out, steps)
        if len(done) < kills:
            row = kill(
                child, out, rng.choice(SIGNALS), rng.choice(MOMENTS), rng.uniform(0, longest)
            )
            status = row["status"]
            if status != 0:
                done.append(row)
                print(row, flush=True)
        else:
            status = exit_status(child, block=True)
        if status == 0:
            wrong += differences(straight, outcome(out))
            runs += 1
        elif status not in (130, -signal.SIGKILL, -signal.SIGTERM):
            wrong.append(Path(f"{out}.txt").read_text()[-2000:])
            runs += 1
    return {"kills": done, "runs": runs, "steps": steps, "differences": wrong}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="how many (30)")
    parser.add_argument("--steps", type=int, default=12, help="of each run (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened")
    args = parser.parse_args()

    torch.set_num_threads(1)  # a child of a process with threads may hang in them
    with tempfile.TemporaryDirectory() as folder:
        result = stress(Path(folder), args.kills, args.steps, random.Random(args.seed))
    wrong = result["differences"]
    print(f"{len(result['kills'])} kills in {result['runs']} runs, {len(wrong)} differences")
    print(*wrong[:20], sep="\n")
    if args.json:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        command = f"python tests/slow/kills.py --kills {args.kills} --seed {args.seed}"
        result = {"command": command, "commit": commit, **result}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
