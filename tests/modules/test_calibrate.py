"""quantize_(calibration=...): what it runs, what each kind of data gives, and what it refuses."""

import copy
import hashlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
import transformers

import fqcompile
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.modules.calibrate import random_batch
from fqcompile.tensor.codes import _levels_of_bytes
from fqcompile.weights.store import STORE
from tests import dense_models, moe_models
from tests.children import in_child
from tests.helpers import Mlp, finequant, frozen

OPTIONS: dict[str, Any] = {"min_elements": 4096, "granularity": 64}


def _h(plan: Any) -> dict[str, Tensor]:
    plans = {site.name: site.recipe.plan for site in plan.sites if site.status == "quantized"}
    return {
        n: p.calibration.h
        for n, p in plans.items()
        if p.calibration and p.calibration.h is not None
    }


BEGINS = {"llama": 1, "opt": 2, "mixtral": 1}  # the bos_token_id of their configs


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "mixtral"])
def test_random_ids_give_what_a_compiled_graph_of_symbolic_sizes_gets(name: str) -> None:
    if name in moe_models.MODELS:
        model, inputs = moe_models.build(name, torch.float32, "grouped_mm"), None
        inputs = {"input_ids": torch.arange(1, 11).view(2, 5), "use_cache": False}
    else:
        model, inputs = dense_models.build(name, torch.float32)
    begins = random_batch(model)["input_ids"][:, 0].unique().tolist()
    assert begins == [BEGINS[name]] if name in BEGINS else len(begins) > 16
    packed = _h(fqcompile.quantize_(copy.deepcopy(model), **OPTIONS))
    with torch.no_grad():
        torch._dynamo.reset()
        finequant(model, dynamic=True, fullgraph=False, **OPTIONS)(**inputs)
    compiled = _h(fqcompile.reports()[-1])
    assert packed.keys() == compiled.keys() and len(packed) >= 8
    for weight, h in packed.items():
        torch.testing.assert_close(h, compiled[weight], rtol=2.0**-7, atol=0, msg=weight)


@pytest.mark.parametrize("vocabularies", [(200, 50), (50, 200)])
def test_ids_of_a_decoder_are_of_its_own_vocabulary(vocabularies: tuple[int, int]) -> None:
    source, target = vocabularies
    model: Any = transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(
            langs=["en", "de"], src_vocab_size=source, tgt_vocab_size=target, d_model=32,
            encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=20,
        )
    )  # fmt: skip
    ids = random_batch(model)
    assert 0.9 * source < ids["input_ids"].max() < source
    assert 0.9 * target < ids["decoder_input_ids"].max() < target
    plan = fqcompile.quantize_(model, min_elements=1000)
    assert {site.calibration for site in plan.quantized} == {"synthetic"}


X = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "data",
    [X, {"x": X}, [X[:2], X[2:]], [(X,)], ({"x": part} for part in X.split(2))],
    ids=["tensor", "dict", "list", "arguments", "generator"],
)
def test_given_inputs_are_counted_row_by_row(data: Any) -> None:
    model = frozen(Mlp())
    hidden = nn.functional.gelu(model.up(X)).double()
    plan = fqcompile.quantize_(model, calibration=data)
    assert plan.options["calibration"] == "batches"
    assert {(s.calibration, s.calibration_rows) for s in plan.sites} == {("batches", 6)}
    for weight, x in (("up.weight", X.double()), ("down.weight", hidden)):
        mean = x.square().mean(0)
        expected = mean / mean.mean() / 2 + 0.5
        torch.testing.assert_close(_h(plan)[weight].double(), expected, rtol=2.0**-8, atol=0)


def test_what_makes_batches_runs_as_anywhere_else() -> None:
    model, drawn = frozen(Mlp()), []

    def batches() -> Iterator[Tensor]:
        for _ in range(2):
            drawn.append(torch.randn(3, 128))
            model(drawn[-1])  # as to skip what it does well
            yield drawn[-1]

    torch.manual_seed(7)
    plan = fqcompile.quantize_(model, calibration=batches())
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert all(torch.equal(torch.randn(3, 128), x) for x in drawn)
    assert torch.equal(torch.get_rng_state(), after)
    assert {s.calibration_rows for s in plan.sites} == {6}


@pytest.fixture
def other_defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    _levels_of_bytes.cache_clear()
    dtype, device = request.param
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize(
    "other_defaults", [(torch.float64, "cpu"), (torch.bfloat16, "meta")], indirect=True
)
@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_default_types_and_devices_change_nothing(method: str, other_defaults: None) -> None:
    def packed() -> tuple[list[Any], list[Tensor]]:
        model = copy.deepcopy(original)
        plan = fqcompile.quantize_(model, calibration=inputs, method=method)
        dense = fqcompile.restore(model).parameters()
        return [site.calibration for site in plan.sites], [p.detach() for p in dense]

    with torch.device("cpu"):
        original, inputs = frozen(Mlp()).to(torch.float32), torch.randn(600, 128).float()
    sources, found = packed()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    expected, weights = packed()
    assert sources == expected and all(source.startswith("batches") for source in sources)
    assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_a_model_that_keeps_results_with_gradients_is_copied(method: str) -> None:
    model, inputs = frozen(Mlp()), torch.randn(600, 128)
    plain = copy.deepcopy(model)
    model.kept = [model.up(X.clone().requires_grad_())]
    before = model.kept[0].detach().clone()
    plan = fqcompile.quantize_(model, calibration=inputs, method=method)
    assert not model.kept[0].is_leaf and torch.equal(model.kept[0], before)
    expected = fqcompile.quantize_(plain, calibration=inputs, method=method)
    assert [site.calibration for site in plan.sites] == [s.calibration for s in expected.sites]
    pairs = (fqcompile.restore(one).parameters() for one in (model, plain))
    dense = zip(*pairs, strict=True)
    assert all(torch.equal(one, other) for one, other in dense)


