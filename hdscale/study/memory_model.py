"""The memory of a training step, part by part. docs/plan.md derives every term; the names here are the ones there.

A rank's peak is the largest of five moments of the step, on top of what is there all the time:

    loss       all activations are alive, and the loss over the vocabulary
    heads      the first decoder layer has been differentiated: a hypernetwork's gradient is formed and added up
    backward   the encoder's last block is differentiated, beside the reduction bucket
    reduction  no activations; gradients and buffers of the reduction
    update     gradients and what AdamW needs

Legend: B rows of a micro-batch, S source, T target, D d_model, F d_ff, H heads, N layers; e bytes of a number of the
computation, m bytes of an element of a dropout mask, n trainables, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hdscale.bases.cross_attention import few_targets


@dataclass(frozen=True)
class Architecture:
    """What the formulas need of a T5-family base.

    `own_biases`: each layer has position biases of its own (UMT5), and so a mask of its own.
    """

    d_model: int
    d_ff: int
    heads: int
    d_kv: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    gated: bool
    dropout: float
    own_biases: bool = False


@dataclass(frozen=True)
class Work:
    """What one rank computes, and how.

    Attributes:
        rows: B of a micro-batch. source: S. target: T, padding included.
        dtype_bytes: e. device: cpu or cuda: they keep different things for the backward pass.
        checkpointing: none, encoder, decoder or all. attention: sdpa or eager.
        encoder_dim, decoder_dim: adapter sizes A (0: no adapter on that side).
        encoder_passes: 2 where the encoder's own first pass conditions its adapters.
        generated: the decoder's adapters are generated. keeps_generated: they are kept for the backward pass (the plain
            PyTorch backend), not formed again.
        trains_base: all of the base's weights train.
        adapts_self_attention: something in the decoder's self-attentions trains: their linears, prefixes, or norms.
        label_smoothing: of the loss.
    """

    rows: int
    source: int
    target: int
    dtype_bytes: int = 2
    device: str = "cuda"
    checkpointing: str = "none"
    attention: str = "sdpa"
    encoder_dim: int = 64
    decoder_dim: int = 64
    encoder_passes: int = 1
    generated: bool = True
    keeps_generated: bool = False
    trains_base: bool = False
    adapts_self_attention: bool = False
    label_smoothing: float = 0.0

    @property
    def mask_bytes(self) -> int:
        """m: CUDA keeps a dropout mask as booleans, the CPU in the dtype."""
        return 1 if self.device == "cuda" else self.dtype_bytes


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed distributes the trainable parameters.

    Attributes:
        ranks: W. stage: of ZeRO. offload: masters and moments are in host memory. bucket: elements of a reduction.
    """

    ranks: int = 1
    stage: int = 2
    offload: bool = False
    bucket: int = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        frozen: the base's weights. trainable: the weights that train, as the computation uses them.
        masters, moments: this rank's share of the float32 masters and of AdamW's two moments.
        accumulation: float32 gradients that ZeRO-1 keeps between steps under bf16.
        encoder, decoder: activations kept for the backward pass. generated: generated adapters, where they are kept.
        decoder_rest: of the decoder's, what is left when its last layer has been differentiated.
        loss: logits and what the loss needs. backward: temporaries of the block that is being differentiated.
        heads: gradient of what all layers share, fresh and summed. bucket: of the reduction, during the backward pass.
        gradients: gradients and reduction buffers, at the end of the backward pass.
        update: temporaries of AdamW. workspace: CUDA context, libraries, fragmentation.
        host: host memory of the rank (offloaded optimizer), without the mapped checkpoint.
    """

    frozen: float
    trainable: float
    masters: float
    moments: float
    accumulation: float
    encoder: float
    decoder: float
    decoder_rest: float
    generated: float
    loss: float
    backward: float
    heads: float
    bucket: float
    gradients: float
    update: float
    workspace: float
    host: float

    @property
    def standing(self) -> float:
        """What is held between steps."""
        return self.frozen + self.trainable + self.masters + self.moments + self.accumulation

    @property
    def moments_of_peak(self) -> dict[str, float]:
        """{moment: bytes on top of `standing`}."""
        return {
            "loss": self.encoder + self.decoder + self.generated + self.loss,
            "heads": self.encoder + self.generated + self.decoder_rest + self.heads,
            "backward": self.encoder + self.backward + self.bucket,
            "reduction": self.gradients,
            "update": self.update,
        }

    @property
    def peak(self) -> float:
        """Most bytes at any moment of a step."""
        return self.standing + max(self.moments_of_peak.values()) + self.workspace

    @property
    def moment(self) -> str:
        """When the peak is."""
        return max(self.moments_of_peak, key=self.moments_of_peak.__getitem__)


def step_memory(
    base: Architecture,
    work: Work,
    sharding: Sharding,
    parameters: int,
    trainable: int,
    shared: int = 0,
    workspace: float | None = None,
) -> Memory:
    """Memory of a training step on one rank.

    Args:
        parameters: of the base. trainable: n.
        shared: of n, what all layers of the decoder share (the hypernetwork): its gradient is a sum over them.
        workspace: bytes that no term has; default: 0 on a CPU, and `cuda_workspace` on a GPU.
    """
    e, w, n = work.dtype_bytes, sharding.ranks, trainable
    shards = 1 if sharding.stage < 3 else w
    frozen = 0 if work.trains_base else e * parameters / shards
    masters, moments = 4 * n / w, 8 * n / w
    host = masters + moments + 4 * n / w if sharding.offload else 0.0
    encoder, block = encoder_activations(base, work)
    decoder, generated = decoder_activations(base, work)
    rest = decoder * (1 - 1 / max(base.decoder_layers, 1)) if work.checkpointing in ("none", "encoder") else decoder
    # the optimizer's temporaries: torch's loop over tensors needs two more of them, the fused kernel none
    loop = 0 if work.device == "cuda" and not sharding.offload else 8 * n / w
    update = final_gradients(n, work, sharding) + (0 if sharding.offload and work.device == "cuda" else loop)
    memory = Memory(
        frozen=frozen,
        trainable=e * n / shards,
        masters=0 if sharding.offload else masters,
        moments=0 if sharding.offload else moments,
        accumulation=4 * n if sharding.stage == 1 and e == 2 else 0,
        encoder=encoder,
        decoder=decoder,
        decoder_rest=rest,
        generated=generated,
        loss=loss_bytes(base, work),
        backward=block,
        heads=2 * e * shared if base.decoder_layers > 1 else e * shared,
        bucket=bucket_bytes(n, work, sharding),
        gradients=gradient_bytes(n, work, sharding),
        update=update,
        workspace=0.0,
        host=host,
    )
    if workspace is None:
        workspace = cuda_workspace(memory, base, e, sharding) if work.device == "cuda" else 0.0
    return replace(memory, workspace=workspace)


def cuda_workspace(memory: Memory, base: Architecture, e: int, sharding: Sharding) -> float:
    """What a GPU needs besides tensors: context, libraries, cuBLAS's workspace, 4% lost between the allocator's blocks.

    Under ZeRO-3 the weights of two blocks are gathered at a time.
    """
    gathered = 0.0
    if sharding.stage == 3:
        inner = base.heads * base.d_kv
        gathered = 2 * e * (8 * base.d_model * inner + 3 * base.d_model * base.d_ff)
    return 0.6e9 + 0.04 * (memory.standing + max(memory.moments_of_peak.values())) + gathered


# ---- activations


def norm_bytes(rows: float, base: Architecture, work: Work) -> float:
    """A layer norm and the residual stream that it reads: x itself, on a CPU in float32, and one number per row."""
    kept = 4 if work.device == "cpu" else work.dtype_bytes
    trained = work.dtype_bytes if work.trains_base else 0
    return rows * (base.d_model * (kept + trained) + 4)


def adapter_bytes(rows: float, dim: float, base: Architecture, work: Work) -> float:
    """What an adapter of size `dim` keeps; its input counts only where the norm beside it does not keep that tensor."""
    if not dim:
        return 0.0
    copied = work.device == "cpu" and work.dtype_bytes == 2
    return work.dtype_bytes * rows * (dim + (base.d_model if copied else 0))


def attention_bytes(queries: float, keys: float, pairs: float, base: Architecture, work: Work) -> float:
    """What an attention keeps: queries and keys are rows, pairs is B·(queries)·(keys) of an instance, summed.

    Fused kernels keep q, k, v, their output, and one number per row and head (the additive mask belongs to the stack,
    not to a layer: see `mask_bytes`). Eager attention, and on a CPU also attention with dropout, is not fused:
    the probabilities are kept three times (softmax, mask, product), on a CPU all of them in float32.
    """
    inner = base.heads * base.d_kv
    e = work.dtype_bytes
    trained = e * (queries * base.d_model + queries * inner) if work.trains_base else 0
    if not is_fused(base, work):
        wide = 4 if work.attention == "sdpa" else e
        masks = 2 * wide + (wide if work.device == "cpu" else work.mask_bytes) if base.dropout > 0 else 2 * wide
        return wide * inner * (queries + 2 * keys) + masks * base.heads * pairs + trained
    return e * inner * (2 * queries + 2 * keys) + 4 * base.heads * queries + trained


def cross_attention_bytes(queries: float, keys: float, base: Architecture, work: Work) -> float:
    """What the decoder's attention to the source keeps.

    On a CPU few targets keep no keys and values of the source (`hdscale.bases.cross_attention`): the queries' image of
    size D for each head, and the probabilities, whose softmax bf16 and dropout copy. A GPU always projects.
    """
    pairs = queries * work.source
    projects = work.device == "cuda" or not few_targets(work.target, work.source, base.d_kv)
    if projects or work.attention == "eager":
        return attention_bytes(queries, keys, pairs, base, work)
    e, drops = work.dtype_bytes, base.dropout > 0
    shares = 4 + (e if e < 4 or drops else 0) + (work.mask_bytes if drops else 0)
    trained = e * queries * (2 * base.d_model + 2 * base.heads * base.d_kv) if work.trains_base else 0
    return e * queries * base.heads * base.d_model + base.heads * pairs * shares + trained


def is_fused(base: Architecture, work: Work) -> bool:
    """Whether an attention is one kernel."""
    return work.attention != "eager" and not (work.device == "cpu" and base.dropout > 0)


def mask_bytes(elements: float, layers: int, base: Architecture, work: Work, recomputed: bool) -> float:
    """The additive mask of position bias and padding: of a stack, or of each layer that has biases of its own.

    Fused kernels keep it, and so do layers that are recomputed. The first layer needs none of its own.
    """
    masks = max(layers - 1, 1) if base.own_biases else 1
    return work.dtype_bytes * elements * masks if recomputed or is_fused(base, work) else 0.0


def feed_forward_bytes(rows: float, base: Architecture, work: Work) -> float:
    """What a feed-forward keeps: gated GELU its input and the two factors; ReLU its output."""
    e = work.dtype_bytes
    tensors = 3 if base.gated else 1
    dropped = work.mask_bytes if base.dropout > 0 else 0
    trained = e * (base.d_model + base.d_ff) if work.trains_base else 0
    return rows * (base.d_ff * (tensors * e + dropped) + trained)


def dropout_bytes(rows: float, base: Architecture, work: Work) -> float:
    """The mask of a dropout on the residual stream."""
    return rows * base.d_model * work.mask_bytes if base.dropout > 0 else 0.0


def stack_dropout_bytes(rows: float, base: Architecture, work: Work) -> float:
    """The masks of a stack's own dropouts: after its last norm and, where the embeddings train, after them."""
    return (2 if work.trains_base else 1) * dropout_bytes(rows, base, work)


