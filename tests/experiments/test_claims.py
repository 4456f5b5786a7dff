"""experiments/claims.py: each verdict from hand-made results, and the table in the docs."""

import dataclasses
import json

import pytest

from experiments import claims
from experiments.claims import BEGIN, BEGIN_SHORT, END, Claim, Difference
from experiments.claims import claims as all_claims
from utils.common import ROOT


def over_seeds(low, high, seeds=5, paper=None):
    mean = (low + high) / 2
    return Difference("a − b", mean, low, high, seeds=seeds, steps=600, paper=paper)


def over_scenes(low, high):
    return Difference("a − b", (low + high) / 2, low, high)


def claim(*differences, one_model=(), one_decides=False):
    files = "table2"
    return Claim("it helps", "table 2", list(differences), files, "", one_model, one_decides)


NOT_RUN = Difference("a − b")


# -------------------------------------------------------------------------------------- the verdict
@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([over_seeds(0.1, 2)], "held"),
        ([over_seeds(-0.1, 2)], "not shown"),
        ([over_seeds(-2, -0.1)], "contradicted"),
        ([over_seeds(0.1, 2), over_seeds(1, 3)], "held"),
        ([over_seeds(0.1, 2), over_seeds(-1, 3)], "not shown"),
        ([over_seeds(0.1, 2), over_seeds(-3, -1)], "contradicted"),
        ([over_seeds(0.1, 2, seeds=2)], "not shown"),  # too few seeds
        ([over_seeds(-2, -1, seeds=2)], "not shown"),
        ([over_seeds(0.1, 2), NOT_RUN], "not shown"),
        ([over_seeds(-2, -1), NOT_RUN], "contradicted"),  # nothing can repair it
        ([Difference("a − b", 1.0, seeds=1)], "not shown"),  # one seed has no interval
        ([NOT_RUN], "not shown"),
        ([], "not shown"),
    ],
)
def test_a_verdict_follows_from_the_intervals_over_seeds(differences, verdict):
    assert claim(*differences).verdict() == verdict


def test_one_model_decides_nothing_but_whether_it_fails():
    one = [over_scenes(1, 2)]
    assert claim(one_model=one).verdict() == "not shown"
    assert claim(one_model=one, one_decides=True).verdict() == "held"
    assert claim(one_model=[over_scenes(-2, -1)], one_decides=True).verdict() == "contradicted"
    assert claim(one_model=[over_scenes(-2, 1)], one_decides=True).verdict() == "not shown"
    assert claim(over_seeds(1, 2), one_model=[over_scenes(-2, -1)]).verdict() == "held"


def test_a_difference_of_two_versions_decides_only_where_it_is_large():
    """A version of torch changes a run by a point: an interval must lie beyond two."""
    near = dataclasses.replace(over_seeds(-1.7, -0.2), mixed=True)
    far = dataclasses.replace(over_seeds(4.9, 7.6), mixed=True)
    assert claim(near).verdict() == "not shown"
    assert claim(dataclasses.replace(near, mixed=False)).verdict() == "contradicted"
    assert claim(far).verdict() == "held"
    assert "two versions" in claim(near).here(short=False)


# ---------------------------------------------------------------------------------------- the cells
def test_a_row_prints_numbers_seeds_steps_and_what_was_not_run():
    both = claim(over_seeds(0.96, 2, paper=0.59), over_seeds(-0.04, 4, paper=3.33))
    assert both.paper() == "+0.59 … +3.33 (table 2)"
    full = "a − b +1.5 (+1.0 … +2.0); a − b +2.0 (+0.0 … +4.0): 5 seeds, 600 steps"
    assert both.here(short=False) == full
    assert both.here(short=True) == "a − b +1.5 (+1.0 … +2.0): 5 seeds"
    behind = claim(over_seeds(-9, 1), over_seeds(-3, -1))
    assert behind.here(short=True).startswith("a − b −2.0 (")  # what decides
    assert claim().here(short=True) == "not run yet"
    waiting = claim(NOT_RUN, one_model=[over_scenes(-2, 1)])
    assert waiting.here(short=False) == "a − b not run yet. a − b −0.5 (−2.0 … +1.0): one model"
    assert waiting.here(short=True) == "−0.5 (−2.0 … +1.0): one model"
    assert waiting.paper() == "table 2"


# --------------------------------------------------------------------------------- from the results
def write_runs(folder, table, **scores):
    """results/TABLE.json with a run for each score of each row."""
    runs = []
    for row, values in scores.items():
        for seed, score in enumerate(values):
            runs.append({"row": row.replace("_", " "), "seed": seed, "steps": 600, "mIoU": score})
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{table}.json").write_text(json.dumps({"runs": runs}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    return tmp_path


def verdicts():
    return {claim.text: claim.verdict() for claim in all_claims()}


