import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vibejax import sharding


def test_axes_left_out_have_size_one():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert mesh.devices.size == 8


def test_a_mesh_may_use_some_of_the_devices():
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[2:4])
    assert list(mesh.devices.flat) == jax.devices()[2:4]


def test_unknown_mesh_axis_is_named():
    with pytest.raises(ValueError, match=r"mesh axes \['model'\]: must be among data, fsdp"):
        sharding.make_mesh({"model": 8})


def test_sizes_that_do_not_use_all_devices_are_an_error():
    with pytest.raises(ValueError, match="data=1 x fsdp=3 x context=1 x tensor=2 needs 6 devices"):
        sharding.make_mesh({"fsdp": 3, "tensor": 2})


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not there: one of two slices of 2x2 chips, or of two hosts of GPUs."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def of_two_slices(**fields):
    return [
        Device(4 * part + 2 * y + x, part, (x, y, 0), **fields)
        for part in (1, 0)
        for y in (0, 1)
        for x in (0, 1)
    ]


def test_data_alone_lies_across_slices():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2}, of_two_slices())
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices[:, 0, 0, 0], [0, 0, 1, 1])
    assert (slices == slices[:, :1, :1, :1]).all()
    assert {*mesh.devices.flat} == {*of_two_slices()}
    with pytest.raises(ValueError, match="axis data = 1 must be a multiple of the 2 slices"):
        sharding.make_mesh({"fsdp": 8}, of_two_slices())


def test_gpus_of_several_hosts_keep_their_order():
    devices = of_two_slices(platform="gpu", device_kind="NVIDIA H100")
    mesh = sharding.make_mesh({"fsdp": 8}, devices)
    assert [*mesh.devices.flat] == devices


def test_axis_names_become_mesh_axes():
    want = P(("data", "fsdp"), "context", "tensor", None)
    assert sharding.spec("batch", "length", "heads", None) == want
    assert sharding.mesh_axes("batch") == ("data", "fsdp")
    assert sharding.mesh_axes("vocab") == ("tensor",)
    assert sharding.mesh_axes("layers") == ()


def test_every_rule_names_mesh_axes():
    for axis in sharding.AXIS_RULES:
        assert set(sharding.mesh_axes(axis)) <= set(sharding.MESH_AXES)


def test_unknown_array_axis_is_named():
    with pytest.raises(ValueError, match="no sharding rule for axis 'width'; known: batch, length"):
        sharding.spec("batch", "width")


@pytest.mark.parametrize(
    "sizes, shape, axes, message",
    [
        ({"tensor": 8}, (2, 128), ("kv_heads", "head_dim"), r"'kv_heads' of size 2 .* = 8"),
        ({"data": 4, "fsdp": 2}, (4, 8), ("batch", "length"), r"'batch' of size 4 .* = 8"),
        ({"context": 8}, (8, 60), ("batch", "length"), r"'length' of size 60 .* = 8"),
    ],
    ids=["one mesh axis", "two mesh axes", "too few"],
)
def test_an_axis_that_does_not_divide_is_named(sizes, shape, axes, message):
    mesh = sharding.make_mesh(sizes)
    with pytest.raises(ValueError, match=f"axis {message}"):
        sharding.sharding(mesh, shape, *axes)


def test_sharding_cuts_and_replicates():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    cut = sharding.sharding(mesh, (8, 6, 4), "batch", None, "heads")
    assert cut.shard_shape((8, 6, 4)) == (2, 6, 2)
    assert sharding.replicated(mesh).shard_shape((8, 6, 4)) == (8, 6, 4)


def test_axes_of_one_device_are_left_out():
    """What a program gives back then has the sharding that was asked for: equal, not just alike."""
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert sharding.sharding(mesh, (8, 64, 4, 16), "batch", "length", "heads", None).spec == P(
        "fsdp", None, "tensor"
    )
    place = sharding.sharding(mesh, (2, 8, 6), "layers", "embed", "mlp")
    made = jax.jit(lambda: jax.lax.with_sharding_constraint(np.ones((2, 8, 6)), place))()
    again = jax.jit(lambda x: x + 1)(made)
    assert made.sharding == again.sharding == place


def test_constrain_lays_out_on_the_mesh_in_force():
    x_BT = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    assert sharding.constrain(x_BT, "batch", "length") is x_BT  # there is none here
    mesh = sharding.make_mesh({"fsdp": 4, "context": 2})
    with jax.set_mesh(mesh):
        out_BT = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "length"))(x_BT)
    assert out_BT.sharding.shard_shape(out_BT.shape) == (2, 4)
    np.testing.assert_array_equal(out_BT, 2 * x_BT)
