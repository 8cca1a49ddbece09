"""What a kernel moves and computes, against what it must: one record for all operations."""

from dataclasses import dataclass

from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Work:
    """One call's work, counted from its grid, blocks and copies.

    `moved` are the bytes between HBM and VMEM by operand, padding and repetition
    included; `needed` each operand's own, once, and of those only what has to be touched.
    `flops` are of the products that run, `flops_needed` of those that are asked for.
    """

    moved: dict[str, int]
    needed: dict[str, int]
    flops: int
    flops_needed: int
    exponentials: int = 0

    def ratio(self, *operands: str) -> float:
        """Bytes moved over bytes needed, of some operands or of all."""
        operands = operands or tuple(self.moved)
        moved, needed = (
            sum(bytes_of[name] for name in operands)
            for bytes_of in (self.moved, self.needed)
        )
        return moved / max(needed, 1)

    def estimate(self) -> pl.CostEstimate:
        """For `pallas_call`."""
        return pl.CostEstimate(
            flops=self.flops,
            transcendentals=self.exponentials,
            bytes_accessed=sum(self.moved.values()),
        )
