"""`srpo keys`: makes an API key, and the line of the key file that admits it."""

from server.cli.parsing import Arguments, parse
from server.security.keys import new_key


class KeysSettings(Arguments):
    """Make an API key. The key is shown once; keep the hash line in the key file."""


def main(arguments: list[str]) -> int:
    parse(KeysSettings, "keys", arguments)
    key, line = new_key()
    print(f"key (give it to the client):           {key}")
    print(f"line (append it to SRPO_API_KEYS_FILE): {line}")
    return 0
