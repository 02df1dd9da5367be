"""Run a model on batches block by block: all of them come through one before any goes on.

    thread of batch 1   embed ┐         ┌ ... ┐         ┌ ... ┐      ┌ loss
    thread of batch 2   embed ┤ block 0 ├ ... ┤ block 1 ├ ... ┤ head ├ loss
                              └─────────┘     └─────────┘     └──────┘

Each batch runs the whole model, in a thread of its own that waits wherever a block is called.
Blocks run in the thread that asks for them. So nothing need be known of what a model does between
its blocks: masks, positions, skip connections and encoders' outputs are locals of its own code. One
block at a time has to be in memory, can be run repeatedly, and can be packed before batches go on.
"""

import copy
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from fqcompile.distributed.ranks import progress
from fqcompile.modules.calibrate import call, copy_of
from fqcompile.modules.inputs import Collect, WeightInputs, without_shortcuts
from fqcompile.modules.weights import ModuleWeight
from fqcompile.quant.calibration import fixed_random_numbers
from fqcompile.tensor.chunks import plain_tensors
from fqcompile.torch_compat import plain_module

Held = Callable[[nn.Module], AbstractContextManager[object]]
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NOT_CALLED = (nn.ModuleList, nn.ModuleDict)


class _Stopped(BaseException):
    """Ends a thread whose run is of no use any more; no model's code handles it."""


@dataclass
class _Call:
    """A block that a batch has come to, and what it is called with."""

    name: str
    forward: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self) -> "_Call":
        """To be run once more: a block may write to caches, and to its inputs."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


class _Thread(threading.Thread):
    """The run of one batch, which goes on only while the thread that resumes it waits for it.

    Attributes:
        call: the block that it waits for; None once it has ended.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.call: _Call | None = None
        self._work = _as_here(work)
        self._error: BaseException | None = None
        self._turn: SimpleQueue[Any] = SimpleQueue()  # outputs of blocks, or _Stopped
        self._back: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        try:
            with plain_tensors():
                self._work()
        except BaseException as error:
            self._error = error
        self.call = None
        self._back.put(None)

    def wait_for(self, call: _Call) -> Any:
        """In this thread: let the other go on; what it found the block's output to be."""
        self.call = call
        self._back.put(None)
        output = self._turn.get()
        if output is _Stopped:
            raise _Stopped
        return output

    def resume(self, output: Any = None) -> None:
        """Run until it is at its next block, or at its end; raises what the model raises."""
        self.call = None
        if self.ident is None:
            self.start()
        else:
            self._turn.put(output)
        self._back.get()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        if self.is_alive():
            self._turn.put(_Stopped)
            self.join()


@dataclass(eq=False)
class Block:
    """A part of the model that batches have come to.

    Attributes:
        name: its qualified name.
        module: the model's own, not a copy.
        threads, calls: the runs that wait for it, and what it is to be called with.
    """

    name: str
    module: nn.Module
    threads: Sequence[_Thread]
    calls: list[_Call]

    def of(self, weights: Iterable[ModuleWeight]) -> list[ModuleWeight]:
        """Those that its modules multiply with, as they are there now."""
        own = set(self.module.modules())
        return [here(w) for w in weights if w.holders and w.holders[0][0] in own]

    def collect(self, weights: Iterable[ModuleWeight], collect: Collect) -> None:
        """Run it on its inputs, and call `collect` as `collect_inputs` does; the batches stay."""
        for one in self.calls:
            own = one.copied()
            with plain_tensors(), WeightInputs(weights, collect):
                own.forward(*own.args, **own.kwargs)

    def go_on(self) -> None:
        """Run it, and let the batches go on to their next block."""
        self.calls.clear()  # each is freed with its output
        for thread in self.threads:
            assert thread.call is not None
            with plain_tensors():
                output = thread.call.forward(*thread.call.args, **thread.call.kwargs)
            thread.resume(output)


