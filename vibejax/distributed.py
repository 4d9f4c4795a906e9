"""Several processes as one run: one a host, each with the same program, over JAX's own runtime.

Where the others are is read from the environment, the first of these that is there:

- VIBEJAX_COORDINATOR (HOST:PORT of process 0), VIBEJAX_PROCESSES (how many) and VIBEJAX_PROCESS
  (which of them, from 0), for any machines;
- SLURM's variables, with one task a node;
- what a TPU pod, GKE or MPI tells its workers, as JAX finds it.

Without any of them a run is one process. All processes have to come within VIBEJAX_START_S
seconds (300).

What processes tell each other here, kilobytes, goes through JAX's coordination service: no device
waits for a host that still decodes or verifies, and a process that fails tells the others why.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src.distributed import global_state as _state  # its key-value store has no public name

from vibejax import config_file, preemption, progress
from vibejax.config_file import InputError, Section
from vibejax.kernels import tiles

LOG = logging.getLogger("vibejax")
VARIABLES = ("VIBEJAX_COORDINATOR", "VIBEJAX_PROCESSES", "VIBEJAX_PROCESS")
START_S = 300
HEARTBEAT_S = 30  # without a sign from a process, which may compile or decode, it counts as dead
SHUTDOWN_S = 60  # a process that ends waits for the others, which may be where they cannot end
LOOK_S = 2  # between two looks at whether another process has failed
FAILED = "vibejax/failed"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS",
          "SLURM_PROCID")  # fmt: skip


class StartError(InputError):
    """Processes that cannot work together; the message says what to do."""


class PeerError(InputError):
    """Another process has failed; the message names it and says why."""


class Place(NamedTuple):
    """Where a process stands among those of its run.

    Attributes:
        coordinator_address: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
    """

    coordinator_address: str
    num_processes: int
    process_id: int


_rounds = itertools.count()


@contextlib.contextmanager
def joined(config: Section) -> Iterator[None]:
    """Has this process be one of its run's: what is inside begins and ends in all of them.

    Args:
        config: the run's, which must be the same in all.

    Raises:
        StartError: the processes do not find each other, or are not alike.
        PeerError: another process has failed.
    """
    start()
    if _state.client is None:
        yield
        return
    try:
        require_alike(config)
        yield
        jax.distributed.shutdown()  # Python's own ending, where JAX would do it, can take long
    except PeerError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        line = f"{error}" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        _state.client.key_value_set(f"{FAILED}/{process()}", line.splitlines()[0])
        raise


def start() -> None:
    """Connects this process with the others that the environment tells of, if it does.

    Raises:
        StartError: what it tells cannot be used, or not all come in time.
    """
    place = place_from(os.environ)
    if place is None and jax.config.jax_platforms == "cpu":
        return  # a pod's worker that is to compute on its own CPU
    seconds = START_S
    if os.environ.get("VIBEJAX_START_S"):
        seconds = _positive(os.environ, "VIBEJAX_START_S")
    # Given all of it, JAX leaves all devices of the host to its one process.
    known = {} if place is None else place._asdict() | {"cluster_detection_method": "deactivate"}
    # JAX's own limit ends the process with a stack trace; nothing can be raised from there.
    limit = threading.Timer(seconds, _give_up, (place, seconds))
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        if place is not None or not isinstance(error, ValueError):
            raise StartError(f"{_named(place)}: {error}") from None
        # JAX knows of no others.
    finally:
        limit.cancel()


def _give_up(place: Place | None, seconds: int) -> None:
    """Ends this process, which others have not joined in time."""
    missing = "not all processes came"
    if place is not None and place.process_id:
        host, _, port = place.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=LOOK_S).close()
        except OSError as error:
            missing = f"no coordinator answers ({error})"
    print(
        f"error: {_named(place)}: {missing} within {seconds} s (VIBEJAX_START_S)", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(1)


def place_from(environment: Mapping[str, str]) -> Place | None:
    """What the environment says of this process; None: nothing, or JAX may know.

    Raises:
        StartError: it cannot be used.
    """
    given = [name for name in VARIABLES if environment.get(name)]
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise StartError(f"{', '.join(given)}: needs {missing} too")
    if given:
        place = Place(
            environment["VIBEJAX_COORDINATOR"],
            _positive(environment, "VIBEJAX_PROCESSES"),
            _natural(environment, "VIBEJAX_PROCESS"),
        )
        address = place.coordinator_address
        if not re.fullmatch(r".+:\d+", address):
            raise StartError(f"VIBEJAX_COORDINATOR = {address!r}: must be HOST:PORT")
        if place.process_id >= place.num_processes:
            raise StartError(
                f"VIBEJAX_PROCESS = {place.process_id}: must be below VIBEJAX_PROCESSES = "
                f"{place.num_processes}"
            )
        return place
    if not all(name in environment for name in _SLURM):
        return None
    tasks = _positive(environment, "SLURM_NTASKS")
    nodes = _positive(environment, "SLURM_STEP_NUM_NODES")
    if tasks != nodes:
        raise StartError(
            f"SLURM started {tasks} tasks on {nodes} nodes: one process uses all devices of its "
            "host, so ask for --ntasks-per-node=1"
        )
    # The list is like node[003-005,9],other: the first node is the prefix and the first number.
    prefix, number = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"]).groups()
    port = 61_440 + _natural(environment, "SLURM_JOB_ID") % 4_096  # jobs on a node differ
    return Place(f"{prefix}{number or ''}:{port}", tasks, _natural(environment, "SLURM_PROCID"))


def _named(place: Place | None) -> str:
    if place is None:
        return "the processes that JAX found"
    return (
        f"process {place.process_id} of {place.num_processes}, coordinator "
        f"{place.coordinator_address}"
    )


def _natural(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environment[name]):
        raise StartError(f"{name} = {environment[name]!r}: must be a whole number")
    return int(environment[name])


def _positive(environment: Mapping[str, str], name: str) -> int:
    number = _natural(environment, name)
    if not number:
        raise StartError(f"{name} = 0: must be at least 1")
    return number


def store() -> Any:
    """JAX's client of the key-value store that all processes share; None where there is one."""
    return _state.client


