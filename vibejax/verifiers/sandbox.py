"""Runs model-written Python where it can do no harm: bubblewrap, bare namespaces, or not at all.

A sandbox is a bare interpreter in process, network, mount, IPC and UTS namespaces of its own. It
serves one problem after another, each in a process that knows nothing of the others, as long as
they leave no trace; see `harness` for how. What it sees is in `sandbox_layout`: the interpreter and
its libraries, an empty /tmp of its own, and no network, no environment, no descriptor but the two
pipes of the control protocol, which a solution never holds. Each test is confined further, by
limits and the system-call filter of `seccomp`. When the first process dies, the kernel kills all.

Without root, a user namespace gives the right to do this. Root needs none; there the harness turns
into a user id that nobody has, because the kernel exempts root from the limit on processes.

Needs Linux 5.14 (limits counted per user namespace) on x86_64 or aarch64. What works on a machine
is found out by running a program that tries to get out.
"""

import atexit
import collections
import contextlib
import functools
import importlib.util
import itertools
import marshal
import os
import platform
import resource
import select
import shutil
import signal
import subprocess
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vibejax.verifiers import harness, plain, sandbox_layout, seccomp

BUBBLEWRAP, NAMESPACES, NOTHING = "bubblewrap", "namespaces", "none"
GRACE_S = 10.0  # beyond a test's own limit, before the sandbox itself counts as broken
CLOSE_S = 2.0  # for the harness to leave by itself
MOST_IDLE = 2  # sandboxes kept for the next problem; more only where threads verify side by side
THREADS = 64  # RLIMIT_NPROC; the filter allows no second process
OPEN_FILES = 64
STACK_BYTES = 112 * 2**20  # the kernel keeps 128 MiB of address space free for it
UNUSED_UIDS = (2_000_000_000, 2**27), (61_184, 4_336)  # first, count: assigned to no user anywhere

INTERPRETER_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")  # -I -S, but for a fixed hash seed
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # one program, one output; gone before a solution runs
PACKAGES = ("vibejax", "vibejax.verifiers")  # empty in the sandbox
MODULES = ("plain", "harness_children", "harness", "namespaces")
BOOTSTRAP = """
import marshal, posix, sys
def read(count):
    parts = []
    while count:
        parts.append(posix.read(0, count))
        if not parts[-1]: posix._exit(0)
        count -= len(parts[-1])
    return b"".join(parts)
modules, layout, uid = marshal.loads(read(int.from_bytes(read(8), "little")))
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    if code: exec(code, module.__dict__)
if layout: sys.modules["vibejax.verifiers.namespaces"].enter(layout)
sys.modules["vibejax.verifiers.harness"].main(uid)
"""
PROBE = """
import os, socket
escapes = []
def attempt(what, action):
    try: action()
    except OSError: return
    escapes.append(what)
attempt("reads /etc/passwd", lambda: open("/etc/passwd"))
attempt("reads /proc", lambda: os.listdir("/proc"))
attempt("writes outside of /tmp", lambda: open("/file", "w"))
attempt("opens a socket", lambda: socket.socket(socket.AF_UNIX))
attempt("forks", lambda: os.fork() or os._exit(0))
with open("/tmp/file", "w") as file: file.write("x")
if os.environ: escapes.append("sees the environment")
print("escapes:", *escapes, sep=", ")
"""


class SandboxUnavailableError(RuntimeError):
    """There is no way to confine a program on this machine."""


class SandboxBrokenError(RuntimeError):
    """The sandbox failed, not the solution in it."""


class Backend(NamedTuple):
    """A way to confine: its name, and whether it takes a user namespace."""

    name: str
    user_namespace: bool


class Ended(NamedTuple):
    """How a test ended.

    Attributes:
        how: harness.EXITED, SIGNALLED or TIMED_OUT.
        value: exit status or signal.
        reply: what was printed (program), returned (call) or found (assert).
        errors: the end of the solution's standard error.
    """

    how: int
    value: int
    reply: bytes
    errors: bytes


