"""What the TPU kernels of causal attention move and compute, from their grids and blocks.

The kernels are JAX's; their grids and index maps are written down here a second time, and
a test counts the copies of a run in interpret mode to see that they agree.

Letters: N query heads, T length, b block, H size of queries and keys, U of values.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

LANES, SUBLANES = 128, 8


class Work(NamedTuple):
    """One kernel's work on one sequence: bytes by operand, floating-point operations.

    `moved` are copies between HBM and VMEM, `needed` each array once and without what
    the kernel pads; of the FLOPs, those of the blocks visited and of the pairs seen.
    """

    moved: dict[str, int]
    needed: int
    flops: int
    flops_needed: int
    exponentials: int

    def estimate(self) -> pl.CostEstimate:
        """For `pallas_call`."""
        return pl.CostEstimate(
            flops=self.flops,
            transcendentals=self.exponentials,
            bytes_accessed=sum(self.moved.values()),
        )


def estimates(q_NTH: Array, k_KTH: Array, v_KTU: Array, segments, *, block: int):
    """The estimate of each kernel, by its phase."""
    heads = q_NTH.shape[0], k_KTH.shape[0]
    sizes = q_NTH.shape[-1], v_KTU.shape[-1]
    bytes_each = q_NTH.dtype.itemsize
    return {
        phase: count(
            phase,
            length=q_NTH.shape[1],
            heads=heads,
            sizes=sizes,
            block=block,
            bytes_each=bytes_each,
            segments=segments is not None,
        ).estimate()
        for phase in ("fwd", "dkv")
    }


def count(
    phase: str,
    *,
    length: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    block: int,
    bytes_each: int,
    segments: bool = False,
) -> Work:
    """The work of "fwd" or "dkv" (all three gradients) on one sequence.

    `heads` are those of queries and of keys, `sizes` those of a key and of a value;
    `block` divides `length`.
    """
    (N, K), (H, U) = heads, sizes
    blocks = length // block
    if phase == "dkv":  # walks along the keys, and for each along heads and queries
        key, head, query = np.indices((blocks, N, blocks)).reshape(3, -1)
        step, query, kv_block = query, np.maximum(query, key), key
    else:
        head, query, key = np.indices((N, blocks, blocks)).reshape(3, -1)
        kv_block = np.where(key <= query, key, 0)
    kv_head = head // (N // K)
    ours, theirs = (head, query), (kv_head, kv_block)
    keys, values = block * H * bytes_each, block * U * bytes_each
    lanes, sublanes = block * LANES * 4, block * SUBLANES * 4
    row = (sublanes if phase == "dkv" else block * 4, ours)  # one number a query
    operands = {"q": (keys, ours), "k": (keys, theirs), "v": (values, theirs)}
    match phase:
        case "fwd":
            operands |= {"o": (values, ours), "logsumexp": (lanes, ours)}
            products = H + U
        case "dkv":
            operands |= {"do": (values, ours), "logsumexp": row, "di": row}
            operands |= {"dk": (keys, theirs), "dv": (values, theirs)}
            operands |= {
                "dq": (keys, (key, head, step))
            }  # a part for each block of keys
            products = 3 * H + 2 * U
    one, other = (sublanes, lanes) if phase == "dkv" else (lanes, sublanes)
    operands["q_sequence"] = (one, (query,))
    if segments:
        operands["q_segment_ids"] = (one, (query,))
        operands["kv_segment_ids"] = (other, (kv_block,))
    visited = N * blocks * (blocks + 1) // 2 * block**2
    return Work(
        moved={
            name: size * _copies(*where) for name, (size, where) in operands.items()
        },
        needed=_needed(phase, length, heads, sizes, bytes_each),
        flops=2 * visited * products,
        flops_needed=2 * N * math.comb(length + 1, 2) * products,
        exponentials=visited,
    )


def _copies(*indices: np.ndarray) -> int:
    """How often a block's index changes along the grid: Pallas copies it then."""
    index = np.stack(indices)
    return 1 + int((index[:, 1:] != index[:, :-1]).any(axis=0).sum())


def _needed(phase, length, heads, sizes, bytes_each) -> int:
    (N, K), (H, U) = heads, sizes
    q, k, v, out, row = N * H, K * H, K * U, N * U, N * 4  # the last in float32
    wide = {
        "fwd": q + k + v + out,
        "dkv": 2 * q + 2 * (k + v) + out,
    }
    rows = row if phase == "fwd" else 2 * row
    return length * (bytes_each * wide[phase] + rows)
