"""Files of llama.cpp's own converter, with its ways of storing tensors: exported, read, and run by llama.cpp."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gguf_architectures.py"
EXPORTED = {
    "deepseek_v3": "parts of kv_b_proj, one transposed, stay as they are",
    "dbrx": "experts of two dimensions, stored along their outputs",
    "gemma3_text": "norms plus one, and an embedding without the rows that no token has",
    "gpt2": "Conv1D, and q, k and v in one tensor",
    "granitemoeshared": "gates and ups in one layer, in two tensors",
    "qwen3_5_text": "heads in another order, and columns of ssm_out with them",
    "wrapper:llava": "names of a wrapper",
}
REFUSED = {"falcon_h1": "output.weight of the GGUF file", "gemma3n_text": "no types for rows of 4 weights"}


@pytest.mark.slow
def test_every_way_of_storing_tensors_is_exported_or_refused_before_the_work(tmp_path: Path) -> None:
    kinds = [*EXPORTED, *REFUSED]
    command: list[str | Path] = [
        sys.executable,
        BENCHMARK,
        *kinds,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "report.md",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {kind: json.loads((tmp_path / "work" / f"{kind.replace(':', '-')}.json").read_text()) for kind in kinds}
    assert {kind: found[kind]["outcome"] for kind in EXPORTED} == dict.fromkeys(EXPORTED, "EXPORTS")
    for kind, reason in REFUSED.items():
        assert found[kind]["outcome"] == "REFUSES"
        assert reason in found[kind]["reason"]
    judged = [kind for kind in EXPORTED if "equal" in found[kind]["engine"].rpartition(": the base")[2]]
    assert {"gpt2", "granitemoeshared", "wrapper:llava"} <= set(judged)
