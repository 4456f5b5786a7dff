"""Bad input: the real commands, fed with what must not be; one line that names it, status 2, every file as it was.

Each case is a process of its own. It forks from one that has imported torch already (multiprocessing's forkserver;
where there is none, it starts from nothing), runs the command's file as `python FILE …` would, and ends as it does.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  (imported once, for every child)
import pytest
import torch
from bad_files import CHECKPOINTS, FILES, LINES, MASKS, RUNS, TREES, build_checkpoints, build_world

import experiments  # noqa: F401
import prepare  # noqa: F401
import pretrain  # noqa: F401
from clip_model import HERE
from data import read_picture

FORK = "forkserver" in multiprocessing.get_all_start_methods()
TRAIN = "train.py --weights random --limit 4 --batch-size 4 --steps 1 --size 64 --device cpu --processes 1 --out run"
PREDICT = "predict.py run/best.pt --device cpu --text x --out o.png --mask m.png"
EVALUATE = "evaluate.py run/best.pt --device cpu --limit 2 --json r.json --csv r.csv --save-masks masks"


# ------------------------------------------------------------------------------------------------ real processes
def child(argv, folder, log, room):
    """`python FILE …` in `folder`, its output in log.out and log.err; no file may grow over `room` bytes."""
    os.chdir(folder)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = argv
    with limited(room):
        runpy.run_path(str(HERE / argv[0]), run_name="__main__")


@contextlib.contextmanager
def limited(room):
    """No file may grow over `room` bytes; afterwards it may again, for what measures the coverage."""
    if room is None:
        yield
        return
    import resource  # where there are no limits, this is missing

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """shell(argv, folder, room=None) -> exit status, what stood on stdout, on stderr."""
    context = multiprocessing.get_context("forkserver" if FORK else "spawn")
    log = tmp_path_factory.mktemp("log") / "log"
    with pytest.MonkeyPatch.context() as patch:  # what the server starts with, and all that forks from it
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        if FORK:
            context.set_forkserver_preload(["test_bad_input"])

        def run(argv, folder, room=None):
            argv = argv.split() if isinstance(argv, str) else argv
            process = context.Process(target=child, args=(argv, str(folder), str(log), room))
            process.start()
            process.join(600)
            process.kill()
            return process.exitcode, *(log.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))

        yield run


def snapshot(folder):
    """Every file and folder below, with size and time of the last write; of what a run left, its bytes too."""
    paths = {path: path.stat() for path in folder.rglob("*") if not path.name.startswith(".coverage")}
    kept = {path: path.read_bytes() for path in (folder / "run").glob("*")}
    return {path: (path.is_dir() or (stat.st_size, stat.st_mtime_ns), kept.get(path)) for path, stat in paths.items()}


@pytest.fixture(scope="module")
def world(shell, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    build_world(world)
    status, _, error = shell(TRAIN, world)
    assert status == 0 and error == "", error
    build_checkpoints(world)
    return world


# ------------------------------------------------------------------------------------------------ the cases
def listed(area, text, command="{}"):
    """Cases from lines `arguments → what the one line on stderr must name`."""
    pairs = [line.split(" → ") for line in text.strip().splitlines()]
    return {f"{area}: {given.strip()}": (command.format(given.strip()), says) for given, says in pairs}


def cases() -> dict:
    """Name → (command line, what the one line on stderr must name; … stands between two things)."""
    show, with_checkpoint = (
        "data.py show {} --out sheet.png",
        f"{PREDICT} --image photo.png".replace("run/best.pt", "{}"),
    )
    found = {f"own folder, {name}": (show.format(f"line-{name}"), "refs.jsonl line 2") for name in LINES}
    found |= {f"own folder, mask {name}": (show.format(f"mask-{name}"), "masks/0.png") for name in MASKS}
    for name in TREES:
        found[f"RefCOCO, {name}"] = show.format(f"refcoco --data tree-{name}"), TREES[name][0]
    for name, (_, says) in CHECKPOINTS.items():
        found[f"checkpoint, {name}"] = with_checkpoint.format(f"{name}.pt"), f"{name}.pt … {says}"
    for name in ("empty", "text", "code", "code-zip", "number", "other", "names", "official-like", "cut", "none"):
        found[f"checkpoint, file {name}"] = with_checkpoint.format(f"{name}.pt"), f"{name}.pt"
    for name, (_, says) in RUNS.items():
        found[f"resume, {name}"] = f"{TRAIN} --resume {name}.pt", f"{name}.pt … {says}"
    for name in ("empty", "code", "code-zip", "number", "other", "names", "cut", "none"):
        found[f"weights, file {name}"] = f"{TRAIN} --weights {name}.pt", f"{name}.pt"
    for name in (
        "empty.png",
        "text.png",
        "cut.png",
        "cut.jpg",
        "cut.gif",
        "bomb.png",
        "none.png",
        "drawing.svg",
        "hollow",
    ):
        found[f"picture, {name}"] = f"{PREDICT} --image {name}", name
    for name, text in {"empty": "", "blank": " \t\n", "control": "\x07\x1b", "no width": "\u200b\u200d"}.items():
        found[f"sentence, {name}"] = [*PREDICT.split(), "--image", "photo.png", "--text", text], "--text"
    return found | ARGUMENTS


ARGUMENTS = (
    listed(
        "train",
        """
        --steps 0 → --steps: 0
        --steps -1 → --steps: -1
        --steps 99999999999999999999 → 99999999999999999999
        --epochs 2 → --epochs 2
        --batch-size x → --batch-size: x
        --limit -3 → --limit: -3
        --lr nan → --lr nan
        --lr inf → --lr inf
        --dropout 1 → --dropout 1.0
        --dropout nan → --dropout nan
        --size 100 → picture size 100
        --size 32000000 → --size: 32000000
        --words 2 → --words 2
        --width 33 → width of 33
        --seed -1 → --seed: -1
        --seed 99999999999 → --seed: 99999999999
        --workers -1 → --workers: -1
        --workers 1000000 → --workers: 1000000
        --device gpu → --device
        --colour red → --colour
        --backbone RN7 → RN7
        --system sam → sam
        --system detris --backbone RN50 → RN50
        --tuning magic → magic
        --tuning lora+lora → lora
        --tuning bridger+frozen → bridger+frozen
        --dataset cococo → cococo
        --dataset scenes,cococo → cococo
        --dataset latin → latin/refs.jsonl
        --dataset refcoco --data tree-gone → COCO_train2014_000000000001.jpg
        --dataset refcoco --data photo.png → photo.png
        --out photo.png → photo.png
        --out photo.png/x → photo.png/x
        --resume run/last.pt --size 96 → --size 64
        --resume run/last.pt --tuning frozen → --tuning bridger
        --resume run/last.pt --system barleria --backbone tiny-vit → run/last.pt
        --resume run/best.pt → run/best.pt
        """,
        TRAIN + " {}",
    )
    | listed(
        "predict",
        """
        --threshold nan → --threshold nan
        --threshold 3 → --threshold 3
        --out x.jpg → x.jpg
        --out x.png --mask x.png → x.png
        --out photo.png → photo.png
        --mask photo.png/x.png → photo.png/x.png
        --probability own/images/0.png/p.png → own/images/0.png/p.png
        --device tpu → --device
        --weights none.pt → none.pt
        """,
        PREDICT + " --image photo.png {}",
    )
    | listed(
        "evaluate",
        """
        --split nosuch → nosuch
        --threshold nan → --threshold nan
        --batch-size 0 → --batch-size: 0
        --limit -1 → --limit: -1
        --workers -1 → --workers: -1
        --by colour → colour
        --dataset own --by kind → --by kind
        --dataset scenes,scenes+ → scenes,scenes+
        --dataset cut-picture --split train → cut-picture/images/1.png
        --dataset mask-grey --split train → mask-grey/masks/0.png
        --dataset cut-picture --split train --workers 1 → cut-picture/images/1.png
        --json photo.png/x → photo.png/x
        --csv own → own
        --json x --csv x → --json x
        --save-masks photo.png → photo.png
        """,
        EVALUATE + " {}",
    )
    | listed(
        "data",
        """
        show scenes --number 0 → --number: 0
        show scenes --number 1000000 → --number: 1000000
        show scenes --seed -1 → --seed: -1
        show scenes --split nosuch → nosuch
        show refcoco --data hollow → hollow/refcoco/instances.json
        show cut-picture → cut-picture/images/1.png
        show scenes --number 1 --out photo.png/x → photo.png/x
        hide scenes → hide
        """,
        "data.py {}",
    )
    | listed(
        "prepare",
        """
        cococo --data d → cococo
        refcoco --data d --workers 0 → --workers: 0
        refcoco → --data
        refcoco --data photo.png → photo.png
        refcoco --data tree-refs-code → tree-refs-code/refcoco
        """,
        "prepare.py {}",
    )
    | listed(
        "pretrain",
        """
        RN50 → RN50
        tiny --steps 0 → --steps: 0
        tiny --lr nan --out p.pt → --lr nan
        tiny --out nowhere/p.pt → nowhere/p.pt
        """,
        "pretrain.py {}",
    )
    | listed(
        "experiments",
        """
        table99 → table99
        table6 --seeds 0 → --seeds: 0
        table6 --rows nosuch → nosuch
        table6 --lr nan → --lr nan
        table6 --colour red → --colour red
        table6 --results photo.png → photo.png
        """,
        "experiments.py --results res {}",
    )
)


@pytest.mark.parametrize("case", cases())
def test_bad_input_is_one_line_status_2_and_nothing_written(shell, world, case):
    argv, says = cases()[case]
    before = snapshot(world)
    status, _, error = shell(argv, world)
    after = snapshot(world)
    assert status == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
    assert all(part in error for part in says.split(" … ")), error
    assert after == before and not (world / "CODE-RAN").exists()


def test_the_code_in_those_files_would_have_run(world, tmp_path, monkeypatch):
    """The plain loaders do run it: that nothing ran above is these commands' doing."""
    monkeypatch.chdir(tmp_path)
    for load in (lambda: pickle.loads(FILES["code.pt"]), lambda: torch.load(world / "code-zip.pt", weights_only=False)):
        load()
        (tmp_path / "CODE-RAN").rmdir()


