"""Writes many texts at once with one language model, each with a finished stack of its own: continuous batching.

A step adds a token to every text. Texts join between two steps and leave when they end, so none waits for another. A prompt is
read in parts, one between two steps, so a long one does not hold up the texts that are being written.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import FinishReason, Piece, Prompt, Sampling, TokenChances, no_numbers
from chainfed_ray.serving.row_cache import RowCache
from chainfed_ray.serving.sampler import Sampler
from chainfed_ray.serving.stack_batch import AdapterRows, adapters_of

Emit = Callable[[Piece | Exception], None]
"""Takes the pieces of a text as they come. The last one has a finish reason, unless an exception ends the text."""

MOST_ROWS = 16
_BETWEEN = 128  # tokens of prompts that are read between two steps: several short prompts, or a part of a long one
_AT_ONCE = 1024  # the same while no text is written


@dataclass(eq=False)
class _Row:
    """A text that is written, or whose prompt is read."""

    saved: SavedStack | None
    prompt: list[int]
    most: int  # tokens that may follow the prompt
    sampler: Sampler
    likeliest: int | None  # see Sampling
    text: Any  # a Detokenizer
    emit: Emit
    cancelled: Callable[[], bool]
    read: int = 0  # tokens that are in the cache
    written: list[int] = field(default_factory=list)
    chances: list[TokenChances] = field(default_factory=list)  # of tokens that no piece has told yet

    @property
    def columns(self) -> int:
        """The columns of the cache that it may take."""
        return len(self.prompt) + self.most

    def tell(self, text: str, reason: FinishReason | None = None) -> None:
        """Emit a piece."""
        self.emit(Piece(text, len(self.prompt), len(self.written), reason, tuple(self.chances)))
        self.chances = []


class Generator:
    """Writes texts with a language ``model``, up to ``most_rows`` at once. It is not thread-safe.

    The keys and values of the texts take ``row_bytes`` at most. A text waits until there is room for all that it may become.
    Other generators may share these bytes: see ``share_with``.
    """

    def __init__(
        self,
        model: LanguageModel,
        most_rows: int = MOST_ROWS,
        row_bytes: int | None = None,
    ) -> None:
        self._model = model
        self._most_rows = most_rows if self._model.has_rows else 1
        self._row_bytes = row_bytes
        self._beside = list[ref[Generator]]()  # weak: who is let go of is freed at once
        self._token_bytes = 0 if row_bytes is None else self._model.token_bytes()
        self._waiting = deque[_Row]()
        self._reading: tuple[_Row, Any] | None = None  # with its cache
        self._rows, self._cache = list[_Row](), self._model.new_cache()
        self._adapters = AdapterRows()

    def begin(
        self,
        saved: SavedStack | None,
        prompt: Prompt,
        sampling: Sampling,
        emit: Emit,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Let ``step`` continue a text, or answer a chat, with the adapters of ``saved``, or with none.

        ``cancelled`` is asked at each step; the text ends as soon as it returns True. Another thread than the one that calls
        ``step`` may call this.

        Raises:
            InvalidJob: the prompt is empty or too long, the model cannot chat, or the schema cannot be followed.
        """
        ids = self._model.tokens_of(prompt)
        most = self._model.most_after(prompt, len(ids), sampling.max_tokens)
        if self._row_bytes is not None and (len(ids) + most) * self._token_bytes > self._row_bytes:
            columns = self._row_bytes // self._token_bytes
            expected = f"at most {columns} tokens, the prompt's {len(ids)} included: there is memory for no more"
            raise InvalidJob.at("max_tokens", most, expected)
        text = self._model.detokenizer(ids, sampling.stop)
        sampler = Sampler(sampling, None if sampling.schema is None else self._model.grammar(sampling.schema))
        self._waiting.append(_Row(saved, ids, most, sampler, sampling.likeliest, text, emit, cancelled))

    @property
    def is_idle(self) -> bool:
        """True if there is no text to write."""
        return not (self._rows or self._reading or self._waiting)

    def share_with(self, other: "Generator") -> None:
        """Let the texts of this generator and of ``other`` together have the bytes that each of them has by itself."""
        self._beside.append(ref(other))
        other._beside.append(ref(self))

    @property
    def held_bytes(self) -> int:
        """The bytes that the keys and values of its texts may come to."""
        return self._bytes_of([*self._rows, *([self._reading[0]] if self._reading else [])])

    def _bytes_of(self, rows: Sequence[_Row]) -> int:
        """The same of some texts: all take the columns of the longest."""
        return len(rows) * max((row.columns for row in rows), default=0) * self._token_bytes

    def step(self) -> bool:
        """Read a part of the next prompts, and add a token to every text. False if there is nothing left to do."""
        try:
            room = _BETWEEN if self._rows else _AT_ONCE
            while room > 0 and (read := self._read(room)):
                room -= read
            if self._rows:
                self._write()
        except Exception as error:  # of the model's code, or for want of memory
            self._fail(error)
        return not self.is_idle

    def write(
        self,
        saved: SavedStack | None,
        prompt: Prompt,
        sampling: Sampling,
        emit: Callable[[Piece], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write one text from its beginning to its end. See ``begin``."""
        failed = list[Exception]()

        def sort(told: Piece | Exception) -> None:
            failed.append(told) if isinstance(told, Exception) else emit(told)

        self.begin(saved, prompt, sampling, sort, cancelled)
        while self.step():
            pass
        if failed:
            raise failed[0]

    def _write(self) -> None:
        """Run the last token of every row, and choose the next ones."""
        tokens = torch.tensor([[row.written[-1]] for row in self._rows])
        lengths = [row.read for row in self._rows]
        logits = self._model.logits(tokens, lengths, self._adapters.adapters(), self._cache)
        for row in self._rows:
            row.read += 1
        self._let_go([place for place, row in enumerate(self._rows) if not self._goes_on(row, logits[place])])

    def _read(self, most: int) -> int:
        """Read up to ``most`` tokens of a prompt. With its last one, the text has its first token and joins the others.

        Returns how many were read: none if no prompt waits, or if there is no room for its text.
        """
        while self._waiting and self._waiting[0].cancelled():
            self._end(self._waiting.popleft(), "length")
        if self._reading is None and self._waiting and self._has_room(self._waiting[0]):
            self._reading = self._waiting[0], self._model.new_cache()
            self._waiting.popleft()  # afterwards: another thread asks whether there is anything to do
        if self._reading is None:
            return 0
        row, cache = self._reading
        part = row.prompt[row.read : row.read + most]
        if row.cancelled():
            self._reading = None
            self._end(row, "length")
            return len(part)
        adapters = adapters_of([row.saved.stack if row.saved else None])
        try:
            logits = self._model.logits(torch.tensor([part]), [row.read], adapters, cache)
        except Exception as error:  # it concerns this text alone
            self._reading = None
            row.emit(error)
            return len(part)
        row.read += len(part)
        if row.read == len(row.prompt):
            if self._goes_on(row, logits[0]):
                self._join(row, cache)
            self._reading = None
        return len(part)

    def _has_room(self, row: _Row) -> bool:
        """True if the row can join."""
        beside = sum(other.held_bytes for one in self._beside if (other := one()))
        fits = self._row_bytes is None or self._bytes_of([*self._rows, row]) + beside <= self._row_bytes
        return fits and len(self._rows) < self._most_rows

    def _goes_on(self, row: _Row, logits: Tensor) -> bool:
        """Choose the next token of a text, and emit what it adds. False if that is the end of the text."""
        try:
            return self._chosen(row, logits)
        except Exception as error:  # such as that of a broken stack: the others go on
            row.emit(error)
            return False

    def _chosen(self, row: _Row, logits: Tensor) -> bool:
        if not logits.isfinite().any():
            raise no_numbers()
        token = row.sampler.choose(logits)
        row.written.append(token)
        if row.likeliest is not None:
            row.chances.append(self._model.chances(logits, token, row.likeliest))
        ended = token in self._model.ends
        if not ended and (new := row.text.add(token)):
            row.tell(new)
        if ended or row.text.stopped or row.sampler.is_complete:
            self._end(row, "stop")
        elif len(row.written) == row.most or row.cancelled():
            self._end(row, "length")
        else:
            return True
        return False

    def _end(self, row: _Row, reason: FinishReason) -> None:
        """Emit the last piece of a text. What was held back may end with a stop string."""
        text = row.text.end()
        row.tell(text, "stop" if row.text.stopped else reason)

    def _join(self, row: _Row, cache: Any) -> None:
        if self._rows:
            self._cache.join(cache)
        else:
            self._cache = cache
        self._rows.append(row)
        self._adapters.join(row.saved.stack if row.saved else None)

    def _let_go(self, places: list[int]) -> None:
        """Let go of the rows at ``places``, and of what the cache holds for them alone. The last rows take their places."""
        if not places:
            return
        order = list(range(len(self._rows)))
        for place in reversed(places):
            self._adapters.leave(place)
            order[place] = order[-1]
            order.pop()
        self._rows = [self._rows[place] for place in order]
        if not self._rows:
            self._cache, self._adapters = self._model.new_cache(), AdapterRows()
        elif isinstance(self._cache, RowCache):
            self._cache.keep(order, max(row.read for row in self._rows))

    def _fail(self, error: Exception) -> None:
        """End every text that the cache holds a part of, and the one that was to join them."""
        failed = list(dict.fromkeys([*self._rows, *([self._reading[0]] if self._reading else [])]))
        self._rows, self._reading = [], None
        self._cache, self._adapters = self._model.new_cache(), AdapterRows()
        for row in failed:
            row.emit(error)
