"""The notebooks: paired texts agree, what they import is there, and by marker every cell
runs on a tiny budget: what it does, `test_quickstart.py` does by default.
"""

import ast
import os
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_agree(path):
    notebook = jupytext.read(path)
    script = jupytext.read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs committed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_there(path):
    tree = ast.parse(path.with_suffix(".py").read_text("utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert any(getattr(n, "module", None) == "dsjax.train.step" for n in imports)
    exec(compile(ast.Module(imports, []), path.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """In an empty directory, by this interpreter, with this source tree."""
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("DSJAX_NOTEBOOK_STEPS", "2")
    # One device, as a reader has; but quick compiles, as everywhere here.
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", search)
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any("largest difference" in str(cell.outputs) for cell in code)
