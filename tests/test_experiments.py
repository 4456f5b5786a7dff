"""10. experiments.py: each configuration runs once, rows are comparable, nothing is lost, the arithmetic is right."""

import fcntl
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import benchmark
import experiments
import scenes
import train
from experiments import Below, chosen_rows, main, run_arguments
from settings import PRESETS
from tables import TABLES, against, count_tuned, counts, differences, interval, markdown, spread

FAST = ["--weights", "random", "--limit", "6", "--size", "64", "--batch-size", "4", "--device", "cpu"]


def run(folder, table, *more):
    """The command itself, two steps a run → its results file."""
    main([table, "--steps", "2", "--results", str(folder / "results"), *FAST, *more])
    return json.loads((folder / "results" / f"{table}.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """table6, two rows, two seeds."""
    folder = tmp_path_factory.mktemp("table")
    return folder, run(folder, "table6", "--seeds", "2", "--rows", "without GA", "ETRIS")


def test_the_results_file_holds_what_design_promises(finished):
    folder, file = finished
    keys = {
        "row",
        "seed",
        "steps",
        "seconds",
        "command",
        "commit",
        "hardware",
        "oIoU",
        "mIoU",
        "Pr@0.5",
        "tuned",
        "rate",
    }
    assert file["version"] == 1 and all(keys <= set(run) for run in file["runs"])
    assert [(run["row"], run["seed"]) for run in file["runs"]] == [
        ("without GA", 0), ("without GA", 1), ("ETRIS", 0), ("ETRIS", 1)]  # fmt: skip
    assert {run["steps"] for run in file["runs"]} == {2} and {run["split"] for run in file["runs"]} == {"test"}
    assert sum(kind["sentences"] for kind in file["runs"][0]["kinds"].values()) == file["runs"][0]["sentences"]
    text = (folder / "results" / "table6.md").read_text()
    assert "| without GA | 62.21 (71.51 / 53.41 / 11.16) |" in text and "2 steps, 2 seeds" in text
    assert (folder / "results" / "table6.png").stat().st_size > 5000
    assert not list((folder / "results" / ".unfinished").iterdir())


def test_the_rate_is_the_best_of_three_on_val_with_the_first_seed(finished):
    folder, file = finished
    store = json.loads((folder / "results" / "runs.json").read_text())["runs"].values()
    for row, tuning in (("without GA", "bridger+no-ga"), ("ETRIS", "bridger")):
        tried = [one for one in store if one["config"]["tuning"] == tuning and one["seed"] == 0]
        assert sorted(one["rate"] for one in tried) == pytest.approx([0.000667, 0.002, 0.006])
        best = max(one["val"]["mIoU"] for one in tried)
        chosen = [one for one in file["runs"] if one["row"] == row]
        assert chosen[0]["val"]["mIoU"] == best and {one["rate"] for one in chosen} == {chosen[0]["rate"]}


def test_an_identical_configuration_runs_once_and_serves_every_table(finished, monkeypatch):
    """The full ETRIS is a row of tables 2, 4, 5 and 6: once it is there, the others only look it up."""
    folder, file = finished
    monkeypatch.setattr(experiments, "run_once", lambda *_: pytest.fail("was trained again"))
    for table, row in (("table4", "2->n, 3"), ("table5", "conv & deconv"), ("table2", "ETRIS")):
        again = run(folder, table, "--seeds", "2", "--rows", row)["runs"]
        assert [one["mIoU"] for one in again] == [one["mIoU"] for one in file["runs"] if one["row"] == "ETRIS"]


def test_what_differs_is_another_configuration():
    args = SimpleNamespace(small=True, backbone="tiny", dataset="scenes", steps=2)
    rows = {row.name: row for table in ("table2", "table4", "table7") for row in TABLES[table][1]}
    known = set()
    for row in rows.values():
        for rate, seed in ((0.001, 0), (0.002, 0), (0.001, 1)):
            own = run_arguments(row, args, FAST, rate, seed)
            known.add(json.dumps(experiments.configuration(own, row), sort_keys=True))
    same = {"ETRIS", "2->n, 3", f"d = {PRESETS['tiny']['width']}"}
    assert len(known) == 3 * (len(rows) - len(same & set(rows)) + 1)


def test_data_that_changed_under_the_same_name_is_another_configuration(monkeypatch):
    args = train.arguments([*FAST, "--steps", "2"])
    before = experiments.configuration(args, TABLES["table6"][1][3])
    experiments.open_split.cache_clear()
    for colour in scenes.COLOURS:
        monkeypatch.setitem(scenes.COLOURS, colour, (9, 9, 9))
    after = experiments.configuration(args, TABLES["table6"][1][3])
    experiments.open_split.cache_clear()
    assert {key for key in before if before[key] != after[key]} == {"data"}


def test_rows_see_the_same_batches_in_the_same_order(tmp_path, monkeypatch):
    seen, real = {}, train.step

    def spy(run, batch):
        seen.setdefault((run.args.tuning, run.args.lr), []).append((batch["ref_id"].tolist(), batch["sentence"]))
        return real(run, batch)

    monkeypatch.setattr(train, "step", spy)
    run(tmp_path, "table6", "--seeds", "1", "--lr", "0.001", "--rows", "without HA", "without Bridger")
    first, second = seen.values()
    assert first == second and len(first) == 2


@pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
def test_what_lies_below_the_first_bridge_is_computed_once_and_equal(backbone, tmp_path):
    """Shared or not: the same loss and the same weights after three steps; each picture goes through the stem once."""
    args = train.arguments([*FAST, "--backbone", backbone, "--out", str(tmp_path)])
    args.workers, below, outcomes = 0, Below(), []
    source, bar = experiments.sources(args)[0], SimpleNamespace(set_postfix=lambda **_: 0, update=lambda: 0)
    bar.format_dict = {"rate": 1}
    for shared in (False, True, True):
        train.seed_all(0)
        model = train.make_model(args, torch.device("cpu"))
        stem, calls = model.clip.visual.stem, []
        model.clip.visual.stem = lambda x, stem=stem, calls=calls: calls.append(len(x)) or stem(x)
        run = train.Run(args, model, torch.device("cpu"), torch.float32, 3)
        if shared:
            with below.shared_by(model):
                outcome = train.train_epoch(run, source, bar)
        else:
            outcome = train.train_epoch(run, source, bar)
        outcomes.append((outcome, model.projector.txt.weight.detach()))
    for outcome, weight in outcomes[1:]:
        assert outcome == pytest.approx(outcomes[0][0], rel=1e-5)
        assert torch.allclose(weight, outcomes[0][1], atol=1e-5)
    assert len(below.kept) == 4  # one epoch of 6 objects in fours is one batch


def test_a_model_that_learns_below_the_first_bridge_is_left_alone_and_others_come_back_as_they_were():
    args, below = train.arguments(FAST), Below()
    images, tokens = torch.randn(2, 3, 64, 64), torch.tensor([[49406, 736, 49407, 0]] * 2)
    for how, touched in (("adapter", False), ("full", False), ("lora", True), ("coop+bridger", True)):
        args.tuning = how
        model = train.make_model(args, torch.device("cpu")).eval()
        with torch.no_grad():
            plain = model(images, tokens)
            with below.shared_by(model):
                assert ("stem" in vars(model.clip.visual)) == touched
                assert torch.allclose(model(images, tokens), plain, atol=1e-5)
            assert "stem" not in vars(model.clip.visual) and torch.equal(model(images, tokens), plain)
    assert len(below.kept) == 2


def test_an_interrupted_table_goes_on_where_it_stood(tmp_path, monkeypatch, capsys):
    """SIGTERM in the second run's second step: the first run stands in the file, the second waits and goes on."""
    real, calls = train.step, []

    def interrupted(run, batch):
        calls.append(run.args.lr)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batch)

    monkeypatch.setattr(train, "step", interrupted)
    more = ("--seeds", "1", "--rows", "without Bridger", "--steps", "3")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "table6", *more)
    assert stop.value.code == 130 and len(calls) == 4 and "the same command goes on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results" / "runs.json").read_text())["runs"]) == 1
    whole = run(tmp_path, "table6", *more)["runs"][0]
    assert calls.count(calls[3]) == 3 and len(calls) == 9  # three runs of three steps, none of them twice
    other = run(tmp_path / "other", "table6", *more)["runs"][0]
    assert (whole["mIoU"], whole["oIoU"], whole["val"]) == (other["mIoU"], other["oIoU"], other["val"])


