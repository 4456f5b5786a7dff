"""Bad input into the real commands: one line that names it, status 2, every file as it was.

Each case is a process of its own. It forks from one that has imported torch already
(multiprocessing's forkserver; where there is none, it starts from nothing), runs the command's file
as `python FILE …` or `python -m MODULE …` would, and ends as it does.
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

import checkpoint
import data
import evaluate
import experiments.reproduce  # noqa: F401
import predict
import prepare  # noqa: F401
import toy.pretrain  # noqa: F401
import train
from robustness.bad_files import (
    CHECKPOINTS,
    FILES,
    LINES,
    MASKS,
    RUNS,
    TREES,
    build_checkpoints,
    build_world,
)
from utils.common import READ_ERRORS, ROOT, UserError, as_user_error, command
from utils.images import IMAGE_ERRORS, read_image

HAS_FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
TESTS = ROOT / "tests"
TRAIN = (
    "train.py --weights random --limit 4 --batch-size 4 --steps 1 --size 64 --device cpu --out run"
)
PREDICT = "predict.py run/best.pt --device cpu --text x --out o.png --mask m.png"
EVALUATE = (
    "evaluate.py run/best.pt --device cpu --limit 2 --json r.json --csv r.csv --save-masks masks"
)
DISK_FULL = "cannot be written: File too large"


# ---------------------------------------------------------------------------------- real processes
def child(argv, folder, log, max_bytes):
    """Run `python FILE …` in `folder`, its output in log.out and log.err.

    max_bytes: no file may grow over that.
    """
    os.chdir(folder)
    for number, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    with limited(max_bytes):
        run_as_main(argv)


def run_as_main(argv):
    """What `python argv` does, in this process."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1])  # imported above; it runs anew
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


@contextlib.contextmanager
def limited(max_bytes):
    """No file may grow over that; afterwards it may again, for what measures the coverage."""
    if max_bytes is None:
        yield
        return
    import resource  # where there are no limits, this is missing

    infinity = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, infinity))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """shell(argv, folder, max_bytes=None) → exit status, what stood on stdout, on stderr."""
    context = multiprocessing.get_context("forkserver" if HAS_FORKSERVER else "spawn")
    log = tmp_path_factory.mktemp("log") / "log"
    folders = [str(ROOT), str(TESTS), str(TESTS / "robustness")]

    def run(argv, folder, max_bytes=None):
        if isinstance(argv, str):
            argv = argv.split()
        process = context.Process(target=child, args=(argv, str(folder), str(log), max_bytes))
        process.start()
        process.join(300)
        process.kill()
        out = log.with_suffix(".out").read_text(errors="replace")
        err = log.with_suffix(".err").read_text(errors="replace")
        return process.exitcode, out, err

    with pytest.MonkeyPatch.context() as patch:  # what the server starts with, and all its forks
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        patch.setenv("OMP_NUM_THREADS", "1")
        if HAS_FORKSERVER:
            context.set_forkserver_preload(["test_bad_input"])
        yield run


def snapshot(folder):
    """Every file and folder below, with size and time of the last write; of the run, its bytes."""
    found = {}
    for path in folder.rglob("*"):
        if path.name.startswith(".coverage"):
            continue
        stat = path.stat()
        content = path.read_bytes() if path.parent == folder / "run" else None
        found[path] = path.is_dir() or (stat.st_size, stat.st_mtime_ns, content)
    return found


