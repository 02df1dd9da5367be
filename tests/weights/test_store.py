"""WeightStore: one copy per weight, found by identity, remade when stale, gone with the weight."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.config import SiteOptions
from fqcompile.kernels.cpu.aten_packed import ATEN_INT4_CPU
from fqcompile.quant.choose import QuantPlan
from fqcompile.weights import store as module
from fqcompile.weights.fingerprint import ATTEMPTS, fingerprint
from fqcompile.weights.node_weight import NodeWeight, Part
from fqcompile.weights.recipe import IDENTITY, WeightRecipe
from fqcompile.weights.store import WeightStore

OPTIONS = SiteOptions(granularity=32)


def weight(seed: int = 0, n: int = 64, k: int = 64) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def plan(bits: int = 4) -> QuantPlan:
    return QuantPlan(bits, 32, "mse", torch.bfloat16, 0.0)


def part(bits: int = 4, recipe: WeightRecipe = IDENTITY, index: int = 0) -> Part:
    return Part(recipe, (index,), plan(bits), 64, 64)


def spec(bits: int = 4) -> NodeWeight:
    return NodeWeight((part(bits),), 32)


PAIR = NodeWeight((part(), part(index=1)), 32)


@pytest.fixture
def store() -> WeightStore:
    return WeightStore()


def test_same_weight_gets_the_same_tensors(store: WeightStore) -> None:
    w = weight()
    first = store.packed(spec(), (w,))
    assert store.packed(spec(), (w,)) is first
    assert store.plan(IDENTITY, (w,), OPTIONS, torch.float32) is store.plan(
        IDENTITY, (w,), OPTIONS, torch.float32
    )


def test_equal_weights_of_different_identity_do_not_share(store: WeightStore) -> None:
    a, b = weight(), weight()
    packed_a, packed_b = store.packed(spec(), (a,)), store.packed(spec(), (b,))
    assert packed_a.qweight is not packed_b.qweight
    assert torch.equal(packed_a.qweight, packed_b.qweight)


def test_two_requests_of_one_weight_live_side_by_side(store: WeightStore) -> None:
    w = weight()
    four, eight = store.packed(spec(4), (w,)), store.packed(spec(8), (w,))
    assert (four.qweight.dtype, eight.qweight.dtype) == (torch.uint8, torch.int8)
    assert store.packed(spec(4), (w,)).qweight is four.qweight
    transposed = NodeWeight((part(recipe=IDENTITY.then("t")),), 32)
    assert not torch.equal(store.packed(transposed, (w,)).qweight, four.qweight)


@pytest.mark.parametrize("change", ["version", "storage"])
def test_changed_weight_is_packed_again(store: WeightStore, change: str) -> None:
    w = weight()
    before = store.packed(spec(), (w,)).qweight.clone()
    if change == "version":
        w.copy_(weight(1))
    else:
        w.data = weight(1)
    after = store.packed(spec(), (w,)).qweight
    assert not torch.equal(before, after)
    assert torch.equal(after, store.packed(spec(), (weight(1),)).qweight)


def test_fingerprint_sees_version_and_storage() -> None:
    w = weight()
    prints = [fingerprint((w,))]
    w.mul_(2)
    prints.append(fingerprint((w,)))
    w.data = w.data.clone()
    prints.append(fingerprint((w,)))
    assert len(set(prints)) == 3
    assert fingerprint((w,)) == fingerprint((w,))


def test_weight_made_in_inference_mode_has_a_fingerprint(store: WeightStore) -> None:
    with torch.inference_mode():
        w = weight()
    assert store.packed(spec(), (w,)).qweight.shape == (64, 32)


def test_packed_tensors_die_with_their_weight(store: WeightStore) -> None:
    w = weight()
    gone = weakref.ref(store.packed(spec(), (w,)).qweight)
    del w
    gc.collect()
    assert gone() is None


def test_store_keeps_no_weight_alive(store: WeightStore) -> None:
    w, other = weight(), weight(1)
    store.packed(PAIR, (w, other))
    store.plan(IDENTITY, (w,), OPTIONS, torch.float32)
    gone = [weakref.ref(w), weakref.ref(other)]
    del w, other
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_packed_pair_dies_with_its_second_weight(store: WeightStore) -> None:
    """A replaced k of a stacked q, k, v must not leave its old stack behind while q lives."""
    w, other = weight(), weight(1)
    gone = weakref.ref(store.packed(PAIR, (w, other)).qweight)
    del other
    gc.collect()
    store.packed(PAIR, (w, weight(2)))
    gc.collect()
    assert gone() is None


def test_reused_id_is_not_taken_for_the_dead_weight(store: WeightStore) -> None:
    w, other = weight(), weight(1)
    store.packed(PAIR, (w, other))
    old_id = id(other)
    for _ in range(50):
        del other
        other = weight(2)
        if id(other) == old_id:
            break
    got = store.packed(PAIR, (w, other)).qweight
    assert torch.equal(got[64:], store.packed(spec(), (weight(2),)).qweight)


def test_stacking_leaves_one_copy_of_the_codes(store: WeightStore) -> None:
    """What quantize made for each site becomes a view of the stack, not a second copy."""
    w, other = weight(), weight(1)
    plain = weakref.ref(store.quantized(part(), (w,)).qweight)
    stacked = store.packed(PAIR, (w, other))
    assert plain() is None
    for own, source in zip(PAIR.parts, (w, other), strict=True):
        view = store.quantized(own, (source,))
        for tensor, whole in zip(view.tensors, stacked.tensors, strict=True):
            assert tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_stack_at_a_finer_group_size_serves_no_coarser_request(store: WeightStore) -> None:
    """One graph stacks a weight with a finer sibling, another reads it alone."""
    w, other = weight(), weight(1)
    want = WeightStore().packed(spec(), (weight(),))
    fine = NodeWeight((part(), part(index=1)), 16)
    assert store.packed(fine, (w, other)).scale.shape == (128, 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(store.packed(spec(), (w,)).tensors, want.tensors, strict=True)
    )


def test_one_site_shares_its_codes_with_what_the_node_reads(store: WeightStore) -> None:
    w = weight()
    quantized = store.quantized(part(), (w,))
    qweight = store.packed(spec(), (w,)).qweight
    assert qweight.untyped_storage().data_ptr() == quantized.qweight.untyped_storage().data_ptr()


def test_kernel_layout_replaces_the_plain_copy_and_plain_can_be_made_again(
    store: WeightStore,
) -> None:
    w = weight()
    plain = weakref.ref(store.quantized(part(), (w,)).qweight)
    store.packed(replace(spec(), layout=ATEN_INT4_CPU), (w,))
    assert plain() is None
    assert torch.equal(
        store.packed(spec(), (w,)).qweight, WeightStore().packed(spec(), (weight(),)).qweight
    )


def test_reason_is_remembered_like_a_plan(store: WeightStore) -> None:
    w = weight()
    w[3, 4] = float("nan")
    reason = store.plan(IDENTITY, (w,), OPTIONS, torch.float32)
    assert isinstance(reason, str)
    assert "(3, 4)" in reason
    w[3, 4] = 0
    assert isinstance(store.plan(IDENTITY, (w,), OPTIONS, torch.float32), QuantPlan)


def test_packing_ignores_the_modes_of_the_caller(store: WeightStore) -> None:
    want = WeightStore().packed(spec(), (weight(),))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        w = weight()
        got = store.packed(spec(), (w,))
    assert not any(t.is_inference() or t.requires_grad for t in got.tensors)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors, want.tensors, strict=True))
    parameter = torch.nn.Parameter(weight())
    assert not any(t.requires_grad for t in store.packed(spec(), (parameter,)).tensors)


def test_clear_forgets_everything(store: WeightStore) -> None:
    w = weight()
    before = store.packed(spec(), (w,)).qweight
    store.clear()
    assert store.packed(spec(), (w,)).qweight is not before


def expert_spec(rows: int = 8, interleaved: bool = False) -> NodeWeight:
    stack = Part(IDENTITY, (0,), plan(), rows, 64, 4)
    return NodeWeight((stack,), 32, interleaved=interleaved)


def test_experts_keep_one_copy_that_plain_requests_view(store: WeightStore) -> None:
    w = torch.randn(4, 8, 64)
    packed = store.packed(expert_spec(), (w,))
    part = expert_spec().parts[0]
    plain = store.quantized(part, (w,))
    assert plain is not None and plain.qweight.data_ptr() == packed.qweight.data_ptr()


def test_experts_with_moved_rows_drop_the_plain_copy(store: WeightStore) -> None:
    w = torch.randn(4, 8, 64)
    packed = store.packed(expert_spec(interleaved=True), (w,))
    plain = WeightStore().quantized(expert_spec().parts[0], (w.clone(),))
    recovered = store.quantized(expert_spec().parts[0], (w,))
    assert torch.equal(recovered.qweight, plain.qweight)
    straight = store.packed(expert_spec(), (w,))
    assert torch.equal(packed.qweight[:, :4], straight.qweight[:, ::2]), "made again on request"


class Writer:
    """Stands for another thread: writes to the weight while something is made of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, w: Tensor, new: list[Tensor]) -> None:
        self.new = iter(new)
        for owner, name in ((module, "find_or_quantize"), (Part, "quantize")):
            self._patch(monkeypatch, owner, name, w)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, w: Tensor) -> None:
        make = getattr(owner, name)

        def written_meanwhile(*args: Any) -> Any:
            result = make(*args)
            value = next(self.new, None)
            if value is not None:
                w.copy_(value)
            return result

        monkeypatch.setattr(owner, name, written_meanwhile)


