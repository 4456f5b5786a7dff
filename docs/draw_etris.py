"""Draw docs/etris.svg: ETRIS as boxes, with the shape of each tensor on its arrow.

    python -m docs.draw_etris                      writes docs/etris.svg and the notebooks' variants
    python -m docs.draw_etris --part bridger       prints it with one part in color

SHAPES is the only place where a shape stands. A test compares all of them with the models.
"""

import argparse
import re
from pathlib import Path

SVG = Path(__file__).parent / "etris.svg"
PICTURES = Path(__file__).parents[1] / "notebooks" / "pictures"  # etris-clip.svg, …

# A variant's name: the boxes that keep their color.
PARTS = {
    "clip": ("clip",),
    "bridger": ("bridger",),
    "decoder": ("decoder",),
    "trained": ("bridger", "decoder"),
    "loss": ("loss",),
}
ASKED = ("clip",)  # variants with question marks for shapes: there the reader finds them

# What travels along each arrow, without the batch dimension: RN101 at 416 pixels, tiny at 128.
SHAPES = {
    "RN101": {
        "image": (3, 416, 416),
        "visual.stem": (256, 104, 104),
        "visual0": (512, 52, 52),
        "visual1": (1024, 26, 26),
        "visual2": (2048, 13, 13),
        "visual.head": (512, 13, 13),
        "text.stem": (17, 512),
        "text0": (17, 512),
        "text1": (17, 512),
        "text2": (17, 512),
        "words": (17, 512),
        "sentence": (512,),
        "previous.visual": (676, 64),
        "previous.text": (17, 64),
        "hierarchical_alignment": (512, 26, 26),
        "features": (512, 26, 26),
        "kernel": (256, 3, 3),
        "logits": (1, 104, 104),
    },
    "tiny": {
        "image": (3, 128, 128),
        "visual.stem": (64, 32, 32),
        "visual0": (128, 16, 16),
        "visual1": (256, 8, 8),
        "visual2": (512, 4, 4),
        "visual.head": (128, 4, 4),
        "text.stem": (17, 64),
        "text0": (17, 64),
        "text1": (17, 64),
        "text2": (17, 64),
        "words": (17, 64),
        "sentence": (128,),
        "previous.visual": (64, 32),
        "previous.text": (17, 32),
        "hierarchical_alignment": (64, 8, 8),
        "features": (64, 8, 8),
        "kernel": (32, 3, 3),
        "logits": (1, 32, 32),
    },
}

WIDTH = 1000
HEIGHT = 632
TEXT_Y = 78  # the text encoder's lane
BRIDGE_Y = 186
VISUAL_Y = 294  # the image encoder's lane
ALIGN_Y = 408  # hierarchical alignment
DECODER_Y = 534
STAGE_X = (290, 474, 658)  # left edges of the three stages
STAGE_WIDTH = 84
STEM_X = 130
STEM_WIDTH = 62
HEAD_X = 842
SENTENCE_X = 950
WORDS_X = 974

