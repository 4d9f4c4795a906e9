"""Every file of the newest checkpoint damaged in turn: `python tests/benchmarks/corruption.py`.

Two checkpoints of a small state with one array that fills files of its own. Each file of the newer
one is truncated to half and to nothing, has single bits flipped (in data: at many places), and is
deleted; then the state is restored. Prints a row for each file: how often the restore fell back to
the older checkpoint, with one line that says so, and how often it loaded the newer one, right to
the last bit, because the damaged bytes are not read. Anything else is not as promised: exit code 1.
"""

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vibejax.checkpoint import Checkpoints
from vibejax.run_folder import RunError
from vibejax.train import TrainState

FLIPS = 5  # places of a file


def state(step: int) -> TrainState:
    big = jax.random.normal(jax.random.key(step), (256, 1024))  # 1 MiB that cannot be compressed
    params = {"w": big, "b": jnp.full(8, step, jnp.bfloat16)}
    return TrainState(jnp.array(step, jnp.int32), params, optax.adam(1.0).init(params))


def damages(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of damage, and what a file then holds; None: it is gone."""
    yield "deleted", None
    yield "emptied", b""
    yield "truncated", content[: len(content) // 2]
    for place in sorted({int(x) for x in np.linspace(0, len(content) - 1, FLIPS)}):
        yield (
            f"bit flipped at {place}",
            (content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]),
        )


def restored(folder: Path) -> tuple[str, str]:
    """What a restore came to, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        checkpoints = Checkpoints(folder, keep=2)
        try:
            found = checkpoints.restore_latest(state(0))
        except RunError as error:
            return "error", str(error)
        finally:
            checkpoints.close()
    step = int(found.step)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), found, state(step))
    if not step or not all(jax.tree.leaves(same)):
        return "wrong numbers", printed.getvalue()
    return ("fell back" if step == 1 else "not read"), printed.getvalue()


def acceptable(outcome: str, printed: str, folder: Path) -> bool:
    line = f"{folder}/2"
    if outcome == "fell back":
        return [x.startswith(line) for x in printed.splitlines() if "damaged" in x] == [True]
    if outcome == "error":
        return len(printed.splitlines()) == 1 and str(folder) in printed
    return outcome == "not read"


def walk(folder: Path) -> Iterator[tuple[str, Counter]]:
    """Each file of the newer checkpoint, and how often which outcome came of damaging it."""
    good, run = folder / "good", folder / "run"
    checkpoints = Checkpoints(good, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    for path in sorted(p for p in (good / "2").rglob("*") if p.is_file()):
        name, outcomes = path.relative_to(good / "2"), Counter()
        for kind, content in damages(path.read_bytes()):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(good, run)
            if content is None:
                (run / "2" / name).unlink()
            else:
                (run / "2" / name).write_bytes(content)
            outcome, printed = restored(run)
            if not acceptable(outcome, printed, run):
                print(f"{name} {kind}: {outcome}: {printed}", file=sys.stderr)
                outcome = "not as promised"
            outcomes[outcome] += 1
        yield str(name), outcomes


def main() -> None:
    totals: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, outcomes in walk(Path(folder)):
            print(json.dumps({"file": name, **outcomes}), flush=True)
            totals += outcomes
    row = {
        "benchmark": "corruption",
        "case": "each file of the newest checkpoint",
        "ours": totals["not as promised"],
        "peer": None,
        "ratio": None,
        "unit": f"of {totals.total()} damages not as promised",
        "higher_is_better": False,
        **totals,
    }
    print(json.dumps(row))
    sys.exit(bool(totals["not as promised"]))


if __name__ == "__main__":
    main()
