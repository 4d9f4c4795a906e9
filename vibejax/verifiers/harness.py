"""What runs inside the sandbox: one confined process a test, and a report of how it ended.

`sandbox.py` starts a bare interpreter and hands it this module's code; then come problems, one
after the other, each a job (the solution and its limits) and its tests. Standard library only:
nothing else is visible there.

Who trusts whom. Four kinds of process, each the parent of the next:

- The harness, the sandbox's first process, imports what solutions use and forks for each problem.
  It reads nothing but the length of a job, so that what it hands on to later problems by forking
  holds nothing of earlier ones. Starting an interpreter takes longer than running ten tests.
- The supervisor of a problem reads its job and forks for each test. It never runs a line of the
  solution. At the end it says whether the sandbox is as it was: if a solution left as much as a
  trace in /tmp, the only place where it can write, the sandbox is not used again.
- A solution's process (one for each run of a program, one for all calls of a problem) gives up
  every descriptor but the ones it is meant to use, takes its limits and the system-call filter, and
  only then compiles and runs the solution. What a solution can reach is its own process, and there
  is nothing worth reaching. `program` and `call` tests send an input, never an expected output;
  what is printed or returned is compared outside of the sandbox.
- `assert` tests have to run next to calls of the solution. They run in a process beside it, the
  tester, where proxies stand for the solution's functions. Values cross a pipe as plain data and
  are rebuilt as exact builtin types, so that nothing of the solution's making (no `__eq__`, no
  changed builtin) exists where the asserts run. The tester itself reads the test code from the
  control pipe: the supervisor, of which the solution's process is a copy, never holds it.

An `assert` test passes only if its code ran to the end, called the solution and never lost it. The
filter keeps a solution from signalling, tracing or reading any other process.
"""

import ctypes
import fcntl
import functools
import gc
import marshal
import os
import resource
import select
import signal
from collections.abc import Callable
from typing import Any

from vibejax.verifiers import harness_children as children
from vibejax.verifiers import plain

EXITED, SIGNALLED, TIMED_OUT = range(3)  # how a test's process ended
ERROR_TAIL_BYTES = 2_000  # of standard error, for people
CALLEE_EXIT_S = 1.0  # from closing its pipe to the end of a process, which takes its memory along
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
COMMON_MODULES = ("bisect", "heapq", "itertools", "math", "random", "re", "string")

libc = ctypes.CDLL(None, use_errno=True)


