"""free_weights=True: same results from less memory; an original goes only if nothing needs it."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from fqcompile import FreedWeightError
from fqcompile.backend import finequant as backend
from fqcompile.passes import lower
from fqcompile.weights.freed import is_freed
from fqcompile.weights.packed import PackedPart
from fqcompile.weights.store import STORE
from tests.helpers import InnerGraphs, Mlp, assert_close, finequant, frozen, oracle, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def freed_names(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if is_freed(weight)}


def storage_bytes(model: nn.Module) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return sum(
            {
                w.untyped_storage()._cdata: w.untyped_storage().nbytes() for w in model.parameters()
            }.values()
        )


def same_without_freeing(model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    """What a copy gives, compiled alike except that it keeps its weights."""
    compiled = finequant(copy.deepcopy(model), **options)
    results = [compiled(x) for x in inputs]
    torch._dynamo.reset()
    fqcompile.report.clear_reports()
    return results


def test_result_is_the_same_and_the_originals_are_gone() -> None:
    model = frozen(Mlp())
    (expected,) = same_without_freeing(model, X)
    before = storage_bytes(model)
    weights = [model.up.weight, model.down.weight]
    compiled = finequant(model, free_weights=True)
    for _ in range(3):
        assert torch.equal(compiled(X), expected)
    assert freed_names(model) == {"up.weight", "down.weight"}
    assert storage_bytes(model) == before - 2 * 128 * 256 * 4
    assert [model.up.weight, model.down.weight] == weights or all(
        a is b for a, b in zip((model.up.weight, model.down.weight), weights, strict=True)
    )
    assert len(fqcompile.reports()) == 1


def test_report_says_what_was_freed() -> None:
    finequant(frozen(Mlp()), free_weights=True, exclude=["down"])(X)
    freed, kept = report().plan.site("up.weight"), report().plan.site("down.weight")
    assert (freed.freed, freed.not_freed) == (True, None)
    assert (kept.freed, kept.not_freed) == (False, None)
    assert "freed 1 originals: 0.12 MiB" in str(report())
    assert freed.as_dict()["freed"] is True


def test_without_the_option_nothing_is_freed_or_reported() -> None:
    model = frozen(Mlp())
    finequant(model)(X)
    assert not freed_names(model)
    assert not any(site.freed or site.not_freed for site in report().sites)


def test_explain_frees_nothing() -> None:
    model = frozen(Mlp())
    plan = fqcompile.explain(model, X, free_weights=True)
    assert plan.quantized and plan.options["free_weights"] is True
    assert not freed_names(model)


def test_other_shapes_and_modes_run_from_the_same_packed_weights() -> None:
    model = frozen(Mlp())
    inputs = [torch.randn(rows, 128) for rows in (5, 1, 9)]
    compiled = finequant(model, free_weights=True, dynamic=False)
    with torch.no_grad():
        expected = same_without_freeing(model, *inputs, dynamic=False)
        results = [compiled(x) for x in inputs]
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
    with torch.inference_mode():
        assert torch.equal(compiled(inputs[0]), expected[0])


def test_parameters_that_require_grad_are_freed_where_no_gradient_can_flow() -> None:
    model = Mlp()
    compiled = finequant(model, free_weights=True)
    with torch.no_grad():
        compiled(X)
    assert len(freed_names(model)) == 2
    with pytest.raises(Exception, match=r"requires grad.*needs the values of up\.weight"):
        compiled(X)
    fqcompile.restore(model)
    assert model.up.weight.requires_grad


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: torch.matmul(x, w.mT),
    "permute": lambda x, w: torch.mm(x, w.permute(1, 0)),
    "left": lambda x, w: (w @ x.mT).mT,
    "addmm": lambda x, w: torch.addmm(x.new_ones(384), x, w.t()),
    "cast": lambda x, w: F.linear(x, w.to(x.dtype).contiguous()),
    "chunk": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1),
    "split": lambda x, w: torch.cat([F.linear(x, part) for part in w.split(128)], -1),
    "slices": lambda x, w: F.linear(x, w[:200]).sum(-1, True) + F.linear(x, w[200:]),
    "unflatten": lambda x, w: (
        F.linear(x, w.unflatten(0, (2, -1))[0]) + F.linear(x, w.unflatten(0, (2, -1))[1])
    ),
    "einsum": lambda x, w: torch.einsum("bd,hkd->bhk", x, w.view(4, 96, 128)),
    "metadata": lambda x, w: F.linear(x.to(w.device, w.dtype), w) * w.size(0) + w.dim(),
    "types": lambda x, w: F.linear(x, w if isinstance(w, nn.Parameter) else x),
}


class OneForm(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(384, 128) / 11)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.form](x, self.w)


@pytest.mark.parametrize("form", FORMS)
def test_later_graph_traces_every_form_on_a_freed_weight(form: str) -> None:
    """Dynamo sees another class of parameter there, and must write the same graph."""
    model, inputs = frozen(OneForm(form)), [torch.randn(rows, 128) for rows in (4, 3)]
    options = {"dynamic": False, "min_elements": 1}
    expected = same_without_freeing(model, *inputs, **options)
    compiled = finequant(model, free_weights=True, **options)
    for x, want in zip(inputs, expected, strict=True):
        assert torch.equal(compiled(x), want)
        assert freed_names(model) == {"w"}


class Fork(nn.Module):
    """Four linears of one input: fused where all are called, and some alone where not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(128, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts if len(x) > 2 else [self.parts[2], self.parts[0]]
        return torch.cat([part(x) for part in parts], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_in_one_graph_and_alone_in_another(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overrides give the siblings unlike group sizes, which the fused op has to share."""
    model = frozen(Fork().to(dtype))
    inputs = [torch.randn(rows, 128).to(dtype) for rows in (5, 1)]
    options: dict[str, Any] = {"dynamic": False, "min_elements": 1, "granularity": 64}
    options["overrides"] = {
        r"parts\.2": {"granularity": 32},
        r"parts\.0": {"granularity": "column"},
    }
    expected = same_without_freeing(model, *inputs, **options)
    compiled = finequant(model, free_weights=True, **options)
    for x, want in zip(inputs, expected, strict=True):
        assert torch.equal(compiled(x), want)
    assert len(freed_names(model)) == 4


# --- memory


def test_never_more_than_one_original_beside_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))).bfloat16()
    weights = tuple(model.parameters())
    peaks: list[int] = []

    def measure(method: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            result = method(*args)
            held = {
                t.untyped_storage().data_ptr(): t.nbytes
                for w in weights
                for t in STORE.tensors_of((w,))
            }
            peaks.append(storage_bytes(model) + sum(held.values()))
            return result

        return measured

    for name in ("plan", "packed"):
        monkeypatch.setattr(STORE, name, measure(getattr(STORE, name)))
    one = weights[0].nbytes
    finequant(model, free_weights=True)(torch.randn(2, 256).bfloat16())
    assert len(peaks) >= 24
    assert max(peaks) <= 12 * one + one // 2, "all originals and the codes of one"
    assert peaks[-1] < 12 * one * 0.3


MEASURE = """
import torch
from torch import nn

def kib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith(key))

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(40)))
model.bfloat16().requires_grad_(False)
options = {"inner_backend": "eager", "scale_method": "absmax", "granularity": 64}
x = torch.randn(1, 1024, dtype=torch.bfloat16)
small = nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16().requires_grad_(False)
torch.compile(small, backend="finequant", options=options)(x)  # load what compilation loads
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
torch.compile(model, backend="finequant", options={**options, "free_weights": FREE})(x)
print(kib("VmHWM") - before, kib("VmRSS") - before)
"""


def _resident(free: bool) -> tuple[int, int]:
    code = MEASURE.replace("FREE", str(free))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, after = map(int, run.stdout.split())
    return peak, after


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_falls_and_never_holds_both() -> None:
    """80 MiB in bf16, 22 MiB packed."""
    original = 40 * 1024 * 1024 * 2 // 1024
    keep_peak, keep = _resident(free=False)
    peak, after = _resident(free=True)
    assert keep > 0.2 * original, "packed weights beside the originals"
    assert after < -0.6 * original, f"{after} KiB of {original}"
    assert peak < 0.15 * original < keep_peak, f"peak {peak} KiB over the {original} of the model"


# --- several owners


@pytest.mark.parametrize("weight_updates", ["detect", "ignore"])
def test_instances_and_blocks_share_two_graphs_and_are_all_freed(weight_updates: str) -> None:
    """One for weights that are freed already, one for those that are not yet."""
    models = [frozen(Mlp(seed=seed)) for seed in range(6)]
    expected = [same_without_freeing(model, X, granularity=64)[0] for model in models]
    options = {"granularity": 64, "free_weights": True, "weight_updates": weight_updates}
    compiled = [finequant(model, **options) for model in models]
    for _ in range(3):
        for run, want in zip(compiled, expected, strict=True):
            assert torch.equal(run(X), want)
    assert all(len(freed_names(model)) == 2 for model in models)
    assert len(fqcompile.reports()) == 2


def test_blocks_compiled_in_place_are_all_freed() -> None:
    model = frozen(nn.Sequential(*(Mlp(seed=seed) for seed in range(12))))
    original = copy.deepcopy(model)
    options = {"inner_backend": "eager", "granularity": 64, "free_weights": True}
    for block in model:
        block.compile(backend="finequant", fullgraph=True, options=options)
    first, second = model(X), model(X)
    assert torch.equal(first, second)
    assert len(freed_names(model)) == 24, "more blocks than Dynamo compiles one function for"
    assert len(fqcompile.reports()) == 2
    plan = fqcompile.reports()[0].plan
    expected = nn.Sequential(*(oracle(block, plan) for block in original))(X)
    assert_close(first, expected, k=256, depth=24)


class Tied(nn.Module):
    """A head that shares its embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 128)
        self.body = nn.Linear(128, 128)
        self.head = nn.Linear(128, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


def test_weight_that_an_embedding_reads_stays() -> None:
    model, ids = frozen(Tied()), torch.arange(7)
    before = model.embedding.weight.clone()
    (expected,) = same_without_freeing(model, ids)
    assert torch.equal(finequant(model, free_weights=True)(ids), expected)
    assert freed_names(model) == {"body.weight"}
    assert torch.equal(model.embedding.weight, before)
    (head,) = [site for site in report().plan.quantized if site.bits == 8]
    assert head.not_freed == "embedding reads it as it is"
    assert "not freed 1: embedding reads it as it is" in str(report())


def test_weight_that_an_earlier_graph_reads_stays() -> None:
    model = frozen(Mlp())
    finequant(model, exclude=["up"])(X)
    finequant(model, free_weights=True)(X)
    first, second = fqcompile.reports()
    assert freed_names(model) == {"down.weight"}
    assert second.plan.site("up.weight").not_freed == f"{first.graph} reads it as it is"


def test_weight_that_a_module_outside_of_the_graph_holds_stays() -> None:
    model = frozen(Tied())
    finequant(model.head, free_weights=True)(X)
    assert not freed_names(model)
    assert report().plan.quantized[0].not_freed == "2 modules share it"
    model.embedding(torch.arange(3))


def test_weight_whose_memory_another_tensor_shares_stays() -> None:
    model = frozen(Mlp())
    other = nn.Parameter(model.up.weight.detach(), requires_grad=False)
    before = other.clone()
    finequant(model, free_weights=True)(X)
    assert freed_names(model) == {"down.weight"}
    assert torch.equal(model.up.weight, before)
    assert model.up.weight.data_ptr() == other.data_ptr()


class FusedQkv(nn.Module):
    """Slices of one parameter: of `qkv` all thirds are multiplied by, of `part` only one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * 128, 128) / 11)
        self.part = nn.Parameter(torch.randn(2 * 128, 128) / 11)
        self.a = nn.Parameter(torch.randn(128, 128) / 11)
        self.b = nn.Parameter(torch.randn(128, 128) / 11)
        self.kn = nn.Parameter(torch.randn(128, 64) / 11)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in self.qkv.chunk(3))
        y = F.linear(q + k * v, self.part[:128])
        z = F.linear(y, torch.cat([self.a, self.b]))
        return torch.cat([z, y @ self.kn], -1)


def test_what_is_packed_in_slices_is_freed_when_all_of_it_is() -> None:
    model = frozen(FusedQkv())
    original = copy.deepcopy(model)
    options = {"min_elements": 1}
    (expected,) = same_without_freeing(model, X, **options)
    compiled = finequant(model, free_weights=True, **options)
    assert torch.equal(compiled(X), expected)
    assert freed_names(model) == {"qkv", "kn"}
    reasons = {site.name: site.not_freed for site in report().plan.quantized}
    why = "what is packed of it is computed, or is not all of it"
    assert (reasons["part"], reasons["a+b"]) == (why, why)
    dequantised = oracle(original)
    fqcompile.restore(model)
    for name in ("qkv", "kn"):
        assert torch.equal(getattr(model, name), getattr(dequantised, name)), name
    assert torch.equal(compiled(X), expected)


def test_buffers_stay() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(256, 128))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    finequant(frozen(Buffered()), free_weights=True)(X)
    assert report().plan.quantized[0].not_freed.startswith("only parameters")


# --- what later graphs ask for


LATER: dict[str, dict[str, Any]] = {
    "quantises it in another way": {"bits": 8},
    r"is kept: name matches exclude pattern 'up'": {"exclude": ["up"]},
    "in another way": {"scale_method": "absmax"},
}


@pytest.mark.parametrize("message", LATER)
def test_later_graph_that_needs_the_original_is_an_error(message: str) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, free_weights=True)
    expected = compiled(X)
    graph = report().graph
    with pytest.raises(
        Exception, match=rf"{message}.*needs the values of up\.weight, which {graph}"
    ):
        finequant(model, **LATER[message])(X)
    assert torch.equal(compiled(X), expected)


def test_later_graph_that_reads_the_weight_otherwise_is_an_error() -> None:
    model = frozen(Mlp())
    finequant(model, free_weights=True)(X)

    def normalised(x: Tensor) -> Tensor:
        return model(x) + model.down.weight.sum()

    with pytest.raises(Exception, match=r"read by sum, needs the values of down\.weight"):
        finequant(normalised)(X)
    with pytest.raises(FreedWeightError, match=r"linear needs the values of up\.weight"):
        model(X)
    with pytest.raises(FreedWeightError, match="a dry run, which runs the model eagerly"):
        fqcompile.explain(model, X)


def test_later_graph_that_keeps_weights_uses_the_packed_ones() -> None:
    model = frozen(Mlp())
    expected = finequant(model, free_weights=True)(X)
    assert torch.equal(finequant(model)(X), expected)


def test_kernel_whose_layout_cannot_be_undone_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fqcompile.kernels.cpu.native_library.refusal", lambda: "switched off")
    for free, kernel in ((False, "aten_int4pack"), (True, "dequantize")):
        model = frozen(Mlp()).bfloat16()
        with torch.no_grad():
            finequant(model, granularity=64, free_weights=free)(X.bfloat16())
        assert {site.kernel for site in fqcompile.reports()[-1].sites} == {kernel}


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["after", "before"])
def test_keeping_graph_with_such_a_layout_does_not_lose_the_codes(
    order: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fqcompile.kernels.cpu.native_library.refusal", lambda: "switched off")
    model, x = frozen(Mlp()).bfloat16(), X.bfloat16()
    dequantised = oracle(model, fqcompile.explain(model, x, granularity=64))
    for free in order:
        torch._dynamo.reset()  # so that weights are freed while the graph is compiled
        with torch.no_grad():
            finequant(model, granularity=64, free_weights=free)(x)
    assert len(freed_names(model)) == 2
    fqcompile.restore(model)
    assert torch.equal(model.up.weight, dequantised.up.weight)


# --- failures


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*args: Any) -> Any:
        raise ValueError("no compiler here")

    monkeypatch.setattr(lower, "compile_inner", fail)
    yield


def test_failing_compilation_leaves_dequantised_weights_and_says_so(broken_compiler: None) -> None:
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    torch._dynamo.reset()
    actual = finequant(model, free_weights=True)(X)
    assert not freed_names(model)
    assert_close(actual, dequantised(X), k=256, depth=2)
    (warning,) = report().warnings
    assert "pass 'lower' failed with ValueError: no compiler here" in warning
    assert warning.endswith("2 weights that were freed have their dequantised values again")


def test_failing_compilation_raises_where_asked_and_leaves_a_model_that_runs(
    broken_compiler: None,
) -> None:
    model = frozen(Mlp())
    with pytest.raises(Exception, match="no compiler here"):
        finequant(model, free_weights=True, on_unsupported="error")(X)
    assert not freed_names(model)
    model(X)


def test_failing_graph_cannot_fall_back_to_weights_freed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, free_weights=True, dynamic=False)
    expected = compiled(X)

    def fail(*args: Any) -> Any:
        raise ValueError("no compiler here")

    monkeypatch.setattr(lower, "compile_inner", fail)
    with pytest.raises(Exception, match=r"no compiler here, so that it needs the values of"):
        compiled(X[:3])
    assert torch.equal(compiled(X), expected)


# --- new values


def _new(seed: int) -> Tensor:
    return Mlp(seed=seed).up.weight.detach().clone()


def _load_state_dict(model: Mlp, new: Tensor) -> None:
    state = {**Mlp(seed=0).state_dict(), "up.weight": new}
    model.load_state_dict(state)


def _load_state_dict_assigning(model: Mlp, new: Tensor) -> None:
    model.load_state_dict({**Mlp(seed=0).state_dict(), "up.weight": new}, assign=True)
    model.requires_grad_(False)


def _copy_(model: Mlp, new: Tensor) -> None:
    model.up.weight.copy_(new)


def _set_data(model: Mlp, new: Tensor) -> None:
    model.up.weight.data = new


def _replace_parameter(model: Mlp, new: Tensor) -> None:
    model.up.weight = nn.Parameter(new, requires_grad=False)


def _restore_and_step(model: Mlp, new: Tensor) -> None:
    fqcompile.restore(model)
    model.up.weight.grad = model.up.weight - new
    torch.optim.SGD([model.up.weight], lr=1.0).step()


UPDATES = [
    *[
        (update, weight_updates)
        for update in (
            _load_state_dict,
            _load_state_dict_assigning,
            _copy_,
            _set_data,
            _replace_parameter,
        )
        for weight_updates in ("detect", "ignore")
    ],
    (_restore_and_step, "detect"),  # a restored weight is an ordinary one
]


@pytest.mark.parametrize("guarded", [True, False], ids=["by Dynamo", "called directly"])
@pytest.mark.parametrize(("update", "weight_updates"), UPDATES)
def test_freed_weight_given_values_is_packed_anew(
    update: Callable[[Mlp, Tensor], None], weight_updates: str, guarded: bool
) -> None:
    """In every graph; also where nothing guards, which is what serving stacks switch off."""
    model = frozen(Mlp())
    options = {"granularity": 64, "free_weights": True, "weight_updates": weight_updates}
    run = _compile(model, options, guarded)
    inputs = (X, X[:2])
    for x in inputs:
        run(x)
    assert len(freed_names(model)) == 2
    for seed in (1, 2, 3):
        new = _new(seed)
        with torch.no_grad():
            update(model, new.clone())
        fresh = frozen(Mlp())
        fresh.up.weight.copy_(model.up.weight)
        assert_close(fresh.up.weight, new, depth=1)
        plan = fqcompile.reports()[0]
        expected = oracle(fresh, plan)
        for x in (*inputs, *inputs):
            assert_close(run(x), expected(x), k=256, depth=2)
        assert is_freed(model.up.weight) == (update is not _restore_and_step)


def _compile(model: Mlp, options: dict[str, Any], guarded: bool) -> Callable[[Tensor], Tensor]:
    if guarded:
        return finequant(model, dynamic=False, **options)
    graphs: dict[int, Callable[..., Any]] = {}

    def run(x: Tensor) -> Tensor:
        parameters = (model.up.weight, model.up.bias, model.down.weight, model.down.bias)
        if len(x) not in graphs:
            graphs[len(x)] = _direct(model, x, options)
        return graphs[len(x)](x, *parameters)

    return run


def _direct(model: Mlp, x: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    """Our backend's callable, of (x, up's and down's weights and biases)."""
    found: list[Callable[..., Any]] = []

    def capture(gm: torch.fx.GraphModule, args: list[Any]) -> Callable[..., Any]:
        compiled = backend(gm, args, options={"inner_backend": "eager", **options})
        order = [
            1 + [id(p) for p in parameters].index(id(a)) if isinstance(a, nn.Parameter) else 0
            for a in args
        ]
        found.append(lambda *given: compiled(*[given[i] for i in order])[0])
        return compiled

    parameters = (model.up.weight, model.up.bias, model.down.weight, model.down.bias)
    torch._dynamo.reset()
    torch.compile(model, backend=capture, fullgraph=True, dynamic=False)(x)
    return found[0]


def test_optimizer_step_on_a_freed_weight_is_refused() -> None:
    model = Mlp()
    with torch.no_grad():
        finequant(model, free_weights=True)(X)
    model.up.weight.grad = torch.ones(256, 128)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        with pytest.raises(FreedWeightError, match=r"needs the values of up\.weight"):
            kind(model.parameters(), lr=0.1).step()
    assert len(freed_names(model)) == 2


# --- restore and copies


def test_restored_model_is_the_dequantised_one_and_compiled_graphs_go_on() -> None:
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    compiled = finequant(model, free_weights=True)
    expected = compiled(X)
    weights = [model.up.weight, model.down.weight]
    packed = [t.data_ptr() for w in weights for t in STORE.tensors_of((w,))]
    assert fqcompile.restore(model) is model
    assert all(type(w) is nn.Parameter for w in model.parameters())
    assert model.up.weight is weights[0]
    assert torch.equal(model(X), dequantised(X))
    for _ in range(2):
        assert torch.equal(compiled(X), expected)
    assert packed == [t.data_ptr() for w in weights for t in STORE.tensors_of((w,))]
    assert not freed_names(model), "restored for good"
    assert torch.equal(model(X), dequantised(X))


def test_restored_weights_are_not_quantised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, free_weights=True)
    expected = compiled(X)
    fqcompile.restore(model)
    monkeypatch.setattr(PackedPart, "quantize", lambda *args: pytest.fail("quantised again"))
    monkeypatch.setattr(
        "fqcompile.weights.store.choose_and_quantize", lambda *args: pytest.fail("chosen again")
    )
    assert torch.equal(compiled(X), expected)


