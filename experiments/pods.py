"""The papers' runs on TPU pods, on meshes that `dsjax plan` chose.

What is trained, on how many tokens and at what rate is as in `experiments.pretrain`. Ours
are the mesh, the sequences that go through it at once, and what is computed again. Each
docstring has the plan's command: on any machine with the `tpu` extra it says whether the
recipe fits, and what it can reach there. docs/pods.md says how to start one.

V3 is not among those of v6e: its largest slice has 256 chips, on which float32 weights and
gradients with bfloat16 moments are 32.0 GB a chip, of 33.6.
"""

from dataclasses import replace

from dsjax.nn.options import Remat
from dsjax.train.experiment import Experiment, MeshShape
from experiments.pretrain import pretrain_v2, pretrain_v2_lite, pretrain_v3


def v3_v5p() -> Experiment:
    """V3 on 512 v5p chips: an expert group of 64 has four experts a device.

    Command: dsjax train experiments.pods.v3_v5p --set data.sources.0.path=DIR
    Hardware: v5p:8x8x8 (v5p-1024 on Cloud TPU: 512 chips, 128 hosts).
    Plan: dsjax plan v3 --topology v5p:8x8x8 --mesh fsdp=8,expert=64
        --batch-per-device 2 --length 4096 --remat full
    Memory: weights, moments and gradients 16.0 GB a device; the peak at 1 x 2048 is
        25.4 GB of 102.8. Bound there: MFU at most 37%, 70% if all overlaps.
    """
    return replace(
        pretrain_v3(),
        name="v3_v5p",
        microbatch=1024,
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=8, expert=64),
    )


def v3_tpu7x() -> Experiment:
    """V3 on 256 tpu7x chips, each of which is two devices: the mesh of 512 v5p chips.

    Command: dsjax train experiments.pods.v3_tpu7x --set data.sources.0.path=DIR
    Hardware: tpu7x:4x8x8 (256 chips, 64 hosts, 512 devices).
    Plan: dsjax plan v3 --topology tpu7x:4x8x8 --mesh fsdp=8,expert=64
        --batch-per-device 2 --length 4096 --remat full
    """
    return replace(v3_v5p(), name="v3_tpu7x")


def v2_v5p() -> Experiment:
    """V2 on 256 v5p chips: an expert group is one of the router's, on one device, so
    that a token's row goes to three devices at most.

    Command: dsjax train experiments.pods.v2_v5p --set data.sources.0.path=DIR
    Hardware: v5p:4x8x8 (v5p-512 on Cloud TPU: 256 chips, 64 hosts).
    Plan: dsjax plan v2 --topology v5p:4x8x8 --mesh fsdp=32,expert=8
        --batch-per-device 3 --length 4096 --remat full --moments float32
    """
    return replace(
        pretrain_v2(),
        name="v2_v5p",
        microbatch=768,
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=32, expert=8),
    )


def v2_v6e() -> Experiment:
    """V2 on a whole v6e pod, one sequence a chip at a time.

    Command: dsjax train experiments.pods.v2_v6e --set data.sources.0.path=DIR
    Hardware: v6e:16x16 (v6e-256 on Cloud TPU: 256 chips, 64 hosts).
    Plan: dsjax plan v2 --topology v6e:16x16 --mesh fsdp=32,expert=8
        --batch-per-device 1 --length 4096 --remat full --moments float32
    """
    return replace(v2_v5p(), name="v2_v6e", microbatch=256)


def v2_lite_v5p() -> Experiment:
    """V2-Lite on 64 v5p chips, four sequences a chip at a time.

    Command: dsjax train experiments.pods.v2_lite_v5p --set data.sources.0.path=DIR
    Hardware: v5p:4x4x4 (v5p-128 on Cloud TPU: 64 chips, 16 hosts).
    Plan: dsjax plan v2-lite --topology v5p:4x4x4 --mesh fsdp=8,expert=8
        --batch-per-device 4 --length 4096 --remat full --moments float32
    Memory: the peak at 4 x 2048 with bfloat16 moments is 6.6 GB a device, of 102.8.
        Bound there: MFU at most 46%, 72% if all overlaps.
    """
    return replace(
        pretrain_v2_lite(),
        name="v2_lite_v5p",
        microbatch=256,
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=8, expert=8),
    )


PODS = (v3_v5p, v3_tpu7x, v2_v5p, v2_v6e, v2_lite_v5p)