class Sandbox:
    """One running sandbox; see `problem` for how it is used.

    Attributes:
        pid: process id of what runs it.
    """

    def __init__(self, backend: Backend):
        """Starts the sandbox.

        Args:
            backend: see `find_backend`.

        Raises:
            SandboxBrokenError: it did not start.
        """
        self._most_bytes = 0
        uid = None if backend.user_namespace or backend.name == NOTHING else _unused_uid()
        layout = sandbox_layout.layout()
        command = [layout["python"], *INTERPRETER_FLAGS, "-c", BOOTSTRAP]
        if backend.name == BUBBLEWRAP:
            command = [*sandbox_layout.bubblewrap(layout, backend.user_namespace), "--", *command]
        enter = layout | {"user": backend.user_namespace} if backend.name == NAMESPACES else None
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        self.pid = self._process.pid
        try:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                os.set_blocking(pipe.fileno(), False)
            self._start(marshal.dumps((_modules(), enter, uid)))
        except BaseException:
            self.close()
            raise

    def begin(self, job: Mapping[str, Any]) -> None:
        """Starts a problem.

        Args:
            job: `kind`, `source`, `setup`, `function` or `names`, `preload`, `output_bytes` and
                `total_seconds` of `harness.supervise`, and `memory_bytes`, the address space of
                a test's process.

        Raises:
            SandboxBrokenError: the harness did not report.
        """
        self._most_bytes = max(job["output_bytes"], harness.ERROR_TAIL_BYTES)
        limits = _limits(job["memory_bytes"], job["output_bytes"])
        machine = platform.machine()
        self._start(marshal.dumps({**job, "limits": limits, "filter": seccomp.build(machine)}))

    def run(self, body: bytes, seconds: float) -> Ended:
        """Runs one test.

        Args:
            body: standard input (program), arguments (call) or test code (assert).
            seconds: wall clock after which the test's process is killed.

        Raises:
            SandboxBrokenError: the harness did not report.
        """
        deadline = time.monotonic() + seconds + GRACE_S
        self._write(plain.words(max(1, round(seconds * 1_000)), len(body)) + body, deadline)
        how, value, reply, errors = self._read_words(4, deadline)
        if reply + errors > 2 * self._most_bytes:
            raise SandboxBrokenError(f"the harness announces {reply} + {errors} bytes")
        return Ended(how, value, self._read(reply, deadline), self._read(errors, deadline))

    def end(self) -> bool:
        """Ends the problem; says whether the sandbox is as it was before.

        Raises:
            SandboxBrokenError: the harness did not report.
        """
        deadline = time.monotonic() + GRACE_S
        self._write(plain.words(0, 0), deadline)
        return self._read_words(1, deadline) == [1]

    def close(self) -> None:
        """Ends every process of the sandbox."""
        with self._process as process:  # which reaps it
            process.stdin.close()  # the harness leaves
            pidfd = os.pidfd_open(process.pid)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(CLOSE_S * 1_000):
                os.killpg(process.pid, signal.SIGKILL)
            os.close(pidfd)

    def _start(self, message: bytes) -> None:
        deadline = time.monotonic() + GRACE_S
        self._write(plain.words(len(message)) + message, deadline)
        self._read_words(1, deadline)

    def _write(self, data: bytes, deadline: float) -> None:
        view, fd = memoryview(data), self._process.stdin.fileno()
        while view:
            self._wait(fd, select.POLLOUT, deadline)
            try:
                view = view[os.write(fd, view) :]
            except BrokenPipeError:
                raise self._broken("ended") from None

    def _read(self, count: int, deadline: float) -> bytes:
        parts, fd = [], self._process.stdout.fileno()
        while count:
            self._wait(fd, select.POLLIN, deadline)
            part = os.read(fd, min(count, 2**20))
            if not part:
                raise self._broken("ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _read_words(self, count: int, deadline: float) -> list[int]:
        data = self._read(count * plain.WORD, deadline)
        starts = range(0, len(data), plain.WORD)
        return [int.from_bytes(data[i : i + plain.WORD], "little") for i in starts]

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1_000):
            raise self._broken("does not answer")

    def _broken(self, what: str) -> SandboxBrokenError:
        try:
            errors = os.read(self._process.stderr.fileno(), 2**16).decode(errors="replace")
        except BlockingIOError:
            errors = ""
        return SandboxBrokenError(": ".join([f"the sandbox {what}", *errors.split("\n")[-2:-1]]))


