"""The example of a language model, as its users run it, only shorter: it learns, and the chain lowers its perplexity."""

from pathlib import Path

import pytest
import yaml

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.evaluation import streamed
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from examples.decoder import make
from tests.project import ROOT


@pytest.mark.slow
def test_held_out_perplexity_falls_along_the_chain(tmp_path: Path) -> None:
    told = make(tmp_path, libraries=("networkx",), steps=40, rows=200)
    document = yaml.safe_load(
        (ROOT / "examples" / "decoder.yaml").read_text().replace("path:decoder", f"path:{tmp_path}")
    )
    document["rounds"] |= {"total": 3, "clients": 2, "local_steps": 6}
    job = prepare_job(parse_job(document), tmp_path / "scratch")
    assert {excluded.client_class for excluded, _ in job.admission.excluded} == {"watch"}

    # A new adapter changes nothing, so this is the base model; the script has told the same of it.
    untuned = streamed(job).whole(AdapterStack.new([job.layers - 1], job.hidden, 64, None, seed=0))
    assert untuned.perplexity == pytest.approx(told["validation"], rel=1e-4)

    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    ends = [record for record in coordinator.rounds() if record.ended]
    cut = [record.held_out_loss for record in ends]
    whole = [record.evaluation.perplexity for record in ends if record.evaluation]
    assert len(cut) == len(whole) == 3
    assert cut == sorted(cut, reverse=True)  # type: ignore[type-var]
    assert whole == sorted(whole, reverse=True)  # type: ignore[type-var]
    assert whole[-1] < 0.9 * untuned.perplexity  # type: ignore[operator]
    job_finished = coordinator.finish().evaluation
    assert job_finished is not None
    assert job_finished.perplexity < 0.9 * told["test"]  # type: ignore[operator]
