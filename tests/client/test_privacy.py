"""Promises of a client's own part of privacy: what its noise is, and that its key is not shown."""

import math
import tracemalloc

import numpy as np
import torch
from scipy import stats

from chainfed_ray.client.privacy import CHUNK, ClientPrivacy, Noise
from tests.builders import noise_of

SECRET = bytes(range(32))


def test_noise_is_gaussian_and_its_values_are_independent() -> None:
    """Of a fixed key, so that it passes always or never; the bounds are those of chance at one in a million."""
    count, deviation = 400_001, 3.0
    drawn = noise_of(Noise(deviation, SECRET), "x", torch.Size([count])).numpy() / deviation
    assert drawn.dtype == np.float64
    far = stats.norm.isf(5e-7)
    assert abs(drawn.mean()) < far / math.sqrt(count)
    assert abs(drawn.var() - 1) < far * math.sqrt(2 / count)
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    half = CHUNK // 2
    pairs = drawn[: count // CHUNK * CHUNK].reshape(-1, 2, half)  # the two of a pair are half a chunk apart
    first_of_two, second_of_two = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    for first, second in (
        (drawn[:-1], drawn[1:]),
        (drawn[:-CHUNK], drawn[CHUNK:]),  # of two chunks
        (first_of_two, second_of_two),
        (first_of_two**2 - 1, second_of_two**2 - 1),
    ):
        spread = first.std() * second.std() * math.sqrt(len(first))
        assert abs((first * second).sum()) < far * spread
    again, other = (noise_of(Noise(deviation, SECRET), name, torch.Size([count])).numpy() for name in ("x", "y"))
    assert np.array_equal(again / deviation, drawn)
    assert abs(np.corrcoef(drawn, other)[0, 1]) < far / math.sqrt(count)


def test_noise_takes_little_memory_however_large_the_tensor() -> None:
    """It is in no plan: 8 MB of values, and less than one to draw noise for them."""
    value = torch.zeros(1_000_003, dtype=torch.float64)
    tracemalloc.start()
    try:
        Noise(1.0, SECRET).add_to("x", value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * CHUNK
    assert value.all()


def test_a_key_is_not_shown_where_a_client_is() -> None:
    share = ClientPrivacy(1.0, Noise(1.0, SECRET))
    assert repr(SECRET)[2:10] not in repr(share)
    assert "key" not in repr(share)
