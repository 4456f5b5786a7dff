"""Would the tests notice? One small change at a time in the code, and the tests of its file must fail.

    python tests/slow/mutants.py --room /tmp/mutants          →  results/mutants.json, a row as each is done; goes on

The list of changes is read off the syntax trees: comparisons (< becomes <=, == becomes !=), constants (a number one
larger or half as large again, True becomes False), axes (dim= one further), signs (+ becomes −, · becomes /, −x becomes
x) and what cuts gradients off (detach, no_grad, requires_grad_). --count of them are drawn by --seed. The folder --room
holds the commit of the first start; later starts bring in only newer tests and try again what survived, unless its row
says `why` it may: that is written in by hand.
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

HERE = Path(__file__).resolve().parents[2]
TESTS = {"clip_model": ["clip_model", "official"], "etris": ["etris", "official"], "data": ["data", "fuzz"],
         "evaluate": ["evaluate", "fuzz"], "train": ["train", "numbers", "parallel"]}  # fmt: skip
OTHER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub,
         ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}  # fmt: skip
LOOK = 10  # seconds of the clock
CUTS = ("detach", "no_grad", "inference_mode", "requires_grad_")


def changed(node, axis=False):
    """(kind, the node that replaces it), or None where there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        return "comparison", ast.Compare(node.left, [OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        return "sign", ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return "sign", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return "constant", ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        larger = node.value + 1 if isinstance(node.value, int) else node.value * 1.5 or 0.5
        return "axis" if axis else "constant", ast.Constant(larger)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CUTS:
        if node.func.attr in ("detach", "requires_grad_"):
            return "detach", node.func.value
        return "detach", ast.parse("torch.enable_grad()", mode="eval").body
    return None


def places(tree) -> list:
    """(parent, field, index or None, node, axis?) of every node that is no part of an f-string or an annotation."""
    found = []

    def visit(parent, axis):
        for field, value in ast.iter_fields(parent):
            if isinstance(parent, ast.JoinedStr) or field in ("annotation", "returns"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST):
                    there = axis or isinstance(parent, ast.keyword) and parent.arg in ("dim", "axis")
                    found.append((parent, field, index, node, there))
                    visit(node, there)

    visit(tree, False)
    return found


def mutant(source, number) -> tuple:
    """The source with its change `number`, and what that is: (source, line, kind, before, after)."""
    tree = ast.parse(source)
    parent, field, index, node, axis = [place for place in places(tree) if changed(place[3], place[4])][number]
    kind, new = changed(node, axis)
    whole = parent if hasattr(parent, "lineno") and not isinstance(parent, ast.stmt) else node
    line, before = node.lineno, ast.unparse(whole)
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new
    after = ast.unparse(whole if whole is parent else new)
    return ast.unparse(ast.fix_missing_locations(tree)), line, kind, before, after


def catalogue(room) -> list[tuple]:
    """(file, number of the change) of everything that can be changed."""
    counts = {}
    for name in TESTS:
        tree = ast.parse((room / f"{name}.py").read_text())
        counts[name] = sum(changed(place[3], place[4]) is not None for place in places(tree))
    return [(name, number) for name, count in counts.items() for number in range(count)]


def run(command, room, patience) -> tuple:
    """Exit status (None: no end after so many seconds of CPU, or twenty times as many), output, was it stopped?"""

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))

    wide = os.environ | {"COLUMNS": "200"}  # for pytest's last lines
    process = subprocess.Popen(command, cwd=room, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, preexec_fn=limit)  # fmt: skip
    paused, before = False, time.time()
    for _ in range(20 * patience // LOOK):
        try:
            said = process.communicate(timeout=LOOK)[0]
        except subprocess.TimeoutExpired:
            said = None
        paused, before = paused or time.time() - before > 3 * LOOK, time.time()
        if said is not None:
            endless = process.returncode in (-signal.SIGKILL, -signal.SIGXCPU)
            return None if endless else process.returncode, said, paused
    os.killpg(process.pid, signal.SIGKILL)
    return None, process.communicate()[0], paused


def first_failure(room, name, patience=600) -> str | None:
    """The first failing test of a file's tests (why is printed), "no end", or None: all pass.

    Some tests wait for a process some seconds of the clock: where somebody stopped everything meanwhile, once more.
    """
    for tests in TESTS[name]:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]
        status, said, paused = run(command, room, patience)
        while status != 0 and paused:
            status, said, paused = run(command, room, patience)
        if status is None:
            return "no end"
        if status:
            lines = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(lines[0] if lines else said[-2000:], flush=True)
            return lines[0].split(" - ")[0][:200] if lines else f"exit status {status}"
    return None


def attempt(room, name, number) -> dict:
    path = room / f"{name}.py"
    whole = path.read_text()
    source, line, kind, before, after = mutant(whole, number)
    try:
        path.write_text(source)
        caught = first_failure(room, name)
    finally:
        path.write_text(whole)
    return {"file": name, "number": number, "line": line, "kind": kind, "before": before, "after": after,
            "caught": caught}  # fmt: skip


def prepare(room):
    """The tree as it was last committed, unless one is there already, with the newest tests."""
    if not (room / "train.py").exists():
        room.mkdir(parents=True, exist_ok=True)
        tree = subprocess.run(["git", "archive", "HEAD"], cwd=HERE, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", room], input=tree, check=True)
        commit = subprocess.run(["git", "describe", "--always"], cwd=HERE, capture_output=True, text=True).stdout
        (room / "commit").write_text(commit)
    shutil.copytree(HERE / "tests", room / "tests", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(HERE / "pyproject.toml", room)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "mutants.json")
    args = parser.parse_args()
    prepare(args.room)
    command = f"python tests/slow/mutants.py --room DIR --seed {args.seed} --count {args.count}"
    result = {"command": command, "commit": (args.room / "commit").read_text().strip(), "mutants": []}
    if args.json.exists():
        result = json.loads(args.json.read_text())
    every = catalogue(args.room)
    rows = {(row["file"], row["number"]): row for row in result["mutants"]}
    for name, number in random.Random(args.seed).sample(every, args.count):
        row = rows.get((name, number))
        if row is None or not row["caught"] and "why" not in row:
            rows[name, number] = attempt(args.room, name, number) | ({"survived_older_tests": True} if row else {})
            print(rows[name, number], flush=True)
            caught = sum(bool(row["caught"]) for row in rows.values())
            result |= {"possible": len(every), "tried": len(rows), "caught": caught, "mutants": [*rows.values()]}
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    for name in {*TESTS} - {row["file"] for row in rows.values() if not row["caught"]}:  # a survivor shows it as well
        assert first_failure(args.room, name) is None, f"the tests of {name} fail without any change"


if __name__ == "__main__":
    main()
