"""The trackers: Weights & Biases, with one run per stage, grouped by the Chatmill run or the sweep; and TensorBoard,
with event files in store/tensorboard/RUN/STAGE."""

import importlib.util
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.durable import keep_json, read_fields
from data.trust import below
from pipeline.config.settings import LoggerConfig
from pipeline.runner.tracking import Say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ANSWER_SECONDS = 10.0  # for the service to answer before a run
INIT_SECONDS = 30.0  # for the service to answer when a stage starts
UPLOAD_SECONDS = 60.0  # at the end of a stage; the rest stays on disk
TAG_LENGTH = 64  # the service's limit


def about(described: dict[str, Any]) -> dict[str, Any]:
    """Facts to keep beside the measurements of a stage: what it is, and what it was made of."""
    context = described.get("context") or {}
    return {
        "stage": described["stage"],
        "key": described["key"],
        "recipe": context.get("recipe"),
        "commit": context.get("git"),
        "inputs": {name: "/".join(folder.split("/")[-2:]) for name, folder in described["inputs"].items()},
        "params": described["params"],
        "launch": described["launch"],
    }


def check_wandb(config: LoggerConfig, online: bool) -> tuple[LoggerConfig, str]:
    """Without a key or a service that answers, measurements stay on this machine."""
    if importlib.util.find_spec("wandb") is None:
        return replace(config, kind="none"), "logger=wandb has no effect: run `pip install wandb`."
    if config.mode == "offline":
        return config, ""
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session  # wandb.login() would ask for a key

    url, wrong, fix = str(wandb.setup().settings.base_url), "", "Run `wandb sync` to upload them later"
    try:
        if authenticate_session(host=url, source="chatmill", prompt=False, update_session=False) is None:
            wrong = f"no API key for {url}"
    except AuthenticationError as error:
        wrong = str(error)
    if wrong:
        fix = "Run `wandb login`, or set WANDB_API_KEY or logger.mode=offline"
    elif online and (why := _unreachable(url)):
        wrong = f"{url} does not answer ({why})"
    if not wrong:
        return config, ""
    return replace(config, mode="offline"), f"logger=wandb: {wrong}. Measurements stay in the store. {fix}."


def _unreachable(url: str) -> str:
    """The reason why the service cannot be reached. Empty if anything answers there."""
    import httpx

    try:
        httpx.get(url, timeout=ANSWER_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return ""


class WeightsAndBiases:
    def __init__(self, described: dict[str, Any], say: Say):
        import wandb

        self.described, self.stepped = described, False
        try:
            self.run = self._init(described["logger"]["mode"])
        except Exception as error:
            if described["logger"]["mode"] == "offline":
                raise
            why = " ".join(str(error).split())
            stays = "Measurements stay in the store. Run `wandb sync` to upload them later."
            say(f"W&B cannot be reached ({why}). {stays}")
            wandb.teardown()  # which still holds the id
            self.run = self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        described, logger, facts = self.described, self.described["logger"], about(self.described)
        tags = dict.fromkeys([described["stage"], facts["recipe"], logger["run"]])
        return wandb.init(
            project=logger["project"],
            mode=mode,
            id=self._id(),
            resume="allow",
            name=f"{logger['run']}/{described['stage']}",
            group=f"sweep {logger['sweep']}" if logger["sweep"] else logger["run"],
            job_type=described["module"].rpartition(".")[2],
            tags=[tag for tag in tags if tag and len(tag) <= TAG_LENGTH],
            dir=described["store"],  # the work folder is deleted when the stage is published
            config=facts,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS
            ),
        )

    def _id(self) -> str:
        """The run's id, kept for the stage's next attempt, which continues the run."""
        path = Path(self.described["work"]) / "scratch" / "wandb.json"
        known = read_fields(path, {"id": uuid.uuid4().hex[:8]})
        keep_json(path, known)
        return str(known["id"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.stepped = True
        self.run.log(metrics, step=step)

    def summary(self, metrics: dict[str, float]) -> None:
        if not self.stepped:
            self.run.log(metrics)  # only what was logged is drawn
        self.run.summary.update(metrics)

    def close(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


def check_tensorboard(config: LoggerConfig) -> tuple[LoggerConfig, str]:
    """Event files are written by the tensorboard package, which is an extra."""
    if importlib.util.find_spec("tensorboard") is not None:
        return config, ""
    return replace(config, kind="none"), "logger=tensorboard has no effect: run `pip install tensorboard`."


class TensorBoard:
    def __init__(self, described: dict[str, Any]):
        self.described = described
        self.writer: SummaryWriter | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.writer = self.writer or self._open(step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a later attempt does not log again what precedes its checkpoint

    def summary(self, metrics: dict[str, float]) -> None:
        if self.writer is None:
            self.log(0, metrics)

    def close(self, done: bool) -> None:
        if self.writer:
            self.writer.close()

    def _open(self, step: int) -> "SummaryWriter":
        """Continue the stage's events, where readers drop the steps of an earlier attempt from `step` on."""
        from torch.utils.tensorboard import SummaryWriter

        described = self.described
        path = Path(described["work"]) / "scratch" / "tensorboard.json"
        known = read_fields(path, {"name": ""})["name"]  # a resume may be of another run
        name = known or f"{described['logger']['run']}/{described['stage']}"
        writer = SummaryWriter(str(below(Path(described["store"], "tensorboard"), name, str(path))), purge_step=step)
        if not known:
            keep_json(path, {"name": name})
            writer.add_text("about", f"```\n{json.dumps(about(described), indent=1)}\n```", step)
        return writer
