"""Calibration by a probe: what h is, what it leaves alone, and that it fails no compilation."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from fqcompile.passes import probe as probe_module
from fqcompile.passes.probe import Probe
from fqcompile.passes.probe_inputs import copied
from fqcompile.report import Site, clear_reports
from fqcompile.weights.store import STORE
from tests.helpers import finequant, frozen, report

VOCAB, WIDTH = 50, 32
OPTIONS: dict[str, Any] = {"min_elements": 1, "granularity": 32}
ROUNDING = 2.0**-8  # h has eight bits


def _compiled(model: nn.Module, *args: Any, dynamic: bool | None = False, **options: Any) -> Any:
    torch._dynamo.reset()
    clear_reports()
    with torch.no_grad():
        return finequant(model, dynamic=dynamic, fullgraph=False, **OPTIONS, **options)(*args)


def _sites() -> dict[str, Site]:
    return {s.name: s for found in fqcompile.reports() for s in found.sites if s.bits == 4}


def _h(site: Site) -> Tensor:
    return site.recipe.plan.calibration.h  # type: ignore[union-attr]


def _blended(x: Tensor) -> Tensor:
    mean = x.reshape(-1, x.shape[-1]).double().square().mean(0)
    return mean / mean.mean() / 2 + 0.5


def _assert_h(h: Tensor, x: Tensor) -> None:
    # the forward in fp32 is off by less than the rounding of h
    torch.testing.assert_close(h.double(), _blended(x), rtol=2 * ROUNDING, atol=0)


class Tokens(nn.Module):
    """Two layers behind an embedding, whose columns differ in size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.table.weight.data *= torch.rand(WIDTH).mul(6).exp()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids))))


IDS = torch.arange(14).view(2, 7)


def test_h_of_the_call_is_that_of_a_plain_forward() -> None:
    model = frozen(Tokens())
    _compiled(model, IDS, calibration="first_call")
    sites, exact = _sites(), copy.deepcopy(model).double()
    x = exact.table(IDS)
    _assert_h(_h(sites["up.weight"]), x)
    _assert_h(_h(sites["down.weight"]), torch.relu(exact.up(x)))
    assert {(s.calibration, s.calibration_rows) for s in sites.values()} == {("first_call", 14)}


def test_random_ids_come_from_a_fixed_seed_for_enough_rows() -> None:
    model, exact = frozen(Tokens()), Tokens().double()
    state = torch.get_rng_state()
    _compiled(model, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(0)
    runs = [torch.randint(0, VOCAB, (2, 7), generator=generator) for _ in range(9)]
    sites = _sites()
    _assert_h(_h(sites["up.weight"]), exact.table(torch.stack(runs)))
    assert {(s.calibration, s.calibration_rows) for s in sites.values()} == {("synthetic", 126)}


class Typed(Tokens):
    """A second input of ids, of the types of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, WIDTH)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids) + self.types(types))))


class Around(nn.Module):
    """What a model may be wrapped in, with a config of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, {"bos_token_id": 4}

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(*args)


def _config(token: object) -> SimpleNamespace:
    return SimpleNamespace(bos_token_id=token)


def _of_text() -> SimpleNamespace:
    return SimpleNamespace(bos_token_id=5, get_text_config=lambda: _config(1))


def _of_two_texts() -> SimpleNamespace:
    def two() -> None:
        raise ValueError("ambiguous")

    return SimpleNamespace(bos_token_id=1, get_text_config=two)


class _Own:
    """A config of other code, which may raise anything."""

    def get_text_config(self, decoder: bool) -> None:
        """In another form than that of transformers."""

    @property
    def bos_token_id(self) -> int:
        raise KeyError("bos_token_id")


@pytest.mark.parametrize(
    ("make", "config", "begins"),
    [
        (Tokens, _config(1), True),
        (Tokens, _config([1, 2]), True),
        (Tokens, _of_text(), True),
        (Tokens, _of_two_texts(), True),
        (Tokens, _config(None), False),
        (Tokens, _config(VOCAB), False),
        (Tokens, {"bos_token_id": 1}, False),
        (Tokens, _Own(), False),
        (Typed, _config(1), True),
    ],
)
@pytest.mark.parametrize("wrap", [lambda m: m, Around, lambda m: lambda *args: m(*args)])
def test_sequences_begin_with_the_begin_token(
    make: Callable[[], Any], config: Any, begins: bool, wrap: Callable[[nn.Module], Any]
) -> None:
    model, exact = frozen(make()), make().double()
    model.config = config
    types = (IDS % 2,) if make is Typed else ()
    _compiled(wrap(model), IDS, *types)
    generator, runs = torch.Generator().manual_seed(0), []
    for _ in range(9):
        ids = torch.randint(0, VOCAB, (2, 7), generator=generator)
        ids[:, 0] = 1 if begins else ids[:, 0]
        x = exact.table(ids)
        if types:  # of no begin
            x = x + exact.types(torch.randint(0, 2, (2, 7), generator=generator))
        runs.append(x)
    (h,) = (_h(site) for name, site in _sites().items() if name.endswith("up.weight"))
    _assert_h(h, torch.stack(runs))


@pytest.mark.parametrize("length", [1, 9])
def test_ids_without_sequences_have_no_begin(length: int) -> None:
    found = []
    for token in (None, 1):
        model = frozen(Tokens())
        model.config = _config(token)
        _compiled(model, torch.arange(9) if length > 1 else torch.arange(9)[:, None])
        found.append(_h(_sites()["up.weight"]))
    assert torch.equal(*found)


@pytest.mark.parametrize("dynamic", [True, False])
def test_symbolic_sizes_are_those_of_many_short_sequences(dynamic: bool) -> None:
    _compiled(frozen(Tokens()), torch.arange(40).repeat(2, 16), dynamic=dynamic)
    # static: 2 x 640 in one run; symbolic: 32 x 16
    assert {s.calibration_rows for s in _sites().values()} == {512 if dynamic else 1280}


class Bags(Tokens):
    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(F.embedding_bag(ids, self.table.weight, offsets))))


