"""What the package makes of small models, as text files: for changes that must change nothing.

    python -m tests.oracle.gate record BEFORE     # at the commit before, about three minutes
    python -m tests.oracle.gate record AFTER
    python -m tests.oracle.gate compare BEFORE AFTER

For each model: the plan, the graph that is handed to the inner backend, digests of the logits
(compiled, and eager after `quantize_`), of every tensor of a saved directory and of an export, or
what was raised. Two ranks of gloo share the sharded models. Nothing in them depends on the time or
the place, so equal packages give equal bytes.
"""

import argparse
import difflib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import FineQuantError
from tests import dense_models, moe_models
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import sharded

DTYPE = torch.bfloat16
Made = tuple[nn.Module, dict[str, Tensor]]
# Of the report: what is another in every run, or on another machine.
_VARIES = {"seconds", "total_seconds", "versions", "debug_dir", "least_us", "graph"}
_PLACE = re.compile(r"(?<=# File: )\S*/(?=[^/]*:\d+ in )")  # of a file in which a call is written
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/\w+")


def cases() -> dict[str, Callable[[], Made]]:
    """What makes each model with an input, by its name."""
    found: dict[str, Callable[[], Made]] = {}
    for name in dense_models.CASES:
        found[name] = lambda name=name: dense_models.build(name, DTYPE)
    for name in moe_models.MODELS:
        ways = ("eager",) if name == "llama4" else ("grouped_mm", "batched_mm")
        for way in ways:
            found[f"{name}-{way}"] = lambda name=name, way=way: _moe(name, way)
    for name, layer in moe_models.LAYERS_OF_OUR_OWN.items():
        found[f"layer-{name.replace(' ', '-')}"] = lambda layer=layer: _layer(layer)
    found["llama-lora"] = lambda: _adapted(use_dora=False)
    found["llama-dora"] = lambda: _adapted(use_dora=True)
    return found


def _moe(name: str, way: str) -> Made:
    model = moe_models.build(name, DTYPE, way)
    torch.manual_seed(0)
    return model, {"input_ids": torch.randint(1, moe_models.VOCAB, (2, 5))}


def _layer(layer: type[nn.Module]) -> Made:
    torch.manual_seed(0)
    model = layer().eval().requires_grad_(False).to(DTYPE)
    return model, {"x": torch.randn(3, 6, moe_models.WIDTH, dtype=DTYPE)}


def _adapted(*, use_dora: bool) -> Made:
    model, inputs = dense_models.build("llama", DTYPE)
    config = LoraConfig(
        r=4, use_dora=use_dora, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    return get_peft_model(model, config).eval().requires_grad_(False), inputs  # type: ignore[arg-type]


SHARDED = (("opt", "tp"), ("llama", "tp"), ("mixtral", "tp"), ("mixtral", "ep"))


def record(out: Path, only: str) -> None:
    """Write a folder for each model whose name has `only` in it."""
    for name, make in cases().items():
        if only in name:
            print(name, flush=True)
            _write(out / name, _facts(make))
    pair = Pair()
    try:
        for name, way in SHARDED:
            title = f"{name}-{way}-2-ranks"
            if only in title:
                print(title, flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    found = pair.run(_rank_facts, name, way, folder)
                for rank, facts in enumerate(found):
                    _write(out / title / f"rank_{rank}", facts)
    finally:
        pair.close()


def _write(folder: Path, facts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in facts.items():
        (folder / name).write_text(text)


def _facts(make: Callable[[], Made]) -> dict[str, str]:
    model, inputs = make()
    facts = _compiled(model, inputs)
    model, inputs = make()
    facts["eager.txt"] = _said(lambda: _packed(model, inputs))
    with tempfile.TemporaryDirectory() as folder:
        facts["saved.txt"] = _said(lambda: _saved(model, Path(folder)))
        facts["export.txt"] = _said(lambda: _exported(make, Path(folder)))
    return facts


def _rank_facts(name: str, way: str, folder: str) -> dict[str, str]:
    torch.manual_seed(0)
    model = sharded(name, DTYPE, Path(folder), way)
    vocabulary = moe_models.VOCAB if name == "mixtral" else dense_models.VOCAB
    return _compiled(model, {"input_ids": torch.randint(1, vocabulary, (2, 5))})


def _compiled(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, str]:
    """The plan and graph of each part that Dynamo captured, and the digest of the result."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        options = {"min_elements": 0, "inner_backend": "eager", "debug_dir": folder}
        call = torch.compile(model, backend="finequant", options=options)
        facts = {"compiled.txt": _said(lambda: _digest(_first(call, inputs)))}
        dumps = sorted(Path(folder).rglob("report.json"), key=lambda p: p.stat().st_mtime_ns)
        plans = [_stable(json.loads(path.read_text())) for path in dumps]
        texts = [next(path.parent.glob("*_lower.after.py")).read_text() for path in dumps]
        graphs = [_PLACE.sub("", text) for text in texts]
    facts["plan.json"] = json.dumps(plans, indent=1)
    facts["graph.py"] = "\n".join(graphs)
    return facts


def _first(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    return next(value for value in output.to_tuple() if isinstance(value, Tensor))


def _packed(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    fqcompile.quantize_(model, min_elements=0)
    return _digest(_first(model, inputs))


def _saved(model: nn.Module, folder: Path) -> str:
    return _tensors(fqcompile.save(model, folder / "saved"))


def _exported(make: Callable[[], Made], folder: Path) -> str:
    """From the dense checkpoint that transformers writes."""
    model, _ = make()
    if not hasattr(model, "save_pretrained"):
        return "no checkpoint of Hugging Face"
    model.save_pretrained(folder / "dense")
    fqcompile.export(folder / "dense", folder / "export", min_elements=0)
    return _tensors(folder / "export")


def _tensors(folder: Path) -> str:
    return "\n".join(_lines(folder)) + "\n"


def _lines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name)
                yield f"{name} {value.dtype} {tuple(value.shape)} {_digest(value)}"


def _digest(value: Tensor) -> str:
    plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def _said(make: Callable[[], str]) -> str:
    """What it gives, or the refusal: that is to stay too."""
    try:
        return make()
    except FineQuantError as error:
        return _TEMPORARY.sub("FOLDER", f"{type(error).__name__}: {error}")


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in _VARIES}
    return [_stable(v) for v in value] if isinstance(value, list) else value


def compare(before: Path, after: Path) -> int:
    """Print how each file differs; the number of those that do."""
    names = {p.relative_to(root) for root in (before, after) for p in root.rglob("*.*")}
    unlike = 0
    for name in sorted(names):
        old, new = ((r / name).read_text() if (r / name).exists() else "" for r in (before, after))
        if old != new:
            unlike += 1
            lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))
            print(f"{name}: {len(lines)} lines", *lines[:12], sep="\n  ")
    print(f"{unlike} of {len(names)} files differ")
    return unlike


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.gate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write what the package makes of the models")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="", help="models whose name contains this text")
    comparing = commands.add_parser("compare", help="show which files of two records differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return int(compare(given.before, given.after) > 0)
    logging.getLogger("fqcompile").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("FQCOMPILE_CACHE_DIR", cache)
        record(given.out, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
