"""Imports without the garbage collector, which walks again and again over what they make, and finds nothing.

A server and its worker make a million objects before they serve; a fifth of their start went to the collector.
"""

import gc
import sys
from pkgutil import resolve_name
from typing import Any


def import_name(name: str) -> Any:
    """What `module:name` stands for. No later collection walks over what the module's first import has made, either."""
    if name.partition(":")[0] in sys.modules:
        return resolve_name(name)
    gc.disable()
    try:
        return resolve_name(name)
    finally:
        gc.freeze()
        gc.enable()
