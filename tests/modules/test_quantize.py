"""quantize_: packed weights in a model that runs eagerly and under every backend, equally."""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

pytest.importorskip("transformers", reason="the demo extra is not installed")
import fqcompile
from fqcompile.config import OF_COMPILING
from fqcompile.errors import OptionError, UnquantizableWeight
from fqcompile.modules import quantize as quantize_module
from fqcompile.weights.parameter import PackedWeight
from tests import moe_models
from tests.dense_models import CASES, build, run
from tests.helpers import (
    InnerGraphs,
    Mlp,
    assert_close,
    assert_not_dense,
    finequant,
    frozen,
    oracle,
    report,
)

CHAIN = 15  # rounded results in a layer, see `tests.test_moe_models`
SMALL: dict[str, Any] = {"min_elements": 4096}


def _packed(model: nn.Module, **options: Any) -> tuple[nn.Module, fqcompile.Plan]:
    packed = copy.deepcopy(model)
    return packed, fqcompile.quantize_(packed, **SMALL, **options)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_dense_model_equals_its_oracle_eagerly_and_compiled(name: str, dtype: torch.dtype) -> None:
    model, inputs = build(name, dtype)
    packed, plan = _packed(model)
    expected = run(oracle(model, plan), inputs)
    depth = CHAIN * CASES[name].layers
    assert_close(run(packed, inputs), expected, depth=depth)
    whole = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert_close(run(whole, inputs), expected, depth=depth)
    torch._dynamo.reset()
    compiled = run(finequant(packed, **SMALL), inputs)
    assert_close(compiled, expected, depth=depth)
    assert not any(s.status == "kept" and s.name in _names(plan) for s in report().sites)
    assert_not_dense(compiled, expected, run(model, inputs))


def _names(plan: fqcompile.Plan) -> set[str]:
    return {site.name for site in plan.quantized}


