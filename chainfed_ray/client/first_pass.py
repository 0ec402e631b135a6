"""The first pass: it runs every example of a client once through the base model, before the first round.

An untrained adapter is the identity (adapters.py), so a new chain computes what the base model computes. This one pass gives
the CKA profile that decides where the chain starts (profiling.py), the features to which the first stage's head is fitted in
closed form (head_sums.py), and the activations that enter the first window in training (prefix.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from chainfed_ray.chain import start_below
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.prefix import PrefixCache
from chainfed_ray.streaming.features import PooledFeatures


class FirstPass:
    """Runs the layers of the base model whose pooled features are not on disk yet.

    With each layer's activations it stores the pooled features that a head of ``head_layers`` layers needs there.
    """

    def __init__(self, cache: PrefixCache, head_layers: int) -> None:
        self._cache, self._kept = cache, frozenset[int]()
        self._no_adapters = AdapterStack.new((), cache.width, bottleneck=1, classes=1, seed=0, head_layers=head_layers)
        self.features: PooledFeatures = cache.features
        self.features.forget_other_variants()

    def keep(self, *layers: int) -> None:
        """Keep the activations of ``layers`` only. Those of other layers are deleted once the next layer has run."""
        self._kept = frozenset(layers)

    def up_to(self, top: int) -> Iterator[int]:
        """Yield each layer up to ``top`` as soon as its pooled features are available."""
        missing = next((layer for layer in range(top + 1) if not self.features.has(layer)), top + 1)
        yield from range(missing)
        if missing > top:
            return
        for layer in self._cache.first_pass(missing - 1, top, self._no_adapters):
            if layer >= missing:
                yield layer
            self._cache.forget_all_but({layer, *self._kept}, self._no_adapters)
        self._cache.forget_all_but(self._kept, self._no_adapters)


@dataclass(frozen=True)
class StartGuess:
    """Guesses from a client's own profile where the chain will start, so that the client can keep the activations there.

    The start follows from the mean of all clients' profiles, which no client knows. If the guess is wrong, the client runs its
    examples again from the nearest layer below whose activations it kept.
    """

    cka_threshold: float
    window: int  # Q
    head_layers: int  # pooled layers of the head

    def kept(self, cka: tuple[float, ...], layers: int) -> tuple[int, ...]:
        """The layers whose activations to keep after the first ``len(cka)`` of ``layers`` layers have run.

        These are the guessed start and the layer below it, or the last layer that ran while there is no guess yet.
        """
        unseen = (1.0,) * (layers - len(cka))
        guess = start_below(cka + unseen, self.cka_threshold, self.window)
        last = len(cka) - 1
        return (max(guess - 1, 0), guess) if guess <= last else (last,)
