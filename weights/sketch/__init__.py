"""`flux/sketch`, the embedded model that draws: `model` holds its files, `recipe` made them, README.md is its card."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "model"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
