"""How wide the weights of each layer type are: what one scale per column has to cover.

Of each output column, its largest weight over its root mean square; of these ratios the quantiles.
A Gaussian column of 256 weights has about 2.9.
"""

from collections.abc import Iterator

import torch
from torch import nn

from bench.accuracy.quantized import NO_HEAD, layer_type
from bench.core.results import Row
from fqcompile.config import FineQuantConfig
from fqcompile.module_weights import module_weights

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def range_rows(model: nn.Module) -> Iterator[Row]:
    """One row per layer type, all its matrices together."""
    ratios: dict[str, list[torch.Tensor]] = {}
    for weight in module_weights(model, FineQuantConfig.from_options(NO_HEAD)):
        if weight.reason is None:
            columns = weight.matrix.detach().flatten(0, -2)
            ratio = columns.abs().amax(1) / columns.square().mean(1).sqrt()
            ratios.setdefault(layer_type(weight.name), []).append(ratio)
    for name, parts in ratios.items():
        quantiles = torch.cat(parts).quantile(torch.tensor(QUANTILES)).tolist()
        yield {"layer_type": name, "quantiles": quantiles}
