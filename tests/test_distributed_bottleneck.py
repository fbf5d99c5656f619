"""Two processes with half the batch each hold the codebook, or the dictionary, of one process with the whole batch."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from laser.bottleneck import DictionaryLearning, VectorQuantizer, code_usage
from laser.more_bottlenecks import GainShapeVQ, ProductVQ, ResidualVQ

STEPS, BATCH = 6, 8
VARIANTS = {
    "vq, k-means": lambda: VectorQuantizer(24, 4, decay=0.9),
    "vq, data, revival": lambda: VectorQuantizer(24, 4, decay=0.8, init="data", revive_below=0.9),
    "vq, random start, revival": lambda: VectorQuantizer(24, 4, decay=0.8, init="random", revive_below=0.5),
    "vq, by gradient": lambda: VectorQuantizer(24, 4, decay=None, revive_below=0.5),
    "dl, data": lambda: DictionaryLearning(24, 4, 2),
    "dl, k-means, revival": lambda: DictionaryLearning(24, 4, 2, init="kmeans", revive_below=0.9),
    "dl, patches, bits, refit": lambda: DictionaryLearning(24, 4, 2, patch_size=2, gradient="refit", coefficient_bits=8, revive_below=0.9),
    "rvq, k-means, stages dropped": lambda: ResidualVQ(12, 4, 3, decay=0.9, stage_dropout=0.5),
    "rvq, data, revival, rate, shared": lambda: ResidualVQ(12, 4, 3, decay=0.8, init="data", revive_below=0.9, rate_weight=0.1, num_codebooks=2),
    "gsvq, data": lambda: GainShapeVQ(12, 4, 3, decay=0.9, init="data"),
    "gsvq, k-means, revival, rate, plain first": lambda: GainShapeVQ(12, 4, 3, decay=0.8, revive_below=0.9, rate_weight=0.1, gains_from=2),
    "pq, k-means": lambda: ProductVQ(12, 4, 2, decay=0.9),
    "pq, data, revival, rate": lambda: ProductVQ(12, 4, 2, decay=0.8, init="data", revive_below=0.9, rate_weight=0.1),
}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 4, 4, 4, generator=generator) + 1 for _ in range(STEPS)]


def train(module, rank, world, cuts):
    "A few steps of gradient descent on this process's part of each batch, gradients averaged as DDP averages them."
    for batch, cut in zip(batches(), cuts):
        z = (batch[:cut] if rank == 0 else batch[cut:]) if world == 2 else batch
        loss = module(z).loss
        if loss.requires_grad: loss.backward()           # a codebook of moving averages has no parameter
        for parameter in module.parameters():
            weight = z.shape[0] / BATCH                  # a mean over unequal halves weighs them by their size
            parameter.grad *= weight
            if world == 2: dist.all_reduce(parameter.grad)
            with torch.no_grad(): parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return {name: value.clone() for name, value in module.state_dict().items()}


def worker(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    halves, uneven = [BATCH // 2] * STEPS, [3, 5, 2, 7, 4, 1]
    result = {name: [train(make(), rank, 2, cuts) for cuts in (halves, uneven)] for name, make in VARIANTS.items()}
    result["ddp"] = ddp(rank)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def ddp(rank):
    "The dictionary under DistributedDataParallel itself, behind a trained convolution."
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), DictionaryLearning(24, 4, 2, revive_below=0.5))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return fit(wrapped, model, lambda batch: batch[:4] if rank == 0 else batch[4:])


def fit(module, model, part):
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in batches():
        out = module(part(batch))
        optimiser.zero_grad()
        (out.loss + out.quantized.square().mean()).backward()
        assert (model[1].dictionary.grad * model[1].dictionary).sum(0).abs().max() < 1e-5
        optimiser.step()
    return model.state_dict()


def close(ours, theirs):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, make in VARIANTS.items():
        alone = train(make(), 0, 1, [BATCH] * STEPS)
        for split in (0, 1):
            for key, value in first[name][split].items():
                assert torch.equal(value, second[name][split][key]), f"{name}: the processes differ in {key}"
            close(first[name][split], alone)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), DictionaryLearning(24, 4, 2, revive_below=0.5))
    close(first["ddp"], fit(model, model, lambda batch: batch))
    assert all(torch.equal(first["ddp"][key], second["ddp"][key]) for key in first["ddp"])


def test_revival_took_place():
    "The comparison above means something: with these settings entries do die and come back."
    modules = VARIANTS["vq, random start, revival"](), VectorQuantizer(24, 4, decay=0.8, init="random", revive_below=0)
    for module in modules: train(module, 0, 1, [BATCH] * STEPS)
    used = [int((code_usage(module.eval()(batches()[0]).codes, 24) > 0).sum()) for module in modules]
    assert used[0] > used[1]
