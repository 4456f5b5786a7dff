"""6. What `predict.py` promises: evaluation's numbers, images of every kind, clear messages."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import predict as room
from conftest import HEIGHT, WIDTH, record, rectangle, write_folder
from data import open_dataset
from evaluate import evaluate
from predict import draw_predictions, probabilities, segment
from toy.scenes import draw_scene
from utils.common import ROOT, UserError
from utils.images import read_image
from utils.plots import write_png
from utils.pool import worker_pool

BRIGHT = rectangle(0, 0, HEIGHT, WIDTH // 2)  # the left half


def photo(mask=BRIGHT):
    gray = mask.astype(np.uint8) * 255
    return np.repeat(gray[..., None], 3, axis=2)


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def test_one_sentence_gives_one_mask_of_the_images_size(bright_model):
    mask = segment(bright_model, photo(), "bright thing")
    assert mask.dtype == bool
    assert mask.shape == (HEIGHT, WIDTH)
    assert iou(mask, BRIGHT) > 0.85


def test_several_sentences_give_as_many_masks(bright_model):
    bright, dark = segment(bright_model, photo(), ["bright thing", "dark thing"])
    assert iou(bright, BRIGHT) > 0.85
    assert iou(dark, ~BRIGHT) > 0.85


def test_a_path_a_pil_image_and_an_array_are_the_same_image(bright_model, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(photo()).save(path)
    opaque = photo()[..., :1] | 255
    with_alpha = np.dstack([photo(), opaque])
    images = [path, str(path), Image.open(path), photo(), photo()[..., 0], with_alpha]
    masks = [segment(bright_model, image, "bright") for image in images]
    assert masks[0].any()
    for mask in masks:
        np.testing.assert_array_equal(mask, masks[0])


def test_the_mask_lies_on_the_image_as_it_is_seen(bright_model, tmp_path):
    """Stored with the left half bright; orientation 6 turns it right: the upper half is bright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()).save(tmp_path / "x.png", exif=exif)
    upper = np.zeros((WIDTH, HEIGHT), bool)
    upper[: WIDTH // 2] = True
    for image in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        assert iou(segment(bright_model, image, "bright"), upper) > 0.85


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_whose_exif_cannot_be_read_is_segmented(bright_model, tmp_path, kind):
    """From a path and from a PIL image, which ended with a bare SyntaxError."""
    Image.fromarray(photo()).save(tmp_path / "x", kind, exif=b"no TIFF", quality=100)
    for image in (tmp_path / "x", Image.open(tmp_path / "x")):
        assert iou(segment(bright_model, image, "bright"), BRIGHT) > 0.85


DEEP = {"I;16": np.uint16(257), "I": np.int32(257), "F": np.float32(1 / 255)}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", *DEEP])
def test_images_of_every_mode_are_segmented(bright_model, mode):
    if mode in DEEP:
        image = Image.fromarray(photo()[..., 0] * DEEP[mode])
        assert image.mode == mode
    else:
        image = Image.fromarray(photo()).convert(mode)
    assert iou(segment(bright_model, image, "bright"), BRIGHT) > 0.85


def test_the_numbers_are_those_of_evaluation(bright_model, tmp_path):
    """The same sample through evaluate.py's saved mask and through segment: no pixel differs."""
    own = write_folder(tmp_path, [record(0, sentences=["bright", "dark one"])])
    path = own / "images" / "0.png"
    write_png(path, photo())
    dataset = open_dataset(str(own), "train")
    evaluate(bright_model, dataset, progress=False, save_masks=tmp_path / "out")
    for number, mask in enumerate(segment(bright_model, path, ["bright", "dark one"])):
        saved = np.asarray(Image.open(tmp_path / "out" / f"0_{number}.png"))
        np.testing.assert_array_equal(mask * 255, saved)
        assert mask.any()
        assert not mask.all()


def test_probabilities_are_between_none_and_sure(bright_model):
    maps = probabilities(bright_model, photo(), ["bright", "dark"])
    assert maps.shape == (2, HEIGHT, WIDTH)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
    inside = maps[0, 5:-5]  # the square's border, gray to the stub, reaches into the image
    assert inside[:, 5:15].min() > 0.9
    assert inside[:, -15:-5].max() < 0.1


def test_more_sentences_than_fit_at_once_are_taken_in_turns(bright_model):
    maps = probabilities(bright_model, photo(), ["bright", "dark"] * 20)
    assert maps.shape == (40, HEIGHT, WIDTH)
    np.testing.assert_array_equal(maps[38], maps[0])


def test_the_model_keeps_the_mode_it_had(bright_model):
    probabilities(bright_model.train(), photo(), ["bright"])
    assert bright_model.training


@pytest.mark.parametrize("sentences", [[], [""], ["a", " "]])
def test_an_empty_sentence_is_refused(bright_model, sentences):
    with pytest.raises(UserError, match="none of them empty"):
        segment(bright_model, photo(), sentences)


@pytest.mark.parametrize("image", [Image.new("F", (4, 4), -1), torch.zeros(3, 4, 4), None])
def test_what_is_no_image_is_refused_in_one_line(bright_model, image):
    with pytest.raises(UserError) as caught:
        segment(bright_model, image, "bright")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4)), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)]
)
def test_an_array_that_is_no_image_is_refused(bright_model, array):
    with pytest.raises(UserError, match="give uint8"):
        segment(bright_model, array, "bright")


