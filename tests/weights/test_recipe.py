"""WeightRecipe: the steps from parameters to one matrix, their identity, and the way back."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.errors import UnquantizableWeight
from fqcompile.weights.recipe import (
    IDENTITY,
    TRANSPOSE,
    Ref,
    Step,
    WeightRecipe,
    simplified,
    target_name,
)


def recipe_of(*steps: tuple[Any, ...], sources: int = 1) -> WeightRecipe:
    """Steps as (target, *args); each starts at the result before it, the first at Ref(0)."""
    made = []
    for i, (target, *args) in enumerate(steps):
        first = Ref(0) if i == 0 else Ref(sources + i - 1)
        own = tuple(args) if any(isinstance(a, list) for a in args) else (first, *args)
        made.append(Step(target, own, {}))
    return WeightRecipe(sources, tuple(made))


MOVING_STEPS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "nothing": (),
    "t": (("t",),),
    "T": ((getattr, "T"),),
    "transpose": (("transpose", 0, 1),),
    "permute": (("permute", (1, 0)),),
    "narrow": (("narrow", 0, 1, 3),),
    "slice": ((operator.getitem, slice(2, None)),),
    "slice with a step": ((operator.getitem, (slice(None), slice(0, None, 2))),),
    "chunk and item": (("chunk", 2, 0), (operator.getitem, 1)),
    "split, item, t": ((torch.split, 2), (operator.getitem, 0), ("t",)),
    "unbind a stack": (("view", 2, 3, 4), ("unbind", 0), (operator.getitem, 1)),
    "view and flatten": (("view", 2, 3, 4), ("flatten", 0, 1)),
    "unsqueeze and squeeze": (("unsqueeze", 0), ("squeeze", 0)),
    "reshape": (("reshape", 3, 8),),
    "contiguous of t": (("t",), ("contiguous",)),
    "select": (("view", 3, 2, 4), ("select", 1, 0)),
    "clone and detach": (("clone",), ("detach",)),
    "cast": (("to", torch.bfloat16),),
    "half, then t": (("half",), ("t",)),
    "float": (("float",),),
}


@pytest.mark.parametrize("steps", MOVING_STEPS.values(), ids=list(MOVING_STEPS))
def test_write_back_inverts_every_moving_step(steps: tuple[tuple[Any, ...], ...]) -> None:
    source = torch.arange(24.0).view(6, 4)
    recipe = recipe_of(*steps)
    before = recipe(source).clone()
    value = -before.float() - 1
    untouched = set(range(24)) - {int(v) for v in before.flatten().tolist()}
    recipe.write_back((source,), value)
    assert torch.equal(recipe(source).float(), value)
    assert all(source.view(-1)[i] == i for i in untouched)
    assert source.dtype == torch.float32


@pytest.mark.parametrize("join", [torch.cat, torch.vstack, torch.concat], ids=target_name)
def test_write_back_into_joined_sources(join: Callable[..., Tensor]) -> None:
    sources = (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16))
    recipe = recipe_of((join, [Ref(0), Ref(1)]), ("t",), sources=2)
    value = torch.arange(18.0).view(3, 6)
    recipe.write_back(sources, value)
    assert torch.equal(recipe(*sources), value)
    assert [s.dtype for s in sources] == [torch.float32, torch.bfloat16]


def test_write_back_keeps_identity_and_requires_grad() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    pointer = parameter.data_ptr()
    IDENTITY.write_back((parameter,), torch.ones(2, 3))
    assert parameter.requires_grad
    assert parameter.data_ptr() == pointer
    assert bool((parameter == 1).all())


@pytest.mark.parametrize(
    "target", [torch.add, operator.mul, torch.matmul, "softplus", "norm"], ids=target_name
)
def test_write_back_refuses_arithmetic_by_name(target: Any) -> None:
    recipe = WeightRecipe(1, (Step(target, (Ref(0), Ref(0)), {}),))
    source = torch.ones(2, 2)
    with pytest.raises(
        UnquantizableWeight, match=f"computed by '{target_name(target)}' from other"
    ):
        recipe.write_back((source,), torch.zeros(2, 2))
    assert bool((source == 1).all())


def test_arithmetic_still_computes() -> None:
    low_rank = WeightRecipe(
        3, (Step(torch.mm, (Ref(1), Ref(2)), {}), Step(torch.add, (Ref(0), Ref(3)), {"alpha": 2}))
    )
    w, b, a = torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2)
    assert torch.equal(low_rank(w, b, a), torch.full((2, 2), 3.0))


def test_then_adds_a_method_to_the_result() -> None:
    w = torch.arange(6.0).view(2, 3)
    assert torch.equal(recipe_of(("t",)).then("narrow", 0, 1, 2)(w), w.t()[1:])
    assert torch.equal(IDENTITY.then("t")(w), TRANSPOSE(w))


def test_key_is_equal_for_equal_steps_and_only_those() -> None:
    def cat(*order: int) -> WeightRecipe:
        return recipe_of((torch.cat, [Ref(i) for i in order]), sources=2)

    assert recipe_of(("t",)).key == recipe_of(("t",)).key == TRANSPOSE.key
    different = [
        IDENTITY,
        TRANSPOSE,
        recipe_of(("narrow", 0, 0, 2)),
        recipe_of(("narrow", 0, 2, 2)),
        recipe_of((operator.getitem, 0)),
        recipe_of((operator.getitem, slice(0, 1))),
        recipe_of(("to", torch.float16)),
        recipe_of(("to", torch.bfloat16)),
        cat(0, 1),
        cat(1, 0),
        WeightRecipe(1, (Step("sum", (Ref(0),), {"dim": 0}),)),
        WeightRecipe(1, (Step("sum", (Ref(0),), {"dim": 1}),)),
    ]
    assert len({recipe.key for recipe in different}) == len(different)


def test_function_and_method_of_one_name_have_one_key() -> None:
    assert recipe_of((torch.t,)).key == recipe_of(("t",)).key


@pytest.mark.parametrize(
    ("steps", "plain"),
    [
        ([("transpose", -2, -1), ("transpose", 1, 2)], IDENTITY),
        ([("permute", 0, 2, 1)], IDENTITY.then("transpose", -2, -1)),
        ([("view", 3, 8, 4), ("unsqueeze", 0), ("squeeze", 0)], IDENTITY),
        ([("contiguous",)], IDENTITY),
    ],
    ids=["twice", "permuted", "views", "no copy"],
)
def test_views_that_amount_to_less_are_simplified(steps: list, plain: WeightRecipe) -> None:
    recipe = IDENTITY
    for method, *args in steps:
        recipe = recipe.then(method, *args)
    assert simplified(recipe, (torch.randn(3, 8, 4),)).key == plain.key


@pytest.mark.parametrize(
    "steps",
    [[("narrow", 1, 0, 4)], [("flip", 1)], [("mul", 2)], [("half",)], [("mT",), ("contiguous",)]],
    ids=["part", "unknown", "arithmetic", "cast", "copy"],
)
def test_other_recipes_stay_as_they_are(steps: list) -> None:
    recipe = IDENTITY
    for method, *args in steps:
        recipe = recipe.then("transpose", -2, -1) if method == "mT" else recipe.then(method, *args)
    assert simplified(recipe, (torch.randn(3, 8, 4),)) is recipe
