"""Pack the weights of a model in place, without compiling it (`quantize_`), and `restore` them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from fqcompile.config import HEAD_BITS, FineQuantConfig, SiteOptions, packing_config
from fqcompile.distributed.ranks import agree, progress
from fqcompile.distributed.shards import is_part, local_part, rank_groups, with_part
from fqcompile.errors import UnquantizableWeight
from fqcompile.hf_compat import untie
from fqcompile.kernels.registry import kernel_for
from fqcompile.modules.blocks import BlockRuns
from fqcompile.modules.calibrate import calibrated, collect_inputs
from fqcompile.modules.given import check_quantizable, check_restorable
from fqcompile.modules.gptq import Run, WeightsInputs, batches_for, check_method, compensated
from fqcompile.modules.kinds import settle_norms
from fqcompile.modules.weights import ModuleWeight, filtered, module_weights
from fqcompile.passes.summary import SiteRecipe, said_of
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import QuantPlan, scale_dtype_beside
from fqcompile.report import Plan, Site
from fqcompile.weights.disk_cache import find_or_quantize
from fqcompile.weights.fingerprint import ATTEMPTS, fingerprint
from fqcompile.weights.parameter import PackedWeight
from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import plain_eager


def quantize_(
    model: nn.Module,
    *,
    calibration: Any = "synthetic",
    method: str = "scale",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: object,
) -> Plan:
    """Replace the weights of linears, attention, recurrent cells and experts with packed ones.

    The model then runs eagerly and under every torch.compile backend, including "finequant", which
    uses the packed weights as they are. A linear that shares its weight with a table gets a packed
    copy, unless `quantize_embeddings=8` packs it for both. Weights that PyTorch's norms compute are
    parameters then, in evaluation mode. Packed weights cannot be trained; adapters on top of them
    can. They are packed one at a time, so peak memory is the model plus one weight; with "gptq",
    plus up to 4 GiB. Of a sharded model all ranks must call this, and each packs its own shards.

    Args:
        calibration: what the model is run on first, to see in which columns of its weights errors
            count most: "synthetic", random token ids, if its forward takes `input_ids`; your own
            inputs, as a tensor, a dict of keyword arguments, or an iterable of such; or None, not
            at all. A copy that shares the parameters runs, so that buffers, caches, the training
            mode and random numbers stay as they are.
        method: "scale" rounds each weight, at the best scales. "gptq" needs your own inputs: codes
            of 4 bits make up for each other's errors, where 512 rows or more came to a weight, or
            expert; some thousand are better. What an interrupted run had made is found on disk.
        filter_fn: called with the module that holds a weight and its qualified name, as torchao
            does; weights for which the result is false stay, with that reason in the plan.
        options: the fields of `FineQuantConfig` that choose which weights are quantized, and how.

    Returns:
        A plan with one row per weight: how it was quantized, or why it was skipped.

    Raises:
        OptionError: `model` is none, or an option is unknown, not allowed or only of compiling.
        UnquantizableWeight: a weight cannot be quantized and `on_unsupported="error"`.
        ShardingError: FSDP wraps the model or a part of it; or it is sharded, for "gptq".
        RankError: ranks of a sharded model used different options or plans.
    """
    known = calibration is None or isinstance(calibration, str)
    config = packing_config(options | {"calibration": calibration} if known else options)
    check_quantizable(model)
    check_method(method, calibration)
    settle_norms(model, config, filter_fn)
    waiting = filtered(module_weights(model, config), filter_fn)
    sites = _pack_on_all_ranks(model, waiting, config, calibration, method)
    untie(model)
    return Plan(tuple(sites), config.as_dict() | ({} if known else {"calibration": "batches"}))


def _pack_on_all_ranks(
    model: nn.Module,
    waiting: list[ModuleWeight],
    config: FineQuantConfig,
    calibration: Any,
    method: str,
) -> list[Site]:
    found = worth_it(waiting, config)
    batches = batches_for(method, calibration, found)
    whole = {w.name for w in waiting if not is_part(w.parameter)}
    groups = rank_groups(weight.parameter for weight in waiting)
    if batches is None:
        calibrations = calibrated(model, found, calibration)
        del found  # a list of them all would hold every original until the end
        sites = _pack_all(waiting, config, calibrations)
    else:
        del found
        sites = _compensate_all(model, waiting, config, batches)
    agree("what quantize_ packs", _shared_facts(sites, whole, config), groups)
    return sites


def _pack_all(
    waiting: list[ModuleWeight], config: FineQuantConfig, calibrations: Mapping[str, Calibration]
) -> list[Site]:
    """The rows of the weights, which are taken from the list."""
    sites = []
    waiting.reverse()
    with _bar(len(waiting)) as bar:
        while waiting:
            found = waiting.pop()
            sites.append(_pack(found, config, calibrations.get(found.name)))
            bar.update()
    return sites


def _compensate_all(
    model: nn.Module,
    waiting: list[ModuleWeight],
    config: FineQuantConfig,
    batches: Sequence[object],
) -> list[Site]:
    """The same by GPTQ: block by block, then what lies in none that the batches came to."""
    sites, names, runs = {}, [weight.name for weight in waiting], BlockRuns(model)
    calibrations = calibrated(model, worth_it(waiting, config), batches, runs.collect)
    with _bar(len(names)) as bar:

        def pack(weights: list[ModuleWeight], run: Run) -> None:
            inputs = WeightsInputs(run, worth_it(weights, config))
            for weight in weights:
                calibration = calibrations.get(weight.name)
                sites[weight.name] = _pack(weight, config, calibration, inputs)
                bar.update()

        with closing(runs.blocks(batches)) as blocks:
            for block in blocks:
                inside = block.of(waiting)
                held = {weight.name for weight in inside}
                waiting[:] = [weight for weight in waiting if weight.name not in held]
                pack(inside, block.collect)
        pack(waiting, partial(collect_inputs, model, batches))
    return [sites[name] for name in names]


def _bar(weights: int) -> "tqdm[object]":
    bar: tqdm[object] = progress(desc="fqcompile: packing", total=weights, unit="weight", delay=2)
    return bar


def worth_it(weights: Sequence[ModuleWeight], config: FineQuantConfig) -> list[ModuleWeight]:
    """Those packed to less than 8 bits, whose errors are small anyway."""
    waiting = (weight for weight in weights if weight.reason is None)
    return [w for w in waiting if config.site_options(w.name, head=w.head).bits < HEAD_BITS]


def _shared_facts(
    sites: Sequence[Site], whole: Collection[str], config: FineQuantConfig
) -> dict[str, str]:
    """The facts that must agree on all ranks; for a shard, each rank chooses its own plan."""
    facts = {f"option {name}": str(value) for name, value in config.as_dict().items()}
    for site in sites:
        chosen = (site.status, site.reason, site.bits, site.levels, site.group_size)
        facts[site.name] = str(chosen) if site.name in whole else site.kind
    return facts


def _pack(
    found: ModuleWeight,
    config: FineQuantConfig,
    calibration: Calibration | None,
    inputs: WeightsInputs | None = None,
) -> Site:
    site, packed = packed_of(found, config, calibration, inputs)
    if packed is not None:
        found.put(with_part(found.parameter, packed))
    return site


def packed_of(
    found: ModuleWeight,
    config: FineQuantConfig,
    calibration: Calibration | None = None,
    inputs: WeightsInputs | None = None,
) -> tuple[Site, PackedWeight | None]:
    """The plan's row for a weight, and what replaces it; None if it stays.

    Raises:
        UnquantizableWeight: it has to stay, and `on_unsupported="error"`.
    """
    if found.reason is not None:
        return replace(site_of(found), reason=found.reason), None
    try:
        options = config.site_options(found.name, head=found.head)
        plan, packed = _pack_weight(found, options, calibration, inputs)
    except UnquantizableWeight as error:
        if config.on_unsupported == "error":
            raise UnquantizableWeight(f"{found.name}: {error}") from error
        return replace(site_of(found), reason=str(error)), None
    site = packed_site(found, plan, packed)
    # What GPTQ makes cannot be made again of the weight and its plan.
    return (site if inputs is None else replace(site, recipe=None)), packed


def _pack_weight(
    found: ModuleWeight,
    options: SiteOptions,
    calibration: Calibration | None,
    inputs: WeightsInputs | None,
) -> tuple[QuantPlan, PackedWeight]:
    """Choose bits and groups of a weight and quantize it, on its device.

    Raises:
        UnquantizableWeight: the values or the options do not allow it; the message says why.
    """
    for _ in range(ATTEMPTS):
        before = fingerprint((found.weight,))
        result = _packed(found, options, calibration, inputs)
        if fingerprint((found.weight,)) == before:
            return result
    # Packing a copy would replace a weight that is still being written to, and lose the writes.
    raise UnquantizableWeight(
        f"another thread changed the weight {ATTEMPTS} times while it was quantized; let it finish "
        "first"
    )


def _packed(
    found: ModuleWeight,
    options: SiteOptions,
    calibration: Calibration | None,
    inputs: WeightsInputs | None,
) -> tuple[QuantPlan, PackedWeight]:
    weight = found.weight
    with plain_eager(weight.device.type):
        scale_dtype = scale_dtype_beside(weight.dtype)
        h = None if calibration is None else calibration.h
        plan, codes = find_or_quantize(found.matrix, options, scale_dtype, h)
        plan = replace(plan, calibration=calibration)
        if inputs is not None:
            plan, codes = compensated(found, (plan, codes), inputs, options.error_budget)
        codes = codes.changed(transposed=found.transposed)
        packed = PackedWeight.of(codes, weight.dtype, found.name)
    return plan, packed


def site_of(found: ModuleWeight) -> Site:
    """The plan's row for a weight that is skipped."""
    nbytes = found.weight.numel() * found.weight.element_size()
    return Site(
        name=found.name,
        kind=found.kind,
        shape=tuple(found.matrix.shape),
        status="kept",
        bytes_before=nbytes,
        bytes_after=nbytes,
    )


