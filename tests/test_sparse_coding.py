"""Properties of batch_omp that hold for every signal, dictionary, method and backend."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp

from laser.kernels_cpu import count_differences
from laser.pursuit import METHODS, compare_supports, eligible_norm, normalize_atoms, pursuit
from laser.sparse_coding import batch_omp, refit

BACKENDS = ("reference", "torch", "numba")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def problems(draw):
    """Signals of sizes 1e-30 to 1e30, a dictionary and a sparsity.

    Often with zero signals, signals equal to atoms, duplicate and dependent atoms, strided memory; now and then without signals."""
    M, K, B = draw(st.integers(1, 12)), draw(st.integers(1, 24)), draw(st.sampled_from((0, *range(2, 21))))
    S = draw(st.integers(1, min(K, 8)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    D = torch.randn(M, K, generator=g, dtype=torch.float64)
    if draw(st.booleans()): D[:, K // 2] = D[:, 0]
    if K > 2 and draw(st.booleans()): D[:, 1] = D[:, 0] - 2 * D[:, 2]
    D = normalize_atoms(D.to(dtype))
    X = torch.randn(B, M, generator=g, dtype=torch.float64)
    X[:1] = 0
    X[-1:] = 2 * D[:, -1]
    X = X * 10.0 ** torch.randint(-30, 31, (B, 1), generator=g)
    X = X.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    if draw(st.booleans()): X, D = X.repeat_interleave(2, 1)[:, ::2], D.T.contiguous().T
    return X, D, S


def wide(*tensors):
    """What batch_omp codes: half precision as float32."""
    return [t.float() if t.itemsize == 2 else t for t in tensors]


def holds(methods=METHODS, backends=BACKENDS):
    """A property becomes a test on generated problems, each of them a case."""
    def of(property):
        def test(record, problem, method, backend):
            if record.over: return
            with record.case(): property(*problem, method, backend)
        test.__name__ = test.__qualname__ = property.__name__
        test.__doc__ = property.__doc__
        return given(problems(), st.sampled_from(methods), st.sampled_from(backends))(test)
    return of


def squared_error(code, X, D):
    """Squared residual norm of each signal, relative to the signal's own, in float64."""
    X, D = X.double(), D.double()
    norm = X.square().sum(1).clamp_min(1e-300)
    return (X - code.to(torch.float64).decode(D)).square().sum(1) / norm


def same_but_for_ties(X, D, ours, theirs, method):
    """Whether supports first differ only where two atoms were nearly as good."""
    differ, ties = compare_supports(X.double(), D.double(), ours, theirs, method, eligible_norm(X.dtype))
    return differ == ties


@holds()
def test_codes_are_well_formed(X, D, S, method, backend):
    """Fixed shape, finite, distinct atoms, unused slots last and empty; a zero atom is refused."""
    code = batch_omp(X, D, S, method=method, backend=backend)
    assert code.indices.shape == code.values.shape == (len(X), S)
    assert code.indices.dtype == torch.int64 and code.values.dtype == wide(X)[0].dtype
    assert torch.isfinite(code.values).all()
    used = code.indices >= 0
    assert (code.values[~used] == 0).all()
    assert (used.long().diff(dim=1) <= 0).all()
    for row in code.indices.tolist():
        picked = [i for i in row if i >= 0]
        assert len(set(picked)) == len(picked) and all(i < D.shape[1] for i in picked)
    assert (code.indices[:1] == -1).all()
    hole = D.index_fill(1, torch.tensor(D.shape[1] - 1), 0)
    with pytest.raises(ValueError, match=f"atom {D.shape[1] - 1} of the dictionary is zero"): batch_omp(X, hole, S, method=method, backend=backend)


@holds()
def test_error_never_grows_with_sparsity(X, D, S, method, backend):
    """One more atom never makes the approximation worse, beyond rounding."""
    errors = torch.stack([squared_error(batch_omp(X, D, s, method=method, backend=backend), X, D) for s in range(1, S + 1)])
    assert (errors.diff(dim=0) <= 1e-5).all()
    assert (errors <= 1 + 1e-6).all()


