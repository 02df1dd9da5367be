"""explain(): the plan that compiling would follow, without compiling or changing anything."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from fqcompile.kernels import roofline
from fqcompile.passes.kept import TABLE
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle, quantized_names, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


class Small(Mlp):
    """With one linear below min_elements."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(super().forward(x))


def _model() -> nn.Module:
    return frozen(Small())


def _sites(plan: Any) -> list[tuple[Any, ...]]:
    return sorted(
        (s.name, s.shape, s.status, s.reason, s.bits, s.group_size, s.relative_error, s.kernel)
        for s in plan.sites
    )


@pytest.mark.parametrize(
    "options", [{}, {"bits": 8}, {"granularity": 32}, {"exclude": ["up"]}, {"error_budget": 0.05}]
)
def test_explain_equals_the_report_of_compiling(options: dict[str, Any]) -> None:
    model = _model()
    plan = fqcompile.explain(model, X, inner_backend="eager", **options)
    assert not fqcompile.reports()
    finequant(model, **options)(X)
    assert _sites(plan) == _sites(report().plan)
    assert dict(plan.options) == dict(report().plan.options)


def test_explain_changes_nothing_and_compiles_nothing() -> None:
    model = _model()
    state = copy.deepcopy(model.state_dict())
    expected = model(X)
    fqcompile.explain(model, X)
    assert not fqcompile.reports()
    assert not any(module._compiled_call_impl for module in model.modules())
    assert torch.equal(model(X), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.data_ptr() == dict(model.named_parameters())[name].data_ptr()


@pytest.mark.slow
@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch counts dry runs and compilations together",
)
def test_explain_again_and_again_gives_the_same_plan_and_leaves_room_to_compile() -> None:
    model = _model()
    shapes = [(1,) * rank + (128,) for rank in range(12)]  # each rank is a graph of its own
    plans = [fqcompile.explain(model, torch.randn(shape)) for shape in shapes]
    assert all(_sites(plan) == _sites(plans[0]) for plan in plans)
    compiled = finequant(model)
    for shape in shapes[:4]:
        x = torch.randn(shape)
        assert_close(compiled(x), oracle(model)(x), k=256, depth=3)


def test_explain_sees_the_options_and_weights_of_each_call() -> None:
    model = _model()
    bits = [fqcompile.explain(model, X, bits=b).site("up.weight").bits for b in (4, 8, 4)]
    assert bits == [4, 8, 4]
    model.up.weight[0, 0] = torch.nan
    assert "NaN" in fqcompile.explain(model, X).site("up.weight").reason


def test_explain_of_a_compiled_model() -> None:
    model = _model()
    compiled = finequant(model)
    compiled(X)
    assert _sites(fqcompile.explain(model, X)) == _sites(report().plan)
    assert len(fqcompile.reports()) == 1
    assert_close(compiled(X), oracle(model)(X), k=256, depth=3)


