"""A data set repository on a hub, through huggingface_hub: a branch is resolved once, its files fetched by sha256."""

import difflib
import fnmatch
from collections.abc import Iterable
from typing import Any

from data.errors import DataError, DataMistake
from data.fetch import TIMEOUT_SECONDS, Wanted, describe_url, fetch_all, http_errors, patiently, status_of, unreachable
from data.source import Made, Request, link_all

RESULT_NEUTRAL = "fetches files that are checked against the sha256 in the key"

HUB = "https://huggingface.co"


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any] | None:
    """{"files": {name: {"sha256", "bytes"}}, "source": {"endpoint", "repo_id", "commit"}}, or None when that would
    need the network and `online` is False. A branch stays at the commit it was first resolved to.

    Raises DataError when the hub cannot be reached or lacks a file.
    """
    if not params.repo_id or params.repo_id.count("/") != 1:
        raise DataMistake(f"data.repo_id: is {params.repo_id!r}, but ORG/NAME is needed.")
    endpoint = (memory.get("endpoint") or HUB).rstrip("/")
    place = f"{endpoint}/datasets/{params.repo_id}"
    remembered = memory.setdefault("hub", {})
    listing = remembered.get(f"{place}@{params.revision}")
    if listing is None or not _has_all(params, listing):
        if not online:
            return None
        listing = remembered[f"{place}@{params.revision}"] = _list_repository(params.repo_id, params.revision, endpoint)
    names = _choose(params, listing["files"])
    for name in names:
        if name not in listing["files"]:
            raise _missing(name, list(listing["files"]), place)
        if listing["files"][name]["sha256"] is None:  # a small file that git itself keeps
            if not online:
                return None
            url = _file_url(params.repo_id, name, listing["commit"], endpoint)
            listing["files"][name] = describe_url(url, own_token=True)
    files = {name: listing["files"][name] for name in names}
    source = {"endpoint": endpoint, "repo_id": params.repo_id, "commit": listing["commit"]}
    return {"files": files, "source": source}


def make(request: Request) -> Made | None:
    """Link the files into `out` under the names the repository gives them."""
    source = request.identity["source"]
    wanted = [
        Wanted(
            name=name,
            url=_file_url(source["repo_id"], name, source["commit"], source["endpoint"]),
            sha256=file["sha256"],
            bytes=file["bytes"],
            own_token=True,
        )
        for name, file in request.identity["files"].items()
    ]
    if not fetch_all(wanted, request.blobs, request.workers, request.on_progress, request.should_stop, request.say):
        return None
    link_all({item.name: item.sha256 for item in wanted}, request)
    val = request.params.val_shard if request.params.what == "text" and request.params.validation else None
    return Made([item.name for item in wanted if item.name != val], val)


def _choose(params: Any, known: Iterable[str]) -> list[str]:
    """The names of the wanted files, in order; one that nothing has is left as it was written."""
    if params.what == "dataset":
        chosen: dict[str, None] = {}
        for pattern in params.files:
            chosen |= dict.fromkeys(sorted(fnmatch.filter(known, pattern)) or [pattern])
        if not chosen:
            raise DataMistake(f"data.files: name files of {params.repo_id}, or patterns for them.")
        return list(chosen)
    if params.train_shards is None or params.train_shards < 1:
        raise DataMistake(
            f"data.train_shards: is {params.train_shards}; say how many shards of {params.repo_id} to take."
        )
    train = [params.shard.format(i) for i in range(params.train_shards)]
    if params.val_shard in train:
        raise DataMistake(
            f"data.val_shard: {params.val_shard} is one of the {len(train)} training shards. Name another."
        )
    if not params.validation:
        return train
    if params.val_shard is None:
        raise DataMistake("data.val_shard: name the shard that is held out.")
    return [*train, params.val_shard]


def _has_all(params: Any, listing: dict[str, Any]) -> bool:
    """Whether a listing made earlier still answers: the repository may have grown since."""
    return all(name in listing["files"] for name in _choose(params, listing["files"]))


def _list_repository(repo_id: str, revision: str, endpoint: str) -> dict[str, Any]:
    """{"commit": str, "files": {path: {"sha256": str | None, "bytes": int}}} of a data set repository.

    sha256 is None for small files that git itself keeps. Raises DataError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint)

    def ask() -> tuple[str, list[Any]]:
        commit = api.dataset_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS).sha or revision
        return commit, list(api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type="dataset"))

    try:
        commit, entries = patiently(ask, endpoint)
    except GatedRepoError:
        raise DataError(f"{repo_id} at {endpoint} is gated. Accept its terms there, then `hf auth login`.") from None
    except RevisionNotFoundError:
        raise DataMistake(f"data.revision: {repo_id} at {endpoint} has no {revision!r}.") from None
    except RepositoryNotFoundError:
        raise no_repository(repo_id, endpoint) from None
    except http_errors() as error:
        if status_of(error) == 404:  # a mirror that does not say which
            raise no_repository(repo_id, endpoint) from None
        raise unreachable(f"{repo_id} at {endpoint}", error) from None
    files = {
        entry.path: {"sha256": entry.lfs.sha256 if entry.lfs else None, "bytes": entry.size}
        for entry in entries
        if isinstance(entry, RepoFile)
    }
    return {"commit": commit, "files": files}


def no_repository(repo_id: str, endpoint: str) -> DataError:
    return DataMistake(
        f"data.repo_id: there is no data set {repo_id} at {endpoint}, or it is private (`hf auth login`)."
    )


def _file_url(repo_id: str, path: str, commit: str, endpoint: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo_id, path, repo_type="dataset", revision=commit, endpoint=endpoint)


def _missing(name: str, known: list[str], where: str) -> DataError:
    """The error for a file that is not there, with the nearest that are."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"The nearest are {', '.join(near)}." if near else f"It has {len(known)} files."
    return DataError(f"{where} has no file {name}. {hint}")
