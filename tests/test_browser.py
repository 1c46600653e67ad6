"""The playground and /docs in a real Chromium, on a real server (make browser)."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from support.scripted_server import Gate, Scripted
from support.server import LiveServer

if TYPE_CHECKING:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed: make browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `browser` is not installed")
expect = sync_api.expect

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
PATIENCE = 60_000  # ms: drawing on a busy machine

SHOWN = """async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
    canvas.drawImage(image, 0, 0);
    return canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data.slice(0, 4000).join();
}"""


@dataclass
class Visit:
    """A page, and what it did."""

    page: "sync_api.Page"
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, prompt: str, *, steps: int = 2, size: str = "Square") -> None:
        """Fill the form with a small request, and send it off."""
        self.page.locator("#parameters").evaluate("details => details.open = true")
        choice = self.page.get_by_role("radio", name=size, exact=True)
        choice.press("Space")  # the notice may come late and move what a click would hit
        expect(choice).to_be_checked()
        self.page.get_by_label("Steps", exact=True).fill(str(steps))
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.get_by_role("button", name="Generate").click()

    def cards(self) -> "sync_api.Locator":
        return self.page.locator(".card")

    def images(self) -> "sync_api.Locator":
        return self.page.locator(".card img")


@pytest.fixture(scope="module")
def chromium() -> Iterator["sync_api.Browser"]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: sudo apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", NOWHERE])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: "sync_api.Browser") -> Iterator[Callable[..., Visit]]:
    """Opens a page of a server in a browser without a past; `options` are the browser context's."""
    contexts: list[sync_api.BrowserContext] = []

    def opened(server: LiveServer, path: str = "/", **options: Any) -> Visit:
        context = chromium.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        this = Visit(page)

        def listen(said: "sync_api.ConsoleMessage") -> None:
            if said.type in ("error", "warning"):
                this.complaints.append(said.text)

        page.on("console", listen)
        page.on("pageerror", lambda error: this.complaints.append(str(error)))
        page.on("request", lambda request: this.requests.append(request.url))
        page.goto(server.url + path)
        return this

    expect.set_options(timeout=PATIENCE)
    yield opened
    for context in contexts:
        context.close()


def faults(page: "sync_api.Page") -> list[str]:
    found = axe.Axe().run(page).response["violations"]
    return [f"{fault['id']}: {node['html']}" for fault in found for node in fault["nodes"]]


def idle(server: LiveServer) -> bool:
    health = httpx.get(f"{server.url}/health").json()
    return not health["running"] and not health["waiting"]


def test_a_prompt_becomes_an_image_that_outlives_a_reload(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.ask("a red apple")
    picture = tab.page.get_by_role("img", name="a red apple")
    expect(picture).to_be_visible()
    assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth }") == 512
    expect(tab.page.get_by_role("status")).to_have_text("The image is ready.")
    expect(tab.page.get_by_role("complementary")).to_contain_text("A stand-in is drawing: tiny")
    tab.page.reload()
    expect(tab.page.get_by_role("img", name="a red apple")).to_be_visible()
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith((live.url, "blob:", "data:"))] == []


def test_steps_and_a_preview_are_shown_while_it_draws(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.ask("a long story", steps=50, size="Square HD")
    expect(tab.page.get_by_text(re.compile(r"Drawing: step \d+ of 50"))).to_be_visible()
    expect(tab.page.get_by_role("img", name="Preview of the image being drawn")).to_be_visible()
    tab.page.get_by_role("button", name="Cancel").click()
    assert tab.complaints == []


def test_the_place_in_the_line_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visit: Callable[..., Visit]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path, safety_checker="none") as server:
        for _ in range(2):  # one is being drawn, one waits
            body = {"model": "flux/srpo", "prompt": gate.prompt, "image_size": "square", "num_inference_steps": 1}
            reply = httpx.post(f"{server.url}/v1/images/generations", json=body, headers={"prefer": "respond-async"})
            assert reply.status_code == 202
        tab = visit(server)
        tab.ask("a red apple")
        expect(tab.page.locator("#step")).to_contain_text("1 ahead in the line")
        gate.allow(100)
        expect(tab.images()).to_be_visible()
    assert tab.complaints == []


