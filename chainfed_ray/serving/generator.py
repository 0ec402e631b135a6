"""A causal language model held in memory, with which finished stacks write text."""

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
from chainfed_ray.model.blocks import find_layers
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.detokenizer import Detokenizer

MOST_TOKENS = 256  # of a text, where nobody says how many
_COLDEST = 1e-5  # below it logits over the temperature may be no numbers any more

FinishReason = Literal["stop", "length"]
Prompt = str | Chat  # a text to go on with, or messages that wait for an answer


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen, and when a text ends."""

    max_tokens: int | None = None  # None: as many as the model has positions for, up to MOST_TOKENS
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0  # of the likeliest tokens, those that have this much probability
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: another text each time


class Piece(NamedTuple):
    """Some of a text, as it is written; the last piece says why the text ends: at an end or a stop string, or by its length."""

    text: str
    prompt_tokens: int
    tokens: int  # of the text so far
    finish_reason: FinishReason | None = None


class Generator:
    """``base`` and its head, loaded once; any number of stacks can be put on it. One call at a time.

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
        # What a checkpoint proposes for sampling (penalties, a top_k) does not hold: who asks says how.
        self._model.generation_config = GenerationConfig()
        self._positions: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def write(
        self,
        saved: SavedStack,
        prompt: Prompt,
        sampling: Sampling,
        say: Callable[[Piece], None],
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """Go on with a text, or answer a chat, and ``say`` it piece by piece; end with the token after which all are ``gone``.

        Raises:
            InvalidJob: the prompt is empty or too long, or the model cannot chat.
        """
        ids = self._prompt(prompt)
        most = self._most(prompt, len(ids), sampling.max_tokens)
        writing = _Writing(Detokenizer(self._tokenizer, ids, sampling.stop), self._ends, len(ids), say, gone)
        inputs = torch.tensor([ids])
        # The generator is the whole process's: what others draw is not to follow from a caller's seed.
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
        """The tokens of a prompt, as a job of this task has them in training."""
        ids = prompt_ids(self._tokenizer, prompt) if isinstance(prompt, str) else self._chat(prompt)
        if not ids and self._tokenizer.bos_token_id is not None:
            return [int(self._tokenizer.bos_token_id)]
        if not ids:
            raise InvalidJob.at("prompt", prompt, "one with a token or more: this model has none for a beginning")
        return ids

    def _chat(self, messages: Chat) -> list[int]:
        if not self._tokenizer.chat_template:
            expected = "a prompt for POST /v1/completions: the tokenizer of this model has no chat template"
            raise InvalidJob.at("messages", messages[-1].content, expected)
        return chat_ids(self._tokenizer, messages, add_generation_prompt=True, field="messages")

    def _most(self, prompt: Prompt, length: int, asked: int | None) -> int:
        """The tokens that may follow a prompt of ``length`` tokens."""
        if self._positions is None:
            return asked or MOST_TOKENS
        room = self._positions - length
        if room < 1:
            field = "prompt" if isinstance(prompt, str) else "messages"
            expected = f"fewer than {self._positions} tokens, the model's positions; there are {length}"
            raise InvalidJob.at(field, prompt, expected)
        if asked is not None and asked > room:
            expected = f"at most {room}: the model has {self._positions} positions, and the prompt takes {length}"
            raise InvalidJob.at("max_tokens", asked, expected)
        return asked or min(MOST_TOKENS, room)

    def _configuration(self, sampling: Sampling, most: int) -> GenerationConfig:
        common = {
            "max_new_tokens": most,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": min(self._ends, default=0),  # one text at a time: there is no padding
        }
        if sampling.temperature < _COLDEST:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
        )

    @contextmanager
    def _adapted(self, stack: AdapterStack) -> Iterator[None]:
        """Meanwhile each layer's output goes through its adapter."""
        hooks = [self._layers[layer].register_forward_hook(_through(stack.adapter(layer))) for layer in stack.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Writing(StoppingCriteria):
    """Says what is written, token by token, and ends it."""

    def __init__(
        self,
        text: Detokenizer,
        ends: set[int],
        prompt_tokens: int,
        say: Callable[[Piece], None],
        gone: Callable[[], bool],
    ) -> None:
        self._text, self._ends, self._prompt_tokens, self._say, self._gone = text, ends, prompt_tokens, say, gone
        self._tokens = 0
        self._ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Token ids [1, T] so far → whether no more are to be made, [1]."""
        token = int(input_ids[0, -1])
        self._tokens += 1
        self._ended = token in self._ends
        if not self._ended and (text := self._text.add(token)):
            self._say(Piece(text, self._prompt_tokens, self._tokens))
        return torch.tensor([self._ended or self._text.stopped or self._gone()], device=input_ids.device)

    def finish(self) -> None:
        """Say the end."""
        text = self._text.end()
        reason: FinishReason = "stop" if self._ended or self._text.stopped else "length"
        self._say(Piece(text, self._prompt_tokens, self._tokens, reason))


def _through(adapter: Adapter) -> Callable[[nn.Module, Any, Any], Any]:
    def adapted(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    return adapted


def _ends(token: int | list[int] | None) -> set[int]:
    """The tokens that end a text."""
    return set() if token is None else {token} if isinstance(token, int) else set(token)
