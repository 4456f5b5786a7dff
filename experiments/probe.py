"""What crosses the Bridger? Interventions on a trained model, and a linear probe at every stage.

    python -m experiments.probe weights/etris-tiny.pt --json probe.json --figure probe.png
    python -m experiments.probe RN101.pth --dataset refcoco --split val --data data

A bridge adds Δv to the image stream and Δt to the text stream. Four questions, all at inference:

  streams    What is lost without Δv, without Δt, without both, and with one stage's bridge alone?
             And if both are scaled by 0 (none) … 1 (as trained) … 1.5? At 0 both encoders are
             plain CLIP, bit for bit, but for positions that were trained beside the Bridger.
  partners   The traffic. Δv is computed with another sentence, about the same image or about
             another one; Δt with another image. All else stays. What is lost then had crossed.
  probe      Can a ridge regression tell from one place's feature whether the named object is there?
             AUC per image, after each stage and in the decoder, with the bridges and at strength 0,
             for the first sentence of each object.
  kinds      All of it by kind of sentence, where the data has kinds.

drop: mIoU as trained minus mIoU of the row, over the same sentences; low, high: its 95 % interval
over 2,000 resamplings of the objects. A partner's row leaves out sentences that have no partner.
In the JSON every row has all of COLUMNS: null is what the row does not measure.

B batch · L tokens · C channels · H W a stage's grid · K sentences of an object
"""

import contextlib
import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_checkpoint
from data import letterbox_mask, normalize, open_dataset
from evaluate import THRESHOLD, EvalDataset, count_pixels, predict_masks, score, summarize, upload
from experiments.cache import FrozenFeatureCache
from fast import set_fast
from toy.scenes import FLAVOURS, Scene, sentences_about
from utils.common import (
    Parser,
    UserError,
    check_writable,
    command,
    integer,
    pick_device,
    provenance,
    seed_all,
    write_file,
)
from utils.plots import outline, png
from utils.tokenizer import tokenize

STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)  # beside 0 (none) and 1 (both)
COLUMNS = ("row", "oIoU", "mIoU", "drop", "AUC", "AUC_without", "gain", "low", "high")
PARTNERS = ("other sentence", "sentence of another image", "other image")
RESAMPLINGS = 2000
RIDGE = 1e-3  # of the features' mean variance
CHANCE = 50  # AUC of a guess, percent
OBJECTS_PER_BATCH = 16
HEAT_MAPS = 4  # examples in the figure


# ----------------------------------------------------------------------------------- interventions
@dataclass
class Streams:
    """What one bridge was given: v (B, C, H, W), t (B, L, D), and of the bridge before it x, y."""

    v: Tensor
    t: Tensor
    previous: tuple | None
    key_padding_mask: Tensor | None

    def with_image_of(self, other):
        """This text, the other's image."""
        x = None if other.previous is None else other.previous[0]
        y = None if self.previous is None else self.previous[1]
        previous = None if self.previous is None else (x, y)
        return replace(self, v=other.v, previous=previous)

    def rows(self, index):
        """The streams of other rows of the batch."""
        previous = self.previous
        if previous is not None:
            previous = tuple(None if x is None else x[index] for x in previous)
        mask = self.key_padding_mask
        mask = None if mask is None else mask[index]
        return Streams(self.v[index], self.t[index], previous, mask)

    def run(self, bridge):
        return bridge(self.v, self.t, self.previous, self.key_padding_mask)


class Tap(nn.Module):
    """A bridge that notes what it is given, and of which an experiment changes what it returns.

    image, text: strengths of Δv and Δt. sentence, other_image: Streams from which Δv takes the
    text, and Δt the image, in place of its own.
    """

    def __init__(self, bridge):
        super().__init__()
        self.bridge = bridge
        self.given = None
        self.reset()

    def reset(self):
        self.image = 1.0
        self.text = 1.0
        self.sentence = None
        self.other_image = None

    def forward(self, v, t, previous=None, key_padding_mask=None):
        """As etris.Bridge.forward."""
        own = Streams(v, t, previous, key_padding_mask)
        self.given = own
        delta_v, delta_t, new_previous = own.run(self.bridge)
        if self.sentence is not None:
            delta_v, _, _ = self.sentence.with_image_of(own).run(self.bridge)
        if self.other_image is not None:
            _, delta_t, _ = own.with_image_of(self.other_image).run(self.bridge)
        return self.image * delta_v, self.text * delta_t, new_previous


