"""Bridges for the question "does anything cross the Bridger?" (experiments.reproduce question).

    python train.py --tuning bridger+mute

The Bridger is meant to let two encoders exchange information. Each arm closes part of that way and
keeps the rest: where a stream may not attend to the other one, it attends to itself instead, with
the same parameters. So an arm differs from ETRIS in what it can know, not in how it learns.

B batch · L words · D text width · C channels · H W a stage's grid · d bridge width
"""

import torch
from torch import nn

from etris import Bridge
from utils.common import UserError


class ArmBridge(nn.Module):
    """A Bridge, of which the streams attend to each other or to themselves, and write or do not.

    image_attends: the image stream attends to the words; otherwise to itself. text_attends: the
    text stream attends to the image; otherwise to itself. image_writes, text_writes: whether Δv
    and Δt are added to CLIP's streams. Parts that no output depends on are removed.
    """

    def __init__(self, bridge: Bridge, image_attends, text_attends, image_writes, text_writes):
        super().__init__()
        self.bridge = bridge
        self.image_attends = image_attends
        self.text_attends = text_attends
        self.image_writes = image_writes
        self.text_writes = text_writes
        if not image_writes:
            bridge.zoom_out = None
            bridge.interact_v = None
        if not text_writes:
            bridge.linear_out = None
            bridge.interact_t = None
        self.needs_image = image_writes or text_attends
        self.needs_text = text_writes or image_attends
        if not self.needs_image:
            bridge.zoom_in = None
            bridge.norm_v = None
        if not self.needs_text:
            bridge.linear_in = None
            bridge.norm_t = None

    def forward(self, v, t, previous=None, key_padding_mask=None):
        """v (B, C, H, W), t (B, L, D), mask (B, L) → Δv, Δt, and `previous` of the next bridge."""
        bridge = self.bridge
        x = None
        y = None
        if self.needs_image:
            x = bridge.zoom_in(v)
            B, d, h, w = x.shape
            x = x.flatten(2).mT  # (B, N, d)
            if previous is not None:
                x = bridge.norm_v(x + previous[0])
        if self.needs_text:
            y = bridge.linear_in(t)  # (B, L, d)
            if previous is not None:
                y = bridge.norm_t(y + previous[1])

        delta_v = torch.zeros_like(
            v
        )  # without a gradient: the image encoder's backward pass is saved
        delta_t = torch.zeros_like(t)
        if self.image_writes:
            other = y if self.image_attends else x
            other_mask = key_padding_mask if self.image_attends else None
            new_x = bridge.interact_v(x, other, other_padding_mask=other_mask)
            delta_v = bridge.zoom_out(new_x.mT.unflatten(2, (h, w)))
        if self.text_writes:
            other = x if self.text_attends else y
            other_mask = None if self.text_attends else key_padding_mask
            new_y = bridge.interact_t(y, other, key_padding_mask, other_mask)
            delta_t = bridge.linear_out(new_y)
        return delta_v, delta_t, (x, y)


def replace_bridges(
    model, image_attends=False, text_attends=False, image_writes=True, text_writes=True
):
    """Put an ArmBridge around every bridge. UserError where there is none, or one already."""
    bridges = list(model.bridger.items())
    if not bridges or isinstance(bridges[0][1], ArmBridge):
        arms = ", ".join(ARMS)
        raise UserError(f"--tuning: bridger+ARM takes exactly one of {arms}, with bridger")
    for name, bridge in bridges:
        arm = ArmBridge(bridge, image_attends, text_attends, image_writes, text_writes)
        model.bridger[name] = arm


def mute(model):
    """Each stream attends to itself; both are changed; nothing crosses."""
    replace_bridges(model)


def text_only(model):
    """Mute, and only the text stream is changed: no gradient runs through the image encoder."""
    replace_bridges(model, image_writes=False)


def image_only(model):
    """Mute, and only the image stream is changed."""
    replace_bridges(model, text_writes=False)


def text_to_image(model):
    """One way: the image stream attends to the words, the text stream to itself."""
    replace_bridges(model, image_attends=True)


def image_to_text(model):
    """One way: the text stream attends to the image, the image stream to itself."""
    replace_bridges(model, text_attends=True)


ARMS = {
    "mute": mute,
    "text-only": text_only,
    "image-only": image_only,
    "text-to-image": text_to_image,
    "image-to-text": image_to_text,
}
