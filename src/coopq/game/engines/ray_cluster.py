"""The same game on a Ray cluster: workers hold the model and the bank, the driver owns proposals and the journal."""

import importlib.util
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coopq.core.errors import CoopQError, EstimationError, one_line
from coopq.core.types import Assignments
from coopq.game.engines.ray_worker import Measurement, Worker
from coopq.game.session import Session

_CHUNKS_PER_WORKER = 4
"""Chunks of one call for each worker: small, so that a worker that is slow or lost holds up little; large, so that the
assignments of a chunk share prefixes."""
_MIN_CHUNK = 8


@dataclass(frozen=True)
class RayConfig:
    """Where the workers are.

    Attributes:
        address: Address of a running cluster; "auto" for the one of this machine, "local" to start one here.
        workers: Number of workers; None takes one for each GPU, or for each CPU core if the driver computes on a CPU.
    """

    address: str
    workers: int | None = None

    @contextmanager
    def connected(self, device: str) -> Iterator[None]:
        """Hold a connection to the cluster.

        Args:
            device: Type of the driver's device, on which the workers compute too.
        Raises:
            EstimationError: If Ray is not installed, there is no such cluster, or a worker would have no GPU.
        """
        if importlib.util.find_spec("ray") is None:
            raise EstimationError("a cluster needs Ray; run: pip install 'coopq[ray]'")
        import ray

        try:
            _knock(self.address)
            ray.init(
                address=self.address,
                namespace="coopq",
                log_to_driver=False,
                include_dashboard=False if self.address == "local" else None,
            )
        except (OSError, ValueError) as error:
            raise EstimationError(
                f"no Ray cluster at {self.address!r} ({error}); start one with `ray start --head`, "
                "or take --ray-address local"
            ) from error
        try:
            n_gpus = int(ray.cluster_resources().get("GPU", 0))
            if device == "cuda" and n_gpus < (self.workers or 1):
                raise EstimationError(
                    f"the cluster has {n_gpus} GPUs for {self.workers or 1} workers, which need one each as the "
                    "driver has; use fewer --workers, or --device cpu"
                )
            yield
        finally:
            ray.shutdown()

    def start(self, session: Session, weights: Mapping[str, Any]) -> "Cluster":
        """The workers of a session; see `Cluster`."""
        return Cluster(self, session, weights)


class Cluster:
    """Workers of one session on Ray; a context manager that lets the workers go at its end.

    Args:
        where: Where the workers are.
        session: The driver's session.
        weights: What the bank's weights depend on.
    """

    def __init__(self, where: RayConfig, session: Session, weights: Mapping[str, Any]) -> None:
        import ray

        self._ray = ray
        resources = ray.cluster_resources()
        device, n_cpus = weights["device"], int(resources.get("CPU", 1))
        n_gpus = int(resources.get("GPU", 0)) if device == "cuda" else 0
        self.n_workers = where.workers or n_gpus or n_cpus
        per_gpu = 1 if n_gpus >= self.n_workers else 0
        n_threads = max(1, n_cpus // self.n_workers)
        # Ray restarts a worker that died, and hands it its unfinished chunk again.
        actor = ray.remote(num_cpus=n_threads, num_gpus=per_gpu, max_restarts=-1, max_task_retries=-1)(Worker)
        # The reference is kept: a worker that starts anew asks for the tokens again.
        self._fitting = ray.put(None if session.fitting is None else session.fitting.tokens)
        n_hosts = sum(node["Alive"] for node in ray.nodes())
        n_sharing = 1 if per_gpu else -(-self.n_workers // n_hosts)
        bank = str(session.folder.bank)
        # The journal says what the driver computes with, so its workers compute with the same.
        request = session.request.replace(device=device, dtype=weights["dtype"])
        self.workers = [
            actor.remote(
                request,
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
                    yield from self._measured(answer)
            if not waiting and all(chunk.tobytes() in done for _, chunk in running.values()):
                break  # only copies are left

    def _measured(self, answer: Any) -> list[Measurement]:
        """What a worker measured.

        Raises:
            CoopQError: What the worker raised, or that the worker failed, in one line.
        """
        try:
            measured: list[Measurement] = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CoopQError | torch.OutOfMemoryError):
                raise error.cause from error
            raise EstimationError(f"a worker failed ({type(error.cause).__name__}: {one_line(error.cause)})") from error
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EstimationError(f"a worker is lost ({reason}); run the same command again to go on") from error
        return measured


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
