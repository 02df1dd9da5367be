"""Quantize a checkpoint by data: its model is run on batches, block by block, or else whole.

text  ->  token ids [1, 512], ...  ->  each block in turn: h of its weights
                                   ->  with GPTQ, once more: its second moments, codes, a shard
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fqcompile.checkpoint.directory import commit, stage, writing
from fqcompile.checkpoint.held import HeldWeights
from fqcompile.checkpoint.hugging_face import transformers
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.checkpoint.model import CheckpointModel, slots
from fqcompile.checkpoint.save import save
from fqcompile.checkpoint.source import read_config
from fqcompile.checkpoint.stream_writer import StreamWriter
from fqcompile.config import FineQuantConfig
from fqcompile.errors import CheckpointError, FineQuantError, OptionError
from fqcompile.modules.blocks import Block, BlockRuns, parts
from fqcompile.modules.calibrate import batches_of, calibrated
from fqcompile.modules.gptq import GPTQ, WeightsInputs, batches_for
from fqcompile.modules.quantize import quantize_, worth_it
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.options import one_of
from fqcompile.quant.calibration import Calibration
from fqcompile.report import Plan
from fqcompile.weights.parameter import PackedWeight

_TOKENS = 512  # of a sequence
_MOST = 128  # sequences of a text


class RunsWhole(FineQuantError):
    """The model of a checkpoint cannot be run block by block; the message says why."""

    def announced(self, work: CheckpointModel) -> str:
        """What to say before the model is loaded whole.

        Raises:
            CheckpointError: there is less memory than it takes.
        """
        tensors = {id(slot.tensor): slot.tensor for slot in slots(work.model)}.values()
        needed, there = sum(tensor.nbytes for tensor in tensors), _available_memory()
        text = (
            f"{work.name} does not run block by block ({self}), so it has to be loaded whole, "
            f"which takes {needed / 2**30:.1f} GiB"
        )
        if there is not None and needed > there:
            raise CheckpointError(
                f"{text}, and {there / 2**30:.1f} GiB are available: give calibration=None, with "
                "which no model is run, or use a machine with more memory"
            )
        return text


@dataclass(frozen=True)
class Data:
    """What a model is run on, and the method that uses it; see `quantize_`.

    Attributes:
        calibration: "synthetic", or batches.
        digest: another for other data or another method.
    """

    calibration: Any = field(repr=False)
    method: str
    digest: str

    @property
    def source(self) -> str:
        """The option in the plan."""
        return self.calibration if isinstance(self.calibration, str) else "batches"

    def by_blocks(self, work: CheckpointModel, config: FineQuantConfig) -> "BlockData":
        """Run the model on the data; one of its blocks is in memory at a time.

        Raises:
            RunsWhole: it does not run so.
        """
        weights = worth_it(module_weights(work.computed, config), config)
        batches_for(self.method, self.calibration, weights)
        where = {module: name for name, part in parts(work.model) for module in part.modules()}
        for weight in weights:
            holders = {where.get(module) for module, _ in weight.holders}
            if len(holders) > 1 or None in holders:
                raise RunsWhole(f"{weight.name} is not a weight of one block alone")
        runs = BlockRuns(work.model, HeldWeights(work), buffers=True)
        try:
            found = calibrated(work.model, weights, self.calibration, runs.collect)
        except FineQuantError:
            raise
        except Exception as error:
            raise RunsWhole(f"{type(error).__name__}: {error}") from error
        return BlockData(self, config, runs, found)

    def quantize(
        self,
        work: CheckpointModel,
        target: Path,
        identity: str,
        files: Mapping[str, bytes],
        options: Mapping[str, object],
    ) -> Plan:
        """Load the model whole, and write it; `identity` is kept in the manifest."""
        found: Any = type(work.model)
        directory = work.source.directory
        model = found.from_pretrained(directory, dtype=work.dtype, local_files_only=True).eval()
        given: Any = options
        plan = quantize_(model, calibration=self.calibration, method=self.method, **given)
        save(model, target, plan=plan)
        saved = read_manifest(target)
        with writing(target, keep=saved.generation):
            more = {name: text for name, text in files.items() if name not in saved.files}
            stage(target, saved.generation, more)
            about = {**saved.model, "source": identity}
            commit(target, replace(saved, model=about, files=(*saved.files, *more)))
        return plan


@dataclass(frozen=True)
class BlockData:
    """What came of running a model block by block, to quantize its weights with."""

    data: Data
    config: FineQuantConfig
    runs: BlockRuns
    calibrations: Mapping[str, Calibration]

    def write_blocks(self, writer: StreamWriter) -> None:
        """With GPTQ, write the weights of all blocks; the rest is left to `writer.write`."""
        writer.calibrations = self.calibrations
        if self.data.method != GPTQ:
            return
        left = {found.name: found for found in writer.found if found.reason is None}
        label = "fqcompile: GPTQ"
        bar: Any = tqdm(desc=label, total=len(left), unit="weight", disable=None)
        with bar, closing(self.runs.blocks(self.data.calibration)) as blocks:
            for block in blocks:
                own = block.of(left.values())
                self._write_block(block, own, writer)
                for found in own:
                    del left[found.name]
                bar.update(len(own))
        # no row comes to these
        writer.inputs = WeightsInputs(
            lambda weights, collect: None, worth_it(list(left.values()), self.config)
        )

    def _write_block(
        self, block: Block, weights: Sequence[ModuleWeight], writer: StreamWriter
    ) -> None:
        """Write its weights and pack them; of a block that is written, read them."""
        inputs = WeightsInputs(block.collect, worth_it(weights, self.config))
        written = writer.has(weight.name for weight in weights)
        for weight in weights:
            codes = writer.packed_before(weight.name) if written else writer.pack(weight, inputs)
            if codes is not None:
                packed = PackedWeight.of(codes, weight.weight.dtype, weight.name)
                for module, attribute in weight.holders:
                    module._parameters[attribute] = nn.Parameter(packed, requires_grad=False)


def _available_memory() -> int | None:
    """Bytes that can be had without swapping, as Linux says; None elsewhere."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) << 10


