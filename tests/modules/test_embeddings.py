"""quantize_embeddings: tables are packed, and the rows that are read are dequantized."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from fqcompile.errors import OptionError
from fqcompile.quant.choose import quantize_weight
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import assert_close, finequant, frozen

V, H = 100, 64  # no whole number of blocks of any layout
IDS = torch.tensor([[0, 99, 3], [3, 64, 63]])
OPTIONS: dict[str, Any] = {"min_elements": 1024, "quantize_embeddings": 8, "calibration": None}


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(V, H), nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        frozen(self).to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.body(self.embed(ids)))
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_dequantized_table(dtype: torch.dtype) -> None:
    model = Model(dtype=dtype)
    table = model.embed.weight.detach().clone()
    plan = fqcompile.quantize_(model, **OPTIONS)
    site = plan.site("embed.weight")
    assert (site.kind, site.status, site.bits, site.shape) == ("embedding", "quantized", 8, (V, H))
    assert site.bytes_after < site.bytes_before and isinstance(model.embed.weight, PackedWeight)
    assert isinstance(site.recipe.plan, object)
    rows = quantize_weight(table, site.recipe.plan).dequantize(dtype)
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0]):
        assert torch.equal(model.embed(ids), rows[ids])
    assert torch.equal(model.embed.weight[-IDS - 1], rows[-IDS - 1])


@pytest.mark.parametrize("index", [V, V + 20, -1, 10**6])
def test_an_id_that_names_no_row_is_an_error(index: int) -> None:
    """Also where it lies in what fills up the last block."""
    model = Model()
    fqcompile.quantize_(model, **OPTIONS)
    if index < 0:  # an index of a tensor may count from the end
        assert torch.equal(model.embed.weight[torch.tensor([index])], model.embed.weight[[V - 1]])
        index = -V - 1
    with pytest.raises(IndexError, match="out of range"):
        model.embed.weight[torch.tensor([index])]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "finequant"])
def test_model_equals_its_oracle(tied: bool, backend: str) -> None:
    torch._dynamo.reset()
    model = Model(tied=tied)
    oracle = copy.deepcopy(model)
    plan = fqcompile.quantize_(model, **OPTIONS)
    assert {site.name for site in plan.quantized} == {
        "body.weight", "lm_head.weight", *([] if tied else ["embed.weight"]),
    }  # fmt: skip
    assert (model.lm_head.weight is model.embed.weight) is tied
    fqcompile.fake_quantize_(oracle, plan)
    assert (oracle.lm_head.weight is oracle.embed.weight) is tied
    own = {"min_elements": 1024}
    compiled = (
        finequant(model, **own) if backend == "finequant" else torch.compile(model, backend=backend)
    )
    with torch.no_grad():
        assert_close(compiled(IDS), oracle(IDS), depth=3)
        assert_close(compiled(IDS[:1]), oracle(IDS[:1]), depth=3)
    if backend == "finequant" and not tied:
        (kept,) = fqcompile.reports()[-1].plan.kept
        assert kept.name == "embed.weight" and "packed already" in str(kept.reason)


def test_a_saved_table_is_loaded_packed_and_tied(tmp_path: Path) -> None:
    for tied in (False, True):
        model = Model(tied=tied)
        plan = fqcompile.quantize_(model, **OPTIONS)
        fqcompile.save(model, tmp_path / str(tied), plan=plan)
        loaded = fqcompile.load(lambda tied=tied: Model(tied=tied), tmp_path / str(tied))
        assert isinstance(loaded.embed.weight, PackedWeight)
        assert (loaded.lm_head.weight is loaded.embed.weight) is tied
        with torch.no_grad():
            assert torch.equal(loaded(IDS), model(IDS))


def test_restored_tables_are_dense_and_stay_tied() -> None:
    model = Model(tied=True)
    fqcompile.quantize_(model, **OPTIONS)
    want = model.embed(IDS)
    fqcompile.restore(model)
    assert model.embed.weight is model.lm_head.weight and type(model.embed.weight) is nn.Parameter
    assert torch.equal(model.embed(IDS), want)


def test_tables_stay_where_they_are_not_asked_for() -> None:
    def kept(model: nn.Module, **options: Any) -> bool:
        fqcompile.quantize_(model, **{**OPTIONS, **options})
        return not isinstance(model.embed.weight, PackedWeight)

    assert kept(Model(), quantize_embeddings=None)
    assert kept(Model(), exclude=["embed"])
    assert kept(Model(), include=["body"])
    assert kept(Model(), min_elements=V * H + 1)
    scaled = Model()
    scaled.embed.max_norm = 1.0  # reading writes to it
    assert kept(scaled)
    tied = Model(tied=True)
    assert kept(tied, exclude=["embed"]) and isinstance(tied.lm_head.weight, PackedWeight)


def test_bags_of_rows_stay() -> None:
    model = frozen(nn.Sequential(nn.EmbeddingBag(V, H), nn.Linear(H, H)))
    plan = fqcompile.quantize_(model, **OPTIONS)
    assert [site.name for site in plan.quantized] == ["1.weight"]


def test_tables_that_stay_where_they_are_asked_for_say_why() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.scaled = nn.EmbeddingBag(V, H), nn.Embedding(V, H, max_norm=1.0)
            self.out, self.linear = nn.Embedding(V, H), nn.Linear(H, H)

    def kept(**options: Any) -> dict[str, str]:
        plan = fqcompile.quantize_(frozen(Tables()), **{**OPTIONS, "exclude": ["out"], **options})
        assert [site.name for site in plan.quantized] == ["linear.weight"]
        return {site.name: str(site.reason) for site in plan.kept}

    assert not kept(quantize_embeddings=None)
    for reasons in (kept(), kept(on_unsupported="error")):
        assert "and this is of EmbeddingBag" in reasons["bag.weight"]
        assert "max_norm=1.0 rescales its rows" in reasons["scaled.weight"]
        assert "exclude pattern" in reasons["out.weight"] and len(reasons) == 3


def test_a_compiled_dense_model_keeps_its_table_and_says_what_packs_it() -> None:
    plan = fqcompile.explain(Model(), IDS, min_elements=1024, quantize_embeddings=8)
    reason = str(plan.site("embed.weight").reason)
    assert plan.site("embed.weight").status == "kept" and "fqcompile.quantize_" in reason
    with pytest.raises(OptionError, match=r"quantize_embeddings is 4.*allowed: None, 8"):
        fqcompile.quantize_(Model(), quantize_embeddings=4)


def test_weights_of_no_embedding_are_read_by_rows_too() -> None:
    """A table in a subclass, which scales its rows as Gemma's does."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 8

    table = frozen(Scaled(V, H))
    fqcompile.quantize_(table, **OPTIONS)
    want = 8 * F.embedding(IDS, table.weight.dequantize())
    assert torch.equal(table(IDS), want)
