"""Enters a sandbox of Linux namespaces without bubblewrap; runs inside the interpreter it confines.

Standard library only. The layout of what stays visible is that of `sandbox_layout.layout`, the
same as bubblewrap gets. Needs Linux 5.12 (mount_setattr) and the right to create the namespaces:
root with CAP_SYS_ADMIN, or unprivileged user namespaces.

Source: Linux man-pages, user_namespaces(7), pivot_root(2), mount_setattr(2).
"""

import ctypes
import os
import struct
from typing import Any

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET."""
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_SETATTR = 442  # the same number on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG, SIGKILL = 1, 9

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises OSError if a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Calls mount(2)."""
    arguments = [text.encode() for text in (source, target, kind)]
    check(libc.mount(*arguments, flags, options.encode()), f"mount {source} on {target}")


def read_only(target: str, *, recursive: bool, devices: bool) -> None:
    """Makes a mount, or a tree of mounts, read-only and free of setuid programs."""
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV)
    wanted = struct.pack("<4Q", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, wanted, len(wanted))
    check(result, f"mount_setattr {target}")


def enter(layout: dict[str, Any]) -> None:
    """Moves the process into fresh namespaces, as process 1, with nothing but the layout visible.

    Returns in the confined process only. The process that called stays outside, waits for it, and
    takes it along when it dies.

    Args:
        layout: `user` (whether a user namespace is needed), `folders` and `files` (shown
            read-only), `links` (path -> target), `masks` (folders shown empty), `devices`,
            `tmp_bytes`, and `pivot_root` (the number of that system call).

    Raises:
        OSError: the kernel or its configuration refuses.
    """
    uid, gid = os.getuid(), os.getgid()
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    user = CLONE_NEWUSER if layout["user"] else 0
    check(libc.unshare(NEW_NAMESPACES | user), "unshare")
    if layout["user"]:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"65534 {uid} 1"),
            ("gid_map", f"65534 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()  # a process enters a new process namespace only by birth
    if child:
        os.closerange(0, 2)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    check(libc.sethostname(b"sandbox", 7), "sethostname")
    _build_root(layout)
    if layout["user"]:  # else the harness needs them once more, to change its user
        header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)
        check(libc.capset(header, bytes(24)), "capset")


def _build_root(layout: dict[str, Any]) -> None:
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # A staging file system over /tmp, because sources below /tmp must stay reachable meanwhile.
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    check(libc.syscall(layout["pivot_root"], b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.makedirs("/new/tmp")
    limits = f"mode=1777,size={layout['tmp_bytes']},nr_inodes=4096"
    mount("tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV, limits)
    for path in layout["folders"]:
        os.makedirs("/new" + path, exist_ok=True)
        _show(path, devices=False)
    for path in (*layout["files"], *layout["devices"]):
        if not os.path.exists("/new" + path):
            os.makedirs(os.path.dirname("/new" + path), exist_ok=True)
            os.close(os.open("/new" + path, os.O_CREAT | os.O_WRONLY, 0o444))
            _show(path, devices=path in layout["devices"])
    for path in layout["masks"]:
        mount("tmpfs", "/new" + path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=555,size=4k")
        read_only("/new" + path, recursive=False, devices=False)
    for path, target in layout["links"].items():
        os.symlink(target, "/new" + path)
    read_only("/new", recursive=False, devices=False)
    os.chdir("/new")
    check(libc.syscall(layout["pivot_root"], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/tmp")


def _show(path: str, *, devices: bool) -> None:
    mount("/old" + path, "/new" + path, "", MS_BIND | MS_REC)
    read_only("/new" + path, recursive=True, devices=devices)
