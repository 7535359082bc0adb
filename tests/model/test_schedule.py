import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ScheduleConfig
from model.optim.schedule import Schedule, batch_factor


def test_the_published_schedule_is_constant_then_falls_to_zero_over_the_last_fifth():
    schedule = Schedule(ScheduleConfig(), steps=1000)
    assert [schedule.at(step).lr for step in (0, 500, 800)] == [1.0, 1.0, 1.0]
    assert schedule.at(900).lr == pytest.approx(0.5) and schedule.at(999).lr == pytest.approx(0.005)


def test_momentum_rises_over_its_own_steps_and_may_fall_in_the_warm_down():
    schedule = Schedule(ScheduleConfig(), steps=1000)
    assert [schedule.at(step).momentum for step in (0, 150, 300, 999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    falling = Schedule(ScheduleConfig(warmdown_frac=0.5, momentum=(0.85, 0.97), momentum_final=0.9), steps=1000)
    assert falling.at(499).momentum == pytest.approx(0.97) and falling.at(999).momentum == pytest.approx(0.90, abs=1e-3)


def test_warm_up_is_linear_and_a_warm_down_may_end_above_zero():
    schedule = Schedule(ScheduleConfig(warmup_steps=3, warmdown_frac=0.5, final_lr_frac=0.1), steps=100)
    assert [schedule.at(step).lr for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert schedule.at(75).lr == pytest.approx(0.55) and schedule.at(99).lr == pytest.approx(0.118)


def test_weight_decay_falls_to_zero_where_that_is_asked_for():
    assert Schedule(ScheduleConfig(), 10).at(9).weight_decay == 1.0
    assert Schedule(ScheduleConfig(weight_decay_to_zero=True), 10).at(5).weight_decay == pytest.approx(0.5)


def test_the_rule_for_batch_sizes_is_off_unless_asked_for():
    assert batch_factor(ScheduleConfig(), 8192) == 1.0
    assert batch_factor(ScheduleConfig(scale_lr_with_batch=True), 2**17) == pytest.approx(0.5)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    warmdown=st.floats(0, 1),
    final=st.floats(0, 1),
    momentum_steps=st.integers(0, 400),
)
def test_every_step_of_every_schedule_has_rates_within_bounds(steps, warmup, warmdown, final, momentum_steps):
    config = ScheduleConfig(warmup, warmdown, final, momentum_steps=momentum_steps, momentum_final=0.9)
    for step in range(steps):
        rates = Schedule(config, steps).at(step)
        assert 0.0 < rates.lr <= 1.0 and 0.85 <= rates.momentum <= 0.95
