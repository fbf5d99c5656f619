__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laser.models import DLVAE as DLVAE, VQVAE as VQVAE, Autoencoder as Autoencoder, load_pretrained as load_pretrained


def __getattr__(name):
    """`from laser import VQVAE` works, and `import laser` alone stays light."""
    if name in ("Autoencoder", "VQVAE", "DLVAE", "load_pretrained"):
        from laser import models
        return getattr(models, name)
    raise AttributeError(f"module 'laser' has no attribute {name!r}")
