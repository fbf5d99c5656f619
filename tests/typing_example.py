"""What a user writes, for a type checker: tests/test_typing.py runs mypy over it. It is not executed."""
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from laser import DLVAE, VQVAE, Autoencoder, load_pretrained
from laser.bottleneck import Bottleneck
from laser.codec import codes_to_streams
from laser.models import ModelOutput, list_pretrained
from laser.sparse_coding import SparseCode, batch_omp

images = torch.rand(2, 3, 64, 64)

model = Autoencoder("dl", num_hiddens=32, num_embeddings=64, sparsity_level=4, coefficient_bits=6)
out = model(images)
assert_type(out, ModelOutput)
assert_type(out.reconstruction, Tensor)
assert_type(out.loss, Tensor)
assert_type(out.codes, Tensor | SparseCode)
out.loss.backward()
assert_type(model.eval(), Autoencoder)
codes = model.encode(images)
assert_type(model.decode(codes), Tensor)
streams = model.compress(images)
assert_type(streams, list[bytes])
assert_type(model.decompress(streams), Tensor | list[Tensor])

assert_type(codes_to_streams(model, codes, images.shape[-2:]), list[bytes])

for name in (VQVAE(num_embeddings=16), DLVAE(sparsity_level=2)):
    assert_type(name(images).reconstruction, Tensor)

code = batch_omp(torch.rand(8, 4), torch.eye(4), 2)
assert_type(code, SparseCode)
assert_type(code.indices, Tensor)
assert_type(code.sparsity, int)

class Pairs(Bottleneck):
    """A bottleneck of one's own sets what the base class leaves at a default."""
    code_shape = (2,)
    later_buffers = (*Bottleneck.later_buffers, "means")

model.save_pretrained("folder")
assert_type(load_pretrained(Path("folder")), Autoencoder)
assert_type(list_pretrained(), dict[str, list[dict]])

model.reconstruct(images)          # type: ignore[operator]  # a misspelt method is found
batch_omp(images, images, "2")     # type: ignore[arg-type]  # and a wrong argument
print(out.reconstructions)         # type: ignore[attr-defined]  # and a misspelt field
