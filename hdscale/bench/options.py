"""What each benchmark takes from the command line (`hdscale bench NAME --help`): no torch, so that help is quick."""

from dataclasses import dataclass
from typing import Literal, Optional

from hdscale.errors import UserError
from hdscale.files import package_root
from hdscale.settings import Settings, setting

DType = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]
VARIANTS = ("hdscale", "released-fp32", "released-bf16", "adapter", "full")
NAMED_SHAPES = {  # D, A, K, layers of the decoder
    "base": (768, 64, 128, 12),
    "large": (1024, 64, 128, 24),
    "xl": (2048, 64, 128, 24),
    "xxl": (4096, 64, 128, 24),
}


@dataclass
class ReportOptions(Settings):
    """Where a benchmark's table goes."""

    json: Optional[str] = setting(
        None, "write JSON to FILE, or print it in place of the table", metavar="FILE", without_value="-"
    )
    markdown: Optional[str] = setting(None, "add the table, hardware, versions and command to FILE", metavar="FILE")


@dataclass
class RowOptions(Settings):
    """Which rows are measured."""

    lengths: str = setting(
        "glue", "glue (drawn like GLUE's), real (text of --data-root), or SOURCE+TARGET tokens such as 512+128"
    )
    data_root: Optional[str] = setting(None, "mirror with GLUE, for --lengths real", metavar="DIR")
    tokenizer: Optional[str] = setting(None, "T5's tokenizer, for --lengths real", metavar="DIR")
    seed: int = setting(0, "of rows that are drawn")

    def validate(self, prefix: str = "--") -> None:
        """Also check the lengths, and what real text needs."""
        super().validate(prefix)
        if self.lengths == "real" and not (self.data_root and self.tokenizer):
            raise UserError("--lengths real needs --data-root DIR (a mirror with GLUE) and --tokenizer DIR")
        if self.lengths not in ("real", "glue"):
            fixed_lengths(self.lengths)


def fixed_lengths(text: str) -> tuple[int, int]:
    """ "512+128" as numbers of source and target tokens."""
    source, _, target = text.partition("+")
    if not (source.isdigit() and target.isdigit() and int(source) > 0 and int(target) > 0):
        raise UserError(f"--lengths {text}: write glue, real, or two numbers such as 512+128")
    return int(source), int(target)


@dataclass
class StepOptions(ReportOptions, RowOptions):
    """`hdscale bench step`."""

    size: str = setting("t5-v1_1-small", "built-in size of the base")
    dtype: Optional[DType] = setting(None, "of hdscale; default: fp32 on CPU, bf16 on CUDA")
    global_batch_size: int = setting(64, "rows per step", at_least=1)
    tokens_per_micro_batch: Optional[int] = setting(
        None,
        "most tokens per pass of hdscale; default, as in training: 1,024 on a CPU, the whole batch on a GPU (the "
        "released code passes the whole batch)",
        metavar="N",
        at_least=1,
    )
    micro_batch_size: Optional[int] = setting(
        None, "rows per pass of hdscale, in place of a number of tokens", metavar="N", at_least=1
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "train.compile of hdscale, adapter and full; auto, as in training: on for a GPU, if that is faster",
    )
    steps: int = setting(5, "steps that each variant is timed for, alternating", at_least=1)
    variants: list[Literal["hdscale", "released-fp32", "released-bf16", "adapter", "full"]] = setting(
        list(VARIANTS), "what is measured; the first is what the others are compared with"
    )
    device: Optional[Device] = setting(None, "default: cuda where there is a GPU")


@dataclass
class DecodeOptions(ReportOptions, RowOptions):
    """`hdscale bench decode`."""

    size: str = setting("t5-v1_1-small", "built-in size of the base")
    dtypes: list[DType] = setting(["fp32", "bf16"], "of hdscale and of the released code")
    batch_size: int = setting(32, "rows per batch", at_least=1)
    tokens: int = setting(16, "new tokens of each mixed row", at_least=1)
    mixed_batches: int = setting(4, "batches of mixed rows", at_least=1)
    rows: Optional[int] = setting(
        None, "only the first N rows of each validation set; default: all", metavar="N", at_least=1
    )
    every: int = setting(8, "decode one in this many batches of a validation set", at_least=1)
    turns: int = setting(3, "times that each side decodes everything, alternating", at_least=1)
    device: Optional[Device] = setting(None, "default: cuda where there is a GPU")


