"""The whole method, stage by stage: `python -m vibejax.pipeline CONFIG [--from STAGE] [--dry-run]`.

CONFIG lists stages, each a command with its configuration (or arguments) and a folder of its own in
`out`; `{name}` in a value is the folder of an earlier stage. A finished stage leaves manifest.json
there: settings, inputs and outputs with their SHA-256 sums, metrics, versions. Run again, the
pipeline goes on after the last finished stage, and inside an unfinished one where it stopped. A
stage whose settings or inputs have changed since is an error: --from STAGE runs it and all after it
again, and keeps what was there beside it.

Models that are to be evaluated are, each in evaluation/STAGE; results.md is the table of all.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from vibejax import buckets, manifest, preemption
from vibejax.config.clr import ClrConfig
from vibejax.config.curate import CurateConfig
from vibejax.config.distill import DistillConfig
from vibejax.config.evaluate import EvaluateConfig
from vibejax.config.pipeline import PipelineConfig, StageConfig
from vibejax.config.probe import ProbeConfig
from vibejax.config.rl import RlConfig
from vibejax.config.sft import SftConfig
from vibejax.config_file import (
    ConfigError,
    InputError,
    Section,
    errors_in_one_line,
    load,
    read_table,
    validated,
)
from vibejax.locations import resolve
from vibejax.run_folder import RunError, locked, read_whole, write_whole
from vibejax.verifiers.pool import VerifierFailure

CONFIGURED: Mapping[str, type[Section]] = {
    "curate": CurateConfig,
    "sft": SftConfig,
    "probe": ProbeConfig,
    "rl": RlConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "clr": ClrConfig,
}
WITH_ARGUMENTS = ("domains", "generate", "merge", "weights")
EVALUATION = "evaluation"
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage, or the evaluation of what it made.

    Attributes:
        name: of the stage; evaluation/NAME of an evaluation.
        command: that does it.
        settings: its configuration, or the arguments of a command that has none.
        folder: where its results go.
    """

    name: str
    command: str
    settings: Section | list[str]
    folder: Path

    @property
    def manifest(self) -> Path:
        """Which is there once the step is finished."""
        return self.folder / "manifest.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--from", dest="start", metavar="STAGE", help="run it and all after it anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    args = parser.parse_args(arguments)
    with preemption.handled(), errors_in_one_line(VerifierFailure, OSError):
        config = load(PipelineConfig, args.config, args.set)
        steps = plan(config, args.config.parent)
        if args.dry_run:
            print(describe(steps))
            return
        run(config, steps, args.start)


def plan(config: PipelineConfig, beside: Path) -> list[Step]:
    """The steps of a pipeline in their order, all settings checked.

    Args:
        config: the pipeline's.
        beside: folder of the file it comes from, and of those it names.

    Raises:
        ConfigError: a stage cannot be run so; one line for each complaint.
    """
    buckets.on_disk(config.out)
    steps, complaints = [], []
    folders: dict[str, str] = {}
    unknown = [name for name in config.defaults if name not in CONFIGURED]
    if unknown:
        complaints.append(f"defaults.{unknown[0]}: no such stage; one of {', '.join(CONFIGURED)}")
    for stage in config.stages:
        folder = Path(config.out) / stage.name
        if stage.name in (*folders, EVALUATION, "out"):
            complaints.append(f"stage {stage.name}: the name is taken")
        try:
            settings = _settings(stage, config, beside, {**folders, "out": str(folder)})
            steps.append(Step(stage.name, stage.run, settings, folder))
            folders[stage.name] = str(folder)
            if stage.evaluate:
                steps.append(_evaluation(stage, config, folders))
        except InputError as error:
            complaints += str(error).splitlines()
            folders[stage.name] = str(folder)
    if complaints:
        raise ConfigError("\n".join(complaints))
    return steps


