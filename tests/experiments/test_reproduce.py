"""experiments/reproduce.py: each configuration runs once, rows are comparable, nothing is lost."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import train
from config import PRESETS
from experiments import reproduce
from experiments.cache import FrozenFeatureCache
from experiments.reproduce import choose_rows, main, make_run_args
from experiments.tables import TABLES, count_tuned, markdown, spread
from toy import scenes
from utils.common import seed_all

SMALL = ["--weights", "random", "--limit", "6", "--size", "64", "--batch-size", "4"]
SMALL += ["--device", "cpu"]
CPU = torch.device("cpu")


def run(folder, table, *options):
    """The command itself, two steps a run → its results file."""
    main([table, "--steps", "2", "--results", str(folder / "results"), *SMALL, *options])
    return json.loads((folder / "results" / f"{table}.json").read_text())


def miniature(**changes):
    """The arguments that `arguments` completes for a run in miniature."""
    values = {"miniature": True, "backbone": "tiny", "dataset": "scenes", "steps": 2}
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """table6, two rows, two seeds."""
    folder = tmp_path_factory.mktemp("table")
    return folder, run(folder, "table6", "--seeds", "2", "--rows", "without GA", "ETRIS")


def test_the_results_file_holds_what_design_promises(finished):
    folder, file = finished
    keys = {"row", "seed", "steps", "seconds", "command", "commit", "hardware"}
    keys |= {"oIoU", "mIoU", "Pr@0.5", "tuned", "rate"}
    assert file["version"] == 1 and all(keys <= set(one) for one in file["runs"])
    assert [(one["row"], one["seed"]) for one in file["runs"]] == [
        ("without GA", 0),
        ("without GA", 1),
        ("ETRIS", 0),
        ("ETRIS", 1),
    ]
    assert {one["steps"] for one in file["runs"]} == {2}
    assert {one["split"] for one in file["runs"]} == {"test"}
    first = file["runs"][0]
    assert sum(kind["sentences"] for kind in first["kinds"].values()) == first["sentences"]
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
        assert chosen[0]["val"]["mIoU"] == best
        assert {one["rate"] for one in chosen} == {chosen[0]["rate"]}


def test_an_identical_configuration_runs_once_and_serves_every_table(finished, monkeypatch):
    """The full ETRIS is a row of tables 2, 4, 5 and 6: once it is there, others look it up."""
    folder, file = finished
    monkeypatch.setattr(reproduce, "run_once", lambda *_: pytest.fail("was trained again"))
    expected = [one["mIoU"] for one in file["runs"] if one["row"] == "ETRIS"]
    for table, row in (("table4", "2->n, 3"), ("table5", "conv & deconv"), ("table2", "ETRIS")):
        again = run(folder, table, "--seeds", "2", "--rows", row)["runs"]
        assert [one["mIoU"] for one in again] == expected


@pytest.mark.parametrize("table", ["table2", "table4"])
def test_the_stored_runs_are_found_again(table, tmp_path, monkeypatch):
    """Nothing is trained where results/ has it, and the table comes out as it is stored."""
    results = reproduce.ROOT / "results"
    (tmp_path / "runs.json").write_text((results / "runs.json").read_text())
    monkeypatch.setattr(reproduce, "run_once", lambda *_: pytest.fail("was trained again"))
    main([table, "--results", str(tmp_path)])
    for name in (f"{table}.json", f"{table}.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text()


def test_what_differs_is_another_configuration():
    args = miniature()
    rows = {row.name: row for name in ("table2", "table4", "table7") for row in TABLES[name][1]}
    known = set()
    for row in rows.values():
        for rate, seed in ((0.001, 0), (0.002, 0), (0.001, 1)):
            run_args = make_run_args(row, args, SMALL, rate, seed)
            known.add(json.dumps(reproduce.configuration(run_args, row), sort_keys=True))
    same = {"ETRIS", "2->n, 3", f"d = {PRESETS['etris']['tiny'].width}"}
    assert len(known) == 3 * (len(rows) - len(same & set(rows)) + 1)


def test_data_that_changed_under_the_same_name_is_another_configuration(monkeypatch):
    run_args = train.arguments([*SMALL, "--steps", "2"])
    [row] = choose_rows("table6", ["ETRIS"])
    before = reproduce.configuration(run_args, row)
    reproduce.open_split.cache_clear()
    for color in scenes.COLORS:
        monkeypatch.setitem(scenes.COLORS, color, (9, 9, 9))
    after = reproduce.configuration(run_args, row)
    reproduce.open_split.cache_clear()
    assert {key for key in before if before[key] != after[key]} == {"data"}


def watch_steps(monkeypatch, before_step):
    """Call `before_step(model, batch, optimizer)` before each of train.py's steps."""
    real = train.train_step

    def train_step(model, batch, optimizer, *rest):
        before_step(model, batch, optimizer)
        return real(model, batch, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", train_step)


def rate_of(optimizer):
    return optimizer.param_groups[0]["initial_lr"]


def test_rows_see_the_same_batches_in_the_same_order(tmp_path, monkeypatch):
    seen = {}

    def note(model, batch, optimizer):
        key = (model.config["tuning"], rate_of(optimizer))
        seen.setdefault(key, []).append((batch["ref_id"].tolist(), batch["sentence"]))

    watch_steps(monkeypatch, note)
    options = ["--seeds", "1", "--lr", "0.001", "--rows", "without HA", "without Bridger"]
    run(tmp_path, "table6", *options)
    first, second = seen.values()
    assert first == second and len(first) == 2


class Bar:
    """Stands in for tqdm."""

    def update(self, steps=1):
        pass

    def set_postfix(self, **values):
        pass


@pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
def test_what_lies_below_the_first_bridge_is_computed_once_and_equal(
    backbone, tmp_path, monkeypatch
):
    """Shared or not: the same losses and weights after three steps; one stem for each image."""
    options = [*SMALL, "--backbone", backbone, "--steps", "3"]
    cache = FrozenFeatureCache()
    stop = SimpleNamespace(requested=False)
    losses = []
    real = train.train_step

    def train_step(*arguments):
        losses.append(real(*arguments))
        return losses[-1]

    monkeypatch.setattr(train, "train_step", train_step)
    outcomes = []
    for number, shared in enumerate((False, True, True)):
        run_args = train.arguments([*options, "--out", str(tmp_path / str(number))])
        run_args.workers = 0
        train_set, _, _ = reproduce.open_splits(run_args)
        seed_all(0)
        model = train.make_model(run_args, CPU, train_positions=False)
        losses.clear()
        arguments = (run_args, model, train_set, CPU, torch.float32, Bar(), stop)
        if shared:
            with cache.attached_to(model):
                reproduce.train_model(*arguments)
        else:
            reproduce.train_model(*arguments)
        outcomes.append((list(losses), model.projector.txt.weight.detach()))
    for other, weight in outcomes[1:]:
        assert other == pytest.approx(outcomes[0][0], rel=1e-5) and len(other) == 3
        assert torch.allclose(weight, outcomes[0][1], atol=1e-5)
    # three epochs of 6 objects in fours are three batches of the same six images
    assert 4 <= len(cache.features) <= 6


def test_a_cached_image_goes_through_the_stem_once(monkeypatch):
    run_args = train.arguments(SMALL)
    model = train.make_model(run_args, CPU, train_positions=False).eval()
    real = model.clip.visual.stem
    sizes = []

    def stem(images):
        sizes.append(len(images))
        return real(images)

    model.clip.visual.stem = stem
    images = torch.randn(3, 3, 64, 64)
    tokens = torch.tensor([[49406, 736, 49407, 0]] * 3)
    with torch.no_grad(), FrozenFeatureCache().attached_to(model):
        model(images[:2], tokens[:2])
        model(images, tokens)
    assert sizes == [2, 1]


def test_a_model_that_learns_below_the_first_bridge_is_left_alone_and_others_come_back():
    cache = FrozenFeatureCache()
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[49406, 736, 49407, 0]] * 2)
    cases = (("adapter", False), ("full", False), ("lora", True), ("coop+bridger", True))
    for tuning, is_served in cases:
        run_args = train.arguments([*SMALL, "--tuning", tuning])
        model = train.make_model(run_args, CPU).eval()
        before = [set(vars(module)) for module in model.modules()]
        with torch.no_grad():
            plain = model(images, tokens)
            with cache.attached_to(model):
                assert ("stem" in vars(model.clip.visual)) == is_served
                assert torch.allclose(model(images, tokens), plain, atol=1e-5)
            assert [set(vars(module)) for module in model.modules()] == before
            assert torch.equal(model(images, tokens), plain)
    assert len(cache.features) == 2


