"""Find the parameters of a model that can be packed, from its modules alone.

These are the `weight` of Linear [N, K] and Conv1D [K, N], those of MultiheadAttention and of
recurrent cells, stacks of experts [E, N, K] or [E, K, N], and on request tables of embeddings
[rows, K]. Other large parameters are listed with the reason why they are skipped. Works on meta
devices.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from fqcompile.config import HEAD_NAMES, ROUTER, ROUTERS, FineQuantConfig
from fqcompile.distributed.shards import is_part, local_part
from fqcompile.quant.checks import OTHER_DTYPE, WEIGHT_DTYPES
from fqcompile.torch_compat import Convolution, remover_of_norm
from fqcompile.weights.parameter import PackedWeight

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Modules whose calls read several weights, as `composites` writes them.
_MATRICES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
}
_ROUTERS = ROUTERS | {"classifier"}  # beside experts alone
_ONE_CALL = "PyTorch's own {} reads it in one call, which takes no packed weight"
_COMPUTED = "the weight is computed from it in each call: {}"
_NO_WEIGHT = "only weights of linears and stacks of experts are packed, and this is "
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

    @property
    def weight(self) -> Tensor:
        """The values that are packed."""
        return local_part(self.parameter)

    @property
    def matrix(self) -> Tensor:
        """[N, K] or [E, N, K]; a view."""
        return self.weight.transpose(-2, -1) if self.transposed else self.weight


Held = tuple[str, nn.Module, str]  # qualified name, module, attribute


def module_weights(model: nn.Module, config: FineQuantConfig) -> list[ModuleWeight]:
    """All matrices of linears and experts, and other large parameters with the skip reason.

    Embeddings are listed only if the options ask for them.
    """
    sharing: dict[int, list[Held]] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}".lstrip(".")
            sharing.setdefault(id(weight), []).append((name, module, attribute))
    modules = dict(model.named_modules())
    found: list[ModuleWeight] = []
    for holders in sharing.values():
        multiply = [held for held in holders if _multiplies(*held)]
        multiply += [held for held in holders if _is_table(*held, multiply, config)]
        others = [held for held in holders if held not in multiply]
        if multiply:
            found.append(_weight(multiply, bool(others), modules, config))
        rest = [held for held in others if not isinstance(held[1], _EMBEDDINGS)]
        found.extend(
            _stays(*held, multiply, modules, config) for held in rest[:1] if _counts(*held, config)
        )
    return found


def settle_norms(model: nn.Module, config: FineQuantConfig) -> None:
    """Make parameters of the weights of linears that a weight or spectral norm computes, in place.

    In evaluation mode they have the same values in each call. Those that stay anyway stay computed.
    """
    for prefix, module in model.named_modules():
        remove = remover_of_norm(module) if _is_linear(module) and not module.training else None
        if remove is not None and config.kept_by_name(f"{prefix}.weight".lstrip(".")) is None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            if config.kept_by_size(weight.numel()) is None:
                remove()


def _multiplies(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether the module is known to multiply with it, even if the orientation is unknown."""
    dims = _parameter(module, attribute).dim()
    if dims == 2:
        linear = attribute == "weight" and (_is_linear(module) or _is_conv1d(module))
        return linear or any(
            isinstance(module, kind) and attribute in names for kind, names in _MATRICES.items()
        )
    return dims == 3 and _holds_experts(name, module, attribute)


def _is_table(
    name: str, module: nn.Module, attribute: str, multiply: list[Held], config: FineQuantConfig
) -> bool:
    """Whether its rows are packed: of an embedding that does not rescale them, where asked for.

    A table that Conv1D multiplies with has K along its rows, so that none can be read alone.
    """
    asked = config.quantize_embeddings and config.kept_by_name(name) is None
    plain = isinstance(module, nn.Embedding) and module.max_norm is None
    whole = not is_part(_parameter(module, attribute))
    turned = any(_is_conv1d(other) for _, other, _ in multiply)
    return bool(asked and plain and whole and attribute == "weight" and not turned)


def _parameter(module: nn.Module, attribute: str) -> Tensor:
    """The parameter; an empty tensor if a lazy module has not created it yet."""
    parameter = module.get_parameter(attribute)
    return torch.empty(0, 0) if is_lazy(parameter) else parameter


