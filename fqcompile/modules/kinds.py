"""What kinds of modules there are: linears, experts, routers, and what norms compute a weight."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from fqcompile.config import ROUTERS, FineQuantConfig
from fqcompile.torch_compat import Convolution, remover_of_norm

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Modules whose calls read several weights, as `composites` writes them.
_MATRICES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
}
_ROUTERS = ROUTERS | {"classifier"}  # beside experts alone


def settle_norms(
    model: nn.Module, config: FineQuantConfig, accepts: Callable[[nn.Module, str], bool] | None
) -> None:
    """Make parameters of the weights of linears that a weight or spectral norm computes, in place.

    In evaluation mode they have the same values in each call. Those that stay, by their names or
    sizes or since `accepts(module, its name)` refuses them, stay computed.
    """
    for prefix, module in model.named_modules():
        remove = remover_of_norm(module) if is_linear(module) and not module.training else None
        if remove is None or config.kept_by_name(f"{prefix}.weight".lstrip(".")) is not None:
            continue
        weight: Tensor = module.weight
        asked = accepts is None or (callable(accepts) and accepts(module, prefix))
        if asked and config.kept_by_size(weight.numel()) is None:
            remove()


def remedy_of_computed(module: nn.Module, attribute: str) -> str | None:
    """What makes a parameter of a tensor that hooks or parametrizations compute in each call."""
    if attribute == "weight" and remover_of_norm(module) is not None:
        return "call model.eval() first, after which it no longer changes"
    if is_parametrized(module, attribute):
        return (
            "call torch.nn.utils.parametrize.remove_parametrizations to have one that can be packed"
        )
    sources = (f"{attribute}{end}" for end in ("_v", "_g", "_orig"))
    if attribute in vars(module) and any(source in module._parameters for source in sources):
        return (
            "call torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove to have "
            "one that can be packed"
        )
    return None


def multiplies(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether the module is known to multiply with it, even if the orientation is unknown."""
    dims = parameter_of(module, attribute).dim()
    if dims == 2:
        linear = attribute == "weight" and (is_linear(module) or is_conv1d(module))
        return linear or any(
            isinstance(module, kind) and attribute in names for kind, names in _MATRICES.items()
        )
    return dims == 3 and holds_experts(name, module, attribute)


def parameter_of(module: nn.Module, attribute: str) -> Tensor:
    """The parameter; an empty tensor if a lazy module has not created it yet."""
    parameter = module.get_parameter(attribute)
    return torch.empty(0, 0) if is_lazy(parameter) else parameter


def holds_experts(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether a three-dimensional parameter is a stack of experts, not a table or a filter."""
    if is_transposed(module, attribute) is not None:
        return True
    if isinstance(module, Convolution | ParametrizationList):
        return False
    return "expert" in f"{name} {type(module).__name__}".lower()


def is_linear(module: nn.Module) -> bool:
    """Whether its weight is [N, K]."""
    return isinstance(module, nn.Linear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D (GPT-2's linear), whose weight is [K, N]."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a convolution of single pixels, which its weight [N, K, 1, ...] multiplies."""
    if not isinstance(module, Convolution) or module.transposed or module.groups != 1:
        return False
    steps = (*module.kernel_size, *module.stride, *module.dilation)
    return all(step == 1 for step in steps) and all(size == 0 for size in module.padding)


def is_transposed(module: nn.Module, attribute: str) -> bool | None:
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


def is_router(name: str, modules: dict[str, nn.Module]) -> bool:
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
