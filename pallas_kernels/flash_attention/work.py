"""What the TPU kernels of causal attention move and compute, from their grids and blocks.

The kernels are JAX's; their grids and index maps are written down here a second time, and
a test counts the copies of a run in interpret mode to see that they agree.

Letters: N query heads, T length, b block, H size of queries and keys, U of values.
"""

import math

import numpy as np
from jaxtyping import Array

from pallas_kernels.work import Work

LANES, SUBLANES = 128, 8


def estimates(
    q_NTH: Array, k_KTH: Array, v_KTU: Array, segments, *, block: int, fused: bool
):
    """The estimate of each kernel, by its phase's name in splash."""
    heads = q_NTH.shape[0], k_KTH.shape[0]
    sizes = q_NTH.shape[-1], v_KTU.shape[-1]
    bytes_each = q_NTH.dtype.itemsize
    phases = {"fwd": "fwd"} | (
        {"dkv": "fused"} if fused else {"dkv": "dkv", "dq": "dq"}
    )
    return {
        name: count(
            phase,
            length=q_NTH.shape[1],
            heads=heads,
            sizes=sizes,
            block=block,
            bytes_each=bytes_each,
            segments=segments is not None,
        ).estimate()
        for name, phase in phases.items()
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
    """The work of one kernel on one sequence: "fwd", "fused" (all three gradients), or,
    one after the other, "dkv" and "dq".

    `heads` are those of queries and of keys, `sizes` those of a key and of a value;
    `block` divides `length`.
    """
    (N, K), (H, U) = heads, sizes
    blocks = length // block
    by_keys = phase in ("dkv", "fused")
    if by_keys:  # walks along the keys, and for each along heads and queries
        key, head, query = np.indices((blocks, N, blocks)).reshape(3, -1)
        step, query, kv_block = query, np.maximum(query, key), key
    else:
        head, query, key = np.indices((N, blocks, blocks)).reshape(3, -1)
        kv_block = np.where(key <= query, key, 0)
    kv_head = head // (N // K)
    ours, theirs = (head, query), (kv_head, kv_block)
    keys, values = block * H * bytes_each, block * U * bytes_each
    lanes, sublanes = block * LANES * 4, block * SUBLANES * 4
    row = (sublanes if by_keys else block * 4, ours)  # one number a query
    operands = {"q": (keys, ours), "k": (keys, theirs), "v": (values, theirs)}
    back = {"do": (values, ours), "logsumexp": row, "di": row}
    by_kv = {"dk": (keys, theirs), "dv": (values, theirs)}
    match phase:
        case "fwd":
            operands |= {"o": (values, ours), "logsumexp": (lanes, ours)}
            products = H + U
        case "fused":  # a part of dq for each block of keys
            operands |= back | by_kv | {"dq": (keys, (key, head, step))}
            products = 3 * H + 2 * U
        case "dkv":
            operands |= back | by_kv
            products = 2 * H + 2 * U
        case "dq":
            operands |= back | {"dq": (keys, ours)}
            products = 2 * H + U
    one, other = (sublanes, lanes) if by_keys else (lanes, sublanes)
    operands["q_sequence"] = (one, (query,))
    if segments:
        operands["q_segment_ids"] = (one, (query,))
        operands["kv_segment_ids"] = (other, (kv_block,))
    visited = N * blocks * (blocks + 1) // 2 * block**2
    moved = {name: size * _copies(*where) for name, (size, where) in operands.items()}
    return Work(
        moved=moved,
        needed=_needed(moved, length, heads, sizes, bytes_each),
        flops=2 * visited * products,
        flops_needed=2 * N * math.comb(length + 1, 2) * products,
        exponentials=visited,
    )


def _copies(*indices: np.ndarray) -> int:
    """How often a block's index changes along the grid: Pallas copies it then."""
    index = np.stack(indices)
    return 1 + int((index[:, 1:] != index[:, :-1]).any(axis=0).sum())


def _needed(operands, length, heads, sizes, bytes_each) -> dict[str, int]:
    """Each array once, without what the kernels pad; numbers of tokens are none of them."""
    (N, K), (H, U) = heads, sizes
    numbers = {"q": N * H, "k": K * H, "v": K * U, "o": N * U}
    numbers |= {f"d{name}": size for name, size in numbers.items()}
    each = {name: size * bytes_each for name, size in numbers.items()}
    each |= {"logsumexp": N * 4, "di": N * 4}
    return {name: length * each.get(name, 0) for name in operands}
