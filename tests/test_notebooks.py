"""The notebooks: `check` says right, wrong and not yet, and what is committed is small and clean.

.ci/run runs them. The right answers are not those of notebooks/answers.py: every block of
notebooks/solutions.md is run as it stands.
"""

import ast
import base64
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint
from data import letterbox, normalize, open_dataset
from toy.scenes import draw_scene
from utils.common import ROOT
from utils.tokenizer import tokenize

pytest.importorskip("IPython", reason="the notebooks need jupyter")
FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))
import matplotlib.colors  # noqa: E402

matplotlib.use("Agg")
import lesson  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = re.findall(
    r"```python\n(.*?)```", (FOLDER / "solutions.md").read_text(encoding="utf-8"), re.DOTALL
)
MODULES = [path.stem for path in sorted(ROOT.glob("*.py"))]
for package in ("experiments", "methods", "toy", "utils"):
    for path in sorted((ROOT / package).glob("*.py")):
        if path.stem != "__init__":
            MODULES.append(f"{package}.{path.stem}")


def cells(path, kind="code"):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    """A code cell as Python: lines of IPython's own (%…) left out."""
    lines = "".join(cell["source"]).split("\n")
    return "\n".join(line for line in lines if not line.startswith("%"))


def code(path):
    return "\n".join(source(cell) for cell in cells(path))


def prose(path):
    return "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))


def asked(path):
    """Names of the exercises that a notebook checks."""
    return re.findall(r'check\(\s*"([^"]+)"', code(path))


def name_of(path):
    return path.stem


# ------------------------------------------------------------------------------------------- check
@pytest.mark.parametrize("name", lesson.EXERCISES)
def test_the_right_answer_is_right_and_two_typical_wrong_ones_are_wrong_with_their_reason(
    name, capsys
):
    exercise = lesson.EXERCISES[name]
    assert lesson.check(name, exercise.right) is True
    assert "right\n" in capsys.readouterr().out
    assert len(exercise.wrong) >= 2
    for answer, why in exercise.wrong:
        assert lesson.check(name, answer) is False
        assert why in capsys.readouterr().out


def says(text, value):
    """Whether a text has this value as a word or number of its own, as Python would print it."""
    word = re.escape(lesson.short(value).strip("'"))
    return re.search(rf"(?<![\w.]){word}(?![\w]|\.\d)", text) is not None


@pytest.mark.parametrize("name", lesson.EXERCISES)
def test_wrong_answers_get_a_reason_then_a_hint_and_never_the_expected_value(name, capsys):
    exercise = lesson.EXERCISES[name]
    lesson.wrong_answers.clear()
    said = []
    for answer, _ in (*exercise.wrong[:2], exercise.wrong[0]):
        assert lesson.check(name, answer) is False
        said.append(capsys.readouterr().out)
    assert "hint" not in said[0]
    for text in said[1:]:
        assert exercise.hint in text
        assert f'lesson.solution("{name}")' in text
    expected = lesson.solution(name)
    assert lesson.difference(expected, lesson.run(exercise.right, exercise)) is None
    for text in said:
        ours = re.sub(r"^  yours .*$", "", text, flags=re.MULTILINE)  # without what was answered
        without_names = ours.replace(name, "")
        assert not says(without_names, expected), text
        if not exercise.on:
            assert not says(without_names, exercise.right), text


def test_the_expected_value_would_be_noticed():
    assert says("it is 9, not 8", 9)
    assert says("that is (4, 17, 676) ", (4, 17, 676))
    assert not says("19 or 0.9 or 9.5", 9)


def test_a_solution_of_no_exercise_names_the_exercises(capsys):
    assert lesson.solution("no such exercise") is None
    assert "01 tokens" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "a word",
        float("nan"),
        [],
        {},
        [[1], [2, 3]],
        object(),
        Hostile(),
        1e400,
        lambda: 0,
        lambda *_: 1 / 0,
        lambda *_: None,
        Exception,
        b"x",
        1j,
    ],
)
def test_check_never_raises_and_calls_nothing_of_this_right(answer, capsys):
    for name in [*lesson.EXERCISES, "no such exercise"]:
        assert lesson.check(name, answer) is False
    assert capsys.readouterr().out


def test_a_partly_filled_answer_is_not_yet(capsys):
    assert lesson.check("01 RN101 stage 1", (1024, ..., ...)) is False
    assert "not yet" in capsys.readouterr().out


def test_answers_may_come_as_list_tensor_or_array(capsys):
    shape = (1024, 26, 26)
    for answer in (list(shape), torch.Size(shape), torch.tensor(shape), np.array(shape)):
        assert lesson.check("01 RN101 stage 1", answer) is True
    for answer in (set(range(8)), list(range(8)), range(8)):
        assert lesson.check("02 not causal", answer) is True