def test_an_interrupted_table_goes_on_where_it_stood(tmp_path, monkeypatch, capsys):
    """SIGTERM in the second run's second step: the first run stands, the second one goes on."""
    calls = []

    def interrupt(model, batch, optimizer):
        calls.append(rate_of(optimizer))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    watch_steps(monkeypatch, interrupt)
    options = ("--seeds", "1", "--rows", "without Bridger", "--steps", "3")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "table6", *options)
    assert stop.value.code == 130 and len(calls) == 4
    assert "the same command goes on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results" / "runs.json").read_text())["runs"]) == 1
    whole = run(tmp_path, "table6", *options)["runs"][0]
    assert calls.count(calls[3]) == 3 and len(calls) == 9  # three runs of three steps, none twice
    other = run(tmp_path / "other", "table6", *options)["runs"][0]
    assert (whole["mIoU"], whole["oIoU"], whole["val"]) == (
        other["mIoU"],
        other["oIoU"],
        other["val"],
    )


def test_a_table_interrupted_while_it_evaluates_stands_after_that_run(
    tmp_path, monkeypatch, capsys
):
    """The evaluation is finished, the run is kept, and no other one begins."""
    real = reproduce.evaluate

    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(reproduce, "evaluate", real)
        return real(*arguments, **options)

    monkeypatch.setattr(reproduce, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "table6", "--seeds", "1", "--rows", "ETRIS")
    assert stop.value.code == 130 and "goes on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results" / "runs.json").read_text())["runs"]) == 1


