"""Writes what `flux/sketch` knows, and how well it draws, into its card: `python -m bench.sketch.evaluate --card`."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = Path(__file__).parents[2] / "weights" / "sketch" / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->"
KNOWS_BEGIN, KNOWS_END = "<!-- knows -->\n", "<!-- known -->"
LINE = 120  # characters
TITLES = {
    "things": "Every thing it knows, on white",
    "kinds": "Kinds of prompts (512x512, `none`)",
    "free": "Prompts as people write them",
    "sizes": "Sizes (one thing, half of them on a scene)",
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
            f"{prompt.capitalize()}: {row['same_thing']:.0%} show one, "
            f"{row['psnr_between_seeds']:.1f} dB from each other."
        )
    return lines


def format_knowledge(knows: Mapping[str, Any]) -> str:
    """Markdown: the things, scenes, backgrounds and colours of the manifest."""
    things, colours = knows["things"], knows["colours"]
    paragraphs = (
        f"{len(things)} things: {', '.join(things)}.",
        f"Scenes: {', '.join(knows['scenes'])}.",
        f"Backgrounds: {', '.join(knows['backgrounds'])}. Where the prompt names none, the seed chooses a pale tint.",
        f"Colours: {', '.join(colours['are'])}, for {', '.join(colours['of'])}.",
    )
    return "\n\n".join(textwrap.fill(paragraph, LINE, break_on_hyphens=False) for paragraph in paragraphs)


def replace_between(text: str, begin: str, end: str, new: str) -> str:
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{new}\n\n{end}{rest.partition(end)[2]}"


def write(results: Results, knows: Mapping[str, Any], file: Path = CARD) -> None:
    """Replace the texts between the card's marks."""
    parts = [format_table(title, results[name]) for name, title in TITLES.items() if name in results]
    parts.append("\n".join(f"- {sentence}" for sentence in format_sentences(results)))
    text = replace_between(file.read_text(), KNOWS_BEGIN, KNOWS_END, format_knowledge(knows))
    file.write_text(replace_between(text, BEGIN, END, "\n\n".join(parts)))
