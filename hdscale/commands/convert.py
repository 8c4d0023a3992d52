"""`hdscale convert`: write an export of a checkpoint of the authors' released implementation."""

from __future__ import annotations

import argparse

from hdscale.bases.settings import ModelSettings
from hdscale.errors import EXIT_DONE
from hdscale.modeling.convert import convert_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from-released", metavar="FILE", required=True, help="the release's pytorch_model.bin")
    parser.add_argument("--to", metavar="DIR", required=True, help="folder of the export")
    parser.add_argument("--model", required=True, help="base that it was trained on (google/t5-large-lm-adapt, ...)")
    parser.add_argument("--tasks", nargs="*", help="task names in the order of their ids (task-conditioned models)")
    parser.add_argument(
        "--post-layernorm-input", action="store_true", help="the release was run with adapter_norm_input=true"
    )


def run(args: argparse.Namespace) -> int:
    config, trainables = convert_checkpoint(
        args.from_released, args.to, ModelSettings(args.model), args.tasks, args.post_layernorm_input
    )
    encoder, decoder = config.method.encoder, config.method.decoder
    print(
        f"{len(trainables)} tensors, {sum(tensor.numel() for tensor in trainables.values()):,} parameters: "
        f"encoder {encoder.adapter} {encoder.dim}, decoder {decoder.adapter} {decoder.dim}, "
        f"bottleneck {config.method.hypernet.bottleneck} -> {args.to}"
    )
    return EXIT_DONE
