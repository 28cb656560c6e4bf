"""The division of an optimizer step; of use to plans too, which read no data and load none of its libraries."""


def num_micro_batches(global_batch: int, batch_size: int, world_size: int) -> int:
    """Number of micro-batches (forward and backward passes) of each rank in one optimizer step.

    Args:
        global_batch: Sequences of the step over all ranks.
        batch_size: Largest number of sequences of a rank in one micro-batch.
        world_size: Number of ranks.
    """
    return -(-global_batch // (batch_size * world_size))
