"""`eval`: evaluates any model outside a pipeline, with the stage that pipelines use. Its results are not stored.

The model is one of the store, an artifact's folder, or an exported folder. Data sets come from the store. Missing ones
are downloaded into it first.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.tasks.mixture import CoreSpec
from pipeline.artifacts.artifact import read_marker
from pipeline.artifacts.store import Artifact, Store
from pipeline.commands.cli import STOPPED
from pipeline.commands.find_model import TRUST_CODE, find_model
from pipeline.commands.parser import Parser
from pipeline.config import compose as config
from pipeline.config.settings import Settings, StageConfig
from pipeline.errors import StageFailed, UserError
from pipeline.plan import dag, plan
from pipeline.plan.dag import Dag, Stage
from pipeline.plan.session import Session, new_run_id
from pipeline.printing import say
from pipeline.runner import gpus, launch, make
from pipeline.runner.console import RunView
from pipeline.runner.environment import user_path
from pipeline.runner.signals import StopSwitch
from pipeline.stage import load
from pipeline.ui.models import MODULES

NAME, MODULE = "eval", "pipeline.stages.evaluate"
LISTED = ("tasks", "core", "prompts", "questions")  # params that tasks=[...] stands for


def evaluate(arguments: list[str]) -> int:
    """Print the results, which are those of the stages evaluate_* for the same settings."""
    parser = Parser("eval", "MODEL", least=1, most=1)
    parser.add_argument("--out", metavar="FILE.json", help="also write the results there")
    parser.flag("--trust-code", help=TRUST_CODE)
    flags = parser.parse(arguments)
    out = user_path(flags.out) if flags.out else None
    if out and not out.absolute().parent.is_dir():
        raise UserError("is in a folder that does not exist", str(out), "Create it, or choose another file.")
    own, rest = split(flags.overrides)
    session = Session.open(rest)
    with workplace() as work, StopSwitch() as switch, RunView() as view:
        model = Subject.find(session, rest, flags.names[0], flags.trust_code)
        stage, datasets = declared(session.settings, params(session.settings, model.stages, own))
        if model.artifact is None and not own.keys() & {"tasks", "bpb_tokens"}:
            stage.params.bpb_tokens = None
            print("Bits per byte are left out: the store does not have the training text.", file=sys.stderr)
        inputs = {"model": model.folder, "tokenizer": model.tokenizer}
        if stage.params.bpb_tokens is not None:
            inputs["tokens"] = model.tokens()
        gpus.check(stage)
        inputs |= fetch(session, datasets, switch, view)
        outcome = run(stage, model.label, inputs, work, session.store, switch, view)
        if outcome.status != "done":
            if switch.asked:
                print("stopped. An evaluation outside a pipeline keeps nothing.", file=sys.stderr)
                return STOPPED
            raise StageFailed(NAME, outcome.cause or "unknown", outcome.message, str(work / "log.txt"))
        if out:
            results = json.loads((work / "out" / "results.json").read_text()) | {"model": model.label}
            out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, which stays if the stage fails, because the log is in it."""
    folder = Path(tempfile.mkdtemp(prefix="chatmill-eval-"))
    keep = False
    try:
        yield folder
    except StageFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


# --- which model


@dataclass
class Subject:
    """The model to be evaluated. artifact: the model, or what it was exported from, if a store here has it."""

    label: str
    folder: Path
    tokenizer: Path
    stages: list[str]
    store: Store
    artifact: Artifact | None

    @classmethod
    def find(cls, session: Session, overrides: list[str], name: str, trust_code: bool = False) -> "Subject":
        """Find a model by name or folder, and print which it is. Raises UserError, Corrupt."""
        found, why = find_model(session, overrides, name, trust_code)
        say(f"Model: {found.label}, {why}", file=sys.stderr)
        folder, tokenizer = found.open()
        store = found.store or session.store
        if found.store is not None:
            artifact = Store.read(folder)
        else:
            marker = read_marker(folder)
            artifact = Store.read(store.folder(marker.module, marker.key)) if marker and marker.module else None
        stages = artifact.stages if artifact else []
        return cls(found.label, folder, tokenizer, stages, store, artifact)

    def tokens(self) -> Path:
        """The tokens that the model, or its base model, was trained on. Bits per byte are of their validation shard."""
        artifact = self.artifact
        while artifact is not None:
            inputs = artifact.record["inputs"]
            if "tokens" in inputs and (found := Store.read(self.store.folder("tokenize", inputs["tokens"]))):
                return self.store.open(found)
            made = [self.store.folder(module, str(inputs.get("model"))) for module in MODULES]
            artifact = next((source for folder in made if (source := Store.read(folder))), None)
        what = "bits per byte need the tokens it was trained on, which the store no longer has"
        raise UserError(what, self.label, "Set tasks=[...] without bpb.")


# --- what is evaluated


