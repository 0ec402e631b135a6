"""Promise: a model that cannot be trained as it is in its folder is refused by what it is, before anything is queued."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from chainfed_ray.data import examples
from chainfed_ray.data.sources import Corpus
from chainfed_ray.errors import InvalidJob
from chainfed_ray.reading import OF_DISKS
from tests.builders import a_job
from tests.causal import causal_folder

Break = Callable[[Path], None]


def configured(**changes: Any) -> Break:
    """Change keys of ``config.json``; a key whose value is None goes."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def written(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text) and None


def without_layer(index: int) -> Break:
    """Take the tensors of a layer out of the checkpoint."""

    def change(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = {name: tensor for name, tensor in load_file(path).items() if f".{index}." not in name}
        save_file(tensors, path, {"format": "pt"})

    return change


def with_a_number(number: float) -> Break:
    """Put a number into a matrix of layer 2."""

    def change(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("layer.2.output.dense.weight"))
        tensors[name][-1, -1] = number
        save_file(tensors, path, {"format": "pt"})

    return change


def with_a_tensor(name: str) -> Break:
    def change(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        save_file({**load_file(path), name: torch.ones(1)}, path, {"format": "pt"})

    return change


CODE = "raise SystemExit('the code of a model was run')"


def with_code(folder: Path) -> None:
    configured(model_type="theirs", auto_map={"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"})(folder)
    (folder / "theirs.py").write_text(CODE)


def with_a_broken_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


def templates(*several: dict[str, str]) -> Break:
    """Give the tokenizer several templates for chats, in the form that older folders have them in."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))

    return change


def with_an_index(*files: str) -> Break:
    """Divide the checkpoint in two files, and let its index name other ``files`` as well."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "1.safetensors")
        named = {str(place): file for place, file in enumerate(("1.safetensors", *files))}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))

    return change


def with_a_tensor_twice(folder: Path) -> None:
    with_an_index("2.safetensors")(folder)
    name, tensor = next(iter(load_file(folder / "1.safetensors").items()))
    save_file({name: tensor + 1}, folder / "2.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            configured(quantization_config={"quant_method": "bitsandbytes"}),
            r"its weights are quantized \(bitsandbytes\)",
        ),
        (without_layer(3), "its checkpoint has no tensor encoder.layer.3"),
        (configured(num_hidden_layers=5), "its checkpoint has no tensor encoder.layer.4"),
        (
            configured(num_hidden_layers=3),
            "its configuration has 3 layers, and its checkpoint a tensor encoder.layer.3",
        ),
        (
            with_a_tensor("encoder.layer.1.output.dense.weight_scale"),
            "its weights are quantized, by the tensor .*_scale",
        ),
        (
            with_a_tensor("encoder.layer.1.output.dense.weight.absmax"),
            "its weights are quantized, by the tensor .*absmax",
        ),
        (configured(intermediate_size=96), r"its configuration has \[96, 32\] for .*, and its checkpoint \[64, 32\]"),
        (configured(num_hidden_layers="six"), "num_hidden_layers"),
        (configured(model_type="no-such-type"), "does not know its type 'no-such-type'"),
        (configured(model_type=None), "model_type"),
        (with_a_number(torch.nan), r"layer.2.output.dense.weight has weights that are no numbers"),
        (with_a_number(-torch.inf), r"layer.2.output.dense.weight has weights that are no numbers"),
        (with_code, "does not know its type 'theirs'; code of the model's own is never run"),
        (written("config.json", "[]"), "a model that can be streamed"),
        (written("config.json", "{"), "config.json"),
        (written("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "a model that can be streamed"),
        (with_a_broken_index, "a model that can be streamed"),
        (written("tokenizer.json", "{}"), "a folder with a tokenizer"),
        (written("tokenizer_config.json", "[1]"), r"a tokenizer .*tokenizer_config.json is \[1\]; expected an object"),
        (written("special_tokens_map.json", "{"), "a tokenizer .*special_tokens_map.json is no JSON"),
        (written("adapter_config.json", "{}"), "the base model itself; this folder has an adapter"),
        (
            with_an_index("../model.safetensors"),
            "its index names '../model.safetensors', which is no file of this folder",
        ),
        (with_an_index(""), "its index names '', which is no file of this folder"),
        (with_an_index("2.safetensors"), "2.safetensors is missing"),
        (with_a_tensor_twice, "2.safetensors has .*, which an earlier file of its index has as well"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_what_it_is(
    change: Break, words: str, document: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    document["model"]["base"] = f"path:{folder}"
    with pytest.raises(InvalidJob, match=words) as refused:
        a_job(document, tmp_path)
    assert [problem.field for problem in refused.value.problems] == ["model.base"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (written("generation_config.json", "{"), "its generation_config.json cannot be used .*is no JSON"),
        (
            written("generation_config.json", "[5]"),
            r"its generation_config.json cannot be used .*is \[5\]; expected an",
        ),
        (written("generation_config.json", '{"watermarking_config": 5}'), "its generation_config.json cannot be used"),
        (
            written("generation_config.json", '{"eos_token_id": "x"}'),
            "has 'x' for eos_token_id; expected the ids of tokens",
        ),
        (written("chat_template.jinja", "{{ 1 }}\n{% for"), "a chat template that can be used .line 2: "),
        (templates({"name": "tools", "template": "x"}), "of several, one is called default; this one has tools"),
    ],
)
def test_a_language_model_that_could_not_be_served_is_refused(
    change: Break, words: str, document: dict[str, Any], tmp_path: Path
) -> None:
    """And not trained first. It reads what it writes with when it is loaded whole."""
    folder = causal_folder("llama", tmp_path / "model", chat=True)
    change(folder)
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * n}]}
        for n in range(1, 13)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    document["model"] = {"base": f"path:{folder}", "task": "causal-lm"}
    document["data"] = {"train": f"path:{tmp_path / 'chats.jsonl'}", "messages": "messages", "max_length": 60}
    document["chain"] = {"window": 1, "adapter": {"bottleneck": 8}}
    with pytest.raises(InvalidJob, match=words) as refused:
        a_job(document, tmp_path)
    assert [problem.field for problem in refused.value.problems] == ["model.base"]


