import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from vibejax import config_file
from vibejax.config.clr import ClrConfig
from vibejax.config.curate import CurateConfig
from vibejax.config.distill import DistillConfig
from vibejax.config.evaluate import EvaluateConfig
from vibejax.config.pipeline import PipelineConfig
from vibejax.config.probe import ProbeConfig
from vibejax.config.rl import RlConfig
from vibejax.config.sft import SftConfig
from vibejax.config_file import ConfigError, load
from vibejax.verifiers import worker
from vibejax.verifiers.pool import Pool

ROOT = Path(__file__).parents[1]
CONFIGS, QUICKSTART = ROOT / "configs", ROOT / "vibejax" / "quickstart"
BASE = 'policy = "p"\nprompts = "q"\n'
SHIPPED = [
    *[(RlConfig, p) for p in [*sorted(CONFIGS.glob("rl_*.toml")), QUICKSTART / "rl.toml"]],
    *[
        (SftConfig, p)
        for p in [*sorted(CONFIGS.glob("sft_*.toml")), CONFIGS / "quickstart_sft.toml"]
    ],
    *[(DistillConfig, p) for p in sorted(CONFIGS.glob("distill_*.toml"))],
    *[(CurateConfig, p) for p in sorted(CONFIGS.glob("curate_*.toml"))],
    *[(EvaluateConfig, p) for p in sorted(CONFIGS.glob("evaluate_*.toml"))],
    *[(ProbeConfig, p) for p in sorted(CONFIGS.glob("probe_*.toml"))],
    *[(ClrConfig, p) for p in sorted(CONFIGS.glob("clr_*.toml"))],
    *[(PipelineConfig, p) for p in sorted(CONFIGS.glob("pipeline_*.toml"))],
]


@pytest.mark.parametrize("cls, path", SHIPPED, ids=lambda x: getattr(x, "name", ""))
def test_every_shipped_config_loads(cls, path):
    load(cls, path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[rollout]\ngroup_sise = 8", "unknown key rollout.group_sise; did you mean rollout.grou"),
        ("grop_size = 8", "unknown key grop_size; did you mean rollout.group_size?"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size = 1: must be greater than or equal to 2"),
        ("[rollout]\ntop_p = true", "rollout.top_p = True: must be a valid number"),
        ('[objective]\naggregation = "mean"', "objective.aggregation = 'mean': must be 'sequence'"),
        ("[rollout]\nslots = 0", "rollout.slots = 0"),
        ("[train]\nrow_tokens = 9", "train.row_tokens = 9 must be at least rollout.max_prompt_to"),
        ("[rolout]\ngroup_size = 4", "unknown key rolout.group_size; did you mean rollout.group_"),
        ('resume = "True"', "resume = 'True': must be false, true or 'auto'"),
        ("[rollout]\nmin_tokens = 90000", "rollout: min_tokens = 90000 is above max_completion_"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_message_names_file_key_and_rule(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(BASE + text)
    with pytest.raises(ConfigError) as error:
        load(RlConfig, path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_all_errors_come_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("steps = 0\nsede = 1\n[rollout]\ngroup_size = 1\n")
    with pytest.raises(ConfigError) as error:
        load(RlConfig, path, ["seed=-1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 6  # steps, sede, group_size, seed, and the required policy and prompts
    assert [line for line in lines if line.startswith("--set: seed = -1")]
    assert f"{path}: policy is required" in lines


def test_overrides_win_and_bare_words_are_strings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    got = load(RlConfig, path, ["rollout.top_p=0.95", "out=runs/x", "resume=true", "seed = 7"])
    assert (got.rollout.top_p, got.out, got.resume, got.seed) == (0.95, "runs/x", True, 7)


def test_resolved_configuration_reads_back(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    want = load(
        RlConfig, path,
        ['out=a "quoted" name\x7f', "optimizer.learning_rate=3e-7", "optimizer.clip_norm=inf"],
    )  # fmt: skip
    path.write_text(config_file.dump(want))
    assert load(RlConfig, path) == want


def test_settings_of_verifiers_reach_the_pool(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BASE + "[verifiers.code]\nallow_unsandboxed = true\n")
    resolved = load(RlConfig, path, ["verifiers.workers=3"])
    path.write_text(config_file.dump(resolved))
    assert load(RlConfig, path) == resolved
    with Pool(**resolved.verifiers.pool_arguments()) as pool:
        assert pool.verify([({"verifier": "math", "ground_truth": 1}, "\\boxed{1}")])[0].correct


def test_configurations_are_frozen(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    with pytest.raises(ValueError, match="frozen"):
        load(RlConfig, path).steps = 3


def test_help_lists_every_field_with_type_default_and_meaning():
    command = [sys.executable, "-m", "vibejax.rl", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, _, field in config_file._fields(RlConfig):
        assert f"\n  {name} (" in text
        assert field.description in text
    assert "rollout.group_size (int, default 16)" in text


def test_every_shipped_configuration_is_read():
    assert {p for _, p in SHIPPED} >= {*CONFIGS.glob("*.toml")}


def test_a_judge_has_limits_of_its_own(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    arguments = load(RlConfig, path, ["verifiers.judge.timeout_s=300"]).verifiers.pool_arguments()
    for name in ("rubric", "math_judge"):
        assert arguments["settings"][name]["timeout_s"] == 300 < arguments["limits_s"][name]
        taken = inspect.signature(importlib.import_module(worker.MODULES[name]).verify).parameters
        assert taken.keys() >= arguments["settings"][name].keys()


@pytest.mark.parametrize(
    "setting",
    ["verifiers.memory_mb=100", "optimizer.warmup=100", "optimizer.beta2=1.0", "seed=4294967296",
     "verifiers.judge.timeout_s=86400"],
)  # fmt: skip
def test_numbers_that_nothing_could_work_with_are_refused(tmp_path, setting):
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    with pytest.raises(ConfigError, match=f"--set: {setting.partition('=')[0]}"):
        load(RlConfig, path, [setting])
