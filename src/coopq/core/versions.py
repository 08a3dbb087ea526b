"""Versions of libraries: those that numbers depend on, and those whose private parts are in use."""

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version

_PACKAGES = ("coopq", "torch", "transformers", "optimum-quanto", "hqq", "gptqmodel", "auto-round", "libggml-python")
_log = logging.getLogger(__name__)


@cache
def check_version(package: str, tried: str, what: str) -> None:
    """Warn, once in a process, if a package has another version than the one that was tried.

    Args:
        package: Name of the package, as pip has it.
        tried: The version that was tried, or its first numbers: "5.24" stands for 5.24.0 and 5.24.1.
        what: What uses private parts of the package: "backend 'hqq'".
    """
    try:
        found = version(package)
    except PackageNotFoundError:  # a copy without metadata
        found = "unknown"
    if found != tried and not found.startswith(f"{tried}."):
        _log.warning(
            "%s uses private parts of %s, tried with version %s; version %s is installed: if results look wrong, run: "
            "pip install '%s==%s.*'",
            what,
            package,
            tried,
            found,
            package,
            tried,
        )


def installed() -> str:
    """The packages that numbers depend on, with their versions: "coopq 0.1.0, torch 2.9"."""
    return ", ".join(f"{found.name} {found.version}" for name in _PACKAGES for found in distributions(name=name))
