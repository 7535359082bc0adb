"""From YAML and the command line to typed settings.

Hydra composes what YAML and the command line say; the dataclasses add what neither names (pipeline/config/settings.py,
and `Params` of each stage's module); then all of it is typed and checked.
"""

import dataclasses
import functools
import shlex
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import did_you_mean
from pipeline import typed
from pipeline.config.quoting import parsed_override, quote, quoted, texts_in
from pipeline.config.settings import FOLLOWS, PipelineConfig, Settings, StageConfig
from pipeline.errors import UserError
from pipeline.stage import load

CONF = Path(__file__).resolve().parents[2] / "conf"
SEVERAL = "-m runs one after the other; 'NAME=[a,b]' is a list."
SETTINGS = {field.name for field in dataclasses.fields(Settings)} - {"stages"}
TEXTS = dict(texts_in(Settings))
WITHOUT_EFFECT = {  # Hydra would take these
    "hydra.sweep": "It is for -m.",
    "hydra.run": "Outputs of a run are in the store: set store.root=DIR.",
    "hydra.job": "",
    "hydra.output_subdir": "",
}


def compose(overrides: list[str]) -> dict[str, Any]:
    """All settings of a run as plain values, resolved. Main thread only. Raises UserError."""
    from omegaconf import OmegaConf

    with explained(overrides):
        tree = composed_yaml(overrides)
        tree["pipeline"]["stages"] = stages_of(tree)
        composed: Any = OmegaConf.to_container(OmegaConf.create(with_defaults(tree)), resolve=True)
    follow(composed)
    return dict(composed)


def composed_yaml(overrides: list[str]) -> dict[str, Any]:
    """conf/config.yaml with the overrides, as plain values; interpolations are not resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    for override in overrides:
        for name, fix in WITHOUT_EFFECT.items():
            if override.lstrip("+").startswith(name):
                raise UserError("has no effect", override, fix)
    OmegaConf.register_new_resolver("least", _least, replace=True)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", overrides=as_hydra_takes(overrides))
    tree: Any = OmegaConf.to_container(composed, resolve=False)
    return {"pipeline": {}, **tree}


def files_of(overrides: list[str]) -> list[tuple[str, str]]:
    """The files that are composed, in their order: each without .yaml, and the name of the group that it fills."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composed = loader.compute_defaults_list("config", as_hydra_takes(overrides), RunMode.RUN).defaults
    return [(file.config_path, file.package or "") for file in composed if file.config_path]


def _least(*numbers: int | None) -> int | None:
    """`${least:a,b}` in YAML: the smaller of those that are not null."""
    return min((number for number in numbers if number is not None), default=None)


def stages_of(tree: dict[str, Any]) -> list[str]:
    """pipeline.stages, or else the names of all stages that are declared, in the order of their declaration."""
    listed = typed.build(PipelineConfig, tree["pipeline"], "pipeline").stages
    return [name for name in tree if _is_stage(tree, name)] if listed is None else listed


def _is_stage(tree: dict[str, Any], name: str) -> bool:
    return name not in SETTINGS and isinstance(tree[name], dict) and "run" in tree[name]


# --- defaults from the dataclasses


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """The composed tree and all that it does not name, of settings and stages, but for groups that follow settings."""
    filled = _fill(Settings, tree)
    for name in tree["pipeline"]["stages"]:
        if isinstance(tree.get(name), dict):
            stage = filled[name] = _fill(StageConfig, tree[name])
            if isinstance(stage.get("run"), str) and isinstance(stage["params"], dict):
                stage["params"] = _fill(load(stage["run"], name).Params, stage["params"], without=FOLLOWS)
    return filled


def _fill(
    cls: type, given: dict[str, Any], default: dict[str, Any] | None = None, without: Collection[type] = ()
) -> dict[str, Any]:
    """`given` and those defaults of `cls` that it does not name; groups typed by a dataclass likewise."""
    filled = _defaults(cls, without) if default is None else dict(default)
    for name, value in given.items():
        group = groups_of(cls).get(name)
        if group and group not in without and isinstance(value, dict):
            value = _fill(group, value, filled.get(name), without)
        filled[name] = value
    return _in_order(cls, filled)


