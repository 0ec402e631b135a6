"""Promises of a served language model: its text is that of the streamed chain, ends where it is to, and is nobody else's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from chainfed_ray.data.messages import Message
from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.detokenizer import Detokenizer
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import Piece, Sampling
from chainfed_ray.serving.row_cache import RowCache
from chainfed_ray.serving.stack_batch import adapters_of
from tests.causal import FAMILIES, a_causal_stack, a_lora_stack, byte_tokenizer, causal_folder, streamed_logits, written

BYTES = byte_tokenizer(chat=False)
GREEDY = Sampling(max_tokens=12, temperature=0)
PROMPT = "tide and "


def likeliest(folder: Path, saved: SavedStack, prompt: str, count: int) -> list[int]:
    """The tokens after ``prompt``, each the likeliest by the streamed chain, without a cache of keys and values."""
    ids: list[int] = BYTES(prompt)["input_ids"]
    begun = len(ids)
    while len(ids) < begun + count and ids[-1] != BYTES.eos_token_id:
        so_far = torch.tensor([ids])
        ids.append(int(streamed_logits(folder, saved.stack, so_far, torch.ones_like(so_far))[0, -1].argmax()))
    return ids[begun:]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def generator(llama: Path) -> Generator:
    return Generator(LanguageModel(f"path:{llama}", torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", [a_causal_stack, a_lora_stack])
def test_greedy_text_is_that_of_the_streamed_chain(
    stack: Callable[[Path], SavedStack], family: str, tmp_path: Path
) -> None:
    folder = causal_folder(family, tmp_path / "base")
    saved = stack(folder)
    generator = Generator(LanguageModel(f"path:{folder}", torch.float32))
    for prompt in (PROMPT, "salt", "0123456789"):
        tokens = likeliest(folder, saved, prompt, count=12)
        text, last = written(generator, saved, prompt, GREEDY)
        assert text == BYTES.decode(tokens, skip_special_tokens=True)
        reason = "stop" if tokens[-1] == BYTES.eos_token_id else "length"
        assert last[1:4] == (len(prompt), len(tokens), reason)


@pytest.mark.slow
def test_stacks_take_turns_and_leave_nothing_behind(llama: Path, generator: Generator) -> None:
    stacks = [a_causal_stack(llama, seed=0), a_causal_stack(llama, layers=(1,), seed=1)]
    alone = [
        written(Generator(LanguageModel(f"path:{llama}", torch.float32)), saved, PROMPT, GREEDY) for saved in stacks
    ]
    assert alone[0] != alone[1]
    for _ in range(2):
        assert [written(generator, saved, PROMPT, GREEDY) for saved in stacks] == alone


@pytest.mark.slow
def test_a_seed_gives_its_text_again_and_draws_from_no_one(llama: Path, generator: Generator) -> None:
    saved = a_causal_stack(llama)
    torch.manual_seed(5)
    texts = [
        written(generator, saved, PROMPT, Sampling(24, temperature=1.5, seed=seed))[0] for seed in (1, 2, 1, None, None)
    ]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 4
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_a_narrow_top_p_and_a_low_temperature_leave_the_likeliest(llama: Path, generator: Generator) -> None:
    saved = a_causal_stack(llama)
    greedy = written(generator, saved, PROMPT, GREEDY)
    assert written(generator, saved, PROMPT, Sampling(12, temperature=1.5, top_p=1e-6)) == greedy
    assert written(generator, saved, PROMPT, Sampling(12, temperature=1e-4)) == greedy


def test_a_text_ends_before_a_stop_string(llama: Path, generator: Generator) -> None:
    saved = a_causal_stack(llama)
    sampling = Sampling(30, temperature=1.5, seed=3)
    text, last = written(generator, saved, PROMPT, sampling)
    stop = text[4:6]
    cut, stopped = written(generator, saved, PROMPT, Sampling(30, 1.5, stop=("no such", stop), seed=3))
    assert cut == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens < last.tokens


def test_a_text_ends_with_the_token_after_which_nobody_listens(llama: Path, generator: Generator) -> None:
    pieces: list[Piece] = []
    sampling = Sampling(40, temperature=1.5, seed=3)
    generator.write(a_causal_stack(llama), PROMPT, sampling, pieces.append, cancelled=lambda: len(pieces) == 2)
    assert pieces[-1].tokens == pieces[1].tokens < 40


def test_what_cannot_be_written_is_refused_by_its_field(llama: Path, generator: Generator) -> None:
    saved = a_causal_stack(llama)
    limit = Blocks(llama, torch.float32).positions
    assert limit is not None
    with pytest.raises(InvalidJob, match=r"^prompt is .*; expected fewer than \d+ tokens"):
        written(generator, saved, "x" * limit, GREEDY)
    with pytest.raises(InvalidJob, match=r"^max_tokens is .*; expected at most 5, because the model has"):
        written(generator, saved, "x" * (limit - 5), Sampling(6))
    with pytest.raises(InvalidJob, match=r"^messages is .*no chat template"):
        generator.write(saved, (Message("user", "hello"),), GREEDY, print)
    assert written(generator, saved, "", GREEDY)[1].prompt_tokens == 1, "the token for a beginning"


@pytest.mark.slow
def test_a_chat_is_its_template(tmp_path: Path) -> None:
    folder = causal_folder("llama", tmp_path / "base", chat=True)
    generator, saved, pieces = (
        Generator(LanguageModel(f"path:{folder}", torch.float32)),
        a_causal_stack(folder),
        list[Piece](),
    )
    generator.write(saved, (Message("system", "be brief"), Message("user", "hi")), GREEDY, pieces.append)
    plain = written(generator, saved, "system: be brief\nuser: hi\nassistant:", GREEDY)
    assert ("".join(piece.text for piece in pieces), pieces[-1]) == plain


@pytest.mark.slow
@given(text=st.text(min_size=1), prompt=st.text(), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3))
@settings(deadline=None)
def test_the_pieces_are_the_text_up_to_the_first_stop(text: str, prompt: str, stop: list[str]) -> None:
    """Whatever the characters, however many tokens each has, and whatever a stop string begins like."""
    tokens = Detokenizer(BYTES, BYTES(prompt)["input_ids"], tuple(stop))
    pieces = [tokens.add(token) for token in BYTES(text)["input_ids"]]
    said = "".join([*pieces, tokens.end()])
    found = [place for one in stop if (place := text.find(one)) >= 0]
    assert tokens.stopped == bool(found)
    if not found:
        assert said == text
    else:
        # Of stop strings that begin in turn, the one that ends first is found first.
        first = min((text.find(one) + len(one), text.find(one)) for one in stop if one in text)
        assert said == text[: first[1]]


@pytest.mark.slow
def test_loras_are_told_apart_where_a_model_flattens_its_tokens(tmp_path: Path) -> None:
    """The shared experts of Qwen2-MoE are given [B · T, D]."""
    base = causal_folder("qwen2_moe", tmp_path / "base")
    model = LanguageModel(f"path:{base}", torch.float32)
    stacks = [a_lora_stack(base, rank=2, seed=0).stack, a_lora_stack(base, rank=3, seed=1).stack, None]
    tokens = torch.arange(3, 15).reshape(3, 4)
    both = model.logits(tokens, [0, 0, 0], adapters_of(stacks), model.new_cache())
    for row, stack in enumerate(stacks):
        alone = model.logits(tokens[row : row + 1], [0], adapters_of([stack]), model.new_cache())
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_texts_that_are_written_together_are_what_they_are_alone(llama: Path) -> None:
    """Whenever they join, however long they are, and whatever stack they have; also those of the base model alone."""
    stacks = [a_causal_stack(llama, seed=0), a_causal_stack(llama, layers=(1,), seed=1), a_lora_stack(llama), None]
    generator, alone = (
        Generator(LanguageModel(f"path:{llama}", torch.float32), most_rows=3),
        Generator(LanguageModel(f"path:{llama}", torch.float32)),
    )
    prompts = ["salt " * length for length in (1, 9, 3, 1, 5, 2, 4)]
    samplings = [Sampling(most, temperature=most % 2, seed=most) for most in (3, 12, 5, 20, 1, 9, 2)]
    told: list[list[Piece | Exception]] = [[] for _ in prompts]
    for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        generator.begin(stacks[place % 4], prompt, sampling, told[place].append)
        generator.step()
    while generator.step():
        pass
    for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        expected = list[Piece]()
        alone.write(stacks[place % 4], prompt, sampling, expected.append)
        assert told[place] == expected


@pytest.mark.slow
def test_a_long_prompt_does_not_hold_up_a_text(llama: Path) -> None:
    generator, saved = Generator(LanguageModel(f"path:{llama}", torch.float32)), a_causal_stack(llama)
    written_first, long = list[Piece | Exception](), list[Piece | Exception]()
    generator.begin(saved, PROMPT, Sampling(30, temperature=1.5, seed=3), written_first.append)
    generator.step()
    generator.begin(saved, "x" * 300, GREEDY, long.append)
    before = len(written_first)
    for _ in range(2):  # one token may be a part of a character
        generator.step()
    assert len(written_first) > before
    assert not long, "its prompt is read in parts"
    while generator.step():
        pass
    assert long[-1] == written(generator, saved, "x" * 300, GREEDY)[1]


def test_an_error_of_the_model_ends_the_texts_that_it_concerns(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, saved = Generator(LanguageModel(f"path:{llama}", torch.float32), most_rows=1), a_causal_stack(llama)
    ended, waiting = list[Piece | Exception](), list[Piece | Exception]()
    generator.begin(saved, PROMPT, GREEDY, ended.append)
    generator.step()
    with monkeypatch.context() as broken:
        broken.setattr(torch.nn.functional, "gelu", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        generator.begin(saved, PROMPT, GREEDY, waiting.append)
        generator.step()
    assert isinstance(ended[-1], MemoryError)
    while generator.step():
        pass
    assert waiting[-1] == written(generator, saved, PROMPT, GREEDY)[1]


@pytest.mark.slow
def test_texts_wait_for_the_memory_of_what_they_may_become(llama: Path) -> None:
    saved, alone = a_causal_stack(llama), Generator(LanguageModel(f"path:{llama}", torch.float32))
    token_bytes = LanguageModel(f"path:{llama}", torch.float32).token_bytes()
    assert token_bytes == 2 * 2 * 16 * 4, "keys and values, two layers, 16 numbers of four bytes"
    generator = Generator(LanguageModel(f"path:{llama}", torch.float32), row_bytes=token_bytes * 60)
    told: list[list[Piece | Exception]] = [[] for _ in range(3)]
    for pieces in told:  # each may take 9 + 12 columns, so there is room for two
        generator.begin(saved, PROMPT, GREEDY, pieces.append)
    while len(told[0]) < 2:
        generator.step()
    assert [bool(pieces) for pieces in told] == [True, True, False]
    while generator.step():
        pass
    assert {pieces[-1] for pieces in told} == {written(alone, saved, PROMPT, GREEDY)[1]}
    with pytest.raises(InvalidJob, match=r"max_tokens is 52; expected at most 60 tokens, the prompt's 9 included"):
        generator.begin(saved, PROMPT, Sampling(52), print)


@pytest.mark.slow
def test_who_leaves_while_his_text_waits_holds_up_nobody(llama: Path) -> None:
    generator, saved = Generator(LanguageModel(f"path:{llama}", torch.float32), most_rows=1), a_causal_stack(llama)
    first, left, last = (list[Piece | Exception]() for _ in range(3))
    generator.begin(saved, PROMPT, GREEDY, first.append)
    generator.step()
    generator.begin(saved, PROMPT, GREEDY, left.append, cancelled=lambda: True)
    generator.begin(saved, PROMPT, GREEDY, last.append)
    generator.step()
    assert [isinstance(piece, Piece) and piece.tokens for piece in left] == [0]
    while generator.step():
        pass
    assert first[-1] == last[-1] == written(generator, saved, PROMPT, GREEDY)[1]


def test_a_stack_that_is_broken_fails_its_own_text_alone(llama: Path) -> None:
    generator, broken = Generator(LanguageModel(f"path:{llama}", torch.float32)), a_causal_stack(llama, seed=1)
    with torch.no_grad():
        next(broken.stack.parameters()).fill_(torch.nan)
    sampling, told, failed = Sampling(12, temperature=1, seed=2), list[Piece | Exception](), list[Piece | Exception]()
    whole = a_causal_stack(llama)
    generator.begin(whole, PROMPT, sampling, told.append)
    generator.step()
    generator.begin(broken, PROMPT, sampling, failed.append)
    while generator.step():
        pass
    assert isinstance(failed[-1], InvalidJob)
    assert "numbers that are finite" in str(failed[-1])
    assert told[-1] == written(generator, whole, PROMPT, sampling)[1]


def test_a_cache_that_cannot_take_a_text_ends_those_that_it_concerns_and_no_other(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, saved = Generator(LanguageModel(f"path:{llama}", torch.float32)), a_causal_stack(llama)
    first, second, later = (list[Piece | Exception]() for _ in range(3))

    def full(self: RowCache, other: RowCache) -> None:
        raise MemoryError("no more")

    generator.begin(saved, PROMPT, GREEDY, first.append)
    generator.step()
    with monkeypatch.context() as broken:
        broken.setattr(RowCache, "join", full)
        generator.begin(saved, PROMPT, GREEDY, second.append)
        generator.step()
    assert isinstance(first[-1], MemoryError)
    assert isinstance(second[-1], MemoryError)
    assert generator.is_idle
    generator.begin(saved, PROMPT, GREEDY, later.append)
    while generator.step():
        pass
    assert later[-1] == written(generator, saved, PROMPT, GREEDY)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows"), [("lfm2", False), ("roberta", False), ("bloom", True), ("gemma3_text", True)]
)
def test_models_that_keep_more_than_keys_and_values_write_one_text_at_a_time(
    kind: str, rows: bool, tmp_path: Path
) -> None:
    """Or those that count positions by themselves. They write what Hugging Face's own code gives without a cache."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260, "pad_token_id": 0}
    more = {
        "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "intermediate_size": 64},
        "roberta": {"is_decoder": True, "intermediate_size": 64, "max_position_embeddings": 130},
        "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "sliding_window": 8},
        "bloom": {"n_head": 4, "n_layer": 2},
    }[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | more)).eval()
    model.save_pretrained(tmp_path / "base")
    BYTES.save_pretrained(tmp_path / "base")
    generator = Generator(LanguageModel(f"path:{tmp_path / 'base'}", torch.float32))
    assert LanguageModel(f"path:{tmp_path / 'base'}", torch.float32).has_rows == rows
    told = [list[Piece | Exception]() for _ in range(3)]
    prompts = ["tide and salt", "worm", "a longer text of many more bytes"]
    for prompt, pieces in zip(prompts, told, strict=True):
        generator.begin(None, prompt, GREEDY, pieces.append)
    while generator.step():
        pass
    for prompt, pieces in zip(prompts, told, strict=True):
        ids: list[int] = BYTES(prompt)["input_ids"]
        begun = len(ids)
        while len(ids) < begun + 12 and ids[-1] != BYTES.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        said = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
        assert said == BYTES.decode(ids[begun:], skip_special_tokens=True), prompt
