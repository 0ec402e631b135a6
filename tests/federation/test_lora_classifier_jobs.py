"""Promises of jobs whose classifiers have LoRAs: from the first row to the saved model, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import resolve
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run, run_some
from tests.models import class_logits, tiny

LORA = {"kind": "lora", "rank": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("look_ahead", "start"), [("exact", 1), ("none", "best-exit")])
def test_a_job_ends_with_the_model_that_was_evaluated(
    look_ahead: str, start: int | str, document: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Stopped after a round and resumed, it has the same bits."""
    document["chain"] |= {"look_ahead": look_ahead, "start": start, "head": "fitted", "adapter": LORA}
    # Phones train one of the three ranks.
    document["fleet"]["clients"] = [
        {"name": "laptop", "count": 2, "memory": "64MiB"},
        {"name": "phone", "count": 2, "memory": "64MiB", "rank": 1},
    ]
    job = a_job(document, tmp_path / "one")
    coordinator, straight = run(job, tmp_path / "one" / "log")
    records = CommitLog(tmp_path / "one" / "log").rounds()
    assert all(record.counted and not record.failed_turns for record in records)
    ranks = {turn.client_class: turn.rank for turn in records[0].turns}
    assert ranks == {"laptop": None, "phone": 1}
    assert {group.client_class: group.rank for group in coordinator.open().admitted} == ranks
    sent = {turn.client_class: turn.sent_bytes for turn in records[0].turns}
    head = sum(tensor.nbytes for name, tensor in straight.items() if name.startswith("head."))
    assert sent["laptop"] - head == 3 * (sent["phone"] - head) > 0
    coordinator.save(tmp_path)
    saved, finished = load_stack(tmp_path / "model"), coordinator.finish()
    assert saved.stack.is_lora
    assert saved.classes == job.classes
    batch = job.test.batch(np.arange(len(job.test)))
    found = class_logits(tiny_model_folder, saved.stack, batch.ids, batch.mask).argmax(1)
    assert float((found == batch.labels).double().mean()) == pytest.approx(finished.accuracy)

    run_some(a_job(document, tmp_path / "two"), tmp_path / "two" / "log", 1)
    _, resumed = run(a_job(document, tmp_path / "two"), tmp_path / "two" / "log")
    assert_same(straight, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter", "expected"),
    [
        ("albert", LORA, "chain.adapter.kind is 'lora'; expected 'bottleneck' for albert: no linear module is of one"),
        ("xlnet", LORA, "chain.adapter.kind is 'lora'; expected 'bottleneck' for xlnet: no linear module is of one"),
        (
            "bert",
            LORA | {"targets": ["q_proj"]},
            "chain.adapter.targets is 'q_proj'; expected a linear module for a LoRA: dense",
        ),
        ("deberta-v2", LORA | {"targets": ["pos_key_proj"]}, "for a LoRA: dense, key_proj, query_proj, value_proj"),
    ],
)
def test_a_model_on_which_there_can_be_no_such_lora(
    family: str, adapter: dict[str, Any], expected: str, document: dict[str, Any], tmp_path: Path
) -> None:
    tiny(family, tmp_path / "base", vocabulary=30522)
    AutoTokenizer.from_pretrained(resolve("builtin:minilm")).save_pretrained(tmp_path / "base")
    document["model"]["base"] = f"path:{tmp_path / 'base'}"
    document["chain"] |= {"look_ahead": "exact", "adapter": adapter}
    with pytest.raises(InvalidJob) as caught:
        a_job(document, tmp_path)
    assert expected in str(caught.value)