def test_a_rounded_number_and_a_word_with_its_article_are_right(capsys):
    assert lesson.check("00 IoU", 33.3) is True
    assert lesson.check("00 IoU", 33.2) is False
    assert lesson.check("00 who reads", "the Decoder") is True
    assert lesson.check("04 what is Δt", "text adapter") is True


def test_a_word_or_a_number_where_a_set_is_asked_for_is_told_so(capsys):
    for name, answer in (("03 same sentence feature", "words"), ("01 causal", 2)):
        assert lesson.check(name, answer) is False
        assert "give a set" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- solutions
def first_exercise(block):
    return (re.findall(r'check\("([^"]+)"', block) or ["?"])[0]


@pytest.mark.parametrize("block", SOLUTIONS, ids=first_exercise)
def test_every_solution_is_right_as_it_stands(block):
    found = []

    class Lesson:
        @staticmethod
        def check(name, answer):
            found.append(lesson.check(name, answer))

    exec(block, {"check": Lesson.check, "lesson": Lesson})
    assert found and all(found)


def test_every_exercise_has_a_solution_and_stands_in_one_notebook():
    solved = re.findall(r'check\("([^"]+)"', "\n".join(SOLUTIONS))
    in_notebooks = [name for path in NOTEBOOKS for name in asked(path)]
    assert sorted(in_notebooks) == sorted(lesson.EXERCISES) == sorted(solved)


# ----------------------------------------------------------------------------------------- figures
def test_compare_has_a_row_for_each_model_a_title_for_each_image_and_one_caption(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "show", shown.append)
    image = np.zeros((8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    masks = {"one": [mask, mask, ~mask], "two": [mask, ~mask, mask]}
    targets = [mask, ~mask | mask, ~mask & mask]
    lesson.compare([image] * 3, ["a", "b", "c"], masks, targets, "what is outlined")
    [figure] = shown
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes] == ["one", "", "", "two", "", ""]
    assert figure.get_supxlabel() == "what is outlined"
    outlines = [len(axis.collections) for axis in figure.axes]
    assert outlines[0] > 0 == outlines[2]  # nothing is meant: nothing to outline


def test_a_spotlight_keeps_what_is_marked_and_draws_its_edge_outside_of_it():
    image = np.zeros((6, 6, 3), np.uint8)
    image[..., 0] = 200
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    shown = lesson.spotlight(image, mask)
    assert np.allclose(shown[mask], image[mask] / 255)
    edge = np.allclose(shown[1, 2], matplotlib.colors.to_rgb(lesson.FOUND))
    assert edge and not np.allclose(shown[1, 1], shown[1, 2])  # a corner does not touch it
    assert shown[0, 0].min() > 0.55 and np.ptp(shown[0, 0]) < 0.2  # pale elsewhere
    assert np.ptp(lesson.spotlight(image, ~mask & mask), axis=(0, 1)).max() == 0  # nothing marked


def test_a_bridger_of_ones_own_takes_the_shipped_weights_and_the_place_of_the_shipped(
    capsys, monkeypatch
):
    """Notebook 02 as after its exercises: the solution stands where the notebook has `...`."""
    monkeypatch.chdir(FOLDER)
    (solution,) = [block for block in SOLUTIONS if 'check("02 bridge"' in block]
    room = {"check": lesson.check}
    exec(solution, room)
    for cell in cells(FOLDER / "02_bridger.ipynb"):
        program = source(cell)
        if re.search(r"def (shrink_map|grow_map|my_attention|interact|my_bridge)\(", program):
            continue  # the solution's stay
        exec(program, room)
        if 'check("02 bridge"' in program:
            break
    assert "your Bridger in the model: logits differ by" in capsys.readouterr().out


# -------------------------------------------------------------------------- something to play with
@pytest.fixture(scope="module")
def player():
    pytest.importorskip("ipywidgets", reason="it comes with jupyter")
    model = load_checkpoint(ROOT / "weights" / "etris-tiny.pt")
    probes = lesson.fit_probes(model, open_dataset("scenes", "train", limit=4, side=160))
    scenes = {number: draw_scene("scenes", "test", number) for number in (17, 22)}
    choices = {f"{number}": (one.image, one.sentences[0]) for number, one in scenes.items()}
    return lesson.Player(model, probes, choices)


def test_the_players_picture_follows_image_sentence_strength_and_stage(player):
    seen = {bytes(player.picture.value)}
    player.scene.value = "22"
    assert player.sentence.value == player.choices["22"][1]
    seen.add(bytes(player.picture.value))
    player.sentence.value = "the ring"
    seen.add(bytes(player.picture.value))
    player.strength.value = 0.5
    seen.add(bytes(player.picture.value))
    player.stage.value = "decoder"
    seen.add(bytes(player.picture.value))
    assert len(seen) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in seen)


