"""The README and docs/ say what is there: links, commands, the tree, tests, shapes, figures."""

import argparse
import ast
import re
import shlex

import pytest
import torch

import data
import evaluate
import predict
import prepare
import train
from checkpoint import build_model
from docs import draw_etris, draw_methods
from experiments import benchmark, claims, costs, gpu_check, probe, reproduce
from toy import pretrain
from utils import report as bug_report
from utils.common import ROOT, Parser
from utils.tokenizer import tokenize

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "weights" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
CODE = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("", "methods", "toy", "experiments", "utils")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
}
COMMANDS = {
    "train.py": train.main,
    "evaluate.py": evaluate.main,
    "predict.py": predict.main,
    "prepare.py": prepare.main,
    "data.py": data.main,
    "experiments.reproduce": reproduce.main,
    "experiments.benchmark": benchmark.main,
    "experiments.costs": costs.main,
    "experiments.claims": claims.main,
    "experiments.gpu_check": gpu_check.main,
    "experiments.probe": probe.main,
    "toy.pretrain": pretrain.main,
    "utils.report": bug_report.main,
}
NOT_OURS = {"venv", "FILE", "FOLDER.FILE"}  # python -m venv; placeholders
GIVEN_UP = "## What was given up for readable code"


# -------------------------------------------------------------------------------------- the README
def test_the_readme_is_at_most_ten_kilobytes():
    assert len(README.encode()) <= 10_000


def test_the_tree_lists_every_file_of_the_code_in_at_most_six_words():
    [tree] = re.findall(r"```\n(clip_model\.py .*?)```", README, re.S)
    paths = set()
    folder = ""
    for line in tree.splitlines():
        if line.endswith("/"):
            folder = line
            continue
        name, words = line.split(maxsplit=1)
        paths.add(folder + name if line.startswith("  ") else name)
        assert len(words.split()) <= 6, line
    assert paths == set(CODE)


def test_the_readmes_python_gives_a_mask(monkeypatch):
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["mask"].dtype == bool
    assert names["mask"].shape == names["image"].shape[:2]
    assert names["mask"].any()


# --------------------------------------------------------------------------------- links and names
def heading_anchors(text):
    """The anchors that GitHub gives to a page's headings."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        heading = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(heading.replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_image_leads_somewhere(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in heading_anchors(file.read_text(encoding="utf-8")), target


def test_every_page_of_docs_is_reached_from_the_readme():
    reached = set(re.findall(r"\]\(docs/(\w+\.md)", README))
    assert reached == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_every_page_that_the_code_names_exists():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for text in [*CODE.values(), *(path.read_text(encoding="utf-8") for path in notebooks)]:
        for page in re.findall(r"docs/\w+\.(?:md|svg)", text):
            assert (ROOT / page).exists(), page


def test_every_test_that_is_quoted_exists():
    quoted = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values())))
    existing = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        existing |= set(re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8")))
    assert len(quoted) > 40
    assert quoted <= existing, quoted - existing


def test_every_file_that_is_quoted_exists():
    for page, text in PAGES.items():
        for name in re.findall(
            r"`((?:tests|results|toy|methods|experiments|utils)/[^`\s]*)`", text
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_every_name_of_the_table_of_equations_is_in_the_code():
    """`Bridge.zoom_in` is a class Bridge, and a zoom_in that is defined or set on self."""
    code = "\n".join(CODE.values())
    page = PAGES["docs/architecture.md"]
    table = page[page.index("| paper | what") : page.index("## Looking inside")]
    rows = [row.split("|") for row in table.strip().splitlines()[2:] if row.startswith("|")]
    names = [name for row in rows for name in re.findall(r"`([\w./]+)`", row[3])]
    assert len(names) > 25
    for name in names:
        if name in CODE:
            continue
        for part in name.split("."):
            module = re.search(rf"(^|/){part}(\.py|/)", "\n".join(CODE), re.M)
            defined = rf"(class|def) {part}\b|self\.{part}\b"
            assert module or re.search(defined, code), name


# ----------------------------------------------------------------------------------------- imports
def imported_files(path):
    """Files of the project that a file imports anywhere, and those it imports within functions."""
    tree = ast.parse(CODE[path])
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    everywhere = set()
    within = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        files = {f"{name.replace('.', '/')}.py" for name in names} & set(CODE)
        everywhere |= files
        if id(node) in inner:
            within |= files
    return everywhere, within


def test_imports_go_downwards_and_utils_knows_nothing_but_utils():
    """Files whose imports are placed already are placed in turn; a circle would never be."""
    waiting = {}
    for path in CODE:
        waiting[path], within = imported_files(path)
        assert not within, f"{path} imports {within} within a function"
        if path.startswith("utils/"):
            assert all(name.startswith("utils/") for name in waiting[path]), path
    while waiting:
        placed = {path for path, names in waiting.items() if not names & set(waiting)}
        assert placed, f"a circle of imports among {sorted(waiting)}"
        waiting = {path: names for path, names in waiting.items() if path not in placed}


# ---------------------------------------------------------------------------------------- commands
class Captured(Exception):
    """Carries the parser out of a command that was about to parse."""


def parser_of(main, monkeypatch):
    def capture(parser, *args, **options):
        raise Captured(parser)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", capture)
        with pytest.raises(Captured) as caught:
            main([])
    return caught.value.args[0]


def quoted_commands(text):
    """Every `python …` and `torchrun …` of a page, as lists of words from the file on."""
    text = text.split(GIVEN_UP)[0]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = spans + [line for block in blocks for line in block.splitlines()]
    for line in lines:
        for command in line.split(" && "):
            match = re.match(r"(?:python3? (?:-m )?|torchrun --nproc_per_node \w+ )(\S.*)", command)
            if match:
                yield shlex.split(match.group(1), comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_command_is_one_that_its_parser_takes(page, monkeypatch):
    for name, *arguments in quoted_commands(PAGES[page]):
        if name in NOT_OURS:
            continue
        if name.startswith(("tests/slow/", "docs.")):
            path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
            source = path.read_text(encoding="utf-8")
            for option in arguments:
                assert not option.startswith("--") or f'"{option}"' in source, (name, option)
            continue
        parser = parser_of(COMMANDS[name], monkeypatch)
        if "--help" in arguments:
            continue
        _, unknown = parser.parse_known_args(arguments)
        if name == "experiments.reproduce":  # hands the options that it does not know to train.py
            _, unknown = parser_of(train.main, monkeypatch).parse_known_args(unknown)
            assert arguments[0] in reproduce.TABLES or arguments[0] == "counts", arguments
        assert not unknown, (name, unknown)
        if name == "train.py":
            train.arguments(arguments)


def all_actions(parser):
    """A parser's actions and those of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from all_actions(subparser)