# An opaque card: the same in GitHub's light and dark theme.
STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2933 }
.card { fill: #ffffff; stroke: #c9d1d9 }
.clip { fill: #e4e9ef; stroke: #7b8794 }
.bridger { fill: #ffd9a8; stroke: #d9822b }
.decoder { fill: #cfe6ff; stroke: #2f7fc9 }
.loss { fill: #f3d9f0; stroke: #a64d9b }
.kept { stroke-width: 3 }
.faded { fill: #ffffff; stroke: #cbd2d9 }
.faded + text, .faded + text + .sub { fill: #7b8794 }
.line { fill: none; stroke: #3e4c59; stroke-width: 1.4; marker-end: url(#arrow) }
.words { stroke: #2b8a3e }
.sentence { stroke: #8e44ad }
.plus { fill: #ffffff; stroke: #3e4c59 }
.name { font-weight: bold; text-anchor: middle }
.sub { font-size: 11.5px; text-anchor: middle }
.large { font-size: 12px; text-anchor: middle }
.tiny { font-size: 12px; text-anchor: middle; fill: #6b7785 }
.side { font-size: 12.5px; font-style: italic }
"""


def shape(model, name):
    """The shape that `model` has at `name`, written as 512×52×52."""
    return "×".join(str(n) for n in SHAPES[model][name])


def text(x, y, line, style):
    return f'<text x="{x}" y="{y}" class="{style}">{line}</text>'


def arrow(points, style=""):
    """An arrow along `points`, a list of (x, y)."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" class="line {style}"/>'


def box(x, y, width, height, part, name, sub=""):
    """A named box; (x, y) is the middle of its left edge."""
    middle = x + width / 2
    top = y - height / 2
    size = f'width="{width}" height="{height}"'
    lines = [f'<rect x="{x}" y="{top}" {size} rx="6" class="{part}"/>']
    if sub:
        lines.append(text(middle, y - 2, name, "name"))
        lines.append(text(middle, y + 14, sub, "sub"))
    else:
        lines.append(text(middle, y + 4, name, "name"))
    return lines


def plus(x, y):
    return [
        f'<circle cx="{x}" cy="{y}" r="8" class="plus"/>',
        text(x, y + 4.5, "+", "name"),
    ]


def both(x, y, name):
    """The two models' shapes, RN101 above tiny."""
    return [
        text(x, y, shape("RN101", name), "large"),
        text(x, y + 14, shape("tiny", name), "tiny"),
    ]


def scene(x, y, mask):
    """A small drawn image, or the mask of its red circle; (x, y) is its upper left corner."""
    background, circle = ("#111111", "#ffffff") if mask else ("#d8cfc4", "#d62839")
    lines = [
        f'<rect x="{x}" y="{y}" width="64" height="64" fill="{background}"/>',
        f'<circle cx="{x + 20}" cy="{y + 22}" r="13" fill="{circle}"/>',
    ]
    if not mask:
        lines.append(f'<rect x="{x + 36}" y="{y + 34}" width="22" height="22" fill="#2f6fdb"/>')
        lines.append(
            f'<path d="M{x + 8} {y + 58} l12 -18 l12 18 z" fill="#2b8a3e"/>'
            f'<circle cx="{x + 49}" cy="{y + 15}" r="8" fill="#f2c230"/>'
        )
    return lines


def encoders(clip):
    """Both encoders, lane by lane: input, stem, three stages, head."""
    lines = scene(22, VISUAL_Y - 32, mask=False)
    lines += both(54, VISUAL_Y + 50, "image")
    lines.append(text(56, TEXT_Y - 8, "“the red", "large"))
    lines.append(text(56, TEXT_Y + 7, "circle”", "large"))
    lines.append(text(56, TEXT_Y + 22, "17 tokens", "tiny"))
    for y, lane in ((TEXT_Y, "text"), (VISUAL_Y, "visual")):
        label_y = y - 32 if lane == "text" else y + 26
        lines.append(arrow([(90, y), (STEM_X - 2, y)]))
        lines += box(STEM_X, y, STEM_WIDTH, 48, clip, "stem")
        start = STEM_X + STEM_WIDTH
        lines.append(arrow([(start, y), (STAGE_X[0] - 2, y)]))
        lines += both((start + STAGE_X[0]) / 2, label_y, f"{lane}.stem")
        for i, x in enumerate(STAGE_X):
            sub = f"blocks {4 * i + 1}–{4 * i + 4}" if lane == "text" else f"layer{i + 2}"
            lines += box(x, y, STAGE_WIDTH, 48, clip, f"stage {i}", sub)
            end = x + STAGE_WIDTH
            following = STAGE_X[i + 1] if i < 2 else HEAD_X
            lines.append(arrow([(end, y), (following - 2, y)]))
            lines += both(end + 44, label_y, f"{lane}{i}")
        sub = "end mark" if lane == "text" else "pool"
        lines += box(HEAD_X, y, STAGE_WIDTH, 48, clip, "head", sub)
    lines.append(text(22, TEXT_Y - 46, "text encoder", "side"))
    lines.append(text(22, VISUAL_Y - 44, "image encoder", "side"))
    return lines


def bridges(bridger):
    """A bridge after each stage: reads v and t, adds Δv and Δt, hands on its stream."""
    lines = []
    top = BRIDGE_Y - 26
    bottom = BRIDGE_Y + 26
    for i, x in enumerate(STAGE_X):
        end = x + STAGE_WIDTH
        read = end + 18
        add = end + 70
        lines += box(end - 2, BRIDGE_Y, 98, 52, bridger, f"bridge {i}", "zoom, attend")
        lines.append(arrow([(read, TEXT_Y), (read, top - 2)]))
        lines.append(arrow([(read, VISUAL_Y), (read, bottom + 2)]))
        lines.append(arrow([(add, top), (add, TEXT_Y + 10)]))
        lines.append(arrow([(add, bottom), (add, VISUAL_Y - 10)]))
        lines += plus(add, TEXT_Y)
        lines += plus(add, VISUAL_Y)
        lines.append(text(read - 8, TEXT_Y + 50, "t", "large"))
        lines.append(text(read - 8, VISUAL_Y - 42, "v", "large"))
        lines.append(text(add + 13, TEXT_Y + 50, "Δt", "large"))
        lines.append(text(add + 13, VISUAL_Y - 42, "Δv", "large"))
        if i < 2:
            start = end + 96
            stop = STAGE_X[i + 1] + STAGE_WIDTH - 4
            middle = (start + stop) / 2
            lines.append(arrow([(start, BRIDGE_Y), (stop, BRIDGE_Y)]))
            lines.append(text(middle, BRIDGE_Y - 36, "previous", "large"))
            lines.append(text(middle, BRIDGE_Y - 22, shape("RN101", "previous.visual"), "large"))
            lines.append(text(middle, BRIDGE_Y - 8, shape("RN101", "previous.text"), "large"))
            lines.append(text(middle, BRIDGE_Y + 17, shape("tiny", "previous.visual"), "tiny"))
            lines.append(text(middle, BRIDGE_Y + 31, shape("tiny", "previous.text"), "tiny"))
    lines.append(text(22, BRIDGE_Y + 4, "Bridger", "side"))
    return lines


def alignment(part):
    """Hierarchical alignment: three maps, after bridge 0, after bridge 1 and after the head."""
    lines = box(290, ALIGN_Y, HEAD_X + STAGE_WIDTH - 290, 44, part, "hierarchical alignment")
    lines.append(text(22, ALIGN_Y + 4, "decoder", "side"))
    for x in STAGE_X[:2]:
        drop = x + STAGE_WIDTH + 88
        lines.append(arrow([(drop, VISUAL_Y), (drop, ALIGN_Y - 24)]))
    middle = HEAD_X + STAGE_WIDTH / 2
    lines.append(arrow([(middle, VISUAL_Y + 24), (middle, ALIGN_Y - 24)]))
    lines += both(middle - 40, VISUAL_Y + 62, "visual.head")
    return lines


def text_features():
    """The sentence enters hierarchical alignment and projector, the words global alignment."""
    lines = []
    right = HEAD_X + STAGE_WIDTH
    sentence_y = ALIGN_Y + 50
    words_y = ALIGN_Y + 74
    into_alignment = [
        (right, TEXT_Y + 10),
        (SENTENCE_X, TEXT_Y + 10),
        (SENTENCE_X, ALIGN_Y),
        (right + 2, ALIGN_Y),
    ]
    into_projector = [
        (SENTENCE_X, ALIGN_Y),
        (SENTENCE_X, sentence_y),
        (560, sentence_y),
        (560, DECODER_Y - 26),
    ]
    into_global = [
        (right, TEXT_Y - 10),
        (WORDS_X, TEXT_Y - 10),
        (WORDS_X, words_y),
        (366, words_y),
        (366, DECODER_Y - 26),
    ]
    lines.append(arrow(into_alignment, "sentence"))
    lines.append(arrow(into_projector, "sentence"))
    lines.append(arrow(into_global, "words"))
    sentence = f"sentence {shape('RN101', 'sentence')} ({shape('tiny', 'sentence')})"
    words = f"words {shape('RN101', 'words')} ({shape('tiny', 'words')})"
    lines.append(text(780, sentence_y - 6, sentence, "large"))
    lines.append(text(780, words_y - 6, words, "large"))
    return lines


def decoder(part):
    """The lower row: global alignment, projector, logits."""
    lines = [arrow([(320, ALIGN_Y + 22), (320, DECODER_Y - 26)])]
    lines += both(276, ALIGN_Y + 50, "hierarchical_alignment")
    lines += box(284, DECODER_Y, 132, 48, part, "global alignment", "3 layers")
    lines.append(arrow([(416, DECODER_Y), (508, DECODER_Y)]))
    lines += both(460, DECODER_Y + 20, "features")
    lines += box(510, DECODER_Y, 100, 48, part, "projector", "map ∗ kernel")
    kernel = f"kernel {shape('RN101', 'kernel')} ({shape('tiny', 'kernel')})"
    lines.append(text(650, DECODER_Y - 31, kernel, "large"))
    lines.append(arrow([(610, DECODER_Y), (724, DECODER_Y)]))
    lines += both(664, DECODER_Y + 20, "logits")
    return lines


def predicted():
    """What becomes of the logits in prediction."""
    lines = scene(728, DECODER_Y - 32, mask=True)
    lines.append(text(804, DECODER_Y - 4, "σ(logits), enlarged,", "side"))
    lines.append(text(804, DECODER_Y + 14, "&gt; 0.35: the mask", "side"))
    return lines


def training(part):
    """What becomes of the logits in training: they are compared with the object's mask."""
    lines = box(726, DECODER_Y, 100, 48, part, "loss", "one number")
    lines.append(arrow([(874, DECODER_Y), (830, DECODER_Y)]))
    lines += scene(876, DECODER_Y - 32, mask=True)
    lines.append(text(908, DECODER_Y + 48, "the object’s mask", "large"))
    return lines


def legend(classes):
    lines = []
    y = HEIGHT - 24
    entries = (
        (22, "clip", "CLIP: frozen, but its positions train"),
        (290, "bridger", "Bridger: trained"),
        (428, "decoder", "decoder: trained"),
    )
    for x, part, line in entries:
        box_class = classes[part]
        size = 'width="16" height="14" rx="3"'
        lines.append(f'<rect x="{x}" y="{y - 11}" {size} class="{box_class}"/>')
        lines.append(f'<text x="{x + 22}" y="{y}">{line}</text>')
    tiny = '<tspan fill="#6b7785">in gray: tiny at 128</tspan>'
    lines.append(f'<text x="574" y="{y}">shapes: RN101 at 416 pixels, {tiny}</text>')
    return lines


def draw(part=None):
    """The drawing as SVG; part: the one of PARTS to keep in color, all of them unless given."""
    classes = {name: name for name in ("clip", "bridger", "decoder", "loss")}
    if part is not None:
        for name in classes:
            classes[name] = f"{name} kept" if name in PARTS[part] else "faded"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="arrow" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L7 3 L0 6 z" fill="#3e4c59"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" class="card"/>',
    ]
    lines += encoders(classes["clip"])
    lines += bridges(classes["bridger"])
    lines += alignment(classes["decoder"])
    lines += text_features()
    lines += decoder(classes["decoder"])
    lines += training(classes["loss"]) if part == "loss" else predicted()
    lines += legend(classes)
    lines.append("</svg>")
    if part in ASKED:
        shapes = r">((?:sentence |words |kernel )?)[\d×]+(?: \([\d×]+\))?<"
        lines = [re.sub(shapes, r">\1?<", line) for line in lines]
    return "\n".join(lines) + "\n"


def files():
    """The files that hold the drawing, each with its text."""
    found = {SVG: draw()}
    for part in PARTS:
        found[PICTURES / f"etris-{part}.svg"] = draw(part)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw ETRIS.")
    parser.add_argument("--part", choices=PARTS, help="keep one part in color and print the SVG")
    part = parser.parse_args().part
    if part is None:
        for path, svg in files().items():
            path.write_text(svg, encoding="utf-8", newline="\n")
    else:
        print(draw(part), end="")
