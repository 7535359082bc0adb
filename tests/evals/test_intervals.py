"""Intervals of proportions."""

from evals.metrics import wilson


def test_wilson_interval_against_published_values():
    assert [round(x, 4) for x in wilson(0.5, 100)] == [0.4038, 0.5962]
    assert [round(x, 4) for x in wilson(0.0, 10)] == [0.0, 0.2775]
    assert wilson(1.0, 5)[1] == 1.0 and wilson(0.0, 0) == (0.0, 1.0)
