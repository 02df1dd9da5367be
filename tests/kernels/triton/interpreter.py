"""Runs kernels without a GPU, in the process that also compiles them: Triton's interpreter, with

* the arithmetic of the hardware (`interpreter_numbers`),
* every access checked: in bounds, aligned, free of races, after what it has to wait for
  (`interpreter_memory`), and
* everything that is uninitialized set to NaN, or to the largest integer: `torch.empty`, and the
  masked-off lanes of a load that does not say what they are.

    with interpreted() as memory:
        y = launch_my_kernel(x)
    assert memory.unwritten(y) == 0

With `memory.order`, a random.Random, programs run in a random order instead of the grid's.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.compiler.code_generator  # noqa: F401  (keeps the language as it is when imported)
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.triton.interpreter_memory import Access, Memory, RaceError
from tests.kernels.triton.interpreter_numbers import Handle, HardwareNumbers, patch_reductions

SEMANTIC = upstream._ir.MEM_SEMANTIC
ACQUIRES = (SEMANTIC.ACQUIRE, SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (SEMANTIC.RELEASE, SEMANTIC.ACQUIRE_RELEASE)
# The attribute of a handle that names the argument which its pointers point into.
ARGUMENT = "fqcompile.argument"


class CheckedBuilder(HardwareNumbers):
    memory: Memory

    def __init__(self) -> None:
        super().__init__()
        # Its assertions are off anyway; it would compute the integers a second time.
        self.options = replace(self.options, sanitize_overflow=False)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        dtype = upstream._get_np_dtype(ptrs.get_element_ty())
        self._touch(Access.LOAD, ptrs, mask)
        if other is None:
            ones = np.full((*ptrs.data.shape, dtype.itemsize), 0xFF, np.uint8)
            other = Handle(ones.view(dtype)[..., 0], ptrs.get_element_ty())
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        self._touch(Access.STORE, ptrs, mask)
        super().create_masked_store(ptrs, value, mask, *rest)
        stored = super().create_masked_load(ptrs, mask, value, *rest, False)
        if stored.data.tobytes() != np.broadcast_to(value.data, stored.data.shape).tobytes():
            raise RaceError("lanes of one store overwrite each other with something else")

    def create_atomic_rmw(
        self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, *rest: Any
    ) -> Any:
        if val.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("atomics on bf16 are not emulated, use fp32")
        self._update(ptr, mask, sem)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, *rest)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, *rest: Any) -> Any:
        mask = Handle(np.ones_like(ptr.data, bool), tl.int1)
        self._update(ptr, mask, sem)
        return super().create_atomic_cas(ptr, cmp, val, sem, *rest)

    def _touch(self, access: Access, ptrs: Any, mask: Any) -> None:
        size = upstream._get_np_dtype(ptrs.get_element_ty()).itemsize
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.uint64)
        self.memory.touch(access, addresses, size, ptrs.attr.get(ARGUMENT))

    def _update(self, ptr: Any, mask: Any, sem: Any) -> None:
        orders = ptr.data.size == 1 and mask.data.all()
        if orders and sem in ACQUIRES:
            self.memory.acquire(int(ptr.data.item()))
        self._touch(Access.ATOMIC, ptr, mask)
        if orders and sem in RELEASES:
            self.memory.release(int(ptr.data.item()))


def _keep_argument(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The same operation, with a result that remembers which argument a pointer comes from."""

    @functools.wraps(operation)
    def kept(self: Any, *args: Any) -> Any:
        result = operation(self, *args)
        origins = [arg.attr for arg in args if isinstance(arg, Handle) and ARGUMENT in arg.attr]
        for origin in origins:
            result.set_attr(ARGUMENT, origin[ARGUMENT])
        return result

    return kept


# What is left out (`tl.where` of two pointers) forgets it.
for _name in "addptr bitcast broadcast expand_dims reshape splat trans".split():
    setattr(
        CheckedBuilder,
        f"create_{_name}",
        _keep_argument(getattr(HardwareNumbers, f"create_{_name}")),
    )

_builder = CheckedBuilder()
_semantic: TritonSemantic = TritonSemantic(_builder)


