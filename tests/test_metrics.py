"""The accumulator over two gloo processes: the figures of the whole set on each of them."""
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from laser.bottleneck import DictionaryLearning
from laser.data import sample_images
from laser.metrics import Fid, Lpips, ReconstructionMetrics
from laser.models import VQVAE
from laser.sparse_coding import SparseCode


class Colour(nn.Module):
    "A feature network in Inception's place: mean red and mean green"
    num_features = 2
    def forward(self, images): return images[:, :2].double().mean((2, 3)) / 255


def problem():
    "Images, reconstructions and sparse codes"
    generator = torch.Generator().manual_seed(0)
    x = sample_images(32)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator))
    indices = torch.randint(-1, 5, (4, 8, 8, 2), generator=generator)
    return x, y, SparseCode(indices, torch.where(indices < 0, 0.0, 1.0))


def measure(parts):
    torch.manual_seed(0)
    bottleneck = DictionaryLearning(8, 3, 2, coefficient_bits=4)
    bottleneck.fit_tables(problem()[2])
    metrics = ReconstructionMetrics(bottleneck, lpips=Lpips("squeeze", pretrained=False), fid=Fid(Colour()))
    x, y, codes = problem()
    for part in parts: metrics.update(x[part], y[part], SparseCode(codes.indices[part], codes.values[part]))
    return metrics.compute()


CASES = [
    ([slice(0, 2), slice(2, 3)], [slice(3, 4)]),      # three images here, one there
    ([slice(0, 4)], []),                              # a process that got none
]


def worker(rank, address, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    queue.put([measure(parts[rank]) for parts in CASES])
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path):
    expected = measure([slice(0, 4)])
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=worker, args=(rank, f"file://{tmp_path}/store", queue)) for rank in range(2)]
    for process in workers: process.start()
    results = [result for _ in workers for result in queue.get(timeout=300)]
    for process in workers: process.join(60)
    assert all(process.exitcode == 0 for process in workers)
    assert expected["images"] == 4 and {"lpips", "rfid", "usage", "perplexity", "bits_per_pixel", "bits_per_pixel_ideal"} <= set(expected)
    for result in results:
        assert list(result) == list(expected)
        for name, value in expected.items(): assert math.isclose(result[name], value, rel_tol=1e-5, abs_tol=1e-7), name


@pytest.mark.parametrize("scale, shift, says", [(1, 0, None), (255, 0, "divide [0, 255] by 255"), (2, -1, "(x + 1)/2")])
def test_a_model_says_once_that_its_images_are_out_of_range(scale, shift, says):
    model = VQVAE(num_hiddens=8, num_residual_hiddens=4, embedding_dim=8, num_embeddings=16).eval()
    x = sample_images(32)*scale + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2): model(x)
    assert len(caught) == (says is not None) and all(says in str(warning.message) for warning in caught)