class WithBreaks(Small):
    """Three graphs; the first linear's weight is read in two of them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        torch._dynamo.graph_break()
        hidden = self.down(hidden)
        torch._dynamo.graph_break()
        return self.score(self.down(F.gelu(self.up(hidden))))


def test_explain_joins_the_graphs_of_a_broken_model() -> None:
    model = frozen(WithBreaks())
    plan = fqcompile.explain(model, X)
    names = [site.name for site in plan.sites]
    assert sorted(names) == ["down.weight", "score.weight", "up.weight"]
    finequant(model, fullgraph=False)(X)
    found = {name for r in fqcompile.reports() for name in quantized_names(r.sites)}
    assert quantized_names(plan.sites) == found


def test_explain_takes_keyword_inputs_and_plain_functions() -> None:
    model = _model()

    def function(x: Tensor, *, scale: float) -> Tensor:
        return model(x) * scale

    plan = fqcompile.explain(function, X, example_kwargs={"scale": 2.0})
    assert len(plan.quantized) == 2


def test_the_plan_prints_and_exports(tmp_path: Path) -> None:
    plan = fqcompile.explain(_model(), X, bits=8)
    text = str(plan)
    assert "up.weight" in text
    assert "quantized 2 of 3 sites" in text
    assert "kept 1: fewer elements than min_elements=16384" in text
    loaded = json.loads(plan.to_json())
    assert loaded["options"]["bits"] == 8
    assert [site["name"] for site in loaded["sites"]] == [site.name for site in plan.sites]
    page = plan.to_html(tmp_path / "plan.html").read_text()
    assert "down.weight" in page


def test_a_failing_model_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="128"):
        fqcompile.explain(_model(), torch.randn(5, 127))
    assert fqcompile.explain(_model(), X).quantized


def test_matrices_that_no_graph_reads_are_listed() -> None:
    """A loop over data keeps experts out of every graph; a branch not taken keeps its layer out."""

    class Unread(Small):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 128, 128))
            self.other = nn.Linear(128, 256)
            self.tiny = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x)[:, :8] if len(x) > 99 else super().forward(x)

    plan = fqcompile.explain(frozen(Unread()), X)
    reasons = {s.name: (s.kind, str(s.reason)) for s in plan.kept}
    unread = {name: found for name, found in reasons.items() if "no captured graph" in found[1]}
    assert {name: kind for name, (kind, _) in unread.items()} == {
        "experts": "experts",
        "other.weight": "linear",
    }
    assert unread["experts"][1].endswith(
        "call model.set_experts_implementation('grouped_mm') first"
    )
    assert "set_experts" not in unread["other.weight"][1]


@pytest.mark.parametrize(
    ("conv", "name"),
    [
        (nn.Conv1d(64, 64, 4), "conv.weight"),
        (nn.Conv2d(64, 64, 4), "conv.weight"),
        (
            torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 4), dim=2),
            "conv.parametrizations.weight.original1",
        ),
    ],
    ids=["conv1d", "conv2d", "weight norm"],
)
def test_a_convolution_that_no_graph_reads_is_none_of_experts(conv: nn.Module, name: str) -> None:
    class Unread(Small):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv
            self.relative = nn.Parameter(torch.randn(8, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.relative if len(x) > 99 else super().forward(x)

    model = frozen(Unread())
    plan = fqcompile.explain(model, X)
    site, other = plan.site(name), plan.site("relative")
    assert (site.kind, site.status) == ("other", "kept")
    assert site.shape == tuple(model.get_parameter(name).shape)
    reason = str(site.reason)
    assert "no captured graph reads it" in reason and "a convolution" in reason
    assert "quantize_" not in reason
    assert (other.kind, other.status) == ("other", "kept")
    assert "set_experts" not in str(other.reason)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_a_recurrent_layer_keeps_out_of_every_graph_says_so(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(128, 128)
            self.out = nn.Linear(128, 256)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model = frozen(Recurrent())
    plan = fqcompile.explain(model, X)
    unread = [site for site in plan.kept if "no captured graph" in str(site.reason)]
    assert "rnn.weight_ih_l0" in {site.name for site in unread}
    for site in unread:
        assert f"does not trace nn.{kind.__name__}" in str(site.reason)
        assert "quantize_(model) first" in str(site.reason)
    assert fqcompile.quantize_(model).site("out.weight").status == "quantized"


def test_every_matrix_that_a_graph_reads_is_listed_once() -> None:
    plan = fqcompile.explain(_model(), X)
    assert len({s.name for s in plan.sites}) == len(plan.sites)
    assert not any("no captured graph" in str(s.reason) for s in plan.sites)


def test_a_compilation_does_not_measure_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 128 MiB and a tenth of a second: only for who asks, and once."""
    asked = []
    monkeypatch.setattr(roofline, "read_bandwidth", lambda: asked.append(None) or 10e9)
    model = torch.compile(frozen(Mlp()), backend="finequant", options={"inner_backend": "eager"})
    with torch.no_grad():
        model(torch.randn(3, 128))
    (report,) = fqcompile.reports()
    assert report.plan.totals.quantized and not asked
    site = report.plan.quantized[0]
    assert site.least_us == site.as_dict()["least_us"] > 0
    assert f"lower bound of the quantized matmuls: {report.least_ms:.3g} ms" in str(report)
    assert len(asked) == report.plan.totals.quantized
    assert fqcompile.Site(**site.as_dict(), recipe=None).least_us == site.least_us


