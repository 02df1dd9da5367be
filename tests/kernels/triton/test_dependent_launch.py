"""Kernels that start before the one before them ends: what they may not do until that is complete.

In the interpreter every launch of a test in this folder starts early, and each access before the
wait fails. Here: that this is noticed, that machine code keeps the order too, what is prefetched,
where kernels are launched plainly, and on a GPU chains of layers.
"""

import logging
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from bench.static import expert_launches, launches
from bench.static.launches import Case as Static
from bench.static.machine_code import toolchain_missing
from bench.static.sass import GLOBAL_READS, LOCAL_ACCESSES, ahead_of
from fqcompile.errors import OptionError
from fqcompile.kernels.spec import A100, H200, Gpu, TileConfig
from fqcompile.kernels.triton import dependent_launch, launch
from fqcompile.torch_compat import inductor_config
from tests.kernels.triton import expert_oracle, oracle
from tests.kernels.triton.expert_oracle import ExpertCase
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.interpreter_memory import Access, Memory, OrderError
from tests.kernels.triton.oracle import BF16, EARLY, SMALL, Case, packed, random_codes
from tests.kernels.triton.ptx import emulated_ptx

PREFETCHED, LINE = 4, 128  # blocks of K, bytes
SPLIT = replace(SMALL, SPLIT_K=2)
ONE = Case(n=80, k=700, bias=True, residual=True, activation="silu")
# Each kernel that is launched early, in each of its forms.
CASES: dict[str, Case | ExpertCase] = {
    "direct": ONE,
    "split": replace(ONE, config=SPLIT),
    "gated": replace(ONE, gated=True),
    "gated, finished": replace(ONE, n=37, gated=True),
    "int8": replace(ONE, bits=8, group_size=oracle.COLUMN),
    "grouped": ExpertCase((3, 3, 8), tail=2, one=replace(ONE, residual=False)),
    "grouped, split": ExpertCase((3, 3, 8), one=replace(ONE, residual=False, config=SPLIT)),
    "gathered": ExpertCase(ids=(2, -3, 5, 2), one=replace(ONE, residual=False)),
    "gathered, split": ExpertCase(ids=(2, 0), one=replace(ONE, residual=False, config=SPLIT)),
}
every_form = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def run(case: Case | ExpertCase) -> torch.Tensor:
    of = expert_oracle if isinstance(case, ExpertCase) else oracle
    return of.run(case, of.draw(case))  # type: ignore[attr-defined]


@triton.jit
def _order_kernel(x_ptr, BEFORE: tl.constexpr, WAITS: tl.constexpr):
    """Does that before it waits, if it waits."""
    if BEFORE == "loads":
        tl.load(x_ptr)
    elif BEFORE == "stores":
        tl.store(x_ptr, 1.0)
    elif BEFORE == "updates":
        tl.atomic_add(x_ptr, 1.0)
    elif BEFORE == "lets":
        tl.extra.cuda.gdc_launch_dependents()
    elif BEFORE == "ends":  # noqa: SIM102  (Triton has no `and` of a constant and a value)
        if tl.program_id(0) == 1:
            return
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(x_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0)))


@pytest.mark.parametrize("before", ["loads", "stores", "updates", "lets", "ends"])
def test_the_interpreter_notices_what_comes_before_the_wait(before: str) -> None:
    x = torch.zeros(2)
    with interpreted(), pytest.raises(OrderError, match=before):
        _order_kernel[(2,)](x, before, True, launch_pdl=True)
    with interpreted():
        _order_kernel[(1,)](x, before, True)  # launched plainly, it comes after all before it


def test_the_interpreter_notices_a_wait_that_is_missing() -> None:
    with interpreted(), pytest.raises(OrderError, match="lets the next launch start"):
        _order_kernel[(1,)](torch.zeros(1), "nothing", False, launch_pdl=True)
    with interpreted():
        _order_kernel[(1,)](torch.zeros(1), "nothing", True, launch_pdl=True)