def encoder_activations(base: Architecture, work: Work) -> tuple[float, float]:
    """(bytes kept by the encoder, bytes on top of them while its last block is differentiated)."""
    e = work.dtype_bytes
    rows = work.rows * work.source
    pairs = rows * work.source
    block = (
        2 * norm_bytes(rows, base, work)
        + attention_bytes(rows, rows, pairs, base, work)
        + feed_forward_bytes(rows, base, work)
        + 2 * dropout_bytes(rows, base, work)
        + adapter_bytes(rows, work.encoder_dim, base, work)
    )
    # gradients of the block's widest tensors
    temporaries = backward_temporaries(rows, pairs, base, work)
    if not work.encoder_dim and not work.trains_base:
        return 0.0, 0.0
    last = norm_bytes(rows, base, work) + stack_dropout_bytes(rows, base, work) + e * rows * base.d_model
    recomputed = work.checkpointing in ("encoder", "all")
    last += mask_bytes(base.heads * pairs, base.encoder_layers, base, work, recomputed)
    if recomputed:
        kept = base.encoder_layers * e * rows * base.d_model + last
        # what the recomputed block keeps is released as its gradients come
        return work.encoder_passes * kept, block + 3 * e * rows * base.d_model
    # nothing before the first adapter needs a gradient
    first = block if work.trains_base else e * rows * (base.d_model + work.encoder_dim)
    kept = first + (base.encoder_layers - 1) * block + last
    return work.encoder_passes * kept, temporaries


