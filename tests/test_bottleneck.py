"""What holds for every bottleneck, registered or of one's own, and for folders that earlier versions saved."""
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from laser.bottleneck import BOTTLENECKS, Bottleneck, VectorQuantizer, make_bottleneck, register
from laser.models import Autoencoder, load_pretrained

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("name", ["vqvae-0.1.0", "dlvae-0.1.0"])
def test_folders_of_version_0_1_0_load_and_give_the_same_pictures(name):
    model = load_pretrained(SAVED / name)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert type(model).__name__.lower() == name.split("-")[0] and not model.training
    assert torch.allclose(model(x).reconstruction, load_file(SAVED / name / "expected.safetensors")["reconstruction"], atol=1e-6)
    assert not len(model.bottleneck.rate_points)


def test_a_codebook_recovers_from_one_wild_batch_within_ten():
    g = torch.Generator().manual_seed(0)
    vq = VectorQuantizer(32, 8)
    for _ in range(20): vq(torch.randn(16, 8, 8, 8, generator=g))
    vq(1e6 * torch.randn(16, 8, 8, 8, generator=g))
    for _ in range(10): vq(torch.randn(16, 8, 8, 8, generator=g))
    codes = vq.eval()(torch.randn(64, 8, 8, 8, generator=g)).codes
    assert len(codes.unique()) >= 29


@register("test-lists")
class Lists(Bottleneck):
    """Outside the package: a list of up to three numbers, how many comes first, alphabets of 4, 2, 3 and 5."""
    SIZES = (2, 3, 5)

    def __init__(
        self,
        embedding_dim: int = 3,  # numbers in a latent vector
        scale: float = 1.0,  # of the numbers
    ):
        super().__init__(5, embedding_dim)
        self.scale, self.code_shape = scale, (3,)

    def encode_signals(self, signals):
        sizes = torch.tensor(self.SIZES)
        codes = ((signals[:, :3] / self.scale).sigmoid() * sizes).long().clamp(max=sizes - 1)
        used = torch.arange(3) < (signals.norm(dim=1) / self.scale).long().clamp(max=3)[:, None]
        return torch.where(used, codes, -1)

    def decode_signals(self, codes):
        q = torch.logit((codes + 0.5) / torch.tensor(self.SIZES)).float() * self.scale
        return torch.nn.functional.pad(torch.where(codes >= 0, q, 0), (0, self.embedding_dim - 3))

    def table_sizes(self): return [4, *self.SIZES]

    def next_table(self, before):
        t = before.shape[1]
        if t == 0: return before.new_zeros(len(before))
        return torch.where(before[:, 0] >= t, t, -1) if t < 4 else before.new_full((len(before),), -1)

    def symbol_values(self, codes): return torch.cat([(codes >= 0).sum(1, keepdim=True), codes.clamp_min(0)], 1)

    def from_symbols(self, values): return torch.where(torch.arange(3) < values[:, :1], values[:, 1:], -1)


def example(name):
    """A bottleneck that has seen a few batches, in eval mode; options that give it a finite alphabet where it has one."""
    options = dict(dl=dict(coefficient_bits=5, sparsity_level=3)).get(name, {})
    bottleneck = make_bottleneck(name, embedding_dim=8, **options)
    g = torch.Generator().manual_seed(1)
    for _ in range(3): bottleneck(torch.randn(8, 8, 8, 8, generator=g))
    return bottleneck.eval(), torch.randn(3, 8, 4, 6, generator=g)


@pytest.mark.parametrize("name", ["vq", "dl", "test-lists"])
def test_codes_are_exact_and_their_symbols_are_too(name):
    bottleneck, z = example(name)
    out = bottleneck(z)
    codes = bottleneck.encode(z)
    assert torch.equal(bottleneck.decode_codes(codes), out.quantized) and out.quantized.shape == z.shape
    values, sizes = bottleneck.symbols(codes)
    assert ((values < sizes) | (sizes == 0)).all() and (sizes[:, 1:].bool() <= sizes[:, :-1].bool()).all()
    back = bottleneck.from_symbols(values)
    assert torch.equal(bottleneck.decode_signals(back), bottleneck.decode_signals(bottleneck._flat(codes)[0]))
    assert torch.equal(bottleneck.symbols(back)[0], values)
    bottleneck.fit_tables(codes)
    bits = bottleneck.code_bits(codes)
    assert bits.shape == (3, 4, 6) and (bits >= 0).all() and 0 < bits.sum() <= bottleneck.bits_per_code() * bits.numel()


@pytest.mark.parametrize("name", ["vq", "dl", "test-lists"])
def test_sequences_images_and_video(name):
    bottleneck, _ = example(name)
    for shape in ((2, 8, 5), (2, 8, 4, 6), (2, 8, 2, 4, 6), (2, 8)):
        z = torch.randn(shape)
        quantized, codes, loss = bottleneck(z)
        assert quantized.shape == shape and torch.equal(bottleneck.decode_codes(codes), quantized) and loss.ndim == 0


def test_a_bottleneck_of_ones_own_is_saved_by_name_and_loaded(tmp_path):
    model = Autoencoder("test-lists", num_hiddens=8, num_residual_hiddens=4, scale=0.5)
    x = torch.rand(4, 3, 16, 16)
    model(x).loss.backward()
    model.eval().fit_tables(x)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert torch.equal(again(x).reconstruction, model(x).reconstruction) and again.bottleneck.scale == 0.5
    assert torch.equal(again.bottleneck.code_bits(again.encode(x)), model.bottleneck.code_bits(model.encode(x)))
    name = BOTTLENECKS.pop("test-lists")                   # a folder names a bottleneck; it never brings one
    with pytest.raises(ValueError, match="no bottleneck 'test-lists'"): load_pretrained(tmp_path)
    BOTTLENECKS["test-lists"] = name


KINDS = dict(vq=dict(rate_weight=0.01), dl=dict(coefficient_bits=6), simvq={}, fsq={}, pq={}, none={}, scalar={},
             rvq=dict(stage_dropout=0.5), gsvq=dict(rate_weight=0.01, beam=2))


def trained(kind, run, steps=5):
    """A small model after a few steps of SGD, each of `run(model, x)`: its numbers, and the gradient of the last step."""
    torch.manual_seed(0)
    model = Autoencoder(kind, num_hiddens=8, num_residual_hiddens=4, num_residual_blocks=1, embedding_dim=8, **KINDS[kind])
    optimizer, graphs = torch.optim.SGD(model.parameters(), 0.1), []
    run = run(model)
    for step in range(steps):
        optimizer.zero_grad()
        run(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)], graphs


def plain(model): return lambda x: model(x).loss


def same(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_learns_once_and_the_same(kind, reentrant):
    def run(model): return lambda x: checkpoint(lambda x: model(x).loss, x.requires_grad_(), use_reentrant=reentrant)
    assert same(trained(kind, run)[0], trained(kind, plain)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_compiled_once_and_the_same(kind):
    torch._dynamo.reset(), counters.clear()
    numbers, graphs = trained(kind, lambda model: plain(torch.compile(model, backend="eager")))
    assert same(numbers, trained(kind, plain)[0]) and set(graphs) == {2}          # before and after the bottleneck
