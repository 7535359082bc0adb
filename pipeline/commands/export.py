"""`export`: a model as a folder that other tools load. The formats are in pipeline/commands/export_formats.py."""

import argparse
import shutil
import tempfile
from pathlib import Path

from pipeline.artifacts.find_model import find_model
from pipeline.artifacts.store import Store
from pipeline.commands import export_formats
from pipeline.commands.exported import MARKER, Exported, put, read_marker
from pipeline.errors import UserError
from pipeline.plan.session import Session
from pipeline.printing import say
from pipeline.runner.environment import user_path
from pipeline.ui.models import ModelChoice


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=list(export_formats.WRITERS),
        default="hf",
        help="hf: for transformers, vLLM, TRL. nanochat: for nanochat of 2025 and mlx-lm",
    )
    parser.add_argument("--trust-code", action="store_true", help="run code that a folder from elsewhere names")
    parser.set_defaults(takes_names=True)


def export(flags: argparse.Namespace, overrides: list[str]) -> int:
    if len(flags.names) != 2:
        raise UserError("needs a model and a folder", "export", "python flows.py export NAME --format hf DIR")
    model, why = find_model(Session.open(overrides), overrides, flags.names[0], flags.trust_code)
    say(f"Model: {model.label}, {why}")
    target = user_path(flags.names[1]).resolve()
    earlier = write(model, target, flags.format)
    if earlier is not None:
        say(f"Replaced the export of {earlier.stages[0]} {earlier.key} in {target} ({len(earlier.files)} files)")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    say(f"Exported to {target} ({size / 1e6:.1f} MB). {export_formats.HINTS[flags.format].format(target=target)}")
    return 0


def write(model: ModelChoice, target: Path, format: str = "hf") -> Exported | None:
    """Write `target` in the format. An earlier export there is replaced, and returned; other files stay.

    Raises UserError where other files are in the way, ModelError for a model that the format cannot express, Corrupt
    for a damaged one.
    """
    earlier = check_target(target)
    folder, _ = model.open()
    origin = Store.read(folder) if model.store else read_marker(folder)
    stages = origin.stages if origin else [model.label]
    record = Exported(format, origin.module if origin else "", origin.key if origin else "", stages)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    try:
        export_formats.WRITERS[format](model, record, made)
        taken = sorted(p.name for p in made.iterdir() if (target / p.name).exists() and not _ours(p.name, earlier))
        if taken:
            what = f"holds files of yours that the export would replace: {', '.join(taken)}"
            raise UserError(what, str(target), "Move them, or export elsewhere.")
        put(made, target, record)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return earlier


def check_target(target: Path) -> Exported | None:
    """The earlier export in `target`, if there is one. Raises UserError for a file, or a folder with other contents."""
    if target.exists() and not target.is_dir():
        raise UserError("is a file", str(target), "Name a folder.")
    earlier = read_marker(target)
    if earlier is None and target.is_dir() and any(target.iterdir()):
        raise UserError("is not empty, and no earlier export", str(target), "Name a new folder, or empty this one.")
    return earlier


def _ours(name: str, earlier: Exported | None) -> bool:
    return earlier is not None and (name == MARKER or any(name == file.split("/")[0] for file in earlier.files))
