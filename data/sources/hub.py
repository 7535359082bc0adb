"""Data set repositories on a hub: a branch is resolved to a commit once, files are fetched by their SHA-256."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from data.errors import DataError, DataMistake, did_you_mean
from data.sources.fetch import Wanted, describe_url
from data.sources.source import Made, Request
from data.sources.web import ANOTHER_ENDPOINT, ask_json, http_errors, retried, status_of, unreachable
from data.trust import check_name, check_sha256, check_size, described, group, origin, shown

HUB = "https://huggingface.co"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40,64}")
MOST_PAGES = 1_000  # of a repository's list of files; the hub has up to 1,000 files on each
MOST_FILES = 500_000


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any] | None:
    """{"files": {name: {"sha256", "bytes"}}, "source": {"endpoint", "repo_id", "commit", "own_token"}}, or None when
    that would need the network and `online` is False. A branch stays at the commit that it was first resolved to.

    Raises DataError when the hub cannot be reached, lacks a file, or lists an impossible one.
    """
    if not REPOSITORY.fullmatch(params.repo_id or ""):
        raise DataMistake(f"data.repo_id: is {params.repo_id!r}, expected ORG/NAME.")
    endpoint = (memory.get("endpoint") or HUB).rstrip("/")
    own_token = gets_token(endpoint, memory.get("send_token") or [])
    place = f"{endpoint}/datasets/{params.repo_id}"
    remembered = group(memory, "hub")
    listing: Any = remembered.get(f"{place}@{params.revision}")
    # The repository may have gained files since the listing was made.
    if not _is_listing(listing) or not all(name in listing["files"] for name in _choose(params, listing["files"])):
        if not online:
            return None
        listing = _list_repository(params.repo_id, params.revision, endpoint, own_token)
        remembered[f"{place}@{params.revision}"] = listing
    files = {}
    for name in _choose(params, listing["files"]):
        if name not in listing["files"]:
            known = list(listing["files"])
            raise DataError(f"{place} has no file {name}. {did_you_mean(name, known, f'It has {len(known)} files.')}")
        check_name(name, place)
        if listing["files"][name]["sha256"] is None:  # a small file that git itself keeps
            if not online:
                return None
            url = _file_url(params.repo_id, name, listing["commit"], endpoint)
            found = describe_url(url, own_token)
            if found["bytes"] != listing["files"][name]["bytes"]:
                raise DataError(f"{url}: does not have the size that {endpoint} lists. {ANOTHER_ENDPOINT}")
            listing["files"][name] = found
        files[name] = listing["files"][name]
    source = {"endpoint": endpoint, "repo_id": params.repo_id, "commit": listing["commit"], "own_token": own_token}
    return {"files": files, "source": source}


def gets_token(endpoint: str, marked: list[str]) -> bool:
    """Return True if the user's hub token may be sent there: to the official hub, and to endpoints the user marked."""
    return origin(endpoint) in map(origin, [HUB, *marked])


def make(request: Request) -> Made | None:
    """Link the files into `out` under their names in the repository."""
    source = request.identity["source"]
    wanted = [
        Wanted(
            name=name,
            url=_file_url(source["repo_id"], name, source["commit"], source["endpoint"]),
            sha256=file["sha256"],
            bytes=file["bytes"],
            own_token=source["own_token"],
        )
        for name, file in request.identity["files"].items()
    ]
    if not request.fetch(wanted):
        return None
    val = request.params.val_shard if request.params.what == "text" and request.params.validation else None
    return Made([item.name for item in wanted if item.name != val], val)