def without_data(options: Mapping[str, object]) -> dict[str, object]:
    """The options of `quantize_checkpoint` that are fields of FineQuantConfig."""
    return {n: option for n, option in options.items() if n not in ("calibration", "method")}


def data_of(
    directory: Path, *, calibration: Any = None, method: Any = "scale", **_: object
) -> Data | None:
    """Of the options of `quantize_checkpoint`; None if there is no calibration.

    Args:
        calibration: also the path of a text file, for the tokenizer in `directory`.

    Raises:
        OptionError: it is no such thing, or there is none and the method needs some.
    """
    one_of("scale", GPTQ)("method", method)
    if calibration is None:
        if method != "scale":
            raise OptionError(
                f"option method is {method!r}, and calibration is None: give calibration a text "
                'file or batches, or use method "scale"'
            )
        return None
    if isinstance(calibration, str | PathLike) and calibration != "synthetic":
        calibration = _batches_of_text(Path(calibration), directory)
    elif not isinstance(calibration, str):
        calibration = list(batches_of(calibration))
    content = io.BytesIO()
    torch.save(calibration, content)
    digest = sha256(f"{method} ".encode() + content.getvalue()).hexdigest()
    return Data(calibration, method, digest)


def _batches_of_text(file: Path, directory: Path) -> list[Tensor]:
    """Token ids [1, 512], each with the special tokens of a sequence; a shorter rest is left out.

    Raises:
        OptionError: there is no such file, it is not of text or has none, or no tokenizer.
    """
    asked = f"option calibration is {str(file)!r}"
    if not file.is_file():
        raise OptionError(
            f'{asked}, and there is no such file; allowed: "synthetic", the path of a text file, '
            "None, or in Python batches"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{asked}, which is no UTF-8: {error}") from error
    if not text.strip():
        raise OptionError(f"{asked}, which holds no text: give it one of some thousand words")
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{asked}, a text, and {directory} has no tokenizer that transformers loads: copy the "
            "model's tokenizer files there, or in Python give batches of token ids"
        ) from error
    length = min(_TOKENS, tokenizer.model_max_length, _positions(read_config(directory)))
    ids = _sequences(tokenizer, text, length)
    whole = [one for one in ids if len(one) == length] or ids[:1]
    return [torch.tensor([one]) for one in whole[:_MOST]]


def _sequences(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """The whole text in pieces of so many tokens; only those of Rust can make pieces themselves."""
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
        sequences: list[list[int]] = made["input_ids"]
        return sequences
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = length - tokenizer.num_special_tokens_to_add()
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [tokenizer.build_inputs_with_special_tokens(piece) for piece in pieces]


def _positions(config: Mapping[str, Any]) -> int:
    """How long a sequence of the model may be, where its config says so."""
    own = config.get("text_config", config)
    given = [own.get(name) for name in ("max_position_embeddings", "n_positions")]
    return min((n for n in given if isinstance(n, int) and n > 0), default=_TOKENS)
