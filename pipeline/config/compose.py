"""From YAML and the command line to typed settings. Hydra composes; everything is then checked once more, strictly."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.trust import origin
from pipeline import typed
from pipeline.config import renamed
from pipeline.config.quoting import quote, quoted, texts_in
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.typed import Amount, Count, Natural

CONF = Path(__file__).resolve().parents[2] / "conf"
ADDED = re.compile(r"\+stage@(\w+)=")  # a stage beside those that pipeline.stages lists
UNDECLARED = re.compile(r"\w+\.(pin|(launch|params)\.\w+)=")  # what a stage has although its YAML need not name it
SEVERAL = "-m runs one after the other; 'NAME=[a,b]' is a list."
INNER = re.compile(r"(?:\+\+)?(\w+\.params(?:\.\w+)+)\.(\w+)=")  # a setting of a group of a stage's params
UNUSED = re.compile(r"\+*hydra\.(run|job|output_subdir)\b")  # Hydra would take it, and nothing of it be seen


@dataclass
class StoreConfig:
    root: str = "store"
    reverify_days: Amount = 30.0  # a file hashed within so many days, and not touched since, is not hashed again
    min_free_gb: Amount = 1.0  # a run does not start with less free disk


@dataclass
class RunConfig:
    name: str | None = None  # tags what the run makes; chat, eval and export take it
    sweep: str | None = None  # set by -m: the sweep that the run belongs to


@dataclass
class GuardConfig:
    usd: Amount | None = 1.0  # stop before remaking more than this only because code changed; null: never stop
    budget_usd: Amount | None = None  # stop before a run that is expected to cost more


@dataclass
class LoggerConfig:
    kind: Literal["none", "wandb", "tensorboard"] = "none"
    project: str = "chatmill"
    mode: Literal["online", "offline", "disabled"] = "online"


@dataclass
class HubConfig:
    """Raises DataMistake for an endpoint that is not a URL."""

    send_token: list[str] = field(default_factory=list)  # endpoints besides the official hub that get your hub token

    def __post_init__(self) -> None:
        for endpoint in self.send_token:
            origin(endpoint)


@dataclass
class AppConfig:
    host: str = "127.0.0.1"
    port: Natural = 7860  # 0: any free one
    share: bool = False
    password: str | None = None  # null: one is made and shown when the app starts
    insecure: bool = False  # ask for no password
    hosts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)


@dataclass
class PipelineConfig:
    stages: list[str]
    targets: list[str] = field(default_factory=list)  # empty: those that nothing reads


@dataclass
class StageConfig:
    """One file of conf/stage: the whole contract of a stage. An input set to null is none."""

    run: str
    inputs: dict[str, str | None] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    pin: str | None = None


@dataclass
class DataConfig:
    """Text to pretrain on; see conf/data."""

    source: str
    repo_id: str | None
    revision: str
    shard: str
    shard_tokens: Count | None
    train_shards: Count | None
    tokenizer_shards: Count | None
    val_shard: str | None
    column: str
    paths: list[str]


@dataclass
class IdentityConfig:
    name: str  # what the model calls itself
    file: str | None = None  # conversations of your own, a line of jsonl each


@dataclass
class MixtureConfig:
    """Tasks of each kind; their entries are typed where a stage's params take them up. The rest are knobs for these."""

    midtrain: list[dict[str, Any]]
    sft: list[dict[str, Any]]
    rl: list[dict[str, Any]]
    rl_eval: list[dict[str, Any]]
    chat_eval: list[dict[str, Any]]
    identity: IdentityConfig
    core: dict[str, Any] | None = None
    identity_size: Count | None = None
    eval_size: Count | None = None
    operations: dict[str, Amount] = field(default_factory=dict)
    who: dict[str, Any] = field(default_factory=dict)


@dataclass
class Settings:
    """Everything a run is told, typed. `model` and `optim` are typed where a stage's params take them up."""

    pipeline: PipelineConfig
    stages: dict[str, StageConfig]
    recipe: str
    datasets: dict[str, dict[str, Any]]
    model: dict[str, Any]
    optim: dict[str, Any]
    data: DataConfig
    mixture: MixtureConfig
    report_notes: list[str]
    launch: Launch
    store: StoreConfig
    run: RunConfig
    guard: GuardConfig
    logger: LoggerConfig
    hub: HubConfig
    app: AppConfig
    until: str | None = None
    only: list[str] = field(default_factory=list)
    force: list[str] = field(default_factory=list)


