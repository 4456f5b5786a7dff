"""Would the tests notice? Make one small change in the code at a time; its tests must fail.

    python tests/slow/mutants.py --room /tmp/mutants          a row in results/mutants.json each

The list of changes is read off the syntax trees: comparisons (< becomes <=, == becomes !=),
constants (a number one larger or half as large again, True becomes False), axes (dim= one further),
signs (+ becomes −, · becomes /, −x becomes x) and what cuts gradients off (detach, no_grad,
requires_grad_). --count of them are drawn by --seed.

The folder --room holds the commit of the first start; later starts bring in only newer tests, go on
where the results end, and try again what survived, unless its row says `why` it may: that is
written in by hand. Results of another commit are replaced.
"""

import argparse
import ast
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = {  # file: the test files that must notice
    "clip_model": ["test_clip_model", "methods/test_published"],
    "etris": ["test_etris", "methods/test_published"],
    "data": ["test_data", "robustness/test_fuzz"],
    "evaluate": ["test_evaluate", "robustness/test_fuzz"],
    "train": ["test_train", "test_distributed"],
    "checkpoint": ["test_checkpoint", "test_train"],
}
OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
CUTS = ("detach", "no_grad", "inference_mode", "requires_grad_")
SLICE = 10  # seconds from one look at the running tests to the next


# ----------------------------------------------------------------------------------------- changes
def changed(node, axis=False):
    """(kind, the node that replaces it), or None where there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        operators = [OTHER[type(node.ops[0])](), *node.ops[1:]]
        return "comparison", ast.Compare(node.left, operators, node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        return "sign", ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return "sign", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return "constant", ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        larger = node.value + 1 if isinstance(node.value, int) else node.value * 1.5 or 0.5
        return "axis" if axis else "constant", ast.Constant(larger)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("detach", "requires_grad_"):
            return "detach", node.func.value
        if node.func.attr in CUTS:
            return "detach", ast.parse("torch.enable_grad()", mode="eval").body
    return None


def nodes(tree) -> list:
    """(parent, field, index or None, node, is an axis) of what is no f-string or annotation."""
    found = []

    def visit(parent, axis):
        if isinstance(parent, ast.JoinedStr):
            return
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST):
                    continue
                is_axis = isinstance(parent, ast.keyword) and parent.arg in ("dim", "axis")
                found.append((parent, field, index, node, axis or is_axis))
                visit(node, axis or is_axis)

    visit(tree, False)
    return found


def changeable(tree) -> list:
    return [row for row in nodes(tree) if changed(row[3], row[4]) is not None]


def mutant(source, number) -> tuple:
    """The source with its change `number`, and what that is: line, kind, before, after."""
    tree = ast.parse(source)
    parent, field, index, node, axis = changeable(tree)[number]
    kind, new = changed(node, axis)
    is_expression = hasattr(parent, "lineno") and not isinstance(parent, ast.stmt)
    shown = parent if is_expression else node
    before = ast.unparse(shown)
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new
    after = ast.unparse(shown if is_expression else new)
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno, kind, before, after


def catalogue(room) -> list[tuple]:
    """(file, number of the change) of everything that can be changed."""
    found = []
    for name in TESTS:
        tree = ast.parse((room / f"{name}.py").read_text())
        found += [(name, number) for number in range(len(changeable(tree)))]
    return found


# ------------------------------------------------------------------------------------------- tests
def run(command, room, seconds) -> tuple:
    """Exit status, output, and whether somebody stopped everything meanwhile.

    The status is None where there was no end within so many seconds of CPU, or 20 times as many.
    """

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    wide = os.environ | {"COLUMNS": "200"}  # for pytest's last lines
    process = subprocess.Popen(
        command,
        cwd=room,
        env=wide,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )
    paused = False
    before = time.time()
    for _ in range(20 * seconds // SLICE):
        try:
            output = process.communicate(timeout=SLICE)[0]
        except subprocess.TimeoutExpired:
            output = None
        paused = paused or time.time() - before > 3 * SLICE
        before = time.time()
        if output is not None:
            endless = process.returncode in (-signal.SIGKILL, -signal.SIGXCPU)
            return None if endless else process.returncode, output, paused
    os.killpg(process.pid, signal.SIGKILL)
    return None, process.communicate()[0], paused


def first_failure(room, name, seconds=600) -> str | None:
    """The first failing test of a file's tests (why is printed), "no end", or None: all pass.

    Some tests wait some seconds for a process: where everything was stopped meanwhile, once more.
    """
    for tests in TESTS[name]:
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command = [*pytest, f"tests/{tests}.py"]
        status, output, paused = run(command, room, seconds)
        while status != 0 and paused:
            status, output, paused = run(command, room, seconds)
        if status is None:
            return "no end"
        if status:
            lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(lines[0] if lines else output[-2000:], flush=True)
            return lines[0].split(" - ")[0][:200] if lines else f"exit status {status}"
    return None


def attempt(room, name, number) -> dict:
    """Make the change, run the tests, undo it."""
    path = room / f"{name}.py"
    whole = path.read_text()
    source, line, kind, before, after = mutant(whole, number)
    try:
        path.write_text(source)
        caught = first_failure(room, name)
    finally:
        path.write_text(whole)
    return {
        "file": name,
        "number": number,
        "line": line,
        "kind": kind,
        "before": before,
        "after": after,
        "caught": caught,
    }


# -------------------------------------------------------------------------------------------- room
def prepare(room):
    """The tree as it was last committed, unless one is there already, with the newest tests."""
    if not (room / "train.py").exists():
        room.mkdir(parents=True, exist_ok=True)
        archive = ["git", "archive", "HEAD"]
        tree = subprocess.run(archive, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", room], input=tree, check=True)
        describe = ["git", "describe", "--always"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout
        (room / "commit").write_text(commit)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", room / "tests", ignore=ignore, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", room)


def earlier_rows(path, commit) -> dict:
    """The rows of an earlier start with the same commit, by file and number."""
    if not path.exists():
        return {}
    file = json.loads(path.read_text())
    if file["commit"] != commit:
        return {}
    return {(row["file"], row["number"]): row for row in file["mutants"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", type=Path, required=True, metavar="DIR", help="for a copy of the project"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    parser.add_argument("--count", type=int, default=60, help="how many changes (60)")
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "results" / "mutants.json",
        metavar="FILE",
        help="gets a row of each change (results/mutants.json)",
    )
    args = parser.parse_args()

    prepare(args.room)
    commit = (args.room / "commit").read_text().strip()
    rows = earlier_rows(args.json, commit)
    every = catalogue(args.room)
    for name, number in random.Random(args.seed).sample(every, args.count):
        row = rows.get((name, number))
        if row is not None and (row["caught"] or "why" in row):
            continue
        rows[name, number] = attempt(args.room, name, number)
        if row is not None:
            rows[name, number]["survived_older_tests"] = True
        print(rows[name, number], flush=True)
        result = {
            "command": "python tests/slow/mutants.py --room DIR "
            f"--seed {args.seed} --count {args.count}",
            "commit": commit,
            "possible": len(every),
            "tried": len(rows),
            "caught": sum(bool(row["caught"]) for row in rows.values()),
            "mutants": list(rows.values()),
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    survivors = {row["file"] for row in rows.values() if not row["caught"]}
    for name in set(TESTS) - survivors:  # a survivor shows that they pass
        assert first_failure(args.room, name) is None, f"the tests of {name} fail without a change"


if __name__ == "__main__":
    main()
