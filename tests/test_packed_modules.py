"""Packed weights under what others do to parameters: move, cast, offload, resize, tie."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.weights.parameter import PackedWeight
from tests.helpers import Mlp, assert_close, frozen

BACKENDS = ["none", "aot_eager", "finequant"]
# Every format holds it without an error, as its outermost value, with a scale that 16 bits hold.
EXACT = 127 / 16
FLAGS = ["", "swap_module_params", "overwrite_module_params"]


def _compiled(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    if backend == "none":
        return model
    options = {"options": {"inner_backend": "eager"}} if backend == "finequant" else {}
    return torch.compile(model, backend=backend, **options)  # type: ignore[no-any-return,call-overload]


def _dense(model: nn.Module) -> nn.Module:
    """The oracle: the same values in ordinary parameters, which PyTorch itself moves."""
    return fqcompile.restore(copy.deepcopy(model))


@pytest.fixture(params=FLAGS, ids=lambda flag: flag or "default")
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """PyTorch's ways to convert a module's parameters."""
    if not request.param:
        yield
        return
    setter = getattr(torch.__future__, f"set_{request.param}_on_conversion")
    setter(True)
    yield
    setter(False)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to where it is": lambda m: m.to("cpu"),
    "half": lambda m: m.half(),
    "bf16": lambda m: m.to(torch.bfloat16),
    "there and back": lambda m: m.half().float(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.few(6)
@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_was_called_is_moved_and_cast(backend: str, move: str) -> None:
    model = frozen(nn.Sequential(Mlp(), nn.LayerNorm(128), nn.Linear(128, 64)))
    fqcompile.quantize_(model, exclude=["^2"], min_elements=0)
    x, call = torch.randn(3, 128), _compiled(model, backend)
    call(x)
    oracle = _dense(model)
    MOVES[move](model)
    MOVES[move](oracle)
    assert isinstance(model[0].up.weight, PackedWeight)
    dtype = model[2].weight.dtype
    assert all(p.dtype == dtype for p in model.parameters())
    # The oracle's weights are rounded where the codes are not.
    coarsest = torch.float16 if move == "there and back" else dtype

    def check(what: str) -> None:
        results = (run(x.to(dtype)).to(coarsest) for run in (call, oracle))
        assert_close(*results, k=256, depth=4, what=what)

    check("after the move")
    model[0].up.weight.copy_(torch.zeros(model[0].up.weight.shape))
    oracle[0].up.weight.zero_()
    check("after a write")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(96, 128), nn.Linear(128, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))  # type: ignore[no-any-return]


@pytest.mark.few(6)
@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("make", [Mlp, _Tied])
def test_a_dense_model_that_was_compiled_is_moved_and_cast(
    make: Callable[[], nn.Module], move: str
) -> None:
    """What is remembered of a dense weight does not keep PyTorch from exchanging it."""
    model = frozen(make())
    x = torch.tensor([3, 5]) if make is _Tied else torch.randn(3, 128)
    options: Any = {"inner_backend": "eager", "min_elements": 0}
    call = torch.compile(model, backend="finequant", options=options)
    call(x)
    MOVES[move](model)
    if move == "there and back":  # writes through `.data`, and may find the same memory again
        fqcompile.refresh(model)
    dtype = next(model.parameters()).dtype
    x = x if make is _Tied else x.to(dtype)
    plan = fqcompile.explain(model, x, min_elements=0)
    oracle = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    assert_close(call(x), oracle(x), k=256, depth=4, what=move)


def test_a_compiled_models_parameters_are_pickled_as_others_are(tmp_path: Path) -> None:
    """By a process that has never seen fqcompile too, and as weights only."""
    model = frozen(Mlp())
    _compiled(model, "finequant")(torch.randn(3, 128))
    torch.save(list(model.parameters()), tmp_path / "parameters.pt")
    read = f"import sys, torch; ps = torch.load({str(tmp_path / 'parameters.pt')!r}); "
    check = "print(len(ps), 'fqcompile' in sys.modules, sum(p.double().sum().item() for p in ps))"
    done = subprocess.run([sys.executable, "-c", read + check], capture_output=True, text=True)
    total = sum(p.double().sum().item() for p in model.parameters())
    assert done.stdout.split() == [str(len(list(model.parameters()))), "False", str(total)], done


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_exchanged_reach_compiled_graphs(backend: str) -> None:
    """Both directions: a packed weight for another, and for a dense one."""
    model = frozen(Mlp())
    fqcompile.quantize_(model, min_elements=0)
    x, call = torch.randn(3, 128), _compiled(model, backend)
    call(x)
    other = frozen(Mlp(seed=1))
    fqcompile.quantize_(other, min_elements=0)
    torch.utils.swap_tensors(model.up.weight, other.up.weight)
    assert_close(call(x), _dense(model)(x), k=256, depth=3)
    torch.utils.swap_tensors(model.down.weight, nn.Parameter(torch.full((128, 256), EXACT), False))
    assert not isinstance(model.down.weight, PackedWeight)
    assert_close(call(x), _dense(model)(x), k=256, depth=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_another_type_give_the_weight_that_type(backend: str) -> None:
    """`p.data = p.data.float()`, as peft prepares a quantized model for training."""
    model = frozen(Mlp()).to(torch.bfloat16)
    fqcompile.quantize_(model, min_elements=0)
    call = _compiled(model, backend)
    call(torch.randn(3, 128, dtype=torch.bfloat16))
    codes = [p.qweight.clone() for p in model.parameters() if isinstance(p, PackedWeight)]
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    packed = [p for p in model.parameters() if isinstance(p, PackedWeight)]
    assert all(torch.equal(p.qweight, c) for p, c in zip(packed, codes, strict=True))
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in packed)
    x = torch.randn(3, 128)
    assert_close(call(x), _dense(model)(x), k=256, depth=3)
    model.up.weight.data = torch.zeros(model.up.weight.shape, dtype=torch.float16)
    assert model.up.weight.dtype == torch.float16 and not model.up.weight.dequantized().any()
    with pytest.raises(
        FineQuantError, match=r"\(256, 128\), up\.weight, got values of shape \(3, 3\)"
    ):
        model.up.weight.data = torch.zeros(3, 3)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (128,), (256, 1), (1, 256, 128), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_of_another_shape_are_no_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A dense weight would get that shape; what copy_ broadcasts fills no weight here."""
    model = frozen(Mlp())
    fqcompile.quantize_(model)
    before = model.up.weight.dequantized()
    with pytest.raises(
        FineQuantError, match=r"up\.weight, got values of shape .*fqcompile\.restore"
    ):
        model.up.weight.data = torch.ones(shape, dtype=dtype)
    assert model.up.weight.dtype == torch.float32
    assert torch.equal(model.up.weight.dequantized(), before)
    with torch.no_grad():
        model.up.weight.copy_(torch.full((1, 128), EXACT))
    assert_close(model.up.weight.dequantized(), torch.full((256, 128), EXACT), k=1)