def compose(overrides: list[str]) -> dict[str, Any]:
    """conf/config.yaml with the overrides, resolved to plain containers. Main thread only. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    for override in overrides:
        if UNUSED.match(override):
            raise UserError("decides nothing here", override, "What a run leaves is in the store: store.root=FOLDER.")
    OmegaConf.register_new_resolver("least", _least, replace=True)
    GlobalHydra.instance().clear()
    inner = [o for o in overrides if INNER.match(o)]
    outer = [o for o in overrides if o not in inner]
    with explained(overrides), initialize_config_dir(str(CONF), version_base="1.3"):
        composed = plain(hydra_compose("config", overrides=as_hydra_takes(outer)))
    for override in as_hydra_takes(inner):
        _set_inner(composed, override)
    listed = typed.build(PipelineConfig, composed.get("pipeline"), "pipeline").stages
    listed = listed + [name for o in overrides if (found := ADDED.match(o)) and (name := found[1]) not in listed]
    composed["pipeline"]["stages"] = listed
    return composed


def as_hydra_takes(overrides: list[str]) -> list[str]:
    """STAGE.pin, STAGE.launch.NAME and STAGE.params.NAME are set, whether or not the stage's YAML names them.

    What the stage's module does not know is found out when they are typed. Values are quoted where Hydra needs it.
    """
    texts = {name: kind for name, kind in texts_in(Settings) if not (CONF / name).is_dir()}
    taken = [quoted(override, texts) for override in overrides]
    return [f"++{o}" if UNDECLARED.match(o) or (INNER.match(o) and o[0] != "+") else o for o in taken]


def _set_inner(composed: dict[str, Any], override: str) -> None:
    """Set one value of a group such as pretrain.params.optim, which in YAML is all of another group: `${optim}`.

    Hydra would put the one value in the place of all. Raises UserError.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = INNER.match(override)
    assert found
    stage, *path = found[1].split(".")
    group: Any = composed.get(stage)
    for name in path:
        group = group.setdefault(name, {}) if isinstance(group, dict) else None
    if not isinstance(group, dict):
        raise UserError(f"there is no group of settings {found[1]}", override, "`plan --config` shows all names.")
    with explained([override]):
        parsed = OverridesParser.create().parse_override(override)
    if parsed.is_sweep_override():
        raise UserError("names several values", override, SEVERAL)
    group[found[2]] = parsed.value()


@contextmanager
def explained(overrides: list[str]) -> Iterator[None]:
    """What Hydra complains about in here becomes a UserError of one line."""
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split()), str(CONF), "Mend the YAML there.") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not overrides:
            raise
        known: list[str] = []
        for added in ([o for o in overrides if "@" in o.partition("=")[0]], []):  # stages of the user's own, if any
            GlobalHydra.instance().clear()
            with suppress(HydraException), initialize_config_dir(str(CONF), version_base="1.3"):
                known = known or _dotted(OmegaConf.to_container(compose("config", overrides=added), resolve=False))
        raise _explain(error, as_hydra_takes(overrides), known) from None


def _least(*numbers: int | None) -> int | None:
    """`${least:a,b}` in YAML: the smaller of those that are not null."""
    return min((number for number in numbers if number is not None), default=None)


def plain(composed: Any) -> dict[str, Any]:
    """A composed config as plain containers, interpolations resolved."""
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]


def settings(composed: dict[str, Any]) -> Settings:
    """Type and check a composed config; a name nobody declared is an error, however it came in."""
    known = {f.name for f in dataclasses.fields(Settings)} - {"stages"}
    names = typed.build(PipelineConfig, composed.get("pipeline"), "pipeline").stages
    for name in composed:
        if name not in known and name not in names:
            if isinstance(composed[name], dict) and "run" in composed[name]:
                continue  # a stage that this recipe does not list
            raise typed.unknown(name, sorted(known | set(names)), "")
    stages = {}
    for name in names:
        if not isinstance(composed.get(name), dict):
            raise UserError(
                f"lists {name}, which is not declared", "pipeline.stages", f"Add +stage@{name}=FILE (see conf/stage)."
            )
        stages[name] = typed.build(StageConfig, composed[name], name)
    values = {name: composed[name] for name in known if name in composed}
    built = typed.build(Settings, values | {"stages": {}})
    built.stages = stages
    if built.run.name and "/" in built.run.name:
        raise UserError(f"is {built.run.name!r}, but a name with / in it would be taken for a folder's", "run.name")
    return built


def _explain(error: Exception, overrides: list[str], known: list[str]) -> UserError:
    """Hydra's complaint in one line, with the nearest right name where a name is wrong."""
    for override in overrides:
        if found := _mistake_in(override, known):
            return found
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if text.startswith("Ambiguous value"):
        ambiguous = next((o for o in overrides if repr(o)[1:-1] in text or o in text), "")
        return UserError(text.replace("'++", "'"), fix=f"{SEVERAL}{_as_text(ambiguous)}")
    if wrong := getattr(error, "override", None):
        return UserError(f"cannot be read ({text})", str(wrong), f"Lists are written 'NAME=[a,b]'.{_as_text(wrong)}")
    return UserError(text)


def _as_text(override: str) -> str:
    """Advice to type the value of an override as one text."""
    name, given, value = override.lstrip("+").partition("=")
    text = f"{name}={quote(value)}"
    shown = shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
    return f" As one text: {shown}" if given else ""


def _mistake_in(override: str, known: list[str]) -> UserError | None:
    """What is wrong with the name or the choice in one override; None if that is not where the mistake is."""
    name, given, value = override.lstrip("+~").partition("=")
    name = name.partition("@")[0]
    group = CONF / name
    if not name:
        return UserError(f"{override!r} names no setting", fix="Settings are written NAME=VALUE.")
    if group.is_dir():
        choices = sorted(p.stem for p in group.glob("*.yaml"))
        for chosen in value.strip("'\"").split(","):  # several in a sweep
            if chosen not in choices and not chosen.startswith("["):
                fix = renamed.did_you_mean(chosen, choices, f"There are: {', '.join(choices)}.", f"{name}=")
                return UserError(f"there is no {name} called {chosen!r} in {group}", fix=fix)
    elif not given and not override.startswith("~"):
        return UserError(f"{override!r} is neither a verb nor a setting", fix="Settings are written NAME=VALUE.")
    elif name not in known and not override.startswith(("+", "hydra")):
        fix = renamed.did_you_mean(name, known, "`python flows.py plan --config` shows all names.")
        return UserError(f"there is no setting {name}", fix=renamed.hint(name) or fix)
    return None


def _dotted(value: Any, path: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [path]
    own = [path] if path else []
    return own + [n for k, v in value.items() for n in _dotted(v, f"{path}.{k}" if path else str(k))]
