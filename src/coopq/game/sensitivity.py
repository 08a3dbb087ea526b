"""Activations and gradients of the full-precision model, streamed block by block: no second copy of the model."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.quantize.bank import WeightBank
from coopq.game.prefix_engine import PrefixEngine
from coopq.core.types import UNTOUCHED, Player, Width

_STEP = 3e-3
"""Of central differences, as a share of the root mean square of the weights."""


class Probe:
    """What one-layer scores look at.

    Args:
        engine: The model on its calibration tokens.
        bank: Its players' weights.
        low: The lower of the two widths.
        high: The higher one.
        levels: The widths that each player has; at another one it is what it is at the next wider. None where all have
            both.

    Attributes:
        layer_forwards: Forwards of one block over all tokens that were asked for, though what is known is not computed
            again; a backward counts as two.
    """

    def __init__(
        self,
        engine: PrefixEngine,
        bank: WeightBank,
        low: Width,
        high: Width,
        levels: Sequence[Sequence[Width]] | None = None,
    ) -> None:
        self._engine = engine
        self._bank = bank
        self._levels = levels
        self._first_order: tuple[int, dict[Width, list[list[float]]]] | None = None
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
        return self._bank.weights(player, UNTOUCHED)

    def quantized(self, player: int, bits: Width) -> dict[str, Tensor]:
        """The same, quantized and dequantised."""
        return self._bank.weights(player, self._level(player, bits))

    def _level(self, player: int, bits: Width) -> Width:
        return bits if self._levels is None else min(level for level in self._levels[player] if level >= bits)

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

    def first_order_changes(self) -> dict[Width, list[list[float]]]:
        """<dL/dW, W - Q_b(W)> by width, player and linear layer, nats per token."""
        before = self.layer_forwards
        if self._first_order is None:
            changes: dict[Width, list[list[float]]] = {
                bits: [[] for _ in self.players] for bits in (self.low, self.high)
            }
            for player, gradients in self.gradients():
                weights = self.weights(player)
                for bits, of_players in changes.items():
                    quantized = self.quantized(player, bits)
                    of_players[player] = [
                        float(
                            (gradient.double() * (weights[name] - quantized[name]).to(gradient.device).double()).sum()
                        )
                        for name, gradient in gradients.items()
                    ]
            self._first_order = self.layer_forwards - before, changes
        spent, changes = self._first_order
        self.layer_forwards = before + spent
        return changes

    def sequence_changes(self) -> npt.NDArray[np.float64]:
        """What quantizing each player does to the loss of each sequence, to first order.

        <g_s, Q_b(W) - W>, where g_s is the gradient of the mean loss of sequence s. No gradient by a weight is formed:
        with the inputs x and the gradients y of a layer's outputs it is the sum over tokens of y (Q_b(W) - W) x.

        Returns:
            Shape (2, n_players, n_sequences), nats per token; at the low width, then at the high one.
        """
        return self._of_outputs(lambda moved, gradient: moved * gradient)

    def output_errors(self) -> npt.NDArray[np.float64]:
        """How far quantizing each player moves the outputs of its linear layers, weighted by squared gradients.

        Sum over tokens and outputs of (y (Q_b(W) - W) x)^2, where y is the gradient of the mean loss of the sequence by
        the output.

        Returns:
            Shape (2, n_players, n_sequences); at the low width, then at the high one.
        """
        return self._of_outputs(lambda moved, gradient: (moved * gradient).square())

    def _of_outputs(self, term: Callable[[Tensor, Tensor], Tensor]) -> npt.NDArray[np.float64]:
        """Sums over the outputs of linear layers, at both widths, by player and sequence; see `sequence_changes`.

        Args:
            term: From how an output moves and the gradient of its sequence's mean loss by it, both of shape
                (n_sequences, length, out), what is summed.
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
        sums = np.zeros((2, len(self.players), n_sequences))
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
                            total = term(moved, of_output[name]).flatten(1).double().sum(dim=1)
                            sums[row, player, starts[j] : starts[j + 1]] += total.cpu().numpy()
        return sums

    def traces(self, n_samples: int, seed: int) -> dict[str, float]:
        """Traces of the Hessian of the mean loss by the weights of each linear layer, by name, as Hutchinson estimates.

        E[v'Hv] over random signs v. Hv is a central difference of gradients, of all layers at once: between layers the
        signs are independent, so that what one layer adds to another's estimate is zero on average.

        Args:
            n_samples: Draws of the signs.
            seed: Where they come from.
        """
        names = [
            (player, linear.name) for player in range(len(self.players)) for linear in self.players[player].linears
        ]
        originals = {name: self.weights(player)[name] for player, name in names}
        squares = [weight.float().square().mean().cpu() for weight in originals.values()]
        step = _STEP * float(torch.stack(squares).mean().sqrt())
        traces = dict.fromkeys(originals, 0.0)
        try:
            for sample, sign in product(range(n_samples), (1, -1)):
                draws = torch.Generator().manual_seed(seed * n_samples + sample)
                signs = {
                    name: (torch.randint(2, weight.shape, generator=draws, dtype=torch.int8) * 2 - 1).to(weight.device)
                    for name, weight in originals.items()
                }
                for player, name in names:
                    moved = torch.add(originals[name], signs[name], alpha=sign * step)
                    self._bank.parameters(player)[name].data = moved
                for _, gradients in self.gradients():
                    for name, gradient in gradients.items():
                        along = float((gradient.double() * signs[name].to(gradient.device)).sum())
                        traces[name] += sign * along / (2 * step * n_samples)
        finally:
            self._bank.restore()
        return traces

    @torch.no_grad()
    def divergences(self) -> npt.NDArray[np.float64]:
        """KL divergence of the next token from that of full precision, when one player alone is quantized.

        Returns:
            Shape (2, n_players), nats per token; at the low width, then at the high one.
        """
        engine = self._engine
        engine.record()
        states = [engine.embedded]
        for block in range(len(engine.members)):
            states.append(engine.forward_block(block, states[-1]))
        self.layer_forwards += len(engine.members)
        found = np.zeros((2, len(self.players)))
        try:
            for block, members in enumerate(engine.members):
                for player, (row, bits) in product(members, enumerate((self.low, self.high))):
                    self._bank.set_player(player, self._level(player, bits))
                    moved = states[block]
                    for after in range(block, len(engine.members)):
                        moved = engine.forward_block(after, moved)
                        self.layer_forwards += 1
                    self._bank.set_player(player, UNTOUCHED)
                    pairs = zip(states[-1], moved, strict=True)
                    found[row, player] = np.concatenate([self._divergence(of, other) for of, other in pairs]).mean()
        finally:
            self._bank.restore()
        return found

    def _divergence(self, states: Tensor, other: Tensor) -> npt.NDArray[np.float64]:
        """KL divergence at each scored position of a batch, from two forms of the states after the last block."""
        portion = self._engine.positions_at_once()
        found = []
        for pair in zip(*(of[:, :-1].flatten(0, 1).split(portion) for of in (states, other)), strict=True):
            logs = [functional.log_softmax(self._engine.head(some.unsqueeze(1)).float()[:, 0], dim=1) for some in pair]
            found.append(functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).double().sum(dim=1))
        return torch.cat(found).cpu().numpy()

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
