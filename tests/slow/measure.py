"""Runs that decided a default or a claim: the default run with one thing changed, over seeds.

    python tests/slow/measure.py still --seeds 0 1 2 --steps 500  appends to results/defaults.json

defaults     the run as it is
still        CLIP's positional embeddings frozen (the original: not)
connect      the attention pool's extra branch
padding      padding takes part in the Bridger's attention (the original)
start        torch's initial values everywhere, not a tenth of them where bridges and decoder join
frozen       no Bridger
no-sentence  every sentence is empty
no-image     every image is gray
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import data  # noqa: E402
import etris  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

MODEL_OPTIONS = {
    "still": {"train_positions": False},
    "connect": {"connect": True},
    "padding": {"mask_padding": False},
}
CASES = ["defaults", *MODEL_OPTIONS, "start", "frozen", "no-sentence", "no-image"]
MAKE_MODEL = train.make_model
LETTERBOX = data.letterbox
TOKENIZE = data.tokenize


def tokenize_nothing(sentences, max_tokens):
    """As many empty sentences."""
    count = 1 if isinstance(sentences, str) else len(sentences)
    return TOKENIZE([""] * count, max_tokens)


def letterbox_nothing(image, size):
    """A square of CLIP's mean color."""
    square, box = LETTERBOX(image, size)
    return data.MEAN.round().byte().expand_as(square).clone(), box


def leave_model(model):
    """In the place of scale_down_init: torch's initial values stay."""


def change(case):
    """Change one thing, in training and in evaluation alike."""
    train.make_model = functools.partial(MAKE_MODEL, **MODEL_OPTIONS.get(case, {}))
    if case == "start":
        etris.scale_down_init = leave_model
    if case == "no-sentence":
        data.tokenize_cached = tokenize_nothing
        evaluate.tokenize = tokenize_nothing
    if case == "no-image":
        data.letterbox = letterbox_nothing
        evaluate.letterbox = letterbox_nothing


def run(case, seed, steps, extra_args) -> dict:
    """One training run; its result.json, with the val scores by which defaults are chosen."""
    argv = ["--seed", str(seed), "--steps", str(steps), *extra_args]
    if case == "frozen":
        argv += ["--tuning", "frozen"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        train.main([*argv, "--out", str(out)])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        result = json.loads((out / "result.json").read_text())
    origin = lines[0]
    val = lines[-1]["val"]
    return {
        "case": case,
        "seed": seed,
        "commit": origin["commit"],
        "frozen": origin["frozen"]["sha256"][:16],
        "threads": torch.get_num_threads(),
        "val": {metric: val[metric] for metric in ("oIoU", "mIoU")},
        **result,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES, help="what is changed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each (0)")
    parser.add_argument("--steps", type=int, default=500, help="of each run (500)")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "defaults.json",
        metavar="FILE",
        help="gets a row of each run (results/defaults.json); other options go to train.py",
    )
    args, extra_args = parser.parse_known_args()

    change(args.case)
    for seed in args.seeds:
        row = run(args.case, seed, args.steps, extra_args)
        rows = json.loads(args.results.read_text()) if args.results.exists() else []
        args.results.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
