"""A head whose weight is also a table that no nn.Embedding owns: 8 bits, and the table stays.

Compiling, explain and fake_quantize_ see every reader of a weight; quantize_ sees the modules. The
last tests are of models of transformers, whose `tie_weights` others call.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from fqcompile.errors import FineQuantError
from fqcompile.integrations.transformers import FineQuantHfConfig
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import CASES, COMMON, build, run
from tests.helpers import assert_close, finequant, frozen, report

IDS = torch.arange(6).view(2, 3)
OPTIONS: dict[str, Any] = {"min_elements": 1024}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "embedding": lambda table: F.embedding(IDS, table),
    "index": lambda table: table[IDS],
    "index_select": lambda table: table.index_select(0, IDS.flatten()).view(2, 3, -1),
    "gather": lambda table: table.gather(0, IDS.flatten()[:, None].expand(-1, table.shape[1])).view(
        2, 3, -1
    ),
    "view": lambda table: F.embedding(IDS, table.detach().view(table.shape)),
}


class Table(nn.Module):
    """A table as libraries write their own: no nn.Embedding."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(96, 128))
        self.read = read

    def forward(self) -> Tensor:
        return self.read(self.rows)


class Tied(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor], *, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Table(read)
        self.body = nn.Linear(128, 128)
        self.out = nn.Linear(128, 96)
        self.out.weight = self.table.rows
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.table() + x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.out(x)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("read", READS)
def test_the_head_takes_8_bits_and_the_table_stays(read: str, broken: bool) -> None:
    model, x = frozen(Tied(READS[read], broken=broken)), torch.zeros(2, 3, 128)
    plan = fqcompile.explain(model, x, **OPTIONS)
    assert {s.name: s.bits for s in plan.quantized} == {"body.weight": 4, "out.weight": 8}
    (table,) = plan.kept
    assert table.name == "table.rows" and "embedding table" in str(table.reason)
    actual = finequant(model, fullgraph=not broken, **OPTIONS)(x)
    faked = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    assert torch.equal(faked.table.rows, model.table.rows)
    assert not torch.equal(faked.out.weight, model.out.weight)
    assert_close(actual, faked(x), depth=3)
    # and not what the head gives that reads its table dequantized, too
    faked.table.rows = faked.out.weight
    assert not torch.allclose(actual, faked(x), rtol=1e-5)


def test_one_parameter_for_both_is_compiled_and_cannot_be_faked() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lm_head = nn.Linear(128, 96)

        def forward(self, ids: Tensor) -> Tensor:
            return self.lm_head(F.embedding(ids, self.lm_head.weight))

    model = frozen(Functional())
    plan = fqcompile.explain(model, IDS, **OPTIONS)
    rows = [(s.name, s.status, s.bits) for s in plan.sites]
    assert rows == [("lm_head.weight", "quantized", 8), ("lm_head.weight", "kept", None)]
    actual = finequant(model, **OPTIONS)(IDS)
    assert [(s.name, s.status, s.bits) for s in report().sites] == rows
    before = model.lm_head.weight.clone()
    with pytest.raises(
        FineQuantError,
        match=r"lm_head\.weight is the weight of a linear and is read.*table.*own to fake",
    ):
        fqcompile.fake_quantize_(model, plan)
    assert torch.equal(model.lm_head.weight, before)
    apart = nn.ModuleDict({"lm_head": copy.deepcopy(model.lm_head)})
    alone = fqcompile.explain(apart["lm_head"], before[IDS], bits=8, **OPTIONS)
    fqcompile.fake_quantize_(apart, alone)
    assert_close(actual, apart["lm_head"](before[IDS]))


