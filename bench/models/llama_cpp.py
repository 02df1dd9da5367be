"""llama.cpp as a way to run a phase, through the C interface that llama-cpp-python binds.

The model is a file in Q4_0 with an output head in Q8_0, rounded from the same weights
(`models.gguf_file`); Gemma's is the file that its weights are from. It is read into memory, so that
no page is mapped while a call is timed. Keys and values are fp16, as by default. Each phase runs
with and without flash attention for a few calls, and the faster one is measured.

Before that its logits are compared with those of the eager model under the file's weights: after a
prompt, and after a token that follows it.
"""

import copy
import ctypes
import logging
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import hypot, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.measure import allowed_error, relative_error
from bench.models import gguf_file
from bench.models.ideal import experts_hit
from bench.models.phases import (
    Decoding,
    Generation,
    Phase,
    Prefill,
    Ready,
    Work,
    random_tokens,
)
from fqcompile.demo.gemma import FILE, gemma_folder
from fqcompile.errors import OptionError
from fqcompile.kernels.tuning.measure import WrongResult

PACKAGE = "llama_cpp"
_BATCH = 512  # tokens of a prompt that go through the layers at once, llama.cpp's default
_CHECKED = 12  # tokens of the prompt whose logits are compared
_TRIED = 3  # calls, with and without flash attention
# Activations are rounded to 8 bits in blocks of 32, whose largest is about 2.1 standard deviations:
# √(1/12) of a step of 2.1/127, for the inputs of the four kinds of products of a layer.
_ROUNDED = 2.1 / 127 / sqrt(12)
_PRODUCTS = 4


def system_info() -> str:
    """What llama.cpp was built for: the instruction sets that it uses, its libraries."""
    told: bytes = import_module(PACKAGE).llama_print_system_info()
    return told.decode()


def ready(model: nn.Module, phase: Phase) -> Ready:
    """The phase by llama.cpp, with as many threads as PyTorch has.

    Raises:
        WrongResult: its logits are not the model's.
        OptionError: the phase has more than one sequence, or the model no GGUF file.
    """
    if not isinstance(phase, Decoding):
        tokens = phase.tokens
    elif phase.rows == 1:
        tokens = torch.cat((random_tokens(model, phase.context), phase.tokens), 1)
    else:
        raise OptionError(f"batch={phase.rows}: llama.cpp is measured with one sequence")
    file = _opened(model)
    numbers = tokens[0].numpy().astype(np.int32)
    tried = {flash: _runner(file, phase, numbers, flash) for flash in (False, True)}
    seconds = {flash: _least_seconds(*calls) for flash, calls in tried.items()}
    fast = min(seconds, key=lambda flash: seconds[flash])
    row = {"error": file.error, "allowed": file.allowed, "flash_attention": fast}
    if not isinstance(phase, Generation):
        read = gguf_file.bytes_read(file.path, experts_hit(model, phase.rows))
        row["bytes_read"] = read + phase.context_bytes
    return Ready(*tried[fast], row)


def _least_seconds(work: Work, rewind: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_TRIED):
        rewind()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _runner(
    file: "_File", phase: Phase, tokens: np.ndarray, flash: bool
) -> tuple[Work, Callable[[], None]]:
    """What computes the phase, and what goes back to where it begins."""
    if isinstance(phase, Prefill):
        sequence = _Sequence(file, len(tokens), flash)
        return partial(_generate, sequence, tokens, 1), partial(sequence.rewind, 0)
    if isinstance(phase, Generation):
        sequence = _Sequence(file, len(tokens) + phase.new, flash)
        return partial(_generate, sequence, tokens, phase.new), partial(sequence.rewind, 0)
    sequence = _Sequence(file, phase.length, flash)
    sequence.read(tokens[: phase.context])
    return partial(sequence.read, tokens[phase.context :]), partial(sequence.rewind, phase.context)


def _generate(sequence: "_Sequence", tokens: np.ndarray, new: int) -> Tensor:
    """Read a prompt and make `new` tokens, always the likeliest: the logits of the first."""
    sequence.rewind(0)
    logits = sequence.read(tokens)
    first, token = logits.clone(), logits.argmax()
    for _ in range(new - 1):
        token = sequence.read(np.array([token], np.int32)).argmax()
    return first


class _File:
    """A model that llama.cpp has loaded, and how far its logits are from PyTorch's."""

    def __init__(self, model: nn.Module) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "model.gguf"
        expected = model
        if getattr(model.config, "model_type", None) in gguf_file.ARCHITECTURES:
            gguf_file.write(model, self.path)
            expected = copy.deepcopy(model)
            gguf_file.read_into(expected, self.path)
        else:
            self.path = gemma_folder() / FILE
        self.library = import_module(PACKAGE)
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # prints every tensor else
        self.library.llama_backend_init()
        settings = self.library.llama_model_default_params()
        settings.use_mmap, settings.n_gpu_layers = False, 0
        self.model = self.library.llama_model_load_from_file(bytes(self.path), settings)
        weakref.finalize(self, self.library.llama_model_free, self.model)
        self.check(expected)

    def check(self, model: nn.Module) -> None:
        """Compare the logits after a prompt and a token."""
        layers, dtype = model.config.num_hidden_layers, next(model.parameters()).dtype
        tokens = random_tokens(model, _CHECKED + 1)
        with torch.no_grad():
            right = model(input_ids=tokens, use_cache=False).logits[0, -2:]
        sequence = _Sequence(self, len(tokens[0]), False)
        numbers = tokens[0].numpy().astype(np.int32)
        found = torch.stack([sequence.read(part).clone() for part in (numbers[:-1], numbers[-1:])])
        self.error = relative_error(found, right)
        rounded = 2 * sqrt(_PRODUCTS * layers) * _ROUNDED
        self.allowed = hypot(allowed_error(dtype, layers), rounded)
        if not self.error <= self.allowed:
            raise WrongResult(f"relative error {self.error:.2g}, allowed {self.allowed:.2g}")


class _Sequence:
    """Tokens that a model has read, and has room for: `length` of them."""

    def __init__(self, file: _File, length: int, flash: bool) -> None:
        self._library = library = file.library
        threads = torch.get_num_threads()
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, max(length, _BATCH), _BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = int(flash)
        settings.swa_full = False  # the window alone, where attention has one
        self._file, self._context = file, library.llama_init_from_model(file.model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {length} tokens, see its log")
        weakref.finalize(self, library.llama_free, self._context)
        self._memory = library.llama_get_memory(self._context)
        self._words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(file.model))

    def read(self, tokens: np.ndarray) -> Tensor:
        """Add tokens: the logits [vocabulary] after the last one, until the next call."""
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch = self._library.llama_batch_get_one(pointer, len(tokens))
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        logits: Any = self._library.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self._words,)))

    def rewind(self, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        if not self._library.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise RuntimeError(f"llama.cpp cannot go back to {length} tokens")


_FILES: "weakref.WeakKeyDictionary[nn.Module, _File]" = weakref.WeakKeyDictionary()


def _opened(model: nn.Module) -> _File:
    """Written and checked once for all phases of a model, and forgotten with it."""
    if model not in _FILES:
        _FILES[model] = _File(model)
    return _FILES[model]
