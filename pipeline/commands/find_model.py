"""Finds the model that a command line names: a stage, a run, a key, or a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.durable import read_fields, read_json
from data.trust import fits
from pipeline.artifacts.artifact import read_marker
from pipeline.artifacts.store import Artifact, Store
from pipeline.errors import Corrupt, UserError
from pipeline.plan.session import ROW, RUN, Session
from pipeline.runner.environment import user_path
from pipeline.ui.models import CHAT_MODULES, MODULES, PROMPTS, TEXTS, ModelChoice, choice, describe

TRUST_CODE = "run the model code that a folder from elsewhere names"  # help of --trust-code

# Settings of how and where things run, which never change the model that a configuration plans.
NEUTRAL = ("launch", "store", "app", "hub", "logger", "guard", "run", "until", "only", "force", "hydra")


def find_model(session: Session, overrides: list[str], name: str, trust_code: bool = False) -> tuple[ModelChoice, str]:
    """The model that `name` refers to, and why it is this one.

    A stage refers to what this configuration plans; without overrides, to the newest. Other names are those of runs,
    keys or the start of one, and folders: an artifact, or what `export` or transformers' save_pretrained wrote.

    Raises UserError if there is none, if its tokenizer is gone, or if a folder from elsewhere names code of its own and
    trust_code is False.
    """
    folder = user_path(name)
    found = in_folder(session.store, folder.resolve(), trust_code) if folder.is_dir() else None
    if found is not None:
        return found, "from this folder"
    stage = session.dag.stages.get(name)
    if stage is not None and stage.run.rpartition(".")[2] in MODULES:
        artifact, why = planned(session, overrides, [name]) or newest(session.store, [name])
        return choice(session.store, artifact), why
    try:
        return choice(session.store, session.store.find_by_name(name, MODULES)), "as named"
    except UserError:
        if not folder.is_dir():
            raise
    what = "holds no model: neither artifact.json, model.json nor config.json with a tokenizer.json"
    raise UserError(what, str(folder), "Run `ls` to see the models of the store.")


def default_model(session: Session, overrides: list[str]) -> tuple[ModelChoice, str]:
    """The model for `chat` if none is named: the last chat model of this configuration. Raises UserError."""
    stages = [name for name, stage in session.dag.stages.items() if stage.run.rpartition(".")[2] in CHAT_MODULES]
    artifact, why = planned(session, overrides, stages[::-1]) or newest(session.store, [])
    return choice(session.store, artifact), why


def planned(session: Session, overrides: list[str], stages: list[str]) -> tuple[Artifact, str] | None:
    """The artifact planned for the first of the stages that has one, and why. None if no override chooses a model.

    Raises UserError if overrides choose a configuration and the store has none of the stages.
    """
    chosen = [override for override in overrides if not _is_neutral(override)]
    if not chosen or not stages:
        return None
    steps = session.plan(online=False, targets=stages).steps
    for name in stages:
        if artifact := steps[name].artifact:
            return artifact, f"as planned by {' '.join(chosen)}"
    others = [artifact for artifact in session.store.all() if stages[0] in artifact.stages]
    there = f"To use {_shown(others[0])} instead, name its key." if others else f"The store has no other {stages[0]}."
    what, settings = f"the store has no {stages[0]} of this configuration", " ".join(chosen)
    raise UserError(what, settings, f"Run `python flows.py {settings} until={stages[0]}` to make it. {there}")


def _is_neutral(override: str) -> bool:
    parts = override.lstrip("+~").partition("=")[0].split(".")
    return parts[0] in NEUTRAL or parts[1:2] == ["launch"]  # of all stages, or of one


def newest(store: Store, stages: list[str]) -> tuple[Artifact, str]:
    """The model that the newest finished pipeline has for one of the stages, else the newest in the store.

    stages: if empty, the last chat model, or else base model. Raises UserError if there is none.
    """
    for run, made in finished_runs(store):
        models = [artifact for name, artifact in made if artifact.module in MODULES and (not stages or name in stages)]
        if models:
            chatting = [artifact for artifact in models if artifact.module in CHAT_MODULES]
            return (chatting or models)[-1], f"from the newest finished pipeline, run {run}"
    found = [a for a in store.all() if a.module in MODULES and (not stages or set(stages) & set(a.stages))]
    if not found:
        what = f"the store has no {' or '.join(stages) or 'model'} yet"
        raise UserError(what, str(store.root), "Run `python flows.py` to train one.")
    return min(found, key=lambda a: not stages and a.module not in CHAT_MODULES), "the newest: no pipeline has finished"


def finished_runs(store: Store) -> Iterator[tuple[str, list[tuple[str, Artifact]]]]:
    """Runs of a whole pipeline that made or found every stage, newest first, with the artifacts that still exist.

    Leaves out sweeps and partial runs (until, only), which try something out.
    """
    for path in sorted((store.root / "runs").glob("*/state.json"), reverse=True):
        state, rows = read_fields(path, RUN), read_json(path.with_name("plan.json"), list) or []
        made = state["artifacts"]
        names = [row["stage"] for row in rows if fits(row, ROW) and row["action"] != "idle"]
        if _is_whole(state) and names and all(name in made for name in names):
            yield path.parent.name, [(name, found) for name in names if (found := _still_there(store, made[name]))]


def _is_whole(state: dict[str, Any]) -> bool:
    part = any(str(override).startswith(("until=", "only=")) for override in state["overrides"])
    return bool(state["ended"]) and not (state["failures"] or state["sweep"] or part)


def _still_there(store: Store, made: Any) -> Artifact | None:
    try:
        return Store.read(store.folder(made["module"], made["key"])) if fits(made, {"module": "", "key": ""}) else None
    except Corrupt:
        return None


def _shown(artifact: Artifact) -> str:
    run = artifact.record.get("run_name") or artifact.record.get("recipe") or artifact.record.get("run")
    return f"{artifact.stages[0]} {artifact.key} ({run})" if run else f"{artifact.stages[0]} {artifact.key}"


# --- folders


def in_folder(store: Store, folder: Path, trust_code: bool = False) -> ModelChoice | None:
    """The model in a folder; None if the folder holds none. Raises UserError, Corrupt."""
    if artifact := Store.read(folder):
        if artifact.module not in MODULES:
            what = f"is a {artifact.module}, not a model"
            raise UserError(what, str(folder), f"Models are made by {', '.join(MODULES)}.")
        if folder == store.folder(artifact.module, artifact.key):
            return choice(store, artifact)
        found = choice(Store(Path(folder, *[".."] * 3)), artifact)  # of another store, or alone
    elif (folder / "tokenizer.json").is_file() and any((folder / n).is_file() for n in ("model.json", "config.json")):
        found = _foreign(folder)
    else:
        return None
    _check_code(folder, trust_code)
    return found


def _foreign(folder: Path) -> ModelChoice:
    """A folder without a manifest: an export, or what other tools made of one. Raises ModelError, DataError."""
    from data.tokens.tokenizer import Tokenizer
    from model.saved import inspect

    (config, _), marker = inspect(folder), read_marker(folder)
    vocab_size = Tokenizer.load(folder).vocab_size
    if vocab_size != config.vocab_size:
        raise UserError(f"holds a tokenizer of {vocab_size} tokens and a model of {config.vocab_size}", str(folder))
    base = marker is not None and marker.module == "pretrain"
    facts = describe(config, base)
    return ModelChoice(str(folder), folder.name, folder, folder, facts, TEXTS if base else PROMPTS)


def _check_code(folder: Path, trust_code: bool) -> None:
    """Raises UserError for a model whose folder names code to run, unless the user trusts it."""
    from model.saved import read_config

    arch = read_config(folder).arch
    if "." in arch and not trust_code:
        what = f"names {arch} as its architecture, which would run code of that name from the working directory"
        raise UserError(what, str(folder), "Add --trust-code if you trust it.")
