"""One file from the web: resumed where a broken download stopped, and checked."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from util.errors import UserError
from util.progress import progress

CHUNK = 1 << 20
TIMEOUT = 60
"""seconds without a byte"""


def download(url: str, path: Path, md5: str) -> None:
    """Fetch ``url`` to ``path``. What has arrived stands in ``path.part``; the name tells that it is whole.

    Raises:
        UserError: no connection, a broken one, a wrong checksum, or no place to write.
    """
    part = path.with_name(path.name + ".part")
    by_hand = f"or fetch {url} by hand and save it as {path}"
    try:
        if path.exists():
            if file_md5(path) != md5:
                raise UserError(f"{path} is not the file at {url}: its MD5 is not {md5}; delete it and run again")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        missing = _receive(url, part)
        if missing > 0:
            raise UserError(
                f"the connection broke, {missing:,} bytes of {url} are missing; run again to continue {part}, {by_hand}"
            )
        if (found := file_md5(part)) != md5:
            part.unlink()
            raise UserError(f"{url} came with MD5 {found}, not {md5}, and was deleted; run again, {by_hand}")
        part.replace(path)
    except urllib.error.URLError as error:
        raise UserError(f"{url} cannot be fetched ({error.reason}); run again later, {by_hand}") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: the connection broke ({error!r}); run again to continue {part}, {by_hand}") from error
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written ({error.strerror})") from error


def _receive(url: str, part: Path) -> int:
    """Append to ``part`` what it lacks, and return the number of bytes that did not come."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what we have: it may be whole, the checksum tells
            return 0
        raise
    with response:
        span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or span is None or int(span[1]) != have:
            if response.status == 206:
                raise http.client.HTTPException("the server sent another part than asked for")
            have = 0  # the server knows no ranges and sends all of it
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            part.open("ab" if have else "wb") as file,
            progress(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar,
        ):
            while data := response.read(CHUNK):
                file.write(data)
                bar.update(len(data))
        return (total or 0) - part.stat().st_size


def file_md5(path: Path) -> str:
    """Return the MD5 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
