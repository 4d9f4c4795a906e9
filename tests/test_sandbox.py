"""Hostile programs, each contained, with the next sample still scored; and what confines them."""

import contextlib
import errno
import itertools
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.verifiers import Outcome, code, harness, plain, sandbox, seccomp

ADD = [{"input": "1 2\n", "output": "3\n"}]
GOOD = "print(sum(map(int, input().split())))"


def working():
    """Every way of confining that works here; for root, with and without a user namespace."""
    found = []
    for name in (sandbox.BUBBLEWRAP, sandbox.NAMESPACES):
        try:
            way = sandbox.find_backend(name)
        except sandbox.SandboxUnavailableError:
            continue
        found += [way] if way.user_namespace else [way, way._replace(user_namespace=True)]
    return found or [sandbox.Backend("auto", True)]  # then the tests below fail with the reason


@pytest.fixture(params=working(), ids=lambda way: f"{way.name}-{way.user_namespace}")
def way(request):
    return request.param


@pytest.fixture(params=sorted({way.name for way in working()}))
def backend(request):
    return request.param


def verify(source, tests=ADD, **settings):
    tests = {"type": "stdin", "cases": tests} if isinstance(tests, list) else tests
    return code.verify({"tests": tests}, f"```python\n{source}\n```", **settings)


def run(source, way):
    """Runs a program on its own and returns how it ended."""
    if way.name == "auto":
        way = sandbox.find_backend()
    with sandbox.problem(way, program(textwrap.dedent(source))) as box:
        return box.run(b"", 20.0)


def program(source):
    job = {"kind": "program", "source": source, "setup": "", "preload": []}
    return job | {"memory_bytes": 2**29, "output_bytes": 2**20, "total_seconds": 30.0}


def printed(source, way):
    ended = run(source, way)
    assert ended.how == harness.EXITED, ended
    return (ended.reply or ended.errors).decode().strip()


HOSTILE = {
    "infinite loop": "while True: pass",
    "sleeping past the clock": "import time\ntime.sleep(1000)",
    "fork bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
    "thread bomb": """
        import threading, time
        threading.stack_size(65536)
        while True:
            threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
        """,
    "10 GB": "x = bytearray(10 * 10**9)\nprint(3)",
    "10 GB of small objects": "x = [0]\nwhile True: x += x",
    "file descriptors": """
        import os
        while True:
            os.open("/dev/null", os.O_RDONLY)
        """,
    "huge output": "while True: print('3' * 10**6)",
    "a full disk": """
        import itertools
        for i in itertools.count():
            open(f"/tmp/{i}", "w").write("x" * 10**6)
        """,
    "leaving before the tests": "import os\nos._exit(0)",
    "leaving by exception": "raise SystemExit(0)",
    "killing the parent": """
        import os
        for pid in (os.getppid(), 1, 0, -1, os.getpid() - 1):
            try:
                os.kill(pid, 9)
            except OSError:
                pass
        """,
    "daemonising": """
        import os
        if os.fork():
            os._exit(0)
        os.setsid()
        while True: pass
        """,
    "running a program": "import os\nos.execv('/usr/bin/env', ['env', 'echo', '3'])",
    "ending the interpreter at exit": "import atexit, os\natexit.register(os._exit, 0)",
    "stack overflow": """
        import functools, sys
        sys.setrecursionlimit(10**9)
        @functools.cache
        def f(n):
            return f(n + 1)
        f(0)
        """,
    "compiler": "x = " + "(" * 5000 + ")" * 5000,
    "an endless thread": """
        import threading
        threading.Thread(target=lambda: all(x == 0 for x in iter(int, 1))).start()
        """,
}


