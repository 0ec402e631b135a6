"""The arrows between the folders point one way: api → cluster → chainfed_ray."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest

from chainfed_ray.config import JobSpec
from chainfed_ray.sections import Section
from tests.project import ROOT, files_of

FORBIDDEN = {
    "chainfed_ray": {"ray", "fastapi", "deepspeed", "chainfed_ray.cluster", "chainfed_ray.api"},
    "cluster": {"fastapi", "chainfed_ray.api"},
    "api": set[str](),
}
GENERIC = {"api", "cluster", "tests", "benchmarks", "examples"}


def imported(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it: the first part of their names, or which of our three folders."""
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.Module) -> set[str]:
    """The same of what was parsed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {package(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {package(f"{node.module}.{alias.name}") for alias in node.names}
    return found


def package(name: str) -> str:
    """``chainfed_ray.api`` and ``chainfed_ray.cluster`` are the folders ``api`` and ``cluster``."""
    first, second = (*name.split("."), "")[:2]
    return f"{first}.{second}" if first == "chainfed_ray" and second in ("api", "cluster") else first


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder: str) -> None:
    files = files_of(folder)
    assert files
    for path in files:
        allowed = {"deepspeed"} if path == ROOT / "chainfed_ray" / "offloaded.py" else set[str]()
        assert imported(path) & FORBIDDEN[folder] == allowed, path.name
        assert not imported(path) & GENERIC, f"{path.name}: an installation has no such package, or somebody else's"


def test_no_test_file_imports_another() -> None:
    """Each can be moved, and run in any process, by itself; what several need is in files that hold no tests."""
    for path in (ROOT / "tests").glob("*.py"):
        modules = {f"{node.module}.{alias.name}" for node in froms(path) for alias in node.names}
        assert not {name for name in modules if name.startswith("tests.test_")}, path.name


def test_tests_reach_for_no_private_names() -> None:
    """What they prove is what the code promises; how it does that may change without them."""
    for path in (ROOT / "tests").glob("*.py"):
        ours = [node for node in froms(path) if (node.module or "").split(".")[0] in ("chainfed_ray", "benchmarks")]
        assert not {alias.name for node in ours for alias in node.names if alias.name.startswith("_")}, path.name
        of_others = [node for node in attributes(path) if is_private(node)]
        assert not {f"line {node.lineno}: {ast.unparse(node)}" for node in of_others}, path.name


def froms(path: Path) -> list[ast.ImportFrom]:
    """The ``from … import …`` of a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]


def attributes(path: Path) -> list[ast.Attribute]:
    """The names that a file asks objects for."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]


def is_private(node: ast.Attribute) -> bool:
    """Whether that is a private name of something else than the object itself."""
    itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super")
    special = not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in ("_replace", "_asdict")
    return not itself and not special


def test_deepspeed_is_imported_only_when_it_is_used() -> None:
    """It takes seconds, and looks for a compiler."""
    for folder in FORBIDDEN:
        for path in files_of(folder):
            top = ast.Module(
                [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)], []
            )
            assert "deepspeed" not in imported_by(top), path.name


def test_the_map_gives_every_file_a_duty() -> None:
    duties = (ROOT / "ARCHITECTURE.md").read_text()
    for folder in FORBIDDEN:
        for path in files_of(folder):
            assert path.stem == "__init__" or f"{path.name} " in duties, path.name


def test_every_key_of_a_job_is_documented() -> None:
    documented = (ROOT / "docs" / "jobs.md").read_text()
    for path in keys(JobSpec):
        assert f"| `{path}` |" in documented, path


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The path of every key that has no keys below it."""
    for name, field in section.model_fields.items():
        inner = [item for item in (field.annotation, *get_args(field.annotation)) if is_section(item)]
        if inner:
            yield from keys(
                inner[0], f"{prefix}{name}[]." if get_origin(field.annotation) is tuple else f"{prefix}{name}."
            )
        else:
            yield prefix + name


def is_section(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Section)
