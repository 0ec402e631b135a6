"""Promise: the check of a storage says which folder cannot be written to, and leaves nothing behind."""

from pathlib import Path

import pytest

from chainfed_ray.cluster.storage import Settings, Storage, database_url
from chainfed_ray.errors import InvalidSetting
from chainfed_ray.reading import ReadingRules


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path / "data", scratch=tmp_path / "scratch")
    storage.check()
    storage.scratch_root.mkdir()
    storage.check()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    storage.root.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=str(storage.root)):
        storage.check()
    (tmp_path / "away").rename(storage.root)
    storage.scratch_root.rmdir()
    storage.scratch_root.write_text("a file where a folder is meant")
    with pytest.raises(NotADirectoryError, match=str(storage.scratch_root)):
        storage.check()


def test_folders_and_patterns_come_from_the_environment_and_go_on_to_other_processes(tmp_path: Path) -> None:
    given = {
        "CHAINFED_STORAGE": str(tmp_path),
        "CHAINFED_DATA_ROOTS": "/data/a:/data/b",
        "CHAINFED_HUB_ALLOW": "org/*, other/model",
        "CHAINFED_LOG": "json",
        "CHAINFED_SERVING_LEAST_REPLICAS": "0",
    }
    settings = Settings.from_environment(given)
    assert settings.reading == ReadingRules((Path("/data/a"), Path("/data/b")), None, ("org/*", "other/model"))
    assert settings.json_logs
    assert (settings.least_serving_replicas, settings.serving_replicas) == (0, 1)
    assert Settings.from_environment(settings.environment()) == settings
    for name, wrong in (
        ("CHAINFED_MODEL_ROOTS", "models"),
        ("CHAINFED_WITHOUT_KEYS", "all"),
        ("CHAINFED_LOG", "xml"),
        ("CHAINFED_SERVING_LEAST_REPLICAS", "2"),
        ("CHAINFED_SERVING_LEAST_REPLICAS", "-1"),
    ):
        with pytest.raises(InvalidSetting, match=name):
            Settings.from_environment({**given, name: wrong})


def test_a_space_in_a_url_is_one_and_a_path_is_what_it_is(tmp_path: Path) -> None:
    for given, folder in ((f"file://{tmp_path}/my%20data", "my data"), (f"{tmp_path}/my%20data", "my%20data")):
        assert Settings.from_environment({"CHAINFED_STORAGE": given}).storage.root == tmp_path / folder
        assert database_url({"CHAINFED_STORAGE": given}) == f"sqlite:///{tmp_path / folder}/chainfed.db"
    assert database_url({"CHAINFED_STORAGE": str(tmp_path / "none")}) == f"sqlite:///{tmp_path}/none/chainfed.db"
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_made_for_a_service_is_its_users_alone(tmp_path: Path) -> None:
    """Rows and models of all tenants are in it. One that its owner has made stays as it is."""
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    for folder, mode in ((there, 0o755), (tmp_path / "new", 0o700)):
        assert Storage.at(folder).root.stat().st_mode & 0o777 == mode
