"""Promises of a job's conditions: they follow from its states, and say since when."""

from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.api.jobs.conditions import conditions
from chainfed_ray.cluster.tables import Event
from chainfed_ray.records.states import STATES_BEFORE, Status


@st.composite
def stories(draw: st.DrawFn) -> list[Event]:
    """The changes of a job's state, one after the other, each of which is possible."""
    story: list[Status] = ["queued"]
    while (after := [to for to, before in STATES_BEFORE.items() if story[-1] in before]) and len(story) < 12:
        if draw(st.integers(0, 9)) == 0:
            break
        story.append(draw(st.sampled_from(sorted(after))))
    return [
        Event(seq, kind, f"2030-01-01T00:00:{seq:02d}.000Z", {"type": "QuorumLost"} if kind == "failed" else {})
        for seq, kind in enumerate(story, 1)
    ]


@given(stories())
def test_they_follow_from_the_states(story: list[Event]) -> None:
    found = {one.type: one for one in conditions(story)}
    states, last = [event.kind for event in story], story[-1]
    assert list(found) == ["Validated", "Running", "Paused", "Finished"]
    true_in = {
        "Running": ("running", "pausing"),
        "Paused": ("paused",),
        "Finished": ("succeeded", "failed", "cancelled"),
    }
    for kind, group in true_in.items():
        one = found[kind]  # type: ignore[index]
        assert (one.status == "True") == (last.kind in group)
        changed = next(
            place
            for place in range(len(states), 0, -1)
            if place == 1 or (states[place - 2] in group) != (states[place - 1] in group)
        )
        assert one.since == story[changed - 1].at, "of the first event since which it has been so"
    if "running" in states and "validating" not in states[len(states) - states[::-1].index("running") :]:
        assert found["Validated"].status == "True"
    if found["Validated"].status == "False":
        tried = len(states) - states[::-1].index("validating")
        assert next(state for state in states[tried:] if state != "pausing") == "failed"
    if last.kind == "failed":
        assert found["Finished"].reason == "QuorumLost"


def test_a_job_that_is_not_valid_says_so() -> None:
    story = [
        Event(1, "queued", "1", {}),
        Event(2, "validating", "2", {}),
        Event(3, "failed", "3", {"type": "InvalidJob"}),
    ]
    assert [(one.type, one.status, one.reason, one.since) for one in conditions(story)] == [
        ("Validated", "False", "InvalidJob", "3"),
        ("Running", "False", "InvalidJob", "1"),
        ("Paused", "False", "InvalidJob", "1"),
        ("Finished", "True", "InvalidJob", "3"),
    ]


def test_a_job_that_is_to_pause_and_turns_out_not_to_be_valid_says_so() -> None:
    kinds = ("queued", "validating", "pausing", "failed")
    story = [Event(seq, kind, str(seq), {"type": "InvalidJob"}) for seq, kind in enumerate(kinds, 1)]
    validated = conditions(story)[0]
    assert (validated.type, validated.status, validated.reason) == ("Validated", "False", "InvalidJob")


def test_a_job_that_waits_for_memory_says_so_until_it_begins() -> None:
    story = [Event(seq, kind, f"2030-01-01T00:00:0{seq}.000Z", {}) for seq, kind in enumerate(("queued", "waiting"), 1)]
    running = conditions(story)[1]
    assert (running.type, running.status, running.reason, running.since) == (
        "Running",
        "False",
        "MemoryLimit",
        story[0].at,
    )
    assert conditions([*story, Event(3, "validating", "2030-01-01T00:00:03.000Z", {})])[1].reason == "Validating"
