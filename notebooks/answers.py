"""What `lesson.check` compares with. Try first; worked solutions are in solutions.md.

One dict per notebook. An exercise has the right answer, typical wrong ones, each with the reason it
is wrong, and a hint. Where a function is to be written, `right` is one, and `on` lists the
arguments both are tried with. Neither reasons nor hints say the answer.
"""

from dataclasses import dataclass
from math import log, log2
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from clip_model import Attention
from etris import Bridge, Interactor


@dataclass(frozen=True)
class Exercise:
    """right: a value or a function. wrong: pairs (answer, why it is wrong). on: argument tuples."""

    right: object
    wrong: list
    hint: str
    on: tuple = ()


def randn(*shape, seed=0):
    """Random numbers that are the same everywhere, to try a function on."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- 00 start
START = {
    "00 IoU": Exercise(
        right=100 / 3,
        wrong=[
            (50, "divide by the pixels in either mask, not by those of one mask"),
            (25, "the pixels in both masks are counted once in the union"),
            (1 / 3, "in percent"),
            (33, "not rounded so far: to one decimal"),
        ],
        hint="pixels in both masks, over pixels in at least one of them, in percent",
    ),
    "00 strength 0": Exercise(
        right=1,
        wrong=[
            (4, "at strength 0 no sentence reaches the image encoder"),
            (0, "the image encoder runs; what it gives is plain CLIP's"),
        ],
        hint="which part of the model could make the map depend on the sentence, and is it on?",
    ),
    "00 who reads": Exercise(
        right="decoder",
        wrong=[
            ("bridger", "at strength 0 it adds nothing, and the mask still follows the sentence"),
            ("image encoder", "at strength 0 it is plain CLIP, which has not read the sentence"),
        ],
        hint="the mask is made after both encoders; what comes after them?",
    ),
}


# ----------------------------------------------------------------------------------------- 01 CLIP
def cosine_map(dense, sentence):
    return F.cosine_similarity(dense, sentence[:, None, None], dim=0)


def dot_product_map(dense, sentence):
    return torch.einsum("ehw,e->hw", dense, sentence)


def half_normalized_map(dense, sentence):
    return dot_product_map(F.normalize(dense, dim=0), sentence)


CLIP = {
    "01 tokens": Exercise(
        right=9,
        wrong=[
            (7, "the start and the end mark count too"),
            (17, "17 is the length of the row; what follows the end mark is padding"),
        ],
        hint="every frequent word is one token; then add the two marks",
    ),
    "01 RN101 stage 1": Exercise(
        right=(1024, 26, 26),
        wrong=[
            ((512, 52, 52), "that is stage 0, layer2"),
            ((256, 26, 26), "the side is right; the channels are the tiny one's, of width 16"),
            (
                (256, 8, 8),
                "that is the tiny CLIP at 128 pixels; RN101 is four times as wide, 416 / 16 = 26",
            ),
        ],
        hint="1.2: stage 1 has how many times the width, and its side is divided by what?",
    ),
    "01 causal": Exercise(
        right={2, 3, 4, 5, 6, 7},
        wrong=[
            ({2}, "the words after it have seen the changed word"),
            (
                set(range(8)),
                "the start mark and “the” stand before the change: they never see it",
            ),
        ],
        hint="a word sees itself and the words before it, so ask which positions see “red”",
    ),
    "01 cosine map": Exercise(
        right=cosine_map,
        wrong=[
            (dot_product_map, "divide by both lengths"),
            (half_normalized_map, "the sentence has a length too: divide by it"),
        ],
        hint="`F.normalize` makes vectors of length 1; then multiply and sum over the channels",
        on=(
            (randn(8, 3, 3), randn(8, seed=1)),
            (randn(4, 2, 5), 7 * randn(4, seed=2)),
        ),
    ),
    "01 longer row": Exercise(
        right=0,
        wrong=[
            (8, "padding stands after every one of them, and who sees what stands after it?"),
            (1, "the end mark sees what stands before it, and padding does not"),
            (5, "that is how many zeros are added; ask who can see them"),
        ],
        hint="padding comes after the end mark; 1.3: which words does a word see?",
    ),
}


# -------------------------------------------------------------------------------------- 02 Bridger
def randomized(module, seed=0):
    """The module with random parameters that are the same everywhere, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def shrink(v, weight, shift=0):
    """A convolution without overlap; with a shift, of the patches beside the right ones."""
    return F.conv2d(v.roll(shift, -1), weight, stride=weight.shape[-1])


def shrink_by_one(v, weight):
    return F.conv2d(v, weight)


def shrink_shifted(v, weight):
    return shrink(v, weight, shift=1)


def grow(v, weight):
    return F.conv_transpose2d(v, weight, stride=weight.shape[-1])


