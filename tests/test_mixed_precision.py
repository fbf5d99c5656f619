"""A hundred training steps on photographs under autocast stay finite: CelebA faces where CELEBA_DIR is set, else the built-in sample."""
import math

import pytest
import torch

from laser.data import load_images
from laser.training import make_model, model_config


@pytest.fixture(scope="module")
def images():
    """Quarters of 16 photographs, 64 of 64x64."""
    x, label = load_images("auto", n=16, split="train", size=128)
    print(label)
    return x.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)


@pytest.mark.parametrize("kind", ["vqvae", "dlvae"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hundred_steps_stay_finite(kind, dtype, images):
    torch.manual_seed(0)
    model = make_model(model_config(kind)(num_hiddens=16, num_residual_hiddens=8, embedding_dim=16, num_embeddings=64, linear_path=False))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(100):
        x = images[torch.randint(len(images), (4,))]
        with torch.autocast("cpu", dtype): out = model(x)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(out.loss.item())
    assert all(map(math.isfinite, losses))
    assert all(v.isfinite().all() for v in model.state_dict().values())
    assert sum(losses[-10:]) < sum(losses[:10])/2                          # and it learned