@pytest.fixture(scope="module")
def world(shell, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    build_world(world)
    status, _, error = shell(TRAIN, world)
    assert status == 0 and error == "", error
    build_checkpoints(world)
    return world


# --------------------------------------------------------------------------------------- the cases
def listed(area, text, command="{}"):
    """Cases from lines `arguments → what the one line on stderr must name`."""
    found = {}
    for line in text.strip().splitlines():
        given, says = line.strip().split(" → ")
        found[f"{area}: {given}"] = (command.format(given), says)
    return found


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
        --size 100 → image size 100
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
        --dataset cut-image --split train → cut-image/images/1.png
        --dataset mask-gray --split train → mask-gray/masks/0.png
        --dataset cut-image --split train --workers 1 → cut-image/images/1.png
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
        show cut-image → cut-image/images/1.png
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
        from-coco none.json --images hollow --out m → none.json
        from-coco photo.png --images hollow --out m → photo.png
        from-coco deep.json --images hollow --out m → deep.json
        from-coco photo.png --images none --out m → none
        from-coco photo.png --images hollow --out m --boxes all → --boxes
        from-coco photo.png --images hollow → --out
        from-labelme hollow --out m → hollow holds no JSON
        from-labelme photo.png --out m → photo.png
        from-labelme hollow --out m --split half → --split
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
        "-m toy.pretrain {}",
    )
    | listed(
        "reproduce",
        """
        table99 → table99
        table6 --seeds 0 → --seeds: 0
        table6 --rows nosuch → nosuch
        table6 --lr nan → --lr nan
        table6 --colour red → --colour red
        table6 --results photo.png → photo.png
        """,
        "-m experiments.reproduce --results res {}",
    )
)
CHECKPOINT_FILES = [
    "empty",
    "text",
    "code",
    "code-zip",
    "number",
    "other",
    "names",
    "official-like",
    "state-5",
    "cut",
    "none",
]
WEIGHT_FILES = ["empty", "code", "code-zip", "number", "other", "names", "cut", "none"]
IMAGE_FILES = [
    "empty.png",
    "text.png",
    "cut.png",
    "cut.jpg",
    "cut.gif",
    "bomb.png",
    "none.png",
    "drawing.svg",
    "hollow",
]
EMPTY_SENTENCES = {
    "empty": "",
    "blank": " \t\n",
    "control": "\x07\x1b",
    "no width": "\u200b\u200d",
}


def show(dataset):
    return f"data.py show {dataset} --out sheet.png"


def predict_with(checkpoint):
    return (
        f"predict.py {checkpoint} --device cpu --text x --out o.png --mask m.png --image photo.png"
    )


def cases() -> dict:
    """Name → (command line, what the one line on stderr must name; … stands between two things)."""
    found = {}
    for name in LINES:
        found[f"own folder, {name}"] = (show(f"line-{name}"), "refs.jsonl line 2")
    for name in MASKS:
        found[f"own folder, mask {name}"] = (show(f"mask-{name}"), "masks/0.png")
    for name, (says, _) in TREES.items():
        found[f"RefCOCO, {name}"] = (show(f"refcoco --data tree-{name}"), says)
    for name, (_, says) in CHECKPOINTS.items():
        found[f"checkpoint, {name}"] = (predict_with(f"{name}.pt"), f"{name}.pt … {says}")
    for name in CHECKPOINT_FILES:
        found[f"checkpoint, file {name}"] = (predict_with(f"{name}.pt"), f"{name}.pt")
    for name, (_, says) in RUNS.items():
        found[f"resume, {name}"] = (f"{TRAIN} --resume {name}.pt", f"{name}.pt … {says}")
    for name in WEIGHT_FILES:
        found[f"weights, file {name}"] = (f"{TRAIN} --weights {name}.pt", f"{name}.pt")
    for name in IMAGE_FILES:
        found[f"image, {name}"] = (f"{PREDICT} --image {name}", name)
    for name, text in EMPTY_SENTENCES.items():
        argv = [*PREDICT.split(), "--image", "photo.png", "--text", text]
        found[f"sentence, {name}"] = (argv, "--text")
    return found | ARGUMENTS


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_status_2_and_nothing_written(shell, world, case):
    argv, says = CASES[case]
    before = snapshot(world)
    status, _, error = shell(argv, world)
    after = snapshot(world)
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    assert error.startswith("error: "), error
    assert all(part in error for part in says.split(" … ")), error
    assert after == before and not (world / "CODE-RAN").exists()


