"""TPU kernels run by JAX's interpreter on a CPU: races and stray reads fail the test, and
the bytes they copy are counted.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from unittest import mock

import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

FIRST_BUFFER = 100  # how the interpreter numbers the arrays of a kernel, in order


def checked(**options) -> pltpu.InterpretParams:
    """All checks on; a race is left for `interpreted` to raise."""
    options |= {"out_of_bounds_reads": "raise", "uninitialized_memory": "nan"}
    if "on_race" in {field.name for field in fields(pltpu.InterpretParams)}:
        options["on_race"] = "warn"  # from JAX 0.12 on; before, it knew nothing else
    return pltpu.InterpretParams(detect_races=True, **options)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[Counter]:
    """Kernels traced inside run interpreted; yields bytes copied, by what was copied.

    Blocks that the grid brings to VMEM or takes from it count by the kernel's name for
    them. Copies that a kernel starts itself count as ("dma", n), where n is the place of
    the array read from among the inputs and outputs, or as "dma out" where they leave VMEM.
    Results have to be ready (`jax.block_until_ready`) before the context ends.

    Raises:
        AssertionError: a race was found (the interpreter itself only prints it), or
            nothing was interpreted.
        IndexError, JaxRuntimeError: a read out of bounds.
    """
    copies, states = Counter(), []

    class Races(interpreter.RaceDetectionState):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            states.append(self)  # one a kernel, thrown away after it

    def get(*args, input_name=None, _get=interpreter.get, **kwargs):
        token, values = _get(*args, input_name=input_name, **kwargs)
        if input_name is not None:
            copies[input_name] += values.nbytes
        return token, values

    def store(*args, output_name=None, _store=interpreter.store, **kwargs):
        if output_name is not None:
            copies[output_name] += np.asarray(args[6]).nbytes
        return _store(*args, output_name=output_name, **kwargs)

    # The interpreter's own DMA calls what is wrapped by `fail_on_exception`.
    get.__wrapped__ = interpreter.get.__wrapped__
    store.__wrapped__ = interpreter.store.__wrapped__

    def execute_write(dma, _write=interpreter.DMA.execute_write):
        if dma.data is not None:
            space = interpreter.TPU_MEMORY_SPACE_NAMES[int(dma.src_memory_space)]
            from_hbm = space in ("any", "hbm")
            copies["dma", dma.src_buffer_id - FIRST_BUFFER] += (
                dma.data_size if from_hbm else 0
            )
            copies["dma out"] += 0 if from_hbm else dma.data_size
        return _write(dma)

    interpreter.reset_tpu_interpret_mode_state()
    with (
        mock.patch.object(interpreter, "RaceDetectionState", Races),
        mock.patch.object(interpreter, "get", get),
        mock.patch.object(interpreter, "store", store),
        mock.patch.object(interpreter.DMA, "execute_write", execute_write),
        pltpu.force_tpu_interpret_mode(params or checked()),
    ):
        try:
            yield copies
        finally:
            interpreter.reset_tpu_interpret_mode_state()
    assert states, "nothing was interpreted"
    assert not any(state.races_found for state in states), "a race"


def pallas_calls(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every `pallas_call` in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for part in jaxprs_in_params(equation.params):
            yield from pallas_calls(part)
