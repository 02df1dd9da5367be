"""fake_quantize_: write a plan's dequantized values into an ordinary model, to measure quality."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fqcompile.distributed.shards import local_part
from fqcompile.errors import FineQuantError, UnquantizableWeight
from fqcompile.hf_compat import untie
from fqcompile.modules.given import check_model
from fqcompile.modules.kinds import remedy_of_computed
from fqcompile.passes.naming import Holder, holders_of
from fqcompile.passes.summary import SiteRecipe
from fqcompile.quant.choose import quantize_weight
from fqcompile.report import CompileReport, Plan, Site
from fqcompile.torch_compat import remover_of_norm
from fqcompile.weights.store import STORE

_MOST_NAMED = 4


@dataclass(frozen=True)
class _Target:
    """A site, its tensors in the model, and for each tensor the modules that get their own copy."""

    site: Site
    recipe: SiteRecipe
    sources: tuple[Tensor, ...]
    movers: tuple[tuple[Holder, ...], ...]
    normed: tuple[nn.Module, ...]  # whose norm computes one of the tensors


def fake_quantize_(model: nn.Module, plan: Plan | CompileReport) -> nn.Module:
    """Replace each weight that `plan` quantizes by its dequantized value, in place; return `model`.

    The result runs wherever an unquantized model runs and computes the same values as the compiled
    model. If a linear shares its weight with an embedding, or with another reader of the original
    values, the linear gets a parameter of its own. Nothing is written until every site of the plan
    has been located in the model. Weights that PyTorch's norms compute become parameters, as in
    `quantize_`, in evaluation mode.

    Errors are weighed as they were when this model was compiled, if it was. In a copy, or another
    instance of the class, they are weighed as for the model that the plan was made for.

    Args:
        model: with dense weights, under the names that the plan has.
        plan: of `explain`, `quantize_` or `quantize_checkpoint`, or the report of a compilation.

    Raises:
        OptionError: `model` is no model.
        FineQuantError: a site's name matches no tensor of the model or several; two sites write to
            the same elements; or the dequantized value cannot be stored, because the weight is
            computed from others in each call or an embedding reads the same parameter.
    """
    check_model(model, "fake_quantize_")
    targets = _targets(model, plan)
    normed = {id(norm): norm for target in targets for norm in target.normed}
    for norm in normed.values():
        remove = remover_of_norm(norm)
        if remove is not None:
            remove()
    if normed:  # their weights are other tensors now
        targets = _targets(model, plan)
    own: dict[int, Tensor] = {}
    for target in targets:
        _apply(target, own)
    untie(model)
    return model


def _apply(target: _Target, own: dict[int, Tensor]) -> None:
    """`own`: the copies made so far for modules that move, by the identity of the original."""
    recipe = target.recipe
    for weight, movers in zip(target.sources, target.movers, strict=True):
        if movers and id(weight) not in own:
            copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            own[id(weight)] = copy
            for holder in movers:
                setattr(holder.module, holder.attribute, copy)
    # of a sharded parameter the plan is for the part that lies here
    sources = tuple(local_part(own.get(id(weight), weight)) for weight in target.sources)
    plan = recipe.plan
    if plan.calibration is not None:  # an instance of the class that was compiled too has its own
        known = STORE.calibration(recipe.recipe, target.sources, plan.calibration.asked)
        plan = replace(plan, calibration=known or plan.calibration)
    with torch.no_grad():
        matrix = recipe.recipe(*sources)
        w_hat = quantize_weight(matrix, plan).dequantize(torch.float32)
    recipe.recipe.write_back(sources, w_hat)


def _targets(model: nn.Module, plan: Plan | CompileReport) -> list[_Target]:
    """The sites that the plan quantizes, located in the model; nothing is changed."""
    places = holders_of(model)
    for prefix, module in model.named_modules():
        # what hooks compute they leave in attributes, where it is found
        for attribute in module.parametrizations if is_parametrized(module) else ():
            settles = _settles(module, attribute)
            with torch.no_grad():
                tensor = getattr(module, attribute) if settles else torch.empty(0)
            name = f"{prefix}.{attribute}".lstrip(".")
            places[id(tensor)] = [Holder(name, module, attribute, tensor)]
    targets = [_target(places, site) for site in plan.sites if site.status == "quantized"]
    _refuse_overlaps(targets)
    return targets


def _settles(module: nn.Module, attribute: str) -> bool:
    """Whether a norm computes it that can be removed: in training the values still change."""
    return attribute == "weight" and not module.training and remover_of_norm(module) is not None


def _refuse_computed(name: str, holder: Holder) -> None:
    """Refuse to write to what the next call computes again, and would overwrite."""
    remedy = remedy_of_computed(holder.module, holder.attribute)
    if remedy is not None and not _settles(holder.module, holder.attribute):
        raise FineQuantError(
            f"{name}: {holder.name} is computed in each call of the model: {remedy}"
        )


def _target(places: Mapping[int, Sequence[Holder]], site: Site) -> _Target:
    recipe = site.recipe
    if not isinstance(recipe, SiteRecipe):
        raise FineQuantError(
            f"site {site.name} has no recipe: pass the plan that explain() or a report gave, "
            "not one read from a file, nor one of GPTQ, whose values a model has after restore()"
        )
    try:
        recipe.recipe.check_writable()
    except UnquantizableWeight as error:
        raise FineQuantError(f"{site.name}: {error}") from error
    found = [_find(places, name, held=recipe.held) for name in recipe.names]
    for holder in found:
        _refuse_computed(site.name, holder)
    sources = tuple(holder.tensor for holder in found)
    with torch.no_grad():
        shape = tuple(recipe.recipe(*map(local_part, sources)).shape)
    if shape != site.shape:
        raise FineQuantError(
            f"{site.name} is {list(site.shape)} in the plan and {list(shape)} in the model; the "
            "plan must come from this model"
        )
    movers = [
        ()
        if recipe.of_tables
        else _movers(holder.name, places[id(holder.tensor)], shared=name in recipe.shared)
        for name, holder in zip(recipe.names, found, strict=True)
    ]
    normed = tuple(h.module for h in found if _settles(h.module, h.attribute))
    return _Target(site, recipe, sources, tuple(movers), normed)


def _find(places: Mapping[int, Sequence[Holder]], name: str, *, held: bool) -> Holder:
    """Look up a tensor by its qualified name, else by a unique match of name suffixes.

    The plan may describe a part of this model, or this model may be a part of the plan's model. A
    name that is only Dynamo's path (not `held`) counts as a suffix.
    """
    fitting: dict[int, Holder] = {}
    for holders in places.values():
        for holder in holders:
            if held and holder.name == name:
                return holder
            if f".{holder.name}".endswith(f".{name}") or name.endswith(f".{holder.name}"):
                fitting.setdefault(id(holder.tensor), holder)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    names = [holder.name for holder in fitting.values()]
    more = ", ..." if len(names) > _MOST_NAMED else ""
    what = (
        f"it may be any of {', '.join(names[:_MOST_NAMED])}{more}"
        if names
        else "no name ends like it"
    )
    raise FineQuantError(
        f"the model has no tensor {name!r} ({what}); the plan must come from this model: pass the "
        "module that was explained or compiled"
    )


def _movers(name: str, sharing: Sequence[Holder], *, shared: bool) -> tuple[Holder, ...]:
    """Modules that multiply with a weight whose original values others read; empty if none do.

    Raises:
        FineQuantError: the two kinds of readers cannot be told apart.
    """
    if any(holder.embeds for holder in sharing):
        movers = tuple(holder for holder in sharing if not holder.embeds)
    elif shared:
        movers = tuple(holder for holder in sharing if holder.multiplies)
    else:
        return ()
    parameters = all(holder.attribute in holder.module._parameters for holder in movers)
    if movers and parameters and len(movers) < len(sharing):
        return movers
    raise FineQuantError(
        f"{name} is the weight of a linear and is read as it is elsewhere, as an embedding's table "
        "or as its kept row in the plan says, through one parameter; give the linear a module of "
        "its own to fake-quantize it, or exclude it"
    )


def _refuse_overlaps(targets: Sequence[_Target]) -> None:
    """Check that the parts of one weight that several sites quantize do not overlap.

    Raises:
        FineQuantError: an element would be written twice.
    """
    # of one site met under two types of activations, the plans differ in the scales' type alone
    distinct = {(t.site.name, t.recipe.recipe.key): t for t in targets}
    readers = Counter(id(weight) for target in distinct.values() for weight in target.sources)
    written: dict[int, Tensor] = {}
    for target in distinct.values():
        if all(readers[id(weight)] == 1 for weight in target.sources):
            continue
        sources = tuple(map(local_part, target.sources))
        masks = target.recipe.recipe.elements_read(sources)
        for weight, mask in zip(target.sources, masks, strict=True):
            before = written.get(id(weight))
            if before is not None and bool((before & mask).any()):
                raise FineQuantError(
                    f"{target.site.name} and another site quantize the same elements, each in its "
                    "own way, and a parameter has room for one; use the compiled model, or exclude "
                    "the weight"
                )
            written[id(weight)] = mask if before is None else before | mask
