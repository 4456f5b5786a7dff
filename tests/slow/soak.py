"""Minutes of training, then thousands of predictions, in one process: its memory must stay flat.

    python tests/slow/soak.py --minutes 10 --predictions 5000  results/soak.json, results/soak.png

Training is train.py's own loop with its evaluations, checkpoints and figures, ended by a signal as
Ctrl-C would; predictions are `predict.segment` on drawn scenes of 90 sizes. The memory in use is
read every second (Linux). Flat: over the second half of each phase the median is at most 3 % above
that of the quarter before it. The script fails where it is not.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import train  # noqa: E402
from checkpoint import read_checkpoint  # noqa: E402
from predict import load, segment  # noqa: E402
from toy.scenes import SPLITS, draw_scene  # noqa: E402

MAX_GROWTH = 1.03
PHASES = {"training": "#0072B2", "predictions": "#D55E00"}


def memory() -> float:
    """Megabytes of this process that lie in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch(threading.Thread):
    """Reads the memory every second into `seen`: (seconds, megabytes, phase)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.phase = "start"
        self.seen = []
        self.begin = time.time()

    def run(self):
        while True:
            seconds = round(time.time() - self.begin, 1)
            self.seen.append((seconds, round(memory(), 1), self.phase))
            time.sleep(1)


def run_training(out, minutes) -> int:
    """train.py until the time is over; the steps it took."""
    argv = ["--limit", "64", "--steps", "1000000", "--device", "cpu", "--out", str(out)]
    threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        train.main(argv)
    except SystemExit as error:
        assert error.code == 130, error.code
    return read_checkpoint(out / "last.pt")["training"]["state"]["global_step"]


def run_predictions(model, count):
    """`segment`, a sentence at a time, on images of many sizes."""
    rng = random.Random(0)
    for index in range(count):
        scene = draw_scene("scenes", "test", index % SPLITS["test"], side=rng.randrange(70, 160))
        mask = segment(model, scene.image, rng.choice(scene.sentences))
        assert mask.shape == scene.mask.shape


def growth(seen, phase) -> dict:
    """The median of the second half against that of the second quarter."""
    numbers = [megabytes for _, megabytes, name in seen if name == phase]
    quarter = len(numbers) // 4
    before = statistics.median(numbers[quarter : 2 * quarter])
    after = statistics.median(numbers[2 * quarter :])
    return {
        "second_quarter_mb": before,
        "second_half_mb": after,
        "growth": round(after / before, 4),
        "highest_mb": max(numbers),
        "flat": after / before <= MAX_GROWTH,
    }


def draw(seen, path):
    figure = Figure((8, 3.2), layout="constrained")
    axes = figure.subplots()
    for phase, color in PHASES.items():
        minutes = [seconds / 60 for seconds, _, name in seen if name == phase]
        megabytes = [megabytes for _, megabytes, name in seen if name == phase]
        axes.plot(minutes, megabytes, color=color, label=phase)
    axes.set(xlabel="minutes", ylabel="memory in use, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of training (10)")
    parser.add_argument("--predictions", type=int, default=5000, help="how many (5000)")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "results" / "soak.json",
        metavar="FILE",
        help="write the numbers, and a figure beside them (results/soak.json)",
    )
    args = parser.parse_args()

    watch = Watch()
    watch.start()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        watch.phase = "training"
        steps = run_training(out, args.minutes)
        watch.phase = "loading"
        model = load(out / "last.pt", device="cpu")
        watch.phase = "predictions"
        run_predictions(model, args.predictions)
        watch.phase = "end"
    seen = list(watch.seen)

    describe = ["git", "describe", "--always"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    options = f"--minutes {args.minutes:g} --predictions {args.predictions}"
    phases = {phase: growth(seen, phase) for phase in PHASES}
    result = {
        "command": f"python tests/slow/soak.py {options}",
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "training_steps": steps,
        **phases,
        "seconds_mb": seen[::5],
    }
    print(json.dumps(phases, indent=1))
    args.json.write_text(json.dumps(result) + "\n")
    draw(seen, args.json.with_suffix(".png"))
    raise SystemExit(not all(row["flat"] for row in phases.values()))


if __name__ == "__main__":
    main()