def grow_overlapping(v, weight):
    return F.conv_transpose2d(v, weight)


def grow_flipped(v, weight):
    return grow(v, weight.flip(2, 3))


def real_attend(attention, x, other, padding=None):
    return attention(x, other, key_padding_mask=padding)


def attend_to_padding(attention, x, other, padding=None):
    return attention(x, other)


def attend_with_one_head(attention, x, other, padding=None):
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    scores = (x @ w_q.mT + b_q) @ (other @ w_k.mT + b_k).mT * x.shape[-1] ** -0.5
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], float("-inf"))
    return attention.out_proj(scores.softmax(-1) @ (other @ w_v.mT + b_v))


def real_interact(ita, x, other, padding=None, other_padding=None):
    return ita(x, other, key_padding_mask=padding, other_padding_mask=other_padding)


def interact_without_shortcuts(ita, x, other, padding=None, other_padding=None):
    x = ita.norm1(ita.self_attn(x, key_padding_mask=padding))
    x = ita.norm2(ita.cross_attn(x, other, key_padding_mask=other_padding))
    return ita.norm3(ita.linear2(F.relu(ita.linear1(x))))


def interact_normalized_before(ita, x, other, padding=None, other_padding=None):
    x = x + ita.self_attn(ita.norm1(x), key_padding_mask=padding)
    x = x + ita.cross_attn(ita.norm2(x), other, key_padding_mask=other_padding)
    return x + ita.linear2(F.relu(ita.linear1(ita.norm3(x))))


def real_bridge(bridge, v, t, previous=None, padding=None):
    return bridge(v, t, previous, padding)


def bridge_by_the_paper(bridge, v, t, previous=None, padding=None, hands_on="output"):
    """What a reading of equations 2 and 5 to the letter makes of a bridge's layers."""
    x = bridge.zoom_in(v)
    height = x.shape[2]
    x = x.flatten(2).mT
    y = bridge.linear_in(t)
    if previous is not None:
        x = bridge.norm_v(x + previous[0])
        y = bridge.norm_t(y + previous[1])
    new_x = bridge.interact_v(x, y, other_padding_mask=padding)
    other = x if hands_on == "output" else new_x
    new_y = bridge.interact_t(y, other, key_padding_mask=padding)
    delta_v = bridge.zoom_out(new_x.mT.unflatten(2, (height, -1)))
    kept = (new_x, new_y) if hands_on == "output" else (x, y)
    return delta_v, bridge.linear_out(new_y), kept


def bridge_one_after_the_other(bridge, v, t, previous=None, padding=None):
    return bridge_by_the_paper(bridge, v, t, previous, padding, hands_on="input")


def bridge_without_previous(bridge, v, t, previous=None, padding=None):
    return bridge(v, t, None, padding)


WORDS = randn(2, 5, 6, seed=4)
WORDS_PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
ATTENTION = randomized(Attention(8, heads=2))
INTERACTOR = randomized(Interactor(8, heads=2, hidden=12), seed=1)
INTERACTION = (randn(2, 4, 8), randn(2, 5, 8, seed=1))


def small_bridge(stage):
    """A bridge of width 8 over maps of 3, 5 and 7 channels, 8 × 8 to 2 × 2 positions."""
    visual = SimpleNamespace(channels=(3, 5, 7), strides=(2, 4, 8))
    config = SimpleNamespace(patch_size=None, text_width=6)
    clip = SimpleNamespace(visual=visual, config=config)
    return randomized(Bridge(clip, stage, width=8, heads=2, first=stage == 0), seed=stage)