def test_rows_run_one_by_one_make_the_whole_table(finished, tmp_path):
    """A later call with --rows keeps the comparable rows there are, in the table's order, and drops others."""
    folder, file = finished
    path = tmp_path / "results" / "table6.json"
    path.parent.mkdir()
    other = file["runs"][0] | {"row": "without Bridger", "config": file["runs"][0]["config"] | {"steps": 9}}
    path.write_text(json.dumps(file | {"runs": [*file["runs"], other]}))
    runs = run(tmp_path, "table6", "--seeds", "1", "--lr", "0.001", "--rows", "without HA")["runs"]
    assert [one["row"] for one in runs] == ["without HA", "without GA", "without GA", "ETRIS", "ETRIS"]


def refused(capsys, folder, *command):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([*command, "--results", str(folder), *FAST])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_unknown_tables_and_rows_name_those_there_are(tmp_path, capsys):
    assert "table2, table4, table5" in refused(capsys, tmp_path, "table9")
    assert "without HA; without Bridger" in refused(capsys, tmp_path, "table6", "--rows", "without hands")


def test_what_a_tables_rows_and_seeds_decide_cannot_be_given(tmp_path, capsys):
    """Else three seeds would be one and the same, and rows what they do not say."""
    for given in (["--seed", "4"], ["--seed=4"], ["--tuning", "lora"], ["--system", "detris"]):
        assert f"{given[0]}: the table's rows and seeds decide" in refused(capsys, tmp_path, "table6", *given)
    assert not (tmp_path / "runs.json").exists()


