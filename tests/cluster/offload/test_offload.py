"""Promises of evaluation with the weights on disk: it is plain evaluation, a failure costs one of them, and nothing is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chainfed_ray.activity import Activity, Listener, no_listener
from chainfed_ray.cluster.offload.door import make_disk_evaluator
from chainfed_ray.cluster.offload.evaluator import DiskEvaluator, make_evaluator
from chainfed_ray.cluster.offload.footprint import offload_footprint
from chainfed_ray.cluster.offload.messages import OFFLOAD, Reason
from chainfed_ray.cluster.offload.model import worker_batches
from chainfed_ray.cluster.offload.run import why_over
from chainfed_ray.cluster.offload.worker import why
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import EvaluationFailed
from chainfed_ray.evaluation.evaluator import Evaluated
from chainfed_ray.evaluation.predictions import Predictions, predict
from chainfed_ray.federation.evaluation import server_evaluation
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import known_profile_of
from chainfed_ray.model.forward import added
from chainfed_ray.model.pooling import LayerStates, mean_over_tokens
from chainfed_ray.model.source import ModelSource
from tests.builders import a_job
from tests.clusters import needs_ops
from tests.watching import command_of, processes_below, wait_for

_BATCH, _CLASSES = 4, 3
_ENCODERS = ("bert",)
# A matrix of 512 × 512 numbers in float32 is just large enough for DeepSpeed to keep it on the disk.
_SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder and a decoder of random weights, with matrices that go to the disk and others that do not."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "bert": AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=200, **_SIZES)),
    }
    experts = {"num_key_value_heads": 4, "num_local_experts": 4, **_SIZES, "intermediate_size": 512}
    made["mixtral"] = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=200, **experts))
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def examples_of(family: str, count: int = 21) -> Examples:
    generator = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(generator.integers(5, 17, count))])
    ids = generator.integers(3, 200, int(offsets[-1])).astype(np.int32)
    made = Examples(ids, offsets, generator.integers(0, _CLASSES, count))
    return made if family in _ENCODERS else replace(made, targets=made.every_token)


def stack_of(family: str, seed: int) -> AdapterStack:
    """One that does something: fresh adapters are the identity. That of a decoder has LoRAs inside its layers."""
    classes = _CLASSES if family in _ENCODERS else None
    if family not in _ENCODERS:
        stack = AdapterStack.new_lora({layer: {"self_attn.q_proj": (512, 512)} for layer in (1, 2)}, 16, seed)
    else:
        stack = AdapterStack.new(range(1, 3), 512, 16, classes, seed, head_layers=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stack


@torch.no_grad()
def plainly(base: ModelSource, stack: AdapterStack, examples: Examples) -> Predictions:
    """The same with every layer in memory."""
    blocks = Blocks(base.folder, base.dtype)
    layers, matrices = [blocks.load_layer(index) for index in range(blocks.num_layers)], blocks.reader()
    whole = Predictions.blank(len(examples))
    for indices in examples.by_length(_BATCH):
        batch = examples.batch(indices)
        hidden, calls = blocks.embed(batch.ids, batch.mask)
        means = []
        for index, layer in enumerate(layers):
            with added(layer, stack.inside(index)):
                hidden = blocks.run(layer, hidden, calls[index])
            if adapter := stack.after(index):
                hidden = adapter(hidden)
            means.append(mean_over_tokens(hidden, batch.mask))
        states = LayerStates(hidden, torch.stack(means[:-1], 1))
        whole.put(torch.from_numpy(indices), predict(blocks, stack, states, batch, matrices))
    matrices.close()
    blocks.close()
    return whole


def assert_equal(found: Predictions, expected: Predictions) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=1e-6)
    for name in ("counts", "correct", "classes"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@contextmanager
def evaluator(
    base: ModelSource, family: str, workers: int = 1, listen: Listener = no_listener
) -> Iterator[DiskEvaluator]:
    blocks = Blocks(base.folder, base.dtype)
    costs = known_profile_of(blocks, 16, _CLASSES if family in _ENCODERS else None)
    blocks.close()
    sets = {"test": examples_of(family)}
    made = make_evaluator(base, costs, sets, workers=workers, batch_size=_BATCH, listen=listen)
    assert isinstance(made, DiskEvaluator), made
    try:
        yield made
    finally:
        made.close()


def workers() -> list[psutil.Process]:
    """The processes of Ray Train's workers, and of what brings them orders."""
    return processes_below("RayTrainWorker", "TrainController", "EvaluationRun", "PlacementGroupCleaner")


def training(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if "RayTrainWorker" in command_of(process)]


def is_gone(base: ModelSource) -> bool:
    return not (base.scratch / OFFLOAD).exists() or not list((base.scratch / OFFLOAD).rglob("*.swp"))


