"""Weights of graphs and modules: recipes, the store of packed weights, packed parameters."""

# Importing any module of this package registers the operators of packed weights.
from fqcompile.weights import parameter_ops as _parameter_ops  # noqa: F401
