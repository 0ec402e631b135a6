"""Every random choice of a job follows from its one seed and the name of the choice.

So a round drawn again after a restart is the same round: no generator's state has to be saved.
"""

from hashlib import blake2b


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for the choice called ``names``, independent of every other choice's."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
