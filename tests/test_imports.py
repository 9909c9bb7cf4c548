"""Imports run one way: from one package down to the next, and in no circle of files, a type checker's included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("orchestrator", "dashboards", "search_spaces", "streamllm")
"""Each may import those behind it."""


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in FLOORS for path in (ROOT / package).rglob("*.py")}


def imported(module):
    """Our modules that it imports, wherever in it: those whose names it takes something from."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            where = ".".join([*start, *([node.module] if node.module else [])])
            found |= {name if (name := f"{where}.{alias.name}") in MODULES else where for alias in node.names}
    return found & MODULES.keys() - {module}


def circle(imports):
    """Empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_files():
    imports = {module: imported(module) for module in MODULES}
    assert len(imports["orchestrator.sweep"]) > 10, "they are found at all"
    assert circle(imports) == []
    assert "streamllm.policy" in circle(imports | {"streamllm.policy": {"orchestrator.sweep"}})


@pytest.mark.parametrize("package", FLOORS)
def test_packages_import_those_below(package):
    below = FLOORS[FLOORS.index(package) :]
    up = {
        f"{module} -> {other}"
        for module in MODULES
        for other in imported(module)
        if module.split(".")[0] == package and other.split(".")[0] not in below
    }
    assert up == set()
