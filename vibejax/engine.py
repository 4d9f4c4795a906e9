"""The rollout engine: requests in, completions out as they finish.

    engine = Engine(sampler_copy.make(params, model, "bfloat16"), EngineConfig(model=model))
    for completion in engine.generate([Request(0, tokens, max_tokens=512, samples=8)], Sampling()):
        print(completion.request, completion.sample, completion.stop, completion.tokens)

Keys and values lie in pages of a pool. Sequences decode in slots, many steps a call (`decode`);
between two windows the host takes out what has ended, fills free slots from the queue and has
prompts computed in chunks (`scheduler`, `batching`). While a window runs, the caller has the
completions of the one before. A completion is a function of (parameters, seed, step, prompt,
sample) alone.

Several devices: each has slots and pages of its own, and all take requests from one queue;
`tensor` of them share heads and feed-forward width.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vibejax import attention, batching, decode, memory_plan, progress, sharding
from vibejax.batching import Draft
from vibejax.completions import (
    Completion,
    Counts,
    EngineConfig,
    EngineError,
    Request,
    Stop,
    check_config,
    check_request,
    check_sampling,
)
from vibejax.decode import Drawn, Sampling
from vibejax.job_queue import Job, Lengths, Queue
from vibejax.memory_plan import MemoryPlan
from vibejax.qwen2 import ModelConfig, Params
from vibejax.scheduler import Fill, Running, Scheduler

STOPS: dict[int, Stop] = {
    decode.STOP: "stop",
    decode.LENGTH: "length",
    decode.NOT_FINITE: "not_finite",
}


class Engine:
    """Decodes on some devices; it is asked for one set of requests at a time."""

    def __init__(
        self, params: Params, config: EngineConfig, devices: Sequence[jax.Device] | None = None
    ):
        """Plans the memory; pages are allocated by the first `generate`.

        Args:
            params: from `sampler_copy.make`, on the devices; or their shapes, where `load`
                brings them later.
            config: sizes.
            devices: of this process; None: all.

        Raises:
            EngineError: a size cannot be used, or the plan does not fit.
        """
        if not isinstance(params["layers"], list):
            raise EngineError("params: layers are stacked; sampler_copy.make gives an engine's")
        self.context = config.context or config.model.context
        # No sequence has more steps than the context: the copies have no room for them.
        config = dataclasses.replace(config, window=min(config.window, self.context))
        self.config, self.counts = config, Counts()
        self.dtype = params["norm"].dtype
        self.kv_dtype = kv_dtype(config, self.dtype)
        self.mesh = engine_mesh(config.model, config.tensor, devices)
        self._parts = sharding.ways(self.mesh, "batch")
        check_config(config, self._parts)
        self._entries = -(-self.context // config.page_tokens)
        with jax.set_mesh(self.mesh):
            self.has_copies = config.attention == "auto" and not attention.has_kernels()
        self.memory = plan_memory(
            config,
            self.dtype,
            parts=self._parts,
            copied=self.has_copies,
            limit_bytes=config.memory_bytes or memory_plan.engine_bytes(self.mesh.local_devices[0]),
        )
        self.params = params if isinstance(params["norm"], jax.Array) else None
        self._pools: decode.Pools | None = None
        self._copies, self._copies_shape = None, None
        self._closed, self._runs = False, 0
        self._lengths = Lengths()

    def load(self, params: Params) -> None:
        """Takes other parameters of the same shapes; whatever was being generated ends.

        Raises:
            EngineError: the engine is closed, or they are of another dtype.
        """
        if self._closed:
            raise EngineError("the engine is closed")
        if params["norm"].dtype != self.dtype:
            raise EngineError(
                f"params: {params['norm'].dtype}, the engine was made for {self.dtype}"
            )
        self.params = params
        self._runs += 1

    def release(self) -> None:
        """Lets go of parameters and pages, until `load`."""
        self.params = self._pools = self._copies = None
        self._runs += 1

    def close(self) -> None:
        """Gives all memory back; the engine cannot be used any more."""
        self.release()
        self._closed = True

    def require_room(self, what: str, tokens: int, max_tokens: int) -> None:
        """Checks that the pool of a device holds one sequence.

        Args:
            what: the prompt's name, for the message.
            tokens: of the prompt.
            max_tokens: of its completion.

        Raises:
            EngineError: it could outgrow the pool.
        """
        size, pages = self.config.page_tokens, self.memory.pages
        most = -(-(tokens + max_tokens - 1) // size)  # the last is not cached
        if most > pages:
            raise EngineError(
                f"{what}: its {tokens} tokens and {max_tokens} more need {most} pages of {size}, "
                f"a device has {pages} (pool_tokens, or what its memory has room for)"
            )

    def generate(
        self, requests: Sequence[Request], how: Sampling, *, seed: int = 0, step: int = 0
    ) -> Iterator[Completion]:
        """Samples completions.

        Args:
            requests: the prompts.
            how: the distribution.
            seed: of the run, below 2**32.
            step: optimizer step, or another number for draws of another kind; below 2**32.

        Returns:
            The completions as they finish. Any other call of the engine ends it.

        Raises:
            EngineError: a request cannot be used, or the engine is closed.
        """
        if self._closed or self.params is None:
            raise EngineError(f"the engine {'is closed' if self._closed else 'has no parameters'}")
        check_sampling(how, self.config.model, seed, step)
        requests, queue = tuple(requests), Queue()
        parts = [
            Scheduler(
                queue, self.config.slots // self._parts, self.memory.pages,
                self.config.page_tokens, self.config.window,
            )
            for _ in range(self._parts)
        ]  # fmt: skip
        jobs = []
        for n, request in enumerate(requests):
            check_request(request, self.context, self.config.model)
            job = Job(
                n, len(request.tokens), request.samples, request.max_tokens,
                self._lengths.expected(_identity(request)),
            )  # fmt: skip
            self.require_room(f"prompt {request.prompt}", len(request.tokens), request.max_tokens)
            # Fewer prompts than devices: each lets several work.
            jobs += job.split(-(-self._parts // len(requests)))
        queue.submit(jobs)
        self._runs += 1
        self.counts = Counts()
        return self._run(requests, queue, parts, how, np.uint32(seed), np.uint32(step), self._runs)

    def _run(self, requests, queue, parts, how, seed, step, run) -> Iterator[Completion]:
        self._require(run)
        drafts: dict[Running, Draft] = {}
        tables = batching.Tables(self._parts, parts[0].slots, self._entries)
        places = batching.Places(self._parts, parts[0].slots, keeps=self.has_copies)
        self._copies, self._copies_shape = None, None
        ended: list[Completion] = []
        began = time.perf_counter()
        while not all(part.idle for part in parts):
            share = -(-(queue.samples + sum(p.outstanding for p in parts)) // len(parts))
            plans = [part.plan(share) for part in parts]
            for plan in plans:
                for sequence in plan.started:
                    request = requests[sequence.job.id]
                    drafts.setdefault(sequence, _draft(request, sequence.sample))
            tables.write(plans)
            self.counts.host_s += time.perf_counter() - began
            self._fill(plans, requests, drafts)
            self._copy(parts, plans)
            drawn = None
            if places.assign(plans):
                drawn = self._window(places, drafts, tables, how, seed, step)
            yield from ended  # while the device works
            progress.beat()
            self._require(run)
            drawn = jax.device_get(drawn)
            began = time.perf_counter()
            ended = self._account(places, drawn, parts, requests, drafts, how) if drawn else []
            self.counts.put_back = sum(part.put_back_count for part in parts)
        yield from ended

    def _require(self, run: int) -> None:
        if run != self._runs:
            raise EngineError("the engine was closed, loaded or asked for something else")

    def _fill(self, plans, requests, drafts) -> None:
        """Computes a chunk of all that waits for it."""
        started = {(s.job.id, s.sample): s for plan in plans for s in plan.running.values()}

        def tokens_of(fill: Fill) -> np.ndarray:
            prompt = np.asarray(requests[fill.job.id].tokens, np.int32)
            if fill.sample is None:
                return prompt
            draft = drafts[started[fill.job.id, fill.sample]]
            return np.concatenate([prompt, draft.tokens[: draft.count]])

        chunk_tokens = self.config.chunk_tokens
        for call in batching.chunks(plans, tokens_of, chunk_tokens, self._entries):
            with jax.set_mesh(self.mesh):
                self._pools = decode.fill(
                    self.params, self._take_pools(),
                    call.token_BT, call.first_B, call.count_B, call.table_BM,
                    config=self.config.model, implementation=self.config.attention,
                )  # fmt: skip
            for fill, count in zip(call.fills, call.counts, strict=True):
                fill.done += count
                self.counts.filled_tokens += count

    def _copy(self, parts, plans) -> None:
        """Copies what a prompt leaves over beyond its whole pages, for each of its samples."""
        waiting = [
            [s for s in plan.running.values() if s.ready and s.copies is not None] for plan in plans
        ]
        if not any(waiting):
            return
        rows = batching.fitting(batching.sizes(parts[0].slots), max(map(len, waiting)))
        page_2PB = np.full((2, len(parts), rows), -1, np.int32)
        for part, sequences in enumerate(waiting):
            for row, sequence in enumerate(sequences):
                page_2PB[:, part, row] = sequence.copies, sequence.pages[sequence.shared]
                parts[part].copied(sequence)
        with jax.set_mesh(self.mesh):
            self._pools = decode.copy(self._take_pools(), *page_2PB.reshape(2, -1))

    def _window(self, places, drafts, tables, how, seed, step) -> Drawn:
        """Starts a window; its pages and copies are the device's from here on."""
        config, entries, implementation = self.config, self._entries, self.config.attention
        if self.has_copies:
            tokens = config.page_tokens
            needed = min(entries, -(-(places.longest() + config.window) // tokens))
            lengths = batching.doublings(entries, -(-batching.LEAST_COPY // tokens))
            entries = batching.fitting(lengths, needed)
            shape = places.count, entries * tokens
            if shape != self._copies_shape:
                places.forget()
                self._copies, self._copies_shape = None, shape
                with jax.set_mesh(self.mesh):
                    self._copies = decode.empty_copies(
                        config.model, self._parts * places.count, shape[1], self.dtype
                    )
        rows = batching.make_rows(places, drafts, tables.page_PSM, entries)
        with jax.set_mesh(self.mesh):
            self._pools, self._copies, drawn = decode.window(
                self.params, self._take_pools(), self._copies, rows, seed, step,
                config=config.model, how=how, steps=config.window,
                group=batching.group_of(places.count), implementation=implementation,
            )  # fmt: skip
        return drawn

    def _account(self, places, drawn: Drawn, parts, requests, drafts, how) -> list[Completion]:
        """Takes in what a window drew; the completions that ended in it."""
        completions = []
        self.counts.windows += 1
        self.counts.slot_steps += len(drawn.count_B) * int(drawn.count_B.max())
        for number, (part, row) in enumerate(zip(parts, places.sequences, strict=True)):
            sampled, stops = {}, {}
            for b, sequence in enumerate(row, number * places.count):
                if sequence is None:
                    continue
                draft, count = drafts[sequence], int(drawn.count_B[b])
                draft.extend(drawn.token_BW[b, :count], drawn.logprob_BW[b, :count])
                stop = STOPS.get(int(drawn.why_B[b]))
                new = min(count, draft.count - how.min_tokens + 1)  # may end in a loop
                if how.loop_tokens and new > 0 and stop != "not_finite":
                    end = batching.loop_end(draft.tokens[: draft.count], new, how.loop_tokens)
                    if end is not None and (end < draft.count or stop is None):
                        draft.count, stop = end, "loop"
                sampled[sequence.slot] = draft.count - sequence.sampled
                if stop:
                    stops[sequence.slot] = stop
            for sequence, stop in zip(part.account(sampled, stops), stops.values(), strict=True):
                draft = drafts.pop(sequence)
                self.counts.tokens += draft.count
                request = requests[sequence.job.id]
                self._lengths.learn(_identity(request), draft.count, self._runs)
                completions.append(
                    Completion(
                        sequence.job.id, draft.sample, draft.tokens[: draft.count].copy(),
                        draft.logprobs[: draft.count].copy(), stop,
                    )
                )  # fmt: skip
        return completions

    def _take_pools(self) -> decode.Pools:
        """The pools, to be given to a program that gives them back."""
        taken, self._pools = self._pools, None
        if taken is not None:
            return taken
        config, model = self.config, self.config.model
        with jax.set_mesh(self.mesh):
            return decode.empty_pools(
                model, self._parts * self.memory.pages, config.page_tokens, self.kv_dtype
            )


def _identity(request: Request) -> tuple[tuple[int, ...], int]:
    """What lengths are learnt of: other files, and the canary, number their prompts alike."""
    return request.tokens, request.max_tokens


def _draft(request: Request, place: int) -> Draft:
    return Draft(
        prompt=request.prompt,
        sample=request.numbers[place] if request.numbers else place,
        prompt_tokens=np.asarray(request.tokens, np.int32),
        tokens=np.empty(request.max_tokens, np.int32),
        logprobs=np.empty(request.max_tokens, np.float32),
    )


def engine_mesh(
    model: ModelConfig, tensor: int, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of an engine: groups of `tensor` devices, each with slots of its own.

    Args:
        model: what decodes.
        tensor: devices that share heads and feed-forward width.
        devices: of this process; None: all.

    Raises:
        EngineError: they do not divide.
    """
    devices = jax.local_devices() if devices is None else devices
    if len(devices) % tensor or model.kv_heads % tensor:
        raise EngineError(
            f"tensor {tensor}: must divide {len(devices)} devices and {model.kv_heads} "
            "key/value heads"
        )
    return sharding.make_mesh({"data": len(devices) // tensor, "tensor": tensor}, devices)


def plan_memory(
    config: EngineConfig, dtype: Any, *, parts: int, copied: bool, limit_bytes: int
) -> MemoryPlan:
    """The plan of a device's memory, and with it the number of pages.

    Args:
        config: the engine's sizes.
        dtype: of the parameters.
        parts: groups of devices with slots of their own.
        copied: whether rows decode from copies of their pages.
        limit_bytes: that a device has for the engine.

    Raises:
        EngineError: it does not fit.
    """
    context = config.context or config.model.context
    try:
        return memory_plan.plan(
            config.model,
            rows=config.slots // parts,
            context=-(-context // config.page_tokens) * config.page_tokens,
            page_tokens=config.page_tokens,
            pool_tokens=-(-config.pool_tokens // parts),
            chunk_tokens=config.chunk_tokens,
            kv_dtype=kv_dtype(config, dtype),
            dtype=dtype,
            tensor=config.tensor,
            copied=copied,
            weight_bytes=memory_plan.weight_bytes(config.model, dtype, config.tensor),
            limit_bytes=limit_bytes,
        )
    except MemoryError as error:
        raise EngineError(str(error)) from None


def kv_dtype(config: EngineConfig, dtype: Any) -> np.dtype:
    """Of pages, where parameters are of `dtype`."""
    return np.dtype(np.int8 if config.kv_dtype == "int8" else dtype)
