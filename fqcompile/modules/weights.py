"""Find the parameters of a model that can be packed, from its modules alone.

These are the `weight` of Linear [N, K] and Conv1D [K, N], those of MultiheadAttention and of
recurrent cells, stacks of experts [E, N, K] or [E, K, N], and on request tables of embeddings
[rows, K]. Other large parameters are listed with the reason why they are skipped. Works on meta
devices.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from fqcompile.config import HEAD_NAMES, ROUTER, FineQuantConfig
from fqcompile.distributed.shards import is_part, local_part
from fqcompile.errors import OptionError
from fqcompile.modules.kinds import (
    EMBEDDINGS,
    is_conv1d,
    is_linear,
    is_pointwise,
    is_router,
    is_transposed,
    multiplies,
    parameter_of,
    remedy_of_computed,
)
from fqcompile.quant.checks import OTHER_DTYPE, WEIGHT_DTYPES
from fqcompile.torch_compat import Convolution
from fqcompile.weights.parameter import PackedWeight

_ONE_CALL = "PyTorch's own {} reads it in one call, which takes no packed weight"
_COMPUTED = "the weight is computed from it in each call: {}"
_NO_WEIGHT = "only weights of linears and stacks of experts are packed, and this is "
_COMPILED = "; torch.compile(model, backend='finequant') can quantize it"
_FILTERED = "filter_fn does not accept its module"
_ORIENTATION = (
    "stack of experts whose module does not say by is_transposed if its matrices are [N, K] "
    "or [K, N]"
)


@dataclass(frozen=True)
class ModuleWeight:
    """A parameter that linears or experts multiply with, or another large parameter.

    For a sharded parameter, the local shard.

    Attributes:
        parameter: the parameter as the module holds it.
        name: qualified name in the first module that multiplies with it.
        holders: (module, attribute) of every module that multiplies with it, or reads its rows if
            those are packed too.
        transposed: its matrices are [K, N].
        head: an output head or a table, which gets 8 bits unless the options set bits.
        tied: another module that reads it as a table also holds it, and keeps it.
        of_tables: embeddings are among the holders.
        reason: why it is skipped; None if it may be packed.
        chosen_by: of what is skipped since a weight is computed from it, (that weight's module, its
            name).
    """

    name: str
    parameter: Tensor
    holders: tuple[tuple[nn.Module, str], ...]
    kind: str
    transposed: bool = False
    head: bool = False
    tied: bool = False
    of_tables: bool = False
    reason: str | None = None
    chosen_by: tuple[nn.Module, str] | None = None

    @property
    def module_name(self) -> str:
        """The qualified name of the first module that multiplies with it."""
        return self.name.rpartition(".")[0]

    @property
    def choice(self) -> tuple[nn.Module, str] | None:
        """What a filter is asked about it, a module and its name; None if it stays anyway."""
        return (self.holders[0][0], self.module_name) if self.reason is None else self.chosen_by

    @property
    def weight(self) -> Tensor:
        """The values that are packed."""
        return local_part(self.parameter)

    @property
    def matrix(self) -> Tensor:
        """[N, K] or [E, N, K]; a view."""
        return self.weight.transpose(-2, -1) if self.transposed else self.weight

    def put(self, packed: Tensor) -> None:
        """Replace it in all its holders, by one parameter: what is tied stays so."""
        parameter = nn.Parameter(packed, requires_grad=False)
        for module, attribute in self.holders:
            module._parameters[attribute] = parameter


Held = tuple[str, nn.Module, str]  # qualified name, module, attribute


def module_weights(model: nn.Module, config: FineQuantConfig) -> list[ModuleWeight]:
    """All matrices of linears and experts, and other large parameters with the skip reason.

    Embeddings are listed only if the options ask for them, then those that stay dense too.
    """
    sharing: dict[int, list[Held]] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}".lstrip(".")
            sharing.setdefault(id(weight), []).append((name, module, attribute))
    modules = dict(model.named_modules())
    found: list[ModuleWeight] = []
    for holders in sharing.values():
        multiply = [held for held in holders if multiplies(*held)]
        multiply += [held for held in holders if _is_table(*held, multiply, config)]
        others = [held for held in holders if held not in multiply]
        if multiply:
            found.append(_weight(multiply, bool(others), modules, config))
        asked = config.quantize_embeddings is not None
        rest = [held for held in others if asked or not isinstance(held[1], EMBEDDINGS)]
        found.extend(
            _stays(*held, multiply, modules, config)
            for held in rest[:1]
            if _counts(*held, modules, config)
        )
    return found


def filtered(
    weights: Iterable[ModuleWeight], accepts: Callable[[nn.Module, str], bool] | None
) -> list[ModuleWeight]:
    """The weights, of which those that `accepts(module, its name)` refuses stay as they are.

    Raises:
        OptionError: `accepts` cannot be called.
    """
    if accepts is None:
        return list(weights)
    if not callable(accepts):
        raise OptionError(
            f"filter_fn is {accepts!r}; allowed: a function of a module and its qualified name "
            "that returns whether its weight is quantized, or None"
        )
    return [
        found
        if found.choice is None or accepts(*found.choice)
        else replace(found, reason=_FILTERED)
        for found in weights
    ]


def _is_table(
    name: str, module: nn.Module, attribute: str, multiply: list[Held], config: FineQuantConfig
) -> bool:
    """Whether its rows are packed: of an embedding that does not rescale them, where asked for.

    A table that Conv1D multiplies with has K along its rows, so that none can be read alone.
    """
    asked = config.quantize_embeddings and config.kept_by_name(name) is None
    plain = isinstance(module, nn.Embedding) and module.max_norm is None
    whole = not is_part(parameter_of(module, attribute))
    turned = any(is_conv1d(other) for _, other, _ in multiply)
    return bool(asked and plain and whole and attribute == "weight" and not turned)


def _weight(
    holders: list[Held], tied: bool, modules: dict[str, nn.Module], config: FineQuantConfig
) -> ModuleWeight:
    name, module, attribute = holders[0]
    parameter = parameter_of(module, attribute)
    stacked, of_tables = parameter.dim() == 3, isinstance(holders[-1][1], EMBEDDINGS)
    alone = isinstance(module, EMBEDDINGS)
    transposed = is_transposed(module, attribute) if stacked else is_conv1d(module)
    reason = _reason(name, module, local_part(parameter), modules, config)
    if transposed is None:
        reason = reason or _ORIENTATION
    if is_lazy(module.get_parameter(attribute)):
        reason = "it is not initialized yet: run the model once, then call quantize_"
    return ModuleWeight(
        name=name,
        parameter=parameter,
        holders=tuple((module, attribute) for _, module, attribute in holders),
        kind="experts" if stacked else "embedding" if alone else "linear",
        transposed=bool(transposed),
        head=of_tables or tied or HEAD_NAMES.search(name) is not None,
        tied=tied,
        of_tables=of_tables,
        reason=reason,
    )


def _counts(
    name: str,
    module: nn.Module,
    attribute: str,
    modules: dict[str, nn.Module],
    config: FineQuantConfig,
) -> bool:
    """Whether a skipped parameter is worth a row: large ones, linears' matrices and tables."""
    parameter = parameter_of(module, attribute)
    _, owner, _ = _computed_from(name, module, attribute, modules)
    matrix = is_linear(owner) or isinstance(owner, EMBEDDINGS)
    large = parameter.numel() >= config.min_elements or matrix
    return large and parameter.dim() > 1 and parameter.numel() > max(parameter.shape)


