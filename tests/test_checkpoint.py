"""checkpoint.py: a model from plain values, files that load safely, and only where they belong."""

import pickle

import pytest
import torch

from checkpoint import (
    VERSION,
    TrainState,
    build_model,
    load_checkpoint,
    read_checkpoint,
    restore_trainable,
    same_dataset,
    save_checkpoint,
)
from config import DEFAULT_BACKBONES, OWN_BACKBONES, PRESETS
from utils.common import ROOT, UserError


class Args:
    """Stands in for the command line that a checkpoint keeps."""

    def __init__(self):
        self.seed = 0


def saved(path, **options):
    model = build_model("tiny", weights="random", size=64, **options)
    save_checkpoint(path, model, Args())
    return model


@pytest.mark.parametrize("system", PRESETS)
def test_the_config_of_a_model_builds_its_twin(system):
    """Names, shapes and settings; a checkpoint carries nothing else about its model."""
    torch.manual_seed(0)
    model = build_model(DEFAULT_BACKBONES[system], system=system, weights="random", size=64)
    torch.manual_seed(0)
    twin = build_model(**model.config)
    assert twin.config == model.config and twin.system == system
    ours, theirs = model.state_dict(), twin.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_checkpoint_gives_the_same_logits(tmp_path):
    model = saved(tmp_path / "a.pt", tuning="bridger+adapter").eval()
    again = load_checkpoint(tmp_path / "a.pt")
    images = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[49406, 736, 49407, 0], [49406, 320, 736, 49407]])
    with torch.no_grad():
        assert torch.equal(model(images, tokens), again(images, tokens))
    assert not again.training


def test_a_checkpoint_never_holds_a_frozen_tensor(tmp_path):
    model = saved(tmp_path / "a.pt")
    stored = read_checkpoint(tmp_path / "a.pt")["tuned"]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and not set(frozen) & set(stored)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(trainable) <= set(stored)


def test_without_the_word_bridger_there_is_no_bridge():
    assert len(build_model("tiny", weights="random", size=64, tuning="coop").bridger) == 0
    assert len(build_model("tiny", weights="random", size=64, tuning="coop+bridger").bridger) == 3


WRONG = {
    "unknown system": ({"system": "cris"}, "unknown --system 'cris'"),
    "another system's backbone": ({"system": "detris"}, "--system detris with --backbone tiny"),
    "a system without its own modules": (
        {"system": "barleria", "backbone": "tiny-vit", "tuning": "lora"},
        "barleria always trains its own modules: write bridger+lora",
    ),
    "too many tokens": ({"max_tokens": 78}, "--words 78: choose 3 to 24"),
    "too few tokens": ({"max_tokens": 2}, "--words 2: choose 3 to 24"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_built_is_said(case):
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        build_model(**{"backbone": "tiny", "weights": "random", "size": 64, **options})


def test_a_file_of_another_version_is_refused(tmp_path):
    saved(tmp_path / "a.pt")
    file = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**file, "version": VERSION - 1}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"version {VERSION - 1}, this code reads {VERSION}"):
        read_checkpoint(tmp_path / "a.pt")


def test_another_frozen_backbone_is_refused(tmp_path):
    saved(tmp_path / "a.pt")
    other = build_model("tiny", weights="random", size=64, seed=1)
    with pytest.raises(UserError, match="was trained on a frozen tiny"):
        restore_trainable(other, read_checkpoint(tmp_path / "a.pt"), "a.pt")


def test_a_tensor_of_another_shape_missing_or_not_finite_is_refused(tmp_path):
    model = saved(tmp_path / "a.pt")
    file = read_checkpoint(tmp_path / "a.pt")
    name = "bridger.0.linear_in.weight"
    broken = [torch.zeros(1), torch.full_like(file["tuned"][name], float("nan"))]
    for tensor in broken:
        with pytest.raises(UserError, match=f"1 tensors do not fit.*{name} first"):
            restore_trainable(model, {**file, "tuned": {**file["tuned"], name: tensor}}, "a.pt")
    fewer = {key: x for key, x in file["tuned"].items() if key != name}
    with pytest.raises(UserError, match=f"1 tensors do not fit.*{name} first"):
        restore_trainable(model, {**file, "tuned": fewer}, "a.pt")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = saved(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    model.bridger["0"].linear_in.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="bridger.0.linear_in.weight is not finite any more"):
        save_checkpoint(tmp_path / "a.pt", model, Args())
    assert (tmp_path / "a.pt").read_bytes() == before


class Attack:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_no_code_of_a_file_runs(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"version": VERSION, "config": Attack()}))
    torch.save({"version": VERSION, "config": Attack(), "tuned": {}}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=f"{name}.*give another checkpoint file"):
            read_checkpoint(tmp_path / name)
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_bug_of_ours_is_no_damaged_file(tmp_path, monkeypatch):
    """as_user_error catches what reading raises; a NameError is ours and stays a traceback."""
    saved(tmp_path / "a.pt")

    def broken(*args, **options):
        raise NameError("a bug")

    monkeypatch.setattr("checkpoint.apply_tuning", broken)
    with pytest.raises(NameError):
        load_checkpoint(tmp_path / "a.pt")


def test_the_state_of_a_run_counts_steps_and_epochs():
    state = TrainState()
    state.count_step(0.5)
    state.count_step(0.3)
    assert (state.global_step, state.batch_in_epoch, state.running_loss) == (2, 2, 0.8)
    state.next_epoch()
    assert (state.epoch, state.global_step) == (1, 2)
    assert (state.batch_in_epoch, state.running_loss) == (0, 0.0)


def test_a_run_may_be_moved_and_its_data_too(tmp_path, monkeypatch):
    """--dataset is compared by folders' names: spelled otherwise, elsewhere, in a mix."""
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "other", "x/plain"):
        (tmp_path / folder).mkdir(parents=True)
    assert same_dataset("scenes", "scenes") and not same_dataset("scenes", "scenes+")
    assert same_dataset("plain", "./plain") and same_dataset("plain", str(tmp_path / "plain"))
    assert same_dataset("/gone/plain", "plain") and same_dataset("C:\\data\\plain", "plain")
    assert same_dataset("plain,other", "./plain, ./other")
    assert not same_dataset("plain,other", "other,plain")  # the order decides the batches
    assert not same_dataset("plain", "other")
    assert not same_dataset("plain", "x/plain")  # both are here, and they differ


# ----------------------------------------------------------------------------------------- shipped
FILES = sorted((ROOT / "weights").glob("*.pt"))
SHIPPED = [path for path in FILES if path.stem not in OWN_BACKBONES]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_checkpoint_is_small_holds_no_folders_and_is_on_the_model_card(path):
    """Trained tensors in half precision where their values fit, without an optimizer."""
    file = read_checkpoint(path)
    assert file["training"] is None
    for x in file["tuned"].values():
        if x.dtype == torch.float32:
            assert x.abs().max() > torch.finfo(torch.float16).max
        else:
            assert x.dtype in (torch.float16, torch.int64)
    assert path.stat().st_size < 4_000_000
    assert not [value for value in file["args"].values() if str(value).startswith(("/", "\\"))]
    card = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in card
    assert not load_checkpoint(path).training
