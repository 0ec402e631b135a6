"""The requests and answers of the two routes in the format of OpenAI's API, so that programs written for that API work.

Such programs send null for an option that is not set, and options that ask for nothing, such as ``tools: []``. Both are
accepted. An option that asks for something that we cannot do is refused by its name.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, FailFast, Field, TypeAdapter, model_validator

from chainfed_ray.api.schemas.bodies import (
    LONGEST_NAME,
    MOST_CHARACTERS,
    PromptText,
    RequestBody,
    bounded,
    one_or_more,
)
from chainfed_ray.api.schemas.logprobs import ChatLogprobs, CompletionLogprobs
from chainfed_ray.serving.messages import MOST_TOKENS, FinishReason, Prompt, Sampling, chat_of

_MAX_TOKENS = f"the most tokens to generate; by default as many as fit into the model's positions, up to {MOST_TOKENS}"
MOST_CHOICES = 8  # texts for one prompt
MOST_LIKELIEST = 20  # tokens whose chances are told
MOST_PROMPTS = 16
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]

# The values of an option that ask for nothing.
Zero = Annotated[float, Field(ge=0, le=0)]
No = Literal[False]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(RequestBody):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="add a last chunk with the `usage` and no choices")
    include_obfuscation: No | None = Field(None, description="not supported: no chunk is padded")


class _Unsupported(RequestBody):
    """Options of both routes that are accepted only with a value that asks for nothing."""

    frequency_penalty: Zero | None = Field(None, description="not supported")
    presence_penalty: Zero | None = Field(None, description="not supported")
    logit_bias: EmptyObject | None = Field(None, description="not supported")


class GenerationOptions(_Unsupported):
    """How text is generated. Null means that an option is not set."""

    model: str = Field(max_length=LONGEST_NAME, description="a name from `GET /v1/models` whose task is `causal-lm`")
    max_tokens: int | None = Field(None, ge=1, description=_MAX_TOKENS)
    temperature: float | None = Field(
        None, ge=0, le=2, description="randomness of sampling, by default 1; 0 always takes the likeliest token"
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="sample only from the likeliest tokens with this probability together, by default 1",
    )
    stop: Annotated[list[_Stop] | None, one_or_more(4, 1000, 1, {"type": "null"})] = Field(
        None, max_length=4, description="the text ends before the first of these strings"
    )
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="texts per prompt, by default 1")
    user: str | None = Field(None, description="accepted and ignored; it is not stored")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="the same seed generates the same text again")
    stream: bool | None = Field(None, description="send the text as server-sent events while it is generated")
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """The options in the form that the generator takes."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(
            self.most_tokens, temperature, top_p, tuple(self.stop or ()), self.seed, self.schema_text, self.chances
        )

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that a text is to match, if there is one."""
        return None

    @property
    def texts(self) -> int:
        """How many texts are asked for, for each prompt."""
        return self.n or 1

    @property
    def chances(self) -> int | None:
        """How many of the likeliest tokens are to be told at each place; None if no chances are."""
        return None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, if the caller says so."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """True if a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationOptions):
    """Prompts to continue."""

    prompt: Annotated[list[PromptText], FailFast(), one_or_more(MOST_PROMPTS), AfterValidator(bounded)] = Field(
        min_length=1, max_length=MOST_PROMPTS, description=f"{MOST_CHARACTERS:,} characters in all, at most"
    )
    best_of: Literal[1] | None = Field(None, description="not supported")
    echo: No | None = Field(None, description="not supported")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_LIKELIEST,
        description="tell each token's chance, and those of so many of the likeliest ones",
    )
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="not supported")

    @property
    def chances(self) -> int | None:
        """See ``GenerationOptions``."""
        return self.logprobs


class TextPart(RequestBody):
    """A part of a message. Programs that can also send pictures send text in this form."""

    type: Literal["text"]
    text: PromptText


def _joined(value: Any) -> Any:
    return "".join(part.text for part in _PARTS.validate_python(value)) if isinstance(value, list) else value


