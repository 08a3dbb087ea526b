"""Requests: the same options for the command line, benches and saved JSON, each checked when a request is built."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coopq.core.errors import BudgetError, OptionError
from coopq.core.files import read_record, write_record
from coopq.core.goal import Goal
from coopq.core.spec_base import option_name
from coopq.core.specs import Request, SolverSpec, TextSpec, WidthsSpec, option_fields
from coopq.judge.bench.config import read_bench
from tests.command_line import command

EVERY: dict[str, Any] = {
    "model": "some/model",
    "dtype": "bfloat16",
    "device": "cuda",
    "backend": "gptq",
    "group_size": 32,
    "act_order": True,
    "symmetric": False,
    "imatrix": "file.gguf",
    "bits": (2.5, 4, 16),
    "granularity": "fused",
    "embeddings": True,
    "routers": True,
    "calibration": "hub:text",
    "tokens": 512,
    "sequence_length": 128,
    "calibration_seed": 3,
    "fit_tokens": 1024,
    "screen_tokens": 256,
    "loss": "kl",
    "permutations": 7,
    "seed": 5,
    "target": "gguf",
    "base": "base.gguf",
    "context": 4096,
}
"""Every option with another value than its default."""


def test_every_option_is_here() -> None:
    names = [field.encode_name for field in option_fields()]
    assert list(EVERY) == names
    assert len(set(names)) == len(names)
    defaults = Request.from_options(model="").options()
    assert [name for name, value in EVERY.items() if value == defaults[name]] == []


def test_options_make_a_request_and_a_request_gives_them_back() -> None:
    request = Request.from_options(**EVERY)
    assert request.options() == EVERY
    assert Request.from_options(**request.options()) == request
    assert request.model.source == "some/model"
    assert request.text.source == "hub:text"
    assert request.text.seed == 3
    assert request.search.seed == 5
    assert request.target.form == "gguf"
    assert Request.from_options(model="demo").text == TextSpec()


@pytest.mark.parametrize("options", [EVERY, {"model": "demo"}])
def test_a_request_goes_through_json(options: dict[str, Any], tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Record:
        request: Request

    request = Request.from_options(**options)
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request
    write_record(tmp_path / "record.json", Record(request), 2)
    read = read_record(
        tmp_path / "record.json", Record, 2, what="record", missing="", way_out="delete it", error=OptionError
    )
    assert read.request == request
    assert read.request.options() == request.options()
    assert all(
        type(width) is type(ours) for width, ours in zip(read.request.widths.bits, request.widths.bits, strict=True)
    )


def test_options_are_replaced_by_name() -> None:
    request = Request.from_options(**EVERY)
    changed = request.replace(tokens=128, screen_tokens=None, seed=0)
    assert changed.options() == {**EVERY, "tokens": 128, "screen_tokens": None, "seed": 0}
    assert request.options() == EVERY, "requests do not change"
    with pytest.raises(AttributeError):
        request.text.tokens = 1  # type: ignore[misc]
    with pytest.raises(OptionError, match="screen-tokens = 256 is more than tokens = 128"):
        request.replace(tokens=128)


def test_what_specs_say_of_themselves() -> None:
    widths = WidthsSpec(bits=(16, 4, 2.5))
    assert widths.bits == (2.5, 4, 16), "ascending"
    assert (widths.low, widths.high, widths.quantized) == (2.5, 16, (2.5, 4))
    assert widths.text == "2.5, 4 and 16"
    assert WidthsSpec(bits=(4.0, 2.0)).text == "2 and 4", "whole widths are whole numbers"
    text = TextSpec(tokens=512, sequence_length=128, fit_tokens=384, screen_tokens=256)
    assert (text.n_sequences, text.n_fit_sequences, text.n_screen_sequences) == (4, 3, 2)
    plain = TextSpec(tokens=512, sequence_length=128)
    assert (plain.n_fit_sequences, plain.n_screen_sequences) == (None, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype = 'int3' does not fit: choose from auto, float32, bfloat16, float16"),
        ({"granularity": "head"}, "granularity = 'head' does not fit: choose from block, fused, linear"),
        ({"loss": "kld"}, "loss = 'kld' does not fit: choose from nll, kl"),
        ({"permutations": 1}, "permutations = 1 does not fit: expected int >= 2"),
        ({"seed": -1}, "seed = -1 does not fit: expected int >= 0"),
        ({"calibration_seed": -1}, "calibration-seed = -1 does not fit: expected int >= 0"),
        ({"sequence_length": 1}, "sequence-length = 1 does not fit: expected int >= 2"),
        ({"tokens": "many"}, "tokens = 'many' does not fit: expected int, got str"),
        ({"tokens": 0}, "tokens = 0 does not fit: expected int >= 1"),
        (
            {"tokens": 100},
            "tokens = 100 is not a positive multiple of sequence-length = 512; sequences are",
        ),
        ({"fit_tokens": 0}, "fit-tokens = 0 is not a positive multiple of sequence-length = 512"),
        ({"screen_tokens": 513}, "screen-tokens = 513 is not a positive multiple of sequence-length = 512"),
        ({"screen_tokens": 16384}, "screen-tokens = 16384 is more than tokens = 8192"),
        ({"embeddings": "yes"}, "embeddings = 'yes' does not fit: expected bool, got str"),
        ({"group_size": 1.5}, "group-size = 1.5 does not fit: expected int | null, got float"),
        ({"model": 3}, "model = 3 does not fit: expected str, got int"),
        ({"bits": (4,)}, "bits = 4 are not two or more different widths; write 2,4"),
        ({"bits": (2, 4, 4)}, "bits = 2, 4, 4 are not two or more different widths; write 2,4"),
        ({"bits": 4}, "bits = 4 does not fit: expected array, got int"),
        ({"context": 0}, "context = 0 is not a number of tokens; leave it out for no KV cache"),
        ({"permutation": 3}, "option 'permutation' is unknown; did you mean 'permutations'?"),
        ({"sequence_lenght": 3}, "option 'sequence-lenght' is unknown; did you mean 'sequence-length'?"),
        ({"colour": "blue"}, "option 'colour' is unknown; choose from model, dtype, device, backend, "),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_fits(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Request.from_options(**{"model": "demo", **options})
    line = str(caught.value)
    assert line.startswith(message)
    assert "\n" not in line


def test_a_request_needs_a_model() -> None:
    with pytest.raises(OptionError, match="model is missing; give one"):
        Request.from_options(bits=(2, 4))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "give one of size, fit (a memory) and max-loss"),
        ({"budget": "3avg", "max_loss": 3.0}, "give one of size, fit (a memory) and max-loss"),
        ({"max_loss": float("nan")}, "max-loss = nan is no limit; give nats per token"),
        ({"max_loss": float("inf")}, "max-loss = inf is no limit; give nats per token"),
        ({"budget": "3avg", "method": 3}, "method = 3 does not fit: expected str, got int"),
    ],
)
def test_a_goal_is_a_budget_or_a_limit(goal: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Goal(**goal)
    assert str(caught.value).startswith(message)


def test_a_budget_that_cannot_be_read_is_a_wrong_goal() -> None:
    with pytest.raises(BudgetError, match="'small' cannot be read"):
        Goal(budget="small")


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"alpha": 2.0}, "alpha = 2.0 does not fit: expected float <= 1"),
        ({"alpha": -0.1}, "alpha = -0.1 does not fit: expected float >= 0"),
        ({"time_limit": 0.0}, "time-limit = 0.0 is not a positive number of seconds; leave it out for no limit"),
        ({"time_limit": float("nan")}, "time-limit = nan is not a positive number of seconds"),
    ],
)
def test_a_solver_has_limits(solver: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        SolverSpec(**solver)
    assert str(caught.value).startswith(message)


def test_saved_json_with_other_fields_is_refused() -> None:
    plain = msgspec.to_builtins(Request.from_options(model="demo"))
    for wrong in (plain | {"colour": "blue"}, plain | {"text": {"token": 512}}, plain | {"model": {}}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Request)
    with pytest.raises((msgspec.ValidationError, OptionError), match="granularity"):
        msgspec.convert(plain | {"widths": {"granularity": "head"}}, Request)


def test_the_command_line_has_every_option_by_its_name() -> None:
    code, text, err = command("quantize", "--help")
    assert code == 0, err
    words = set(text.replace("/", " ").split())
    for field in option_fields():
        if not field.required:
            assert f"--{option_name(field)}" in words
    assert "MODEL" in words, "the only argument"
    for kind in (Goal, SolverSpec):
        assert {f"--{option_name(field)}" for field in option_fields(kind)} <= words


def test_saved_json_has_every_option_by_its_name(finished: Path) -> None:
    record = json.loads((finished.with_name("out-run") / "run.json").read_text())
    saved = {name: value for group in record["request"].values() for name, value in group.items()}
    assert list(saved) == list(EVERY)
    assert saved["tokens"] == 128
    assert record["format_version"] == 3
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["request"] == record["request"]


@pytest.mark.parametrize("spelling", ["-", "_"])
def test_a_bench_has_every_option_by_its_name(spelling: str, tmp_path: Path) -> None:
    listed = {"model": "models", "backend": "backends", "bits": "bits", "seed": "seeds"}
    keys = {name: value for name, value in EVERY.items() if name not in listed}
    keys |= {listed[name]: [EVERY[name]] for name in listed}
    keys |= {"methods": ["active"], "budgets": ["3avg"]}
    lines = [f"{name.replace('_', spelling)} = {json.dumps(value)}" for name, value in keys.items()]
    path = tmp_path / "all.toml"
    path.write_text("\n".join(lines))
    (case,) = read_bench(path).cases
    assert case.seeded(5) == Request.from_options(**EVERY)
    path.write_text("\n".join(line for line in lines if not line.startswith("calibration" + spelling)))
    (case,) = read_bench(path).cases
    assert case.seeded(5) == Request.from_options(**{**EVERY, "calibration_seed": 5}), "another text for every seed"
