"""Quantized models on disk: safetensors shards, and one manifest that lists their contents.

    fqcompile.json                             written last: files it does not name do not count
    fqcompile-<generation>-00000.safetensors   codes, scales and dense tensors, in the plain layout,
                                               and in the header how to read them
    config.json, the index, tokenizer.json...  as Hugging Face expects them next to the weights

Nothing depends on the machine, and nothing is pickled.
"""
