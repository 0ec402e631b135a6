"""A causal language model in memory: its tokens, its limits, and its forward pass with other adapters for each row."""

from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chainfed_ray.data.messages import Chat
from chainfed_ray.data.targets import chat_ids, prompt_ids
from chainfed_ray.data.tokens import check_known
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import tokenizer
from chainfed_ray.model.blocks import linear_modules_of
from chainfed_ray.model.forward import adapt
from chainfed_ray.model.source import load_whole, lowest_layers, weights_folder
from chainfed_ray.model.trunk import find_layers
from chainfed_ray.serving.detokenizer import Detokenizer
from chainfed_ray.serving.messages import MOST_TOKENS, SCHEMA, Chance, Prompt, TokenChances
from chainfed_ray.serving.row_cache import RowCache
from chainfed_ray.serving.stack_batch import RowAdapters

_COUNT_POSITIONS = ("roberta", "camembert", "data2vec")  # types of models that add to the positions of tokens
_BY_DISTANCE = ("bloom", "mpt")  # types whose attention knows distances alone


class LanguageModel:
    """The language model ``base``, loaded once: all of it, or its lowest ``layers`` with its own norm and head.

    It has no weights of its own if it is part ``of`` another one of the same base model. It is not thread-safe.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(
        self, base: str, dtype: torch.dtype, layers: int | None = None, of: "LanguageModel | None" = None
    ) -> None:
        if of is None or layers is None:
            folder = weights_folder(base)
            self._tokenizer = tokenizer(base, folder)
            self._model: Any = load_whole(AutoModelForCausalLM, folder, dtype, layers)
        else:
            self._tokenizer, self._model = of._tokenizer, lowest_layers(of._model, layers)
        self._model.eval().requires_grad_(False)
        config = self._model.config.get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        ends = _tokens(self._model.generation_config.eos_token_id) | _tokens(self._tokenizer.eos_token_id)
        self.ends = {token for token in ends if 0 <= token < self._vocabulary}  # some name others, such as -1 for none
        self._takes = set(signature(self._model.forward).parameters)
        self.has_rows = self._can_have_rows()
        self._running = _Running()
        self.layers: Any = self._model.get_submodule(find_layers(self._model, base))
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(self._running.hook(index))
            for path, module in linear_modules_of(layer):
                module.register_forward_hook(self._running.inner_hook(index, path))

    def new_cache(self) -> Any:
        """An empty cache of keys and values: a ``RowCache`` if this model's can be kept in rows."""
        return RowCache() if self.has_rows else DynamicCache(config=self._model.config)

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Sequence[int], adapters: RowAdapters, cache: Any) -> Tensor:
        """Run new tokens [B, T] of B rows, and add them to ``cache``, where the rows have ``lengths`` tokens already.

        Returns the logits of the token that follows each row, [B, V].
        """
        held, new = max(lengths), tokens.shape[1]
        own = torch.tensor(lengths).unsqueeze(1)
        given = {
            "attention_mask": (torch.arange(held + new) >= held - own).long(),  # rows are aligned at their ends
            **({"position_ids": own + torch.arange(new)} if self.has_rows else {}),
            "logits_to_keep": 1,
        }
        self._running.adapters = adapters
        try:
            output = self._model(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in given.items() if name in self._takes},
            )
        finally:
            self._running.adapters = {}
        logits: Tensor = output.logits[:, -1]
        return logits

    def grammar(self, schema: str) -> LLMatcher:
        """What allows the tokens of a JSON document that matches ``schema``.

        Raises:
            InvalidJob: the schema cannot be followed.
        """
        expected = "a JSON schema that can be followed"
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema)
            if not (wrong := LLMatcher.validate_grammar(grammar, self._guided)):
                return LLMatcher(self._guided, grammar)
        except ValueError as error:
            wrong = str(error)
        raise InvalidJob.at(SCHEMA, schema, f"{expected} ({wrong.splitlines()[0]})")

    @cached_property
    def _guided(self) -> LLTokenizer:
        fast: Any = self._tokenizer  # another kind is refused
        try:
            return from_tokenizer(fast, self._vocabulary, sorted(self.ends))
        except ValueError as error:
            raise InvalidJob.at(SCHEMA, "a schema", f"none, because of this model's tokenizer ({error})") from None

    def token_bytes(self) -> int:
        """The bytes that the cache holds for each token of a row."""
        cache = self.new_cache()
        self.logits(torch.tensor([[0]]), [0], {}, cache)
        held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        return sum(states[:, :, :1].nbytes for states in held if states is not None) or 1

    def _can_have_rows(self) -> bool:
        """True if rows of other lengths can be run together: if keys and values are all that is kept, and positions are given.

        Recurrent layers keep more. Some models count positions by themselves, in which shorter rows would be wrong.
        """
        config = self._model.config
        layers = {type(layer) for layer in DynamicCache(config=config).layers}
        counts = any(word in config.model_type for word in _COUNT_POSITIONS)
        placed = "position_ids" in self._takes or config.model_type in _BY_DISTANCE
        return layers <= {DynamicLayer, DynamicSlidingWindowLayer} and placed and not counts

    def chances(self, logits: Tensor, token: int, count: int) -> TokenChances:
        """The chances by logits [V] of ``token``, and of the ``count`` likeliest tokens."""
        logprobs = torch.log_softmax(logits.float(), -1)
        best = logprobs.topk(min(count, len(logprobs)))
        likeliest = (self._chance(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenChances(self._chance(token, float(logprobs[token])), tuple(likeliest))

    def _chance(self, token: int, logprob: float) -> Chance:
        # Behind another token: many tokenizers drop the leading space of a text.
        alone, both = (self._text([*self._before, *tokens]) for tokens in ([], [token]))
        return Chance(both[len(alone) :], logprob)

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def _before(self) -> list[int]:
        tokens: list[int] = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        return tokens

    def detokenizer(self, prompt: Sequence[int], stop: tuple[str, ...]) -> Detokenizer:
        """What turns the tokens after ``prompt`` into text, up to a ``stop`` string."""
        return Detokenizer(self._tokenizer, prompt, stop)

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, one or more, made in the same way as those of a job's training rows.

        Raises:
            InvalidJob: the prompt is empty, or has a token that the model has not, or the model cannot chat.
        """
        ids = prompt_ids(self._tokenizer, prompt) if isinstance(prompt, str) else self._chat(prompt)
        if not ids and self._tokenizer.bos_token_id is not None:
            return [int(self._tokenizer.bos_token_id)]
        if not ids:
            expected = "a prompt of one token or more, because this model has no token for the beginning of a text"
            raise InvalidJob.at("prompt", prompt, expected)
        check_known(self._tokenizer, "prompt" if isinstance(prompt, str) else "messages", ids, self._vocabulary)
        return ids

    def most_after(self, prompt: Prompt, length: int, asked: int | None) -> int:
        """The most tokens that may follow a prompt of ``length`` tokens, where the caller asked for ``asked``.

        Raises:
            InvalidJob: the model's positions are too few.
        """
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

    def _chat(self, messages: Chat) -> list[int]:
        if not self._tokenizer.chat_template:
            expected = "a prompt for POST /v1/completions, because this model's tokenizer has no chat template"
            raise InvalidJob.at("messages", messages[-1].content, expected)
        return chat_ids(self._tokenizer, messages, add_generation_prompt=True, field="messages")


class _Running:
    """The adapters of the rows that run, as the hooks of the layers see them.

    The hooks hold this and not the language model: a model that is let go of is then freed at once, and not when Python looks
    for circles.
    """

    def __init__(self) -> None:
        self.adapters: RowAdapters = {}

    def hook(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        """What passes the output of layer ``index`` through the rows' adapters."""

        def through(layer: nn.Module, inputs: Any, output: Any) -> Any:
            adapter = self.adapters.get((index, ""))
            return adapt(adapter, layer, inputs, output) if adapter else None  # None: the output stays as it is

        return through

    def inner_hook(self, index: int, path: str) -> Callable[[nn.Module, Any, Any], Any]:
        """What adds to the output of the module at ``path`` in layer ``index`` what the rows' LoRAs make of its input."""

        def add(_module: nn.Module, inputs: Any, output: Any) -> Any:
            change = self.adapters.get((index, path))
            return output + change(inputs[0]) if change else None

        return add


def _tokens(token: int | list[int] | None) -> set[int]:
    """The end tokens of a configuration, which gives none, one or several."""
    return set() if token is None else {token} if isinstance(token, int) else set(token)
