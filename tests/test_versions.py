"""Private parts of libraries: which versions were tried, and what a user hears about other versions."""

import importlib
import logging
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from coopq.core.versions import check_version

ADAPTERS = {
    "transformers": "coopq.model.sources.gguf",
    "optimum-quanto": "coopq.quantizers.quanto",
    "hqq": "coopq.quantizers.hqq",
    "gptqmodel": "coopq.quantizers.gptq.backend",
    "auto-round": "coopq.quantizers.gptq.autoround",
    "libggml-python": "coopq.quantizers.ggml.library",
}


@pytest.mark.parametrize("package", ADAPTERS)
def test_the_tried_versions_are_those_that_the_tests_run_with(package: str) -> None:
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    pinned = re.search(rf"^{package}==(\S+)", constraints, re.MULTILINE)
    assert pinned is not None
    adapter = vars(importlib.import_module(ADAPTERS[package]))
    assert f"{pinned[1]}.".startswith(f"{adapter.get('TRIED') or adapter['_TRIED']}.")


def test_another_version_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    check_version.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_version("hqq", version("hqq"), "backend 'hqq'")
        check_version("hqq", version("hqq").partition(".")[0], "backend 'hqq'")
        assert not caplog.records
        for _ in range(2):
            check_version("hqq", "0.1", "backend 'hqq'")
    (record,) = caplog.records
    assert record.message == (
        f"backend 'hqq' uses private parts of hqq, tried with version 0.1; version {version('hqq')} is installed: if "
        "results look wrong, run: pip install 'hqq==0.1.*'"
    )
