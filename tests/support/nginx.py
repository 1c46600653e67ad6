"""A real nginx on a loopback port, from Debian's package, with deploy/nginx/srpo.conf before some servers."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from support.server import free_port
from support.waiting import LIMIT, within

EXAMPLE = Path(__file__).parent.parent.parent / "deploy" / "nginx" / "srpo.conf"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
MAIN = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log warn;
events {{}}
http {{
    access_log off;
{temporary}
    include {folder}/srpo.conf;
}}
"""


def find_nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def fill_example(port: int, servers: Sequence[int]) -> str:
    """The example with these ports in the place of its addresses."""
    line = re.compile(r"^    server 10\.0\.0\.\d+:8000(.*)\n", re.MULTILINE)
    text = EXAMPLE.read_text()
    options = line.findall(text)[0]
    lines = "".join(f"    server 127.0.0.1:{server}{options}\n" for server in servers)
    text = line.sub("", text).replace("    least_conn;\n", f"    least_conn;\n{lines}")
    return text.replace("listen 80;", f"listen 127.0.0.1:{port};")


def write_configuration(folder: Path, port: int, servers: Sequence[int]) -> list[str]:
    """The command that runs nginx with it."""
    (folder / "srpo.conf").write_text(fill_example(port, servers))
    temporary = "\n".join(f"    {name}_temp_path {folder}/{name};" for name in TEMPORARY)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, temporary=temporary))
    return [
        find_nginx() or "nginx",
        "-p",
        str(folder),
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        str(folder / "error.log"),
    ]


@contextmanager
def running_nginx(servers: Sequence[int]) -> Iterator[str]:
    """Its URL."""
    folder, port = Path(tempfile.mkdtemp(prefix="srpo-nginx-")), free_port()
    command = write_configuration(folder, port, servers)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **user)
    url = f"http://127.0.0.1:{port}"
    try:
        assert within(LIMIT, lambda: answers(url)), (folder / "error.log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def answers(url: str) -> bool:
    try:
        return bool(httpx.get(url).status_code)
    except httpx.TransportError:
        return False
