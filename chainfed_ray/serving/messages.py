"""What the processes of the API and of the models send each other. It imports no torch, which the API's do without."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from chainfed_ray.data.messages import Chat, Message
from chainfed_ray.errors import InvalidJob

SCHEMA = "response_format.json_schema.schema"  # where a request has the schema of its answer
MOST_TOKENS = 256  # the limit of a text's tokens where the caller gives none

Probabilities = list[list[float]]
"""The probability of each class, for each text."""

FinishReason = Literal["stop", "length"]
Prompt = str | Chat  # a text to continue, or the messages of a chat to answer


def chat_of(turns: Iterable[tuple[str, str]]) -> Chat:
    """A chat, from the role and the content of each message."""
    return tuple(Message(role, content) for role, content in turns)


class ModelKey(NamedTuple):
    """The base model ``base`` in ``dtype``, as in a job file, with the stack of ``job`` on it; alone if that is None.

    The stack is that of the job's ``round``, or of its model. If ``moving`` is set, that was the newest round, or the best, a
    moment ago, and the one that is so now will do. With ``layers`` it is that of the job's early exit after so many layers.
    """

    base: str
    dtype: str
    job: str | None = None
    round: int | None = None
    moving: Literal["latest", "best"] | None = None
    layers: int | None = None


class Question(NamedTuple):
    """The texts to be classified with ``model``, which then has a stack, or to be embedded; and what goes along for traces."""

    model: ModelKey
    texts: list[str]
    asked: Mapping[str, str] | None = None


Work = Callable[[Sequence[Question]], Sequence[Any]]
"""Answers questions together: an answer for each, or the error because of which it has none."""


def no_numbers() -> InvalidJob:
    """The error of a model whose output is not finite, such as one whose training went astray."""
    return InvalidJob.at("model", "(its output)", "numbers that are finite; the training of this model went astray")


class Embedding(NamedTuple):
    """The embedding of a text, D numbers, and how many tokens the text has."""

    values: list[float]
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen, and when a text ends."""

    max_tokens: int | None = None  # None: MOST_TOKENS, or the positions that the prompt leaves if those are fewer
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    stop: tuple[str, ...] = ()  # the text ends before any of these strings
    seed: int | None = None  # None: a different text each time
    schema: str | None = None  # a JSON schema: the text is a JSON document that matches it
    likeliest: int | None = None  # how many of the likeliest tokens to tell at each place; None: tell no chances


class Chance(NamedTuple):
    """A token's text, and the natural logarithm of its probability before temperature and top-p."""

    token: str
    logprob: float


class TokenChances(NamedTuple):
    """The chance of a token that was generated, and those of the likeliest tokens in its place."""

    chosen: Chance
    likeliest: tuple[Chance, ...]


def joined(pieces: "Sequence[Piece]") -> "Piece":
    """Several pieces of one text as one, which ends as the last of them."""
    text, chances = (
        "".join(piece.text for piece in pieces),
        tuple(chance for piece in pieces for chance in piece.chances),
    )
    return pieces[-1]._replace(text=text, chances=chances)


class Piece(NamedTuple):
    """A piece of a text that is being generated. The last piece has the ``finish_reason``."""

    text: str
    prompt_tokens: int  # tokens of the prompt
    tokens: int  # tokens generated so far
    finish_reason: FinishReason | None = None  # "stop": an end token or a stop string; "length": the limit of tokens
    chances: tuple[TokenChances, ...] = ()  # of the tokens since the piece before, if they were asked for