def test_a_player_without_a_sentence_asks_for_one_and_keeps_its_picture(player):
    before = bytes(player.picture.value)
    player.sentence.value = "  "
    assert player.message.value == "Type a sentence."
    assert bytes(player.picture.value) == before


def test_a_file_of_ones_own_becomes_a_choice_and_a_broken_one_is_named(player):
    class File:
        def __init__(self, name, content):
            self.name = name
            self.content = content

    class Upload:
        value = [File("mine.jpg", (FOLDER / "pictures" / "cat.jpg").read_bytes())]

    player.sentence.value = "the cat"
    player.file = Upload()
    player.upload(None)
    assert player.scene.value == "mine.jpg"
    assert player.sentence.value == "the cat"
    Upload.value = [File("broken.png", b"no image")]
    player.upload(None)
    assert player.message.value.startswith("broken.png cannot be read")


def test_at_strength_0_a_look_is_plain_clip_and_at_1_it_is_the_model(player):
    model = player.model
    image, sentence = player.choices["17"]
    square, _ = letterbox(image, model.size)
    tokens = tokenize([sentence], model.max_tokens)
    plain = lesson.look(model, image, sentence, 0)
    trained = lesson.look(model, image, sentence, 1)
    with torch.inference_mode():
        v = model.clip.visual.stem(normalize(square[None]))
        for i, stage in enumerate(model.clip.visual.stages):
            v = stage(v)
            assert torch.equal(v, plain[f"visual{i}.after"])
    seen = model.activations(normalize(square[None]), tokens)
    for name in ("visual2.after", "text2.after", "features"):
        assert torch.allclose(seen[name], trained[name], atol=1e-5)
        assert not torch.allclose(seen[name], plain[name], atol=1e-3)


# ------------------------------------------------------------------- predictions, openings, endings
def is_folded(cell):
    """Whether JupyterLab opens a notebook with this cell's output folded."""
    metadata = cell["metadata"]
    hidden = metadata.get("jupyter", {}).get("outputs_hidden", False)
    assert metadata.get("collapsed", False) == hidden  # the older name of the same
    return hidden


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_outputs_below_a_prediction_are_folded_and_no_others(path):
    below_a_prediction = False
    folded = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            below_a_prediction = "**Predict" in "".join(cell["source"])
            continue
        expected = below_a_prediction and "check(" not in source(cell)
        assert is_folded(cell) is expected, source(cell)
        folded += expected
    assert folded >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_opens_with_minutes_stars_and_needs_and_ends_with_what_one_knows(path):
    markdown = cells(path, "markdown")
    opening = "".join(markdown[0]["source"])
    assert "**Question.**" in opening
    assert re.search(r"^\*.* minutes.* · ★{1,3} · needs: .*\*$", opening, re.MULTILINE)
    ending = "".join(markdown[-1]["source"])
    known, questions = ending.split("## You now know")[1].split("## Five questions")
    assert len(re.findall(r"^- ", known, re.MULTILINE)) == 3
    answers = re.findall(r"<details><summary>\d\. .*</summary>\n\n(.+)\n</details>", questions)
    assert len(answers) == 5
    assert "`" not in "".join(re.findall("<summary>.*</summary>", questions))  # HTML, no Markdown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_exercise_is_marked_with_stars(path):
    text = prose(path)
    assert len(re.findall(r"\*\*Exercise \d+ \(★{1,3}\)\.\*\*", text)) == len(asked(path))
    assert len(re.findall(r"\*\*Exercise", text)) == len(asked(path))


