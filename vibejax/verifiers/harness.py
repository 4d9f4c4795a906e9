"""What runs inside the sandbox: one confined process a test, and a report of how it ended.

`sandbox.py` starts a bare interpreter, hands it this module's code and a job (the solution and its
limits), then one test at a time. Standard library only: nothing else is visible there.

Who trusts whom. The harness is the first process of the sandbox and never runs a line of the
solution; it forks for each test and waits. A forked child gives up every descriptor but the ones it
is meant to use, takes its limits and the system-call filter, and only then compiles and runs the
solution. What a solution can reach is its own process, and there is nothing worth reaching:

- `program` and `call` tests send an input, never an expected output. The harness reports what was
  printed or returned; the comparison happens outside of the sandbox.
- `assert` tests have to run next to calls of the solution. They run in a second child, the tester,
  where proxies stand for the solution's functions. Values cross a pipe as plain data and are
  rebuilt as exact builtin types, so that nothing of the solution's making (no `__eq__`, no changed
  builtin) exists where the asserts run. The tester itself reads the test code from the control
  pipe: the harness, of which the solution's process is a copy, never holds it.

An `assert` test passes only if its code ran to the end, called the solution and never lost it. The
filter keeps the two children from signalling, tracing or reading each other.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import resource
import select

from vibejax.verifiers import harness_children as children
from vibejax.verifiers import plain

TYPE_CHECKING = False  # importing typing takes longer than running a test
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

EXITED, SIGNALLED, TIMED_OUT = range(3)  # how a test's process ended
ERROR_TAIL_BYTES = 2_000  # of standard error, for people
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
SIGKILL = 9  # the module signal would cost every problem its import of enum

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
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if job["filter"]:
        program = SockFprog(len(job["filter"]) // 8, job["filter"])
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def start(job: dict, seconds: float, fds: list[int], run: Callable, body_length: int = 0) -> int:
    """Forks a confined child that sees `fds` as 0, 1, 2, ... and nothing else.

    Args:
        job: see `main`.
        seconds: the child's CPU time.
        fds: its descriptors, in order.
        run: called as `run(job)` or, with a body, `run(job, body)`; does not return.
        body_length: bytes that the child, not the harness, reads from the control pipe.

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
    poll.register(0, 0)  # nothing but the death of whoever started the sandbox
    ended = fd in {number for number, _ in poll.poll(seconds * 1_000)}
    os.close(fd)
    if not ended:
        os.kill(pid, SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not ended:
        return TIMED_OUT, 0
    if os.WIFSIGNALED(status):
        return SIGNALLED, os.WTERMSIG(status)
    return EXITED, os.WEXITSTATUS(status)


def memory_file(content: bytes = b"") -> int:
    """Returns a descriptor of a file that has no name and no place in the file system."""
    fd = os.memfd_create("test")
    plain.write_all(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def content(fd: int, last: int) -> bytes:
    """Returns at most the last so many bytes of a memory file."""
    size = os.fstat(fd).st_size
    return os.pread(fd, last, max(0, size - last))


def run_test(job: dict, seconds: float, length: int) -> tuple[int, int, bytes, bytes]:
    """Runs the next test, whose body of `length` bytes waits in the control pipe.

    Returns:
        How the process ended, its exit status or signal, its result, the tail of its errors.
    """
    given = b"" if job["kind"] == "assert" else plain.read_exactly(0, length)
    entered = memory_file(given if job["kind"] == "program" else b"")
    printed, errors, result = memory_file(), memory_file(), memory_file()
    opened = [entered, printed, errors, result]
    if job["kind"] == "assert":
        requests_out, requests_in = os.pipe()
        replies_out, replies_in = os.pipe()
        opened += [requests_out, requests_in, replies_out, replies_in, quiet := memory_file()]
        fds = [entered, printed, errors, requests_out, replies_in]
        solution = start(job, seconds, fds, children.serve_solution)
        fds = [entered, quiet, quiet, replies_out, requests_in, result]
        tester = start(job, seconds, fds, children.run_tests, length)
        for fd in (requests_out, requests_in, replies_out, replies_in):  # ends must show as EOF
            opened.remove(fd)
            os.close(fd)
        ended = finish(tester, seconds)
        finish(solution, 0)
    elif job["kind"] == "call":
        fds = [entered, printed, errors, result]
        ended = finish(start(job, seconds, fds, lambda job: children.run_call(job, given)), seconds)
    else:
        ended = finish(start(job, seconds, opened[:3], children.run_program), seconds)
    reply = content(printed if job["kind"] == "program" else result, job["output_bytes"])
    tail = content(errors, ERROR_TAIL_BYTES)
    for fd in opened:
        os.close(fd)
    return *ended, reply, tail


def main(job: dict) -> None:
    """Serves tests from descriptor 0 on descriptor 1 until the other end closes.

    Args:
        job: `kind` (program, call or assert), `source` and `setup` (code), `function` (of call) or
            `names` (that the tests use, of assert), `preload` (modules), `limits` (rlimit kind ->
            value), `output_bytes`, `filter` (of `seccomp.build`, or empty), `uid` (to become, or
            None).
    """
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[job["uid"]] * 3)
        os.setresuid(*[job["uid"]] * 3)
    prctl(PR_SET_PDEATHSIG, SIGKILL)  # after the change of user, which clears it
    os.environ.clear()
    for name in job["preload"]:  # once here instead of once in each test's process
        __import__(name)
    compile("", "nothing", "exec")  # likewise: the first one builds the classes of the syntax tree
    gc.freeze()
    try:
        plain.write_all(1, plain.words(1))
        while True:
            seconds, length = plain.read_word(0) / 1_000, plain.read_word(0)
            how, value, reply, tail = run_test(job, seconds, length)
            plain.write_all(1, plain.words(how, value, len(reply), len(tail)) + reply + tail)
    except (EOFError, BrokenPipeError):
        os._exit(0)