def _choose(params: Any, known: Iterable[str]) -> list[str]:
    """The names of the wanted files, in order; a pattern that matches nothing stays as it is."""
    if params.what == "dataset":
        chosen: dict[str, None] = {}
        for pattern in params.files:
            chosen |= dict.fromkeys(sorted(fnmatch.filter(known, pattern)) or [pattern])
        if not chosen:
            raise DataMistake(f"data.files: name files of {params.repo_id}, or patterns for them.")
        return list(chosen)
    if params.train_shards is None or params.train_shards < 1:
        raise DataMistake(
            f"data.train_shards: is {params.train_shards}. Set the number of shards of {params.repo_id} to use."
        )
    train = [params.shard.format(i) for i in range(params.train_shards)]
    if params.val_shard in train:
        raise DataMistake(
            f"data.val_shard: {params.val_shard} is one of the {len(train)} training shards. Name another."
        )
    if not params.validation:
        return train
    if params.val_shard is None:
        raise DataMistake("data.val_shard: name the validation shard.")
    return [*train, params.val_shard]


def _is_listing(value: Any) -> bool:
    """Return True for what _list_repository returns. A remembered listing may be damaged, or older than its checks."""
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        return False
    return COMMIT.fullmatch(str(value.get("commit"))) is not None and all(
        described(file) or (isinstance(file, dict) and file.get("sha256", "") is None)
        for file in value["files"].values()
    )


def _list_repository(repo_id: str, revision: str, endpoint: str, own_token: bool) -> dict[str, Any]:
    """{"commit": str, "files": {path: {"sha256": str | None, "bytes": int}}} of a data set repository.

    sha256 is None for small files that git itself keeps. Raises DataError.
    """
    api = f"{endpoint}/api/datasets/{repo_id}"

    def ask(url: str) -> tuple[Any, str]:
        return retried(lambda: ask_json(url, own_token), url)

    try:
        about, _ = ask(f"{api}/revision/{quote(revision, safe='')}")
        commit = about.get("sha") if isinstance(about, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise _not_a_hub(api, "no commit")
        files: dict[str, Any] = {}
        page = f"{api}/tree/{commit}?recursive=true"
        for _ in range(MOST_PAGES):
            entries, page = ask(page)
            files |= _files(entries, api)
            if not page:
                return {"commit": commit, "files": files}
            if len(files) > MOST_FILES:
                break
    except http_errors() as error:
        raise _refusal(error, repo_id, revision, endpoint) from None
    raise DataError(f"{api}: the list of files has no end ({len(files):,} files so far). {ANOTHER_ENDPOINT}")


def _files(entries: Any, api: str) -> dict[str, Any]:
    """The files on a page of a repository's list. Raises DataError for a page of another shape."""
    if not isinstance(entries, list):
        raise _not_a_hub(api, "no list of files")
    files = {}
    for entry in entries:
        is_entry = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not is_entry or not isinstance(lfs := entry.get("lfs"), dict | None):
            raise _not_a_hub(api, f"{shown(entry)} in the list of files")
        if entry.get("type") == "file":
            where = f"{api}: {entry['path']}"
            sha256 = check_sha256(lfs.get("oid"), where) if lfs is not None else None
            files[entry["path"]] = {"sha256": sha256, "bytes": check_size(entry.get("size"), where)}
    return files


def _not_a_hub(api: str, what: str) -> DataError:
    return DataError(f"{api}: the answer is not that of a hub ({what}). {ANOTHER_ENDPOINT}")


def _refusal(error: Exception, repo_id: str, revision: str, endpoint: str) -> DataError:
    """The error for a hub's refusal, by its X-Error-Code if it sends one."""
    response = getattr(error, "response", None)
    code = response.headers.get("X-Error-Code") if response is not None else None
    if code == "GatedRepo":
        return DataError(f"{repo_id} at {endpoint} is gated. Accept its terms there, then `hf auth login`.")
    if code == "RevisionNotFound":
        return DataMistake(f"data.revision: {repo_id} at {endpoint} has no {revision!r}.")
    if code == "RepoNotFound" or status_of(error) in (401, 404):  # a mirror may not say which
        return DataMistake(
            f"data.repo_id: there is no data set {repo_id} at {endpoint}, or it is private (`hf auth login`)."
        )
    return unreachable(f"{repo_id} at {endpoint}", error)


def _file_url(repo_id: str, path: str, commit: str, endpoint: str) -> str:
    return f"{endpoint}/datasets/{repo_id}/resolve/{quote(commit, safe='')}/{quote(path)}"
