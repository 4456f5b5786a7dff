"""Rubbish in, our own error out: properties of what reads text, masks, tables and pickles.

The examples are drawn, and the same every time. What they found is told beside the line that
repaired it, in tests/test_data.py and tests/utils.
"""

import html
import json
import pickle
import pickletools
import string
import sys
from fractions import Fraction

import ftfy
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from conftest import HEIGHT, WIDTH, record, refer_tables, write_folder, write_refer
from data import (
    MEAN,
    Letterbox,
    TrainDataset,
    letterbox,
    letterbox_mask,
    open_dataset,
    unletterbox,
)
from evaluate import PRECISION_THRESHOLDS, intersection_union, summarize
from utils.common import READ_ERRORS, UserError
from utils.images import decode_segmentation
from utils.tokenizer import padding_mask, tokenize, tokenizer

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies
given = hypothesis.given
hypothesis.settings.register_profile(
    "same every time", derandomize=True, max_examples=150, deadline=None, database=None
)
hypothesis.settings.load_profile("same every time")

SIDES = st.integers(1, 120)
ODD_LETTERS = "éß人😀'’&;<>/\u0130\u200b\ufb01\ud800"
TEXT = st.text() | st.text(string.printable + ODD_LETTERS, max_size=40)
RUN = []  # what a hostile pickle has run