HANDED_ON = (randn(2, 16, 8, seed=2), randn(2, 5, 8, seed=3))
BRIDGER = {
    "02 shrink": Exercise(
        right=shrink,
        wrong=[
            (shrink_by_one, "patches must not overlap: go in steps of the kernel's side"),
            (shrink_shifted, "the first patch starts at row 0, column 0"),
        ],
        hint="`F.conv2d` with the right stride; the kernel's side stands in the weight's shape",
        on=(
            (randn(2, 3, 4, 4), randn(5, 3, 2, 2, seed=1)),
            (randn(1, 2, 6, 9), randn(3, 2, 3, 3, seed=2)),
            (randn(1, 4, 3, 2), randn(2, 4, 1, 1, seed=3)),
        ),
    ),
    "02 grow": Exercise(
        right=grow,
        wrong=[
            (grow_overlapping, "patches must not overlap: go in steps of the kernel's side"),
            (grow_flipped, "a patch is painted as the kernel lies, not turned"),
        ],
        hint="`F.conv_transpose2d` paints; its stride is how far two patches lie apart",
        on=(
            (randn(2, 5, 2, 2), randn(5, 3, 2, 2, seed=1)),
            (randn(1, 3, 2, 3), randn(3, 2, 3, 3, seed=2)),
            (randn(1, 2, 3, 2), randn(2, 4, 1, 1, seed=3)),
        ),
    ),
    "02 kernel at the stem": Exercise(
        right=4,
        wrong=[
            (2, "that leaves stage 0's grid: the bridges work on stage 1's"),
            (8, "that leaves stage 2's grid: the bridges work on stage 1's"),
            (1, "that leaves the stem's own grid, and the bridges share a smaller one"),
        ],
        hint="divide the side of the stem's map by the side of the grid that the bridges share",
    ),
    "02 attend": Exercise(
        right=real_attend,
        wrong=[
            (attend_to_padding, "a weight after the end mark must be 0"),
            (attend_with_one_head, "each head compares its own slice of the width"),
        ],
        hint="`unflatten` the width into (heads, size), bring heads in front of positions, and "
        "put −∞ into the scores at padding before the softmax",
        on=(
            (ATTENTION, *INTERACTION),
            (ATTENTION, *INTERACTION, WORDS_PADDING),
        ),
    ),
    "02 interact": Exercise(
        right=real_interact,
        wrong=[
            (interact_without_shortcuts, "what came in is added to what each branch makes of it"),
            (interact_normalized_before, "added first, then normalized"),
        ],
        hint="three lines of one form: x = norm(x + branch(x))",
        on=(
            (INTERACTOR, *INTERACTION),
            (INTERACTOR, *INTERACTION, None, WORDS_PADDING),
            (INTERACTOR, *reversed(INTERACTION), WORDS_PADDING, None),
        ),
    ),
    "02 handed on": Exercise(
        right={"delta_v", "delta_t"},
        wrong=[
            (
                {"delta_v", "delta_t", "previous"},
                "so it is by the paper's equation 2; in the code the stream skips the interactors",
            ),
            ({"previous"}, "what reaches the encoders comes out of the interactors"),
        ],
        hint="follow x through `Bridge.forward`: what is returned last, x or new_x?",
    ),
    "02 residual": Exercise(
        right=(1024, 26, 26),
        wrong=[
            ((512, 52, 52), "that is this stage's output, to which the code adds"),
            ((64, 26, 26), "that is the bridge's own width: zoom-out leaves it"),
            ((2048, 13, 13), "that is two stages on"),
        ],
        hint="a sum needs two maps of one shape: which map is the bridge's added to?",
    ),
    "02 bridge": Exercise(
        right=real_bridge,
        wrong=[
            (
                bridge_by_the_paper,
                "that hands on the interactors' output, as the paper writes; the code's `previous` "
                "is their input",
            ),
            (
                bridge_one_after_the_other,
                "the words attend to the image as it came in, not as the words have changed it",
            ),
            (bridge_without_previous, "add what the bridge before has handed on, and normalize"),
        ],
        hint="zoom in, add `previous`, both interactors on what is then there, zoom out; 2.0 says "
        "what is handed on",
        on=(
            (small_bridge(0), randn(2, 3, 8, 8), WORDS, None, WORDS_PADDING),
            (small_bridge(1), randn(2, 5, 4, 4), WORDS, HANDED_ON, WORDS_PADDING),
            (small_bridge(2), randn(2, 7, 2, 2), WORDS, HANDED_ON, WORDS_PADDING),
        ),
    ),
    "02 zero start": Exercise(
        right=2048,
        wrong=[
            (4096, "the gradient of A passes through B, and B is zero"),
            (0, "the gradient of B does not pass through B"),
        ],
        hint="write B (A x) and ask for each matrix: by what is its gradient multiplied?",
    ),
    "02 not causal": Exercise(
        right=set(range(8)),
        wrong=[
            ({6, 7}, "so it is without the Bridger; its attention among words is not causal"),
            ({6}, "attention mixes words: the change travels"),
        ],
        hint="is the Bridger's self-attention among the words causal, too?",
    ),
}


# ----------------------------------------------------------------------------- 03 decoder and loss
def gate_factors(s, w_value, b_value, w_out, b_out):
    value = w_value @ s + b_value
    return w_out @ value + b_out


def gate_without_bias(s, w_value, b_value, w_out, b_out):
    return w_out @ (w_value @ s) + b_out


def gate_in_wrong_order(s, w_value, b_value, w_out, b_out):
    return w_value @ (w_out @ s + b_out) + b_value


def gate_arguments(width):
    """A sentence, then weight and bias of value and output."""
    return (
        randn(width),
        randn(width, width, seed=1),
        randn(width, seed=2),
        randn(width, width, seed=3),
        randn(width, seed=4),
    )


