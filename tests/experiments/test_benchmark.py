"""experiments/benchmark.py: fair turns, honest ladders, rows as they are promised."""

import json

import pytest
import torch

import train
from experiments import benchmark
from experiments.benchmark import Bench, StepOptions, interleave, make_ladder
from fast import FAST, FOLDED

CPU = torch.device("cpu")


@pytest.fixture
def bench():
    run_args = train.arguments(["--weights", "random", "--size", "32"])
    return Bench(run_args, CPU, batch_size=1)


def swapped(model) -> int:
    """How many of the model's methods fast.py has swapped."""
    return sum("attend" in vars(m) or "forward" in vars(m) for m in model.modules())


def test_the_ladder_leads_from_the_plain_path_to_what_training_does(bench):
    """No trick in the first variant, one more in each; on "fast" modules and layout of train.py."""
    ladder = make_ladder(bench.model, CPU)
    expected = swapped(train.make_model(bench.args, CPU))
    names = list(ladder)
    climb = [ladder[name] for name in names[: names.index("fast")]]
    assert climb[0] == StepOptions(torch.float32)
    assert [len(options.classes) for options in climb] == list(range(len(climb)))
    assert set(climb[-1].classes) <= {*FAST, *FOLDED}
    conv = bench.model.clip.visual.conv1

    bench.apply(ladder["fast"])
    assert swapped(bench.model) == expected > 0
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    bench.apply(ladder["plain"])
    assert swapped(bench.model) == 0 and conv.weight.is_contiguous()
    assert make_ladder(bench.model, CPU, compiled=True)["fast + compile"].compile


def test_no_rung_asks_a_gpu_for_a_format_that_it_only_emulates(bench, monkeypatch):
    """On a T4 the whole benchmark could end there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    ladder = make_ladder(bench.model, torch.device("cuda"))
    assert {rung.dtype for rung in ladder.values()} == {torch.float16}
    assert make_ladder(bench.model, CPU)["fast + bf16"].dtype is torch.bfloat16


def test_what_the_benchmark_measures_adds_up(bench):
    """The peak grows with the batch and is above the weights; a step takes time and moves none."""
    before = {name: x.clone() for name, x in bench.model.named_parameters()}
    options = make_ladder(bench.model, CPU)["fast"]
    assert bench.step(options) > 0
    few = bench.memory(options)
    many = Bench(bench.args, CPU, batch_size=4).memory(options)
    weights = sum(x.nbytes for x in bench.model.state_dict().values()) / 2**20
    assert weights < few < many
    assert all(torch.equal(x, before[name]) for name, x in bench.model.named_parameters())


def test_variants_take_turns_and_the_first_round_is_not_counted():
    order = []
    clock = iter(range(1000))

    def variant(name):
        def call():
            order.append(name)
            return next(clock)

        return call

    times = interleave({name: variant(name) for name in ("plain", "fast")}, seconds=0)
    assert order == ["plain", "fast"] * 4
    assert times["plain"] == {"seconds": 4, "quartiles": [3, 5], "rounds": 3}  # of 2, 4 and 6


def test_the_benchmark_prints_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    """`--backbone tiny --batch-size 2 --quick --json`, three rounds of everything."""
    real = benchmark.interleave
    monkeypatch.setattr(benchmark, "interleave", lambda functions, seconds: real(functions, 0))
    path = tmp_path / "b.json"
    options = ["--backbone", "tiny", "--batch-size", "2", "--quick", "--device", "cpu"]
    benchmark.main([*options, "--json", str(path)])
    rows = {row["row"]: row for row in json.loads(path.read_text())}
    step = rows["train_step"]
    assert step["speedup"] == pytest.approx(step["plain_seconds"] / step["seconds"])
    keys = {"backbone", "system", "device", "batch", "seconds", "plain_seconds", "speedup"}
    assert keys | {"quartiles", "rounds", "memory_mb", "plain_memory_mb"} <= set(step)
    assert (step["backbone"], step["batch"], step["rounds"]) == ("tiny", 2, 3)
    assert {"ladder: plain", "ladder: fast", "ladder: fast + bf16"} <= rows.keys()
    assert rows["ladder: plain"]["speedup"] == 1
    assert rows["machine"]["device"] == "cpu"
    assert 0 < rows["data"]["share"] < 100
    evaluation = rows["evaluation"]
    assert evaluation["speedup"] == pytest.approx(
        evaluation["plain_seconds"] / evaluation["seconds"]
    )
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in rows if name != "machine")