def split(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of tasks=, max_per_task= and the stage's own parameters, in Hydra's grammar; and the other overrides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    fields = {field.name for field in dataclasses.fields(load(MODULE, NAME).Params)}
    known = fields - set(LISTED) | {"tasks", "max_per_task"}
    mine = [text for text in overrides if text.partition("=")[0] in known]
    try:
        parsed = OverridesParser.create().parse_overrides(config.as_hydra_takes(mine))
        own = {override.key_or_group: override.value() for override in parsed}
    except HydraException as error:
        raise UserError(str(error).splitlines()[0], NAME, "Lists are written tasks=[ARC-Easy,core].") from None
    return own, [text for text in overrides if text not in mine]


def params(settings: Settings, stages: list[str], own: dict[str, Any]) -> dict[str, Any]:
    """The stage's parameters as plain values: those of the recipe's own evaluation of such a model, and those of the
    command line. With tasks=[...], only what it lists is evaluated."""
    evaluations = [stage for stage in settings.stages.values() if stage.run == MODULE]
    fitting = [stage for stage in evaluations if stage.inputs.get("model") in stages] or evaluations[-1:]
    values = dict(fitting[0].params) if fitting else {}
    chosen = {name: value for name, value in own.items() if name not in ("tasks", "max_per_task")}
    if "tasks" in own:
        names = own["tasks"] if isinstance(own["tasks"], list) else [own["tasks"]]
        bpb = next((stage.params["bpb_tokens"] for stage in evaluations if stage.params.get("bpb_tokens")), None)
        values |= {"prompts": [], "questions": [], "core": None, "bpb_tokens": None}
        if "bpb" in names:
            values["bpb_tokens"] = bpb
        if "core" in names:
            values["core"] = dataclasses.asdict(settings.mixture.core or CoreSpec())
        values["tasks"] = [task(settings, name) for name in names if name not in ("core", "bpb")]
    values |= chosen
    limit = own.get("max_per_task")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"is {limit!r}", "max_per_task", "It must be at least 1.")
    if limit:
        values["tasks"] = [spec | {"size": min(spec.get("size") or limit, limit)} for spec in values.get("tasks", [])]
        if values.get("core"):
            values["core"] = values["core"] | {"max_per_task": limit}
    return values


def task(settings: Settings, wanted: Any) -> dict[str, Any]:
    """The mixture's entry of that name, or one for an import path. A complete entry is returned as it is."""
    if isinstance(wanted, dict):
        return {"split": "test", **wanted}
    known = {spec.get("name") or str(spec["task"]).rpartition(".")[2]: spec for spec in settings.mixture.chat_eval}
    if isinstance(wanted, str) and wanted in known:
        return dict(known[wanted])
    if "." in str(wanted):
        return {"task": wanted, "split": "test"}
    others = "For others, name the model by its key and add mixture=nanochat, or give the import path of a class."
    raise UserError(
        f"there is no task {wanted!r}", "mixture.chat_eval", f"There are: {', '.join(known)}, core, bpb. {others}"
    )


def declared(settings: Settings, values: dict[str, Any]) -> tuple[Stage, Dag]:
    """The evaluation as a stage, typed and checked, and the data sets that it needs."""
    alone = dataclasses.replace(settings, stages={NAME: StageConfig(MODULE, params=values)})
    stages = dict(dag.build(alone).stages)
    return stages.pop(NAME), Dag(stages)


# --- evaluating


def fetch(session: Session, datasets: Dag, switch: StopSwitch, view: RunView) -> dict[str, Path]:
    """The folders of the data sets by input name. Missing ones are downloaded into the store."""
    if not datasets.stages:
        return {}
    settings = session.settings
    made = plan.make_plan(datasets, session.store, True, session.hub, targets=list(datasets.stages))
    origin = make.provenance(new_run_id(), None, settings.recipe)
    maker = make.Maker(session.store, switch, view.events(), origin, {}, 1, settings.store.min_free_gb)
    found = {}
    for step in made.steps.values():
        artifact = step.artifact or maker.make(step, {}, {}, False)
        found[step.name] = session.store.open(artifact)
    return found


def run(
    stage: Stage, what: str, inputs: dict[str, Path], work: Path, store: Store, switch: StopSwitch, view: RunView
) -> launch.Outcome:
    """Run the stage in its own process, or one per GPU. Its results are in work/out. what: the model, to be shown."""
    job = make.job_file(stage, "", None, inputs, work, store.root)
    events = view.events()
    watch = launch.Watch(
        on_progress=lambda state: events.progress(NAME, state),
        on_say=lambda line: events.say(NAME, line),
        should_stop=lambda: switch.asked,
        why_kill=lambda: switch.why_kill,
    )
    with gpus.taken_by(stage, partial(events.waiting, NAME), lambda: switch.asked) as env:
        events.started(NAME, what, work / "log.txt")
        return launch.run(work, job, True, stage.launch, watch, env)
