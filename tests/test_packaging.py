"""What a newcomer relies on: the metadata, the README's commands and its tree."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
UNTRACKED = {"__pycache__", "build", "dist", "quickstart", "runs", "venv"}
HIDDEN = {".ci", ".gitignore", ".pre-commit-config.yaml"}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(extra: str = "") -> set[str]:
    """The distributions that dsjax asks for, by itself or with an extra."""
    asked = map(Requirement, metadata.requires("dsjax"))
    return {
        canonical(requirement.name)
        for requirement in asked
        if not requirement.marker or requirement.marker.evaluate({"extra": extra})
    }


def third_party(*folders: str) -> set[str]:
    """The top-level modules, neither ours nor Python's, that the folders import."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    ours = {"dsjax", "pallas_kernels", "tests", "conftest"}
    return modules - sys.stdlib_module_names - ours


def unmet(modules: set[str], asked: set[str]) -> set[str]:
    providers = metadata.packages_distributions()
    return {
        module
        for module in modules
        if not {canonical(name) for name in providers.get(module, [])} & asked
    }


def test_everything_imported_is_required():
    modules = third_party("dsjax", "pallas_kernels")
    modules -= {"torch"}  # benchmarks compare with it, where it is installed
    assert unmet(modules, requirements()) == set()


def test_everything_required_is_imported():
    modules = third_party("dsjax", "pallas_kernels")
    providers = metadata.packages_distributions()
    used = {canonical(name) for module in modules for name in providers.get(module, [])}
    # safetensors: to make checkpoints with; those that people bring are read by ourselves
    assert requirements() - used == {"safetensors"}


def test_the_extras():
    extras = {"data", "tpu", "cuda", "test", "notebook", "eval"}
    assert extras == set(metadata.metadata("dsjax").get_all("Provides-Extra"))
    assert metadata.metadata("dsjax")["Requires-Python"] == ">=3.11"


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ("tpu", "libtpu"),
        ("cuda13-local", "jax-cuda13-plugin"),
        ("cuda13-local", "jax-cuda13-pjrt"),
    ],
)
def test_compilers_for_absent_hardware_match_jax(extra, name):
    """The `test` extra brings them, so that ahead-of-time checks never skip."""
    version = metadata.version(name)
    if name == "jax-cuda13-pjrt":  # a requirement of the plug-in, not of jax
        assert version == metadata.version("jax-cuda13-plugin")
        return
    (needed,) = (
        requirement
        for requirement in map(Requirement, metadata.requires("jax"))
        if requirement.name == name and requirement.marker.evaluate({"extra": extra})
    )
    assert version in needed.specifier


def test_no_cuda_libraries_are_asked_for():
    """A CPU machine installs the plug-in without gigabytes of CUDA."""
    asked = requirements("test")
    assert not [name for name in asked if name.startswith("nvidia")]
    test = [line for line in metadata.requires("dsjax") if "cuda13-local" in line]
    assert len(test) == 1


def test_every_folder_is_a_package():
    """`find_packages` leaves out a folder without __init__.py, and all below it."""
    sources = [
        *(ROOT / "dsjax").rglob("*.py"),
        *(ROOT / "pallas_kernels").rglob("*.py"),
    ]
    assert {path.parent for path in sources} == {
        path.parent for path in sources if path.name == "__init__.py"
    }


@pytest.mark.parametrize(
    "command",
    ["pip install -e . && dsjax quickstart", "pip install -e '.[test]' && pytest"],
)
def test_the_two_commands_are_one_line_each(command):
    """A fresh environment, then what the command says; CI runs the second of them."""
    (line,) = [line for line in README.splitlines() if line.endswith(command)]
    assert line.strip() == f"python3 -m venv .venv && . .venv/bin/activate && {command}"


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (grep,) = re.findall(r"readme_command=\$\((grep .*)\)", script)
    done = subprocess.run(
        ["bash", "-c", grep], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "pip install -e '.[test]' && pytest\n"


def test_licence():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- the README's tree: one line for every file


def tree() -> dict[str, str]:
    """Path -> its line's words; a folder's path ends in a slash."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", README, re.DOTALL)[1]
    found, folders = {}, []
    for line in block.splitlines():
        indent, name, words = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups()
        depth, rest = divmod(len(indent), 2)
        assert not rest, line
        del folders[depth:]
        path = "".join(folders) + name
        assert path not in found, line
        found[path] = words
        if name.endswith("/"):
            folders.append(name)
    return found


def files(folder: Path = ROOT) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name not in HIDDEN:
            continue
        if path.name in UNTRACKED or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            yield from files(path)
        elif path.name != "__init__.py":
            yield path.relative_to(ROOT).as_posix()


def test_the_tree_names_every_file():
    """A folder without lines of its own stands for all that is in it."""
    named = tree()
    leaves = {
        folder
        for folder in named
        if folder.endswith("/")
        and not any(path != folder and path.startswith(folder) for path in named)
    }
    covered = lambda path: any(path.startswith(folder) for folder in leaves)  # noqa: E731
    present = {path for path in files() if not covered(path)}
    listed = {path for path in named if not path.endswith(("/", "__init__.py"))}
    assert present - listed == set(), "files without a line"
    assert listed - present == set(), "lines without a file"


def test_every_line_of_the_tree_says_something():
    assert [path for path, words in tree().items() if not words] == []