class Biased(Tokens):
    """A second table, of one dimension and of fewer rows than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.rand(16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids) + self.bias[ids][..., None])))


class Columns(Tokens):
    """Ids along the second dimension of a table, which has more rows than columns."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table.weight[:, ids].T[:, :WIDTH])))


class Picked(Tokens):
    """Ids that also pick from a row shorter than the table."""

    def forward(self, ids: Tensor) -> Tensor:
        picked = self.table.weight.sum(1)[:14].expand(2, 14).gather(1, ids)
        return self.down(torch.relu(self.up(self.table(ids) + picked[..., None])))


class Selected(Tokens):
    """The same by indexing what is computed, and through a view."""

    def forward(self, ids: Tensor) -> Tensor:
        picked = self.table.weight.sum(1)[:14][ids.flatten()].view(2, 7, 1)
        return self.down(torch.relu(self.up(self.table(ids) + picked)))


class Scored(Tokens):
    """Ids that pick behind the last product, which the probe does not run."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids)))).gather(2, ids[..., None])


class Read(Tokens):
    """An integer input that is read, by indices that are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(14).view(2, 7).flip(0))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table.weight[:2] + numbers[self.order].sum())))


@pytest.mark.parametrize(
    ("make", "args", "source"),
    [
        (Bags, (torch.arange(20), torch.tensor([0, 4, 4, 9])), "first_call"),
        (Biased, (torch.arange(14).view(2, 7),), "synthetic"),
        (Columns, (torch.arange(14),), "first_call"),
        (Picked, (torch.arange(14).view(2, 7),), "first_call"),
        (Selected, (torch.arange(14).view(2, 7),), "first_call"),
        (Scored, (torch.arange(14).view(2, 7),), "synthetic"),
        (Read, (torch.arange(14),), "first_call"),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_integers_of_other_meaning_stay_in_their_bounds(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], source: str, dynamic: bool
) -> None:
    _compiled(frozen(make()), *args, dynamic=dynamic)
    assert {s.calibration for s in _sites().values()} == {source}


class Shared(Tokens):
    """One matrix that is read as a stack, by rows that differ in size."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * torch.stack([torch.ones(WIDTH), torch.arange(WIDTH)])[:, None]
        stack = self.up.weight.expand(2, 64, WIDTH).view(2, 64, WIDTH)
        return torch.bmm(stack, x.mT)


def test_one_matrix_read_as_a_stack_has_one_h_and_one_set_of_codes() -> None:
    model = frozen(Shared())
    actual = _compiled(model, IDS)
    (site,) = _sites().values()
    h = _h(site)
    assert h.shape == (2, WIDTH) and torch.equal(h[0], h[1]) and h[0].unique().numel() > 1
    plain = fqcompile.fake_quantize_(copy.deepcopy(model), report())
    torch.testing.assert_close(actual, plain(IDS), rtol=1e-5, atol=1e-4)


def test_without_calibration_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "run", None)
    _compiled(frozen(Tokens()), IDS, calibration=None)
    assert {s.calibration for s in _sites().values()} == {None}
    packed = frozen(Tokens())
    fqcompile.quantize_(packed, calibration=None, **OPTIONS)
    _compiled(packed, IDS)
    assert len(_sites()) == 2


def test_eight_bits_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "run", None)
    _compiled(frozen(Tokens()), IDS, bits=8)
    assert {s.calibration for s in report().sites} == {None}


def test_other_graphs_of_known_weights_use_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(Tokens())
    first = _compiled(model, IDS)
    h = _h(_sites()["up.weight"])
    monkeypatch.setattr(Probe, "run", None)
    assert torch.equal(_compiled(model, IDS), first)  # compiled anew, after a reset
    _compiled(model, IDS[:1, :3])
    assert torch.equal(_h(_sites()["up.weight"]), h)


def test_fake_quantized_codes_are_those_of_the_compiled_model() -> None:
    model = frozen(Tokens())
    actual = _compiled(model, IDS)
    plain = fqcompile.fake_quantize_(copy.deepcopy(model), report())
    torch.testing.assert_close(actual, plain(IDS), rtol=1e-5, atol=1e-5)
    alone = _compiled(copy.deepcopy(model), IDS, calibration=None)
    assert not torch.allclose(actual, alone, rtol=1e-3)


class Up(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.table(ids))


def test_calibrating_lowers_the_error_of_the_result() -> None:
    model = frozen(Up())
    ids = torch.randint(0, VOCAB, (20, 9), generator=torch.Generator().manual_seed(5))
    exact = model(ids)
    errors = [
        float((_compiled(copy.deepcopy(model), ids, calibration=c) - exact).norm())
        for c in ("synthetic", None)
    ]
    assert errors[0] < 0.9 * errors[1], errors  # measured .77


class Stateful(nn.Module):
    """Every kind of state that a forward may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.cache = nn.Buffer(torch.zeros(4, WIDTH))
        self.window = self.cache[1:]  # the same memory

    def forward(self, ids: Tensor, seen: Tensor, tail: Tensor) -> Tensor:
        x = self.norm(self.tokens.table(ids).mean(1))
        self.cache.index_copy_(0, self.calls.view(1), x[:1])
        self.calls += 1
        seen.add_(1)
        x = x + self.window.sum() + tail.sum()
        return nn.functional.dropout(self.tokens.up(x), 0.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_state_is_written_once_by_the_call_itself(mode: Callable[[], Any]) -> None:
    model = Stateful().requires_grad_(False)
    plain, results = copy.deepcopy(model), {}
    plain.window = plain.cache[1:]
    for name, run in (("plain", plain), ("compiled", None)):
        torch._dynamo.reset()
        run = run or finequant(model, dynamic=False, fullgraph=False, **OPTIONS)
        shared = torch.zeros(10)
        torch.manual_seed(3)
        with mode():
            clear_reports()
            run(IDS, shared[:6], shared[4:])
        owner = plain if name == "plain" else model
        results[name] = (dict(owner.state_dict()), shared, torch.get_rng_state())
    state, shared, random = results["plain"]
    assert torch.equal(shared, results["compiled"][1])
    assert torch.equal(random, results["compiled"][2])
    for name, value in state.items():
        assert torch.equal(value, results["compiled"][0][name]), name
    assert _sites()["tokens.up.weight"].calibration in ("synthetic", "first_call")


def test_copies_share_memory_where_tensors_do() -> None:
    base = torch.arange(24.0).view(4, 6)
    given = [base[1:3], base[2:, ::2].t(), base.clone(), torch.tensor(3), base[:0], base.mH]
    memory: dict[int, Tensor] = {}
    for tensor in copied(given, memory):
        tensor.fill_(9)
    copies = copied(given, memory)
    for old, new in zip(given, copies, strict=True):
        assert (torch.equal(old, new) and old.data_ptr() != new.data_ptr()) or not old.numel()
    copies[0].zero_()
    assert copies[1].t()[0].eq(0).all() and copies[5].mH[1].eq(0).all()
    assert base[1, 1] == 7 and copies[2][1, 1] == 7


FAILURES: list[str] = []  # the next calls of the operator fail, whatever the ids are


@torch.library.custom_op("fqtest::below", mutates_args=())
def below(ids: Tensor, bound: int) -> Tensor:
    if FAILURES:
        raise ValueError(FAILURES.pop())
    if int(ids.max()) >= bound:
        raise ValueError(f"an id is not below {bound}")
    return ids.clone()


@below.register_fake
def _(ids: Tensor, bound: int) -> Tensor:
    return torch.empty_like(ids)


class Picky(Tokens):
    """Takes some ids alone, inside autocast."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(ids) + below(ids, 20).sum() * 0 + self.up.weight.sum() * 0


class Late(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.table(ids) + below(ids, 20).sum() * 0
        return self.down(torch.relu(self.up(x)))


def test_a_failing_probe_leaves_the_weights_alone_and_says_why() -> None:
    model = frozen(Late())
    FAILURES[:] = ["it fails"] * 2
    actual = _compiled(model, IDS)
    (warning,) = report().warnings
    assert "ValueError: it fails" in warning and "up.weight" in warning
    assert {site.calibration for site in _sites().values()} == {"none: ValueError: it fails"}
    assert torch.equal(actual, _compiled(copy.deepcopy(model), IDS, calibration=None))
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_that_refuses_random_ids_is_calibrated_by_the_call() -> None:
    model = frozen(Late())
    actual = _compiled(model, IDS)
    (warning,) = report().warnings
    source = "first_call, since random ids failed: ValueError: an id is not below 20"
    assert source in warning and "up.weight" in warning
    sites = _sites().values()
    assert {(s.calibration, s.calibration_rows) for s in sites} == {(source, 14)}
    own = _compiled(copy.deepcopy(model), IDS, calibration="first_call")
    assert torch.equal(actual, own) and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("of_call", [False, True])
def test_ids_of_infinite_values_give_way_to_those_of_the_call(of_call: bool) -> None:
    model = frozen(Tokens())
    model.table.weight.data[0 if of_call else VOCAB - 1] = torch.inf
    _compiled(model, IDS)
    (h, _), source = map(_h, _sites().values()), "inputs of up.weight are not finite"
    found = {str(site.calibration) for site in _sites().values()}
    if of_call:
        assert h is None and found == {"none: its inputs were zeros or not finite"}
    else:
        assert found == {f"first_call, since random ids failed: ValueError: {source}"}
        _assert_h(_h(_sites()["up.weight"]), model.double().table(IDS))
    assert source in report().warnings[0]


class Transformed(Tokens):
    """Transforms of torch.func, one in the other, before the layers."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.vmap(lambda row: row - below(ids, 30).sum() * 0 + row.mean())(self.table(ids))
        x = x + torch.vmap(torch.func.grad(lambda row: row.square().sum() / 4))(x)
        _, change = torch.func.jvp(lambda x: x * 2, (x,), (x,))
        return self.down(torch.relu(self.up(change)))


@pytest.mark.parametrize("bound_holds", [True, False])
def test_transforms_are_run_and_left(bound_holds: bool) -> None:
    model, exact = frozen(Transformed()), Transformed().double()
    FAILURES[:] = [] if bound_holds else ["once"]
    _compiled(model, IDS, calibration="first_call" if bound_holds else "synthetic")
    sites = _sites()
    x = exact.table(IDS)
    _assert_h(_h(sites["up.weight"]), x + x.mean((1, 2), keepdim=True))
    assert all(str(site.calibration).startswith("first_call") for site in sites.values())
    assert torch._C._functorch.maybe_current_level() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        pass  # which a level that was not left would refuse


class Packed(Tokens):
    """Sequences one after the other, and where each of them begins."""

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.table(ids)
        return self.down(torch.relu(self.up(x - x[places[:-1]].mean(0))))


class Lengths(Tokens):
    """A batch of sequences, and how long each of them is."""

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.table(ids)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return self.down(torch.relu(self.up(x * mask[..., None])))


class Numbered(Tokens):
    """Places of the tokens themselves, which are as many as there are ids."""

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(ids) + places[:, None] / 9)))


