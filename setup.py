"""Metadata, dependencies and extras. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dsjax/__init__.py").read_text())

DATA = ["pyarrow", "zstandard"]  # Parquet, .jsonl.zst
TEST = [
    *DATA,
    # jax's own extras give the compilers that match it, for the ahead-of-time checks:
    # libtpu, and the CUDA plug-in without CUDA's libraries.
    "jax[tpu,cuda13-local]",
    "beartype",
    "ipykernel",
    "jupytext",
    "nbclient",
    "nbformat",
    "packaging",
    "psutil",
    "pytest",
    "pytest-xdist",
    "ruff>=0.17,<0.18",  # the formatter changes from version to version
]

setup(
    name="dsjax",
    version=VERSION[1],
    description="The DeepSeek family of models as one Transformer in JAX",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["dsjax*", "pallas_kernels*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.16",
        "safetensors",
        "tokenizers",
        "etils[epath]",
        "jaxtyping",
        "jinja2",
        "matplotlib",
        "ml_dtypes",
        "numpy",
        "tensorboardX",
        "tensorstore",
        "tqdm",
    ],
    extras_require={
        "data": DATA,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": TEST,
        "notebook": ["ipykernel", "jupytext", "nbclient", "nbformat"],
        "eval": [],  # perplexity needs nothing more
    },
    entry_points={"console_scripts": ["dsjax = dsjax.cli:main"]},
)
