"""The code that makes an artifact, as a part of its key.

A stage's code is what running it reaches: its `main` and `Params`, the functions, classes and constants that these
name, and so on, through the project's own modules and those beside the user's configs. A definition counts as its
syntax tree, without comments, docstrings and layout, and under no module's name: moving it to another module changes no
key. Statements that a module executes when it is imported (a registration, for example) count with any use of it.

Not part of it: installed packages, except for which of their names are used; modules that cannot change a result
(NEUTRAL); text inside `raise SomeError(...)` where the class has a `cause`, and inside `job.say(...)`, so that
correcting a message retrains nothing.
"""

import ast
import functools
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.plan.keys import ROOT, digest

WHOLE = "*"  # all of a module, where it is used as a value
ACTS = ""  # the statements of a module that act when it is imported

# By the longest prefix: modules that cannot change what is made. Add one only after showing that. A module of the
# user's own says RESULT_NEUTRAL = "why" at its top.
NEUTRAL = {
    "flows": True,
    "pipeline": True,  # orders, starts, stores and shows; its stages and the report's content are what makes
    "pipeline.numbers": False,
    "pipeline.report": False,
    "pipeline.stages": False,
    "pipeline.stages.__main__": True,
    "data.chat.template": True,
    "data.durable": True,
    "data.errors": True,
    "data.sources.fetch": True,
    "data.helpers": True,
    "data.sources.source": True,
    "data.sources.hub": True,
    "data.trust": True,
    "data.sources.web": True,
    "evals.ledger": True,
    "model.training.checkpoint": True,
    "model.checks": True,
    "model.device": True,
    "model.distributed": True,
    "model.errors": True,
    "model.training.batch_size": True,
    "model.training.prefetch": True,
    "model.training.resume": True,
}

Ref = tuple[str, str]  # module, definition

_files: dict[Path, int] = {}  # that modules were read from, with their mtime_ns
_import_path: list[str] = []


@dataclass(frozen=True)
class Code:
    digest: str  # of all that is reached, and of which of it each name in it means
    parts: dict[str, dict[str, str]]  # module -> definition -> digest of its syntax tree, to explain differences


def code_of(module: str, params: Any = None) -> Code:
    """What executing a stage's module reaches, with the modules that text in `params` names (a task's class, a model).

    Raises UserError for a file that does not parse.
    """
    _forget_if_edited()
    reached = _Reached()
    source = _source(module)
    for name in ("Params", "main"):
        if source and name in source.names:
            reached.follow((module, name))
    for text in sorted(set(_texts(params))):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) and (prefixes := _prefixes(text)):
            rest = text[len(prefixes[-1]) + 1 :]
            reached.follow((prefixes[-1], rest.partition(".")[0] or WHOLE))
    return reached.code()


def is_neutral(module: str) -> bool:
    """Return True for a module that cannot change what is made."""
    if (listed := _listed(module)) is not None:
        return listed
    source = _source(module)
    return source is not None and "RESULT_NEUTRAL" in source.definitions


@functools.cache
def _listed(module: str) -> bool | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((NEUTRAL[prefix] for prefix in prefixes if prefix in NEUTRAL), None)


@dataclass
class _Reached:
    """Definitions, numbered in the order in which they are met, which depends on no module's name."""

    numbers: dict[Ref, int] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)

    def follow(self, start: Ref) -> None:
        waiting = deque([start])
        while waiting:
            ref = _resolve(*waiting.popleft())
            if ref is None or self.entries[self._number(ref)] is not None:
                continue
            found = _definition(*ref)
            for module in (ref[0], *found.imports):
                self._import(module)
            if found.digest:
                self.parts.setdefault(ref[0], {})[ref[1]] = found.digest
            means = [(name, other) for name, target in found.refs if (other := _resolve(*target))]
            self.entries[self._number(ref)] = [found.digest, [[name, self._number(other)] for name, other in means]]
            waiting += [other for _, other in means]

    def _number(self, ref: Ref) -> int:
        if ref not in self.numbers:
            self.numbers[ref] = len(self.entries)
            self.entries.append(None)
        return self.numbers[ref]

    def _import(self, module: str) -> None:
        if module not in self.imported and not is_neutral(module) and _source(module) is not None:
            self.imported.add(module)
            for other in _definition(module, ACTS).imports:
                self._import(other)

    def code(self) -> Code:
        done: set[str] = set()
        while new := self.imported - done:
            for _, module in sorted((_definition(module, ACTS).digest, module) for module in new):
                if _definition(module, ACTS).digest:
                    self.follow((module, ACTS))
            done |= new
        return Code(digest(self.entries), {m: dict(sorted(found.items())) for m, found in sorted(self.parts.items())})


# --- one module


@dataclass(frozen=True)
class _Source:
    """A parsed module."""

    package: str
    definitions: dict[str, list[ast.stmt]]
    names: dict[str, Ref | str]  # of definitions and of imports at its top; an installed package's: its dotted name
    imports: tuple[str, ...]  # project modules that are imported with it


