"""What works on this machine: versions, extras, engines, memory; and what a model needs."""

import json
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coopq.core.errors import CoopQError
from coopq.core.files import cache_folder
from coopq.core.specs import Request
from coopq.core.types import ProgressCallback, silent
from coopq.export.formats import TargetFile
from coopq.export.gguf.converter import find_converter
from coopq.game.prepared import prepare
from coopq.model.memory import free_memory, gib

_SECONDS = 300.0
"""How long an import may take. Some libraries compile when they are imported first."""
_GGML = "coopq.report.doctor_worker:quantize_by_ggml"


class Part(NamedTuple):
    """What can be installed beside coopq.

    Attributes:
        name: Name of the extra, or of the engine.
        gives: What the part is for.
        paths: What must work: modules, or "module:function".
        install: What pip installs.
    """

    name: str
    gives: str
    paths: tuple[str, ...]
    install: str

    @property
    def command(self) -> str:
        """The command that installs the part."""
        return f"pip install '{self.install}'"


def _extra(name: str, gives: str, *paths: str) -> Part:
    return Part(name, gives, paths, f"coopq[{name}]")


EXTRAS = (
    _extra("llama-cpp", "GGUF in and out; the backends of ggml", "gguf", "accelerate", "libggml", _GGML, "xllamacpp"),
    _extra("vllm", "--to compressed-tensors, and the backend gptq", "compressed_tensors", "gptqmodel"),
    _extra("openvino", "--to openvino", "openvino"),
    _extra("mlx", "--to mlx", "mlx_lm"),
    _extra("quanto", "backend quanto", "optimum.quanto"),
    _extra("hqq", "backend hqq", "hqq.core.quantize"),
    _extra("gptq", "backends gptq and gptq-static", "gptqmodel"),
    _extra("autoround", "backend autoround", "auto_round"),
    _extra("datasets", "calibration text from the hub", "datasets"),
    _extra("tasks", "zero-shot accuracy", "lm_eval"),
    _extra("bench", "coopq bench", "pandas"),
    _extra("plot", "figures of coopq compare and coopq bench", "matplotlib"),
    _extra("ray", "a Ray cluster", "ray"),
    _extra("sharded", "a model divided between GPUs", "accelerate"),
)
"""The extras of the package."""
ENGINES = (
    Part("llama.cpp", "GGUF files, by llama.cpp itself", ("xllamacpp",), "xllamacpp"),
    Part("llama.cpp", "GGUF files, by its own bindings", ("llama_cpp",), "llama-cpp-python"),
    Part("llama.cpp", "GGUF files, by a fork", ("ik_llama_cpp",), "ik-llama-cpp-python"),
    Part("OpenVINO", "folders of --to openvino", ("openvino",), "coopq[openvino]"),
    Part("vLLM", "models of gptq; --to compressed-tensors", ("vllm",), "vllm"),
    Part("transformers", "--to compressed-tensors", ("compressed_tensors",), "coopq[vllm]"),
    Part("transformers", "--to auto-round", ("auto_round",), "coopq[autoround]"),
    Part("mlx-lm", "--to mlx", ("mlx_lm",), "coopq[mlx]"),
)
"""The engines whose loss can be compared on this machine, if the package works."""


def examine(source: str | None = None, progress: ProgressCallback = silent) -> dict[str, Any]:
    """What works here, as plain data; nothing that is missing or broken is an error.

    Args:
        source: A model whose needs are of interest, as `coopq.core.specs.ModelSpec` has it.
        progress: Told of every import.
    Returns:
        `versions`, `memory` and `disk` in bytes, `gpus`, `extras`, `engines`, `converter`, and with a source `model`:
        its needs, or `refused`, why coopq refuses the model.
    """
    paths = sorted({path for part in (*EXTRAS, *ENGINES) for path in part.paths})
    answers = dict(zip(paths, _try_imports(paths, progress), strict=True))
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("coopq", "torch", "transformers")},
        },
        "memory": free_memory("cpu"),
        "disk": _disk(),
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
        "extras": [_state(part, answers) for part in EXTRAS],
        "engines": [_state(part, answers) for part in ENGINES],
        "converter": _converter(),
    }
    return found if source is None else {**found, "model": _needs(source, progress)}


