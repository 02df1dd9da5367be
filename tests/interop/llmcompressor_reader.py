"""What llm-compressor reads of checkpoints; run by the Python of .venv-llmcompressor.

    python llmcompressor_reader.py TASKS.json

A task is {"directory", "out"}. `out`.safetensors gets the parameters of the model that `oneshot`
would begin with: read and decompressed by llm-compressor's own function.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from llmcompressor.args import ModelArguments
from llmcompressor.entrypoints.utils import initialize_model_from_path
from safetensors.torch import save_file

if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model = initialize_model_from_path(ModelArguments(model=task["directory"]))
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, Path(task["out"]).with_suffix(".safetensors"))
