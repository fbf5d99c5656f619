"""Streams: exact, as short as their tables promise, and nothing but an error or an image whatever bytes come in."""
import copy
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from laser import codec
from laser.bottleneck import BOTTLENECKS, Bottleneck, bottleneck_options, register
from laser.context import context_bits, fit_context
from laser.models import Autoencoder
from laser.sparse_coding import SparseCode

try: import laser.more_bottlenecks  # noqa: F401  registers them
except ImportError: pass

# without the linear path: what these tests expect of few codes of untrained networks was set for such
NETWORK = dict(num_hiddens=16, num_residual_hiddens=8, num_residual_blocks=1, downsampling_factor=4, linear_path=False)


@register("test_codec")
class Ragged(Bottleneck):
    """One of 5 kinds, then as many numbers as the kind says, the first below 3, the second below 7, the others always 0."""

    def __init__(self, embedding_dim: int = 8):
        super().__init__(7, embedding_dim)
        self.code_shape = (5,)
        self.scale = torch.nn.Parameter(torch.tensor(0.25))

    def encode_signals(self, signals):
        kind = (signals[:, 0].abs() * 15).long() % 5
        numbers = (signals[:, 1:5] * 15).long() % torch.tensor([3, 7, 1, 1], device=signals.device)
        used = torch.arange(4, device=signals.device) < kind[:, None]
        return torch.cat([kind[:, None], torch.where(used, numbers, -1)], 1)

    def decode_signals(self, codes): return torch.nn.functional.pad(codes * self.scale, (0, self.signal_dim - 5))
    def table_sizes(self): return [5, 3, 7, 1]

    def next_table(self, before):
        t = before.shape[1]
        return before.new_zeros(len(before)) if t == 0 else torch.where(before[:, 0] < t, -1, min(t, 3))

    def symbol_values(self, codes): return codes.clamp_min(0)

    def from_symbols(self, values):
        used = torch.arange(4) < values[:, :1]
        return torch.cat([values[:, :1], torch.where(used, values[:, 1:], -1)], 1)


def with_alphabet():
    """Every registered bottleneck that can be coded, and the options that make it so."""
    for name in (n for n, c in BOTTLENECKS.items() if c.__module__.startswith("laser.") or n == "test_codec"):
        options = {key: value for key, value in dict(num_embeddings=16, embedding_dim=8, coefficient_bits=5).items()
                   if key in bottleneck_options(name)}
        try: Autoencoder(name, **NETWORK, **options).bottleneck.table_sizes()
        except ValueError: continue
        yield name, options
        if "coefficient_bits" in options: yield name, options | dict(coefficient_bits=None, rate_weight=1e-3)


