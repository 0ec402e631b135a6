"""Promise: an early exit answers as the chain cut at its layer, whoever else asks of the same base model."""

import gc
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from weakref import ref

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from chainfed_ray.errors import InvalidJob, ServiceBusy, UnsupportedModel
from chainfed_ray.export.handover import hand_over
from chainfed_ray.model.blocks import Blocks, weight_bytes
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.model.saved_stack import SavedStack, save_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import ModelKey, Piece, Question, Sampling
from chainfed_ray.serving.peft_method import ChainFedConfig
from tests.causal import a_causal_stack, a_lora_stack, byte_tokenizer, causal_folder, written
from tests.models import a_saved_stack, chain_outputs, tiny_causal_model
from tests.watching import wait_for

TEXTS = ["salt tide wave", "worm", "a much longer text about ships, stars and seeds", "wind"]
GREEDY = Sampling(max_tokens=10, temperature=0)
BYTES = byte_tokenizer(chat=False)


def cut(saved: SavedStack, layers: int) -> SavedStack:
    """The same stack, as that of an exit."""
    return replace(saved, stack=saved.stack.up_to(layers - 1), run_layers=layers)


@torch.no_grad()
def plain(folder: Path, saved: SavedStack, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The probabilities of an exit, and its embeddings, from the outputs of the layers, one text at a time."""
    words, blocks = AutoTokenizer.from_pretrained(folder), Blocks(folder, torch.float32)
    probabilities, embeddings = [], []
    for text in texts:
        row = words([text], return_tensors="pt", truncation=True, max_length=saved.max_length)
        mask = row["attention_mask"]
        *below, last = chain_outputs(blocks, saved.stack, row["input_ids"], mask)[: saved.run_layers]
        means = [mean_over_tokens(hidden, mask) for hidden in below]
        assert saved.stack.head is not None
        given = torch.stack(means, 1) if means else None
        probabilities.append(saved.stack.head(last, mask, given).softmax(-1))
        vector = mean_over_tokens(blocks.finish(last, mask), mask)
        embeddings.append(vector / vector.norm())
    return torch.cat(probabilities), torch.cat(embeddings)


@pytest.mark.slow
def test_rows_of_several_exits_and_of_the_whole_model_in_one_call(tiny_model_folder: Path) -> None:
    whole = [a_saved_stack(tiny_model_folder, seed=seed) for seed in range(2)]
    stacks = [cut(whole[0], 2), whole[0], cut(whole[1], 3), cut(whole[1], 2), whole[1]]
    classifier = Classifier(f"path:{tiny_model_folder}", torch.float32)
    found = classifier.of_each([(saved, TEXTS) for saved in stacks])
    vectors = classifier.embeddings([(saved, TEXTS) for saved in stacks])
    for saved, ours, of_texts in zip(stacks, found, vectors, strict=True):
        probabilities, embeddings = plain(tiny_model_folder, saved, TEXTS)
        torch.testing.assert_close(ours, probabilities, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor([text.values for text in of_texts]), embeddings, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_an_exit_loads_the_layers_that_it_runs_and_no_more(tiny_model_folder: Path, tmp_path: Path) -> None:
    saved, base = a_saved_stack(tiny_model_folder), f"path:{tiny_model_folder}"
    save_stack(saved, tmp_path / "None")
    save_stack(cut(saved, 2), tmp_path / "2")
    files = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("None", "2")}
    most = weight_bytes(tiny_model_folder, torch.float32) + sum(files.values())
    engine = Engine(lambda model: tmp_path / str(model.layers), most)
    key = ModelKey(base, "float32", "job")
    small = weight_bytes(tiny_model_folder, torch.float32, layers=2)
    one, other = (Question(key._replace(layers=layers), TEXTS) for layers in (2, None))
    (before,) = engine.classify([one])
    assert engine.held_bytes == small + files["2"]
    (whole,) = engine.classify([other])
    (after,) = engine.classify([one])
    assert engine.held_bytes == most, "the part has gone, or there would be no room"
    for answer, of in ((before, cut(saved, 2)), (after, cut(saved, 2)), (whole, saved)):
        assert not isinstance(answer, Exception)
        expected, _ = plain(tiny_model_folder, of, TEXTS)
        torch.testing.assert_close(torch.tensor(answer), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def likeliest(folder: Path, saved: SavedStack, prompt: str) -> str:
    """The text of an exit, each token the likeliest by the streamed chain, without a cache of keys and values."""
    ids: list[int] = BYTES(prompt)["input_ids"]
    begun, blocks = len(ids), Blocks(folder, torch.float32)
    reader = blocks.reader()
    while len(ids) < begun + 10 and ids[-1] != BYTES.eos_token_id:
        so_far = torch.tensor([ids])
        mask = torch.ones_like(so_far)
        last = chain_outputs(blocks, saved.stack, so_far, mask)[(saved.run_layers or blocks.num_layers) - 1]
        finished = blocks.finish(last, mask)[0, -1]
        ids.append(int(torch.cat([finished @ rows.T for _, rows in reader.slices(blocks.language_head)]).argmax()))
    reader.close()
    return str(BYTES.decode(ids[begun:], skip_special_tokens=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_base_model_classifies_and_writes_and_its_exits_write_too(family: str, tmp_path: Path) -> None:
    """All at once, and the base model is in memory once: the bytes are counted, and the weights are the same tensors."""
    folder = tmp_path / "base"
    tiny_causal_model(family, tied=family == "gpt2", vocabulary=260, layers=3).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    writers = {"whole": a_causal_stack(folder, layers=(0, 1, 2)), "lora": a_lora_stack(folder, layers=(1, 2))}
    stacks = {
        "whole-None": writers["whole"], "whole-1": cut(writers["whole"], 1), "whole-2": cut(writers["whole"], 2),
        "lora-2": cut(writers["lora"], 2), "class-None": a_saved_stack(folder, layers=(0, 2)),
        "class-2": cut(a_saved_stack(folder, layers=(0, 2)), 2),
    }  # fmt: skip
    for name, saved in stacks.items():
        save_stack(saved, tmp_path / name)
    most = 2**22
    engine, told = (
        Engine(lambda model: tmp_path / f"{model.job}-{model.layers}", most),
        SimpleQueue[tuple[str, object]](),
    )
    first = [name for name in stacks if not name.startswith("class")]
    keys = {
        name: ModelKey(f"path:{folder}", "float32", job, layers=None if layers == "None" else int(layers))
        for name in stacks
        for job, _, layers in [name.partition("-")]
    }
    answered = engine.classify([Question(keys["class-2"], TEXTS)])  # loads two layers alone
    for name in first[1:] + first[:1]:
        engine.begin(keys[name], "tide and ", GREEDY, lambda piece, name=name: told.put((name, piece)), lambda: False)  # type: ignore[misc]
    answered += engine.classify([Question(keys["class-None"], TEXTS), Question(keys["class-2"], TEXTS)])
    texts, ended = dict.fromkeys(first, ""), 0
    while ended < len(first):
        name, piece = told.get(timeout=60)
        assert isinstance(piece, Piece), piece
        texts[name] += piece.text
        ended += piece.finish_reason is not None
    assert texts == {name: likeliest(folder, stacks[name], "tide and ") for name in first}
    for answer, name in zip(answered, ("class-2", "class-None", "class-2"), strict=True):
        assert not isinstance(answer, Exception), answer
        torch.testing.assert_close(torch.tensor(answer), plain(folder, stacks[name], TEXTS)[0], rtol=0, atol=1e-5)
    files = sum((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in stacks)

    def is_held_once() -> bool:
        engine.classify([Question(keys["class-None"], TEXTS)])  # lets go of the parts whose texts have ended
        return engine.held_bytes == weight_bytes(folder, torch.float32) + most // 8 + files

    wait_for(is_held_once, "the parts to go")


@pytest.mark.slow
def test_where_both_do_not_fit_what_is_asked_for_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    """There is room for the whole model that classifies, or for an exit that writes, and not for a model that does both."""
    folder = tmp_path / "base"
    tiny_causal_model("llama", tied=False, vocabulary=260, layers=4).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    stacks = {"None": a_saved_stack(folder, layers=(0, 1)), "1": cut(a_causal_stack(folder, layers=(0,)), 1)}
    for name, saved in stacks.items():
        save_stack(saved, tmp_path / name)
    whole = weight_bytes(folder, torch.float32)
    files = sum((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in stacks)
    assert weight_bytes(folder, torch.float32, layers=1) + (whole + files) // 8 < whole
    engine, told = Engine(lambda model: tmp_path / str(model.layers), whole + files), SimpleQueue[Piece | Exception]()
    key, texts = ModelKey(f"path:{folder}", "float32", "job"), list[str]()
    for _ in range(2):
        (answer,) = engine.classify([Question(key, TEXTS)])
        torch.testing.assert_close(torch.tensor(answer), plain(folder, stacks["None"], TEXTS)[0], rtol=0, atol=1e-5)
        wait_for(lambda: begun(engine, key._replace(layers=1), told), "room for the text")
        texts.append("")
        while not isinstance(piece := told.get(timeout=60), Exception):
            texts[-1] += piece.text
            if piece.finish_reason:
                break
        wait_for(
            lambda: not isinstance(engine.classify([Question(key, TEXTS)])[0], Exception), "room for the classifier"
        )
    assert texts == [likeliest(folder, stacks["1"], "tide ")] * 2


def begun(engine: Engine, key: ModelKey, told: "SimpleQueue[Piece | Exception]") -> bool:
    """Begin a text; False if what is in use leaves no room."""
    try:
        engine.begin(key, "tide ", GREEDY, told.put, lambda: False)
    except ServiceBusy:
        return False
    return True


def test_a_model_that_is_let_go_of_is_freed_at_once(tmp_path: Path) -> None:
    """Also if no collector looks for circles: the bytes of tensors are none of its business."""
    base = f"path:{causal_folder('llama', tmp_path / 'base')}"
    collector = gc.isenabled()
    gc.disable()
    try:
        model = LanguageModel(base, torch.float32)
        weights = [ref(parameter) for parameter in model.layers.parameters()]
        whole, part = (Generator(one, row_bytes=2**20) for one in (model, LanguageModel(base, torch.float32, 1, model)))
        whole.share_with(part)
        saved = a_lora_stack(tmp_path / "base")
        assert written(whole, saved, "tide", GREEDY) != written(part, cut(saved, 1), "tide", GREEDY)
        del model, whole, part
        assert not [one for one in weights if one() is not None]
    finally:
        if collector:
            gc.enable()


def test_an_exit_is_handed_over_to_no_engine_that_would_run_all_layers(tiny_model_folder: Path, tmp_path: Path) -> None:
    save_stack(cut(a_saved_stack(tiny_model_folder), 2), tmp_path / "exit-2")
    with pytest.raises(InvalidJob, match="an early exit after 2"):
        hand_over(tmp_path / "exit-2", tmp_path / "out", "peft")
    with pytest.raises(UnsupportedModel, match="an early exit after 2 layers"):
        ChainFedConfig.from_pretrained(str(tmp_path / "exit-2"))
