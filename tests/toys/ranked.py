"""The stage `total`, with ranks: it runs under torchrun, which takes seconds to start."""

from tests.toys.total import Params, main

__all__ = ["RANKS", "Params", "main"]

RANKS = True
