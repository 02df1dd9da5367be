"""fake_quantize_: a plan's dequantised values in an ordinary model, to judge quality."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fqcompile.distributed.shards import local_part
from fqcompile.errors import FineQuantError
from fqcompile.passes.summary import SiteRecipe
from fqcompile.quant.choose import quantize_weight
from fqcompile.report import CompileReport, Plan, Site

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def fake_quantize_(model: nn.Module, plan: Plan | CompileReport) -> nn.Module:
    """Replace each weight that `plan` quantises by its dequantised value, in place; return `model`.

    The result runs wherever an unquantised model runs and computes what the compiled one does. A
    weight that an embedding shares is given to the linear as a parameter of its own: embeddings
    are not quantised.

    Raises:
        FineQuantError: the model has no parameter of a site's name, or a site's weight is computed
            from others so that its value has no place to be written.
    """
    for site in plan.sites:
        if site.status == "quantized":
            _apply(model, site)
    return model


def _apply(model: nn.Module, site: Site) -> None:
    if not isinstance(site.recipe, SiteRecipe):
        raise FineQuantError(
            f"site {site.name} has no recipe: pass the plan that explain() or a report gave, "
            "not one read from a file"
        )
    # of a sharded parameter the plan is for the part that lies here
    sources = tuple(local_part(_separate(model, name)) for name in site.recipe.names)
    with torch.no_grad():
        matrix = site.recipe.recipe(*sources)
        w_hat = quantize_weight(matrix, site.recipe.plan).dequantize(torch.float32)
    site.recipe.recipe.write_back(sources, w_hat)


def _separate(model: nn.Module, name: str) -> Tensor:
    """The tensor of that name, taken apart from any embedding that shares it."""
    weight = _find(model, name)
    holders = list(_holders(model, weight))
    others = [(module, attribute) for module, attribute in holders if not _embeds(module)]
    if len(others) == len(holders):
        return weight
    if not others:
        raise FineQuantError(
            f"{name} is the weight of an embedding and is also multiplied by a functional linear; "
            "give the linear a module of its own to fake-quantise it"
        )
    own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for module, attribute in others:
        setattr(module, attribute, own)
    return own


def _find(model: nn.Module, name: str) -> Tensor:
    """By qualified name; a name from a graph that began inside a submodule may lack the prefix."""
    tensors = dict(_tensors(model))
    if name in tensors:
        return tensors[name]
    found = [full for full in tensors if full.endswith(f".{name}") or name.endswith(f".{full}")]
    if len(found) != 1:
        matches = f"{len(found)} names end like it" if found else "no name ends like it"
        raise FineQuantError(
            f"the model has no tensor {name!r} ({matches}); the plan must come from this model"
        )
    return tensors[found[0]]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes by qualified name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{attribute}".lstrip("."), value


def _holders(model: nn.Module, weight: Tensor) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False):
            if value is weight:
                yield module, attribute


def _embeds(module: nn.Module) -> bool:
    """An embedding, or a scaled one that derives from it."""
    return isinstance(module, _EMBEDDINGS)