def test_the_code_in_those_files_would_have_run(world, tmp_path, monkeypatch):
    """The plain loaders do run it: that nothing ran above is these commands' doing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(FILES["code.pt"])
    (tmp_path / "CODE-RAN").rmdir()
    torch.load(world / "code-zip.pt", weights_only=False)
    (tmp_path / "CODE-RAN").rmdir()


@pytest.mark.parametrize(
    "argv",
    [
        "predict.py none.pt --image x --text y",
        "train.py --steps -1",
        "evaluate.py text.pt",
        "-m experiments.reproduce table99",
    ],
)
def test_a_plain_process_says_the_same(shell, world, argv):
    words = argv.split()
    if words[0] != "-m":
        words[0] = ROOT / words[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": world, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *words], **options)
    assert (done.returncode, done.stdout, done.stderr) == shell(argv, world)
    assert done.returncode == 2


# ----------------------------------------------------------------------------------- the neighbors
NEIGHBORS = {  # image, sentence, width and height of the mask, what else is said
    "turned by EXIF": ("exif.jpg", "x", (60, 80), ""),
    "a palette": ("palette.png", "x", (80, 60), ""),
    "gray": ("gray.png", "x", (80, 60), ""),
    "see-through": ("see-through.png", "x", (80, 60), ""),
    "16 bits": ("16-bit.png", "x", (80, 60), ""),
    "one pixel": ("one.png", "x", (1, 1), ""),
    "20,000 pixels wide": ("wide.png", "x", (20000, 8), ""),
    "animated": ("animated.gif", "x", (80, 60), ""),
    "a name that is not UTF-8": ("caf\udce9.png", "x", (80, 60), "caf\\udce9.png"),
    "10,000 letters": ("photo.png", "letters, " * 1111, (80, 60), "longer than 17 tokens: cut"),
    "right to left": ("photo.png", "\u202eהכוס האדומה", (80, 60), "הכוס"),
    "emoji": ("photo.png", "the 😀 one 👩‍👩‍👧", (80, 60), "😀"),
    "control characters": ("photo.png", "the\x07 \x1b[31mred\ud800 one", (80, 60), "red"),
}


@pytest.mark.parametrize("case", NEIGHBORS)
def test_odd_but_good_is_segmented_without_a_complaint(shell, world, tmp_path, case):
    image, sentence, size, says = NEIGHBORS[case]
    outputs = ["--out", str(tmp_path / "o.png"), "--mask", str(tmp_path / "m.png")]
    given = ["--device", "cpu", "--image", image, "--text", sentence]
    status, said, error = shell(["predict.py", "run/best.pt", *given, *outputs], world)
    assert (status, error) == (0, "")
    assert says in said
    assert read_image(tmp_path / "m.png").shape[1::-1] == size
    assert read_image(tmp_path / "o.png").std() > 0


@pytest.mark.parametrize("more", ["", " --workers 1"])
def test_evaluate_keeps_going_over_what_it_cannot_read(shell, world, tmp_path, more):
    """Of three lines one names no mask and one a cut image: each is said, both are counted."""
    files = f"--json {tmp_path}/r.json --save-masks {tmp_path}/masks"
    dataset = "--dataset three --split train --keep-going"
    status, said, error = shell(f"evaluate.py run/best.pt {dataset} {files}{more}", world)
    assert status == 0, error
    result = json.loads((tmp_path / "r.json").read_text())
    assert "2 skipped" in said
    assert (result["skipped"], result["refs"], result["sentences"]) == (2, 1, 1)
    lines = error.splitlines()
    assert len(lines) == 2 and all(line.startswith("skipped: ") for line in lines)
    assert "three/refs.jsonl line 3" in error and "three/images/1.png" in error
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["0_0.png"]


def test_predict_keeps_going_over_images_it_cannot_read(shell, world, tmp_path):
    """Without --keep-going the folder is refused and nothing is written.

    Where nothing in it is good, it is refused either way.
    """
    outputs = f"--out {tmp_path}/o --mask {tmp_path}/m"
    argv = f"predict.py run/best.pt --device cpu --text x --image mixed {outputs}"
    status, _, error = shell(argv, world)
    assert status == 2 and "mixed/bad.png" in error
    assert not any(tmp_path.iterdir())

    status, said, error = shell(f"{argv} --keep-going", world)
    assert status == 0 and "1 of 2 images, 1 skipped" in said
    assert error.startswith("skipped: mixed/bad.png") and len(error.splitlines()) == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["good.png"]

    status, _, error = shell(f"{argv.replace('mixed', 'spoilt')} --keep-going", world)
    assert status == 2 and len(error.splitlines()) == 1 and "spoilt/bad.png" in error


# ------------------------------------------------------------------------------ the system refuses
def test_a_full_disk_leaves_the_last_good_checkpoint(shell, world, tmp_path):
    """No file may grow over 1 MB, as on a full disk: the run cannot save, what was there stays."""
    shutil.copytree(world / "run", tmp_path / "run")
    names = ("last.pt", "best.pt", "result.json")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    status, _, error = shell(f"{TRAIN} --resume --steps 2", tmp_path, max_bytes=1_000_000)
    assert status == 2 and len(error.splitlines()) == 1
    assert f".pt {DISK_FULL}" in error
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_full_disk_leaves_no_half_of_an_image(shell, world, tmp_path):
    shutil.copy(world / "photo.png", tmp_path)
    argv = predict_with(world / "run" / "best.pt")
    status, _, error = shell(argv, tmp_path, max_bytes=3000)
    assert status == 2 and len(error.splitlines()) == 1
    assert f"o.png {DISK_FULL}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_folder_that_may_not_be_written_is_said_before_any_work(shell, world):
    """/proc belongs to the system: even its administrator makes no file there."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    for argv in (f"{TRAIN} --out /proc/x", f"{PREDICT} --image photo.png --out /proc/x.png"):
        status, _, error = shell(argv, world)
        assert status == 2 and len(error.splitlines()) == 1 and "/proc/x" in error