FORMS = [
    *((form, torch.float32) for form in ("grouped_mm", "batched_mm", "eager")),
    ("grouped_mm", torch.bfloat16),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("implementation", "dtype"), FORMS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", moe_models.MODELS)
def test_experts_equal_their_oracle_eagerly_and_compiled(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    model = moe_models.build(name, dtype, implementation)
    ids = torch.randint(1, moe_models.VOCAB, (2, 5), generator=torch.Generator().manual_seed(7))
    packed, plan = _packed(model)
    stacks = set(moe_models.expert_weights(model))
    assert {site.name for site in plan.quantized if site.kind == "experts"} == stacks
    expected = moe_models.logits(oracle(model, plan), ids)
    depth = CHAIN * moe_models.LAYERS
    assert_close(moe_models.logits(packed, ids), expected, depth=depth)
    if implementation == "eager" and name != "llama4":
        return  # a loop over data: no one graph
    whole = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert_close(moe_models.logits(whole, ids), expected, depth=depth)
    torch._dynamo.reset()
    assert_close(moe_models.logits(finequant(packed, **SMALL), ids), expected, depth=depth)
    assert {site.name for site in report().plan.quantized} == _names(plan)


def _memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memories behind these tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _packed_tensors(model: nn.Module) -> list[Tensor]:
    packed = [p for p in model.parameters() if isinstance(p, PackedWeight)]
    return [t for w in packed for t in (w.qweight, w.scale)]


def test_finequant_reads_the_memory_of_the_packed_weights(inner_graphs: InnerGraphs) -> None:
    """Merged q, k, v and gate, up too: their weights become rows of what the kernel reads."""
    model, inputs = build("llama", torch.float32)
    packed, plan = _packed(model, granularity=64)  # those of one group size are merged
    held = sum(w.packed_bytes for w in packed.parameters() if isinstance(w, PackedWeight))
    before = run(packed, inputs)
    run(finequant(packed, **SMALL, inner_backend="fqtest_spy"), inputs)
    own = _packed_tensors(packed)
    read = [ref() for ref in inner_graphs.packed[0]]
    assert len(read) < 2 * len(plan.quantized), "some were merged"
    assert _memory(own) == _memory([*own, *(t for t in read if t is not None)]) <= 1.01 * held
    assert torch.equal(run(packed, inputs), before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["finequant", "inductor"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_generate_with_eager_prefill_and_compiled_decoding(name: str, backend: str) -> None:
    """As `generate` does with a static cache: the prompt runs eagerly, each token compiled."""
    moe = name == "mixtral"
    model = (
        moe_models.build(name, torch.float32, "grouped_mm")
        if moe
        else build(name, torch.float32)[0]
    )
    packed, plan = _packed(model)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    prompt = torch.randint(1, 100, (1, 7))
    expected = oracle(model, plan).generate(prompt, **options)
    eager = packed.forward
    compiled = torch.compile(eager, backend=backend, fullgraph=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (eager if kwargs["input_ids"].shape[1] > 1 else compiled)(*args, **kwargs)

    packed.forward = forward
    with torch.no_grad():
        actual = packed.generate(prompt, **options)
    assert actual.tolist() == expected.tolist()


def test_sibling_blocks_share_one_graph_and_keep_their_own_weights() -> None:
    blocks = nn.ModuleList(frozen(Mlp(seed=seed)) for seed in range(3))
    fqcompile.quantize_(blocks, granularity="column")
    x = torch.randn(2, 128)
    expected = [block(x) for block in blocks]
    for block in blocks:
        block.compile(backend="finequant", options={"inner_backend": "eager"})
    for block, y in zip(blocks, expected, strict=True):
        assert_close(block(x), y)
    report()  # of the one graph


@pytest.mark.parametrize("backend", ["finequant", "aot_eager"])
def test_new_values_reach_compiled_graphs(backend: str) -> None:
    model = frozen(Mlp())
    fqcompile.quantize_(model)
    options = {"options": {"inner_backend": "eager"}} if backend == "finequant" else {}
    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    x = torch.randn(2, 128)
    first = compiled(x)
    model.load_state_dict(frozen(Mlp(seed=1)).state_dict())
    second = compiled(x)
    assert not torch.allclose(first, second, atol=0.1)
    assert_close(second, model(x))


def test_gradients_reach_what_lies_before_a_packed_weight() -> None:
    """As adapters and prompts are tuned on a frozen base."""
    model = frozen(Mlp())
    plan = fqcompile.quantize_(packed := copy.deepcopy(model))
    x = torch.randn(2, 128, requires_grad=True)
    expected = torch.autograd.grad(oracle(model, plan)(x).square().sum(), x)[0]
    backends: dict[str, Any] = {
        "eager": packed,
        "aot": torch.compile(packed, backend="aot_eager", fullgraph=True),
        "finequant": finequant(packed, inner_backend="aot_eager"),
    }
    for name, way in backends.items():
        torch._dynamo.reset()
        actual = torch.autograd.grad(way(x).square().sum(), x)[0]
        assert_close(actual, expected, k=256, depth=4, what=name)


def test_options_say_what_is_packed_and_how() -> None:
    model = build("llama", torch.float32)[0]
    plan = fqcompile.quantize_(
        model,
        bits=8,
        exclude=["o_proj"],
        overrides={"down_proj": {"bits": 4, "granularity": 64}},
        min_elements=128 * 128,
    )
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert mlp.down_proj.weight.format.group_size == 64 and mlp.down_proj.weight.format.bits == 4
    assert mlp.up_proj.weight.format.bits == 8
    assert not isinstance(attention.o_proj.weight, PackedWeight)
    assert not isinstance(attention.k_proj.weight, PackedWeight)
    reasons = {site.name.split(".")[-2]: site.reason for site in plan.kept}
    assert reasons["o_proj"] == "name matches exclude pattern 'o_proj'"
    assert reasons["k_proj"] == "fewer elements than min_elements=16384"
    assert plan.totals.bytes_after < 0.6 * plan.totals.bytes_before


def test_a_tied_head_is_packed_and_the_embedding_stays() -> None:
    model = build("opt", torch.float32)[0]
    table = model.get_input_embeddings().weight
    before = table.clone()
    plan = fqcompile.quantize_(model)
    head = model.get_output_embeddings().weight
    assert isinstance(head, PackedWeight) and head.format.bits == 8
    assert model.get_input_embeddings().weight is table and torch.equal(table, before)
    assert plan.site("lm_head.weight").bits == 8


def test_weights_that_cannot_be_packed_stay_with_their_reason() -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 128), nn.MultiheadAttention(128, 4), Mlp()))
    model[0].weight[3, 4] = torch.nan
    model[2].up.double()
    plan = fqcompile.quantize_(model)
    reasons = {site.name: site.reason or "" for site in plan.kept}
    assert "NaN" in reasons["0.weight"]
    assert "float64" in reasons["2.up.weight"]
    assert [site.name for site in plan.quantized] == [
        "1.in_proj_weight",
        "1.out_proj.weight",
        "2.down.weight",
    ]
    again = fqcompile.quantize_(model)
    assert again.site("2.down.weight").reason == "the weight is packed already"
    with pytest.raises(UnquantizableWeight, match=r"0\.weight: .*NaN"):
        fqcompile.quantize_(model, on_unsupported="error")


def test_a_model_without_values_stays_as_it_is() -> None:
    with torch.device("meta"):
        model = Mlp()
    plan = fqcompile.quantize_(model, **SMALL)
    assert {site.status for site in plan.sites} == {"kept"}
    assert all("holds no values: load it first" in str(site.reason) for site in plan.sites)


def test_experts_that_do_not_say_their_orientation_stay() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 64, 128))

    model = frozen(Experts())
    assert "is_transposed" in str(fqcompile.quantize_(model).site("up").reason)
    model.is_transposed = True
    assert fqcompile.quantize_(model).site("up").shape == (4, 128, 64)