def _in_order(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The settings as `cls` declares them, then names that it does not know."""
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values} | values


def _defaults(cls: type, without: Collection[type]) -> dict[str, Any]:
    """Plain defaults of a dataclass, groups included. A setting that must be given is left out."""
    values = {}
    for field in dataclasses.fields(cls):
        group = groups_of(cls).get(field.name)
        if field.default is not dataclasses.MISSING:
            values[field.name] = _plain(field.default)
        elif group in without or field.name == "stages":
            continue
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _plain(field.default_factory())
        elif group:
            values[field.name] = _defaults(group, without)
    return values


def follow(composed: dict[str, Any]) -> None:
    """Give the groups of stages that follow settings the values of these that the stage itself does not name."""
    for name in composed["pipeline"]["stages"]:
        stage = composed.get(name)
        if isinstance(stage, dict) and isinstance(stage.get("run"), str) and isinstance(stage["params"], dict):
            params, cls = stage["params"], typing.cast(type, load(stage["run"], name).Params)
            for field, group in groups_of(cls).items():
                own = params.get(field, {})  # missing where the whole group follows; null is a value
                if group in FOLLOWS and isinstance(own, dict):
                    params[field] = _group_at(composed, FOLLOWS[group]) | own
            stage["params"] = _in_order(cls, params)


@functools.cache
def groups_of(cls: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves, or null."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        for option in (hint, *typing.get_args(hint)):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                found[name] = option
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _group_at(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """The group of that name; {} where null or a mistake is in its place."""
    group: Any = tree
    for name in path.split("."):
        group = group.get(name) if isinstance(group, dict) else None
    return group if isinstance(group, dict) else {}


# --- typed


def settings(composed: dict[str, Any]) -> Settings:
    """Type and check a composed config; a name nobody declared is an error, however it came in."""
    names = composed["pipeline"]["stages"]
    for name in composed:
        if name not in SETTINGS and name not in names and not _is_stage(composed, name):
            raise typed.unknown(name, sorted(SETTINGS | set(names)), "")
    stages = {}
    for name in names:
        if not isinstance(composed.get(name), dict):
            raise UserError(
                f"lists {name}, which is not declared", "pipeline.stages", f"Add +stage@{name}=FILE (see conf/stage)."
            )
        stages[name] = typed.build(StageConfig, composed[name], name)
    built = typed.build(Settings, {name: composed[name] for name in composed if name in SETTINGS})
    built.stages = stages
    if built.run.name and "/" in built.run.name:
        raise UserError(f"is {built.run.name!r}, but a name with / in it would be taken for a folder's", "run.name")
    return built


# --- the command line


def as_hydra_takes(overrides: list[str]) -> list[str]:
    """Overrides in Hydra's grammar: values are quoted where it needs that, and settings get `++` in front.

    Hydra would refuse those that YAML does not name. What is no setting is found when all of them are typed.
    """
    folders = searched(overrides)
    return [f"++{override}" if _is_setting(override, folders) else override for override in map(_quoted, overrides)]


def _quoted(override: str) -> str:
    name = override.partition("=")[0].lstrip("+")
    return override if (CONF / name).is_dir() else quoted(override, TEXTS)


def _is_setting(override: str, folders: list[Path]) -> bool:
    """Return True for NAME=VALUE that chooses no file of a group and is not for Hydra itself."""
    name, given, _ = override.partition("=")
    if not (given and name) or name[0] in "+~" or "@" in name or "/" in name or name.startswith("hydra."):
        return False
    return not any((folder / name).is_dir() for folder in folders)


def searched(overrides: list[str]) -> list[Path]:
    """Folders with YAML files: Chatmill's, and those of hydra.searchpath=[...] on the command line."""
    found = [CONF]
    for override in overrides:
        if override.lstrip("+").startswith("hydra.searchpath=") and (parsed := parsed_override(override)):
            paths = parsed.value()
            found += [Path(path.removeprefix("file://")) for path in paths if not path.startswith("pkg://")]
    for folder in found[1:]:
        if not folder.is_dir():
            raise UserError(
                f"{str(folder)!r} is not a directory", "hydra.searchpath", "Name one with recipes in recipe/."
            )
    return found


@contextmanager
def explained(overrides: list[str]) -> Iterator[None]:
    """Complaints of Hydra in here become a UserError of one line."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split()), str(CONF), "Mend the YAML there.") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not overrides:
            raise
        raise _explain(error, overrides) from None


def _explain(error: Exception, overrides: list[str]) -> UserError:
    """Hydra's complaint in one line, with the nearest right name where a name is wrong."""
    for override in overrides:
        if found := _mistake_in(override, searched(overrides)):
            return found
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].replace("'++", "'")
    if text.startswith("Ambiguous value"):
        ambiguous = next((o for o in overrides if repr(o)[1:-1] in text or o in text), "")
        return UserError(text, fix=f"{SEVERAL}{_as_text(ambiguous)}")
    if wrong := str(getattr(error, "override", None) or "").removeprefix("++"):
        return UserError(f"cannot be read ({text})", wrong, f"Lists are written 'NAME=[a,b]'.{_as_text(wrong)}")
    return UserError(text)


def _as_text(override: str) -> str:
    """Advice to type the value of an override as one text."""
    name, given, value = override.lstrip("+").partition("=")
    text = f"{name}={quote(value)}"
    shown = shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
    return f" As one text: {shown}" if given else ""


def _mistake_in(override: str, folders: list[Path]) -> UserError | None:
    """Explain a wrong name or choice in one override; None if that is not where the mistake is."""
    name, given, value = override.lstrip("+~").partition("=")
    name = name.partition("@")[0]
    groups = [folder / name for folder in folders if (folder / name).is_dir()]
    if not name:
        return UserError(f"{override!r} names no setting", fix="Settings are written NAME=VALUE.")
    if groups:
        choices = sorted({path.stem for group in groups for path in group.glob("*.yaml")})
        for chosen in value.strip("'\"").split(","):  # several in a sweep
            if chosen and chosen not in choices and not chosen.startswith("["):
                fix = did_you_mean(chosen, choices, f"There are: {', '.join(choices)}.", f"{name}=")
                return UserError(f"there is no {name} called {chosen!r} in {' or '.join(map(str, groups))}", fix=fix)
    elif not given and not override.startswith("~"):
        return UserError(f"{override!r} is neither a command nor a setting", fix="Settings are written NAME=VALUE.")
    elif override.startswith("~") and name.partition(".")[0] not in SETTINGS:
        return typed.unknown(name, sorted(SETTINGS), "")
    return None
