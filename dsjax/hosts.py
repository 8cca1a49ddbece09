"""Several hosts as one machine: start-up, and which rows of a batch each one brings."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.request import Request, urlopen

import jax
import numpy as np
from jax.extend.backend import clear_backends
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsjax.errors import UserError
from dsjax.sharding import BATCH, named

TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
WORKERS = "computeMetadata/v1/instance/attributes/worker-network-endpoints"


def start(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of one job, before anything else asks JAX for devices.

    `coordinator` is HOST:PORT of process 0; with the other two it says everything.
    Without any of them the environment tells (a TPU pod, Slurm, Open MPI); a single
    process stays alone. Raises UserError when only some of the three are given.
    """
    explicit = (coordinator, processes, process_id)
    if any(value is not None for value in explicit):
        _check(coordinator, processes, process_id)
    elif not (in_a_job(os.environ) or in_a_slice(os.environ)):
        return
    # CPU devices of several processes talk through gloo; no effect on accelerators.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(*explicit)
    except RuntimeError as error:
        raise UserError(f"cannot join the other processes: {error}") from error


def _check(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            "--coordinator, --processes and --process-id are needed together: "
            f"{coordinator}, {processes}, {process_id}"
        )
    if ":" not in coordinator or not 0 <= process_id < processes:
        raise UserError(
            f"--coordinator {coordinator} must be HOST:PORT, and --process-id "
            f"{process_id} from 0 to {processes - 1}"
        )


def in_a_job(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process of several, or of a TPU pod's
    worker.
    """
    tasks = next((environment[name] for name in TASKS if name in environment), "1")
    pod = any("," in environment.get(name, "") for name in TPU_VARIABLES)
    return (tasks.isdigit() and int(tasks) > 1) or pod


def in_a_slice(environment: Mapping[str, str]) -> bool:
    """Whether this machine is one of several of a Cloud TPU slice. On Compute Engine no
    variable says so; the machine's metadata name the others, and JAX asks there, too.
    Only where there is a TPU: elsewhere a look for the server's name can take long.
    """
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(
        Path("/dev/vfio").glob("[0-9]*")
    )
    if "TPU_SKIP_MDS_QUERY" in environment or not (
        chips or "GCE_METADATA_IP" in environment
    ):
        return False
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = Request(
        f"http://{server}/{WORKERS}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urlopen(request, timeout=5) as answer:
            return b"," in answer.read()
    except OSError:  # no such server, or no such machine
        return False


def simulate(devices: int) -> None:
    """On a machine without an accelerator, makes its CPU at least so many devices: XLA
    runs a small step mostly on one core, and a device can be a core.

    Arrays made before are lost. Several processes say themselves how many each has.
    """
    alone = jax.process_count() == 1 and jax.default_backend() == "cpu"
    if alone and devices > jax.device_count():
        clear_backends()
        jax.config.update("jax_num_cpu_devices", devices)


def part(rows: int, mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process brings part `index` of the `count` equal parts of a
    batch of `rows` sequences.

    Processes whose devices work on the same sequences bring the same part. Raises
    UserError when the parts cannot be equal.
    """
    placement = named(P(BATCH), (rows,), mesh)
    owned: dict[int, set[int]] = {}
    for device, (cut,) in placement.devices_indices_map((rows,)).items():
        owned.setdefault(device.process_index, set()).update(range(rows)[cut])
    parts = sorted({tuple(sorted(mine)) for mine in owned.values()})
    if sum(map(len, parts)) != rows or len({*map(len, parts)}) != 1:
        raise UserError(
            f"microbatch={rows} sequences cannot be shared equally by "
            f"{jax.process_count()} processes on the mesh {dict(mesh.shape)}"
        )
    return parts.index(tuple(sorted(owned[jax.process_index()]))), len(parts)


def assemble(
    batch: Mapping[str, np.ndarray], *, rows: int, axis: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Global arrays from what every process brings: `rows` of them along `axis`, cut
    over the mesh's batch axes.
    """
    arrays = {}
    for name, local in batch.items():
        shape = (*local.shape[:axis], rows, *local.shape[axis + 1 :])
        spec = P(*(None,) * axis, BATCH, *(None,) * (local.ndim - axis - 1))
        placement = named(spec, shape, mesh)
        arrays[name] = jax.make_array_from_process_local_data(placement, local, shape)
    return arrays
