"""Digests of arrays, computed where they lie and the same however they are sharded.

Every element becomes one 32-bit word, its bits mixed with its place in the whole array, and the
digest is the sum of all words modulo 2**32, twice with different mixing. Sums of integers do not
depend on their order, so devices add up their own parts.

What it finds: for a given place the mixing is a bijection of the bits, so one changed element
always changes both sums. Elements that changed places, parts that became zeros and any other
change of several elements leave both sums as they were with a chance of about 2**-64. It is no
defence against somebody who looks for a collision.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = (0x9E3779B9, 0x85EBCA6B)  # of the two sums; odd, and so are their powers


def of_leaves(tree: Any) -> dict[str, str]:
    """Path of each array in `tree` -> its dtype, shape and digest.

    Args:
        tree: of arrays, on any devices; nothing of them but 8 bytes each comes to the host.
    """
    sums = jax.device_get([_sums(leaf) for leaf in jax.tree.leaves(tree)])
    return {
        name: f"{kind} {first:08x}{second:08x}"
        for (name, kind), (first, second) in zip(kinds(tree).items(), sums, strict=True)
    }


def kinds(tree: Any) -> dict[str, str]:
    """Path of each array in `tree` -> its dtype and shape, with which its digest begins."""
    named, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype.name}{list(leaf.shape)}"
        )
        for path, leaf in named
    }


def of_tree(tree: Any) -> str:
    """One digest of all arrays of `tree`."""
    return of_text(json.dumps(of_leaves(tree), sort_keys=True))


def of_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Both sums of one array. By array: many of a state have the same shape, hence one program."""
    words = _words(x)
    return jnp.stack([_sum(words, seed) for seed in SEEDS])


def _sum(words: jax.Array, seed: int) -> jax.Array:
    place = jnp.uint32(seed)
    for axis, size in enumerate(words.shape):
        # A factor for each axis: a running index would be the same for places 2**32 apart.
        factor = np.uint32(pow(seed, axis + 2, 2**32))
        index = jnp.arange(size, dtype=jnp.uint32) * factor
        place = place + jnp.expand_dims(index, [i for i in range(words.ndim) if i != axis])
    return jnp.sum(_mix(words ^ _mix(place)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of 8 bytes is two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each bit depends on all (the finalizer of MurmurHash3)."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
