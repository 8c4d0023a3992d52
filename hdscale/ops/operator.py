"""`torch.ops.hdscale.*`: schemas, shapes for tracing, gradients and autocast of the compiled operator.

Nothing whose size grows with D*A per instance is kept for the backward pass: that pass keeps the inputs and the
adapter's hidden activations [B, T, A], and generates the adapters again.

The heads' gradient is the expensive half of the backward pass, because each of N layers adds to the same two large
matrices. It can be computed in two ways:

* `generated_adapter`: each call's backward pass computes the heads' whole gradient, and autograd adds them.
* `generated_adapter_tokens` + `generated_adapter_shared`: one pass over the heads for all layers. The first turns codes
  and heads into *tokens*: tensors without memory, one for each factor of that gradient which one layer's backward pass
  knows: x, dz, hidden and dy. The second takes a layer's tokens as inputs, and its backward pass returns these factors
  as *the tokens' gradients*. Autograd thus carries the factors of every layer to one node, which computes the gradient
  of heads and codes at once. There is no state outside the graph: activation checkpointing, `retain_graph`,
  `torch.compile` and gradient hooks (each parameter's fires once, with the whole sum) see an ordinary function.

Every operator here has a plain-PyTorch implementation, used on devices for which no kernels are loaded. The three
`generated_adapter_by_products` operators have no other implementation: they compute the same with the library's matrix
products over whole generated matrices, which is faster on a CPU than tile by tile once there are many tokens (see
`matrix_products_are_faster`). They too generate the matrices again in the backward pass.

The generated biases `hidden_bias` and `out_bias`, and their gradients, are float32 for bfloat16 tensors: the gradient
of a bias sums B * T terms of either sign into A numbers, possibly into one, and where they cancel, every rounding
error on the way is visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hdscale.ops.precision import at_least_float32

_WEIGHTS = "Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias"
_LAYER = f"Tensor x, Tensor code, {_WEIGHTS}, Tensor hidden_bias, Tensor out_bias"

_FORWARD = f"({_LAYER}) -> (Tensor y, Tensor hidden)"
_BACKWARD = f"(Tensor dy, Tensor hidden, Tensor code, {_WEIGHTS}) -> (Tensor dx, Tensor dz, Tensor dhidden_bias)"
_HEADS_BACKWARD = (
    "(Tensor[] x, Tensor[] dz, Tensor[] hidden, Tensor[] dy, Tensor code, Tensor down_weight, Tensor up_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FAMILIES = ("generated_adapter", "generated_adapter_by_products")

_LIBRARY = torch.library.Library("hdscale", "FRAGMENT")
for _schema in (
    *(f"{family}{_FORWARD}" for family in _FAMILIES),
    *(f"{family}_backward{_BACKWARD}" for family in _FAMILIES),
    *(f"{family}_heads_backward{_HEADS_BACKWARD}" for family in _FAMILIES),
    f"generated_adapter_tokens(Tensor code, {_WEIGHTS}, int length, int adapter_size, bool count_uses) -> Tensor[]",
    f"generated_adapter_shared({_LAYER}, Tensor[] tokens) -> (Tensor y, Tensor hidden)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_OPS = torch.ops.hdscale
FACTORS = 4
"""Tokens of a layer: x, dz, hidden, dy (and, where uses are counted, one more)."""


def few_tokens(length: int, d_model: int, dim: int) -> bool:
    """Whether T tokens' activations are smaller than the weights generated for them: T (D + A) <= D A.

    With more tokens, keeping the generated weights costs little compared with keeping their inputs, and generating them
    again takes more time than it saves (measured on CPU, hdscale/bench/results/).
    """
    return length * (d_model + dim) <= d_model * dim


def operator_is_faster(device: str, dtype: torch.dtype, length: int, d_model: int, dim: int) -> bool:
    """Whether `auto` chooses the operator: for few tokens, and for half as many in bfloat16 on a CPU.

    The library's bfloat16 products are faster there, while the kernels apply generated tiles in float32 (measured,
    hdscale/bench/results/).
    """
    twice = device == "cpu" and dtype == torch.bfloat16
    return few_tokens(2 * length if twice else length, d_model, dim)


def matrix_products_are_faster(device: str, length: int, d_model: int, dim: int) -> bool:
    """Whether the library's matrix products compute this faster than the tiled kernels: for many tokens, on a CPU.

    Small adapters always use the kernels, which never round a generated weight: the fewer numbers the gradient of a
    bias has, the likelier it is that the terms cancel in all of them.
    """
    return device == "cpu" and dim >= 16 and not few_tokens(length, d_model, dim)


def _family(x: Tensor, dim: int) -> str:
    return _FAMILIES[1 if matrix_products_are_faster(x.device.type, x.shape[1], x.shape[2], dim) else 0]


def forward_for(x: Tensor, dim: int) -> Callable[..., Any]:
    """The operator that computes x's adapters of size `dim`: tile by tile, or with matrix products."""
    return getattr(_OPS, _family(x, dim))


