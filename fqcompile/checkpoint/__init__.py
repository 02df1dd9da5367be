"""Quantized models on disk: safetensors shards, and one manifest that says what they hold.

    fqcompile.json                             written last: what it does not name is not there
    fqcompile-<generation>-00000.safetensors   codes, scales and dense tensors, in the plain layout
    config.json, tokenizer.json, ...           as Hugging Face wants them beside the weights

Nothing in it depends on the machine, and nothing is pickled.
"""