def image_loss(z, mask):
    """Equations 10 and 11 on one image."""
    return F.binary_cross_entropy_with_logits(z, mask)


def summed_loss(z, mask):
    return F.binary_cross_entropy_with_logits(z, mask, reduction="sum")


def loss_of_the_object(z, mask):
    return -(mask * z.sigmoid().log()).mean()


def loss_of_hard_targets(z, mask):
    return F.binary_cross_entropy_with_logits(z, (mask > 0.5).float())


def loss_of_two_cases(z, mask):
    """Equation 11 to the letter: what is not all object counts as background."""
    return F.binary_cross_entropy_with_logits(z, (mask == 1).float())


DECODER = {
    "03 never learn": Exercise(
        right=394_752,
        wrong=[
            (393_216, "queries and keys have biases too"),
            (197_376, "both what makes queries and what makes keys: twice that"),
            (24_960, "that is width 64, and the rule is right: now width 256"),
        ],
        hint="per gate: the rows of weight and bias that make queries, and those that make keys",
    ),
    "03 gate": Exercise(
        right=gate_factors,
        wrong=[
            (gate_without_bias, "the value has a bias"),
            (gate_in_wrong_order, "value first, then output"),
        ],
        hint="two linear layers, one after the other, each with its bias",
        on=(gate_arguments(3), gate_arguments(6)),
    ),
    "03 same sentence feature": Exercise(
        right={"words"},
        wrong=[
            ({"words", "kernel"}, "the kernel is written by the sentence's feature alone"),
            ({"words", "gates"}, "the gates' factors are written by the sentence's feature alone"),
            ({"kernel"}, "what writes the kernel is the same for both"),
        ],
        hint="for each way: does its module read the sentence's feature, or the words?",
    ),
    "03 loss": Exercise(
        right=image_loss,
        wrong=[
            (summed_loss, "equation 10 is the mean"),
            (loss_of_the_object, "the pixel positions beside the object count too"),
            (loss_of_hard_targets, "a target between the two counts in both cases, with its share"),
            (loss_of_two_cases, "a target between the two is no background: it has both shares"),
        ],
        hint="weigh the two cases of equation 11 by the target and by what it lacks to 1; the mean",
        on=(
            (randn(3, 3), (randn(3, 3, seed=1) > 0).float()),
            (3 * randn(2, 5), (randn(2, 5, seed=2) > 1).float()),
            (randn(2, 4), randn(2, 4, seed=3).sigmoid()),
        ),
    ),
    "03 target": Exercise(
        right=0.75,
        wrong=[
            (0, "that is the authors' target, the top-left pixel"),
            (1, "not the majority: the mean of the 16 pixels"),
        ],
        hint="which share of the 4 × 4 pixels is object?",
    ),
}


# ---------------------------------------------------------------------------- 04 with and without
def jump_across(feature, inside):
    """Mean distance of horizontal neighbors of which exactly one is inside."""
    jumps = feature.diff(dim=2).norm(dim=0)
    return jumps[inside[:, 1:] != inside[:, :-1]].mean()


def jump_anywhere(feature, inside):
    return feature.diff(dim=2).norm(dim=0).mean()


def city_block_jump(feature, inside):
    jumps = feature.diff(dim=2).abs().sum(0)
    return jumps[inside[:, 1:] != inside[:, :-1]].mean()


def paired_gain(a, b):
    """Mean of the differences and its standard error."""
    gains = np.asarray(a, float) - np.asarray(b, float)
    return gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5


def unpaired_gain(a, b):
    variance = np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)
    return np.mean(a) - np.mean(b), variance**0.5


def gain_with_numpys_deviation(a, b):
    gains = a - b
    return gains.mean(), gains.std() / len(gains) ** 0.5


def gain_and_deviation(a, b):
    gains = a - b
    return gains.mean(), gains.std(ddof=1)


