"""`torch.ops.hdscale.*`: schemas, shapes for tracing, gradients and autocast of the compiled operator.

Nothing that grows with D*A per instance is kept for the backward pass: it keeps the inputs and the adapter's
hidden activations [B, T, A], and generates the adapters again.

The heads' gradient is the expensive half of the backward pass, because each of N layers adds to the same two
large matrices. Two forms are offered:

* `generated_adapter`: stands alone; each call's backward pass forms the heads' whole gradient, and autograd
  adds them.
* `generated_adapter_tokens` + `generated_adapter_shared`: one pass over the heads for all layers. The first
  turns codes and heads into *tokens*, tensors without memory that stand for what one layer's backward pass
  knows about that gradient: x, dz, hidden and dy. The second takes a layer's tokens as inputs, and its
  backward pass returns these factors as *the tokens' gradients*. Autograd thus carries the factors of every
  layer to one node, which forms the gradient of heads and codes at once. There is no state beside the
  graph: activation checkpointing, `retain_graph`, `torch.compile` and gradient hooks (each parameter's
  fires once, with the whole sum) see an ordinary function.

Every operator here has a plain-PyTorch implementation, used on devices for which no kernels are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEIGHTS = "Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias"
_LAYER = f"Tensor x, Tensor code, {_WEIGHTS}, Tensor hidden_bias, Tensor out_bias"

_LIBRARY = torch.library.Library("hdscale", "FRAGMENT")
for _schema in (
    f"generated_adapter({_LAYER}) -> (Tensor y, Tensor hidden)",
    f"generated_adapter_backward(Tensor dy, Tensor hidden, Tensor code, {_WEIGHTS}) -> (Tensor dx, Tensor dz)",
    "generated_adapter_heads_backward(Tensor[] x, Tensor[] dz, Tensor[] hidden, Tensor[] dy, Tensor code,"
    " Tensor down_weight, Tensor up_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"generated_adapter_tokens(Tensor code, {_WEIGHTS}, int length, int adapter_size, bool count_uses) -> Tensor[]",
    f"generated_adapter_shared({_LAYER}, Tensor[] tokens) -> (Tensor y, Tensor hidden)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_OPS = torch.ops.hdscale
FACTORS = 4
"""Tokens of a layer: x, dz, hidden, dy (and, where uses are counted, one more)."""


# ---- plain implementations -------------------------------------------------------------------------------


def _generate(code: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """One head's generated matrices [B, rows, -1]."""
    return torch.addmm(bias, code, weight.t()).view(code.shape[0], rows, weight.shape[0] // rows)


def _forward(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias):
    down = _generate(code, down_weight, down_bias, x.shape[2])
    hidden = torch.baddbmm(hidden_bias.unsqueeze(1), x, down).relu()
    up = _generate(code, up_weight, up_bias, hidden.shape[2])
    return torch.baddbmm(out_bias.unsqueeze(1), hidden, up), hidden


def _backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias):
    up = _generate(code, up_weight, up_bias, hidden.shape[2])
    dz = torch.bmm(dy, up.transpose(1, 2)).masked_fill(hidden <= 0, 0)
    down = _generate(code, down_weight, down_bias, dy.shape[2])
    return torch.bmm(dz, down.transpose(1, 2)), dz


def _heads_backward(x, dz, hidden, dy, code, down_weight, up_weight):
    wide = torch.promote_types(code.dtype, torch.float32)
    dcodes: list[Tensor] = []
    sums: list[Tensor] = []
    for layer in range(len(x)):
        d_down = torch.bmm(x[layer].transpose(1, 2), dz[layer]).flatten(1)
        d_up = torch.bmm(hidden[layer].transpose(1, 2), dy[layer]).flatten(1)
        dcodes.append(d_down @ down_weight + d_up @ up_weight)
        parts = (d_down.t() @ code[layer], d_down.sum(0), d_up.t() @ code[layer], d_up.sum(0))
        sums = [part.to(wide) for part in parts] if not sums else [s.add_(p) for s, p in zip(sums, parts, strict=True)]
    return (torch.stack(dcodes), *(total.to(code.dtype) for total in sums))


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


def _shared(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias, tokens):
    return _OPS.generated_adapter(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias)


