"""Five kills at random moments, each followed by --resume, end where an undisturbed run does (tests/slow/kills.py)."""

import json
import os
import subprocess
import sys

import pytest

from clip_model import HERE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks, which this system cannot")
def test_killed_five_times_and_resumed_is_bit_for_bit_the_run_straight_through(tmp_path):
    """Weights, Adam, rates, random states, best score, log and result; SIGINT and SIGTERM save and exit with 130."""
    script, outcome = HERE / "tests" / "slow" / "kills.py", tmp_path / "kills.json"
    command = [sys.executable, str(script), "--kills", "5", "--steps", "4", "--seed", "3", "--json", str(outcome)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(outcome.read_text())
    assert len(result["kills"]) == 5 and result["runs"] >= 1 and result["differences"] == []