FIGURE_3 = {
    "04 different maps": Exercise(
        right=(1, 4),
        wrong=[
            ((4, 4), "without the Bridger no sentence reaches the image encoder"),
            ((1, 1), "with the Bridger every sentence changes the map"),
        ],
        hint="what can reach the image encoder in each of the two models?",
    ),
    "04 edge": Exercise(
        right=jump_across,
        wrong=[
            (jump_anywhere, "only the pairs that cross the edge"),
            (city_block_jump, "Euclidean: the root of the sum of squares over channels"),
        ],
        hint="`feature.diff(dim=2)` goes to the right neighbor; its length is a norm over channels",
        on=(
            (randn(4, 3, 5), randn(3, 5, seed=1) > 0),
            (randn(2, 6, 6), randn(6, 6, seed=2) > 1),
        ),
    ),
    "04 paired gain": Exercise(
        right=paired_gain,
        wrong=[
            (
                unpaired_gain,
                "take the differences first: what makes a sentence hard for both drops out",
            ),
            (gain_and_deviation, "the error of a mean of n is smaller by √n"),
            (gain_with_numpys_deviation, "numpy's std divides by n unless it is told otherwise"),
        ],
        hint="subtract sentence by sentence first, then mean and standard deviation / √n",
        on=(
            (np.array([60.0, 10, 90, 40]), np.array([55.0, 0, 88, 41])),
            (np.array([5.0, 7, 30]), np.array([9.0, 0, 10])),
        ),
    ),
    "04 direction": Exercise(
        right="image to text",
        wrong=[
            ("both", "another sentence's Δv does as well: what it carries of its own is not used"),
            ("none", "one of the two swaps costs something"),
            ("text to image", "which of the two streams is worse with another partner?"),
        ],
        hint="Δv goes into the image stream and could carry the sentence; Δt the other way round",
    ),
    "04 what is Δt": Exercise(
        right="a text adapter",
        wrong=[
            ("useless", "cut away, it costs points"),
            ("a message from the image", "then another image's would be the wrong message"),
        ],
        hint="it must be there, and the image it is computed with doesn't matter",
    ),
    "04 last bridge": Exercise(
        right=0,
        wrong=[
            (1, "the bridge stands after the last stage; only the head follows"),
            (3, "a bridge changes what comes after it"),
        ],
        hint="list the three stages in order, and mark where the bridge stands",
    ),
}


# ------------------------------------------------------------------------------ 05 what is trained
def is_frozen(before, after):
    """Whether two state dicts hold the same names and the same bits."""
    if before.keys() != after.keys():
        return False
    return all(torch.equal(x, after[name]) for name, x in before.items())


def parameters_are_equal(before, after):
    parameters = [name for name in before if name.endswith(("weight", "bias"))]
    return all(torch.equal(before[name], after[name]) for name in parameters)


def is_nearly_frozen(before, after):
    return all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def bridger_size(d):
    """Numbers in RN101's Bridger of width d."""
    return 2304 + 27_237 * d + 48 * d**2


def bridger_size_in_proportion(d):
    return round(1_942_080 * d / 64)


def bridger_size_on_a_line(d):
    return round(223_272 + (d - 8) * (1_942_080 - 223_272) / 56)


BN = {"bn.weight": torch.ones(2), "bn.running_mean": torch.zeros(2)}
BN_MOVED = {**BN, "bn.running_mean": torch.ones(2)}
BN_NEARLY = {**BN, "bn.weight": torch.ones(2) + 1e-5}
TRAINED = {
    "05 share": Exercise(
        right=100 * 26_328_129 / 145_874_338,
        wrong=[
            (100 * 1_942_080 / 145_874_338, "the decoder learns too"),
            (100 * 26_186_305 / 145_874_338, "CLIP's positional embeddings learn too"),
            (
                100 * 1_942_080 / 56_259_936,
                "that is the Bridger against the image encoder alone, nearly the headline",
            ),
        ],
        hint="learning / of all, in percent; both numbers stand in the last row",
    ),
    "05 bridger size": Exercise(
        right=bridger_size,
        wrong=[
            (bridger_size_in_proportion, "twice the width is not twice the numbers"),
            (bridger_size_on_a_line, "a line through two widths: attention grows with the square"),
        ],
        hint="three columns of the last row are three linear equations for a, b and c",
        on=((8,), (64,), (256,)),
    ),
    "05 BatchNorm": Exercise(
        right={"running_mean", "running_var", "num_batches_tracked"},
        wrong=[
            (
                {"weight", "bias"},
                "these two need an optimizer; the statistics move by themselves",
            ),
            ({"running_mean", "running_var"}, "the counter moves too: a SHA-256 sees it"),
        ],
        hint="parameters need an optimizer, buffers do not; which of the five are buffers?",
    ),
    "05 is frozen": Exercise(
        right=is_frozen,
        wrong=[
            (
                parameters_are_equal,
                "buffers belong to it: running statistics move without any gradient",
            ),
            (is_nearly_frozen, "bit for bit: nearly is not frozen"),
        ],
        hint="compare the names first, then every tensor with `torch.equal`",
        on=((BN, dict(BN)), (BN, BN_MOVED), (BN, BN_NEARLY)),
    ),
    "05 kept": Exercise(
        right=[{1, 2}, {2}, set()],
        wrong=[
            (
                [{0}, {1}, {2}],
                "the stage before the bridge is done when the bridge begins: which way does the "
                "gradient travel?",
            ),
            (
                [{0, 1, 2}, {1, 2}, {2}],
                "below the first bridge nothing learns, so no gradient has to go there",
            ),
            (
                [{0}, {0, 1}, {0, 1, 2}],
                "the gradient comes from the loss: it needs what lies between loss and bridge",
            ),
        ],
        hint="walk back from the loss to the bridge: through which stages do you come?",
    ),
    "05 first gradient": Exercise(
        right={"up.weight", "up.bias"},
        wrong=[
            (
                {"up.weight", "up.bias", "down.weight", "down.bias"},
                "by the chain rule, one pair's gradient is multiplied with a matrix of zeros",
            ),
            (
                {"down.weight", "down.bias"},
                "does the loss change at all if these two change a little?",
            ),
            ({"up.bias"}, "what stands behind a matrix of zeros need not be zero itself"),
        ],
        hint="change one number of a tensor a little: does the output change?",
    ),
    "05 LoRA": Exercise(
        right=20_480,
        wrong=[
            (1_048_576, "that is the whole weight; A and B alone learn"),
            (16_384, "that is A alone"),
            (4096, "that is B alone"),
        ],
        hint="only the two thin matrices learn: A is rank x inputs, B is outputs x rank",
    ),
}


