"""Activations and gradients of the full-precision model, streamed block by block: no second copy of the model."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.bank import WeightBank
from coopq.engine import PrefixEngine
from coopq.types import Player


class Probe:
    """What one-layer scores look at.

    Args:
        engine: The model on its calibration tokens.
        bank: Its players' weights.
        low: The lower of the two widths.
        high: The higher one.

    Attributes:
        layer_forwards: Forwards of one block over all tokens that were asked for; a backward counts as two.
    """

    def __init__(self, engine: PrefixEngine, bank: WeightBank, low: int, high: int) -> None:
        self._engine = engine
        self._bank = bank
        self.low = low
        self.high = high
        self.layer_forwards = 0

    @property
    def players(self) -> Sequence[Player]:
        """The players, in order."""
        return self._bank.players

    @property
    def blocks(self) -> list[int]:
        """The block of each player: what turns scores of blocks into scores of players, shape (n_players,)."""
        return [player.block for player in self.players]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Share of its block's weights that each player has, shape (n_players,); 1 where players are blocks."""
        n_weights = np.array([player.n_weights for player in self.players], dtype=np.float64)
        return n_weights / np.bincount(self.blocks, n_weights)[self.blocks]

    @property
    def scored_tokens(self) -> int:
        """Tokens of a sequence that are predicted: all but the first."""
        return int(self._engine.batches[0].shape[1]) - 1

    def weights(self, player: int) -> dict[str, Tensor]:
        """Original weights of a player's linear layers by name, each of shape (out, in)."""
        return self._bank.originals(player)

    def quantized(self, player: int, bits: int) -> dict[str, Tensor]:
        """The same, quantized and dequantised."""
        return self._bank.quantized(player, bits)

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states before and after each block, shape (n_sequences, length, width) both; two at a time."""
        self._engine.record()
        states = self._engine.embedded
        for block in range(len(self._engine.members)):
            outputs = self._engine.forward_block(block, states)
            self.layer_forwards += 1
            yield torch.cat(states), torch.cat(outputs)
            states = outputs

    def gradients(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Gradients of the mean loss by each player's weights, from the last player to the first.

        Yields:
            The player, and d loss / d weight by name of the linear layer, shape (out, in). A block's forward is
            repeated with a graph when its turn comes, once for all its players, so that only hidden states and one
            block's gradients are held.
        """
        engine = self._engine
        engine.record()
        states = [engine.embedded]
        for block in range(len(engine.members)):
            states.append(engine.forward_block(block, states[-1]))
        upstream = [self._head_gradient(j, final) for j, final in enumerate(states.pop())]
        self.layer_forwards += len(engine.members)
        for block, members in reversed(list(enumerate(engine.members))):
            self.layer_forwards += 3
            with engine.placed(block):
                weights = {name: weight for player in members for name, weight in self._bank.parameters(player).items()}
                totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
                for j, leaf in enumerate(states.pop()):
                    with torch.enable_grad():
                        leaf = leaf.detach().requires_grad_()
                        output = engine.call_block(block, j, leaf)
                    upstream[j], *gradients = torch.autograd.grad(output, [leaf, *weights.values()], upstream[j])
                    for total, gradient in zip(totals.values(), gradients, strict=True):
                        total += gradient
            for player in reversed(members):
                yield player, {linear.name: totals[linear.name] for linear in self.players[player].linears}

    def sequence_changes(self) -> npt.NDArray[np.float64]:
        """What quantizing each player does to the loss of each sequence, to first order.

        <g_s, Q_b(W) - W>, where g_s is the gradient of the mean loss of sequence s. No gradient by a weight is formed:
        with the inputs x and the gradients y of a layer's outputs it is the sum over tokens of y (Q_b(W) - W) x.

        Returns:
            Shape (2, n_players, n_sequences), nats per token; at the low width, then at the high one.
        """
        engine = self._engine
        engine.record()
        states = [engine.embedded]
        for block in range(len(engine.members)):
            states.append(engine.forward_block(block, states[-1]))
        # The mean over all sequences, times their number, is the sum of their means.
        n_sequences = sum(len(batch) for batch in engine.batches)
        upstream = [self._head_gradient(j, final) * n_sequences for j, final in enumerate(states.pop())]
        self.layer_forwards += len(engine.members)
        changes = np.zeros((2, len(self.players), n_sequences))
        starts = np.cumsum([0, *(len(batch) for batch in engine.batches)])
        for block, members in reversed(list(enumerate(engine.members))):
            self.layer_forwards += 5  # forward, gradient of the states, and two products for each weight
            with engine.placed(block):
                for j, leaf in enumerate(states.pop()):
                    leaf = leaf.detach().requires_grad_()
                    with torch.enable_grad(), self._bank.watching(members) as seen:
                        output = engine.call_block(block, j, leaf)
                    outputs = [of_layer for _, of_layer in seen.values()]
                    upstream[j], *gradients = torch.autograd.grad(output, [leaf, *outputs], upstream[j])
                    of_output = dict(zip(seen, gradients, strict=True))
                    for player, (row, bits) in product(members, enumerate((self.low, self.high))):
                        for name, weight in self.weights(player).items():
                            delta = (self.quantized(player, bits)[name] - weight).to(seen[name][0].device)
                            moved = functional.linear(seen[name][0], delta)
                            change = (moved * of_output[name]).flatten(1).double().sum(dim=1)
                            changes[row, player, starts[j] : starts[j + 1]] += change.cpu().numpy()
        return changes

    def _head_gradient(self, j: int, final: Tensor) -> Tensor:
        """Gradient of the mean loss by the states after the last block, for one batch of tokens.

        The head gets a portion of the positions at a time, as sequences of one token.
        """
        tokens = self._engine.batches[j]
        n_scored = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in self._engine.batches)
        portion = self._engine.positions_at_once()
        scored, targets = final[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        parts = []
        for some, target in zip(scored.split(portion), targets.split(portion), strict=True):
            with torch.enable_grad():
                leaf = some.detach().unsqueeze(1).requires_grad_()
                logits = self._engine.head(leaf).float()[:, 0]
                loss = functional.cross_entropy(logits, target.to(logits.device), reduction="sum")
            parts.append(torch.autograd.grad(loss / n_scored, leaf)[0][:, 0])
        gradient = torch.zeros_like(final)
        gradient[:, :-1] = torch.cat(parts).unflatten(0, (len(final), -1))
        return gradient
