"""Text in every Python installation: the topics of the language reference, and the source of the standard library.

A module gives two kinds of documents: its prose (docstrings and long comments) and its code without them, so that
nothing occurs twice. Modules and topics are held out completely: no text of the validation shard has a neighbour in
training.
"""

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sources.source import Made, Request
from data.text.files import held_out, write_shard
from data.trust import group, is_sha256

SHARDS = 4
PAGE_CHARS = 4000
VAL_FRACTION = 0.05  # of the modules and topics
LONG_COMMENT_LINES = 4  # shorter comments stay with the code that they describe
# Tables, generated text, tests, and packages that are not in the standard library.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "entities.py"}


def identity(params: Any, memory: dict[str, Any], online: bool) -> dict[str, Any]:
    """{"files": {"python", "sources"}, "source": {}} of this Python installation; needs no network."""
    found = _sources()
    stats = [(name, (stat := path.stat()).st_size, stat.st_mtime_ns) for name, path in found.items()]
    seen_as = hashlib.sha256(repr(stats).encode()).hexdigest()
    remembered = group(memory, "pydocs")
    if remembered.get("seen_as") != seen_as or not is_sha256(remembered.get("sources")):
        digest = hashlib.sha256(repr(sorted(_topics().items())).encode())
        for name, path in found.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        remembered.update(seen_as=seen_as, sources=digest.hexdigest())
    return {"files": {"python": platform.python_version(), "sources": remembered["sources"]}, "source": {}}


def make(request: Request) -> Made | None:
    """Pages in shuffled order as SHARDS training shards and val.parquet; None if stopped before the end."""
    params = request.params
    train: list[str] = []
    val: list[str] = []
    fraction = VAL_FRACTION if params.val_fraction is None else params.val_fraction
    total = len(_topics()) + 2 * len(_sources())
    for i, (name, text) in enumerate(_units()):
        if request.should_stop():
            return None
        (val if held_out(name, fraction) else train).extend(pages(text))
        request.on_progress(i, total)
    if not val or not train:
        raise DataError(f"download.params.val_fraction: {fraction} leaves nothing to train on or to validate with.")
    names = [f"shard_{i:05d}.parquet" for i in range(SHARDS)]
    train = _shuffled(train, params.seed)
    for i, name in enumerate(names):
        write_shard(request.out / name, train[i::SHARDS], params.column)
    if params.validation:
        write_shard(request.out / "val.parquet", _shuffled(val, params.seed + 1), params.column)
    return Made(names, "val.parquet" if params.validation else None)


def _shuffled(texts: list[str], seed: int) -> list[str]:
    import numpy as np  # here, so that planning does not import it

    from data.tokens.packing import Permutation

    return [texts[i] for i in Permutation(len(texts), seed)(np.arange(len(texts)))]


def _sources() -> dict[str, Path]:
    """The standard library's modules, by path below its folder. Raises DataError if they have no source."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and name not in LEFT_OUT:
                found[path.relative_to(root).as_posix()] = path
    if not found:
        raise DataError(f"{root}: this Python has no source of its standard library. Use data=local with text.")
    return dict(sorted(found.items()))


def _units() -> Iterator[tuple[str, str]]:
    """(name, text); both texts of a module have its name, so that they are held out together."""
    for name, text in sorted(_topics().items()):
        yield name, text
    for name, path in _sources().items():
        try:
            text = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes in these files
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files demonstrate other encodings, or errors
        prose, code = split_module(name.removesuffix(".py").replace("/", "."), tree, text)
        yield name, prose
        yield name, code


def _topics() -> dict[str, str]:
    """The language reference as `help()` shows it; some distributions do not include it."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return {}
    return {name: inspect.cleandoc(text) for name, text in found.items()}


def split_module(module: str, tree: ast.Module, text: str) -> tuple[str, str]:
    """(prose, code): docstrings under their dotted names and long comments; and the lines that are left."""
    lines = text.split("\n")
    prose = []
    taken: set[int] = set()  # line numbers from 0
    for name, node in _described(module, tree):
        if docstring := ast.get_docstring(node):
            prose.append(f"{name}\n\n{docstring}\n")
            first = node.body[0]
            taken.update(range(first.lineno - 1, first.end_lineno or first.lineno))
    for block in _comment_blocks(lines, taken):
        prose.append("\n".join(lines[i].strip().lstrip("#").removeprefix(" ") for i in block) + "\n")
        taken.update(block)
    code = "\n".join(line for i, line in enumerate(lines) if i not in taken)
    return "\n".join(prose), code


def pages(text: str) -> Iterator[str]:
    """`text` cut at line ends into pages of about PAGE_CHARS, at a blank line where one comes soon."""
    page: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        full = size >= PAGE_CHARS and not line.strip()
        if full or (size + len(line) > PAGE_CHARS * 5 // 4 and page):
            yield "".join(page).strip("\n")
            page, size = [], 0
        if page or line.strip():
            page.append(line)
            size += len(line)
    if size > 40:  # a line or two on their own are not a document
        yield "".join(page).strip("\n")


def _described(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    yield prefix, node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _described(f"{prefix}.{child.name}", child)


def _comment_blocks(lines: list[str], taken: set[int]) -> Iterator[range]:
    start = 0
    for i in range(len(lines) + 1):
        if i < len(lines) and i not in taken and lines[i].lstrip().startswith("#"):
            continue
        if i - start >= LONG_COMMENT_LINES:
            yield range(start, i)
        start = i + 1
