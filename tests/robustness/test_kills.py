"""Five kills at random moments, each with a --resume, end where an undisturbed run does."""

import json
import os
import subprocess
import sys

import pytest

from utils.common import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks, which this system cannot")
def test_killed_five_times_and_resumed_is_bit_for_bit_the_run_straight_through(tmp_path):
    """Weights, optimizer, random states, best score, log, result. SIGINT and SIGTERM save."""
    script = ROOT / "tests" / "slow" / "kills.py"
    outcome = tmp_path / "kills.json"
    options = ["--kills", "5", "--steps", "4", "--seed", "3", "--json", str(outcome)]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(outcome.read_text())
    assert len(result["kills"]) == 5 and result["runs"] >= 1 and result["differences"] == []
