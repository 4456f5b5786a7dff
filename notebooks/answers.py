"""What `lesson.check` compares with. Try first; worked solutions are in solutions.md.

One dict per notebook. An exercise has the right answer and typical wrong ones, each with the reason it is wrong. Where
a function is to be written, `right` is one, and `on` lists the arguments both are tried with.
"""

from dataclasses import dataclass
from math import log, log2

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Exercise:
    """right: a value or a function; wrong: pairs (answer, what is wrong with it); on: argument tuples of a function."""

    right: object
    wrong: tuple = ()
    on: tuple = ()


def dice(*shape, seed=0):
    """Random numbers that are the same everywhere, to try a function on."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CLIP = {
    "01 tokens": Exercise(9, (
        (7, "the start and the end mark count too"),
        (17, "17 is the length of the row; what is behind the end mark is padding"))),
    "01 RN101 stage 1": Exercise((1024, 26, 26), (
        ((512, 52, 52), "that is stage 0, layer2"),
        ((256, 8, 8), "that is the tiny CLIP at 128 pixels; RN101 is four times as wide, 416 / 16 = 26"))),
    "01 causal": Exercise({2, 3, 4, 5, 6, 7}, (
        ({2}, "the words behind it have seen the changed word"),
        (set(range(8)), "the start mark and “the” stand before the change: they never see it"))),
    "01 cosine map": Exercise(
        lambda dense, sentence: F.cosine_similarity(dense, sentence[:, None, None], dim=0), (
            (lambda dense, sentence: torch.einsum("ehw,e->hw", dense, sentence), "divide by both lengths"),
            (lambda dense, sentence: torch.einsum("ehw,e->hw", F.normalize(dense, dim=0), sentence),
             "the sentence has a length too: divide by it")),
        ((dice(8, 3, 3), dice(8, seed=1)), (dice(4, 2, 5), 7 * dice(4, seed=2)))),
    "01 places": Exercise(169, (
        (13, "13 each way: that many rows, and as many columns"),
        (170, "the mean token is left out: only places are compared"))),
}  # fmt: skip


def zoomed(v, weight, shift=0):
    """A 2 × 2 convolution with stride 2; with a shift, of the patches beside the right ones."""
    return F.conv2d(v.roll(shift, -1)[None], weight, stride=2)[0]


def one_head(q, k, v, scale=True, over=-1):
    """softmax(q kᵀ / √d) v, with two mistakes to choose from."""
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale else 1)).softmax(over) @ v


BRIDGER = {
    "02 zoom count": Exercise(524_288, (
        (131_072, "a kernel of 2 × 2 has four cells: times 4"),
        (524_352, "there is no bias"))),
    "02 zoom in": Exercise(zoomed, (
        (lambda v, weight: F.conv2d(v[None], weight)[0], "patches must not overlap: go in steps of 2"),
        (lambda v, weight: zoomed(v, weight, 1), "the first patch starts at row 0, column 0")),
        ((dice(3, 4, 4), dice(5, 3, 2, 2, seed=1)), (dice(2, 4, 6), dice(3, 2, 2, 2, seed=2)))),
    "02 attention": Exercise(one_head, (
        (lambda q, k, v: one_head(q, k, v, scale=False), "divide the scores by √d, or the softmax gets too sharp"),
        (lambda q, k, v: one_head(q, k, v, over=0), "each asking place's weights add up to 1: softmax over the keys")),
        ((dice(4, 8), dice(5, 8, seed=1), dice(5, 8, seed=2)), (dice(5, 2), dice(3, 2, seed=3), dice(3, 2, seed=4)))),
    "02 attention shape": Exercise((4, 17, 676), (
        ((4, 676, 17), "that is the other one, in which places ask words"),
        ((4, 17, 26), "26 × 26 places are asked"))),
    "02 not causal": Exercise(set(range(8)), (
        ({6, 7}, "so it is without the Bridger; its attention among words is not causal"),
        ({6}, "attention mixes words: the change travels"))),
}  # fmt: skip


def object_loss(z, mask):
    """Equations 10 and 11 on one picture."""
    return F.binary_cross_entropy_with_logits(z, mask)


TWO_PICTURES = ((dice(3, 3), (dice(3, 3, seed=1) > 0).float()), (3 * dice(2, 5), (dice(2, 5, seed=2) > 1).float()))
GATE = tuple((dice(d), dice(d, d, seed=1), dice(d, seed=2), dice(d, d, seed=3), dice(d, seed=4)) for d in (3, 6))
DECODER = {
    "03 never learn": Exercise(394_752, (
        (393_216, "queries and keys have biases too"),
        (197_376, "both what makes queries and what makes keys: twice that"))),
    "03 gate": Exercise(lambda s, wv, bv, wo, bo: wo @ (wv @ s + bv) + bo, (
        (lambda s, wv, bv, wo, bo: wo @ (wv @ s) + bo, "the value has a bias"),
        (lambda s, wv, bv, wo, bo: wv @ (wo @ s + bo) + bv, "value first, then output")), GATE),
    "03 kernel count": Exercise(2305, (
        (2304, "the last number written is the bias"),
        (4609, "512 is the decoder's width, the projector halves it"))),
    "03 loss": Exercise(object_loss, (
        (lambda z, mask: F.binary_cross_entropy_with_logits(z, mask, reduction="sum"), "equation 10 is the mean"),
        (lambda z, mask: -(mask * z.sigmoid().log()).mean(), "the places beside the object count too")), TWO_PICTURES),
    "03 target": Exercise(0.75, (
        (0, "that is the authors' target, the top-left pixel"),
        (1, "not the majority: the mean of the 16 pixels"))),
}  # fmt: skip


def jump_across(feature, inside):
    """Mean distance of horizontal neighbours of which exactly one is inside."""
    jumps = (feature[:, :, 1:] - feature[:, :, :-1]).norm(dim=0)
    return jumps[inside[:, 1:] != inside[:, :-1]].mean()


def paired_gain(a, b):
    """Mean of the differences and its standard error."""
    gains = np.asarray(a, float) - np.asarray(b, float)
    return gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5


def unpaired_gain(a, b):
    return np.mean(a) - np.mean(b), (np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)) ** 0.5


RUNS = ((np.array([60.0, 10, 90, 40]), np.array([55.0, 0, 88, 41])), (np.array([5.0, 7, 30]), np.array([9.0, 0, 10])))
FIGURE_3 = {
    "04 different maps": Exercise((1, 4), (
        ((4, 4), "without the Bridger no sentence reaches the picture's encoder"),
        ((1, 1), "with the Bridger every sentence changes the map"))),
    "04 edge": Exercise(jump_across, (
        (lambda feature, inside: feature.diff(dim=2).norm(dim=0).mean(), "only the pairs that cross the edge"),
        (lambda feature, inside: feature.diff(dim=2).abs().sum(0)[inside[:, 1:] != inside[:, :-1]].mean(),
         "Euclidean: the root of the sum of squares over channels")),
        ((dice(4, 3, 5), dice(3, 5, seed=1) > 0), (dice(2, 6, 6), dice(6, 6, seed=2) > 1))),
    "04 paired gain": Exercise(paired_gain, (
        (unpaired_gain, "take the differences first: what makes a sentence hard for both drops out"),
        (lambda a, b: ((a - b).mean(), (a - b).std(ddof=1)), "the error of a mean of n is smaller by √n")), RUNS),
    "04 last bridge": Exercise(0, (
        (1, "the bridge stands behind the last stage; only the head follows"),
        (3, "a bridge changes what comes behind it"))),
}  # fmt: skip


def is_frozen(before, after):
    """Whether two state dicts hold the same names and the same bits."""
    return before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


BN = {"bn.weight": torch.ones(2), "bn.running_mean": torch.zeros(2)}
MOVED, NEARLY = BN | {"bn.running_mean": torch.ones(2)}, BN | {"bn.weight": torch.ones(2) + 1e-5}
TRAINED = {
    "05 share": Exercise(100 * 26_328_129 / 145_874_338, (
        (100 * 1_942_080 / 145_874_338, "the decoder learns too"),
        (100 * 26_186_305 / 145_874_338, "CLIP's positions learn too"),
        (100 * 1_942_080 / 56_259_936, "that is the Bridger against the image encoder alone, nearly the headline"))),
    "05 BatchNorm": Exercise({"running_mean", "running_var", "num_batches_tracked"}, (
        ({"weight", "bias"}, "these two need an optimizer; the statistics move by themselves"),
        ({"running_mean", "running_var"}, "the counter moves too: a fingerprint sees it"))),
    "05 is frozen": Exercise(is_frozen, (
        (lambda a, b: all(torch.equal(a[n], b[n]) for n in a if n.endswith(("weight", "bias"))),
         "buffers belong to it: running statistics move without any gradient"),
        (lambda a, b: all(torch.allclose(a[n], b[n], atol=1e-3) for n in a), "bit for bit: nearly is not frozen")),
        ((BN, dict(BN)), (BN, MOVED), (BN, NEARLY))),
    "05 LoRA": Exercise(4096, (
        (262_144, "that is the whole weight; A and B alone learn"),
        (2048, "A and B: two of them"))),
}  # fmt: skip
TRAINING = {
    "06 first loss": Exercise(log(2), (
        (0.5, "½ is the probability; its loss is −log ½"),
        (1.0, "that is log₂; the code takes natural logarithms"))),
    "06 blind loss": Exercise(lambda p: -(p * log(p) + (1 - p) * log(1 - p)), (
        (lambda p: -log(p), "only the object's pixels pay −log p; the others pay −log(1 − p)"),
        (lambda p: -(p * log2(p) + (1 - p) * log2(1 - p)), "natural logarithms, as in the code")),
        ((0.06,), (0.5,), (0.2,))),
    "06 two metrics": Exercise([910 / 11, 50.0], (
        ([50.0, 910 / 11], "the other way round: mIoU is the mean of 90 and 10"),
        ([0.8273, 0.5], "in percent"))),
    "06 standard error": Exercise(28 / 3811**0.5, (
        (28 / 3811, "divide by the square root of their number"),
        (28.0, "that is how far one object lies from the mean, not the mean from another mean"))),
    "06 seeds": Exercise(6, (
        (3, "both sides have a spread: 2/n, not 1/n"),
        (2, "one standard error is not enough: twice that"))),
}  # fmt: skip


def swap(sentence, pairs=(("left", "right"),)):
    """Words exchanged inside longer words too."""
    for a, b in pairs:
        sentence = sentence.replace(a, "\0").replace(b, a).replace("\0", b)
    return sentence


def lowest(rows, n, key=lambda row: (row["IoU"], -row["U"])):
    return [row["sentence"] for row in sorted(rows, key=key)[:n]]


ROWS = [{"sentence": name, "IoU": found, "U": union} for name, found, union in
        (("the star", 40.0, 50), ("left ring", 0.0, 80), ("the 7", 91.0, 300), ("red one", 0.0, 200))]  # fmt: skip
FAILURES = {
    "07 chance": Exercise((1 / 3 + 1 / 4 + 1 / 5) / 3, (
        (0.25, "the mean of 1/3, 1/4 and 1/5, not 1 over the mean of 3, 4 and 5"),
        (0.1, "it picks among the digits in the picture, not among all ten"))),
    "07 swap": Exercise(swap, (
        (lambda sentence: sentence.replace("left", "right").replace("right", "left"),
         "the second replacement undoes the first"),
        (lambda sentence: " ".join({"left": "right", "right": "left"}.get(word, word) for word in sentence.split()),
         "leftmost and rightmost too")),
        (("left ring",), ("the rightmost star",), ("the ring to the right of the left star",), ("the blue one",))),
    "07 nothing there": Exercise([0.0, 100.0], (
        ([0.0, 0.0], "0 / 0 counts as 1 here: nothing was to be found, and nothing was"),
        ([100.0, 0.0], "the other way round"))),
    "07 worst": Exercise(lowest, (
        (lambda rows, n: lowest(rows, n, lambda row: (-row["IoU"], -row["U"])), "those are the best"),
        (lambda rows, n: lowest(rows, n, lambda row: row["IoU"]), "where two are equal, the larger U first")),
        ((ROWS, 2), (ROWS, 3))),
}  # fmt: skip


def label_iou(predicted, truth, classes):
    return np.mean([((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in classes])


def bounds(mask, behind=1):
    """left, top, right, bottom of a mask (H, W); behind=0 names its last column and row."""
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + behind, ys.max() + behind]


def most_pixels(maps, names, threshold):
    return names[int((np.asarray(maps) > threshold).sum((1, 2)).argmax())]


LABELS = np.array([[0, 0, 1], [0, 2, 2], [2, 2, 2]]), np.array([[0, 1, 1], [0, 2, 2], [0, 2, 2]])
MASK = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
SURE = np.array([[[0.9, 0.0], [0.0, 0.0]], [[0.4, 0.4], [0.4, 0.0]], [[0.34, 0.34], [0.34, 0.34]]])
BEYOND = {
    "08 letterbox": Exercise(278, (
        (416, "the longer side fills the square, the shorter one does not: nothing is stretched"),
        (427, "the picture is made smaller by 416 / 640"))),
    "08 mean IoU": Exercise(label_iou, (
        (lambda predicted, truth, classes: (predicted == truth).mean(), "that is the share of right pixels"),
        (lambda predicted, truth, classes: np.mean([(predicted[truth == c] == c).mean() for c in classes]),
         "divide by the union: pixels wrongly given to a class count, too")),
        ((*LABELS, (0, 1, 2)), (*LABELS, (1, 2)))),
    "08 box": Exercise(bounds, (
        (lambda mask: bounds(mask, 0), "right and bottom are the first column and row behind the mask"),
        (lambda mask: [bounds(mask)[i] for i in (1, 0, 3, 2)], "columns first: left, top, right, bottom")),
        ((MASK,), (MASK.T,))),
    "08 classify": Exercise(most_pixels, (
        (lambda maps, names, threshold: names[int(np.asarray(maps).mean((1, 2)).argmax())],
         "count the pixels over the threshold"),
        (lambda maps, names, threshold: names[int(np.asarray(maps).max((1, 2)).argmax())],
         "the surest pixel is not the largest mask")),
        ((SURE, ["star", "ring", "heart"], 0.35), (SURE, ["star", "ring", "heart"], 0.3))),
}  # fmt: skip


def planar(y, w, b, u):
    """One planar step of a normalizing flow."""
    return y + u * torch.tanh(w @ y + b)


def ridge(x, y, strength, times=1):
    """The linear map from x to y, with `times` the strength on the diagonal."""
    return torch.linalg.solve(x.mT @ x + times * strength * torch.eye(x.shape[1]), x.mT @ y)


OTHERS = {
    "09 planar": Exercise(planar, (
        (lambda y, w, b, u: y + u * torch.tanh(w * y + b), "w · y is a dot product: one number for all channels"),
        (lambda y, w, b, u: u * torch.tanh(w @ y + b), "y itself is added: with u = 0 nothing happens")),
        tuple((dice(d), dice(d, seed=1), 0.3, dice(d, seed=2)) for d in (3, 6))),
    "09 tokens": Exercise(694, (
        (677, "the prompts are tokens too, one for each of the 17 words, padding included"),
        (693, "the class token comes first"))),
    "09 rank": Exercise(1, (
        (48, "that is the width; look what each token's prior is a multiple of"),
        (89, "as many tokens, and all of them point the way of p or against it"))),
    "09 field": Exercise(7, (
        (5, "branch 3 reads branch 2 as well, which has looked at its neighbours"),
        (9, "2 places to each side by its own kernel, 1 more by branch 2's: 1 + 2 · 3"))),
    "09 branch inputs": Exercise((128, 192, 224), (
        ((128, 64, 96), "z comes along every time"),
        ((128, 192, 160), "branch 3 reads z and both branches before it"))),
    "09 ridge": Exercise(ridge, (
        (lambda x, y, strength: ridge(x, y, strength, 0), "that is plain least squares: where is the strength?"),
        (lambda x, y, strength: ridge(x, y, strength, len(x)), "the squares are summed, not averaged")),
        ((dice(9, 3), dice(9, 2, seed=1), 2.0), (dice(6, 4, seed=2), dice(6, 4, seed=3), 10.0))),
}  # fmt: skip

EXERCISES = CLIP | BRIDGER | DECODER | FIGURE_3 | TRAINED | TRAINING | FAILURES | BEYOND | OTHERS
