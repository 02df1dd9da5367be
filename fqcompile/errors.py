"""The exceptions that fqcompile raises, and how their messages suggest a name.

Each message names the value found, the rule it breaks and the remedy. A weight that is not
quantized is not an error: the plan records it with the reason.
"""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'bits'?", or an empty string."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class FineQuantError(Exception):
    """Base class of all errors that fqcompile raises."""


class OptionError(FineQuantError, ValueError):
    """An option has an unknown name, a wrong type or a value out of range."""


class UnquantizableWeight(FineQuantError, ValueError):
    """A weight cannot be quantized; the message is the reason that the report shows."""


class NoKernelError(FineQuantError, NotImplementedError):
    """No kernel template accepts a matmul; the message lists each template's refusal."""


class KernelBuildError(FineQuantError, RuntimeError):
    """A kernel cannot be compiled or loaded on this machine; the message is the compiler's."""


class GraphInvariantError(FineQuantError, RuntimeError):
    """A pass left a graph that breaks a rule of its stage: a bug of fqcompile."""


class CorruptEntry(FineQuantError, ValueError):
    """A file of the weight cache is damaged; it is deleted and written again."""


class CheckpointError(FineQuantError, RuntimeError):
    """A directory of weights cannot be read or written; the message names the file or tensor."""


class RankError(FineQuantError, RuntimeError):
    """Ranks of one model disagree, or one does not respond; the message names them."""


class ShardingError(FineQuantError, TypeError):
    """A model is sharded in a way that does not allow quantizing its weights."""


class EstimateError(FineQuantError, ValueError):
    """A model, a device or a parallel layout cannot be estimated; the message says why."""


class PlanDoesNotFit(UnquantizableWeight):
    """The weight no longer has the values that the plan was made for: another thread wrote to it.

    Never reaches the user: planning is retried, the last time on a copy of the weight.
    """
