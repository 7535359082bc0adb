"""All settings but those of stages: what may be set, of which type, its default and, as a comment, its meaning.

Settings of a stage are declared likewise, by its module's `Params` (pipeline/stages) and by `Launch` (pipeline/job.py).
`plan --config` prints these comments.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.tasks.mixture import CoreSpec
from data.trust import origin
from model.checks import Amount, Count, Natural
from model.config import GPTConfig, OptimConfig
from pipeline.job import Launch

# A param of one of these types follows the settings of this name, value by value, unless its stage says otherwise:
# with optim=adamw pretrain.params.optim.matrix_lr=0.001, pretrain has adamw's other values.
FOLLOWS: dict[type, str] = {GPTConfig: "model", OptimConfig: "optim", CoreSpec: "mixture.core"}


@dataclass
class StoreConfig:
    root: str = "store"  # beside flows.py; in the working directory if installed without -e; CHATMILL_STORE moves it
    reverify_days: Amount = 30.0  # a file hashed within so many days, and not touched since, is not hashed again
    min_free_gb: Amount = 1.0  # a run does not start with less free disk


@dataclass
class RunConfig:
    name: str | None = None  # tags what the run makes or uses; chat, eval, export, show and report take it
    sweep: str | None = None  # set by -m: the sweep that the run belongs to


@dataclass
class GuardConfig:
    usd: Amount | None = 1.0  # stop before remaking more than this only because code changed; null: never stop
    budget_usd: Amount | None = None  # stop before a run that is expected to cost more


@dataclass
class LoggerConfig:
    kind: Literal["none", "wandb", "tensorboard"] = "none"
    project: str = "chatmill"
    mode: Literal["online", "offline", "disabled"] = "online"  # offline: to the store alone


@dataclass
class HubConfig:
    """Raises DataMistake for an endpoint that is not a URL."""

    send_token: list[str] = field(default_factory=list)  # endpoints that get your token, besides https://huggingface.co

    def __post_init__(self) -> None:
        for endpoint in self.send_token:
            origin(endpoint)


@dataclass
class AppConfig:
    host: str = "127.0.0.1"
    port: Natural = 7860  # 0: any free one
    share: bool = False  # a public link, through Gradio's servers
    password: str | None = None  # null: a token is made at each start and printed in the link
    insecure: bool = False  # true: no password
    hosts: list[str] = field(default_factory=list)  # other names of the server, as behind a proxy: [chat.example.org]
    origins: list[str] = field(default_factory=list)  # other pages that may send requests: ["https://chat.example.org"]


@dataclass
class PipelineConfig:
    stages: list[str] | None = None  # null: all that are declared (conf/config.yaml, and +stage@NAME=FILE)
    targets: list[str] = field(default_factory=list)  # empty: the stages that nothing reads


@dataclass
class StageConfig:
    """One file of conf/stage: the whole contract of a stage."""

    run: str  # the module
    inputs: dict[str, str | None] = field(default_factory=dict)  # stages to read, by the name it knows them by
    params: dict[str, Any] = field(default_factory=dict)  # what is made: the module's Params
    launch: dict[str, Any] = field(default_factory=dict)  # how it is run, where that differs from the group launch
    pin: str | None = None  # the key of an artifact to use, whatever the stage's own key


@dataclass
class DataConfig:
    """Text to pretrain on; see conf/data."""

    source: str  # import path: data.sources.hub, url, local, pydocs, or a module of your own
    repo_id: str | None = None  # a hub's data set repository, ORG/NAME
    revision: str = "main"  # its branch, tag or commit
    shard: str = "shard_{:05d}.parquet"  # how its shards are named, counted from 0
    shard_tokens: Count | None = None  # about as many tokens per shard, to check horizons before any download
    train_shards: Count | None = None  # how many to train on; null: all (not on a hub)
    tokenizer_shards: Count | None = None  # how many of them the tokenizer learns from, at most
    val_shard: str | None = None  # the file held out, by name; null (not on a hub): hold out some of the text
    column: str = "text"
    paths: list[str] = field(default_factory=list)  # data=local: files or folders (parquet; jsonl, txt, also .gz, .zst)


@dataclass
class IdentityConfig:
    name: str = "Chatmill"  # what the model calls itself, and what its answers are graded by
    file: str | None = None  # a jsonl of conversations of your own instead of the templates


@dataclass
class MixtureConfig:
    """Tasks of each kind (conf/mixture). The rest are knobs for their entries, which are typed as params of stages."""

    midtrain: list[dict[str, Any]] = field(default_factory=list)
    sft: list[dict[str, Any]] = field(default_factory=list)
    rl: list[dict[str, Any]] = field(default_factory=list)
    rl_eval: list[dict[str, Any]] = field(default_factory=list)  # held-out problems for the curve
    chat_eval: list[dict[str, Any]] = field(default_factory=list)
    identity: IdentityConfig = field(default_factory=IdentityConfig)
    core: CoreSpec | None = None  # null: no CORE
    identity_size: Count | None = None  # of the templates or your file, as often as it takes; null: each once
    eval_size: Count | None = None  # items of each evaluation
    operations: dict[str, Amount] = field(default_factory=dict)  # of Arithmetic, with their weights
    who: dict[str, Any] = field(default_factory=dict)  # the entry of the model's identity


@dataclass
class Settings:
    """All that a run is told, typed."""

    pipeline: PipelineConfig
    recipe: str  # of conf/recipe, or of a folder of your own
    datasets: dict[str, dict[str, Any]]
    model: GPTConfig
    optim: OptimConfig
    data: DataConfig
    mixture: MixtureConfig
    launch: Launch
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    run: RunConfig = field(default_factory=RunConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    app: AppConfig = field(default_factory=AppConfig)
    until: str | None = None  # run up to this stage
    only: list[str] = field(default_factory=list)  # run these stages alone; what they read must be there
    force: list[str] = field(default_factory=list)  # make these again although they are there
    report_notes: list[str] = field(default_factory=list)  # lines below the report's results: what the data really are
    stages: dict[str, StageConfig] = field(default_factory=dict)  # by name; in YAML, each at the top level
