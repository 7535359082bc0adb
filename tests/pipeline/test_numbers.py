"""Every number among the settings refuses or obeys 0, -1, NaN and infinity; a new one has to decide as well."""

import dataclasses
import functools
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

import pipeline.stages
from model.config import GPTConfig
from pipeline import typed
from pipeline.bench.registry import BenchSettings
from pipeline.config import compose as config
from pipeline.config.settings import Settings
from pipeline.job import Launch

# What 0 means where it is taken as it is.
ZERO = {
    "Launch.retries": "none",
    "Launch.resume": "the checkpoint of step 0",
    "Launch.grace_seconds": "end it at once",
    "Launch.usd_per_hour": "costs nothing",
    "StoreConfig.reverify_days": "hash each time",
    "StoreConfig.min_free_gb": "do not ask",
    "GuardConfig.usd": "no paid work again for a change of code",
    "GuardConfig.budget_usd": "nothing that costs",
    "AppConfig.port": "any free one",
    "MixtureConfig.operations": "this operation is not asked",
    "GPTConfig.dropout": "none",
    "OptimConfig.matrix_lr": "these parameters stay as they are",
    "OptimConfig.embedding_lr": "these parameters stay as they are",
    "OptimConfig.unembedding_lr": "these parameters stay as they are",
    "OptimConfig.value_embedding_lr": "these parameters stay as they are",
    "OptimConfig.scalar_lr": "these parameters stay as they are",
    "OptimConfig.betas": "no memory",
    "OptimConfig.embedding_betas": "no memory",
    "OptimConfig.unembedding_betas": "no memory",
    "OptimConfig.scalar_betas": "no memory",
    "OptimConfig.normuon_beta2": "no memory",
    "OptimConfig.weight_decay": "none",
    "ScheduleConfig.warmup_steps": "none",
    "ScheduleConfig.warmdown_frac": "none",
    "ScheduleConfig.final_lr_frac": "to nothing",
    "ScheduleConfig.momentum": "none",
    "ScheduleConfig.momentum_final": "none",
    "ScheduleConfig.momentum_steps": "the last value from the start",
    "evaluate.Params.temperature": "the likeliest token",
    "evaluate.Params.sample_temperature": "the likeliest token",
    "evaluate.Params.keep": "none",
    "finetune.Params.dropout": "none",
    "contamination.Params.examples": "none",
    "report.Params.samples": "none",
    "report.Params.talks": "none",
    "rl.Params.keep": "none",
    "rl.Params.kl": "none",
    "BenchSettings.split": "the first shard",
} | {f"{stage}.Params.seed": "a seed" for stage in ("download", "evaluate", "finetune", "pretrain", "render", "rl")}


def classes() -> Iterator[type]:
    """The dataclasses that settings are typed by."""
    stages = [
        importlib.import_module(f"pipeline.stages.{m.name}")
        for m in pkgutil.iter_modules(pipeline.stages.__path__)
        if m.name != "__main__"
    ]
    waiting: list[Any] = [Settings, BenchSettings, *(s.Params for s in stages if hasattr(s, "Params"))]
    seen: set[Any] = set()
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        if dataclasses.is_dataclass(found) and isinstance(found, type):
            yield found
            waiting += typing.get_type_hints(found, include_extras=True).values()
        else:
            waiting += typing.get_args(found) if typing.get_origin(found) is not Literal else ()


def name_of(cls: type, field: str) -> str:
    module = cls.__module__.rpartition(".")[2]
    return f"{module}.{cls.__name__}.{field}" if cls.__name__ == "Params" else f"{cls.__name__}.{field}"


def as_wanted(hint: Any, number: Any) -> Any:
    """`number` in the form that a setting of this type has; None if it holds no number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        return number
    if origin is Annotated:
        return as_wanted(inner[0], number)
    if origin in (typing.Union, types.UnionType):
        return next((wanted for option in inner if (wanted := as_wanted(option, number)) is not None), None)
    if origin is tuple:
        return [number for _ in inner] if as_wanted(inner[0], number) is not None else None
    if origin is dict and as_wanted(inner[1], number) is not None:
        return {"plus": number}
    return None


def numbers() -> list[tuple[type, str]]:
    return [
        (cls, name)
        for cls in classes()
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if as_wanted(hint, 0) is not None
    ]


composed_once = functools.cache(lambda: config.compose([]))


def taken(cls: type, name: str, number: float) -> Any:
    """What becomes of the number: "refused", or the setting's value."""
    composed = composed_once()
    needed = {
        "TaskSpec": {"task": "data.tasks.arithmetic.Arithmetic"},
        "Params": {"source": "data.sources.pydocs"} if cls.__module__.endswith("download") else {},
        "DataConfig": composed["data"],
        "MixtureConfig": composed["mixture"],
    }
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    try:
        built: Any = typed.build(cls, needed.get(cls.__name__, {}) | {name: as_wanted(hint, number)})
        if cls is GPTConfig:
            built.resolved(vocab_size=512)
    except Exception as error:
        assert getattr(error, "cause", None) == "config" and name in str(error), f"{name}={number}: {error!r}"
        return "refused"
    return getattr(built, name)


@pytest.mark.parametrize(("cls", "name"), numbers(), ids=[name_of(*pair) for pair in numbers()])
def test_a_number_that_means_nothing_is_refused_and_0_is_off_or_has_a_meaning(cls: type, name: str) -> None:
    for number in (math.nan, math.inf, -math.inf, -1):
        assert taken(cls, name, number) == "refused", number
    zero = taken(cls, name, 0)
    assert zero in (None, "refused") or name_of(cls, name) in ZERO, "say above what 0 means, or refuse it"


def test_what_0_means_is_said_of_settings_that_take_it() -> None:
    by_name = {name_of(*pair): pair for pair in numbers()}
    assert [name for name in ZERO if name not in by_name or taken(*by_name[name], 0) in (None, "refused")] == []


def test_0_is_off_where_null_is_and_says_so() -> None:
    built = typed.build(Launch, {"timeout_minutes": 0, "save_every": 0, "save_minutes": 0.0, "keep_every": 0})
    assert built.timeout_minutes is built.save_every is built.save_minutes is built.keep_every is None
    params = composed_once()["pretrain"]["params"]
    stage = importlib.import_module("pipeline.stages.pretrain")
    off = typed.build(stage.Params, params | {"grad_clip": 0, "skip_spikes": 0, "eval_every": 0})
    assert off.grad_clip is off.skip_spikes is off.eval_every is None
