"""Models as ONNX files: the codes and pictures that the model gives, for every bottleneck whose operators allow it."""
import pytest
import torch

from laser.export import export_onnx, run_onnx
from laser.models import Autoencoder
from laser.sparse_coding import SparseCode

onnx = [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")]
KINDS = dict(vq={}, vq_rate=dict(rate_weight=0.01), dl=dict(sparsity_level=3), dl_ormp=dict(method="ormp", patch_size=2, coefficient_bits=6),
             dl_diverse=dict(diversity=0.3), fsq=dict(levels="5x3x3"), pq={}, none={}, rvq={}, rvq_rate=dict(rate_weight=0.01, beam=2),
             gsvq=dict(num_quantizers=2), simvq={}, rotation={})
LONG = ("dl_ormp", "dl_diverse", "rvq_rate", "gsvq", "simvq", "rotation")


def trained(kind, **options):
    """A small model that has seen a few batches, in eval mode, with tables where bits count."""
    torch.manual_seed(0)
    if kind not in ("fsq", "none"): options = dict(num_embeddings=16, **options)
    model = Autoencoder(kind, num_hiddens=8, num_residual_hiddens=4, num_residual_blocks=1, embedding_dim=8, **options)
    for _ in range(20): model(torch.rand(4, 3, 16, 16))
    if model.bottleneck.rate_weight: model.eval().fit_tables(torch.rand(4, 3, 16, 16))
    return model.eval()


@pytest.mark.parametrize("case", [pytest.param(k, marks=pytest.mark.slow) if k in LONG else k for k in KINDS])
def test_codes_and_pictures_are_the_models(case, tmp_path):
    model = trained(case.split("_")[0], **KINDS[case])
    decoder, encoder = export_onnx(model, tmp_path / "new")
    for shape in ((1, 3, 16, 24), (3, 3, 40, 16)):                          # not those of the example
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        codes = model.encode(images)
        ours = [codes.indices, codes.values] if isinstance(codes, SparseCode) else [codes]
        theirs = run_onnx(encoder, images)
        assert [t.dtype for t in theirs] == [o.dtype for o in ours] and theirs[0].shape == ours[0].shape
        close = 1e-5 if ours[0].is_floating_point() else 0
        assert ((theirs[0] - ours[0]).abs() <= close).float().mean() > 0.99                  # a tie may fall the other way
        for mine, other in zip(ours[1:], theirs[1:]): assert ((mine - other).abs() < 1e-4).float().mean() > 0.99
        assert (run_onnx(decoder, *ours)[0] - model.decode(codes)).abs().max() < 1e-5


def test_what_has_no_fixed_graph_says_so_and_leaves_the_decoder(tmp_path):
    model = trained("dl", rate_weight=0.01)
    with pytest.raises(ValueError, match="encoder of a model with bottleneck 'dl'.*encoder=False"): export_onnx(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["decoder.onnx"] == [p.name for p in export_onnx(model, tmp_path, encoder=False)]


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("laser.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx"): export_onnx(trained("none"), tmp_path)
