"""The system-call filter that model-written code runs under, as a classic BPF program.

Namespaces take away what a process can see; this takes away what it can do with what is left. A
process under the filter

- starts no process and runs no other program, only threads of its own. That ends fork bombs and
  daemons, and it makes the limits on memory and CPU time, which the kernel keeps for each process,
  limits of the whole solution;
- signals, traces, reads, pins or slows down no other process;
- opens no socket of any family (a network namespace leaves AF_VSOCK and AF_ALG reachable);
- makes no memory that `RLIMIT_AS` does not count (memfd, System V and POSIX shared memory);
- reaches none of the large kernel interfaces that a plain Python program never uses (namespaces,
  mounts, BPF, perf, io_uring, userfaultfd, keys, modules).

A refused call fails with EPERM, so that a program which asks politely gets a Python exception. The
filter lists what is refused and lets the rest pass: a list of what is allowed would turn honest
solutions wrong on the next release of libc. A call made through another ABI than the machine's own
kills the process.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; the numbers are those of
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

import errno
import functools
import struct

# name: (x86_64, aarch64); None where the architecture lacks the call.
REFUSED = {
    # other processes and programs
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    # the network, and memory that no limit counts
    "socket": (41, 198),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # namespaces, mounts, identity
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setgroups": (116, 159),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "capset": (126, 91),
    "personality": (135, 92),
    # large or administrative kernel interfaces
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "lookup_dcookie": (212, 18),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
}
MACHINES = ("x86_64", "aarch64")  # the columns above
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = (56, 220)
CLONE3 = (435, 435)
PRLIMIT64 = (302, 261)
FCNTL, IOCTL = (72, 25), (16, 29)
SIGNAL_BY_FILE = {FCNTL: (8, 10, 15), IOCTL: (0x8901, 0x8902)}
"""F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: input on a file sends any signal to any
process of the same user."""

CLONE_THREAD = 0x00010000
X32_BIT = 0x40000000  # x86_64 numbers above this are the x32 ABI

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]. Little-endian.
NUMBER, ARCH, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, ALLOW = 0x80000000, 0x7FFF0000


def _fail(code: int) -> int:
    return 0x00050000 | code


def _when(test: int, value: int, result: int) -> list[tuple[int, int, int, int]]:
    """Returns `result` from the filter if the loaded word passes the test."""
    return [(test, 0, 1, value), (RETURN, 0, 0, result)]


@functools.cache
def build(machine: str) -> bytes:
    """Assembles the filter for a machine.

    Args:
        machine: `platform.machine()` of the host.

    Returns:
        An array of `struct sock_filter`, 8 bytes each, for `prctl(PR_SET_SECCOMP)`.

    Raises:
        ValueError: there is no table of system calls for this machine.
    """
    if machine not in MACHINES:
        raise ValueError(
            f"no system-call filter for machine {machine!r}; there is one for {MACHINES}"
        )
    column = MACHINES.index(machine)
    program = [(LOAD, 0, 0, ARCH), (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine])]
    program += [(RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        program += _when(JUMP_AT_LEAST, X32_BIT, KILL)
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            program += _when(JUMP_EQUAL, numbers[column], _fail(errno.EPERM))
    # The flags of clone3 lie in memory, where no filter can look; without it, libc uses clone.
    program += _when(JUMP_EQUAL, CLONE3[column], _fail(errno.ENOSYS))
    program += [(JUMP_EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += [(JUMP_ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW)]
    program += [(RETURN, 0, 0, _fail(errno.EPERM))]
    for numbers, commands in SIGNAL_BY_FILE.items():
        tests = [x for value in commands for x in _when(JUMP_EQUAL, value, _fail(errno.EPERM))]
        body = [(LOAD, 0, 0, SECOND_ARGUMENT), *tests, (RETURN, 0, 0, ALLOW)]
        program += [(JUMP_EQUAL, 0, len(body), numbers[column]), *body]
    # A process may lower its own limits (pid 0), not another's.
    program += [(JUMP_EQUAL, 0, 3, PRLIMIT64[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += _when(JUMP_AT_LEAST, 1, _fail(errno.EPERM))
    program += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def number(name: str, machine: str) -> int:
    """Returns the number of a refused system call on a machine.

    Raises:
        ValueError: there is no table of system calls for this machine.
    """
    if machine not in MACHINES:
        raise ValueError(f"no system calls known of machine {machine!r}; known are {MACHINES}")
    return REFUSED[name][MACHINES.index(machine)]
