"""`bench accuracy`: true bits, equal matrices, outliers that change nothing, gates, verdicts."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the bench extra is not installed")

from bench.accuracy import rows as accuracy_rows
from bench.accuracy import run as accuracy
from bench.accuracy import train_lm
from bench.accuracy.corpus import Corpus, Document
from bench.accuracy.language_model import windows_of
from bench.accuracy.others import BASELINES
from bench.accuracy.outliers import with_outliers
from bench.accuracy.plots import draw
from bench.accuracy.quantized import QuantizedWeight, layer_type, ours, theirs
from bench.accuracy.rows import WAYS, Exact, our_row
from bench.accuracy.targets import ADAPTIVE, pareto_front, verdicts
from bench.accuracy.train_lm import FAMILIES, SIZES, build, train_tokenizer
from bench.core.results import Row, missing

TEXT = "def value(self, name):\n    return self.table[name]\n" * 60
DOCUMENTS = tuple(Document(f"{n}.py", TEXT[n * 7 :]) for n in range(4))
TINY = SIZES["tiny"]


def model_of(family: str) -> nn.Module:
    """Untrained; its norms' gains and biases made such that all of them matter."""
    model = build(family, TINY).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def exact() -> Exact:
    tokenizer = train_tokenizer(DOCUMENTS, TINY.vocabulary)
    return Exact.of(model_of("llama"), windows_of(DOCUMENTS, tokenizer, TINY.context, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_the_bytes_of_codes_and_scales(family: str) -> None:
    model = model_of(family)
    quantized = ours(model, {"granularity": 32})
    weights = dict(model.named_parameters())
    bits = elements = 0
    for one in quantized.weights:
        weight = weights[one.name]
        rows = weight.numel() // weight.shape[-1]
        bits += 8 * (weight.numel() // 2) + 16 * rows * (weight.shape[-1] // 32)
        elements += weight.numel()
    assert quantized.bits_per_weight == pytest.approx(bits / elements) == 4.5


@pytest.mark.parametrize("family", FAMILIES)
def test_everyone_quantizes_the_same_matrices_and_nothing_else(family: str) -> None:
    model = model_of(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    mine = ours(model, WAYS["int4 g64 mse"])
    other = theirs(model, lambda w: (w.sign(), 1.0))
    assert {w.name for w in mine.weights} == {w.name for w in other.weights}
    changed = {w.name for w in mine.weights}
    assert not any("embed" in name or "head" in name or ".gate." in name for name in changed)
    for quantized in (mine, other):
        for name, parameter in quantized.model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in changed), name
    for name, parameter in other.model.named_parameters():
        if name in changed:
            assert torch.equal(parameter, before[name].sign())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert other.bits_per_weight == 1


def test_names_of_layer_types() -> None:
    assert layer_type("model.decoder.layers.3.fc1.weight") == "fc1"
    assert layer_type("model.layers.0.mlp.experts.down_proj") == "experts.down_proj"


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_change_the_weights_and_not_the_function(family: str) -> None:
    model = model_of(family)
    tokens = torch.arange(40)[None] % TINY.vocabulary
    # A power of two moves exactly; 0.03 shows that it is no matter of exponents.
    for shrink, tolerance in ((1 / 32, 0.0), (0.03, 1e-5)):
        changed = with_outliers(model, shrink)
        difference = (changed(tokens).logits - model(tokens).logits).abs().max()
        assert difference <= tolerance * model(tokens).logits.abs().max()
        for weight in ours(model, {"min_elements": 1}).weights:
            before = dict(model.named_parameters())[weight.name].abs().amax()
            after = dict(changed.named_parameters())[weight.name].abs().amax()
            assert after > 5 * before, weight.name


def test_an_outlier_moved_on_one_side_alone_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")
    tokens = torch.arange(40)[None]

    def one_sided(written: Any, read: Any, channels: Tensor, shrink: float) -> None:
        for tensor in (t for t in written if t is not None):
            tensor[channels] *= shrink

    monkeypatch.setattr("bench.accuracy.outliers._move", one_sided)
    difference = with_outliers(model)(tokens).logits - model(tokens).logits
    assert difference.abs().max() > 1e-3


def test_outliers_refuse_a_factor_that_relu_would_notice() -> None:
    with pytest.raises(ValueError, match="shrink -1"):
        with_outliers(nn.Linear(2, 2), -1.0)
    with pytest.raises(ValueError, match="Linear has no decoder layers"):
        with_outliers(nn.Linear(2, 2))


def test_a_row_of_ours_has_passed_its_gate(exact: Exact) -> None:
    row = our_row(exact, ADAPTIVE).row
    assert row["compiled_difference"] <= row["allowed_difference"]
    assert {"loss", "loss_low", "loss_high", "agreement", "bits_per_weight"} <= set(row)
    assert 0 < row["divergence_low"] <= row["divergence"] <= row["divergence_high"]


@pytest.mark.parametrize("way", ["int8 column mse", ADAPTIVE])
def test_no_row_where_the_backend_computes_something_else(
    exact: Exact, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def slightly_off(model: nn.Module, options: Any) -> Any:
        quantized = ours(model, options)
        next(p for n, p in quantized.model.named_parameters() if "up_proj" in n)[0] = 0
        return quantized

    monkeypatch.setattr(accuracy_rows, "ours", slightly_off)
    row = our_row(exact, way)
    assert row.evaluation is None and "loss" not in row.row
    assert row.row["failure"].startswith("compiled differs from dequantized by")


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_other_libraries_keep_the_matrix_at_their_bits(baseline: Any) -> None:
    if why := missing(baseline.package):
        pytest.skip(why)
    w = 0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    w_hat, bits = baseline.quantizer(w)
    group = int(baseline.name.rpartition("g")[2])
    assert bits == 4 + 32 / group
    assert w_hat.shape == w.shape and w_hat.dtype == torch.float32
    assert 0.03 < (w - w_hat).norm() / w.norm() < 0.13
    assert len(w_hat[0, :group].unique()) <= 16


def rows_of(losses: dict[str, tuple[float, float]], part: str = "quality") -> list[Row]:
    return [
        {"part": part, "model": "m", "way": way, "bits_per_weight": bits, "loss": loss}
        | {"bits_per_byte": 2 + loss, "divergence": 3 * loss}
        for way, (bits, loss) in losses.items()
    ]


def verdict(found: list[Any], target: str) -> bool | None:
    return next(v.met for v in found if target in v.target)


def test_targets_compare_at_equal_or_fewer_bits_only() -> None:
    quality = {
        ADAPTIVE: (4.25, 0.010),
        "hqq g64": (4.5, 0.011),
        "hqq g128": (4.25, 0.009),
        "int4 g128 mse": (4.125, 0.020),
        "nf4 g64": (4.5, 0.0096),
        "int8 adaptive mse": (8.0625, 0.0021),
    }
    found = verdicts(rows_of(quality))
    for measure in ("loss", "divergence"):
        assert verdict(found, f"{measure} below hqq g64") is True
        assert verdict(found, f"{measure} below hqq g128") is False
        assert verdict(found, f"{measure} below int4 g128 mse") is None
        assert verdict(found, f"{measure} below nf4") is True  # 0.0096 * 1.05 = 0.01008
    assert verdict(found, "int8 within") is False  # 0.1 % of 2 is 0.0020


def test_a_rival_of_more_bits_also_meets_our_way_of_nearly_as_many() -> None:
    ways = {ADAPTIVE: (4.13, 0.010), "int4 g64 mse": (4.25, 0.008), "int4 g32 mse": (4.5, 0.006)}
    found = verdicts(rows_of({**ways, "hqq g64": (4.5, 0.009), "hqq g128": (4.26, 0.009)}))
    assert verdict(found, "adaptive's loss below hqq g64") is False
    assert verdict(found, "g32's loss below hqq g64") is True
    assert verdict(found, "g64's divergence below hqq g128") is True
    assert not any("g32's loss below hqq g128" in v.target for v in found)


def test_fixed_groups_are_mixed_to_the_adaptive_bits() -> None:
    fixed = {"int4 g128 mse": (4.125, 0.02), "int4 g64 mse": (4.25, 0.01)}
    for value, met in ((0.0149, True), (0.0151, False)):
        found = verdicts(rows_of({ADAPTIVE: (4.1875, value), **fixed}))
        one = next(v for v in found if "mixed" in v.target)
        assert one.limit == pytest.approx(0.015) and one.met is met
    assert not any("mixed" in v.target for v in verdicts(rows_of({ADAPTIVE: (4.0, 0.1), **fixed})))


def test_a_difference_within_the_noise_is_said_to_be() -> None:
    rows = rows_of({ADAPTIVE: (4.25, 0.010), "hqq g64": (4.5, 0.011), "nf4 g64": (4.5, 0.02)})
    for row, ends in zip(rows[1:], ((-0.001, 0.003), (0.001, 0.003)), strict=True):
        row["loss_beyond_low"], row["loss_beyond_high"] = ends
    notes = {v.target: v.note for v in verdicts(rows) if "loss" in v.target}
    assert "noise" in notes["adaptive's loss below hqq g64's"]
    assert "noise" not in notes["adaptive's loss below nf4 g64's x 1.05"]


def test_targets_with_outliers() -> None:
    plain = {ADAPTIVE: (4.25, 0.01), "int4 column mse": (4.06, 0.02)}
    outliers = {
        ADAPTIVE: (4.5, 0.05),
        "int4 range mse": (4.5, 0.09),
        "int4 column mse": (4.06, 0.4),
    }
    found = verdicts(rows_of(plain) + rows_of(outliers, "outliers"))
    assert verdict(found, "multiply int4 column mse's loss") is True
    assert verdict(found, "with outliers int4 adaptive mse's loss") is True
    assert verdict(found, "with outliers int4 range mse's loss") is False


def weight(name: str, bits: float, error: float, elements: int = 100) -> QuantizedWeight:
    return QuantizedWeight(name, elements, bits, error)


def test_the_pareto_front_against_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [tuple(p) for p in torch.randint(0, 12, (40, 2), generator=generator).tolist()]
    beaten = {
        i for i, a in enumerate(points) for b in points if b != a and b[0] <= a[0] and b[1] <= a[1]
    }
    expected = sorted({p for i, p in enumerate(points) if i not in beaten})
    assert [points[i] for i in pareto_front(points)] == expected


@pytest.mark.slow
def test_the_command_from_training_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    corpus: Callable[[], Corpus] = lambda: Corpus(DOCUMENTS[:2], DOCUMENTS[2:])  # noqa: E731
    for module in (train_lm, accuracy):
        monkeypatch.setattr(module, "stdlib_corpus", corpus)
    monkeypatch.setattr(accuracy, "BASELINES", [])
    arguments = ["--family", "opt", "--size", "tiny", "--folder", str(tmp_path), "--windows", "1"]
    parsed = accuracy.parse(arguments)
    monkeypatch.setattr(accuracy, "parse", lambda argv: parsed)
    monkeypatch.setattr(accuracy, "embedding_rows", lambda *given: [])
    monkeypatch.setattr(accuracy, "load_embedder", lambda: ())
    monkeypatch.setattr(accuracy, "WAYS", {w: WAYS[w] for w in (ADAPTIVE, "int4 column absmax")})
    accuracy.main(arguments)
    shown = capsys.readouterr().out
    assert "adaptive's loss below hqq" not in shown and "Not reported" not in shown
    assert [line.split()[:2] for line in shown.splitlines()].count(["opt", "int4"]) >= 4
    assert (tmp_path / "accuracy.json").is_file()
    if importlib.util.find_spec("matplotlib"):
        assert len(list(tmp_path.glob("*.svg"))) == 2
    else:
        assert draw([], tmp_path) == []
