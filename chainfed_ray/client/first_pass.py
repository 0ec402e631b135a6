"""The first pass: every example of a client once through the base model, for all that is needed before the first round.

An adapter that was never trained is the identity (adapters.py), so a new chain is the base model. One pass through that gives
the CKA profile from which the chain's start follows (cka.py), the features to which the first stage's head is fitted in
closed form (discriminant.py), and the activations at the bottom of its window, from which training goes on (prefix.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from chainfed_ray.chain import start_below
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.features import PooledFeatures
from chainfed_ray.model.prefix import PrefixCache


class FirstPass:
    """Runs the layers of the base model whose features are not there yet, for a head of ``head_layers`` layers."""

    def __init__(self, cache: PrefixCache, head_layers: int) -> None:
        self._cache, self._kept = cache, frozenset[int]()
        self._bare = AdapterStack.new((), cache.width, bottleneck=1, classes=1, seed=0, head_layers=head_layers)
        self.features: PooledFeatures = cache.features
        self.features.forget_other_variants()

    def keep(self, *layers: int) -> None:
        """Keep the activations of these layers, and of no others once the next ones are made."""
        self._kept = frozenset(layers)

    def up_to(self, top: int) -> Iterator[int]:
        """Each layer up to ``top``, as soon as its features are there."""
        missing = next((layer for layer in range(top + 1) if not self.features.has(layer)), top + 1)
        yield from range(missing)
        if missing > top:
            return
        for layer in self._cache.first_pass(missing - 1, top, self._bare):
            if layer >= missing:
                yield layer
            self._cache.forget_all_but({layer, *self._kept}, self._bare)
        self._cache.forget_all_but(self._kept, self._bare)


@dataclass(frozen=True)
class StartGuess:
    """How a client guesses from its own profile where the chain will start: it keeps the activations there.

    The start follows from the mean of all clients' profiles, which no client knows. One whose guess is wrong runs its examples
    from the nearest layer that it kept.
    """

    cka_threshold: float
    window: int  # Q, layers
    head_layers: int  # layers that the head will read

    def kept(self, cka: tuple[float, ...], layers: int) -> tuple[int, ...]:
        """The layers whose activations are worth keeping after the first ``len(similarities)`` of ``layers``: the guess, and
        the one below it; before there is a guess, the last.
        """
        unseen = (1.0,) * (layers - len(cka))
        guess = start_below(cka + unseen, self.cka_threshold, self.window)
        last = len(cka) - 1
        return (max(guess - 1, 0), guess) if guess <= last else (last,)
