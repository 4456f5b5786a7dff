"""Try the oldest versions that requirements.txt allows: an environment of exactly them, the tests.

    python tests/slow/oldest.py --python python3.10 --room /tmp/oldest [tests/test_etris.py …]

Writes results/oldest.json. Downloads about 3 GB the first time (torch 2.6 for Linux brings CUDA)
and needs 7 GB in the folder --room.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def oldest() -> list[str]:
    """requirements.txt with every lower bound made exact."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line.replace(">=", "==") for line in lines if not line.startswith("#")]


def install(python, room) -> Path:
    """The environment's own python; what is there already stays."""
    room.mkdir(parents=True, exist_ok=True)
    own_python = room / "venv" / "bin" / "python"
    bounds = room / "oldest.txt"
    bounds.write_text("\n".join(oldest()) + "\n")
    if not own_python.exists():
        subprocess.run([python, "-m", "venv", room / "venv"], check=True)
    requirements = ["-r", ROOT / "requirements-test.txt", "-c", bounds]
    pip = [own_python, "-m", "pip", "install", "-q", "--no-cache-dir", *requirements]
    subprocess.run(pip, check=True)
    return own_python


def run_tests(own_python, file) -> dict:
    """One test file's closing line, and what failed."""
    pytest = [own_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", file]
    done = subprocess.run(pytest, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return {
        "file": file,
        "status": done.returncode,
        "says": re.sub(r" in .*", "", lines[-1].strip("= ")),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def test_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="test files (all of tests/)")
    parser.add_argument("--python", default=sys.executable, help="the oldest Python at hand")
    parser.add_argument(
        "--room", type=Path, required=True, metavar="DIR", help="for the environment"
    )
    args = parser.parse_args()

    own_python = install(args.python, args.room.resolve())
    version = subprocess.run([own_python, "--version"], capture_output=True, text=True)
    describe = ["git", "describe", "--always"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    result = {
        "command": f"python tests/slow/oldest.py --python {Path(args.python).name}",
        "commit": commit.stdout.strip(),
        "versions": [version.stdout.strip(), *oldest()],
        "tests": [],
    }
    for file in args.tests or test_files():
        row = run_tests(own_python, file)
        result["tests"].append(row)
        print(row, flush=True)
        (ROOT / "results" / "oldest.json").write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any(row["status"] for row in result["tests"]))


if __name__ == "__main__":
    main()
