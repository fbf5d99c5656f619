"""Properties of batch_omp that hold for every signal, dictionary, method and backend."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laser.kernels_cpu import count_differences
from laser.pursuit import METHODS, compare_supports, normalize_atoms, pursuit
from laser.sparse_coding import batch_omp, refit

BACKENDS = ("reference", "torch", "numba")


@st.composite
def problems(draw):
    """Signals, a dictionary and a sparsity; often with duplicate atoms, zero signals and signals equal to atoms."""
    M, K, B = draw(st.integers(1, 12)), draw(st.integers(1, 24)), draw(st.integers(2, 20))
    S = draw(st.integers(1, min(K, 8)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    D = torch.randn(M, K, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        D[:, K // 2] = D[:, 0]
    X = torch.randn(B, M, generator=g, dtype=torch.float64)
    X[0] = 0
    X[-1] = 2 * D[:, -1]
    X = X * 10.0 ** draw(st.integers(-20, 20))
    return X.to(dtype), normalize_atoms(D.to(dtype)), S


def squared_error(code, X, D):
    """Squared residual norm of each signal, relative to the signal's own, in float64."""
    X, D = X.double(), D.double()
    norm = X.square().sum(1).clamp_min(1e-300)
    return (X - code.to(torch.float64).decode(D)).square().sum(1) / norm


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(METHODS), st.sampled_from(BACKENDS))
def test_codes_are_well_formed(problem, method, backend):
    """Fixed shape, finite, distinct atoms, unused slots last and empty."""
    X, D, S = problem
    code = batch_omp(X, D, S, method=method, backend=backend)
    assert code.indices.shape == code.values.shape == (len(X), S)
    assert code.indices.dtype == torch.int64 and code.values.dtype == X.dtype
    assert torch.isfinite(code.values).all()
    used = code.indices >= 0
    assert (code.values[~used] == 0).all()
    assert (used.long().diff(dim=1) <= 0).all()
    for row in code.indices.tolist():
        picked = [i for i in row if i >= 0]
        assert len(set(picked)) == len(picked) and all(i < D.shape[1] for i in picked)
    assert (code.indices[0] == -1).all()


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(METHODS), st.sampled_from(BACKENDS))
def test_error_never_grows_with_sparsity(problem, method, backend):
    """One more atom never makes the approximation worse, beyond rounding."""
    X, D, S = problem
    errors = torch.stack([squared_error(batch_omp(X, D, s, method=method, backend=backend), X, D) for s in range(1, S + 1)])
    assert (errors.diff(dim=0) <= 1e-5).all()
    assert (errors <= 1 + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(METHODS), st.sampled_from(("torch", "numba")))
def test_no_worse_than_the_reference(problem, method, backend):
    """A fast backend leaves no larger residual than the reference, unless a tie sent them different ways."""
    X, D, S = problem
    ours = batch_omp(X, D, S, method=method, backend=backend)
    indices, values = pursuit(X, D, S, method=method)
    same = (ours.indices == indices).all(1)
    reference = type(ours)(indices, values)
    excess = (squared_error(ours, X, D) - squared_error(reference, X, D))[same]
    assert (excess <= (1e-5 if X.dtype == torch.float32 else 1e-10)).all()


@settings(max_examples=30, deadline=None)
@given(problems(), st.sampled_from(METHODS), st.sampled_from(BACKENDS))
def test_batch_equals_one_by_one(problem, method, backend):
    """The code of a signal does not depend on its company, except where rounding decides a near-tie."""
    X, D, S = problem
    code = batch_omp(X, D, S, method=method, backend=backend)
    single = [batch_omp(x[None], D, S, method=method, backend=backend) for x in X]
    errors = torch.cat([squared_error(c, x[None], D) for c, x in zip(single, X)])
    same = torch.tensor([torch.equal(c.indices[0], i) for c, i in zip(single, code.indices)])
    assert torch.allclose(errors[same], squared_error(code, X, D)[same], atol=1e-5)
    if X.dtype == torch.float64:
        differ, ties = compare_supports(X, D, code.indices, torch.cat([c.indices for c in single]), method)
        assert differ == ties


@pytest.mark.parametrize("backend", ("torch", "numba"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", (0.1, 0.03, 0.005))
def test_nearly_parallel_atoms_in_float32(spread, method, backend):
    """Where float32 could not tell the atoms apart the answer is still that of float64, except at near-ties."""
    g = torch.Generator().manual_seed(0)
    D = torch.randn(17, 130, generator=g)
    D, X = normalize_atoms(D[:, :1] + spread * D).contiguous(), torch.randn(1500, 17, generator=g)
    indices = batch_omp(X, D, 4, method=method, backend=backend).indices
    differ, ties = count_differences(X, D, indices, method)
    assert differ == ties


@pytest.mark.parametrize("backend", BACKENDS)
def test_refit_agrees_with_lstsq(backend):
    """The coefficients of OMP are the least-squares coefficients of its support."""
    g = torch.Generator().manual_seed(0)
    D = normalize_atoms(torch.randn(10, 30, generator=g, dtype=torch.float64))
    X = torch.randn(50, 10, generator=g, dtype=torch.float64)
    code = batch_omp(X, D, 4, backend=backend)
    for x, i, v in zip(X, code.indices, code.values):
        expected = np.linalg.lstsq(D[:, i].numpy(), x.numpy(), rcond=None)[0]
        assert np.allclose(v, expected, atol=1e-10)
    assert torch.allclose(refit(X, D, code.indices), code.values, atol=1e-10)


def test_diversity_is_the_same_in_every_backend():
    """Usage is counted over the whole call in every backend, chunked or not."""
    g = torch.Generator().manual_seed(1)
    D = torch.randn(3, 16, generator=g, dtype=torch.float64)
    X = torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    codes = [batch_omp(X, D, 4, method="mp", diversity=0.001, backend=b) for b in BACKENDS]
    for code in codes[1:]:
        assert (code.indices == codes[0].indices).all(1).float().mean() > 0.999
