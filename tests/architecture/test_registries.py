"""A plug-in is one file and one line of a table: file name, registry name and class name agree."""

import importlib
import re
from pathlib import Path

import pytest

from rota.base.registry import Registry

SOURCE = Path(__file__).resolve().parents[2] / "src" / "rota"


def registries():
    """Every registry that a package's `__init__` holds, by the name of the package."""
    found = {}
    for path in sorted((SOURCE / "serving").rglob("__init__.py")):
        if "Registry(" not in path.read_text(encoding="utf-8"):
            continue
        package = ".".join(path.parent.relative_to(SOURCE.parent).parts)
        held = vars(importlib.import_module(package)).values()
        found[package] = next(value for value in held if isinstance(value, Registry))
    return found


REGISTRIES = registries()
ENTRIES = [(package, name) for package, registry in REGISTRIES.items() for name in sorted(registry.table)]


def hump(name):
    return "".join(part.capitalize() for part in name.split("_"))


def test_the_registries_are_found():
    assert {"rota.serving.policies.order", "rota.serving.policies.dispatch"} <= set(REGISTRIES)
    groups = [registry._group for registry in REGISTRIES.values()]
    assert len(set(groups)) == len(groups), "two kinds share an entry-point group"
    assert all(re.fullmatch(r"rota\.[a-z_]+", group or "") for group in groups), groups


@pytest.mark.parametrize(("package", "name"), ENTRIES)
def test_file_name_registry_name_and_class_name_agree(package, name):
    registry = REGISTRIES[package]
    module, _, class_name = registry.table[name].partition(":")
    assert module in (f"{package}.{name}", f"{package}.{name}.{name}")
    assert class_name.startswith(hump(name)), f"{class_name} should begin with {hump(name)}"
    loaded = registry.load(name)
    assert loaded.__module__ == module
    assert loaded.__doc__, f"{class_name} does not say its rule"


@pytest.mark.parametrize("package", sorted(REGISTRIES))
def test_every_file_is_in_the_table_or_is_a_part_that_others_import(package):
    folder = SOURCE.parent / Path(*package.split("."))
    parts = {path.stem for path in folder.glob("*.py")} - {"__init__"} - set(REGISTRIES[package].table)
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    orphans = [name for name in sorted(parts) if not re.search(rf"{re.escape(package)}(\.| import ){name}\b", source)]
    assert not orphans, f"neither in the table nor imported by anything: {orphans}"