def test_memory_is_counted_as_it_is_held() -> None:
    model = frozen(Mlp())
    fqcompile.quantize_(model, min_elements=0)
    held = sum(
        p.qweight.nbytes + p.scale.nbytes if isinstance(p, PackedWeight) else p.nbytes
        for p in model.parameters()
    )
    assert sum(p.nbytes for p in model.parameters()) == held
    # as transformers counts
    assert round(sum(p.nelement() * p.element_size() for p in model.parameters())) == held
    pointers = {p.data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters())), "which tell what is tied, as accelerate"


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_accelerate_keeps_elsewhere(tied: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the dev extra is not installed")
    model = _language_model(tied=tied)
    fqcompile.quantize_(model, min_elements=4096)
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(offloaded(ids).logits, expected)


def test_weights_that_are_elsewhere_are_neither_restored_nor_saved(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the dev extra is not installed")
    model = _language_model()
    fqcompile.quantize_(model, min_elements=4096)
    ids = torch.arange(7)[None]
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(FineQuantError, match=r"layers\.0.*restored.*meta.*remove_hook_from_module"):
        fqcompile.restore(model)
    with pytest.raises(FineQuantError, match=r"saved.*meta device.*remove_hook_from_module"):
        fqcompile.save(model, tmp_path)
    assert torch.equal(model(ids).logits, expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # as the message says
    assert not any(isinstance(p, PackedWeight) for p in fqcompile.restore(model).parameters())
    assert_close(model(ids).logits, expected)
    layer = nn.Sequential(nn.Linear(128, 128, bias=False))
    fqcompile.quantize_(layer, min_elements=4096)
    with pytest.raises(FineQuantError, match=r"^0\.weight cannot be saved: it is on the meta"):
        fqcompile.save(layer.to("meta"), tmp_path)


@pytest.mark.parametrize("given", ["x", None, nn.Linear])
def test_what_is_no_model_is_said_to_be_none(given: Any, tmp_path: Any) -> None:
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: fqcompile.save(given, tmp_path),
        "quantize_": lambda: fqcompile.quantize_(given),
        "restore": lambda: fqcompile.restore(given),
        "fake_quantize_": lambda: fqcompile.fake_quantize_(given, fqcompile.Plan((), {})),
        "refresh": lambda: fqcompile.refresh(given),
    }
    found = "the class Linear" if given is nn.Linear else repr(given)
    for function, call in calls.items():
        with pytest.raises(OptionError, match=f"^{function} got {found} in place of a model; give"):
            call()


def test_weights_in_files_of_dense_values_are_refused_by_name(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the dev extra is not installed")
    model = _language_model()
    fqcompile.quantize_(model, min_elements=4096)
    with pytest.raises(FineQuantError, match=r"model\.layers\.0\..*weight.*fqcompile\.save"):
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(FineQuantError, match=r"\(3, 4\).*packed weight.*fqcompile\.restore"):
        PackedWeight(torch.ones(3, 4), requires_grad=False)


def test_a_device_map_of_packed_sizes_is_followed() -> None:
    """Scales are not counted: at most 4 bytes for 32 codes of half a byte, or more of them."""
    accelerate = pytest.importorskip("accelerate", reason="the dev extra is not installed")
    model = _language_model()
    plan = fqcompile.quantize_(model, min_elements=4096)
    ids = torch.arange(7)[None]
    expected = model(ids).logits.detach()
    types = {4: accelerate.utils.CustomDtype.INT4, 8: torch.int8}
    packed = {site.name: types[site.bits] for site in plan.quantized}
    sizes = accelerate.utils.compute_module_sizes(model, special_dtypes=packed)
    held = sum(p.nbytes for p in model.parameters())
    assert held / 1.25 <= sizes[""] <= held
    parts = accelerate.infer_auto_device_map(
        model, {"cpu": held}, no_split_module_classes=["LlamaDecoderLayer"], special_dtypes=packed
    )
    assert set(parts.values()) == {"cpu"}
    dispatched = accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    assert torch.equal(dispatched(ids).logits, expected)


def test_dense_files_are_dispatched_before_packing_and_not_after(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the dev extra is not installed")
    dense = _language_model()
    dense.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = type(dense)(dense.config)
    filled = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    plans = [fqcompile.quantize_(model, min_elements=4096) for model in (dense, filled.eval())]
    ids = torch.arange(7)[None]
    assert plans[0].totals == plans[1].totals
    assert torch.equal(filled(ids).logits, dense(ids).logits)
    with pytest.raises(FineQuantError, match=r"cannot replace a packed weight.*fqcompile\.restore"):
        accelerate.load_checkpoint_and_dispatch(dense, tmp_path, device_map={"": "cpu"})


def _language_model(*, tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", ["resize_token_embeddings", "tie_weights"])
def test_embeddings_are_resized_and_tied_after_packing(change: str, tied: bool) -> None:
    model = _language_model(tied=tied)
    fqcompile.quantize_(model, min_elements=4096)
    oracle = _dense(model)
    for one in (model, oracle):
        if change == "tie_weights":
            one.tie_weights()
        else:
            one.resize_token_embeddings(300, mean_resizing=False)
    ids = torch.arange(7)[None]
    found, expected = model(ids).logits[..., :256], oracle(ids).logits[..., :256]
    assert_close(found, expected, k=128, depth=30)


def test_a_rescale_in_place_is_refused_with_the_layer_and_the_remedy() -> None:
    """As RWKV divides its output weights on the first call of inference."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.RwkvConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, rescale_every=1, context_length=16
    )
    model = transformers.RwkvForCausalLM(config).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    fqcompile.quantize_(model, min_elements=0)
    ids = torch.arange(7)[None]
    refused = r"blocks\.\d\.attention\.output\.weight.*fqcompile\.restore.*exclude=\['rwkv\.blocks"
    with pytest.raises(FineQuantError, match=refused):
        model(ids)
    plan = fqcompile.quantize_(plain, min_elements=0, exclude=[r"\.output\.weight", r"ffn|feed"])
    assert plan.quantized and plain(ids).logits.isfinite().all()


def test_a_lazy_linear_has_a_row_until_it_has_a_weight() -> None:
    model = nn.Sequential(nn.LazyLinear(128), nn.Linear(128, 128))
    plan = fqcompile.quantize_(model)
    assert "not initialized yet" in str(plan.site("0.weight").reason)
    assert plan.site("1.weight").status == "quantized"
    x = torch.randn(2, 256)
    model(x)
    assert fqcompile.quantize_(model).site("0.weight").status == "quantized"
    assert_close(model(x), _dense(model)(x), k=256, depth=2)


class _Table(nn.Module):
    """An embedding that is none of PyTorch's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


@pytest.mark.parametrize("table_first", [False, True])
def test_a_linear_that_a_table_shares_is_a_head(table_first: bool) -> None:
    head = nn.Linear(64, 512)
    table = _Table(head.weight)
    model = frozen(nn.Sequential(*((table, head) if table_first else (head, table))))
    original = head.weight
    plan = fqcompile.quantize_(model)
    names = ("0.weight", "1.weight")
    of_table, of_head = names if table_first else names[::-1]
    assert plan.site(of_head).bits == 8 and isinstance(head.weight, PackedWeight)
    assert table.weight is original
    assert plan.site(of_table).status == "kept"
    assert "table" in str(plan.site(of_table).reason) and of_head in str(plan.site(of_table).reason)


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda ids, w: F.embedding(ids, w),
    "index": lambda ids, w: w[ids],
    "index_select": lambda ids, w: w.index_select(0, ids.flatten()),
    "gather": lambda ids, w: w.gather(0, ids.flatten()[:, None].expand(-1, w.shape[1])),
    "take_along_dim": lambda ids, w: w.take_along_dim(ids.flatten()[:, None], 0),
    "slices": lambda ids, w: torch.stack([w[int(i)] for i in ids.flatten()]),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_packed_weight_are_read_as_of_a_table(backend: str, bits: int, read: str) -> None:
    layer = nn.Linear(64, 1001).requires_grad_(False)
    fqcompile.quantize_(layer, bits=bits)
    w = layer.weight
    expected = w.dequantized()
    call = _compiled(READS[read], backend) if read != "slices" else READS[read]  # type: ignore[arg-type]
    for ids in ([[3, 1000], [3, 0]], [[999]], [[i % 1001] for i in range(0, 5000, 7)]):
        index = torch.tensor(ids)
        assert torch.equal(call(index, w), READS[read](index, expected))


NO_ROWS = {
    "embedding": [1001, -1, -1001, -1002],
    "index_select": [1001, -1],
    "index": [1001, -1002],
}


@pytest.mark.parametrize("read", NO_ROWS)
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=pytest.mark.slow)])
def test_rows_that_are_not_there_are_named(backend: str, read: str) -> None:
    """Also those from the end, which only an index of a dense table has."""
    layer = nn.Linear(64, 1001).requires_grad_(False)
    fqcompile.quantize_(layer, bits=8)
    call = _compiled(READS[read], backend)  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.int32):
        for absent in NO_ROWS[read]:
            ids = torch.tensor([[5, absent]], dtype=dtype)
            with pytest.raises(IndexError):
                READS[read](ids, layer.weight.dequantized())
            with pytest.raises(IndexError, match=f"row {absent} is out of range: .* 1001 rows"):
                call(ids, layer.weight)


@pytest.mark.parametrize("ids", [[], [[]], [[[7, 0], [0, 1000]]], 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_have_any_rank(ids: Any, dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 1001).requires_grad_(False)
    fqcompile.quantize_(layer, bits=8)
    index, dense = torch.tensor(ids, dtype=dtype), layer.weight.dequantized()
    for read in (F.embedding, lambda ids, w: w[ids], lambda ids, w: w[-1 - ids]):
        assert torch.equal(read(index, layer.weight), read(index, dense))
    if index.dim() < 2:
        assert torch.equal(layer.weight.index_select(0, index), dense.index_select(0, index))
    else:
        with pytest.raises(IndexError, match="vector"):
            layer.weight.index_select(0, index)


def test_a_table_that_rescales_what_is_read_is_refused_once_it_is_packed() -> None:
    table = nn.Embedding(1001, 64).requires_grad_(False)
    fqcompile.quantize_(table, quantize_embeddings=8, calibration=None)
    ids, rows = torch.tensor([3, 5]), table.weight.dequantized()
    for options in ({"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert torch.equal(F.embedding(ids, table.weight, **options), rows[ids])
    table.max_norm = 1.0
    for call in (table, torch.compile(table, backend="aot_eager")):
        with pytest.raises(Exception, match=r"embedding_renorm_.*would write.*fqcompile\.restore"):
            call(ids)


MADE_ANEW: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "itself": lambda w: nn.Parameter(w, requires_grad=False),
    "clone": lambda w: nn.Parameter(w.clone(), requires_grad=False),
    "data": lambda w: nn.Parameter(w.data, requires_grad=False),
    "turned twice": lambda w: nn.Parameter(w.t().clone().t(), requires_grad=False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.few(6)
@pytest.mark.parametrize("make", MADE_ANEW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_parameter_is_made_within_a_compiled_call(hooked: bool, backend: str, make: str) -> None:
    """A graph break of Dynamo's, after which it must not compile what makes packed weights."""
    model, x = frozen(nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64))), torch.randn(4, 256)
    fqcompile.quantize_(model)
    expected = _dense(model)(x)
    first = model[0]

    def renew(module: nn.Linear, args: object) -> None:
        module.weight = MADE_ANEW[make](module.weight)

    class Renewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, MADE_ANEW[make](first.weight), first.bias)
            return model[1](y)  # type: ignore[no-any-return]

    if hooked:
        first.register_forward_pre_hook(renew)
    call = _compiled(model if hooked else Renewing(), backend)
    with torch.no_grad():
        for _ in range(3):
            assert_close(call(x), expected)
