"""6. What `predict.py` promises: evaluation's numbers, pictures of every kind, and files that say what was found."""

import numpy as np
import pytest
import torch
from conftest import HEIGHT, WIDTH, record, rectangle, write_folder
from PIL import Image

import predict as room
from clip_model import UserError
from data import open_dataset, read_picture
from etris import Gate
from evaluate import evaluate, write_picture
from predict import probabilities, segment

BRIGHT = rectangle(0, 0, HEIGHT, WIDTH // 2)  # the left half


def photo(mask=BRIGHT):
    return np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)


def iou(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def test_one_sentence_gives_one_mask_of_the_pictures_size(bright_model):
    mask = segment(bright_model, photo(), "bright thing")
    assert mask.dtype == bool and mask.shape == (HEIGHT, WIDTH) and iou(mask, BRIGHT) > 0.85


def test_several_sentences_give_as_many_masks(bright_model):
    bright, dark = segment(bright_model, photo(), ["bright thing", "dark thing"])
    assert iou(bright, BRIGHT) > 0.85 and iou(dark, ~BRIGHT) > 0.85


def test_a_path_a_pil_image_and_an_array_are_the_same_picture(bright_model, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(photo()).save(path)
    images = [path, str(path), Image.open(path), photo(), photo()[..., 0], np.dstack([photo(), photo()[..., :1] | 255])]
    masks = [segment(bright_model, image, "bright") for image in images]
    assert all(np.array_equal(mask, masks[0]) for mask in masks) and masks[0].any()


def test_the_mask_lies_on_the_picture_as_it_is_seen(bright_model, tmp_path):
    """Stored with the left half bright; orientation 6 shows it turned right: the upper half is bright, and 40x30."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()).save(tmp_path / "x.png", exif=exif)
    upper = np.zeros((WIDTH, HEIGHT), bool)
    upper[: WIDTH // 2] = True
    for image in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        assert iou(segment(bright_model, image, "bright"), upper) > 0.85


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_pictures_of_every_mode_are_segmented(bright_model, mode):
    image = Image.fromarray(photo()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(photo())
    image = image if mode == "I;16" else image.convert(mode)
    assert iou(segment(bright_model, image, "bright"), BRIGHT) > 0.85


def test_the_numbers_are_those_of_evaluation(bright_model, tmp_path):
    """The same item through evaluate.py's saved mask and through segment: not one pixel differs."""
    own = write_folder(tmp_path, [record(0, sentences=["bright", "dark one"])])
    write_picture(own / "images" / "0.png", photo())
    evaluate(bright_model, open_dataset(str(own), "train"), progress=False, save_masks=tmp_path / "out")
    for number, mask in enumerate(segment(bright_model, own / "images" / "0.png", ["bright", "dark one"])):
        np.testing.assert_array_equal(mask * 255, np.asarray(Image.open(tmp_path / "out" / f"0_{number}.png")))
        assert mask.any() and not mask.all()


def test_probabilities_are_between_none_and_sure(bright_model):
    maps = probabilities(bright_model, photo(), ["bright", "dark"])
    assert maps.shape == (2, HEIGHT, WIDTH) and maps.dtype == np.float32 and maps.min() >= 0 and maps.max() <= 1
    inside = maps[0, 5:-5]  # the border of the square, grey to the stub, reaches a little into the picture
    assert inside[:, 5:15].min() > 0.9 and inside[:, -15:-5].max() < 0.1


def test_the_model_keeps_the_mode_it_had(bright_model):
    probabilities(bright_model.train(), photo(), ["bright"])
    assert bright_model.training


@pytest.mark.parametrize("sentences", [[], [""], ["a", " "]])
def test_an_empty_sentence_is_refused(bright_model, sentences):
    with pytest.raises(UserError, match="none of them empty"):
        segment(bright_model, photo(), sentences)


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)])
def test_an_array_that_is_no_picture_is_refused(bright_model, array):
    with pytest.raises(UserError, match="give uint8"):
        segment(bright_model, array, "bright")


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def run(bright_model, monkeypatch, tmp_path):
    """Run the command in an empty folder that holds photo.png, with the stub as its checkpoint."""
    monkeypatch.setattr(room, "load_checkpoint", lambda path, weights=None, device="cpu", words=None: bright_model)
    monkeypatch.chdir(tmp_path)
    write_picture("photo.png", photo())
    return lambda *argv: room.main(["x.pt", "--device", "cpu", *argv])


