"""The documentation is under test: a route, an error, a command, a key or a variable without it fails here."""

import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from typer.main import get_command

from benchmarks.zoo import WRONG
from chainfed_ray import errors
from chainfed_ray.api.command.cli import app
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.storage import Settings, Storage
from tests.models import ENCODERS, FAMILIES, MIXTURES, TIED, UNTIED
from tests.project import ROOT

API, CLI, ERRORS = ((ROOT / "docs" / name).read_text() for name in ("api.md", "cli.md", "errors.md"))


@pytest.mark.slow
def test_every_route() -> None:
    paths = create_app(cast("Service", None)).openapi()["paths"]
    assert paths
    for path, methods in paths.items():
        for method in methods:
            assert re.search(rf"`{method.upper()} {re.escape(path)}`", API), f"{method} {path}"


def test_every_error() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ChainFedError)]
    tree = errors.__doc__ or ""
    for kind in kinds:
        if kind is not errors.ChainFedError:
            assert f"| `{kind.__name__}` |" in ERRORS, kind
            assert f"── {kind.__name__} " in tree, kind
            assert not kind.__bases__[1].__module__.startswith("chainfed"), "a plain Python error as well"


def test_every_command_and_its_options() -> None:
    commands = dict(commands_of(get_command(app)))
    assert commands
    for name, command in commands.items():
        assert f"`chainfed {name}" in CLI, name
        assert {"--json"} <= {option for parameter in command.params for option in parameter.opts}, name
        assert command.help, name


def test_the_manifest_of_a_site_has_options_that_the_command_has() -> None:
    manifest = yaml.safe_load((ROOT / "examples" / "kubernetes" / "site.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    program, name, address, *words = [*container["command"], *container["args"]]
    command = dict(commands_of(get_command(app)))[name]
    known = {option: parameter for parameter in command.params for option in parameter.opts}
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (program, address[:8]) == ("chainfed", "https://")
    assert given.keys() <= known.keys()
    assert all(option in given for option, parameter in known.items() if parameter.required and option.startswith("--"))
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {given["--data"], given["--cache"], str(Path(given["--key-file"]).parent)} == mounted


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each command by its words, such as ``keys create``."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_every_variable(tmp_path: Path) -> None:
    for name in Settings(Storage.at(tmp_path)).environment():
        assert f"| `{name}` |" in CLI, name


@pytest.mark.parametrize("family", sorted({*FAMILIES, *ENCODERS, *MIXTURES, *TIED, *UNTIED}))
def test_every_family_under_test(family: str) -> None:
    """``python -m benchmarks zoo --document docs/models.md`` writes the table anew."""
    assert f"| `{family}` | streamed, equal |" in (ROOT / "docs" / "models.md").read_text()


def test_no_family_of_the_table_is_wrong() -> None:
    assert f"| {WRONG} |" not in (ROOT / "docs" / "models.md").read_text()


DOCUMENTS = ["README.md", "benchmarks/LOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_make_targets(document: str) -> None:
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (folder / link).exists(), link
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z]+)`|^    make ([a-z]+)", text, re.MULTILINE):
        assert "".join(target) in targets, target


def test_the_picture_of_the_chain_is_what_its_script_makes() -> None:
    """``python docs/pictures/chain.py`` writes it anew."""
    script = ROOT / "docs" / "pictures" / "chain.py"
    assert script.with_suffix(".svg").read_text() == runpy.run_path(str(script))["picture"]()
