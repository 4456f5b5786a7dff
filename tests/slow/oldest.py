"""The oldest versions that requirements.txt allows, tried: a virtual environment with exactly them, and the tests.

    python tests/slow/oldest.py --python python3.10 --room /tmp/oldest [tests/test_etris.py …]    →  results/oldest.json

Downloads about 3 GB the first time (torch 2.6 for Linux brings CUDA) and needs 7 GB in the folder --room.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def oldest() -> list[str]:
    """requirements.txt with every lower bound made exact."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [line.replace(">=", "==") for line in lines if not line.startswith("#")]


def install(python, room) -> Path:
    """The environment's own python; what is there already is taken as it is."""
    room.mkdir(parents=True, exist_ok=True)
    own, bounds = room / "venv" / "bin" / "python", room / "oldest.txt"
    bounds.write_text("\n".join(oldest()) + "\n")
    if not own.exists():
        subprocess.run([python, "-m", "venv", room / "venv"], check=True)
    pip = [own, "-m", "pip", "install", "-q", "--no-cache-dir", "-r", HERE / "requirements-test.txt", "-c", bounds]
    subprocess.run(pip, check=True)
    return own


def test(own, file) -> dict:
    """One test file's closing line, and what failed."""
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", file]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"file": file, "status": done.returncode, "says": re.sub(r" in .*", "", lines[-1].strip("= ")),
            "failed": failed}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="(all of tests/)")
    parser.add_argument("--python", default=sys.executable, help="the oldest Python that is at hand")
    parser.add_argument("--room", type=Path, required=True, metavar="DIR", help="for the environment")
    args = parser.parse_args()
    own = install(args.python, args.room.resolve())
    files = args.tests or sorted(str(path.relative_to(HERE)) for path in (HERE / "tests").glob("test_*.py"))
    python = subprocess.run([own, "--version"], capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "describe", "--always"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    result = {"command": f"python tests/slow/oldest.py --python {Path(args.python).name}", "commit": commit,
              "versions": [python, *oldest()], "tests": []}  # fmt: skip
    for file in files:
        result["tests"].append(test(own, file))
        print(result["tests"][-1], flush=True)
        (HERE / "results" / "oldest.json").write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any(row["status"] for row in result["tests"]))


if __name__ == "__main__":
    main()