def packed_site(found: ModuleWeight, plan: QuantPlan, packed: PackedWeight) -> Site:
    """The plan's row for a weight that was packed."""
    recipe = IDENTITY.then("transpose", -2, -1) if found.transposed else IDENTITY
    scale, device = packed.scale.dtype, packed.device
    return replace(
        site_of(found),
        status="quantized",
        bits=plan.bits,
        levels=plan.levels,
        group_size=plan.group_size,
        bytes_after=packed.packed_bytes,
        **said_of(plan),
        kernel=kernel_for(packed.format, packed.dtype, scale, device, None),
        recipe=SiteRecipe(recipe, (found.name,), plan, of_tables=found.of_tables),
    )


def restore(model: nn.Module) -> nn.Module:
    """Replace each packed parameter with a dense one of its dequantized values; return `model`.

    The model can then be run, saved and copied like any other. Each weight has the dtype of its
    packed parameter, so memory use grows to that of the model before it was packed.

    Raises:
        FineQuantError: `model` is none, or packed weights are elsewhere, as accelerate's hooks do.
    """
    check_restorable(model)
    dense: dict[Tensor, nn.Parameter] = {}  # a tied weight stays tied
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            packed = local_part(weight)
            if isinstance(packed, PackedWeight):
                if weight not in dense:
                    values = with_part(weight, packed.dequantized().contiguous())
                    dense[weight] = nn.Parameter(values, False)
                setattr(module, name, dense[weight])
    return model
