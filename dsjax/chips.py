"""What an accelerator can do at best, by the name that JAX has for it.

A figure is one of a JAX device: a tpu7x chip is two of them. Sources: Google Cloud's
pages on v5e, v5p and v6e (compute and HBM rate), `jax.experimental.pallas`'s table (the
same, and tpu7x), the TPU compiler (usable HBM); NVIDIA's data sheets of H200, H100, A100
and T4, dense rates without sparsity, memory as sold. A link's rate is one way: for a
TPU nine tenths of the nominal 50 or 100 GB/s, for NVLink half of the sum that a data
sheet gives; tpu7x's, and that nine tenths can be reached, are not confirmed by a
document of the maker.
"""

from dataclasses import dataclass

GB, TERA = 10**9, 10**12


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one JAX device.

    `flops`: dense bfloat16 FLOP/s (float16 on a T4, which has no bfloat16 units).
    `memory`: bytes of HBM. `bandwidth`: of it, bytes/s. `link`: bytes/s one way over one
    ICI link of a TPU, or over all of a GPU's NVLink (without it: over PCIe).
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


_V5E = Chip(flops=197 * TERA, memory=15.75 * 2**30, bandwidth=819 * GB, link=45 * GB)
_V5P = Chip(flops=459 * TERA, memory=95.74 * 2**30, bandwidth=2765 * GB, link=90 * GB)
_V6E = Chip(flops=918 * TERA, memory=31.25 * 2**30, bandwidth=1640 * GB, link=90 * GB)
_TPU7X = Chip(
    flops=2307 / 2 * TERA, memory=94.75 * 2**30, bandwidth=7380 / 2 * GB, link=90 * GB
)
_H100 = Chip(flops=989 * TERA, memory=80 * GB, bandwidth=3350 * GB, link=450 * GB)
_A100 = Chip(flops=312 * TERA, memory=80 * GB, bandwidth=2039 * GB, link=300 * GB)

CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
    "NVIDIA H200": Chip(
        flops=989 * TERA, memory=141 * GB, bandwidth=4800 * GB, link=450 * GB
    ),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": Chip(
        flops=756 * TERA, memory=80 * GB, bandwidth=2000 * GB, link=64 * GB
    ),
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": Chip(
        flops=312 * TERA, memory=40 * GB, bandwidth=1555 * GB, link=300 * GB
    ),
    "NVIDIA A100 80GB PCIe": Chip(
        flops=312 * TERA, memory=80 * GB, bandwidth=1935 * GB, link=32 * GB
    ),
    "Tesla T4": Chip(flops=65 * TERA, memory=16 * GB, bandwidth=320 * GB, link=16 * GB),
}


def find(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for a CPU and what is not here."""
    return CHIPS.get(kind)