def _stays(
    name: str,
    module: nn.Module,
    attribute: str,
    multiply: list[Held],
    modules: dict[str, nn.Module],
    config: FineQuantConfig,
) -> ModuleWeight:
    parameter, chosen_by = parameter_of(module, attribute), None
    prefix, owner, computed = _computed_from(name, module, attribute, modules)
    remedy = remedy_of_computed(owner, computed) if is_linear(owner) else None
    if multiply:
        of = type(module).__name__
        reason = f"{multiply[0][0]} shares it; {of} may read it as a table, and keeps it"
    elif remedy is None:
        reason = config.kept_by_name(name) or _why_no_weight(owner, attribute)
    else:  # the options choose what is computed, and would once it is a parameter
        kept = config.kept_by_name(f"{prefix}.{computed}".lstrip("."))
        kept = kept or config.kept_by_size(parameter.numel())
        reason = kept or _COMPUTED.format(remedy)
        chosen_by = None if kept else (owner, prefix)
    return ModuleWeight(name, parameter, (), "other", reason=reason, chosen_by=chosen_by)


def _computed_from(
    name: str, module: nn.Module, attribute: str, modules: dict[str, nn.Module]
) -> tuple[str, nn.Module, str]:
    """What is computed from a parameter: (its module's name, that module, its attribute there)."""
    if isinstance(module, ParametrizationList):
        prefix, _, path = f".{name}".rpartition(".parametrizations.")
        return prefix[1:], modules[prefix[1:]], path.partition(".")[0]
    return name.rpartition(".")[0], module, re.sub("_(orig|v|g)$", "", attribute)


def _why_no_weight(module: nn.Module, attribute: str) -> str:
    """Why a parameter is not a weight to pack, if nothing that could be is computed from it."""
    of = type(module).__name__
    if isinstance(module, nn.EmbeddingBag):
        return f"only tables of nn.Embedding are packed, and this is of {of}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return (
            f"max_norm={module.max_norm} rescales its rows in each call, and packed ones stay as "
            "they are: rescale them all once and set max_norm to None to have it packed"
        )
    if isinstance(module, nn.Embedding) and is_part(parameter_of(module, attribute)):
        return "the table is sharded, and packed rows are read where all of them are"
    if isinstance(module, Convolution):
        single = attribute == "weight" and is_pointwise(module)
        return f"{_NO_WEIGHT}a convolution's{_COMPILED if single else ''}"
    if isinstance(module, nn.Bilinear):
        return f"{_NO_WEIGHT}a Bilinear's{_COMPILED}"
    if isinstance(module, nn.RNNBase):
        return _ONE_CALL.format(of)
    if is_linear(module):
        return f"{_NO_WEIGHT}another parameter of a {of}"
    return f"{_NO_WEIGHT}a parameter of {of}, whose use is not known without a graph: see explain()"


def _reason(
    name: str,
    module: nn.Module,
    weight: Tensor,
    modules: dict[str, nn.Module],
    config: FineQuantConfig,
) -> str | None:
    by_name = config.kept_by_name(name)
    if by_name is not None:
        return by_name
    if isinstance(weight, PackedWeight):
        return "the weight is packed already"
    if type(weight) not in (nn.Parameter, Tensor) or weight.layout != torch.strided:
        return f"the weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype not in WEIGHT_DTYPES:
        return OTHER_DTYPE.format(weight.dtype)
    if is_router(name, modules) and not config.override_matches(name):
        return ROUTER
    return config.kept_by_size(weight.numel())
