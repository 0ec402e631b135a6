"""Derives the seed of every random choice in a job from the job's one seed and the choice's name.

No state of a random generator has to be saved: a round that is repeated after a restart makes the same choices.
"""

from hashlib import blake2b


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for the choice called ``names``. Seeds of different choices are independent."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
