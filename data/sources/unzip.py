"""Zip archives from outside, unpacked within bounds: what could leave the folder, or fill the disk, is refused."""

import errno
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from data.errors import DataError
from data.trust import below, check_name

MOST_MEMBERS = 100_000
LARGEST_UNPACKED = 4 << 30  # bytes of all members, far above the CORE bundle
MOST_EXPANSION = 100  # times the archive's own size, past SMALL_UNPACKED: text shrinks to a tenth or so
SMALL_UNPACKED = 16 << 20
LARGEST_DIRECTORY = 32 << 20  # bytes of the list of members; zipfile takes ten times as many for it
CHUNK = 1 << 20


def unzip(path: Path, folder: Path, where: str) -> None:
    """Unpack the files of the archive `path` below `folder`. where: who sent it, for messages.

    Raises DataError for a file that is not a zip, for more bytes than the bounds above allow and, before anything is
    written, for members that are links or devices, encrypted, share a name, or have one that leaves the folder.
    """
    try:
        _check_directory(path, where)
        with zipfile.ZipFile(path) as archive:
            members = [info for info in _checked(archive.infolist(), path.name, where) if not info.is_dir()]
            left = min(LARGEST_UNPACKED, max(SMALL_UNPACKED, MOST_EXPANSION * path.stat().st_size))
            if sum(info.file_size for info in members) > left:
                raise _too_large(where, left)
            for info in members:
                left -= _write(archive, info, below(folder, info.orig_filename, where), left, where)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # what a seek to an offset that the archive names may raise
            raise
        raise _not_whole(where, error) from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError) as error:
        raise _not_whole(where, error) from None


def _not_whole(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: is not a whole zip file ({error}). Fetch it again, or try another mirror.")


def _check_directory(path: Path, where: str) -> None:
    """Raise DataError for a list of members that would fill the memory: zipfile reads it whole, whatever its size."""
    with open(path, "rb") as file:
        # Private, but only zipfile itself knows which of several end records it will believe.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > LARGEST_DIRECTORY:  # type: ignore[attr-defined]
        raise DataError(f"{where}: its list of members exceeds {LARGEST_DIRECTORY >> 20} MB. Refused.")


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
    """Write a member, whole or not at all; returns the bytes written, at most `left`."""
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
