"""One rollout of several processes: each has some of the groups, all take the same step on them.

Of another's completions a process knows lengths, stops and verdicts, which decide advantages, loss
weights and the plan of the rows. Their tokens and log-probs stay where they were sampled until the
devices need them: each process fills in its own documents of a micro-batch, and a sum over the
devices puts the rows together.

Shape suffixes: B rows of a micro-batch, T tokens of a row, D devices.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vibejax import distributed, sharding, train
from vibejax.completions import Completion, Counts
from vibejax.data import Prompt
from vibejax.packing import Rows
from vibejax.rollout import Rollout
from vibejax.train import Batch
from vibejax.verifiers import Outcome, Verdict

OWN = ("token", "target", "sampler_logprob")  # what a process knows of its own documents only


def share(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts that this process completes."""
    return prompts[distributed.process() :: distributed.count()]


def joined(own: Rollout, prompts: Sequence[Prompt]) -> Rollout:
    """The rollout of all prompts, of which each process has sampled its `share`."""
    processes = distributed.count()
    if processes == 1:
        return own
    told = distributed.gather(
        [
            [
                [len(c.tokens), c.stop, v.correct, v.reward, v.outcome]
                for c, v in zip(group, verdicts, strict=True)
            ]
            for group, verdicts in zip(own.completions, own.verdicts, strict=True)
        ]
    )
    completions, verdicts = [], []
    for n in range(len(prompts)):
        place, process = divmod(n, processes)
        if process == distributed.process():
            completions.append(own.completions[place])
            verdicts.append(own.verdicts[place])
            continue
        rows = told[process][place]
        completions.append(
            [_elsewhere(g, length, stop) for g, (length, stop, *_) in enumerate(rows)]
        )
        verdicts.append(
            [
                Verdict(correct=correct, reward=reward, outcome=Outcome(outcome))
                for *_, correct, reward, outcome in rows
            ]
        )
    journaled = sum(distributed.gather(own.journaled))
    counts = _total(own.counts)
    return Rollout(prompts, completions, verdicts, journaled=journaled, counts=counts)


def _elsewhere(sample: int, length: int, stop) -> Completion:
    zeros = np.zeros(length)
    return Completion(0, sample, zeros.astype(np.int32), zeros.astype(np.float32), stop, here=False)


def _total(counts: Counts) -> Counts:
    """What the engines of all processes have done; the seconds are those of the slowest."""
    every = [Counts(**told) for told in distributed.gather(dataclasses.asdict(counts))]
    return dataclasses.replace(sum(every, Counts()), host_s=max(one.host_s for one in every))


def place(rows: Rows, mesh: Mesh) -> Batch:
    """Rows in which each process has filled in its own documents, laid out over the mesh.

    Raises:
        ValueError: B or T does not divide over the mesh; the message names the axis.
    """
    if distributed.count() == 1:
        return train.place(rows, mesh)
    known = train.place({name: x for name, x in rows.items() if name not in OWN}, mesh)
    own = {name: _one_each(rows[name], mesh) for name in OWN if name in rows}
    return known | _summed(own, mesh)


def _one_each(x_BT: np.ndarray, mesh: Mesh) -> jax.Array:
    """[D, B, T]: this process's rows on its first device, zeros on its others."""
    first, *others = mesh.local_devices
    parts = [jax.device_put(x_BT[None], first)]
    parts += [jnp.zeros((1, *x_BT.shape), x_BT.dtype, device=device) for device in others]
    shape = (mesh.size, *x_BT.shape)
    return jax.make_array_from_single_device_arrays(shape, sharding.one_each(mesh), parts)


@functools.partial(jax.jit, static_argnames="mesh")
def _summed(own: dict[str, jax.Array], mesh: Mesh) -> Batch:
    """Exact: of each element all but one process have zero."""
    return {
        name: jax.lax.with_sharding_constraint(
            jnp.sum(x_DBT, axis=0), sharding.sharding(mesh, x_DBT.shape[1:], "batch", "length")
        )
        for name, x_DBT in own.items()
    }