class Conv(nn.Module):
    """A weight [K, N], as GPT-2's, and one [N, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(128, 256) / 11)
        self.linear = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.addmm(x.new_ones(256), x, self.conv))


def test_freed_model_is_saved_packed_and_loaded(tmp_path: Any) -> None:
    model = frozen(Conv())
    finequant(model, free_weights=True)(X)
    assert len(freed_names(model)) == 2
    fqcompile.save(model, tmp_path / "packed")
    loaded = fqcompile.load(Conv, tmp_path / "packed")
    fqcompile.restore(model)
    for name in ("conv", "linear.weight"):
        assert torch.equal(loaded.get_parameter(name).dequantized(), model.get_parameter(name))
    assert torch.equal(loaded.linear.bias, model.linear.bias)


def test_freed_weight_that_is_packed_in_slices_is_not_saved(tmp_path: Any) -> None:
    model = frozen(FusedQkv())
    finequant(model, free_weights=True, min_elements=1)(X)
    with pytest.raises(
        fqcompile.FineQuantError, match=r"qkv cannot be saved: it was freed.*restore"
    ):
        fqcompile.save(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_packed_weights_are_restored_too() -> None:
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    fqcompile.restore(fqcompile.quantize_(model) and model)
    assert all(type(w) is nn.Parameter for w in model.parameters())
    assert torch.equal(model(X), dequantised(X))


def test_deepcopy_of_a_freed_model_runs_eagerly_and_compiled_with_the_same_codes() -> None:
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    expected = finequant(model, free_weights=True)(X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), dequantised(X))
    assert torch.equal(finequant(twin)(X), expected)
    twin.up.weight.mul_(-1)
    assert not torch.allclose(finequant(twin)(X), expected)
    assert len(freed_names(model)) == 2


def test_state_dict_saved_by_torch_is_a_whole_file(tmp_path: Any) -> None:
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    finequant(model, free_weights=True)(X)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = frozen(Mlp(seed=5))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(loaded(X), dequantised(X))


def test_freed_weights_die_with_their_model(inner_graphs: InnerGraphs) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, free_weights=True, inner_backend="fqtest_spy")
    compiled(X)
    references = [ref for refs in inner_graphs.packed for ref in refs]
    assert len(references) == 4
    del model, compiled
    assert [ref for ref in references if ref() is not None] == []


def test_clearing_the_store_spares_freed_weights() -> None:
    model = frozen(Mlp())
    compiled = finequant(model, free_weights=True)
    expected = compiled(X)
    STORE.clear()
    torch._dynamo.reset()
    assert torch.equal(finequant(model, free_weights=True)(X), expected)


@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
def test_through_other_inner_backends(inner_backend: str) -> None:
    model = frozen(Mlp())
    (expected,) = same_without_freeing(model, X, inner_backend=inner_backend)
    compiled = finequant(model, free_weights=True, inner_backend=inner_backend)
    assert torch.equal(compiled(X), expected)
    assert torch.equal(compiled(X), expected)
    assert len(freed_names(model)) == 2


def test_gradients_flow_to_the_input_of_freed_layers() -> None:
    """Adapters before frozen layers: the backward pass reads the packed weight."""
    model = frozen(Mlp())
    dequantised = oracle(model, fqcompile.explain(model, X))
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    finequant(model, free_weights=True, inner_backend="aot_eager")(inputs[0]).sum().backward()
    dequantised(inputs[1]).sum().backward()
    assert len(freed_names(model)) == 2
    assert_close(inputs[0].grad, inputs[1].grad, k=256, depth=2)
