"""Quantize a checkpoint by data: its model is loaded whole, run on batches, packed and saved.

text  ->  token ids [1, 512], ...  ->  quantize_(model, calibration=batches)  ->  save
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.directory import commit, stage, writing
from fqcompile.checkpoint.hugging_face import transformers
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.checkpoint.model import CheckpointModel
from fqcompile.checkpoint.save import save
from fqcompile.errors import OptionError
from fqcompile.modules.calibrate import batches_of
from fqcompile.modules.quantize import quantize_
from fqcompile.report import Plan

_TOKENS = 512  # of a sequence
_MOST = 128  # sequences of a text


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

    def quantize(
        self,
        work: CheckpointModel,
        target: Path,
        identity: str,
        files: Mapping[str, bytes],
        options: Mapping[str, object],
    ) -> Plan:
        """Write the model of a checkpoint to a directory; `identity` is kept in its manifest."""
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
        OptionError: there is no such file, or it is not of text.
    """
    if not file.is_file():
        raise OptionError(
            f'option calibration is {str(file)!r}; allowed: "synthetic", the path of a text file, '
            "None, or in Python batches"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"option calibration is {str(file)!r}, which is no UTF-8: {error}"
        ) from error
    tokenizer = transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    length = min(_TOKENS, tokenizer.model_max_length)
    ids = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
    whole = [one for one in ids["input_ids"] if len(one) == length] or ids["input_ids"][:1]
    return [torch.tensor([one]) for one in whole[:_MOST]]
