"""Draw notebooks/pictures/methods.svg: where six ways to tune a frozen CLIP put their numbers.

    python -m docs.draw_methods

Each panel is one place in the model: gray is frozen, orange is trained. methods/peft.py has the
code of the first five, etris.py of the sixth.
"""

from docs.draw_etris import PICTURES, STYLE, arrow, box, plus, text

SVG = PICTURES / "methods.svg"
PANEL_WIDTH = 326
PANEL_HEIGHT = 196
LEGEND = 34
FROZEN = "clip"
TRAINED = "bridger"
MORE_STYLE = """
.title { font-size: 14px; font-weight: bold }
.panel { fill: none; stroke: #c9d1d9 }
"""


def shortcut(start, end, y, height):
    """A path around what lies between: up, along, down into a plus."""
    return arrow([(start, y), (start, y - height), (end, y - height), (end, y - 8)])


def adapter(x, y):
    """After a layer of a transformer's block, before the shortcut is added."""
    lines = [shortcut(x + 20, x + 258, y, 46), arrow([(x, y), (x + 36, y)])]
    lines += box(x + 36, y, 84, 46, FROZEN, "attention", "or MLP")
    lines.append(arrow([(x + 120, y), (x + 142, y)]))
    lines += box(x + 142, y, 90, 46, TRAINED, "adapter", "¼ width, GELU")
    lines += [arrow([(x + 232, y), (x + 250, y)]), *plus(x + 258, y)]
    lines.append(arrow([(x + 266, y), (x + 290, y)]))
    return lines


def compacter(x, y):
    """The same place; a matrix is a sum of Kronecker products."""
    lines = [text(x, y - 36, "at the adapters' places; each matrix is", "sub left")]
    lines += box(x, y, 66, 52, "faded", "W")
    lines.append(text(x + 82, y + 5, "= Σ", "name"))
    lines += box(x + 104, y, 34, 34, TRAINED, "A")
    lines.append(text(x + 152, y + 5, "⊗", "name"))
    lines.append(text(x + 168, y + 5, "(", "name"))
    lines += box(x + 176, y, 16, 52, TRAINED, "s")
    lines += box(x + 200, y, 52, 18, TRAINED, "t")
    lines.append(text(x + 262, y + 5, ")", "name"))
    lines.append(text(x + 104, y + 44, "A: 4×4, one set for all layers", "sub left"))
    return lines


def conv_adapter(x, y):
    """Inside a bottleneck of the image encoder."""
    lines = [shortcut(x + 8, x + 268, y, 46), arrow([(x, y), (x + 16, y)])]
    lines += box(x + 16, y, 42, 46, FROZEN, "1×1", "conv")
    lines.append(arrow([(x + 58, y), (x + 74, y)]))
    lines += box(x + 74, y, 42, 46, FROZEN, "3×3", "conv")
    lines.append(arrow([(x + 116, y), (x + 132, y)]))
    lines += box(x + 132, y, 60, 46, TRAINED, "adapter", "1×1")
    lines.append(arrow([(x + 192, y), (x + 208, y)]))
    lines += box(x + 208, y, 42, 46, FROZEN, "1×1", "conv")
    lines += [arrow([(x + 250, y), (x + 260, y)]), *plus(x + 268, y)]
    lines.append(arrow([(x + 276, y), (x + 292, y)]))
    return lines


def lora(x, y):
    """Beside a weight of the attention, on queries and values."""
    lines = [arrow([(x, y - 18), (x + 88, y - 18)])]
    lines += box(x + 88, y - 18, 104, 42, FROZEN, "W", "queries, values")
    lines += [arrow([(x + 192, y - 18), (x + 240, y - 18)]), *plus(x + 248, y - 18)]
    lines.append(arrow([(x + 256, y - 18), (x + 290, y - 18)]))
    lines.append(arrow([(x + 30, y - 18), (x + 30, y + 36), (x + 60, y + 36)]))
    lines += box(x + 60, y + 36, 62, 40, TRAINED, "A", "4 rows")
    lines.append(arrow([(x + 122, y + 36), (x + 150, y + 36)]))
    lines += box(x + 150, y + 36, 72, 40, TRAINED, "B", "4 columns")
    lines.append(arrow([(x + 222, y + 36), (x + 248, y + 36), (x + 248, y - 10)]))
    return lines


