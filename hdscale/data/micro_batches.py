"""A global batch distributed to ranks and cut into micro-batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Sequence

from hdscale.data.batches import Row


def deal(
    rows: Sequence[Row],
    world_size: int,
    micro_batch_size: int | None = None,
    sort_by_length: bool = True,
    tokens_per_micro_batch: int | None = None,
) -> list[list[list[Row]]]:
    """Every rank's micro-batches of a global batch.

    The batch is the same mixed batch whatever the cut; sorted by length, its micro-batches pad little. Each rank gets
    the same number of micro-batches (ZeRO reduces gradients at each backward pass).

    Args:
        rows: the global batch, at least one row per rank, and a multiple of the number of ranks.
        micro_batch_size: most rows of one micro-batch; None: all of a rank's rows in one.
        sort_by_length: by source, then target, longest first; otherwise in the batch's own order.
        tokens_per_micro_batch: most tokens of one micro-batch, padding included (a longer row is a micro-batch of its
            own): few micro-batches of many short rows and more of few long ones, each about equally much work. None:
            all of equally many rows, to within one.

    Returns:
        [rank][micro-batch] -> rows.
    """
    if sort_by_length:
        # sorting is stable, so equal lengths keep the order of the batch
        rows = sorted(rows, key=lambda row: (-len(row.input_ids), -len(row.labels)))
    if tokens_per_micro_batch is None:
        share = -(-len(rows) // world_size)
        pieces = world_size * -(-share // (micro_batch_size or share))
        bounds = [len(rows) * index // pieces for index in range(pieces + 1)]
    else:
        bounds = balanced_bounds(rows, world_size, micro_batch_size or len(rows), tokens_per_micro_batch)
    micro_batches = [list(rows[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    # neighbours in length go to different ranks, so that all are busy for equally long
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def padded_tokens(rows: Sequence[Row]) -> int:
    """Tokens that a micro-batch of these rows makes the model compute: source and target, padding included."""
    return len(rows) * (max(len(row.input_ids) for row in rows) + max(len(row.labels) for row in rows))


def balanced_bounds(rows: Sequence[Row], world_size: int, most_rows: int, most_tokens: int) -> list[int]:
    """Where to cut the rows into pieces within both limits: as few as a multiple of the ranks allows, the largest as
    small as so many pieces can be.
    """
    sizes = [(len(row.input_ids), len(row.labels)) for row in rows]
    fewest = len(greedy_bounds(sizes, most_rows, most_tokens)) - 1
    pieces = -(-fewest // world_size) * world_size
    low, high = 1, min(most_tokens, max(1, sum(source + target for source, target in sizes) * len(sizes)))
    while low < high:
        middle = (low + high) // 2
        if len(greedy_bounds(sizes, most_rows, middle)) - 1 <= pieces:
            high = middle
        else:
            low = middle + 1
    bounds = greedy_bounds(sizes, most_rows, low)
    # a limit that yields too few pieces: split those with most rows (there are at least as many rows as pieces)
    while len(bounds) - 1 < pieces:
        widest = max(range(len(bounds) - 1), key=lambda index: bounds[index + 1] - bounds[index])
        bounds.insert(widest + 1, (bounds[widest] + bounds[widest + 1]) // 2)
    return bounds


def greedy_bounds(sizes: Sequence[tuple[int, int]], most_rows: int, most_tokens: int) -> list[int]:
    """Bounds of pieces that are filled one after the other up to a limit of rows or of padded tokens."""
    bounds, longest_source, longest_target = [0], 0, 0
    for index, (source, target) in enumerate(sizes):
        count = index - bounds[-1] + 1
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if count > 1 and (count > most_rows or count * (longest_source + longest_target) > most_tokens):
            bounds.append(index)
            longest_source, longest_target = source, target
    return [*bounds, len(sizes)]
