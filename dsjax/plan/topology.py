"""Hardware that is not here: its devices for the compiler, its peaks, its torus.

Names: v5e:4x4, v6e:8x8 (two dimensions), v5p:8x8x8, tpu7x:2x2x2 (three), in chips; h200:8
is that many GPUs of one host.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from dsjax import chips
from dsjax.errors import UserError

DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
GPUS_OF_A_HOST = 8

# What the CUDA plug-in has to know of a GPU in order to compile for it (an H200 SXM).
_H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for, and how they are wired.

    `platform`: "tpu" or "cuda", as in `jax.lax.platform_dependent`. `torus`: chips along
    each dimension; empty where a switch joins all GPUs. `wraps`: whether a dimension's
    ends are joined. `devices_of_chip` share a chip's links.
    """

    name: str
    platform: str
    devices: tuple[jax.Device, ...]
    chip: chips.Chip
    torus: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()
    devices_of_chip: int = 1


def topology(name: str) -> Topology:
    """The hardware called `name`.

    Raises UserError for a name that means nothing, a shape that cannot be built, or a
    compiler that is not installed.
    """
    kind, _, shape = name.lower().partition(":")
    if kind == "h200" and re.fullmatch(r"\d*", shape):
        return _gpus(name, int(shape or 1))
    if kind not in DIMENSIONS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"topology {name!r}: write v5e:4x4, v5p:8x8x8, v6e:8x8, tpu7x:2x2x2 "
            f"(chips along each dimension of the torus) or h200:8"
        )
    torus = tuple(map(int, shape.split("x")))
    if len(torus) != DIMENSIONS[kind]:
        raise UserError(f"topology {name!r}: {kind} has {DIMENSIONS[kind]} dimensions")
    return _tpus(name, kind, torus)


def _tpus(name: str, kind: str, torus: tuple[int, ...]) -> Topology:
    if find_spec("libtpu") is None:
        raise UserError(
            f"topology {name!r} needs the TPU compiler: pip install 'dsjax[tpu]'"
        )
    try:
        devices = topologies.get_topology_desc(
            topology_name=f"{kind}:{'x'.join(map(str, torus))}", platform="tpu"
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name!r}: {str(error).splitlines()[0]}") from None
    count = 1
    for size in torus:
        count *= size
    return Topology(
        name=name,
        platform="tpu",
        devices=tuple(devices),
        chip=chips.find(devices[0].device_kind),
        torus=torus,
        wraps=tuple(_wraps(kind, size) for size in torus),
        devices_of_chip=len(devices) // count,
    )


def _wraps(kind: str, size: int) -> bool:
    """Whether a dimension's ends are joined: in three dimensions by optical switches
    between cubes of 4 x 4 x 4; in two only where it is the whole pod's 16.
    """
    return size % 4 == 0 if DIMENSIONS[kind] == 3 else size == 16


def _gpus(name: str, count: int) -> Topology:
    if not 1 <= count <= GPUS_OF_A_HOST:
        raise UserError(f"topology {name!r}: a host has 1 to {GPUS_OF_A_HOST} GPUs")
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError(
            f"topology {name!r} needs the CUDA plug-in: pip install "
            f"'jax-cuda13-plugin=={jax.__version__}' 'jax-cuda13-pjrt=={jax.__version__}'"
        )
    try:
        devices = topologies.get_topology_desc(
            "h200", "cuda", target_config=_H200, topology=f"1x1x{count}"
        ).devices
    except NotImplementedError:  # the plug-in was looked for, and found no driver
        raise UserError(
            f"topology {name!r}: without a GPU, set JAX_PLATFORMS=cpu"
        ) from None
    return Topology(
        name=name,
        platform="cuda",
        devices=tuple(devices),
        chip=chips.find(devices[0].device_kind),
    )
