"""choose: a codebook, whose scores only choose an entry, stays; other products beside it do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.graphs import assert_same, run_passes, weight

CODES, UP = weight(96, 64), weight(64, 64, 1)
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


CODEBOOKS = [ranked, sorted_, argsorted, euclidean, negated, normalized, cosine, straight, shifted]


@pytest.mark.parametrize("choose", CODEBOOKS)
def test_codebook_is_kept_and_chooses_as_before(choose: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(lambda x: (choose(x), F.linear(x, UP)), X)
    reasons = {site.name: site.reason for site in run.state.sites}
    assert reasons.pop("UP") is None
    assert all(str(reason).startswith("codebook") for reason in reasons.values()), reasons
    assert torch.equal(run.outputs()[0], choose(X))
    assert_same(run)


@pytest.mark.parametrize("choose", [euclidean, negated, cosine])
def test_named_in_overrides_it_is_quantized(choose: Callable[[Tensor], Tensor]) -> None:
    run = run_passes(choose, X, overrides={"CODES": {"bits": 8}})
    assert [site.reason for site in run.state.sites] == [None]


def test_classifier_that_is_sampled_is_no_codebook() -> None:
    def greedy(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, CODES) + 1
        return scores.argmax(-1), scores

    assert run_passes(greedy, X).counts["rewrite"] == 1


def test_sorted_scores_that_are_read_are_no_codebook() -> None:
    def sampled(x: Tensor) -> tuple[Tensor, Tensor]:
        scores, order = F.linear(x, CODES).sort(-1, descending=True)
        return scores.softmax(-1).cumsum(-1), order

    assert run_passes(sampled, X).counts["rewrite"] == 1


def test_distance_that_is_used_as_a_value_is_no_codebook() -> None:
    def kernel(x: Tensor) -> Tensor:
        return torch.exp(F.linear(x, CODES) - CODES.pow(2).sum(1))

    assert run_passes(kernel, X).counts["rewrite"] == 1