def images(count, side=32, seed=0):
    """Smooth random pictures, float [count, 3, side, side] in [0, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module", params=[*with_alphabet()], ids=lambda p: p[0] + "-rate" * ("rate_weight" in p[1]))
def model(request):
    name, options = request.param
    torch.manual_seed(0)
    model = Autoencoder(name, **NETWORK, **options).train()
    with torch.no_grad(): model.pre_bottleneck.weight.mul_(30)       # latents that differ, without training
    for seed in range(3): model(images(32, seed=seed))
    if "rate_weight" in options: model.bottleneck.rate_weight = energy(model) / 1000
    model.eval().fit_tables(images(100, seed=9))
    return model


@torch.no_grad()
def energy(model):
    """Mean squared length of a latent."""
    return float(model.latents(images(8)).square().sum(1).mean())


def same(a, b):
    if isinstance(a, SparseCode): return torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)
    return torch.equal(a, b)


def pick(codes, start, stop):
    if isinstance(codes, SparseCode): return SparseCode(codes.indices[start:stop], codes.values[start:stop])
    return codes[start:stop]


def test_codes_and_pictures_come_back(model):
    x = images(5, seed=1)
    codes = model.encode(x)
    streams = model.compress(x)
    back, size = codec.streams_to_codes(model, streams)
    assert size == (32, 32) and same(back, codes)
    assert torch.equal(model.decompress(streams), model.decode(codes))


def test_coded_bits_are_within_two_percent_of_ideal(model):
    x = images(100, side=64, seed=2)
    with torch.no_grad(): ideal = float(model.bottleneck.code_bits(model.encode(x)).sum())
    coded = sum(8 * len(stream) for stream in model.compress(x))
    header = 100 * 8 * codec.HEADER.size
    assert codec.HEADER.size <= 16 and 0.999 * ideal < coded - header < max(1.02 * ideal + 100 * 8, 100 * 40)


def test_every_size_comes_back(model):
    sizes = [(1, 1), (3, 50), (33, 32), (64, 7)]
    x = [images(1, side=64)[0, :, :h, :w] for h, w in sizes]
    decoded = model.decompress(model.compress(x))
    assert [tuple(y.shape[1:]) for y in decoded] == sizes
    assert all(0 <= y.min() and y.max() <= 1 for y in decoded)


def test_saved_model_decodes(model, tmp_path):
    streams = model.compress(images(2))
    model.save_pretrained(tmp_path)
    assert torch.equal(Autoencoder.from_pretrained(tmp_path).decompress(streams), model.decompress(streams))


def repaired(stream):
    """The stream with its checksum made right again."""
    return stream[:12] + zlib.crc32(stream[16:], zlib.crc32(stream[:12])).to_bytes(4, "little") + stream[16:]


def mutations(streams, count, seed):
    """Streams with flipped, cut, added and exchanged bytes; every second one with its checksum made right again."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        stream = bytearray(streams[rng.integers(len(streams))])
        kind = rng.integers(5)
        if kind == 0: stream[rng.integers(len(stream))] ^= 1 << rng.integers(8)
        elif kind == 1: stream = stream[:rng.integers(len(stream))]
        elif kind == 2: stream += rng.bytes(rng.integers(1, 9))
        elif kind == 3: stream[4:8] = rng.bytes(4)                                      # size of the image
        else:
            start = rng.integers(len(stream))
            stream[start:start + 4] = rng.bytes(min(4, len(stream) - start))
        stream = bytes(stream)
        yield repaired(stream) if i % 2 and len(stream) >= 16 else stream


def refuses(model, stream):
    """Whether a stream ends in an error, and not in a picture: within a second of computing."""
    start = time.process_time()
    try: x = model.decompress([stream])
    except ValueError: x = None
    assert x is None or (x.ndim == 4 and x.shape[1] == 3 and 0 <= x.min() and x.max() <= 1)
    assert time.process_time() - start < 1
    return x is None


