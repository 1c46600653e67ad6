"""How long a person waits for a first image: from opening the playground in a cold browser to the picture on it.

    srpo bench page [--model flux/sketch] [--prompt "a cat"] [--rounds 3] [--json FILE]

A real server that is ready, Chromium without a cache, the form as it comes but for the prompt. Seconds until the form,
a first preview and the image are there, and the CPU seconds that server and worker took for them: where other work
shares the cores, these say more. Needs the extra `browser` (make browser).
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench.load import server
from bench.readers import api_process

PATIENCE = 600_000  # ms
FIGURES = ("form_s", "preview_s", "image_s", "server_cpu_s")


def cpu_seconds(url: str) -> float:
    """What the server and its workers have taken so far."""
    pids = [api_process(url), *httpx.get(f"{url}/health").json()["worker_pids"]]
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def visit(browser: Any, url: str, prompt: str) -> dict[str, float]:
    """One person's first image."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, before, start, told = context.new_page(), cpu_seconds(url), time.perf_counter(), []
    page.goto(url)
    for wanted in ("#fields input", "#preview:not([hidden])", ".card img"):
        page.locator(wanted).first.wait_for()
        told.append(time.perf_counter() - start)
        if len(told) == 1:
            page.get_by_label("Prompt", exact=True).fill(prompt)
            page.get_by_role("button", name="Generate").click()
    page.locator(".card img").evaluate("image => image.decode()")
    told[-1] = time.perf_counter() - start
    context.close()
    return dict(zip(FIGURES, [*told, cpu_seconds(url) - before], strict=True))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "srpo bench page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="flux/sketch")
    parser.add_argument("--prompt", default="a cat")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    except ModuleNotFoundError:
        parser.error("playwright is not installed: make browser")
    if chromium is None:
        parser.error("there is no Chromium (Debian: sudo apt-get install chromium)")
    with server(options.model) as url, sync_playwright() as playwright:
        rounds = []
        for _ in range(options.rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            rounds.append(visit(browser, url, options.prompt))
            browser.close()
    figures = {name: statistics.median(one[name] for one in rounds) for name in FIGURES}
    figures["first_image_s"] = rounds[0]["image_s"]
    table = Table("figure", "seconds", title=f"{options.model}, median of {options.rounds}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