WHY = {
    "infinite loop": "time limit",
    "sleeping past the clock": "time limit",
    "fork bomb": "time limit",
    "thread bomb": "can't start new thread",
    "10 GB": "MemoryError",
    "10 GB of small objects": "MemoryError",
    "file descriptors": "Too many open files",
    "huge output": "File too large",
    "a full disk": "No space left on device",
    "compiler": "too many nested parentheses",
    "daemonising": "Operation not permitted",
    "running a program": "Operation not permitted",
    "stack overflow": "killed by signal 11",
    "an endless thread": "time limit",
}
"""What ends them, where it is a limit; the others end by themselves."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_is_wrong_and_the_next_sample_is_scored(name, backend):
    why = WHY.get(name, "printed")
    limits = {"memory_bytes": 2**28, "output_bytes": 2**22, "backend": backend}
    limits["seconds"] = 1.0 if why == "time limit" else 30.0  # the other limits must come first
    verdict = verify(textwrap.dedent(HOSTILE[name]), **limits)
    assert verdict.outcome is Outcome.WRONG and why in verdict.detail, verdict
    assert verify(GOOD, backend=backend).outcome is Outcome.CORRECT


ATTEMPTS = """
open('/etc/passwd')
open('/etc/hostname')
os.listdir('/proc')
os.listdir('/home')
open('/dev/tty')
open('/usr/lib/file', 'w')
open('/file', 'w')
open('/dev/file', 'w')
open(os.path.dirname(os.__file__) + '/file', 'w')
os.chmod(os.path.dirname(os.__file__) + '/site-packages', 0o777)
os.rmdir('/tmp')
os.chmod('/', 0o777)
os.mkfifo('/pipe')
os.fork()
os.forkpty()
os.posix_spawn('/usr/bin/env', ['env'], {})
os.setuid(0)
os.kill(os.getpid(), 0)
os.pidfd_open(1)
os.memfd_create('x')
os.sched_setaffinity(0, {0})
os.setpriority(os.PRIO_PROCESS, 0, 19)
resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
socket.socket()
socket.socket(socket.AF_UNIX)
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.create_connection(('127.0.0.1', 22), 1)
os.fstat(3)
""".strip().split("\n")


def test_attempts_are_refused(way):
    source = f"""
        import os, resource, socket
        for attempt in {ATTEMPTS!r}:
            try:
                eval(attempt)
            except (OSError, ValueError):
                continue
            print(attempt)
        """
    assert printed(source, way) == ""


def test_no_environment_and_no_descriptors(way, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    with open("/etc/passwd") as leaked:
        os.set_inheritable(leaked.fileno(), True)
        source = """
            import ctypes, os
            environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
            found = []
            for fd in range(200):
                try:
                    os.fstat(fd)
                    found.append(fd)
                except OSError:
                    pass
            print(dict(os.environ), bool(environ) and environ[0], found)
            """
        assert printed(source, way) == "{} None [0, 1, 2]"


def test_files_outside_are_neither_seen_nor_touched(way, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("content")
    source = f"""
        import os, shutil
        print(os.path.exists({str(kept)!r}))
        for path in ("/dev", "/etc", os.path.dirname(os.__file__) + "/json"):
            shutil.rmtree(path, ignore_errors=True)
        for path in ({str(tmp_path / "new")!r}, "/usr/lib/new"):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                open(path, "w").write("x")
            except OSError:
                pass
        """
    assert printed(source, way) == "False"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "content"
    assert not Path("/usr/lib/new").exists() and Path(json.__file__).exists()


def test_installed_packages_are_not_visible(way):
    source = """
        import glob, sys
        print([x for path in sys.path for x in glob.glob(path + "/*-packages/*")])
        """
    assert printed(source, way) == "[]"


def test_network_of_the_host_is_out_of_reach(way):
    """Even where the filter were to let sockets pass: there is no route to a listening server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        source = f"""
            import socket
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)
            except OSError:
                print("refused")
            """
        assert printed(source, way) == "refused"
        with pytest.raises(TimeoutError):
            server.accept()


def test_each_sandbox_has_its_own_empty_tmp(way):
    source = "import os\nprint(os.listdir('/tmp'), os.getcwd())\nopen('file', 'w').write('x')"
    assert printed(source, way) == "[] /tmp"
    assert printed(source, way) == "[] /tmp"


def test_every_refused_system_call_fails_with_eperm(way):
    """The numbers are right on this machine: each call is made, with harmless arguments."""
    column = seccomp.MACHINES.index(platform.machine())
    numbers = {k: v[column] for k, v in seccomp.REFUSED.items() if v[column] is not None}
    source = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for name, number in {numbers!r}.items():
            if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != {errno.EPERM}:
                print(name, ctypes.get_errno())
        """
    assert printed(source, way) == ""


def test_ptrace_and_reading_another_process_are_refused(way):
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(64)
        class Vector(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
        here = Vector(ctypes.addressof(buffer), 64)
        there = Vector(id(os), 64)
        for pid in (1, os.getppid(), os.getpid()):
            print(libc.ptrace(16, pid, None, None), end=" ")
            print(libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
        """
    assert set(printed(source, way).split()) == {"-1"}


