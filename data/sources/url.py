"""One file from the web, wherever it can be had."""

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data.errors import DataError
from data.sources.fetch import Wanted, describe_url, fetch_all
from data.sources.hub import HUB
from data.sources.source import Made, Request, link_all
from data.sources.unzip import unzip
from data.trust import check_name, described, group


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


def make(request: Request) -> Made | None:
    """Link the file into `out`; a zip is also unpacked beside itself if asked."""
    ((name, file),) = request.identity["files"].items()
    wanted = Wanted(name, request.identity["source"]["url"], file["sha256"], file["bytes"])
    if not fetch_all([wanted], request.blobs, 1, request.on_progress, request.should_stop, request.say):
        return None
    link_all({name: file["sha256"]}, request)
    if request.params.extract:
        unzip(request.out / name, request.out, wanted.url)
    return Made([name])


def _first(places: list[str], remembered: dict[str, Any], name: str) -> str:
    reasons = []
    for url in places:
        try:
            remembered[url] = describe_url(url)
            return url
        except DataError as error:
            reasons.append(str(error))
    raise DataError(f"{name} cannot be had. " + " ".join(reasons))
