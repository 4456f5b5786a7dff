"""7. The tiny CLIP from nothing: pictures and captions of drawn scenes, CLIP's contrastive loss, a laptop.

    python pretrain.py tiny          →  weights/tiny.pt       (a narrow ModifiedResNet)
    python pretrain.py tiny-vit      →  weights/tiny-vit.pt   (a narrow ViT)
    python pretrain.py tiny-dino     →  weights/tiny-dino.pt  (a narrow DINOv2, which never sees a word)

So that "a frozen pre-trained CLIP" is real in the default run: same architecture files, same tokenizer, same loss as
OpenAI's (Radford et al. 2021, figure 3), only small. The shipped file holds half-precision tensors and just the token
rows that occurred; `official.read_weights` draws the other rows from a fixed seed.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from clip_model import CLIP, HERE, SIZES, tokenize
from command import SEED, Parser, UserError, command, integer
from data import letterbox
from detris import DINO
from detris import SIZES as DINO_SIZES
from etris import set_fast
from scenes import FLAVOURS, PLACES, RELATIONS, WORLD, draw_things, paint, plan_scene

CONTEXT = 24


def phrase(thing, rng, bare=0.2) -> str:
    """One thing in words: colour and shape, often with its size; but for a share `bare` of them with its place."""
    size = {"small": "small ", "large": "big "}.get(thing.size, "") if rng.random() < 0.5 else ""
    name = f"number {thing.digit}" if thing.shape == "number" else thing.shape
    across = "left" if thing.x < WORLD * 0.4 else "right" if thing.x > WORLD * 0.6 else ""
    down = "top" if thing.y < WORLD * 0.4 else "bottom" if thing.y > WORLD * 0.6 else ""
    place = " ".join(word for word in (down, across) if word) or "center"
    said = size + f"{thing.colour} {name}"
    ways = [said, said + " " + PLACES[place], place + " " + said]
    return rng.choice(ways, p=[bare, 0.6 * (1 - bare), 0.4 * (1 - bare)])


def caption(things, rng) -> str:
    """What a caption might say of these things: one beside another, or a list of up to three of them."""
    a, *rest = [things[i] for i in rng.permutation(len(things))]
    if rest and rng.random() < 0.5:
        b = rest[0]
        dx, dy = a.x - b.x, a.y - b.y
        way = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")
        return f"{phrase(a, rng, 0.7)} {rng.choice(RELATIONS[way])} the {phrase(b, rng, 0.7)}"
    return " and ".join(phrase(thing, rng) for thing in (a, *rest[:2]))


def draw(rng, ripe, side, twin=False):
    """Picture uint8 (S, S, 3) and its caption; `ripe` says how far the run is, 0 to 1.

    It begins with pictures of one or two things, and ends with up to four, or, a quarter, with whole scenes and what
    was said of them. From crowded pictures alone a small model learns colours and little else: not even left and right
    (tried: the words left and right could not be read off its sentence features, R² 0.1; from two things, 0.9). A third
    are of digits mostly. `twin`: the picture and caption that the same dice give once looks have traded places.
    """
    whole = rng.random() < 0.25 * ripe
    things = draw_things(rng, rng.choice(["train", "train", "test-numbers"]))
    count = int(rng.integers(1, 3 + round(2 * ripe)))
    if whole and not twin:
        plan = plan_scene(FLAVOURS[rng.integers(3)], "train", int(rng.integers(16000)))
        return paint(plan.things, 0, rng, side)["picture"], str(rng.choice(plan.sentences))
    shown = trade_places(things, count) if twin else things[:count]
    return paint(shown, 0, rng, side)["picture"], caption(shown, rng)


def trade_places(things, count):
    """The first `count` things, each looking as the next one did; a single one as the last would have."""
    looks = (*things[1:count], things[0 if count > 1 else -1])
    return [replace(t, shape=o.shape, colour=o.colour, digit=o.digit) for t, o in zip(things, looks, strict=False)]


def batch(count, side, seed, ripe=1.0):
    """Pictures (B, 3, S, S), normalised, and tokens (B, 24), all from the seed.

    Of four pictures the second is the first one's twin: the contrastive loss then has to tell apart which thing is
    where, and not only which things there are.
    """
    twins = [i % 4 == 1 for i in range(count)]
    dice = [np.random.default_rng((*seed, i - twin, 1)) for i, twin in enumerate(twins)]
    drawn = [draw(rng, ripe, side, twin) for rng, twin in zip(dice, twins, strict=True)]
    return torch.stack([letterbox(picture, side)[0] for picture, _ in drawn]), tokenize([t for _, t in drawn], CONTEXT)


class Captions(torch.utils.data.Dataset):
    """Batch number i of the run, all of it from the seed and i; seed 0 of `batch` is held back for `retrieval`."""

    def __init__(self, steps, size, side, seed):
        self.steps, self.size, self.side, self.seed = steps, size, side, seed

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        return batch(self.size, self.side, (self.seed + 1, step), step / self.steps)


def contrastive_loss(images, texts, scale):
    """Features (B, E) of pictures and their captions → mean cross-entropy of finding each among the other's batch."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).mT
    mine = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, mine) + F.cross_entropy(logits.mT, mine)) / 2