def test_foreign_system_calls_kill(way):
    """Machine code that enters the kernel by another ABI's door does not get in."""
    if platform.machine() == "x86_64":
        text = bytes.fromhex("b814000000cd80c3")  # mov eax, 20 (getpid of i386); int 0x80; ret
    else:
        text = bytes.fromhex("000020d4")  # brk: aarch64 processes cannot enter the 32-bit ABI
    source = f"""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write({text!r})
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        print("alive")
        """
    ended = run(source, way)
    assert ended.how == harness.SIGNALLED and not ended.reply


def test_namespaces_are_new_and_die_with_the_worker(way):
    source = f"""
        from vibejax.verifiers import sandbox
        box = sandbox.Sandbox(sandbox.Backend{tuple(way)!r})
        print(box.pid, flush=True)
        box.begin({program("import time; time.sleep(600)")!r})
        box.run(b"", 600.0)
        """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as worker:
        try:
            pid = int(worker.stdout.readline())
            deadline = time.monotonic() + 30
            while len(family := descendants(pid)) < 4 and time.monotonic() < deadline:
                time.sleep(0.02)
            shared = [x for x in SEPARATE if namespace(family[-1], x) == namespace("self", x)]
        finally:
            worker.kill()
    assert len(family) >= 4  # bubblewrap or launcher, harness, supervisor, program
    assert not shared
    deadline = time.monotonic() + 30
    while (left := [pid for pid in family if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


SEPARATE = ("net", "pid", "mnt", "ipc", "uts")


def namespace(pid, kind):
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *itertools.chain.from_iterable(descendants(int(child)) for child in children)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_refuses_where_nothing_confines():
    """In a process that may start no other, as some containers are, the reason is said."""
    source = """
        import ctypes, platform
        from vibejax.verifiers import code, harness, sandbox, seccomp
        program = seccomp.build(platform.machine())
        harness.prctl(harness.PR_SET_NO_NEW_PRIVS, 1)
        harness.prctl(harness.PR_SET_SECCOMP, harness.SECCOMP_MODE_FILTER,
                      ctypes.byref(harness.SockFprog(len(program) // 8, program)))
        print(sandbox.find_backend(allow_unsandboxed=True).name)
        code.load()
        code.verify({"tests": {"type": "stdin", "cases": [{"input": "", "output": ""}]}}, "x")
        """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "none\n", done.stderr
    last = done.stderr.strip().split("\n")[-1]
    assert "SandboxUnavailableError: no sandbox for model-written code (bubblewrap: " in last
    assert "allow_unsandboxed = true" in last


def test_unsandboxed_still_has_limits_and_filter():
    job = program("import os\nprint(1)\nos.fork()")
    with sandbox.problem(sandbox.Backend(sandbox.NOTHING, False), job) as box:
        ended = box.run(b"", 20.0)
    assert ended.reply == b"1\n" and b"PermissionError" in ended.errors


def pid_of(way, source):
    """Runs a program and returns which sandbox it ran in."""
    with sandbox.problem(way, program(source)) as box:
        box.run(b"", 20.0)
        return box.pid


@pytest.mark.parametrize(
    "trace",
    [
        "open('/tmp/file', 'w')",
        "import os\nopen('/tmp/file', 'w')\nos.remove('/tmp/file')",
        "import os\nos.makedirs('/tmp/' + '/'.join(['deep'] * 500))",
    ],
)
def test_a_sandbox_serves_again_only_if_a_solution_left_no_trace(way, trace):
    sandbox.close_idle()
    first = pid_of(way, "print(1)")
    assert pid_of(way, "while True: print('x' * 10**6)") == first
    assert pid_of(way, trace) == first
    second = pid_of(way, "print(1)")
    assert second != first and not alive(first)
    assert pid_of(way, "print(1)") == second


def test_an_idle_sandbox_that_died_is_replaced(way):
    sandbox.close_idle()
    first = pid_of(way, "print(1)")
    for pid in descendants(first):
        with contextlib.suppress(ProcessLookupError):  # it died with the one before it
            os.kill(pid, signal.SIGKILL)
    assert pid_of(way, "print(1)") != first


def test_signals_by_file_are_refused(way):
    """Input on a descriptor could send any signal to its owner; the supervisor is no process 1."""
    source = """
        import fcntl, os, struct
        out, into = os.pipe()
        for pid in [os.getppid(), *range(1, 20)]:
            owner = struct.pack("ii", 1, pid)
            for command, value in ((fcntl.F_SETOWN, pid), (10, 9), (15, owner), (4, 0o20000)):
                try:
                    fcntl.fcntl(out, command, value)
                except OSError:
                    pass
            os.write(into, b"x")
        print(fcntl.fcntl(out, fcntl.F_GETOWN))
        """
    assert printed(source, way) == "0"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend = 'docker': must be auto, bubblewrap or namesp"):
        sandbox.find_backend("docker")


def filter_result(program, machine_arch, number, first=0, second=0):
    """Interprets a classic BPF program on one system call."""
    data = struct.pack("<iIQ6Q", number, machine_arch, 0, first, second, 0, 0, 0, 0)
    instructions = [struct.unpack_from("<HBBI", program, i) for i in range(0, len(program), 8)]
    at, word = 0, 0
    while True:
        kind, if_true, if_false, value = instructions[at]
        at += 1
        if kind == seccomp.LOAD:
            (word,) = struct.unpack_from("<I", data, value)
        elif kind == seccomp.RETURN:
            return value
        else:
            tests = {
                seccomp.JUMP_EQUAL: word == value,
                seccomp.JUMP_AT_LEAST: word >= value,
                seccomp.JUMP_ANY_BIT: bool(word & value),
            }
            at += if_true if tests[kind] else if_false


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_filter_refuses_what_it_lists_and_nothing_else(machine):
    program, arch = seccomp.build(machine), seccomp.AUDIT_ARCH[machine]
    column = seccomp.MACHINES.index(machine)
    refused = {x[column] for x in seccomp.REFUSED.values() if x[column] is not None}
    eperm = 0x50000 | errno.EPERM
    special = seccomp.CLONE, seccomp.CLONE3, seccomp.PRLIMIT64, seccomp.FCNTL, seccomp.IOCTL
    for number in set(range(600)) - {numbers[column] for numbers in special}:
        want = eperm if number in refused else seccomp.ALLOW
        assert filter_result(program, arch, number) == want
    thread = seccomp.CLONE_THREAD | 0x100
    assert filter_result(program, arch, seccomp.CLONE[column], thread) == seccomp.ALLOW
    assert filter_result(program, arch, seccomp.CLONE[column], 17) == eperm
    assert filter_result(program, arch, seccomp.CLONE3[column]) == 0x50000 | errno.ENOSYS
    assert filter_result(program, arch, seccomp.PRLIMIT64[column], 0) == seccomp.ALLOW
    assert filter_result(program, arch, seccomp.PRLIMIT64[column], 1) == eperm
    for numbers, commands in seccomp.SIGNAL_BY_FILE.items():
        for command in range(20):
            want = eperm if command in commands else seccomp.ALLOW
            assert filter_result(program, arch, numbers[column], 5, command) == want
    assert filter_result(program, arch, seccomp.IOCTL[column], 5, 0x8901) == eperm
    assert filter_result(program, 0x40000003, 20) == seccomp.KILL
    if machine == "x86_64":
        assert filter_result(program, arch, seccomp.X32_BIT | 1) == seccomp.KILL


def test_filter_of_an_unknown_machine_is_an_error():
    with pytest.raises(ValueError, match="no system-call filter for machine 'riscv64'"):
        seccomp.build("riscv64")


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ATOMS |= st.binary() | st.complex_numbers(allow_nan=False)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(ATOMS, inner)
        | st.sets(ATOMS)
        | st.frozensets(ATOMS)
    ),
    max_leaves=12,
)


def typed(value):
    """A text that shows value and type at every level; sets and dicts have no order."""
    if isinstance(value, dict):
        parts = sorted(f"{typed(k)}: {typed(v)}" for k, v in value.items())
    elif isinstance(value, list | tuple):
        parts = [typed(item) for item in value]
    elif isinstance(value, set | frozenset):
        parts = sorted(map(typed, value))
    else:
        parts = [repr(value)]
    return f"{type(value).__name__}({', '.join(parts)})"


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_plain_data_keeps_value_and_type(value):
    tree = plain.loads(plain.dumps(plain.encode(value, pytest.fail)))
    assert typed(plain.decode(tree, pytest.fail)) == typed(value)


def test_plain_data_of_a_subclass_is_plain():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    copy = plain.decode(plain.loads(plain.dumps(plain.encode([Liar(3)], pytest.fail))), pytest.fail)
    assert type(copy[0]) is int and copy != [4]