OTHER_READS: dict[str, tuple[Callable[[nn.Linear, Tensor, Tensor], Tensor], str]] = {
    "softmax": (lambda lin, w, x: lin(x) + F.linear(x, w.softmax(-1)), "softmax"),
    "norm": (lambda lin, w, x: lin(x) / w.norm(dim=1), "norm"),
    "column": (lambda lin, w, x: lin(x) + w[:, 0], "add"),
    "conv": (
        lambda lin, w, x: lin(x) + F.conv1d(x[..., None], w[..., None], padding=1)[..., 1],
        "conv1d",
    ),
    "vmap": (lambda lin, w, x: lin(x) + torch.vmap(lambda row: F.linear(row, w))(x), "vmap"),
    "grad": (lambda lin, w, x: lin(x) + torch.func.grad(lambda y: (y @ w.T).sum())(x)[:, :96], ""),
}


class ReadTwice(nn.Module):
    def __init__(self, read: Callable[[nn.Linear, Tensor, Tensor], Tensor], *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(128, 96)
        self.other = nn.ParameterList([self.lin.weight] if apart else [])
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lin, self.other[0] if len(self.other) else self.lin.weight, x)


@pytest.mark.parametrize("apart", [False, True], ids=["one", "apart"])
@pytest.mark.parametrize("read", OTHER_READS)
def test_any_second_reader_has_a_row_and_keeps_the_values(read: str, apart: bool) -> None:
    function, reader = OTHER_READS[read]
    model, x = frozen(ReadTwice(function, apart=apart)), torch.randn(4, 128)
    plan = fqcompile.explain(model, x, **OPTIONS)
    (quantized,), (kept,) = plan.quantized, plan.kept
    assert (quantized.name, kept.name) == ("lin.weight", "other.0" if apart else "lin.weight")
    assert reader in str(kept.reason)
    actual = finequant(model, **OPTIONS)(x)
    assert [(s.name, s.reason) for s in report().sites] == [(s.name, s.reason) for s in plan.sites]
    linear = copy.deepcopy(model.lin)
    fqcompile.fake_quantize_(linear, fqcompile.explain(linear, x, **OPTIONS))
    expected = function(linear, model.lin.weight, x)
    assert_close(actual, expected, depth=2)
    if apart:
        faked = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
        assert torch.equal(faked(x), expected)
        return
    with pytest.raises(FineQuantError, match=r"lin\.weight is the weight of a linear and is read"):
        fqcompile.fake_quantize_(model, plan)


def test_shape_and_type_of_a_weight_are_no_second_read() -> None:
    class Like(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(128, 96)

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros_like(self.lin.weight).sum() + x.new_zeros(self.lin.weight.shape[0])
            return self.lin(x.to(self.lin.weight)) + zeros.type_as(self.lin.weight)

    plan = fqcompile.explain(frozen(Like()), torch.randn(4, 128), **OPTIONS)
    assert [(s.name, s.status) for s in plan.sites] == [("lin.weight", "quantized")]


def test_a_second_read_behind_a_graph_break_is_seen_too() -> None:
    def read(lin: nn.Linear, w: Tensor, x: Tensor) -> Tensor:
        y = lin(x)
        torch._dynamo.graph_break()
        return y / w.norm(dim=1)

    model, x = frozen(ReadTwice(read, apart=False)), torch.randn(4, 128)
    plan = fqcompile.explain(model, x, **OPTIONS)
    assert [(s.name, s.status) for s in plan.sites] == [
        ("lin.weight", "quantized"),
        ("lin.weight", "kept"),
    ]
    with pytest.raises(FineQuantError, match="one parameter"):
        fqcompile.fake_quantize_(model, plan)


def test_ibert() -> None:
    """Its quantized embedding has a parameter of its own, which the decoder shares."""
    torch.manual_seed(0)
    config = hf.IBertConfig(**COMMON, tie_word_embeddings=True)
    model, ids = frozen(hf.IBertForMaskedLM(config)), torch.arange(14).view(2, 7)
    table = model.ibert.embeddings.word_embeddings.weight
    decoder = model.lm_head.decoder
    assert decoder.weight is table
    plan = fqcompile.explain(model, ids, **OPTIONS)
    assert plan.site("lm_head.decoder.weight").bits == 8
    kept = plan.site("ibert.embeddings.word_embeddings.weight")
    assert "embedding table" in str(kept.reason)
    with torch.no_grad():
        actual = finequant(model, fullgraph=False, **OPTIONS)(ids).logits
        faked = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
        assert torch.equal(faked.ibert.embeddings.word_embeddings.weight, table)
        assert_close(actual, faked(ids).logits, depth=40)
    compiled = {s.name: s.bits for r in fqcompile.reports() for s in r.plan.quantized}
    assert compiled["lm_head.decoder.weight"] == 8


def _opened(model: Any, plan: fqcompile.Plan, folder: Path) -> nn.Module:
    fqcompile.save(model, folder, plan=plan)
    return fqcompile.load(None, folder)


def _by_transformers(model: Any, plan: fqcompile.Plan, folder: Path) -> nn.Module:
    fqcompile.save(model, folder, plan=plan)
    opened: nn.Module = type(model).from_pretrained(folder)
    return opened


# What becomes of a packed model with its plan.
APART: dict[str, Callable[[Any, fqcompile.Plan, Path], nn.Module]] = {
    "packed": lambda model, plan, folder: model,
    "copied": lambda model, plan, folder: copy.deepcopy(model),
    "within": lambda model, plan, folder: nn.Sequential(model)[0],
    "loaded": _opened,
    "opened": _by_transformers,
    "restored": lambda model, plan, folder: fqcompile.restore(model),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("way", APART)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tied_head])
