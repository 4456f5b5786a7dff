"""What `utils/images.py` promises: every mode of an image, every way to write a mask."""

import numpy as np
import pytest
from PIL import Image

from conftest import HEIGHT, WIDTH, corners
from utils.common import UserError
from utils.images import decode_segmentation, read_image


# ------------------------------------------------------------------------------------------ images
def pixel(path, image, **options):
    image.save(path, **options)
    return read_image(path)[0, 0].tolist()


def test_images_of_every_mode_become_rgb(tmp_path):
    """By hand: 16-bit gray 65534 / 257 = 254.99, cut to 254; half transparent black over white."""
    gray16 = Image.fromarray(np.full((2, 2), 65534, np.uint16))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert pixel(tmp_path / "a.png", Image.new("L", (2, 2), 90)) == [90, 90, 90]
    assert pixel(tmp_path / "b.png", gray16) == [254, 254, 254]
    assert pixel(tmp_path / "c.png", palette) == [255, 0, 0]
    assert pixel(tmp_path / "d.png", clear) == [255, 255, 255]
    assert pixel(tmp_path / "e.png", half) == [127, 127, 127]
    assert pixel(tmp_path / "f.png", palette, transparency=1) == [255, 255, 255]
    assert pixel(tmp_path / "g.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == [255, 0, 0]
    assert pixel(tmp_path / "h.png", Image.new("1", (2, 2), 1)) == [255, 255, 255]
    red = Image.new("RGB", (2, 2), "red")
    blue = Image.new("RGB", (2, 2), "blue")
    assert pixel(tmp_path / "i.gif", red, save_all=True, append_images=[blue]) == [255, 0, 0]


def test_exif_turns_the_pixels(tmp_path):
    """Orientation 6: the camera was turned right: what is stored top left is seen top right."""
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    assert np.argwhere(read_image(tmp_path / "x.png")[..., 0] == 255).tolist() == [[0, 1]]
    assert read_image(tmp_path / "x.png", exif=False)[0, 0, 0] == 255


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_a_bad_image_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png"):
        read_image(tmp_path / "x.png")


def test_a_truncated_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / "x.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"x\.jpg.*truncated"):
        read_image(path)


def test_an_image_of_enormous_size_is_refused(tmp_path, monkeypatch):
    """PIL only warns up to twice its limit; here the limit is the limit."""
    Image.new("RGB", (11, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"x\.png.*110 pixels"):
        read_image(tmp_path / "x.png")


def test_our_own_mistake_is_no_user_error(tmp_path):
    """A bug in what reads the image keeps its traceback."""
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")

    def convert(image):
        return image.no_such_attribute

    with pytest.raises(AttributeError):
        read_image(tmp_path / "x.png", convert=convert)


# ------------------------------------------------------------------------------------------- masks
def test_a_polygon_of_two_corners_holds_no_pixel():
    """Four numbers in front would make the library read every polygon as a box."""
    mask = decode_segmentation([[3, 3, 8, 8], corners(5, 5, 15, 15)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask[5:15, 5:15], True)
    assert mask.sum() == 100


def test_run_lengths_equal_a_loop_over_pixels():
    """Runs alternate outside, inside, outside …; pixel k is in column k // H, row k % H."""
    rng = np.random.default_rng(0)
    runs = rng.multinomial(7 * 5, np.ones(9) / 9).tolist()
    slow = np.zeros((7, 5), bool)
    k = 0
    for number, run in enumerate(runs):
        for _ in range(run):
            slow[k % 7, k // 7] = number % 2 == 1
            k += 1
    mask = decode_segmentation({"size": [7, 5], "counts": runs}, 7, 5)
    np.testing.assert_array_equal(mask, slow)
