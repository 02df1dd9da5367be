"""From a weight matrix to codes and scales: formats, granularity, packing, choice."""
