"""WeightDispatch: the variant and packed tensors of the weights passed in, whosever they are."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fqcompile.weights.dispatch import Variant, WeightDispatch


class Compiler:
    """Stands for the pipeline: "packs" a weight by doubling it, and counts its calls."""

    def __init__(self) -> None:
        self.variants: dict[bool, Variant] = {}
        self.bound = 0

    def variant_for(self, args: Sequence[Any], changing: frozenset[int] = frozenset()) -> Variant:
        self.bound += 1
        if 1 in changing:
            return Variant(lambda x, w: x + 2 * w, (0, 1), lambda args: ())
        negative = bool(args[1][0] < 0)
        sign = -1 if negative else 1
        if negative not in self.variants:
            self.variants[negative] = Variant(lambda x, w2: sign * (x + w2), (0,), self.pack)
        return self.variants[negative]

    @staticmethod
    def pack(args: Sequence[Any]) -> tuple[Tensor, ...]:
        return (args[1] * 2,)


def make(detect: bool = True) -> tuple[Compiler, WeightDispatch]:
    compiler = Compiler()
    return compiler, WeightDispatch((1,), compiler.variant_for, detect)


X = torch.ones(2)


def test_weights_are_packed_once_and_found_again() -> None:
    compiler, run = make()
    w = torch.ones(2)
    assert run(X, w).tolist() == [3, 3]
    assert run(X, w).tolist() == [3, 3]
    assert compiler.bound == 1


def test_other_instances_get_their_own_weights_and_variant() -> None:
    compiler, run = make()
    a, b, c = torch.ones(2), torch.full((2,), 5.0), torch.full((2,), -1.0)
    for _ in range(2):
        assert [run(X, w)[0].item() for w in (a, b, c)] == [3, 11, 1]
    assert compiler.bound == 3
    assert len(compiler.variants) == 2


def test_update_in_place_is_noticed_where_asked_for() -> None:
    for detect, expected in ((True, 9), (False, 3)):
        _, run = make(detect)
        w = torch.ones(2)
        run(X, w)
        w.fill_(4)
        assert run(X, w)[0].item() == expected, f"detect={detect}"


def test_new_storage_is_noticed() -> None:
    _, run = make()
    w = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    run(X, w)
    w.data = torch.full((2,), 4.0)
    assert run(X, w)[0].item() == 9


def test_update_may_lead_to_another_variant() -> None:
    compiler, run = make()
    w = torch.ones(2)
    run(X, w)
    w.fill_(-1)
    assert run(X, w)[0].item() == 1
    assert len(compiler.variants) == 2


def test_replacement_is_noticed_even_without_detection() -> None:
    _, run = make(detect=False)
    run(X, torch.ones(2))
    assert run(X, torch.full((2,), 4.0))[0].item() == 9


def test_dead_weights_leave_nothing_behind() -> None:
    _, run = make(detect=False)
    w = torch.ones(2)
    run.bind((X, w))
    packed = weakref.ref(next(iter(run._table.bindings.values())).packed[0])
    del w
    gc.collect()
    assert packed() is None
    assert not run._table.bindings


def test_new_weight_under_a_reused_id_is_bound_anew() -> None:
    _, run = make(detect=False)
    values = []
    for value in range(20):
        w = torch.full((2,), float(value))
        values.append(run(X, w)[0].item())
        del w
    assert values == [1 + 2 * value for value in range(20)]


def test_dispatch_keeps_no_weight_alive() -> None:
    _, run = make()
    w = torch.ones(2)
    run(X, w)
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None