# -------------------------------------------------------------------------------------- 06 training
def blind_loss(p):
    return -(p * log(p) + (1 - p) * log(1 - p))


def blind_loss_of_the_object(p):
    return -log(p)


def blind_loss_in_bits(p):
    return -(p * log2(p) + (1 - p) * log2(1 - p))


TRAINING = {
    "06 first loss": Exercise(
        right=log(2),
        wrong=[
            (0.5, "½ is the probability; its loss is −log ½"),
            (1.0, "that is log₂; the code takes natural logarithms"),
        ],
        hint="σ(0) = ½ at every pixel; what does equation 11 charge for it?",
    ),
    "06 blind loss": Exercise(
        right=blind_loss,
        wrong=[
            (
                blind_loss_of_the_object,
                "only the object's pixels pay −log p; the others pay −log(1 − p)",
            ),
            (blind_loss_in_bits, "natural logarithms, as in the code"),
        ],
        hint="a share p of the pixels pays −log p; what does the rest pay?",
        on=((0.06,), (0.5,), (0.2,)),
    ),
    "06 two metrics": Exercise(
        right=[910 / 11, 50.0],
        wrong=[
            ([50.0, 910 / 11], "the other way round: mIoU is the mean of 90 and 10"),
            ([0.8273, 0.5], "in percent"),
        ],
        hint="oIoU: add all I and all U, then divide; mIoU: divide each, then take the mean",
    ),
    "06 standard error": Exercise(
        right=28 / 3811**0.5,
        wrong=[
            (28 / 3811, "divide by the square root of their number"),
            (
                28.0,
                "that is how far one object lies from the mean, not the mean from another mean",
            ),
        ],
        hint="standard deviation / √n",
    ),
    "06 seeds": Exercise(
        right=6,
        wrong=[
            (3, "both sides have a spread: 2/n, not 1/n"),
            (2, "one standard error is not enough: twice that"),
        ],
        hint="twice the standard error has to be smaller than 0.59: solve for n, round up",
    ),
    "06 best of five": Exercise(
        right=0.58,
        wrong=[
            (0.0, "the mean of five runs is not shifted; is the best of five not?"),
            (0.5, "one standard deviation is how far a typical run lies out, not the best of five"),
            (0.82, "the old method's single run lies above its mean as often as below it"),
        ],
        hint="draw five numbers of deviation 0.5, take the largest; a million times; the mean",
    ),
}


# -------------------------------------------------------------------------------- 07 where it fails
def swap(sentence):
    """left ↔ right, inside longer words too."""
    sentence = sentence.replace("left", "\0")
    sentence = sentence.replace("right", "left")
    return sentence.replace("\0", "right")


def swap_one_after_the_other(sentence):
    return sentence.replace("left", "right").replace("right", "left")


def swap_whole_words(sentence):
    words = {"left": "right", "right": "left"}
    return " ".join(words.get(word, word) for word in sentence.split())


def worst_first(row):
    return row["IoU"], -row["U"]


def worst(rows, n):
    return [row["sentence"] for row in sorted(rows, key=worst_first)[:n]]


def best(rows, n):
    rows = sorted(rows, key=lambda row: (-row["IoU"], -row["U"]))
    return [row["sentence"] for row in rows[:n]]


def worst_in_any_order(rows, n):
    rows = sorted(rows, key=lambda row: row["IoU"])
    return [row["sentence"] for row in rows[:n]]