def test_options_of_compiling_are_refused() -> None:
    with pytest.raises(OptionError, match="option mode is one of compiling"):
        fqcompile.quantize_(frozen(Mlp()), mode="reduce-overhead")
    with pytest.raises(OptionError, match="did you mean 'granularity'"):
        fqcompile.quantize_(frozen(Mlp()), granularty=64)
    with pytest.raises(OptionError, match=r"option modes; allowed: bits, [a-z_, ]+$") as error:
        fqcompile.quantize_(frozen(Mlp()), modes=1)
    assert not [name for name in OF_COMPILING if f" {name}," in str(error.value)]


def test_originals_are_released_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))))
    alive = [weakref.ref(layer.weight) for layer in model]
    left: list[int] = []
    quantize = quantize_module.find_or_quantize

    def counted(*args: Any) -> Any:
        left.append(sum(ref() is not None for ref in alive))
        return quantize(*args)

    monkeypatch.setattr(quantize_module, "find_or_quantize", counted)
    fqcompile.quantize_(model)
    assert left == [4, 3, 2, 1]


def test_restored_model_is_the_dequantized_one() -> None:
    model, x = frozen(Mlp()), torch.randn(5, 128)
    dequantized = oracle(model, fqcompile.explain(model, x, calibration=None))
    fqcompile.quantize_(model, calibration=None)
    assert fqcompile.restore(model) is model
    assert all(type(weight) is nn.Parameter for weight in model.parameters())
    assert torch.equal(model(x), dequantized(x))


def test_removed_option_names_what_does_its_work() -> None:
    """Every door that takes options says what replaces `free_weights`."""
    model, x = frozen(Mlp()), torch.randn(5, 128)
    remedy = r"free_weights was removed: call fqcompile\.quantize_\(model\)"
    for use in (
        lambda: fqcompile.FineQuantConfig(free_weights=True),
        lambda: fqcompile.quantize_(model, free_weights=True),
        lambda: fqcompile.explain(model, x, free_weights=False),
        lambda: finequant(model, free_weights=True)(x),
    ):
        with pytest.raises((OptionError, torch._dynamo.exc.BackendCompilerFailed), match=remedy):
            use()


