"""README's reading order, ledger and links say what is there."""

import re

import pytest

from clip_model import HERE

README = (HERE / "README.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (HERE / "tests").glob("*.py"))


def lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_reading_order_names_every_file_with_its_lines():
    rows = dict(re.findall(r"^\| \w* \| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M))
    assert {name: int(count) for name, count in rows.items()} == {path.name: lines(path) for path in HERE.glob("*.py")}


def test_the_book_is_as_long_as_it_says():
    book = sum(lines(HERE / name) for name in ("clip_model.py", "etris.py", "data.py", "train.py"))
    assert f"**The book** is four files, {book:,} lines" in README


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(?:(?:tests/)?test_\w+\.py::)?(test_\w+)`", README))))
def test_every_test_that_is_quoted_exists(name):
    assert f"def {name}(" in TESTS


def test_links_into_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([\w/-]+[./][\w./-]*)(?:#[\w-]*)?\)", README):
        assert (HERE / target).exists(), target
