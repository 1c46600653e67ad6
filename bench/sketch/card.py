"""Writes the measured part of the model card of `flux/sketch`, for `python -m bench.sketch.evaluate --card`."""

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
SHARES = ("right", "thing", "ground", "floor")
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def format_share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def format_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a kind of prompt, a column a share."""
    lines = [f"### {title}", "", f"| | pictures | {' | '.join(SHARES)} |", "|---" * (len(SHARES) + 2) + "|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['pictures']} | {' | '.join(format_share(row.get(column)) for column in SHARES)} |"
        )
    return "\n".join(lines)


def format_sentences(results: Results) -> list[str]:
    """The figures outside the tables: drift, the reader's ceiling, the autoencoder, the distance between seeds."""
    lines = []
    if "drift" in results:
        rows = (f"`{name}` {row['psnr']:.1f} dB PSNR, SSIM {row['ssim']:.2f}" for name, row in results["drift"].items())
        lines.append(f"Against `none`, the same seeds: {'; '.join(rows)}.")
    if "ceiling" in results:
        held, near = results["ceiling"].values()
        lines += [
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
        lines.append(
            f"{prompt.capitalize()}: {row['same_thing']:.0%} show one, on {row['backgrounds']} backgrounds, "
            f"{row['psnr_between_seeds']:.1f} dB from each other."
        )
    return lines


def write(results: Results, file: Path = CARD) -> None:
    """Replace the text between the card's marks."""
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [format_table(title, results[name]) for name, title in TITLES.items() if name in results]
    parts.append("\n".join(f"- {sentence}" for sentence in format_sentences(results)))
    file.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END + after)
