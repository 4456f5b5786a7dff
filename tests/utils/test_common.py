"""What `utils/common.py` promises: whose commit a run states, how it ends, text that is UTF-8."""

import ast
import shutil
import subprocess

import pytest
import torch

from utils import common
from utils.common import ROOT, UserError, command, git_commit

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="there is no git")


# ------------------------------------------------------------------------------------- provenance
def git(folder, *words) -> str:
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    line = ["git", *name, *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder) -> str:
    """A repository with one file → its commit."""
    folder.mkdir(parents=True)
    (folder / "x.py").write_text("1\n", encoding="utf-8")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", f"of {folder.name}")
    return git(folder, "describe", "--always")


def commit_of(folder, monkeypatch) -> str:
    monkeypatch.setattr(common, "ROOT", folder)
    return git_commit()


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    """train.py ended after building the model."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path, monkeypatch) == "unknown"


@needs_git
def test_the_commit_is_this_repositorys_dirty_or_not_in_a_worktree_too(tmp_path, monkeypatch):
    own = repository(tmp_path / "own")
    assert commit_of(tmp_path / "own", monkeypatch) == own
    git(tmp_path / "own", "worktree", "add", "--quiet", "--detach", str(tmp_path / "tree"))
    assert commit_of(tmp_path / "tree", monkeypatch) == own
    (tmp_path / "tree" / "x.py").write_text("2\n", encoding="utf-8")
    assert commit_of(tmp_path / "tree", monkeypatch) == f"{own}-dirty"


@needs_git
def test_another_repositorys_commit_is_never_stated(tmp_path, monkeypatch):
    """A ZIP inside another repository; a .git that is none; a hook of another repository."""
    other = repository(tmp_path / "other")
    own = repository(tmp_path / "own")
    assert own != other
    copy = tmp_path / "other" / "copy"
    copy.mkdir()
    assert commit_of(copy, monkeypatch) == "unknown"
    (copy / ".git").mkdir()
    assert commit_of(copy, monkeypatch) == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert commit_of(tmp_path / "own", monkeypatch) == own


# --------------------------------------------------------------------------------------- processes
def test_torchruns_group_is_left_wherever_a_command_ends(tmp_path, capsys):
    """Data or weights may be missing, which is said after the processes have met."""

    @command
    def main(argv=None):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        raise UserError("no data")

    with pytest.raises(SystemExit):
        main()
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr().err == "error: no data\n"


# ------------------------------------------------------------------------------------- text files
def test_text_is_opened_as_utf_8_everywhere():
    """Where nothing is said it is the system's encoding, on Windows cp1252 or gbk."""
    folders = [ROOT, *(ROOT / name for name in ("utils", "methods", "toy", "experiments"))]
    silent = []
    for path in [path for folder in folders for path in sorted(folder.glob("*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            is_builtin = name == "open" and isinstance(call.func, ast.Name)
            texts = [word.value for word in ast.walk(call) if isinstance(word, ast.Constant)]
            is_binary = any(text in ("rb", "wb", "ab") for text in texts)
            says = "encoding" in {word.arg for word in call.keywords}
            if (is_builtin and not is_binary) or name in ("read_text", "write_text"):
                silent += [] if says else [f"{path.name}:{call.lineno}"]
    assert silent == []
