"""Activations and gradients of the full-precision model, streamed block by block without a second copy of the model.

`traces` is the exception: it moves all weights of the players at the same time, which takes a second copy of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.core.errors import EstimationError
from coopq.core.types import UNTOUCHED, Player, Width, next_width
from coopq.core.weight_cache import Weights
from coopq.game.engines.assigned_model import players_of_blocks
from coopq.game.streamed_gradients import divergence, head_gradients, output_gradients, watching, weight_gradients
from coopq.model.blockwise import Blockwise, States
from coopq.model.matrices import in_float64
from coopq.quantizers.bank import WeightBank

_STEP = 3e-3
"""Step of central differences, as a share of the root mean square of the weights. With this step the traces of tiny
models are within 2 % of those by exact second derivatives (tests/test_sensitivity.py)."""

Term: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What is summed over a linear layer's outputs, from how far quantization moves the outputs and the gradient of each
sequence's mean loss by the outputs, all of one shape: (n_sequences, length, out) or (n_sequences * length, out)."""


class Sensitivity:
    """What one-layer scores are computed from: states, gradients and errors of the full-precision model.

    Args:
        blockwise: The model on its calibration tokens.
        bank: The weights of the model's players at each width.
        low: The lower of two widths.
        high: The higher of two widths.
        player_widths: Widths of each player. A player without `low` or `high` has its next wider width, or its widest.
            None if all players have both.

    Attributes:
        blockwise: As given.
        bank: As given.
        members: The players of each block.
        block_forwards: Forwards of one block over all tokens that were asked for, cached results included. A backward
            counts as two.
        on_work: Called whenever `block_forwards` grows.
    """

    def __init__(
        self,
        blockwise: Blockwise,
        bank: WeightBank,
        low: Width,
        high: Width,
        player_widths: Sequence[Sequence[Width]] | None = None,
    ) -> None:
        self.blockwise = blockwise
        self.bank = bank
        self.members = players_of_blocks(bank.players)
        self._player_widths = player_widths
        self._first_order: tuple[int, dict[Width, list[list[float]]]] | None = None
        self.low = low
        self.high = high
        self._block_forwards = 0
        self.on_work: Callable[[], None] = lambda: None

    @property
    def block_forwards(self) -> int:
        """Forwards of one block so far; `on_work` is called when the number grows."""
        return self._block_forwards

    @block_forwards.setter
    def block_forwards(self, n: int) -> None:
        self._block_forwards = n
        self.on_work()

    @property
    def players(self) -> Sequence[Player]:
        """The players, in order."""
        return self.bank.players

    @property
    def blocks(self) -> list[int]:
        """Block of each player, shape (n_players,): an index that turns scores of blocks into scores of players."""
        return [player.block for player in self.players]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Share of its block's weights that each player has, shape (n_players,); 1 if players are blocks."""
        n_weights = np.array([player.n_weights for player in self.players], dtype=np.float64)
        return n_weights / np.bincount(self.blocks, n_weights)[self.blocks]

    @property
    def scored_tokens(self) -> int:
        """Predicted tokens of a sequence: all but the first."""
        return int(self.blockwise.batches[0].shape[1]) - 1

    def weights(self, player: int) -> Weights:
        """Original weights of a player's linear layers by name, each of shape (out, in)."""
        return self.bank.weights(player, UNTOUCHED)

    def quantized(self, player: int, bits: Width) -> Weights:
        """Weights of a player's linear layers by name, quantized and dequantized, each of shape (out, in)."""
        return self.bank.weights(player, self.width_of(player, bits))

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states before and after each block, both of shape (n_sequences, length, width); two are held."""
        self.blockwise.record()
        before = self.blockwise.embedded
        for block in range(self.blockwise.n_blocks):
            after = self.blockwise.forward_block(block, before)
            self.block_forwards += 1
            yield torch.cat(before), torch.cat(after)
            before = after

    def gradients(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Gradients of the mean loss by each player's weights, from the last player to the first.

        A block's forward is repeated with a graph, once for all its players, when its turn comes. So only hidden states
        and one block's gradients are held.

        Yields:
            The player, and d loss / d weight by name of the linear layer, shape (out, in).
        """
        states = self.all_states()
        upstream = head_gradients(self.blockwise, states.pop())
        for block, members in reversed(list(enumerate(self.members))):
            self.block_forwards += 3
            parameters = [self.bank.parameters(player) for player in members]
            weights = {name: weight for by_name in parameters for name, weight in by_name.items()}
            found = weight_gradients(self.blockwise, block, states.pop(), upstream, weights)
            for player in reversed(members):
                yield player, {linear.name: found[linear.name] for linear in self.players[player].linears}

    def first_order_changes(self) -> dict[Width, list[list[float]]]:
        """<dL/dW, W - Q_b(W)> by width, player and linear layer, nats per token; computed once."""
        before = self.block_forwards
        if self._first_order is None:
            changes: dict[Width, list[list[float]]] = {b: [[] for _ in self.players] for b in (self.low, self.high)}
            for player, gradients in self.gradients():
                weights = self.weights(player)
                for bits, changes_by_player in changes.items():
                    quantized = self.quantized(player, bits)
                    changes_by_player[player] = [
                        _inner_product(gradient, weights[name] - quantized[name])
                        for name, gradient in gradients.items()
                    ]
            self._first_order = self.block_forwards - before, changes
        spent, changes = self._first_order
        self.block_forwards = before + spent
        return changes

    def sequence_changes(self) -> npt.NDArray[np.float64]:
        """First-order change of each sequence's loss by quantizing each player alone.

        <g_s, Q_b(W) - W>, where g_s is the gradient of the mean loss of sequence s. No gradient by a weight is formed:
        with a layer's inputs x and the gradients y by its outputs, the change is the sum over tokens of
        y (Q_b(W) - W) x.

        Returns:
            Shape (2, n_players, n_sequences), nats per token; at the low width, then at the high one.
        """
        return self._sums_over_outputs(lambda moved, gradient: moved * gradient)

    def traces(self, n_samples: int, seed: int) -> dict[str, float]:
        """Traces of the Hessian of the mean loss by each linear layer's weights, by name: Hutchinson's estimates.

        E[v'Hv] over random signs v. Hv is a central difference of gradients, for all layers at once: the signs of
        different layers are independent, so layers add nothing to each other's estimate on average.

        Args:
            n_samples: Draws of the signs.
            seed: Seed of the draws.
        Raises:
            EstimationError: If the model computes in bfloat16, whose 8 bits of mantissa swallow most of the steps.
        """
        if self.bank.model.dtype == torch.bfloat16:
            raise EstimationError("hawq needs --dtype float32 or float16: its steps are lost in bfloat16")
        owners = {linear.name: index for index, player in enumerate(self.players) for linear in player.linears}
        originals = {name: self.weights(player)[name] for name, player in owners.items()}
        squares = [weight.float().square().mean().cpu() for weight in originals.values()]
        step = _STEP * float(torch.stack(squares).mean().sqrt())
        traces = dict.fromkeys(originals, 0.0)
        try:
            for sample, direction in product(range(n_samples), (1, -1)):
                signs = _random_signs(originals, seed * n_samples + sample)
                for name, player in owners.items():
                    moved = torch.add(originals[name], signs[name], alpha=direction * step)
                    self.bank.parameters(player)[name].data = moved
                for _, gradients in self.gradients():
                    for name, gradient in gradients.items():
                        along = _inner_product(gradient, signs[name])
                        traces[name] += direction * along / (2 * step * n_samples)
        finally:
            self.bank.restore()
        return traces

    @torch.no_grad()
    def divergences(self) -> npt.NDArray[np.float64]:
        """KL divergence of the next token from full precision if one player alone is quantized.

        Returns:
            Shape (2, n_players), nats per token; at the low width, then at the high one.
        """
        states = self.all_states()
        found = np.zeros((2, len(self.players)))
        try:
            for player, (row, bits) in product(range(len(self.players)), enumerate((self.low, self.high))):
                block = self.players[player].block
                self.bank.set_player(player, self.width_of(player, bits))
                moved = states[block]
                for after in range(block, self.blockwise.n_blocks):
                    moved = self.blockwise.forward_block(after, moved)
                    self.block_forwards += 1
                self.bank.set_player(player, UNTOUCHED)
                found[row, player] = divergence(self.blockwise, states[-1], moved).mean()
        finally:
            self.bank.restore()
        return found

    def width_of(self, player: int, bits: Width) -> Width:
        """A player's width where `bits` are asked for: the next wider one, or the widest, for a player without."""
        return bits if self._player_widths is None else next_width(self._player_widths[player], bits)

    def all_states(self) -> list[States]:
        """States before the first block and after each block."""
        self.blockwise.record()
        states = [self.blockwise.embedded]
        for block in range(self.blockwise.n_blocks):
            states.append(self.blockwise.forward_block(block, states[-1]))
        self.block_forwards += self.blockwise.n_blocks
        return states

    def _sums_over_outputs(self, term: Term) -> npt.NDArray[np.float64]:
        """Sums over the outputs of linear layers, shape (2, n_players, n_sequences); see `sequence_changes`."""
        sizes = [len(batch) for batch in self.blockwise.batches]
        starts, n_sequences = np.cumsum([0, *sizes]), sum(sizes)
        states = self.all_states()
        # Each sequence's own mean loss: the mean over all sequences, times their number, is the sum of these.
        upstream = [gradient * n_sequences for gradient in head_gradients(self.blockwise, states.pop())]
        sums = np.zeros((2, len(self.players), n_sequences))
        for block in reversed(range(self.blockwise.n_blocks)):
            self.block_forwards += 5  # a forward, the gradient by the states, and two products for each weight
            with self.blockwise.placed(block):
                members = self.members[block]
                for j, batch in enumerate(states.pop()):
                    leaf = batch.detach().requires_grad_()
                    with torch.enable_grad(), watching(self.bank, members) as seen:
                        output = self.blockwise.call_block(block, j, leaf)
                    upstream[j], gradients = output_gradients(output, leaf, upstream[j], seen)
                    for player, (row, bits) in product(members, enumerate((self.low, self.high))):
                        sums[row, player, starts[j] : starts[j + 1]] += self._sum_terms(
                            term, player, bits, gradients, sizes[j]
                        )
        return sums

    def _sum_terms(
        self, term: Term, player: int, bits: Width, gradients: Mapping[str, tuple[Tensor, Tensor]], n_sequences: int
    ) -> npt.NDArray[np.float64]:
        """Terms of a player at a width, summed over its layers' outputs and tokens, shape (n_sequences,).

        Args:
            term: What is summed.
            player: The player.
            bits: The width.
            gradients: Inputs and gradients by the outputs of the block's linear layers, by name.
            n_sequences: Sequences of the batch. OPT's blocks join the sequences before some linear layers.
        """
        quantized = self.quantized(player, bits)
        total: npt.NDArray[np.float64] = np.zeros(())
        for name, weight in self.weights(player).items():
            inputs, gradient = gradients[name]
            error = self.bank.matrices[name].rows(quantized[name] - weight)
            moved = functional.linear(inputs, error.to(inputs.device))
            total = total + in_float64(term(moved, gradient)).reshape(n_sequences, -1).sum(dim=1).cpu().numpy()
        return total


def _inner_product(gradient: Tensor, change: Tensor) -> float:
    """<gradient, change> in float64, on the gradient's device if that has float64."""
    wide = in_float64(gradient)
    return float((wide * change.to(wide.device)).sum())


def _random_signs(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random sign for each weight, the same for the same seed, on the weights' devices."""
    draws = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(2, weight.shape, generator=draws, dtype=torch.int8) * 2 - 1).to(weight.device)
        for name, weight in weights.items()
    }
