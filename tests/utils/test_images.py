"""What `utils/images.py` promises: every mode of an image, every way to write a mask."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import HEIGHT, WIDTH, corners, rectangle
from utils.common import UserError
from utils.images import (
    MAX_MEGAPIXELS,
    TURNS,
    decode_segmentation,
    file_inside,
    is_image_name,
    read_image,
    read_image_bytes,
    read_pil,
    read_shape,
    to_mask,
)

OBJECT = rectangle(10, 20, 30, 35)


# ----------------------------------------------------------------------------------------- sources
@pytest.mark.parametrize("url", ["http://host/x.png", "https://host/x", "s3://b/x.png", "Gs://b/x"])
def test_a_url_is_refused_before_it_is_looked_for(url):
    with pytest.raises(UserError, match="nothing is downloaded here: download it first"):
        read_image(url)


@pytest.mark.parametrize("path", ["C://x.png", "http/x.png", "a:b.png", "1://x.png"])
def test_a_path_that_resembles_a_url_is_a_path(path):
    with pytest.raises(UserError, match="No such file|cannot find|incorrect"):
        read_image(path)


def test_a_files_content_gives_what_the_file_gives(tmp_path):
    """Turned upright as well."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = read_image_bytes((tmp_path / "x.png").read_bytes(), "standard input")
    assert found.shape == (6, 4, 3)
    np.testing.assert_array_equal(found, read_image(tmp_path / "x.png"))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_content_that_is_no_image_is_one_line_with_its_name(content):
    with pytest.raises(UserError, match="^standard input: ") as caught:
        read_image_bytes(content, "standard input")
    assert len(str(caught.value).splitlines()) == 1


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
    with pytest.raises(UserError, match=r"x\.png.*110 pixels.*scale it down"):
        read_image(tmp_path / "x.png")


def test_the_largest_photographs_of_phones_are_read():
    """200 megapixels. Pillow alone refuses from 179 on, and warns from 89 on."""
    assert Image.MAX_IMAGE_PIXELS == MAX_MEGAPIXELS * 10**6 >= 16320 * 12240


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.float32([[0, 0.5, 1]]), [0, 128, 255]),
        (np.float32([[0, 127.6, 255]]), [0, 128, 255]),
        (np.float32([[0, 32639, 65535]]), [0, 127, 255]),
        (np.int32([[0, 128, 255]]), [0, 128, 255]),
        (np.int32([[0, 32639, 65535]]), [0, 127, 255]),
        (np.uint16([[0, 32639, 65535]]), [0, 127, 255]),
        (np.uint16([[0, 128, 255]]), [0, 128, 255]),
        (np.int32([[0, 0, 0]]), [0, 0, 0]),
    ],
)
def test_deep_gray_is_scaled_by_the_values_it_has(tmp_path, values, expected):
    """0..1, 0..255 or 0..65535. By hand: 0.5 × 255 = 127.5, 32639 = 127 × 257."""
    Image.fromarray(values).save(tmp_path / "x.tif")
    for pixels in (read_image(tmp_path / "x.tif"), read_pil(Image.fromarray(values))):
        assert pixels[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    "values", [[-1, 200], [0, 65536], [0, float("nan")], [0, float("inf")], [0, 5], [0, 300]]
)
def test_deep_gray_of_an_unclear_range_is_refused(tmp_path, values):
    """5 may be of 255 or of 10; 300 may be of 65535 or of 400."""
    image = Image.fromarray(np.float32([values]))
    image.save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif.*gray values"):
        read_image(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"the PIL image F 2 × 1.*gray values"):
        read_pil(image)


@pytest.mark.parametrize("bits", [10, 12])
def test_a_cameras_10_or_12_bits_in_16_are_refused(tmp_path, bits):
    """They were read as almost black."""
    image = Image.fromarray(np.uint16([[0, 2**bits - 1]]))
    image.save(tmp_path / "x.png")
    with pytest.raises(UserError, match=rf"x\.png.*gray values up to {2**bits - 1}"):
        read_image(tmp_path / "x.png")


def deep_png(values):
    """uint16 (H, W, C) → the bytes of a PNG of 16 bits, which Pillow does not write."""
    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = png_chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 16, kind, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


