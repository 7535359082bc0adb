"""Files that are whole or not there at all, also after a power cut."""

import os
from pathlib import Path

RESULT_NEUTRAL = "stores what others made"


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
