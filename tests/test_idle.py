"""What processes load: a client's no more than its turns need, those of the API and of the controller no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

# Those of the server, of tools, of other ways to run a model; and what others would load along with Hugging Face's code.
NOT_LOADED = {
    "accelerate", "chainfed_ray.api", "chainfed_ray.data.sources", "chainfed_ray.evaluation",
    "chainfed_ray.federation.coordinator", "chainfed_ray.planning.prepare", "chainfed_ray.model.trace",
    "chainfed_ray.serving", "datasets", "deepspeed", "fastapi", "gguf", "httpx", "matplotlib", "networkx", "opacus",
    "pandas", "peft", "ray.data", "ray.serve", "ray.train", "scipy", "sentence_transformers", "sklearn", "sqlalchemy",
    "sympy.core", "torch._dynamo.convert_frame", "torch.distributed.tensor", "torch.utils.tensorboard", "torchvision",
    "transformers.trainer", "typer",
}  # fmt: skip

_IDLE = """
import sys
from pathlib import Path

import pytest

import torch

from chainfed_ray.model.source import ModelSource
import chainfed_ray.cluster.pool.actors
from chainfed_ray.client.turn import ready

ready(ModelSource(Path(sys.argv[1]), torch.float32, Path(sys.argv[2])))
print(*sys.modules)
"""


@pytest.mark.slow
def test_an_idle_client_has_loaded_only_what_its_turns_need(tiny_model_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IDLE, str(tiny_model_folder), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"ray", "torch", "transformers.models.bert.modeling_bert"} <= loaded
    assert not loaded & NOT_LOADED


@pytest.mark.slow
@pytest.mark.parametrize("module", ["api.serve.deployment", "cluster.jobs.coordinators"])
def test_who_only_passes_work_on_loads_no_torch(module: str) -> None:
    """There are three such processes in a service, and it waits for them to start."""
    code = f"import chainfed_ray.{module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.split())


@pytest.mark.slow
def test_a_program_that_asks_the_service_loads_nothing_of_the_server() -> None:
    """Also once it has looked at an answer, for which the models of all answers are loaded."""
    code = """
import inspect, sys
from chainfed_ray.api.sdk import calls, clients, exchanges

models = [model for part in (calls, exchanges) for _, model in inspect.getmembers(part) if isinstance(model, calls.Model)]
assert len(models) > 15
for model in models:
    if model.module:
        __import__(f"chainfed_ray.{model.module}")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"chainfed_ray.api.schemas.jobs", "chainfed_ray.api.schemas.completions"} <= loaded
    assert not {"fastapi", "starlette", "ray", "sqlalchemy", "torch", "numpy", "chainfed_ray.cluster"} & loaded