def test_tie_weights_leaves_a_head_that_has_its_own_values(
    name: str, way: str, tmp_path: Path
) -> None:
    model, inputs = build(name, torch.float32)
    plan = fqcompile.quantize_(model, calibration=None, **OPTIONS)
    apart: Any = APART[way](model, plan, tmp_path)
    expected = run(apart, inputs)
    kinds = [type(p.data) for p in apart.parameters()]
    tables = {name: p for name, p in apart.named_parameters() if p.shape[0] == 512}
    for again in range(2):  # both of what from_pretrained calls, and of what users do
        apart.tie_weights(recompute_mapping=bool(again))
        assert torch.equal(run(apart, inputs), expected)
    assert [type(p.data) for p in apart.parameters()] == kinds
    assert all(apart.get_parameter(name) is p for name, p in tables.items())


def test_tie_weights_after_fake_quantize_and_after_quantizing_while_loading(tmp_path: Path) -> None:
    model, inputs = build("gemma3", torch.float32)
    dense: Any = model
    dense.save_pretrained(tmp_path)
    config = FineQuantHfConfig(**OPTIONS)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    faked: Any = fqcompile.fake_quantize_(model, loaded.hf_quantizer.plan)
    for apart in (loaded, faked):
        expected = run(apart, inputs)
        apart.tie_weights()
        assert torch.equal(run(apart, inputs), expected)
    assert isinstance(loaded.lm_head.weight, PackedWeight)
    assert not loaded.all_tied_weights_keys and not faked.all_tied_weights_keys
    other, _ = build("gemma3", torch.float32)  # of the same class
    other.tie_weights()  # type: ignore[operator]
    assert other.lm_head.weight is other.model.embed_tokens.weight  # type: ignore[union-attr]


def test_what_is_tied_and_packed_as_one_stays_tied() -> None:
    """The table packed too, or neither: then `save_pretrained` has to know that they are one."""
    for options in ({"quantize_embeddings": 8}, {"exclude": ["lm_head"]}):
        model, _ = build("gemma3", torch.float32)
        ties = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
        fqcompile.quantize_(model, calibration=None, **OPTIONS, **options)
        assert (
            model.all_tied_weights_keys == ties == {"lm_head.weight": "model.embed_tokens.weight"}
        )
        model.tie_weights()  # type: ignore[operator]
        assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_resized_vocabulary_makes_a_packed_head_dense_with_its_values() -> None:
    model: Any = build("gemma3", torch.float32)[0]
    fqcompile.quantize_(model, calibration=None, **OPTIONS)
    values = model.lm_head.weight.dequantized()
    model.resize_token_embeddings(520)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (520, 128)
    assert torch.equal(model.lm_head.weight[:512], values)
    assert not torch.equal(model.model.embed_tokens.weight[:512], values)
