"""The table of `benchmarks/grouped_matmul.md`: the TPU kernels' work at the models' shapes.

python -m pallas_kernels.grouped_matmul.traffic
"""

import itertools

import numpy as np

from pallas_kernels.grouped_matmul.tiles_tpu import SWIGLU
from pallas_kernels.grouped_matmul.work import outer_work, rows_work
from pallas_kernels.work import Work


def main() -> None:
    """Prints it in Markdown."""
    rng = np.random.default_rng(0)
    models = {"V3": (7168, 2048), "V2": (5120, 1536), "V2-Lite": (2048, 1408)}
    print(
        "| | groups, rows | product | w | all bytes | FLOPs |\n|---|---|---|---|---|---|"
    )
    for (model, (D, F)), (groups, rows) in itertools.product(
        models.items(), [(8, 4096), (32, 8192), (256, 512)]
    ):
        sizes = rng.multinomial(rows, np.ones(groups) / groups).tolist()
        up, down = {"contracted": D, "out": F}, {"contracted": F, "out": D}
        products = {
            "gate or up": rows_work(sizes, rows=rows, **up),
            "gate and up": rows_work(sizes, rows=rows, **up, has=SWIGLU),
            "down": rows_work(sizes, rows=rows, **down),
        }
        if rows > groups * 8:
            products |= {
                "up, by rows": rows_work(sizes, rows=rows, **down, turned=False),
                "down, by rows": rows_work(sizes, rows=rows, **up, turned=False),
            }
        for name, done in products.items():
            _print(f"{model} | {groups}, {rows} | {name}", done, "w")
        if rows > groups * 8:
            done = outer_work(sizes, rows=rows, N=F, K=D)
            _print(f"{model} | {groups}, {rows} | up, by weights", done, "dw")


def _print(name: str, done: Work, weights: str) -> None:
    flops = done.flops / done.flops_needed
    print(f"| {name} | {done.ratio(weights):.3f} | {done.ratio():.2f} | {flops:.3f} |")


if __name__ == "__main__":
    main()