# ---- plain implementations -------------------------------------------------------------------------------


def _generate(code: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """One head's generated matrices [B, rows, -1]."""
    return torch.addmm(bias, code, weight.t()).view(code.shape[0], rows, weight.shape[0] // rows)


def _forward(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias):
    down = _generate(code, down_weight, down_bias, x.shape[2])
    hidden = torch.baddbmm(hidden_bias.unsqueeze(1).to(x.dtype), x, down).relu_()
    del down
    up = _generate(code, up_weight, up_bias, hidden.shape[2])
    return torch.baddbmm(out_bias.unsqueeze(1).to(x.dtype), hidden, up), hidden


def _backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias):
    up = _generate(code, up_weight, up_bias, hidden.shape[2])
    dz = torch.bmm(dy, up.transpose(1, 2)).masked_fill_(hidden <= 0, 0)
    del up
    down = _generate(code, down_weight, down_bias, dy.shape[2])
    return torch.bmm(dz, down.transpose(1, 2)), dz, dz.sum(1, dtype=at_least_float32(dz.dtype))


PARTIAL_SUMS = 4
"""The heads' gradient is summed in this many parts: several layers together, so that fewer sums are rounded."""


def _heads_backward(x, dz, hidden, dy, code, down_weight, up_weight):
    layers, size_b, size_k = code.shape
    together = -(-layers // PARTIAL_SUMS)
    dcode = code.new_zeros(code.shape, dtype=at_least_float32(code.dtype))
    found: list[Tensor] = []
    for weight, inputs, grads in ((down_weight, x, dz), (up_weight, hidden, dy)):
        dweight, dbias = torch.zeros_like(weight), dcode.new_zeros(weight.shape[0])
        generated = weight.new_empty(together, size_b, inputs[0].shape[2], grads[0].shape[2])
        for first in range(0, layers, together):
            some = slice(first, min(first + together, layers))
            count = some.stop - some.start
            for index, layer in enumerate(range(some.start, some.stop)):
                torch.bmm(inputs[layer].transpose(1, 2), grads[layer], out=generated[index])
            gradient = generated[:count].view(count * size_b, weight.shape[0])
            codes = code[some].reshape(count * size_b, size_k)
            # the first product is written, not added to zeros
            torch.addmm(dweight, gradient.t(), codes, beta=int(first > 0), out=dweight)
            dbias += gradient.sum(0)
            dcode[some] += (gradient @ weight).view(count, size_b, size_k)
        found += [dweight, dbias.to(code.dtype)]
    return (dcode.to(code.dtype), *found)


def _tokens(code, down_weight, down_bias, up_weight, up_bias, length, adapter_size, count_uses):
    layers, size_b, _ = code.shape
    size_a, size_d = adapter_size, down_weight.shape[0] // adapter_size
    tokens = []
    for _ in range(layers):
        for width in (size_d, size_a, size_a, size_d):
            tokens.append(code.new_empty(1).expand(size_b, length, width))
        if count_uses:
            tokens.append(torch.empty((), device="cpu"))
    return tokens


def _shared(*arguments):
    x, *rest, hidden_bias, out_bias, _ = arguments
    return forward_for(x, hidden_bias.shape[1])(x, *rest, hidden_bias, out_bias)


_IMPLEMENTATIONS: tuple[tuple[str, Callable[..., Any]], ...] = (
    *((family, _forward) for family in _FAMILIES),
    *((f"{family}_backward", _backward) for family in _FAMILIES),
    *((f"{family}_heads_backward", _heads_backward) for family in _FAMILIES),
    ("generated_adapter_tokens", _tokens),
    ("generated_adapter_shared", _shared),
)
for _name, _function in _IMPLEMENTATIONS:
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


# ---- shapes for tracing ----------------------------------------------------------------------------------


def _forward_shapes(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias):
    size_b, size_t, size_d = x.shape
    return x.new_empty(size_b, size_t, size_d), x.new_empty(size_b, size_t, hidden_bias.shape[1])


def _backward_shapes(dy, hidden, code, down_weight, down_bias, up_weight, up_bias):
    sums = hidden.new_empty(hidden.shape[0], hidden.shape[2], dtype=at_least_float32(hidden.dtype))
    return dy.new_empty(dy.shape), hidden.new_empty(hidden.shape), sums


def _heads_backward_shapes(x, dz, hidden, dy, code, down_weight, up_weight):
    rows, size_k = down_weight.shape
    return (
        code.new_empty(code.shape),
        code.new_empty(rows, size_k),
        code.new_empty(rows),
        code.new_empty(rows, size_k),
        code.new_empty(rows),
    )


_SHAPES: tuple[tuple[str, Callable[..., Any]], ...] = (
    *((family, _forward_shapes) for family in _FAMILIES),
    *((f"{family}_backward", _backward_shapes) for family in _FAMILIES),
    *((f"{family}_heads_backward", _heads_backward_shapes) for family in _FAMILIES),
    ("generated_adapter_tokens", _tokens),
    ("generated_adapter_shared", lambda *arguments: _forward_shapes(*arguments[:-1])),
)
for _name, _shapes in _SHAPES:
    torch.library.register_fake(f"hdscale::{_name}", _shapes, lib=_LIBRARY)


# ---- gradients -------------------------------------------------------------------------------------------


def _save_for_layer(ctx, inputs, output) -> None:
    x, code, down_weight, down_bias, up_weight, up_bias, *_ = inputs
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, code, down_weight, down_bias, up_weight, up_bias, hidden)


def _layer_backward(ctx, dy, _):
    x, code, down_weight, down_bias, up_weight, up_bias, hidden = ctx.saved_tensors
    family = _family(x, hidden.shape[2])
    backward, heads_backward = getattr(_OPS, f"{family}_backward"), getattr(_OPS, f"{family}_heads_backward")
    dx, dz, dhidden_bias = backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias)
    heads = (None,) * 5
    if any(ctx.needs_input_grad[1:6]):
        dcode, *rest = heads_backward([x], [dz], [hidden], [dy], code.unsqueeze(0), down_weight, up_weight)
        heads = (dcode.squeeze(0), *rest)
    return dx, *heads, dhidden_bias, dy.sum(1, dtype=at_least_float32(dy.dtype))


