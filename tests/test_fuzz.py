"""Rubbish in, our own error out: properties of what reads text, masks, tables and pickles, over drawn examples.

The examples are drawn the same way every time. What they found is told beside the line that repaired it, in data.py's
tests.
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
from conftest import HEIGHT, WIDTH, record, refer_tables, write_folder, write_refer
from pycocotools import mask as coco

from clip_model import UserError, padding, tokenize, tokenizer
from data import Box, TrainSet, draw_mask, letterbox, letterbox_mask, open_dataset, unletterbox
from evaluate import PRECISIONS, intersection_union, summarise

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st, given = hypothesis.strategies, hypothesis.given
hypothesis.settings.register_profile(
    "same every time", derandomize=True, max_examples=150, deadline=None, database=None
)
hypothesis.settings.load_profile("same every time")

SIDES = st.integers(1, 120)
TEXT = st.text() | st.text(string.printable + "éß人😀'’&;<>/\u0130\u200b\ufb01\ud800", max_size=40)
RUN = []


# ------------------------------------------------------------------------------------------------ sentences
@given(TEXT)
def test_tokens_are_the_mended_texts_bytes(text):
    """Every byte of every word is in some piece, and no other: nothing is unknown to byte pairs."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    mended = " ".join(mended.split()).lower()
    assert "".join(tokenizer().decode(tokenizer().encode(text)).split()) == "".join(mended.split())


@given(st.lists(TEXT, max_size=3), st.integers(3, 20))
def test_a_row_of_tokens_is_start_pieces_end_and_padding(sentences, words):
    for row in tokenize(sentences, words):
        end = int(row.argmax())
        assert row[0] == 49406 and row[end] == 49407 and (row == 49407).sum() == 1 and not row[end + 1 :].any()
        assert padding(row[None])[0].tolist() == [False] * (end + 1) + [True] * (words - end - 1)


# ------------------------------------------------------------------------------------------------ letterbox
@given(SIDES, SIDES, st.integers(8, 80))
def test_the_letterbox_is_the_largest_centred_rectangle_of_the_same_shape(height, width, size):
    top, left, tall, wide = Box(size, (height, width)).rectangle
    assert max(tall, wide) == size and min(tall, wide) >= 1
    assert abs(tall * max(height, width) - height * size) <= max(height, width) / 2 or tall == 1
    assert abs(wide * max(height, width) - width * size) <= max(height, width) / 2 or wide == 1
    assert (top, left) == ((size - tall) // 2, (size - wide) // 2)


@given(SIDES, SIDES, st.integers(8, 80), st.integers(0, 2**32))
def test_what_lies_around_the_picture_never_comes_back(height, width, size, seed):
    """Ramps over the picture come back as its own coordinates, though everything around them is no number."""
    image, box = letterbox(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), size)
    top, left, tall, wide = box.rectangle
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[top : top + tall, left : left + wide] = True
    assert image.isfinite().all() and not image[:, ~inside].any()
    y, x = ((torch.arange(size) - first + 0.5) / count for first, count in ((top, tall), (left, wide)))
    maps = torch.stack([y[:, None].expand(size, size), x.expand(size, size)]).masked_fill(~inside, float("nan"))
    back = unletterbox(maps, box)
    rows, columns = ((torch.arange(n) + 0.5) / n for n in (height, width))
    assert (back[0] - rows[:, None]).abs().max() <= 0.5 / tall and (back[1] - columns).abs().max() <= 0.5 / wide


@given(SIDES, SIDES, st.integers(8, 80))
def test_a_mask_of_everything_fills_the_rectangle_and_comes_back_whole(height, width, size):
    square = letterbox_mask(np.ones((height, width), bool), box := Box(size, (height, width)))
    assert square.sum().item() == pytest.approx(box.rectangle[2] * box.rectangle[3])
    assert unletterbox(square, box).min() > 0.99


# ------------------------------------------------------------------------------------------------ masks
NUMBER = st.floats(-90, 90, width=32) | st.floats() | st.integers(-(10**20), 10**20)
CORNER = st.tuples(st.floats(-5, WIDTH + 5, width=32), st.floats(-5, HEIGHT + 5, width=32))
POLYGON = st.lists(CORNER, min_size=3, max_size=8).map(lambda corners: [c for corner in corners for c in corner])


@given(st.lists(POLYGON, min_size=1, max_size=4), st.lists(st.tuples(NUMBER, NUMBER).map(list), max_size=2))
def test_polygons_are_pycocotools_own_joined(polygons, lines):
    """Each drawn alone by the library and OR-ed here; a line of two corners or a point adds nothing."""
    each = [coco.decode(coco.frPyObjects([points], HEIGHT, WIDTH))[..., 0] for points in polygons]
    found = draw_mask([*lines, *polygons], HEIGHT, WIDTH)
    assert found.dtype == bool and np.array_equal(found, np.any(each, axis=0))


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_run_lengths_of_any_mask_are_read_as_pycocotools_wrote_them(seed, share):
    """As text, as bytes and as numbers counted here: the mask they were made of."""
    mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share
    text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    column = [False, *mask.T.ravel().tolist(), None]
    turns = [i for i in range(len(column) - 1) if column[i] != column[i + 1]]
    runs = np.diff([0, *turns]).tolist()
    for counts in (text, text.decode(), runs):
        assert np.array_equal(draw_mask({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH), mask)


JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
SHAPES = st.one_of(
    st.lists(st.lists(NUMBER, min_size=4, max_size=12), max_size=3),
    st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]), "counts": TEXT | st.binary() | st.lists(NUMBER)}),
    st.fixed_dictionaries({"size": st.lists(NUMBER, max_size=3) | JSON, "counts": st.just([0, HEIGHT * WIDTH])}),
    JSON,
)


