"""Kernels for GPUs, in Triton. Import from here only where Triton is installed."""
