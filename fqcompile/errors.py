"""The exceptions that fqcompile raises, and how their messages suggest a name.

Each message says what was found, the rule it breaks and what to do about it. A weight that is left
as it was is no error but a record in the plan, with its reason.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'bits'?", or nothing."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class FineQuantError(Exception):
    """Base of every error of fqcompile."""


class OptionError(FineQuantError, ValueError):
    """An option has an unknown name, a wrong type or a value out of range."""


class UnquantizableWeight(FineQuantError, ValueError):
    """A weight cannot be quantized; the message is the reason shown in the report."""


class NoKernelError(FineQuantError, NotImplementedError):
    """No kernel template accepts a matmul; the message lists each template's refusal."""


class KernelBuildError(FineQuantError, RuntimeError):
    """A kernel cannot be compiled or loaded on this machine; the message is the compiler's."""


class GraphInvariantError(FineQuantError, RuntimeError):
    """A pass left a graph that breaks a rule of its stage: a bug of fqcompile."""


class CorruptEntry(FineQuantError, ValueError):
    """A file of the weight cache is not as it was written; it is removed and made again."""


class CheckpointError(FineQuantError, RuntimeError):
    """A directory of weights cannot be read or written; the message names the file or tensor."""


class RankError(FineQuantError, RuntimeError):
    """Ranks of one model do not do the same, or one does not answer; the message names them."""


class ShardingError(FineQuantError, TypeError):
    """A model is spread over ranks in a way that its weights cannot be quantized in."""


class EstimateError(FineQuantError, ValueError):
    """A model, a device or a way to share them out cannot be estimated; the message says why."""


class PlanDoesNotFit(UnquantizableWeight):
    """The weight has not the values that the plan was made for: another thread wrote to it.

    Never reaches the user: a plan is made again, at last for a copy of the weight.
    """
