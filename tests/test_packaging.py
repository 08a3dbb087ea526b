"""The wheel outside the checkout, and the names that it promises."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import coopq

ROOT = Path(__file__).parents[1]


def test_every_public_name_exists() -> None:
    assert all(getattr(coopq, name) is not None for name in coopq.__all__)
    assert not hasattr(coopq, "no_such_name")


def test_public_names_stay_functions_whatever_is_imported() -> None:
    """A module of the name would take its place in the package once something imports it."""
    code = """
import pkgutil, sys, coopq
for module in pkgutil.walk_packages(coopq.__path__, "coopq."):
    if module.name.count(".") == 1:
        __import__(module.name)
sys.exit(not all(callable(getattr(coopq, name)) for name in coopq.__all__))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_needs_no_model_starts_without_torch() -> None:
    modules = (
        "coopq.cli.main",
        "coopq.cli.about_commands",
        "coopq.cli.commands",
        "coopq.core.specs",
        "coopq.export.formats",
        "coopq.plan.allocate",
        "coopq.plan.methods",
        "coopq.quantizers",
        "coopq.report.page.saved",
        "coopq.search",
    )
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    if "torch" in sys.modules:
        sys.exit(module + " imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_a_command_and_says_its_version() -> None:
    for arguments in (["-m", "coopq"], ["-m", "coopq.cli.main"]):
        done = subprocess.run([sys.executable, *arguments, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, f"coopq {coopq.__version__}"), done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [("coopq qu", "quantize"), ("coopq quantize --bac", "--backend"), ("coopq quantize --for ll", "llama.cpp")],
)
def test_a_shell_completes(line: str, expected: str) -> None:
    words = line.split()
    environment = os.environ | {
        "_COOPQ_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from coopq.cli.main import main; main()"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert f"plain,{expected}" in done.stdout.split(), done.stderr


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built with the installed hatchling: no index is asked."""
    folder = tmp_path_factory.mktemp("distribution")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_distribution_holds_what_it_needs(distribution: Path) -> None:
    """The data of the package in the wheel, and the package with its pages in the sdist."""
    (wheel,), (source,) = distribution.glob("*.whl"), distribution.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    package = ROOT / "src" / "coopq"
    data = {f"coopq/{file.relative_to(package)}" for file in package.rglob("*") if _is_data(file)}
    assert any("report/page/assets/" in name for name in data)
    assert data | {"coopq/py.typed", "coopq/__main__.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Paper, https://" in metadata
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "src/coopq/__init__.py"} <= held
    assert not any(name.startswith("tests") for name in held), "tests need the rest of the checkout"


def _is_data(file: Path) -> bool:
    return file.is_file() and file.suffix not in (".py", ".pyc")


def test_a_wheel_runs_the_main_job_outside_the_checkout(distribution: Path, tmp_path: Path, stories: str) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *distribution.glob("*.whl"))
    # The other packages are taken from here: a path in a .pth file lends its packages, not its own .pth files,
    # so the checkout stays out of sight.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    assert run(python, "-c", "import coopq; print(coopq.__file__)").startswith(str(site))
    command = tmp_path / "env" / "bin" / "coopq"
    fast = ("--permutations", "2", "--tokens", "128", "--sequence-length", "64")
    run(command, "quantize", stories, "--budget", "3avg", "--out", "model", *fast)
    assert "perplexity" in run(command, "evaluate", "model", "--tokens", "256", "--sequence-length", "64")
    assert (site / "coopq" / "model" / "texts" / "data" / "LICENSES.md").is_file()
    assert (site / "coopq" / "py.typed").is_file(), "type checkers heed its annotations"
