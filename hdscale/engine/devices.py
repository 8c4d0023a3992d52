"""What is said of a GPU that does not suit, and of one whose memory does not suffice."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hdscale.engine.settings import TrainSettings
from hdscale.errors import UserError

BF16_CAPABILITY = (8, 0)


class OutOfGpuMemory(RuntimeError):
    """A step needs more memory than the GPU has; the message is one line with advice."""


def bf16_warning(device: torch.device, dtype: torch.dtype) -> str | None:
    """What to say of bf16 on a GPU without units for it (V100, T4), which computes it slowly; None on any other."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has no bf16 units and computes bf16 slowly: fp32 is likely to be faster "
        "(train.dtype=fp32 with a DeepSpeed file for fp32, or --dtype fp32)"
    )


def gpu_identity(device: torch.device) -> str:
    """Names a GPU among all of this node's."""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_own_gpu(store: dist.Store, rank: int, world_size: int, gpu: str) -> None:
    """Raise on every rank if two ranks have one GPU, in which NCCL would end with a long traceback. Collective.

    Args:
        store: reached by all ranks.
        gpu: this rank's node and GPU.

    Raises:
        UserError: naming the ranks.
    """
    keys = [f"hdscale/gpu/{other}" for other in range(world_size)]
    store.set(keys[rank], gpu)
    owners: dict[str, int] = {}
    for other, found in enumerate(store.multi_get(keys)):
        first = owners.setdefault(found.decode(), other)
        if first != other:
            raise UserError(
                f"ranks {first} and {other} share one GPU ({found.decode()}); start at most one rank per GPU: "
                "--ntasks-per-node equal to --gpus-per-node, --nproc_per_node or --num_gpus as many as there are GPUs"
            )


def out_of_memory(error: torch.OutOfMemoryError, step: int, train: TrainSettings) -> OutOfGpuMemory:
    """The one line for a step that did not fit: what was asked for, and which settings need less."""
    asked = next((line for line in " ".join(str(error).split()).split(". ") if "allocate" in line), "")
    if train.token_budget or train.tokens_found_automatically:
        now = f"lower train.tokens_per_micro_batch (now {train.tokens_per_micro_batch})"
    elif train.micro_batch_size:
        now = f"lower train.micro_batch_size (now {train.micro_batch_size}), or set train.tokens_per_micro_batch=auto"
    else:
        now = "set train.micro_batch_size (now all of a rank's rows on a GPU) or train.tokens_per_micro_batch=auto"
    return OutOfGpuMemory(
        f"step {step}: out of GPU memory{f' ({asked})' if asked else ''}; {now}, or set "
        "model.activation_checkpointing=all, each with another run.name or --fresh; or continue this run with "
        "deepspeed=ds_configs/zero3_bf16.json. `hdscale plan` says what fits"
    )
