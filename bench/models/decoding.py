"""One step of decoding and one prefill of a model, as functions to compile and to time.

A step reads a static cache that holds a context of random keys and values; the steps of all that is
compared read and write the same one, from the same length on.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Work = Callable[[], Tensor]


class Decoding:
    """A batch of sequences of `context` tokens, each to be lengthened by up to `steps` more.

    Attributes:
        rows: tokens that go through the layers in a step; `head_rows` of them through the head.
        attended: pairs of a token and one that it attends to, in the first step.
        context_bytes: of the keys and values of the context, of all layers.
    """

    def __init__(self, model: nn.Module, batch: int, context: int, steps: int) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.context = context
        self.rows = self.head_rows = batch
        self.attended = batch * (context + 1)
        cache_type = import_module("transformers").StaticCache
        self.cache = cache_type(config=config, max_cache_len=context + steps)
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        self.cache.early_initialization(
            batch, key_heads, config.hidden_size // heads, dtype, device
        )
        generator = torch.Generator(device).manual_seed(1)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        self.context_bytes = held * context // (context + steps)
        self.tokens = torch.randint(
            config.vocab_size, (batch, 1), device=device, generator=generator
        )
        self.positions = torch.full((batch, 1), context, device=device)
        # OPT counts positions from the mask where it is not given one.
        self.mask = torch.ones((batch, context + steps), dtype=torch.long, device=device)

    def rewind(self) -> None:
        """Forget all tokens after the context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.positions.fill_(self.context)

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
            logits: Tensor = run(self.tokens, self.positions)
            self.positions += 1
            return logits

        return work


class Prefill:
    """One prompt of `length` tokens; no cache is kept. Attributes as those of Decoding."""

    context_bytes = 0
    head_rows = 1

    def __init__(self, model: nn.Module, length: int) -> None:
        self.rows = length
        self.attended = length * (length + 1) // 2
        parameter, config = next(model.parameters()), model.config
        generator = torch.Generator(parameter.device).manual_seed(2)
        vocabulary: Any = config.vocab_size  # type: ignore[union-attr]
        self.tokens = torch.randint(
            vocabulary, (1, length), device=parameter.device, generator=generator
        )

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
