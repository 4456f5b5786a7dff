"""Downloads: small files whole or not at all, large ones resumed; dead links fail at once."""

import hashlib
import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from utils.common import UserError

TIMEOUT = 20  # seconds of silence before a connection is given up
RETRY_DELAYS = (1, 2, 4)  # seconds from one attempt to the next
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # time-outs and HTTP errors are OSErrors
CACHE_REMEDY = "name a folder that can be written by the environment variable ETRIS_CACHE"


def cache_folder() -> Path:
    """Where downloaded weights are kept: ETRIS_CACHE, else ~/.cache/etris."""
    return Path(os.environ.get("ETRIS_CACHE") or Path.home() / ".cache" / "etris")


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """A file's bytes, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------------------------------- attempts
def is_refusal(error) -> bool:
    """Whether the server said no for good, such as 404; neither 408, 416, 429 nor 5xx is that."""
    if not isinstance(error, urllib.error.HTTPError):
        return False
    return error.code < 500 and error.code not in (408, 416, 429)


def retry(attempt, wait=time.sleep):
    """Call attempt() until it succeeds, at most once more than there are RETRY_DELAYS.

    The last error is raised; so is a refusal at once, and any error after wait(seconds) is true.
    """
    for seconds in RETRY_DELAYS:
        try:
            return attempt()
        except NETWORK_ERRORS as error:
            if is_refusal(error) or wait(seconds):
                raise
    return attempt()


def unreachable(url, error) -> UserError:
    reason = str(error) or repr(error)
    return UserError(f"{url}: {reason}: try again later, or use another address")


# ------------------------------------------------------------------------------ whole or not at all
def fetch(url, path, hash_prefix=None, progress=True):
    """Download `url` to `path`, whole or not at all, with torch.hub; for files of up to a few GB.

    hash_prefix: the first digits of the file's SHA-256. Without it a download that breaks off goes
    unnoticed: check what came. UserError where the file cannot be had, or has another hash.
    """

    def attempt():
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=show_bar)
        except RuntimeError as error:  # another hash: another file, or the download broke off
            raise ConnectionError(error) from error

    show_bar = progress and sys.stderr.isatty()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub waits forever
    print(f"downloading {url}")
    try:
        retry(attempt)
    except NETWORK_ERRORS as error:
        raise unreachable(url, error) from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------------------------- with resumption
def request(url, start=0):
    """Open `url` from byte `start` on; the answer is a context manager."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address: it begins with http:// or https://")
    headers = {"User-Agent": "etris-prepare"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def resume_download(url, tmp_path: Path):
    """Append to `tmp_path` what it lacks of `url`; ConnectionError where the answer breaks off."""
    start = size_of(tmp_path)
    try:
        answer = request(url, start)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows: another file's beginning, or killed at the end
            tmp_path.unlink()
        raise
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        start = 0  # the server sends all of it again
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length else None
    bar = tqdm(
        desc=tmp_path.stem,
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        file=sys.stdout,
    )
    with answer, bar, open(tmp_path, "ab" if start else "wb") as file:
        while chunk := answer.read(1 << 18):
            file.write(chunk)
            bar.update(len(chunk))
    size = size_of(tmp_path)
    if total is not None and size != total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes")


def download(url, path, whole=zipfile.is_zipfile):
    """Download `url` to `path`, continuing `path`.part.

    UserError where it cannot be had, or where whole(path of the file that came) is false.
    """
    tmp_path = Path(f"{path}.part")
    try:
        retry(lambda: resume_download(url, tmp_path))
    except NETWORK_ERRORS as error:
        raise unreachable(url, error) from error
    if not whole(tmp_path):
        tmp_path.unlink()
        reason = "what came is not the file expected, or broken"
        raise UserError(f"{url}: {reason}: try again later, or use another address")
    os.replace(tmp_path, path)
