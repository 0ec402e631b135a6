"""The arrows between the folders point one way: api → cluster → chainfed_ray."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest

from chainfed_ray.config import JobSpec
from chainfed_ray.sections import Section

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "chainfed_ray": {"ray", "fastapi", "deepspeed", "cluster", "api"},
    "cluster": {"fastapi", "api"},
    "api": set[str](),
}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.Module) -> set[str]:
    """The same of what was parsed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        allowed = {"deepspeed"} if path == ROOT / "chainfed_ray" / "offloaded.py" else set[str]()
        assert imported(path) & FORBIDDEN[folder] == allowed, path.name


def test_deepspeed_is_imported_only_when_it_is_used() -> None:
    """It takes seconds, and looks for a compiler."""
    for folder in FORBIDDEN:
        for path in (ROOT / folder).rglob("*.py"):
            top = ast.Module(
                [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)], []
            )
            assert "deepspeed" not in imported_by(top), path.name


def test_readme_gives_every_file_a_duty() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in FORBIDDEN:
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or f"{path.name} " in readme, path.name


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
