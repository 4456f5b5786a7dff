"""The tiny backbones, from nothing: drawn images and captions, one to two hours on a laptop.

    python -m toy.pretrain tiny        →  weights/tiny.pt       (a narrow ModifiedResNet)
    python -m toy.pretrain small       →  weights/small.pt      (tiny.pt, gone on at 192 pixels)
    python -m toy.pretrain tiny-vit    →  weights/tiny-vit.pt   (a narrow ViT)
    python -m toy.pretrain tiny-dino   →  weights/tiny-dino.pt  (a narrow DINOv2; no text)

Of the shipped files only tiny.pt was made with these defaults; weights/README.md has the options of
the others, 18 to 68 minutes each.

With them "a frozen pre-trained CLIP" is real in the default run: the same architecture, tokenizer
and loss as OpenAI's (Radford et al. 2021, figure 3), only small. A shipped CLIP holds
half-precision tensors and only the token rows that occurred; `utils.clip_weights.read_weights`
draws the other rows from a fixed seed.

B batch · S image side · N patches · E joint space
"""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from clip_model import CLIP, CLIP_CONFIGS, resize_positions
from config import OWN_BACKBONES
from data import normalize
from fast import set_fast
from methods.dinov2 import DINO, DINO_CONFIGS
from toy.scenes import FLAVOURS, PLACES, RELATIONS, WORLD, draw_things, paint, plan_scene
from utils.clip_weights import read_weights
from utils.common import ROOT, SEED, Parser, UserError, command, integer, write_file
from utils.tokenizer import tokenize

MAX_TOKENS = 24
CONTINUED = {"small": "tiny"}  # backbone → the shipped one that its training goes on from


# ------------------------------------------------------------------------------ images and captions
def phrase(thing, rng, bare=0.2) -> str:
    """One thing in words: colour and shape, half of the time its size.

    All but a share `bare` of the phrases also name the place.
    """
    size = ""
    if rng.random() < 0.5:
        size = {"small": "small ", "large": "big "}.get(thing.size, "")
    noun = f"number {thing.digit}" if thing.shape == "number" else thing.shape
    text = f"{size}{thing.colour} {noun}"
    place = place_of(thing)
    ways = [text, f"{text} {PLACES[place]}", f"{place} {text}"]
    return rng.choice(ways, p=[bare, 0.6 * (1 - bare), 0.4 * (1 - bare)])


def place_of(thing) -> str:
    """The key of PLACES that says where a thing is: "left", "top right", "center" …"""
    words = []
    if thing.y < WORLD * 0.4:
        words.append("top")
    elif thing.y > WORLD * 0.6:
        words.append("bottom")
    if thing.x < WORLD * 0.4:
        words.append("left")
    elif thing.x > WORLD * 0.6:
        words.append("right")
    return " ".join(words) or "center"


def caption(things, rng) -> str:
    """A caption of these things: one of them beside another, or a list of up to three."""
    first, *rest = [things[i] for i in rng.permutation(len(things))]
    if rest and rng.random() < 0.5:
        second = rest[0]
        start = phrase(first, rng, 0.7)  # in the order of the words: rng makes the same captions
        relation = rng.choice(RELATIONS[direction(first, second)])
        return f"{start} {relation} the {phrase(second, rng, 0.7)}"
    return " and ".join(phrase(thing, rng) for thing in (first, *rest[:2]))


def direction(a, b) -> str:
    """On which side of b the thing a lies, along the axis on which they are farther apart."""
    dx = a.x - b.x
    dy = a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def draw(rng, progress, side, twin=False):
    """An image uint8 (S, S, 3) and its caption; `progress` says how far the run is, 0 to 1.

    A run begins with images of one or two things. It ends with up to four, or, where an image is no
    twin, for a quarter with whole scenes and their sentences. From crowded images alone a small
    model learns colours and little else: left and right could not be read off its sentence features
    (R² 0.1; 0.9 when it begins with two things). A third of the images show digits mostly.

    twin: the image and caption that the same rng gives once looks have changed places.
    """
    show_scene = rng.random() < 0.25 * progress
    things = draw_things(rng, rng.choice(["train", "train", "test-numbers"]))
    count = int(rng.integers(1, 3 + round(2 * progress)))
    if show_scene and not twin:
        plan = plan_scene(FLAVOURS[rng.integers(3)], "train", int(rng.integers(16000)))
        painted = paint(plan.things, 0, rng, side)
        return painted["image"], str(rng.choice(plan.sentences))
    shown = trade_places(things, count) if twin else things[:count]
    painted = paint(shown, 0, rng, side)
    return painted["image"], caption(shown, rng)


def trade_places(things, count):
    """The first `count` things, each with the look of the next; a single one with the last's."""
    looks = [*things[1:count], things[0] if count > 1 else things[-1]]
    traded = []
    for thing, look in zip(things, looks, strict=False):
        traded.append(replace(thing, shape=look.shape, colour=look.colour, digit=look.digit))
    return traded


