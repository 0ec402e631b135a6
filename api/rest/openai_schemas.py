"""The resources of the two routes that have OpenAI's form, so that programs written for it can call a model of ours."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from chainfed_ray.data.chats import Chat, Message
from chainfed_ray.serving.generator import MOST_TOKENS, FinishReason, Sampling


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_MAX_TOKENS = f"by default as many as the model has positions for, up to {MOST_TOKENS}"
Strings = BeforeValidator(_listed, json_schema_input_type=str | list[str])
PromptText = Annotated[str, Field(max_length=100_000)]


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="whether a last chunk, without choices, has the `usage`")


class GenerationOptions(BaseModel):
    """How a text is to be written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="a name from `GET /v1/models` whose task is `causal-lm`")
    max_tokens: int | None = Field(None, ge=1, description=_MAX_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="of the likeliest tokens, those with this much probability")
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Strings] | None = Field(
        None, max_length=4, description="the text ends before any of these"
    )
    n: Literal[1] | None = Field(None, description="texts for a prompt: there is one")
    user: str | None = Field(None, description="taken, and kept nowhere")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text again")
    stream: bool = Field(False, description="as server-sent events, while it is written")
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """The same, for the generator."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, tuple(self.stop or ()), self.seed)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationOptions):
    """Texts to go on with."""

    prompt: Annotated[list[PromptText], Strings] = Field(min_length=1, max_length=16)


class TextPart(BaseModel):
    """Some of a message, as programs send it that could send pictures too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def _joined(value: Any) -> Any:
    return "".join(part.text for part in _PARTS.validate_python(value)) if isinstance(value, list) else value


_PARTS = TypeAdapter(list[TextPart])


class ChatMessage(BaseModel):
    """Something said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str = Field(description="`system`, `user` or `assistant`, as the model's template has it", max_length=100)
    content: Annotated[PromptText, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class ChatRequest(GenerationOptions):
    """A chat to answer."""

    max_tokens: int | None = Field(
        None, ge=1, description=_MAX_TOKENS, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)

    @property
    def chat(self) -> Chat:
        """The same, for the generator."""
        return tuple(Message(message.role, message.content) for message in self.messages)


class Usage(BaseModel):
    """Tokens read, and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, read: int, written: int) -> "Usage":
        """Their sum, too."""
        return cls(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class _Answer(BaseModel):
    """What an answer, or a chunk of one, begins with."""

    id: str
    created: int = Field(description="seconds since 1970, UTC")
    model: str
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """What follows a prompt."""

    index: int = Field(description="of the prompt")
    text: str
    finish_reason: FinishReason | None = Field(
        description="`stop`: at the model's own end or a stop string; `length`; null in a chunk that is not the last"
    )


class Completion(_Answer):
    """What follows each prompt, or in a stream some of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason


class ChatCompletion(_Answer):
    """The answer to a chat, as a list of one."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChunkChoice(BaseModel):
    """Some of the answer to a chat."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None


class ChatChunk(_Answer):
    """Some of the answer to a chat, in a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
