"""A seccomp filter for every tier: system calls that no honest program makes are refused.

It takes most of the kernel's less travelled code out of reach of whoever looks for a hole in it:
new namespaces, mounts, tracing, BPF, io_uring, keys. And it holds what Landlock lets pass: modes,
owners, times and attributes of files, limits and priorities of processes of the same user.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Mapping

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_FAMILIES = (1, 2, 10)
"""Unix, IPv4 and IPv6, which a network namespace holds; it does not hold vsock, and others are
rarely travelled."""
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWUSER, PID, NET, IPC, UTS, CGROUP, NS and TIME among the flags of clone."""
_CLONE3 = 435
_COMMON = (425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 442, 452)
"""io_uring, the new mount calls, pidfds and fchmodat2 have one number everywhere."""
_REFUSED: Mapping[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        56,
        41,
        302,
        (
            90, 91, 92, 93, 94, 132, 141, 142, 144, 188, 189, 190, 197, 198, 199, 203, 235, 251,
            256, 260, 261, 268, 279, 280, 314,
            101, 103, 135, 154, 155, 161, 163, 165, 166, 167, 168, 169, 172, 173, 175, 176, 179,
            246, 248, 249, 250, 272, 298, 303, 304, 308, 310, 311, 312, 313, 320, 321, 323,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        198,
        261,
        (
            5, 6, 7, 14, 15, 16, 30, 52, 53, 54, 55, 88, 118, 119, 122, 140, 238, 239, 274,
            39, 40, 41, 51, 60, 89, 92, 97, 104, 105, 106, 116, 117, 142, 217, 218, 219, 224, 225,
            241, 264, 265, 268, 270, 271, 272, 273, 280, 282, 294,
        ),
    ),
}  # fmt: skip
"""Machine → its audit number, clone, socket, prlimit64, and: *chmod*, *chown*, *utime*, *xattr,
setpriority, sched_set*, ioprio_set, migrate_pages, move_pages; ptrace, process_vm_*, kcmp, unshare,
setns, mount, umount2, pivot_root, chroot, acct, swapon, swapoff, reboot, quotactl, *_module,
kexec_*, syslog, personality, bpf, perf_event_open, userfaultfd, keyctl and its kin, *_handle_at,
I/O ports."""


def system_call_filter(machine: str | None = None) -> bytes | None:
    """The filter as a BPF program; None for machines whose numbers we do not know."""
    known = _REFUSED.get(machine or platform.machine())
    if known is None:
        return None
    architecture, clone, socket, prlimit, refused = known
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE | _ENOSYS),
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _REFUSE | _ENOSYS),  # its flags lie in memory; libc falls back on clone
    ]
    for number in (*refused, *_COMMON):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    program += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _REFUSE | _EPERM),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 4, prlimit),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, 0),  # its own limits, which it can only lower
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE | _EPERM),
        (_EQUAL, 0, len(_FAMILIES) + 2, socket),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        *((_EQUAL, len(_FAMILIES) - place, 0, family) for place, family in enumerate(_FAMILIES)),
        (_RETURN, 0, 0, _REFUSE | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in program)
