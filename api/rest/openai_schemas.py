"""The requests and answers of the two routes in the format of OpenAI's API, so that programs written for that API work."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from chainfed_ray.data.chats import Chat, Message
from chainfed_ray.serving.generator import MOST_TOKENS, FinishReason, Sampling


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_MAX_TOKENS = f"the most tokens to generate; by default as many as fit into the model's positions, up to {MOST_TOKENS}"
Strings = BeforeValidator(_listed, json_schema_input_type=str | list[str])
PromptText = Annotated[str, Field(max_length=100_000)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="add a last chunk with the `usage` and no choices")


class GenerationOptions(BaseModel):
    """How text is generated."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="a name from `GET /v1/models` whose task is `causal-lm`")
    max_tokens: int | None = Field(None, ge=1, description=_MAX_TOKENS)
    temperature: float = Field(
        1.0, ge=0, le=2, description="randomness of sampling; 0 always takes the likeliest token"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample only from the likeliest tokens whose probabilities add up to this"
    )
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Strings] | None = Field(
        None, max_length=4, description="the text ends before the first of these strings"
    )
    n: Literal[1] | None = Field(None, description="texts per prompt; only 1 is possible")
    user: str | None = Field(None, description="accepted and ignored; it is not stored")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed generates the same text again")
    stream: bool = Field(False, description="send the text as server-sent events while it is generated")
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """The options in the form that the generator takes."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, tuple(self.stop or ()), self.seed)

    @property
    def wants_usage(self) -> bool:
        """True if a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationOptions):
    """Prompts to continue."""

    prompt: Annotated[list[PromptText], Strings] = Field(min_length=1, max_length=16)


class TextPart(BaseModel):
    """A part of a message. Programs that can also send pictures send text in this form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def _joined(value: Any) -> Any:
    return "".join(part.text for part in _PARTS.validate_python(value)) if isinstance(value, list) else value


_PARTS = TypeAdapter(list[TextPart])


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str = Field(
        description="a role of the model's template, mostly `system`, `user` or `assistant`", max_length=100
    )
    content: Annotated[PromptText, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class ChatRequest(GenerationOptions):
    """A chat to answer."""

    max_tokens: int | None = Field(
        None, ge=1, description=_MAX_TOKENS, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)

    @property
    def chat(self) -> Chat:
        """The messages in the form that the generator takes."""
        return tuple(Message(message.role, message.content) for message in self.messages)


class Usage(BaseModel):
    """Counts of tokens: of the prompts, of the generated text, and of both together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "Usage":
        """The usage with its total."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class _Answer(BaseModel):
    """The fields that every answer, and every chunk of one, has."""

    id: str
    created: int = Field(description="seconds since 1970, UTC")
    model: str
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """The text that follows one prompt."""

    index: int = Field(description="which prompt, counted from 0")
    text: str
    finish_reason: FinishReason | None = Field(
        description="`stop`: the model ended the text, or a stop string did; `length`: the text has `max_tokens`; "
        "null in every chunk but the last"
    )


class Completion(_Answer):
    """The text that follows each prompt; in a stream, a piece of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason


class ChatCompletion(_Answer):
    """The answer to a chat. `choices` has one element."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    """The text that a chunk adds to the answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChunkChoice(BaseModel):
    """A piece of the answer to a chat."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None


class ChatChunk(_Answer):
    """A chunk of a stream that answers a chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
