"""7. The tiny CLIP from nothing: pictures and captions of drawn scenes, CLIP's contrastive loss, a laptop.

    python pretrain.py tiny          →  weights/tiny.pt       (a narrow ModifiedResNet)
    python pretrain.py tiny-vit      →  weights/tiny-vit.pt   (a narrow ViT)

So that "a frozen pre-trained CLIP" is real in the default run: same architecture files, same tokenizer, same loss as
OpenAI's (Radford et al. 2021, figure 3), only small. The shipped file holds half-precision tensors and just the token
rows that occurred; `official.read_weights` draws the other rows from a fixed seed.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip_model import CLIP, HERE, SIZES, UserError, command, tokenize
from data import letterbox
from etris import set_fast
from scenes import FLAVOURS, PLACES, RELATIONS, WORLD, paint, plan_scene

CONTEXT = 24


def phrase(thing, rng) -> str:
    """One thing in words: colour and shape, often with its size, sometimes with its place."""
    size = {"small": "small ", "large": "big "}.get(thing.size, "") if rng.random() < 0.5 else ""
    name = f"number {thing.digit}" if thing.shape == "number" else thing.shape
    across = "left" if thing.x < WORLD * 0.4 else "right" if thing.x > WORLD * 0.6 else ""
    down = "top" if thing.y < WORLD * 0.4 else "bottom" if thing.y > WORLD * 0.6 else ""
    place = " ".join(word for word in (down, across) if word) or "center"
    said = " " + PLACES[place] if rng.random() < 0.4 else ""
    return f"{size}{thing.colour} {name}{said}"


def caption(things, rng) -> str:
    """What a caption might say of these things: one beside another, or a list of up to three of them."""
    a, *rest = [things[i] for i in rng.permutation(len(things))]
    if rest and rng.random() < 0.5:
        b = rest[0]
        dx, dy = a.x - b.x, a.y - b.y
        way = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")
        return f"{phrase(a, rng)} {rng.choice(RELATIONS[way])} the {phrase(b, rng)}"
    return " and ".join(phrase(thing, rng) for thing in (a, *rest[:2]))


def draw(index, split, side, rng):
    """Picture uint8 (S, S, 3) and caption of scene `index`; the flavour follows from the index.

    Most pictures show only one to three of the scene's things, all of them in the caption: from crowded pictures alone
    a small model learns colours and little else (tried: after 500 steps the loss stood at 2.6, with these at 1.2).
    """
    plan = plan_scene(FLAVOURS[index % 3], split, index // 3)
    few = rng.integers(1, 4) if rng.random() < 0.7 else len(plan.things)
    things = [plan.things[i] for i in rng.permutation(len(plan.things))[:few]]
    text = caption(things, rng) if few < 4 or rng.random() < 0.6 else str(rng.choice(plan.sentences))
    return paint(things, 0, rng, side)["picture"], text


def batch(indices, split, side, seed):
    """Pictures (B, 3, S, S), normalised, and tokens (B, 24) of the scenes with these indices."""
    drawn = [draw(int(i), split, side, np.random.default_rng((seed, int(i)))) for i in indices]
    return torch.stack([letterbox(picture, side)[0] for picture, _ in drawn]), tokenize([t for _, t in drawn], CONTEXT)


class Captions(torch.utils.data.Dataset):
    """Batch number i of the run: indices, pictures and captions all follow from the seed and i."""

    def __init__(self, steps, size, side, seed):
        self.steps, self.size, self.side, self.seed = steps, size, side, seed

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        indices = np.random.default_rng((self.seed, step)).choice(48000, self.size, replace=False)
        return batch(indices, "train", self.side, self.seed + 1 + step)


def contrastive_loss(images, texts, scale):
    """Features (B, E) of pictures and their captions → mean cross-entropy of finding each among the other's batch."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).mT
    mine = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, mine) + F.cross_entropy(logits.mT, mine)) / 2


@torch.no_grad()
def retrieval(clip, count=500) -> dict:
    """Top-1 and top-5 accuracy (percent) of finding the caption of a picture, and back, among `count` of val."""
    clip.eval()
    parts = [batch(range(i, i + 50), "val", clip.size.picture, 0) for i in range(0, count, 50)]
    images = torch.cat([F.normalize(clip.encode_image(x), dim=-1) for x, _ in parts])
    texts = torch.cat([F.normalize(clip.encode_text(t), dim=-1) for _, t in parts])
    scores = images @ texts.mT
    result = {}
    for name, s in (("caption", scores), ("picture", scores.mT)):
        place = (s > s.diag()[:, None]).sum(1)
        result |= {f"{name}@{k}": round(100 * (place < k).float().mean().item(), 1) for k in (1, 5)}
    return result


@torch.no_grad()
def calm(clip):
    """Scale sentence features to the size OpenAI's have, 0.4 a number: no cosine changes, what is built on them does.

    At the 1.6 that training ended with, the first sentences wrote kernels four times too large for the decoder.
    """
    clip.text_projection *= 0.4 / clip.encode_text(batch(range(128), "val", clip.size.picture, 0)[1]).std()


def save(clip, rows, path):
    """Half-precision tensors; of the token table only the rows that occurred, with their numbers."""
    state = {name: x.half() if x.is_floating_point() else x for name, x in clip.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][rows]
    torch.save(state | {"token_rows": rows}, f"{path}.part")
    os.replace(f"{path}.part", path)


def pretrain(name, steps, batch_size, lr, seed, path):
    """Train, save, report; returns the record that is written beside the weights."""
    torch.manual_seed(seed)
    clip, start, seen = CLIP(SIZES[name]).train(), time.time(), torch.zeros(49408, dtype=torch.bool)
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.02)
    torch.nn.init.constant_(clip.logit_scale, np.log(1 / 0.07))
    clip = set_fast(clip.to(memory_format=torch.channels_last))
    adam = torch.optim.AdamW(clip.parameters(), lr, weight_decay=0.02, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps, pct_start=0.05)
    loader = torch.utils.data.DataLoader(Captions(steps, batch_size, clip.size.picture, seed), None, num_workers=0)
    bar = tqdm(loader, unit="batch", desc=name)
    for images, tokens in bar:
        seen[tokens] = True
        images = images.contiguous(memory_format=torch.channels_last)
        loss = contrastive_loss(clip.encode_image(images), clip.encode_text(tokens), clip.logit_scale.exp())
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        clip.logit_scale.data.clamp_(max=np.log(100))
        bar.set_postfix(loss=f"{loss.item():.2f}", scale=f"{clip.logit_scale.exp().item():.0f}", refresh=False)
    calm(clip.eval())
    save(clip, seen.nonzero()[:, 0], path)
    record = {"command": f"python pretrain.py {name} --steps {steps} --batch-size {batch_size} --lr {lr} --seed {seed}"}
    record |= {"threads": torch.get_num_threads()}
    record |= {"minutes": round((time.time() - start) / 60, 1), "loss": round(loss.item(), 3)}
    record |= {"token_rows": int(seen.sum())}
    record |= {"bytes": Path(path).stat().st_size, "val_retrieval_of_500": retrieval(clip)}
    return record


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["tiny", "tiny-vit"])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="default: weights/NAME.pt")
    args = parser.parse_args(argv)
    path = Path(args.out or HERE / "weights" / f"{args.name}.pt")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder: give another --out")
    record = pretrain(args.name, args.steps, args.batch_size, args.lr, args.seed, path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
