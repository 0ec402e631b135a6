"""The quantized matrices that a checkpoint of ours may hold, in NF4 or a form of GGUF files, and how the checkpoint names them.

A row of such a matrix is a sequence of blocks, each of so many values in so many bytes. The checkpoint has it as bytes
[N, bytes of a row], or [E, N, bytes of a row] for experts, under the parameter's own name. Its safetensors metadata say which
tensors are blocks, and of which form: to a reader that does not know, the shapes are wrong, so nobody takes them for weights.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME  # their own; the version is pinned


class BlockForm(NamedTuple):
    """The size of a block."""

    values: int
    bytes: int


# By GGUF's names, and QLoRA's. Q5_0 and Q5_1 are missing in transformers' table; files of small models have them beside Q4_K.
FORMS = {GGML_NAME[kind]: BlockForm(*sizes) for kind, sizes in GGML_BLOCK.items()} | {
    "Q5_0": BlockForm(32, 22),
    "Q5_1": BlockForm(32, 24),
    "NF4": BlockForm(64, 36),
}
VERSION = 1
_KEY = "chainfed_blocks"


def to_metadata(forms: Mapping[str, str]) -> dict[str, str]:
    """The safetensors metadata of a checkpoint whose tensors ``forms`` are blocks: the form of each, by its name."""
    return {_KEY: json.dumps({"version": VERSION, "forms": forms})}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The form of each tensor that is blocks. Empty for a checkpoint of plain numbers.

    Raises:
        ValueError: the checkpoint is of another version, or has a form that is not known.
    """
    if _KEY not in metadata:
        return {}
    document = json.loads(metadata[_KEY])
    forms: dict[str, str] = document["forms"]
    if document["version"] != VERSION or not set(forms.values()) <= set(FORMS):
        raise ValueError("its matrices are quantized in a way that this version does not know")
    return forms
