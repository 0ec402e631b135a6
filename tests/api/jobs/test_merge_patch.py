"""Promises of merge patches: the examples of RFC 7396, and that what is patched stays as it was."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.api.jobs.merge_patch import patched

# Appendix A of RFC 7396.
EXAMPLES: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("document", "patch", "expected"), EXAMPLES)
def test_the_examples_of_the_standard(document: Any, patch: Any, expected: Any) -> None:
    assert patched(document, patch) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.slow
@given(document=json_values, patch=json_values)
def test_what_is_patched_stays_as_it_was_and_a_patch_twice_is_one(document: Any, patch: Any) -> None:
    before = copy.deepcopy((document, patch))
    once = patched(document, patch)
    assert (document, patch) == before
    assert patched(once, patch) == once
