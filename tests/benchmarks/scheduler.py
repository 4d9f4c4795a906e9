"""The rollout scheduler alone, at 64K: `python tests/benchmarks/scheduler.py`.

512 prompts, 16 completions each, dealt to 1, 4 or 16 hosts of 128 slots each. A prompt's lengths
are lognormal around its own median, and those are lognormal around 6,000 tokens; completions are
cut at 65,536. No device decodes: windows of 64 steps are played, and each advances every slot by
one token a step.

ours: useful slot-steps over slots x steps until the last host is done, prompts with the longest
    expected completions first; expectations are the mean length of an earlier group of the prompt.
peer: the same with the prompts in their own order.

`ceiling` is what no order can exceed: a step takes one token of the longest completion, too.
`host_share` is the time of planning and accounting over that of the decode steps of a window, at
20 ms a step.
"""

import json
import time

import numpy as np

from vibejax.job_queue import Job, Queue
from vibejax.scheduler import Scheduler

PROMPTS, SAMPLES, SLOTS, WINDOW = 512, 16, 128, 64
MEDIAN_TOKENS, LONGEST, PROMPT_TOKENS = 6_000, 65_536, 300
PAGE_TOKENS, PAGES = 64, 24_000  # 1.5 million tokens, 12,000 a slot: 53 GiB of the 3B model
STEP_S = 0.020


def main() -> None:
    random = np.random.default_rng(0)
    median_P1 = MEDIAN_TOKENS * np.exp(0.8 * random.standard_normal((PROMPTS, 1)))
    draw = lambda: np.clip(  # noqa: E731 - the lengths of one group of every prompt
        median_P1 * np.exp(0.6 * random.standard_normal((PROMPTS, SAMPLES))), 100, LONGEST
    ).astype(int)
    earlier_PG, length_PG = draw(), draw()
    for hosts in (1, 4, 16):
        ours = play(length_PG, earlier_PG.mean(axis=1), hosts)
        peer = play(length_PG, None, hosts)
        useful = int(length_PG.sum())
        row = {
            "benchmark": "scheduler",
            "case": f"{hosts} hosts",
            "ours": round(useful / (hosts * SLOTS * ours["steps"]), 3),
            "peer": round(useful / (hosts * SLOTS * peer["steps"]), 3),
            "ratio": round(peer["steps"] / ours["steps"], 3),
            "unit": "share of slot-steps that draw a token",
            "higher_is_better": True,
            "ceiling": round(min(1.0, useful / (hosts * SLOTS * int(length_PG.max()))), 3),
            "put_back": ours["put_back"],
            "peer_put_back": peer["put_back"],
            "host_ms_a_window": round(1e3 * ours["host_s"] / ours["windows"], 2),
            "host_share": round(ours["host_s"] / ours["windows"] / (WINDOW * STEP_S), 5),
        }
        print(json.dumps(row), flush=True)


def play(length_PG: np.ndarray, expected_P: np.ndarray | None, hosts: int) -> dict[str, float]:
    """All hosts to their ends: the steps of the slowest, and sums over all."""
    totals = {"steps": 0, "put_back": 0, "host_s": 0.0, "windows": 0}
    for host in range(hosts):
        queue = Queue()
        scheduler = Scheduler(queue, SLOTS, PAGES, PAGE_TOKENS, WINDOW)
        queue.submit(
            Job(p, PROMPT_TOKENS, SAMPLES, LONGEST, None if expected_P is None else expected_P[p])
            for p in range(host, PROMPTS, hosts)
        )
        steps = 0
        while not scheduler.idle:
            began = time.perf_counter()
            plan = scheduler.plan()
            totals["host_s"] += time.perf_counter() - began
            for fill in plan.fills:
                fill.done = fill.tokens
            for sequence in plan.running.values():
                if sequence.copies is not None:
                    scheduler.copied(sequence)
            left = {
                slot: int(length_PG[s.job.id, s.sample]) - s.sampled
                for slot, s in plan.running.items()
            }
            steps += min(WINDOW, max(left.values()))
            began = time.perf_counter()
            scheduler.account(
                {slot: min(n, WINDOW) for slot, n in left.items()},
                [slot for slot, n in left.items() if n <= WINDOW],
            )
            totals["host_s"] += time.perf_counter() - began
            totals["windows"] += 1
        totals["steps"] = max(totals["steps"], steps)
        totals["put_back"] += scheduler.put_back_count
    return totals


if __name__ == "__main__":
    main()
