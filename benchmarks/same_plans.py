"""Whether two checkouts make the same plans and the same saved models, from eight runs of the command line.

    git worktree add build/before ed5c34d
    python benchmarks/same_plans.py build/before . --work build/same-plans

Each run is made in both checkouts, in processes of their own, and kept: repeating the command compares again. Plans are
compared field by field, numbers to twelve digits, after renamed fields are mapped to today's names. Weights are
compared byte by byte.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from convert import convert

MODEL = Path(__file__).parent / "data" / "twelve"
SMALL = Path(__file__).parents[1] / "tests" / "data" / "stories260k"
TEXT = ["--tokens", "1024", "--sequence-length", "128"]

RUNS: dict[str, list[str]] = {
    "coopq-block-2-4": ["twelve", "--method", "coopq", "--permutations", "5", "--budget", "3avg", *TEXT],
    "active-block-2-4": ["twelve", "--budget", "2.5avg", *TEXT],
    "active-fused-2-3-4-8-kl": [
        *["twelve", "--granularity", "fused", "--bits", "2,3,4,8", "--backend", "hqq", "--loss", "kl"],
        *["--budget", "3.5bpw", "--tokens", "512", "--sequence-length", "64"],
    ],
    "active-linear-2-4": ["stories260k", "--granularity", "linear", "--budget", "3avg", "--backend", "quanto", *TEXT],
    "auto-quantize-fused-2-3-4-8": [
        *["twelve", "--granularity", "fused", "--bits", "2,3,4,8", "--method", "auto-quantize", "--budget", "3.5bpw"],
        *TEXT,
    ],
    "fisher-linear-2-4": ["stories260k", "--granularity", "linear", "--method", "fisher", "--budget", "3avg", *TEXT],
    "active-embeddings-gguf": [
        *["llama", "--granularity", "block", "--bits", "2,4,8,16", "--backend", "ggml", "--embeddings"],
        *["--target", "gguf", "--base", "BASE", "--context", "256", "--budget", "6.4MB"],
        *["--tokens", "256", "--sequence-length", "64", "--fit-tokens", "256"],
    ],
    "greedy-compressed-tensors": [
        *["llama", "--backend", "gptq", "--bits", "4,8", "--method", "greedy-down", "--target", "compressed-tensors"],
        *["--budget", "8MB", "--tokens", "256", "--sequence-length", "64", "--fit-tokens", "512"],
    ],
}

RENAMED = {
    "layer_forwards": "block_forwards",
    "layer_forwards_unshared": "block_forwards_unshared",
    "evidence": "confidence",
    "config": "request",
}
"""Names of a plan's fields before format version 2, and since."""
_FORMAT = "format_version"


def main() -> None:
    """Run what is not run yet, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", help="another; without it only the first one's runs are made")
    parser.add_argument("--work", type=Path, default=Path("build/same-plans"), help="folder of the runs")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = (arguments.work / "llama.gguf").resolve()
    if not base.exists():
        convert(MODEL.parent / "llama", base)
    before = {name: run(arguments.before, name, arguments.work / "before", base) for name in RUNS}
    if arguments.after is None:
        return
    after = {name: run(arguments.after, name, arguments.work / "after", base) for name in RUNS}
    failed = False
    for name in RUNS:
        differing = differences(before[name], after[name])
        failed |= bool(differing)
        print(f"{name}: {'; '.join(differing) or 'the same plan, the same weights'}")
    sys.exit(1 if failed else 0)


def run(checkout: Path, name: str, work: Path, base: Path) -> Path:
    """The folder of a saved model, made by a checkout."""
    out = (work / name).resolve()
    model, *options = RUNS[name]
    source = SMALL if model == SMALL.name else MODEL.parent / model
    command = [sys.executable, "-m", entry(checkout), "quantize", str(source), *options, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "HF_HUB_OFFLINE": "1"}
    command = [str(base) if word == "BASE" else word for word in command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} in {checkout}: {done.stderr.strip().splitlines()[-1]}")
    return out


def entry(checkout: Path) -> str:
    """The module of a checkout's command line."""
    return "coopq.cli.main" if (checkout / "src" / "coopq" / "cli" / "main.py").is_file() else "coopq.cli"


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two saved models."""
    ours, theirs = (plan_fields(folder) for folder in (before, after))
    found = [
        f"{key}: {ours.get(key)!r} before, {theirs.get(key)!r} after"
        for key in sorted({*ours, *theirs})
        if not is_same(ours.get(key), theirs.get(key))
    ]
    for file in sorted({path.name for folder in (before, after) for path in folder.glob("*.safetensors")}):
        if digest(before / file) != digest(after / file):
            found.append(f"{file} differs")
    return found


def is_same(before: Any, after: Any) -> bool:
    """Whether two values are equal, numbers to twelve digits."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(is_same(before[key], after[key]) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(is_same, before, after))
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-12, abs_tol=1e-15)
    return bool(before == after)


def plan_fields(folder: Path) -> dict[str, Any]:
    """The fields of a saved plan by today's names, the request as flat options."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    fields = {RENAMED.get(key, key): value for key, value in plan.items() if key != _FORMAT}
    request = fields.pop("request")
    options = old_options(request) if "low" in request else {k: v for spec in request.values() for k, v in spec.items()}
    return fields | {f"option {name}": value for name, value in options.items()}


def old_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a request as plans held them before format version 2."""
    options = {key: value for key, value in config.items() if key not in ("low", "between", "high", "calibration")}
    text, screening = config["calibration"], options.pop("screening")
    length = text["length"]
    return {
        **options,
        "bits": [config["low"], *config["between"], config["high"]],
        "calibration": text["source"],
        "calibration_seed": text["seed"],
        "tokens": text["sequences"] * length,
        "sequence_length": length,
        "fit_tokens": None if text["fitting"] is None else text["fitting"] * length,
        "screen_tokens": None if screening is None else screening * length,
    }


def digest(file: Path) -> str:
    """A hash of a file; none where there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


if __name__ == "__main__":
    main()
