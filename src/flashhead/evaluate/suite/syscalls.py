"""What a program that a model wrote may ask of Linux: numbers of system calls by processor.

An allow-list, so a call that is added to Linux later is forbidden. Left out on purpose: `clone` and
`fork` (no processes, no threads), `socket`, `execve`, `unlink`, `rename`, `mkdir`, `chmod`,
`kill`, `ioctl` (a terminal takes typed input from it), `prlimit64` (root's reaches other
processes), `io_uring_setup` (it opens files and sockets behind the filter), `openat2` and `clone3`
(their arguments lie in memory that a filter cannot read). `open` and `openat` pass without the
flags that write or create; `fcntl` passes with commands that neither own nor signal.
"""

import os
import platform
from typing import Any

_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
"""Name: number on x86_64, number on aarch64; None: that processor has no such call."""
_OPEN = ((2, 1), (257, 2)), ((56, 2),)
"""Calls that open a file, and which argument holds the flags, by processor."""
_FCNTL = (72, 25)
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC."""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: column of the tables, AUDIT_ARCH of the kernel."""


def filter_table() -> dict[str, Any] | None:
    """What `sandbox_child.filter_program` takes; None: no filter is known for this machine."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _ARCHITECTURES:
        return None
    column, arch = _ARCHITECTURES[machine]
    return {
        "arch": arch,
        "allowed": [
            numbers[column] for numbers in _NUMBERS.values() if numbers[column] is not None
        ],
        "open_calls": _OPEN[column],
        "write_flags": os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
        "fcntl": _FCNTL[column],
        "fcntl_commands": _FCNTL_COMMANDS,
    }
