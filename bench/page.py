"""How long a person waits for a first image: from opening the playground in a cold browser to the picture on it.

    srpo bench page [--model flux/sketch] [--prompt "a cat"] [--rounds 3] [--json FILE]

The server is real and ready, Chromium has no cache, and only the prompt of the form is changed. Figures are the seconds
until the form, a first preview and the image are visible, and the CPU seconds of server and worker, which say more
where other work shares the cores. Needs the extra `browser` (make browser).
"""

import importlib
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from bench.support.report import make_parser, print_table, write_json
from bench.support.server_process import api_pid, start_server, worker_pids

PATIENCE = 600_000  # ms
FIGURES = ("form_s", "preview_s", "image_s", "server_cpu_s")


def cpu_seconds(url: str) -> float:
    """CPU seconds that the server and its workers have used so far."""
    pids = [api_pid(url), *worker_pids(url)]
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def visit(browser: Any, url: str, prompt: str) -> dict[str, float]:
    """Draw one image as a new visitor does. Seconds, by the names in `FIGURES`."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, before, start, times = context.new_page(), cpu_seconds(url), time.perf_counter(), []
    page.goto(url)
    for selector in ("#fields input", "#preview:not([hidden])", ".card img"):
        page.locator(selector).first.wait_for()
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            page.get_by_label("Prompt", exact=True).fill(prompt)
            page.get_by_role("button", name="Generate").click()
    page.locator(".card img").evaluate("image => image.decode()")
    times[-1] = time.perf_counter() - start
    context.close()
    return dict(zip(FIGURES, [*times, cpu_seconds(url) - before], strict=True))


def main(arguments: list[str]) -> int:
    parser = make_parser("page", __doc__)
    parser.add_argument("--model", default="flux/sketch")
    parser.add_argument("--prompt", default="a cat")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    except ModuleNotFoundError:
        parser.error("playwright is not installed: make browser")
    if chromium is None:
        parser.error("there is no Chromium (Debian: sudo apt-get install chromium)")
    with start_server(options.model) as url, sync_playwright() as playwright:
        rounds = []
        for _ in range(options.rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            rounds.append(visit(browser, url, options.prompt))
            browser.close()
    figures = {name: statistics.median(figures[name] for figures in rounds) for name in FIGURES}
    figures["first_image_s"] = rounds[0]["image_s"]
    rows = [(name, f"{value:.2f}") for name, value in figures.items()]
    print_table(f"{options.model}, median of {options.rounds}", ("figure", "seconds"), rows)
    write_json(figures, options.json)
    return 0