class SockFprog(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def prctl(option: int, *arguments: Any) -> None:
    """Calls prctl(2).

    Raises:
        OSError: it failed; a process that cannot be confined must not go on.
    """
    if libc.prctl(option, *(*arguments, 0, 0, 0, 0)[:4]) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def confine(job: dict, seconds: float) -> None:
    """Takes limits and the system-call filter: from here on the process is the solution's."""
    for kind, value in {**job["limits"], resource.RLIMIT_CPU: int(seconds) + 1}.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = SockFprog(len(job["filter"]) // 8, job["filter"])
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def start(job: dict, seconds: float, fds: list[int], run: Callable, body_length: int = 0) -> int:
    """Forks a confined child that sees `fds` as 0, 1, 2, ... and nothing else.

    Args:
        job: see `supervise`.
        seconds: the child's CPU time.
        fds: its descriptors, in order.
        run: called as `run(job)` or, with a body, `run(job, body)`; does not return.
        body_length: bytes that the child, not the supervisor, reads from the control pipe.

    Returns:
        The child's process id.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        body = [plain.read_exactly(0, body_length)] if body_length else []
        lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        for target, fd in enumerate(lifted):
            os.dup2(fd, target)
        os.closerange(len(fds), 1_000)
        confine(job, seconds)
        run(job, *body)
    finally:
        os._exit(70)


def finish(pid: int, seconds: float) -> tuple[int, int]:
    """Waits for a child, at most `seconds`, and reaps it.

    Returns:
        How it ended, and its exit status or signal.
    """
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    # Nothing but the death of whoever started the sandbox. It is watched for at every wait: a death
    # signal does not pass from a parent that dropped its rights to a child that changed its user.
    poll.register(0, 0)
    ended = fd in {number for number, _ in poll.poll(seconds * 1_000)}
    os.close(fd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not ended:
        return TIMED_OUT, 0
    if os.WIFSIGNALED(status):
        return SIGNALLED, os.WTERMSIG(status)
    return EXITED, os.WEXITSTATUS(status)


def memory_file(data: bytes = b"") -> int:
    """Returns a descriptor of a file that has no name and no place in the file system."""
    fd = os.memfd_create("test")
    plain.replace(fd, data)
    return fd


def run_program(job: dict, seconds: float, length: int) -> tuple[int, int, bytes, bytes]:
    """Runs the solution as a program; `supervise` says what it takes and returns."""
    fds = [memory_file(plain.read_exactly(0, length)), memory_file(), memory_file()]
    ended = finish(start(job, seconds, fds, children.run_program), seconds)
    printed = plain.content(fds[1], job["output_bytes"])
    errors = plain.content(fds[2], ERROR_TAIL_BYTES)
    for fd in fds:
        os.close(fd)
    return *ended, printed, errors


def run_assert(job: dict, seconds: float, length: int) -> tuple[int, int, bytes, bytes]:
    """Runs test code beside the solution; `supervise` says what it takes and returns."""
    empty, printed, errors, quiet, result = files = [memory_file() for _ in range(5)]
    pipes = requests_out, requests_in, replies_out, replies_in = *os.pipe(), *os.pipe()
    fds = [empty, printed, errors, requests_out, replies_in]
    solution = start(job, seconds, fds, children.serve_solution)
    fds = [empty, quiet, quiet, replies_out, requests_in, result]
    tester = start(job, seconds, fds, children.run_tests, length)
    for fd in pipes:  # here, so that the death of one child is an end of file for the other
        os.close(fd)
    ended = finish(tester, seconds)
    finish(solution, 0)
    found = plain.content(result, job["output_bytes"])
    tail = plain.content(errors, ERROR_TAIL_BYTES)
    for fd in files:
        os.close(fd)
    return *ended, found, tail


class Callee:
    """The solution's process that answers calls: one for a problem, a new one after a failure.

    Nothing is read from a pipe but single bytes, and nothing is waited for but with a limit: the
    process at the other end may be hostile.
    """

    def __init__(self, job: dict):
        """Takes the job; the process starts with the first call."""
        self.job = job
        self.pid = 0
        self.files = [memory_file() for _ in range(5)]

    def run(self, seconds: float, length: int) -> tuple[int, int, bytes, bytes]:
        """Makes one call; `supervise` says what it takes and returns."""
        empty, printed, errors, arguments, result = self.files
        plain.replace(arguments, plain.read_exactly(0, length))
        for fd in (printed, errors, result):
            plain.replace(fd, b"")
        if not self.pid:
            go_out, self.go = os.pipe()
            self.done, done_in = os.pipe()
            fds = [empty, printed, errors, go_out, done_in, arguments, result]
            self.pid = start(self.job, self.job["total_seconds"], fds, children.serve_calls)
            os.close(go_out)
            os.close(done_in)
        try:
            os.write(self.go, b"\0")
        except BrokenPipeError:
            pass  # it ended between two calls, as is found out below
        ready = select.poll()
        for fd, event in ((self.done, select.POLLIN), (0, 0)):
            ready.register(fd, event)
        events = dict(ready.poll(seconds * 1_000))
        if events.get(self.done, 0) & select.POLLIN:
            os.read(self.done, 1)
            ended = EXITED, 0
        else:
            ended = finish(self.pid, CALLEE_EXIT_S if self.done in events else 0)
            os.close(self.go)
            os.close(self.done)
            self.pid = 0
        found = plain.content(result, self.job["output_bytes"]) if self.pid else b""
        return *ended, found, plain.content(errors, ERROR_TAIL_BYTES)


def supervise(job: dict) -> None:
    """Serves one problem's tests from descriptor 0 on descriptor 1, until a test of no time.

    For each test, `run_test(seconds, length)` gets its time limit and the length of its body, which
    waits on descriptor 0, and returns how the test's process ended (EXITED, SIGNALLED, TIMED_OUT),
    its exit status or signal, its result, and the end of its standard error.

    Args:
        job: `kind` (program, call or assert), `source` and `setup` (code), `function` (of call) or
            `names` (that the tests use, of assert), `preload` (modules), `limits` (rlimit kind ->
            value), `output_bytes`, `total_seconds`, `filter` (of `seccomp.build`).
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in job["preload"]:  # once here instead of once in each test's process
        __import__(name)
    run_test = {
        "program": functools.partial(run_program, job),
        "assert": functools.partial(run_assert, job),
        "call": Callee(job).run,
    }[job["kind"]]
    before = os.stat("/tmp")
    plain.write_all(1, plain.words(1))
    while True:
        milliseconds, length = plain.read_word(0), plain.read_word(0)
        if not milliseconds:
            break
        how, value, reply, tail = run_test(milliseconds / 1_000, length)
        plain.write_all(1, plain.words(how, value, len(reply), len(tail)) + reply + tail)
    after = os.stat("/tmp")
    same = (before.st_mode, before.st_ctime_ns) == (after.st_mode, after.st_ctime_ns)
    plain.write_all(1, plain.words(int(same and not os.listdir("/tmp"))))


def main(uid: int | None) -> None:
    """Serves problems from descriptor 0 on descriptor 1 until the other end closes.

    Args:
        uid: user to become, or None.
    """
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    os.environ.clear()
    for name in COMMON_MODULES:
        __import__(name)
    compile("", "nothing", "exec")  # the first one builds the classes of the syntax tree
    gc.freeze()
    try:
        plain.write_all(1, plain.words(1))
        while True:
            length = plain.read_word(0)
            supervisor = os.fork()
            if not supervisor:
                supervise(marshal.loads(plain.read_exactly(0, length)))
                os._exit(0)
            if os.waitpid(supervisor, 0)[1]:
                os._exit(1)
    except (EOFError, BrokenPipeError):
        os._exit(0)
