"""Operations on a model's modules that need no compiler: pack, restore and fake-quantize weights.

weights        finds the parameters that can be packed, from the modules alone
quantize       `quantize_` and `restore`
fake_quantize  `fake_quantize_`, a plan's values in an ordinary model
"""