def run(config: PipelineConfig, steps: Sequence[Step], start: str | None = None) -> Path:
    """Runs what is not finished, and returns the pipeline's folder.

    Args:
        config: the pipeline's.
        steps: as `plan` returns them.
        start: name of a step that is run anew, with all after it.

    Raises:
        InputError: a stage cannot start or go on, or a finished one has other settings now.
    """
    out = Path(config.out)
    names = [step.name for step in steps]
    if start is not None and start not in names:
        raise RunError(f"--from {start}: no such stage; one of {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock", config.out), _compilation_cache(out / "compiled"):
        if start is not None:
            for step in steps[names.index(start) :]:
                _set_aside(step.folder)
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            if step.manifest.is_file():
                _check_unchanged(step)
                print(f"{title}: finished before", flush=True)
                continue
            print(f"{title}: {step.command}", flush=True)
            _run_step(step)
            (out / "results.md").write_text(table(steps))
    print(table(steps))
    return out


def table(steps: Sequence[Step]) -> str:
    """Every evaluated model as Markdown: pass@1 with its 95% interval, pass@n, mean length."""
    rows = {
        step.name.removeprefix(f"{EVALUATION}/"): json.loads(
            (step.folder / "results.json").read_text()
        )["sets"]
        for step in steps
        if step.command == "evaluate" and step.manifest.is_file()
    }
    if not rows:
        return ""
    sets = [*dict.fromkeys(name for row in rows.values() for name in row)]
    lines = [f"| after | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row[s]) if s in row else '' for s in sets)} |")
    return "\n".join(lines) + "\n"


def _cell(result: Mapping[str, Any]) -> str:
    one, most = result["avg"], result["pass_n"]
    interval = "{low:.3f}-{high:.3f}".format(**one)
    return f"{one['mean']:.3f} ({interval}), {most['mean']:.3f}, {result['length']:.0f}"


def describe(steps: Sequence[Step]) -> str:
    """The plan, as people read it: what is done, and at most how many tokens a step samples."""
    lines = []
    for number, step in enumerate(steps, start=1):
        state = "finished" if step.manifest.is_file() else "to do"
        lines.append(
            f"{number:3} {step.name:30} {step.command:9} {state:9} {_tokens(step)}".rstrip()
        )
    return "\n".join(lines)


def _tokens(step: Step) -> str:
    """What is known before about the tokens of a step."""
    settings = step.settings
    if isinstance(settings, RlConfig):
        groups = settings.steps * settings.rollout.prompts_per_step
        count = groups * settings.rollout.group_size * settings.rollout.max_completion_tokens
        return f"samples at most {count:,} tokens in {settings.steps} steps"
    if isinstance(settings, SftConfig):
        path = resolve(settings.data)
        passes = settings.epochs or None
        if passes and path.is_file():
            return f"trains on about {round(passes * path.stat().st_size / 4):,} tokens"
        if settings.steps:
            return f"trains on {settings.steps * settings.documents_per_step:,} documents"
        return f"trains on {settings.data}, {settings.epochs:g} times"
    limits = getattr(settings, "rollout", None)
    if limits is not None and hasattr(settings, "samples"):
        return f"samples {settings.samples} a prompt, each at most {limits.max_completion_tokens:,}"
    return ""


def _settings(
    stage: StageConfig, config: PipelineConfig, beside: Path, folders: Mapping[str, str]
) -> Section | list[str]:
    """What a stage's command gets, with the folders that its values name."""
    where = f"stage {stage.name}"
    if stage.run in WITH_ARGUMENTS:
        if stage.config or stage.set:
            raise ConfigError(f"{where}: {stage.run} has `arguments`, no configuration")
        return _filled(stage.arguments, folders, where)
    if stage.run not in CONFIGURED:
        known = ", ".join([*CONFIGURED, *WITH_ARGUMENTS])
        raise ConfigError(f"{where}: run = {stage.run!r}: must be one of {known}")
    if stage.arguments:
        raise ConfigError(f"{where}: {stage.run} has a configuration, no `arguments`")
    base = read_table(beside / stage.config) if stage.config else {}
    return _section(stage.run, [base, stage.set], config, folders, where)


def _evaluation(stage: StageConfig, config: PipelineConfig, folders: Mapping[str, str]) -> Step:
    name = f"{EVALUATION}/{stage.name}"
    folder = Path(config.out) / EVALUATION / stage.name
    table = {"policy": folders[stage.name]}
    where = f"stage {stage.name}, evaluate"
    settings = _section("evaluate", [table], config, {**folders, "out": str(folder)}, where)
    return Step(name, "evaluate", settings, folder)


