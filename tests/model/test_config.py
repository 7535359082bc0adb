import pytest

from model.config import GPTConfig, OptimConfig, ScheduleConfig
from model.errors import ModelError

FACTS = [  # depth, parameters, FLOPs per token (three digits), at vocab 65,536 and context 2,048
    (4, 36_700_160, 1.447e8),
    (12, 185_597_952, 1.038e9),
    (20, 560_988_160, 3.492e9),
    (26, 1_081_999_360, 6.901e9),
    (32, 1_879_048_192, 1.208e10),
]


@pytest.mark.parametrize("depth, params, flops", FACTS)
def test_depth_alone_gives_the_published_sizes(depth, params, flops):
    config = GPTConfig(depth=depth, vocab_size=65_536).resolved()
    assert config.num_params() == params == 2 * 65_536 * config.width + 12 * depth * config.width**2
    assert config.flops_per_token() == pytest.approx(flops, rel=5e-4)
    assert (config.width, config.heads) == (64 * depth, depth // 2)


def test_windows_are_a_quarter_of_the_context_in_whole_128s_and_the_last_layer_sees_all():
    config = GPTConfig(arch="modern", depth=8, vocab_size=64, sequence_len=1000).resolved()
    assert config.windows() == [256, 256, 256, 1000, 256, 256, 256, 1000]
    assert GPTConfig(arch="modern", depth=2, vocab_size=64, sequence_len=64).resolved().windows() == [64, 64]


def test_a_switch_set_by_hand_overrides_what_the_architecture_says():
    config = GPTConfig(arch="modern", depth=4, vocab_size=64, smear=False, rope_theta=5.0).resolved()
    assert (config.smear, config.rope_theta, config.backout) == (False, 5.0, True)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"depth": 3}, "head_dim"),
        ({"kv_heads": 3, "depth": 8}, "kv_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"head_dim": 7, "width": 14}, "even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, said):
    with pytest.raises(ModelError, match=said):
        GPTConfig(**{"depth": 4, "vocab_size": 64, **settings}).resolved()


def test_a_vocabulary_other_than_the_tokenizers_is_an_error():
    assert GPTConfig(depth=2).resolved(vocab_size=300).vocab_size == 300
    with pytest.raises(ModelError, match="tokenizer has 300"):
        GPTConfig(depth=2, vocab_size=400).resolved(vocab_size=300)


@pytest.mark.parametrize(
    "kind, settings, said",
    [
        (ScheduleConfig, {"warmdown_frac": -0.2}, "schedule.warmdown_frac is -0.2; it must be at least 0"),
        (ScheduleConfig, {"warmdown_frac": 20.0}, "schedule.warmdown_frac is 20.0; it is a part of all steps"),
        (ScheduleConfig, {"warmup_steps": -1}, "schedule.warmup_steps"),
        (ScheduleConfig, {"final_lr_frac": float("nan")}, "schedule.final_lr_frac is nan"),
        (OptimConfig, {"matrix_lr": -0.02}, "optim.matrix_lr is -0.02; it must be at least 0"),
        (OptimConfig, {"iterations": 0}, "optim.iterations is 0; it must be at least 1"),
        (OptimConfig, {"width_ref": -768}, "optim.width_ref"),
        (OptimConfig, {"betas": (0.8, 1.0)}, "optim.betas"),
    ],
)
def test_rates_that_would_climb_or_divide_by_zero_are_named(kind, settings, said):
    with pytest.raises(ModelError, match=said):
        kind(**settings)
