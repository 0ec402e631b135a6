"""Requests that ask for much with little, or for what cannot be: none may be answered with 5xx, or make others wait."""

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_JSON, _YAML = {"Content-Type": "application/json"}, {"Content-Type": "application/yaml"}
_MIB = 2**20


class HostileRequest(NamedTuple):
    """One request, and what is hostile about it."""

    what: str
    method: str
    path: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


def hostile_requests() -> Iterator[HostileRequest]:
    """All of them, each with a body of at most 1 MiB."""
    for what, path in _paths():
        yield HostileRequest(what, "GET", path)
    for path in ("/v1/jobs", "/v1/plan"):
        for what, text in _json_jobs():
            yield HostileRequest(what, "POST", path, _JSON, text.encode("utf-8", "surrogatepass"))
        for what, text in _yaml_jobs():
            yield HostileRequest(what, "POST", path, _YAML, text.encode())
    for path in ("/v1/classify", "/v1/completions", "/v1/chat/completions"):
        for what, text in _model_bodies():
            yield HostileRequest(what, "POST", path, _JSON, text.encode("utf-8", "surrogatepass"))
    yield HostileRequest("a body of another type", "POST", "/v1/jobs", {"Content-Type": "image/png"}, b"{}")
    yield HostileRequest("bytes that are no text", "POST", "/v1/jobs", _JSON, bytes(range(256)) * 4)
    yield HostileRequest("another host", "GET", "/v1/jobs", {"Host": "evil.example"})
    yield HostileRequest("a key that is empty", "POST", "/v1/jobs", {**_JSON, "Idempotency-Key": ""}, b"{}")
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"):
        yield HostileRequest(f"the method {method}", method, "/v1/jobs")


def _paths() -> Iterator[tuple[str, str]]:
    for number in ("-1", str(2**31), str(2**63), "9" * 5000, "1e9", "%00", "NaN", "''"):
        yield f"after={number[:20]}", f"/v1/jobs/none/events?after={number}"
        yield f"limit={number[:20]}", f"/v1/jobs?limit={number}"
    for name in ("%00", "..%2F..%2Fetc%2Fpasswd", "%ff%fe", "a" * 6000, "%F0%9F%A6%84", "'; drop table jobs; --"):
        yield f"the job {name[:20]}", f"/v1/jobs/{name}"
        yield f"older than {name[:20]}", f"/v1/jobs?cursor={name}"
        yield f"the model {name[:20]}", f"/v1/models/{name}"
    yield "a path with a slash at its end", "/v1/jobs/"


def _job(changes: dict[Any, Any]) -> dict[Any, Any]:
    """A job that can be read, with other values at some of its keys."""
    job: dict[Any, Any] = {
        "name": "hostile",
        "model": {"base": "path:/none"},
        "data": {"train": "path:/none"},
        "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
        "rounds": {},
    }
    for section, value in changes.items():
        inside = job.get(section)
        job[section] = {**inside, **value} if isinstance(inside, dict) and isinstance(value, dict) else value
    return job


def _json_jobs() -> Iterator[tuple[str, str]]:
    ten_to_400 = 10**400
    jobs: dict[str, dict[Any, Any]] = {
        "a deadline of 10**400": {"rounds": {"deadline": ten_to_400}},
        "memory of 10**400": {"fleet": {"clients": [{"name": "a", "memory": ten_to_400}]}},
        "half a surrogate pair": {"name": "\ud800"},
        "half a pair in a key": {"\udfff": 1},
        "half a pair in a key and its value": {"\udfff": "\udfff"},
        "a null character": {"data": {"train": "path:/a\0b"}},
        "a part of a path too long": {"data": {"train": "path:/" + "a" * 300}},
        "a path too long": {"model": {"base": "path:" + "/a" * 3000}},
        "a path that is not permitted": {"data": {"train": "path:/proc/1/root"}},
        "the folder of processes": {"model": {"base": "path:/proc"}},
        "a device without an end": {"data": {"train": "path:/dev/zero"}},
        "a pipe": {"data": {"train": "path:/proc/self/fd/0"}},
        "four million clients": {
            "fleet": {"clients": [{"name": f"c{n}", "count": 100_000, "memory": "1GiB"} for n in range(40)]}
        },
        "fifty thousand empty classes": {"fleet": {"clients": [{}] * 50_000}},
        "twenty thousand keys": {f"key{number}": number for number in range(20_000)},
        "a name of 250 KB": {"model": {"base": "x" * 250_000}},
    }
    for what, changes in jobs.items():
        yield what, json.dumps(_job(changes))
    yield "a number of 5,000 digits", json.dumps(_job({})).replace('"rounds": {}', f'"seed": {"9" * 5000}')
    yield "one key, twenty thousand times", "{" + ",".join('"a": 1' for _ in range(20_000)) + "}"
    yield "brackets, 100,000 deep", "[" * 100_000
    yield "objects, 40,000 deep", '{"a":' * 40_000
    yield "1 MiB of zeros", "0" * _MIB
    yield "a string of 1 MiB", json.dumps("x" * (_MIB - 2))
    yield "no number", '{"seed": NaN, "rounds": {"total": Infinity}}'


def _yaml_jobs() -> Iterator[tuple[str, str]]:
    for value in (
        "2001-99-99",
        "!!int x",
        "!!bool x",
        "!!timestamp x",
        "!!float x",
        '!!int ""',
        '"\\UFFFFFFFF"',
        "0x" + "f" * 5000,
        "!!map [a]",
        "!!python/object/apply:os.system [ls]",
        "[" * 900,
        "- " * 900,
        "*nobody",
        "1:59:" * 400,
        "? " * 500,
    ):
        yield f"YAML {value[:30]}", f"name: {value}"
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))
    yield "aliases of aliases", "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + levels
    yield "256 KiB of keys", "\n".join(f"key{number}: {number}" for number in range(17_000))
    yield "1 MiB of keys", "\n".join(f"key{number}: {number}" for number in range(70_000))
    yield "256 KiB of brackets", "[" * 256_000


def _model_bodies() -> Iterator[tuple[str, str]]:
    asked: dict[str, Any] = {"model": "none", "texts": ["a"]}
    yield "texts of 1 MiB", json.dumps({**asked, "texts": ["x" * 100_000] * 10})
    yield "300,000 numbers as texts", json.dumps({**asked, "texts": [1] * 300_000})
    yield "50,000 keys", json.dumps({**asked, **{f"key{number}": number for number in range(50_000)}})
    yield "a model's name of 1 MiB", json.dumps({**asked, "model": "x" * (_MIB - 100)})
    yield "half a surrogate pair for a model", '{"model": "\\ud800", "texts": ["\\ud800"]}'
    yield "half a pair in a model's key", '{"\\ud800": 1}'
    yield "a null character in a name", '{"model": "\\u0000", "texts": ["a"], "prompt": "a"}'
    yield "a number of digits without end", '{"model": "none", "texts": ["a"], "seed": ' + "9" * 5000 + "}"
    yield "brackets without end", '{"texts": ' + "[" * 500_000
    yield "100,000 messages", json.dumps({"model": "none", "messages": [{}] * 100_000})
    yield "no object", "[1, 2, 3]"
    yield "nothing", ""