def assert_plain(found: list[Evaluated], base: ModelSource, family: str, count: int) -> None:
    """The evaluations of two stacks by ``count`` processes are plain ones, within the bytes that were planned."""
    examples = examples_of(family)
    for seed, evaluated in enumerate(found):
        assert_equal(evaluated.predictions, plainly(base, stack_of(family, seed), examples))
        assert evaluated.forward_seconds <= evaluated.seconds
        assert evaluated.peak_bytes
        assert evaluated.planned_bytes
        assert evaluated.peak_bytes <= evaluated.planned_bytes
        assert evaluated.processes == count
        assert evaluated.process_bytes
        assert evaluated.process_bytes > 100 * 2**20, "with its libraries"
    assert not torch.equal(found[0].predictions.losses, found[1].predictions.losses)


@ray.remote(num_cpus=0)
class Owner:
    """Evaluates stacks of the encoder, as a coordinator does, until it is killed."""

    def __init__(self, base: ModelSource) -> None:
        self._heard: list[Activity] = []
        self._open = evaluator(base, "bert", listen=self._heard.append)
        self._evaluator = self._open.__enter__()

    def evaluate(self, seed: int) -> Evaluated:
        return self._evaluator.evaluate(stack_of("bert", seed), "test")

    def heard(self) -> list[Activity]:
        return self._heard

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@needs_ops
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_it_is_plain_evaluation_and_nothing_of_it_outlives_its_owner(models: dict[str, Path], tmp_path: Path) -> None:
    """Its worker is killed while it loads the model, which costs an evaluation; at the end its owner is killed."""
    base = ModelSource(models["bert"], torch.float32, tmp_path)
    available = ray.available_resources()["memory"]  # type: ignore[no-untyped-call]
    made: Any = Owner
    owner = made.remote(base)
    first = owner.evaluate.remote(0)
    wait_for(lambda: list(tmp_path.rglob("*.swp")), "model on the disk")
    training(workers())[0].kill()
    with pytest.raises(EvaluationFailed, match="failed: the process of a worker ended"):
        ray.get(first, timeout=120)
    wait_for(lambda: is_gone(base), "free disk")
    before = len(ray.get(owner.heard.remote()))

    found, processes = [], []
    for seed in (0, 1):
        found.append(ray.get(owner.evaluate.remote(seed), timeout=120))
        processes.append([process.pid for process in training(workers())])
        assert list(tmp_path.rglob("*.swp")), "some of the model is on the disk"
    assert_plain(found, base, "bert", 1)
    assert processes[0] == processes[1], "the model was loaded once"
    heard = ray.get(owner.heard.remote())[before:]
    assert heard[0].what == "starting the processes of DeepSpeed"
    assert heard[-1].what == "evaluating the whole model (test)"
    assert all(activity.total is None or 0 <= activity.done <= activity.total for activity in heard)

    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(owner.die.remote(), timeout=120)
    wait_for(lambda: not workers() and is_gone(base), "end of the workers")
    wait_for(lambda: ray.available_resources()["memory"] >= available, "free memory")  # type: ignore[no-untyped-call]


@needs_ops
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_processes_of_a_mixture_of_experts(models: dict[str, Path], tmp_path: Path) -> None:
    """One of them is killed between two orders, which costs one evaluation."""
    base, family = ModelSource(models["mixtral"], torch.bfloat16, tmp_path), "mixtral"
    with evaluator(base, family, 2) as offloaded:
        found = [offloaded.evaluate(stack_of(family, seed), "test") for seed in (0, 1)]
        assert len(training(workers())) == 2
        assert list(tmp_path.rglob("*.swp")), "some of the model is on the disk"
        training(workers())[0].kill()
        with pytest.raises(EvaluationFailed, match="failed: the process of a worker ended") as failed:
            offloaded.evaluate(stack_of(family, 0), "test")
    assert len(str(failed.value).splitlines()) == 1, "the one that was killed is the reason, not what the other noticed"
    assert_plain(found, base, family, 2)
    wait_for(lambda: is_gone(base), "free disk")
    wait_for(lambda: not workers(), "end of the workers")


_COMPLAINT = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:24223: Connection reset by peer\n"
    "This may indicate a possible application crash on rank 0 or a network set up issue."
)


