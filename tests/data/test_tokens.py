"""Batches of examples: each example in one of them, and none with more padding than was allowed."""

from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from chainfed_ray.data.tokens import joined, ragged, tokenize

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
