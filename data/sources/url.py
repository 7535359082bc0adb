"""One file from the web, at the first place that has it; a zip archive is unpacked within bounds.

An archive decides neither where its files are written nor how much of the disk they take.
"""

import errno
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data.errors import DataError
from data.sources.fetch import Wanted, describe_url
from data.sources.hub import HUB
from data.sources.source import Made, Request
from data.trust import below, check_name, described, group

MOST_MEMBERS = 100_000
LARGEST_UNPACKED = 4 << 30  # bytes of all members, far above the CORE bundle
MOST_EXPANSION = 100  # times the archive's own size, past SMALL_UNPACKED: text shrinks to a tenth or so
SMALL_UNPACKED = 16 << 20
LARGEST_DIRECTORY = 32 << 20  # bytes of the list of members; zipfile takes ten times as many for it
CHUNK = 1 << 20


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any] | None:
    """{"files": {name: {"sha256", "bytes"}}, "source": {"url"}} of the first place that has the file.

    A mirror set as endpoint is asked first, for files/NAME. None when that would need the network and `online` is
    False. Raises DataError when no place has it.
    """
    if not params.urls:
        raise DataError("data.urls: names no file.")
    name = check_name(PurePosixPath(urlsplit(params.urls[0]).path).name, "data.urls")
    endpoint = (memory.get("endpoint") or HUB).rstrip("/")
    places = list(params.urls) if endpoint == HUB else [f"{endpoint}/files/{name}", *params.urls]
    remembered = group(memory, "url")
    found = next((url for url in places if described(remembered.get(url))), None)
    if found is None:
        if not online:
            return None
        found = _first(places, remembered, name)
    return {"files": {name: remembered[found]}, "source": {"url": found}}


def _first(places: list[str], remembered: dict[str, Any], name: str) -> str:
    reasons = []
    for url in places:
        try:
            remembered[url] = describe_url(url)
            return url
        except DataError as error:
            reasons.append(str(error))
    raise DataError(f"{name} is not available. " + " ".join(reasons))


def make(request: Request) -> Made | None:
    """Link the file into `out`; a zip is also unpacked beside itself if params.extract says so."""
    ((name, file),) = request.identity["files"].items()
    wanted = Wanted(name, request.identity["source"]["url"], file["sha256"], file["bytes"])
    if not request.fetch([wanted]):
        return None
    if request.params.extract:
        unzip(request.out / name, request.out, wanted.url)
    return Made([name])


def unzip(path: Path, folder: Path, where: str) -> None:
    """Unpack the files of the archive `path` below `folder`. where: who sent it, for messages.

    Raises DataError for a file that is not a zip, for more bytes than the bounds above allow and, before anything is
    written, for members that are links or devices, encrypted, share a name, or have one that leaves the folder.
    """
    try:
        with open(path, "rb") as file:
            # Private, but only zipfile itself knows which of several end records it will believe.
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        # Zipfile reads the list of members completely, whatever its size.
        if end and end[zipfile._ECD_SIZE] > LARGEST_DIRECTORY:  # type: ignore[attr-defined]
            raise DataError(f"{where}: its list of members exceeds {LARGEST_DIRECTORY >> 20} MB. Refused.")
        with zipfile.ZipFile(path) as archive:
            members = [info for info in _checked(archive.infolist(), path.name, where) if not info.is_dir()]
            left = min(LARGEST_UNPACKED, max(SMALL_UNPACKED, MOST_EXPANSION * path.stat().st_size))
            if sum(info.file_size for info in members) > left:
                raise _too_large(where, left)
            for info in members:
                left -= _write(archive, info, below(folder, info.orig_filename, where), left, where)
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError) as error:
        # A seek to an offset that the archive names may raise EINVAL; other system errors are not the archive's fault.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DataError(
            f"{where}: is not a complete zip file ({error}). Fetch it again, or try another mirror."
        ) from None


def _checked(members: list[zipfile.ZipInfo], own_name: str, where: str) -> list[zipfile.ZipInfo]:
    if len(members) > MOST_MEMBERS:
        raise DataError(f"{where}: has {len(members):,} members, more than the {MOST_MEMBERS:,} allowed. Refused.")
    files, folders = {own_name.casefold()}, set()
    for info in members:
        name = check_name(info.orig_filename.removesuffix("/"), where)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{where}: its member {name} is a link or a device. Refused.")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{where}: its member {name} is encrypted, or not compressed by deflate. Refused.")
        parts = name.casefold().split("/")  # on some file systems names that differ only by case are one
        folders |= {"/".join(parts[:i]) for i in range(1, len(parts) + info.is_dir())}
        if not info.is_dir():
            if "/".join(parts) in files:
                raise DataError(f"{where}: has more than one member named {name}. Refused.")
            files.add("/".join(parts))
    for name in files & folders:
        raise DataError(f"{where}: its member {name} is both a file and a folder. Refused.")
    return members


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left: int, where: str) -> int:
    """Write a member completely or not at all; returns the bytes written, at most `left`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}\\tmp")  # no member can have this name: backslashes are refused
    written = 0
    try:
        with archive.open(info) as source, open(temporary, "wb") as file:
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > left:
                    raise _too_large(where, left)
                file.write(chunk)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _too_large(where: str, most: int) -> DataError:
    return DataError(f"{where}: unpacks to more than the {most / 1e6:,.0f} MB allowed for its size. Refused.")
