"""Bad jobs are refused before anything starts, and the error names the field, the value and what would do."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.parse import document_of, parse_job, parse_yaml
from chainfed_ray.units import counted, format_bytes, parse_bytes, parse_seconds
from tests.builders import a_job
from tests.models import tiny
from tests.project import ROOT


def test_document_round_trips(document: dict[str, Any]) -> None:
    spec = parse_job(document)
    assert parse_job(spec.document()) == spec


def test_a_document_of_the_version_before_is_the_same_job(document: dict[str, Any]) -> None:
    spec = parse_job(document)
    assert parse_job({**spec.document(), "version": 1}) == spec
    for wrong in (0, 3, "1", True, 1.0):
        with pytest.raises(InvalidJob, match=r"^version is "):
            parse_job({**document, "version": wrong})


def test_every_example_is_a_job() -> None:
    for path in (ROOT / "examples").glob("*.yaml"):
        parse_yaml(path.read_text())


def test_yaml_numbers_are_numbers_and_a_key_twice_is_an_error() -> None:
    with pytest.raises(InvalidJob, match="given twice"):
        parse_yaml("name: a\nname: b")
    with pytest.raises(InvalidJob, match=r"seed is 1000\.0"):
        parse_yaml("seed: 1e3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "rounds: {total: 010}",
            r"^rounds\.total is '010'; expected a decimal number without a 0 before it, or a text in quotes: ",
        ),
        ("seed: 1_0e3", r"^seed is '1_0e3'; expected a number without underscores"),
        ("rounds: {total: 0o10}", r"^rounds\.total is '0o10'; expected a decimal number"),
        ("rounds: {total: -0b11}", r"^rounds\.total is '-0b11'; expected a decimal number"),
        ("rounds: {deadline: 1:30}", r"^rounds\.deadline is '1:30'; expected a number without colons"),
        (
            "fleet: {clients: [{count: 1_000}]}",
            r"^fleet\.clients\[0\]\.count is '1_000'; expected a number without under",
        ),
        (
            "name: on",
            "^name is 'on'; expected true or false, or a text in quotes: versions of YAML read this differently$",
        ),
        ("name: &a No\nseed: *a", "^name is 'No'"),
        ("name: 2026-01-31", "^name is '2026-01-31'; expected a text in quotes"),
        ("off: 1", "^off is 'off'"),
    ],
)
def test_what_versions_of_yaml_read_differently_is_refused_by_its_field(text: str, words: str) -> None:
    with pytest.raises(InvalidJob, match=words):
        parse_yaml(text)


def test_what_they_read_alike_is_read() -> None:
    text = "{a: 0x10, b: 'on', c: \"1:30\", d: 0, e: 0.5, f: -7, g: 1e3, h: abc_def, i: true, j: null, k: 10.0.0.1, l: v1_0}"
    assert document_of(text) == {
        "a": 16, "b": "on", "c": "1:30", "d": 0, "e": 0.5, "f": -7, "g": 1000.0, "h": "abc_def", "i": True, "j": None,
        "k": "10.0.0.1", "l": "v1_0",
    }  # fmt: skip
    with pytest.raises(InvalidJob, match=r"^rounds\.total is '010'"):
        document_of("010", "rounds.total")


@pytest.mark.parametrize(
    ("section", "change", "field"),
    [
        ("chain", {"windw": 3}, "chain.windw"),
        ("chain", {"start": "later"}, "chain.start"),
        ("chain", {"start": -1}, "chain.start"),
        ("rounds", {"clients": "5"}, "rounds.clients"),
        ("rounds", {"clients": 9}, "rounds.clients"),
        ("rounds", {"quorum": 4}, "rounds.quorum"),
        ("rounds", {"deadline": "soon"}, "rounds.deadline"),
        ("fleet", {"clients": []}, "fleet.clients"),
        ("fleet", {"clients": [{"name": "p", "memory": "9 apples"}]}, "fleet.clients[0].memory"),
    ],
)
def test_wrong_documents(document: dict[str, Any], section: str, change: dict[str, Any], field: str) -> None:
    document[section] |= change
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize(
    ("section", "change", "field"),
    [
        ("model", {"base": "path:nowhere"}, "model.base"),
        ("model", {"base": "builtin:other"}, "model.base"),
        ("data", {"train": "path:nowhere.csv"}, "data.train"),
        ("data", {"train": "ftp:rows"}, "data.train"),
        ("data", {"label": "class"}, "data.label"),
        ("chain", {"window": 5}, "chain.window"),
        ("chain", {"start": 3}, "chain.start"),
        ("fleet", {"clients": [{"name": "p", "count": 3, "memory": "1KiB"}]}, "fleet.clients"),
        ("fleet", {"clients": [{"name": "p", "count": 500, "memory": "64MiB"}]}, "fleet.clients"),
    ],
)
def test_impossible_jobs(
    document: dict[str, Any], tmp_path: Path, section: str, change: dict[str, Any], field: str
) -> None:
    document[section] |= change
    with pytest.raises(InvalidJob) as caught:
        a_job(document, tmp_path)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("rows", ["", '{"text": "a"', "\n".join('{"text": "a", "label": "x"}' for _ in range(20))])
def test_unusable_rows(document: dict[str, Any], tmp_path: Path, rows: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    document["data"]["train"] = f"path:{path}"
    with pytest.raises(InvalidJob, match=r"data\."):
        a_job(document, tmp_path)


@pytest.mark.slow
def test_texts_beyond_the_model(document: dict[str, Any], tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [{"text": "sea " * 600, "label": label} for label in ("a", "b") for _ in range(10)]
    rows = [row | {"text": f"{row['text']}{index}"} for index, row in enumerate(rows)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    long = {**document, "data": {"train": f"path:{tmp_path / 'long.jsonl'}", "max_length": 1024}}
    with pytest.raises(InvalidJob, match=r"data\.max_length is 1024; .*a text has 60\d tokens"):
        a_job(long, tmp_path)

    folder = tiny("bert", tmp_path / "narrow", vocabulary=1000)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    narrow = {**document, "model": {"base": f"path:{folder}"}}
    with pytest.raises(InvalidJob, match=r"model\.base is .*1000 token ids; this one gives \d{4}"):
        a_job(narrow, tmp_path)


def test_quantities() -> None:
    assert parse_bytes("96MiB") == 96 * 2**20
    assert parse_bytes("1.5kB") == 1500
    assert parse_seconds("2m") == 120
    assert format_bytes(1536) == "1.5KiB"
    assert [counted(count, "alias", "aliases") for count in (0, 1, 2)] == ["0 aliases", "1 alias", "2 aliases"]


def test_the_papers_recipe_fills_in_what_the_job_leaves_open(document: dict[str, Any]) -> None:
    del document["chain"]["head"], document["rounds"]["learning_rate"]
    ours, papers = parse_job(document), parse_job({**document, "recipe": "paper"})
    assert (ours.chain.head, papers.chain.head) == ("fitted", "zero")
    assert (papers.chain.cka_threshold, papers.rounds.learning_rate) == (0.8, 3e-3)
    assert (papers.chain.window, papers.rounds.total) == (2, 4)
    assert parse_job(papers.document()) == papers


def test_what_a_job_says_counts_more_than_its_recipe(document: dict[str, Any]) -> None:
    document |= {"recipe": "paper"}
    document["chain"] |= {"head": "fitted", "global_weight": 0.2}
    spec = parse_job(document)
    assert (spec.chain.head, spec.chain.global_weight, spec.chain.cka_threshold) == ("fitted", 0.2, 0.8)


def test_a_head_from_zero_has_further_to_go_than_a_fitted_one(document: dict[str, Any]) -> None:
    assert document["chain"]["head"] == "zero"
    assert parse_job(document).rounds.head_learning_rate == 0.1
    document["rounds"]["head_learning_rate"] = 0.02
    assert parse_job(document).rounds.head_learning_rate == 0.02
    del document["chain"]["head"], document["rounds"]["head_learning_rate"]
    assert parse_job(document).rounds.head_learning_rate == 1e-3


@pytest.mark.parametrize(("key", "value"), [("recipe", "papers"), ("chain", 3)])
def test_a_recipe_hides_no_mistake(key: str, value: object, document: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match=key):
        parse_job({**document, "recipe": "paper", key: value})


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("path:/models/llama@v2/final", "final:tiny"),
        ("path:/models/llama@v2/", "llama@v2:tiny"),
        ("hf:org/llama@v2", "llama:tiny"),
        ("builtin:minilm", "minilm:tiny"),
    ],
)
def test_a_revision_is_no_part_of_a_models_name_and_a_folder_is(document: dict[str, Any], base: str, name: str) -> None:
    document["model"]["base"] = base
    assert parse_job(document).model_name == name


def test_a_base_with_quantized_matrices_is_another_base(document: dict[str, Any]) -> None:
    plain = parse_job(document).model
    document["model"] |= {"base": "hf:org/llama@v2", "quantization": "nf4"}
    spec = parse_job(document)
    assert plain.weights == plain.base
    assert (spec.model_name, spec.model.weights) == ("llama-nf4:tiny", "hf:org/llama@v2#nf4")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"base": "hf:org/llama#nf4"}, r"model\.base is 'hf:org/llama#nf4'; .*model\.quantization says it"),
        (
            {"base": "path:llama.gguf", "quantization": "nf4"},
            r"model\.quantization is 'nf4'; expected 'none' for a GGUF file",
        ),
        (
            {"base": "builtin:smollm2", "quantization": "nf4"},
            r"model\.quantization is 'nf4'; expected 'none' for a GGUF file",
        ),
        ({"quantization": "int8"}, r"model\.quantization is 'int8'; expected 'none' or 'nf4'"),
    ],
)
def test_weights_are_quantized_once_by_one_key(document: dict[str, Any], model: dict[str, str], words: str) -> None:
    document["model"] |= model
    with pytest.raises(InvalidJob, match=words):
        parse_job(document)


@pytest.mark.parametrize(
    ("given", "seconds", "written"),
    [({}, math.inf, "auto"), ({"deadline": "auto"}, math.inf, "auto"), ({"deadline": "20m"}, 1200.0, 1200.0)],
)
def test_a_deadline_is_a_duration_or_none(
    document: dict[str, Any], given: dict[str, Any], seconds: float, written: object
) -> None:
    document["rounds"] |= given
    spec = parse_job(document)
    assert spec.rounds.deadline == seconds
    assert spec.document()["rounds"]["deadline"] == written
    assert parse_job(spec.document()) == spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rounds": {"deadline": 10**400}}, "rounds.deadline"),
        ({"rounds": {"deadline": "31h31"}}, "rounds.deadline"),
        ({"rounds": {"deadline": 10**9}}, "rounds.deadline"),
        ({"rounds": {"deadline": math.inf}}, "rounds.deadline"),
        ({"fleet": {"clients": [{"name": "a", "memory": 10**400}]}}, "fleet.clients[0].memory"),
        ({"fleet": {"clients": [{"name": "a", "memory": "9999999999TiB"}]}}, "fleet.clients[0].memory"),
        ({"model": {"base": "path:\ud800"}}, "model.base"),
        ({"seed": 10**5000}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_no_machine_can_hold_is_refused_by_its_field(change: dict[str, Any], field: str) -> None:
    document = {
        "name": "x",
        "model": {"base": "builtin:minilm"},
        "data": {"train": "builtin:docstrings"},
        "fleet": {"clients": [{"name": "a", "memory": "1GiB"}]},
    }
    with pytest.raises(InvalidJob) as refused:
        parse_job(document | change)
    assert field in {problem.field for problem in refused.value.problems}
    assert len(str(refused.value)) < 2000


_LEVELS = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        "name: 2001-99-99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!float x", 'a: !!int ""', 'a: "\\UFFFFFFFF"',
        "name: !!map [a]", "seed: 0x" + "f" * 5000, "[" * 900, "[" * 5000, "a: &a [*a]", "a0: &a0 x\n" + _LEVELS,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_hostile_yaml_is_refused_at_once_and_briefly(text: str) -> None:
    """Ten levels of nine aliases would be three thousand million values."""
    with pytest.raises(InvalidJob) as refused:
        parse_yaml(text)
    assert len(str(refused.value)) < 2000


def test_of_very_many_mistakes_the_first_are_told() -> None:
    with pytest.raises(InvalidJob) as refused:
        parse_job({f"key{index}": 1 for index in range(20_000)})
    assert 50 < len(refused.value.problems) <= 100


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("chain", {"adapter": {"kind": "bottleneck"}}, "no value with chain.adapter.kind bottleneck"),
        ("chain", {"adapter": {"kind": "lora", "rank": 2}}, "at most 2, chain.adapter.rank"),
        ("aggregation", {"rule": "median"}, "no value with aggregation.rule median"),
        ("aggregation", {"optimizer": "adam"}, "no value with aggregation.optimizer adam"),
    ],
)
def test_fewer_ranks_need_loras_and_a_plain_mean(
    document: dict[str, Any], section: str, change: dict[str, Any], words: str
) -> None:
    document["chain"] |= {"adapter": {"kind": "lora", "rank": 4}, "look_ahead": "exact"}
    document["fleet"]["clients"][0]["rank"] = 3
    document[section] = document.get(section, {}) | change
    with pytest.raises(InvalidJob, match=words) as caught:
        parse_job(document)
    assert "fleet.clients[0].rank" in [problem.field for problem in caught.value.problems]


def test_a_file_at_a_site_is_told_as_one(document: dict[str, Any]) -> None:
    document["fleet"]["clients"] = [{"name": "ward", "memory": "1GiB", "site": "ward", "data": "rows.jsonl"}]
    with pytest.raises(InvalidJob, match=r"data is 'rows\.jsonl'; expected with `site`: `site:<path>`"):
        parse_job(document)


def test_what_an_error_quotes_of_a_file_is_short_and_obeyed_by_no_terminal() -> None:
    people = "東京\u3000店, Geschäft\xa0A, می\u200cخواهم"
    for filling in ("x", "\x1b", "\U000e0001"):
        error = InvalidJob.at("model.base", "path:m", f"a checkpoint without {people} \x1b[31m\0 {filling * 10**6}")
        for text in (str(error), error.problems[0].document()["expected"] or ""):
            assert rf"without {people} \x1b[31m\x00 " in text
            assert len(text) < 5100
            assert "\x1b" not in text