def test_predictions_are_drawn_under_what_is_meant(bright_model, tmp_path):
    dataset = open_dataset("scenes", "val", limit=3, side=bright_model.size)
    draw_predictions(bright_model, dataset, tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").std() > 0


def test_load_asks_for_the_device_that_is_there_and_gives_the_fast_path(monkeypatch, bright_model):
    given = []
    made_fast = []

    def load_checkpoint(*asked):
        given.append(asked)
        return bright_model

    def set_fast(model):
        made_fast.append(model)
        return model

    monkeypatch.setattr(room, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(room, "set_fast", set_fast)
    assert room.load("x.pt", "w.pt", "cpu", 22) is bright_model
    assert given == [("x.pt", "w.pt", torch.device("cpu"), 22)]
    assert made_fast == [bright_model]


# ----------------------------------------------------------------------------------------- command
@pytest.fixture
def run(bright_model, monkeypatch, tmp_path):
    """Run the command in an empty folder that holds photo.png, with the stub as its checkpoint."""
    monkeypatch.setattr(room, "load_checkpoint", lambda *_: bright_model)
    monkeypatch.chdir(tmp_path)
    write_png("photo.png", photo())
    return lambda *argv: room.main(["x.pt", "--device", "cpu", *argv])


def read(path):
    return np.asarray(Image.open(path))


def test_the_command_writes_overlay_mask_and_probabilities(run, tmp_path, capsys):
    files = ["--mask", "m.png", "--probability", "deep/p.png"]
    run("--image", "photo.png", "--text", r"bright $\x$", *files)
    assert set(np.unique(read("m.png"))) == {0, 255}
    assert iou(read("m.png") > 0, BRIGHT) > 0.85
    assert read("deep/p.png").shape == (HEIGHT, WIDTH)
    assert len(np.unique(read("deep/p.png"))) > 2
    colors = np.unique(read_image("overlay.png").reshape(-1, 3), axis=0)
    assert len(colors) > 3  # black, white, tint, and the legend
    # half of the image, and a little
    assert r"photo.png: 'bright $\\x$': 5" in capsys.readouterr().out


def test_several_sentences_give_numbered_masks_in_colors_of_their_own(run, tmp_path):
    files = ["--mask", "m.png", "--out", "o.png"]
    run("--image", "photo.png", "--text", "bright", "--text", "dark", *files)
    assert iou(read("m_1.png") > 0, BRIGHT) > 0.85
    assert iou(read("m_2.png") > 0, ~BRIGHT) > 0.85
    drawn = read_image("o.png")
    y = drawn.shape[0] // 4
    width = drawn.shape[1]
    # white under 55 % of orange #E69F00 (230, 159, 0)
    np.testing.assert_allclose(drawn[y, width // 4], [241, 202, 115], atol=2)
    # black under 55 % of sky blue #56B4E9 (86, 180, 233)
    np.testing.assert_allclose(drawn[y, 3 * width // 4], [47, 99, 128], atol=2)


def test_nothing_found_is_an_empty_mask_and_is_said(run, capsys):
    write_png("photo.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    run("--image", "photo.png", "--text", "bright", "--mask", "m.png")
    assert read("m.png").shape == (HEIGHT, WIDTH)
    assert not read("m.png").any()
    assert "nothing found" in capsys.readouterr().out


def test_a_long_sentence_is_cut_and_this_is_said(run, capsys):
    long = "bright one two three four five"
    run("--image", "photo.png", "--text", long, "--text", "bright")
    assert "1 of the sentences are longer than 6 tokens" in capsys.readouterr().out


def test_a_folder_of_images_gives_a_folder_of_results(run, tmp_path):
    """What is no image is passed over; two images of one stem keep their endings."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(photo()).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    run("--image", "in", "--text", "bright", "--mask", "masks", "--out", "drawn")
    for folder in ("masks", "drawn"):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert names == ["a.jpg.png", "a.png.png", "b.png"]


def test_no_result_of_a_folder_replaces_another(tmp_path):
    """a.jpg, a.png and a.jpg.png gave two results; upper and lower case are one name on a Mac."""
    names = ["a.jpg", "a.png", "a.jpg.png", "B.JPG", "b.png", "c.png"]
    for name in names:
        (tmp_path / name).touch()
    found = room.images_in(tmp_path)
    assert {name: path.name for name, path in found.items()} == {
        **{name: name for name in names[:5]},
        "c": "c.png",
    }


def test_what_a_phone_and_a_mac_leave_in_a_folder_is_said_and_counted(run, tmp_path, capsys):
    """HEIC and DNG beside JPEG went unsaid; ._IMG_1.JPG, .pdf and .mpg ended the command."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("IMG_1.JPG", "IMG_2.JPG"):
        Image.fromarray(photo()).save(folder / name)
    double = b"\x00\x05\x16\x07\x00\x02\x00\x00" + bytes(4096)
    contents = {
        "IMG_3.HEIC": b"\0\0\0\x18ftypheic" + bytes(90),
        "IMG_4.DNG": b"II*\0" + bytes(90),
        "._IMG_1.JPG": double,
        "scan.pdf": b"%PDF-1.4",
        "film.mpg": b"\0\0\1\xb3" + bytes(90),
        ".DS_Store": bytes(90),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "album").mkdir()
    run("--image", "in", "--text", "bright", "--out", "drawn")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "IMG_1.png",
        "IMG_2.png",
    ]
    out = capsys.readouterr().out
    names = ".DS_Store, ._IMG_1.JPG, IMG_3.HEIC, IMG_4.DNG, film.mpg and 1 more"
    assert f"in: 6 of 8 files are no images that can be read here: {names}\n" in out
    assert "in: folders inside are not looked into: album\n" in out


def test_a_folder_of_nothing_that_can_be_read_is_refused_and_says_why(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "IMG_3.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(SystemExit):
        run("--image", "in", "--text", "bright", "--out", "drawn")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "in holds no image. 1 of 1 files" in error
    assert "IMG_3.HEIC: save photographs as JPEG or PNG" in error


def test_one_bad_image_in_a_folder_is_said_before_anything_is_written(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in" / "a.png", photo())
    (tmp_path / "in" / "b.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        run("--image", "in", "--text", "bright", "--out", "drawn")
    assert not (tmp_path / "drawn").exists()


def test_bad_images_in_a_folder_can_be_skipped_and_are_counted(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in" / "a.png", photo())
    (tmp_path / "in" / "b.png").write_bytes(b"")
    run("--image", "in", "--text", "bright", "--out", "drawn", "--keep-going")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["a.png"]
    assert "1 of 2 images, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--image", "none.png", "--text", "x"], "none.png"),
        (["--image", "photo.png", "--text", " "], "empty"),
        (["--image", "photo.png", "--text", "x", "--mask", "m.jpg"], "m.jpg"),
        (["--image", "photo.png", "--text", "x", "--threshold", "3"], "0 to 1"),
        (["--image", "broken.png", "--text", "x"], "broken.png"),
        (["--image", "hollow", "--text", "x"], "hollow holds no image"),
        (["--image", "photo.png", "--text", "x", "--out", "photo.png/o.png"], "cannot be written"),
        (["--image", "photo.png", "--text", "x", "--out", "./photo.png"], "written over"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, tmp_path, capsys, argv, says):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "hollow").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------ folder
def write_photos(folder, count):
    """Scenes of several sizes, as the command line's folder."""
    folder.mkdir()
    for i in range(count):
        scene = Image.fromarray(draw_scene("scenes", "test", i).image)
        scene.resize((60 + 10 * (i % 3), 50)).save(folder / f"{i}.png")


def results(folder):
    return {path.relative_to(folder).as_posix(): read(path) for path in folder.rglob("*.png")}


def test_a_folder_in_batches_gives_what_its_images_give_alone(tmp_path, capsys):
    """Masks, overlays and what is said are the same; probabilities up to one of 255 levels.

    Eighteen images, two sentences: two batches, of which the second is smaller.
    """
    write_photos(tmp_path / "in", 18)
    command = [str(ROOT / "weights" / "etris-tiny.pt"), "--device", "cpu", "--text", "the circle"]
    command += ["--text", "the red one"]
    kinds = ("out", "mask", "probability")

    said = []
    for path in sorted((tmp_path / "in").iterdir()):
        files = [x for kind in kinds for x in (f"--{kind}", f"{tmp_path}/alone/{kind}/{path.name}")]
        room.main([*command, "--image", str(path), *files])
        said += capsys.readouterr().out.splitlines()[1:]  # the first line is about the checkpoint
    alone = results(tmp_path / "alone")
    assert len(alone) == 18 * 5

    for workers in ("0", "2"):
        files = [x for kind in kinds for x in (f"--{kind}", f"{tmp_path}/{workers}/{kind}")]
        room.main([*command, "--image", str(tmp_path / "in"), "--workers", workers, *files])
        assert capsys.readouterr().out.splitlines()[1:] == said
        together = results(tmp_path / workers)
        assert together.keys() == alone.keys()
        for name, pixels in together.items():
            atol = 1 if name.startswith("probability") else 0
            np.testing.assert_allclose(pixels.astype(int), alone[name], atol=atol, err_msg=name)


def test_images_of_a_batch_do_not_touch_each_other(bright_model):
    """Three images of one color each, two sentences: every pair has its own map, in order."""
    shades = torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1, 1)
    squares = shades.expand(3, 3, 32, 32)
    tokens = room.tokenize(["bright", "dark"], bright_model.max_tokens)
    maps = room.predict_squares(bright_model, squares, tokens)
    assert maps.shape == (3, 2, 32, 32)
    bright = maps[:, :, 16, 16] > 0.5
    assert bright.tolist() == [[False, True], [True, False], [False, True]]


def test_more_images_and_sentences_than_fit_at_once(bright_model):
    squares = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    tokens = room.tokenize(["bright", "dark"] * 20, bright_model.max_tokens)
    maps = room.predict_squares(bright_model, squares, tokens)
    assert maps.shape == (3, 40, 32, 32)
    assert torch.equal(maps[2, 38], maps[0, 0])
    assert torch.equal(maps[2, 39], maps[0, 1])


def test_bad_images_are_treated_the_same_by_workers(run, tmp_path, capsys):
    """Refused before anything is written; with --keep-going skipped, named and counted."""
    write_photos(tmp_path / "in", 4)
    (tmp_path / "in" / "1.png").write_bytes(b"")
    options = ["--image", "in", "--text", "bright", "--out", "drawn", "--workers", "2"]
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: in/1.png: the file is empty")
    assert not (tmp_path / "drawn").exists()

    run(*options, "--keep-going")
    said = capsys.readouterr()
    assert said.err.startswith("skipped: in/1.png")
    assert "3 of 4 images, 1 skipped" in said.out
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "0.png",
        "2.png",
        "3.png",
    ]


def test_a_result_that_a_worker_cannot_write_is_one_line(run, tmp_path, capsys):
    write_photos(tmp_path / "in", 4)
    (tmp_path / "drawn" / "2.png").mkdir(parents=True)
    options = ["--image", "in", "--text", "bright", "--out", "drawn", "--workers", "2"]
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert "drawn/2.png cannot be written" in error


def end_itself():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="--workers"), worker_pool(1) as pool:
        pool.submit(end_itself).result()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see a process end")
def test_workers_end_when_the_main_process_is_killed():
    code = """
import os, time
from utils.pool import worker_pool
with worker_pool(2) as pool:
    print(*{future.result() for future in [pool.submit(os.getpid) for _ in range(9)]}, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        workers = process.stdout.readline().split()
        assert workers
        process.kill()
    for _ in range(600):
        if not any(os.path.isdir(f"/proc/{worker}") for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {workers} still run")


# ----------------------------------------------------------------------------------- other sources
class Stdin:
    def __init__(self, content, terminal=False):
        self.buffer = io.BytesIO(content)
        self.isatty = lambda: terminal


@pytest.fixture
def pipe(monkeypatch):
    def into(content, **options):
        room.stdin_bytes.cache_clear()
        monkeypatch.setattr(sys, "stdin", Stdin(content, **options))

    yield into
    room.stdin_bytes.cache_clear()


def test_an_image_from_standard_input_gives_what_its_file_gives(run, tmp_path, pipe, capsys):
    run("--image", "photo.png", "--text", "bright", "--mask", "file.png")
    pipe((tmp_path / "photo.png").read_bytes())
    run("--image", "-", "--text", "bright", "--mask", "piped.png", "--out", "o.png")
    np.testing.assert_array_equal(read("piped.png"), read("file.png"))
    assert "-: 'bright': 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, terminal, says",
    [
        (b"", False, "standard input: it is empty"),
        (b"no image", False, "standard input: cannot identify"),
        (b"", True, "standard input is a terminal"),
    ],
)
def test_what_is_no_image_on_standard_input_is_one_line(
    run, tmp_path, pipe, capsys, content, terminal, says
):
    pipe(content, terminal=terminal)
    with pytest.raises(SystemExit) as stopped:
        run("--image", "-", "--text", "bright")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert says in error
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    "url",
    ["http://host/x.png", "https://host/x.jpg", "s3://bucket/x.png", "file:///x.png", "HTTPS://x"],
)
def test_a_url_is_refused_and_says_why(run, bright_model, tmp_path, capsys, url):
    with pytest.raises(SystemExit) as stopped:
        run("--image", url, "--text", "bright")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert f"{url}: a URL, and nothing is downloaded here: download it first" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(UserError, match="download it first"):
        segment(bright_model, url, "bright")


def test_a_real_photograph_keeps_its_size(refer_sample, bright_model):
    sample = open_dataset("refcoco", "testA", refer_sample)[0]
    mask = segment(bright_model, sample.image, sample.sentences[0])
    assert mask.shape == sample.mask.shape
