"""Promises of the reading rules: a job reads what is in its folders, whatever its paths lead to, and learns of nothing else."""

import importlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from errno import (
    EACCES,
    EHOSTDOWN,
    EINVAL,
    EIO,
    ENAMETOOLONG,
    ENODEV,
    ENOTCONN,
    EPERM,
    ESTALE,
    ETIMEDOUT,
)
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from chainfed_ray.data.sources import read_table
from chainfed_ray.errors import InvalidJob, UnsupportedModel
from chainfed_ray.hub import configuration, resolve, tokenizer
from chainfed_ray.model.source import check_generation
from chainfed_ray.planning.base_model import about_the_model
from chainfed_ray.reading import (
    EVERYTHING,
    OF_DISKS,
    OWN_UPLOAD,
    HubAway,
    NotAllowed,
    ReadingRules,
    UploadedFile,
    check_repository,
    data_file,
    reading_by,
    reading_from,
    trouble_behind,
    try_its_disk,
    try_to_read,
    what_fails,
)
from chainfed_ray.streaming.checkpoint import Checkpoint

ROWS = "text\na\nb\n"


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder in which data and models may be, and one beside it; this process reads by that rule."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "rows.csv").write_text(ROWS)
    with reading_by(ReadingRules((inside,), (inside,), ("org/*",))):
        yield inside, outside


def refusal(source: str) -> str:
    with pytest.raises(InvalidJob) as refused:
        read_table("data.train", source, "train")
    (problem,) = refused.value.problems
    assert problem.field == "data.train"
    return problem.expected


def test_files_of_a_root_are_read_under_every_name_that_leads_to_them(roots: tuple[Path, Path]) -> None:
    inside, outside = roots
    (outside / "way-in.csv").symlink_to(inside / "rows.csv")
    (inside / "link.csv").symlink_to("rows.csv")
    for path in (inside, inside / "rows.csv", inside / "link.csv", outside / "way-in.csv", inside / ".." / "inside"):
        assert len(read_table("data.train", f"path:{path}", "train")) in (2, 4)


def test_what_leads_out_is_refused_in_the_same_words_whether_it_is_there_or_not(roots: tuple[Path, Path]) -> None:
    inside, outside = roots
    (inside / "out.csv").symlink_to(outside / "rows.csv")
    (inside / "nowhere.csv").symlink_to(outside / "none.csv")
    (inside / "folder").symlink_to(outside)
    (inside / "circle.csv").symlink_to(inside / "circle.csv")
    (outside / "secret").mkdir(mode=0)
    paths = [
        outside, outside / "rows.csv", outside / "none.csv", outside / "secret" / "x.csv", Path("/etc/passwd"),
        Path("/proc/self/environ"), inside / ".." / "outside" / "rows.csv", inside / ".." / "outside" / "none.csv",
        inside / "out.csv", inside / "nowhere.csv", inside / "folder" / "rows.csv", inside / "circle.csv",
        Path(f"{inside}-2/rows.csv"), Path("rows.csv"), Path("a\0b"), Path("x" * 5000),
    ]  # fmt: skip
    told = {refusal(f"path:{path}") for path in paths}
    assert len(told) == 1, told
    assert "CHAINFED_DATA_ROOTS" in told.pop()


def test_a_link_in_a_folder_of_files_is_looked_at_as_well(roots: tuple[Path, Path]) -> None:
    inside, outside = roots
    (inside / "within.csv").symlink_to(inside / "rows.csv")
    (inside / "nowhere.csv").symlink_to(inside / "none.csv")
    assert len(read_table("data.train", f"path:{inside}", "train")) == 4
    (outside / "folder").mkdir()
    told = set()
    for target in ("rows.csv", "none.csv", "folder", "none/rows.csv", "rows.csv/none"):
        for name in ("more.csv", "more"):
            (inside / name).symlink_to(outside / target)
            told.add(refusal(f"path:{inside}"))
            (inside / name).unlink()
    assert len(told) == 1, told
    assert "CHAINFED_DATA_ROOTS" in told.pop()


def test_what_is_no_ordinary_file_is_not_opened(roots: tuple[Path, Path]) -> None:
    inside, _ = roots
    os.mkfifo(inside / "pipe.csv")
    assert "CHAINFED_DATA_ROOTS" in refusal(f"path:{inside / 'pipe.csv'}")
    with pytest.raises(NotAllowed), data_file(inside / "pipe.csv"):
        pass
    with reading_by(ReadingRules((Path("/dev"),))):
        assert "CHAINFED_DATA_ROOTS" in refusal("path:/dev/zero")