# --------------------------------------------------------------------------------------- sentences
@given(TEXT)
def test_tokens_are_the_mended_texts_bytes(text):
    """Every byte of every word is in some piece, and no other: nothing is unknown to byte pairs."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    mended = " ".join(mended.split()).lower()
    decoded = tokenizer().decode(tokenizer().encode(text))
    assert "".join(decoded.split()) == "".join(mended.split())


@given(st.lists(TEXT, max_size=3), st.integers(3, 20))
def test_a_row_of_tokens_is_start_pieces_end_and_padding(sentences, max_tokens):
    for row in tokenize(sentences, max_tokens):
        end = int(row.argmax())
        assert row[0] == 49406 and row[end] == 49407
        assert (row == 49407).sum() == 1 and not row[end + 1 :].any()
        expected = [False] * (end + 1) + [True] * (max_tokens - end - 1)
        assert padding_mask(row[None])[0].tolist() == expected


# --------------------------------------------------------------------------------------- letterbox
@given(SIDES, SIDES, st.integers(8, 80))
def test_the_letterbox_is_the_largest_centered_rectangle_of_the_same_shape(height, width, size):
    top, left, tall, wide = Letterbox(size, (height, width)).rectangle
    longer = max(height, width)
    assert max(tall, wide) == size and min(tall, wide) >= 1
    assert abs(tall * longer - height * size) <= longer / 2 or tall == 1
    assert abs(wide * longer - width * size) <= longer / 2 or wide == 1
    assert (top, left) == ((size - tall) // 2, (size - wide) // 2)


@given(SIDES, SIDES, st.integers(8, 80), st.integers(0, 2**32))
def test_what_lies_around_the_image_never_comes_back(height, width, size, seed):
    """Ramps over the image come back as its own coordinates, though all around them is NaN."""
    rng = np.random.default_rng(seed)
    image, box = letterbox(rng.integers(0, 256, (height, width, 3), np.uint8), size)
    top, left, tall, wide = box.rectangle
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[top : top + tall, left : left + wide] = True
    assert image.dtype == torch.uint8
    assert (image[:, ~inside] == MEAN.round().view(3, 1)).all()

    y = (torch.arange(size) - top + 0.5) / tall
    x = (torch.arange(size) - left + 0.5) / wide
    ramps = torch.stack([y[:, None].expand(size, size), x.expand(size, size)])
    back = unletterbox(ramps.masked_fill(~inside, float("nan")), box)
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    assert (back[0] - rows[:, None]).abs().max() <= 0.5 / tall
    assert (back[1] - columns).abs().max() <= 0.5 / wide


@given(SIDES, SIDES, st.integers(8, 80))
def test_a_mask_of_everything_fills_the_rectangle_and_comes_back_whole(height, width, size):
    box = Letterbox(size, (height, width))
    square = letterbox_mask(np.ones((height, width), bool), box).float() / 255
    assert square.sum().item() == pytest.approx(box.rectangle[2] * box.rectangle[3])
    assert unletterbox(square, box).min() > 0.99


# ------------------------------------------------------------------------------------------- masks
NUMBER = st.floats(-90, 90, width=32) | st.floats() | st.integers(-(10**20), 10**20)
CORNER = st.tuples(st.floats(-5, WIDTH + 5, width=32), st.floats(-5, HEIGHT + 5, width=32))


def flatten(corners):
    return [coordinate for corner in corners for coordinate in corner]


POLYGON = st.lists(CORNER, min_size=3, max_size=8).map(flatten)
POINT = st.tuples(NUMBER, NUMBER).map(list)


@given(st.lists(POLYGON, min_size=1, max_size=4), st.lists(POINT, max_size=2))
def test_polygons_are_pycocotools_own_joined(polygons, points):
    """Each drawn alone by the library and OR-ed here; a point adds nothing."""
    each = []
    for polygon in polygons:
        rle = coco.frPyObjects([polygon], HEIGHT, WIDTH)
        each.append(coco.decode(rle)[..., 0])
    found = decode_segmentation([*points, *polygons], HEIGHT, WIDTH)
    assert found.dtype == bool
    assert np.array_equal(found, np.any(each, axis=0))


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_run_lengths_of_any_mask_are_read_as_pycocotools_wrote_them(seed, share):
    """As text, as bytes and as numbers counted here: the mask they were made of."""
    mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share
    text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    column = [False, *mask.T.ravel().tolist(), None]
    turns = [i for i in range(len(column) - 1) if column[i] != column[i + 1]]
    runs = np.diff([0, *turns]).tolist()
    for counts in (text, text.decode(), runs):
        segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
        assert np.array_equal(decode_segmentation(segmentation, HEIGHT, WIDTH), mask)


def lists_and_dicts(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3)


JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lists_and_dicts,
    max_leaves=8,
)
RIGHT_SIZE = st.just([HEIGHT, WIDTH])
ANY_RUNS = TEXT | st.binary() | st.lists(NUMBER)
ANY_SIZE = st.lists(NUMBER, max_size=3) | JSON
SEGMENTATIONS = st.one_of(
    st.lists(st.lists(NUMBER, min_size=4, max_size=12), max_size=3),
    st.fixed_dictionaries({"size": RIGHT_SIZE, "counts": ANY_RUNS}),
    st.fixed_dictionaries({"size": ANY_SIZE, "counts": st.just([0, HEIGHT * WIDTH])}),
    JSON,
)


@given(SEGMENTATIONS)
def test_a_segmentation_of_rubbish_is_an_error_not_the_librarys_crash(segmentation):
    """The library is C: corners far outside end the process.

    Runs that fill too little show what memory held before.
    """
    try:
        mask = decode_segmentation(segmentation, HEIGHT, WIDTH)
    except READ_ERRORS:  # Sample.load tells these as one line, and no other
        return
    assert mask.shape == (HEIGHT, WIDTH)
    assert np.array_equal(mask, decode_segmentation(segmentation, HEIGHT, WIDTH))


# ----------------------------------------------------------------------------------------- metrics
def mask_of_bits(bits):
    return np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4)


MASKS = st.integers(0, 2**12 - 1).map(mask_of_bits)


@given(st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=6))
def test_metrics_are_the_formulas_in_fractions(pairs):
    """Pixel by pixel and without rounding; each I / U a fraction, 1 where both masks are empty."""
    counted = []
    for found, true in pairs:
        pixels = [(bool(found[y, x]), bool(true[y, x])) for y in range(3) for x in range(4)]
        intersection = sum(f and t for f, t in pixels)
        union = sum(f or t for f, t in pixels)
        counted.append((intersection, union))
    ours = [intersection_union(*map(torch.from_numpy, pair)) for pair in pairs]
    assert ours == counted

    each = [Fraction(i, u) if u else Fraction(1) for i, u in counted]
    intersections, unions = zip(*counted, strict=True)
    overall = Fraction(sum(intersections), sum(unions)) if sum(unions) else 1
    exact = {"oIoU": overall, "mIoU": sum(each) / len(each)}
    for threshold in PRECISION_THRESHOLDS:
        over = sum(i > Fraction(str(threshold)) for i in each)
        exact[f"Pr@{threshold}"] = Fraction(over, len(each))
    expected = {name: 100 * float(value) for name, value in exact.items()}
    assert summarize(intersections, unions) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ tables
PROCESS_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")


def ran(*_):
    RUN.append("a hostile pickle called this")
    return []


def watch(event, _):
    if watch.on and event in PROCESS_EVENTS:
        RUN.append(event)


watch.on = False
sys.addaudithook(watch)  # cannot be taken away again, only told not to look


def read_all(name, folder):
    """Every object of every split, as training reads it."""
    for split in ("train", "val", "testA"):
        dataset = open_dataset(name, split, folder)
        for i in range(len(dataset)):
            item = TrainDataset(dataset, 16, 5)[i]
            torch.tensor([item["ref_id"]])
            item["sentence"].encode()
            repr(dataset.counts())


def use(name, folder):
    """Reading is our own error, or gives items that make tensors; and nothing runs."""
    watch.on = True
    try:
        read_all(name, folder)
    except UserError:
        pass
    finally:
        watch.on = False
        run = list(RUN)
        RUN.clear()
    assert run == []


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own"), [record(0)])


def dump(value):
    return json.dumps(value).encode()


def dump_changed_record(changes):
    return dump(record(0) | changes)


KEYS = st.sampled_from([*record(), "ref_id", "sent_ids", "split"])
CHANGES = st.dictionaries(KEYS, JSON | st.lists(TEXT), max_size=3)
LINES = st.binary(max_size=60) | JSON.map(dump) | CHANGES.map(dump_changed_record)


@given(st.lists(LINES, max_size=3))
def test_a_folders_table_of_rubbish_is_our_error(own, lines):
    (own / "refs.jsonl").write_bytes(b"\n".join([dump(record(1)), *lines]))
    use(str(own), None)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_refer(tmp_path_factory.mktemp("refer")).parents[1]


WHOLE = st.sampled_from([pickle.dumps(refer_tables()[0], protocol) for protocol in (0, 2, 4)])
CALLS = st.sampled_from(
    [
        b"ctest_fuzz\nran\n(tR",
        b"cos\nsystem\n(S'true'\ntR",
        b"\x8c\x02os\x8c\x06system\x93(tR",
    ]
)
POSITION = st.integers(0, 3000)
BYTE = st.integers(0, 255)


def change_bytes(whole, changes):
    changed = bytearray(whole)
    for position, value in changes:
        changed[position % len(changed)] = value
    return bytes(changed)


def cut_off(whole, position):
    return whole[: position % len(whole)]


def insert_call(whole, position, call):
    position %= len(whole)
    return whole[:position] + call + b"0" + whole[position:]


PICKLES = st.one_of(
    st.binary(max_size=80),
    st.builds(change_bytes, WHOLE, st.lists(st.tuples(POSITION, BYTE), max_size=4)),
    st.builds(cut_off, WHOLE, POSITION),
    st.builds(insert_call, WHOLE, POSITION, CALLS),
)


def modest(content) -> bool:
    """Asks for no gigabytes: Python's unpickler fills a table as long as a memo's numbers say."""
    try:
        for code, value, _ in pickletools.genops(content):
            if "PUT" in code.name and value > 10**6:
                return False
    except Exception:
        pass
    return True


@given(PICKLES.filter(modest))
def test_a_pickle_of_rubbish_is_our_error_and_runs_nothing(tree, content):
    (tree / "refcoco" / "refs(unc).p").write_bytes(content)
    use("refcoco", tree)


FIELD = st.sampled_from(["ref_id", "ann_id", "image_id", "split", "sentences", "sent_ids"])
SENTENCES = st.lists(
    st.dictionaries(st.sampled_from(["sent", "sent_id"]), JSON, max_size=2), max_size=2
)


@given(FIELD, JSON | SENTENCES)
def test_refs_with_a_field_of_rubbish_are_our_error(tree, field, value):
    refs, instances = refer_tables()
    refs[0][field] = value
    write_refer(tree, tables=(refs, instances), protocol=2)
    use("refcoco", tree)


TABLE = st.sampled_from(["images", "annotations"])
COLUMN = FIELD | st.sampled_from(["id", "file_name", "height", "width", "segmentation"])


@given(TABLE, COLUMN, JSON)
def test_instances_with_a_field_of_rubbish_are_our_error(tree, table, field, value):
    refs, instances = refer_tables()
    write_refer(tree, tables=(refs, instances), protocol=2)
    instances[table][0][field] = value
    (tree / "refcoco" / "instances.json").write_text(json.dumps(instances))
    use("refcoco", tree)