# ------------------------------------------------------------------- our own bugs are no bad input
OUR_BUGS = (NameError, AssertionError, ZeroDivisionError)


@pytest.mark.parametrize("bug", OUR_BUGS)
def test_our_own_bugs_are_not_told_as_the_users_mistake(bug):
    """They pass through as they are, and the command that runs into one shows its traceback."""
    with pytest.raises(bug, match="^ours$"), as_user_error("a.png", "save it anew"):
        raise bug("ours")

    @command
    def main(argv=None):
        raise bug("ours")

    with pytest.raises(bug, match="^ours$"):
        main([])


@pytest.mark.parametrize("error", READ_ERRORS)
def test_what_reading_a_damaged_file_raises_is_one_line_with_its_cause(error):
    cause = error("two\nlines")
    with pytest.raises(UserError) as caught, as_user_error("a.png", "save it anew"):
        raise cause
    assert caught.value.__cause__ is cause
    line = str(caught.value)
    assert line.startswith("a.png: ") and line.endswith(": save it anew")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("bug", OUR_BUGS)
@pytest.mark.parametrize(
    ("module", "name", "argv"),
    [
        (predict, "probabilities", f"{PREDICT} --image photo.png"),
        (evaluate, "score", EVALUATE),
        (data, "decode_segmentation", show("refcoco --data refer")),
        (data, "parse_record", show("own")),
        (train, "train_step", f"{TRAIN} --out bug"),
        (train, "set_fast", f"{TRAIN} --out bug"),
        (checkpoint, "check_same_run", f"{TRAIN} --resume run/last.pt --out bug"),
    ],
)
def test_a_bug_in_a_command_is_a_traceback(world, monkeypatch, module, name, argv, bug):
    """In the midst of the real commands, at the places where files are read, too."""

    def broken(*_, **__):
        raise bug("ours")

    monkeypatch.chdir(world)
    monkeypatch.setattr(module, name, broken)
    script, *options = argv.split()
    commands = {
        "predict.py": predict.main,
        "evaluate.py": evaluate.main,
        "data.py": data.main,
        "train.py": train.main,
    }
    with pytest.raises(bug, match="^ours$"):
        commands[script](options)


def test_a_decoders_own_error_is_caught_around_images_only():
    """Pillow's decoders divide by zero on damaged files; elsewhere that would be our bug."""
    assert issubclass(ZeroDivisionError, IMAGE_ERRORS)
    assert not issubclass(ZeroDivisionError, READ_ERRORS)
