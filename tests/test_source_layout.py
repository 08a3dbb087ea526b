"""The layout of the source: what imports what, and how large folders and files are."""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import coopq
from coopq.export.formats import FORMS
from coopq.plan.methods import METHODS
from coopq.quantizers import BACKENDS

SOURCE = Path(coopq.__file__).parent
LAYERS = (
    ("__main__",),  # python -m coopq
    ("coopq",),  # the public names
    ("cli",),
    ("pipeline",),
    ("report",),
    ("judge",),
    ("export",),
    ("plan",),
    ("game",),
    ("quantizers",),
    ("model", "search"),
    ("core",),
)
"""Folders, the highest first; a folder imports from itself and from folders below."""
MOST_ENTRIES = 12
_NO_STAGES = {"__pycache__", "__main__.py"}
MOST_LINES = 300
PATH = re.compile(r"(coopq(?:\.\w+)+)(?::([\w.]+))?")
"""A module, or a module and a name in it, as texts of registries have them."""

MODULES = {
    ".".join(("coopq", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def folder_of(module: str) -> str:
    """The layer that a module is in: the name after "coopq.", or "coopq" for the package itself."""
    return module.split(".")[1] if "." in module else module


def imported(tree: ast.Module, module: str) -> Iterator[str]:
    """The modules of this package that a module imports: anywhere in it, for types only, or by a path in a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively in line {node.lineno}"
            source = str(node.module)
            yield from (inner if (inner := f"{source}.{alias.name}") in MODULES else source for alias in node.names)
        elif isinstance(node, ast.Constant):
            path = PATH.fullmatch(str(node.value))
            if path is not None and (path[1] in MODULES or path[2] is not None):  # "coopq.load" alone is no module
                yield path[1]


def violations(trees: dict[str, ast.Module]) -> list[str]:
    """Imports from a folder that is not below."""
    height = {folder: -level for level, folders in enumerate(LAYERS) for folder in folders}
    found = []
    for module, tree in trees.items():
        ours = folder_of(module)
        for name in imported(tree, module):
            theirs = folder_of(name)
            if name.partition(".")[0] == "coopq" and theirs != ours and height[theirs] >= height[ours]:
                found.append(f"{module} imports {name}")
    return found


def test_no_folder_imports_from_a_higher_one() -> None:
    assert {folder_of(module) for module in MODULES} == set(chain(*LAYERS))
    assert violations(TREES) == []


@pytest.mark.parametrize(
    "line",
    [
        "import coopq.plan.plan",
        "from coopq.plan.plan import Plan",
        "from coopq import pipeline",
        "from coopq import quantize",
        "def f():\n    from coopq.cli import main",
        "if TYPE_CHECKING:\n    from coopq.export.formats import Form",
        'TABLE = {"name": "coopq.plan.by_score:plans_by_score"}',
        'importlib.import_module("coopq.judge.comparison")',
    ],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    assert len(violations({"coopq.game.session": ast.parse(line)})) == 1


def test_model_and_search_do_not_import_each_other() -> None:
    assert violations({"coopq.model.load": ast.parse("import coopq.search.space")})
    assert violations({"coopq.search.space": ast.parse("import coopq.model.load")})
    assert not violations({"coopq.search.space": ast.parse("import coopq.search.measured, coopq.core.types")})


def test_paths_of_registries_lead_to_names() -> None:
    paths = [method.path for method in METHODS.values() if method.path is not None]
    paths += [backend.path for backend in BACKENDS.values()] + [form.path for form in FORMS.values()]
    for path in paths:
        found = PATH.fullmatch(path)
        assert found is not None, path
        module, name = found.groups()
        assert module in MODULES, path
        kinds = ast.FunctionDef, ast.ClassDef
        assert name.split(".")[0] in {node.name for node in TREES[module].body if isinstance(node, kinds)}, path


def test_folders_and_files_are_small() -> None:
    folders = [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        entries = sorted(path.name for path in folder.iterdir() if path.name not in _NO_STAGES)
        assert len(entries) <= MOST_ENTRIES, (folder, entries)
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lengths.items() if n > MOST_LINES} == {}


def test_no_process_imports_modules_from_the_current_folder() -> None:
    """Python looks for modules there first, and it may be a stranger's model; -P turns that off.

    The converter that a user names is a script, and a script imports from the script's own folder.
    """
    for path in MODULES.values():
        for options in re.findall(r"sys\.executable, (.*)", path.read_text(encoding="utf-8")):
            assert options.startswith(('"-P", ', "converter]")), (
                f"{path}: {options}"
            )  # a script has a folder of its own


@pytest.mark.parametrize(("function", "folder"), [("find_players", "model"), ("get_backend", "quantizers")])
def test_a_request_is_turned_into_players_and_backend_in_one_place(function: str, folder: str) -> None:
    """Outside the function's own folder."""
    callers = [
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and function in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
        and folder_of(module) != folder
    ]
    assert callers == ["coopq.game.prepared"]
