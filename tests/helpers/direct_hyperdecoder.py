"""The hyperdecoder's equations written out for one instance, to add to tests/helpers/direct_t5.py."""

from __future__ import annotations

import torch

from tests.helpers.direct_t5 import Hooks


class Parallel(Hooks):
    """Eq. 2: `y = FF(LayerNorm(x)) + Adapter(x)`, the adapter given for each layer as (W_d, b_d, W_u, b_u) of Eq. 1."""

    def __init__(self, side, adapters, normed_input=False):
        self.side, self.adapters, self.normed_input = side, adapters, normed_input

    def parallel(self, side, layer, x, normed):
        if side != self.side:
            return 0.0
        w_d, b_d, w_u, b_u = self.adapters[layer]
        x = normed if self.normed_input else x
        return torch.relu(x @ w_d.T + b_d) @ w_u.T + b_u


def learned(weights, side, layers):
    """Eq. 1's matrices of learned adapters."""
    stem = f"{side}.adapters.{{}}"
    return [
        [weights[f"{stem.format(i)}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
        for i in range(layers)
    ]


def generated(weights, side, e, d_model, dim, layers):
    """Eq. 3-7 and 9 for one instance; e [size]. The release views the down weight as [d, a], the up one as [a, d]."""
    heads = f"{side}.hypernetwork.adapter_heads"
    adapters = []
    for i in range(layers):
        joined = torch.cat([e, weights[f"{side}.hypernetwork.layer_embedding.weight"][i]])
        h = torch.relu(
            weights[f"{side}.hypernetwork.linear.weight"] @ joined + weights[f"{side}.hypernetwork.linear.bias"]
        )
        w_u = (weights[f"{heads}.up_weight"] @ h + weights[f"{heads}.up_bias"]).view(dim, d_model).T
        w_d = (weights[f"{heads}.down_weight"] @ h + weights[f"{heads}.down_bias"]).view(d_model, dim).T
        b_u = weights[f"{heads}.up_bias_weight"] @ h + weights[f"{heads}.up_bias_bias"]
        b_d = weights[f"{heads}.down_bias_weight"] @ h + weights[f"{heads}.down_bias_bias"]
        adapters.append((w_d, b_d, w_u, b_u))
    return adapters


def embedding(weights, side, h, mlp=True):
    """Eq. 8 for one instance: h [S, D] -> e [D]."""
    e = h.mean(dim=0)
    if mlp:
        stem = f"{side}.embedding.mlp"
        e = torch.relu(weights[f"{stem}.0.weight"] @ e + weights[f"{stem}.0.bias"])
        e = weights[f"{stem}.2.weight"] @ e + weights[f"{stem}.2.bias"]
    return e
