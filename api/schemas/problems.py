"""What is wrong with a request: the body of every answer that is an error."""

from typing import Literal

from pydantic import BaseModel, Field

from chainfed_ray.api.schemas.bodies import example


class FieldProblem(BaseModel):
    """A field of a request that is wrong."""

    field: str = Field(description="the field's path, such as `rounds.clients`")
    value: str | None = Field(description="the value in Python's notation; null if the field is missing")
    expected: str = Field(description="what the field must be")


class OpenAIError(BaseModel):
    """An error in the form of OpenAI's API, whose clients look for it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="the first field that is wrong")
    code: str = Field(description="the kind of problem, such as `model_not_found`")


class ProblemDetails(BaseModel):
    """The format of every error: problem details (RFC 9457), with the same in the form of OpenAI's API as `error`."""

    model_config = example(
        {
            "type": "urn:chainfed:problem:invalid-request",
            "title": "Invalid request",
            "status": 422,
            "detail": "top_k is 0; expected greater than or equal to 1",
            "instance": "/v1/classify",
            "request_id": "5f2c9a1e7b3d4c6f8a0b1c2d3e4f5a6b",
            "errors": [{"field": "top_k", "value": "0", "expected": "greater than or equal to 1"}],
            "error": {
                "message": "top_k is 0; expected greater than or equal to 1",
                "type": "invalid_request_error",
                "param": "top_k",
                "code": "invalid_request",
            },
        }
    )

    type: str = Field(description="the kind of problem, for programs: `urn:chainfed:problem:…`")
    title: str
    status: int
    detail: str = Field(description="what is wrong, for people")
    instance: str = Field(description="the path of the request")
    request_id: str = Field(description="the request's id, also in the header X-Request-ID and in the service's log")
    errors: list[FieldProblem]
    error: OpenAIError
