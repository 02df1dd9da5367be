"""quantize: each chosen site gets its spec, and its codes lie in the store."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import STORE
from tests.passes.graphs import run_passes, weight

X = torch.randn(4, 64)


def test_spec_says_recipe_inputs_shape_and_plan() -> None:
    a, b = weight(48, 64), weight(64, 32, 1)
    run = run_passes(lambda x: (F.linear(x, a), x @ b), X, until="quantize")
    first, second = (site.packed for site in run.state.sites)
    assert (first.rows, first.k, first.group_size, first.bits) == (48, 64, 32, 4)
    assert (second.rows, second.k) == (32, 64)
    assert first.parts[0].recipe.key == IDENTITY.key
    assert second.parts[0].recipe.key == IDENTITY.then("transpose", -2, -1).key
    given = [run.captured.args[i] for spec in (first, second) for i in spec.inputs]
    assert given[0] is a
    assert given[1] is b


def test_codes_are_in_the_store_and_those_of_the_oriented_weight() -> None:
    w = weight(64, 32)
    run = run_passes(lambda x: x @ w, X, until="quantize", bits=8)
    (part,) = run.state.sites[0].packed.parts
    stored = STORE.quantized(part, (w,))
    # int8 with a searched scale: within one step of the weight.
    error = (stored.dequantize(torch.float32) - w.t()).abs()
    assert bool((error <= stored.scale.repeat_interleave(32, 1).abs()).all())


def test_kept_sites_are_not_packed() -> None:
    a, b = weight(64, 64), weight(64, 64, 1)
    run = run_passes(
        lambda x: F.linear(x, a) + F.linear(x, b), X, until="quantize", exclude=["^a$"]
    )
    assert run.counts["quantize"] == 1
    assert [site.packed is not None for site in run.state.sites] == [False, True]
    assert run.state.matched == ["b: 4 bits, groups of 32"]


def test_two_sites_of_one_weight_share_its_codes() -> None:
    w = weight(64, 64)

    def forward(x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w)), w)

    run = run_passes(forward, X, until="quantize")
    first, second = run.state.sites
    assert STORE.quantized(first.packed.parts[0], (w,)) is STORE.quantized(
        second.packed.parts[0], (w,)
    )
