"""The same game on a Ray cluster: workers hold the model and the bank, the driver owns proposals and journal."""

import importlib.util
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coopq.quantize import get_backend
from coopq.quantize.bank import WeightBank, round_untouched
from coopq.game.prefix_engine import PrefixEngine
from coopq.core.errors import EstimationError, Mismatch
from coopq.model.load import fingerprint_weights, load_model
from coopq.model.players import find_players
from coopq.core.config import RunConfig
from coopq.core.types import Assignment, Assignments, Width

_CHUNKS_PER_WORKER = 4
"""Chunks of one call for each worker: small, so that one that is slow or lost holds up little; large, so that the
assignments of a chunk share prefixes."""
_LEAST_IN_CHUNK = 8

Measurement = tuple[Assignment, npt.NDArray[np.float64], int]
"""An assignment, its loss on each sequence, and the layer forwards that it took."""


@dataclass(frozen=True)
class RayConfig:
    """Where the workers are.

    Attributes:
        address: Of a running cluster; "auto" for the one that this machine belongs to, "local" to start one here.
        workers: Their number; None takes one for each GPU, or for each CPU core of a cluster without GPUs.
    """

    address: str
    workers: int | None = None


class Worker:
    """A model and its bank in a process of their own; Ray makes an actor of it.

    Args:
        config: What is measured.
        weights: What the bank's weights depend on, as the driver has it.
        bank: The driver's bank, for workers that see its disk; others quantize the model themselves.
        tokens: Calibration tokens for backends that take them, shape (n_sequences, length).
        levels: The widths that each player has.
        n_threads: That it computes with.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: dict[str, Any],
        bank: str,
        tokens: npt.NDArray[np.int64],
        levels: Sequence[Sequence[Width]],
        n_threads: int,
    ) -> None:
        torch.set_num_threads(n_threads)
        loaded = load_model(config.model, dtype=config.dtype, device=config.device)
        if (found := fingerprint_weights(loaded.model)) != weights["weights"]:
            ours, theirs = {"weights": weights["weights"]}, {"weights": found}
            way_out = "give workers the driver's files and versions"
            raise Mismatch(f"a worker found another model under {config.model!r}", ours, theirs, way_out)
        players = find_players(loaded.model, config.granularity, config.embeddings)
        backend = get_backend(**config.quantizer, bits=config.widths)
        round_untouched(loaded, players, config.widths)
        shared = Path(bank)
        folder = shared if (shared / "bank.json").is_file() else Path(mkdtemp(prefix="coopq-bank-"))
        self._bank = WeightBank(folder, loaded, players, backend, weights)
        if folder != shared:
            self._bank.build(config.widths, tokens, levels=levels)
        self._model = loaded.model
        self._engines: dict[tuple[str, str], PrefixEngine] = {}

    def evaluate(
        self, name: str, tokens: npt.NDArray[np.int64], assignments: Assignments, loss: str
    ) -> list[Measurement]:
        """Losses of assignments on the tokens called `name`."""
        if (name, loss) not in self._engines:
            self._engines[name, loss] = PrefixEngine(self._model, self._bank, tokens, loss)
        return list(self._engines[name, loss].evaluate(assignments))

    def process(self) -> int:
        """The number of its process."""
        return os.getpid()


class Cluster:
    """Workers of one run on Ray.

    Args:
        where: Where they are.
        config: What is measured.
        weights: What the bank's weights depend on.
        bank: The bank's folder.
        tokens: Calibration tokens for backends that take them.
        levels: The widths that each player has.
    Raises:
        EstimationError: If Ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        where: RayConfig,
        config: RunConfig,
        weights: dict[str, Any],
        bank: Path,
        tokens: npt.NDArray[np.int64],
        levels: Sequence[Sequence[Width]],
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise EstimationError("a cluster needs Ray; run: pip install 'coopq[ray]'")
        import ray

        self._ray = ray
        try:
            _knock(where.address)
            ray.init(
                address=where.address,
                namespace="coopq",
                log_to_driver=False,
                include_dashboard=False if where.address == "local" else None,
            )
        except OSError as error:
            raise EstimationError(
                f"no Ray cluster at {where.address!r} ({error}); start one with `ray start --head`, "
                "or take --ray-address local"
            ) from error
        resources = ray.cluster_resources()
        n_gpus, n_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.n_workers = where.workers or n_gpus or n_cpus
        per_gpu = 1 if n_gpus >= self.n_workers else 0
        n_threads = max(1, n_cpus // self.n_workers)
        # Ray starts a worker that died anew and gives it its unfinished chunk again.
        actor = ray.remote(num_cpus=n_threads, num_gpus=per_gpu, max_restarts=-1, max_task_retries=-1)(Worker)
        self._tokens = ray.put(tokens)  # kept: a worker that starts anew asks for them again
        self.workers = [
            actor.remote(config, weights, str(bank), self._tokens, levels, n_threads) for _ in range(self.n_workers)
        ]

    def close(self) -> None:
        """Let the workers go; a cluster that was there before stays."""
        for worker in self.workers:
            self._ray.kill(worker)
        self._ray.shutdown()

    def evaluate(self, name: str, tokens: Any, assignments: Assignments, loss: str) -> Iterator[Measurement]:
        """Losses of assignments, as they come.

        Chunks are neighbours in lexicographic order, which share most of their prefixes. A worker that has nothing left
        to do measures what others have not finished; the first answer counts.
        """
        unique = np.unique(assignments, axis=0)
        n_chunks = max(self.n_workers, min(self.n_workers * _CHUNKS_PER_WORKER, len(unique) // _LEAST_IN_CHUNK))
        chunks = np.array_split(unique, n_chunks)
        waiting = [chunk for chunk in chunks if len(chunk)]
        running: dict[Any, tuple[Any, Assignments]] = {}
        done: set[bytes] = set()
        idle = list(self.workers)
        while waiting or running:
            for worker in idle:
                chunk = waiting.pop(0) if waiting else self._slowest(running, done)
                if chunk is not None:
                    running[worker.evaluate.remote(name, tokens, chunk, loss)] = worker, chunk
            idle = []
            ready, _ = self._ray.wait(list(running), num_returns=1)
            for answer in ready:
                worker, chunk = running.pop(answer)
                idle.append(worker)
                if chunk.tobytes() not in done:
                    done.add(chunk.tobytes())
                    yield from self._ray.get(answer)
            if not waiting and all(chunk.tobytes() in done for _, chunk in running.values()):
                break  # only copies are left

    @staticmethod
    def _slowest(running: dict[Any, tuple[Any, Assignments]], done: set[bytes]) -> Assignments | None:
        """The chunk that began first of those that only one worker has; None if there is none."""
        keys = [chunk.tobytes() for _, chunk in running.values()]
        for _, chunk in running.values():
            if chunk.tobytes() not in done and keys.count(chunk.tobytes()) == 1:
                return chunk
        return None


def _knock(address: str) -> None:
    """Fail within seconds where nobody answers; Ray would try for minutes.

    Raises:
        OSError: If nobody answers at HOST:PORT.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class ClusterEngine:
    """What a game asks for losses, answered by a cluster.

    Args:
        cluster: The workers.
        name: Of the tokens.
        tokens: Shape (n_sequences, length).
        loss: As for `PrefixEngine`.
    """

    def __init__(self, cluster: Cluster, name: str, tokens: npt.NDArray[np.int64], loss: str) -> None:
        self._cluster = cluster
        self._name = name
        self._loss = loss
        self._tokens = cluster._ray.put(tokens)

    def evaluate(self, assignments: Assignments) -> Iterator[Measurement]:
        """Losses of distinct assignments, in any order."""
        return self._cluster.evaluate(self._name, self._tokens, assignments, self._loss)
