"""Hyperformer and Hyperformer++ (Karimi Mahabadi et al. 2021): adapters after the sub-layers, generated from a task.

An adapter follows the self-attention and the feed-forward of every block of both stacks, before dropout and residual:
`y + LayerNorm(up(gelu(down(y))))`. All of its weights and those of its LayerNorm are generated. T5's own layer norms
are trained as well. There are three forms: `hyperformer` with one hypernetwork per stack and heads for each of the two
places (as released), the same with a pair of hypernetworks per layer that read the task embedding directly, and
`hyperformer++`, in which both places share the heads.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hdscale.bases.interface import Adaptation, Base, StackSizes
from hdscale.errors import UserError, nearest
from hdscale.modeling.conditioning import TaskEmbedding, task_rows, with_unseen_task
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.methods.interface import Method, RunEncoder, required
from hdscale.modeling.settings import HyperformerSettings, MethodSettings
from hdscale.ops import group_by_instance

PLACES = ("attention", "feed_forward")
INIT_STD = 0.01
CODE_NORM_EPS = 1e-6


class NormedAdapters(NamedTuple):
    """Adapters with their LayerNorm, for B instances (or tasks)."""

    down: Tensor  # [B, D, A]
    down_bias: Tensor  # [B, A]
    up: Tensor  # [B, A, D]
    up_bias: Tensor  # [B, D]
    norm_weight: Tensor  # [B, D]
    norm_bias: Tensor  # [B, D]

    def rows(self, index: Tensor) -> NormedAdapters:
        """The adapters of the tasks with indices `index` [B]."""
        return NormedAdapters(*(tensor.index_select(0, index) for tensor in self))


def apply_normed_adapter(y: Tensor, weights: NormedAdapters) -> Tensor:
    """`y + LayerNorm(up(gelu(down(y))))`: tokens y [N, D], adapters of B instances -> [N, D]."""
    grouped = group_by_instance(y, weights.down.shape[0])
    hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), grouped, weights.down)
    hidden = functional.gelu(hidden, approximate="tanh")
    z = torch.baddbmm(weights.up_bias.unsqueeze(1), hidden, weights.up)
    z = functional.layer_norm(z, z.shape[-1:]) * weights.norm_weight.unsqueeze(1) + weights.norm_bias.unsqueeze(1)
    return y + z.reshape(y.shape)


class NormedAdapterHeads(nn.Module):
    """Linear heads that turn a code into an adapter and its LayerNorm; weights N(0, 0.01²), biases 0."""

    def __init__(self, d_model: int, dim: int, code: int) -> None:
        super().__init__()
        self.d_model, self.dim = d_model, dim
        self.down = nn.Linear(code, d_model * dim)
        self.down_bias = nn.Linear(code, dim)
        self.up = nn.Linear(code, dim * d_model)
        self.up_bias = nn.Linear(code, d_model)
        self.norm_weight = nn.Linear(code, d_model)
        self.norm_bias = nn.Linear(code, d_model)
        for linear in (self.down, self.down_bias, self.up, self.up_bias, self.norm_weight, self.norm_bias):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def generate(self, codes: Tensor) -> NormedAdapters:
        """codes [B, code] -> their adapters."""
        return NormedAdapters(
            self.down(codes).unflatten(-1, (self.d_model, self.dim)),
            self.down_bias(codes),
            self.up(codes).unflatten(-1, (self.dim, self.d_model)),
            self.up_bias(codes),
            self.norm_weight(codes),
            self.norm_bias(codes),
        )

    def forward(self, y: Tensor, codes: Tensor, index: Tensor) -> Tensor:
        """y [N, D], codes [tasks, code], index [B] into them -> [N, D]; generated per task, not per instance."""
        return apply_normed_adapter(y, self.generate(codes).rows(index))


class CodeNetwork(nn.Module):
    """Turns the embeddings of task, layer and (in `++`) place into a code: Linear, ReLU, Linear, LayerNorm.

    Weights of the Linears N(0, 0.01²), biases 0, as in its authors' code.
    """

    def __init__(self, layers: int, embedding: int, hidden: int, places: bool) -> None:
        super().__init__()
        self.layer_embedding = nn.Embedding(layers, embedding)
        self.place_embedding = nn.Embedding(len(PLACES), embedding) if places else None
        self.network = nn.Sequential(
            nn.Linear(embedding * (3 if places else 2), hidden),
            nn.ReLU(),
            nn.Linear(hidden, embedding),
            nn.LayerNorm(embedding, eps=CODE_NORM_EPS),
        )
        for linear in self.network:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks [M, embedding] -> codes [N, places or 1, M, embedding]."""
        layers = self.layer_embedding.weight  # [N, E]
        places = tasks.new_zeros(1, 0) if self.place_embedding is None else self.place_embedding.weight
        shape = (layers.shape[0], places.shape[0], tasks.shape[0], -1)
        joined = [tasks[None, None], layers[:, None, None], places[None, :, None]]
        return self.network(torch.cat([part.expand(shape) for part in joined], dim=-1))