def test_rows_run_one_by_one_make_the_whole_table(finished, tmp_path):
    """A later call keeps the comparable rows there are, in the table's order, and drops others."""
    _, file = finished
    path = tmp_path / "results" / "table6.json"
    path.parent.mkdir()
    first = file["runs"][0]
    other = {**first, "row": "without Bridger", "config": {**first["config"], "steps": 9}}
    path.write_text(json.dumps({**file, "runs": [*file["runs"], other]}))
    options = ["--seeds", "1", "--lr", "0.001", "--rows", "without HA"]
    runs = run(tmp_path, "table6", *options)["runs"]
    names = ["without HA", "without GA", "without GA", "ETRIS", "ETRIS"]
    assert [one["row"] for one in runs] == names


def refused(capsys, folder, *command):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([*command, "--results", str(folder), *SMALL])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_unknown_tables_and_rows_name_those_there_are(tmp_path, capsys):
    assert "table2, table4, table5" in refused(capsys, tmp_path, "table9")
    line = refused(capsys, tmp_path, "table6", "--rows", "without hands")
    assert "without HA; without Bridger" in line


def test_what_a_tables_rows_and_seeds_decide_cannot_be_given(tmp_path, capsys):
    """Else three seeds would be one and the same, and rows what they do not say."""
    for given in (["--seed", "4"], ["--seed=4"], ["--tuning", "lora"], ["--system", "detris"]):
        line = refused(capsys, tmp_path, "table6", *given)
        assert f"{given[0]}: the table's rows and seeds decide" in line
    assert not (tmp_path / "runs.json").exists()