@holds(methods=("omp", "ormp"))
def test_residual_is_orthogonal_to_the_chosen_atoms(X, D, S, method, backend):
    """What is left of a signal has nothing of an atom that has been taken, relative to the signal's length."""
    code, bound = batch_omp(X, D, S, method=method, backend=backend), 1e-8 if X.dtype == torch.float64 else 1e-3
    X, D = X.double(), D.double()
    residual = X - code.to(torch.float64).decode(D)
    left = (D.T[code.indices.clamp_min(0)] @ residual[..., None])[..., 0].abs() * (code.indices >= 0)
    assert (left <= bound * X.norm(dim=1, keepdim=True)).all()


@holds(backends=("torch", "numba"))
def test_no_worse_than_the_reference(X, D, S, method, backend):
    """A fast backend leaves no larger residual than the reference, unless a tie sent them different ways."""
    ours = batch_omp(X, D, S, method=method, backend=backend)
    indices, values = pursuit(*wide(X, D), S, method=method)
    same = (ours.indices == indices).all(1)
    reference = type(ours)(indices, values)
    excess = (squared_error(ours, X, D) - squared_error(reference, X, D))[same]
    assert (excess <= (1e-10 if X.dtype == torch.float64 else 1e-5)).all()


@holds()
def test_batch_equals_one_by_one(X, D, S, method, backend):
    """The code of a signal does not depend on its company, except where rounding decides a near-tie."""
    if not len(X): return
    code = batch_omp(X, D, S, method=method, backend=backend)
    single = [batch_omp(x[None], D, S, method=method, backend=backend) for x in X]
    errors = torch.cat([squared_error(c, x[None], D) for c, x in zip(single, X)])
    same = torch.tensor([torch.equal(c.indices[0], i) for c, i in zip(single, code.indices)])
    assert torch.allclose(errors[same], squared_error(code, X, D)[same], atol=1e-5)
    if X.dtype == torch.float64: assert same_but_for_ties(X, D, code.indices, torch.cat([c.indices for c in single]), method)


@holds()
def test_order_scale_and_threads_change_nothing(X, D, S, method, backend):
    """Signals in another order, atoms in another order, a power of two, another number of threads."""
    X, D = wide(X, D)
    many = X.repeat(1 + 256 // max(1, len(X)), 1)                          # enough for the threads
    code = batch_omp(many, D, S, method=method, backend=backend)
    scaled = batch_omp(many / 4, D, S, method=method, backend=backend)
    same = (scaled.indices == code.indices).all(1, keepdim=True)
    assert ((4 * scaled.values - code.values).abs() * same <= 1e-3 * many.double().norm(dim=1, keepdim=True)).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threaded = batch_omp(many, D, S, method=method, backend=backend)
    finally: torch.set_num_threads(before)
    g = torch.Generator().manual_seed(S)
    rows, atoms = torch.randperm(len(many), generator=g), torch.randperm(D.shape[1], generator=g)
    moved = batch_omp(many[rows], D[:, atoms], S, method=method, backend=backend).indices
    moved = torch.where(moved >= 0, atoms[moved], -1)
    if backend == "reference" and D.dtype == torch.float32: return         # which decides in float32: see its notebook
    for other in (scaled, threaded): assert same_but_for_ties(many, D, code.indices, other.indices, method)
    assert same_but_for_ties(many[rows], D, code.indices[rows], moved, method)


@holds(methods=("omp",))
def test_supports_are_those_of_scikit_learn(X, D, S, method, backend):
    """Step by step, except at near-ties."""
    X, D = X.double(), normalize_atoms(D.double())
    unit = X / X.norm(dim=1, keepdim=True).clamp_min(1e-300)               # theirs stops at a correlation of 1.5e-8
    theirs = torch.full((len(X), S), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                    # that the atoms are dependent
        for x, order in zip(unit, theirs):
            path = np.asarray(orthogonal_mp(D.numpy(), x.numpy(), n_nonzero_coefs=S, return_path=True))
            before = np.zeros(D.shape[1], bool)
            for step, chosen in enumerate(path.reshape(D.shape[1], path.size // D.shape[1]).T != 0):
                order[step], before = int((chosen & ~before).argmax()), chosen
    assert same_but_for_ties(X, D, batch_omp(X, D, S, backend=backend).indices, theirs, method)


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
