"""The measured part of the model card of `flux/sketch`, as `python -m bench.sketch.evaluate --card` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = Path(__file__).parents[2] / "weights" / "sketch" / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->"
TITLES = {
    "things": "Every thing it knows, on white",
    "kinds": "Kinds of prompts (512x512, 28 steps, guidance 4.5, `none`)",
    "free": "Prompts as people write them",
    "sizes": "Sizes (one thing)",
    "steps": "Steps (one thing)",
    "guidance": "Guidance (one thing)",
    "presets": "Acceleration (one thing, 28 steps)",
}
COLUMNS = ("right", "thing", "ground", "floor")
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a kind of prompt, a column a share."""
    lines = [f"### {title}", "", f"| | pictures | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['pictures']} | {' | '.join(share(row.get(column)) for column in COLUMNS)} |")
    return "\n".join(lines)


def sentences(results: Results) -> list[str]:
    """What is not a table: drift, the reader's ceiling, the autoencoder, and two seeds' distance."""
    said = []
    if "drift" in results:
        rows = (f"`{name}` {row['psnr']:.1f} dB PSNR, SSIM {row['ssim']:.2f}" for name, row in results["drift"].items())
        said.append(f"Against `none`, the same seeds: {'; '.join(rows)}.")
    if "ceiling" in results:
        held, near = results["ceiling"].values()
        said += [
            (
                f"The reader's ceiling, on the generator's own held-out scenes through the autoencoder: "
                f"{held['reader_right']:.0%}."
            ),
            f"The autoencoder on them: {held['vae_psnr']:.1f} dB PSNR, {held['vae_psnr_worst']:.1f} at worst.",
            (
                f"Against the nearest training picture (the same thing, the same background): {near['psnr']:.1f} dB, "
                f"from {near['psnr_farthest']:.1f} to {near['psnr_nearest']:.1f}."
            ),
        ]
    for prompt, row in results.get("seeds", {}).items():
        said.append(
            f"{prompt.capitalize()}: {row['same_thing']:.0%} show one, on {row['backgrounds']} backgrounds, "
            f"{row['psnr_between_seeds']:.1f} dB from each other."
        )
    return said


def write(results: Results, file: Path = CARD) -> None:
    """Put the tables between the card's marks."""
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [table(title, results[name]) for name, title in TITLES.items() if name in results]
    parts.append("\n".join(f"- {sentence}" for sentence in sentences(results)))
    file.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after)