def batch(count, side, seed, progress=1.0):
    """Images (B, 3, S, S), normalized, and tokens (B, 24), all from the seed.

    Of four images the second is the first one's twin. The contrastive loss then has to tell apart
    which thing is where, and not only which things there are.
    """
    images = []
    captions = []
    for i in range(count):
        twin = i % 4 == 1
        rng = np.random.default_rng((*seed, i - twin, 1))
        image, text = draw(rng, progress, side, twin)
        images.append(torch.from_numpy(image))
        captions.append(text)
    images = torch.stack(images).permute(0, 3, 1, 2).contiguous()  # (B, 3, S, S)
    return normalize(images), tokenize(captions, MAX_TOKENS)


class CaptionBatches(torch.utils.data.Dataset):
    """Batch number i of a run, from the seed and i; seed 0 of `batch` is held back for scores."""

    def __init__(self, steps, batch_size, side, seed, start=0.0):
        self.steps = steps
        self.batch_size = batch_size
        self.side = side
        self.seed = seed
        self.start = start  # progress at the first batch

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        progress = self.start + (1 - self.start) * step / self.steps
        return batch(self.batch_size, self.side, (self.seed + 1, step), progress)


def train(name, parameters, loss_of, steps, batch_size, side, lr, seed, start=0.0) -> float:
    """Minimize loss_of(images, tokens) over that many batches. Returns the last loss.

    start: the progress (of `draw`) that the first images show.
    """
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.02, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05
    )
    batches = CaptionBatches(steps, batch_size, side, seed, start)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)
    progress_bar = tqdm(loader, unit="batch", desc=name)
    for images, tokens in progress_bar:
        loss = loss_of(images.contiguous(memory_format=torch.channels_last), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress_bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


# -------------------------------------------------------------------- CLIP: images against captions
def contrastive_loss(images, texts, scale):
    """Features (B, E) of images and captions → mean cross-entropy of finding each one's partner."""
    images = F.normalize(images, dim=-1)
    texts = F.normalize(texts, dim=-1)
    logits = scale * images @ texts.mT  # (B, B)
    partners = torch.arange(len(logits), device=logits.device)
    loss_of_images = F.cross_entropy(logits, partners)
    loss_of_texts = F.cross_entropy(logits.mT, partners)
    return (loss_of_images + loss_of_texts) / 2


@torch.no_grad()
def retrieval(clip, count=500) -> dict:
    """Top-1 and top-5 accuracy (percent) of finding an image's caption among `count`, and back."""
    clip.eval()
    images = []
    texts = []
    for i in range(count // 50):
        some_images, some_tokens = batch(50, clip.config.image_size, (0, i))
        images.append(F.normalize(clip.encode_image(some_images), dim=-1))
        texts.append(F.normalize(clip.encode_text(some_tokens), dim=-1))
    scores = torch.cat(images) @ torch.cat(texts).mT
    result = {}
    for name, matrix in (("caption", scores), ("picture", scores.mT)):
        rank = (matrix > matrix.diag()[:, None]).sum(1)
        for k in (1, 5):
            found = (rank < k).float().mean().item()
            result[f"{name}@{k}"] = round(100 * found, 1)
    return result


@torch.no_grad()
def scale_text_projection(clip):
    """Scale sentence features to the size of OpenAI's, a standard deviation of 0.4.

    No cosine changes. At the 1.6 that training ended with, the first sentences made the decoder's
    kernels four times too large.
    """
    _, tokens = batch(128, clip.config.image_size, (0, 0))
    clip.text_projection *= 0.4 / clip.encode_text(tokens).std()


def pretrain_clip(name, path, steps, batch_size, lr, seed) -> dict:
    """Train a CLIP by its contrastive loss and save it; returns what its record says."""
    clip = CLIP(CLIP_CONFIGS[name]).train()
    nn.init.normal_(clip.token_embedding.weight, std=0.02)
    nn.init.constant_(clip.logit_scale, np.log(1 / 0.07))
    start = 0.0
    if name in CONTINUED:
        load_for_size(clip, ROOT / "weights" / f"{CONTINUED[name]}.pt")
        start = 1.0
    clip = set_fast(clip.to(memory_format=torch.channels_last))
    occurred = torch.zeros(clip.config.vocab_size, dtype=torch.bool)  # token rows

    def loss_of(images, tokens):
        occurred[tokens] = True
        clip.logit_scale.data.clamp_(max=np.log(100))
        images = clip.encode_image(images)
        texts = clip.encode_text(tokens)
        return contrastive_loss(images, texts, clip.logit_scale.exp())

    side = clip.config.image_size
    loss = train(name, clip.parameters(), loss_of, steps, batch_size, side, lr, seed, start)
    scale_text_projection(clip.eval())
    rows = occurred.nonzero()[:, 0]
    state = half_precision(clip)
    state["token_embedding.weight"] = state["token_embedding.weight"][rows]
    state["token_rows"] = rows
    save(state, path)
    return {
        "loss": round(loss, 3),
        "token_rows": len(rows),
        "retrieval_of_500": retrieval(clip),
    }


def load_for_size(clip, path):
    """Load a ResNet CLIP's file into one for larger images: only its positions are resized."""
    state = read_weights(path)
    name = "visual.attnpool.positional_embedding"
    side = clip.config.image_size // 32
    state[name] = resize_positions(state[name], side, side)
    clip.load_state_dict(state)


def half_precision(model) -> dict:
    """The state dict, floating-point tensors in half precision."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.half() if tensor.is_floating_point() else tensor
    return state


def save(state, path):
    """Write a state dict whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


# ---------------------------------------------------------------------------- DINO: no words at all
def hide(count, patches, share=0.6):
    """(B, N) bool: in each image this share of its patches, chosen at random."""
    return torch.rand(count, patches).argsort(1) < share * patches


def patches_of(images, patch_size):
    """(B, 3, S, S) → (B, N, 3·patch_size²), row by row."""
    return F.unfold(images, patch_size, stride=patch_size).mT


def masked_loss(dino, head, images, hidden):
    """SimMIM (Xie et al. 2022): paint hidden patches from the others; mean |error| per pixel."""
    stream = dino.norm(dino(images, hidden))
    painted = head(stream[:, dino.prefix_tokens :])  # (B, N, 3·patch_size²)
    truth = patches_of(images, dino.patch_size)
    return F.l1_loss(painted[hidden], truth[hidden])


@torch.no_grad()
def masked_scores(dino, head, count=500) -> dict:
    """The loss on images held back, and that of painting the visible patches' mean colour."""
    torch.manual_seed(0)
    images = [batch(50, dino.config.image_size, (0, i))[0] for i in range(count // 50)]
    images = torch.cat(images)
    hidden = hide(len(images), dino.pos_embed.shape[1] - 1)
    truth = patches_of(images, dino.patch_size).unflatten(2, (3, -1))  # (B, N, 3, patch_size²)
    visible = (~hidden)[:, :, None, None]
    pixels = visible.sum((1, 3), keepdim=True) * truth.shape[3]
    mean = (truth * visible).sum((1, 3), keepdim=True) / pixels  # (B, 1, 3, 1)
    loss = masked_loss(dino, head, images, hidden)
    loss_of_mean = F.l1_loss(mean.expand_as(truth)[hidden], truth[hidden])
    return {"val_loss": round(loss.item(), 3), "of_the_mean": round(loss_of_mean.item(), 3)}


def pretrain_dino(name, path, steps, batch_size, lr, seed) -> dict:
    """Train a DINOv2 by masked images and save it; returns what its record says.

    DINOv2's own training, a student and its moving average, needs large batches and days. Hiding
    patches and painting them again has one network, one loss, nothing to collapse, and uses the
    mask token that the weights already have.
    """
    dino = set_fast(DINO(DINO_CONFIGS[name]).train())
    head = nn.Linear(dino.config.width, 3 * dino.patch_size**2)
    patches = dino.pos_embed.shape[1] - 1

    def loss_of(images, _):
        return masked_loss(dino, head, images, hide(len(images), patches))

    parameters = [*dino.parameters(), *head.parameters()]
    side = dino.config.image_size
    loss = train(name, parameters, loss_of, steps, batch_size, side, lr, seed)
    save(half_precision(dino), path)
    return {"loss": round(loss, 3), **masked_scores(dino.eval(), head)}


# ------------------------------------------------------------------------------------- command line
def pretrain(name, steps, batch_size, lr, seed, path) -> dict:
    """Train and save; returns the record that is written beside the weights."""
    torch.manual_seed(seed)
    start = time.time()
    pretrain_one = pretrain_dino if name in DINO_CONFIGS else pretrain_clip
    scores = pretrain_one(name, path, steps, batch_size, lr, seed)
    options = f"--steps {steps} --batch-size {batch_size} --lr {lr} --seed {seed}"
    return {
        "command": f"python -m toy.pretrain {name} {options}",
        "threads": torch.get_num_threads(),
        "minutes": round((time.time() - start) / 60, 1),
        "bytes": Path(path).stat().st_size,
        **scores,
    }


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=OWN_BACKBONES, help="which backbone")
    parser.add_argument("--steps", type=integer(), default=4000, help="batches (4000)")
    parser.add_argument("--batch-size", type=integer(), default=128, help="images (128)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate (0.0015)")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights and images (0)")
    parser.add_argument("--out", metavar="FILE", help="where (weights/NAME.pt)")
    args = parser.parse_args(argv)

    path = Path(args.out or ROOT / "weights" / f"{args.name}.pt")
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{path}: no file in an existing folder: give another --out")
    if not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr}: choose a rate between 0 and 1")
    record = pretrain(args.name, args.steps, args.batch_size, args.lr, args.seed, path)
    text = json.dumps(record, indent=1)
    write_file(path.with_suffix(".json"), f"{text}\n".encode())
    print(text)


if __name__ == "__main__":
    main()
