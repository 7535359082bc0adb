"""Tests that need a program which no Python package brings: a browser, a database, a scheduler, a mount."""

import pytest


def service(name: str, available: object) -> list[pytest.MarkDecorator]:
    """Marks of such tests. They are in `full`, .ci/run runs them too, and without the service they are skipped."""
    return [pytest.mark.full, pytest.mark.service, pytest.mark.skipif(not available, reason=f"needs {name}")]