@torch.no_grad()
def retrieval(clip, count=500) -> dict:
    """Top-1 and top-5 accuracy (percent) of finding the caption of a picture, and back, among `count` held back."""
    clip.eval()
    parts = [batch(50, clip.size.picture, (0, i)) for i in range(count // 50)]
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
    clip.text_projection *= 0.4 / clip.encode_text(batch(128, clip.size.picture, (0, 0))[1]).std()


def save(clip, rows, path):
    """Half-precision tensors; of the token table only the rows that occurred, with their numbers."""
    state = {name: x.half() if x.is_floating_point() else x for name, x in clip.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][rows]
    torch.save(state | {"token_rows": rows}, f"{path}.part")
    os.replace(f"{path}.part", path)


def learn(name, parameters, loss_of, steps, batch_size, side, lr, seed):
    """loss_of(images, tokens) → a loss, made smaller for so many batches of drawn scenes. Returns the last one."""
    adam = torch.optim.AdamW(parameters, lr, weight_decay=0.02, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps, pct_start=0.05)
    loader = torch.utils.data.DataLoader(Captions(steps, batch_size, side, seed), None, num_workers=0)
    bar = tqdm(loader, unit="batch", desc=name)
    for images, tokens in bar:
        loss = loss_of(images.contiguous(memory_format=torch.channels_last), tokens)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def pretrain_clip(name, path, steps, batch_size, lr, seed):
    """A CLIP by its contrastive loss, saved; returns what the record says of it."""
    clip, seen = CLIP(SIZES[name]).train(), torch.zeros(49408, dtype=torch.bool)
    torch.nn.init.normal_(clip.token_embedding.weight, std=0.02)
    torch.nn.init.constant_(clip.logit_scale, np.log(1 / 0.07))
    clip = set_fast(clip.to(memory_format=torch.channels_last))

    def loss_of(images, tokens):
        seen[tokens] = True
        clip.logit_scale.data.clamp_(max=np.log(100))
        return contrastive_loss(clip.encode_image(images), clip.encode_text(tokens), clip.logit_scale.exp())

    loss = learn(name, clip.parameters(), loss_of, steps, batch_size, clip.size.picture, lr, seed)
    calm(clip.eval())
    save(clip, seen.nonzero()[:, 0], path)
    return {"loss": round(loss, 3), "token_rows": int(seen.sum()), "retrieval_of_500": retrieval(clip)}


# ------------------------------------------------------------------------------------------ without a single word
def hide(count, places, share=0.6):
    """(B, N) bool: in every picture this share of its patches, another draw for each."""
    return torch.rand(count, places).argsort(1) < share * places


def patches_of(images, patch):
    """(B, 3, S, S) → (B, N, 3·patch²), row by row."""
    return F.unfold(images, patch, stride=patch).mT


def masked_loss(dino, head, images, hidden):
    """SimMIM (Xie et al. 2022): the pixels of hidden patches from the others; mean |error|, in normalised pixels."""
    guess = head(dino.norm(dino(images, hidden))[:, dino.first :])  # (B, N, 3·patch²)
    return F.l1_loss(guess[hidden], patches_of(images, dino.patch)[hidden])


@torch.no_grad()
def masked_scores(dino, head, count=500):
    """The same on pictures held back, and what guessing the visible patches' mean colour gives."""
    torch.manual_seed(0)
    images = torch.cat([batch(50, dino.size.picture, (0, i))[0] for i in range(count // 50)])
    hidden = hide(len(images), dino.pos_embed.shape[1] - 1)
    truth = patches_of(images, dino.patch).unflatten(2, (3, -1))  # (B, N, 3, patch²)
    visible = (~hidden)[:, :, None, None]
    mean = (truth * visible).sum((1, 3), keepdim=True) / (visible.sum((1, 3), keepdim=True) * truth.shape[3])
    plain = F.l1_loss(mean.expand_as(truth)[hidden], truth[hidden])
    return {"val_loss": round(masked_loss(dino, head, images, hidden).item(), 3), "of_the_mean": round(plain.item(), 3)}


def pretrain_dino(name, path, steps, batch_size, lr, seed):
    """A DINOv2 by masked pictures alone, saved; returns what the record says of it.

    DINOv2's own training, a student and its moving average, wants large batches and days; hiding patches and painting
    them again has one network, one loss, nothing to collapse, and uses the mask token the weights already have.
    """
    dino = set_fast(DINO(DINO_SIZES[name]).train())
    head, places = torch.nn.Linear(dino.size.width, 3 * dino.patch**2), dino.pos_embed.shape[1] - 1

    def loss_of(images, _):
        return masked_loss(dino, head, images, hide(len(images), places))

    parameters = [*dino.parameters(), *head.parameters()]
    loss = learn(name, parameters, loss_of, steps, batch_size, dino.size.picture, lr, seed)
    torch.save({name: x.half() for name, x in dino.state_dict().items()}, f"{path}.part")
    os.replace(f"{path}.part", path)
    return {"loss": round(loss, 3), **masked_scores(dino.eval(), head)}


def pretrain(name, steps, batch_size, lr, seed, path):
    """Train, save, report; returns the record that is written beside the weights."""
    torch.manual_seed(seed)
    start = time.time()
    made = (pretrain_dino if name in DINO_SIZES else pretrain_clip)(name, path, steps, batch_size, lr, seed)
    record = {"command": f"python pretrain.py {name} --steps {steps} --batch-size {batch_size} --lr {lr} --seed {seed}"}
    record |= {"threads": torch.get_num_threads(), "minutes": round((time.time() - start) / 60, 1)}
    return record | {"bytes": Path(path).stat().st_size} | made


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["tiny", "tiny-vit", "tiny-dino"])
    parser.add_argument("--steps", type=integer(), default=4000)
    parser.add_argument("--batch-size", type=integer(), default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", help="default: weights/NAME.pt")
    args = parser.parse_args(argv)
    path = Path(args.out or HERE / "weights" / f"{args.name}.pt")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path}: no file in a folder that is there: give another --out")
    if not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr}: choose a rate between 0 and 1")
    record = pretrain(args.name, args.steps, args.batch_size, args.lr, args.seed, path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
