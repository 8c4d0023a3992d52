"""What the hypernetwork is conditioned on: the pooled encoding with its MLP (Eq. 8), or a task's embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdscale.errors import UserError
from hdscale.ops.precision import at_least_float32


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: hidden [B, S, D], mask [B, S] -> [B, D], summed in float32."""
    weight = mask.unsqueeze(-1).to(at_least_float32(hidden.dtype))
    total = (hidden.to(weight.dtype) * weight).sum(dim=1)
    return (total / weight.sum(dim=1).clamp(min=1.0)).to(hidden.dtype)


def stretch_means(hidden: Tensor, mask: Tensor, pools: int) -> Tensor:
    """Means over P stretches of (nearly) equal length of each source: hidden [B, S, D], mask [B, S] -> [B, P * D].

    If a source has fewer than P tokens, some stretches are empty, and their means 0.
    """
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    stretch = (mask.cumsum(dim=1) - 1) * pools // length  # [B, S]
    member = (stretch.unsqueeze(-1) == torch.arange(pools, device=mask.device)) & (mask.unsqueeze(-1) > 0)
    weight = member.to(at_least_float32(hidden.dtype))  # [B, S, P]
    total = weight.transpose(1, 2) @ hidden.to(weight.dtype)  # [B, P, D]
    return (total / weight.sum(dim=1).clamp(min=1.0).unsqueeze(-1)).to(hidden.dtype).flatten(1)


class AttentionPooling(nn.Module):
    """P learned queries, each giving a softmax-weighted mean of the tokens. They start at 0, which gives the mean."""

    def __init__(self, d_model: int, pools: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(pools, d_model))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, S, D], mask [B, S] -> [B, P * D]."""
        score = hidden @ self.queries.T / math.sqrt(hidden.shape[-1])  # [B, S, P]
        score = score.to(at_least_float32(hidden.dtype)).masked_fill(mask.unsqueeze(-1) == 0, -math.inf)
        weight = torch.softmax(score, dim=1)
        return (weight.transpose(1, 2) @ hidden.to(weight.dtype)).to(hidden.dtype).flatten(1)


class EncodingEmbedding(nn.Module):
    """`e = MLP(mean(h))` (Eq. 8): Linear, ReLU, Linear, all of size D; without the MLP, `e = mean(h)` (Table 9).

    Args:
        d_model: D.
        mlp: whether to use the MLP.
        conditioning: "mean", or "attention" for learned queries instead.
        pools: number P of pooled vectors, which are concatenated.

    Attributes:
        size: of e: D, or P * D without the MLP.
    """

    def __init__(self, d_model: int, mlp: bool = True, conditioning: str = "mean", pools: int = 1) -> None:
        super().__init__()
        self.pools = pools
        self.size = d_model if mlp else pools * d_model
        self.pooling = AttentionPooling(d_model, pools) if conditioning == "attention" else None
        self.mlp = (
            nn.Sequential(nn.Linear(pools * d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model)) if mlp else None
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, S, D] (after the encoder's final layer norm), mask [B, S] -> e [B, size]."""
        if self.pooling is not None:
            pooled = self.pooling(hidden, mask)
        elif self.pools > 1:
            pooled = stretch_means(hidden, mask, self.pools)
        else:
            pooled = masked_mean(hidden, mask)
        return pooled if self.mlp is None else self.mlp(pooled)


def with_unseen_task(weight: Tensor) -> Tensor:
    """Rows of N tasks [N, ...] and, as row N, their mean, which represents an unseen task (Table 5)."""
    return torch.cat([weight, weight.mean(dim=0, keepdim=True)])


def task_rows(task_ids: Tensor, tasks: int) -> Tensor:
    """Indices of task ids [B] into the rows of `with_unseen_task`; -1 is a task that the model was not trained on.

    Raises:
        UserError: for an id beyond the tasks (checked on a CPU only, because the host would have to wait for a GPU).
    """
    if task_ids.device.type == "cpu" and task_ids.numel() and int(task_ids.max()) >= tasks:
        raise UserError(
            f"task id {int(task_ids.max())}: the model was trained on {tasks} tasks, 0 to {tasks - 1}; "
            "give -1 for a task that it was not trained on"
        )
    return torch.where(task_ids < 0, tasks, task_ids)


class TaskEmbedding(nn.Embedding):
    """A learned vector for each task, N(0, 1) at first; task id -1 gets the mean of all of them (Table 5)."""

    def forward(self, task_ids: Tensor) -> Tensor:
        """task_ids [B] -> [B, size]."""
        return with_unseen_task(self.weight)[task_rows(task_ids, self.num_embeddings)]
