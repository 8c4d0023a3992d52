"""A global batch dealt out to ranks and cut into micro-batches of rows of like length."""

from __future__ import annotations

from collections.abc import Sequence

from hdscale.data.batches import Row


def deal(
    rows: Sequence[Row], world_size: int, micro_batch_size: int | None = None, sort_by_length: bool = True
) -> list[list[list[Row]]]:
    """Every rank's micro-batches of a global batch.

    The batch is the same mixed batch whatever the cut; sorted by length, its micro-batches pad little. Each rank gets the
    same number of micro-batches, and the sizes of all differ by at most one row.

    Args:
        rows: the global batch, at least one row a rank.
        micro_batch_size: most rows of one micro-batch; None: all of a rank's rows in one.
        sort_by_length: by source, then target, longest first; otherwise in the batch's own order.

    Returns:
        [rank][micro-batch] -> rows.
    """
    share = -(-len(rows) // world_size)
    each = -(-share // (micro_batch_size or share))
    if sort_by_length:
        # sorting is stable, so equal lengths keep the order of the batch
        rows = sorted(rows, key=lambda row: (-len(row.input_ids), -len(row.labels)))
    pieces = world_size * each
    bounds = [len(rows) * index // pieces for index in range(pieces + 1)]
    micro_batches = [list(rows[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    # neighbours in length go to different ranks, so that all are busy for equally long
    return [micro_batches[rank::world_size] for rank in range(world_size)]