class _WithFactors(nn.Linear):
    """A linear that adds factors of its own, as loralib's does."""

    def __init__(self) -> None:
        super().__init__(128, 256)
        self.lora_A = nn.Parameter(torch.randn(8, 128))
        self.lora_B = nn.Parameter(torch.randn(256, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def test_of_a_linear_only_its_weight_is_packed() -> None:
    model = nn.Sequential(_WithFactors())
    plan = fqcompile.quantize_(model, min_elements=0)
    assert [site.name for site in plan.quantized] == ["0.weight"]
    layer = model[0]
    for name in ("lora_A", "lora_B"):
        assert type(layer.get_parameter(name)) is nn.Parameter
        assert layer.get_parameter(name).requires_grad, "and it trains on"
        assert "adapter factor" in str(plan.site(f"0.{name}").reason)
    x = torch.randn(2, 128)
    expected = x @ layer.weight.dequantized().T + layer.bias + x @ layer.lora_A.T @ layer.lora_B.T
    assert_close(layer(x), expected, depth=3)


NORMS: dict[str, Any] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrizations.weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "parametrizations.orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", NORMS)
def test_a_weight_that_a_norm_computes_is_packed_in_evaluation_mode(way: str) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(0)
        return frozen(nn.Sequential(NORMS[way](nn.Linear(128, 256)), nn.Linear(256, 4)))

    model, x = normed().train(), torch.randn(2, 128)
    plan = fqcompile.quantize_(model)
    assert not plan.quantized
    reason = str(next(s.reason for s in plan.kept if s.name.startswith("0.")))
    assert "computed from it in each call" in reason and "model.eval()" in reason
    excluded = normed()
    assert not fqcompile.quantize_(excluded, exclude=[r"0\.weight"]).quantized
    assert hasattr(excluded[0], "parametrizations") or len(excluded[0]._forward_pre_hooks)
    w = normed()[0](torch.eye(128)).mT - model[0].bias[:, None]
    model = normed()
    plan = fqcompile.quantize_(model)
    assert [site.name for site in plan.quantized] == ["0.weight"]
    w_hat = model[0].weight.dequantize()
    assert float((w_hat - w).norm() / w.norm()) == pytest.approx(
        plan.site("0.weight").relative_error, rel=1e-2
    )
    assert_close(model[0](x), x @ w_hat.mT + model[0].bias)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", NORMS)
def test_a_normed_weight_that_the_options_leave_has_their_reason(way: str, training: bool) -> None:
    for options, reason in [
        ({"exclude": [r"0\.weight$"]}, "exclude pattern"),
        ({"include": [r"1\.weight$"]}, "include pattern"),
        ({"filter_fn": lambda module, name: name != "0"}, "filter_fn does not accept"),
        ({"min_elements": 128 * 256 + 1}, "min_elements"),
    ]:
        model = nn.Sequential(NORMS[way](nn.Linear(128, 256)), nn.Linear(256, 4)).train(training)
        plan = fqcompile.quantize_(model, calibration=None, **options)
        said = [str(site.reason) for site in plan.kept if site.name.startswith("0.")]
        assert len(said) == 1 and reason in said[0], (options, said)


@pytest.mark.parametrize(
    "options", [{"method": "gptq", "calibration": None}, {"method": "x"}, {"calibration": 5}]
)
def test_a_refused_option_leaves_the_norms_of_a_model(options: dict[str, Any]) -> None:
    model = nn.Sequential(NORMS["parametrizations.weight_norm"](nn.Linear(128, 256))).eval()
    with pytest.raises(OptionError):
        fqcompile.quantize_(model, **options)
    assert hasattr(model[0], "parametrizations")


PARAMETRIZED: dict[str, Any] = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "weight_orig",
        "prune.remove",
    ),
    "a function of one's own": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        "parametrizations.weight.original",
        "remove_parametrizations",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", PARAMETRIZED)
