"""choose: a codebook, whose scores only choose an entry, stays; other products beside it do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.graphs import assert_same, run_passes, weight

CODES, UP, DOWN = weight(96, 64), weight(64, 64, 1), weight(64, 96, 2)
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))


def euclidean(x: Tensor) -> Tensor:
    """As in Chameleon and VQ-VAE."""
    norms = torch.sum(x**2, dim=1, keepdim=True) + torch.sum(CODES**2, dim=1)
    return torch.argmin(norms - 2 * torch.einsum("bd,dn->bn", x, CODES.transpose(0, 1)), dim=1)


def negated(x: Tensor) -> Tensor:
    """As in EnCodec."""
    embed = CODES.t()
    squares = x.pow(2).sum(1, keepdim=True)
    dist = -(squares - 2 * x @ embed + embed.pow(2).sum(0, keepdim=True))
    return dist.max(dim=-1).indices


def normalized(x: Tensor) -> Tensor:
    """As in DAC."""
    codes, x = F.normalize(CODES), F.normalize(x)
    squares = x.pow(2).sum(1, keepdim=True)
    dist = squares - 2 * x @ codes.t() + codes.pow(2).sum(1, keepdim=True).t()
    return F.embedding((-dist).max(1)[1], CODES)


def cosine(x: Tensor) -> Tensor:
    return CODES[(x @ CODES.t()).argmax(-1)]


def product_with_one_hot(x: Tensor) -> Tensor:
    """As in Gumbel quantizers, which read entries by a product."""
    chosen = F.one_hot((x @ CODES.t()).argmax(-1), len(CODES))
    return chosen.float().to(x.dtype) @ CODES


def straight(x: Tensor) -> Tensor:
    return F.embedding(F.linear(x, CODES).argmax(dim=-1), CODES)


def shifted(x: Tensor) -> Tensor:
    """The norms as a bias."""
    return F.linear(x, CODES, -CODES.pow(2).sum(1) / 2).topk(3).indices


def ranked(x: Tensor) -> Tensor:
    return torch.einsum("bd,nd->bn", x, CODES).topk(3).indices


def sorted_(x: Tensor) -> Tensor:
    return F.linear(x, CODES).sort(-1, descending=True)[1][:, 0]


def argsorted(x: Tensor) -> Tensor:
    return F.linear(x, CODES).argsort(-1, descending=True)[:, 0]


def by_comparison(x: Tensor) -> Tensor:
    distance = CODES.pow(2).sum(1) - 2 * F.linear(x, CODES)
    return (distance == distance.amin(-1, keepdim=True)).int()


def one_hot(x: Tensor) -> Tensor:
    """Made in the type and the shape of the scores, of which it reads the choice alone."""
    scores = F.linear(x, CODES)
    chosen = torch.zeros_like(scores).scatter(1, scores.argmin(-1, keepdim=True), 1.0)
    return chosen.type_as(scores)


CODEBOOKS = [
    ranked,
    sorted_,
    argsorted,
    euclidean,
    negated,
    normalized,
    cosine,
    straight,
    shifted,
    by_comparison,
    one_hot,
    product_with_one_hot,
]


@pytest.mark.parametrize("choose", CODEBOOKS)
def test_codebook_is_kept_and_chooses_as_before(choose: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(lambda x: (choose(x), F.linear(x, UP)), X)
    reasons = {site.name: str(site.reason) for site in run.state.sites}
    assert reasons.pop("UP") == "None"
    known = ("codebook", "embedding table")
    assert all(reason.startswith(known) for reason in reasons.values()), reasons
    assert torch.equal(run.outputs()[0], choose(X))
    assert_same(run)


@pytest.mark.parametrize("choose", [euclidean, negated, cosine])
def test_named_in_overrides_it_is_quantized(choose: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(choose, X, overrides={"CODES": {"bits": 8}})
    assert [site.reason for site in run.state.sites] == [None]


def xielu(scores: Tensor) -> Tensor:
    """As in Apertus."""
    negative = torch.expm1(torch.min(scores, torch.tensor(-1e-6))) - scores
    return torch.where(scores > 0, 2 * scores * scores + scores, negative + scores)


def elu(scores: Tensor) -> Tensor:
    return scores.clamp(min=0) + scores.minimum(torch.zeros(())).exp() - 1


def relu6(scores: Tensor) -> Tensor:
    return torch.min(torch.max(scores, torch.zeros(())), torch.tensor(6.0))


def relu(scores: Tensor) -> Tensor:
    return scores * (scores > 0)


def shrunk(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.abs() < 0.5, 0)


def thresholded(scores: Tensor) -> Tensor:
    """The eight largest of a row."""
    least = scores.topk(8).values[:, -1:]
    return torch.where(scores >= least, scores, torch.zeros(()))


def ranked_mask(scores: Tensor) -> Tensor:
    """The same, by their ranks."""
    return scores * (scores.argsort(-1, descending=True).argsort(-1) < 8)


def without_least(scores: Tensor) -> Tensor:
    return scores - scores.min(-1, keepdim=True).values


def but_the_least(scores: Tensor) -> Tensor:
    return scores.scatter(1, scores.argmin(-1, keepdim=True), 0)


def sparsemax(scores: Tensor) -> Tensor:
    ordered = scores.sort(-1, descending=True).values
    sums, counts = ordered.cumsum(-1) - 1, torch.arange(1, scores.shape[1] + 1)
    support = (counts * ordered > sums).sum(-1, keepdim=True)
    return (scores - sums.gather(1, support - 1) / support).clamp(min=0)


def gumbel(scores: Tensor) -> Tensor:
    """Hard in its values, and soft where a gradient goes through it."""
    soft = scores.softmax(-1)
    hard = torch.zeros_like(soft).scatter(1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def nearest_and_how_near(scores: Tensor) -> Tensor:
    found = (CODES.pow(2).sum(1) - 2 * scores).min(-1)
    return found.values[:, None] * F.one_hot(found.indices, 96)


def rounded(scores: Tensor) -> Tensor:
    return scores.round().to(torch.int64).clamp(-8, 7) * F.one_hot(scores.argmin(-1), 96)


ACTIVATIONS = [
    xielu,
    elu,
    relu6,
    relu,
    shrunk,
    thresholded,
    ranked_mask,
    without_least,
    but_the_least,
    sparsemax,
    gumbel,
    nearest_and_how_near,
    rounded,
]


@pytest.mark.parametrize("products", [True, False], ids=["multiplied", "returned"])
@pytest.mark.parametrize("activate", ACTIVATIONS)
def test_activation_that_compares_its_values_is_no_choice(
    activate: Callable[[Tensor], Tensor], products: bool
) -> None:
    """A multilayer perceptron whose activation is written with comparisons, ranks or minima."""

    def mlp(x: Tensor) -> Tensor:
        hidden = activate(F.linear(x, CODES))
        return F.linear(hidden.float(), DOWN) if products else hidden

    run = run_passes(mlp, X)
    assert {site.name: site.reason for site in run.state.sites}["CODES"] is None
    assert_same(run)


def test_classifier_that_is_sampled_is_no_codebook() -> None:
    def greedy(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, CODES) + 1
        return scores.argmax(-1), scores

    assert run_passes(greedy, X).counts["rewrite"] == 1


@pytest.mark.parametrize(
    "mix",
    [
        lambda s: F.conv1d(s, torch.ones(8, 6, 1)),
        lambda s: F.scaled_dot_product_attention(s[None], s[None], s[None])[0],
        lambda s: torch.baddbmm(s[None], s.new_ones(1, 6, 6), s[None])[0],
    ],
    ids=["convolution", "attention", "product"],
)
def test_what_lies_before_another_product_is_no_codebook(mix: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(lambda x: mix(F.linear(x, CODES)).topk(3).indices, X)
    assert [site.reason for site in run.state.sites] == [None]


def test_sorted_scores_that_are_read_are_no_codebook() -> None:
    def sampled(x: Tensor) -> tuple[Tensor, Tensor]:
        scores, order = F.linear(x, CODES).sort(-1, descending=True)
        return scores.softmax(-1).cumsum(-1), order

    assert run_passes(sampled, X).counts["rewrite"] == 1


def test_distance_that_is_used_as_a_value_is_no_codebook() -> None:
    def kernel(x: Tensor) -> Tensor:
        return torch.exp(F.linear(x, CODES) - CODES.pow(2).sum(1))

    assert run_passes(kernel, X).counts["rewrite"] == 1


def test_a_product_with_more_than_one_hot_rows_is_no_table() -> None:
    """As in models of tables: categories beside numbers. Rows of one matrix read alone stay."""
    ids = torch.tensor([1, 0, 3, 2, 1, 0])

    def joined(x: Tensor) -> Tensor:
        return F.linear(torch.cat([F.one_hot(ids, 16).float(), x[:, :48]], 1), UP)

    def alone(x: Tensor) -> Tensor:
        return F.linear(F.one_hot(ids, 64).float().view(2, 3, 64), UP)

    assert [site.reason for site in run_passes(joined, X).state.sites] == [None]
    (site,) = run_passes(alone, X).state.sites
    assert str(site.reason).startswith("embedding table")
