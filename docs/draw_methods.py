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


class Panel:
    """Collects the SVG of one panel. Coordinates count from the start of its main line."""

    def __init__(self, x, y):
        self.x = x
        self.y = y
        self.lines = []

    def arrow(self, *points):
        """Along `points`, pairs (x, y)."""
        moved = [(self.x + x, self.y + y) for x, y in points]
        self.lines.append(arrow(moved))

    def flow(self, start, end, y=0):
        """An arrow to the right."""
        self.arrow((start, y), (end, y))

    def shortcut(self, start, end):
        """A path around what lies between: up, along, down into a plus."""
        self.arrow((start, 0), (start, -46), (end, -46), (end, -8))

    def plus(self, x, y=0):
        self.lines += plus(self.x + x, self.y + y)

    def text(self, x, y, line, style):
        self.lines.append(text(self.x + x, self.y + y, line, style))

    def box(self, x, y, size, part, name, sub=""):
        """A named box of `size` (width, height); (x, y) is the middle of its left edge."""
        self.lines += box(self.x + x, self.y + y, *size, part, name, sub)


def adapter(panel):
    """After a layer of a transformer's block, before the shortcut is added."""
    panel.shortcut(20, 258)
    panel.flow(0, 36)
    panel.box(36, 0, (84, 46), FROZEN, "attention", "or MLP")
    panel.flow(120, 142)
    panel.box(142, 0, (90, 46), TRAINED, "adapter", "¼ width, GELU")
    panel.flow(232, 250)
    panel.plus(258)
    panel.flow(266, 290)


def compacter(panel):
    """The same place; a matrix is a sum of Kronecker products."""
    panel.text(0, -36, "at the adapters' places; each matrix is", "sub left")
    panel.box(0, 0, (66, 52), "faded", "W")
    panel.text(82, 5, "= Σ", "name")
    panel.box(104, 0, (34, 34), TRAINED, "A")
    panel.text(152, 5, "⊗", "name")
    panel.text(168, 5, "(", "name")
    panel.box(176, 0, (16, 52), TRAINED, "s")
    panel.box(200, 0, (52, 18), TRAINED, "t")
    panel.text(262, 5, ")", "name")
    panel.text(104, 44, "A: 4×4, one set for all layers", "sub left")


def conv_adapter(panel):
    """Inside a bottleneck of the image encoder."""
    panel.shortcut(8, 268)
    panel.flow(0, 16)
    panel.box(16, 0, (42, 46), FROZEN, "1×1", "conv")
    panel.flow(58, 74)
    panel.box(74, 0, (42, 46), FROZEN, "3×3", "conv")
    panel.flow(116, 132)
    panel.box(132, 0, (60, 46), TRAINED, "adapter", "1×1")
    panel.flow(192, 208)
    panel.box(208, 0, (42, 46), FROZEN, "1×1", "conv")
    panel.flow(250, 260)
    panel.plus(268)
    panel.flow(276, 292)


def lora(panel):
    """Beside a weight of the attention, on queries and values."""
    above = -18  # the frozen weight's line
    below = 36  # the line of A and B
    panel.flow(0, 88, above)
    panel.box(88, above, (104, 42), FROZEN, "W", "queries, values")
    panel.flow(192, 240, above)
    panel.plus(248, above)
    panel.flow(256, 290, above)
    panel.arrow((30, above), (30, below), (60, below))
    panel.box(60, below, (62, 40), TRAINED, "A", "4 rows")
    panel.flow(122, 150, below)
    panel.box(150, below, (72, 40), TRAINED, "B", "4 columns")
    panel.arrow((222, below), (248, below), (248, above + 8))


def coop(panel):
    """Before the sentence's words."""
    left = 14
    for word, part, width in COOP_WORDS:
        panel.box(left, -22, (width, 30), part, word)
        left += width + 6
    panel.arrow((145, -7), (145, 14))
    panel.box(60, 36, (170, 42), FROZEN, "text encoder", "all layers")


def bridger(panel):
    """Between the two encoders, after each stage."""
    top = -50
    bottom = 40
    for lane, name in ((top, "text"), (bottom, "image")):
        panel.flow(0, 16, lane)
        panel.box(16, lane, (70, 38), FROZEN, name, "stage i")
        panel.flow(86, 232, lane)
        panel.plus(240, lane)
        panel.flow(248, 290, lane)
    panel.box(108, -5, (152, 34), TRAINED, "bridge i")
    panel.arrow((128, top), (128, -22))
    panel.arrow((128, bottom), (128, 12))
    panel.arrow((240, -22), (240, top + 8))
    panel.arrow((240, 12), (240, bottom - 8))


COOP_WORDS = (
    ("start", FROZEN, 40),
    ("v₁", TRAINED, 26),
    ("…", TRAINED, 26),
    ("v₈", TRAINED, 26),
    ("red", FROZEN, 34),
    ("circle", FROZEN, 46),
    ("end", FROZEN, 34),
)
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
    size = f'width="{PANEL_WIDTH - 8}" height="{PANEL_HEIGHT - 8}"'
    for number, (draw_method, name, place) in enumerate(PANELS):
        row, column = divmod(number, 3)
        left = 11 + PANEL_WIDTH * column
        top = 8 + PANEL_HEIGHT * row
        lines.append(f'<rect x="{left + 4}" y="{top + 4}" {size} rx="6" class="panel"/>')
        lines.append(text(left + 16, top + 24, name, "title"))
        lines.append(text(left + 16, top + 41, place, "side"))
        panel = Panel(left + 18, top + 122)
        draw_method(panel)
        lines += panel.lines
    bottom = height - LEGEND / 2 - 4
    lines += box(24, bottom, 18, 14, FROZEN, "")
    lines.append(text(50, bottom + 5, "CLIP, frozen", ""))
    lines += box(154, bottom, 18, 14, TRAINED, "")
    lines.append(text(180, bottom + 5, "trained", ""))
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
