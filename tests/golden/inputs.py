"""What the golden files were made with: weights by name, images and masks by seed (numpy alone)."""

import zlib

import numpy as np
import torch


def generator(text):
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def fill(name, shape):
    """The weights of a tensor: they follow from its name alone."""
    x = np.asarray(generator(name).standard_normal(shape, dtype=np.float32))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(1)
    if leaf == "running_var":
        return torch.from_numpy(np.clip(1 + 0.1 * x, 0.5, 1.5).astype(np.float32))
    if leaf == "logit_scale":
        return torch.tensor(4.6052)
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        embeddings = ("positional_embedding", "pos_embed", "cls_token", "register_tokens")
        if leaf in (*embeddings, "mask_token") or "token_embedding" in name:
            fan_in = shape[-1]
        if leaf in ("text_projection", "proj"):
            fan_in = shape[0]
        return torch.from_numpy(x * np.float32(fan_in**-0.5))
    x = 1 + 0.1 * x if leaf == "weight" else 0.1 * x
    return torch.from_numpy(x.astype(np.float32)).reshape(shape)


def images(which, side):
    """(2, 3, side, side) float32."""
    x = generator(f"image-{which}").standard_normal((2, 3, side, side), dtype=np.float32)
    return torch.from_numpy(x)


def masks(which, side):
    """(2, side, side) uint8: two ellipses with soft edges; the target is this / 255."""
    rng = generator(f"mask-{which}")
    grid = (np.arange(side) + 0.5) / side
    ellipses = []
    for _ in range(2):
        center_y, center_x = rng.uniform(0.3, 0.7, 2)
        radius_y, radius_x = rng.uniform(0.12, 0.35, 2)
        y = (grid[:, None] - center_y) / radius_y
        x = (grid - center_x) / radius_x
        distance = np.sqrt(y**2 + x**2)
        inside = np.clip(0.5 + 8 * (1 - distance), 0, 1)
        ellipses.append(np.round(255 * inside).astype(np.uint8))
    return torch.from_numpy(np.stack(ellipses))
