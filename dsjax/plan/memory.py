"""What a compiled program takes of each device's memory, and what takes the most."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dsjax.plan.programs import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device, as the compiler plans them.

    `outputs`: those results that do not take a donated argument's place (`aliased` do).
    `peak` is what must fit: temporaries do not all live at once. `host`: what is kept in
    the host's memory. Where a program did not fit, the TPU compiler tells its peak alone.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    peak: int
    host: int = 0


class OverfullError(Exception):
    """The compiler gave up: the program needs `peak` bytes of a device, or an unknown
    number (0).
    """

    def __init__(self, peak: int) -> None:
        super().__init__(peak)
        self.peak = peak


def compiled(program: Program) -> jax.stages.Compiled:
    """Compiles. Raises OverfullError where the TPU compiler runs out of memory."""
    try:
        return program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error):
            raise
        raise OverfullError(_used(str(error))) from None


def _used(message: str) -> int:
    """The bytes in "Used 133.35G of 95.74G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Of a compiled program, on one device."""
    stats = compiled.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        + stats.host_temp_size_in_bytes
        - stats.host_alias_size_in_bytes
    )
    return Memory(
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        aliased=stats.alias_size_in_bytes,
        peak=stats.peak_memory_in_bytes or arguments + temporaries + outputs,
        host=host,
    )


def groups(program: Program) -> dict[str, int]:
    """Bytes of a device that each group of arrays takes, gradients among them; the
    padding that a compiler adds is not in them.
    """
    named: Mapping[str, Any] = {**program.arguments, "gradients": program.gradients}
    sizes = {
        name: sum(map(local_bytes, jax.tree.leaves(tree)))
        for name, tree in named.items()
    }
    return {name: size for name, size in sizes.items() if size}


def local_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Of an abstract array's part on one device."""
    shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
    return math.prod(shape) * array.dtype.itemsize
