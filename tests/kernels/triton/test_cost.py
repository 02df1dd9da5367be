"""The cost model's registers, shared memory and instructions, against the machine code."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.static.launches import GPUS, Case, chosen, gemm, selection, spec
from bench.static.machine_code import read, toolchain_missing
from fqcompile.kernels.spec import H200, TileConfig
from fqcompile.kernels.triton.cost import cost
from tests.kernels.triton.test_static import BUDGETS, VERSION

pytestmark = pytest.mark.skipif(
    toolchain_missing() is not None or VERSION not in BUDGETS,
    reason="no machine code of a Triton that the model was fitted to",
)
CASES = [case for arch in GPUS for case in selection(arch) if case.kind == "gemm"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_model_is_near_the_machine_code(case: Case) -> None:
    assert case.config is not None
    code, model = case.read(), cost(case.spec, case.config, case.gpu, 16)
    few_rows = case.config.BLOCK_M == 16
    near = 0.12 if few_rows else 0.25
    assert model.instructions == pytest.approx(code.per_weight(case.weights), rel=near)
    assert 0.95 <= model.shared_bytes / code.shared_bytes <= 1.15
    assert 0.65 <= model.registers / code.registers <= 1.5


@pytest.mark.parametrize(("arch", "products"), [("sm_100", "UTCHMMA"), ("sm_120", "HMMA")])
def test_the_model_tells_data_center_gpus_from_others_by_their_products(
    arch: str, products: str
) -> None:
    """Hopper's successor multiplies as Hopper does, and its consumer's twin as an A100 does."""
    capability = int(arch.removeprefix("sm_"))
    case = gemm(spec(4, 128, gpu=replace(H200, arch=arch)), TileConfig(16, 128, 128, 1, 4, 4))
    code = read(case.launch, capability)
    assert code.count(products) and code.spills == 0
    model = cost(case.spec, TileConfig(16, 128, 128, 1, 4, 4), case.gpu, 16)
    assert model.instructions == pytest.approx(code.per_weight(case.weights, unroll=1), rel=0.06)


@pytest.mark.few(1)
@pytest.mark.parametrize("arch", GPUS)
def test_what_is_chosen_for_few_rows_has_one_shape(arch: int) -> None:
    """At most 128 weights a thread in a block: `make static` reads the machine code of all."""
    found = list(chosen(arch))
    assert len(found) > 50
    for case in found:
        assert isinstance(case.config, TileConfig)
        assert case.config.BLOCK_M == 16
        assert case.weights <= 128 * 32 * case.config.num_warps
