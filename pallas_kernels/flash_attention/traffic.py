"""What the TPU kernels of causal attention move and compute at the models' shapes.

python -m pallas_kernels.flash_attention.traffic
"""

from pallas_kernels.flash_attention import work
from pallas_kernels.flash_attention.pallas_tpu import block_size

PHASES = ("fwd", "fused", "dkv", "dq")
CASES = {  # length, heads of queries and of keys, sizes of keys and of values
    "V3, V2": (4096, (128, 128), (192, 128)),
    "V3 at 2048": (2048, (128, 128), (192, 128)),
    "V2-Lite": (8192, (16, 16), (192, 128)),
    "V3 at 128K, heads over 8": (131_072, (16, 16), (192, 128)),
    "LLM 67B": (4096, (64, 8), (128, 128)),
    "an odd length": (5003, (128, 128), (192, 128)),
}


def main() -> None:
    """Prints a table in Markdown, for one sequence in bfloat16."""
    print(
        "| | length | block | kernel | MB moved | over needed | GFLOP | over needed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (length, heads, sizes) in CASES.items():
        block = block_size(length, sizes, 2)
        padded = -(-length // block) * block
        for phase in PHASES:
            shape = dict(heads=heads, sizes=sizes, bytes_each=2)
            done = work.count(phase, length=padded, block=block, **shape)
            real = work.count(phase, length=length, block=length, **shape)
            moved = sum(done.moved.values())
            print(
                f"| {name} | {length} | {block} | {phase} | {moved / 1e6:.0f} "
                f"| {moved / sum(real.needed.values()):.2f} | {done.flops / 1e9:.0f} "
                f"| {done.flops / real.flops_needed:.2f} |"
            )


if __name__ == "__main__":
    main()
