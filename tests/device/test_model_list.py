"""Promise: transformers' list of models is read from a file, and is the one that it would make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

_READER = """
def create_import_structure_from_path(place):
    print("read")
    return {frozenset({"torch"}): {"modeling_a": {"A", "B"}}, "b": {frozenset(): {"configuration_b": set()}}}
"""
_ASK = """
import os
from chainfed_ray.device.model_list import keep_model_list
keep_model_list()
import transformers
from transformers.utils import import_utils
models = os.path.join(os.path.dirname(transformers.__file__), "models")
plain = {frozenset({"torch"}): {"modeling_a": {"A", "B"}}, "b": {frozenset(): {"configuration_b": set()}}}
for place in (models, os.path.join(models, "__init__.py")):
    assert import_utils.create_import_structure_from_path(place) == plain
"""
_NAMES = """
from chainfed_ray.device.model_list import keep_model_list
keep_model_list()
import transformers
import transformers.models
print(sorted({*transformers.__all__, *transformers.models.__all__}), transformers.BertConfig)
"""


def _said(words: str, kept: Path, before: Path | None = None) -> str:
    path = os.pathsep.join([*([str(before)] if before else []), *sys.path])
    environment = {**os.environ, "CHAINFED_MODELS": str(kept), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_list_is_read_again_when_a_file_has_changed(tmp_path: Path) -> None:
    package, kept = tmp_path / "transformers", tmp_path / "kept"
    for folder in (package, package / "utils", package / "models", package / "models" / "b"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (package / "utils" / "import_utils.py").write_text(_READER)
    assert _said(_ASK, kept, before=tmp_path) == "read\n", "once for both names of the place"
    assert _said(_ASK, kept, before=tmp_path) == ""
    (package / "models" / "b" / "modeling_b.py").touch()
    assert _said(_ASK, kept, before=tmp_path) == "read\n"
    assert _said(_ASK, kept, before=tmp_path) == ""
    for file in (kept / "lists").iterdir():
        file.write_text("{}")
    assert _said(_ASK, kept, before=tmp_path) == "read\n"
    assert _said(_ASK, kept, before=tmp_path) == ""
    assert _said(_ASK, package / "__init__.py", before=tmp_path) == "read\n", "where nothing can be kept"


@pytest.mark.slow
def test_transformers_has_the_same_names(tmp_path: Path) -> None:
    names = sorted({*transformers.__all__, *transformers.models.__all__})
    plain = f"{names} {transformers.BertConfig}\n"
    assert _said(_NAMES, tmp_path) == plain
    assert len(list((tmp_path / "lists").iterdir())) == 1
    assert _said(_NAMES, tmp_path) == plain