def test_the_file_that_was_looked_at_is_the_one_that_is_read(roots: tuple[Path, Path]) -> None:
    """A link that takes its place in the meantime leads nowhere else."""
    inside, outside = roots
    (outside / "rows.csv").write_text("secret\n")
    with data_file(inside / "rows.csv") as own:
        (inside / "rows.csv").unlink()
        (inside / "rows.csv").symlink_to(outside / "rows.csv")
        assert own.read_text() == ROWS


def test_what_is_missing_in_a_root_may_be_told(roots: tuple[Path, Path]) -> None:
    inside, _ = roots
    assert "a file or folder that exists" in refusal(f"path:{inside}/none.csv")


def test_a_root_that_is_empty_or_missing_is_a_disk_that_is_away(roots: tuple[Path, Path]) -> None:
    """Whoever named a file in it made no mistake. Beside it, and beside other roots, everything is as before."""
    inside, outside = roots
    (inside / "rows.csv").unlink()
    for _ in range(2):
        for key, read in (("data.train", partial(read_table, "data.train")), ("model.base", resolve)):
            ask = partial(read, f"path:{inside}/rows.csv", *(["train"] if key == "data.train" else []))
            with pytest.raises(OSError, match="not mounted") as away:
                ask()
            assert (away.value.errno, away.value.filename) == (ENODEV, f"path:{inside}/rows.csv"), key
            with pytest.raises(OSError, match="not mounted"):
                read(f"path:{inside}", *(["train"] if key == "data.train" else []))
        assert "CHAINFED_DATA_ROOTS" in refusal(f"path:{outside}/none.csv")
        if inside.exists():
            inside.rmdir()
    with reading_by(ReadingRules((outside, inside))):
        assert "a file or folder that exists" in refusal(f"path:{outside}/none.csv")


def test_a_root_may_be_a_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)
    with reading_by(ReadingRules((rows,))):
        assert len(read_table("data.train", f"path:{rows}", "train")) == 2
        try_its_disk(rows)


@pytest.mark.parametrize("order", [1, -1])
def test_of_roots_in_each_other_the_deepest_is_the_disk(tmp_path: Path, order: int) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    inner = tmp_path / "mounted"
    inner.mkdir()
    with reading_by(ReadingRules((tmp_path, inner)[::order])):
        assert "a file or folder that exists" in refusal(f"path:{tmp_path}/none.csv")
        with pytest.raises(OSError, match="not mounted"):
            read_table("data.train", f"path:{inner}/none.csv", "train")


