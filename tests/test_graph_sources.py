"""Graphs that come another way than from a plain model: they are right, and explained."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel

import fqcompile
from fqcompile.passes.kept import IN_THE_GRAPH
from fqcompile.passes.plan import NO_VALUES
from tests.helpers import (
    Mlp,
    assert_close,
    assert_quantized_like_oracle,
    finequant,
    frozen,
    oracle,
    quantized_names,
    report,
)

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
BOTH = {"up.weight", "down.weight"}


def reasons() -> dict[str, str | None]:
    return {s.name: s.reason for r in fqcompile.reports() for s in r.sites if s.status == "kept"}


def test_saved_export_is_quantized() -> None:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(frozen(Mlp()), (X,)), buffer)
    buffer.seek(0)
    model = torch.export.load(buffer).module()
    with torch.no_grad():
        actual = finequant(model)(X)
        assert_quantized_like_oracle(model, actual, lambda m: m(X), k=256, depth=2)
    assert quantized_names(report().sites) == BOTH


@pytest.mark.parametrize("decomposed", [False, True], ids=["weights", "codes"])
@pytest.mark.parametrize("also_dense", [False, True], ids=["packed", "in part"])
def test_exported_packed_weights_stay_packed(decomposed: bool, also_dense: bool) -> None:
    """As packed weights, or as the codes that `run_decompositions` makes of them."""
    model = frozen(Mlp())
    plan = fqcompile.quantize_(model, exclude=["down"] if also_dense else [])
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    if decomposed:
        program = program.run_decompositions({})
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(program.module()(X), expected)
        actual = finequant(program.module())(X[:3])
        if also_dense:
            model = oracle(frozen(Mlp()), plan)
            fqcompile.fake_quantize_(model, report())
        assert_close(actual, model(X[:3]), k=256, depth=2)
    assert not report().warnings


def mamba(**sizes: int) -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=8))


def falcon_mamba(**sizes: int) -> nn.Module:
    config = transformers.FalconMambaConfig(**sizes, state_size=8)
    return transformers.FalconMambaForCausalLM(config)


def jamba(**sizes: int) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    layers = {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 4}
    state = {"mamba_d_state": 8, "mamba_dt_rank": 8}
    config = transformers.JambaConfig(**sizes, **heads, **layers, **state)
    return transformers.JambaForCausalLM(config)


@pytest.mark.parametrize("make", [mamba, pytest.param(falcon_mamba, marks=pytest.mark.slow), jamba])
def test_state_space_model_with_a_vmap_is_quantized(make: Any) -> None:
    torch.manual_seed(0)
    model = frozen(make(vocab_size=300, hidden_size=64, num_hidden_layers=2))
    ids = torch.randint(0, 300, (2, 5))  # the scan is traced step by step

    def run(m: Any) -> Tensor:
        logits: Tensor = m(ids, use_cache=False).logits
        return logits

    with torch.no_grad():
        actual = run(finequant(model, min_elements=1024))
        assert len(report().plan.quantized) >= 6
        assert_quantized_like_oracle(model, actual, run, k=256, depth=8)


def test_codebooks_of_a_codec_choose_as_before() -> None:
    torch.manual_seed(0)
    small = {"num_filters": 4, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 1024}
    two = {"sampling_rate": 800, "upsampling_ratios": [4, 2], "target_bandwidths": [2.0]}
    config = transformers.EncodecConfig(**small, **two, num_lstm_layers=1)
    quantizer = frozen(transformers.EncodecModel(config).quantizer)
    for layer in quantizer.layers:
        layer.codebook.embed.copy_(torch.randn(1024, 32))
    hidden = torch.randn(2, 32, 20)
    with torch.no_grad():
        codes = torch.compile(
            quantizer.encode, backend="finequant", options={"inner_backend": "eager"}
        )(hidden)
        assert torch.equal(codes, quantizer.encode(hidden))
    kept = reasons()
    assert kept and all("codebook: " in str(reason) for reason in kept.values()), kept


def test_what_is_passed_in_is_multiplied_with_as_it_is() -> None:
    """A buffer that a compiled module read before keeps Dynamo's mark when it is passed in."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(128, 256))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    holder = Holder()

    def product(x: Tensor, *, table: Tensor, more: list[Tensor]) -> Tensor:
        return x @ table @ more[0]

    with torch.no_grad():
        finequant(holder)(X)
        assert quantized_names(report().sites) == {"table"}
        fqcompile.report.clear_reports()
        more = [nn.Parameter(torch.randn(256, 128))]
        actual = finequant(product)(X, table=holder.table, more=more)
        assert torch.equal(actual, product(X, table=holder.table, more=more))
    assert quantized_names(report().sites) == set()


