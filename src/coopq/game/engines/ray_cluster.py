"""The same game on a Ray cluster: workers hold the model and the bank, the driver owns proposals and the journal."""

import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coopq.core.errors import EstimationError, Mismatch
from coopq.core.specs import Request
from coopq.core.types import Assignment, Assignments, Player, Width
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine
from coopq.game.prepared import prepare
from coopq.game.session import Session
from coopq.model.load import fingerprint_weights
from coopq.model.matrices import round_untouched
from coopq.model.memory import free_memory
from coopq.quantizers.bank import WeightBank

_CHUNKS_PER_WORKER = 4
"""Chunks of one call for each worker: small, so that a worker that is slow or lost holds up little; large, so that the
assignments of a chunk share prefixes."""
_MIN_CHUNK = 8

Measurement = tuple[Assignment, npt.NDArray[np.float64], int]
"""An assignment, the loss on each sequence, and the block forwards that the loss took."""


@dataclass(frozen=True)
class RayConfig:
    """Where the workers are.

    Attributes:
        address: Address of a running cluster; "auto" for the one of this machine, "local" to start one here.
        workers: Number of workers; None takes one for each GPU, or for each CPU core of a cluster without GPUs.
    """

    address: str
    workers: int | None = None

    def connect(self, session: Session, weights: Mapping[str, Any]) -> "Cluster":
        """The workers of a session; see `Cluster`."""
        return Cluster(self, session, weights)


class Worker:
    """A model and its bank in a process of their own; Ray makes an actor of a worker.

    Args:
        request: What is measured.
        players: The driver's players.
        weights: What the bank's weights depend on, as the driver has it.
        bank: The driver's bank, for workers that see its disk; other workers quantize the model themselves.
        fitting: Tokens that weights are fitted to, shape (n_sequences, length); None for backends that fit none.
        player_widths: The widths of each player.
        n_threads: Threads that the worker computes with.
        n_sharing: Workers that share the memory of a device.
    """

    def __init__(
        self,
        request: Request,
        players: Sequence[Player],
        weights: Mapping[str, Any],
        bank: str,
        fitting: npt.NDArray[np.int64] | None,
        player_widths: Sequence[Sequence[Width]],
        n_threads: int,
        n_sharing: int = 1,
    ) -> None:
        torch.set_num_threads(n_threads)
        # The target's base file and the calibration text may lie on the driver's disk alone; a worker needs neither.
        prepared = prepare(request.replace(target=None, base=None, calibration="c4"))
        free = free_memory(request.model.device)
        room = prepared.footprint.room(None if free is None else free // n_sharing)
        loaded = prepared.load()
        if (found := fingerprint_weights(loaded.model)) != weights["weights"]:
            raise Mismatch(
                f"a worker found another model under {request.model.source!r}",
                {"weights": weights["weights"]},
                {"weights": found},
                "give workers the driver's files and versions",
            )
        round_untouched(loaded, players, request.widths.bits)
        shared = Path(bank)
        folder = shared if (shared / "bank.json").is_file() else Path(mkdtemp(prefix="coopq-bank-"))
        self.bank = WeightBank(folder, loaded, players, prepared.backend, weights, room=room)
        if folder != shared:
            self.bank.build(request.widths.bits, fitting, player_widths=player_widths)
        self._model = loaded.model
        self._engines: dict[tuple[str, str], PrefixEngine] = {}

    def evaluate(
        self, name: str, tokens: npt.NDArray[np.int64], assignments: Assignments, loss: str
    ) -> list[Measurement]:
        """Losses of assignments on the tokens called `name`."""
        if (name, loss) not in self._engines:
            self._engines[name, loss] = make_engine(self._model, self.bank, tokens, loss)
        return list(self._engines[name, loss].evaluate(assignments))

    def process(self) -> int:
        """The number of the worker's process."""
        return os.getpid()


class Cluster:
    """Workers of one session on Ray; a context manager that lets the workers go at its end.

    Args:
        where: Where the workers are.
        session: The driver's session.
        weights: What the bank's weights depend on.
    Raises:
        EstimationError: If Ray is not installed, or there is no such cluster.
    """

    def __init__(self, where: RayConfig, session: Session, weights: Mapping[str, Any]) -> None:
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
        # The reference is kept: a worker that starts anew asks for the tokens again.
        self._fitting = ray.put(None if session.fitting is None else session.fitting.tokens)
        n_hosts = sum(node["Alive"] for node in ray.nodes())
        n_sharing = 1 if per_gpu else -(-self.n_workers // n_hosts)
        bank = str(session.folder.bank)
        self.workers = [
            actor.remote(
                session.request,
                session.players,
                weights,
                bank,
                self._fitting,
                session.player_widths,
                n_threads,
                n_sharing,
            )
            for _ in range(self.n_workers)
        ]

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers go; a cluster that was there before stays."""
        for worker in self.workers:
            self._ray.kill(worker)
        self._ray.shutdown()

    def engine(self, name: str, tokens: npt.NDArray[np.int64], loss: str) -> "ClusterEngine":
        """What a game asks for losses on some tokens.

        Args:
            name: A name of the tokens that no other tokens have.
            tokens: Shape (n_sequences, length).
            loss: "nll" or "kl".
        """
        return ClusterEngine(self, name, self._ray.put(tokens), loss)

    def evaluate(self, name: str, tokens: Any, assignments: Assignments, loss: str) -> Iterator[Measurement]:
        """Losses of assignments, as they come.

        Chunks are neighbours in lexicographic order, which share most of their prefixes. A worker that has nothing left
        to do measures what other workers have not finished; the first answer counts.
        """
        unique = np.unique(assignments, axis=0)
        n_chunks = max(self.n_workers, min(self.n_workers * _CHUNKS_PER_WORKER, len(unique) // _MIN_CHUNK))
        chunks = np.array_split(unique, n_chunks)
        waiting = [chunk for chunk in chunks if len(chunk)]
        running: dict[Any, tuple[Any, Assignments]] = {}
        done: set[bytes] = set()
        idle = list(self.workers)
        while waiting or running:
            for worker in idle:
                chunk = waiting.pop(0) if waiting else _slowest(running, done)
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


class ClusterEngine:
    """What a game asks for losses, answered by a cluster; `Cluster.engine` makes one.

    Args:
        cluster: The workers.
        name: Name of the tokens.
        tokens: Ray's reference to the tokens.
        loss: "nll" or "kl".
    """

    def __init__(self, cluster: Cluster, name: str, tokens: Any, loss: str) -> None:
        self._cluster, self._name, self._tokens, self._loss = cluster, name, tokens, loss

    def evaluate(self, assignments: Assignments) -> Iterator[Measurement]:
        """Losses of distinct assignments, in any order."""
        return self._cluster.evaluate(self._name, self._tokens, assignments, self._loss)


def _slowest(running: Mapping[Any, tuple[Any, Assignments]], done: set[bytes]) -> Assignments | None:
    """The chunk that began first among those that only one worker has; None if there is none."""
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
