"""Run a command where no network is but loopback: `unshare -rn python tests/support/loopback_only.py COMMAND ...`.

An empty network namespace has its loopback switched off; this switches it on, checks that nothing else is there, and
becomes the command.
"""

import fcntl
import os
import socket
import struct
import sys

SIOCSIFFLAGS, IFF_UP = 0x8914, 1

if __name__ == "__main__":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        sys.exit(f"this is not an empty network namespace: it has {', '.join(names)}")
    os.execvp(sys.argv[1], sys.argv[1:])
