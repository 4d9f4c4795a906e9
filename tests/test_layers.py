"""The direction of imports: a module imports only from layers below its own."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # bottom first; a folder counts as one module
    {"kernels"},
    {"config_file", "preemption"},
    {"progress"},
    {"config", "sharding", "distributed", "rope", "digests", "buckets"},
    {"locations"},
    {"attention", "cache", "losses", "verifiers", "run_folder", "optimizer"}
    | {"goodput", "profiling", "weight_products"},
    {"qwen2", "packing", "metrics", "arithmetic", "benchmarks", "votes", "programs", "watchdog"}
    | {"records", "chat_template"},
    {"domains", "sampler_copy", "meshes", "job_queue", "page_pool"},
    {"checkpoint_config"},
    {"safetensors_folder"},
    {"gguf_reader"},
    {"gguf_tokenizer", "checkpoint_reader"},
    {"tokenizer"},
    {"weights", "train", "data"},
    {"checkpoint", "sampling", "scheduler", "memory_plan", "policy_programs"} | {"train_shapes"},
    {"decode"},
    {"batching", "completions"},
    {"engine", "journal"},
    {"rollout", "scoring", "report", "reliability", "clr_questions"},
    {"policy", "replies", "clr_results", "manifest", "exchange", "handover"},
    {"rl_shapes"},
    {"rl_setup"},
    {"group_sampling", "policy_update"},
    # The stages: each a command, none built on another.
    {"sft", "rl", "distill", "probe", "merge", "evaluate", "clr", "generate", "score", "judge"}
    | {"curate"},
    {"pipeline", "planning"},
    {"validation"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ELSEWHERE = {"kernels", "tests", "tpu", "configs", "conftest"}  # not importable by these names


def module_files() -> list[Path]:
    files = [*ROOT.joinpath("kernels").rglob("*.py"), *ROOT.joinpath("vibejax").rglob("*.py")]
    inside = [path.relative_to(ROOT) for path in files]
    return sorted(path for path in inside if path.parts[:2] != ("vibejax", "kernels"))  # a link


def owner(path: Path) -> str:
    """The module of `LAYERS` that a file belongs to."""
    return "kernels" if path.parts[0] == "kernels" else path.with_suffix("").parts[1]


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """The dotted path of each import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = ("." * node.level, *(node.module or "").split("."))
            yield from ((*filter(None, prefix), alias.name) for alias in node.names)


def violations(own: str, source: str) -> list[str]:
    """What a file of module `own` imports and must not."""
    found = []
    for top, *rest in imported(source):
        if set(top) == {"."} or top in ELSEWHERE:
            found.append(f"{own} imports {'.'.join([top, *rest])}: write vibejax.NAME")
        elif top == "vibejax" and rest and rest[0] != own:
            if rest[0] not in LEVEL:
                found.append(f"{own} imports {rest[0]}, which is not in LAYERS: list it there")
            elif LEVEL[rest[0]] >= LEVEL[own]:
                found.append(f"{own} imports {rest[0]}, which is not below it")
    return found


@pytest.mark.parametrize("path", module_files(), ids=str)
def test_imports_point_down(path):
    own = owner(path)
    if own == "__init__":
        assert not list(imported(ROOT.joinpath(path).read_text())), "vibejax itself imports nothing"
        return
    assert own in LEVEL, f"{path}: give {own!r} its layer in LAYERS, above all that it imports"
    assert not violations(own, ROOT.joinpath(path).read_text())


def test_each_module_has_one_layer():
    assert len(LEVEL) == sum(map(len, LAYERS))


def test_kernels_stand_alone():
    """They import jax and their own folder, and are no package that could hide another."""
    allowed = {"jax", "numpy", "vibejax"} | sys.stdlib_module_names
    for path in ROOT.joinpath("kernels").rglob("*.py"):
        assert path.name != "__init__.py"
        assert {top for top, *_ in imported(path.read_text())} <= allowed, path


def test_a_configuration_is_read_without_jax():
    """A mistyped key is reported in a tenth of a second, not after jax has loaded."""
    files = [*ROOT.joinpath("vibejax", "config").glob("*.py"), ROOT / "vibejax" / "config_file.py"]
    assert len(files) > 2
    for path in files:
        found = {*imported(path.read_text())}
        ours = {path[1] for path in found if path[0] == "vibejax"}
        assert ours <= {"config", "config_file"}
        assert not {top for top, *_ in found} & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize(
    "own, source, message",
    [
        ("losses", "from vibejax import qwen2", "losses imports qwen2, which is not below it"),
        ("losses", "from vibejax.qwen2 import head", "losses imports qwen2, which is not below"),
        ("losses", "def f():\n    import vibejax.qwen2", "losses imports qwen2, which is not"),
        ("rl", "from vibejax.sft import run", "rl imports sft, which is not below it"),
        ("rl", "from vibejax.utils import f", "rl imports utils, which is not in LAYERS: list it"),
        ("qwen2", "from kernels import reference", r"imports kernels.reference: write vibejax"),
        ("qwen2", "from . import rope", "qwen2 imports ..rope: write vibejax.NAME"),
        ("qwen2", "from .rope import Rope", "qwen2 imports ..rope.Rope: write vibejax.NAME"),
    ],
)
def test_an_import_that_points_up_is_found(own, source, message):
    (found,) = violations(own, source)
    assert message in found


def test_imports_that_point_down_or_inside_are_none_of_that():
    source = "import jax\nfrom vibejax.sharding import spec\nfrom vibejax.losses import mgpo"
    assert not violations("losses", source)
