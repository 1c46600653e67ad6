"""Looks at /health, one after the other, until it is told to end. Then it prints the seconds of each.

It is a process of its own, so that its times hold nothing of what the attackers do. Usage: python pings.py PORT
"""

import http.client
import json
import signal
import sys
import time

PAUSE = 0.02  # seconds between two looks
LIMIT = 300.0  # seconds for a look

seconds: list[float] = []
going = True


def end(*_: object) -> None:
    global going
    going = False


def main(port: int) -> None:
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    while going:
        began = time.monotonic()
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
            seconds.append(time.monotonic() - began)
        except (OSError, http.client.HTTPException):
            connection.close()
        time.sleep(PAUSE)
    connection.close()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(int(sys.argv[1]))
