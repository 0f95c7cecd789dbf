"""Where arrays live: one table from logical axes to mesh axes, and what follows from it.

Data, fully sharded and tensor parallelism are shapes of the mesh, not code.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import MeshConfig, ModelConfig
from jaxformer.errors import ConfigError
from jaxformer.types import Batch

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("length", None),
    ("head_dim", None),
    ("lora", None),
    ("buckets", None),
    ("types", None),
    ("labels", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given); `ConfigError` if they do not fit its shape."""
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.tensor
    data = max(len(devices) // rest, 1) if config.data == -1 else config.data
    if data * rest != len(devices):
        raise ConfigError(
            f"mesh data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} takes "
            f"{data * rest} devices, but there are {len(devices)}; change the mesh, or leave "
            "mesh.data at -1."
        )
    shape = (data, config.fsdp, config.tensor)
    for group in np.array(devices).reshape(-1, config.tensor):
        if len({device.process_index for device in group}) > 1:
            raise ConfigError(
                f"mesh.tensor {config.tensor} reaches over more than one process, but each process "
                "reads rows of its own; make it a divisor of the devices of one process."
            )
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def check_fits(config: ModelConfig, mesh: Mesh) -> None:
    """Raise a `ConfigError` naming every dimension the mesh does not divide, and what would fit."""
    wrong = []
    transforms = config.head_transform or config.pooler != "none"
    for axis, sizes in {
        "tensor": {
            "n_heads": config.n_heads,
            **({"n_kv_heads": config.n_kv_heads} if config.n_kv_heads else {}),
            "d_ff": config.d_ff,
            "vocab_size": config.vocab_size,
            "source_vocab_size": config.source_vocab_size,
            **({"d_model": config.d_model} if transforms else {}),
        },
        "fsdp": {"d_model": config.d_model},
    }.items():
        parts = mesh.shape[axis]
        for name, size in sizes.items():
            if size % parts:
                fits = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
                larger = _larger(config, name, parts)
                wrong.append(
                    f"model.{name} {size} is not a multiple of mesh.{axis} {parts} "
                    f"(mesh.{axis} could be {', '.join(map(str, fits))}"
                    + (f"; or {name} {larger})" if larger else ")")
                )
    if wrong:
        raise ConfigError("the mesh does not divide the model:\n  " + "\n  ".join(wrong))


def _larger(config: ModelConfig, name: str, parts: int) -> int | None:
    """The next size of `name` that `parts` divides and the rest of `config` allows, if any near."""
    start = -(-getattr(config, name) // parts) * parts
    for size in range(start, start + 64 * parts, parts):
        with contextlib.suppress(ConfigError):
            dataclasses.replace(config, **{name: size})
            return size
    return None


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings_for(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of an abstract tree whose leaves carry logical axis names.

    Leaves without names (a step counter, a key) are replicated.
    """

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.LogicallyPartitioned)

    def unbox_empty(node: Any) -> Any:
        """An optimizer's place for a parameter that it leaves out has a box, but no array in it."""
        return node.value if is_box(node) and not hasattr(node.value, "shape") else node

    boxed = jax.tree.map(unbox_empty, boxed, is_leaf=is_box)
    return logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of anything whose first axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a numpy batch as global arrays, their rows cut over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def copies(params: Any) -> Mesh | None:
    """The mesh of which every device holds all of `params`, if there is one of several devices."""
    first = jax.tree.leaves(params)[0]
    place = getattr(first, "sharding", None)
    if not isinstance(place, NamedSharding) or place.mesh.size == 1:
        return None
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    whole = all(getattr(each, "is_fully_replicated", False) for each in places)
    return place.mesh if whole and isinstance(place.mesh, Mesh) else None


def parts_of(mesh: Mesh | None) -> int:
    """How many parts rows are cut into over such a mesh of copies, if there is one."""
    return 1 if mesh is None else mesh.size


def beside(params: Any, others: Any) -> Any:
    """`params` as they are if they are on the devices of `others`, else moved there, each whole."""
    mine, theirs = (jax.tree.leaves(each)[0].sharding for each in (params, others))
    if isinstance(theirs, NamedSharding):
        there = isinstance(mine, NamedSharding) and mine.mesh == theirs.mesh
        theirs = NamedSharding(theirs.mesh, PartitionSpec())
    else:
        there = mine == theirs
    return params if there else jax.device_put(params, theirs)


def over_rows(mesh: Mesh | None, function: Callable[..., Any], *rows: Any) -> Callable[..., Any]:
    """`function` with the rows cut over the devices of `mesh`, if there is one, which never talk.

    `rows` says of each argument, or of each part of it, whether its arrays are cut along their
    first axis, as all are that it returns; every device has the others whole.
    """
    if mesh is None:
        return function
    cut, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=jax.tree.map(lambda has: cut if has else whole, rows),
        out_specs=cut,
        check_vma=False,
    )


def fetch(tree: Any) -> Any:
    """Every leaf as a whole numpy array, on every process."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, jitted functions see the mesh and modules' logical axes mean something."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield
