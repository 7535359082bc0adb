"""Plain values cross as they are; anything else does not, whatever was written to the pipe."""

import collections
import enum
import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.sandbox import wire

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
hashable = st.recursive(scalars, lambda inner: st.lists(inner).map(tuple) | st.frozensets(inner), max_leaves=5)
plain = st.recursive(
    hashable | st.sets(hashable),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(hashable, inner),
    max_leaves=10,
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["tuple", "set", "frozenset", "dict", "complex", "bytes", "x"]), inner)
    ),
)
PLAIN = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)


def crossed(value):
    inner, outer = os.pipe()
    try:
        wire.write(outer, wire.encode(wire.pack(value), wire.REPLY_BYTES))
        return wire.unpack(wire.receive(inner, wire.REPLY_BYTES))
    finally:
        os.close(inner)
        os.close(outer)


def parts(value):
    yield value
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from parts(item)


def shown(value) -> str:
    """Its text, whatever the order in sets; equal for NaN, too."""
    if isinstance(value, dict):
        items = [f"{shown(key)}: {shown(item)}" for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        items = [shown(item) for item in value]
    else:
        return repr(value)
    return f"{type(value).__name__}{sorted(items) if isinstance(value, set | frozenset) else items}"


@settings(max_examples=50, deadline=None)
@given(plain)
def test_a_plain_value_arrives_as_it_is(value):
    assert shown(crossed(value)) == shown(value)


@settings(max_examples=50, deadline=None)
@given(any_json)
def test_whatever_arrives_is_made_of_exact_built_in_types_or_refused(packed):
    try:
        value = wire.unpack(json.loads(json.dumps(packed)))
    except wire.NotPlain:
        return
    assert all(type(part) in PLAIN for part in parts(value))


def test_a_subclass_arrives_as_its_base():
    class Colour(enum.IntEnum):
        RED = 1

    class Word(str):
        pass

    Pair = collections.namedtuple("Pair", "a b")
    value = [Colour.RED, Word("x"), collections.Counter("aab"), Pair(1, 2), collections.OrderedDict(k=1)]

    assert [(made, type(made)) for made in crossed(value)] == [
        (1, int),
        ("x", str),
        ({"a": 2, "b": 1}, dict),
        ((1, 2), tuple),
        ({"k": 1}, dict),
    ]


DEEP = []
for _ in range(100):
    DEEP = [DEEP]
ITSELF = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value",
    [object(), len, range(3), iter([]), {}.keys(), DEEP, ITSELF, 10**5000, "x" * (1 << 20), list(range(1 << 19))],
    ids=["object", "function", "range", "iterator", "keys", "deep", "itself", "digits", "long", "many"],
)
def test_what_is_not_plain_or_too_large_is_refused_by_the_sender(value):
    with pytest.raises(wire.NotPlain):
        crossed(value)


@pytest.mark.parametrize(
    "data",
    [b"{no json}", b"\xff", b"[" * 20_000, b"9" * 5_000, b"[" * 100 + b"]" * 100, b'{"set": [[1]]}', b'{"x": 1}'],
    ids=["words", "bytes", "brackets", "digits", "deep", "unhashable", "unknown"],
)
def test_and_by_the_receiver(data):
    inner, outer = os.pipe()
    os.write(outer, struct.pack(">I", len(data)) + data)

    with pytest.raises(wire.NotPlain):
        wire.unpack(wire.receive(inner))


def test_a_frame_above_the_limit_is_not_read():
    inner, outer = os.pipe()
    os.write(outer, struct.pack(">I", 1 << 30))

    with pytest.raises(wire.NotPlain, match="more than"):
        wire.receive(inner, wire.REPLY_BYTES)


def test_the_end_of_the_stream_inside_a_frame_is_a_loss():
    inner, outer = os.pipe()
    os.write(outer, struct.pack(">I", 9) + b"{")
    os.close(outer)

    with pytest.raises(wire.Lost):
        wire.receive(inner)
