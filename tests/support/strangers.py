"""Strangers that are slow on purpose: services that drip their answers."""

import socket
import threading
from contextlib import closing

PACE = 0.02  # seconds between two bytes


class DrippingService:
    """An HTTP service on loopback that answers with `start`, and then a byte at a time for ever."""

    def __init__(self, start: bytes) -> None:
        self.connections = 0
        self._start = start
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        pause = threading.Event()
        with closing(connection):
            try:
                connection.recv(2**16)
                connection.sendall(self._start)
                while not pause.wait(PACE):
                    connection.sendall(b"x")
            except OSError:
                pass  # the other side has given up
