"""Which parameters of a model are weights that can be packed, told from its modules alone.

Linear, Conv1D [K, N], and stacks of experts [E, N, K] or [E, K, N]. Works on meta devices.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fqcompile.config import HEAD_NAMES, FineQuantConfig
from fqcompile.distributed.shards import local_part
from fqcompile.quant.validate import WEIGHT_DTYPES
from fqcompile.weights.packed_weight import PackedWeight

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ROUTERS = frozenset("gate router wg classifier shared_expert_gate".split())
_ORIENTATION = (
    "stack of experts whose module does not say by is_transposed if its matrices are [N, K] "
    "or [K, N]"
)


@dataclass(frozen=True)
class ModuleWeight:
    """A parameter that linears or experts multiply with; of a sharded one the part that lies here.

    Attributes:
        parameter: as the module has it.
        name: qualified, of the first that is no embedding's.
        holders: (module, attribute) of all that share it and are no embeddings.
        transposed: its matrices are [K, N].
        head: an output head, which gets 8 bits unless options say otherwise.
        tied: an embedding shares it, and keeps it.
        reason: why it stays as it is; None: it may be packed.
    """

    name: str
    parameter: Tensor
    holders: tuple[tuple[nn.Module, str], ...]
    kind: str
    transposed: bool = False
    head: bool = False
    tied: bool = False
    reason: str | None = None

    @property
    def weight(self) -> Tensor:
        """The values that are packed."""
        return local_part(self.parameter)

    @property
    def matrix(self) -> Tensor:
        """[N, K] or [E, N, K]; a view."""
        return self.weight.transpose(-2, -1) if self.transposed else self.weight


def module_weights(model: nn.Module, config: FineQuantConfig) -> list[ModuleWeight]:
    """All matrices of linears and experts, those that stay with the reason."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}".lstrip(".")
            holders.setdefault(id(weight), []).append((name, module, attribute))
    modules = dict(model.named_modules())
    found: list[ModuleWeight] = []
    for sharing in holders.values():
        own = [held for held in sharing if not isinstance(held[1], _EMBEDDINGS)]
        if own and own[0][1].get_parameter(own[0][2]).dim() in (2, 3):
            name, tied = own[0][0], len(own) < len(sharing)
            places = [(module, attribute) for _, module, attribute in own]
            found.extend(_weight(name, places, tied, modules, config))
    return found


def _weight(
    name: str,
    holders: list[tuple[nn.Module, str]],
    tied: bool,
    modules: dict[str, nn.Module],
    config: FineQuantConfig,
) -> Iterator[ModuleWeight]:
    module, attribute = holders[0]
    parameter = module.get_parameter(attribute)
    weight = local_part(parameter)
    stacked = weight.dim() == 3
    if not stacked and not (_is_linear(module) or _is_conv1d(module)):
        return
    transposed = _is_transposed(module, attribute) if stacked else _is_conv1d(module)
    reason = _reason(name, module, weight, modules, config)
    if transposed is None:
        reason = reason or _ORIENTATION
    yield ModuleWeight(
        name=name,
        parameter=parameter,
        holders=tuple(holders),
        kind="experts" if stacked else "linear",
        transposed=bool(transposed),
        head=tied or HEAD_NAMES.search(name) is not None,
        tied=tied,
        reason=reason,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's linear of GPT-2, whose weight is [K, N]."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _is_transposed(module: nn.Module, attribute: str) -> bool | None:
    """As the module says, or as gate x up and down fit together; None where neither tells."""
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
        return f"dtype {weight.dtype} is not supported; use fp32, fp16 or bf16"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "PyTorch's own attention reads it in one call, which takes no packed weight"
    if _is_router(name, modules) and not config.override_matches(name):
        return "router: its top-k decides which experts run; name it in overrides to quantise it"
    if weight.numel() < config.min_elements:
        return f"fewer elements than min_elements={config.min_elements}"
    return None


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """A linear named as routers are, in a module that has experts too."""
    path = name.split(".")
    if len(path) < 2 or path[-2] not in _ROUTERS:
        return False
    parent = modules.get(".".join(path[:-2]))
    return parent is not None and any("expert" in child for child, _ in parent.named_children())