ROWS = [
    {"sentence": "the star", "IoU": 40.0, "U": 50},
    {"sentence": "left ring", "IoU": 0.0, "U": 80},
    {"sentence": "the 7", "IoU": 91.0, "U": 300},
    {"sentence": "red one", "IoU": 0.0, "U": 200},
]
FAILURES = {
    "07 chance": Exercise(
        right=(1 / 3 + 1 / 4 + 1 / 5) / 3,
        wrong=[
            (0.25, "the mean of 1/3, 1/4 and 1/5, not 1 over the mean of 3, 4 and 5"),
            (0.1, "it picks among the digits in the image, not among all ten"),
        ],
        hint="a random pick among k digits is right once in k; then the mean over the scenes",
    ),
    "07 swap": Exercise(
        right=swap,
        wrong=[
            (swap_one_after_the_other, "the second replacement undoes the first"),
            (swap_whole_words, "leftmost and rightmost too"),
        ],
        hint="the second replacement must not see what the first has written: use a placeholder",
        on=(
            ("left ring",),
            ("the rightmost star",),
            ("the ring to the right of the left star",),
            ("the blue one",),
        ),
    ),
    "07 nothing there": Exercise(
        right=[0.0, 100.0],
        wrong=[
            ([0.0, 0.0], "0 / 0 counts as 1 here: nothing was to be found, and nothing was"),
            ([100.0, 0.0], "the other way round"),
        ],
        hint="what is the union in each case, and what does 0 / 0 count as?",
    ),
    "07 always nothing": Exercise(
        right=(20, 100, 0),
        wrong=[
            ((0, 100, 0), "gIoU counts 1 where nothing fits and the model says nothing"),
            ((20, 100, 100), "T-acc counts the sentences that fit something: it answers none"),
            ((20, 20, 0), "N-acc is a share of the sentences that fit nothing, not of all"),
        ],
        hint="take ten sentences, two of which fit nothing, and count each score",
    ),
    "07 worst": Exercise(
        right=worst,
        wrong=[
            (best, "those are the best"),
            (worst_in_any_order, "where two are equal, the larger U first"),
        ],
        hint='sort by a pair: `(row["IoU"], -row["U"])`',
        on=((ROWS, 2), (ROWS, 3)),
    ),
}


# ------------------------------------------------------------------------- 08 images of one's own
def mean_iou(predicted, truth, classes):
    scores = []
    for c in classes:
        both = (predicted == c) & (truth == c)
        either = (predicted == c) | (truth == c)
        scores.append(both.sum() / either.sum())
    return np.mean(scores)


def pixel_accuracy(predicted, truth, classes):
    return (predicted == truth).mean()


def mean_recall(predicted, truth, classes):
    return np.mean([(predicted[truth == c] == c).mean() for c in classes])


