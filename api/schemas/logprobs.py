"""The chances of the tokens of a text that was written, in OpenAI's form."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic import BaseModel, Field

from chainfed_ray.serving.messages import Chance, TokenChances

_UNFINISHED = "\ufffd"  # what tokenizers decode the bytes of an incomplete character to


class CompletionLogprobs(BaseModel):
    """The chances of a completion's tokens: natural logarithms of probabilities, before temperature and top-p."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="where each token begins, in characters after the prompt")

    @classmethod
    def of(cls, chances: Sequence[TokenChances], offset: int) -> "CompletionLogprobs":
        """The chances of tokens that begin ``offset`` characters after the prompt."""
        lengths = [len(chance.chosen.token) for chance in chances]
        return cls(
            tokens=[chance.chosen.token for chance in chances],
            token_logprobs=[chance.chosen.logprob for chance in chances],
            top_logprobs=[{other.token: other.logprob for other in reversed(chance.likeliest)} for chance in chances],
            text_offset=[offset + length for length in accumulate(lengths, initial=0)][:-1],
        )


class TokenLogprob(BaseModel):
    """A token, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="its text in UTF-8; null if it is a part of a character")

    @classmethod
    def fields(cls, chance: Chance) -> dict[str, Any]:
        """The fields of a token's chance."""
        part = _UNFINISHED in chance.token
        return {
            "token": chance.token,
            "logprob": chance.logprob,
            "bytes": None if part else list(chance.token.encode()),
        }


class ChosenLogprob(TokenLogprob):
    """A token of the answer, with the likeliest tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The chances of an answer's tokens, before temperature and top-p."""

    content: list[ChosenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, chances: Sequence[TokenChances]) -> "ChatLogprobs":
        """The chances in OpenAI's form."""
        return cls(
            content=[
                ChosenLogprob(
                    **TokenLogprob.fields(chance.chosen),
                    top_logprobs=[TokenLogprob(**TokenLogprob.fields(other)) for other in chance.likeliest],
                )
                for chance in chances
            ]
        )
