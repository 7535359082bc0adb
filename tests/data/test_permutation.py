"""The keyed permutation: a bijection for every size and key, the same everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokens.packing import Permutation


@given(n=st.integers(1, 3000), key=st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3))
def test_every_position_goes_to_a_place_of_its_own(n, key):
    places = Permutation(n, *key)(np.arange(n))
    assert sorted(places.tolist()) == list(range(n))


@given(n=st.integers(1, 2**40), at=st.data())
def test_a_position_alone_goes_where_it_goes_among_others(n, at):
    positions = np.array(at.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    permutation = Permutation(n, 7)
    together = permutation(positions)
    assert together.min() >= 0 and together.max() < n
    assert together.tolist() == [int(permutation(np.array([p]))[0]) for p in positions]


def test_the_order_is_the_same_on_every_machine():
    assert Permutation(10, 0)(np.arange(10)).tolist() == [5, 4, 2, 1, 0, 9, 6, 3, 7, 8]
    assert Permutation(10**12, 42, 3)(np.array([0, 1, 10**12 - 1])).tolist() == [
        660762325307,
        606364366999,
        614780344161,
    ]


def test_keys_give_orders_that_have_nothing_in_common():
    orders = [Permutation(10_000, 5, epoch)(np.arange(10_000)) for epoch in range(3)]
    for i, order in enumerate(orders):
        for other in [np.arange(10_000), *orders[:i]]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
            assert (order == other).sum() < 10


def test_positions_outside_are_refused():
    with pytest.raises(IndexError):
        Permutation(10, 0)(np.array([10]))
    with pytest.raises(ValueError):
        Permutation(0)