def _save_for_tokens(ctx, inputs, output) -> None:
    code, down_weight, _, up_weight, *_, count_uses = inputs
    ctx.count_uses = count_uses
    ctx.set_materialize_grads(False)  # a layer that was not used has no factors, rather than zeros
    ctx.save_for_backward(code, down_weight, up_weight)


def _tokens_backward(ctx, factors):
    code, down_weight, up_weight = ctx.saved_tensors
    per_layer = FACTORS + int(ctx.count_uses)
    used = [layer for layer in range(code.shape[0]) if factors[layer * per_layer] is not None]
    if not used:
        return (None,) * 8
    lists = [[factors[layer * per_layer + which] for layer in used] for which in range(per_layer)]
    if ctx.count_uses and any(float(uses) != 1 for uses in lists[FACTORS]):
        raise RuntimeError(
            "hdscale: a layer's shared heads were used in more than one call of generated_adapter, and their "
            "gradients cannot be separated; call share_heads once for each use"
        )
    some = code if len(used) == code.shape[0] else code[used]
    heads_backward = getattr(_OPS, f"{_family(lists[0][0], lists[1][0].shape[2])}_heads_backward")
    dcode, *heads = heads_backward(*lists[:FACTORS], some, down_weight, up_weight)
    if some is not code:
        dcode = code.new_zeros(code.shape).index_copy(0, torch.tensor(used, device=code.device), dcode)
    return dcode, *heads, None, None, None


def _save_for_shared(ctx, inputs, output) -> None:
    _save_for_layer(ctx, inputs[:-1], output)
    ctx.count_uses = len(inputs[-1]) > FACTORS


def _shared_backward(ctx, dy, _):
    x, code, down_weight, down_bias, up_weight, up_bias, hidden = ctx.saved_tensors
    backward = getattr(_OPS, f"{_family(x, hidden.shape[2])}_backward")
    dx, dz, dhidden_bias = backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias)
    factors = [x, dz, hidden, dy]
    if ctx.count_uses:
        factors.append(torch.ones((), device="cpu"))
    return dx, None, None, None, None, None, dhidden_bias, dy.sum(1, dtype=at_least_float32(dy.dtype)), factors


_GRADIENTS: tuple[tuple[str, Callable[..., Any], Callable[..., None]], ...] = (
    *((family, _layer_backward, _save_for_layer) for family in _FAMILIES),
    ("generated_adapter_tokens", _tokens_backward, _save_for_tokens),
    ("generated_adapter_shared", _shared_backward, _save_for_shared),
)
for _name, _gradient, _save in _GRADIENTS:
    torch.library.register_autograd(f"hdscale::{_name}", _gradient, setup_context=_save, lib=_LIBRARY)


# ---- autocast --------------------------------------------------------------------------------------------


def _autocast_to_bfloat16(name: str, key: str) -> None:
    """Under autocast the operator computes in bfloat16, as a matrix product would; generated biases stay float32."""
    operator = getattr(_OPS, name)
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(position: int, argument):
        wanted = torch.float32 if position in (6, 7) else torch.bfloat16
        if isinstance(argument, list):
            return [cast(0, tensor) if tensor.dim() else tensor for tensor in argument]
        floating = torch.is_tensor(argument) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(wanted) if floating else argument

    def call(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*(cast(*pair) for pair in enumerate(arguments)))

    _LIBRARY.impl(name, call, key)


for _name in (*_FAMILIES, "generated_adapter_tokens", "generated_adapter_shared"):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _autocast_to_bfloat16(_name, _key)
