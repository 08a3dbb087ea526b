"""Block by block through many assignments: the order for models whose blocks do not all fit on the accelerator."""

from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.types import Assignments
from coopq.game.engines.assigned_model import AssignedModel, Walk
from coopq.model.blockwise import States


def layer_major(model: AssignedModel, assignments: Assignments, left_out: npt.NDArray[np.bool_]) -> Walk:
    """Walk through the assignments a chunk at a time; all of a chunk go through a block together.

    For each setting of a block in the chunk, the block visits the device once and computes every distinct prefix before
    the block. A chunk has half as many assignments as the model has blocks, and holds as many hidden states as a
    depth-first walk: the states before a block and the states after it.

    Args:
        model: The model with its offloaded blocks.
        assignments: Distinct, in lexicographic order, shape (n, n_players).
        left_out: Which blocks each assignment leaves out, shape (n, n_blocks).
    """
    chunk_size = max(1, len(model.members) // 2)
    for start in range(0, len(assignments), chunk_size):
        chunk, chunk_left_out = assignments[start : start + chunk_size], left_out[start : start + chunk_size]
        final = _final_states(model, chunk, chunk_left_out)
        previous = None
        for assignment, without in zip(chunk, chunk_left_out, strict=True):
            first = model.first_difference(assignment, previous)
            yield assignment, final[assignment.tobytes()], int((~without[first:]).sum())
            previous = assignment


def _final_states(model: AssignedModel, chunk: Assignments, left_out: npt.NDArray[np.bool_]) -> dict[bytes, States]:
    """States after the last block, by assignment."""
    blockwise = model.blockwise
    states = {b"": blockwise.embedded}
    memories: dict[bytes, list[dict[Any, Any]]] = {b"": []}
    for d, members in enumerate(model.members):
        settings = chunk[:, members]
        after: dict[bytes, States] = {}
        memories_after: dict[bytes, list[dict[Any, Any]]] = {}
        for widths in np.unique(settings, axis=0):
            rows = (settings == widths).all(axis=1)
            prefixes = {row[: members.start].tobytes() for row in chunk[rows]}
            if left_out[rows, d].all():
                after |= {prefix + widths.tobytes(): states[prefix] for prefix in prefixes}
                memories_after |= {prefix + widths.tobytes(): memories[prefix] for prefix in prefixes}
                continue
            with model.block_at(d, widths):
                for prefix in sorted(prefixes):
                    blockwise.remember(memories[prefix])
                    after[prefix + widths.tobytes()] = blockwise.forward_block(d, states[prefix])
                    memories_after[prefix + widths.tobytes()] = blockwise.memory()
        states, memories = after, memories_after
    return states