@pytest.mark.parametrize(
    ("make", "ids", "places", "rows"),
    [
        (Packed, torch.arange(30), torch.tensor([0, 12, 30]), 7 * 30),
        (Lengths, torch.arange(30).view(3, 10), torch.tensor([10, 4, 7]), 7 * 30),
        (Numbered, torch.arange(30).view(3, 10), torch.arange(10), 512),
    ],
)
def test_places_in_the_ids_keep_the_sizes_that_they_fit_to(
    make: Callable[[], nn.Module], ids: Tensor, places: Tensor, rows: int
) -> None:
    _compiled(frozen(make()), ids, places, dynamic=True)
    found = {(s.calibration, s.calibration_rows) for s in _sites().values()}
    assert found == {("synthetic", rows)}


class Joint(Tokens):
    """Products that read the same rows, other rows, and rows that were written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, 64) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).clone()
        y = self.up(x) + self.a(x) + self.b(x.mul(torch.arange(WIDTH)))
        x.mul_(torch.arange(WIDTH).flip(0))
        return y + self.c(x)


def test_rows_that_products_share_are_counted_once_and_not_after_a_write() -> None:
    counted: list[Any] = []
    original = probe_module.count_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "count_rows", lambda *a: (counted.append(a), original(*a)))
        _compiled(frozen(Joint()), IDS, calibration="first_call")
    sites, x = _sites(), Joint().double().table(IDS)
    order = torch.arange(WIDTH)
    assert len(counted) == 3
    for name, rows in (("up", x), ("a", x), ("b", x * order), ("c", x * order.flip(0))):
        _assert_h(_h(sites[f"{name}.weight"]), rows)


def test_many_runs_cost_no_more_than_one_of_512_ids() -> None:
    for rows, shape in ((512, (1, 512)), (600, (1, 600)), (5 * 64, (1, 64)), (11, (1, 1))):
        _compiled(frozen(Tokens()), torch.zeros(shape, dtype=torch.long))
        assert {s.calibration_rows for s in _sites().values()} == {rows}


def test_fake_quantizing_a_second_instance_gives_its_own_codes() -> None:
    layers = [frozen(Tokens(0)), frozen(Tokens(1))]
    torch._dynamo.reset()
    clear_reports()
    with torch.no_grad():
        for layer in layers:
            layer.compile(backend="finequant", options={"inner_backend": "eager", **OPTIONS})
        _, actual = [layer(IDS) for layer in layers]
        plain = fqcompile.fake_quantize_(layers[1], report())
        torch.testing.assert_close(actual, plain.forward(IDS), rtol=1e-5, atol=1e-5)


def test_ranges_of_modes_that_the_probe_leaves_in_the_middle_are_closed() -> None:
    _compiled(frozen(Picky()), IDS)
    assert _sites()["up.weight"].calibration == "synthetic"
    assert not torch.is_autocast_enabled("cpu")


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.after = Tokens(), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        torch._dynamo.graph_break()
        return self.after(x)


def test_parts_behind_a_break_see_the_values_of_the_call() -> None:
    model = frozen(Pieces())
    _compiled(model, IDS)
    sites = _sites()
    assert sites["tokens.up.weight"].calibration == "synthetic"
    after = sites["after.weight"]
    assert (after.calibration, after.calibration_rows) == ("first_call", 14)
    exact = fqcompile.fake_quantize_(copy.deepcopy(model.tokens), fqcompile.reports()[0])
    _assert_h(_h(after), exact.double()(IDS))


def test_instances_of_one_graph_are_calibrated_by_their_own_weights() -> None:
    first, second = frozen(Tokens(0)), frozen(Tokens(1))
    alone = _compiled(copy.deepcopy(second), IDS)
    torch._dynamo.reset()
    clear_reports()
    layers = [copy.deepcopy(first), copy.deepcopy(second)]
    with torch.no_grad():
        for layer in layers:
            layer.compile(backend="finequant", options={"inner_backend": "eager", **OPTIONS})
        _, actual = [layer(IDS) for layer in layers]
    assert len(fqcompile.reports()) == 1 and torch.equal(actual, alone)


@pytest.mark.parametrize("assign", [False, True])
def test_new_weights_are_calibrated_and_changed_ones_keep_what_they_had(assign: bool) -> None:
    model, other = frozen(Tokens(0)), frozen(Tokens(1))
    torch._dynamo.reset()
    clear_reports()
    compiled = finequant(model, dynamic=False, **OPTIONS)
    with torch.no_grad():
        compiled(IDS)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        actual = compiled(IDS)
    kept = fqcompile.fake_quantize_(copy.deepcopy(model), report())(IDS)
    expected = _compiled(other, IDS) if assign else kept
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_codes_do_not_depend_on_threads_or_the_store() -> None:
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            model = frozen(Tokens())
            _compiled(model, IDS)
            found.append([_h(site) for site in _sites().values()])
        finally:
            torch.set_num_threads(before)
        STORE.clear()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_table_and_what_only_looks_like_ids() -> None:
    class Odd(Tokens):
        def forward(self, ids: Tensor, places: Tensor, count: int) -> Tensor:  # type: ignore[override]
            x = self.table(ids.view(-1)[None].to(torch.int32)) + self.table.weight[places]
            return self.down(self.up(x)) * count

    places = torch.tensor([3, 4, 5, 6])
    _compiled(frozen(Odd()), IDS[:1, :4].contiguous(), places, 3, dynamic=True)
    assert {s.calibration for s in _sites().values()} == {"synthetic"}
