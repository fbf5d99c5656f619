"Kernels: every path, method and precision against the reference, the memory that each path takes, and what the CUDA kernels need."
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laser import kernels_cuda
from laser.kernels_cpu import count_differences, omp_numba
from laser.pursuit import METHODS, eligible_norm, normalize_atoms, pursuit
from laser.sparse_coding import nearest_entry


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_forked_after_threads_code_as_their_parent_does(threads):
    script = f"""
from concurrent.futures import ThreadPoolExecutor
import torch
from laser.kernels_cpu import omp_numba
from laser.pursuit import normalize_atoms
from laser.sparse_coding import nearest_entry
torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(0)
x, D = torch.randn(300, 40, generator=generator), normalize_atoms(torch.randn(40, 90, generator=generator))
wide = normalize_atoms(torch.randn(16, 9000, generator=generator))
calls = [lambda: omp_numba(x, D, 5)[0], lambda: omp_numba(x, D, 5, method="ormp")[0], lambda: omp_numba(x.double(), D.double(), 5)[0],
         lambda: omp_numba(x[:40, :16], wide, 3)[0], lambda: omp_numba(x, D, 5, diversity=0.01)[0], lambda: nearest_entry(x, D.T.contiguous())]
wholes = [call() for call in calls]
class Codes(torch.utils.data.Dataset):
    def __len__(self): return len(calls)
    def __getitem__(self, i): return calls[i]()
for _ in range(5):
    with ThreadPoolExecutor(4) as pool: results = list(pool.map(lambda i: calls[i % len(calls)](), range(4 * len(calls))))
    assert all(torch.equal(result, wholes[i % len(calls)]) for i, result in enumerate(results))
    workers = torch.utils.data.DataLoader(Codes(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=100)
    assert all(torch.equal(*pair) for pair in zip(workers, wholes, strict=True))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_operators_may_be_registered_again():
    "Notebooks define the operators of the package once more when both run in one process, as while the site's pages are built."
    script = """
import torch
import laser.sparse_coding as package
generator = torch.Generator().manual_seed(0)
x, D = torch.randn(50, 8, generator=generator), torch.nn.functional.normalize(torch.randn(8, 20, generator=generator), dim=0)
codes, nearest = package.batch_omp(x, D, 3).indices, package.nearest_entry(x, D.T)
notebook = {"__name__": "notebook", "__package__": "laser"}
for _ in range(2):
    exec(compile(open(package.__file__).read(), package.__file__, "exec"), notebook)
    for module in (vars(package), notebook):
        assert torch.equal(module["batch_omp"](x, D, 3).indices, codes) and torch.equal(module["nearest_entry"](x, D.T), nearest)
assert torch.equal(torch.compile(notebook["batch_omp"], fullgraph=True, backend="eager")(x, D, 3).indices, codes)
assert torch.equal(torch.compile(notebook["nearest_entry"], fullgraph=True, backend="eager")(x, D.T), nearest)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
@pytest.mark.parametrize("B, M, K, S, method, dtype", [
    (300_000, 3, 16, 4, "ormp", "float32"), (100_000, 64, 512, 3, "ormp", "float32"), (20_000, 64, 512, 3, "omp", "float64"),
    (3200, 16, 9000, 3, "omp", "float32"), (3200, 16, 9000, 3, "ormp", "float32"), (2100, 16, 6000, 3, "omp", "float64"),  # Gram matrices of 288 MB and more
    (3200, 16, 9000, 1, "vq", "float32"), (65_536, 16, 1024, 4, "torch", "float32")])
