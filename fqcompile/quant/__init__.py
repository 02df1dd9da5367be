"""From a weight matrix to codes and scales: granularity, scales, checks, choice."""
