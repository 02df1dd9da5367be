"""Kernels for x86 and other CPUs."""
