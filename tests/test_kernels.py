"Kernels: every path, method and precision against the reference, and the memory that each path takes."
import subprocess
import sys

import pytest
import torch

from laser.kernels import count_differences, omp_numba
from laser.pursuit import METHODS, eligible_norm, normalize_atoms, pursuit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("M, K, S", [(3, 16, 2), (12, 40, 4), (48, 160, 6)])
def test_codes_equal_the_reference(M, K, S, method, dtype):
    generator = torch.Generator().manual_seed(M)
    x, D = torch.randn(400, M, generator=generator, dtype=dtype), normalize_atoms(torch.randn(M, K, generator=generator, dtype=dtype))
    for tol in (0.0, M / 5):
        indices, values = omp_numba(x, D, S, method=method, tol=tol)
        reference = pursuit(x.double(), D.double(), S, method=method, tol=tol, eligible=eligible_norm(dtype))
        differ, ties = count_differences(x, D, indices, method, tol)
        same = (indices == reference[0]).all(1)
        assert differ == ties and differ <= 2 and ((values - reference[1]).abs().amax(1)[same] < (1e-3 if dtype == torch.float32 else 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_scaling_a_signal_scales_its_code(method, dtype):
    generator = torch.Generator().manual_seed(1)
    x, D = torch.randn(200, 32, generator=generator, dtype=dtype), normalize_atoms(torch.randn(32, 64, generator=generator, dtype=dtype))
    indices, values = omp_numba(x, D, 4, method=method)
    for power in (-100, -60, 60, 100):
        i, v = omp_numba(x * 2.0**power, D, 4, method=method)
        assert torch.equal(i, indices) and torch.allclose(v / 2.0**power, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B, M, K, S, method", [(300_000, 3, 16, 4, "ormp"), (100_000, 64, 512, 3, "ormp"), (600, 16, 9000, 3, "ormp"), (600, 16, 9000, 3, "omp")])
def test_working_memory_stays_under_256_mb(B, M, K, S, method):
    script = f"""
import resource, torch
from laser.kernels import omp_numba
from laser.pursuit import normalize_atoms
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, D = torch.randn({B}, {M}), normalize_atoms(torch.randn({M}, {K}))
omp_numba(x[:2], D[:, :8].contiguous(), 1)
omp_numba(x[:200].repeat(2, 1)[:, :1].repeat(1, 20), normalize_atoms(torch.randn(20, 30)), 2, method="{method}")
before = peak()
indices, values = omp_numba(x, D, {S}, method="{method}")
gram = {K} ** 2 * 4 if {K} ** 2 * 4 <= 2**28 and {M} > 16 else 0
print((peak() - before - gram - 12 * indices.numel()) / 2**20)
"""
    megabytes = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert megabytes < 256
