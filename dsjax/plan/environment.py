"""What the compilers for absent hardware need in the environment, before JAX starts."""

import os

# libtpu looks for a TPU's metadata server, for a lock that only one process may hold, and
# for the names of its hosts otherwise; the levels keep its complaints to itself.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def prepare() -> None:
    """Sets what is not set. JAX itself stays on the CPU: an accelerator that is here
    would be taken, and is not needed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