def quantized(w: Tensor) -> Tensor:
    return WeightStore().packed(spec(), (w.clone(),)).qweight


@pytest.mark.parametrize("writes", [1, 2, ATTEMPTS - 1])
def test_a_weight_written_while_it_is_quantized_leaves_nothing_stale(
    store: WeightStore, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight()
    Writer(monkeypatch, w, [weight(seed) for seed in range(1, writes + 1)])
    plan = store.plan(IDENTITY, (w,), OPTIONS, torch.bfloat16)
    assert isinstance(plan, QuantPlan)
    for _ in range(2):
        assert torch.equal(store.packed(spec(), (w,)).qweight, quantized(weight(writes)))


def test_a_part_written_while_it_is_packed_leaves_nothing_stale(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, other = weight(), weight(9)
    Writer(monkeypatch, w, [weight(1)])
    for _ in range(2):
        codes = store.packed(PAIR, (w, other)).qweight
        assert torch.equal(codes, torch.cat([quantized(weight(1)), quantized(other)]))
        assert torch.equal(store.quantized(part(), (w,)).qweight, quantized(weight(1)))


def test_of_a_weight_that_is_written_each_time_a_copy_is_quantized(
    store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight()
    Writer(monkeypatch, w, [weight(seed) for seed in range(1, 40)])
    codes = store.packed(spec(), (w,)).qweight
    monkeypatch.undo()
    assert any(torch.equal(codes, quantized(weight(seed))) for seed in range(1, 40))
    w.copy_(weight(50))
    assert torch.equal(store.packed(spec(), (w,)).qweight, quantized(weight(50)))


def test_content_decides_where_it_is_compared(store: WeightStore) -> None:
    """A write through .data leaves identity, address and version as they were."""
    w, other = weight(), weight(2)
    before = store.packed(spec(), (w,)).qweight
    assert store.changed([w, other]) == []
    assert store.packed(spec(), (w,)).qweight is before
    w.data.copy_(weight(1))
    assert store.packed(spec(), (w,)).qweight is before
    assert [t is w for t in store.changed([other, w])] == [True]
    assert torch.equal(store.packed(spec(), (w,)).qweight, quantized(weight(1)))


def test_what_is_forgotten_is_made_again(store: WeightStore) -> None:
    w = weight()
    store.packed(spec(), (w,))
    w.data.copy_(weight(1))
    store.forget([w])
    assert torch.equal(store.packed(spec(), (w,)).qweight, quantized(weight(1)))
