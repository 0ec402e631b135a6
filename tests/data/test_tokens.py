"""Batches of examples: each example in one of them, and none with more padding than was allowed."""

from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any, cast
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from chainfed_ray.data.tokens import joined, of_like_length, ragged, tokenize

LENGTHS = some.lists(some.integers(1, 40), min_size=1, max_size=60)


@given(lengths=LENGTHS, most=some.integers(1, 200))
def test_batches_by_tokens_hold_every_example_once_and_no_more_tokens_than_allowed(
    lengths: list[int], most: int
) -> None:
    examples = ragged([np.arange(length) for length in lengths], np.arange(len(lengths)))
    batches = list(examples.by_tokens(most, np.arange(len(examples))))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for indices in batches:
        assert len(indices) == 1 or len(indices) * max(examples.lengths[indices]) <= most
    longest = [max(examples.lengths[indices]) for indices in batches]
    assert longest == sorted(longest)


@given(lengths=some.lists(some.integers(1, 400), min_size=1, max_size=9), own=some.integers(0, 100))
def test_a_batch_is_cut_into_parts_of_like_length_in_the_best_way(lengths: list[int], own: int) -> None:
    def cost(parts: Iterable[slice]) -> int:
        return sum(int(ascending[part].max()) * (part.stop - part.start) + own for part in parts)

    ascending = np.sort(lengths)
    with mock.patch("chainfed_ray.data.tokens._TOKENS_OF_A_PART", own):
        parts = of_like_length(ascending)
    ends = [0, *(part.stop for part in parts)]
    assert parts == [slice(*each) for each in pairwise(ends)]
    assert ends[-1] == len(lengths)
    places = range(1, len(lengths))
    every_way = (
        [slice(*each) for each in pairwise((0, *cuts, len(lengths)))]
        for count in range(len(lengths))
        for cuts in combinations(places, count)
    )
    assert cost(parts) == min(map(cost, every_way))


@given(parts=some.lists(LENGTHS, min_size=1, max_size=4))
def test_joined_parts_follow_each_other(parts: list[list[int]]) -> None:
    made = [
        ragged([np.full(length, place) for length in part], np.arange(len(part))) for place, part in enumerate(parts)
    ]
    whole = joined(made)
    assert list(whole.lengths) == [length for part in parts for length in part]
    assert list(whole.ids) == [place for place, part in enumerate(parts) for length in part for _ in range(length)]
    assert list(whole.labels) == [label for part in made for label in part.labels]


def test_long_texts_are_tokenised_few_at_a_time() -> None:
    asked = []

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        asked.append(len(texts))
        return {"input_ids": [[len(text)] for text in texts]}

    texts = ["x" * length for length in (1_500_000, 1_500_000, 1_500_000, 5_000_000, *[1] * 501)]
    examples = tokenize(cast("Any", tokenizer), texts, [0] * len(texts), max_length=1)
    assert asked == [2, 1, 1, 500, 1]
    assert list(examples.ids) == list(map(len, texts))