@dataclass(frozen=True)
class _Definition:
    digest: str
    refs: tuple[tuple[str, Ref], ...]  # names in it and what of the project they mean, sorted
    imports: tuple[str, ...]  # modules that are imported when it is executed


@functools.cache
def _source(module: str) -> _Source | None:
    path = find_module(module)
    if path is None:
        return None
    _files[path] = path.stat().st_mtime_ns
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"does not parse: {error.msg}", f"{path}:{error.lineno}") from None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: dict[str, Ref | str] = {}
    imports: set[str] = set()
    definitions: dict[str, list[ast.stmt]] = {ACTS: []}
    for node in _at_import(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= _bound(node, package)
            imports |= set(_imported(node, package))
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node) or _only_for_types(node):
            continue
        defined = _defines(node)
        for name in defined:
            definitions.setdefault(name, []).append(node)
            names[name] = (module, name)
        if not defined or _calls_project(node, names):
            definitions[ACTS].append(node)
            bound = [n.id for n in _at_import(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            names |= {name: (module, ACTS) for name in bound if name not in names}
    return _Source(package, definitions, names, tuple(sorted(imports)))


@functools.cache
def _definition(module: str, name: str) -> _Definition:
    source = _source(module)
    assert source
    if name == WHOLE:
        every = {other: ref for other, ref in source.names.items() if not isinstance(ref, str)}
        return _Definition("", tuple(sorted(every.items())), ())
    nodes = [list(ast.walk(top)) for top in source.definitions[name]]
    local = [n for found in nodes for n in found if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = source.names
    for node in local:
        names = names | _bound(node, source.package)
    refs: dict[str, Ref] = {}
    installed: dict[str, str] = {}
    for spelled, means in (use for found in nodes for use in _uses(found, names)):
        if isinstance(means, str):
            installed[spelled] = means
        elif means != (module, name):
            refs[spelled] = means
    if isinstance(star := source.names.get("*"), tuple):
        refs["*"] = star
    texts = [serialise(found[0], _silent(found, names, source.package)) for found in nodes]
    imports = {other for node in local for other in _imported(node, source.package)}
    if name == ACTS:
        imports |= set(source.imports)
    content = digest([texts, sorted(installed.items())]) if texts else ""
    return _Definition(content, tuple(sorted(refs.items())), tuple(sorted(imports)))


@functools.cache
def _resolve(module: str, name: str) -> Ref | None:
    """The definition that `module.name` means, through re-exports; None if it does not count. A name that is not found,
    as it is made when the program runs, means the whole module."""
    for _ in range(100):  # re-exports in a circle end somewhere
        source = None if is_neutral(module) else _source(module)
        if source is None:
            return None
        if name in source.definitions or name == WHOLE:
            break
        means = source.names.get(name)
        if isinstance(means, str):
            return None
        if means is not None:
            module, name = means
        elif find_module(f"{module}.{name}"):
            module, name = f"{module}.{name}", WHOLE
        else:
            name = WHOLE
    return module, name


def _forget_if_edited() -> None:
    """What was read holds until one of the files that it was read from changes."""
    edited = any(not path.is_file() or path.stat().st_mtime_ns != mtime for path, mtime in _files.items())
    if edited or _import_path[:] != [os.getcwd(), *sys.path]:
        forget()


def forget() -> None:
    """Read all modules again when they are needed."""
    for cached in (find_module, _source, _definition, _resolve, _has_cause):
        cached.cache_clear()
    _files.clear()
    _import_path[:] = [os.getcwd(), *sys.path]


def _uses(nodes: list[ast.AST], names: dict[str, Ref | str]) -> Iterator[tuple[str, Ref | str]]:
    """Names and dotted names among `nodes` (of ast.walk) that imports or definitions bind, and what they mean."""
    inner: set[int] = set()  # names within a dotted name
    for node in nodes:
        if not isinstance(node, (ast.Name, ast.Attribute)) or id(node) in inner:
            continue
        chain = _chain(node)
        if not chain or chain[0] not in names:
            continue
        below: ast.AST = node
        while isinstance(below, ast.Attribute):
            below = below.value
            inner.add(id(below))
        means, spelled = names[chain[0]], chain[0]
        for attribute in chain[1:]:
            if isinstance(means, str) or means[1] != WHOLE:
                break
            module, spelled = means[0], f"{spelled}.{attribute}"
            means = (f"{module}.{attribute}", WHOLE) if find_module(f"{module}.{attribute}") else (module, attribute)
        yield spelled, means


def _chain(node: ast.AST) -> list[str]:
    """["a", "b", "c"] of the expression a.b.c; empty for others."""
    rest: list[str] = []
    while isinstance(node, ast.Attribute):
        rest.insert(0, node.attr)
        node = node.value
    return [node.id, *rest] if isinstance(node, ast.Name) else []


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements and names that importing a module executes: no body of a function, no TYPE_CHECKING block."""
    for child in ast.iter_child_nodes(node):
        if not _only_for_types(child):
            yield child
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from _at_import(child)


def _defines(node: ast.stmt) -> list[str]:
    """Names that a statement defines and does nothing else."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return []
    targets = [item for t in targets for item in (t.elts if isinstance(t, (ast.Tuple, ast.List)) else [t])]
    return [t.id for t in targets if isinstance(t, ast.Name)] if all(isinstance(t, ast.Name) for t in targets) else []


def _calls_project(node: ast.stmt, names: dict[str, Ref | str]) -> bool:
    """Return True if importing the module calls functions of the project here, which may register what is defined."""
    called = list(getattr(node, "decorator_list", []))
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        called += [n.func for n in _at_import(node) if isinstance(n, ast.Call)]
    roots = [chain[0] for function in called if (chain := _chain(function))]
    return any(isinstance(means := names.get(root), tuple) and not _listed(means[0]) for root in roots)


def _silent(nodes: list[ast.AST], names: dict[str, Ref | str], package: str) -> set[int]:
    """Nodes of a tree that its digest leaves out: imports from the project, which `refs` stand for, and messages."""
    found: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if _imported(node, package):
                found.add(id(node))
        elif _is_message(node, names):
            found |= {id(n) for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def _is_message(node: ast.AST, names: dict[str, Ref | str]) -> bool:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return any(_has_cause(means) for _, means in _uses([node.exc.func], names))
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _chain(node.func)[-2:] == ["job", "say"]
    )


@functools.cache
def _has_cause(means: Ref | str | None, depth: int = 0) -> bool:
    """Return True for a class of errors that are meant for the user: with a `cause`, its own or inherited."""
    source = _source(means[0]) if isinstance(means, tuple) else None
    if source is None or means is None or depth > 10:
        return False
    nodes = source.definitions.get(means[1])
    if nodes is None:
        return _has_cause(source.names.get(means[1]), depth + 1)
    if not isinstance(nodes[0], ast.ClassDef):
        return False
    bases = [base for node in nodes[0].bases for _, base in _uses([node], source.names)]
    return any("cause" in _defines(item) for item in nodes[0].body) or any(_has_cause(b, depth + 1) for b in bases)


# --- syntax trees as text


def serialise(node: Any, silent: set[int] | frozenset[int] = frozenset()) -> str:
    """A syntax tree as text: node types and non-empty fields by name; no positions, docstrings or contexts.

    The same on Python 3.11 to 3.13, whose own `ast.dump` is not.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if name in ("ctx", "kind", "type_comment") or (value is None and not isinstance(node, ast.Constant)):
                continue
            if name == "body" and isinstance(value, list):
                value = [item for item in value if not _is_docstring(item)]
            if isinstance(node, ast.JoinedStr) and isinstance(value, list):
                # Python 3.12.0 and 3.12.1 end some format specs with an empty text
                value = [item for item in value if getattr(item, "value", None) != ""]
            if isinstance(value, list):
                value = [item for item in value if id(item) not in silent]
            if value != [] and id(value) not in silent:
                fields.append(f"{name}={serialise(value, silent)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ",".join(serialise(item, silent) for item in node if not _only_for_types(item)) + "]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _only_for_types(node: Any) -> bool:
    if not isinstance(node, ast.If):
        return False
    return getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


# --- imports


@functools.cache
def find_module(name: str) -> Path | None:
    """The source file of a module of the project or of the user's own import path; None for anything installed."""
    relative = name.replace(".", "/")
    for root in _roots(os.getcwd(), *sys.path):
        for candidate in (f"{root}/{relative}.py", f"{root}/{relative}/__init__.py"):
            if os.path.isfile(candidate):
                return Path(candidate)
    return None


@functools.lru_cache(maxsize=8)
def _roots(here: str, *import_path: str) -> list[Path]:
    own = [Path(here, entry).resolve() for entry in import_path]
    installed = ("site-packages", "dist-packages", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return [ROOT, *(p for p in own if p != ROOT and not any(part in installed for part in p.parts))]


def _prefixes(dotted: str) -> list[str]:
    """The prefixes of `dotted` that are project modules, shortest first."""
    parts = dotted.split(".")
    return [name for i in range(1, len(parts) + 1) if find_module(name := ".".join(parts[:i])) is not None]


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Project modules that an import executes, packages around them included."""
    if isinstance(node, ast.Import):
        return [name for alias in node.names for name in _prefixes(alias.name)]
    base = _absolute(node, package)
    inner = [name for alias in node.names if find_module(name := f"{base}.{alias.name}")]
    return _prefixes(base) + inner


def _bound(node: ast.Import | ast.ImportFrom, package: str) -> dict[str, Ref | str]:
    """Names that an import binds, and what they mean."""
    found: dict[str, Ref | str] = {}
    for alias in node.names:
        if isinstance(node, ast.Import):
            dotted = alias.name if alias.asname else alias.name.partition(".")[0]
            found[alias.asname or dotted] = (dotted, WHOLE) if find_module(dotted) else dotted
            continue
        base = _absolute(node, package)
        dotted = f"{base}.{alias.name}"
        if find_module(dotted):
            found[alias.asname or alias.name] = (dotted, WHOLE)
        else:
            found[alias.asname or alias.name] = (base, alias.name) if find_module(base) else dotted
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
