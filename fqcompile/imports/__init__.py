"""Checkpoints that others quantised, opened with packed weights: no dense weight is ever made.

reader       config and headers -> which layers are packed, and how to read one (by quant_method)
assemble     layers -> the model's weights: experts stacked, gate above up, codes unchanged
"""
