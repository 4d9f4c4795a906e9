"""Digests: by hand, over shardings, and of arrays in which something was changed."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax import digests, sharding

SHAPE = (8, 6, 4)


def mix(word):
    """MurmurHash3's finalizer, in Python's integers."""
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def test_by_hand():
    """[1.0, -2.0], whose bits are 3f800000 and c0000000."""
    (found,) = digests.of_leaves({"w": jnp.array([1.0, -2.0])}).values()
    sums = []
    for seed in digests.SEEDS:
        places = [mix((seed + i * seed * seed) % 2**32) for i in (0, 1)]
        words = [mix(0x3F800000 ^ places[0]), mix(0xC0000000 ^ places[1])]
        sums.append(sum(words) % 2**32)
    assert found == f"float32[2] {sums[0]:08x}{sums[1]:08x}"


def test_names_say_where_a_leaf_is():
    tree = {"layers": [{"w": jnp.zeros((2, 3), jnp.bfloat16)}], "step": jnp.zeros((), jnp.int32)}
    found = digests.of_leaves(tree)
    assert list(found) == ["layers.0.w", "step"]
    assert found["layers.0.w"].startswith("bfloat16[2, 3] ")


def test_a_sharding_changes_nothing():
    kinds = [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_]
    tree = [(VALUES * 9).astype(kind) for kind in kinds]
    alone = digests.of_leaves(tree)
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    for spec in [("data", "tensor"), (None, None, ("tensor", "data"))]:
        place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert digests.of_leaves(jax.device_put(tree, place)) == alone


VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
PLACE = st.integers(0, VALUES.size - 1)


@settings(max_examples=50, deadline=None)
@given(place=PLACE, bit=st.integers(0, 31))
def test_any_flipped_bit_is_found(place, bit):
    changed = VALUES.copy()
    changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    assert digests.of_tree(changed) != digests.of_tree(VALUES)


@settings(max_examples=50, deadline=None)
@given(places=st.lists(PLACE, min_size=2, max_size=2, unique=True))
def test_any_swap_is_found(places):
    changed = VALUES.copy()
    flat = changed.reshape(-1)
    flat[places] = flat[places[::-1]]
    assert digests.of_tree(changed) != digests.of_tree(VALUES)


def test_zeros_and_moved_parts_are_found():
    x = VALUES
    rows, zeros = np.arange(len(x))[:, None, None], np.zeros_like(x)
    zeroed = [np.where(rows == 2, 0, x), zeros, -zeros]
    moved = [x[::-1], np.roll(x, 1, axis=2), x[[1, 0, *range(2, len(x))]], x.reshape(6, 8, 4)]
    found = digests.of_leaves([x, *zeroed, *moved]).values()
    assert len(set(found)) == len(found)