class GroupError(Exception):
    """As Ray Train's error of a group of workers."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("the group failed\nand so on")
        self.worker_failures = dict(enumerate(failures))


@pytest.mark.slow
def test_the_first_cause_is_the_reason() -> None:
    complaint, own = why(RuntimeError(_COMPLAINT)), why(OSError(28, "the disk is full"))
    assert complaint.peer_failed
    assert own == Reason("the disk is full", peer_failed=False)
    assert why(RuntimeError("[some/file.cpp:12] it is wrong\nsecond line")).words == "it is wrong"
    assert why(ValueError()).words == "ValueError"
    UserExceptionWithTraceback = type("UserExceptionWithTraceback", (Exception,), {})
    died = GroupError(UserExceptionWithTraceback(), ValueError())
    assert why_over([complaint, own], died) == "the disk is full"
    assert why_over([complaint], died).startswith("the process of a worker ended (ValueError)")
    assert why_over([complaint], GroupError(UserExceptionWithTraceback())).startswith("the process of a worker ended;")
    assert why_over([], ValueError("a\nb")) == "Ray Train could not go on: a"
    assert why_over([], None) == "the run ended"


@pytest.mark.slow
def test_what_only_passes_work_on_loads_no_torch() -> None:
    words = (
        "import sys, chainfed_ray.cluster.offload.run;"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_machine_that_cannot_be_looked_at_is_judged_by_torch(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(scratch: Path) -> Any:
        raise OSError(30, "Read-only file system", str(scratch))

    monkeypatch.setattr("chainfed_ray.cluster.offload.evaluator.look", unreadable)
    document["evaluation"] = {"engine": "deepspeed"}
    made = server_evaluation(a_job(document, tmp_path), on_disk=make_disk_evaluator)
    assert made.evaluator.startswith("torch (in place of deepspeed: this machine could not be checked: Read-only")


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of half a MiB in ``folder``; False where it may not be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


_LOADING = """
import resource, sys, torch
from pathlib import Path
from chainfed_ray.model.source import ModelSource
from chainfed_ray.cluster.offload.model import OffloadedModel
from chainfed_ray.cluster.offload.build import ops_folder
model, folder, bound = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if bound:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bound, bound))
try:
    OffloadedModel(ModelSource(model, torch.float32, folder), folder / "nvme", ops_folder(), lambda: None)
except OSError as error:
    print(error)
"""


@needs_ops
@pytest.mark.slow
def test_a_disk_that_fills_is_an_error_in_words_and_no_abort(models: dict[str, Path], tmp_path: Path) -> None:
    """As the layers are written. Where nothing may be mounted, the kernel bounds the length of a file instead."""
    with small_disk(tmp_path / "disk") as mounted:
        arguments = [str(models["bert"]), str(tmp_path / "disk"), "0" if mounted else str(2**19)]
        done = subprocess.run([sys.executable, "-c", _LOADING, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "has no room for 4MiB more" in done.stdout
        wait_for(lambda: not (tmp_path / "disk" / "nvme").exists(), "free disk")


@needs_ops
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_disk_too_small_fails_the_evaluation_in_words(models: dict[str, Path], tmp_path: Path) -> None:
    """The workers may be on another machine than their owner, and look for themselves."""
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("a small disk may not be mounted here")
        base = ModelSource(models["bert"], torch.float32, tmp_path / "disk")
        sets = {"test": examples_of("bert")}
        both = DiskEvaluator(base, _SIZES["num_hidden_layers"], sets, 64 * 2**20, workers=2, batch_size=_BATCH)
        with pytest.raises(EvaluationFailed, match=r"disk: 512KiB free in .*, 36\.\dMiB needed"):
            both.evaluate(stack_of("bert", 0), "test")  # the disk of one machine is for both
        blocks = Blocks(base.folder, base.dtype)
        refused = make_evaluator(base, known_profile_of(blocks, 16, _CLASSES), {"test": examples_of("bert")})
        blocks.close()
        assert isinstance(refused, str)
        assert refused.startswith("disk: ")


def test_every_process_runs_as_many_batches_and_each_example_counts_once() -> None:
    examples = examples_of("bert", 21)  # six batches
    for count in (1, 2, 4, 7):
        dealt = [worker_batches(examples, _BATCH, rank, count) for rank in range(count)]
        assert len({len(share) for share in dealt}) == 1
        counted = [index for share in dealt for indices, counts in share if counts for index in indices.tolist()]
        assert sorted(counted) == list(range(21))


@pytest.mark.slow
def test_more_processes_lock_less_memory_each(models: dict[str, Path]) -> None:
    blocks = Blocks(models["bert"], torch.float32)
    costs = known_profile_of(blocks, 16, _CLASSES)
    alone, shared = (offload_footprint(blocks, costs, count, _BATCH, 16) for count in (1, 2))
    blocks.close()
    matrix = 512 * 2048 * 4
    assert matrix <= alone.buffers < 1.1 * matrix
    assert shared.buffers < alone.buffers
    assert alone.gathered == 0
    assert shared.gathered >= 2 * matrix
