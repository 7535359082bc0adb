"""All settings as YAML, each with where its value comes from and, from the dataclass that declares it, its meaning."""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from pipeline.config import compose as config
from pipeline.config.quoting import parsed_override
from pipeline.config.settings import FOLLOWS, Settings, StageConfig
from pipeline.job import Launch
from pipeline.stage import load

DEFAULT = "default"
WIDE = 100  # characters of a list in one line


def commented(composed: dict[str, Any], overrides: list[str]) -> str:
    """YAML that reads back as `composed`, which `overrides` gave."""
    found = origins(overrides)
    lines = ["# Each value with where it comes from: its default, a file of conf/, or the command line."]
    for name, value in composed.items():
        if name in composed["pipeline"]["stages"]:
            lines += [f"{name}:", *_lines(value, StageConfig, name, found, "  ", _classes_of(value, name))]
        else:
            lines += _lines({name: value}, Settings, "", found)
    return "\n".join(lines) + "\n"


def _classes_of(stage: dict[str, Any], name: str) -> dict[str, type]:
    return {"params": load(stage["run"], name).Params, "launch": Launch}


def _lines(
    values: dict[str, Any],
    cls: type | None,
    path: str,
    origin: dict[str, str],
    indent: str = "",
    groups: dict[str, type] | None = None,
    followed: str = "",
) -> Iterator[str]:
    """groups: types of fields that `cls` declares as plain dicts. followed: the settings that this group follows."""
    groups = groups or (config.groups_of(cls) if cls else {})
    meanings = comments(cls) if cls else {}
    for name, value in values.items():
        place = f"{path}.{name}" if path else name
        meaning = meanings.get(name, "")
        if isinstance(value, dict) and value:
            yield f"{indent}{_flow(name)}:" + (f" # {meaning}" if meaning else "")
            group = groups.get(name)
            follows = FOLLOWS.get(group, "") if group and ".params." in place else ""
            yield from _lines(value, group, place, origin, indent + "  ", followed=follows)
            continue
        where = _origin(place, origin) or (f"as {followed}.{name}" if followed else DEFAULT)
        comment = f" # [{where}]" + (f" {meaning}" if meaning else "")
        if isinstance(value, list) and len(_flow(value)) > WIDE:
            yield f"{indent}{_flow(name)}:{comment}"
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            yield f"{indent}{_flow(name)}: {_flow(value)}{comment}"


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20, allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, or in the line above it, by the field's name."""
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        texts = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                behind, above = texts.get(node.end_lineno or 0), texts.get(node.lineno - 1)
                alone = above if above and above.line.lstrip().startswith("#") else None
                if text := behind or alone:
                    found[node.target.id] = text.string.lstrip("# ")
    return found


def origins(overrides: list[str]) -> dict[str, str]:
    """Where settings that are not left at their default come from, by their dotted names."""
    import yaml

    folders, found = config.searched(overrides), {}
    for path, package in config.files_of(overrides):
        file = next((file for folder in folders if (file := folder / f"{path}.yaml").is_file()), None)
        if file is not None:
            shown = file.relative_to(config.CONF.parent) if file.is_relative_to(config.CONF) else file
            content = yaml.safe_load(file.read_text()) or {}
            content.pop("defaults", None)
            found.update(dict.fromkeys(dotted(content, package), str(shown)))
    for override in config.as_hydra_takes(overrides):
        parsed = parsed_override(override)
        if parsed and not parsed.is_delete() and not any((folder / parsed.key_or_group).is_dir() for folder in folders):
            found.update(dict.fromkeys(dotted(parsed.value(), parsed.key_or_group), "command line"))
    return found


def dotted(value: Any, path: str) -> Iterator[str]:
    """The names of all values in a group."""
    if not isinstance(value, dict) or not value:
        yield path
        return
    for name, inner in value.items():
        yield from dotted(inner, f"{path}.{name}" if path else str(name))


def _origin(place: str, origin: dict[str, str]) -> str:
    """The origin of a value, or of the group that was given as a whole."""
    while place and place not in origin:
        place = place.rpartition(".")[0]
    return origin.get(place, "")
