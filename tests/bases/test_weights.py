"""What a training pass keeps for its backward pass: nothing that only a frozen weight's gradient would need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hdscale.bases.linears import together
from hdscale.bases.steps import activation, norm
from hdscale.bench.memory import architecture
from hdscale.config import load_config
from hdscale.modeling import build_model
from hdscale.resolve import resolve_model
from hdscale.study.inputs import adapts_self_attention, counted, work_of
from hdscale.study.memory_model import decoder_activations, encoder_activations
from tests.helpers.products import Linears

B, S, T, A = 6, 44, 3, 7
METHODS = ("hyperdecoder", "adapter")


def configured(method: str, *settings: str):
    return load_config(
        None,
        [
            "model.name=tiny-2", f"method.name={method}", "data.tasks=[quickstart]", f"data.max_source_length={S}",
            f"data.max_target_length={T}", f"method.encoder.dim={A}", f"method.decoder.dim={A}", "train.dtype=fp32",
            *settings,
        ],
    )  # fmt: skip


def built(config, dtype: torch.dtype = torch.float32):
    return build_model(resolve_model(config), dtype, trainable_dtype=dtype).train()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, S // 2 :] = 0
    return {
        "input_ids": torch.randint(3, 2000, (B, S), generator=generator),
        "attention_mask": mask,
        "labels": torch.randint(3, 2000, (B, T), generator=generator),
        "task_ids": torch.zeros(B, dtype=torch.long),
    }


class Kept:
    """The tensors that autograd keeps inside a `with`, one per storage, without the model's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.tensors: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.parameters:
            self.tensors.setdefault(address, tensor)
        return tensor

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_input_of_a_frozen_linear_is_kept_only_by_who_needs_it_otherwise(method, dtype):
    """Normed streams and the feed-forward's product are read by frozen linears alone: neither is kept.

    What is kept of their inputs is an attention's output, which the attention itself needs, in both stacks.
    """
    model = built(configured(method, "model.dropout=0.0"), dtype)
    with Linears(model.base) as linears, Kept(model) as kept:
        output = model(**batch())
    read = linears.read
    names = {read[address][0].rsplit(".", 1)[-1] for address in kept.tensors if address in read}
    assert names == {"o"}
    assert {"v", "wi_1", "wo", "lm_head"} <= {name.rsplit(".", 1)[-1] for name, _ in read.values()}
    output.loss_sum.backward()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) > 50 and all(model.get_parameter(name).grad is None for name in frozen)
    assert all(model.get_parameter(name).grad is not None for name in model.trainable_names())


def test_where_all_weights_train_their_inputs_are_kept():
    """The counter-check: the walk sees what it looks for."""
    model = built(
        load_config(
            None, ["model.name=tiny-2", "method.name=full_finetuning", "model.dropout=0.0", "data.tasks=[quickstart]"]
        )
    )
    with Linears(model.base) as linears, Kept(model) as kept:
        model(**batch())
    read = linears.read
    assert {"v", "wi_1", "wo", "lm_head"} <= {
        read[address][0].rsplit(".", 1)[-1] for address in kept.tensors if address in read
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_first_encoder_block_keeps_nothing_before_its_adapter(method):
    """Nothing below the first trainable needs a gradient: its attention and feed-forward keep nothing."""
    model = built(configured(method, "model.dropout=0.0"))
    with Linears(model.base) as linears:
        model(**batch())

    def needs_gradient(block: int) -> list[bool]:
        """Of each product of a block: whether its output is part of what is differentiated."""
        inside = f"encoder.block.{block}."
        return [output.requires_grad for name, output in linears.outputs.items() if name.startswith(inside)]

    assert needs_gradient(0) == [False] * 7
    assert needs_gradient(1) == [True] * 7


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", ["none", "encoder"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_are_those_of_the_plan(method, dtype, checkpointing, dropout):
    """The plan's formulas are a sum over what has to be kept, term by term; no tensor beside them."""
    config = configured(
        method, f"model.dropout={dropout}", f"train.dtype={dtype}", f"model.activation_checkpointing={checkpointing}",
        *(["method.hypernet.bottleneck=4"] if method == "hyperdecoder" else []),
    )  # fmt: skip
    model = built(config, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    with Kept(model) as kept:
        encoded = model.encode(batch()["input_ids"], batch()["attention_mask"], batch()["task_ids"])
        model.decode(encoded, batch()["labels"])
    _, sides, _ = counted(config)
    base, work = architecture(config), work_of(config, B, "cpu", sides)
    encoder, decoder = encoder_activations(base, work)[0], decoder_activations(base, work)[0]
    assert kept.bytes() == pytest.approx(encoder + decoder, rel=0.02)


@pytest.mark.parametrize("form, adapts", [("adapter", False), ("adapter+prefix", True), ("lora", True)])
def test_the_first_decoder_layer_keeps_nothing_before_its_cross_attention(form, adapts):
    """Unless its self-attention is adapted: then the plan counts it as well."""
    config = configured("hyperdecoder", "model.dropout=0.0", f"method.decoder.form={form}")
    model = built(config)
    with Linears(model.base) as linears:
        model(**batch())
    own = [name for name in linears.outputs if name.startswith("decoder.block.0.layer.0.")]
    assert len(own) == 4 and any(linears.outputs[name].requires_grad for name in own) == adapts
    assert linears.outputs["decoder.block.1.layer.0.SelfAttention.q"].requires_grad
    assert adapts_self_attention(config.method) == adapts


def test_a_gated_feed_forward_keeps_three_tensors():
    """GELU's input and the two factors of the product, where transformers' own keeps six."""
    model = built(configured("adapter", "model.dropout=0.0"))
    feed_forward = model.base.encoder.block[0].layer[-1].DenseReluDense
    x = torch.randn(B * S, 96, requires_grad=True)
    with Kept(model) as kept:
        hidden = activation("gelu_new", True)(together(x, *feed_forward.inputs()))
        F.linear(hidden, feed_forward.wo.weight)
    assert [tuple(tensor.shape) for tensor in kept.tensors.values()] == [(B * S, 192)] * 3


def norm_and_gradients(function, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradients of both arguments."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    y.backward(torch.cos(x.detach()))
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def norm_of_transformers(x: Tensor, weight: Tensor) -> Tensor:
    module = T5LayerNorm(48)
    del module.weight
    module.weight = weight
    return module(x)


def norm_by_formula(x: Tensor, weight: Tensor) -> Tensor:
    """Zhang and Sennrich 2019: division by the root mean square."""
    return x / ((x**2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize(
    "dtype, reference, tolerance",
    [
        (torch.float32, norm_of_transformers, 1e-6),
        (torch.bfloat16, norm_of_transformers, 1e-2),
        # transformers' divides in float32 in every dtype
        (torch.float64, norm_of_transformers, 1e-6),
        (torch.float64, norm_by_formula, 1e-14),
    ],
    ids=["fp32", "bf16", "fp64", "fp64 formula"],
)
def test_the_norm_is_that_of_transformers(dtype, reference, tolerance):
    """Result and gradients of x and weight; in float64 it is the formula's, more exact than transformers'."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.linspace(0.5, 2.0, 48, dtype=dtype)
    x = (torch.randn(21, 48, generator=generator) * 4).to(dtype)
    wanted = norm_and_gradients(reference, x, weight)
    found = norm_and_gradients(lambda x, weight: norm(x, weight, 1e-6), x, weight)
    for theirs, ours in zip(wanted, found, strict=True):
        assert ours.dtype == dtype
        assert float((theirs - ours).abs().max() / theirs.abs().max()) <= tolerance
