"""Promises of memory profiles that are kept: they are found again, for the same model and question alone, and cost no more."""

import json
from pathlib import Path

import pytest

from chainfed_ray.budget.demand import NO_MEMORY, BytePolynomial, MemoryProfile, PartMemory, StepMemory
from chainfed_ray.budget.kept_profiles import kept_profile, pass_once

_TENSOR = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's settings and the header of its weights, and a cache folder with nothing in it."""
    monkeypatch.setenv("CHAINFED_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder, _TENSOR)
    return folder


def write_weights(folder: Path, header: dict[str, object], values: bytes = bytes(8)) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)


def a_profile(layers: int) -> MemoryProfile:
    part = PartMemory(BytePolynomial(((1, 2), (3,))), (BytePolynomial(((4,),)),), ())
    step = StepMemory(part, NO_MEMORY, part, NO_MEMORY)
    return MemoryProfile(
        layers, 8, 4, 100, 10, 20, 30, 40, BytePolynomial(()), 50, 60, 2, False, True, step, step, part, NO_MEMORY
    )


def layers_found(model: Path, question: str, traced: int) -> int:
    """The layers of the profile that is found, where tracing gives ``traced``."""
    found = kept_profile(model, question, lambda: a_profile(traced))
    assert found == a_profile(found.layers)
    return found.layers


def test_what_was_traced_is_found_again_for_the_same_model_and_question(model: Path) -> None:
    assert layers_found(model, "R = 8", traced=1) == 1
    assert layers_found(model, "R = 8", traced=2) == 1
    write_weights(model, _TENSOR, values=bytes(range(8)))
    assert layers_found(model, "R = 8", traced=3) == 1, "values change no form"
    assert layers_found(model, "R = 16", traced=4) == 4
    write_weights(model, {"weight": {**_TENSOR["weight"], "dtype": "I64"}})
    assert layers_found(model, "R = 8", traced=5) == 5
    (model / "config.json").write_text('{"layers": 2}')
    assert layers_found(model, "R = 8", traced=6) == 6


def test_a_check_that_was_passed_is_not_made_again(model: Path) -> None:
    made = list[str]()

    def check() -> None:
        made.append("check")
        if len(made) == 1:
            raise ValueError("this model cannot be streamed")

    with pytest.raises(ValueError, match="cannot be streamed"):
        pass_once(model, "layers", check)
    pass_once(model, "layers", check)
    pass_once(model, "layers", check)
    assert made == ["check", "check"], "what it raised is no answer"
    (model / "config.json").write_text('{"layers": 2}')
    pass_once(model, "layers", check)
    assert len(made) == 3


def test_a_damaged_file_is_traced_again_and_a_folder_that_is_none_costs_the_time_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layers_found(model, "R = 8", traced=1) == 1
    (kept,) = (tmp_path / "models" / "profiles").iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    assert layers_found(model, "R = 8", traced=2) == 2
    assert layers_found(model, "R = 8", traced=3) == 2
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file")
    assert layers_found(model, "R = 8", traced=4) == 4
    monkeypatch.setenv("CHAINFED_MODELS", "not/absolute")
    assert layers_found(model, "R = 8", traced=5) == 5


@pytest.mark.slow
def test_jobs_that_ask_for_ever_new_profiles_do_not_fill_the_disk(model: Path, tmp_path: Path) -> None:
    for width in range(300):
        layers_found(model, f"R = {width}", traced=width)
    assert len(list((tmp_path / "models" / "profiles").iterdir())) == 256
    assert layers_found(model, "R = 299", traced=0) == 299
