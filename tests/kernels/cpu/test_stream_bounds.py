"""The x86 kernel touches nothing but its tensors: each lies against a page without access."""

import faulthandler
import signal
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from fqcompile.kernels.cpu import stream
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.tensor.quantized import QuantizedTensor
from tests.children import FORK
from tests.kernels.cpu.guarded import at_end_of_page, at_start_of_page
from tests.kernels.cpu.test_stream import DTYPES, FORMS, packed
from tests.kernels.test_op import oracle
from tests.native.paths import NAMES, path
from tests.strategies import make_problem

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

SIDES = (at_end_of_page, at_start_of_page)


def new_empty_at(side: object) -> object:
    """Tensor.new_empty into guarded memory, for results."""
    return lambda self, *shape: side(torch.empty(*shape, dtype=self.dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES, ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_tensors_is_touched(
    name: str, side: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(1, 1, 1), (1, 70, 40), (1, 65, 30), (3, 64, 33), (9, 65, 264), (2, 130, 7)]
    for (m, n, k), form, group, gated in product(shapes, FORMS, (5, 32, 4096), (False, True)):
        p = make_problem(
            leading=(m,), n=n, k=k, **form, group_size=group, dtype=dtype, gated=gated,
            bias=True, residual=True, activation="silu",
        )  # fmt: skip
        weight = packed(p)
        weight = QuantizedTensor(side(weight.qweight), side(weight.scale), weight.format)
        tensors = [side(t) for t in (p.x, p.bias, p.residual)]
        with path(name), monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", new_empty_at(side))
            epilogue = Epilogue(*tensors[1:], p.activation, gated)
            got = stream._run(tensors[0], weight, None, epilogue, None)
        want, bound = oracle(p)
        assert bool(((got.double() - want).abs() <= bound).all())
        with path(name), monkeypatch.context() as patch:
            empty = torch.empty
            patch.setattr(torch, "empty", lambda *s, dtype, e=empty: side(e(*s, dtype=dtype)))
            stream._transposed(weight, 0, weight.rows, dtype)


def test_the_guard_is_seen_to_stop_a_read() -> None:
    """A weight with fewer rows than it says ends the process."""
    p = make_problem(n=64, k=1024)
    short = packed(p).changed(rows=128)
    short = replace(short, qweight=at_end_of_page(short.qweight))

    def read() -> None:
        faulthandler.disable()  # the fault is meant
        stream._run(p.x, short, None, Epilogue(), None)

    with path(NAMES[0]):
        child = FORK.Process(target=read)
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGSEGV


def test_a_packed_weight_is_whole_cache_lines() -> None:
    """So that experts of a stack begin on a line as the stack does."""
    for bits, n, k, group in product((4, 8), (1, 65), (1, 9, 40), (5, 32)):
        weight: QuantizedTensor = packed(make_problem(n=n, k=k, bits=bits, group_size=group))
        assert weight.qweight.nbytes % 64 == 0
        assert weight.scale.nbytes % 64 == 0
