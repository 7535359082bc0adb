"""One invocation: settings, DAG, store and plan, opened together and checked."""

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.locks import probe
from pipeline.artifacts.store import Store
from pipeline.config import compose as config
from pipeline.config.settings import Settings, StoreConfig
from pipeline.errors import Corrupt, UserError
from pipeline.plan import dag, plan
from pipeline.plan.dag import Dag
from pipeline.plan.keys import CHECKOUT, ROOT
from pipeline.plan.plan import Plan
from pipeline.runner import gpus
from pipeline.runner.environment import prepare_caches, user_path

# state.json and an entry of plan.json of a run
RUN = {"started": 0.0, "ended": 0.0, "overrides": [], "sweep": "", "artifacts": {}, "failures": []}
ROW = {"stage": "", "action": ""}


@dataclass
class Session:
    settings: Settings
    composed: dict[str, Any]
    dag: Dag
    store: Store
    hub: dict[str, Any]  # "endpoint" to ask for data sets, "send_token": those that get the user's token

    @classmethod
    def open(cls, overrides: list[str]) -> "Session":
        """Compose and check everything that can be checked without looking at the store. Raises UserError."""
        composed = config.compose(overrides)
        settings = config.settings(composed)
        store = open_store(settings)
        prepare_caches(store.root)
        hub = {"endpoint": os.environ.get("HF_ENDPOINT"), "send_token": settings.hub.send_token}
        return cls(settings, composed, dag.build(settings), store, hub)

    def plan(self, online: bool, targets: Iterable[str] = ()) -> Plan:
        """The plan. Stages that a command names (`targets`) take precedence over those that settings choose."""
        s = self.settings
        until, only, force, wanted = s.until, s.only, s.force, s.pipeline.targets
        if named := list(targets):
            until, only, wanted = None, [], named
            force = [name for name in force if name in self.dag.behind(named)]
        return plan.make_plan(self.dag, self.store, online, self.hub, until, only, force, wanted, s.recipe)

    def checked_plan(self) -> tuple[Plan, list[str]]:
        """A plan whose running stages read only verified files, and what to say of the store: what was found damaged.

        Raises UserError for a stage that needs GPUs which this machine does not have, before anything is made.
        """
        if any(gpus.lacking(stage) for stage in self.dag.stages.values()):
            for step in self.plan(online=False).running():
                gpus.check(step.stage)
        found = [note] if (note := self.store.format_note()) else []
        while True:
            made = self.plan(online=True)
            if made.running():
                probe(self.store.root / "locks")
            damaged = self._damaged_inputs(made)
            if damaged is None:
                return made, found
            found.append(damaged)

    def _damaged_inputs(self, made: Plan) -> str | None:
        """Hash what a running stage is about to read; the first damaged artifact goes to quarantine."""
        for name in {source for step in made.running() for source in step.stage.inputs.values()}:
            artifact = made.steps[name].artifact
            if artifact is not None and made.steps[name].action == "cached":
                try:
                    self.store.open(artifact)
                except Corrupt as error:
                    if pin := made.steps[name].stage.pin:
                        raise UserError(error.what, f"{name}.pin={pin}", "Pin another, or none.") from None
                    if artifact.folder.exists():
                        raise  # it could not be moved away, so that nothing can be made in its place
                    return f"{name}: {error.what}, making it again"
        return None


def store_root(root: str) -> Path:
    """CHATMILL_STORE where the setting is left as it is. A relative path is beside flows.py in a checkout, and in the
    working directory where Chatmill was installed, as nobody looks for a store among Python's packages."""
    if root == StoreConfig.root and (chosen := os.environ.get("CHATMILL_STORE")):
        return user_path(chosen).absolute()
    path = user_path(root)
    path = path if path.is_absolute() else (ROOT if CHECKOUT else Path.cwd()) / path
    if not root or (path.exists() and not path.is_dir()):
        raise UserError(
            f"is {root!r}, which is not a directory", "store.root", "Name one. It is created if it does not exist."
        )
    return path


def open_store(settings: Settings) -> Store:
    store = Store(store_root(settings.store.root), settings.store.reverify_days)
    store.check_format()
    return store


def new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
