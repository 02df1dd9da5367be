"""The decorator on functions and forward methods, and the ways in which options come in."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from tests.helpers import assert_close, finequant, frozen, oracle, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
WEIGHT = nn.Parameter(torch.randn(128, 128) / 11, requires_grad=False)


def test_a_function_with_a_global_weight() -> None:
    @fqcompile.finequant(inner_backend="eager", bits=8)
    def function(x: Tensor) -> Tensor:
        """Doc."""
        return F.linear(x, WEIGHT)

    assert function.__name__ == "function"
    assert function.__doc__ == "Doc."
    actual, expected = function(X), F.linear(X, WEIGHT)
    (site,) = report().plan.quantized
    assert (site.name, site.bits) == ("WEIGHT", 8)
    # Rounding to 8 bits leaves an error of about a hundredth in the weight, and so in the result.
    error = ((actual - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 3 * site.relative_error


def test_a_closure_s_weight() -> None:
    weight = torch.randn(128, 128) / 11

    @fqcompile.finequant(inner_backend="eager")
    def function(x: Tensor) -> Tensor:
        return x @ weight

    assert not torch.allclose(function(X), X @ weight)
    assert [site.name for site in report().plan.quantized] == ["weight"]


class Decorated(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.proj = nn.Linear(128, 128)

    @fqcompile.finequant(inner_backend="eager", granularity=32, fullgraph=True)
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.proj(x))


def test_a_forward_method_serves_every_instance() -> None:
    for seed in range(3):
        model = frozen(Decorated(seed))
        actual = model(X)
        faked = oracle(model, report())
        assert_close(actual, torch.relu(faked.proj(X)))
    assert report().plan.site("proj.weight").group_size == 32


def test_without_options_the_whole_compiler_runs() -> None:
    weight = torch.randn(128, 128) / 11

    @fqcompile.finequant
    def function(x: Tensor) -> Tensor:
        return torch.relu(x @ weight)

    assert function(X).shape == X.shape
    assert dict(report().plan.options) == fqcompile.FineQuantConfig().as_dict()
    assert report().plan.quantized


def test_dynamic_and_fullgraph_are_torch_compile_s() -> None:
    @fqcompile.finequant(inner_backend="eager", dynamic=True)
    def dynamic(x: Tensor) -> Tensor:
        return x @ WEIGHT

    for rows in (2, 3, 4, 5):
        dynamic(X[:rows])
    assert len(fqcompile.reports()) == 1

    @fqcompile.finequant(inner_backend="eager", fullgraph=True)
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x @ WEIGHT

    with pytest.raises(torch._dynamo.exc.Unsupported):
        broken(X)


def test_bad_options_raise_where_the_function_is_defined() -> None:
    with pytest.raises(fqcompile.OptionError, match=r"unknown option bit;.*did you mean 'bits'"):
        fqcompile.finequant(bit=8)


def test_mode_reaches_inductor_from_torch_compile_and_as_an_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches: list[dict[str, object]] = []

    def compile_fx(module: nn.Module, args: Any, config_patches: dict[str, object]) -> Any:
        patches.append(config_patches)
        return module.forward

    monkeypatch.setattr("fqcompile.passes.lower.compile_fx", compile_fx)
    model = frozen(nn.Linear(128, 128))
    torch.compile(model, backend="finequant", mode="max-autotune-no-cudagraphs")(X)
    torch._dynamo.reset()
    settings = {"mode": "max-autotune-no-cudagraphs", "inductor": {"max_autotune": False}}
    finequant(model, inner_backend="inductor", **settings)(X)
    assert patches[0]["max_autotune"] is True
    assert patches[1]["max_autotune"] is False
    assert [r.plan.options["mode"] for r in fqcompile.reports()] == [settings["mode"]] * 2


def test_the_backend_is_found_without_importing_the_package() -> None:
    script = (
        "import sys, torch\n"
        "model = torch.nn.Linear(128, 128).requires_grad_(False)\n"
        "assert 'finequant' in torch.compiler.list_backends()\n"
        "assert 'fqcompile' not in sys.modules\n"
        "options = {'inner_backend': 'eager'}\n"
        "torch.compile(model, backend='finequant', options=options)(torch.ones(2, 128))\n"
        "print(len(sys.modules['fqcompile'].reports()))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
