"""Cycles of V3's router, and of a norm beside it, by the TPU compiler's own estimates.

    python -m benchmarks.router [--topology v5p:2x2x1] [--tokens 4096]

Needs the TPU compiler, no TPU. It gives no estimate for sorts; for those, count bundles in
what `LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"` leaves behind.

Letters: T tokens, E experts, D model.
"""

import argparse
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.nn.router import route


def choose(scores_1TE: jax.Array, bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """V3's chosen experts and their weights."""
    routing = route(scores_1TE, bias_E, models.v3().segments[1].feed_forward)
    return routing.indices_BTk, routing.weights_BTk


def norm(x_TD: jax.Array, scale_D: jax.Array) -> jax.Array:
    """RMSNorm alone, with no neighbours to be fused with."""
    wide = x_TD.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6) * scale_D).astype(x_TD.dtype)


def main() -> None:
    """Prints one line for each program, then its operations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(args.topology, platform="tpu")
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), P())
    T, E, D = args.tokens, 256, 7168
    programs = {
        choose: [((1, T, E), "float32"), ((E,), "float32")],
        norm: [((T, D), "bfloat16"), ((D,), "float32")],
    }
    for program, arrays in programs.items():
        shapes = [jax.ShapeDtypeStruct(*array, sharding=place) for array in arrays]
        compiled = jax.jit(program).lower(*shapes).compile()
        text = compiled.as_text()
        lines = text[text.index("ENTRY") :].splitlines()
        costs = [re.search(r'estimated_cycles":"(\d+)"', line) for line in lines]
        cycles = [int(cost[1]) if cost else 0 for cost in costs]
        sorts = sum(" sort(" in line for line in lines)
        moved = compiled.cost_analysis()["bytes accessed"]
        name = program.__name__
        print(f"{name}: {sum(cycles):,} cycles and {sorts} sorts, {moved / 1e6:.0f} MB")
        for line, count in zip(lines, cycles):
            if count:
                print(f"{count:10,}  {line.split(' = ')[0].strip()}")


if __name__ == "__main__":
    main()