def box(mask, after=1):
    """left, top, right, bottom of a mask (H, W); after=0 names its last column and row."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + after, rows.max() + after]


def inclusive_box(mask):
    return box(mask, after=0)


def rows_first_box(mask):
    left, top, right, bottom = box(mask)
    return [top, left, bottom, right]


def largest_mask(maps, names, threshold):
    pixels = (np.asarray(maps) > threshold).sum((1, 2))
    return names[int(pixels.argmax())]


def largest_mean(maps, names, threshold):
    return names[int(np.asarray(maps).mean((1, 2)).argmax())]


def surest_pixel(maps, names, threshold):
    return names[int(np.asarray(maps).max((1, 2)).argmax())]


PREDICTED = np.array([[0, 0, 1], [0, 2, 2], [2, 2, 2]])
TRUTH = np.array([[0, 1, 1], [0, 2, 2], [0, 2, 2]])
MASK = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
MAPS = np.array(
    [
        [[0.9, 0.0], [0.0, 0.0]],
        [[0.4, 0.4], [0.4, 0.0]],
        [[0.34, 0.34], [0.34, 0.34]],
    ]
)
NAMES = ["star", "ring", "heart"]
BEYOND = {
    "08 letterbox": Exercise(
        right=278,
        wrong=[
            (416, "the longer side fills the square, the shorter one does not"),
            (427, "the image is made smaller by 416 / 640"),
        ],
        hint="the longer side becomes 416; the other side shrinks by the same factor; round",
    ),
    "08 mirrored": Exercise(
        right={0, 2, 4},
        wrong=[
            (
                {0, 1, 2, 3, 4, 5},
                "the mask is mirrored with its image; is what the sentence says of it still true?",
            ),
            ({0}, "above and below are not left and right"),
            ({1, 3, 5}, "these are the pairs that become wrong"),
        ],
        hint="which words change their meaning in a mirror?",
    ),
    "08 mean IoU": Exercise(
        right=mean_iou,
        wrong=[
            (pixel_accuracy, "that is the share of right pixels"),
            (
                mean_recall,
                "divide by the union: pixels wrongly given to a class count, too",
            ),
        ],
        hint="for each class: pixels that are it in both maps, over pixels that are it in either",
        on=((PREDICTED, TRUTH, (0, 1, 2)), (PREDICTED, TRUTH, (1, 2))),
    ),
    "08 box": Exercise(
        right=box,
        wrong=[
            (inclusive_box, "right and bottom are the first column and row after the mask"),
            (rows_first_box, "columns first: left, top, right, bottom"),
        ],
        hint="`np.nonzero(mask)` gives rows and columns; the end is one after the last",
        on=((MASK,), (MASK.T,)),
    ),
    "08 speck": Exercise(
        right=[100 / 101, 0.01],
        wrong=[
            ([100 / 101, 100 / 101], "the box has to reach that one pixel"),
            ([0.01, 100 / 101], "the masks first"),
            ([1.0, 0.01], "the one pixel more stands in the union of the masks"),
        ],
        hint="draw both boxes; for boxes and masks alike: the common area over that of the union",
    ),
    "08 classify": Exercise(
        right=largest_mask,
        wrong=[
            (largest_mean, "count the pixels over the threshold"),
            (surest_pixel, "the surest pixel is not the largest mask"),
        ],
        hint="count `maps > threshold` for each map, then take the largest",
        on=((MAPS, NAMES, 0.35), (MAPS, NAMES, 0.3)),
    ),
}


# ------------------------------------------------------------------------------------- 09 BarLeRIa
def planar(y, w, b, u):
    """One planar step of a normalizing flow."""
    return y + u * torch.tanh(w @ y + b)


def planar_by_channel(y, w, b, u):
    return y + u * torch.tanh(w * y + b)


def planar_without_shortcut(y, w, b, u):
    return u * torch.tanh(w @ y + b)


def planar_arguments(width):
    return randn(width), randn(width, seed=1), 0.3, randn(width, seed=2)


BARLERIA = {
    "09 planar": Exercise(
        right=planar,
        wrong=[
            (planar_by_channel, "w · y is a dot product: one number for all channels"),
            (planar_without_shortcut, "y itself is added: with u = 0 nothing happens"),
        ],
        hint="`w @ y` is one number for all channels",
        on=(planar_arguments(3), planar_arguments(6)),
    ),
    "09 tokens": Exercise(
        right=694,
        wrong=[
            (677, "the prompts are tokens too, one for each of the 17 words, padding included"),
            (693, "the class token comes first"),
        ],
        hint="416 / 16 patches each way, the class token, and one prompt for each word",
    ),
    "09 rank": Exercise(
        right=1,
        wrong=[
            (0, "so it is in this model, where every number is 0; and where they are not?"),
            (48, "that is the width; look what each token's prior is a multiple of"),
            (89, "as many tokens, and all of them have the direction of p or the opposite one"),
        ],
        hint="every token's row is a multiple of the same vector",
    ),
}


# --------------------------------------------------------------------------------------- 10 DETRIS
def half_width(differences):
    """Half of the 95 % interval of the mean of three differences."""
    return 4.303 * np.std(differences, ddof=1) / 3**0.5


def half_width_normal(differences):
    return 1.96 * np.std(differences, ddof=1) / 3**0.5


def half_width_by_n(differences):
    return 4.303 * np.std(differences) / 3**0.5


def half_width_of_one(differences):
    return 4.303 * np.std(differences, ddof=1)


DETRIS = {
    "10 field": Exercise(
        right=11,
        wrong=[
            (7, "branch 3 reads branch 2 as well, which has read its neighbors"),
            (12, "count the middle too: 3 positions to each side by its own kernel, then 2 more"),
        ],
        hint="its own kernel, and on top of it what branch 2 has already read",
    ),
    "10 branch inputs": Exercise(
        right=(128, 192, 224),
        wrong=[
            ((128, 64, 96), "z is an input every time"),
            ((128, 192, 160), "branch 3 reads z and both branches before it"),
        ],
        hint="each branch reads z and the outputs of all branches before it",
    ),
    "10 half width": Exercise(
        right=half_width,
        wrong=[
            (half_width_normal, "1.96 is for many seeds; with three, t is more than twice that"),
            (half_width_by_n, "the standard deviation divides by n − 1: `ddof=1`"),
            (half_width_of_one, "that is for a single run: the mean of n varies less"),
        ],
        hint="`np.std(differences, ddof=1)`, times t, over the root of n",
        on=(([1.0, 2.0, 4.5],), ([-0.3, 0.2, 0.4],)),
    ),
}

EXERCISES = {
    **START,
    **CLIP,
    **BRIDGER,
    **DECODER,
    **FIGURE_3,
    **TRAINED,
    **TRAINING,
    **FAILURES,
    **BEYOND,
    **BARLERIA,
    **DETRIS,
}
