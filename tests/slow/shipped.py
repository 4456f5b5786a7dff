"""What the paper says of boundaries, digits and crowds, measured on the two shipped models.

    python tests/slow/shipped.py            two minutes; writes results/shipped.json

edges    The jump of neighboring features at the named object's edge, over the mean jump at the
         other things' edges, in percent: with the Bridger less without it, scene by scene.
digits   mIoU on the test scenes less that on `test-numbers`, where every sentence names a digit.
crowds   The same for `test-crowd`.

Each as experiments/claims.py reads it: mean and 95 % interval over scenes, of one pair of models.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from checkpoint import load_checkpoint  # noqa: E402
from data import letterbox, normalize, open_dataset  # noqa: E402
from evaluate import evaluate  # noqa: E402
from experiments.tables import interval  # noqa: E402
from fast import set_fast  # noqa: E402
from toy.scenes import paint  # noqa: E402
from utils.common import provenance, write_file  # noqa: E402
from utils.tokenizer import tokenize  # noqa: E402

WITH = ROOT / "weights" / "etris-tiny.pt"
WITHOUT = ROOT / "weights" / "etris-tiny-frozen.pt"
MAPS = {
    "after stage 0": "visual0.after",
    "after stage 1": "visual1.after",
    "in the decoder": "features",
}
SCENES = 200  # for the edges
OBJECTS = 500  # for digits and crowds


# ------------------------------------------------------------------------------------------- edges
def jump_at_edge(feature, mask) -> float:
    """Mean Euclidean jump between neighboring places of which one is inside the mask.

    feature (C, h, w); mask (H, W) bool.
    """
    share = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), feature.shape[1:])[0]
    inside = share > share.max() / 2
    down = feature.diff(dim=1).norm(dim=0)[inside[1:] != inside[:-1]]
    right = feature.diff(dim=2).norm(dim=0)[inside[:, 1:] != inside[:, :-1]]
    return torch.cat([down, right]).mean().item()


def edge_ratios(model, scene) -> np.ndarray:
    """For each of MAPS: the jump at the named object's edge, in percent of that at the others'."""
    square, _ = letterbox(scene.image, model.size)
    tokens = tokenize(scene.sentences[:1], model.max_tokens)
    seen = model.activations(normalize(square[None]), tokens)
    jumps = []  # (things, maps)
    for i in range(len(scene.things)):
        mask = paint(scene.things, i, np.random.default_rng(0), model.size)["mask"]
        jumps.append([jump_at_edge(seen[name][0], mask) for name in MAPS.values()])
    others = np.delete(jumps, scene.target, axis=0)
    return 100 * np.array(jumps[scene.target]) / others.mean(0)


def edges(with_bridger, without, scenes) -> list[dict]:
    """What the Bridger adds to each ratio."""
    gains = [edge_ratios(with_bridger, scene) - edge_ratios(without, scene) for scene in scenes]
    found = []
    for name, values in zip(MAPS, np.array(gains).T, strict=True):
        x = interval(values.tolist())
        found.append({"name": name, "mean": x["mean"], "low": x["low"], "high": x["high"]})
    return found


# ---------------------------------------------------------------------------------------- failures
def mean_and_variance(rows) -> tuple[float, float]:
    """mIoU of evaluate's rows, and its variance: sentences about one object are not independent."""
    values = np.array([row["IoU"] for row in rows])
    _, index = np.unique([row["ref_id"] for row in rows], return_inverse=True)
    residuals = np.bincount(index, values - values.mean())  # summed by object
    return float(values.mean()), float((residuals**2).sum() / len(values) ** 2)


def lost(rows, harder_rows, name) -> dict:
    """mIoU on `rows` less that on the harder ones, with the 95 % interval of other scenes."""
    mean, variance = mean_and_variance(rows)
    harder_mean, harder_variance = mean_and_variance(harder_rows)
    half = 1.96 * (variance + harder_variance) ** 0.5
    difference = mean - harder_mean
    return {"name": name, "mean": difference, "low": difference - half, "high": difference + half}


# --------------------------------------------------------------------------------------------- all
def main():
    with_bridger = load_checkpoint(WITH)
    without = load_checkpoint(WITHOUT)
    scenes = open_dataset("scenes", "test", limit=SCENES, side=with_bridger.size)
    found = {"edges": edges(with_bridger, without, [scenes[i] for i in range(SCENES)])}
    fast = set_fast(with_bridger)
    rows = {}
    for split in ("test", "test-numbers", "test-crowd"):
        dataset = open_dataset("scenes", split, limit=OBJECTS, side=with_bridger.size)
        result, rows[split] = evaluate(fast, dataset, progress=False)
        print(f"{split:13} mIoU {result['mIoU']:.1f}, {result['sentences']:,} sentences")
    found["digits"] = [lost(rows["test"], rows["test-numbers"], "test − test-numbers")]
    found["crowds"] = [lost(rows["test"], rows["test-crowd"], "test − test-crowd")]
    for group, differences in found.items():
        for x in differences:
            print(
                f"{group:7} {x['name']:21} {x['mean']:+6.2f} ({x['low']:+.2f} … {x['high']:+.2f})"
            )
    facts = provenance(0, with_bridger.backbone.identity)
    facts |= {"scenes": SCENES, "objects": OBJECTS, "models": [WITH.name, WITHOUT.name]}
    write_file(ROOT / "results" / "shipped.json", json.dumps({**found, **facts}, indent=1).encode())


if __name__ == "__main__":
    main()
