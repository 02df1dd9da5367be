"""Weights of graphs and modules: recipes, the store of packed weights, packed parameters."""

# Fills the table of what a packed weight answers itself, whichever of these modules is imported.
from fqcompile.weights import parameter_ops as _parameter_ops  # noqa: F401