def read(path):
    return np.asarray(Image.open(path))


def test_the_command_writes_overlay_mask_and_probabilities(run, tmp_path, capsys):
    run("--image", "photo.png", "--text", r"bright $\x$", "--mask", "m.png", "--probability", "deep/p.png")
    assert set(np.unique(read("m.png"))) == {0, 255} and iou(read("m.png") > 0, BRIGHT) > 0.85
    assert read("deep/p.png").shape == (HEIGHT, WIDTH) and len(np.unique(read("deep/p.png"))) > 2
    assert len(np.unique(read_picture("overlay.png").reshape(-1, 3), axis=0)) > 3  # black, white, tint, and the legend
    assert r"photo.png: 'bright $\\x$': 5" in capsys.readouterr().out  # half of the picture, and a little


def test_several_sentences_give_numbered_masks_in_colours_of_their_own(run, tmp_path):
    run("--image", "photo.png", "--text", "bright", "--text", "dark", "--mask", "m.png", "--out", "o.png")
    assert iou(read("m_1.png") > 0, BRIGHT) > 0.85 and iou(read("m_2.png") > 0, ~BRIGHT) > 0.85
    drawn = read_picture("o.png")
    height, width = drawn.shape[0] // 4, drawn.shape[1]
    # white under 55 % of orange #E69F00 (230, 159, 0); black under 55 % of sky blue #56B4E9 (86, 180, 233)
    np.testing.assert_allclose(drawn[height, width // 4], [241, 202, 115], atol=2)
    np.testing.assert_allclose(drawn[height, 3 * width // 4], [47, 99, 128], atol=2)


def test_nothing_found_is_an_empty_mask_and_is_said(run, capsys):
    write_picture("photo.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    run("--image", "photo.png", "--text", "bright", "--mask", "m.png")
    assert read("m.png").shape == (HEIGHT, WIDTH) and not read("m.png").any()
    assert "nothing found" in capsys.readouterr().out


def test_a_long_sentence_is_cut_and_this_is_said(run, capsys):
    run("--image", "photo.png", "--text", "bright one two three four five", "--text", "bright")
    assert "1 of the sentences are longer than 6 tokens" in capsys.readouterr().out


def test_a_folder_of_pictures_gives_a_folder_of_results(run, tmp_path):
    """What is no picture is passed over; two pictures of one stem keep their endings."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(photo()).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    run("--image", "in", "--text", "bright", "--mask", "masks", "--out", "drawn")
    for folder in ("masks", "drawn"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["a.jpg.png", "a.png.png", "b.png"]


def test_one_bad_picture_in_a_folder_is_said_before_anything_is_written(run, tmp_path):
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / "a.png", photo())
    (tmp_path / "in" / "b.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        run("--image", "in", "--text", "bright", "--out", "drawn")
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--image", "none.png", "--text", "x"], "none.png"),
        (["--image", "photo.png", "--text", " "], "empty"),
        (["--image", "photo.png", "--text", "x", "--mask", "m.jpg"], "m.jpg"),
        (["--image", "photo.png", "--text", "x", "--threshold", "3"], "0 to 1"),
        (["--image", "broken.png", "--text", "x"], "broken.png"),
        (["--image", "hollow", "--text", "x"], "hollow holds no picture"),
        (["--image", "photo.png", "--text", "x", "--out", "photo.png/o.png"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, tmp_path, capsys, argv, says):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "hollow").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_real_photograph_keeps_its_size(refer_sample, bright_model):
    item = open_dataset("refcoco", "testA", refer_sample)[0]
    assert segment(bright_model, item.picture, item.sentences[0]).shape == item.mask.shape


def test_load_asks_for_the_device_that_is_there_and_gives_the_fast_path(monkeypatch, bright_model):
    given = []
    monkeypatch.setattr(room, "load_checkpoint", lambda *asked: given.append(asked) or torch.nn.Sequential(Gate(8, 2)))
    assert room.load("x.pt", "w.pt", "cpu", 22)[0].fast
    assert given == [("x.pt", "w.pt", torch.device("cpu"), 22)]