def test_each_site_says_what_it_takes_at_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged gate and up share the activations that their one matmul moves."""
    monkeypatch.setattr(roofline, "read_bandwidth", lambda: 10e9)
    sites = fqcompile.explain(frozen(Mlp()), torch.randn(3, 128), granularity=64).quantized
    for site in sites:
        n, k = site.shape
        moved = site.bytes_after + 3 * 4 * (n + k)
        assert site.least_us == pytest.approx(1e6 * moved / 10e9)
        assert site.as_dict()["least_us"] == site.least_us


class Repeated(nn.Module):
    """Three equal layers, each behind a graph break: one graph serves them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(seed=i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def test_equal_layers_behind_graph_breaks_are_all_listed() -> None:
    model = frozen(Repeated())
    plan = fqcompile.explain(model, X)
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]
    assert [site.name for site in plan.sites] == names
    assert str(plan.totals).startswith("quantized 6 of 6 sites")
    actual = finequant(model, fullgraph=False)(X)
    assert_close(actual, oracle(model, plan)(X), k=256, depth=6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_of_equal_layers_reports_all_that_run_it(dynamic: bool) -> None:
    """With their own errors, plans and reasons, in the report of the variant that is theirs."""
    model = frozen(Repeated())
    model.layers[1].up.weight[0, 0] = torch.nan
    options = {"overrides": {r"layers\.2\.down": {"bits": 8}}, "exclude": [r"layers\.0\.up"]}
    plan = fqcompile.explain(model, X, inner_backend="eager", **options)
    way = finequant(model, fullgraph=False, dynamic=dynamic, **options)
    for _ in range(2):
        way(X)
        rows = [row for found in fqcompile.reports() for row in _sites(found.plan)]
        assert sorted(rows) == _sites(plan)
    by_layer = [{s.name.split(".")[1] for s in found.sites} for found in fqcompile.reports()]
    assert by_layer == [{"0", "1"}, {"2"}]


def test_dumps_hold_the_rows_of_all_equal_layers(tmp_path: Path) -> None:
    finequant(frozen(Repeated()), fullgraph=False, debug_dir=str(tmp_path))(X)
    (report,) = fqcompile.reports()
    (folder,) = tmp_path.iterdir()
    assert len(report.sites) == 6
    assert json.loads((folder / "report.json").read_text()) == json.loads(report.to_json())
    assert "layers.2.down.weight" in (folder / "sites.txt").read_text()


def test_the_report_of_equal_layers_fake_quantizes_all_of_them() -> None:
    model = frozen(Repeated())
    actual = finequant(model, fullgraph=False)(X)
    (report,) = fqcompile.reports()
    assert_close(actual, oracle(model, report)(X), k=256, depth=6)


def test_equal_layers_with_nothing_to_quantize_are_reported_by_the_first() -> None:
    """They run its graph without a word to us; `explain` lists them all."""
    model, options = frozen(Repeated()), {"min_elements": 1 << 20}
    plan = fqcompile.explain(model, X, **options)
    finequant(model, fullgraph=False, **options)(X)
    (report,) = fqcompile.reports()
    assert len(plan.kept) == 6
    assert report.sites == plan.sites[:2]


class Positions(nn.Module):
    """As CTRL, which casts its table before what breaks the graph, and reads its rows after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(256, 128))
        self.up = nn.Linear(128, 128)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        self.table = self.table.to(x.dtype)
        torch._dynamo.graph_break()
        return self.up(x + self.table[ids])


def test_what_a_graph_only_hands_on_is_told_by_the_one_that_reads_it() -> None:
    model, ids = frozen(Positions()), torch.arange(5)
    plan = fqcompile.explain(model, X, ids, inner_backend="eager")
    kept = {site.name: site.reason for site in plan.kept}
    assert kept == {"table": TABLE}
    finequant(model, fullgraph=False)(X, ids)
    assert _sites(plan) == sorted(
        row for found in fqcompile.reports() for row in _sites(found.plan)
    )


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_explain_of_what_is_compiled_in_place(parts: bool) -> None:
    model = frozen(Repeated())
    expected = _sites(fqcompile.explain(model, X, inner_backend="eager"))
    modules = list(model.layers) if parts else [model]
    for module in modules:
        module.compile(backend="finequant", options={"inner_backend": "eager"})
    assert _sites(fqcompile.explain(model, X, inner_backend="eager")) == expected
    assert not fqcompile.reports()
    with torch.no_grad():
        actual = model(X)
    assert fqcompile.reports()
    assert_close(actual, oracle(model, fqcompile.explain(model, X))(X), k=256, depth=6)


def test_equal_layers_with_other_plans_are_told_apart() -> None:
    model = frozen(Repeated())
    model.layers[1].up.weight[0, 0] = torch.nan
    plan = fqcompile.explain(model, X, overrides={r"layers\.2\.": {"bits": 8}})
    assert [site.bits for site in plan.sites] == [4, 4, None, 4, 8, 8]
    assert "NaN" in str(plan.site("layers.1.up.weight").reason)


def test_parts_of_one_weight_are_numbered_over_all_graphs() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(256, 128))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.both[:128])
            torch._dynamo.graph_break()
            return F.linear(x, self.both[128:])

    plan = fqcompile.explain(frozen(Split()), X, min_elements=1024)
    assert [site.name for site in plan.quantized] == ["both[0]", "both[1]"]


def test_a_model_as_it_was_made_is_explained_as_it_will_be_called() -> None:
    """Weights require grad until somebody freezes them; inference runs under no_grad."""
    plan = fqcompile.explain(Small(), X)
    assert _sites(plan) == _sites(fqcompile.explain(_model(), X))
    assert len(plan.quantized) == 2
    assert torch.is_grad_enabled()


def test_equal_reasons_are_one_line() -> None:
    plan = fqcompile.explain(Repeated(), X, grad=True)
    assert len(plan.kept) == 6
    assert plan.kept_lines() == [
        "kept 6: the weight requires grad: call under torch.no_grad(), or freeze it with "
        "requires_grad_(False)"
    ]
    assert str(plan).count("requires_grad_(False)") == 1


def test_a_table_of_positions_that_a_linear_projects_is_none_of_experts() -> None:
    """As in Wav2Vec2-Conformer: the constant [1, tokens, width] is the linear's input."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pe = torch.randn(1, 300, 64)
            self.project = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.project(self.pe[:, : x.shape[1]])

    plan = fqcompile.explain(frozen(Positions()), torch.randn(2, 5, 64), min_elements=256)
    (table,) = [site for site in plan.kept if site.name == "pe"]
    assert table.kind == "other"
