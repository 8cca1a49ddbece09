"""The command line: helps, exit codes, one line for every mistake, JSON alone on stdout."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax import cli
from dsjax.errors import UserError

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "quickstart",
    "train",
    "inspect",
    "plan",
    "tokenize",
    "convert",
    "export",
    "generate",
    "eval",
    "scaling",
]


def run(*args: str, **options) -> subprocess.CompletedProcess:
    """`dsjax ARGS` in a process of its own."""
    command = [sys.executable, "-m", "dsjax.cli", *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, **options
    )


def help_of(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main([*args, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_parses(capsys, command):
    *_, heading, example = help_of(capsys, command).strip().splitlines()
    assert heading == "example:"
    program, *args = shlex.split(example)
    assert program == "dsjax"
    assert args[0] == command
    assert cli.parser().parse_args(args).run


def test_help_names_every_command(capsys):
    out = help_of(capsys)
    for command in COMMANDS:
        assert f"    {command}" in out
    assert "example:\n  dsjax quickstart" in out


def test_help_needs_no_jax():
    """`--help` answers at once: nothing heavy is imported before a command runs."""
    program = (
        "import sys, dsjax.cli\n"
        "try: dsjax.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'jax', 'flax', 'numpy', 'orbax'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "x.y", "--steps", "0"],
        ["inspect"],
        ["inspect", "v3", "--context", "-1"],
        ["inspect", "v3", "--context", "many"],
        ["plan", "v3"],
        ["plan", "v3", "--topology", "v5p:2x2x1", "--mode", "serve"],
        ["plan", "v3", "--topology", "v5p:2x2x1", "--batch-per-device", "1/0"],
        ["generate", "model"],
        ["generate", "model", "--prompt", "x", "--dtype", "int8"],
        ["eval", "model", "--task", "mmlu", "--data", "x"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(capsys, args):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("dsjax: ")
    assert printed.err.count("\n") == 1


def raiser(error: BaseException):
    def find(*_):
        raise error

    return find


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("shape (2, 3)\n is not (3, 2)"), "shape (2, 3) is not (3, 2)"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
            "a/b: No such file or directory",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            "a/b: Permission denied",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "[Errno 28] No space left on device",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: write: No space left on device [x=1]"),
            "No space left on device",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_line(capsys, monkeypatch, error, line):
    monkeypatch.setattr("dsjax.count.find", raiser(error))
    assert cli.main(["inspect", "v3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"dsjax: {line}\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("dsjax.count.find", raiser(ValueError("a defect")))
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["inspect", "v3"])


def test_interrupt(capsys, monkeypatch):
    monkeypatch.setattr("dsjax.count.find", raiser(KeyboardInterrupt()))
    assert cli.main(["inspect", "v3"]) == 130
    assert capsys.readouterr().err == "dsjax: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dsjax.cli", "inspect", "tiny_llm_7b"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_json_is_all_of_stdout():
    done = run("inspect", "tiny-v3", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["name"] == "tiny_v3"


def test_plain_user_without_accelerator_sees_no_complaints(monkeypatch):
    """libtpu and the CUDA plug-in are installed for the tests; neither speaks up."""
    if any(next(Path("/dev").glob(pattern), None) for pattern in cli.ACCELERATORS):
        pytest.skip("this machine has an accelerator")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    done = run("inspect", "tiny-v3")
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("files", [["nvidia0", "nvidiactl"], ["vfio/0"], ["accel0"]])
def test_an_accelerator_is_left_to_jax(monkeypatch, tmp_path, files):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cli, "Path", lambda _: tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # on any machine with the driver
    cli._stay_on_cpu_without_accelerator()
    assert os.environ.pop("JAX_PLATFORMS") == "cpu"
    for file in files:
        (tmp_path / file).touch()
    cli._stay_on_cpu_without_accelerator()
    assert "JAX_PLATFORMS" not in os.environ


def test_the_users_platform_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    monkeypatch.setattr(cli, "Path", lambda _: tmp_path)
    cli._stay_on_cpu_without_accelerator()
    assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
