"""experiments/costs.py: a roofline and a peak that can be added up by hand, arms that cost less."""

import json
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments import costs
from experiments.costs import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    LiveStorages,
    Roofline,
    computed,
    measured,
    table,
)
from experiments.tables import ETRIS, FIX_BACKBONE, QUESTION

CPU = torch.device("cpu")
TEXT_ONLY = next(row for row in QUESTION if row.name == "text only")


def test_a_kernel_takes_the_larger_of_its_arithmetic_and_its_traffic():
    """A large product is arithmetic, 2 n³; a sum is traffic, two numbers read and one written."""
    n = 4096
    with FakeTensorMode(), Roofline() as roofline:
        a = torch.empty(n, n)
        before = roofline.seconds
        _ = a @ a
        product = roofline.seconds - before
        _ = a.T  # a view costs nothing
        _ = a + a
        addition = roofline.seconds - before - product
    assert product == pytest.approx(2 * n**3 / FLOPS_PER_SECOND)
    assert addition == pytest.approx(3 * 4 * n**2 / BYTES_PER_SECOND)


def test_the_peak_is_that_of_what_lives_at_one_time():
    """Views share their storage; what is dropped no longer counts."""
    with FakeTensorMode(), LiveStorages() as live:
        a = torch.empty(1000)
        b = a + 1
        c = b.view(10, 100)
        del b, c
        d = a + 1
        del d
    assert live.peak == 2 * 4000
    assert live.total == 4000
    del a


def test_text_only_costs_less_than_etris_and_more_than_no_bridger():
    """No gradient passes the image encoder, so none of its activations are kept."""
    rows = {row["row"]: row for row in computed((FIX_BACKBONE, ETRIS, TEXT_ONLY))}
    frozen, etris, text_only = (rows[name] for name in ("fix backbone", "ETRIS", "text only"))
    assert etris["of_etris"] == 1
    for cost in ("seconds", "memory_mb"):
        assert frozen[cost] < text_only[cost] < 0.85 * etris[cost]


def test_the_arms_take_turns_and_are_compared_with_etris(monkeypatch):
    order = []
    step = costs.Bench.step

    def spy(bench, options):
        order.append(bench.args.tuning)
        return step(bench, options)

    monkeypatch.setattr(costs.Bench, "step", spy)
    rows = measured("tiny", 1, CPU, rounds=2, rows=(ETRIS, TEXT_ONLY))
    assert order[:6] == ["bridger", "bridger+text-only"] * 3
    assert rows[0]["of_etris"] == 1
    assert rows[1]["memory_mb"] < rows[0]["memory_mb"]
    assert "| text only |" in table(rows)


def test_the_command_writes_every_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(costs, "on_paper", partial(costs.on_paper, backbone="tiny"))  # sooner
    monkeypatch.setattr(costs.computed, "__defaults__", ((ETRIS,),))
    path = tmp_path / "costs.json"
    costs.main(["--computed", "--json", str(path)])
    machine, etris = json.loads(path.read_text())
    assert machine["commit"]
    assert etris["row"] == "ETRIS"
    assert "computed, A100: RN101, batch 32" in capsys.readouterr().out