@functools.cache
def _as_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what it assigns made tensors, as Triton's compiler does.

    Upstream does this as well, but leaves its own names among the globals of the kernel's module.
    """
    lines, first_line = inspect.getsourcelines(function)
    module = ast.parse(textwrap.dedent("".join(lines)))
    definition = module.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    upstream.ASTTransformer().visit(definition)
    around = inspect.getclosurevars(function).nonlocals | {"interpreter_semantic": _semantic}
    wrapper = ast.parse(f"def wrap({', '.join(around)}):\n    return {function.__name__}")
    wrapper.body[0].body.insert(0, definition)  # type: ignore[attr-defined]
    ast.increment_lineno(definition, first_line - 1)
    ast.fix_missing_locations(wrapper)
    names: dict[str, Any] = {}
    code = compile(wrapper, inspect.getfile(function), "exec")
    exec(code, function.__globals__, names)
    return names["wrap"](**around)


def _argument(name: str, value: Any) -> Any:
    """A launch argument that is not constexpr, as the compiled kernel gets it."""
    if isinstance(value, bool):
        return _scalar(value, tl.int1)
    if isinstance(value, int):
        signed = (tl.int32, -(2**31), 2**31), (tl.int64, -(2**63), 2**63)
        return _scalar(
            value, next((t for t, low, high in signed if low <= value < high), tl.uint64)
        )
    if isinstance(value, float):
        return _scalar(value, tl.float32)
    converted = upstream._implicit_cvt(value)
    if isinstance(value, torch.Tensor):
        converted.handle.set_attr(ARGUMENT, name)
    return converted


def _scalar(value: float, dtype: Any) -> Any:
    return tl.tensor(Handle(np.array([value], upstream._get_np_dtype(dtype)), dtype), dtype)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, TensorDescriptor):
        yield name, value.base
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


def _multiple_of(value: Any, divisors: Any) -> Any:
    """A promise that is not kept miscompiles. That of a block is about its pieces: not checked."""
    if isinstance(value, tl.tensor) and value.handle.data.size == 1 and isinstance(divisors, int):
        number = int(value.handle.data.item())
        assert number % divisors == 0, f"multiple_of({number}, {divisors})"
    return value


def _index(scalar: Any) -> int:
    """As upstream's from Triton 3.7 on: NumPy 2.4 refuses int() of an array of one element."""
    return int(scalar.handle.data.item())


def _programs(
    kernel: JITFunction, arguments: dict[str, Any], grid: Any, starts_early: bool, memory: Memory
) -> Iterator[Callable[[], None]]:
    """What runs each program of a launch, in the order of the grid; to be iterated in `_run`."""
    function = _as_python(kernel.fn)
    sizes = tuple(grid(arguments) if callable(grid) else grid)
    sizes += (1,) * (3 - len(sizes))
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    converted = {
        name: getattr(value, "value", value) if name in constants else _argument(name, value)
        for name, value in arguments.items()
    }
    named_tensors = (_tensors(name, value) for name, value in arguments.items())
    views = memory.views_of(dict(pair for pairs in named_tensors for pair in pairs))

    def run(program: tuple[int, int, int]) -> None:
        _builder.set_grid_dim(*sizes)
        _builder.set_grid_idx(*program)
        memory.begin_program(program, views, starts_early)
        try:
            function(**converted)
            memory.end_program()
        except Exception as error:
            error.add_note(f"in program {program} of {kernel.fn.__name__}")
            raise

    for program in product(*map(range, sizes)):
        yield functools.partial(run, program)


def _call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return _as_python(function.fn)(*args, **kwargs)


def _launch(kernel: JITFunction, memory: Memory, *args: Any, **kwargs: Any) -> None:
    grid, warmup = kwargs.pop("grid"), kwargs.pop("warmup", False)
    starts_early = kwargs.pop("launch_pdl", False)
    if warmup:
        return
    # The others are launch options, such as num_warps.
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    programs = _programs(kernel, bound.arguments, grid, starts_early, memory)
    if memory.together is None:
        _run([programs], memory)
    else:
        memory.together.append(programs)


def _run(launches: Iterable[Iterable[Callable[[], None]]], memory: Memory) -> None:
    memory.begin_launch()
    _builder.memory = memory
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(JITFunction, "__call__", _call)
        patch.setattr(upstream, "interpreter_builder", _builder)
        patch.setattr(upstream, "interpreter_semantic", _semantic)
        with _language(), pytest.MonkeyPatch.context() as patch_language:
            patch_language.setattr(tl, "multiple_of", _multiple_of)
            dependent = {"gdc_wait": "wait", "gdc_launch_dependents": "launch_dependents"}
            for name, own in dependent.items():
                patch_language.setattr(tl.extra.cuda, name, getattr(memory, own))
            patch_language.setattr(tl.tensor, "__index__", _index)
            patch_reductions(patch_language)
            programs = [run for launch in launches for run in launch]
            if memory.order is not None:
                memory.order.shuffle(programs)
            for run in programs:
                run()


@contextmanager
def together(memory: Memory) -> Iterator[None]:
    """The launches inside run at the end, as on several streams: their programs are one launch."""
    memory.together = []
    try:
        yield
        _run(memory.together, memory)
    finally:
        memory.together = None


@contextmanager
def _language() -> Iterator[None]:
    """Inside, `tl` computes with the builder that the interpreter has on entry (Triton 3.6), or at
    each call (3.7)."""
    # Functions of Triton's own library see `tl` under the name `core`.
    patched = upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        yield
    finally:
        patched.restore()


@contextmanager
def interpreted() -> Iterator[Memory]:
    """Inside, `kernel[grid](...)` of a @triton.jit function runs in the interpreter, on the CPU.

    Triton's language is changed during a launch only, so kernels can be compiled inside as well.
    """
    memory = Memory()
    mode = torch.get_deterministic_debug_mode()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", functools.partialmethod(_launch, memory))
            # This mode fills what `torch.empty` and its relatives return.
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            torch.set_deterministic_debug_mode("warn")
            yield memory
    finally:
        torch.set_deterministic_debug_mode(mode)
