"""Cross-entropies of logits, and their gradient."""

from pallas_kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
