"""The hyperdecoder and the grid around it (Tables 8, 13): {none, manual, task, generated} in each of the two stacks.

The paper's method has learned adapters in the encoder and generated ones in the decoder. With learned adapters on both
sides it is the adapter baseline (A.1), with task-conditioned ones on both the task hypernet (A.2). What goes beyond the
paper (other conditioning, LoRA and prefixes, layers that share an adapter, a hypernetwork per layer, scaled output) are
options of the same module; their defaults are the paper's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdscale.bases.base import architecture
from hdscale.bases.interface import Adaptation, ComposedAdaptation, LayerwiseAdaptation, ScaledAdaptation
from hdscale.errors import UserError, nearest
from hdscale.modeling.adapters import ManualAdaptation, ManualAdapters
from hdscale.modeling.conditioning import EncodingEmbedding, TaskEmbedding, masked_mean
from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.hypernetwork import GeneratedAdaptation, GeneratedAdapterHeads, Hypernetwork
from hdscale.modeling.lora import GeneratedLora, GeneratedLoraAdaptation, adapted_linears, check_lora
from hdscale.modeling.methods.interface import Encode, Method
from hdscale.modeling.prefix import GeneratedPrefix, GeneratedPrefixAdaptation
from hdscale.modeling.settings import MethodSettings, SideSettings

KINDS = ("none", "manual", "task", "generated")
FORMS = ("adapter", "lora", "prefix")
CONDITIONED = ("task", "generated")


def forms(side: SideSettings) -> list[str]:
    """What a task or generated side generates."""
    return side.form.split("+") if side.adapter in CONDITIONED else []


def parse_layers(text: str | None, layers: int, key: str) -> list[int]:
    """The layers of "0-5,11", in order.

    Raises:
        UserError: for anything else, or layers that the stack does not have.
    """
    found: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (last.strip() or first.strip()).isdigit()):
            raise UserError(f"{key}={text}: write layers from 0, such as 0-5,11")
        found |= set(range(int(first), int(last or first) + 1))
    if found and max(found) >= layers:
        raise UserError(f"{key}={text}: the stack has layers 0 to {layers - 1}")
    return sorted(found)


class Side(nn.Module):
    """What adapts one stack.

    Args:
        name: encoder or decoder. An encoder with generated adapters runs twice, its first pass conditioning the second,
            and so has learned adapters for that pass.
        config: base, method and tasks. base_config: of the base model.
    """

    def __init__(self, name: str, config: HyperdecoderConfig, base_config) -> None:
        super().__init__()
        settings: SideSettings = getattr(config.method, name)
        decoder = name == "decoder"
        layers = base_config.num_decoder_layers if decoder else base_config.num_layers
        d_model = base_config.d_model
        self.kind = settings.adapter
        self.normed_input = settings.input == "layernorm"
        self.fixed_scale = settings.scale
        if settings.learned_scale:
            self.scale = nn.Parameter(torch.full((layers,), settings.scale))
        if self.kind == "manual" or (self.kind == "generated" and not decoder):
            self.adapters = ManualAdapters(d_model, layers, settings.dim)
        if self.kind not in CONDITIONED:
            return

        hypernet = config.method.hypernet
        self.shared = parse_layers(settings.shared_layers, layers, f"method.{name}.shared_layers")
        self.generated = [layer for layer in range(layers) if layer not in self.shared]
        if self.shared:
            self.shared_adapters = ManualAdapters(d_model, len(self.shared), settings.dim)
        if self.kind == "task":
            self.task_embedding = TaskEmbedding(len(config.tasks), d_model)
            size = d_model
        else:
            self.embedding = EncodingEmbedding(d_model, hypernet.mlp, hypernet.conditioning, hypernet.pools)
            size = self.embedding.size

        def heads() -> dict[str, nn.Module]:
            return generating_heads(settings, config.method, base_config, decoder)

        if hypernet.per_layer:
            self.hypernetworks = nn.ModuleList(
                Hypernetwork(size, 1, hypernet.bottleneck, 0, heads()) for _ in self.generated
            )
        elif self.generated:
            self.hypernetwork = Hypernetwork(
                size, len(self.generated), hypernet.bottleneck, hypernet.layer_embedding, heads()
            )

    def manual(self) -> ManualAdaptation:
        """The learned adapters: of a manual side, or of a generated encoder's first pass."""
        return ManualAdaptation(self.adapters, self.normed_input)

    def adaptation(self, e: Tensor | None) -> Adaptation | None:
        """The stack's adaptation for a batch with embeddings e [B, ...] (None where nothing is conditioned)."""
        if self.kind == "none":
            return None
        adaptation: Adaptation = self.manual() if self.kind == "manual" else self.conditioned(e)
        if "scale" in self._parameters:
            # a value of its own, and not the parameter: DeepSpeed's stage 3 takes parameters apart again
            return ScaledAdaptation(adaptation, self.scale * 1.0)
        return adaptation if self.fixed_scale == 1.0 else ScaledAdaptation(adaptation, self.fixed_scale)

    def conditioned(self, e: Tensor) -> Adaptation:
        """What is generated from e, and the adapters of the layers that share theirs."""
        if not self.generated:
            return ManualAdaptation(self.shared_adapters, self.normed_input)
        if "hypernetworks" in self._modules:
            layers = [(self.generate(hypernetwork, e), 0) for hypernetwork in self.hypernetworks]
        else:
            generated = self.generate(self.hypernetwork, e)
            if not self.shared:
                return generated
            layers = [(generated, index) for index in range(len(self.generated))]
        by_layer = dict(zip(self.generated, layers, strict=True))
        if self.shared:
            shared = ManualAdaptation(self.shared_adapters, self.normed_input)
            by_layer |= {layer: (shared, index) for index, layer in enumerate(self.shared)}
        return LayerwiseAdaptation([by_layer[layer] for layer in range(len(by_layer))])

    def generate(self, hypernetwork: Hypernetwork, e: Tensor) -> Adaptation:
        """The adaptation that a hypernetwork generates from e [B, ...]."""
        codes = hypernetwork(e)
        members: list[Adaptation] = []
        for name, heads in hypernetwork.named_children():
            if name == "adapter_heads":
                members.append(GeneratedAdaptation(heads, codes, self.normed_input))
            elif name == "lora_heads":
                members.append(GeneratedLoraAdaptation(heads, codes))
            elif name == "prefix_heads":
                members.append(GeneratedPrefixAdaptation(heads, codes))
        return members[0] if len(members) == 1 else ComposedAdaptation(members)


