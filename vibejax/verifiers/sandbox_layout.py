"""What a sandbox sees of the file system, and the bubblewrap command that shows it no more.

The system's libraries, the interpreter and its standard library without installed packages, all
read-only; time zones; four harmless devices; an empty, small /tmp. No /etc/passwd, no /proc, no
/sys, nothing of anybody's home.
"""

import functools
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vibejax.verifiers import seccomp

TMP_BYTES = 64 * 2**20
NOBODY = 65_534


@functools.cache
def layout() -> dict[str, Any]:
    """Returns what a sandbox sees; see `namespaces.enter`."""
    python = os.path.realpath(sys.executable)
    system = [Path("/lib"), Path("/lib64"), Path("/usr/lib"), Path("/usr/lib64")]
    links = {str(path): os.readlink(path) for path in system if path.is_symlink()}
    folders = {path for path in system if path.is_dir() and not path.is_symlink()}
    for prefix in (sys.base_prefix, sys.base_exec_prefix):
        folders.add(Path(prefix).resolve() / "lib")
    zones = Path("/usr/share/zoneinfo")
    folders |= {zones.resolve()} if zones.is_dir() else set()
    masks = {mask for folder in folders for mask in folder.glob("python3*/*-packages")}
    cache = "/etc/ld.so.cache"
    return {
        "python": python,
        "folders": sorted(map(str, folders)),
        "files": [python, *([cache] if os.path.exists(cache) else [])],
        "links": links,
        "masks": sorted(str(mask) for mask in masks if not mask.is_symlink()),
        "devices": ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"],
        "tmp_bytes": TMP_BYTES,
        "pivot_root": seccomp.number("pivot_root", platform.machine()),
    }


def bubblewrap(shown: Mapping[str, Any], user_namespace: bool) -> list[str]:
    """Returns the bubblewrap command that runs what follows it in a layout.

    Args:
        shown: of `layout`.
        user_namespace: whether a user namespace is needed; without, whoever calls is root.
    """
    command = [str(shutil.which("bwrap")), "--die-with-parent", "--as-pid-1", "--new-session"]
    command += ["--chdir", "/tmp"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if user_namespace:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:  # what the harness needs to change its user; it loses both by that
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--perms", "1777", "--size", str(shown["tmp_bytes"]), "--tmpfs", "/tmp"]
    paths = (*shown["folders"], *shown["files"])
    # Made by bubblewrap itself, the parents of a path that only root may enter would be like it.
    every = (*paths, *shown["devices"])
    for parent in sorted({str(parent) for path in every for parent in Path(path).parents}):
        command += ["--perms", "0755", "--dir", parent]
    for path in paths:
        command += ["--ro-bind", path, path]
    for path in shown["masks"]:
        command += ["--perms", "0555", "--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for path in shown["devices"]:
        command += ["--dev-bind", path, path]
    for path, target in shown["links"].items():
        command += ["--symlink", target, path]
    return [*command, "--remount-ro", "/"]