class BlockRuns:
    """A model that is run block by block, first of all by `collect`.

    What runs is a copy that has the model's parameters, whatever becomes of them meanwhile, in
    evaluation mode and without a cache of keys and values.

    Args:
        held: a context in which a module's parameters are there, if they are not always.
        buffers: whether the copy may write to the model's own buffers.
    """

    def __init__(
        self, model: nn.Module, held: Held = nullcontext, *, buffers: bool = False
    ) -> None:
        model = plain_module(model)
        self._own, self._held = dict(parts(model)), held
        self._copy = _copy(model, buffers)
        for name in self._own:
            part = self._copy.get_submodule(name)
            part.forward = partial(_visit, name, part.forward)
        self._visits: Counter[str] = Counter()

    def collect(
        self, batches: Iterable[object], weights: Iterable[ModuleWeight], collect: Collect
    ) -> None:
        """As `collect_inputs` does; also of products outside of blocks, in their threads."""
        found = list(weights)
        self._visits.clear()
        bar: Any = progress(
            desc="fqcompile: running blocks", total=len(self._own), unit="block", leave=False,
            delay=2,
        )  # fmt: skip
        with bar, closing(self._run(batches, lambda: WeightInputs(found, collect))) as run:
            for block in run:
                self._visits[block.name] += 1
                with WeightInputs(block.of(found), collect):
                    block.go_on()
                bar.update()

    def blocks(self, batches: Iterable[object]) -> Generator[Block]:
        """Each that batches come to, once, with the inputs of all its calls.

        When the next is asked for, the batches go on through this one as it is then. It is there at
        its last call, of those that `collect` saw.
        """
        left, earlier = Counter(self._visits), defaultdict[str, list[_Call]](list)
        with closing(self._run(batches, nullcontext)) as run:
            for block in run:
                left[block.name] -= 1
                if left[block.name] > 0:
                    earlier[block.name] += [one.copied() for one in block.calls]
                elif left[block.name] == 0:
                    block.calls[:0] = earlier.pop(block.name, [])
                    yield block
                block.go_on()

    def _run(
        self, batches: Iterable[object], mode: Callable[[], AbstractContextManager[object]]
    ) -> Generator[Block]:
        def work(batch: object) -> None:
            with mode():
                call(self._copy, batch)

        threads = [_Thread(partial(work, batch)) for batch in batches]
        devices = {parameter.device for parameter in self._copy.parameters()}
        with fixed_random_numbers(devices), without_shortcuts(), _stopping(threads):
            for thread in threads:
                thread.resume()
            while waiting := [(t, t.call) for t in threads if t.call is not None]:
                name = waiting[0][1].name
                own = [pair for pair in waiting if pair[1].name == name]
                module = self._own[name]
                with self._held(module):
                    yield Block(name, module, [t for t, _ in own], [c for _, c in own])
                del waiting, own  # the inputs are not needed any longer


def here(weight: ModuleWeight) -> ModuleWeight:
    """With the parameter that its module has now."""
    module, attribute = weight.holders[0]
    return replace(weight, parameter=getattr(module, attribute))


@contextmanager
def _stopping(threads: Sequence[_Thread]) -> Iterator[None]:
    try:
        yield
    finally:
        for thread in threads:
            thread.stop()


def _as_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be called in another thread with this one's default device and autocast."""
    device, kinds = torch.get_default_device(), ("cpu", "cuda")
    casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(device)
            for cast in casts:
                stack.enter_context(torch.autocast(*cast, cache_enabled=False))
            return function(*args, **kwargs)

    return run


def _visit(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of a block's `forward`; a block that another runs is a part of that."""
    thread = threading.current_thread()
    if isinstance(thread, _Thread):
        return thread.wait_for(_Call(name, _as_here(forward), args, kwargs))
    return forward(*args, **kwargs)


def _copy(model: nn.Module, buffers: bool) -> nn.Module:
    """With the very dicts of parameters, so that what is packed in one is packed in the other."""
    shared: list[Any] = [module._parameters for module in model.modules()]
    if buffers:
        shared += [module._buffers for module in model.modules()]
    copied = copy_of(model, shared).eval()
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return copied


def parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks: elements of the outermost lists, and what else has parameters of its own.

    What has some beside a list, such as a model with a scale, is no block.
    """
    inner = list(module.modules())[1:]
    listed = any(isinstance(part, _LISTS) for part in inner)
    if module._parameters and not listed:
        yield name, module
        return
    for key, child in module.named_children():
        path = f"{name}.{key}".lstrip(".")
        element = isinstance(module, _LISTS) and not isinstance(child, _NOT_CALLED)
        if element and any(True for _ in child.parameters()):
            yield path, child
        else:
            yield from parts(child, path)
