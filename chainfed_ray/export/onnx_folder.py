"""Writes a finished classifier as an ONNX graph, which engines without PyTorch run."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainfed_ray.errors import InvalidJob, PackageMissing, UnsupportedModel
from chainfed_ray.export.transformers_folder import prepare_for_classes, whole_model
from chainfed_ray.export.whole_model import WholeClassifier
from chainfed_ray.hub import first_line, tokenizer
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.source import weights_folder

_NAMES = ("input_ids", "attention_mask")
_TRACED = (7, 4)  # the lengths of the texts that the graph is traced with
_MOST_APART = 1e-4  # between a probability of the graph and of PyTorch


def write_onnx(saved: SavedStack, folder: Path) -> None:
    """Write ``model.onnx`` in float32, its tokenizer and ``labels.json``, and check the graph against PyTorch.

    The graph takes ``input_ids`` and ``attention_mask`` [B, T] int64 and gives ``logits`` [B, C], for any B and T.

    Raises:
        InvalidJob: the stack is of a language model, or its base model is not there.
        PackageMissing: the packages of the extra ``onnx`` are not installed.
        UnsupportedModel: the base model has no such graph, or its graph gives other answers.
    """
    if not saved.classes:
        expected = "peft or transformers, because this is a language model; ONNX is for classifiers"
        raise InvalidJob.at("format", "onnx", expected)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise PackageMissing("the format onnx", package, "onnx")
    model = whole_model(saved, "float32")
    assert isinstance(model, WholeClassifier)
    # In a graph of PyTorch's fused attention (sdpa), padding changes the answers: by 0.15 in the logits of a small BERT.
    model.set_attn_implementation({"base_config": "eager"})
    folder.mkdir(parents=True)
    _trace(model, saved.base, folder / "model.onnx")
    _check(model, saved, folder / "model.onnx")
    words = tokenizer(saved.base, weights_folder(saved.base))
    prepare_for_classes(words, saved.max_length)
    words.save_pretrained(folder)
    (folder / "labels.json").write_text(json.dumps(saved.classes, ensure_ascii=False), encoding="utf-8")


class _Logits(nn.Module):
    """The classifier as a function of two tensors, and nothing else."""

    def __init__(self, model: WholeClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        assert isinstance(logits, Tensor)
        return logits


def _trace(model: WholeClassifier, base: str, path: Path) -> None:
    axes: dict[str, Any] = {name: {0: "batch", 1: "length"} for name in _NAMES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about the exporter's own code
            torch.onnx.export(
                _Logits(model).eval(),
                _texts(model, _TRACED),
                path,
                input_names=_NAMES,
                output_names=["logits"],
                dynamic_shapes=axes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # of the exporter, of the model's own code, or of what runs it
        raise UnsupportedModel(base, f"it has no ONNX graph ({type(error).__name__}: {first_line(error)})") from error


def _check(model: WholeClassifier, saved: SavedStack, path: Path) -> None:
    """Run the graph and the model on a batch with padding, and on a text alone.

    Raises:
        UnsupportedModel: their answers differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    longest = saved.max_length
    for lengths in ((longest, 1, (longest + 1) // 2), (longest,)):
        texts = _texts(model, lengths)
        given = {name: tensor.numpy() for name, tensor in zip(_NAMES, texts, strict=True)}
        found = torch.from_numpy(session.run(["logits"], given)[0]).softmax(-1)
        with torch.no_grad():
            expected = model(*texts).logits.softmax(-1)
        apart = float((found - expected).abs().max())
        if not apart <= _MOST_APART:
            raise UnsupportedModel(
                saved.base, f"its ONNX graph gives probabilities that are {apart:.2g} apart from its own"
            )


def _texts(model: WholeClassifier, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of texts without a meaning, of the given lengths."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    count = model.config.get_text_config().vocab_size
    ids = torch.randint(count, mask.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(mask.bool(), ids, 0), mask
