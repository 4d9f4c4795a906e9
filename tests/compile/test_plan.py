"""tpu/plan.py through the real compiler, for a slice that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 1_024,
    "max_position_embeddings": 4_096, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_small_run_is_planned_for_v5e(tmp_path):
    policy, out = tmp_path / "config.json", tmp_path / "plan.json"
    policy.write_text(json.dumps(TINY))
    sets = {
        "policy": tmp_path, "mesh.context": 2, "mesh.fsdp": 2, "train.row_tokens": 4_096,
        "train.microbatch_rows": 2, "train.remat": "attention", "rollout.max_prompt_tokens": 512,
        "rollout.max_completion_tokens": 3_584, "rollout.slots": 32,
    }  # fmt: skip
    command = [
        sys.executable, ROOT / "tpu" / "plan.py", ROOT / "configs" / "rl_math.toml",
        "--slice", "v5e-4", "--json", out, "--cache", tmp_path / "cache",
        *(x for key, value in sets.items() for x in ("--set", f"{key}={value}")),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]
    found = json.loads(out.read_text())
    assert found["fits"] and not found["failures"]
    assert 0 < found["mfu_causal_exposed"] < found["mfu_causal_hidden"] < 1
    accumulate = found["programs"]["accumulate"]
    assert accumulate["ici_bytes"] > 0 and accumulate["dcn_bytes"] == 0
    assert found["programs"]["hand_over"]["ici_bytes"] > 0
    assert 0.3 < found["decode_full"]["share_of_roofline"] <= 1
    again = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "compiling" not in again.stderr  # kept