@pytest.mark.parametrize("method", ["scale", "gptq"])
def test_a_model_that_cannot_be_copied_says_what_helps(method: str) -> None:
    model = frozen(Mlp())
    model.guard = threading.Lock()
    with pytest.raises(FineQuantError, match=r"Mlp cannot be copied: .*lock.* calibration=None"):
        fqcompile.quantize_(model, calibration=torch.randn(600, 128), method=method)
    assert type(model.up.weight) is nn.Parameter
    plan = fqcompile.quantize_(model, calibration=None)
    assert all(site.status == "quantized" for site in plan.sites)


def test_a_model_without_input_ids_says_how_to_pass_inputs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "fqcompile")
    plan = fqcompile.quantize_(frozen(Mlp()))
    assert "takes no input_ids" in caplog.text and "calibration=inputs" in caplog.text
    assert all("takes no input_ids" in str(site.calibration) for site in plan.sites)
    alone = fqcompile.quantize_(frozen(Mlp()), calibration=None)
    for one, other in zip(plan.sites, alone.sites, strict=True):
        assert one.relative_error == other.relative_error and other.calibration is None


class Silent(nn.Module):
    """Does not say which of its embeddings is that of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.types, self.tokens = nn.Embedding(2, 128), nn.Embedding(50, 128)
        self.up = nn.Linear(128, 128)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.up(self.tokens(input_ids) + self.types(input_ids % 2))


def test_of_a_model_that_does_not_say_its_table_it_is_the_largest() -> None:
    model = frozen(Silent())
    ids = torch.randint(0, 50, (32, 16), generator=torch.Generator().manual_seed(0))
    x = (model.tokens(ids) + model.types(ids % 2)).flatten(0, 1).double().square().mean(0)
    h = _h(fqcompile.quantize_(model))["up.weight"].double()
    torch.testing.assert_close(h, x / x.mean() / 2 + 0.5, rtol=2.0**-8, atol=0)


class Passing(nn.Module):
    """Hands on what it is called with, as an adapter's wrapper does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_wrapper_that_hands_keywords_on_is_looked_through() -> None:
    model, _ = dense_models.build("llama", torch.float32)
    own = _h(fqcompile.quantize_(copy.deepcopy(model), **OPTIONS))
    wrapped = _h(fqcompile.quantize_(Passing(Passing(model)), **OPTIONS))
    assert len(own) >= 8 and len(wrapped) == len(own)
    assert all(torch.equal(wrapped[f"model.model.{name}"], h) for name, h in own.items())


@pytest.mark.parametrize("method", ["scale", "gptq"])
@pytest.mark.parametrize("empty", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_no_batches_are_refused(method: str, empty: Any) -> None:
    model = frozen(Mlp())
    with pytest.raises(OptionError, match="holds no batch"):
        fqcompile.quantize_(model, calibration=empty, method=method)
    assert type(model.up.weight) is nn.Parameter


def test_other_words_are_refused() -> None:
    for word, text in (("first_call", "=inputs"), ("sythetic", "synthetic"), (5, "=inputs")):
        with pytest.raises(OptionError, match=text):
            fqcompile.quantize_(frozen(Mlp()), calibration=word)


def test_what_the_user_s_own_batches_raise_is_raised() -> None:
    model = frozen(Mlp())
    with pytest.raises(RuntimeError):
        fqcompile.quantize_(model, calibration=torch.randn(3, 7))
    assert type(model.up.weight) is nn.Parameter


def _digest(compiles: bool) -> str:
    STORE.clear()
    model, inputs = dense_models.build("llama", torch.float32)
    if compiles:
        torch._dynamo.reset()
        with torch.no_grad():
            finequant(model, **OPTIONS)(**inputs)
        found = [t for w in model.parameters() for t in STORE.tensors_of((w,))]
    else:
        fqcompile.quantize_(model, **OPTIONS)
        found = [t for w in model.parameters() if hasattr(w, "packed") for t in w.packed.tensors]
    assert found
    digests = sorted(
        hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).digest() for t in found
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("compiles", [False, True], ids=["quantize_", "compile"])
def test_processes_make_the_same_codes(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "0")
    torch.manual_seed(0)
    first = _digest(compiles)
    torch.rand(7)  # the state of random numbers is another one
    assert in_child(lambda: _digest(compiles)) == first