def decoder_activations(base: Architecture, work: Work) -> tuple[float, float]:
    """(bytes kept by the decoder, with one block's where they are recomputed; bytes of generated adapters kept)."""
    e = work.dtype_bytes
    rows, sources = work.rows * work.target, work.rows * work.source
    own = attention_bytes(rows, rows, rows * work.target, base, work)
    # of the first layer nothing before its cross-attention needs a gradient, unless something there trains
    trains = work.trains_base or work.adapts_self_attention
    before_source = 0.0 if trains else 2 * norm_bytes(rows, base, work) + own + dropout_bytes(rows, base, work)
    block = (
        3 * norm_bytes(rows, base, work)
        + own
        + cross_attention_bytes(rows, sources, base, work)
        + feed_forward_bytes(rows, base, work)
        + 3 * dropout_bytes(rows, base, work)
        + adapter_bytes(rows, work.decoder_dim, base, work)
        + e * rows * work.decoder_dim
    )
    adapter = 2 * e * work.rows * base.d_model * work.decoder_dim
    last = norm_bytes(rows, base, work) + stack_dropout_bytes(rows, base, work)
    recomputed = work.checkpointing in ("decoder", "all")
    own_mask = base.heads * work.target**2
    last += mask_bytes(own_mask, base.decoder_layers, base, work, recomputed)
    last += e * sources if is_fused(base, work) else 0.0
    if recomputed:
        kept = base.decoder_layers * e * rows * base.d_model + last
        return kept + block, (adapter if work.keeps_generated else 0)
    generated = base.decoder_layers * adapter if work.keeps_generated else 0.0
    return base.decoder_layers * block - before_source + last, generated


