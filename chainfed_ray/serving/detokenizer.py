"""Turns generated tokens into text as they come: in pieces of whole characters, up to a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT = 5  # prompt tokens decoded before the first new one: many tokenizers drop the leading space of a text
_UNFINISHED = "\ufffd"  # tokenizers decode the first bytes of an incomplete character to this


class Detokenizer:
    """Decodes the tokens that follow the tokens ``prompt``.

    It holds back text that may turn out to be the beginning of a ``stop`` string. ``stopped`` is True once such a string has
    appeared.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        # A token's text depends on the tokens before it, so each is decoded together with the last few of them.
        self._tokens = list(prompt[-_CONTEXT:])
        self._decoded = len(self._tokens)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token. Returns the text that is now certain, which may be empty; it is empty after a stop string."""
        self._tokens.append(token)
        self._decode_new(unfinished=False)
        return self._release()

    def end(self) -> str:
        """Returns the text that was held back. No token may follow."""
        self._decode_new(unfinished=True)
        released = self._release()
        if self.stopped:
            return released
        released, self._held = released + self._held, ""
        return released

    def _decode_new(self, unfinished: bool) -> None:
        """Decode the new tokens, if they end with a whole character or ``unfinished`` ones are accepted."""
        before, now = self._text(self._tokens[: self._decoded]), self._text(self._tokens)
        if len(now) == len(before) or (now.endswith(_UNFINISHED) and not unfinished):
            return
        self._held += now[len(before) :]
        self._tokens = self._tokens[self._decoded :]
        self._decoded = len(self._tokens)

    def _release(self) -> str:
        """Take from the held text what precedes a stop string, or the possible beginning of one."""
        if self.stopped:
            return ""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else self._first_doubtful()
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _first_doubtful(self) -> int:
        """The first place from which the held text, up to its end, is the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        doubtful = range(max(len(self._held) - longest, 0), len(self._held))
        return next((at for at in doubtful if self._may_stop(self._held[at:])), len(self._held))

    def _may_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
