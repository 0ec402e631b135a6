"""What is asked for without its extra says how to install it; what nobody asked for is left out, and the job goes on."""

import errno
import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from chainfed_ray import hub as base_model
from chainfed_ray.api.command import cli
from chainfed_ray.api.command.local_service import local_service
from chainfed_ray.api.report import pictures
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.cluster.tracing import check_tracing
from chainfed_ray.data import docstrings
from chainfed_ray.errors import InvalidJob, PackageMissing
from tests.builders import FINISHED, a_round, a_start

_NOTHING: Any = None


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)


def test_the_packaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(_: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr(base_model, "distribution", not_there)
    with pytest.raises(InvalidJob, match=r"model\.base is 'builtin:minilm'.*pip install 'chainfed-ray\[demo\]'"):
        base_model.resolve("builtin:minilm")


def test_the_packaged_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "find_spec", lambda name: None)
    with pytest.raises(InvalidJob, match=r"data\.train.*networkx.*pip install 'chainfed-ray\[demo,plots\]'"):
        docstrings.sources("networkx")


@pytest.mark.usefixtures("no_matplotlib")
def test_a_picture_of_a_plan_is_refused_before_anything_is_planned(document: dict[str, Any], tmp_path: Path) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(document))
    with pytest.raises(PackageMissing, match=r"matplotlib.*pip install 'chainfed-ray\[plots\]'"):
        cli.plan(job_file, picture=tmp_path / "plan.png")

    service = Service(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, {})
    with TestClient(create_app(service), "http://localhost") as client:
        refused = client.post("/v1/plan", json=document, headers={"Accept": "image/png"})
    assert refused.status_code == 501
    assert refused.json()["type"] == "urn:chainfed:problem:package-missing"
    assert "matplotlib" in refused.json()["detail"]


@pytest.mark.usefixtures("no_matplotlib")
def test_a_job_is_not_drawn_and_costs_nothing_else(tmp_path: Path) -> None:
    plots, words = pictures.draw_if_possible(tmp_path / "plots", _NOTHING, [], None, 0.8)
    assert plots == []
    assert not (tmp_path / "plots").exists()
    assert "chainfed-ray[plots]" in words


def test_a_plot_that_cannot_be_written_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file, where a folder is meant")
    plots, words = pictures.draw_if_possible(tmp_path / "plots", _NOTHING, [], None, 0.8)
    assert plots == []
    assert words.startswith(f"No plots were drawn in {tmp_path / 'plots'}: ")


def test_a_picture_that_cannot_be_written_costs_itself_alone(tmp_path: Path) -> None:
    words = pictures.write_if_possible(tmp_path / "nowhere" / "plan.png", lambda: b"a picture")
    assert words.startswith(f"No picture was written to {tmp_path / 'nowhere' / 'plan.png'}: ")
    assert pictures.write_if_possible(tmp_path / "plan.png", lambda: b"a picture").startswith("The picture is in ")
    assert (tmp_path / "plan.png").read_bytes() == b"a picture"


def test_a_disk_that_is_full_costs_the_plots_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills up in the middle of a plot."""

    def write(figure: object, path: Path, dpi: int) -> None:
        path.write_bytes(b"half of a plot")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write)
    started = a_start()
    plots, words = pictures.draw_if_possible(tmp_path / "plots", started, [a_round(0, started)], FINISHED, 0.8)
    assert plots == []
    assert words.startswith(f"No plots were drawn in {tmp_path / 'plots'}: [Errno 28] No space left on device")
    assert not list((tmp_path / "plots").iterdir()), "half a plot is none"


@pytest.mark.parametrize("missing", ["opentelemetry.sdk.trace", "opentelemetry.instrumentation.fastapi"])
def test_a_service_whose_traces_nobody_can_export_is_refused_before_it_starts(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    settings = Settings(Storage.at(tmp_path))
    check_tracing()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    with (
        pytest.raises(PackageMissing, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*pip install 'chainfed-ray\[tracing\]'"),
        local_service(settings, "127.0.0.1", 8123, tell=print),
    ):
        pass
    assert not (tmp_path / "service.log").exists(), "nothing was started"