def generating_heads(
    settings: SideSettings, method: MethodSettings, base_config, decoder: bool
) -> dict[str, nn.Module]:
    """The heads of one hypernetwork, by name, for whatever a side generates."""
    bottleneck, lora = method.hypernet.bottleneck, method.lora
    heads: dict[str, nn.Module] = {}
    for form in forms(settings):
        if form == "adapter":
            heads["adapter_heads"] = GeneratedAdapterHeads(
                base_config.d_model, settings.dim, bottleneck, method.backend
            )
        elif form == "lora":
            scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
            linears = adapted_linears(base_config, decoder, lora.targets or "qv", lora.attention or "self")
            heads["lora_heads"] = nn.ModuleDict(
                {key: GeneratedLora(d_in, d_out, lora.rank, bottleneck, scale) for key, d_in, d_out in linears}
            )
        else:
            heads["prefix_heads"] = GeneratedPrefix(
                base_config.num_heads, base_config.d_kv, method.prefix.length, bottleneck
            )
    return heads


class SidesMethod(Method):
    """Hyperdecoder (Sections 2.1-2.3) and every other cell of the grid of Tables 8 and 13."""

    def __init__(self, config: HyperdecoderConfig, base: nn.Module) -> None:
        super().__init__(config, base)
        self.encoder = Side("encoder", config, base.config)
        self.decoder = Side("decoder", config, base.config)
        self.needs_tasks = "task" in (self.encoder.kind, self.decoder.kind)

    @classmethod
    def options(cls, settings: MethodSettings) -> list[str]:
        kinds = {
            name: cls.fixed.get(f"{name}.adapter", getattr(settings, name).adapter) for name in ("encoder", "decoder")
        }
        found = [f"{name}.adapter" for name in kinds if f"{name}.adapter" not in cls.fixed]
        generated: set[str] = set()
        for name, kind in kinds.items():
            side: SideSettings = getattr(settings, name)
            if kind != "none":
                found += [f"{name}.{option}" for option in ("dim", "input", "scale", "learned_scale")]
            if kind in CONDITIONED:
                found += [f"{name}.form", f"{name}.shared_layers"]
                generated |= set(side.form.split("+"))
        if set(kinds.values()) & set(CONDITIONED):
            found += ["hypernet.bottleneck", "hypernet.layer_embedding", "hypernet.per_layer", "backend"]
        if "generated" in kinds.values():
            found += ["hypernet.conditioning", "hypernet.pools", "hypernet.mlp"]
        return found + [name for name in ("lora", "prefix") if name in generated]

    @classmethod
    def sizes(cls, settings: MethodSettings) -> list[list[str]]:
        sides = {name: getattr(settings, name) for name in ("encoder", "decoder")}
        dims = [f"{name}.dim" for name, side in sides.items() if side.adapter == "manual" or "adapter" in forms(side)]
        found = [["hypernet.bottleneck"]] if any(forms(side) for side in sides.values()) else []
        return found + ([dims] if dims else [])

    @classmethod
    def encoder_knows_instances(cls, settings: MethodSettings) -> bool:
        return settings.encoder.adapter in CONDITIONED

    @classmethod
    def check_values(cls, config: HyperdecoderConfig) -> None:
        method = config.method
        for name in ("encoder", "decoder"):
            side: SideSettings = getattr(method, name)
            if side.adapter not in KINDS:
                raise UserError(f"method.{name}.adapter={side.adapter}{nearest(side.adapter, KINDS)}")
            if side.input not in ("hidden", "layernorm"):
                raise UserError(f"method.{name}.input={side.input}{nearest(side.input, ['hidden', 'layernorm'])}")
            if side.adapter != "none" and side.dim < 1:
                raise UserError(f"method.{name}.dim={side.dim} must be at least 1")
            if side.adapter == "task" and not config.tasks:
                raise UserError(f"method.{name}.adapter=task needs the names of the tasks that it is trained on")
            if not math.isfinite(side.scale):
                raise UserError(f"method.{name}.scale={side.scale} must be a finite number")
            for form in forms(side):
                if form not in FORMS or forms(side).count(form) > 1:
                    raise UserError(
                        f"method.{name}.form={side.form}: name adapter, lora, prefix, or several joined by +"
                    )
            if "lora" in forms(side):
                check_lora(method.lora)
                if name == "encoder" and method.lora.attention == "cross":
                    raise UserError("method.lora.attention=cross: the encoder has no cross-attention; use self or all")
            if side.shared_layers is not None:
                base = architecture(config.model)
                layers = base.num_layers if name == "encoder" else base.num_decoder_layers
                parse_layers(side.shared_layers, layers, f"method.{name}.shared_layers")
        hypernet = method.hypernet
        for key in ("bottleneck", "pools"):
            if getattr(hypernet, key) < 1:
                raise UserError(f"method.hypernet.{key}={getattr(hypernet, key)} must be at least 1")
        if hypernet.layer_embedding < 0:
            raise UserError(f"method.hypernet.layer_embedding={hypernet.layer_embedding} must be at least 0")
        if method.prefix.length < 1:
            raise UserError(f"method.prefix.length={method.prefix.length} must be at least 1")
        if hypernet.conditioning not in ("mean", "attention"):
            known = nearest(hypernet.conditioning, ["mean", "attention"])
            raise UserError(f"method.hypernet.conditioning={hypernet.conditioning}{known}")

    def encode(self, encode: Encode, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        side = self.encoder
        if side.kind == "generated":
            first_pass = encode(side.manual())
            return encode(side.adaptation(side.embedding(first_pass, mask)))
        return encode(side.adaptation(side.task_embedding(task_ids) if side.kind == "task" else None))

    def decoder_adaptation(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Adaptation | None:
        conditioned = self.decoder.kind in CONDITIONED
        return self.decoder.adaptation(self.embed(hidden, mask, task_ids) if conditioned else None)

    def embed(self, hidden: Tensor, mask: Tensor, task_ids: Tensor | None) -> Tensor:
        if self.decoder.kind == "generated":
            return self.decoder.embedding(hidden, mask)
        if self.decoder.kind == "task":
            return self.decoder.task_embedding(task_ids)
        return masked_mean(hidden, mask)

    def parts(self) -> dict[str, int]:
        found = {}
        for name in ("encoder", "decoder"):
            side = getattr(self, name)
            for part, module in side.named_children():
                found[f"{name}.{part}"] = sum(p.numel() for p in module.parameters())
            if own := sum(p.numel() for p in side.parameters(recurse=False)):
                found[f"{name}.scale"] = own
        return found


class AdapterMethod(SidesMethod):
    """The adapter baseline (A.1): learned adapters in both stacks."""

    fixed = {"encoder.adapter": "manual", "decoder.adapter": "manual"}


class TaskHypernet(SidesMethod):
    """The task hypernet baseline (A.2): a hypernetwork for each stack, conditioned on a learned task embedding."""

    fixed = {"encoder.adapter": "task", "decoder.adapter": "task"}
