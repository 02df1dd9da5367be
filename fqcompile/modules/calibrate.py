"""Run a model on data, or on random token ids, and collect the inputs of its weights."""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fqcompile.distributed.shards import team_of
from fqcompile.errors import FineQuantError, OptionError, ShardingError
from fqcompile.modules.inputs import Collect, WeightInputs, without_shortcuts
from fqcompile.modules.weights import ModuleWeight
from fqcompile.passes.naming import begin_token_of
from fqcompile.passes.probe_inputs import ROWS, TOKENS
from fqcompile.quant.calibration import (
    Calibration,
    Moments,
    fixed_random_numbers,
    over_ranks,
    token_generator,
    token_ids,
)
from fqcompile.torch_compat import plain_module

log = logging.getLogger("fqcompile")

# Of a model: `run(batches, weights, collect)`, as `collect_inputs` has them.
Run = Callable[[Iterable[object], Iterable[ModuleWeight], Collect], None]

_PASS = (
    "pass calibration=inputs, a tensor, a dict of keyword arguments or an iterable of such, or "
    "calibration=None"
)


def collect_inputs(
    model: nn.Module,
    batches: Iterable[object],
    weights: Iterable[ModuleWeight],
    collect: Collect,
) -> None:
    """Call `collect(weight, expert, x)` for each product of a weight while the batches run.

    x is [..., K]; of a matrix the expert is 0. What runs is a copy of the model that has its
    parameters alone, in evaluation mode: buffers, caches, counters and hooks' state stay as they
    are, and so do random numbers.

    Args:
        batches: what the model is called with: a tensor, a dict of keyword arguments, or a tuple
            or list of positional ones.
        weights: of this model; those of other names are not told.
    """
    found = list(weights)
    plain = plain_module(model)
    own = copy_of(plain, plain.parameters()).eval()
    devices = {weight.weight.device for weight in found}
    for batch in batches:  # made outside: by code that may draw random numbers, or run the model
        with fixed_random_numbers(devices), without_shortcuts(), WeightInputs(found, collect):
            call(own, batch)


class _Detaching(TorchFunctionMode):
    """Copies results that a model keeps, such as a loss, which PyTorch refuses if it has a grad."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = made = tensor.detach().clone()
        return made


def copy_of(model: nn.Module, shared: Iterable[object]) -> nn.Module:
    """A model with these very objects, and copies of all else that a call may write to.

    Raises:
        FineQuantError: it holds something that cannot be copied.
    """
    try:
        with _Detaching():
            return copy.deepcopy(model, {id(own): own for own in shared})
    except Exception as error:  # of anybody's __deepcopy__ or __getstate__
        raise FineQuantError(
            f"a copy of the model is run to calibrate it, and {type(model).__name__} cannot be "
            f"copied: {type(error).__name__}: {error}; take out for the time what does not let "
            "copy.deepcopy(model) work, or pass calibration=None"
        ) from error


def call(model: nn.Module, batch: object) -> None:
    """Run the model on a batch, which is as `collect_inputs` takes them."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def calibrated(
    model: nn.Module,
    weights: Iterable[ModuleWeight],
    calibration: Any,
    run: Run | None = None,
) -> dict[str, Calibration]:
    """By name, what each weight is to be quantized with, from the inputs that came to it.

    Ranks of a sharded model run together, and agree on what each of them has whole.

    Args:
        calibration: "synthetic", None, or batches as `batches_of` takes them. Where the model does
            not run on random ids, a warning says so, and weights are quantized from their values.
        run: another way to run the model on batches than `collect_inputs`; what fails in it is
            raised.

    Raises:
        OptionError: it is another word.
    """
    if calibration is None:
        return {}
    if isinstance(calibration, str) and calibration != "synthetic":
        raise OptionError(
            f"calibration is {calibration!r}, and without compiling there is no call: pass its "
            "inputs themselves, calibration=inputs; also allowed: 'synthetic', None"
        )
    found, source = list(weights), "synthetic" if isinstance(calibration, str) else "batches"

    def own() -> dict[str, Moments] | str:
        return _moments(model, found, calibration, run)

    try:
        results = team_of(weight.parameter for weight in found).together(own)
    except ShardingError as error:
        results = [str(error)]
    for failed in (result for result in results if isinstance(result, str)):
        log.warning("weights are quantized from their values alone: %s; %s", failed, _PASS)
        return {w.name: Calibration(asked=source, source=f"none: {failed}") for w in found}
    each = [result for result in results if not isinstance(result, str)]
    calibrations = {}
    for weight in found:
        column = weight.parameter.dim() - (2 if weight.transposed else 1)
        total, row = over_ranks([m[weight.name] for m in each], weight.parameter, column)
        calibrations[weight.name] = Calibration.of(total, source, source, row)
    return calibrations