@pytest.mark.parametrize("row", [3, 12])
def test_a_token_that_the_model_has_not_is_refused_by_the_row_that_spells_it_out(
    row: int, document: dict[str, Any], tmp_path: Path
) -> None:
    folder = causal_folder("llama", tmp_path / "model")
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<known>", "<picture>"], special_tokens=True)
    words.save_pretrained(folder)
    texts = [{"text": "<picture> of a tree" if number == row else "a tree"} for number in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    document["model"] = {"base": f"path:{folder}", "task": "causal-lm"}
    document["data"] = {"train": f"path:{tmp_path / 'rows.jsonl'}", "max_length": 60}
    document["chain"] = {"window": 1, "adapter": {"bottleneck": 8}}
    expected = rf"data\.train is '<picture>'; expected rows without this token, .*; row {row} has it"
    with pytest.raises(InvalidJob, match=expected):
        a_job(document, tmp_path)


def test_whatever_goes_wrong_with_rows_is_said_of_them(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> Corpus:
        raise ArithmeticError("what nobody has thought of")

    monkeypatch.setattr(examples, "load", read)
    expected = (
        r"data\.train is 'path:.*'; expected rows that can be used \(ArithmeticError: what nobody has thought of\)"
    )
    with pytest.raises(InvalidJob, match=expected):
        a_job(document, tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "no space left"), OSError(errno.ENOTCONN, "away"), TimeoutError(), BrokenPipeError()],
)
def test_but_the_trouble_of_a_disk_or_a_connection_is_not(
    error: OSError, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> Corpus:
        raise error

    monkeypatch.setattr(examples, "load", read)
    with pytest.raises(OSError) as raised:  # noqa: PT011  which one is looked at below
        a_job(document, tmp_path)
    found = raised.value.errno
    assert found == error.errno or (error.errno is None and found in OF_DISKS)
