"""lower: the inner graph takes activations, what else it reads, and packed weights, no more."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqcompile.passes.lower import lower
from fqcompile.weights.store import STORE
from tests.passes.graphs import Run, run_passes, weight

X = torch.randn(4, 64)


def inner_inputs(run: Run) -> list[str]:
    run.outputs()
    return [n.name for n in run.state.graph.nodes if n.op == "placeholder"]


def test_weights_that_are_no_longer_read_leave_the_inputs() -> None:
    layer = nn.Linear(64, 48)
    run = run_passes(layer, X, until="select")
    names = inner_inputs(run)
    assert len(names) == 4
    assert not any(n.endswith("weight_") for n in names)
    assert names[-2:] == ["fq_0_qweight", "fq_0_scale"]
    assert [run.captured.args[i].shape for i in run.variant.kept_args] == [(48,), (4, 64)]


def test_weight_with_another_reader_stays() -> None:
    w = weight(64, 64)
    run = run_passes(lambda x: F.linear(x, w) * w.sum(), X, until="select")
    assert len(inner_inputs(run)) == 4


def test_unused_activation_keeps_its_place() -> None:
    w = weight(64, 64)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return F.linear(x, w)

    run = run_passes(forward, X, X.clone(), until="select")
    inner_inputs(run)
    assert len(run.variant.kept_args) == 2


def test_new_inputs_look_to_aot_like_parameters() -> None:
    w = weight(64, 64)
    run = run_passes(lambda x: F.linear(x, w), X, until="select")
    run.outputs()
    for node in [n for n in run.state.graph.nodes if n.name.startswith("fq_")]:
        assert node._dynamo_source is None
        assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
        assert node.meta["example_value"].fake_mode is not None


def test_pack_serves_any_instance() -> None:
    """The variant holds no weight: another instance's arguments give that instance's codes."""
    w = weight(64, 64)
    run = run_passes(lambda x: F.linear(x, w), X, until="select")
    run.outputs()
    other = weight(64, 64, 5)
    args = [other if a is w else a for a in run.captured.args]
    packed = run.variant.pack(args)
    assert packed[0] is not run.variant.pack(run.captured.args)[0]
    y = run.variant.inner(*[args[i] for i in run.variant.kept_args], *packed)[0]
    (part,) = run.state.packed[run.linears[0]].parts
    # A kernel's own layout has taken the place of the plain one.
    quantized = STORE.quantized(part, (other,)) or part.quantize((other,))
    w_hat = quantized.dequantize(torch.float32)
    torch.testing.assert_close(y, F.linear(X, w_hat))


def test_inner_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(
        "fqcompile.passes.lower.lookup_backend",
        lambda name: lambda module, args: seen.append(name) or module.forward,
    )
    w = weight(64, 64)
    run = run_passes(lambda x: F.linear(x, w), X, until="select", inner_backend="aot_eager")
    lower(run.state, run.captured.args)
    assert seen == ["aot_eager"]


def test_inductor_gets_the_patches_of_mode_and_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def compile_fx(module: object, args: object, config_patches: dict[str, object]) -> object:
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr("fqcompile.passes.lower.compile_fx", compile_fx)
    w = weight(64, 64)
    run = run_passes(
        lambda x: F.linear(x, w),
        X,
        until="select",
        inner_backend="inductor",
        mode="reduce-overhead",
        inductor={"fallback_random": True},
    )
    lower(run.state, run.captured.args)
    assert seen == [{"triton.cudagraphs": True, "fallback_random": True}]