AWAY = [EIO, ETIMEDOUT, EHOSTDOWN, ENOTCONN, ESTALE, ENODEV]
OF_THE_USER = [EACCES, EPERM, ENAMETOOLONG, EINVAL]
WAYS_IN = ("os.open", "os.stat", "os.scandir", "io.open", "builtins.open")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Let one of the ways into a folder raise an error of the system with a number."""

    def fail(number: int, way: str) -> None:
        for name in WAYS_IN:
            module, _, function = name.partition(".")
            before = getattr(importlib.import_module(module), function)

            def instead(
                path: Any = ".", *rest: Any, before: Any = before, fails: bool = name == way, **more: Any
            ) -> Any:
                if fails and isinstance(path, str | Path) and str(path).startswith(str(tmp_path)):
                    raise OSError(number, os.strerror(number))
                return before(path, *rest, **more)

            monkeypatch.setattr(name, instead)

    return fail


@pytest.mark.parametrize("way", ["os.stat", "io.open"])
@pytest.mark.parametrize("number", AWAY + OF_THE_USER)
def test_a_disk_that_does_not_work_is_told_from_a_mistake(
    number: int, way: str, tmp_path: Path, failing: Callable[[int, str], None], tiny_model_folder: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    pairs: list[tuple[str, Callable[[], object]]] = [
        ("data.train", lambda: read_table("data.train", f"path:{rows}", "train")),
        ("model.base", lambda: configured(f"path:{model}")),
    ]
    failing(number, way)
    for field, read in pairs:
        if number in AWAY:
            with pytest.raises(OSError, match=re.escape(os.strerror(number))) as away:
                read()
            assert (away.value.errno, str(tmp_path) in str(away.value.filename)) == (number, True), field
        else:
            with pytest.raises(InvalidJob) as refused:
                read()
            assert refused.value.problems[0].field == field


def configured(base: str) -> None:
    with about_the_model(base):
        configuration(resolve(base))


@pytest.mark.parametrize("number", [EIO, EACCES])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer_config.json", "config.json", "generation_config.json"]
)
def test_so_it_is_with_each_file_of_a_model(
    file: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "generation_config.json").write_text("{}")
    opened, os_open = io.open, os.open

    def instead(path: Any, *rest: Any, of: Any, **more: Any) -> Any:
        if isinstance(path, str | Path) and Path(path) == folder / file:
            raise OSError(number, os.strerror(number))
        return of(path, *rest, **more)

    monkeypatch.setattr("io.open", partial(instead, of=opened))
    monkeypatch.setattr("builtins.open", partial(instead, of=opened))
    monkeypatch.setattr("os.open", partial(instead, of=os_open))

    def read() -> None:
        with about_the_model(f"path:{folder}"):
            tokenizer(f"path:{folder}", folder)
            configuration(folder)
            check_generation(folder)
            Checkpoint(folder).close()

    with pytest.raises(OSError if number == EIO else InvalidJob) as raised:
        read()
    if number == EIO:
        assert isinstance(raised.value, OSError)
        assert raised.value.errno == EIO


def test_what_a_library_in_rust_says_of_a_disk_is_read_as_well() -> None:
    own = partial(reading_from, "path:model", lambda error: UnsupportedModel("model", str(error)))
    for kind in (Exception, SafetensorError):
        with pytest.raises(OSError, match="Input/output error") as raised, own():
            raise kind("I/O error: Input/output error (os error 5)")
        assert (raised.value.errno, raised.value.filename) == (EIO, "path:model")
        for words in ("No such file or directory (os error 2)", "it says (os error 5) of itself"):
            with pytest.raises(UnsupportedModel, match="os error"), own():
                raise kind(words)


@pytest.mark.parametrize("words", ["(os error 110)", "(os error 5)"])
def test_what_a_user_s_file_says_of_a_disk_is_not(words: str, tmp_path: Path) -> None:
    """An error that quotes it has no trouble behind it: a job would wait for its file without an end."""
    rows = tmp_path / "rows.csv"
    rows.write_text(f"a,{words},{words}\n1,2,3\n")
    with pytest.raises(InvalidJob, match="os error"):
        read_table("data.train", f"path:{rows}", "train")
    for error in (InvalidJob.at("data.label", "x", f"one of a, {words}"), ValueError(f"a header {words}")):
        assert trouble_behind(error) is None


def test_the_bytes_of_an_upload_that_are_gone_are_no_mistake_of_whoever_names_it(tmp_path: Path) -> None:
    with reading_by(ReadingRules(uploads={"one": UploadedFile("rows.csv", tmp_path / "one")})):
        with pytest.raises(OSError, match="the bytes of the upload are not there") as gone:
            read_table("data.train", "upload:one", "train")
        assert gone.value.filename == "upload:one", "and not where the service keeps it"
        assert OWN_UPLOAD in refusal("upload:two")


def test_a_trouble_names_what_the_job_named(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened once, and read under a name that leads to no other."""

    def opened(path: Path, *rest: Any) -> NoReturn:
        raise OSError(EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="Input/output error") as away:
        read_table("data.train", f"path:{roots[0]}/rows.csv", "train")
    assert away.value.filename == f"path:{roots[0]}/rows.csv"


@pytest.mark.parametrize("of_model", [True, False])
def test_the_roots_of_one_kind_are_enough_to_try_its_disk(of_model: bool, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for try_ in (try_to_read, try_its_disk):
        with reading_by(ReadingRules(None, (inside,)) if of_model else ReadingRules((inside,))):
            try_(inside / "rows.csv", not of_model)
            with pytest.raises(OSError, match="not mounted"):
                try_(inside / "rows.csv", of_model)


@pytest.mark.parametrize("by_root", [True, False])
def test_a_file_that_alone_is_broken_is_told_from_a_disk_that_is(
    by_root: bool, tmp_path: Path, failing: Callable[[int, str], None]
) -> None:
    rows = tmp_path / "folder" / "rows.csv"
    rows.parent.mkdir()
    rows.write_text(ROWS)
    with reading_by(ReadingRules((tmp_path,) if by_root else None)):
        failing(EIO, "os.stat")
        try_its_disk(rows)
        with pytest.raises(OSError, match="Input/output error"):
            try_to_read(rows)
        failing(EIO, "os.scandir")
        with pytest.raises(OSError, match="Input/output error"):
            try_its_disk(rows)


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionError, ConnectionResetError])
def test_a_library_that_says_no_number_of_a_connection_is_understood(kind: type[OSError]) -> None:
    own = partial(reading_from, "path:model", lambda error: UnsupportedModel("model", str(error)))
    with pytest.raises(OSError, match="it took too long") as raised, own():
        raise kind("it took too long")
    assert (raised.value.errno in OF_DISKS, raised.value.filename) == (True, "path:model")


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"status {status}", response=SimpleNamespace(status_code=status, headers={}, request=None))


