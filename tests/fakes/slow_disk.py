"""A file system on which opening a checkpoint takes long, for one program alone.

`unshare --mount python slow_disk.py FOLDER SECONDS COMMAND...` runs the command with FOLDER as a mount of its own, on
which the kernel lets whoever opens a file below `artifacts/` wait for so long (fanotify's permission events). Needs
root. The mount goes with the command.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading

FAN_CLOEXEC, FAN_CLASS_CONTENT, FAN_MARK_ADD, FAN_MARK_MOUNT = 0x1, 0x4, 0x1, 0x10
FAN_OPEN_PERM, FAN_ALLOW, AT_FDCWD = 0x10000, 0x1, -100
"""Source: linux/fanotify.h."""
EVENT = struct.Struct("=IBBHQii")
"""Length, version, reserved, length of this header, mask, descriptor of the file, pid."""


def watch(folder: str) -> int:
    """A descriptor of which each opening of a file on the mount at `folder` is read, to be allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    listener = int(libc.fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC))
    marked = listener < 0 or libc.fanotify_mark(
        listener, FAN_MARK_ADD | FAN_MARK_MOUNT, ctypes.c_uint64(FAN_OPEN_PERM), AT_FDCWD, folder.encode()
    )
    if marked:
        raise OSError(ctypes.get_errno(), "fanotify: " + os.strerror(ctypes.get_errno()))
    return listener


def answer(listener: int, seconds: float) -> None:
    """Allow everything: what lies below `artifacts/` late, all else at once."""
    while True:
        data = os.read(listener, 4096)
        for offset in range(0, len(data), EVENT.size):
            file = EVENT.unpack_from(data, offset)[5]
            wait = seconds if "/artifacts/" in os.readlink(f"/proc/self/fd/{file}") else 0.0
            timer = threading.Timer(wait, allow, (listener, file))
            timer.daemon = True
            timer.start() if wait else allow(listener, file)


def allow(listener: int, file: int) -> None:
    os.write(listener, struct.pack("=iI", file, FAN_ALLOW))
    os.close(file)


def main() -> int:
    folder, seconds, *command = sys.argv[1:]
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    listener = watch(folder)
    threading.Thread(target=answer, args=(listener, float(seconds)), daemon=True).start()
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
