"""Random small programs through the whole backend, against the same program after fake_quantize_.

Linear layers in every form share inputs and results with epilogues, in-place writes, views and
near-misses. Whatever the passes make of it: same values, same writes to the caller's tensors, and
no two outputs that share memory unless they did so before.
"""

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fqcompile
from fqcompile.report import clear_reports, reports
from tests.passes.graphs import DEFAULTS, assert_close, assert_same_form
from tests.strategies import HIDDEN, LINEAR_STEPS, STEPS, Program, Step, programs
from tests.tiers import examples

shapes = st.tuples(st.integers(1, 2), st.sampled_from([1, 1, 2, 3]))
# Group sizes and bits that differ between the weights, so that siblings have to meet or stay apart.
formats = st.fixed_dictionaries(
    {
        f"(layers|mats)\\.{i}": st.fixed_dictionaries(
            {
                "bits": st.sampled_from([4, 4, 8]),
                "granularity": st.sampled_from([16, 32, 48, "column"]),
            }
        )
        for i in range(4)
    }
)


def inputs(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, *shape, HIDDEN, generator=generator)
    return x, y.clone()


def sharing(tensors: Sequence[Tensor]) -> set[tuple[int, int]]:
    """Pairs that lie in one storage."""
    homes = [t.untyped_storage().data_ptr() for t in tensors]
    count = range(len(homes))
    return {(i, j) for i in count for j in count if i < j and homes[i] == homes[j]}


def check_program(
    program: Program, shape: tuple[int, int], overrides: dict[str, object], *, grad: bool
) -> int:
    """Compile, run and compare; returns the number of fused nodes."""
    torch._dynamo.reset()
    clear_reports()
    program.requires_grad_(False)
    options = {**DEFAULTS, "overrides": overrides}
    compiled = torch.compile(program, backend="finequant", fullgraph=True, options=options)
    given_inputs = inputs(shape, 0)
    with torch.set_grad_enabled(grad):
        got = compiled(*given_inputs)
    (report,) = reports()
    assert not report.warnings, report.warnings

    oracle = fqcompile.fake_quantize_(copy.deepcopy(program), report)
    own_inputs = inputs(shape, 0)
    with torch.set_grad_enabled(grad):
        want = oracle(*own_inputs)
        # Values that cancel later still carry their rounding, so the largest of all sets the scale.
        scale = max(float(v.abs().max()) for v in oracle.values(*inputs(shape, 0)))
    for i, (a, b) in enumerate(zip((*got, *given_inputs), (*want, *own_inputs), strict=True)):
        assert_same_form(a, b, f"value {i}")
        assert_close(a, b, f"value {i}", scale=scale)
    more = sharing((*got, *given_inputs)) - sharing((*want, *own_inputs))
    assert not more, f"outputs and inputs {more} share memory that they did not share before"
    counts = {p.name: p.count for p in report.passes}
    assert counts["rewrite"] > 0, str(report)
    return counts["fuse"]


def has_one_value_per_weight(program: Program) -> bool:
    """Whether every read of a weight quantizes it alike, so that one ŵ can stand for all of them.

    A matrix on the left is grouped along its other side; "merged weight" joins halves of two
    matrices, at one group size for both; "double" is kept and reads the weight as it is.
    """
    reads: dict[tuple[str, int], set[str]] = {}
    for step in program.steps:
        if step.name not in LINEAR_STEPS and step.name != "double":
            continue
        for kind, number, way in reads_of(step):
            reads.setdefault((kind, number), set()).add(way)
    return all(len(ways) == 1 for ways in reads.values())


def reads_of(step: Step) -> list[tuple[str, int, str]]:
    if step.name == "merged weight":
        return [("layer", step.w, "half"), ("mat", step.w, "half")]
    if step.name == "mlp":
        return [("layer", w, "whole") for w in (step.w, step.w ^ 2, step.w + 1 & 3)]
    if step.name in ("linear", "linear without bias", "einsum", "in a mode"):
        return [("layer", step.w, "whole")]
    if step.name == "double":
        return [("mat", step.w, "exact")]
    return [("mat", step.w, "left" if step.name == "left matmul" else "right")]


def runs_uncompiled(program: Program, shape: tuple[int, int]) -> bool:
    """Not where it views a value whose rows lie transposed in memory, as a left matmul's may."""
    try:
        program(*inputs(shape, 0))
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            return False
        raise
    return True


@settings(max_examples=examples(60))
@given(
    program=programs().filter(has_one_value_per_weight),
    shape=shapes,
    overrides=formats,
    grad=st.sampled_from([False, False, True]),
)
def test_compiled_program_is_the_fake_quantized_one(
    program: Program, shape: tuple[int, int], overrides: dict[str, object], grad: bool
) -> None:
    assume(runs_uncompiled(program.requires_grad_(False), shape))
    fusions = check_program(program, shape, overrides, grad=grad)
    event(f"{min(fusions, 4)} fusions")


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_statement_alone(name: str) -> None:
    """So that a statement which no drawn program reaches is not lost unseen."""
    program = Program((Step("linear", 0, 1, 0), Step(name, 2, 1, 1)), (3, 2), 0)
    check_program(program, (2, 3), {}, grad=False)


FOUND: dict[str, tuple[tuple[Step, ...], tuple[int, ...]]] = {
    "+= between two linears, first read again": (
        (
            Step("linear", 0, 0, 0),
            Step("linear", 1, 1, 1),
            Step("iadd", 2, 3, 0),
            Step("relu", 2, 2, 0),
        ),
        (4, 5),
    ),
    "siblings with one row, one written": (
        (Step("linear", 0, 0, 0), Step("linear", 0, 0, 1), Step("add in place", 2, 2, 0)),
        (2, 3),
    ),
    "bias between views": (
        (Step("mm of flat", 0, 0, 0), Step("add row", 2, 2, 0), Step("view", 3, 3, 0)),
        (4,),
    ),
    "one weight in a linear and an einsum": (
        (Step("linear", 0, 0, 0), Step("einsum", 2, 2, 0)),
        (3,),
    ),
}


@pytest.mark.parametrize(("steps", "returned"), FOUND.values(), ids=list(FOUND))
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_programs_that_once_failed(
    steps: tuple[Step, ...], returned: tuple[int, ...], shape: tuple[int, int]
) -> None:
    check_program(Program(steps, returned, 0), shape, {}, grad=False)
