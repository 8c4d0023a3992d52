"""What a training pass keeps for its backward pass: nothing that only a frozen weight's gradient would need."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hdscale.bases.elementwise import OneStepNorm
from hdscale.bench.memory import architecture
from hdscale.config import load_config
from hdscale.modeling import build_model
from hdscale.resolve import resolve_model
from hdscale.study.inputs import counted, work_of
from hdscale.study.memory_model import decoder_activations, encoder_activations

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


def inputs_of_frozen_linears(model: torch.nn.Module) -> dict[int, tuple[str, torch.Tensor]]:
    """{address of a tensor: (name of the last frozen linear that reads it, the tensor)}, filled while the model runs.

    The tensor is held so that no other one gets its address.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}

    def note(name: str, x: torch.Tensor) -> None:
        found[x.untyped_storage().data_ptr()] = name, x

    for name, module in model.base.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_input_of_a_frozen_linear_is_kept_only_by_who_needs_it_otherwise(method, dtype):
    """Normed streams and the feed-forward's product are read by frozen linears alone: neither is kept.

    What is kept of their inputs is an attention's output, which the attention itself needs, in both stacks.
    """
    model = built(configured(method, "model.dropout=0.0"), dtype)
    read = inputs_of_frozen_linears(model)
    with Kept(model) as kept:
        output = model(**batch())
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
    read = inputs_of_frozen_linears(model)
    with Kept(model) as kept:
        model(**batch())
    assert {"v", "wi_1", "wo", "lm_head"} <= {
        read[address][0].rsplit(".", 1)[-1] for address in kept.tensors if address in read
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_first_encoder_block_keeps_nothing_before_its_adapter(method):
    """Nothing below the first trainable needs a gradient: its attention and feed-forward keep nothing."""
    model = built(configured(method, "model.dropout=0.0"))
    inside: Counter[str] = Counter()
    for index, block in enumerate(model.base.encoder.block):
        for name in ("SelfAttention", "DenseReluDense"):
            module = next(part for key, part in block.named_modules() if key.endswith(name))
            module.register_forward_hook(
                lambda _, __, output, key=(index, name): inside.update(
                    {key: int((output[0] if isinstance(output, tuple) else output).requires_grad)}
                )
            )
    model(**batch())
    assert inside[0, "SelfAttention"] == inside[0, "DenseReluDense"] == 0
    assert inside[1, "SelfAttention"] == inside[1, "DenseReluDense"] == 1


@pytest.mark.parametrize("checkpointing", ["none", "encoder"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_bytes_are_those_of_the_plan(method, dtype, checkpointing):
    """The plan's formulas are a sum over what has to be kept, term by term; no tensor beside them."""
    config = configured(
        method, "model.dropout=0.0", f"train.dtype={dtype}", f"model.activation_checkpointing={checkpointing}",
        *(["method.hypernet.bottleneck=4"] if method == "hyperdecoder" else []),
    )  # fmt: skip
    model = built(config, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    with Kept(model) as kept:
        encoded = model.encode(batch()["input_ids"], batch()["attention_mask"], batch()["task_ids"])
        model.decode(encoded, batch()["attention_mask"], batch()["labels"])
    _, sides, _ = counted(config)
    base, work = architecture(config), work_of(config, B, "cpu", sides)
    encoder, decoder = encoder_activations(base, work)[0], decoder_activations(base, work)[0]
    assert kept.bytes() == pytest.approx(encoder + decoder, rel=0.05)


def test_a_gated_feed_forward_keeps_three_tensors():
    """GELU's input and the two factors of the product, where transformers' own keeps six."""
    model = built(configured("adapter", "model.dropout=0.0"))
    dense = model.base.encoder.block[0].layer[-1].DenseReluDense
    x = torch.randn(B, S, 96, requires_grad=True)
    with Kept(model) as kept:
        dense(x)
    assert [tuple(tensor.shape) for tensor in kept.tensors.values()] == [(B, S, 192)] * 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 0.0)])
def test_the_norm_is_that_of_transformers(dtype, tolerance):
    generator = torch.Generator().manual_seed(5)
    norms = []
    for cls in (T5LayerNorm, type("Norm", (OneStepNorm, T5LayerNorm), {})):
        norm = cls(48).to(dtype)
        norm.weight.data = torch.linspace(0.5, 2.0, 48, dtype=dtype)
        norms.append(norm)
    x = (torch.randn(3, 7, 48, generator=generator) * 4).to(dtype)
    results = []
    for norm in norms:
        one = x.clone().requires_grad_()
        y = norm(one)
        y.backward(torch.cos(x))
        results.append((y.detach(), one.grad, norm.weight.grad))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert float((theirs - ours).abs().max() / theirs.abs().max()) <= tolerance