def test_working_memory_stays_under_256_mb(B, M, K, S, method, dtype):
    script = f"""
import torch
from laser.kernels_cpu import omp_numba
from laser.pursuit import normalize_atoms
from laser.sparse_coding import nearest_entry, omp_torch
def megabytes(key): return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
x, D = torch.randn({B}, {M}, dtype=torch.{dtype}), normalize_atoms(torch.randn({M}, {K}, dtype=torch.{dtype}))
def code(x, D):
    if "{method}" == "vq": return nearest_entry(x, D.T)
    return omp_torch(x, D, {S})[0] if "{method}" == "torch" else omp_numba(x, D, {S}, method="{method}")[0]
code(x[:2], D)
code(x[:200].repeat(2, 1)[:, :1].repeat(1, 20), normalize_atoms(torch.randn(20, 30, dtype=x.dtype)))
before = megabytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
indices = code(x, D)
gram = {K} ** 2 * x.itemsize if {K} ** 2 * x.itemsize <= 2**28 and {M} > 16 else 0
print(megabytes("VmHWM") - before - (gram + (8 + x.itemsize) * indices.numel()) / 2**20)
"""
    megabytes = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert megabytes < 256


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="threads share memory by a switch of glibc")
def test_threads_that_share_an_allocator_do_not_share_working_arrays():
    "What one kernel works in must not be given to another, which it would be if it were freed too soon."
    script = """
from concurrent.futures import ThreadPoolExecutor
import torch
from laser.kernels_cpu import omp_numba
from laser.pursuit import normalize_atoms
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
for M, K, S, methods in ((64, 512, 5, ("omp", "ormp", "mp")), (8, 64, 4, ("omp", "ormp"))):
    D, parts = normalize_atoms(torch.randn(M, K, generator=generator)), torch.randn(4, 4000, M, generator=generator)
    for method in methods:
        wholes = [omp_numba(x, D, S, method=method) for x in parts]
        with ThreadPoolExecutor(4) as pool: results = list(pool.map(lambda i: omp_numba(parts[i % 4], D, S, method=method), range(16)))
        assert all(torch.equal(a, b) for i, result in enumerate(results) for a, b in zip(result, wholes[i % 4])), (M, method)
"""
    run = subprocess.run([sys.executable, "-c", script], env=os.environ | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_wrong_input_is_refused_with_what_to_do():
    x, D = torch.randn(4, 3), normalize_atoms(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"call \.float\(\) first"): omp_numba(x.bfloat16(), D.bfloat16(), 2)
    with pytest.raises(ValueError, match="use batch_omp"): omp_numba(x.to("meta"), D.to("meta"), 2)
    for book in (D, torch.empty(0, 3), D.T[0]):
        with pytest.raises(ValueError, match=r"codebook \[K, M\]"): nearest_entry(x, book)
    with pytest.raises(ValueError, match="move one"): nearest_entry(x, D.T.to("meta"))


@pytest.mark.parametrize("operator, rest", [("pursue", (3, "ormp", 0.0, 0.0, "auto")), ("nearest_entry", ())])
def test_operators_are_what_torch_expects(operator, rest):
    x, D = torch.randn(20, 8), normalize_atoms(torch.randn(8, 12))
    torch.library.opcheck(getattr(torch.ops.laser, operator), (x, D if rest else D.T.contiguous(), *rest))


FLOATS = "X D C G DIAGONAL SCALE ENERGY VALUES ATOMS NORMS SCALED".split()
TYPES = {**dict.fromkeys(FLOATS, "*fp32"), "INDICES": "*i64", "DOUBT": "*i32", **dict.fromkeys("B M K programs".split(), "i32"),
         **dict.fromkeys("tol floor noise eligible risky bonus trust stretch blur".split(), "fp32")}


def compiled(kernel, warps, capability, types=TYPES, **constants):
    """Bytes of shared memory and bytes of spilled registers of a Triton kernel, compiled for a GPU that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*") or n in ("K", "M")}  # as a call finds
    source = ASTSource(kernel, {n: types.get(n, "constexpr") for n in names}, {(names.index(n),): v for n, v in constants.items()}, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    said = subprocess.run([assembler, "-v", f"--gpu-name=sm_{capability}{'a' if capability == 90 else ''}", "-o", "/dev/null", "/dev/stdin"],
                          input=done.asm["ptx"], capture_output=True, text=True, check=True).stderr
    return done.metadata.shared, int(re.search(r"(\d+) bytes spill stores", said)[1])


cuda_compiler = pytest.mark.skipif(importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="no Triton compiler here")


@cuda_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize("K, S", [(16, 4), (512, 5), (2048, 8), (8192, 16)])
def test_fused_cuda_kernel_keeps_correlations_in_registers(K, S, rule, capability):
    block = kernels_cuda._power_of_two(K, 32)
    shared, spilled = compiled(kernels_cuda._fused_kernel(), kernels_cuda._fused_warps(block), capability, S=S, RULE=rule, BLOCK_K=block, BLOCK_S=kernels_cuda._power_of_two(S, 2))
    assert shared <= 48 * 1024 and spilled == 0  # every GPU has 48 kB


@cuda_compiler
@pytest.mark.parametrize("capability", [80, 90])
def test_scaling_cuda_kernel_fits(capability):
    shared, spilled = compiled(kernels_cuda._scaling_kernel(), 4, capability, BLOCK_B=16, BLOCK_M=64)
    assert shared <= 48 * 1024 and spilled == 0
