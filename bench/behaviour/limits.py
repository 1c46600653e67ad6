"""Small limits and checks that refuse: the errors that a server with defaults does not show."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
from typing import Any

from bench.behaviour import requests as table
from bench.behaviour.scenarios import draw
from bench.behaviour.server import EDITS, GENERATIONS, Live, Recording, wait_until


@contextmanager
def moderation() -> Iterator[tuple[str, dict[str, Any]]]:
    """A moderation service: its address, and its answer (status and verdict), which may be changed."""
    answer: dict[str, Any] = {"status": 200, "flagged": False}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(json.dumps({"flagged": answer["flagged"]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}/", answer
        service.shutdown()


def serve_within_limits(recording: Recording) -> None:
    """Small limits and checks that refuse: the errors that a server with defaults does not show."""
    words = recording.folder / "words.txt"
    words.write_text("# refused\nforbidden\n/b[ae]d apples?/\n")
    with moderation() as (address, answer):
        settings = {
            "queue_size": "0", "max_running": "1", "body_timeout": "1", "max_body": "4096", "max_upload": "1024",
            "prompt_list": str(words), "safety_checker": f"hook:{address}", "safety_action": "error",
            "cors_origins": table.FOREIGN,
        }  # fmt: skip
        with recording.server("limits", settings) as live:
            live.ask("health", "GET", "/health")
            fill_disk(live)
            draw(live, "refused word", prompt="a ＦＯＲbidden apple")
            draw(live, "refused expression", prompt="bed apples")
            draw(live, "large body", prompt="a" * 3999, user="x" * 4096)
            live.ask("large picture", "POST", EDITS, data=table.EDIT, files={"image": ("a.png", b"x" * 2048)})
            head = (
                "POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{"
            )
            live.ask_raw("slow body", head.format(GENERATIONS).encode())
            draw(live, "post from an allowed page", {"origin": table.FOREIGN})
            answer["flagged"] = True
            draw(live, "withheld", num_images=2)
            draw(live, "flagged, unchecked", enable_safety_checker=False)
            draw(live, "withheld in a stream", stream=True, partial_images=1, num_inference_steps=4)
            answer |= {"flagged": False, "status": 500}
            draw(live, "checker fails", {"idempotency-key": "a"})
            answer["status"] = 200
            draw(live, "checker works again", {"idempotency-key": "a"})
            overload(live)
        for action in ("black", "blur"):
            with recording.server(
                action, {"safety_checker": f"embedded,hook:{address}", "safety_action": action}
            ) as live:
                answer["flagged"] = True
                draw(live, "withheld", output_format="png", num_images=2)
                draw(live, "withheld in a stream", stream=True, partial_images=1, num_inference_steps=4)
                answer["flagged"] = False


def fill_disk(live: Live) -> None:
    """Let the server write no more than the first bytes of a file, as on a full disk."""
    prlimit(live.process.pid, RLIMIT_FSIZE, (20_000, RLIM_INFINITY))
    draw(live, "full disk", output_format="png")
    draw(live, "full disk, no file needed", sync_mode=True)
    prlimit(live.process.pid, RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
    draw(live, "disk with room again", output_format="png")


def overload(live: Live) -> None:
    """A request too many, and a worker that dies twice at the same request."""
    crashing = live.ask_meanwhile("worker dies twice", "POST", GENERATIONS, json={**table.BASE, **table.LARGE})
    wait_until(lambda: live.health()["running"] == 1, "a running request")
    draw(live, "queue is full")
    for _ in range(2):
        [pid] = live.health()["worker_pids"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: crashing.done() or restarted(live, pid), "another worker")  # type: ignore[misc]
    crashing.result()
    live.wait_ready()
    draw(live, "after the restart")


def restarted(live: Live, pid: int) -> bool:
    health = live.health()
    return bool(health["running"]) and health["worker_pids"] not in ([], [pid])


def stop_early(recording: Recording) -> None:
    """Requests before the model is loaded, past their time, and at the server's end."""
    settings = {"request_timeout": "5", "shutdown_grace": "0"}
    with recording.server("early", settings, wait=False) as live:
        live.wait_answering()
        draw(live, "not ready")
        live.ask("ready, not yet", "GET", "/ready")
        live.wait_ready()
        draw(live, "past its time", **table.LARGE)
        draw(live, "past its time, streamed", **table.LARGE, stream=True)
        draw(live, "past its time, as a job", {"idempotency-key": "b"}, **table.LARGE)
        draining = live.ask_meanwhile("draining", "POST", GENERATIONS, json={**table.BASE, **table.LARGE})
        wait_until(lambda: live.health()["running"] == 1, "a running request")
        live.process.terminate()
        draining.result()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["serve", "--model", "tiny", "--port", str(taken.getsockname()[1])]
        recording.command("command: serve: port in use", arguments)
