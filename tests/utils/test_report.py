"""What a bug report needs is printed, and nothing that says whose machine it is."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from conftest import write_refer
from utils.common import ROOT
from utils.report import main


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "somebodys-data"
    write_refer(folder)
    return folder


def test_versions_device_and_counts_are_printed(data, capsys):
    main(["--data", str(data)])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert f"numpy {numpy.__version__}" in out
    assert f"Python {platform.python_version()}" in out
    assert f"{os.cpu_count()} cores" in out
    size = (data / "refcoco" / "refs(unc).p").stat().st_size
    assert f"refcoco/refs(unc).p: {size:,} bytes" in out
    assert "images/train2014: 4 images" in out
    assert "etris-tiny.pt" in out


def test_without_data_the_count_is_zero(tmp_path, capsys):
    main(["--data", str(tmp_path / "none")])
    assert "data: images/train2014: 0 images" in capsys.readouterr().out


def test_no_path_no_user_and_no_host_is_printed(data):
    """As a process of its own, whose user has a name that could not stand there by chance."""
    names = ("USER", "LOGNAME", "USERNAME")
    environment = {**os.environ, **dict.fromkeys(names, "jemandanders"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "utils.report", "--data", str(data)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    host = platform.node()
    secrets = ["jemandanders", "somebodys-data", str(ROOT), str(Path.home()), sys.prefix]
    for secret in [*secrets, host] if len(host) > 3 else secrets:
        assert secret not in done.stdout, secret
    assert not re.search(r"(^|\s)(~|/|[A-Za-z]:\\)\S*", done.stdout, re.M)
