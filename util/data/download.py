"""Download of one file: a broken download is resumed, and the checksum is compared."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from util.errors import UserError
from util.progress import progress

LARGEST = 4 * 2**30
"""bytes, twice the largest file of scripts/prepare_pascal.py; a server may send more than it says"""


def download(url: str, path: Path, md5: str) -> None:
    """Fetch ``url`` to ``path``; an incomplete file is called ``path.part``."""
    part = path.with_name(path.name + ".part")
    if path.exists():
        return
    if part.is_symlink():  # what it links to is not ours
        part.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"or download {url} by hand and save it as {path}"
    try:
        _receive(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} is incomplete ({error}); run again to continue {part}, {by_hand}") from error
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        part.unlink()
        raise UserError(f"{url} has MD5 {found}, not {md5}, and was deleted; run again, {by_hand}")
    part.replace(path)


def _receive(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)  # seconds without a byte
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # no bytes are left: it may be complete, the checksum tells
            return
        raise
    with response:
        have = have if response.status == 206 else 0  # a server without ranges sends the whole file
        total = have + int(response.headers.get("Content-Length", 0))
        bar = progress(desc=part.stem, total=total or None, initial=have, unit="B", unit_scale=True)
        with part.open("ab" if have else "wb") as file, bar:
            while data := response.read(2**20):
                bar.update(file.write(data))
                if file.tell() > LARGEST:
                    part.unlink()
                    raise ConnectionError(f"the server sends more than {LARGEST:,} bytes")
    if part.stat().st_size < total:
        raise ConnectionError(f"{total - part.stat().st_size:,} bytes are missing")