def after(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class TransportError(Exception):
    """As httpx calls it, whichever version of it the hub's library has."""


class ConnectTimeout(TransportError):
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(503), "status 503"), (answered(429), "status 429"), (ConnectTimeout(), "ConnectTimeout"),
        (after(LocalEntryNotFoundError("cannot find the snapshot"), answered(500)), "status 500"),
        (after(ConnectionError("could not reach it"), ConnectTimeout()), "ConnectTimeout"),
        (TimeoutError("too late"), "too late"), (answered(404), None), (answered(401), None),
        (after(ConnectionError("could not reach it"), OfflineModeIsEnabled("offline")), None),
    ],
)  # fmt: skip
def test_a_hub_that_does_not_answer_is_no_mistake_of_the_user_s(
    error: Exception, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told in words that name no disk, and one that says what is wrong is told to the user."""

    def asked(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("chainfed_ray.hub.snapshot_download", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)
    for user in ("hub", "data.sources"):
        monkeypatch.setattr(f"chainfed_ray.{user}.hub_is_reachable", lambda: True)
    for read in (lambda: resolve("hf:org/x"), lambda: read_table("data.train", "hf:org/x", "train")):
        if words is None:
            with pytest.raises(InvalidJob):
                read()
            continue
        with pytest.raises(HubAway) as away:
            read()
        copy = pickle.loads(pickle.dumps(away.value))
        assert (copy.errno in OF_DISKS, what_fails(copy)) == (True, "the hub")
        assert str(copy) == f"the hub does not answer ({words}): hf:org/x"


def test_what_a_job_reads_can_be_tried(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "rows.csv").write_text(ROWS)
    try_to_read(outside / "none.csv")  # that is not the trouble of a disk
    with reading_by(ReadingRules((inside,), ())):
        try_to_read(inside / "rows.csv")
        try_to_read(inside)
        try_to_read(outside / "none.csv")
        (inside / "rows.csv").unlink()
        with pytest.raises(OSError, match="not mounted"):
            try_to_read(inside / "rows.csv")


def test_models_are_in_their_roots_with_all_their_files(roots: tuple[Path, Path]) -> None:
    inside, outside = roots
    for folder in (inside, outside):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
    assert resolve(f"path:{inside}") == inside
    told = set()
    (inside / "link").symlink_to(outside)
    (outside / "pickle.gguf").touch()
    for path in (outside, outside / "none", inside / "link", outside / "pickle.gguf", outside / "none.gguf"):
        with pytest.raises(InvalidJob) as refused:
            resolve(f"path:{path}")
        told.add(refused.value.problems[0].expected)
    assert len(told) == 1, told
    assert "CHAINFED_MODEL_ROOTS" in told.pop()
    (inside / "link").unlink()
    (inside / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(InvalidJob, match="CHAINFED_MODEL_ROOTS"):
        resolve(f"path:{inside}")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("org/rows", True), ("org/rows.v2-x_1", True), ("other/rows", False), ("Org/rows", False), ("csv", False),
        ("org", False), ("org/a/b", False), ("/etc", False), ("../org/x", False), ("org/..", False), ("", False),
        ("org/rows\n", False),
    ],
)  # fmt: skip
def test_the_hub_is_read_by_patterns(roots: tuple[Path, Path], name: str, allowed: bool) -> None:
    if allowed:
        check_repository(name)
    else:
        with pytest.raises(NotAllowed):
            check_repository(name)
        for refused in (
            lambda: read_table("data.train", f"hf:{name}", "train"),
            lambda: resolve(f"hf:{name}"),
        ):
            with pytest.raises(InvalidJob):
                refused()


def test_a_folder_here_is_no_repository(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of data sets would read it in the repository's place."""
    monkeypatch.chdir(roots[1])
    Path("org/rows").mkdir(parents=True)
    with pytest.raises(NotAllowed):
        check_repository("org/rows")


def test_without_rules_everything_is_read_and_closed_rules_allow_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    assert len(read_table("data.train", f"path:{tmp_path}/rows.csv", "train")) == 2
    with reading_by(EVERYTHING.closed()):
        assert "CHAINFED_DATA_ROOTS" in refusal(f"path:{tmp_path}/rows.csv")
        with pytest.raises(NotAllowed):
            check_repository("org/rows")
    assert len(read_table("data.train", f"path:{tmp_path}/rows.csv", "train")) == 2
    assert ReadingRules((tmp_path,), None, ("a/*",)).closed() == ReadingRules((tmp_path,), (), ("a/*",))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_path_is_refused_in_words(path: str) -> None:
    with reading_by(EVERYTHING.closed()):
        assert refusal(f"path:{path}")


def test_a_shard_is_a_file_of_its_folder(tmp_path: Path) -> None:
    for name in ("../x.safetensors", "/etc/passwd", "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
        with pytest.raises(UnsupportedModel, match="no file of this folder"):
            Checkpoint(tmp_path)
