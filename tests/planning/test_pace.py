"""Promises of what is timed for a dry run: one layer stands for all, a part of a batch for the whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.planning import duration, pace
from chainfed_ray.planning.candidates import as_client
from chainfed_ray.planning.pace import Taken, part_of, seconds_of, tokens_of, usual_batch
from tests.builders import a_job


def a_batch(*lengths: int) -> Examples:
    """Examples of so many tokens, each token its place; every second one is to be predicted."""
    rows = [np.arange(length, dtype=np.int32) for length in lengths]
    return ragged(rows, np.arange(len(rows)), [row % 2 == 1 for row in rows])


@pytest.mark.parametrize("cpu", [0.0, 1.0], ids=["short", "long"])
def test_what_grows_with_its_tokens_is_told_exactly(cpu: float) -> None:
    """Measured to the end if it is short; and else in part, with what does not grow told apart."""
    asked = list[int]()

    def work(part: Examples) -> Taken:
        asked.append(tokens_of(part))
        return Taken(3.0 + 0.5 * tokens_of(part), cpu if tokens_of(part) > 10 else 0.0)

    assert seconds_of(a_batch(*[24] * 16), work) == pytest.approx(3.0 + 0.5 * 16 * 24)
    assert max(asked) == (24 if cpu else 16 * 24)


def test_the_first_time_is_not_counted_unless_it_is_long() -> None:
    taken = iter([Taken(9.0, 1.0), Taken(2.0, 2.0)])
    assert seconds_of(a_batch(8), lambda _: next(taken)) == pytest.approx(8.0)
    assert seconds_of(a_batch(8), lambda _: Taken(5.0, 5.0)) == pytest.approx(20.0)


def test_what_a_step_takes_anyway_is_not_taken_for_its_tokens() -> None:
    """Where weights are read in each step, a measurement on a few tokens is long whatever a token takes."""
    asked = list[int]()

    def work(part: Examples) -> Taken:
        asked.append(tokens_of(part))
        return Taken(*[0.5 + 0.001 * tokens_of(part)] * 2)

    assert seconds_of(a_batch(*[24] * 16), work) == pytest.approx(0.5 + 0.001 * 16 * 24)
    assert max(asked) == 16 * 24


def test_no_more_is_measured_than_tells() -> None:
    """A measurement that is long enough, and nearly tells, is followed by one that is somewhat longer: not by the whole."""
    asked = list[int]()

    def work(part: Examples) -> Taken:
        asked.append(tokens_of(part))
        return Taken(*[0.3 + 0.003 * tokens_of(part)] * 2)

    assert seconds_of(a_batch(*[64] * 64), work) == pytest.approx(0.3 + 0.003 * 64 * 64)
    assert max(asked) == 512


def test_a_part_is_of_the_longest_examples_and_goes_over_all_of_one() -> None:
    batch = a_batch(3, 20, 11)
    assert part_of(batch, 40).lengths.tolist() == [20, 11]
    assert part_of(batch, 3 * 20).lengths.tolist() == [20, 11, 3]
    few = part_of(batch, 2)
    assert few.ids.tolist() == [0, 19]
    assert few.targets is not None
    assert few.targets.tolist() == [False, True]


def test_a_usual_batch_has_as_many_tokens_as_batches_have_on_average() -> None:
    examples = a_batch(2, 4, 30, 8)
    assert usual_batch(examples, [np.array([place]) for place in range(4)]).lengths.tolist() == [8]


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 2])
def test_one_layer_is_run_for_all(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """Wherever the chain starts, nothing is run but the two lowest layers and the head."""
    document["chain"]["start"] = start
    job = a_job(document, tmp_path)
    loaded = set[int]()
    load = pace.Blocks.load_layer
    monkeypatch.setattr(
        pace.Blocks, "load_layer", lambda self, index, *more: loaded.add(index) or load(self, index, *more)
    )
    candidate, plan = job.admitted[0]
    found = duration.pace_of(job, as_client(candidate, plan, plan.planned_bytes))
    assert loaded == {0, 1}
    assert min(found.turn, found.step, found.layer, found.load) > 0
    evaluation = pace.evaluation_pace(job.base, job.validation, job.new_stack(range(job.layers), 0), job.window)
    assert duration.evaluation_seconds(job, evaluation) > 0
    assert loaded == {0, 1}
