"""The direction of dependencies: who may import whom. A room may also import whatever its rooms may import."""

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "dsjax.errors": (),
    "dsjax.config": ("dsjax.errors",),
    "dsjax.sharding": ("dsjax.config",),
    "dsjax.models": ("dsjax.config",),
    "dsjax.nn": ("dsjax.config", "dsjax.sharding", "pallas_kernels.*.api"),
    "dsjax.checkpoint": ("dsjax.nn",),
    "dsjax.decode": ("dsjax.nn", "dsjax.data"),  # data: the tokenizer
    "dsjax.data": ("dsjax.config", "dsjax.sharding"),
    "dsjax.chips": (),
    "dsjax.hosts": ("dsjax.sharding",),
    "dsjax.train": (
        "dsjax.nn",
        "dsjax.data",
        "dsjax.checkpoint",
        "dsjax.count",
        "dsjax.chips",
        "dsjax.hosts",
    ),
    "dsjax.eval": ("dsjax.decode", "dsjax.data"),
    "dsjax.plan": ("dsjax.train", "dsjax.decode"),
    "dsjax.count": ("dsjax.nn", "dsjax.models", "dsjax.checkpoint"),
    "pallas_kernels": ("pallas_kernels",),
}
# These may import anything, and nothing imports them.
TOP = (
    "dsjax.cli",
    "dsjax.api",
    "dsjax.quickstart",
    "dsjax",
    "experiments",
    "colab",
    "tests",
)
THIRD_PARTY = {
    "dsjax.errors": set(),
    "dsjax.config": {"jax"},
    "dsjax.chips": set(),
    "pallas_kernels": {"jax", "jaxtyping", "numpy"},
}
PEERS = {"torch", "tqdm"}  # in benchmarks alone


def room(module: str) -> str:
    """dsjax.nn.mla -> dsjax.nn; any module of pallas_kernels -> pallas_kernels."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "dsjax" else 1])


def sources() -> list[Path]:
    return sorted(
        itertools.chain.from_iterable(
            (ROOT / top).rglob("*.py") for top in ("dsjax", "pallas_kernels")
        )
    )


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its head or inside a function, by its full name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def allowed(importer: str) -> set[str]:
    """The rooms that `importer` may reach, itself included; all of dsjax may raise its errors."""
    reached, waiting = set(), [importer]
    if importer != "pallas_kernels":
        waiting.append("dsjax.errors")
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += MAY_IMPORT.get(current, ())
    return reached


def permits(importer: str, imported: str) -> bool:
    rooms = allowed(importer)
    if room(imported) == "pallas_kernels" != importer:
        return "pallas_kernels.*.api" in rooms and imported.endswith(".api")
    return room(imported) in rooms


def test_every_room_has_a_rule():
    unknown = {room(name_of(path)) for path in sources()} - MAY_IMPORT.keys() - {*TOP}
    assert not unknown


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_point_downwards(path):
    importer = room(name_of(path))
    if importer in TOP:
        return
    ours = [
        name
        for name in imports(path)
        if name.split(".")[0] in ("dsjax", "pallas_kernels", "experiments", "tests")
    ]
    assert [name for name in ours if not permits(importer, name)] == []


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_low_rooms_know_few_libraries(path):
    importer = room(name_of(path))
    if importer not in THIRD_PARTY:
        return
    tops = {name.split(".")[0] for name in imports(path)}
    foreign = tops - sys.stdlib_module_names - {"dsjax", "pallas_kernels"}
    peers = PEERS if path.name in ("bench.py", "measure.py") else set()
    assert foreign <= THIRD_PARTY[importer] | peers


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("dsjax.data", "dsjax.nn.mla"),
        ("dsjax.nn", "dsjax.checkpoint"),
        ("dsjax.nn", "dsjax.models"),
        ("dsjax.nn", "pallas_kernels.grouped_matmul.reference"),
        ("dsjax.decode", "dsjax.checkpoint"),
        ("dsjax.train", "dsjax.cli"),
        ("dsjax.train", "dsjax"),
        ("pallas_kernels", "dsjax.errors"),
    ],
)
def test_the_rules_forbid(importer, imported):
    assert not permits(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("dsjax.train", "dsjax.nn.mla"),
        ("dsjax.eval", "dsjax.nn.weights"),
        ("dsjax.nn", "pallas_kernels.grouped_matmul.api"),
        ("dsjax.config", "dsjax.errors"),
    ],
)
def test_the_rules_permit(importer, imported):
    assert permits(importer, imported)