DEEP = {  # name: channels; 1 stands for what varies, -1 for 65535
    "RGB": (1, 1, 1),
    "gray, opaque": (1, -1),
    "white, seen in places": (-1, 1),
    "RGBA": (1, 1, 1, -1),
    "RGBA, seen in places": (-1, -1, -1, 1),
}


@pytest.mark.parametrize("name", DEEP)
def test_channels_of_16_bits_are_read_or_refused(tmp_path, name):
    """Pillow loads the upper 8 bits: masks of 1 and 255 were empty, photographs were black."""
    path = tmp_path / "x.png"
    for highest in (1, 255, 4095, 65535):
        levels = [
            OBJECT * np.uint16(highest if c == 1 else 0) + 65535 * (c < 0) for c in DEEP[name]
        ]
        path.write_bytes(deep_png(np.dstack(levels).astype(np.uint16)))
        if highest == 65535:
            np.testing.assert_array_equal(read_image(path, convert=to_mask), OBJECT)
            assert read_image(path)[10, 20].tolist() == [255, 255, 255]
            continue
        for convert in ({}, {"convert": to_mask}):
            with pytest.raises(UserError, match=r"x\.png: channels of 16 bits"):
                read_image(path, **convert)


def test_a_deep_tiff_whose_white_is_0_is_refused(tmp_path):
    """Pillow turns 8 bits around, and no others: masks were inverted."""
    path = tmp_path / "x.tif"
    Image.fromarray(np.uint8(OBJECT) * 255).save(path, tiffinfo={262: 0})
    np.testing.assert_array_equal(read_image(path, convert=to_mask), OBJECT)
    for values in (np.uint16(~OBJECT) * 65535, np.float32(~OBJECT)):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        black_is_zero = struct.pack("<HHLL", 262, 3, 1, 1)
        assert buffer.getvalue().count(black_is_zero) == 1
        white_is_zero = struct.pack("<HHLL", 262, 3, 1, 0)
        path.write_bytes(buffer.getvalue().replace(black_is_zero, white_is_zero))
        with pytest.raises(UserError, match=r"x\.tif: a TIFF of deep gray whose white is 0"):
            read_image(path, convert=to_mask)


def test_an_error_names_no_object_in_memory():
    with pytest.raises(UserError, match="it: cannot identify an image in it: check"):
        read_image_bytes(b"no image", "it")


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp", "tif", "bmp", "gif", "mpo"])
def test_what_can_be_decoded_is_an_image(tmp_path, ending):
    assert is_image_name(tmp_path / f"x.{ending}")
    assert not is_image_name(tmp_path / f"._x.{ending}")


@pytest.mark.parametrize("ending", ["heic", "DNG", "pdf", "mpg", "eps", "h5", "txt", "json"])
def test_what_can_only_be_named_is_no_image(tmp_path, ending):
    assert not is_image_name(tmp_path / f"x.{ending}")


def test_of_a_raw_file_the_preview_is_not_taken(tmp_path):
    """Pillow opens a DNG as a TIFF and finds the preview."""
    Image.new("RGB", (6, 4)).save(tmp_path / "x.dng", "TIFF")
    with pytest.raises(UserError, match=r"x\.dng.*raw file"):
        read_image(tmp_path / "x.dng")


@pytest.mark.parametrize("name", ["a/x.png", "a\\x.png", ".\\a\\x.png"])
def test_both_slashes_part_folders(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    assert file_inside(tmp_path, name) == tmp_path / "a" / "x.png"


@pytest.mark.parametrize("name", ["..\\x.png", "a\\..\\..\\x.png", "C:\\x.png", "\\x.png", "y"])
def test_neither_slash_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "x.png").touch()
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="not a file inside"):
        file_inside(tmp_path / "in", name)


def test_our_own_mistake_is_no_user_error(tmp_path):
    """A bug in what reads the image keeps its traceback."""
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")

    def convert(image):
        return image.no_such_attribute

    with pytest.raises(AttributeError):
        read_image(tmp_path / "x.png", convert=convert)


# ---------------------------------------------------------------------------------------- metadata
STORED = np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3


