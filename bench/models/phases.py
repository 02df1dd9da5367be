"""A step of decoding, a prefill and a whole `generate()` of a model, to compile and to time.

A step reads a static cache that holds a context of random tokens; the steps of all that is compared
read and write the same one, from the same length on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.results import Row

_TRIED_TOKENS = 16  # of which a model with experts decodes one

Work = Callable[[], Tensor]


@dataclass
class Ready:
    """A way that computes the right thing, compiled and warm, and what is known of it already.

    Attributes:
        rewind: forgets what the calls of `work` have added to the context.
    """

    work: Work
    rewind: Callable[[], None]
    row: Row = field(default_factory=dict)


class Decoding:
    """A batch of sequences of `context` tokens, each to be lengthened by up to `steps` more.

    Attributes:
        rows: tokens that go through the layers in a step; `head_rows` of them through the head.
        attended: pairs of a token and one that it attends to, in the first step.
        length: tokens that the cache has room for.
        context_bytes: of the keys and values of the context, of all layers.
    """

    dynamic = False

    def __init__(self, model: nn.Module, batch: int, context: int, steps: int) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.context, self.length = context, context + steps
        self.rows = self.head_rows = batch
        self.attended = batch * (context + 1)
        cache_type = import_module("transformers").StaticCache
        self.cache = cache_type(config=config, max_cache_len=self.length)
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        self.cache.early_initialization(batch, key_heads, head_size(config), dtype, device)
        tokens = random_tokens(model, context + 1, batch)
        self.tokens = tokens[:, -1:]
        self._fill(model, tokens[:, :-1])
        # These count in Python too, and a graph is compiled for one count. A full one loses a token
        # with each step.
        self.sliding = [layer for layer in self.cache.layers if layer.is_sliding]
        self.windows = [(layer.keys.clone(), layer.values.clone()) for layer in self.sliding]
        token = 2 * batch * key_heads * head_size(config) * dtype.itemsize
        self.context_bytes = sum(
            token * min(context, layer.max_cache_len) for layer in self.cache.layers
        )
        self.positions = torch.full((batch, 1), context, device=device)
        # OPT counts positions from the mask where it is not given one.
        self.mask = torch.ones((batch, self.length), dtype=torch.long, device=device)

    @torch.no_grad()
    def _fill(self, model: nn.Module, tokens: Tensor) -> None:
        """By the model itself: Gemma makes of random keys and values what no rounding survives."""
        mask = torch.ones_like(tokens)
        model(tokens, mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def settle(self, model: nn.Module) -> None:
        """Take the token whose experts `model` chooses by the widest margin, of a few tried.

        Where two experts score alike, rounding decides which one is asked, and right ways to run a
        model differ by a whole expert.
        """
        chosen = getattr(model.config, "num_experts_per_tok", None)
        if chosen is None:
            return
        random = random_tokens(model, _TRIED_TOKENS, len(self.tokens))
        tried = (tokens.contiguous() for tokens in random.split(1, dim=1))
        self.tokens = max(tried, key=lambda tokens: self._margin(model, tokens, chosen))

    def _margin(self, model: Callable[..., Any], tokens: Tensor, chosen: int) -> float:
        """Between the last expert that any of `tokens` is given in any layer, and the next one."""
        self.rewind()
        self._rewind_sliding()
        output = model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            output_router_logits=True,
        )
        best = [scores.float().topk(chosen + 1).values for scores in output.router_logits]
        return min(float((scores[:, -2] - scores[:, -1]).min()) for scores in best)

    def rewind(self) -> None:
        """Forget all tokens after the context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        for layer, (keys, values) in zip(self.sliding, self.windows, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        self.positions.fill_(self.context)

    def _rewind_sliding(self) -> None:
        for layer in self.sliding:
            layer.cumulative_length.fill_(self.context)
            layer.cumulative_length_int = self.context

    def step_of(self, model: nn.Module, compiled: Callable[[Any], Any]) -> Work:
        """A compiled step of `model`: the logits [batch, vocabulary] after one more token."""
        cache, mask = self.cache, self.mask

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits: Tensor = output.logits[:, -1]
            return logits

        run = compiled(step)

        def work() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            self._rewind_sliding()
            logits: Tensor = run(self.tokens, self.positions)
            self.positions += 1
            return logits

        return work


class Prefill:
    """One prompt of `length` tokens; no cache is kept. Attributes as those of Decoding."""

    context_bytes = 0
    head_rows = 1
    dynamic = False

    def __init__(self, model: nn.Module, length: int) -> None:
        self.rows = length
        self.attended = length * (length + 1) // 2
        self.tokens = random_tokens(model, length)

    def rewind(self) -> None:
        """There is nothing to forget."""

    def step_of(self, model: nn.Module, compiled: Callable[[Any], Any]) -> Work:
        """A compiled prefill of `model`: the logits [1, vocabulary] of the last token."""

        def prefill(tokens: Tensor) -> Tensor:
            output = model(input_ids=tokens, use_cache=False, logits_to_keep=1)
            logits: Tensor = output.logits[:, -1]
            return logits

        run = compiled(prefill)

        def work() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            logits: Tensor = run(self.tokens)
            return logits

        return work


class Generation:
    """`generate()`: a prompt of `length` tokens, and `new` of them after it, the likeliest ones.

    With a static cache, and compiled as by `model.compile`: the prompt, a step, and where sizes of
    the cache are Python's numbers, a step for any of them.
    """

    dynamic = None

    def __init__(self, model: nn.Module, length: int, new: int) -> None:
        self.tokens, self.new = random_tokens(model, length), new
        mask = torch.ones_like(self.tokens)
        self.settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        self.settings |= {"attention_mask": mask, "cache_implementation": "static"}
        self.settings |= {"return_dict_in_generate": True, "output_logits": True}

    def rewind(self) -> None:
        """There is nothing to forget."""

    def step_of(self, model: nn.Module, compiled: Callable[[Any], Any]) -> Work:
        """A call of generate(): the logits [1, vocabulary] of its first new token."""
        changed: Any = model
        run = compiled(changed._call_impl)

        def work() -> Tensor:
            changed._compiled_call_impl = run
            try:
                made = changed.generate(self.tokens, disable_compile=True, **self.settings)
            finally:
                changed._compiled_call_impl = None
            logits: Tensor = made.logits[0]
            return logits

        return work


Phase = Decoding | Prefill | Generation


def random_tokens(model: nn.Module, length: int, batch: int = 1) -> Tensor:
    """Of sequences, [batch, length]."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(config.vocab_size, (batch, length), device=device, generator=generator)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
