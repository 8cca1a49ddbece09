"""Where every array lives: one frozen record of PartitionSpecs, and the mesh.

The mesh always has the four axes (data, fsdp, expert, tensor), all of Explicit type, so
that a mistake in a layout fails while tracing. One device is the mesh of ones: there is
no second code path.

A weight rests cut along `fsdp` (and, outside the experts, along `expert` too), so that
all devices share its bytes. It is gathered when a layer uses it
(`dsjax.nn.weights.use`). The other axes stay: `tensor` cuts heads, feed-forward widths
and the vocabulary, `expert` cuts the experts. Activations are cut along their batch
only.
"""

import math
from dataclasses import dataclass, fields, replace

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
REST = ("fsdp", "expert")  # axes that hold a weight at rest; gathered at its use
BATCH = ("data", "fsdp", "expert")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """PartitionSpecs of weights (by their attribute's letters) and of activations.

    `storage`: axes along which a weight merely rests cut, and is gathered for its use.
    `state`: axes along which the state of training is cut besides; its parameters are
    gathered along them once a step (`dsjax.train.zero`).

    Letters: V vocabulary, D model, N heads, K key-value heads, G query heads of one of
    them, H head size, Q query latent, L latent, C latent + rotary key, E experts, F
    feed-forward width, M two times D, B batch, T length.
    """

    embedding_VD: P = P(("tensor", "fsdp"), "expert")
    head_VD: P = P(("tensor", "fsdp"), "expert")
    norm: P = P()
    q_KGHD: P = P("tensor", None, None, REST)
    kv_KHD: P = P("tensor", None, REST)
    o_DKGH: P = P(REST, "tensor", None, None)
    q_bias_KGH: P = P("tensor", None, REST)
    kv_bias_KH: P = P("tensor", REST)
    q_NHD: P = P("tensor", None, REST)
    q_down_QD: P = P(None, REST)
    q_up_NHQ: P = P("tensor", None, REST)
    kv_down_CD: P = P(None, REST)
    kv_up_NHL: P = P("tensor", None, REST)
    o_DNH: P = P(REST, "tensor", None)
    in_FD: P = P("tensor", REST)
    out_DF: P = P(REST, "tensor")
    router_ED: P = P(None, REST)
    router_bias_E: P = P(REST)
    expert_in_EFD: P = P("expert", "tensor", "fsdp")
    expert_out_EDF: P = P("expert", "fsdp", "tensor")
    mtp_DM: P = P(REST, None)
    tokens_BT: P = P(BATCH, None)
    storage: tuple[str, ...] = REST
    state: tuple[str, ...] = ()


def with_whole_dense(sharding: Sharding) -> Sharding:
    """The same with weights outside the experts whole along `expert`: each device of the
    axis has them, and none is gathered. For few devices with memory to spare.
    """

    def whole(entry):
        if isinstance(entry, tuple):
            return tuple(axis for axis in entry if axis != "expert") or None
        return None if entry == "expert" else entry

    stay = "expert_in_EFD", "expert_out_EDF", "tokens_BT"
    specs = {
        field.name: P(*map(whole, getattr(sharding, field.name)))
        for field in fields(Sharding)
        if field.type is P and field.name not in stay
    }
    return replace(sharding, **specs, storage=whole(sharding.storage) or ())


_MODEL = ("tensor", "expert")

# For decoding on a large mesh: no weight is gathered, since few tokens would not pay for
# it. `expert` cuts heads, widths and the vocabulary, as `tensor` does; tokens are
# gathered along it where they meet those, and attention itself stays with its rows.
SERVING = Sharding(
    embedding_VD=P(_MODEL, None),
    head_VD=P(_MODEL, None),
    q_KGHD=P("tensor", None, None, None),
    kv_KHD=P("tensor", None, None),
    o_DKGH=P(None, "tensor", None, None),
    q_bias_KGH=P("tensor", None, None),
    kv_bias_KH=P("tensor", None),
    q_NHD=P(_MODEL, None, None),
    q_down_QD=P(_MODEL, None),
    q_up_NHQ=P(_MODEL, None, None),
    kv_down_CD=P(_MODEL, None),
    kv_up_NHL=P(_MODEL, None, None),
    o_DNH=P(None, _MODEL, None),
    in_FD=P(_MODEL, None),
    out_DF=P(None, _MODEL),
    router_ED=P(None, None),
    router_bias_E=P(None),
    expert_in_EFD=P("expert", "tensor", None),
    expert_out_EDF=P("expert", None, "tensor"),
    mtp_DM=P(None, None),
    storage=(),
)


def platform() -> str | None:
    """What the mesh around is of: "cpu", "gpu" or "tpu"; None if it does not tell."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else None


def is_cut(spec: P, *axes: str) -> bool:
    """Whether any of these axes of the mesh around, of all if none is named, cuts an
    array that lies so.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes[a] > 1 for a in axes_of(*spec) if not axes or a in axes)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """A mesh of data * fsdp * expert * tensor devices; by default the mesh of ones on
    the first device.

    Raises UserError when there are fewer devices than the product of the axes.
    """
    shape = (data, fsdp, expert, tensor)
    devices = jax.devices() if devices is None else devices
    need = math.prod(shape)
    if need > len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, shape))} needs {need} devices, "
            f"{len(devices)} are here"
        )
    # An axis may be a part of a torus's dimension: on 8 x 8 x 8 chips one of 4, say.
    placed = mesh_utils.create_device_mesh(
        shape, devices[:need], allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 4)


def parse_mesh(text: str) -> Mesh:
    """A mesh from "fsdp=2,expert=4" (any subset of the axes; an empty text is the mesh
    of ones)."""
    return make_mesh(**parse_sizes(text))


def parse_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes from "fsdp=2,expert=4"."""
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(
                f"mesh item {item!r}: write AXIS=SIZE "
                f"with AXIS one of {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    return sizes


def axes_of(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in entries of a PartitionSpec, in order."""
    names = []
    for entry in entries:
        names += [entry] if isinstance(entry, str) else entry or ()
    return tuple(names)


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` without the axes that do not divide their dimension, last axes first.

    A spec shorter than the shape is one of a single layer: the stacked layers in front
    of it are never cut.
    """
    spec = (
        (None,) * (len(shape) - len(spec)) + tuple(spec)
        if len(spec)
        else (None,) * len(shape)
    )
    fitted = []
    for size, entry in zip(shape, spec, strict=True):
        axes = (
            ()
            if entry is None
            else (entry,)
            if isinstance(entry, str)
            else tuple(entry)
        )
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        fitted.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return P(*fitted)


def named(spec: P, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array of `shape` whose single-layer spec is `spec`."""
    return NamedSharding(mesh, fit(spec, shape, mesh))
