"""Which model is loaded: one at a time, since models are large."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import Corrupt, UserError
from pipeline.ui.chat import ChatSession
from pipeline.ui.models import ModelChoice


class Sessions:
    """The models to choose from. A session that is still answering lives on until it is done."""

    def __init__(
        self,
        models: Sequence[ModelChoice],
        device: str = "auto",
        load: Callable[..., ChatSession] = ChatSession.load,
    ):
        if not models:
            raise UserError("the store has no model to talk to", fix="`python flows.py` trains one.")
        self.models = list(models)
        self._device, self._load = device, load
        self._loaded: tuple[str, ChatSession] | None = None
        self._lock = threading.Lock()

    def choice(self, key: str | None) -> ModelChoice:
        """The model whose key starts with `key`; the first one for None. Raises UserError."""
        if not key:
            return self.models[0]
        for model in self.models:
            if model.key.startswith(key):
                return model
        raise UserError(f"there is no model {key!r}", "model")

    def get(self, key: str | None) -> ChatSession:
        """The session of that model, loaded if it is not the one that is."""
        model = self.choice(key)
        with self._lock:
            if self._loaded is None or self._loaded[0] != model.key:
                self._loaded = None
                self._loaded = (model.key, self._load(*self._open(model), self._device))
            return self._loaded[1]

    @staticmethod
    def _open(model: ModelChoice) -> tuple[Path, Path]:
        try:
            return model.open()
        except Corrupt as error:
            raise UserError(str(error)) from None