def test_systems_of_other_steps_are_not_comparable_in_miniature(tmp_path):
    """At full size each has its preset's; in miniature an older, shorter row leaves the table."""
    options = ("--seeds", "1", "--lr", "0.001", "--rows")
    run(tmp_path, "systems", *options, "ETRIS, ViT")
    runs = run(tmp_path, "systems", "--steps", "1", *options, "fix backbone, ViT")["runs"]
    assert [one["row"] for one in runs] == ["fix backbone, ViT"]
    text = (tmp_path / "results" / "systems.md").read_text()
    assert "| ETRIS, ViT-B/16 | the same | 70.51 / 73.51 / 66.63 |" in text


def test_a_results_file_of_another_version_is_left_alone(tmp_path, capsys):
    for content, said in (
        ('{"version": 7, "runs": {}}', "version 7, this code writes 1"),
        ("[", "no results file"),
    ):
        (tmp_path / "runs.json").write_text(content)
        assert said in refused(capsys, tmp_path, "table6")
        assert (tmp_path / "runs.json").read_text() == content


def test_at_full_size_the_command_is_the_papers_run(refer_tree):
    """One rate, the preset's; its epochs; RefCOCO's val, which the paper's tables are on."""
    args = miniature(miniature=False, backbone="RN101", dataset="refcoco", steps=None)
    options = ["--data", str(refer_tree)]
    [row] = choose_rows("table6", ["ETRIS"])
    run_args = make_run_args(row, args, options)
    assert (run_args.size, run_args.lr, run_args.steps) == (416, 1e-4, 50)
    assert reproduce.rates_of(row, args, options) == [1e-4]
    splits = [dataset.split for dataset in reproduce.open_splits(run_args)]
    assert splits == ["train", "val", "val"]
    backbones = {}
    for row in TABLES["systems"][1]:
        backbones[row.name] = make_run_args(row, args, options).backbone
    assert backbones["ETRIS, ViT"] == backbones["BarLeRIa"] == "ViT-B-16"
    assert backbones["DETRIS"] == "dinov2-base"


def test_options_that_go_to_train_are_not_taken_for_short_ones_of_our_own(
    monkeypatch, tmp_path, refer_tree
):
    """--data DIR is no short --dataset: it reaches train.py's own arguments."""
    seen = []
    monkeypatch.setattr(reproduce, "run_table", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(reproduce, "report", lambda file: "")
    given = ["--backbone", "RN101", "--dataset", "refcoco", "--data", str(refer_tree)]
    main(["table6", *given, "--results", str(tmp_path)])
    [(_, args, extra_args, _)] = seen
    assert (args.dataset, args.seeds) == ("refcoco", 3)
    assert extra_args == ["--data", str(refer_tree)]


@pytest.mark.parametrize("given, count", [([], 3), (["--lr", "0.01"], 1), (["--lr=0.01"], 1)])
def test_a_given_rate_is_the_only_one_tried(given, count):
    [row] = choose_rows("table6", ["ETRIS"])
    assert len(reproduce.rates_of(row, miniature(), [*SMALL, *given])) == count


def test_every_row_can_be_built_in_miniature():
    """But for the systems whose pre-trained tiny backbone is not random: SMALL says random."""
    for title, rows in TABLES.values():
        assert title and len({row.name for row in rows}) == len(rows)
        for row in rows:
            run_args = make_run_args(row, miniature(), SMALL)
            model = train.make_model(run_args, CPU, **row.build)
            assert 0 <= count_tuned(model, encoders=True) < count_tuned(model)


def test_the_question_writes_its_intervals(tmp_path):
    file = run(tmp_path, "question", "--seeds", "2", "--lr", "0.001")
    assert file["difference"]["mIoU"]["seeds"] == 2 and "relation" in file["difference"]
    assert "95 % interval" in (tmp_path / "results" / "question.md").read_text()


def test_a_difference_is_paired_by_seed(finished):
    runs = finished[1]["runs"]
    gap = [a["mIoU"] - b["mIoU"] for a, b in zip(runs[:2], runs[2:], strict=True)]
    assert f"| {spread(gap)} |" in markdown("table6", runs)
