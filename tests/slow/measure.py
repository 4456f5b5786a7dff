"""Runs that decided a default or a claim of the README: the default run with one thing changed, over seeds.

    python tests/slow/measure.py still --seeds 0 1 2 --steps 500        →  appended to results/defaults.json

defaults    the run as it is                     still       CLIP's positional embeddings frozen (original: not)
connect     the attention pool's extra branch    padding     padding takes part in the Bridger's attention (original)
frozen      no Bridger                           no-sentence every sentence is empty     no-picture  every picture grey
start       torch's initial values everywhere, not a tenth of them where bridges and decoder branches join
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

import data  # noqa: E402
import etris  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

BUILD, LETTERBOX, TOKENIZE, START = train.build, data.letterbox, data.tokenize, etris.start_small
OPTIONS = {"still": {"train_positions": False}, "connect": {"connect": True}, "padding": {"mask_padding": False}}
CASES = ["defaults", *OPTIONS, "start", "frozen", "no-sentence", "no-picture"]


def blind(case):
    """Take away the sentence or the picture, in training and in evaluation alike."""
    if case == "no-sentence":
        data.tokenize = evaluate.tokenize = lambda sentences, words: TOKENIZE([""] * len(sentences), words)
    if case == "no-picture":

        def grey(picture, size):
            image, box = LETTERBOX(picture, size)
            return torch.zeros_like(image), box

        data.letterbox = evaluate.letterbox = grey


def run(case, seed, steps, more) -> dict:
    """One training run; its result.json."""
    train.build = functools.partial(BUILD, **OPTIONS.get(case, {}))
    etris.start_small = (lambda model: None) if case == "start" else START
    blind(case)
    with tempfile.TemporaryDirectory() as folder:
        tuning = ["--tuning", "frozen"] if case == "frozen" else []
        own = ["--processes", "1", "--out", f"{folder}/run", "--seed", str(seed), "--steps", str(steps)]
        train.main([*own, *tuning, *more])  # one process: a helper would not see what is changed here
        log, *_, last = map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text().splitlines())
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    where = {"case": case, "seed": seed, "commit": log["commit"], "frozen": log["frozen"]["sha256"][:16]}
    val = {metric: last["val"][metric] for metric in ("oIoU", "mIoU")}  # what a default is chosen by; the rest is test
    return {**where, "threads": torch.get_num_threads(), "val": val, **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "defaults.json")
    args, more = parser.parse_known_args()
    for seed in args.seeds:
        row = run(args.case, seed, args.steps, more)
        rows = json.loads(args.results.read_text()) if args.results.exists() else []
        args.results.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