@contextlib.contextmanager
def problem(backend: Backend, job: Mapping[str, Any]) -> Iterator[Sandbox]:
    """Runs a problem in a sandbox: one that is idle and as new, or a new one.

    Args:
        backend: see `find_backend`.
        job: see `Sandbox.begin`.

    Raises:
        SandboxBrokenError: no sandbox started.
    """
    while True:
        try:
            box, is_new = _idle[os.getpid(), backend].pop(), False
        except IndexError:
            box, is_new = Sandbox(backend), True
        try:
            box.begin(job)
            break
        except BaseException as error:
            box.close()
            if is_new or not isinstance(error, SandboxBrokenError):
                raise  # an idle one may have died with the thread that started it
    try:
        yield box
        as_new = box.end()
    except BaseException:
        box.close()
        raise
    idle = _idle[os.getpid(), backend]
    if as_new and backend.name != NOTHING and len(idle) < MOST_IDLE:
        idle.append(box)
    else:
        box.close()


@atexit.register
def close_idle() -> None:
    """Ends the sandboxes of this process that wait for a problem."""
    for (owner, _), boxes in _idle.items():
        while owner == os.getpid() and boxes:
            boxes.pop().close()


def find_backend(wanted: str = "auto", *, allow_unsandboxed: bool = False) -> Backend:
    """Returns the first way of confining that holds a program which tries to get out.

    Args:
        wanted: auto, bubblewrap or namespaces.
        allow_unsandboxed: whether, where nothing else works, limits and the system-call filter
            are enough. A solution may then read and delete whatever this user may.

    Raises:
        ValueError: `wanted` is unknown.
        SandboxUnavailableError: nothing works; says what was tried and why it failed.
    """
    if wanted not in ("auto", BUBBLEWRAP, NAMESPACES):
        raise ValueError(f"backend = {wanted!r}: must be auto, {BUBBLEWRAP} or {NAMESPACES}")
    failures = []
    for name in (BUBBLEWRAP, NAMESPACES) if wanted == "auto" else (wanted,):
        try:
            return _probe(name)
        except SandboxUnavailableError as error:
            failures.append(f"{name}: {error}")
    if allow_unsandboxed:
        return Backend(NOTHING, False)
    raise SandboxUnavailableError(
        f"no sandbox for model-written code ({'; '.join(failures)}). Install bubblewrap, or allow "
        "unprivileged user namespaces (in a container: run it with CAP_SYS_ADMIN, or without its "
        "seccomp and AppArmor profiles; on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_"
        "userns=0), or accept the danger with allow_unsandboxed = true"
    )


@functools.cache  # of what works: an exception is not kept, and the next call tries again
def _probe(name: str) -> Backend:
    """Tries one way of confining; returns it, or raises and says why it does not work."""
    if name == BUBBLEWRAP and shutil.which("bwrap") is None:
        raise SandboxUnavailableError("not installed")
    job = {"kind": "program", "source": PROBE, "setup": "", "preload": []}
    job |= {"memory_bytes": 2**29, "output_bytes": 2**16, "total_seconds": GRACE_S}
    why = []
    for user_namespace in (False, True) if os.getuid() == 0 else (True,):
        backend = Backend(name, user_namespace)
        try:
            with problem(backend, job) as sandbox:
                ended = sandbox.run(b"", seconds=GRACE_S)
        except (SandboxBrokenError, OSError, ValueError) as error:
            why.append(str(error))
            continue
        found = (ended.reply or ended.errors).decode(errors="replace").strip()
        if found == "escapes:":
            return backend
        why.append(f"does not confine ({found[-200:]})")
    raise SandboxUnavailableError(", ".join(why))


# Idle sandboxes by process and backend: a fork of this process must not use its parent's.
_idle: dict[tuple[int, Backend], collections.deque[Sandbox]] = collections.defaultdict(
    collections.deque
)
_started = itertools.count()


def _limits(memory_bytes: int, output_bytes: int) -> dict[int, int]:
    return {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_NPROC: THREADS,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_FSIZE: output_bytes,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_CORE: 0,
    }


def _unused_uid() -> int:
    """Returns a user id that is nobody's, different for sandboxes that run at the same time."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = [tuple(map(int, line.split())) for line in lines]
    number = os.getpid() * 64 + next(_started) % 64
    for first, count in UNUSED_UIDS:
        uid = first + number % count
        if any(start <= uid < start + size for start, _, size in ranges):
            return uid
    return sandbox_layout.NOBODY


@functools.cache
def _modules() -> list[tuple[str, types.CodeType | None]]:
    """Returns names and code of the modules that a sandbox runs."""
    names = [f"{PACKAGES[-1]}.{name}" for name in MODULES]
    specs = [importlib.util.find_spec(name) for name in names]
    codes = [spec.loader.get_code(spec.name) for spec in specs]
    return [*((name, None) for name in PACKAGES), *zip(names, codes, strict=True)]
