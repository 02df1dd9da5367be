"""Architectures that nobody made for us: compiled, packed and explained alike, and right."""

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo extra is not installed")
import fqcompile
from fqcompile.errors import FineQuantError
from fqcompile.report import Site
from tests.helpers import assert_close
from tests.zoo.architecture import ARCHITECTURES
from tests.zoo.conftest import ROWS
from tests.zoo.trial import OPTIONS, UNREAD, UNTOLD, Trial

pytestmark = pytest.mark.zoo
BFLOAT16 = "bamba starcoder2 mt5 jetmoe swin".split()  # no near ties of router scores
INDUCTOR = "granite olmo2 electra bart hubert dinov2 phimoe".split()
TRIALS = [
    *((name, torch.float32, "eager") for name in ARCHITECTURES),
    *((name, torch.bfloat16, "eager") for name in BFLOAT16),
    *((name, torch.float32, "inductor") for name in INDUCTOR),
]
CHAIN = 15  # rounded results in a layer, see `tests.test_moe_models`


def _id(case: tuple[str, torch.dtype, str]) -> str:
    name, dtype, inner = case
    suffix = "-bf16" if dtype is torch.bfloat16 else ""
    return name + suffix + (f"-{inner}" if inner != "eager" else "")


@pytest.fixture(scope="module", params=TRIALS, ids=_id)
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    name, dtype, inner = request.param
    architecture = ARCHITECTURES[name]
    library = architecture.package.split(".")[0]
    pytest.importorskip(library, reason=f"{library} is not installed")
    made = Trial(_id(request.param), architecture, dtype, inner)
    yield made
    if "plan" in vars(made):
        ROWS.append((*made.row(), "; ".join(made.plan.kept_lines())))


def _assert_all_close(trial: Trial, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, depth=CHAIN * trial.architecture.depth, what=f"output {place}")


def test_compiled_is_the_fake_quantized_model(trial: Trial) -> None:
    _assert_all_close(trial, trial.compiled[0], trial.outputs(trial.oracle))


def test_another_batch_is_right(trial: Trial) -> None:
    _assert_all_close(trial, trial.compiled[1], trial.outputs(trial.other_oracle, 3))


def test_result_is_near_the_dense_one(trial: Trial) -> None:
    """Not the dense one where anything was quantized, and no further than int4 may bring it."""
    actual, expected = (
        torch.cat([t.float().flatten() for t in ts]) for ts in (trial.compiled[0], trial.dense)
    )
    apart = float((actual - expected).norm() / expected.norm())
    assert apart < 0.7, f"{apart:.2g} of the dense result's norm"
    if trial.plan.quantized:
        assert apart > 1e-4, f"the result is the dense model's ({apart:.2g} apart)"


def test_reports_say_what_explain_said(trial: Trial) -> None:
    def facts(sites: list[Site]) -> set[tuple[object, ...]]:
        return {(s.name, s.kind, s.shape, s.status, s.bits, s.group_size, s.reason) for s in sites}

    met = facts([s for s in trial.plan.sites if not (s.reason or "").startswith(UNREAD[0])])
    told = facts(trial.compiled[2])
    assert told <= met
    # A graph with nothing to quantize runs for equal layers without a word of theirs, and one of
    # open sizes for convolutions that are larger than its first, which was too small for a row.
    by_first = {row[1:] for row in told if row[3] == "kept"}
    missing = {row for row in met - told if row[1:] not in by_first}
    assert {row for row in missing if (row[1], row[3]) != ("other", "kept")} == set()


def test_what_is_table_and_matrix_at_once_is_refused_by_name(trial: Trial) -> None:
    if not trial.architecture.tables:
        pytest.skip("none is both through one parameter")
    plan = trial.explained(2, OPTIONS)
    for name in trial.architecture.tables:
        assert name in [site.name for site in plan.quantized]
        with pytest.raises(FineQuantError, match=f"^{re.escape(name)} is the weight of a linear"):
            fqcompile.fake_quantize_(copy.deepcopy(trial.model), plan)


def test_names_are_those_of_parameters(trial: Trial) -> None:
    """Or of buffers, or the path of a plain attribute, as of a codebook that is computed once."""
    rows = [*trial.plan.sites, *trial.compiled[2], *trial.packed[1].sites]
    unknown = {site.name for site in rows if not set(trial.sources(site)) <= set(trial.named)}
    assert not unknown


def test_only_stacks_of_experts_are_called_experts(trial: Trial) -> None:
    """Not tables of positions [1, tokens, width] or of relative ones, which nothing multiplies."""
    kept = [site for site in (*trial.plan.kept, *trial.packed[1].kept) if site.kind == "experts"]
    assert not {site.name for site in kept if not re.search("expert|_linear", site.name)}


def test_every_linear_is_quantized_or_has_a_true_reason(trial: Trial) -> None:
    untrue = {name: reason for name, reason in _reasons(trial) if not _is_true(trial, name, reason)}
    assert not untrue


def _reasons(trial: Trial) -> Iterator[tuple[str, str]]:
    """Why each linear that was not quantized stays; nothing said is a reason that is not true."""
    for name, weight in trial.linears.items():
        rows = trial.by_weight.get(id(weight), [])
        if not any(site.status == "quantized" for site in rows):
            yield name, "; ".join(str(site.reason) for site in rows)


def _is_true(trial: Trial, name: str, reason: str) -> bool:
    if any(part in name and known in reason for part, known in trial.architecture.kept.items()):
        return True
    return reason.startswith(UNREAD) and name not in trial.read


def test_something_is_quantized(trial: Trial) -> None:
    if not trial.linears:
        pytest.skip("no linear layer that is large enough")
    names = [site.name for site in trial.plan.quantized]
    assert names, trial.plan.kept_lines()


def test_packed_model_is_its_restored_self(trial: Trial) -> None:
    packed, plan = trial.packed
    assert plan.quantized or not trial.linears
    dense = fqcompile.restore(copy.deepcopy(packed))
    _assert_all_close(trial, trial.outputs(packed), trial.outputs(dense))


def test_packing_does_what_the_plan_says(trial: Trial) -> None:
    """Kinds, bits, and what stays on purpose are one; each way may know forms of its own."""
    unlike = {}
    for site in trial.packed[1].sites:
        rows = trial.by_weight.get(id(trial.parameters[site.name]), [])
        rows = [row for row in rows if not (row.reason or "").startswith((*UNREAD, "read by"))]
        alike = not rows or any(_is_alike(site, row) for row in rows)
        linear = trial.linears.get(site.name)
        untold = str(site.reason).endswith(UNTOLD) and (linear is None or linear.dim() == 3)
        other_form = untold or (linear is None and {row.kind for row in rows} == {site.kind})
        if not alike and not (site.status == "kept" and other_form):
            unlike[site.name] = site, rows
    assert not unlike


def _is_alike(site: Site, row: Site) -> bool:
    """Of a matrix that is joined from several the bits are those of the whole."""
    joined = "+" in row.name
    return (site.kind, site.status) == (row.kind, row.status) and (joined or site.bits == row.bits)
