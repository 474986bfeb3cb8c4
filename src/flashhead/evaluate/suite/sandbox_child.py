"""Runs one program that a model wrote; a process of its own, started by `sandbox.py`.

What it may do is a list of system calls (`syscalls.py`): it computes, reads files, and nothing
else. It cannot start processes or threads, open a file for writing, remove or rename one, open a
socket, signal a process, or call ioctl. Everything else fails with EPERM. Limits of time, memory
and files come on top, and root becomes nobody first where it can.

Only the standard library, and nothing of flashhead: the interpreter is started with -I -S.
"""

import contextlib
import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any

NOBODY = 65534
PRELOADED = (
    *("array", "ast", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses"),
    *("datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq"),
    *(
        "itertools",
        "json",
        "math",
        "numbers",
        "operator",
        "random",
        "re",
        "signal",
        "socket",
        "statistics",
    ),
    *("string", "struct", "textwrap", "time", "typing", "unicodedata"),
)
"""Imported before root becomes nobody, who may not be able to read root's interpreter."""
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Classic BPF: load a word, jump if equal, jump if at least, jump if a bit is set, return."""
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_KILL_PROCESS."""
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
"""Offsets in struct seccomp_data."""
X32 = 0x40000000
"""System calls of the x32 ABI begin here: none is allowed."""


def filter_program(table: dict[str, Any]) -> list[bytes]:
    """Instructions of the filter, `struct sock_filter` each.

    Args:
        table: `arch` (AUDIT_ARCH_...), `allowed` numbers, `open_calls`: pairs of number and place
            of the flags, `write_flags`, `fcntl`: its number, `fcntl_commands`.
    """
    code = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQUAL, 1, 0, table["arch"]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, DENY),
    ]
    for number in table["allowed"]:
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for number, place in table["open_calls"]:
        code += [
            (JUMP_EQUAL, 0, 4, number),
            (LOAD, 0, 0, ARGUMENTS_AT + 8 * place),
            (JUMP_ANY_BIT, 0, 1, table["write_flags"]),
            (RETURN, 0, 0, DENY),
            (RETURN, 0, 0, ALLOW),
        ]
    commands = table["fcntl_commands"]
    code += [(JUMP_EQUAL, 0, 1 + 2 * len(commands), table["fcntl"])]
    code += [(LOAD, 0, 0, ARGUMENTS_AT + 8)]
    for command in commands:
        code += [(JUMP_EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
    code += [(RETURN, 0, 0, DENY)]
    return [struct.pack("=HBBI", *instruction) for instruction in code]


def forbid(table: dict[str, Any]) -> None:
    """Install the filter for the rest of this process's life."""
    code = filter_program(table)
    array = ctypes.create_string_buffer(b"".join(code), 8 * len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(array)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "a seccomp filter was refused")


def limit(limits: dict[str, int]) -> None:
    """Limits that the program cannot raise."""
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "CORE"):
        value = limits[name]
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def become_nobody() -> None:
    """Give up root, and with it every privilege; on top of the filter, which holds for root too.

    Where there is no other user to become (a user namespace of one, a container without the
    capability) root is no real root, and stays.
    """
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main() -> None:
    """Read the job, shut the doors, run the program, say that it ended well."""
    job = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.closerange(max(answer, null) + 1, 256)
    for name in PRELOADED:
        __import__(name)
    try:
        code = compile(job["program"], "<completion>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        os.write(answer, b"ready\n")
        os._exit(1)
    try:
        limit(job["limits"])
        if job["filter"] is not None:
            become_nobody()
            forbid(job["filter"])
    except Exception as error:  # noqa: BLE001 - whatever it is, the program must not run
        os.write(answer, f"refused {error}\n".encode())
        os._exit(1)
    os.write(answer, b"ready\n")
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:  # noqa: BLE001 - whatever it raises, it has failed
        os._exit(1)
    os.write(answer, job["secret"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
