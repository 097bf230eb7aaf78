"""Which network interfaces this process's TCP connections go over, as the kernel says. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915
"""Source: linux/sockios.h."""
ESTABLISHED = "01"
"""Source: linux/net/tcp_states.h."""


def used() -> list[str]:
    """Names of the interfaces whose addresses this process's established connections have at this end, sorted."""
    own = _own_sockets()
    local = {address for table in ("tcp", "tcp6") for address, inode in _connections(table) if inode in own}
    return sorted(name for name, addresses in by_interface().items() if addresses & local)


def by_interface() -> dict[str, set[str]]:
    """Addresses of each interface of this host, as /proc spells them."""
    found: dict[str, set[str]] = {}
    with contextlib.suppress(OSError):
        found = {name: _ipv4(name) for _, name in socket.if_nameindex()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            address, *_, name = line.split()
            found.setdefault(name, set()).add(_swapped(address.upper()))
    return found


def _ipv4(name: str) -> set[str]:
    """The interface's IPv4 address, plain and as an IPv6 socket shows it; nothing where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query, contextlib.suppress(OSError):
        answer = fcntl.ioctl(query.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        plain = answer[20:24][::-1].hex().upper()
        return {plain, f"0000000000000000FFFF0000{plain}"}
    return set()


def _swapped(address: str) -> str:
    """An IPv6 address in the order in which /proc/net/tcp6 shows it: each 32-bit word by its last byte first."""
    words = [address[index : index + 8] for index in range(0, 32, 8)]
    return "".join("".join(re.findall("..", word)[::-1]) for word in words)


def _connections(table: str) -> list[tuple[str, str]]:
    """Local address and inode of each established connection."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/self/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        fields = [line.split() for line in lines]
        return [(field[1].split(":")[0], field[9]) for field in fields if field[3] == ESTABLISHED]
    return []


def _own_sockets() -> set[str]:
    """Inodes of the sockets that this process holds."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}")):
                found.add(match[1])
    return found
