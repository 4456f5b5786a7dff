"""The notebooks: `check` says right, wrong and not yet, and what is committed is small and clean. .ci/run runs them.

The right answers are not those of notebooks/answers.py: every block of notebooks/solutions.md is run as it stands.
"""

import ast
import base64
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("IPython", reason="the notebooks need jupyter")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(FOLDER))
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import lesson  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = re.findall(r"```python\n(.*?)```", (FOLDER / "solutions.md").read_text(encoding="utf-8"), re.DOTALL)
FLAT = [path.stem for path in FOLDER.parent.glob("*.py")]


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    """A code cell as Python: lines of IPython's own (%…) left out."""
    return "\n".join(line for line in "".join(cell["source"]).split("\n") if not line.startswith("%"))


def asked(path):
    """Names of the exercises that a notebook checks."""
    return re.findall(r'check\(\s*"([^"]+)"', "\n".join(source(cell) for cell in cells(path)))


# ---------------------------------------------------------------------------------------------------- check
@pytest.mark.parametrize("name", lesson.EXERCISES)
def test_the_right_answer_is_right_and_two_typical_wrong_ones_are_wrong_with_their_reason(name, capsys):
    exercise = lesson.EXERCISES[name]
    assert lesson.check(name, exercise.right) is True
    assert "right\n" in capsys.readouterr().out
    assert len(exercise.wrong) >= 2
    for answer, why in exercise.wrong:
        assert lesson.check(name, answer) is False
        assert why in capsys.readouterr().out


@pytest.mark.parametrize("name", lesson.EXERCISES)
def test_an_open_exercise_is_not_yet(name, capsys):
    assert lesson.check(name, ...) is False
    assert "not yet" in capsys.readouterr().out
    if lesson.EXERCISES[name].on:
        assert lesson.check(name, lambda *_: ...) is False
        assert "not yet" in capsys.readouterr().out


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


@pytest.mark.parametrize("answer", [None, "", "a word", float("nan"), [], {}, [[1], [2, 3]], object(), Hostile(), 1e400,
                                    lambda: 0, lambda *_: 1 / 0, lambda *_: None, Exception, b"x", 1j])  # fmt: skip
def test_check_never_raises_and_calls_nothing_of_this_right(answer, capsys):
    for name in [*lesson.EXERCISES, "no such exercise"]:
        assert lesson.check(name, answer) is False
    assert capsys.readouterr().out


def test_a_partly_filled_answer_is_not_yet(capsys):
    assert lesson.check("01 RN101 stage 1", (1024, ..., ...)) is False
    assert "not yet" in capsys.readouterr().out


def test_answers_may_come_as_list_tensor_or_array(capsys):
    import numpy as np
    import torch

    for answer in ([1024, 26, 26], torch.Size([1024, 26, 26]), torch.tensor([1024, 26, 26]), np.array([1024, 26, 26])):
        assert lesson.check("01 RN101 stage 1", answer) is True
    for answer in ({*range(8)}, [*range(8)], range(8)):
        assert lesson.check("02 not causal", answer) is True


# ---------------------------------------------------------------------------------------------------- solutions
@pytest.mark.parametrize("block", SOLUTIONS, ids=lambda block: (re.findall(r'check\("([^"]+)"', block) or ["?"])[0])
def test_every_solution_is_right_as_it_stands(block):
    found = []
    check = lambda name, answer: found.append(lesson.check(name, answer))  # noqa: E731
    exec(block, {"check": check, "lesson": type("", (), {"check": staticmethod(check)})})
    assert found and all(found)


def test_every_exercise_has_a_solution_and_stands_in_one_notebook():
    solved = re.findall(r'check\("([^"]+)"', "\n".join(SOLUTIONS))
    in_notebooks = [name for path in NOTEBOOKS for name in asked(path)]
    assert sorted(in_notebooks) == sorted(lesson.EXERCISES) == sorted(solved)


# ---------------------------------------------------------------------------------------------------- notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_teaches_question_prediction_seeing_three_exercises_and_asserts(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert "**Question.**" in text and "**Predict" in text and "ou should see" in text
    assert len(asked(path)) >= 3
    assert sum("assert " in source(cell) for cell in cells(path)) >= 3
    assert 'sys.path.insert(0, "..")' in source(cells(path)[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_small_executed_and_clean(path):
    assert path.stat().st_size <= 500 * 1024
    code, pictures = cells(path), 0
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in [output for cell in code for output in cell["outputs"]]:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        pictures += base64.b64decode(data.get("image/png", "")).startswith(b"\x89PNG")
        text = "".join(output.get("text", [])) + "".join(data.get("text/plain", []))
        assert not re.search(r"(^|[\s'\"(=])/(home|root|tmp|opt|usr|work|mnt|Users|var)/|[A-Z]:\\", text), text
        assert not re.search(r"warning|traceback|it/s|step/s", text, re.IGNORECASE), text
        assert not re.search(r"^.*: right$", text, re.MULTILINE), "an exercise is committed solved"
    assert pictures >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_names_a_notebook_imports_from_the_flat_files_exist(path):
    used, nodes = 0, list(ast.walk(ast.parse("\n".join(source(cell) for cell in cells(path)))))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names if name.name in FLAT}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in FLAT:
            used += 1
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name), f"{node.module}.{name.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert hasattr(importlib.import_module(node.value.id), node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef):  # nothing of the flat files is written anew
            named = {module: getattr(importlib.import_module(module), node.name, None) for module in FLAT}
            flat = [module for module, what in named.items() if getattr(what, "__module__", None) == module]
            assert not flat, f"{node.name} stands in {flat}"
    assert used


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_lead_somewhere(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (FOLDER / target).exists(), target
