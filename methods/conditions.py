"""Conditions for the question "when does talk pay?" (experiments.reproduce talk).

    python train.py --tuning bridger+no-language

A decoder that knows the sentence can do without a Bridger that carries it. These take from the
decoder, part by part, what it knows of the sentence, or let the Bridger start louder. What is taken
away is replaced by something of the same shape that knows nothing.

B batch · N pixel positions · D text width · E joint space
"""

from torch import Tensor, nn


class NoAttention(nn.Module):
    """In place of an attention to the words: finds nothing."""

    def forward(self, query, *others, key_padding_mask=None) -> Tensor:
        """query (B, N, D) → zeros (B, N, D)."""
        return query * 0


class NoGate(nn.Module):
    """In place of a gate by the sentence: always open."""

    def forward(self, features, sentence) -> Tensor:
        """features (B, N, D) → the same."""
        return features


class Constant(nn.Module):
    """In place of a Linear that reads the sentence: its bias alone, which learns."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = linear.bias

    def forward(self, x) -> Tensor:
        """x (B, E) → (B, outputs), the same for every sentence."""
        return self.bias.expand(len(x), -1)


def no_words(model):
    """The decoder does not attend to the words (equation 8's second attention)."""
    for layer in model.global_alignment.layers:
        layer.cross_attn = NoAttention()


def no_gates(model):
    """The stage maps are not gated by the sentence (equation 6)."""
    alignment = model.hierarchical_alignment
    alignment.sentence = nn.Identity()
    alignment.gates = nn.ModuleList([NoGate() for _ in alignment.gates])


def no_language(model):
    """Neither, and the sentence does not write the kernel: it reaches the mask through Δv alone."""
    no_words(model)
    no_gates(model)
    model.projector.txt = Constant(model.projector.txt)


def scale_joins(model, factor: float):
    """What joins the streams starts at `factor` times what build_etris gave it, a tenth."""
    for bridge in model.bridger.values():
        weighted = [layer for layer in bridge.zoom_out if hasattr(layer, "weight")]
        for layer in (bridge.linear_out, weighted[-1]):
            layer.weight.data.mul_(factor)


def joins_3(model):
    """The joins start at 0.3."""
    scale_joins(model, 3)


def joins_10(model):
    """The joins start at 1, as in the original."""
    scale_joins(model, 10)


CONDITIONS = {
    "no-words": no_words,
    "no-gates": no_gates,
    "no-language": no_language,
    "joins-3": joins_3,
    "joins-10": joins_10,
}
