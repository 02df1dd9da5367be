"""What is done to a model's modules without compiling it: packed, dense again, or fake-quantized.

weights        which parameters are weights that can be packed, told from the modules alone
quantize       `quantize_` and `restore`
fake_quantize  `fake_quantize_`, a plan's values in an ordinary model
"""
