"""Texts to embed and their embeddings, in OpenAI's form."""

import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, FailFast, Field

from chainfed_ray.api.schemas.bodies import (
    LONGEST_NAME,
    MOST_CHARACTERS,
    MOST_TEXTS,
    PromptText,
    RequestBody,
    bounded,
    example,
    one_or_more,
)
from chainfed_ray.serving.messages import Embedding


class EmbeddingRequest(RequestBody):
    """Texts to embed."""

    model_config = example({"model": "minilm:docstrings", "input": ["Return the mean of the values."]})

    model: str = Field(
        max_length=LONGEST_NAME, description="a name from `GET /v1/models` whose task is `sequence-classification`"
    )
    input: Annotated[list[PromptText], FailFast(), one_or_more(MOST_TEXTS), AfterValidator(bounded)] = Field(
        min_length=1, max_length=MOST_TEXTS, description=f"{MOST_CHARACTERS:,} characters in all, at most"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`base64`: each embedding as 32-bit floats, little-endian, in base64"
    )
    dimensions: None = Field(None, description="not supported: an embedding has the model's dimensions")
    user: str | None = Field(None, description="accepted and ignored; it is not stored")


class EmbeddingUsage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(BaseModel):
    """The embedding of one text."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="which text, counted from 0")
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The embeddings of all texts."""

    model_config = example(
        {
            "object": "list",
            "model": "minilm:docstrings",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.012, -0.034, 0.056]}],
            "usage": {"prompt_tokens": 9, "total_tokens": 9},
        }
    )

    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingEntry]
    usage: EmbeddingUsage

    @classmethod
    def of(cls, model: str, request: EmbeddingRequest, found: Sequence[Embedding]) -> "EmbeddingList":
        """The answer of ``model`` to ``request``."""
        packed = request.encoding_format == "base64"
        return cls(
            model=model,
            data=[
                EmbeddingEntry(index=index, embedding=_packed(text.values) if packed else text.values)
                for index, text in enumerate(found)
            ],
            usage=EmbeddingUsage(
                prompt_tokens=sum(text.tokens for text in found), total_tokens=sum(text.tokens for text in found)
            ),
        )


def _packed(values: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