# --------------------------------------------------------------------------------------- notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_teaches_question_prediction_seeing_three_exercises_and_asserts(path):
    text = prose(path)
    assert "**Question.**" in text and "**Predict" in text and "ou should see" in text
    assert len(asked(path)) >= 3
    assert sum("assert " in source(cell) for cell in cells(path)) >= 3
    assert 'sys.path.insert(0, "..")' in source(cells(path)[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_committed_small_executed_and_clean(path):
    assert path.stat().st_size <= 500_000
    numbers = [cell["execution_count"] for cell in cells(path)]
    assert numbers == list(range(1, len(numbers) + 1))
    images = 0
    for output in [output for cell in cells(path) for output in cell["outputs"]]:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        images += base64.b64decode(data.get("image/png", "")).startswith(b"\x89PNG")
        text = "".join(output.get("text", [])) + "".join(data.get("text/plain", []))
        folders = r"(^|[\s'\"(=])/(home|root|tmp|opt|usr|work|mnt|Users|var)/|[A-Z]:\\"
        assert not re.search(folders, text), text
        assert not re.search(r"warning|traceback|it/s|step/s", text, re.IGNORECASE), text
        assert not re.search(r"^.*: right$", text, re.MULTILINE), "an exercise is committed solved"
    assert images >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_names_a_notebook_imports_from_the_project_exist(path):
    imported = {}  # name in the notebook: module
    used = 0
    nodes = list(ast.walk(ast.parse(code(path))))
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name in MODULES:
                    imported[name.asname or name.name] = importlib.import_module(name.name)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            used += 1
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module}.{name.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id)
            assert module is None or hasattr(module, node.attr), f"{node.value.id}.{node.attr}"
    assert used


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_writes_nothing_of_the_project_anew(path):
    for node in ast.walk(ast.parse(code(path))):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for name in MODULES:
            defined = getattr(importlib.import_module(name), node.name, None)
            assert getattr(defined, "__module__", None) != name, f"{node.name} stands in {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_links_of_a_notebook_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", prose(path)):
        assert target.startswith("http") or (FOLDER / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_commands_that_a_notebook_quotes_exist(path):
    text = prose(path) + code(path)
    for name in re.findall(r"python (\w+)\.py", text):
        assert name in MODULES, name
    for name in re.findall(r"python -m ([\w.]+)", text):
        assert name in MODULES, name


def test_a_notebook_starts_in_its_own_folder_and_in_the_projects():
    """All begin with the same lines; whoever runs them finds the project and its files."""
    beginnings = [source(cells(path)[0]).split("\n\n", 2)[:2] for path in NOTEBOOKS]
    assert all(beginning == beginnings[0] for beginning in beginnings)
    program = "\n\n".join(beginnings[0])
    program += "\nfrom importlib.util import find_spec\nimport pathlib"
    program += "\nassert find_spec('lesson') and find_spec('clip_model') and find_spec('toy')"
    program += "\nassert pathlib.Path('../weights/etris-tiny.pt').exists()"
    for folder in (FOLDER, ROOT):
        subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def test_map_rows_has_a_label_for_each_row_a_title_for_each_column_and_one_caption(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "show", shown.append)
    maps = {"step 0": [np.zeros((4, 4)), np.ones((4, 4))], "step 5": [np.eye(4), torch.eye(4)]}
    masks = [np.eye(4, dtype=bool), np.zeros((4, 4), bool)]
    lesson.map_rows(maps, ["a", "b"], masks, caption="outlined: what is meant")
    [figure] = shown
    assert [axis.get_title() for axis in figure.axes[:4]] == ["a", "b", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes[:4]] == ["step 0", "", "step 5", ""]
    assert figure.get_supxlabel() == "outlined: what is meant"
    assert all(axis.images[0].get_clim() == (0, 1) for axis in figure.axes[:4])


def test_stages_have_one_scale_a_row_and_a_difference_of_the_same_span(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "show", lambda figure, palette: shown.append(figure))
    image = np.zeros((8, 8, 3), np.uint8)
    masks = (np.eye(8, dtype=bool), np.eye(8, dtype=bool)[::-1])
    rows = {
        "stage 0": (np.zeros((4, 4)), np.eye(4), np.eye(4)),
        "mask": (np.full((2, 2), -1.0), np.eye(2), 3 * np.eye(2)),
    }
    lesson.stages(image, masks, rows, ("without", "A", "B"))
    [figure] = shown
    axes = figure.axes[:10]
    assert [axis.get_title() for axis in axes[:5]] == ["A and B", "without", "A", "B", "A less B"]
    for first, (low, high) in ((0, (0, 1)), (5, (-1, 3))):
        assert all(axis.images[0].get_clim() == (low, high) for axis in axes[first + 1 : first + 4])
        assert axes[first + 4].images[0].get_clim() == (low - high, high - low)
    assert not axes[4].images[0].get_array().any()  # the same for both sentences
    assert (axes[9].images[0].get_array() == -2 * np.eye(2)).all()


def test_a_forest_plot_has_a_row_for_each_interval_and_a_line_at_the_reference(monkeypatch):
    shown = []
    monkeypatch.setattr(lesson, "show", shown.append)
    lesson.intervals({"a": (1, 0, 2), "b": (3, 2.5, 4)}, "points", reference=1)
    [axis] = shown[0].axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]
    lines = [line.get_xdata() for line in axis.lines]
    assert list(lines[0]) == [1, 1]
    assert [list(line) for line in lines[1::2]] == [[0, 2], [2.5, 4]]