_PARTS = TypeAdapter(Annotated[list[TextPart], FailFast()])


class ChatMessage(RequestBody):
    """One message of a chat. A message that a model answered with may be sent back as it is."""

    role: str = Field(
        description="a role of the model's template, mostly `system`, `user` or `assistant`", max_length=100
    )
    content: Annotated[PromptText, BeforeValidator(_joined, json_schema_input_type=PromptText | list[TextPart])]
    name: str | None = Field(None, description="accepted and ignored")
    refusal: None = Field(None, description="not supported")
    annotations: EmptyList | None = Field(None, description="not supported")
    audio: None = Field(None, description="not supported")
    function_call: None = Field(None, description="not supported")
    tool_calls: EmptyList | None = Field(None, description="not supported")


def _bounded_chat(messages: list[ChatMessage]) -> list[ChatMessage]:
    bounded([message.content for message in messages])
    return messages


class PlainFormat(RequestBody):
    """The form of an answer: text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(RequestBody):
    """A JSON schema. The answer always follows it, whatever `strict` says."""

    name: str = Field(description="accepted and ignored", max_length=64)
    description: str | None = Field(None, description="accepted and ignored")
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(RequestBody):
    """The form of an answer: a JSON document that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationOptions):
    """A chat to answer."""

    messages: Annotated[list[ChatMessage], FailFast(), AfterValidator(_bounded_chat)] = Field(
        min_length=1, max_length=256, description=f"{MOST_CHARACTERS:,} characters in all, at most"
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="the later name of `max_tokens`")
    functions: EmptyList | None = Field(None, description="not supported")
    function_call: Literal["none", "auto"] | None = Field(None, description="without `functions` it asks for nothing")
    logprobs: bool | None = Field(None, description="tell each token's chance")
    metadata: EmptyObject | None = Field(None, description="not supported")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="only text")
    reasoning_effort: Literal["none"] | None = Field(None, description="not supported")
    verbosity: Literal["medium"] | None = Field(None, description="not supported")
    service_tier: Literal["auto", "default"] | None = Field(None, description="there is one")
    parallel_tool_calls: bool | None = Field(None, description="without `tools` it asks for nothing")
    response_format: ResponseFormat | None = Field(
        None, description="text, or a JSON document; one that `max_tokens` cuts off is not whole"
    )
    store: No | None = Field(None, description="not supported")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="without `tools` it asks for nothing")
    tools: EmptyList | None = Field(None, description="not supported")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_LIKELIEST,
        description="tell the chances of so many of the likeliest tokens; needs `logprobs`",
    )

    @model_validator(mode="after")
    def _likeliest_with_chances(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs only together with logprobs: true")
        return self

    @property
    def chances(self) -> int | None:
        """See ``GenerationOptions``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def schema_text(self) -> str | None:
        """See ``GenerationOptions``."""
        match self.response_format:
            case SchemaFormat(json_schema=wanted):
                return json.dumps(wanted.json_schema)
            case PlainFormat(type="json_object"):
                return json.dumps({"type": "object"})
        return None

    @property
    def chat(self) -> Prompt:
        """The messages in the form that the generator takes."""
        return chat_of((message.role, message.content) for message in self.messages)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, by the lower of the two options if both are given."""
        return min((most for most in (self.max_tokens, self.max_completion_tokens) if most is not None), default=None)


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

    index: int = Field(description="which text, counted from 0: the texts of the first prompt come first")
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(
        description="`stop`: the model ended the text, or a stop string did; `length`: the text has `max_tokens`; "
        "null in every chunk but the last"
    )


class Completion(_Answer):
    """The text that follows each prompt; in a stream, a piece of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class AssistantMessage(BaseModel):
    """The message that the model answers a chat with."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer to a chat."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(_Answer):
    """The answer to a chat: as many `choices` as were asked for."""

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
    logprobs: ChatLogprobs | None = None


class ChatChunk(_Answer):
    """A chunk of a stream that answers a chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
