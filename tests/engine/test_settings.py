"""What `train.*` may be."""

from __future__ import annotations

import pytest

from hdscale.config import load_config
from hdscale.errors import UserError
from hdscale.resolve import resolve


@pytest.mark.parametrize(
    "value, automatic, budget", [("null", False, None), ("4096", False, 4096), ("auto", True, None)]
)
def test_tokens_per_micro_batch(value, automatic, budget):
    train = load_config(None, [f"train.tokens_per_micro_batch={value}"]).train
    assert (train.tokens_found_automatically, train.token_budget) == (automatic, budget)


@pytest.mark.parametrize(
    "overrides, by_device",
    [([], True), (["train.micro_batch_size=16"], False), (["train.tokens_per_micro_batch=auto"], False)],
)
def test_the_device_decides_where_nothing_is_given(overrides, by_device):
    """A GPU is faster with few passes, a CPU with little padding."""
    train = load_config(None, overrides).train
    assert train.passes_by_device == by_device
    assert (train.default_token_budget("cpu"), train.default_token_budget("cuda")) == (1024, None)


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "many"])
def test_wrong_tokens_per_micro_batch(value):
    with pytest.raises(UserError, match=f"train.tokens_per_micro_batch={value}: must be a number of tokens"):
        load_config(None, [f"train.tokens_per_micro_batch={value}"])


def test_automatic_tokens_need_zero_1_or_2():
    config = load_config(None, ["train.tokens_per_micro_batch=auto", "deepspeed=ds_configs/zero3_bf16.json"])
    with pytest.raises(UserError, match="auto works with ZeRO stages 1 and 2"):
        resolve(config, 1)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("train.micro_batch_size=0", "must be at least 1"),
        ("train.dtype=fp16", "must be one of bf16, fp32"),
        ("train.loss_reduction=median", "must be one of mean, sum"),
        ("train.learning_rate=-1", "must be at least 0"),
        ("train.learning_rate=.nan", "must be at least 0"),
        ("train.epochs=-1", "must be above 0"),
        ("train.label_smoothing=2", "must be at least 0 and at most 1"),
        ("run.threads=0", "must be at least 1"),
        ("method.decoder.adapter=generate", "did you mean 'generated'"),
        ("method.lora.targets=qq", "letters among q, k, v and o"),
        ("cluster.time=soon", "is not a time limit"),
        ("cluster.time=2", "is not longer than cluster.signal_delay"),
    ],
)
def test_a_value_is_refused_by_its_fields_own_rule(setting, said):
    with pytest.raises(UserError) as caught:
        load_config(None, [setting])
    assert said in str(caught.value) and setting.partition("=")[0] in str(caught.value)
