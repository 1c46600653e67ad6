"""The embedded model `flux/sketch`. `model` holds its files, README.md is its card; `bench.sketch.recipe` trains it."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "model"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
