"""Reads the part of the Dockerfile language that our Dockerfile uses, and refuses the rest by name."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

FLAGS = {"RUN": {"mount"}, "COPY": {"from"}, "HEALTHCHECK": {"interval", "timeout", "start-period", "retries"}}
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER"}
KNOWN |= {"VOLUME", "WORKDIR"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its flags (`--from=build`) apart from the rest of its text."""

    name: str
    flags: Mapping[str, str]
    text: str
    line: int

    def words(self, variables: Mapping[str, str] | None = None) -> list[str]:
        """The arguments: an exec form's as they are, others split and with variables put in."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return [substitute(word, variables or {}) for word in shlex.split(self.text)]


@dataclass(slots=True)
class Stage:
    """A FROM and what follows it."""

    base: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def find(self, name: str) -> list[Instruction]:
        return [step for step in self.steps if step.name == name]

    def env(self) -> dict[str, str]:
        """Every ENV, in order, as one table."""
        return {key: value for step in self.find("ENV") for key, value in pairs(step, {})}


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile; ARGs before the first FROM are put into the FROM lines."""
    stages: list[Stage] = []
    before: dict[str, str] = {}
    for step in instructions(text):
        if step.name == "FROM":
            base, *name = step.words(before)
            stages.append(Stage(base, name[1] if name else str(len(stages))))
        elif stages:
            stages[-1].steps.append(step)
        else:
            before |= pairs(step, before)
    return stages


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions, with continued lines joined and comments left out."""
    parts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        parts.append(line.strip().removesuffix("\\").strip())
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = " ".join(parts).partition(" ")
        parts = []
        flags = {}
        while name != "CMD" and (flag := re.match(r"--([a-z-]+)=(\S+)\s+", rest)):
            flags[flag[1]] = flag[2]
            rest = rest[flag.end() :]
        if name not in KNOWN or (unknown := set(flags) - FLAGS.get(name, set())) or "<<" in rest:
            raise ValueError(f"line {number}: {name} {unknown if name in KNOWN else ''} is not understood here")
        yield Instruction(name, flags, rest, number)


def pairs(step: Instruction, variables: Mapping[str, str]) -> list[tuple[str, str]]:
    """The names and values of an ENV or ARG; an ARG without a default is empty."""
    return [(name, value) for name, _, value in (word.partition("=") for word in step.words(variables))]


def substitute(word: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], ""), word)


def ignored(path: Path, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a file out of the context: the last pattern that fits it or a parent decides."""
    verdict = False
    names = [str(path), *(str(parent) for parent in path.parents if parent.name)]
    for pattern in patterns:
        bare = pattern.removeprefix("!").rstrip("/")
        forms = {bare, bare.removeprefix("**/"), bare.replace("**/", "*/")}
        if any(fnmatch(name, form) for name in names for form in forms):
            verdict = not pattern.startswith("!")
    return verdict


def context(root: Path) -> list[Path]:
    """The files, relative to `root`, that a build may copy."""
    listed = root / ".dockerignore"
    lines = listed.read_text().splitlines() if listed.exists() else []
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    kept: list[Path] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if name != ".git" and not ignored(here / name, patterns)]
        kept += [here / name for name in files if not ignored(here / name, patterns)]
    return sorted(kept)