for _name, _function in (
    ("generated_adapter", _forward),
    ("generated_adapter_backward", _backward),
    ("generated_adapter_heads_backward", _heads_backward),
    ("generated_adapter_tokens", _tokens),
    ("generated_adapter_shared", _shared),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


# ---- shapes for tracing ----------------------------------------------------------------------------------


@torch.library.register_fake("hdscale::generated_adapter", lib=_LIBRARY)
def _(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias):
    size_b, size_t, size_d = x.shape
    return x.new_empty(size_b, size_t, size_d), x.new_empty(size_b, size_t, hidden_bias.shape[1])


@torch.library.register_fake("hdscale::generated_adapter_shared", lib=_LIBRARY)
def _(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias, tokens):
    size_b, size_t, size_d = x.shape
    return x.new_empty(size_b, size_t, size_d), x.new_empty(size_b, size_t, hidden_bias.shape[1])


@torch.library.register_fake("hdscale::generated_adapter_backward", lib=_LIBRARY)
def _(dy, hidden, code, down_weight, down_bias, up_weight, up_bias):
    return dy.new_empty(dy.shape), hidden.new_empty(hidden.shape)


@torch.library.register_fake("hdscale::generated_adapter_heads_backward", lib=_LIBRARY)
def _(x, dz, hidden, dy, code, down_weight, up_weight):
    rows, size_k = down_weight.shape
    return (
        code.new_empty(code.shape),
        code.new_empty(rows, size_k),
        code.new_empty(rows),
        code.new_empty(rows, size_k),
        code.new_empty(rows),
    )


torch.library.register_fake("hdscale::generated_adapter_tokens", _tokens, lib=_LIBRARY)


# ---- gradients -------------------------------------------------------------------------------------------


def _keep_layer(ctx, inputs, output) -> None:
    x, code, down_weight, down_bias, up_weight, up_bias, *_ = inputs
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, code, down_weight, down_bias, up_weight, up_bias, hidden)


def _layer_backward(ctx, dy, _):
    x, code, down_weight, down_bias, up_weight, up_bias, hidden = ctx.saved_tensors
    dx, dz = _OPS.generated_adapter_backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias)
    heads = (None,) * 5
    if any(ctx.needs_input_grad[1:6]):
        dcode, *rest = _OPS.generated_adapter_heads_backward([x], [dz], [hidden], [dy], code.unsqueeze(0), down_weight, up_weight)
        heads = (dcode.squeeze(0), *rest)
    return dx, *heads, dz.sum(1), dy.sum(1)


def _keep_tokens(ctx, inputs, output) -> None:
    code, down_weight, _, up_weight, *_, count_uses = inputs
    ctx.count_uses = count_uses
    ctx.set_materialize_grads(False)  # a layer that took no part has no factors, rather than zeros
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
            "hdscale: a layer's shared heads were used in more than one call of generated_adapter; their "
            "gradients cannot be told apart, so call share_heads once for each use"
        )
    some = code if len(used) == code.shape[0] else code[used]
    dcode, *heads = _OPS.generated_adapter_heads_backward(*lists[:FACTORS], some, down_weight, up_weight)
    if some is not code:
        dcode = code.new_zeros(code.shape).index_copy(0, torch.tensor(used, device=code.device), dcode)
    return dcode, *heads, None, None, None


def _keep_shared(ctx, inputs, output) -> None:
    _keep_layer(ctx, inputs[:-1], output)
    ctx.count_uses = len(inputs[-1]) > FACTORS


def _shared_backward(ctx, dy, _):
    x, code, down_weight, down_bias, up_weight, up_bias, hidden = ctx.saved_tensors
    dx, dz = _OPS.generated_adapter_backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias)
    factors = [x, dz, hidden, dy]
    if ctx.count_uses:
        factors.append(torch.ones((), device="cpu"))
    return dx, None, None, None, None, None, dz.sum(1), dy.sum(1), factors


for _name, _gradient, _keep in (
    ("generated_adapter", _layer_backward, _keep_layer),
    ("generated_adapter_tokens", _tokens_backward, _keep_tokens),
    ("generated_adapter_shared", _shared_backward, _keep_shared),
):
    torch.library.register_autograd(f"hdscale::{_name}", _gradient, setup_context=_keep, lib=_LIBRARY)

# Under autocast the operator computes in bfloat16, as a matrix product would.
for _name in ("generated_adapter", "generated_adapter_tokens", "generated_adapter_shared"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"hdscale::{_name}", _device, torch.bfloat16, lib=_LIBRARY)