@contextlib.contextmanager
def tapped(model):
    """The taps around the model's bridges, by stage; afterwards the bridges are as before.

    UserError for a model that has none.
    """
    bridger = getattr(model, "bridger", {})
    if model.system != "etris" or not bridger:
        raise UserError(
            f"a {model.system} model without a Bridger: nothing can cross, or be probed"
        )
    bridges = dict(bridger.items())
    taps = {name: Tap(bridge) for name, bridge in bridges.items()}
    bridger.update(taps)
    try:
        yield taps
    finally:
        bridger.update(bridges)


def set_strength(taps, image, text):
    """The same strengths at every stage, and no partners."""
    for tap in taps.values():
        tap.reset()
        tap.image = image
        tap.text = text


def stream_settings(taps) -> dict[str, dict]:
    """Row's name → {stage: (strength of Δv, of Δt)}."""
    settings = {
        "none": dict.fromkeys(taps, (0, 0)),
        "image only": dict.fromkeys(taps, (1, 0)),
        "text only": dict.fromkeys(taps, (0, 1)),
        "both": dict.fromkeys(taps, (1, 1)),
    }
    for stage in taps:
        settings[f"stage {stage}"] = {name: (name == stage,) * 2 for name in taps}
    for strength in STRENGTHS:
        settings[f"strength {strength:g}"] = dict.fromkeys(taps, (strength, strength))
    return settings


# ---------------------------------------------------------------------------------------- partners
def other_sentences(dataset, count) -> dict[int, str | None]:
    """Of each of the first `count` objects a sentence about another one of its image, by ref_id.

    A drawn scene is asked for one; elsewhere another object of the whole split has it, or none has.
    """
    if not isinstance(dataset.samples, list):
        scenes = [dataset[i] for i in range(count)]
        return {scene.ref_id: sentence_about_another(scene) for scene in scenes}
    by_image = {}
    for sample in dataset.samples:
        by_image.setdefault(sample.image_id, []).append(sample)
    found = {}
    for sample in dataset.samples[:count]:
        group = by_image[sample.image_id]
        others = [other for other in group if other.ref_id != sample.ref_id]
        found[sample.ref_id] = others[0].sentences[0] if others else None
    return found


def sentence_about_another(scene) -> str | None:
    """The first sentence that can be said about the next thing of the scene, or the one after."""
    count = len(scene.things)
    first = scene.targets[0] if scene.targets else 0
    for step in range(1, count):
        target = (first + step) % count
        if target in scene.targets:
            continue
        sentences = sentences_about(scene.things, target, "scenes", seed=scene.image_id)
        if sentences:
            return next(iter(sentences))
    return None