@pytest.mark.parametrize(
    "argv", ["predict.py none.pt --image x --text y", "train.py --steps -1", "evaluate.py text.pt"]
)
def test_a_plain_process_says_the_same(shell, world, argv):
    script, *more = argv.split()
    done = subprocess.run([sys.executable, HERE / script, *more], cwd=world, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == shell(argv, world) and done.returncode == 2


# ------------------------------------------------------------------------------------------------ the neighbours
NEIGHBOURS = {  # picture, sentence → width and height of the mask, what else is said
    "turned by EXIF": ("exif.jpg", "x", (60, 80), ""),
    "a palette": ("palette.png", "x", (80, 60), ""),
    "grey": ("grey.png", "x", (80, 60), ""),
    "see-through": ("see-through.png", "x", (80, 60), ""),
    "16 bits": ("16-bit.png", "x", (80, 60), ""),
    "one pixel": ("one.png", "x", (1, 1), ""),
    "20,000 pixels wide": ("wide.png", "x", (20000, 8), ""),
    "animated": ("animated.gif", "x", (80, 60), ""),
    "a name that is not UTF-8": ("caf\udce9.png", "x", (80, 60), "caf\\udce9.png"),
    "10,000 letters": ("photo.png", "letters, " * 1111, (80, 60), "longer than 17 tokens, the end is cut"),
    "right to left": ("photo.png", "\u202eהכוס האדומה", (80, 60), "הכוס"),
    "emoji": ("photo.png", "the 😀 one 👩‍👩‍👧", (80, 60), "😀"),
    "control characters": ("photo.png", "the\x07 \x1b[31mred\ud800 one", (80, 60), "red"),
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_odd_but_good_is_segmented_without_a_complaint(shell, world, tmp_path, case):
    picture, sentence, size, says = NEIGHBOURS[case]
    outputs = ["--out", str(tmp_path / "o.png"), "--mask", str(tmp_path / "m.png")]
    given = ["--device", "cpu", "--image", picture, "--text", sentence]
    status, said, error = shell(["predict.py", "run/best.pt", *given, *outputs], world)
    assert (status, error) == (0, "") and says in said
    assert read_picture(tmp_path / "m.png").shape[1::-1] == size and read_picture(tmp_path / "o.png").std() > 0


@pytest.mark.parametrize("more", ["", " --workers 1"])
def test_evaluate_keeps_going_over_what_it_cannot_read(shell, world, tmp_path, more):
    """Of three lines one names no mask and one a picture that is cut: each is said, both are counted."""
    files = f"--json {tmp_path}/r.json --save-masks {tmp_path}/masks"
    status, said, error = shell(
        f"evaluate.py run/best.pt --dataset three --split train --keep-going {files}{more}", world
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and "2 skipped" in said and (result["skipped"], result["refs"], result["sentences"]) == (2, 1, 1)
    assert all(line.startswith("skipped: ") for line in error.splitlines()) and len(error.splitlines()) == 2
    assert "three/refs.jsonl line 3" in error and "three/images/1.png" in error
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["0_0.png"]


def test_predict_keeps_going_over_pictures_it_cannot_read(shell, world, tmp_path):
    """Without --keep-going the folder is refused and nothing is written; with nothing good in it, either way."""
    command = f"predict.py run/best.pt --device cpu --text x --image mixed --out {tmp_path}/o --mask {tmp_path}/m"
    status, _, error = shell(command, world)
    assert status == 2 and "mixed/bad.png" in error and not any(tmp_path.iterdir())
    status, said, error = shell(f"{command} --keep-going", world)
    assert status == 0 and "1 of 2 pictures, 1 skipped" in said
    assert error.startswith("skipped: mixed/bad.png") and len(error.splitlines()) == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["good.png"]
    status, _, error = shell(f"{command.replace('mixed', 'spoilt')} --keep-going", world)
    assert status == 2 and len(error.splitlines()) == 1 and "spoilt/bad.png" in error


# ------------------------------------------------------------------------------------------------ the system refuses
def test_a_full_disk_leaves_the_last_good_checkpoint(shell, world, tmp_path):
    """No file may grow over 1 MB, as if there were no more room: the run cannot save, and what was there stays."""
    shutil.copytree(world / "run", tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("last.pt", "best.pt", "result.json")}
    status, _, error = shell(f"{TRAIN} --resume --steps 2", tmp_path, room=1_000_000)
    assert status == 2 and len(error.splitlines()) == 1 and ".pt cannot be written: File too large" in error
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_full_disk_leaves_no_half_of_a_picture(shell, world, tmp_path):
    shutil.copy(world / "photo.png", tmp_path)
    argv = f"{PREDICT} --image photo.png".replace("run/best.pt", str(world / "run" / "best.pt"))
    status, _, error = shell(argv, tmp_path, room=3000)
    assert status == 2 and len(error.splitlines()) == 1 and "o.png cannot be written: File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_folder_that_may_not_be_written_is_said_before_any_work(shell, world):
    """/proc belongs to the system: even its administrator makes no file there."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    for command in (f"{TRAIN} --out /proc/x", f"{PREDICT} --image photo.png --out /proc/x.png"):
        status, _, error = shell(command, world)
        assert status == 2 and len(error.splitlines()) == 1 and "/proc/x" in error
