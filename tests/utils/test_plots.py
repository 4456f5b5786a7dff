"""What `utils/plots.py` promises: figures that show what they are given, and nothing else."""

import io
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from utils.plots import contact_sheet, draw_groups, draw_pairs, label, overlay

LARGE = (3000, 4000)  # 12 megapixels


def test_the_figure_of_digits_shows_who_was_taken_for_whom_and_nothing_else(tmp_path, monkeypatch):
    """A 3 found twice and taken for a 5 once: two numbers in the figure, all other cells empty."""
    from matplotlib.axes import Axes

    written = []
    draw_text = Axes.text

    def text(axis, x, y, content, **options):
        written.append((x, y, content))
        return draw_text(axis, x, y, content, **options)

    monkeypatch.setattr(Axes, "text", text)
    draw_groups("digits", {"3": {"3": 2, "5": 1}}, tmp_path / "x.png")
    assert [cell for cell in written if cell[2]] == [(3, 0, 2), (5, 0, 1)]
    assert (tmp_path / "x.png").stat().st_size


def test_a_label_is_short_and_printable():
    """300 characters at most, a line break only where lines are wrapped."""
    assert label("a\x00b\nc", 44) == "a b c"
    assert label("x" * 400, 400) == "x" * 299 + "…"


def large_sample():
    """A white photograph of 12 megapixels whose left half is the object."""
    image = np.full((*LARGE, 3), 255, np.uint8)
    mask = np.zeros(LARGE, bool)
    mask[:, : LARGE[1] // 2] = True
    return SimpleNamespace(image=image, mask=mask, sentences=["the left half"])


@pytest.fixture
def peak():
    """The most memory, in bytes, that Python and numpy have held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_large_photograph_is_drawn_at_the_figures_size(tmp_path, peak):
    """In floats it would take 288 MB, and matplotlib's copies some gigabytes.

    Drawing at the figure's size takes 120 MB, matplotlib's own tables 20 more at the first time.
    """
    sample = large_sample()
    before = peak()
    drawn = np.asarray(Image.open(io.BytesIO(overlay(sample.image, [sample.mask], ["x"]))))
    contact_sheet([sample], tmp_path / "sheet.png")
    draw_pairs([sample], [sample.mask], tmp_path / "pairs.png")
    assert peak() - before < 200e6
    assert max(drawn.shape) < 1100
    y = drawn.shape[0] // 4
    x = drawn.shape[1]
    # white under 55 % of orange (230, 159, 0), and white
    np.testing.assert_allclose(drawn[y, x // 4, :3], [241, 202, 115], atol=2)
    np.testing.assert_allclose(drawn[y, 3 * x // 4, :3], [255, 255, 255], atol=2)


def test_an_overlay_shows_every_sentence_in_the_color_of_its_mask():
    """A black strip, narrower than the legend: it stands in the middle, white on both sides."""
    image = np.zeros((200, 20, 3), np.uint8)
    mask = np.zeros((200, 20), bool)
    mask[:100] = True
    sentences = ["the upper half", "the lower half, second from the top and first from below"]
    drawn = np.asarray(Image.open(io.BytesIO(overlay(image, [mask, ~mask], sentences))))
    height, width, _ = drawn.shape
    assert 300 < width < 960
    np.testing.assert_array_equal(drawn[:960, 0], 255)
    np.testing.assert_allclose(drawn[240, width // 2], [126, 87, 0], atol=1)  # 55 % of orange
    np.testing.assert_allclose(drawn[720, width // 2], [47, 99, 128], atol=1)  # and of blue
    legend = drawn[960:]
    assert (legend[:, 20] == [230, 159, 0]).all(1).any()
    assert (legend[:, 20] == [86, 180, 233]).all(1).any()
    assert (legend[:, 54:] < 100).any()  # letters, and room behind them
    assert (legend[:, -6:] == 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (8, 20000)])
@pytest.mark.parametrize("inside", [False, True])
def test_a_sheet_takes_images_of_any_shape_and_masks_without_an_outline(tmp_path, shape, inside):
    image = np.zeros((*shape, 3), np.uint8)
    sample = SimpleNamespace(image=image, mask=np.full(shape, inside), sentences=["a line"])
    contact_sheet([sample], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size