def _moments(
    model: nn.Module, weights: Sequence[ModuleWeight], calibration: Any, given: Run | None
) -> dict[str, Moments] | str:
    """By name; or why the model does not run on random ids; given batches raise what they raise."""
    moments = {weight.name: Moments(weight.matrix.shape) for weight in weights}
    run = given or partial(collect_inputs, model)

    def collect(weight: ModuleWeight, expert: int, x: Tensor) -> None:
        moments[weight.name].add(x, expert)

    if not isinstance(calibration, str):
        run(batches_of(calibration), weights, collect)
        return moments
    try:
        run([random_batch(plain_module(model))], weights, collect)
    except Exception as error:
        if given is not None:
            raise
        log.debug("a model did not run on random ids", exc_info=True)
        return f"random ids do not run: {type(error).__name__}: {error}"
    return moments


def random_batch(model: nn.Module) -> dict[str, Any]:
    """32 sequences of 16 ids, as a compiled graph with symbolic sizes is run on them.

    Each begins with the begin token of the model's config, if it has one; the others are random.

    Raises:
        ValueError: the model's forward takes no `input_ids`, or it has no table of tokens.
    """
    model = _taking_ids(model)
    accepted = inspect.signature(model.forward).parameters
    table = _table_of(model)
    if table is None:
        raise ValueError(f"{type(model).__name__} has no embedding whose rows its input_ids name")
    tables, shape = {"input_ids": table}, (ROWS // TOKENS, TOKENS)
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        tables["decoder_input_ids"] = _table_of_decoder(model, table)
    device = "cpu" if table.is_meta else table.device  # meta: filled when it runs
    generator, begin = token_generator(), begin_token_of(model)
    ids = {n: token_ids(shape, len(t), generator, begin).to(device) for n, t in tables.items()}
    spared = {"use_cache": False, "logits_to_keep": 1}  # what no weight's input depends on
    return ids | {name: value for name, value in spared.items() if name in accepted}


def _table_of(model: Any) -> Tensor | None:
    """What `input_ids` name rows of: as the model says, if it does; else its largest embedding."""
    with suppress(Exception):  # transformers raises for models that it does not know enough of
        asked: Tensor = model.get_input_embeddings().weight
        return asked
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, key=len, default=None)


def _table_of_decoder(model: Any, other: Tensor) -> Tensor:
    """Its own, as where languages have a vocabulary each; the other one where it has none."""
    own = _table_of(model.get_decoder()) if hasattr(model, "get_decoder") else None
    return other if own is None else own


def _taking_ids(model: nn.Module) -> nn.Module:
    """The model, or the first one inside whose forward takes `input_ids`, if it passes keywords on.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        accepted = inspect.signature(module.forward).parameters
        if "input_ids" in accepted:
            return module
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            break
    raise ValueError(f"the forward of {type(model).__name__} takes no input_ids")


def batches_of(calibration: Any) -> Iterator[object]:
    """The batches in what a user gives: a tensor or dict is one, of anything else each item.

    Raises:
        OptionError: there is nothing in it that could be a batch, or, at the end, there was none.
    """
    if not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise OptionError(
            f"calibration is {calibration!r} ({kind}), which holds no inputs: {_PASS}"
        )
    return _some([calibration] if isinstance(calibration, Tensor | Mapping) else calibration)


def _some(batches: Iterable[object]) -> Iterator[object]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise OptionError(f"calibration is {batches!r}, which holds no batch: {_PASS}")