def test_without_results_nothing_is_shown_and_nothing_raises(folder):
    assert set(verdicts().values()) == {"not shown"}
    assert all("not run yet" in claim.here(short=False) for claim in all_claims())


def test_differences_are_paired_by_seed_and_carry_the_papers_number(folder):
    """40 and 45 against 39 and 43, and 50 against 48: gains 1, 2, 2 about 1.67; t(2) = 4.303."""
    write_runs(folder, "question", fix_backbone=[39, 43, 48], ETRIS=[40, 45, 50])
    [x] = claims.less("question", "ETRIS", "fix backbone")
    half = 4.303 * (1 / 3) ** 0.5 / 3**0.5
    assert (x.mean, x.seeds, x.steps) == (pytest.approx(5 / 3), 3, 600)
    assert x.high - x.mean == pytest.approx(half, abs=1e-3)
    assert x.paper == pytest.approx(3.33)
    assert verdicts()["the Bridger helps"] == "held"


def test_new_rows_of_the_question_appear_and_decide(folder):
    write_runs(folder, "question", ETRIS=[50, 51, 52], mute=[50, 52, 51])
    text = "encoders exchange information, which helps"
    assert verdicts()[text] == "not shown"
    write_runs(folder, "question", ETRIS=[50, 51, 52], mute=[47, 48.1, 49.1])
    assert verdicts()[text] == "held"
    write_runs(folder, "question", ETRIS=[50, 51, 52], mute=[53, 54.1, 55.1])
    assert verdicts()[text] == "contradicted"


def test_traffic_of_the_questions_etris_counts_over_seeds(folder):
    """Drops of 1, 2 and 3 points; Δt with another image was not measured, and is not listed."""
    runs = []
    for drop in (1.0, 2.0, 3.0):
        traffic = [{"row": "none", "drop": 9.0}, {"row": "other sentence", "drop": drop}]
        runs.append({"row": "ETRIS", "steps": 600, "mIoU": 50.0, "traffic": traffic})
    (folder / "results").mkdir()
    (folder / "results" / "question.json").write_text(json.dumps({"runs": runs}))
    [found] = claims.traffic_over_seeds()
    assert (found.mean, found.seeds, found.steps) == (2.0, 3, 600)
    assert found.low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)


def test_a_longer_run_of_a_pair_is_preferred(folder):
    write_runs(folder, "table2", ETRIS=[30, 30, 30], CoOp=[36, 37, 38], LoRA=[20, 21, 22])
    write_runs(folder, "question", ETRIS=[50, 50, 50], CoOp=[45, 46, 47])
    coop, lora = claims.less("question table2", "ETRIS", "CoOp", "LoRA")
    assert coop.mean == 4
    assert lora.mean == 9


def test_the_order_of_table_6_needs_every_link(folder):
    rows = {"without_HA": [10, 11, 12], "without_GA": [20, 21, 22.5]}
    write_runs(folder, "table6", **rows, without_Bridger=[30, 31, 32], ETRIS=[40, 41, 42.5])
    text = "HA matters most, then GA, then the Bridger"
    assert verdicts()[text] == "held"
    write_runs(folder, "table6", **rows, without_Bridger=[15, 16, 17], ETRIS=[40, 41, 42.5])
    assert verdicts()[text] == "contradicted"


# ------------------------------------------------------------------------------------ the documents
def test_a_page_is_renewed_between_its_markers_and_nowhere_else():
    page = f"before\n\n{BEGIN}\nold\n{END}\nbetween\n{BEGIN_SHORT}\nold\n{END}\nafter\n"
    renewed = claims.with_tables(page, [claim(over_seeds(1, 2))])
    assert "old" not in renewed
    assert renewed.startswith("before\n\n") and renewed.endswith(f"{END}\nafter\n")
    full, short = renewed.split("between")
    assert "`results/table2.json`" in full and "`results/table2.json`" not in short
    assert full.count("| held |") == short.count("| held |") == 1
    assert claims.with_tables(renewed, [claim(over_seeds(1, 2))]) == renewed
    assert claims.with_tables("no markers", []) == "no markers"


@pytest.mark.parametrize("page", claims.PAGES)
def test_the_tables_of_claims_are_what_results_give(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert claims.with_tables(text, all_claims()) == text, "python -m experiments.claims --write"


def test_the_page_of_results_holds_the_whole_table():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"{BEGIN}\n{claims.table_of(all_claims())}\n{END}" in text


def test_every_claim_names_a_section_and_files_that_exist():
    for claim in all_claims():
        for name in claim.files.split():
            assert (ROOT / "results" / f"{name}.json").exists()
        if claim.notebook:
            number, section = claim.notebook.split(", ")
            [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            prose = "\n".join("".join(cell["source"]) for cell in cells)
            assert f"\n## {section} " in prose, (path.name, section)
