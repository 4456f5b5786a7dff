"""What `lesson.check` compares with. Try first; worked solutions are in solutions.md.

One dict per notebook. An exercise has the right answer and typical wrong ones, each with the reason it is wrong. Where
a function is to be written, `right` is one, and `on` lists the arguments both are tried with.
"""

from dataclasses import dataclass

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
        ((256, 6, 6), "that is the tiny CLIP at 96 pixels; RN101 is four times as wide, 416 / 16 = 26"))),
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
BRIDGER = {}
DECODER = {}
FIGURE_3 = {}
TRAINED = {}
TRAINING = {}
FAILURES = {}
BEYOND = {}

EXERCISES = CLIP | BRIDGER | DECODER | FIGURE_3 | TRAINED | TRAINING | FAILURES | BEYOND