def index_of_another_image(items) -> list[int]:
    """For each row of a batch a row that has another image: half of the batch further on."""
    ids = [item["sample"].image_id for item, _ in items]
    count = len(ids)
    index = []
    for i in range(count):
        candidates = [(i + count // 2 + step) % count for step in range(count)]
        index.append(next((j for j in candidates if ids[j] != ids[i]), i))
    return index


# ------------------------------------------------------------------------------------- measurement
@torch.inference_mode()
def measure(model, dataset, device="cpu", *, limit=200, names=None, progress=True) -> list[dict]:
    """Rows of streams and partners for the first `limit` objects → one dict per row.

    names: only these rows, and "both" (all). Each object's rows are computed in one go, so that the
    reading is done once.
    """
    device = torch.device(device)
    count = min(limit, len(dataset))
    items = EvalDataset(dataset, model.size, model.max_tokens)
    loader = (item_or_error(items[i]) for i in range(count))
    partners = other_sentences(dataset, count)
    bar = tqdm(total=count, desc="probe", disable=None if progress else True, leave=False)

    tables = {}
    model.eval()
    with tapped(model) as taps, FrozenFeatureCache().attached_to(model), bar:
        settings = stream_settings(taps)
        for chunk in chunks(upload(loader, device), OBJECTS_PER_BATCH):
            batch = [(item, k) for item in chunk for k in range(len(item["tokens"]))]
            for name, setting in settings.items():
                if not is_wanted(name, names):
                    continue
                set_strength(taps, 1, 1)
                for stage, (image, text) in setting.items():
                    taps[stage].image = image
                    taps[stage].text = text
                tables.setdefault(name, []).extend(predict(model, batch, device))
            for name in PARTNERS:
                if is_wanted(name, names):
                    rows = predict_with_partner(model, taps, name, batch, partners, device)
                    tables.setdefault(name, []).extend(rows)
            bar.update(len(chunk))
    if not tables:
        raise UserError(f"{dataset.name} {dataset.split}: no objects to measure")
    return [compare(name, table, tables["both"]) for name, table in tables.items()]


def is_wanted(name, names) -> bool:
    return names is None or name in names or name == "both"


def item_or_error(item) -> dict:
    if "error" in item:
        raise item["error"]
    return item


def chunks(items, size):
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def predict(model, batch, device) -> list[dict]:
    """evaluate.py's row of each (item, index of the sentence)."""
    masks = predict_masks(model, batch, device, THRESHOLD, None)
    counts = count_pixels(batch, masks)
    rows = []
    for (item, k), mask, (intersection, union) in zip(batch, masks, counts, strict=True):
        rows.append(score(item, k, mask, intersection, union))
    return rows


def predict_with_partner(model, taps, name, batch, partners, device) -> list[dict]:
    """Rows of the sentences that have a partner of this kind, with the partner in its place."""
    if name == "other sentence":
        batch = [(item, k) for item, k in batch if partners[item["sample"].ref_id]]
        if not batch:
            return []
        others = [with_sentence(item, partners[item["sample"].ref_id]) for item, _ in batch]
        given = streams_of(model, taps, others, device)
    else:
        given = streams_of(model, taps, batch, device)
        index = index_of_another_image(batch)
        if any(i == j for i, j in enumerate(index)):  # one image only
            return []
        given = {stage: streams.rows(index) for stage, streams in given.items()}

    set_strength(taps, 1, 1)
    for stage, tap in taps.items():
        if name == "other image":
            tap.other_image = given[stage]
        else:
            tap.sentence = given[stage]
    rows = predict(model, batch, device)
    set_strength(taps, 1, 1)
    return rows


def with_sentence(item, sentence) -> tuple[dict, int]:
    """The item with another sentence."""
    length = item["tokens"].shape[1]
    tokens = tokenize([sentence], length).to(item["tokens"].device)
    return item | {"tokens": tokens}, 0


def streams_of(model, taps, batch, device) -> dict[str, Streams]:
    """What each bridge is given when the model runs as trained, by stage."""
    set_strength(taps, 1, 1)
    images = normalize(torch.stack([item["image"] for item, _ in batch]))
    tokens = torch.stack([item["tokens"][k] for item, k in batch])
    model.encode(images, tokens)
    return {stage: tap.given for stage, tap in taps.items()}


# ------------------------------------------------------------------------------ drops and intervals
def compare(name, rows, reference_rows) -> dict:
    """The row's scores, and by how much they lie below the reference's; by kind, too."""
    reference = {key_of(row): row for row in reference_rows}
    pairs = [(row, reference[key_of(row)]) for row in rows]
    result = {"row": name, **scores_and_drop(pairs)}
    kinds = sorted({row["kind"] for row in rows if row.get("kind")})
    result["kinds"] = {}
    for kind in kinds:
        result["kinds"][kind] = scores_and_drop([pair for pair in pairs if pair[0]["kind"] == kind])
    return result


def key_of(row) -> tuple:
    return row["ref_id"], row["sent_id"]


def scores_and_drop(pairs) -> dict:
    """(row, reference's row) of the same sentences → scores in percent, drop, low, high."""
    if not pairs:
        return {"sentences": 0}
    rows = [row for row, _ in pairs]
    scores = summarize([row["I"] for row in rows], [row["U"] for row in rows])
    drops = [other["IoU"] - row["IoU"] for row, other in pairs]
    groups = [row["ref_id"] for row in rows]
    low, high = interval(drops, groups)
    return {
        "oIoU": scores["oIoU"],
        "mIoU": scores["mIoU"],
        "drop": float(np.mean(drops)),
        "low": low,
        "high": high,
        "sentences": len(rows),
    }


def interval(values, groups, seed=0) -> tuple[float, float]:
    """95 % interval of the values' mean; all values of a group are drawn together or not at all."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, values)
    counts = np.bincount(index)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(sums), (RESAMPLINGS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


# ------------------------------------------------------------------------------------ linear probe
class Ridge:
    """Least squares with a penalty, from sums: features (N, C) → whether the object is there."""

    def __init__(self):
        self.products = 0
        self.targets = 0
        self.total = 0
        self.target_total = 0
        self.count = 0
        self.weight = None

    def add(self, x, y):
        """x (N, C), y (N,) of 0 and 1."""
        x = x.double()
        y = y.double()
        self.products = self.products + x.T @ x
        self.targets = self.targets + x.T @ y
        self.total = self.total + x.sum(0)
        self.target_total = self.target_total + y.sum()
        self.count += len(x)

    def fit(self):
        """Solve for the weights of centered features."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        correlation = self.targets / self.count - mean * self.target_total / self.count
        penalty = RIDGE * covariance.diagonal().mean() + 1e-12
        identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        self.weight = torch.linalg.solve(covariance + penalty * identity, correlation)

    def score(self, x) -> Tensor:
        """x (N, C) → (N,), up to a constant."""
        return x.double() @ self.weight


def auc(scores, labels) -> float | None:
    """The chance that a place of the object scores above another one; None without either."""
    positive = scores[labels]
    negative = scores[~labels]
    if not len(positive) or not len(negative):
        return None
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    return float(above.mean())


def features_of(model, taps, items, strength) -> dict[tuple, Tensor]:
    """After each stage and in the decoder: {(name, strength): (B, C, H, W)}, first sentences."""
    set_strength(taps, strength, strength)
    images = normalize(torch.stack([item["image"] for item in items]))
    tokens = torch.stack([item["tokens"][0] for item in items])
    model.recorded = {}
    try:
        model(images, tokens)
        recorded = model.recorded
    finally:
        model.recorded = None
    features = {(f"stage {i}", strength): recorded[f"visual{i}.after"] for i in range(3)}
    features["decoder", strength] = recorded["features"]
    return features


def all_features(model, taps, dataset, count, device, progress):
    """Each of the first `count` objects → (item, {(name, strength): (C, H, W)}), at 0 and 1."""
    items = EvalDataset(dataset, model.size, model.max_tokens)
    count = min(count, len(items))
    loader = (item_or_error(items[i]) for i in range(count))
    hidden = None if progress else True
    bar = tqdm(upload(loader, device), "linear probe", count, disable=hidden, leave=False)
    for chunk in chunks(bar, OBJECTS_PER_BATCH):
        features = features_of(model, taps, chunk, 0) | features_of(model, taps, chunk, 1)
        for i, item in enumerate(chunk):
            yield item, {key: maps[i].float() for key, maps in features.items()}


def place_labels(item, features) -> Tensor:
    """features (C, H, W) → (H·W,): whether the object covers at least half of a place."""
    square = letterbox_mask(item["mask"].cpu().numpy(), item["box"])[None].float() / 255
    covered = F.adaptive_avg_pool2d(square, features.shape[1:])
    return (covered.flatten() >= 0.5).to(features.device)


@torch.inference_mode()
def linear_probe(model, train_set, test_set, device="cpu", *, limit=200, progress=True):
    """AUC per image of probes trained on 2 · limit objects and tested on `limit`.

    → one row per place in the model ("probe stage 0" … "probe decoder": AUC, AUC_without, gain,
    low, high), and examples for the figure: (sample, {(name, strength): scores (H, W)}).
    """
    device = torch.device(device)
    model.eval()
    with tapped(model) as taps, FrozenFeatureCache().attached_to(model):
        probes = {}
        for item, features in all_features(model, taps, train_set, 2 * limit, device, progress):
            for key, x in features.items():
                probe = probes.setdefault(key, Ridge())
                probe.add(x.flatten(1).T, place_labels(item, x))
        for probe in probes.values():
            probe.fit()

        areas = {key: {} for key in probes}  # (name, strength) → {ref_id: AUC}
        kinds = {}  # ref_id → kind of its first sentence
        examples = []
        for item, features in all_features(model, taps, test_set, limit, device, progress):
            heats = {}
            if isinstance(item["sample"], Scene):
                kinds[item["sample"].ref_id] = item["sample"].kinds[0]
            for key, x in features.items():
                scores = probes[key].score(x.flatten(1).T)
                area = auc(scores, place_labels(item, x))
                if area is not None:
                    areas[key][item["sample"].ref_id] = area
                heats[key] = scores.view(x.shape[1:]).cpu().numpy()
            if len(examples) < HEAT_MAPS:
                examples.append((item["sample"], heats))
    names = dict.fromkeys(name for name, _ in probes)
    return [probe_row(name, areas[name, 0], areas[name, 1], kinds) for name in names], examples


def probe_row(name, without, with_bridges, kinds) -> dict:
    """{ref_id: AUC} at strength 0 and as trained → means and gain in percent, by kind, too.

    kinds: {ref_id: kind of its sentence}, of data that has kinds.
    """
    row = {"row": f"probe {name}", **areas_and_gain(without, with_bridges, sorted(with_bridges))}
    row["kinds"] = {}
    for kind in sorted(set(kinds.values())):
        refs = sorted(ref for ref in with_bridges if kinds[ref] == kind)
        row["kinds"][kind] = areas_and_gain(without, with_bridges, refs)
    return row


def areas_and_gain(without, with_bridges, refs) -> dict:
    """Means over these objects, and the gain's interval."""
    if not refs:
        return {"images": 0}
    before = np.array([100 * without[ref] for ref in refs])
    after = np.array([100 * with_bridges[ref] for ref in refs])
    low, high = interval(after - before, refs)
    return {
        "AUC": float(after.mean()),
        "AUC_without": float(before.mean()),
        "gain": float((after - before).mean()),
        "low": low,
        "high": high,
        "images": len(refs),
    }


# ------------------------------------------------------------------------------------------ output
def table_of(rows) -> str:
    """Markdown: streams and partners, then the probe."""
    kinds = sorted({kind for row in rows for kind in row.get("kinds", ())})
    columns = ["what reaches the encoders", "sentences", "oIoU", "mIoU", "drop (95 %)", *kinds]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "mIoU" not in row:
            continue
        count = f"{row['sentences']:,}"
        cells = [row["row"], count, f"{row['oIoU']:.1f}", f"{row['mIoU']:.1f}", cell(row, "drop")]
        cells += [cell(row["kinds"].get(kind, {}), "drop") for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")

    columns = ["probe: is it here?", "images", "AUC", "without bridges", "gain (95 %)", *kinds]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if "AUC" not in row:
            continue
        areas = [f"{row['AUC']:.1f}", f"{row['AUC_without']:.1f}"]
        cells = [row["row"], f"{row['images']:,}", *areas, cell(row, "gain")]
        cells += [cell(row["kinds"].get(kind, {}), "gain") for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row, name) -> str:
    """2.5 (1.9 … 3.1)"""
    if name not in row:
        return "–"
    return f"{row[name]:.1f} ({row['low']:.1f} … {row['high']:.1f})"


LABELS = {
    "none": "neither Δ",
    "image only": "only Δv, into the image encoder",
    "text only": "only Δt, into the text encoder",
    "other sentence": "Δv: another sentence, same image",
    "sentence of another image": "Δv: a sentence of another image",
    "other image": "Δt: another image",
}


def draw(rows, path):
    """Three panels: what each row loses, the curve over strengths, the probe with and without."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.8), layout="constrained")
    drops, curve, probe = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    draw_drops(drops, rows)
    draw_strengths(curve, rows)
    draw_probe(probe, rows)
    write_file(path, png(figure, dpi=120))


def draw_drops(axis, rows):
    """A bar for each stream that is cut and each partner that is swapped."""
    named = [row for row in rows if row["row"] in LABELS or row["row"].startswith("stage")]
    named = [row for row in named if "drop" in row]  # not a partner that no sentence has
    values = [row["drop"] for row in named]
    errors = [
        [row["drop"] - row["low"] for row in named],
        [row["high"] - row["drop"] for row in named],
    ]
    labels = [LABELS.get(row["row"], f"only the bridge after {row['row']}") for row in named]
    colors = ["tab:orange" if row["row"] in PARTNERS else "tab:blue" for row in named]
    axis.barh(labels, values, xerr=errors, color=colors)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("mIoU lost, points")
    axis.set_title("blue: a part cut · orange: a partner swapped", fontsize=10)


def draw_strengths(axis, rows):
    """mIoU over the factor by which Δv and Δt are scaled."""
    strengths = {"none": 0.0, "both": 1.0}
    strengths |= {f"strength {strength:g}": strength for strength in STRENGTHS}
    points = sorted((strengths[row["row"]], row["mIoU"]) for row in rows if row["row"] in strengths)
    axis.plot(*zip(*points, strict=True), marker="o")
    axis.set(xlabel="strength of Δv and Δt (1: as trained)", ylabel="mIoU")
    axis.set_title("the Bridger turned up and down", fontsize=10)


def draw_probe(axis, rows):
    """AUC after each stage and in the decoder; 50 percent is chance, where the bars begin."""
    probed = [row for row in rows if "AUC" in row]
    places = np.arange(len(probed))
    without = [row["AUC_without"] - CHANCE for row in probed]
    with_bridges = [row["AUC"] - CHANCE for row in probed]
    axis.bar(places - 0.2, without, 0.4, bottom=CHANCE, label="without", color="0.7")
    axis.bar(places + 0.2, with_bridges, 0.4, bottom=CHANCE, label="with the Bridger")
    names = [row["row"].removeprefix("probe ") for row in probed]
    axis.set(xticks=places, xticklabels=names, ylim=(CHANCE, 100), ylabel="AUC, percent")
    axis.set_title("linear probe: is the object here?", fontsize=10)
    axis.legend(loc="lower left", fontsize=8, framealpha=1)


def draw_heat_maps(examples, dataset, path):
    """Each example's image, then what the probe sees after each stage, without and with bridges."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in examples[0][1]))
    columns = 1 + 2 * len(names)
    figure = Figure((1.5 * columns, 1.7 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), columns, squeeze=False)
    by_ref = {dataset[i].ref_id: dataset[i] for i in range(min(len(dataset), 64))}
    for axes, (sample, heats) in zip(grid, examples, strict=True):
        whole = by_ref[sample.ref_id]
        axes[0].imshow(whole.image)
        outline(axes[0], whole.mask)
        axes[0].set_title(whole.sentences[0], fontsize=7)
        pairs = [(name, strength) for name in names for strength in (0, 1)]
        for axis, (name, strength) in zip(axes[1:], pairs, strict=True):
            axis.imshow(heats[name, strength], cmap="viridis")
            axis.set_title(f"{name}, {'with' if strength else 'without'}", fontsize=7)
        for axis in axes:
            axis.axis("off")
    write_file(path, png(figure, dpi=120))


# ------------------------------------------------------------------------------------ command line
def arguments(argv=None):
    """The parsed command line."""
    parser = Parser(description="What crosses the Bridger of a trained ETRIS?")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="ours or published")
    parser.add_argument("--dataset", default="scenes", help="as evaluate.py's (scenes)")
    parser.add_argument("--split", help="which split (scenes: test; else val)")
    parser.add_argument("--data", metavar="DIR", help="the folder prepare.py filled (data)")
    parser.add_argument("--weights", metavar="FILE", help="of the frozen CLIP")
    parser.add_argument("--limit", type=integer(2), default=200, metavar="N", help="objects (200)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="which one (the best)")
    parser.add_argument("--json", metavar="FILE", help="write all rows")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the first checkpoint's rows")
    parser.add_argument("--heat-maps", metavar="FILE.png", help="draw what its probe sees")
    args = parser.parse_args(argv)
    for path in (args.json, args.figure, args.heat_maps):
        if path:
            check_writable(path)
    if args.split is None:
        args.split = "test" if args.dataset in FLAVOURS else "val"
    return args


@command
def main(argv=None):
    args = arguments(argv)
    seed_all(0)
    device, reason = pick_device(args.device)
    print(f"device {device}: {reason}")
    all_rows = []
    for checkpoint in args.checkpoints:
        model = set_fast(load_checkpoint(checkpoint, args.weights, device))
        test_set = open_dataset(args.dataset, args.split, args.data, side=model.size)
        train_set = open_dataset(args.dataset, "train", args.data, 2 * args.limit, model.size)
        rows = measure(model, test_set, device, limit=args.limit)
        probe_rows, examples = linear_probe(model, train_set, test_set, device, limit=args.limit)
        rows += probe_rows
        count = min(args.limit, len(test_set))
        print(f"\n{checkpoint}, {test_set.name} {test_set.split}, {count} objects")
        print(table_of(rows))

        facts = provenance(0, model.backbone.identity)
        facts |= {"dataset": test_set.name, "split": test_set.split, "limit": args.limit}
        empty = dict.fromkeys(COLUMNS)
        all_rows += [{**empty, **row, "checkpoint": checkpoint, **facts} for row in rows]
        if args.json:  # after each checkpoint, and before anything is drawn
            write_file(args.json, json.dumps(all_rows, indent=1).encode())
        if checkpoint == args.checkpoints[0] and args.figure:
            draw(rows, args.figure)
        if checkpoint == args.checkpoints[0] and args.heat_maps:
            draw_heat_maps(examples, test_set, args.heat_maps)


if __name__ == "__main__":
    main()
