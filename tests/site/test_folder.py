"""A job reads what a site offers, and nothing else."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.errors import InvalidJob
from chainfed_ray.site.folder import offered


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("machine")
    (root / "secret.jsonl").write_text("secret")
    made = root / "offered"
    (made / "inner" / "shards").mkdir(parents=True)
    (made / "notes.jsonl").write_text("{}")
    (made / "inner" / "more.csv").write_text("a")
    (made / "out").symlink_to(root / "secret.jsonl")
    (made / "up").symlink_to("..")
    (made / "again").symlink_to("notes.jsonl")
    (made / "round").symlink_to("round")
    (made / "inner" / "shards" / "part").symlink_to(root / "secret.jsonl")
    os.mkfifo(made / "pipe")
    return made


@pytest.mark.parametrize("name", ["notes.jsonl", "./notes.jsonl", "inner/more.csv", "inner/../notes.jsonl", "again"])
def test_a_file_in_the_folder_is_found(folder: Path, name: str) -> None:
    assert offered(folder, f"site:{name}").read_text() in ("{}", "a")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jsonl",
        "out",
        "up/secret.jsonl",
        "/etc/passwd",
        "round",
        "pipe",
        "none.csv",
        "inner",
        "a" * 5000,
        "\0",
    ],
)
def test_what_leads_out_or_is_no_file_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InvalidJob) as raised:
        offered(folder, f"site:{name}")
    assert raised.value.problems[0].field == "fleet.clients.data"


@pytest.mark.slow
@given(
    st.lists(st.sampled_from(["..", ".", "inner", "up", "out", "shards", "part", "notes.jsonl", "", "/"]), max_size=8)
)
def test_no_path_leads_out(folder: Path, parts: list[str]) -> None:
    try:
        found = offered(folder, "site:" + "/".join(parts))
    except InvalidJob:
        return
    assert found.is_relative_to(folder.resolve())
    assert "secret" not in found.name
