"""experiments/gpu_check.py without a GPU: it says so; on a CPU its table has every row."""

import pytest
import torch

from experiments import gpu_check
from experiments.gpu_check import Row, run_check


def test_without_a_gpu_it_is_one_line_and_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert "no GPU on this machine" in error and "--device cpu" in error


def test_on_a_cpu_the_table_has_its_rows(monkeypatch, capsys):
    """Tiny, two objects a step: what can be right on a CPU passes; rates have nothing to reach."""
    monkeypatch.setattr(gpu_check, "CPU_OBJECTS", 2)
    monkeypatch.setattr(gpu_check, "PHOTO_SIDE", 64)
    gpu_check.main(["--device", "cpu", "--batch-size", "2", "--seconds", "0"])
    title, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("no GPU, torch ") and "tiny, 128 pixels, 2 objects a step" in title
    assert head == "| check | found | wanted | |"
    rows = {}
    for line in lines:
        _, what, found, wanted, verdict, _ = [cell.strip() for cell in line.split("|")]
        rows[what] = (found, wanted, verdict)
    assert rows["two --deterministic runs"] == ("0.0e+00 apart", "0", "PASS")
    for what in ("a batch in shared memory", "--amp fp16", "allocated, fast"):
        assert rows[what][2] == "PASS", rows
    for what in ("a step, plain", "a step, fast", "evaluation", "loading, 0 workers"):
        assert rows[what][2] == "" and rows[what][0].endswith("/s"), rows
    assert {"--amp auto", "mIoU in bf16 and in float32", "allocated, --recompute"} <= set(rows)


def test_a_check_that_fails_is_a_row():
    """A GPU that is too small for plain costs one row, not the table."""

    def memory(bench):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    [row] = run_check(memory, None)
    assert str(row).startswith("| memory | OutOfMemoryError: CUDA out of memory. Tried")
    assert str(row).endswith("| DIFFERS |")
    assert str(Row("a", "b", "c", True)) == "| a | b | c | PASS |"
