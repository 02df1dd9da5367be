"""Packed weights: format, codes and scales. Independent of kernels and graphs."""