def test_names_of_a_frozen_graph_are_those_of_the_parameters() -> None:
    sequence = frozen(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)))
    with inductor_config.patch(freezing=True), torch.no_grad():
        finequant(sequence)(X)
    assert reasons() == dict.fromkeys(["0.weight", "2.weight"], IN_THE_GRAPH)


def test_frozen_graph_is_explained_and_quantizing_first_works() -> None:
    with inductor_config.patch(freezing=True), torch.no_grad():
        model = frozen(Mlp())
        assert torch.equal(finequant(model)(X), model(X))
        assert reasons() == dict.fromkeys(BOTH, IN_THE_GRAPH)
        assert "freezing off" in report().warnings[0] and "quantize_" in report().warnings[0]
        packed = frozen(Mlp())
        plan = fqcompile.quantize_(packed)
        expected = oracle(frozen(Mlp()), plan)(X)
        assert_close(finequant(packed)(X), expected, k=256, depth=2)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Blocks(nn.Module):
    """Four matrices of 1 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Mlp(128, 2048, seed=seed) for seed in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def buckets() -> tuple[nn.Module, nn.Module]:
    """A model, and DDP that splits it."""
    model = Blocks()
    return model, DistributedDataParallel(model, bucket_cap_mb=1)


@pytest.mark.usefixtures("one_rank")
def test_graph_that_ddp_splits_is_right_and_explained() -> None:
    model, parallel = buckets()
    compiled = finequant(parallel, fullgraph=False)
    with torch.no_grad():
        assert_close(compiled(X), model(X), k=2048, depth=4)
    assert len(fqcompile.reports()) > 1
    kept = reasons()
    assert len(kept) == 4 and set(kept.values()) == {NO_VALUES}
    assert all("optimize_ddp = False" in r.warnings[0] for r in fqcompile.reports() if r.sites)


@pytest.mark.usefixtures("one_rank")
def test_ddp_in_one_graph_is_quantized() -> None:
    model, parallel = buckets()
    with torch._dynamo.config.patch(optimize_ddp=False), torch.no_grad():
        actual = finequant(parallel, fullgraph=False)(X)
    assert len(report().plan.quantized) == 4
    assert_close(actual, oracle(model)(X), k=2048, depth=4)


def test_nested_tensor_is_right_and_explained() -> None:
    model = frozen(Mlp())
    nested = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
    with torch.no_grad():
        actual = finequant(model)(nested)
        assert_close(torch.cat(actual.unbind()), model(X), k=256, depth=2)
    kept = reasons()
    assert set(kept) == BOTH and all("nested tensor" in str(r) for r in kept.values())


def test_compiled_ahead_of_time_it_runs_and_does_not_pretend_to_save() -> None:
    model = frozen(Mlp())
    options = {"inner_backend": "eager"}
    compiled = torch.compile(model.forward, backend="finequant", fullgraph=True, options=options)
    if not hasattr(compiled, "aot_compile"):
        pytest.skip(f"torch {torch.__version__} compiles no method ahead of time")
    with torch.no_grad():
        function = compiled.aot_compile(((X,), {}))
        assert_quantized_like_oracle(model, function(model, X), lambda m: m(X), k=256, depth=2)
    with pytest.raises(NotImplementedError, match=r"fqcompile\.save\(model, directory\)"):
        function.save_compiled_function(os.devnull)


def test_compiled_graph_has_a_name_for_tools_that_show_it() -> None:
    seen: list[Any] = []

    def backend(gm: Any, args: Any) -> Any:
        seen.append(fqcompile.backend.finequant(gm, args, options={"inner_backend": "eager"}))
        return seen[-1]

    torch.compile(frozen(Mlp()), backend=backend)(X)
    assert seen[0].__code__.co_name == "__call__"


def test_graph_without_example_values_is_a_warning() -> None:
    def backend(gm: Any, args: Any) -> Any:
        for node in gm.graph.nodes:
            node.meta.pop("example_value", None)
        return fqcompile.backend.finequant(gm, args, options={"inner_backend": "eager"})

    model = frozen(Mlp())
    assert torch.equal(torch.compile(model, backend=backend)(X), model(X))
    (warning,) = report().warnings
    assert torch.__version__ in warning and "fqcompile.quantize_(model)" in warning


def test_recurrent_network_has_a_row_for_each_matrix() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(128, 128, batch_first=True), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0])

    model = frozen(Recurrent())
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        finequant(model)(X[None])
        explained = fqcompile.explain(model, X[None])
    assert quantized_names(report().sites) == {"out.weight"}
    why = "read by lstm: not a linear or expert form that is quantized"
    assert reasons() == {"lstm.weight_ih_l0": why, "lstm.weight_hh_l0": why}
    assert {s.name: s.reason for s in explained.sites if s.status == "kept"} == reasons()