def test_same_seed_again_is_the_same_image_and_vary_is_another(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.ask("a blue boat")
    tab.cards().first.get_by_role("button", name="Same seed again").click()
    expect(tab.cards()).to_have_count(2)
    expect(tab.page.get_by_role("button", name="Generate")).to_be_visible()
    tab.cards().first.get_by_role("button", name=re.compile("^Vary")).click()
    expect(tab.cards()).to_have_count(3)
    seeds = tab.page.locator(".facts div:has(dt:text-is('Seed')) dd").all_text_contents()
    varied, again, first = [picture.evaluate(SHOWN) for picture in tab.images().all()]
    assert seeds[0] != seeds[1] == seeds[2]
    assert varied != again == first


def test_a_request_is_copied_as_code_that_draws_it_again(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live, permissions=["clipboard-read", "clipboard-write"])
    tab.ask("it's a 'quoted' \"apple\"")
    copied = {}
    for language in ("curl", "Python", "JavaScript"):
        tab.page.get_by_text("Copy as …").click()
        tab.page.get_by_role("button", name=f"Copy as {language}").click()
        expect(tab.page.get_by_role("status")).to_have_text(f"Copied as {language}.")
        expect(tab.page.get_by_text("Copy as …")).to_be_visible()
        copied[language] = tab.page.evaluate("navigator.clipboard.readText()")
    seed = tab.page.locator(".facts dd").first.text_content()
    assert all(f'"seed": {seed}' in code and f"{live.url}/v1/images/generations" in code for code in copied.values())
    programs = {
        "curl": ("bash", "-c"),
        "Python": (sys.executable, "-c"),
        "JavaScript": ("node", "--input-type=module", "-e"),
    }
    drawn = []
    for language, program in programs.items():
        if shutil.which(program[0]):
            ended = subprocess.run(
                [*program, copied[language]], capture_output=True, text=True, timeout=PATIENCE / 1000
            )
            assert ended.returncode == 0, ended.stderr
            [url] = set(re.findall(r"http://[\w.:]+/files/[\w.-]+", ended.stdout))
            drawn.append(httpx.get(url).content)
    with tab.page.expect_download() as saved:
        tab.page.get_by_role("link", name="Save").click()
    assert set(drawn) == {saved.value.path().read_bytes()}


def test_cancelling_stops_the_work_and_leaves_no_image(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.ask("a long story", steps=50, size="Square HD")
    tab.page.get_by_role("button", name="Cancel").click()
    expect(tab.page.get_by_role("status")).to_have_text("Cancelled. Nothing was kept.")
    expect(tab.page.get_by_role("button", name="Generate")).to_be_visible()
    expect(tab.cards()).to_have_count(0)
    expect(tab.page.get_by_text("Nothing drawn yet")).to_be_visible()
    for _ in range(600):
        if idle(live):
            break
        tab.page.wait_for_timeout(50)
    assert idle(live)


def test_the_keyboard_draws_and_cancels(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.page.get_by_label("Steps", exact=True).fill("50")
    tab.page.get_by_label("Prompt", exact=True).fill("a long story")
    tab.page.keyboard.press("Control+Enter")
    expect(tab.page.get_by_role("button", name="Cancel")).to_be_visible()
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_role("status")).to_have_text("Cancelled. Nothing was kept.")


def test_a_missing_or_wrong_key_is_asked_for_and_the_right_one_draws(
    live_with_key: LiveServer, visit: Callable[..., Visit]
) -> None:
    tab = visit(live_with_key)
    tab.ask("a red apple")
    dialog = tab.page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("The server asks for an API key.")
    for key, outcome in (("wrong-key-1", dialog.get_by_text("not known")), ("secret-key-1", tab.images())):
        dialog.get_by_label("Key", exact=True).fill(key)
        dialog.get_by_role("button", name="Use this key").click()
        tab.page.get_by_role("button", name="Generate").click()
        expect(outcome).to_be_visible()
    assert "secret-key-1" not in tab.page.content()


def test_a_flagged_image_is_explained_and_not_shown(
    serve: Callable[..., LiveServer], visit: Callable[..., Visit]
) -> None:
    tab = visit(serve(safety_threshold="1e-9"))
    tab.ask("a red apple")
    expect(tab.cards()).to_contain_text("Image withheld by the safety checker")
    expect(tab.images()).to_have_count(0)
    assert faults(tab.page) == []


def test_what_cannot_be_sent_is_said_before_it_is_sent(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.page.get_by_role("button", name="Generate").click()
    expect(tab.page.get_by_role("alert")).to_have_text("Describe the image first.")
    tab.ask("a red apple", steps=51)
    expect(tab.page.get_by_role("alert")).to_have_text("Steps: expected a whole number from 1 to 50")
    assert not [url for url in tab.requests if url.endswith("/generations")]


def test_a_failure_keeps_its_words_and_its_request_id(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    reply = {
        "message": "The image could not be generated.",
        "requestId": "f" * 32,
        "error": {"code": "x", "param": None},
    }
    tab.page.route("**/generations", lambda route: route.fulfill(status=500, json=reply))
    tab.ask("a red apple")
    expect(tab.cards()).to_contain_text("The image could not be generated.")
    expect(tab.cards()).to_contain_text("f" * 32)


def test_a_server_that_does_not_stream_still_draws(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)

    def refuse(route: "sync_api.Route") -> None:
        body: Any = route.request.post_data_json
        if "stream" in body:
            route.fulfill(status=400, json={"message": "no", "error": {"param": "stream"}})
        else:
            route.continue_()

    tab.page.route("**/generations", refuse)
    tab.ask("a red apple")
    expect(tab.images()).to_be_visible()


def test_a_new_parameter_of_the_server_appears_and_is_sent(live: LiveServer, visit: Callable[..., Visit]) -> None:
    document = httpx.get(f"{live.url}/openapi.json").json()
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]["oneOf"][0]
    schema["properties"]["graininess"] = {
        "type": "integer", "minimum": 2, "maximum": 9, "default": 3, "description": "How grainy it is."
    }  # fmt: skip
    tab = visit(live)
    tab.page.route("**/openapi.json", lambda route: route.fulfill(json=document))
    tab.page.reload()
    expect(tab.page.get_by_text("How grainy it is.")).to_be_visible()
    tab.page.get_by_label("Graininess", exact=True).fill("7")
    with tab.page.expect_request("**/generations") as sent:
        tab.ask("a red apple")
    body: Any = sent.value.post_data_json
    assert body["graininess"] == 7


def test_what_a_stand_in_knows_is_proposed(live: LiveServer, visit: Callable[..., Visit]) -> None:
    models = httpx.get(f"{live.url}/v1/models").json()
    things = ["apple", *(f"thing {number}" for number in range(1, 60))]
    for card in models["data"]:
        card["info"] |= {"knows": things, "ideas": ["two apples on a beach", "a thing 10", "an apple"]}
    tab = visit(live)
    tab.page.route("**/v1/models", lambda route: route.fulfill(json=models))
    tab.page.reload()
    ideas = tab.page.locator("#ideas button")
    expect(ideas).to_have_text(["two apples on a beach", "a thing 10", "an apple"])
    tab.page.get_by_text("What the stand-in can draw").click()
    known = tab.page.locator("#known-things button")
    expect(known).to_have_text(things)
    known.first.click()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value("an apple")
    assert faults(tab.page) == []


def test_images_of_one_request_stand_in_their_order(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    tab.page.locator("#num_images").fill("3")
    tab.page.get_by_label("Seed", exact=True).fill("7")
    tab.ask("three apples")
    expect(tab.images()).to_have_count(3)
    seeds = tab.page.locator(".facts div:has(dt:text-is('Seed')) dd")
    expect(seeds).to_have_text(["7", "8", "9"])


def test_the_newest_image_stands_large_above_the_others(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live, viewport={"width": 1280, "height": 900})
    for prompt in ("a red apple", "a green apple"):
        tab.ask(prompt)
        expect(tab.page.get_by_role("img", name=prompt)).to_be_visible()
    boxes: list[Any] = [picture.bounding_box() for picture in tab.images().all()]
    newest, older = (box["width"] for box in boxes)
    assert newest > 1.5 * older


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_every_state_is_accessible_and_fits_the_width(
    live: LiveServer, visit: Callable[..., Visit], scheme: str, options: dict[str, object]
) -> None:
    tab = visit(live, color_scheme=scheme, reduced_motion="reduce", **options)
    expect(tab.page.get_by_text("Nothing drawn yet")).to_be_visible()
    expect(tab.page.get_by_role("complementary")).to_be_visible()
    assert faults(tab.page) == []
    tab.ask("a red apple")
    expect(tab.images()).to_be_visible()
    assert faults(tab.page) == []
    tab.page.get_by_role("button", name="Key", exact=True).click()
    assert faults(tab.page) == []
    overhang = tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overhang == 0


def test_the_docs_show_the_api_without_the_internet(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live, "/docs")
    tab.page.get_by_text("/v1/images/generations").click()
    expect(tab.page.get_by_text("T-Rex").first).to_be_visible()
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith((live.url, "data:"))] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_bench_measures_a_first_visit(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "server", "bench", "page", "--model", "tiny", "--rounds", "1"]
    subprocess.run([*command, "--json", str(file)], check=True, capture_output=True)
    figures = json.loads(file.read_text())
    assert 0 < figures["form_s"] < figures["preview_s"] <= figures["image_s"] == figures["first_image_s"]
    assert figures["server_cpu_s"] > 0


# --- image to image --------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file to begin with: 544 by 512 pixels of noise."""
    file = tmp_path / "harbour.png"
    Image.effect_noise((544, 512), 60).convert("RGB").save(file)
    return file


def test_a_chosen_picture_becomes_another_one(live: LiveServer, visit: Callable[..., Visit], picture: Path) -> None:
    tab = visit(live)
    page = tab.page
    expect(page.get_by_label("Strength", exact=True)).to_have_count(0)
    page.get_by_label("Begin with a picture").set_input_files(picture)
    expect(page.get_by_role("status")).to_have_text("The next image begins with this picture.")
    expect(page.get_by_text("harbour.png, 544 × 512")).to_be_visible()
    page.locator("#parameters").evaluate("details => details.open = true")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("40")
    expect(page.get_by_role("radio", name="Square", exact=True)).to_have_count(0)
    slider = page.get_by_role("slider", name="Strength, slider")
    expect(slider).to_have_value("0.95")
    slider.press("ArrowLeft")
    expect(page.get_by_label("Strength", exact=True)).to_have_value("0.94")
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Prompt", exact=True).fill("the same in winter")
    assert faults(page) == []
    with page.expect_request("**/generations") as sent:
        page.get_by_role("button", name="Generate").click()
    body: Any = sent.value.post_data_json
    assert body["model"] == "flux/srpo/image-to-image"
    assert body["strength"] == 0.94
    assert base64.b64decode(body["image_url"].partition(",")[2]) == picture.read_bytes()
    drawn = page.get_by_role("img", name="the same in winter")
    expect(drawn).to_be_visible()
    assert drawn.evaluate("async image => { await image.decode(); return image.naturalWidth }") == 544
    assert faults(page) == []
    assert tab.complaints == []


def test_a_drawn_image_is_used_as_input_and_drawn_again(live: LiveServer, visit: Callable[..., Visit]) -> None:
    tab = visit(live)
    page = tab.page
    tab.ask("a red apple")
    expect(tab.images()).to_be_visible()
    page.get_by_role("button", name="Use as input").press("Enter")
    expect(page.get_by_alt_text("The picture to begin with")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.get_by_label("Prompt", exact=True).fill("a green apple")
    page.get_by_role("button", name="Generate").click()
    second = page.get_by_role("img", name="a green apple")
    expect(second).to_be_visible()
    page.get_by_role("button", name="Remove the picture").press("Space")
    expect(page.get_by_role("radio", name="Square", exact=True)).to_be_checked()
    page.get_by_role("button", name="Same seed again").first.click()
    expect(second).to_have_count(2)
    first, again = (image.evaluate(SHOWN) for image in second.all())
    assert first == again
    assert tab.complaints == []


def test_a_dropped_picture_is_taken_and_what_is_none_is_said(
    live: LiveServer, visit: Callable[..., Visit], picture: Path
) -> None:
    tab = visit(live)
    drop = """([text, name]) => {
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], name, { type: 'image/png' }));
        const form = document.getElementById('form');
        const options = { dataTransfer, bubbles: true };
        for (const type of ['dragover', 'drop']) form.dispatchEvent(new DragEvent(type, options));
    }"""
    expect(tab.page.get_by_role("radio", name="Square", exact=True)).to_be_visible()  # the form is there, and listens
    tab.page.evaluate(drop, [base64.b64encode(b"no picture").decode(), "notes.png"])
    expect(tab.page.get_by_role("alert")).to_have_text("notes.png is not a picture that this browser can read.")
    tab.page.evaluate(drop, [base64.b64encode(picture.read_bytes()).decode(), "harbour.png"])
    expect(tab.page.get_by_text("harbour.png, 544 × 512")).to_be_visible()
    expect(tab.page.get_by_role("alert")).to_be_hidden()
    expect(tab.page.get_by_label("Strength", exact=True)).to_have_count(1)
    assert faults(tab.page) == []


def test_a_large_picture_is_made_smaller_before_it_is_sent(
    live: LiveServer, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    tab = visit(live)
    file = tmp_path / "photo.bmp"
    Image.new("RGB", (3072, 1536), "teal").save(file)
    tab.page.get_by_label("Begin with a picture").set_input_files(file)
    expect(tab.page.get_by_text("photo.bmp, 3072 × 1536")).to_be_visible()
    size = tab.page.get_by_alt_text("The picture to begin with").evaluate(
        "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight] }"
    )
    assert size == [1536, 768]
