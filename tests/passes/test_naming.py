"""naming: the names of `named_parameters()` of what was compiled, wherever a graph begins."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from tests.helpers import assert_close, frozen, oracle

OPTIONS: dict[str, Any] = {"min_elements": 1, "inner_backend": "eager", "granularity": 32}
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
ODD = 'it\'s "odd"[0]'


class Block(nn.Module):
    """Two graphs; a weight in every kind of container, behind an attribute access of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh())
        self.listed = nn.ParameterList([torch.randn(64, 64) / 8])
        self.named = nn.ParameterDict({ODD: torch.randn(64, 64) / 8})
        self.register_buffer("table", torch.randn(64, 64) / 8)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.up(x))
        torch._dynamo.graph_break()
        return x @ self.listed[0] @ self.named[ODD] @ self.table


class Siblings(nn.Module):
    """Equal blocks, of which the others run in the graphs of the first; a head behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = Block(), Block(), Block()
        self.lm_head = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.c(self.b(self.a(x))))


def _matrices(model: nn.Module, prefix: str = "") -> set[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {f"{prefix}{name}" for name, tensor in tensors if tensor.dim() == 2}


def _compiled_module(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="finequant", options=options)


def _compiled_in_place(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend="finequant", options=options)
    return model


def _compiled_method(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model.forward, backend="finequant", options=options)


def _compiled_function(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        # no method of the model is on the stack where its parts are called
        return model.lm_head(model.c(model.b(model.a(x))))

    return torch.compile(run, backend="finequant", options=options)


def _compiled_function_of_model(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.lm_head(net.c(net.b(net.a(x))))

    compiled = torch.compile(run, backend="finequant", options=options)
    return lambda x: compiled(model, x)


def _decorated(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    class Pipeline:
        def __init__(self) -> None:
            self.net: Any = model

        @fqcompile.finequant(**options)
        def run(self, x: Tensor) -> Tensor:
            return self.net.lm_head(self.net.c(self.net.b(self.net.a(x))))

    return Pipeline().run


WAYS = [
    _compiled_module,
    _compiled_in_place,
    _compiled_method,
    _compiled_function,
    _compiled_function_of_model,
    _decorated,
]


@pytest.mark.parametrize("way", WAYS)
def test_names_are_those_of_the_module_that_was_compiled(way: Any) -> None:
    model = frozen(Siblings())
    with torch.no_grad():
        way(model, **OPTIONS)(X)
    sites = [site for report in fqcompile.reports() for site in report.sites]
    names = {site.name for site in sites}
    assert names == _matrices(model)  # of b and c too, which run in the graphs that a made
    assert {site.name: site.bits for site in sites}["lm_head.weight"] == 8


def test_explain_names_every_block() -> None:
    model = frozen(Siblings())
    plan = fqcompile.explain(model, X, **OPTIONS)
    assert {site.name for site in plan.quantized} == _matrices(model)
    assert len(plan.sites) == len(_matrices(model))


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_options_by_name_reach_each_block_that_shares_a_graph(way: Any) -> None:
    """Against the plan of explain, in a dense model: other options would give other values."""
    model = frozen(Siblings())
    options = {
        **OPTIONS,
        "exclude": [r"^b\.", "lm_head"],
        "overrides": {r"^c\.": {"bits": 8}},
        "on_unsupported": "error",
    }
    plan = fqcompile.explain(model, X, **options)
    bits = {name: {s.bits for s in plan.sites if s.name.startswith(name)} for name in "abcl"}
    assert bits == {"a": {4}, "b": {None}, "c": {8}, "l": {None}}
    expected = oracle(model, plan)(X)
    with torch.no_grad():
        actual = way(model, **options)(X)
    assert_close(actual, expected, k=64, depth=16)
    assert not torch.allclose(actual, oracle(model, fqcompile.explain(model, X, **OPTIONS))(X))


def test_the_wrapped_model_is_explained_as_the_model() -> None:
    model = frozen(Siblings())
    plan = fqcompile.explain(model, X, **OPTIONS)
    compiled = torch.compile(model, backend="finequant", options=OPTIONS)
    again = fqcompile.explain(compiled, X, **OPTIONS)
    assert [site.name for site in again.sites] == [site.name for site in plan.sites]


def test_a_head_that_is_tied_to_an_embedding_behind_a_break() -> None:
    """Its graph has no embedding, and its name is none of the usual ones."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 64)
            self.out = nn.Linear(64, 96, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            torch._dynamo.graph_break()
            return self.out(x)

    model = frozen(Tied())
    ids = torch.arange(5)
    plan = fqcompile.explain(model, ids, **OPTIONS)
    assert [(s.name, s.bits) for s in plan.quantized] == [("out.weight", 8)]
    with torch.no_grad():
        actual = _compiled_module(model, **OPTIONS)(ids)
    assert_close(actual, oracle(model, plan)(ids), k=64)


def test_names_that_would_be_equal_begin_with_their_roots() -> None:
    a, b = frozen(Block()), frozen(Block())
    plan = fqcompile.explain(lambda x: a(x) + b(x), X, **OPTIONS)
    assert {site.name for site in plan.sites} == _matrices(a, "a.") | _matrices(b, "b.")


class Calls:
    """A model behind an object that is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def run(self, x: Tensor) -> Tensor:
        return self.model(x)


def _scaled(model: nn.Module, scale: float, x: Tensor) -> Tensor:
    return model(x) * scale


def _by_keyword(x: Tensor, *, model: nn.Module) -> Tensor:
    return model(x)


CALLABLES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "partial": lambda m: partial(_scaled, m, 2.0),
    "nested": lambda m: partial(partial(_scaled, m), 2.0),
    "keyword": lambda m: partial(_by_keyword, model=m),
    "module": lambda m: partial(m),
    "method of a module": lambda m: partial(m.forward),
    "method": lambda m: Calls(m).run,
    "partial of a method": lambda m: partial(Calls(m).run),
    "object": Calls,
}


@pytest.mark.parametrize("wrap", CALLABLES.values(), ids=CALLABLES)
def test_names_behind_a_callable_are_those_of_its_model(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> None:
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    called = wrap(model)
    options = OPTIONS | {"exclude": [r"^0\.weight$"]}
    plan = fqcompile.explain(called, X, **options)
    found = [(site.name, site.status) for site in plan.sites]
    assert found == [("0.weight", "kept"), ("2.weight", "quantized")]
    actual = torch.compile(called, backend="finequant", options=options)(X)
    assert [(site.name, site.status) for site in fqcompile.reports()[-1].sites] == found
    assert_close(actual, wrap(oracle(model, plan))(X), k=64, depth=2)


@pytest.mark.few(1)
@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_names_of_an_adapted_model(broken: bool) -> None:
    """peft's wrappers pass attributes on by __getattr__."""
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    from_pieces = Siblings()
    config = peft.LoraConfig(r=4, target_modules=["up"], lora_dropout=0.0)
    model = frozen(peft.get_peft_model(from_pieces, config))
    if not broken:
        for block in (from_pieces.a, from_pieces.b, from_pieces.c):
            block.forward = lambda x, block=block: block.up(x)  # type: ignore[method-assign]
    plan = fqcompile.explain(model, X, exclude=[r"base_model\.model\.lm_head"], **OPTIONS)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for site in plan.sites:
        assert tuple(tensors[site.name].shape) == site.shape
    head = plan.site("base_model.model.lm_head.weight")
    assert head.reason == r"name matches exclude pattern 'base_model\\.model\\.lm_head'"
    assert plan.site("base_model.model.b.up.base_layer.weight").status == "quantized"
