"""What the examples of the documents work on: small models, and checkpoints of them on disk.

Every name here is known to the blocks and to the hidden `<!-- setup: -->` lines.
"""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import fqcompile

__all__ = ["adapter", "checkpoint", "llama", "mixtral", "packed_two_layers", "script", "text",
           "torch", "two_layers"]  # fmt: skip


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).eval()


def packed_two_layers() -> nn.Module:
    model = two_layers()
    fqcompile.quantize_(model)
    return model


def _sizes(**sizes: Any) -> dict[str, Any]:
    heads = sizes.pop("heads", 4)
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 512,
        **sizes,
    }


def llama(**sizes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(**sizes))).eval()


def mixtral() -> Any:
    config = hf.MixtralConfig(**_sizes(), num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config).eval()


def checkpoint(directory: str, **sizes: Any) -> None:
    """A Llama in bf16, as `save_pretrained` writes it."""
    llama(**sizes).to(torch.bfloat16).save_pretrained(directory)


def adapter(model: Any, directory: str) -> None:
    """LoRA with factors that change the result."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(directory)


def text(path: str, directory: str) -> None:
    """2048 words, and for the checkpoint in the directory a tokenizer that knows them all."""
    words = {f"w{number}": number for number in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    Path(path).write_text(" ".join(8 * [*words]))


def script(path: str) -> None:
    """One that compiles a model and calls it."""
    Path(path).write_text(
        "import torch\n"
        "model = torch.compile(torch.nn.Linear(256, 256), backend='finequant')\n"
        "with torch.no_grad():\n"
        "    model(torch.randn(2, 256))\n"
    )
