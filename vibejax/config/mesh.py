"""The mesh of devices."""

from vibejax.config.fields import Count, default
from vibejax.config_file import Section


class MeshConfig(Section):
    """How many devices lie on each mesh axis."""

    data: Count = default(1, "replicas of the whole state")
    fsdp: Count = default(1, "devices that share parameters, optimizer state and rows")
    context: Count = default(1, "devices that share the tokens of a row")
    tensor: Count = default(1, "devices that share heads, feed-forward width and vocabulary")