@given(SHAPES)
def test_a_shape_of_rubbish_is_an_error_not_the_librarys_crash(shape):
    """The library is C: corners far outside end the process, runs that fill too little show what memory held before."""
    try:
        mask = draw_mask(shape, HEIGHT, WIDTH)
    except Exception:  # Item.load tells any as one line
        return
    assert mask.shape == (HEIGHT, WIDTH) and np.array_equal(mask, draw_mask(shape, HEIGHT, WIDTH))


# ------------------------------------------------------------------------------------------------ metrics
MASKS = st.integers(0, 2**12 - 1).map(lambda bits: np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4))


@given(st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=6))
def test_metrics_are_the_formulas_in_fractions(pairs):
    """Pixel by pixel and without rounding: I and U counted, each I / U a fraction, 1 where both masks are empty."""
    counted = []
    for found, true in pairs:
        pixels = [(bool(found[y, x]), bool(true[y, x])) for y in range(3) for x in range(4)]
        counted.append((sum(f and t for f, t in pixels), sum(f or t for f, t in pixels)))
    assert [intersection_union(*map(torch.from_numpy, pair)) for pair in pairs] == counted
    each = [Fraction(i, u) if u else Fraction(1) for i, u in counted]
    both, either = (sum(column) for column in zip(*counted, strict=True))
    slow = {"oIoU": Fraction(both, either) if either else 1, "mIoU": sum(each) / len(each)}
    slow |= {f"Pr@{x}": Fraction(sum(i > Fraction(str(x)) for i in each), len(each)) for x in PRECISIONS}
    assert summarise(*zip(*counted, strict=True)) == pytest.approx({name: 100 * float(x) for name, x in slow.items()})


# ------------------------------------------------------------------------------------------------ tables
def ran(*_):
    RUN.append("a hostile pickle called this")
    return []


def watch(event, _):
    if watch.on and event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"):
        RUN.append(event)


watch.on = False
sys.addaudithook(watch)  # cannot be taken away again, only told not to look


def use(name, data):
    """Every object of every split, read as training reads it: our own error, or items that make tensors."""
    watch.on = True
    try:
        for split in ("train", "val", "testA"):
            source = open_dataset(name, split, data)
            for i in range(len(source)):
                item = TrainSet(source, 16, 5)[i]
                torch.tensor([item["ref_id"]])
                item["sentence"].encode(), repr(source.counts())
    except UserError:
        pass
    finally:
        watch.on, run, RUN[:] = False, list(RUN), []
    assert run == []


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own"), [record(0)])


LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from([*record(), "ref_id", "sent_ids", "split"]), JSON | st.lists(TEXT), max_size=3).map(
        lambda changes: json.dumps(record(0) | changes).encode()
    ),
)


@given(st.lists(LINES, max_size=3))
def test_a_folders_table_of_rubbish_is_our_error(own, lines):
    (own / "refs.jsonl").write_bytes(b"\n".join([json.dumps(record(1)).encode(), *lines]))
    use(str(own), None)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_refer(tmp_path_factory.mktemp("refer")).parents[1]


WHOLE = [pickle.dumps(refer_tables()[0], protocol) for protocol in (0, 2, 4)]
CALLS = [b"ctest_fuzz\nran\n(tR", b"cos\nsystem\n(S'true'\ntR", b"\x8c\x02os\x8c\x06system\x93(tR"]
PICKLES = st.one_of(
    st.binary(max_size=80),
    st.tuples(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4)),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 3000)),
    st.tuples(st.sampled_from(WHOLE), st.integers(0, 3000), st.sampled_from(CALLS)),
)


def damaged(recipe) -> bytes:
    """A whole pickle with bytes changed, cut off, or with a call in its midst."""
    if isinstance(recipe, bytes):
        return recipe
    whole, where, *call = recipe
    if isinstance(where, list):
        changed = bytearray(whole)
        for place, value in where:
            changed[place % len(changed)] = value
        return bytes(changed)
    cut = where % len(whole)
    return whole[:cut] + (call[0] + b"0" + whole[cut:] if call else b"")


def modest(content) -> bool:
    """Asks for no gigabytes: Python's own unpickler fills a table as long as the largest number of a memo."""
    try:
        for code, value, _ in pickletools.genops(content):
            if "PUT" in code.name and value > 10**6:
                return False
    except Exception:
        pass
    return True


@given(PICKLES.map(damaged).filter(modest))
def test_a_pickle_of_rubbish_is_our_error_and_runs_nothing(tree, content):
    (tree / "refcoco" / "refs(unc).p").write_bytes(content)
    use("refcoco", tree)


FIELD = st.sampled_from(["ref_id", "ann_id", "image_id", "split", "sentences", "sent_ids"])


@given(FIELD, JSON | st.lists(st.dictionaries(st.sampled_from(["sent", "sent_id"]), JSON, max_size=2), max_size=2))
def test_refs_with_a_field_of_rubbish_are_our_error(tree, field, value):
    refs, instances = refer_tables()
    refs[0][field] = value
    write_refer(tree, tables=(refs, instances), protocol=2)
    use("refcoco", tree)


@given(
    st.sampled_from(["images", "annotations"]), FIELD | st.sampled_from(["id", "file_name", "height", "width"]), JSON
)
def test_instances_with_a_field_of_rubbish_are_our_error(tree, table, field, value):
    refs, instances = refer_tables()
    write_refer(tree, tables=(refs, instances), protocol=2)
    instances[table][0][field] = value
    (tree / "refcoco" / "instances.json").write_text(json.dumps(instances))
    use("refcoco", tree)