def test_a_computed_weight_has_a_row_that_says_so(way: str) -> None:
    register, name, remedy = PARAMETRIZED[way]
    layer = nn.Linear(128, 256)
    register(layer)
    model = frozen(nn.Sequential(layer)).eval()
    x = torch.randn(2, 128)
    expected = model(x)
    plan = fqcompile.quantize_(model)
    assert not plan.quantized
    reason = str(plan.site(f"0.{name}").reason)
    assert "computed from it in each call" in reason and remedy in reason
    assert torch.equal(model(x), expected)


def test_a_convolution_is_never_offered_a_weight_that_can_be_packed() -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 4), dim=2)
    for model, name in [(conv, "parametrizations"), (nn.Sequential(conv), "0.parametrizations")]:
        site = fqcompile.quantize_(frozen(model)).site(f"{name}.weight.original1")
        assert (site.kind, site.status) == ("other", "kept")
        assert "this is a convolution's" in str(site.reason)
        assert "remove_parametrizations" not in str(site.reason)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(128, 4, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "attention, what was seen": (
        lambda: nn.MultiheadAttention(128, 4, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=torch.arange(5).expand(3, 5) > 2),
    ),
    "attention, sequence first": (
        lambda: nn.MultiheadAttention(128, 4),
        lambda m, x: m(x, x, x),
    ),
    "attention to others": (
        lambda: nn.MultiheadAttention(128, 4),
        lambda m, x: m(x, 2 * x, 2 * x)[0],
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(128, 4, kdim=64, vdim=64),
        lambda m, x: m(x, x[..., :64], x[..., 64:])[0],
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(128, 4, 256, dropout=0, batch_first=True),
            2,
            enable_nested_tensor=False,
        ),
        lambda m, x: m(x),
    ),
    "LSTMCell": (lambda: nn.LSTMCell(128, 64), lambda m, x: m(x[0], m(x[1]))),
    "GRUCell": (lambda: nn.GRUCell(128, 64), lambda m, x: m(x[0])),
    "RNNCell": (lambda: nn.RNNCell(128, 64), lambda m, x: m(x[0])),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_read_several_weights_in_one_call(name: str, training: bool) -> None:
    """The oracle is PyTorch's own call on the dequantized weights."""
    make, call = LAYERS[name]
    torch.manual_seed(0)
    model, x = frozen(make()).train(training), torch.randn(3, 5, 128)
    plan = fqcompile.quantize_(model, **SMALL, calibration=None)
    assert not plan.kept and len(plan.quantized) >= 2
    assert {n for n, p in model.named_parameters() if isinstance(p, PackedWeight)} == _names(plan)
    dense = fqcompile.restore(copy.deepcopy(model))
    with torch.no_grad():
        expected = call(dense, x)
        for run_ in (call, torch.compile(call, backend="aot_eager"), finequant(call, **SMALL)):
            pairs = zip(_tuple(run_(model, x)), _tuple(expected), strict=True)
            for got, want in pairs:
                assert_close(got, want, depth=CHAIN)
            torch._dynamo.reset()


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_other_large_parameters_have_a_row_and_no_table_is_a_stack_of_experts() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(1, 256, 128))
            self.relative = nn.Parameter(torch.randn(8, 64, 64))
            self.blocks = nn.Parameter(torch.randn(4, 4, 64, 64))

    model = frozen(
        nn.Sequential(
            nn.Conv1d(128, 128, 3),
            nn.Conv2d(128, 128, 1),
            nn.LSTM(128, 128),
            nn.Bilinear(32, 32, 16),
            Positions(),
            nn.Conv2d(3, 8, 1),
            nn.Embedding(512, 128),
        )
    )
    plan = fqcompile.quantize_(model)
    rows = {site.name: (site.kind, site.status, str(site.reason)) for site in plan.sites}
    said = {
        "0.weight": "a convolution's",
        "1.weight": "a convolution's; torch.compile(model, backend='finequant') can quantize it",
        "2.weight_ih_l0": "PyTorch's own LSTM reads it in one call",
        "2.weight_hh_l0": "PyTorch's own LSTM reads it in one call",
        "3.weight": "a Bilinear's; torch.compile(model, backend='finequant') can quantize it",
        "4.pos_embed": "a parameter of Positions",
        "4.relative": "a parameter of Positions",
        "4.blocks": "a parameter of Positions",
    }
    for name, reason in said.items():
        assert rows[name][:2] == ("other", "kept") and reason in rows[name][2]
        assert ("torch.compile" in rows[name][2]) is ("torch.compile" in reason)
    assert set(rows) == set(said), "no small one, and no embedding"