def test_systems_of_other_steps_are_not_comparable_in_miniature(tmp_path, monkeypatch):
    """At full size each has its preset's; in miniature an older, shorter row leaves the table."""
    monkeypatch.setattr(experiments, "costs", lambda *_: {})
    more = ("--seeds", "1", "--lr", "0.001", "--rows")
    run(tmp_path, "systems", *more, "ETRIS, ViT")
    runs = run(tmp_path, "systems", "--steps", "1", *more, "fix backbone, ViT")["runs"]
    assert [one["row"] for one in runs] == ["fix backbone, ViT"]


def test_a_results_file_of_another_version_is_left_alone(tmp_path, capsys):
    for content, said in (('{"version": 7, "runs": {}}', "version 7, this code writes 1"), ("[", "no results file")):
        (tmp_path / "runs.json").write_text(content)
        assert said in refused(capsys, tmp_path, "table6")
        assert (tmp_path / "runs.json").read_text() == content


def test_a_second_process_on_the_same_results_is_refused(tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process writes there" in refused(capsys, tmp_path, "table6")
    assert not (tmp_path / "runs.json").exists()


def test_at_full_size_the_command_is_the_papers_run(refer_tree):
    """One rate, the preset's; its epochs; RefCOCO's val, which the paper's tables are on."""
    args = SimpleNamespace(small=False, backbone="RN101", dataset="refcoco", steps=None)
    more = ["--data", str(refer_tree)]
    row = chosen_rows("table6", ["ETRIS"])[0]
    own = run_arguments(row, args, more)
    assert (own.size, own.lr, own.steps) == (416, 1e-4, 50) and experiments.rates(row, args, more) == [1e-4]
    assert [source.split for source in experiments.sources(own)] == ["train", "val", "val"]
    systems = {row.name: run_arguments(row, args, more).backbone for row in TABLES["systems"][1]}
    assert (systems["ETRIS, ViT"], systems["BarLeRIa"], systems["DETRIS"]) == ("ViT-B-16", "ViT-B-16", "dinov2-base")


def test_options_that_go_to_train_are_not_taken_for_short_ones_of_our_own(monkeypatch, tmp_path, refer_tree):
    """--data DIR is no short --dataset: it reaches train.py's own arguments."""
    seen = []
    monkeypatch.setattr(experiments, "run_table", lambda name, args, more: seen.append((args, more)) or [])
    monkeypatch.setattr(experiments, "report", lambda file: "")
    given = ["--backbone", "RN101", "--dataset", "refcoco", "--data", str(refer_tree)]
    main(["table6", *given, "--results", str(tmp_path)])
    [(args, more)] = seen
    assert (args.dataset, args.seeds, more) == ("refcoco", 3, ["--data", str(refer_tree)])


@pytest.mark.parametrize("given, count", [([], 3), (["--lr", "0.01"], 1), (["--lr=0.01"], 1)])
def test_a_given_rate_is_the_only_one_tried(given, count):
    args = SimpleNamespace(small=True, backbone="tiny", dataset="scenes", steps=2)
    assert len(experiments.rates(chosen_rows("table6", ["ETRIS"])[0], args, [*FAST, *given])) == count


def test_every_row_can_be_built_in_miniature():
    """But for the systems whose pre-trained tiny backbone is not random: there `--weights random` is what FAST says."""
    args = SimpleNamespace(small=True, backbone="tiny", dataset="scenes", steps=2)
    for title, rows in TABLES.values():
        assert title and len({row.name for row in rows}) == len(rows)
        for row in rows:
            own = run_arguments(row, args, FAST)
            model = train.make_model(own, torch.device("cpu"), **row.build)
            assert 0 <= count_tuned(model, encoders=True) < count_tuned(model)


# ---- arithmetic
def test_the_paired_interval_by_hand():
    """Differences 1 2 3 4 5: mean 3, standard deviation 1.5811, standard error 0.7071, t(4) = 2.776: 3 ± 1.963."""
    found = interval([1, 2, 3, 4, 5])
    assert found["mean"] == 3 and found["sd"] == pytest.approx(1.5811, abs=1e-4)
    assert (found["low"], found["high"]) == (pytest.approx(1.037, abs=1e-3), pytest.approx(4.963, abs=1e-3))
    assert interval([2.5]) == {"mean": 2.5, "sd": None, "low": None, "high": None, "seeds": 1}


def one_run(row, seed, **kinds):
    """kinds: (sentences, mIoU)."""
    table = {kind: {"sentences": n, "mIoU": score} for kind, (n, score) in kinds.items()}
    return {"row": row, "seed": seed, "oIoU": 50.0 + seed, "mIoU": 40.0 + seed, "kinds": table}


def test_gains_are_paired_by_seed_and_pooled_by_sentences():
    """Relation: 10 sentences gain 6, order: 30 gain 2, together (60 + 60) / 40 = 3; attribute gains 1: 2 more."""
    without = [one_run("fix backbone", s, relation=(10, 20), order=(30, 10), attribute=(9, 60 + s)) for s in (0, 1)]
    bridged = [one_run("ETRIS", s, relation=(10, 26), order=(30, 12), attribute=(9, 61 + s)) for s in (0, 1)]
    found = differences(without + bridged)
    means = {what: x["mean"] for what, x in found.items()}
    assert means == pytest.approx({"oIoU": 0, "mIoU": 0, "relation": 6, "order": 2, "attribute": 1,
                                   "relation, order": 3, "relation, order less attribute": 2})  # fmt: skip
    assert found["attribute"]["sd"] == 0  # the seeds' own ups and downs cancel


def test_the_question_writes_its_intervals(tmp_path):
    file = run(tmp_path, "question", "--seeds", "2", "--lr", "0.001")
    assert file["difference"]["mIoU"]["seeds"] == 2 and "relation" in file["difference"]
    assert "95 % interval" in (tmp_path / "results" / "question.md").read_text()


def test_a_spread_is_the_standard_deviation_over_seeds(finished):
    assert spread([1.0, 3.0]) == "2.00 ± 1.41" and spread([2.0]) == "2.00"
    runs = finished[1]["runs"]
    gap = [a["mIoU"] - b["mIoU"] for a, b in zip(runs[:2], runs[2:], strict=True)]
    assert f"| {spread(gap)} |" in markdown("table6", runs)


def test_counts_prints_every_table_with_the_paper_beside():
    """SPEC 5.2's numbers, at RN101's real size; where ours differ the last column says why."""
    lines = [line.split(" | ") for line in counts().splitlines()[2:]]
    table = {(line[0].strip("| "), line[1]): (line[2], line[3]) for line in lines}
    assert table["5", "linear"] == ("5.77M", "5,766,641") and table["5", "MLP"] == ("1.68M", "1,682,633")
    assert table["5", "conv & interpolate"] == ("1.45M", "1,450,560") and table["4", "n->n, 1"][1] == "1,215,168"
    assert [table["7", f"d = {d}"][1] for d in (8, 16, 32, 64, 128)] == [
        "223,272", "450,384", "923,040", "1,942,080", "4,275,072"]  # fmt: skip
    assert table["8", "Conv Adapter + ETRIS"] == ("3.14M", "3,138,032") and table["2", "CoOp"][1] == "4,096"
    assert table["3", "RN101 decoder"] == ("23.98M", "24,244,225") and table["3", "ViT-B-16 Bridger"][1] == "598,592"
    for line in lines:
        unit = {"M": 1e6, "K": 1e3}[line[2][-1]]
        equal = abs(int(line[3].replace(",", "")) - float(line[2][:-1]) * unit) <= 0.0051 * unit
        assert equal or line[4].strip(" |"), line


# ---- three systems
def test_systems_are_compared_with_their_costs_and_what_was_published(tmp_path, monkeypatch):
    """Two rows, two steps: the file holds what a step, its memory and a sentence cost; the page shows the reviews'."""
    real = benchmark.take_turns
    monkeypatch.setattr(benchmark, "take_turns", lambda functions, seconds: real(functions, 0))
    file = run(tmp_path, "systems", "--seeds", "1", "--lr", "0.001", "--rows", "ETRIS, ViT", "BarLeRIa")
    assert list(file["costs"]) == ["ETRIS, ViT", "BarLeRIa"]
    for cost in file["costs"].values():
        assert cost["step"]["seconds"] > 0 and cost["sentence"]["rounds"] >= 3 and cost["memory_mb"] > 10
    assert file["costs"]["BarLeRIa"]["memory_mb"] > file["costs"]["ETRIS, ViT"]["memory_mb"]
    text = (tmp_path / "results" / "systems.md").read_text()
    assert "| 0.88 / 1.28 / 1.16 |" in text and "| ETRIS, ViT-B/16 | the same | 70.51 / 73.51 / 66.63 |" in text
    again = run(tmp_path, "systems", "--seeds", "1", "--lr", "0.001", "--rows", "ETRIS, ViT")
    assert list(again["costs"]) == [one["row"] for one in again["runs"]] == ["ETRIS, ViT", "BarLeRIa"]


def test_costs_are_compared_with_etris_own():
    """A step of 3 s against 2 s, as much memory, half the time to find: 1.50 / 1.00 / 0.50."""
    costs = {"ETRIS, ViT": (2, 5, 8), "other": (3, 5, 4)}
    assert against(costs, "other") == "1.50 / 1.00 / 0.50" and against({"other": (3, 5, 4)}, "other") == "–"
