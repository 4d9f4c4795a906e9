"""Which meshes, micro-batches and remat policies are worth compiling, by arithmetic alone."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from vibejax import memory_plan, sharding
from vibejax.config.rl import RlConfig
from vibejax.config_file import InputError
from vibejax.losses.logprobs import CHUNK_TOKENS
from vibejax.planning import plan, work
from vibejax.planning.plan import Setting
from vibejax.planning.slices import Slice
from vibejax.qwen2 import ModelConfig

BFLOAT16, FLOAT32 = 2, 4
EFFICIENCY = 0.8  # of the peak, that a large matrix product is taken to reach
REMATS = ("none", "attention", "full")


class Candidate(NamedTuple):
    """A configuration, and what arithmetic says of it.

    Attributes:
        config: the run's.
        seconds: of a token, over all devices.
        peak_bytes: of a device while it trains.
    """

    config: RlConfig
    seconds: float
    peak_bytes: float


def candidates(config: RlConfig, settings: dict, where: Slice, mean_tokens: int) -> list[Candidate]:
    """All that fit by arithmetic, the fastest first.

    Args:
        config: whose mesh, micro-batch and remat policy are changed.
        settings: the policy's config.json.
        where: the slice.
        mean_tokens: of a completion.
    """
    found = []
    for changed in _choices(config, where):
        try:
            setting = plan.prepare(changed, settings, where, mean_tokens)
        except InputError:
            continue
        peak = training_bytes(changed, setting.model, setting.mesh)
        if peak <= where.chip.memory_bytes:
            found.append(Candidate(changed, _seconds(setting), peak))
    return sorted(found, key=lambda c: c.seconds)


def _choices(config: RlConfig, where: Slice) -> Iterator[RlConfig]:
    powers = [2**n for n in range(where.devices.bit_length())]
    for data, context, tensor in itertools.product(powers, powers, (1, 2)):
        fsdp, rest = divmod(where.devices, data * context * tensor)
        if rest or not fsdp:
            continue
        for times, remat in itertools.product((1, 2, 4), REMATS):
            mesh = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
            train = {"microbatch_rows": data * fsdp * times, "remat": remat}
            # Slots must divide over a host's devices whatever they are.
            rollout = {"slots": max(config.rollout.slots, where.devices_a_host)}
            yield config.model_copy(
                update={
                    "mesh": config.mesh.model_copy(update=mesh),
                    "train": config.train.model_copy(update=train),
                    "rollout": config.rollout.model_copy(update=rollout),
                }
            )


def training_bytes(config: RlConfig, model: ModelConfig, mesh) -> float:
    """About what a device holds while gradients are computed.

    State and sums; what the remat policy keeps of every layer; one layer's weights, activations
    and gathered keys and values; a chunk of logits, and the head's whole gradient.
    """
    state = 5 if config.objective.kl else 4
    tokens = config.train.microbatch_rows * config.train.row_tokens / mesh.size
    tokens *= mesh.shape["tensor"]  # devices that share heads hold the same tokens
    tensor = mesh.shape["tensor"]
    heads, width = model.heads * model.head_dim / tensor, model.width
    inner = 2 * heads + 4 * width + 4 * model.mlp / tensor
    kept = {
        "none": width + inner,
        "attention": width + heads + 2 * model.heads / tensor,
        "full": width,
        "offload": 0,
    }[config.train.remat]
    rows = max(1, config.train.microbatch_rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
    gathered = 8 * rows * config.train.row_tokens * model.kv_heads / tensor * model.head_dim
    vocab = model.vocab_rows / tensor
    chunk = 3 * FLOAT32 * min(tokens, CHUNK_TOKENS) * vocab
    head = (BFLOAT16 + FLOAT32) * vocab * width
    layer = 8 * work.layer_weights(model) / tensor
    return (
        state * memory_plan.sharded_bytes(model, mesh)
        + BFLOAT16 * tokens * (model.layers * kept + 2 * inner)
        + BFLOAT16 * gathered
        + chunk
        + head
        + layer
    )


def _seconds(setting: Setting) -> float:
    """Of a token over all devices: products, and weights and gradients on their way."""
    config, model, mesh, chip = setting.config, setting.model, setting.mesh, setting.where.chip
    done = work.accumulate(config, model, mesh, (config.train.row_tokens,))
    parameters = model.layers * work.layer_weights(model) + model.width * model.vocab_rows
    parameters /= mesh.shape["tensor"]
    shards = sharding.ways(mesh, "embed")
    passes = 2 + (config.train.remat != "none")
    inside = parameters * (passes * BFLOAT16 + FLOAT32) * (shards - 1) / shards
    copies = mesh.shape["data"]
    between = 2 * FLOAT32 * parameters / shards * (copies - 1) / copies
    tokens = config.train.microbatch_rows * config.train.row_tokens
    # Keys and values of whole rows, gathered forward and again, and summed back in float32.
    context, rows = mesh.shape["context"], tokens / mesh.size * mesh.shape["context"]
    keys = 2 * model.kv_heads * model.head_dim * rows * (context - 1) / context
    inside += model.layers * keys * (passes * BFLOAT16 + FLOAT32)
    # Activations of devices that share heads are summed twice a layer and pass.
    tensor = mesh.shape["tensor"]
    each = tokens * tensor / mesh.size
    inside += 4 * passes * BFLOAT16 * model.layers * model.width * each * (tensor - 1) / tensor
    link = chip.link * (2 if chip.platform == "tpu" else 1)
    slow = chip.network if setting.where.count > 1 else link
    seconds = done.flops / (EFFICIENCY * chip.flops) + inside / link + between / slow
    return seconds / tokens


def cheapest_change(setting: Setting, over: float) -> str:
    """What to set so that so many bytes a device less are held, the least costly change first."""
    config, model, mesh = setting.config, setting.model, setting.mesh
    now = training_bytes(config, model, mesh)
    train, sizes = config.train, config.mesh
    wider = {}
    if sizes.fsdp > 1:
        wider = {"fsdp": sizes.fsdp // 2, "context": sizes.context * 2}
    elif sizes.data > setting.where.count:
        wider = {"data": sizes.data // 2, "context": sizes.context * 2}
    rows = sizes.data * sizes.fsdp
    changes = []
    if train.microbatch_rows > rows:
        changes.append({"microbatch_rows": rows})
    if train.remat == "none":
        changes.append({"remat": "attention"})
    if train.remat in ("none", "attention"):
        changes.append({"remat": "full"})
    if train.remat != "offload":
        changes.append({"remat": "offload"})
    for change in changes:
        other = config.model_copy(update={"train": train.model_copy(update=change)})
        if training_bytes(other, model, mesh) <= now - over:
            return ", ".join(f"train.{k} = {v!r}" for k, v in change.items()).replace("'", '"')
    if wider:
        other_mesh = sizes.model_copy(update=wider)
        rows = other_mesh.data * other_mesh.fsdp
        other = config.model_copy(
            update={
                "mesh": other_mesh,
                "train": train.model_copy(update={"microbatch_rows": rows}),
            }
        )
        shape = type(mesh)(tuple(other_mesh.model_dump().values()), mesh.axis_names)
        if training_bytes(other, model, shape) <= now - over:
            said = ", ".join(f"mesh.{k} = {v}" for k, v in wider.items())
            return f"{said}, train.microbatch_rows = {rows}"
    return "a larger slice: no choice of remat, micro-batch or mesh saves so much here (--search)"


def cheapest_rollout_change(setting: Setting, over: float) -> str:
    """The same of what a device holds while it decodes."""
    memory = setting.memory
    pages = memory.pages - -(-int(over) // memory.page_bytes)
    tokens = pages * setting.engine.page_tokens
    longest = setting.config.rollout.max_prompt_tokens
    longest += setting.config.rollout.max_completion_tokens
    if tokens >= longest:
        return f"rollout.pool_tokens = {tokens * setting.parts}"
    if setting.engine.tensor * 2 <= setting.model.kv_heads:
        return f"rollout.tensor = {setting.engine.tensor * 2}"
    if setting.config.rollout.kv_dtype == "compute":
        return 'rollout.kv_dtype = "int8"'
    return "a larger slice: its pages do not hold one sequence (--search)"
