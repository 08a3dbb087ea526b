"""Where the blocks of ggml's types keep the code of each weight, and what each code stands for."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.quantizers.ggml.library import from_blocks, to_blocks

_LEAST_BITS, _MOST_BITS = 2, 6
"""Bits of codes that have a layout. Codes of 1 bit are the signs of I-quants, whose other bits several
weights share; codes of more than 6 bits leave no error to compensate."""


class CodeLayout(NamedTuple):
    """Where the blocks of a type keep the codes, if each weight has a code of its own.

    Attributes:
        places: Bits of a block that belong to each weight, the lowest bit of the code first; bits of a byte count from
            the lowest. Shape (bits of a code, weights).
        run: Weights side by side that have the same scale, so that the same code is the same level.
        probes: The bytes of blocks in which the weights of each run count through the codes, and all other bits are
            zero, uint8, shape (probes, bytes). Together the probes have every code in every run.
        mask: The bytes of a block in which the bits of codes alone are set, uint8, shape (bytes,).
    """

    places: npt.NDArray[np.intp]
    run: int
    probes: Tensor
    mask: Tensor

    @property
    def n_codes(self) -> int:
        """Codes that a weight can have."""
        return int(2 ** len(self.places))

    def with_codes(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """The blocks with other codes, uint8, shape (rows, columns)."""
        by_block = codes.numpy().reshape(-1, self.places.shape[1])
        return self._replace_codes(blocks, _code_bytes(by_block, self.places, len(self.mask)))

    def levels(self, kind: Any, blocks: Tensor) -> Tensor:
        """What each code stands for in each run of the blocks' rows, float32, shape (runs of a row, rows, codes).

        Levels rise with the code, or fall where the scale is negative.
        """
        probed = [from_blocks(kind, self._replace_codes(blocks, probe)) for probe in self.probes]
        by_code = torch.cat([levels.reshape(len(blocks), -1, self.run) for levels in probed], dim=2)
        return by_code[:, :, : self.n_codes].transpose(0, 1).contiguous()

    def _replace_codes(self, blocks: Tensor, code_bytes: Tensor) -> Tensor:
        """The blocks with other bits of codes."""
        by_block = blocks.reshape(-1, len(self.mask))
        return (by_block & ~self.mask | code_bytes).reshape(blocks.shape)


def _code_bytes(codes: npt.NDArray[Any], places: npt.NDArray[np.intp], size: int) -> Tensor:
    """Blocks of `size` bytes that hold codes, shape (blocks, weights), and zeros elsewhere."""
    bits = np.zeros((len(codes), 8 * size), dtype=np.uint8)
    for bit, place in enumerate(places):
        bits[:, place] = codes >> bit & 1
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


@cache
def code_layout(kind: Any) -> CodeLayout | None:
    """The layout of a type, found by flipping each bit of blocks and looking which weights change.

    Returns:
        None if weights have no codes of their own, or codes that are too short or too long (see `_LEAST_BITS`).
    """
    from gguf import GGML_QUANT_SIZES

    n_weights, size = GGML_QUANT_SIZES[kind]
    # Several blocks are tried: a bit of a scale changes a single weight if all other weights have the code of zero.
    random_blocks = to_blocks(
        kind, torch.randn(8, n_weights, generator=torch.Generator().manual_seed(0)), torch.ones(n_weights)
    )
    found, effect = [], np.zeros(8 * size)
    for block in random_blocks.numpy():
        flipped = np.unpackbits(block, bitorder="little") ^ np.eye(8 * size, dtype=np.uint8)
        flipped_blocks = torch.from_numpy(np.packbits(flipped, axis=1, bitorder="little"))
        change = (from_blocks(kind, flipped_blocks) - from_blocks(kind, torch.from_numpy(block[None]))).abs().numpy()
        moved = change != 0
        effect += change.sum(axis=1)
        found.append(np.where(moved.sum(axis=1) == 1, moved.argmax(axis=1), -1))
    weight_of_bit = np.where(np.equal(found, found[0]).all(axis=0), found[0], -1)
    (n_bits, *different) = set(np.bincount(weight_of_bit[weight_of_bit >= 0], minlength=n_weights))
    if different or not _LEAST_BITS <= n_bits <= _MOST_BITS:
        return None
    by_effect = np.argsort(effect, kind="stable")
    places = np.stack([by_effect[weight_of_bit[by_effect] == weight] for weight in range(n_weights)], axis=1)
    mask = _code_bytes(np.full((1, n_weights), 2**n_bits - 1), places, size)[0]
    same_codes = _code_bytes(np.repeat(np.arange(2**n_bits)[:, None], n_weights, axis=1), places, size)
    levels = from_blocks(kind, (random_blocks & ~mask | same_codes[:, None]).reshape(-1, size))
    lengths = (n_weights >> halvings for halvings in range(n_weights.bit_length()))
    run = next(n for n in lengths if torch.equal(levels, levels[:, ::n].repeat_interleave(n, dim=1)))
    counting = np.arange(n_weights) % run + run * np.arange(-(-(2**n_bits) // run))[:, None]
    return CodeLayout(places, run, _code_bytes(counting % 2**n_bits, places, size), mask)
