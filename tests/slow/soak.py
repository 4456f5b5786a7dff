"""Minutes of training, then thousands of predictions, in one process: its memory must stay flat, or the script fails.

    python tests/slow/soak.py --minutes 10 --predictions 5000          →  results/soak.json, results/soak.png

Training is train.py's own loop with its evaluations, checkpoints and pictures, ended by a signal as Ctrl-C would;
predictions are `predict.segment` on drawn scenes of 90 sizes. The memory in use is read every second (Linux). Flat:
over the second half of each phase the median is at most 3 % above that of the quarter before it.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

import train  # noqa: E402
from predict import load, segment  # noqa: E402
from scenes import SPLITS, draw_scene  # noqa: E402

GROWTH = 1.03


def memory() -> float:
    """Megabytes of this process that lie in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch(threading.Thread):
    """Reads the memory every second into `seen`: (seconds, megabytes, phase)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.phase, self.seen, self.begin = "start", [], time.time()

    def run(self):
        while True:
            self.seen.append((round(time.time() - self.begin, 1), round(memory(), 1), self.phase))
            time.sleep(1)


def training(watch, out, minutes) -> int:
    """train.py until the time is over; the steps it took."""
    watch.phase = "training"
    threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM)).start()
    options = ["--limit", "64", "--steps", "1000000", "--device", "cpu", "--processes", "1"]
    try:
        train.main([*options, "--out", str(out)])
    except SystemExit as left:
        assert left.code == 130, left.code
    return train.read_checkpoint(out / "last.pt")["training"]["steps"]


def predictions(watch, out, count):
    """`segment`, a sentence at a time, on pictures of many sizes."""
    watch.phase, dice, model = "loading", random.Random(0), load(out / "last.pt", device="cpu")
    watch.phase = "predictions"
    for index in range(count):
        scene = draw_scene("scenes", "test", index % SPLITS["test"], side=dice.randrange(70, 160))
        assert segment(model, scene.picture, dice.choice(scene.sentences)).shape == scene.mask.shape


def growth(seen, phase) -> dict:
    """The median of the second half against that of the second quarter."""
    numbers = [megabytes for _, megabytes, name in seen if name == phase]
    quarter = len(numbers) // 4
    before, after = statistics.median(numbers[quarter : 2 * quarter]), statistics.median(numbers[2 * quarter :])
    return {"second_quarter_mb": before, "second_half_mb": after, "growth": round(after / before, 4),
            "highest_mb": max(numbers), "flat": after / before <= GROWTH}  # fmt: skip


def draw(seen, path):
    from matplotlib.figure import Figure

    figure = Figure((8, 3.2), layout="constrained")
    axis = figure.subplots()
    for phase, colour in (("training", "#0072B2"), ("predictions", "#D55E00")):
        points = [(seconds / 60, megabytes) for seconds, megabytes, name in seen if name == phase]
        axis.plot(*zip(*points, strict=True), color=colour, label=phase)
    axis.set(xlabel="minutes", ylabel="memory in use, MB", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--predictions", type=int, default=5000)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "soak.json")
    args = parser.parse_args()
    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory() as room:
        steps = training(watch, Path(room) / "run", args.minutes)
        predictions(watch, Path(room) / "run", args.predictions)
    watch.phase, seen = "end", list(watch.seen)
    commit = subprocess.run(["git", "describe", "--always"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    command = f"python tests/slow/soak.py --minutes {args.minutes:g} --predictions {args.predictions}"
    phases = {phase: growth(seen, phase) for phase in ("training", "predictions")}
    result = {"command": command, "commit": commit, "torch": torch.__version__, "threads": torch.get_num_threads(),
              "training_steps": steps, "predictions": args.predictions, **phases, "seconds_mb": seen[::5]}  # fmt: skip
    print(json.dumps(phases, indent=1))
    args.json.write_text(json.dumps(result) + "\n")
    draw(seen, args.json.with_suffix(".png"))
    raise SystemExit(not all(row["flat"] for row in phases.values()))


if __name__ == "__main__":
    main()
