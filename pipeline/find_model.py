"""From what a command line calls a model to the folders it is in."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.store import Store
from pipeline.ui.models import MODULES, ModelChoice, choice

RESULT_NEUTRAL = "finds finished models"


def find_model(store: Store, name: str) -> ModelChoice:
    """The model that `name` stands for: a stage (its newest), a run, a key or the start of one, an artifact's folder.

    Raises UserError when there is none, or its tokenizer is gone.
    """
    folder = Path(name).expanduser()
    artifact = Store.read(folder.resolve()) if folder.is_dir() else None
    if artifact is None:
        try:
            return choice(store, store.find_by_name(name, MODULES))
        except UserError:
            if not folder.is_dir():
                raise
        raise UserError(
            "holds neither artifact.json nor, as `export` writes it, chatmill.json", str(folder), "`ls` shows models."
        )
    if artifact.module not in MODULES:
        raise UserError(f"is a {artifact.module}, no model", str(folder), f"Models are made by {', '.join(MODULES)}.")
    root = artifact.folder.parents[2]  # its own store, which may be another
    return choice(store if root == store.root else Store(root), artifact)