def test_every_option_that_is_named_alone_belongs_to_a_command(monkeypatch):
    known = set()
    for main in COMMANDS.values():
        for action in all_actions(parser_of(main, monkeypatch)):
            known |= set(action.option_strings)
    for page, text in PAGES.items():
        for option in re.findall(r"`(--[a-z-]+)[ `]", text.split(GIVEN_UP)[0]):
            assert option in known, f"{page}: {option}"


def test_every_option_has_a_help_text(monkeypatch):
    for name, main in COMMANDS.items():
        for action in all_actions(parser_of(main, monkeypatch)):
            assert action.help, (name, action.dest)


# ----------------------------------------------------------------------------------------- drawing
def test_the_drawing_is_what_its_script_draws():
    for path, svg in draw_etris.files().items():
        assert path.read_text(encoding="utf-8") == svg
    assert draw_methods.SVG.read_text(encoding="utf-8") == draw_methods.draw()
    for part in draw_etris.PARTS:
        drawn = draw_etris.draw(part).split("</style>")[1]
        assert "faded" in drawn and "kept" in drawn


@pytest.fixture(scope="module", params=["tiny", "RN101"])
def shapes(request):
    """A model's name, and the shapes that its activations really have, without the batch."""
    size = draw_etris.SHAPES[request.param]["image"][1]
    model = build_model(request.param, size=size, weights="random", seed=0).eval()
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output

        return hook

    bridge = model.bridger["0"]
    hooks = [
        bridge.register_forward_hook(keep("bridge")),
        model.hierarchical_alignment.register_forward_hook(keep("hierarchical_alignment")),
    ]
    images = torch.zeros(1, 3, size, size)
    tokens = tokenize(["the red circle"], model.max_tokens)
    activations = model.activations(images, tokens)
    for hook in hooks:
        hook.remove()
    visual, text = seen["bridge"][2]
    seen = activations | {
        "hierarchical_alignment": seen["hierarchical_alignment"],
        "previous.visual": visual,
        "previous.text": text,
    }
    with torch.no_grad():
        seen["visual.stem"] = model.clip.visual.stem(images)
        seen["text.stem"] = model.clip.stem(tokens)
        maps, _, _ = model.encode(images, tokens)
    seen["visual.head"] = maps[2]
    for i in range(3):
        seen[f"visual{i}"] = activations[f"visual{i}.after"]
        seen[f"text{i}"] = activations[f"text{i}.after"]
    seen["image"] = images
    return request.param, {name: tuple(value.shape) for name, value in seen.items()}


def test_the_drawings_shapes_are_the_models(shapes):
    name, seen = shapes
    for key, shape in draw_etris.SHAPES[name].items():
        assert seen[key][1:] == shape, key


def test_the_table_of_activations_has_the_models_keys_and_shapes(shapes):
    name, seen = shapes
    page = PAGES["docs/architecture.md"]
    table = page[page.index("| key | shape") : page.index("## How the files")]
    rows = [row.split("|") for row in table.strip().splitlines()[2:] if row.startswith("|")]
    assert len(rows) == 9
    for row in rows:
        keys = re.findall(r"`([^`]+)`", row[1])
        written = re.findall(r"\(([\d, ]+)\)", row[2])
        wanted = [tuple(int(n) for n in shape.split(",")) for shape in written]
        for number, key in enumerate(keys):
            assert key in seen
            if name == "RN101":
                assert seen[key] == wanted[min(number, len(wanted) - 1)], key


# ----------------------------------------------------------------------------------------- figures
def test_the_results_are_those_of_the_records():
    """Every 12.3 ± 4.5 of the results stands in a table of results/, which the commands write."""
    records = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("results/*.md"))
    text = PAGES["docs/results.md"]
    text = (
        text[: text.index("## Defaults that differ")] + text[text.index("## The paper's tables") :]
    )
    found = re.findall(r"[+−]?\d+\.\d\d ± \d+\.\d\d", text)
    assert len(found) > 70
    for figure in found:
        assert figure.replace("−", "-").lstrip("+") in records, figure


def test_the_question_is_the_one_of_the_record():
    text = PAGES["docs/results.md"].replace("−", "-")
    record = (ROOT / "results" / "question.md").read_text(encoding="utf-8")
    gains = re.findall(r"^\| [\w, ]+ \| ([+-]\d+\.\d\d) \| (\S+) to (\S+) \|", record, re.M)
    assert len(gains) == 9
    for mean, low, high in gains:
        assert f"| {mean} | {low} to {high} |" in text