def backward_temporaries(rows: float, pairs: float, base: Architecture, work: Work) -> float:
    """Gradients that are alive at once while a block is differentiated: of the feed-forward, or of the attention."""
    e = work.dtype_bytes
    feed_forward = 5 * e * rows * base.d_ff
    wide = 4 if work.device == "cpu" and base.dropout > 0 else e
    attention = 2 * wide * base.heads * pairs
    return max(feed_forward, attention) + 3 * e * rows * base.d_model


def loss_bytes(base: Architecture, work: Work) -> float:
    """Loss over the vocabulary, in float32: log-probabilities, their gradient, that of the logits, one to smooth."""
    tensors = 4 if work.label_smoothing else 3
    return 4 * tensors * work.rows * work.target * base.vocabulary


# ---- gradients


def bucket_bytes(n: int, work: Work, sharding: Sharding) -> float:
    """Reduction buffers while the encoder is differentiated: where the bucket holds every gradient, only the bucket."""
    if n <= sharding.bucket:
        return work.dtype_bytes * n
    return gradient_bytes(n, work, sharding)


def gradient_bytes(n: int, work: Work, sharding: Sharding) -> float:
    """Gradients and reduction buffers at the end of the backward pass (ZeRO-1's standing ones not counted).

    ZeRO-2 and 3 keep this rank's share in float32, beside a bucket: in bf16 the gradient, its copy in the bucket and a
    float32 copy that is communicated, in fp32 the bucket alone.
    """
    bucket = min(sharding.bucket, n)
    if sharding.stage == 1:
        return work.dtype_bytes * (n + bucket)
    share = 0 if sharding.offload else 4 * n / sharding.ranks
    return share + (8 if work.dtype_bytes == 2 else 4) * bucket


def final_gradients(n: int, work: Work, sharding: Sharding) -> float:
    """Gradients that are alive at the update."""
    if sharding.stage == 1:
        return work.dtype_bytes * n
    return 0 if sharding.offload else 4 * n / sharding.ranks