def exif_block(*tags, orientation=6):
    """An EXIF block whose IFD0 holds the orientation, a SHORT, after the 12 bytes of `tags`."""
    entries = [*tags, struct.pack("<HHLHH", 0x0112, 3, 1, orientation, 0)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


ODD_TAGS = {
    "of no type": struct.pack("<HHLL", 0x010F, 200, 1, 0),
    "of a type that it does not have": struct.pack("<HHLL", 0x011A, 2, 3, 0),
    "longer than the file": struct.pack("<HHLL", 0x010F, 2, 60, 80),
    "of four gigabytes": struct.pack("<HHLL", 0x010F, 2, 2**32 - 1, 0),
    "a folder outside": struct.pack("<HHLL", 0x8769, 4, 1, 2**32 - 1),
}


def encode(kind, **options):
    file = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(STORED).save(file, kind, **lossless, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*Skipping tag")  # of Image.open below
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", ODD_TAGS)
def test_an_odd_tag_hides_neither_pixels_nor_orientation(tmp_path, kind, tag):
    """A tag of a type it does not have made the whole image unreadable."""
    block = exif_block(ODD_TAGS[tag])
    exif = b"Exif\0\0" + block if kind == "JPEG" else block
    (tmp_path / "x").write_bytes(encode(kind, exif=exif))
    plain = np.asarray(Image.open(tmp_path / "x").convert("RGB"))
    upright = np.rot90(plain, -1)
    np.testing.assert_array_equal(read_image(tmp_path / "x"), upright)
    np.testing.assert_array_equal(read_pil(Image.open(tmp_path / "x")), upright)
    np.testing.assert_array_equal(read_image(tmp_path / "x", exif=False), plain)
    assert read_shape(tmp_path / "x") == (4, 6, 6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"no TIFF at all", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff"])
def test_a_block_that_is_no_exif_is_ignored(tmp_path, kind, block):
    (tmp_path / "x").write_bytes(encode(kind, exif=block))
    np.testing.assert_array_equal(read_image(tmp_path / "x"), STORED)
    np.testing.assert_array_equal(read_pil(Image.open(tmp_path / "x")), STORED)


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


PNG_CHUNKS = {
    "a text that unpacks to more than Pillow takes": png_chunk(
        b"zTXt", b"x\0\0" + zlib.compress(bytes(3_000_000))
    ),
    "a damaged color profile": png_chunk(b"iCCP", b"x\0\0no profile"),
    "half a resolution": png_chunk(b"pHYs", b"\0\0"),
    "a wrong checksum": png_chunk(b"tEXt", b"x\0y")[:-1] + b"?",
}


@pytest.mark.parametrize("chunk", PNG_CHUNKS)
def test_damaged_chunks_beside_the_pixels_of_a_png_are_ignored(tmp_path, chunk):
    whole = encode("PNG", exif=exif_block())
    (tmp_path / "x.png").write_bytes(whole[:33] + PNG_CHUNKS[chunk] + whole[33:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.rot90(STORED, -1))


def test_damaged_segments_beside_the_pixels_of_a_jpeg_are_ignored(tmp_path):
    """A color profile that ends after its name: Pillow calls the file no image."""
    whole = encode("JPEG", exif=b"Exif\0\0" + exif_block())
    segment = b"ICC_PROFILE\0"
    segment = b"\xff\xe2" + (len(segment) + 2).to_bytes(2, "big") + segment
    (tmp_path / "x.jpg").write_bytes(whole[:2] + segment + whole[2:])
    plain = np.asarray(Image.open(io.BytesIO(whole)))
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), np.rot90(plain, -1))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_a_tiff_is_turned_once_and_not_at_all_as_it_is_stored(tmp_path, orientation, compression):
    """Pillow turns a TIFF while it loads it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.tif"
    Image.fromarray(STORED).save(path, exif=exif, compression=compression)
    upright = Image.fromarray(STORED)
    if orientation in TURNS:
        upright = upright.transpose(TURNS[orientation])
    np.testing.assert_array_equal(read_image(path), upright)
    np.testing.assert_array_equal(read_pil(Image.open(path)), upright)
    np.testing.assert_array_equal(read_image(path, exif=False), STORED)
    assert read_shape(path) == (4, 6, orientation)


def test_a_tiff_with_odd_metadata_keeps_its_pixels_and_its_owner_the_metadata(tmp_path):
    """XMP as text, where Pillow expects bytes: a TypeError while the pixels are loaded."""
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = "<xmp>"
    tags.tagtype[700] = 2
    tags[270] = "a description"
    Image.fromarray(STORED).save(tmp_path / "x.tif", tiffinfo=tags)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), STORED)
    image = Image.open(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_pil(image), STORED)
    assert image.tag_v2[270] == "a description"
    assert image.info["xmp"] == "<xmp>"
    assert "getexif" not in vars(image)


def test_damaged_pixels_are_still_refused(tmp_path):
    whole = encode("PNG", exif=exif_block(ODD_TAGS["of no type"]))
    (tmp_path / "x.png").write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"x\.png"):
        read_image(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------- masks
WHITE = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
BLACK = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
ALPHA = OBJECT * np.uint8(255)
INSIDE = ALPHA[..., None].repeat(3, axis=2)
CORNER = rectangle(0, 0, 12, WIDTH)  # transparent, and over the object's upper rows


def with_alpha(colors, alpha):
    return Image.fromarray(np.dstack([colors, alpha]))


def palette(transparency):
    """Color 0 is black, color 1 white; the file keeps which of them are transparent."""
    image = Image.fromarray(OBJECT.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.info["transparency"] = transparency
    return image


SEE_THROUGH = {  # name: mask image
    "white everywhere": with_alpha(WHITE, ALPHA),
    "black everywhere": with_alpha(BLACK, ALPHA),
    "black on transparent white": with_alpha(255 - INSIDE, ALPHA),
    "white on transparent black": with_alpha(INSIDE, ALPHA),
    "red on transparent black": with_alpha(INSIDE * np.uint8([1, 0, 0]), ALPHA),
    "alpha of 0 and 1": with_alpha(WHITE, ALPHA // 255),
    "opaque": with_alpha(INSIDE, ALPHA | 255),
    "half transparent everywhere": with_alpha(INSIDE, ALPHA * 0 + 128),
    "gray with alpha": Image.fromarray(np.dstack([WHITE[..., 0], ALPHA]), "LA"),
    "palette, black is transparent": palette(0),
    "palette, by a table": palette(bytes([0, 255])),
    "palette, opaque": palette(bytes([255, 255])),
}


@pytest.mark.parametrize("name", SEE_THROUGH)
def test_a_mask_may_lie_in_its_transparency(tmp_path, name):
    """Where colors say nothing, what is opaque is the object. It was the whole image, or none."""
    SEE_THROUGH[name].save(tmp_path / "x.png")
    mask = read_image(tmp_path / "x.png", convert=to_mask)
    np.testing.assert_array_equal(mask, OBJECT)


def test_gray_with_one_transparent_value_is_a_mask(tmp_path):
    Image.fromarray(ALPHA).save(tmp_path / "x.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", convert=to_mask), OBJECT)
    Image.fromarray(INSIDE).save(tmp_path / "x.png", transparency=(0, 0, 0))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", convert=to_mask), OBJECT)


def gray_png(values, bits, transparent):
    """uint (H, W) → the bytes of a gray PNG of 1, 2, 4, 8 or 16 bits with one transparent value."""
    height, width = values.shape
    header = struct.pack(">LLBBBBB", width, height, bits, 0, 0, 0, 0)
    places = np.arange(bits)[::-1]
    digits = (values[..., None].astype(np.uint16) >> places) & 1  # (H, W, bits)
    packed = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"tRNS", struct.pack(">H", transparent)),
        png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_of_every_depth_may_have_a_transparent_value(tmp_path, bits):
    """Black on transparent white was inverted in 16 bits; Pillow misreads it in 2 and 4."""
    path = tmp_path / "x.png"
    top = 2**bits - 1
    path.write_bytes(gray_png(OBJECT * top, bits, transparent=0))
    np.testing.assert_array_equal(read_image(path, convert=to_mask), OBJECT)
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]
    path.write_bytes(gray_png(~OBJECT * top, bits, transparent=top))
    if bits in (2, 4):
        for convert in ({}, {"convert": to_mask}):
            with pytest.raises(UserError, match=r"x\.png: gray of 2 or 4 bits"):
                read_image(path, **convert)
        return
    np.testing.assert_array_equal(read_image(path, convert=to_mask), OBJECT)
    assert read_image(path)[10, 20].tolist() == [0, 0, 0]


def unnamed_alpha(kind, colors, **options):
    """A file whose fourth channel holds the object, and does not say what it is."""
    file = io.BytesIO()
    with_alpha(colors, ALPHA).save(file, kind, **options)
    data = file.getvalue()
    if kind == "BMP":  # Pillow writes the fourth channel of the oldest kind of BMP
        return data
    stated = struct.pack("<HHLHH", 338, 3, 1, 2, 0)
    assert data.count(stated) == 1
    return data.replace(stated, struct.pack("<HHLHH", 338, 3, 1, 0, 0))


@pytest.mark.parametrize(
    "kind, options", [("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_a_channel_of_no_stated_meaning_is_refused_where_colors_say_nothing(
    tmp_path, kind, options
):
    """The whole image, or nothing, was the object. Black and white goes on, photographs too."""
    path = tmp_path / "x"
    for colors in (WHITE, BLACK):
        path.write_bytes(unnamed_alpha(kind, colors, **options))
        with pytest.raises(UserError, match=r"x: a mask of one color and a channel of no stated"):
            read_image(path, convert=to_mask)
        assert (read_image(path) == colors).all()
    path.write_bytes(unnamed_alpha(kind, INSIDE, **options))
    np.testing.assert_array_equal(read_image(path, convert=to_mask), OBJECT)


def test_where_colors_and_transparency_speak_what_is_transparent_is_outside():
    """Whatever color it keeps."""
    visible = 255 - CORNER * np.uint8(255)
    for hidden in (0, 255, (9, 200, 30)):
        colors = np.where(CORNER[..., None], np.uint8(hidden), INSIDE)
        np.testing.assert_array_equal(to_mask(with_alpha(colors, visible)), OBJECT & ~CORNER)


def test_a_mask_of_nothing_and_a_mask_of_everything_stay():
    assert not to_mask(with_alpha(BLACK, ALPHA * 0)).any()
    assert not to_mask(with_alpha(BLACK, ALPHA | 255)).any()
    assert to_mask(with_alpha(WHITE, ALPHA | 255)).all()


ABOVE = rectangle(0, 0, 5, WIDTH) * np.uint8(255)
AMBIGUOUS = {  # name: mask image, what the line says
    "soft transparency": (with_alpha(WHITE, ALPHA // 2 + np.uint8(3)), "transparency"),
    "half transparency": (with_alpha(WHITE, ALPHA // 2), "transparency"),
    "all transparent": (with_alpha(INSIDE, ALPHA * 0), "disagree"),
    "white where transparent": (with_alpha(INSIDE, ABOVE), "disagree"),
    "gray": (with_alpha(INSIDE // 2, 255 - CORNER * np.uint8(255)), "opaque values"),
    "red": (Image.fromarray(INSIDE * np.uint8([1, 0, 0])), "colored"),
    "blue, almost black": (Image.fromarray(INSIDE // 255 * np.uint8([0, 0, 1])), "colored"),
    "a deep number": (Image.fromarray(np.int32(OBJECT) * 300), "not values"),
    "a negative number": (Image.fromarray(-np.int32(OBJECT)), "not values"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_mask_is_refused_in_one_line(tmp_path, name):
    image, says = AMBIGUOUS[name]
    path = tmp_path / ("x.tif" if image.mode == "I" else "x.png")
    image.save(path)
    with pytest.raises(UserError, match=rf"x\..*{says}") as caught:
        read_image(path, convert=to_mask)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        OBJECT,
        np.uint8(OBJECT),
        np.uint8(OBJECT) * 255,
        np.uint16(OBJECT) * 65535,
        np.int32(OBJECT) * 255,
        np.float32(OBJECT),
        INSIDE,
    ],
    ids=["1 bit", "8 bits 1", "8 bits", "16 bits", "32 bits", "float", "RGB"],
)
def test_masks_of_every_depth_are_read(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", convert=to_mask), OBJECT)


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
