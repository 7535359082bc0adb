"""Settings become typed values; what does not fit is said with its full name and the nearest right one."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from model.checks import Count, Positive
from pipeline import typed
from pipeline.errors import UserError


@dataclass
class Inner:
    lr_frac: float = 0.02
    kind: Literal["muon", "adamw"] = "muon"


@dataclass
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    items: list[Inner] = field(default_factory=list)
    size: int | Literal["auto"] = "auto"
    name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    rows: Count | Literal["auto"] = "auto"
    share: Positive | None = None


def test_nested_values_are_built_and_numbers_typed() -> None:
    built = typed.build(Outer, {"steps": 3.0, "inner": {"lr_frac": 1}, "items": [{"kind": "adamw"}], "size": 8})
    assert built == Outer(3, Inner(1.0), [Inner(kind="adamw")], 8)
    assert type(built.inner.lr_frac) is float
    assert type(built.steps) is int


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (
            {"steps": 1, "inner": {"lr_fraq": 1}},
            r"sft\.params\.inner\.lr_fraq.*Did you mean sft\.params\.inner\.lr_frac",
        ),
        ({"steps": "many"}, r"sft\.params\.steps: is 'many', but a whole number is needed"),
        ({"steps": 1.5}, r"sft\.params\.steps: is 1\.5"),
        ({"steps": True}, r"sft\.params\.steps: is True"),
        ({}, r"sft\.params: needs a value for steps"),
        ({"steps": 1, "items": [{"kind": "sgdd"}]}, r"sft\.params\.items\[0\]\.kind: is 'sgdd'.*muon, adamw"),
        ({"steps": 1, "size": "most"}, r"sft\.params\.size: is 'most'"),
        ({"steps": 1, "rows": 0}, r"sft\.params\.rows: is 0, but a whole number from 1 on or auto is needed"),
        ({"steps": 1, "share": 0}, r"sft\.params\.share: is 0, but a number above 0 is needed"),
        ({"steps": 1, "share": float("nan")}, r"sft\.params\.share: is nan"),
        ({"steps": 1, "inner": None}, r"sft\.params\.inner: is empty"),
    ],
)
def test_what_does_not_fit_is_said_with_its_name(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        typed.build(Outer, plain, "sft.params")