def coop(x, y):
    """Before the sentence's words."""
    lines = []
    words = [("start", FROZEN, 40), ("v₁", TRAINED, 26), ("…", TRAINED, 26), ("v₈", TRAINED, 26)]
    words += [("red", FROZEN, 34), ("circle", FROZEN, 46), ("end", FROZEN, 34)]
    left = x + 14
    for word, part, width in words:
        lines += box(left, y - 22, width, 30, part, word)
        left += width + 6
    middle = x + 145
    lines.append(arrow([(middle, y - 7), (middle, y + 14)]))
    lines += box(x + 60, y + 36, 170, 42, FROZEN, "text encoder", "all layers")
    return lines


def bridger(x, y):
    """Between the two encoders, after each stage."""
    top, bottom = y - 50, y + 40
    lines = []
    for lane, name, sub in ((top, "text", "stage i"), (bottom, "image", "stage i")):
        lines.append(arrow([(x, lane), (x + 16, lane)]))
        lines += box(x + 16, lane, 70, 38, FROZEN, name, sub)
        lines += [arrow([(x + 86, lane), (x + 232, lane)]), *plus(x + 240, lane)]
        lines.append(arrow([(x + 248, lane), (x + 290, lane)]))
    lines += box(x + 108, y - 5, 152, 34, TRAINED, "bridge i")
    lines.append(arrow([(x + 128, top), (x + 128, y - 22)]))
    lines.append(arrow([(x + 128, bottom), (x + 128, y + 12)]))
    lines.append(arrow([(x + 240, y - 22), (x + 240, top + 8)]))
    lines.append(arrow([(x + 240, y + 12), (x + 240, bottom - 8)]))
    return lines


PANELS = (
    (adapter, "Adapter", "in every block, both encoders"),
    (compacter, "Compacter", "in every block, both encoders"),
    (conv_adapter, "Conv Adapter", "in every bottleneck, image encoder"),
    (lora, "LoRA", "in every attention, both encoders"),
    (coop, "CoOp", "before the words, text encoder"),
    (bridger, "Bridger", "between the encoders, three times"),
)


def draw() -> str:
    """The drawing as SVG: two rows of three panels, and a legend."""
    width = 3 * PANEL_WIDTH + 22
    height = 2 * PANEL_HEIGHT + LEGEND + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<style>{STYLE}{MORE_STYLE}.left {{ text-anchor: start }}</style>",
        '<defs><marker id="arrow" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L7 3 L0 6 z" fill="#3e4c59"/></marker></defs>',
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" class="card"/>',
    ]
    for number, (panel, name, place) in enumerate(PANELS):
        left = 11 + PANEL_WIDTH * (number % 3)
        top = 8 + PANEL_HEIGHT * (number // 3)
        size = f'width="{PANEL_WIDTH - 8}" height="{PANEL_HEIGHT - 8}"'
        lines.append(f'<rect x="{left + 4}" y="{top + 4}" {size} rx="6" class="panel"/>')
        lines.append(text(left + 16, top + 24, name, "title"))
        lines.append(text(left + 16, top + 41, place, "side"))
        lines += panel(left + 18, top + 122)
    bottom = height - LEGEND / 2 - 4
    lines += box(24, bottom, 18, 14, FROZEN, "")
    lines.append(text(50, bottom + 5, "CLIP, frozen", ""))
    lines += box(154, bottom, 18, 14, TRAINED, "")
    lines.append(text(180, bottom + 5, "trained", ""))
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
