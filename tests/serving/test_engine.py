"""A process that answers with many models keeps within its memory, and answers as if it had all of it."""

from pathlib import Path
from queue import SimpleQueue

import torch

from chainfed_ray.model.saved_stack import save_stack, stored_bytes
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import ModelKey, Piece, Question, Sampling
from chainfed_ray.streaming.checkpoint import Checkpoint
from tests.causal import a_causal_stack, causal_folder, written
from tests.models import a_saved_stack


def test_more_stacks_than_there_is_room_for(tiny_model_folder: Path, tmp_path: Path) -> None:
    for seed in range(6):
        save_stack(a_saved_stack(tiny_model_folder, classes=3, seed=seed), tmp_path / str(seed))
    checkpoint = Checkpoint(tiny_model_folder)
    base_bytes = sum(checkpoint.loaded_bytes(name, torch.float32) for name in checkpoint.names)
    checkpoint.close()
    keys = [ModelKey(f"path:{tiny_model_folder}", "float32", str(seed)) for seed in range(6)]
    small = Engine(lambda model: tmp_path / str(model.job), base_bytes + 2 * stored_bytes(tmp_path / "0") + 100)
    large = Engine(lambda model: tmp_path / str(model.job), 2**30)
    for place in (0, 1, 0, 2, 3, 4, 5, 0, 5):
        question = Question(keys[place], ["salt tide wave"])
        assert small.classify([question]) == large.classify([question])


def test_texts_of_several_models_are_written_at_the_same_time(tmp_path: Path) -> None:
    folders = [causal_folder("llama", tmp_path / "llama"), causal_folder("gpt2", tmp_path / "gpt2")]
    for seed, folder in enumerate(folders):
        save_stack(a_causal_stack(folder, seed=seed), tmp_path / f"stack-{seed}")
    engine, told = Engine(lambda model: tmp_path / str(model.job), 2**30), SimpleQueue[tuple[int, Piece | Exception]]()
    sampling = Sampling(10, temperature=0)
    for seed, folder in enumerate(folders):
        key = ModelKey(f"path:{folder}", "float32", f"stack-{seed}")
        engine.begin(key, "tide and ", sampling, lambda piece, seed=seed: told.put((seed, piece)), lambda: False)  # type: ignore[misc]
    texts, ended = ["", ""], list[Piece]()
    while len(ended) < len(folders):
        seed, piece = told.get(timeout=60)
        assert isinstance(piece, Piece)
        texts[seed] += piece.text
        if piece.finish_reason:
            ended.append(piece)
    for seed, folder in enumerate(folders):
        alone = Generator(LanguageModel(f"path:{folder}", torch.float32))
        assert texts[seed] == written(alone, a_causal_stack(folder, seed=seed), "tide and ", sampling)[0]