def doctor_report(found: Mapping[str, Any]) -> RenderableType:
    """What works here, and what a model needs: see `examine`."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gpus = ", ".join(f"{gpu['name']} ({gib(gpu['bytes'])})" for gpu in found["gpus"]) or "none"
    disk = ", ".join(f"{gib(free)} in {folder}" for folder, free in found["disk"].items())
    lines = [versions, f"GPUs: {gpus}", f"free memory: {gib(found['memory'])}; free disk: {disk}"]
    lines.append(f"converter to GGUF: {found['converter'] or 'none'}")
    tables = [_parts_table("extra", found["extras"]), _parts_table("engine", found["engines"])]
    parts: list[RenderableType] = [Text("\n".join(lines)), *tables]
    model = found.get("model", {})
    if "summary" in model:
        what = f"{model['source']} ({model['class']}): {model['blocks']} blocks, {model['weights']:,} weights in layers"
        parts.append(Text(f"{what}, on the {model['device']}\nwith default options {model['summary']}"))
    return Group(*parts)


def _parts_table(kind: str, states: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each extra or engine: what it gives, and whether it works."""
    table = Table(kind, "what it gives", "here")
    for state in states:
        here = {
            "works": f"works {state['version'] or ''}".rstrip(),
            "missing": f"not installed: {state['install']}",
            "broken": f"broken: {state['problem']}",
        }[state["state"]]
        table.add_row(state["name"], state["gives"], here)
    return table


def _state(part: Part, answers: dict[str, tuple[str | None, str | None]]) -> dict[str, Any]:
    """A part with its state: "works", "missing" or "broken"."""
    problems = [answers[path][1] for path in part.paths]
    problem = next((problem for problem in problems if problem is not None), None)
    return {
        "name": part.name,
        "gives": part.gives,
        "state": "works" if problem is None else "broken" if problem else "missing",
        "problem": problem,
        "version": answers[part.paths[0]][0],
        "install": part.command,
    }


def _try_imports(paths: Sequence[str], progress: ProgressCallback) -> Iterator[tuple[str | None, str | None]]:
    """Version and problem of each path, see `try_import`; a new process goes on where one ends."""
    done = 0
    while done < len(paths):
        for answer in _import_in_one_process(paths[done:]):
            progress("importing libraries", done, len(paths))
            done += 1
            yield answer
    progress("importing libraries", done, len(paths))


def _import_in_one_process(paths: Sequence[str]) -> Iterator[tuple[str | None, str | None]]:
    """Version and problem of each path, up to the first path whose import ends the process or takes too long."""
    command = [sys.executable, "-P", "-m", "coopq.report.doctor_worker", *paths]
    is_late = threading.Event()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    ) as process:

        def stop() -> None:
            is_late.set()
            process.kill()

        assert process.stdout is not None
        try:
            for _ in paths:
                timer = threading.Timer(_SECONDS, stop)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                if not line:
                    break
                found, problem = json.loads(line)
                yield found, problem
            else:
                return
        finally:
            timer.cancel()
            process.kill()
    late = f"the import took longer than {_SECONDS:g} s"
    yield None, late if is_late.is_set() else f"the import ends with code {process.returncode}"


def _disk() -> dict[str, int]:
    """Free bytes where the work and what is made once of a model are kept; a folder that cannot be used is left out."""
    free = {}
    for folder in (Path.cwd, cache_folder):
        with suppress(OSError, CoopQError):
            free[str(folder())] = shutil.disk_usage(folder()).free
    return free


def _converter() -> str | None:
    """llama.cpp's converter; None if there is none."""
    try:
        found = find_converter()
    except CoopQError:
        return None
    return None if found is None else str(found)


def _needs(source: str, progress: ProgressCallback) -> dict[str, Any]:
    """What the default run of a model needs, without its weights; `refused` if the run cannot start."""
    request = Request.from_options(model=source)
    try:
        prepared = prepare(request, target=TargetFile(progress))
        footprint = prepared.footprint
        needs = {
            "class": type(prepared.skeleton).__name__,
            "blocks": prepared.players[-1].block + 1,
            "weights": sum(player.n_weights for player in prepared.players),
            "device": prepared.device.type,
            "needed": footprint.needed,
            "fastest": footprint.total,
            "bank": footprint.bank,
            "footprint": asdict(footprint),
            "summary": str(footprint),
        }
        prepared.fit()
    except CoopQError as error:
        return {"source": source, "refused": str(error)}
    return {"source": source, **needs, "refused": None}
