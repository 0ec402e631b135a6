"""What every body of a request keeps to, and the limits of the texts in it."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict

_MOST_KEYS = 100
MOST_TEXTS = 256  # of a request
LONGEST_NAME = (
    1000  # characters of a model's name; a base model's may be a folder's, and a folder's has 255 bytes at most
)
MOST_CHARACTERS = 500_000  # of all texts of a request to a model
LONGEST_TEXT = 100_000  # characters of one of them
PromptText = Annotated[str, Field(max_length=LONGEST_TEXT)]


def example(body: JsonDict) -> ConfigDict:
    """The configuration of a model with an example of it, which the OpenAPI document shows."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def bounded(texts: Sequence[str]) -> Sequence[str]:
    """Check that texts have no more than ``MOST_CHARACTERS`` together: the time and memory for them grow with that."""
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise ValueError(f"at most {MOST_CHARACTERS:,} characters in all")
    return texts


def one_or_more(most: int, longest: int = LONGEST_TEXT, shortest: int = 0, *others: dict[str, Any]) -> BeforeValidator:
    """Lets one text be given for a list with that text.

    The JSON schema then has both: a text or up to ``most`` texts, each of up to ``longest`` characters; or one of ``others``.
    """
    text = {"type": "string", "maxLength": longest} | ({"minLength": shortest} if shortest else {})
    texts = {"type": "array", "items": text, "minItems": 0 if others else 1, "maxItems": most}
    given = Annotated[Any, WithJsonSchema({"anyOf": [text, texts, *others]})]
    return BeforeValidator(_listed, json_schema_input_type=given)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RequestBody(BaseModel):
    """A body in JSON, or an object in it. Its errors are few, however much is wrong with it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MOST_KEYS:
            raise ValueError(f"an object of at most {_MOST_KEYS} fields")
        return value
