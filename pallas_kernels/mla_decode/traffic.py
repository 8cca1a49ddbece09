"""What the kernel of MLA decoding moves and computes at the published models' shapes.

python -m pallas_kernels.mla_decode.traffic
"""

import jax.numpy as jnp

from pallas_kernels.mla_decode import work

SIZES = (512, 64)  # latent and rotary part of V2-Lite, V2 and V3 alike
CACHE = ("latent", "rope")
CASES = {  # lengths of the rows, new tokens, heads of one device
    "V3, 8 rows of 8192": ([8192] * 8, 1, 128),
    "V3, 8 rows of 8192, 2 tokens": ([8192] * 8, 2, 128),
    "V3, 8 rows of 8193": ([8193] * 8, 1, 128),
    "V3, lengths 1, 100, 1000, 8000": ([1, 100, 1000, 8000], 1, 128),
    "V2, heads over 8, 1 row of 131072": ([131_072], 1, 16),
    "V2-Lite, 64 rows of 4096": ([4096] * 64, 1, 16),
}


def main() -> None:
    """Prints a table in Markdown."""
    print(
        "| | dtype | cache MB moved | over needed | q, out, lse | GFLOP | over needed |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (lengths, tokens, heads) in CASES.items():
        for dtype in (jnp.bfloat16, jnp.float32):
            done = work.count(
                lengths, tokens=tokens, heads=heads, sizes=SIZES, dtype=dtype
            )
            cache = sum(done.moved[name] for name in CACHE)
            others = sum(done.moved.values()) - cache
            print(
                f"| {name} | {jnp.dtype(dtype)} | {cache / 1e6:.2f} "
                f"| {done.ratio(*CACHE):.3f} | {others / 1e6:.2f} MB "
                f"| {done.flops / 1e9:.2f} | {done.flops / done.flops_needed:.3f} |"
            )


if __name__ == "__main__":
    main()
