"""What `utils/plots.py` promises: figures that show what they are given, and nothing else."""

from utils.plots import draw_groups, label


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
