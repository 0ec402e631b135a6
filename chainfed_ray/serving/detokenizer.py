"""A text as its tokens come: in pieces that are whole characters, up to a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT = 5  # tokens of the prompt with which the first one is read: many tokenizers drop a text's leading space
_UNFINISHED = "\ufffd"  # what the first bytes of a character are read as


class Detokenizer:
    """Turns what follows the tokens ``prompt`` into text. Nothing is given that a stop string may yet begin with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        # Tokens are read with those before them, since a token's text depends on them; only the last few are kept.
        self._tokens = list(prompt[-_CONTEXT:])
        self._read = len(self._tokens)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one token more; after a stop string none is."""
        self._tokens.append(token)
        self._take(unfinished=False)
        return self._give()

    def end(self) -> str:
        """What was held back, once no token follows."""
        self._take(unfinished=True)
        given = self._give()
        if self.stopped:
            return given
        given, self._held = given + self._held, ""
        return given

    def _take(self, unfinished: bool) -> None:
        """Read the tokens that are not read yet, if they end with a whole character."""
        before, now = self._text(self._tokens[: self._read]), self._text(self._tokens)
        if len(now) == len(before) or (now.endswith(_UNFINISHED) and not unfinished):
            return
        self._held += now[len(before) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)

    def _give(self) -> str:
        """Of the text that is held, what comes before a stop string or anything that may become one."""
        if self.stopped:
            return ""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else self._first_doubtful()
        given, self._held = self._held[:end], self._held[end:]
        return given

    def _first_doubtful(self) -> int:
        """Where the end of the text that is held begins to look like a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        doubtful = range(max(len(self._held) - longest, 0), len(self._held))
        return next((at for at in doubtful if self._may_stop(self._held[at:])), len(self._held))

    def _may_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
