"""The file of VIBEJAX_TILES: what it changes, and what it is refused for."""

import jax
import jax.numpy as jnp
import paged_rows
import pytest

from vibejax import attention, programs
from vibejax.kernels import decode_attention_gpu, decode_attention_tpu, flash_attention_gpu, tiles
from vibejax.kernels.flash_attention_gpu import Tile
from vibejax.kernels.tiles import Fetch, Step
from vibejax.run_folder import RunError

GOOD = """
[v5e]
forward = [1024, 256]
decode = [262144, 4]
[gpu9]
dq = [64, 32, 4, 1]
decode = [32, 8, 2]
"""


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    path = tmp_path / "tiles.toml"
    path.write_text(GOOD)
    monkeypatch.setenv(tiles.VARIABLE, str(path))


def test_the_tpu_kernels_take_what_the_file_has(chosen):
    """1,024 rows of 8 heads are 128 tokens; float32 takes half of the keys."""
    mine, other = (
        tiles.tpu_tiles("v5e", "bfloat16", 128, 8),
        tiles.tpu_tiles("v6e", "bfloat16", 128, 8),
    )
    assert (mine.forward, mine.backward) == (tiles.Tile(128, 256), other.backward)
    assert other.forward == tiles.Tile(256, 512)
    assert tiles.tpu_tiles("v5e", "float32", 128, 8).forward.key == 128


def test_the_gpu_kernels_take_what_the_file_has(chosen):
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16)] * 3
    mine, older = (flash_attention_gpu.tiles_for(*arrays, n) for n in (9, 8))
    assert mine.dq == Tile(64, 32, 4, 1) and mine.forward == Tile(128, 128, 8, 2)
    assert older.dq == Tile(128, 64, 8, 2)
    wide = [jax.ShapeDtypeStruct((1, 64, 2, 256), jnp.bfloat16)] * 3
    assert flash_attention_gpu.tiles_for(*wide, 9).dq == Tile(64, 64, 8, 2)


def test_decoding_takes_what_the_file_has(chosen, monkeypatch):
    """Interpreted, the TPU's kernel has v5e's; no device at hand is a Hopper."""
    seen = {}

    def attend(q, *_, **options):
        seen.update(options)
        return q

    case = paged_rows.case((40, 36))
    for backend, kernel in (("tpu", decode_attention_tpu), ("gpu", decode_attention_gpu)):
        monkeypatch.setattr(kernel, "paged_attention", attend)
        attention.paged_attention(*case[:4], implementation=f"{backend}_interpreted")
    assert (seen["fetch"], seen["step"]) == (Fetch(262_144, 4), Step())
    monkeypatch.setattr(attention, "_device", lambda: ("NVIDIA H100 80GB HBM3", "gpu"))
    attention.paged_attention(*case[:4])
    assert seen["step"] == Step(32, 8, 2)


def test_pages_of_a_block_and_keys_of_a_step_follow():
    """A page of 2 heads, 64 tokens of 128 numbers, key and value, of 2 bytes is 64 KiB."""
    blocks = decode_attention_tpu.blocks_for(
        2, 8, 128, 64, jnp.bfloat16, jnp.bfloat16, Fetch(2**18, 3)
    )
    assert blocks == (4, 3)
    tile = decode_attention_gpu.tile_for(8, 128, jnp.bfloat16, Step(32, 8, 2))
    assert tile == (16, 32, 8, 2)
    assert decode_attention_gpu.tile_for(8, 256, jnp.bfloat16, Step(128, 8, 2)).tokens == 32


@pytest.mark.parametrize(
    "text, message",
    [
        ("[v5x]\nforward = [128, 128]", r"unknown table \[v5x\]; known: v4, v5e, .*gpu8, gpu9"),
        ("v5e = 1", r"unknown table \[v5e\]"),
        ("[v5e]\ndq = [128, 128]", "unknown key v5e.dq; known: forward, backward, decode"),
        ("[v5e]\nforward = [128]", r"v5e.forward = \[128\]: must be \[rows, key tokens\]"),
        ("[v5e]\nforward = 128", r"v5e.forward = 128: must be \[rows, key tokens\]"),
        ("[v5e]\nforward = [1000, 128]", "rows must be a power of two, so that tiles divide, from"),
        ("[v5e]\nforward = [128, 64]", "key tokens must be .* from 128 to 16384"),
        ("[v5e]\nforward = [128, 128.0]", "key tokens must be"),
        ("[v5e]\nbackward = [8192, 4096]", "v5e: backward tile of 8192 x 4096 tokens.* MiB"),
        ("[v5e]\ndecode = [524288, 40]", "buffers must be a whole number from 2 to 16"),
        ("[gpu8]\ndkv = [64, 64, 3, 2]", "gpu8.dkv = .*: warps must be a power of two"),
        ("[gpu8]\ndecode = [64, 4, true]", "stages must be a whole number from 1 to 8"),
        ("[v5e\n", "tiles.toml: .*line 1"),
        (None, "No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, monkeypatch, text, message):
    path = tmp_path / "tiles.toml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    with pytest.raises(ValueError, match=message) as error:
        tiles.overrides()
    assert "\n" not in str(error.value) and "tiles.toml" in str(error.value)
    with pytest.raises(RunError, match=r"tiles\.toml"):
        programs.prepare(deterministic=False)