def test_mutated_streams(model, record):
    streams, refused = mutations(model.compress(images(8, seed=3)), 4000, seed=4), 0
    for _ in record.upto(400 // len([*with_alphabet()]) + 1, 4000):
        stream = next(streams)
        with record.case(): refused += refuses(model, stream)
    assert refused > 0.9 * record.cases


def huge(stream, height, width):
    """The stream with another size in its header, and the right checksum."""
    return repaired(stream[:4] + height.to_bytes(2, "little") + width.to_bytes(2, "little") + stream[8:])


HUGE = """
import resource, sys, time
sys.path.insert(0, "tests")
from test_codec import *
torch.manual_seed(0)
model = Autoencoder("vq", num_embeddings=16, embedding_dim=8, **NETWORK).train()
x = images(8) * float(sys.argv[1])
model(x), model.eval().fit_tables(x)
[stream] = model.compress(x[:1])
try: model.decompress([stream[:-1]])
except ValueError: pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
for size in ((60_000, 60_000), (1, 60_000), (60_000, 1), (1000, 1000), (33, 32), (128, 128)):
    try: model.decompress([huge(stream, *size)])
    except ValueError as error: print(size, error)
    else: print(size, "IMAGE")
seconds, memory = time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(f"{seconds:.2f} s, {memory:.0f} MB")
assert seconds < 6 and memory < 100
"""


@pytest.mark.parametrize("contrast", ["1", "0"])      # "0": every code is the same, so that nearly nothing is written
def test_huge_sizes_cost_nothing(contrast):
    done = subprocess.run([sys.executable, "-c", HUGE, contrast], capture_output=True, text=True)
    assert done.returncode == 0 and "IMAGE" not in done.stdout, done.stdout + done.stderr


def stored_streams():
    """Streams of stored codes under stored tables: three images of 6 x 9 codes, of a bottleneck with four tables."""
    bottleneck = Ragged()
    bottleneck.rate_points = torch.zeros(1, dtype=torch.float64)
    bottleneck.table_counts = torch.tensor([[800, 300, 77, 20, 9, 5, 6, 7, 1, 1, 2, 3, 5, 8, 13, 9]])
    n = torch.arange(3 * 54)
    values = torch.stack([n * n % 5, n % 3, n * 3 % 7, n * 0, n * 0], 1)
    tables = codec.FixedTables(bottleneck)
    return bottleneck, tables, values.view(3, 54, 5).numpy()


STORED = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
from test_codec import *
torch.set_num_threads(int(sys.argv[1]))
bottleneck, tables, values = stored_streams()
data = [codec.write_symbols(bottleneck, tables, v, 6, 9) for v in values]
for v, d in zip(values, data):
    assert (codec.read_symbols(bottleneck, tables, d, 6, 9) == np.where(np.arange(5) <= v[:, :1], v, 0)).all()
print(hashlib.md5(b"".join(data)).hexdigest())
"""
SCALAR = dict(ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES="AVX512F AVX512CD AVX512_SKX AVX2 FMA3")


@pytest.mark.parametrize("threads, environment", [("1", {}), ("2", {}), ("1", SCALAR)], ids=["1", "2", "no vectors"])
def test_bytes_of_stored_codes(threads, environment):
    done = subprocess.run([sys.executable, "-c", STORED, threads], capture_output=True, text=True, env=os.environ | environment)
    assert done.stdout.strip() == "27e6f0883d9d449809ad73192caf9773", done.stderr


def test_streams_do_not_depend_on_the_batch(model):
    codes = model.encode(images(6, seed=5))
    together = codec.codes_to_streams(model, codes, (32, 32))
    for size in (1, 2, 3):
        parts = [codec.codes_to_streams(model, pick(codes, i, i + size), (32, 32)) for i in range(0, 6, size)]
        assert sum(parts, []) == together


@pytest.fixture(scope="module")
def with_context(model):
    """The model with a context model, little trained."""
    model = copy.deepcopy(model)
    fit_context(model, images(64, seed=6), steps=30, hidden=16)
    return model


def test_context_model(with_context, model):
    """Fewer bits, the same codes, within two percent of what the context model promises; damage is noticed as before."""
    x = images(40, side=64, seed=7)
    codes = model.encode(x)
    streams = with_context.compress(x)
    back, _ = codec.streams_to_codes(with_context, streams)
    assert same(back, codes)
    ideal, coded = float(context_bits(with_context, codes).sum()), sum(8 * len(s) for s in streams) - 40 * 8 * codec.HEADER.size
    assert coded < max(1.02 * ideal + 40 * 8, 40 * 40)          # a word of 32 bits is the least
    assert "another model" in refusal(model.decompress, streams[:1])
    if any(s[3] & codec.CONTEXT for s in streams):
        damaged = [*mutations(with_context.compress(images(8, seed=3)), 40, seed=4)]
        assert sum(refuses(with_context, s) for s in damaged) > 0.9 * len(damaged)


AGAIN = """
import sys, torch
from laser.codec import codes_to_streams, streams_to_codes
from laser.context import context_bits, fit_context
from laser.models import Autoencoder
folder, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model, codes = Autoencoder.from_pretrained(folder), torch.load(folder + "/codes.pt")
streams = sum((codes_to_streams(model, part, (64, 64)) for part in codes.split(batch)), [])
assert all(s[3] == 128 for s in streams) and torch.equal(torch.cat([streams_to_codes(model, [s])[0] for s in streams]), codes)
sys.stdout.write(b"".join(streams).hex())
"""


def test_context_is_the_same_everywhere(tmp_path):
    """The bytes do not depend on threads, batch or vector instructions: nothing between codes and bytes is rounded."""
    torch.manual_seed(0)
    model = Autoencoder("vq", num_embeddings=32, embedding_dim=8, **NETWORK).train()
    for seed in range(3): model(images(32, seed=seed))
    model.eval().fit_tables(images(64, seed=4))
    fit_context(model, images(64, side=64, seed=5), steps=40, hidden=32)
    model.save_pretrained(tmp_path)
    torch.save(model.encode(images(4, side=64, seed=6)), tmp_path / "codes.pt")
    found = [subprocess.run([sys.executable, "-c", AGAIN, tmp_path, *arguments], capture_output=True, text=True, env=os.environ | env)
             for arguments, env in ((("1", "4"), {}), (("2", "1"), {}), (("1", "3"), SCALAR))]
    assert found[0].returncode == 0, found[0].stderr
    assert found[0].stdout == found[1].stdout == found[2].stdout


def refusal(function, *args):
    with pytest.raises(ValueError) as error: function(*args)
    return str(error.value)


def test_errors_say_what_to_do(model):
    [stream] = model.compress(images(1))
    other = Autoencoder("vq", num_embeddings=4, embedding_dim=8, **NETWORK).eval()
    assert "fit_tables" in refusal(other.compress, images(1))
    other.fit_tables(images(1))
    assert "another model" in refusal(other.decompress, [stream])
    assert "header" in refusal(model.decompress, [stream[:10]])
    assert "checksum" in refusal(model.decompress, [stream[:-1]])
    assert "no LASER stream" in refusal(model.decompress, [b"\x89PNG" + stream])
    assert "stream 1" in refusal(model.decompress, [stream, b""])
    assert "version 9" in refusal(model.decompress, [repaired(stream[:2] + b"\x09" + stream[3:])])


def test_continuous_coefficients_have_no_stream():
    model = Autoencoder("dl", embedding_dim=8, **NETWORK).eval()
    bottleneck, codes = model.bottleneck, model.encode(images(1))
    for f in (bottleneck.fit_tables, bottleneck.symbols): assert "coefficient_bits" in refusal(f, codes)
    assert "coefficient_bits" in refusal(model.compress, images(1))


def test_one_dial_for_the_rate(model):
    """Any rate_weight, fitted or not, alone or mixed: a larger one costs fewer bits, and all come back."""
    x, own = images(6, seed=8), model.bottleneck.rate_weight
    if "rate_weight" not in bottleneck_options(type(model.bottleneck)):
        assert "one rate" in refusal(model.compress, x, 0.1)
        return
    model = copy.deepcopy(model)
    weights = [energy(model) * share for share in (1e-4, 1e-3, 1e-2)]
    if getattr(model.bottleneck, "coefficient_bits", None): assert "fit_tables" in refusal(model.compress, x, weights[0])
    other = 1.1 * weights[1]
    model.fit_tables(images(60, seed=9), rate_weights=weights)
    coded = [model.compress(x, weight) for weight in (*weights, other)]
    assert sum(map(len, coded[0])) > sum(map(len, coded[2]))
    assert [streams[0][3] for streams in coded[:3]] == [model.bottleneck.rate_points.tolist().index(w) for w in weights]
    for streams, weight in zip(coded, (*weights, other)):
        model.bottleneck.rate_weight = weight
        expected = model.decode(model.encode(x))
        model.bottleneck.rate_weight = own
        assert torch.equal(model.decompress(streams), expected)
    assert model.decompress([coded[0][0], coded[3][1]]).shape == (2, 3, 32, 32) and model.bottleneck.rate_weight == own


def test_resumed_dataset_equals_an_uninterrupted_one(model, tmp_path, monkeypatch):
    from laser.data import SampleCrops
    data = SampleCrops("test", size=32, limit=10)
    whole = codec.encode_dataset(model, data, tmp_path / "whole.safetensors", batch_size=4)
    batch, calls = data.batch, []

    def stopping(keys):
        calls.append(keys)
        if len(calls) == 3: raise KeyboardInterrupt
        return batch(keys)

    monkeypatch.setattr(data, "batch", stopping)
    with pytest.raises(KeyboardInterrupt): codec.encode_dataset(model, data, tmp_path / "codes.safetensors", batch_size=4)
    assert not (tmp_path / "codes.safetensors").exists()
    with pytest.raises(ValueError, match="begun with another"):
        codec.encode_dataset(model, data, tmp_path / "codes.safetensors", batch_size=5)
    resumed = codec.encode_dataset(model, data, tmp_path / "codes.safetensors", batch_size=4)
    assert resumed.file.read_bytes() == whole.file.read_bytes()
    assert same(resumed[:4], model.encode(batch(range(4))))