@dataclass
class DataOptions(ReportOptions, RowOptions):
    """`hdscale bench data`."""

    size: str = setting("t5-v1_1-small", "built-in size whose training step consumes the batches")
    global_batch_size: int = setting(128, "rows per step", at_least=1)
    micro_batch_size: int = setting(16, "rows per pass", at_least=1)
    tokens_per_micro_batch: int = setting(2048, "tokens per pass, for the share of padding", at_least=1)
    ranks: int = setting(1, "each rank mixes the global batch and collates its own share", at_least=1)
    batches: int = setting(50, "global batches that are made", at_least=1)
    steps: int = setting(2, "training steps that are timed; 0: none", at_least=0)
    consume: Optional[float] = setting(
        None, "samples per second to compare with, in place of a timed step", metavar="SAMPLES", above=0
    )

    def validate(self, prefix: str = "--") -> None:
        """Also check that the ranks divide the batch."""
        super().validate(prefix)
        if self.global_batch_size % self.ranks:
            raise UserError(f"--global-batch-size={self.global_batch_size}: must be a multiple of --ranks {self.ranks}")


@dataclass
class ScalingOptions(ReportOptions, RowOptions):
    """`hdscale bench scaling`; from `predict_size` on, the assumptions of the prediction."""

    size: str = setting("t5-v1_1-small", "built-in size that is trained here")
    dtype: DType = setting("fp32", "of the base")
    ranks: list[int] = setting([1, 2], "numbers of ranks that are measured")
    global_batch_size: int = setting(
        32, "rows per step of the strong scaling; also each rank's share of the weak scaling", at_least=1
    )
    micro_batch_size: int = setting(8, "rows per pass", at_least=1)
    steps: int = setting(5, "steps that are timed", at_least=1)
    threads: int = setting(1, "CPU threads per rank", at_least=1)
    predict_size: str = setting("t5-v1_1-large", "prediction: built-in size")
    predict_batch: int = setting(16, "prediction: rows per GPU", at_least=1)
    predict_tokens: int = setting(48, "prediction: source tokens per row, as GLUE's mean", at_least=1)
    tflops: float = setting(300.0, "prediction: TFLOP/s that a GPU reaches in bf16", above=0)
    nvlink: float = setting(200.0, "prediction: bandwidth between the GPUs of a node", metavar="GB/S", above=0)
    infiniband: float = setting(25.0, "prediction: bandwidth between nodes", metavar="GB/S", above=0)
    latency: float = setting(30.0, "prediction: latency of one collective", metavar="MICROSECONDS", at_least=0)

    def validate(self, prefix: str = "--") -> None:
        """Also check that every number of ranks divides the batch."""
        super().validate(prefix)
        for ranks in self.ranks:
            if ranks < 1 or self.global_batch_size % ranks:
                raise UserError(
                    f"--ranks {ranks}: --global-batch-size {self.global_batch_size} must be a multiple of it"
                )


@dataclass
class MemoryOptions(ReportOptions):
    """`hdscale bench memory`."""

    only: Optional[str] = setting(None, "cases whose name contains WORD", metavar="WORD")


@dataclass
class CurvesOptions(ReportOptions):
    """`hdscale bench curves`."""

    config: str = setting(
        str(package_root() / "configs" / "quickstart.yaml"), "configuration of a run without dropout", metavar="FILE"
    )
    steps: int = setting(300, "steps of each run", at_least=2)
    tokens: int = setting(512, "train.tokens_per_micro_batch of the fast run", at_least=1)
    compile: Literal["on", "off"] = setting("on", "train.compile of the fast run")
    picture: Optional[str] = setting(None, "draw the curves: .svg, .png or .pdf", metavar="FILE")
    overrides: list[str] = setting([], "settings of all three runs", metavar="key=value")


@dataclass
class OpOptions(ReportOptions):
    """`hdscale bench op`."""

    shape: list[str] = setting(
        ["large"],
        f"{', '.join(NAMED_SHAPES)}, or d=..,a=..,k=..,layers=..; batch=32,tokens=4 by default; may be repeated",
        metavar="NAME[,batch=B][,tokens=T]",
    )
    dtype: Optional[Literal["float32", "bfloat16"]] = setting(None, "default: float32 on CPU, bfloat16 on CUDA")
    device: Optional[Device] = setting(None, "default: cuda where there is a GPU")
    backend: Optional[Literal["cpp", "cuda"]] = setting(None, "implementation to measure; default: the device's own")
    rounds: int = setting(5, "rounds in which the implementations alternate", at_least=1)
    compile: bool = setting(False, "also measure matmul + bmm under torch.compile")