def _section(
    command: str, tables: Sequence[dict], config: PipelineConfig, folders, where: str
) -> Section:
    table: dict[str, Any] = {}
    for part in (config.defaults.get(command, {}), *tables):
        table = _merged(table, part)
    out = folders["out"]
    table["out"] = f"{out}/records.jsonl" if command == "curate" else out
    return validated(CONFIGURED[command], _filled(table, folders, where), where)


def _merged(table: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A table with another's values over its own, tables inside tables too."""
    out = dict(table)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _filled(value: Any, folders: Mapping[str, str], where: str) -> Any:
    """A value with the folders that `{name}` stands for."""
    if isinstance(value, dict):
        return {key: _filled(inner, folders, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, folders, where) for inner in value]
    if not isinstance(value, str):
        return value

    def folder(match: re.Match) -> str:
        if match[1] not in folders:
            raise ConfigError(f"{where}: {match[0]} in {value!r} is no earlier stage")
        return folders[match[1]]

    return PLACEHOLDER.sub(folder, value)


def stage_module(command: str) -> ModuleType:
    """The module that `python -m vibejax.COMMAND` runs."""
    module = importlib.import_module(f"vibejax.{command}")
    if hasattr(module, "__path__"):
        return importlib.import_module(f"vibejax.{command}.__main__")
    return module


def _run_step(step: Step) -> None:
    """Runs a step to its end, from where it stopped if it can, and writes its manifest."""
    began, start = datetime.datetime.now(datetime.UTC), time.perf_counter()
    inputs = manifest.inputs(_plain(step.settings), step.folder)
    module = stage_module(step.command)
    settings = step.settings
    if isinstance(settings, Section) and hasattr(settings, "resume"):
        if (step.folder / "config.toml").is_file():
            settings = settings.model_copy(update={"resume": True})
    elif step.command == "generate":
        settings = [*settings, "--resume"]
    elif step.folder.exists():
        shutil.rmtree(step.folder)  # half of what a command wrote that cannot go on
    try:
        if isinstance(settings, Section):
            if step.command == "curate":
                step.folder.mkdir(parents=True)
            module.run(settings)
        else:
            module.main(settings)
    except (InputError, VerifierFailure) as error:
        raise RunError(f"stage {step.name}: {error}") from error
    finally:
        jax.clear_caches()  # the programs of the next stage are others
        gc.collect()
    written = {
        "stage": step.name,
        "command": step.command,
        "settings": _plain(step.settings),
        "inputs": inputs,
        "outputs": manifest.outputs(step.folder),
        "metrics": manifest.metrics(step.folder),
        "git": manifest.git_revision(),
        "versions": manifest.versions(),
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_whole(step.manifest, json.dumps(written, indent=2))


def _check_unchanged(step: Step) -> None:
    """Raises RunError where a finished step would run otherwise today."""
    stored = read_whole(step.manifest, {})
    for what, now in (
        ("settings", _plain(step.settings)),
        ("inputs", manifest.inputs(_plain(step.settings), step.folder)),
    ):
        if stored[what] == now:
            continue
        difference = next(
            (
                f"{what}.{key}"
                for key in {**stored[what], **now}
                if stored[what].get(key) != now.get(key)
            )
            if isinstance(now, dict)
            else iter([what])
        )
        raise RunError(
            f"stage {step.name} is finished, but {difference} changed since; --from {step.name} "
            "runs it and all after it again"
        )


def _plain(settings: Section | list[str]) -> Any:
    return settings.model_dump(mode="json") if isinstance(settings, Section) else settings


def _set_aside(folder: Path) -> None:
    """Keeps what a step made before, under a name that nobody has."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)


@contextlib.contextmanager
def _compilation_cache(folder: Path) -> Iterator[None]:
    """Stages that compile the same programs do so once, unless the user has a cache already."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield
        return
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


if __name__ == "__main__":
    main()