def count() -> int:
    """How many processes the run has."""
    return _state.num_processes


def process() -> int:
    """Which of them this is, from 0."""
    return _state.process_id


def first() -> bool:
    """Whether this is the process that writes what there is one of, process 0."""
    return process() == 0


def announce(text: Any) -> None:
    """Prints what all processes would say, once."""
    if first():
        print(text)


def require_alike(config: Section) -> None:
    """Checks, before any device works, that all processes run the same program.

    Raises:
        StartError: they do not; all processes say the same.
    """
    here = facts(config)
    (zero, *others) = gather(here)
    for process, other in enumerate(others, start=1):
        differing = [
            f"{name}: {zero.get(name)!r} -> {other.get(name)!r}"
            for name in zero | other
            if zero.get(name) != other.get(name)
        ]
        if differing:
            raise StartError(f"process {process} differs from process 0: {'; '.join(differing)}")


def facts(config: Section) -> dict[str, Any]:
    """What must be the same in all processes: versions, code, tiles and configuration.

    Raises:
        StartError: the file of VIBEJAX_TILES cannot be used.
    """
    try:
        chosen = tiles.overrides()
    except ValueError as error:
        raise StartError(str(error)) from None
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "vibejax")},
        "code of vibejax": code_digest(),
        "tiles": chosen,
        "configuration": type(config).__name__,
        **config_file.leaves(config),
    }


def code_digest(folder: Path = Path(__file__).parent) -> str:
    """The SHA-256 sum of all modules of the package, their names among them."""
    digest = hashlib.sha256()
    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)  # kernels is a link
        for name in names
        if name.endswith(".py")
    ]
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def gather(value: Any) -> list[Any]:
    """What every process gave to its own call, in their order; all must call.

    A process waits for the others for as long as they need; it may be asked to end meanwhile.

    Args:
        value: what JSON can hold.

    Raises:
        PeerError: another process has failed.
    """
    if _state.client is None:
        return [value]
    with progress.waiting():
        return _gathered(next(_rounds), value)


def _gathered(name: int, value: Any) -> list[Any]:
    _state.client.key_value_set(f"vibejax/{name}/{process()}", json.dumps(value))
    if first():
        values = [_told(f"vibejax/{name}/{number}") for number in range(count())]
        _state.client.key_value_set(f"vibejax/{name}/all", f"[{', '.join(values)}]")
        if name:  # all are here, so nobody reads the round before any more
            _state.client.key_value_delete(f"vibejax/{name - 1}")
    return json.loads(_told(f"vibejax/{name}/all"))


def _told(key: str) -> str:
    """The value of a key, once a process has set it."""
    while True:
        preemption.check()
        try:
            return _state.client.blocking_key_value_get(key, LOOK_S * 1_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for failed, reason in _state.client.key_value_dir_get(FAILED):
            raise PeerError(f"process {failed.rpartition('/')[2]}: {reason}")


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, which alone calls it; what JSON can hold."""
    return gather(make() if first() else None)[0]


@contextlib.contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Has this process log to logs/process-K.log of a run's folder, for as long as it lasts."""
    path = folder / "logs" / f"process-{process()}.log"
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logs = (LOG, logging.getLogger())  # what libraries say too; but no line of ours on the screen
    for log in logs:
        log.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    devices = jax.local_devices()
    LOG.info(
        "process %d of %d, %d x %s", process(), count(), len(devices),
        devices[0].device_kind,
    )  # fmt: skip
    try:
        yield
    except BaseException as error:
        LOG.error("%s: %s", type(error).__name__, error)
        raise
    finally:
        for log in logs:
            log.removeHandler(handler)
        handler.close()
