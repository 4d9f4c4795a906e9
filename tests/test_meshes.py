import jax
import pytest

from vibejax import meshes
from vibejax.config.mesh import MeshConfig
from vibejax.config.training import TrainConfig
from vibejax.qwen2 import ModelConfig
from vibejax.rope import Rope
from vibejax.run_folder import RunError

MODEL = ModelConfig(rope=Rope(theta=1e4), layers=1, width=32, heads=4, kv_heads=2, head_dim=8)


def rows(count, tokens):
    return TrainConfig(microbatch_rows=count, row_tokens=tokens)


def test_what_divides_gets_its_mesh():
    mesh = meshes.make(MeshConfig(fsdp=2, context=2, tensor=2), [MODEL, MODEL], rows(2, 2048))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, given, message",
    [
        ({"fsdp": 3}, None, "^mesh: .*fsdp=3 x context=1 x tensor=1 needs 3 devices"),
        ({"fsdp": 2, "tensor": 4}, None, "^mesh: axis 'kv_heads' of size 2 is not a multiple"),
        ({"fsdp": 8}, rows(4, 512), "^mesh: axis 'batch' of size 4 is not a multiple"),
        ({"context": 8}, rows(1, 8 * 512 + 8), "^mesh: rows of 4104 tokens on 8 context shards"),
    ],
)
def test_what_does_not_divide_is_named(sizes, given, message):
    with pytest.raises(RunError, match=message):
        meshes.make(MeshConfig(**sizes), [MODEL], given)


def test_rows_are_checked_without_devices():
    mesh = jax.sharding.AbstractMesh((2, 16, 1, 1), ("data", "fsdp", "context", "tensor"))
    meshes.check_rows(rows(32, 512), mesh)
    with pytest.raises(ValueError, match="'batch' of size 16"):
        meshes.check_rows(rows(16, 512), mesh)