@every_form
def test_every_kernel_is_checked(case: Case | ExpertCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the double of the wait each fails; with it each gives the bits of a plain launch."""
    early = run(case)
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "wait", lambda memory: None)
        with pytest.raises(OrderError, match="before it waits"):
            run(case)
    monkeypatch.setattr(oracle, "EARLY", {})
    assert torch.equal(early.nan_to_num(), run(case).nan_to_num())


def test_the_dense_weight_is_written_by_a_kernel_that_is_launched_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: options.append(kwargs))
    monkeypatch.setattr(launch, "early_launch", lambda device: EARLY)
    monkeypatch.setattr(launch, "conversion", lambda device, dtype: "exponent")
    weight = packed(random_codes(4, 32, 256), torch.ones(32, 2, dtype=BF16), 4, 128)
    launch.dequantize(weight, BF16, 2)
    (made,) = options
    assert not {"launch_pdl", "PDL"} & set(made)


@pytest.mark.few(6)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 128, 256, oracle.COLUMN])
@pytest.mark.parametrize("config", [SMALL, TileConfig(16, 128, 128, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_program_prefetches_what_it_loads_first(
    bits: int, group_size: int, config: TileConfig, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its share the first four blocks, with their scales, all in bounds."""
    loads, lines = noted(monkeypatch)
    run(Case(n=80, k=1100, bits=bits, group_size=group_size, config=config, gated=gated))
    kinds = 2 if gated and config.SPLIT_K == 1 else 1
    assert len(lines) > 1
    for program, at in lines.items():
        words, scales = loads[program, "qweight_ptr"], loads[program, "scale_ptr"]
        first = kinds * min(PREFETCHED, len(words) // kinds)
        # Before the loop come the scales of a weight without groups.
        own = scales[:kinds] if group_size == oracle.COLUMN else scales[kinds : kinds + first]
        wanted = {int(a) for load in [*words[:first], *own] for a in load}
        assert wanted <= {a + byte for a in at for byte in range(LINE)}


def noted(patch: pytest.MonkeyPatch) -> tuple[dict[Any, list[np.ndarray]], dict[Any, list[int]]]:
    """Addresses: of the loads of each program and argument, and of each program's prefetches."""
    loads, lines = defaultdict(list), defaultdict(list)
    touch, prefetch = Memory.touch, Memory.prefetch

    def note_load(self: Memory, access: Access, at: np.ndarray, size: int, name: str) -> None:
        if access is Access.LOAD:
            loads[self.program, name].append(at)
        touch(self, access, at, size, name)

    def note_prefetch(self: Memory, at: np.ndarray, name: str) -> None:
        lines[self.program] += at.tolist()
        prefetch(self, at, name)

    patch.setattr(Memory, "touch", note_load)
    patch.setattr(Memory, "prefetch", note_prefetch)
    return loads, lines


@triton.jit
def _prefetch_kernel(x_ptr, OFFSET: tl.constexpr):
    dependent_launch.prefetch(x_ptr + OFFSET + tl.arange(0, 2))


def test_the_interpreter_notices_a_prefetch_out_of_bounds() -> None:
    with interpreted(), emulated_ptx():
        _prefetch_kernel[(1,)](torch.zeros(4), 2)
        with pytest.raises(IndexError, match="prefetches beyond x_ptr"):
            _prefetch_kernel[(1,)](torch.zeros(4), 3)


# Machine code.

MISSING = toolchain_missing()
compiles = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
STATIC = [*launches.selection(90), *expert_launches.selection(90)]
SMALLEST = TileConfig.parse(launches.TILES[90, False][0])
ACCESSES = GLOBAL_READS | LOCAL_ACCESSES | set("LD ST STG RED REDG ATOM ATOMG UBLKRED".split())


def out_of_order(sass: str) -> set[str]:
    """What comes before the wait and must not: accesses, the signal, and the end."""
    return {i.name for i in ahead_of(sass, "ACQBULK")} & {*ACCESSES, "PREEXIT", "EXIT"}


@compiles
@pytest.mark.parametrize("case", STATIC, ids=lambda case: case.name.replace(" ", "-"))
def test_machine_code_touches_no_memory_before_it_waits(case: Static) -> None:
    code = case.read()
    prefetches = [i for i in ahead_of(code.sass, "ACQBULK") if i.opcode == "CCTL.E.PF2"]
    assert bool(prefetches) == (case.kind == "gemm")
    if case.launch.launch_pdl:
        assert out_of_order(code.sass) == set()
        assert "PREEXIT" in code.sass
    else:
        assert case.kind == "dequantize"
        assert "griddepcontrol" not in code.ptx


@compiles
def test_machine_code_out_of_order_is_seen() -> None:
    code = launches.gemm(launches.spec(4, 128), SMALLEST, PDL=False).read()
    assert {"LDGSTS", "STG", "EXIT"} <= out_of_order(code.sass)


@compiles
def test_kernels_for_other_gpus_have_nothing_of_it() -> None:
    for case in (next(launches.selection(80)), next(expert_launches.selection(80))):
        code = case.read()
        assert "griddepcontrol" not in code.ptx and "prefetch" not in code.ptx


# Where.


def refusal(monkeypatch: pytest.MonkeyPatch, gpu: Gpu = H200, driver: int = 12030) -> str | None:
    monkeypatch.setattr(dependent_launch, "_driver_version", lambda: driver)
    return dependent_launch.refuse_early_launch(gpu)


def test_kernels_start_early_where_all_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch) is None
    for gpu in (A100, replace(H200, arch="sm_89"), replace(H200, arch="gfx942")):
        assert f"has {gpu.arch}" in refusal(monkeypatch, gpu)
    for arch in ("sm_100", "sm_120"):
        assert refusal(monkeypatch, replace(H200, arch=arch)) is None
    assert "says 12020" in refusal(monkeypatch, driver=12020)
    with inductor_config.patch({"triton.enable_pdl": True}):
        assert "triton.enable_pdl" in refusal(monkeypatch)
    for word in ("0", "False"):
        monkeypatch.setenv("FQCOMPILE_PDL", word)
        assert f"FQCOMPILE_PDL={word}" in refusal(monkeypatch)
    monkeypatch.setenv("FQCOMPILE_PDL", "never")
    for gpu in (H200, A100):
        with pytest.raises(OptionError, match="FQCOMPILE_PDL is 'never'; allowed: 1, true"):
            refusal(monkeypatch, gpu)


def test_a_machine_without_driver_has_version_0() -> None:
    assert torch.cuda.is_available() or dependent_launch._driver_version() == 0


@pytest.mark.parametrize("driver", [12030, 11080])
def test_a_device_is_asked_once_and_the_reason_is_logged(
    driver: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(dependent_launch, "_driver_version", lambda: asked.append(1) or driver)
    monkeypatch.setattr(dependent_launch, "gpu_of", lambda device: H200)
    dependent_launch.early_launch.cache_clear()
    with caplog.at_level(logging.INFO, "fqcompile"):
        made = [dependent_launch.early_launch(torch.device("cuda", 7)) for _ in range(3)]
    dependent_launch.early_launch.cache_clear()
    assert made == [EARLY if driver == 12030 else {}] * 3
    assert len(asked) == 1
    assert ("11080" in caplog.text) == (driver == 11080)
    assert dependent_launch.early_launch(torch.device("cpu")) == {}