def _weight(
    holders: list[Held], tied: bool, modules: dict[str, nn.Module], config: FineQuantConfig
) -> ModuleWeight:
    name, module, attribute = holders[0]
    parameter = _parameter(module, attribute)
    stacked, of_tables = parameter.dim() == 3, isinstance(holders[-1][1], _EMBEDDINGS)
    alone = isinstance(module, _EMBEDDINGS)
    transposed = _is_transposed(module, attribute) if stacked else _is_conv1d(module)
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


def _counts(name: str, module: nn.Module, attribute: str, config: FineQuantConfig) -> bool:
    """Whether a skipped parameter is worth a row: large ones, and matrices of linears."""
    parameter = _parameter(module, attribute)
    large = parameter.numel() >= config.min_elements or _is_linear(module)
    return large and parameter.dim() > 1 and parameter.numel() > max(parameter.shape)


def _stays(
    name: str,
    module: nn.Module,
    attribute: str,
    multiply: list[Held],
    modules: dict[str, nn.Module],
    config: FineQuantConfig,
) -> ModuleWeight:
    computed = isinstance(module, ParametrizationList)
    owner = modules[f".{name}".rpartition(".parametrizations.")[0][1:]] if computed else module
    reason = config.kept_by_name(name) or _why_no_weight(owner, attribute, computed=computed)
    if multiply:
        of = type(module).__name__
        reason = f"{multiply[0][0]} shares it; {of} may read it as a table, and keeps it"
    return ModuleWeight(name, _parameter(module, attribute), (), "other", reason=reason)


def _why_no_weight(module: nn.Module, attribute: str, *, computed: bool) -> str:
    """Why a parameter is not a weight to pack; `computed`: a parametrization reads it."""
    of = type(module).__name__
    if _is_linear(module) and remover_of_norm(module) is not None:
        return _COMPUTED.format("call model.eval() first, after which it no longer changes")
    if computed and _is_linear(module):
        return _COMPUTED.format(
            "call torch.nn.utils.parametrize.remove_parametrizations to have one that can be packed"
        )
    if _is_linear(module) and attribute in ("weight_v", "weight_g", "weight_orig"):
        return _COMPUTED.format(
            "call torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove to have "
            "one that can be packed"
        )
    if isinstance(module, Convolution):
        return f"{_NO_WEIGHT}a convolution's"
    if isinstance(module, nn.RNNBase):
        return _ONE_CALL.format(of)
    if _is_linear(module):
        return f"{_NO_WEIGHT}another parameter of a {of}"
    return f"{_NO_WEIGHT}a parameter of {of}, whose use is not known without a graph: see explain()"


def _holds_experts(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether a three-dimensional parameter is a stack of experts, not a table or a filter."""
    if _is_transposed(module, attribute) is not None:
        return True
    if isinstance(module, Convolution | ParametrizationList):
        return False
    return "expert" in f"{name} {type(module).__name__}".lower()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D (GPT-2's linear), whose weight is [K, N]."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _is_transposed(module: nn.Module, attribute: str) -> bool | None:
    """By the module's flag, or by the shapes of gate_up and down; None if neither decides."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    gate_up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or attribute not in ("gate_up_proj", "down_proj"):
        return None
    _, a, b = gate_up.shape
    _, c, d = down.shape
    if (a, b) == (2 * d, c):
        return False
    return True if (a, b) == (d, 2 * c) else None


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
    if _is_router(name, modules) and not config.override_matches(name):
        return ROUTER
    return config.kept_by_size(weight.numel())


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a linear, or a module that contains it, has a router's name and sits next to experts.

    gate.weight, router.layer.weight, gate.wg.weight; experts are recognized by name or class.
    """
    path = name.split(".")[:-1]
    for at, part in enumerate(path):
        parent = modules.get(".".join(path[:at]))
        if part in _ROUTERS and parent is not None:
            others = [(n, type(m).__name__) for n, m in parent.named_children() if n != part]
            if any("expert" in text.lower() for pair in others for text in pair):
                return True
    return False
