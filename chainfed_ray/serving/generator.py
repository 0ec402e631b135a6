"""Generates text with finished stacks on a causal language model that stays in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from chainfed_ray.data.chats import Chat
from chainfed_ray.data.targets import chat_ids, prompt_ids
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.adapters import Adapter, AdapterStack
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.trunk import find_layers
from chainfed_ray.serving.detokenizer import Detokenizer

MOST_TOKENS = 256  # the limit of a text's tokens where the caller gives none
_COLDEST = 1e-5  # below this temperature, dividing the logits by it may overflow; the likeliest token is taken instead

FinishReason = Literal["stop", "length"]
Prompt = str | Chat  # a text to continue, or the messages of a chat to answer


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen, and when a text ends."""

    max_tokens: int | None = None  # None: MOST_TOKENS, or the positions that the prompt leaves if those are fewer
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    stop: tuple[str, ...] = ()  # the text ends before any of these strings
    seed: int | None = None  # None: a different text each time


class Piece(NamedTuple):
    """A piece of a text that is being generated. The last piece has the ``finish_reason``."""

    text: str
    prompt_tokens: int  # tokens of the prompt
    tokens: int  # tokens generated so far
    finish_reason: FinishReason | None = None  # "stop": an end token or a stop string; "length": the limit of tokens


class Generator:
    """The language model ``base``, loaded once. Each call names the stack to use.

    It is not thread-safe: callers make one call at a time.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        folder = resolve(base)
        self._tokenizer = tokenizer(base, folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._model.eval().requires_grad_(False)
        self._layers: Any = self._model.get_submodule(find_layers(self._model, base))
        self._ends = _ends(self._model.generation_config.eos_token_id) | _ends(self._tokenizer.eos_token_id)
        # The caller alone says how to sample: a checkpoint's own settings (penalties, a top_k) would change the result.
        self._model.generation_config = GenerationConfig()
        self._positions: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def write(
        self,
        saved: SavedStack,
        prompt: Prompt,
        sampling: Sampling,
        emit: Callable[[Piece], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Continue a text, or answer a chat, and pass the new text to ``emit`` piece by piece.

        ``cancelled`` is asked after each token; the text ends as soon as it returns True.

        Raises:
            InvalidJob: the prompt is empty or too long, or the model cannot chat.
        """
        ids = self._prompt(prompt)
        most = self._most(prompt, len(ids), sampling.max_tokens)
        writing = _Writing(Detokenizer(self._tokenizer, ids, sampling.stop), self._ends, len(ids), emit, cancelled)
        inputs = torch.tensor([ids])
        # torch's random generator belongs to the whole process. The fork keeps a caller's seed from affecting other work.
        with torch.random.fork_rng(devices=[]), self._adapted(saved.stack):
            torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
            self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._configuration(sampling, most),
                stopping_criteria=StoppingCriteriaList([writing]),
            )
        writing.finish()

    def _prompt(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, made in the same way as those of a job's training rows."""
        ids = prompt_ids(self._tokenizer, prompt) if isinstance(prompt, str) else self._chat(prompt)
        if not ids and self._tokenizer.bos_token_id is not None:
            return [int(self._tokenizer.bos_token_id)]
        if not ids:
            expected = "a prompt of one token or more, because this model has no token for the beginning of a text"
            raise InvalidJob.at("prompt", prompt, expected)
        return ids

    def _chat(self, messages: Chat) -> list[int]:
        if not self._tokenizer.chat_template:
            expected = "a prompt for POST /v1/completions, because this model's tokenizer has no chat template"
            raise InvalidJob.at("messages", messages[-1].content, expected)
        return chat_ids(self._tokenizer, messages, add_generation_prompt=True, field="messages")

    def _most(self, prompt: Prompt, length: int, asked: int | None) -> int:
        """The most tokens that may follow a prompt of ``length`` tokens, where the caller asked for ``asked``."""
        if self._positions is None:
            return asked or MOST_TOKENS
        room = self._positions - length
        if room < 1:
            field = "prompt" if isinstance(prompt, str) else "messages"
            most = self._positions
            expected = f"fewer than {most} tokens, because the model has {most} positions; this prompt has {length}"
            raise InvalidJob.at(field, prompt, expected)
        if asked is not None and asked > room:
            expected = (
                f"at most {room}, because the model has {self._positions} positions and the prompt takes {length}"
            )
            raise InvalidJob.at("max_tokens", asked, expected)
        return asked or min(MOST_TOKENS, room)

    def _configuration(self, sampling: Sampling, most: int) -> GenerationConfig:
        common = {
            "max_new_tokens": most,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": min(self._ends, default=0),  # required by transformers; a single text needs no padding
        }
        if sampling.temperature < _COLDEST:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
        )

    @contextmanager
    def _adapted(self, stack: AdapterStack) -> Iterator[None]:
        """Within this context, each layer's output passes through its adapter of ``stack``."""
        hooks = [self._layers[layer].register_forward_hook(_through(stack.adapter(layer))) for layer in stack.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Writing(StoppingCriteria):
    """Emits the text token by token, and tells ``generate`` when to stop."""

    def __init__(
        self,
        text: Detokenizer,
        ends: set[int],
        prompt_tokens: int,
        emit: Callable[[Piece], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._text, self._ends, self._prompt_tokens, self._emit, self._cancelled = (
            text,
            ends,
            prompt_tokens,
            emit,
            cancelled,
        )
        self._tokens = 0
        self._ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Token ids so far [1, T] → True to stop, [1]."""
        token = int(input_ids[0, -1])
        self._tokens += 1
        self._ended = token in self._ends
        if not self._ended and (text := self._text.add(token)):
            self._emit(Piece(text, self._prompt_tokens, self._tokens))
        return torch.tensor([self._ended or self._text.stopped or self._cancelled()], device=input_ids.device)

    def finish(self) -> None:
        """Emit the last piece, with the reason for which the text ended."""
        text = self._text.end()
        reason: FinishReason = "stop" if self._ended or self._text.stopped else "length"
        self._emit(Piece(text, self._prompt_tokens, self._tokens, reason))


def _through(adapter: Adapter) -> Callable[[nn.Module, Any, Any], Any]:
    def adapted(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    return adapted


def _ends(token: int | list[int] | None) -> set[int]:
    """The end tokens of a configuration, which gives none, one or several."""
    return set() if token is None else {token} if isinstance(token, int) else set(token)