class _JetExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 256, 128))


class _Routed(nn.Module):
    """A block whose router is a module of its own, as in DBRX, JetMoe, Switch and Hunyuan."""

    def __init__(self, router: str, inner: str, experts: tuple[str, nn.Module]) -> None:
        super().__init__()
        gate = nn.Module()
        gate.add_module(inner, nn.Linear(128, 256))
        self.add_module(router, gate)
        self.add_module(*experts)


@pytest.mark.parametrize(
    ("router", "inner", "experts"),
    [
        ("router", "layer", ("experts", nn.Module())),
        ("router", "classifier", ("experts", nn.Module())),
        ("gate", "wg", ("experts", nn.Module())),
        ("router", "layer", ("input_linear", _JetExperts())),
    ],
)
def test_a_router_inside_of_a_module_is_kept(
    router: str, inner: str, experts: tuple[str, nn.Module]
) -> None:
    """4 bits would move its top-k, as for a router that lies beside the experts itself."""
    model, alone = _Routed(router, inner, experts), _Routed(router, inner, ("mlp", nn.Module()))
    name = f"{router}.{inner}.weight"
    assert "router" in str(fqcompile.quantize_(frozen(model)).site(name).reason)
    assert fqcompile.quantize_(frozen(alone)).site(name).status == "quantized"
    overridden = fqcompile.quantize_(model, overrides={name: {"bits": 8}})
    assert overridden.site(name).bits == 8


def test_filter_fn_chooses_by_module_and_name_as_torchaos_does() -> None:
    model, inputs = build("llama", torch.float32)
    asked: dict[str, nn.Module] = {}

    def accepts(module: nn.Module, name: str) -> bool:
        asked[name] = module
        return isinstance(module, nn.Linear) and name.endswith(("up_proj", "q_proj"))

    packed, plan = _packed(model, filter_fn=accepts)
    modules = dict(packed.named_modules())
    assert {f"{name}.weight" for name in asked} == {
        s.name for s in plan.sites if s.status == "quantized" or "filter_fn" in str(s.reason)
    }
    assert all(asked[name] is modules[name] for name in asked)
    for site in plan.sites:
        chosen = site.name.endswith(("up_proj.weight", "q_proj.weight"))
        assert (site.status == "quantized") == chosen
        assert isinstance(packed.get_parameter(site.name), PackedWeight) == chosen
        assert chosen or site.reason == "filter_fn does not accept its module"
    assert_close(run(packed, inputs), run(oracle(model, plan), inputs), depth=CHAIN * 4)


def test_filter_fn_is_not_asked_about_what_stays_anyway_and_finds_the_model_itself() -> None:
    lone = nn.Linear(128, 128)
    asked: list[tuple[nn.Module, str]] = []
    plan = fqcompile.quantize_(lone, filter_fn=lambda *given: asked.append(given) is None, **SMALL)
    assert asked == [(lone, "")] and plan.quantized
    plan = fqcompile.quantize_(lone, filter_fn=lambda *_: False, **SMALL)
    assert plan.sites[0].reason == "the weight is packed already"


def test_filter_fn_of_another_type_is_refused() -> None:
    names: Any = ["lm_head"]
    with pytest.raises(OptionError, match=r"filter_fn is \['lm_head'\]; allowed: a function of a"):
        fqcompile.quantize_(nn.Linear(128, 128), filter_fn=names)