class HyperformerStack(nn.Module):
    """Adapts one stack.

    Args:
        form: "shared" (`++`), "stack" or "layer".
        settings: adapter size, size of embeddings and code, and size of the code network.
        sizes: of the stack.
    """

    def __init__(self, form: str, settings: HyperformerSettings, sizes: StackSizes) -> None:
        super().__init__()
        self.form, self.count = form, sizes.layers
        heads = {"shared": 1, "stack": len(PLACES), "layer": sizes.layers * len(PLACES)}[form]
        self.heads = nn.ModuleList(
            NormedAdapterHeads(sizes.d_model, settings.dim, settings.embedding) for _ in range(heads)
        )
        self.codes: CodeNetwork | None = None
        if form != "layer":
            self.codes = CodeNetwork(sizes.layers, settings.embedding, settings.hidden, places=form == "shared")

    def adaptation(self, tasks: Tensor, index: Tensor) -> HyperformerAdaptation:
        """The stack's adaptation for the embeddings [M, embedding] of the tasks, and each instance's task [B]."""
        if self.codes is None:
            codes = tasks.expand(self.count, 1, *tasks.shape)
        else:
            codes = self.codes(tasks)
        return HyperformerAdaptation(self, codes, index)

    def heads_of(self, layer: int, place: int) -> NormedAdapterHeads:
        """The heads that generate a layer's adapter after the self-attention (0) or the feed-forward (1)."""
        index = {"shared": 0, "stack": place, "layer": layer * len(PLACES) + place}[self.form]
        return cast(NormedAdapterHeads, self.heads[index])


class HyperformerAdaptation(Adaptation):
    """Adapters after the sub-layers, from codes [N, places or 1, tasks, code] and each instance's task [B]."""

    adapts_outputs = True

    def __init__(self, stack: HyperformerStack, codes: Tensor, index: Tensor) -> None:
        self.stack, self.codes, self.index = stack, codes, index

    def code(self, layer: int, place: int) -> Tensor:
        return self.codes[layer, place if self.codes.shape[1] > 1 else 0]

    def after(self, layer: int, place: int, y: Tensor) -> Tensor:
        return self.stack.heads_of(layer, place)(y, self.code(layer, place), self.index)

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        return self.after(layer, PLACES.index("attention"), y)

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        return self.after(layer, PLACES.index("feed_forward"), y)

    def for_generation(self) -> CachedHyperformerAdaptation:
        return CachedHyperformerAdaptation(
            [
                [
                    self.stack.heads_of(layer, place).generate(self.code(layer, place)).rows(self.index)
                    for place in range(len(PLACES))
                ]
                for layer in range(self.codes.shape[0])
            ]
        )


class CachedHyperformerAdaptation(Adaptation):
    """Adapters of B instances, generated once: [layer][place]."""

    adapts_outputs = True

    def __init__(self, layers: list[list[NormedAdapters]]) -> None:
        self.layers = layers

    def after_self_attention(self, layer: int, y: Tensor) -> Tensor:
        return apply_normed_adapter(y, self.layers[layer][PLACES.index("attention")])

    def after_feed_forward(self, layer: int, y: Tensor) -> Tensor:
        return apply_normed_adapter(y, self.layers[layer][PLACES.index("feed_forward")])

    def select(self, rows: Tensor) -> CachedHyperformerAdaptation:
        return CachedHyperformerAdaptation([[adapters.rows(rows) for adapters in layer] for layer in self.layers])


class Hyperformer(Method):
    """Task-conditioned adapters after attention and feed-forward in both stacks; T5's layer norms are trained."""

    needs_tasks = True
    trains_base = True

    def __init__(self, config: HyperdecoderConfig, base: Base) -> None:
        super().__init__(config, base)
        settings, form = config.method.hyperformer, self.form(config)
        self.task_embedding = TaskEmbedding(len(config.tasks), settings.embedding)
        self.encoder = HyperformerStack(form, settings, base.sizes("encoder"))
        self.decoder = HyperformerStack(form, settings, base.sizes("decoder"))

    @classmethod
    def form(cls, config: HyperdecoderConfig) -> str:
        """The form of the stacks: see `HyperformerStack`."""
        return config.method.hyperformer.form

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        return ["hyperformer"]

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        return [["hyperformer.dim"]]

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        settings = config.method.hyperformer
        if settings.form not in ("stack", "layer"):
            raise UserError(f"method.hyperformer.form={settings.form}{nearest(settings.form, ['stack', 'layer'])}")
        for key in ("dim", "embedding", "hidden"):
            if getattr(settings, key) < 1:
                raise UserError(f"method.hyperformer.{key}={getattr(settings, key)} must be at least 1")
        if not config.tasks:
            raise UserError(f"method.name={config.method.name} needs the names of the tasks that it is trained on")

    def tasks_and_index(self, task_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings of all tasks and of an unseen one [tasks + 1, embedding], and the index of each instance's [B]."""
        weight = self.task_embedding.weight
        return with_unseen_task(weight), task_rows(required(task_ids), weight.shape[0])

    def encode(self, run_encoder: RunEncoder, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        return run_encoder(self.encoder.adaptation(*self.tasks_and_index(task_ids)))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation:
        return self.decoder.adaptation(*self.tasks_and_index(task_ids))

    def base_trainables(self, base: Base) -> list[str]:
        return base.norm_names()


class HyperformerPlusPlus(Hyperformer):
    """Hyperformer with one set of heads per stack for both places, which have different place embeddings."""

    @classmethod
    def form(cls, config: HyperdecoderConfig) -> str:
        return "shared"

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        return ["hyperformer.dim", "hyperformer.embedding", "hyperformer.hidden"]
