"""SpQR's quantization of one weight: the compiled loop has the bits of plain PyTorch; what it makes of data."""

import itertools

import pytest
import torch
from compare import assert_same
from octavo import reference

NAMES = ("codes", "scales", "zeros", "second_order", "residual", "error")


def upper_factor(k, generator, tokens=200):
    """Of the inverse of a damped Hessian of correlated inputs."""
    x = torch.randn(tokens, k, generator=generator) @ (torch.eye(k) + 0.1 * torch.randn(k, k, generator=generator))
    hessian = 2 / tokens * x.T @ x
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(k)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def difficult_weight(n, k, group_size, generator):
    """Random rows with heavy tails, then, as far as there are rows, those that hide bugs."""
    w = torch.randn(n, k, generator=generator) * 100
    w[torch.rand(n, k, generator=generator) < 0.01] *= 20
    fill = [
        lambda r: r.zero_(),
        lambda r: r.fill_(7.0),
        lambda r: r.fill_(-7.3),
        lambda r: r.copy_(torch.arange(k) % 4),  # ties of the least and the largest
        lambda r: r.copy_((torch.arange(k) % 2).float().mul(-3.0)),
        lambda r: r[: k // 2].fill_(0.0),
        lambda r: r[:1].fill_(3000.0),  # one weight far out
        lambda r: r.copy_(1000.0 + torch.arange(k) * 0.01),  # far from 0
        lambda r: r.copy_(-1000.0 - torch.arange(k) * 0.01),
        lambda r: r.mul_(1e-7),
        lambda r: r.mul_(1e-30),
        lambda r: r.fill_(-0.0),
    ]
    for i, change in enumerate(fill):
        if 3 * i + 1 < n:
            change(w[3 * i + 1])
    return w


def assert_all_same(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        try:
            assert_same(a, e)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


CASES = [
    (bits, group_size, stats, second, threshold)
    for (bits, second), (group_size, stats), threshold in itertools.product(
        [(2, (3, 3)), (3, (3, 3)), (4, (4, 4)), (3, (0, 0))],
        [(16, 16), (32, 48)],
        [float("inf"), 3000.0],
    )
]


@pytest.mark.parametrize(("bits", "group_size", "stats", "second", "threshold"), CASES)
def test_columns_equal_plain_pytorch(ops, generator, bits, group_size, stats, second, threshold):
    n, k = 51, 64
    w = difficult_weight(n, k, group_size, generator)
    arguments = (w, upper_factor(k, generator), threshold, bits, group_size, stats, *second)
    expected = reference.spqr_quantize_columns(*arguments)
    assert_all_same(ops.spqr_quantize_columns(*arguments), expected)
    if threshold < float("inf"):
        assert 0 < (expected[4] != 0).float().mean() < 0.8
    assert all(t.isfinite().all() for t in expected)
