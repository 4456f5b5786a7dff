"""prepare.py: whatever the network does, a file under its own name is whole and checked."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from robustness.server import Server
from utils import download
from utils.common import ROOT

NUMBERS = range(1, 13)
PUBLISHED = {"train": (8, 16, 8), "val": (2, 4, 2), "testA": (1, 2, 1), "testB": (1, 2, 1)}


def jpeg(number):
    """A grainy image of 90 + number by 64 pixels, some 5 kB: enough for a fault in the middle."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 90 + number, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return file.getvalue()


IMAGES = {f"COCO_train2014_{number:012d}.jpg": jpeg(number) for number in NUMBERS}


def zipped(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def annotation_files(folder="refcoco", by="unc"):
    """What a RefCOCO archive holds: a Python-2 pickle of refs, COCO's instances, other things."""
    splits = [split for split, (refs, _, _) in PUBLISHED.items() for _ in range(refs)]
    refs = []
    images = []
    annotations = []
    for n, split in zip(NUMBERS, splits, strict=True):
        name = f"COCO_train2014_{n:012d}"
        sentences = [
            {"sent_id": 2 * n, "sent": "a", "raw": "a", "tokens": ["a"]},
            {"sent_id": 2 * n + 1, "sent": "b", "raw": "b", "tokens": ["b"]},
        ]
        ref = {
            "ref_id": n,
            "ann_id": n,
            "image_id": n,
            "category_id": 1,
            "split": split,
            "sent_ids": [2 * n, 2 * n + 1],
            "file_name": f"{name}_{n}.jpg",
            "sentences": sentences,
        }
        annotation = {
            "id": n,
            "image_id": n,
            "category_id": 1,
            "segmentation": [[1, 1, 9, 1, 9, 9]],
            "iscrowd": 0,
        }
        refs.append(ref)
        images.append({"id": n, "file_name": f"{name}.jpg", "width": 90 + n, "height": 64})
        annotations.append(annotation)
    unused = {"id": 99, "file_name": f"COCO_train2014_{99:012d}.jpg", "width": 5, "height": 5}
    instances = {"images": [*images, unused], "annotations": annotations}
    return {
        f"{folder}/refs({by}).p": pickle.dumps(refs, 0),
        f"{folder}/instances.json": json.dumps(instances).encode(),
        f"__MACOSX/{folder}/._refs({by}).p": b"not needed",
    }


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(prepare, "ANNOTATION_BYTES", 1000)
    monkeypatch.setattr(prepare, "TRAIN2014_IMAGES", 12)
    monkeypatch.setitem(prepare.PUBLISHED, "refcoco", PUBLISHED)
    monkeypatch.setitem(prepare.IMAGES_IN_ALL, "grefcoco", 12)
    members = {f"train2014/{name}": content for name, content in IMAGES.items()}
    files = {f"/i/{name}": content for name, content in members.items()}
    files["/a/refcoco.zip"] = zipped(annotation_files())
    files["/i/zips/train2014.zip"] = zipped(members)
    with Server(files) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """A quarter of a second of silence is enough, for tests whose server stalls."""
    monkeypatch.setattr(download, "TIMEOUT", 0.25)


def run(server, root, *more, name="refcoco"):
    urls = "--images-url", f"{server.url}/i", "--annotations-url", f"{server.url}/a"
    prepare.main([name, "--data", str(root), *urls, *more])


def refused(server, root, capsys, *more, name="refcoco"):
    """The one line with which the command gives up, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(server, root, *more, name=name)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def tree(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


PREPARED = {"refcoco/refs(unc).p", "refcoco/instances.json", "missing.txt"}
PREPARED |= {f"images/train2014/{name}" for name in IMAGES}


def assert_prepared(root, also=()):
    """Exactly the files promised, whole, nothing half-written beside them."""
    assert tree(root) == PREPARED | set(also)
    for name, content in IMAGES.items():
        assert (root / "images" / "train2014" / name).read_bytes() == content
    for name, content in annotation_files().items():
        if name.startswith("refcoco/"):
            assert (root / name).read_bytes() == content
    assert (root / "missing.txt").read_text() == ""


def test_one_command_brings_annotations_and_only_the_images_they_use(server, tmp_path, capsys):
    """12 refs of 12 images; instances.json lists a 13th that no ref uses: it is not asked for.

    The archive's hash is printed.
    """
    run(server, tmp_path / "new" / "folder")
    assert_prepared(tmp_path / "new" / "folder")
    asked = [path for path, _ in server.requests]
    assert sorted(asked) == sorted({"/a/refcoco.zip", *(f"/i/train2014/{name}" for name in IMAGES)})
    said = capsys.readouterr().out
    assert hashlib.sha256(server.files["/a/refcoco.zip"]).hexdigest() in said
    assert "train: 8 refs, 16 sentences, 8 images" in said and "GB free" in said
    assert said.index("GB free") < said.index("SHA-256")


def test_what_is_there_and_whole_is_not_fetched_again_but_what_is_broken_is(server, tmp_path):
    """Of twelve images one is cut short, one has another size: a second run asks for these two."""
    run(server, tmp_path)
    cut, other = sorted(IMAGES)[3:5]
    images = tmp_path / "images" / "train2014"
    (images / cut).write_bytes(IMAGES[cut][:-500])
    (images / other).write_bytes(IMAGES[cut])
    server.requests.clear()
    run(server, tmp_path)
    assert_prepared(tmp_path)
    assert sorted(server.requests) == [(f"/i/train2014/{name}", None) for name in (cut, other)]


@pytest.mark.parametrize("fault", ["truncate", "stall", "wrong", "redirect", 500, 503, 429])
def test_a_fault_that_passes_leaves_no_trace(server, tmp_path, impatient, fault):
    """The archive and one image fail once in each way of servers, and are asked for again."""
    name = sorted(IMAGES)[0]
    server.faults[f"/i/train2014/{name}"] = [fault]
    if fault != "wrong":  # an archive that is none ends the run: see below
        server.faults["/a/refcoco.zip"] = [fault]
    run(server, tmp_path)
    assert_prepared(tmp_path)


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    """Half of the zip came: the second request asks for the other half alone."""
    server.faults["/a/refcoco.zip"] = ["truncate"]
    run(server, tmp_path)
    half = len(server.files["/a/refcoco.zip"]) // 2
    spans = [span for path, span in server.requests if path == "/a/refcoco.zip"]
    assert spans == [None, f"bytes={half}-"]
    assert_prepared(tmp_path)


def test_a_server_without_range_sends_all_of_it_again(server, tmp_path, capsys):
    """Half of the zip came; the next answer begins at byte 0 and must not be appended to it."""
    server.faults["/a/refcoco.zip"] = ["truncate", "no-range"]
    run(server, tmp_path)
    assert_prepared(tmp_path)
    assert hashlib.sha256(server.files["/a/refcoco.zip"]).hexdigest() in capsys.readouterr().out


def test_the_beginning_of_another_file_is_thrown_away(server, tmp_path):
    """A longer file's .part cannot be continued (HTTP 416): it is fetched from its first byte."""
    (tmp_path / "refcoco.zip.part").write_bytes(bytes(10**6))
    run(server, tmp_path)
    assert_prepared(tmp_path)


def test_missing_images_are_listed_and_not_fatal(server, tmp_path, capsys):
    """Two of twelve: 404 is asked once, a web page four times; missing.txt lists both.

    The next run completes. A broken copy of the first that was there before is removed.
    """
    gone, ill = sorted(IMAGES)[1], sorted(IMAGES)[7]
    server.faults = {f"/i/train2014/{gone}": [404, "…"], f"/i/train2014/{ill}": ["wrong", "…"]}
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    (tmp_path / "images" / "train2014" / gone).write_bytes(IMAGES[gone][:-500])
    run(server, tmp_path)
    asked = [path.rpartition("/")[2] for path, _ in server.requests]
    assert (asked.count(gone), asked.count(ill)) == (1, 4)
    lines = [line.split("\t") for line in (tmp_path / "missing.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == [gone, ill]
    assert "404" in lines[0][1] and "identify" in lines[1][1]
    assert "10 images are whole, 2 missing" in capsys.readouterr().out
    assert tree(tmp_path) == PREPARED - {f"images/train2014/{name}" for name in (gone, ill)}
    server.faults.clear()
    run(server, tmp_path)
    assert_prepared(tmp_path)


def test_an_image_that_is_not_the_one_stated_is_missing(server, tmp_path):
    """instances.json says 91 x 64; the server has a JPEG of 97 x 64, which would shift masks."""
    first, seventh = sorted(IMAGES)[0], sorted(IMAGES)[6]
    server.files[f"/i/train2014/{first}"] = IMAGES[seventh]
    run(server, tmp_path)
    assert "(97, 64) pixels instead of (91, 64)" in (tmp_path / "missing.txt").read_text()
    assert not (tmp_path / "images" / "train2014" / first).exists()


def test_many_failures_in_a_row_end_the_run_with_one_line(server, tmp_path, capsys, monkeypatch):
    """Every image 404: after five in a row the address is named; not all twelve are asked for."""
    monkeypatch.setattr(prepare, "MAX_CONSECUTIVE_FAILURES", 5)
    server.faults = {f"/i/train2014/{name}": [404, "…"] for name in IMAGES}
    line = refused(server, tmp_path, capsys, "--workers", "1")
    assert f"{server.url}/i/train2014" in line
    assert "--images-url" in line and "5 images in a row" in line
    assert 5 <= len([path for path, _ in server.requests if "train2014" in path]) < 12


def test_an_archive_that_is_none_ends_the_run_and_leaves_nothing(server, tmp_path, capsys):
    """An error page with status 200, as dead hosts send it: the address, an empty folder."""
    server.faults["/a/refcoco.zip"] = ["wrong", "…"]
    assert f"{server.url}/a/refcoco.zip" in refused(server, tmp_path, capsys)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("fault", [404, 500, "stall", "truncate"])
def test_annotations_that_cannot_be_had_are_one_line_with_the_address(
    server, tmp_path, capsys, impatient, fault
):
    """Nothing but the .part, from which the next run goes on, is left behind."""
    server.faults["/a/refcoco.zip"] = [fault, "…"]
    assert f"{server.url}/a/refcoco.zip" in refused(server, tmp_path, capsys)
    assert tree(tmp_path) <= {"refcoco.zip.part"}


def test_an_archive_writes_nothing_but_the_files_named_here(server, tmp_path):
    """Members that climb out, are absolute or lie beside the wanted ones stay in the archive."""
    evil = {
        "../evil.p": b"",
        "refcoco/../../refs(evil).p": b"",
        "/refcoco/refs(evil).p": b"",
        "refcoco/evil.py": b"",
    }
    server.files["/a/refcoco.zip"] = zipped(annotation_files() | evil)
    run(server, tmp_path / "data")
    assert tree(tmp_path) == {f"data/{path}" for path in PREPARED}
    assert not Path("/refcoco/refs(evil).p").exists()


def test_a_link_in_an_archive_leads_nowhere(server, tmp_path, capsys):
    """instances.json as a symbolic link to a file outside: the link's own text is read: no JSON."""
    (tmp_path / "secret.json").write_bytes(annotation_files()["refcoco/instances.json"])
    link = zipfile.ZipInfo("refcoco/instances.json")
    link.external_attr = 0o120777 << 16
    files = annotation_files()
    file = io.BytesIO(zipped({"refcoco/refs(unc).p": files["refcoco/refs(unc).p"]}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(link, str(tmp_path / "secret.json"))
    server.files["/a/refcoco.zip"] = file.getvalue()
    assert "instances.json" in refused(server, tmp_path / "data", capsys)
    assert tree(tmp_path / "data") == set()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(server, tmp_path, capsys, monkeypatch):
    """A member of 10 MB where 1 MB is allowed; the archive that carries it is 10 kB."""
    monkeypatch.setattr(prepare, "MAX_FILE_BYTES", 10**6)
    bomb = {"refcoco/refs(bomb).p": bytes(10**7)}
    server.files["/a/refcoco.zip"] = zipped(annotation_files() | bomb)
    assert "refs(bomb).p would be 10,000,000 bytes" in refused(server, tmp_path, capsys)
    assert tree(tmp_path) == set()


def test_a_pickle_that_wants_to_run_code_is_refused(server, tmp_path, capsys):
    """The archive's refs call os.mkdir when unpickled: no folder is made, nothing is kept."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    hostile = {"refcoco/refs(unc).p": pickle.dumps([Hostile()], 0)}
    server.files["/a/refcoco.zip"] = zipped(annotation_files() | hostile)
    assert "refs(unc).p" in refused(server, tmp_path / "data", capsys)
    assert tree(tmp_path) == set() and not (tmp_path / "pwned").exists()


def test_a_damaged_member_is_noticed(server, tmp_path, capsys):
    """One bit of instances.json flipped inside the zip: its checksum tells."""
    content = bytearray(zipped(annotation_files(), zipfile.ZIP_STORED))
    content[content.index(b'"images"') + 3] ^= 1
    server.files["/a/refcoco.zip"] = bytes(content)
    assert "refcoco.zip is damaged" in refused(server, tmp_path, capsys)
    assert tree(tmp_path) == set()


@pytest.mark.parametrize(
    "name, row", [("refcoco", (1, 3, 1)), ("refcoco+", (2, 2, 1)), ("refcoco+", (1, 2, 2))]
)
def test_split_sizes_must_be_the_published_ones(server, tmp_path, capsys, monkeypatch, name, row):
    """testB has (1, 2, 1) refs, sentences, images, not `row`: the folder is never filled."""
    monkeypatch.setitem(prepare.PUBLISHED, name, PUBLISHED | {"testB": row})
    server.files[f"/a/{name}.zip"] = zipped(annotation_files(name))
    line = refused(server, tmp_path, capsys, name=name)
    assert "testB" in line and "--annotations-url" in line
    assert tree(tmp_path) == set()


def test_sentence_counts_from_memory_are_a_note(server, tmp_path, capsys, monkeypatch):
    """RefCOCO+ and RefCOCOg: refs and images must fit; another number of sentences is noted."""
    monkeypatch.setitem(prepare.PUBLISHED, "refcoco+", PUBLISHED | {"val": (2, 5, 2)})
    server.files["/a/refcoco+.zip"] = zipped(annotation_files("refcoco+"))
    run(server, tmp_path, name="refcoco+")
    assert "note: 5 sentences were expected in val" in capsys.readouterr().out
    assert (tmp_path / "refcoco+" / "refs(unc).p").exists()


def test_annotations_of_ones_own_are_checked_and_kept(server, tmp_path, capsys, monkeypatch):
    """A folder that exists is not downloaded; its sizes are checked, and it is not removed."""
    for name, content in annotation_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    monkeypatch.setitem(prepare.PUBLISHED, "refcoco", PUBLISHED | {"val": (3, 4, 2)})
    assert f"{tmp_path / 'refcoco'} (remove it)" in refused(server, tmp_path, capsys)
    assert tree(tmp_path) == before and server.requests == []


def test_two_splittings_share_one_folder(server, tmp_path, monkeypatch):
    """RefCOCOg: one archive holds refs(umd).p and refs(google).p and is downloaded once."""
    for name in ("refcocog-umd", "refcocog-google"):
        monkeypatch.setitem(prepare.PUBLISHED, name, PUBLISHED)
    both = annotation_files("refcocog", "umd") | annotation_files("refcocog", "google")
    server.files["/a/refcocog.zip"] = zipped(both)
    run(server, tmp_path, name="refcocog-umd")
    server.requests.clear()
    run(server, tmp_path, name="refcocog-google")
    assert server.requests == []


def grefcoco_files():
    """The annotations as gRefCOCO's: ref 1 names two objects, ref 2 none, the others one."""
    files = annotation_files("grefcoco")
    refs = pickle.loads(files.pop("grefcoco/refs(unc).p"))
    for ref in refs:
        ref["ann_id"] = [ref["ann_id"]]
    refs[0]["ann_id"] = [1, 2]
    refs[1]["ann_id"] = [-1]
    return files | {"grefcoco/grefs(unc).json": json.dumps(refs).encode()}


def test_grefcocos_annotations_come_by_browser_and_the_line_says_so(server, tmp_path, capsys):
    """No archive of it can be fetched by a program: one line, and nothing but an empty folder."""
    with pytest.raises(SystemExit) as stop:
        prepare.main(["grefcoco", "--data", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert "github.com/henghuiding/gRefCOCO" in lines[0] and str(tmp_path / "grefcoco") in lines[0]
    assert tree(tmp_path) == set()


def test_grefcocos_counts_are_printed_and_its_images_fetched(server, tmp_path, capsys):
    """Files put there by hand, of any size: 2 sentences name two objects, 2 none."""
    for name, content in grefcoco_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    run(server, tmp_path, name="grefcoco")
    said = capsys.readouterr().out
    assert "grefcoco train: 8 refs, 16 sentences, 8 images" in said
    assert "grefcoco train: 2 sentences name several objects, 2 none" in said
    assert "grefcoco val: 0 sentences name several objects, 0 none" in said
    assert {path for path, _ in server.requests} == {f"/i/train2014/{name}" for name in IMAGES}


def test_grefcoco_can_be_had_from_an_address_of_ones_own(server, tmp_path):
    """--annotations-url names a place that has grefcoco.zip."""
    server.files["/a/grefcoco.zip"] = zipped(grefcoco_files())
    run(server, tmp_path, name="grefcoco")
    files = {"grefcoco/grefs(unc).json", "grefcoco/instances.json", "missing.txt"}
    assert files <= tree(tmp_path)


def test_too_little_disk_is_said_before_anything_is_fetched(server, tmp_path, capsys, monkeypatch):
    """Free: 1 MB; needed: twelve images of 165 kB and the annotations."""
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    assert "--data" in refused(server, tmp_path, capsys)
    assert server.requests == [] and tree(tmp_path) == set()


def test_all_images_come_in_one_zip_that_is_resumed_and_unpacked(server, tmp_path):
    """The zip breaks off once; no image is asked for singly; a second run asks for nothing."""
    server.faults["/i/zips/train2014.zip"] = ["truncate"]
    run(server, tmp_path, "--all-images")
    half = len(server.files["/i/zips/train2014.zip"]) // 2
    path = "/i/zips/train2014.zip"
    assert server.requests[1:] == [(path, None), (path, f"bytes={half}-")]
    assert_prepared(tmp_path, also=["train2014.zip"])
    server.requests.clear()
    ages = [path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.jpg")]
    run(server, tmp_path, "--all-images")
    assert ages == [path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.jpg")]
    assert server.requests == []


@pytest.mark.parametrize(
    "option, value", [("workers", "0"), ("images-url", "coco.org"), ("data", "/dev/null/x")]
)
def test_wrong_arguments_are_one_line(server, tmp_path, capsys, option, value):
    """No worker; an address without http://; a folder that cannot be: each line names the value."""
    assert value in refused(server, tmp_path, capsys, f"--{option}", value)


# The command in processes that can be killed: one imports (seconds) and forks for every run.
DRIVER = """
import json, os, sys
import prepare
from utils import download
download.TIMEOUT = 3
published = json.loads(sys.argv[1])
prepare.PUBLISHED["refcoco"] = {split: tuple(row) for split, row in published.items()}
prepare.ANNOTATION_BYTES = 1000
prepare.TRAIN2014_IMAGES = 12
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(prepare.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def stop_in(server, tmp_path):
    """stop_in(path, by, *options): stop a run by a signal when half of `path` came; its status."""
    command = [sys.executable, "-c", DRIVER, json.dumps(PUBLISHED)]
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    arguments = ["refcoco", "--data", str(tmp_path), "--workers", "1"]
    arguments += ["--images-url", f"{server.url}/i", "--annotations-url", f"{server.url}/a"]

    def stop(path=None, by=0, *options):
        server.faults[path] = ["stall"]
        before = len(server.requests)
        driver.stdin.write(json.dumps([*arguments, *options]) + "\n")
        driver.stdin.flush()
        child = int(driver.stdout.readline())
        for _ in range(6000 if path else 0):
            if path in [asked for asked, _ in server.requests[before:]]:
                break
            time.sleep(0.01)
        os.kill(child, by)
        return int(driver.stdout.readline())

    yield stop
    driver.stdin.close()
    driver.wait(60)
    with driver:  # closes its pipes
        assert driver.stderr.read() == "error: stopped; the same command continues where it was\n"


def test_stopped_anywhere_the_same_command_completes(server, tmp_path, stop_in):
    """SIGKILL half way through annotations, the whole zip, the third image; Ctrl-C at the sixth.

    A file under its own name is whole at those moments; the last run completes and tidies up.
    """
    third, sixth = (f"/i/train2014/{sorted(IMAGES)[n]}" for n in (2, 5))
    assert stop_in("/a/refcoco.zip", signal.SIGKILL) == -signal.SIGKILL
    assert tree(tmp_path) <= {"refcoco.zip.part"}
    assert stop_in("/i/zips/train2014.zip", signal.SIGKILL, "--all-images") == -signal.SIGKILL
    assert stop_in(third, signal.SIGKILL) == -signal.SIGKILL
    assert stop_in(sixth, signal.SIGINT) == 2
    for path in (tmp_path / "images" / "train2014").iterdir():
        assert path.suffix == ".part" or path.read_bytes() == IMAGES[path.name]
    assert not (tmp_path / "images" / "train2014" / sorted(IMAGES)[5]).exists()
    assert stop_in(None, 0, "--all-images") == 0
    assert_prepared(tmp_path, also=["train2014.zip"])
