"""What clients do by habit: sizes and names of other models, no word on the format, slashes, several pictures."""

import base64
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.img2img import FILE, PIXELS
from support.pictures import file_of, open_image
from support.scripted_server import Scripted
from support.server import START_LIMIT, LiveServer

from pipelines.errors import QueueFull
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.refusals import Refusals
from server.app import create_app
from server.jobs.spec import JobSpec
from server.schema import GenerationBody, read_body
from server.settings.server import Settings
from server.translation.aliases import translate

ALIASES = "dall-e-3=flux/srpo,gpt-image-1=flux/srpo,painter=flux/srpo"
OTHER = file_of(Image.new("RGB", (512, 512), "navy"))
SMALL = {"image_size": "square", "num_inference_steps": 1, "output_format": "png", "enable_safety_checker": False}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scripted]]:
    """A server for each setting; their engine returns a source picture as it came."""
    settings: dict[str, dict[str, Any]] = {
        "url": {"model_aliases": ALIASES, "edit_pictures": "one"},
        "b64_json": {"response_format": "b64_json", "model_aliases": ALIASES},
        "both": {"response_format": "both"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        running: dict[str, Scripted] = {}
        try:
            for name, options in settings.items():
                folder = tmp_path_factory.mktemp(name)
                running[name] = Scripted(folder, safety_checker="none", **options).__enter__()
            yield running
        finally:
            for server in running.values():
                server.__exit__()


def generate(server: Scripted | LiveServer, path: str = "/v1/images/generations", **fields: Any) -> httpx.Response:
    body = {"model": "flux/srpo", "prompt": "quick"} | SMALL | fields
    body = {name: value for name, value in body.items() if value is not None}
    return httpx.post(server.url + path, json=body, timeout=START_LIMIT)


def edit(server: Scripted, files: Any = None, **fields: str) -> httpx.Response:
    form = {"prompt": "quick", "output_format": "png", "enable_safety_checker": "false"} | fields
    files = files or {"image": FILE}
    return httpx.post(f"{server.url}/v1/images/edits", data=form, files=files, timeout=START_LIMIT)


def keys_of(reply: httpx.Response) -> set[str]:
    """How each picture of a reply comes: `url`, `b64_json` or both; in both lists the same."""
    assert reply.status_code == 201, reply.text
    body = reply.json()
    assert body["images"] == body["data"]
    found = [{"url", "b64_json"} & item.keys() for item in body["data"]]
    assert all(keys == found[0] for keys in found)
    return found[0]


# --- the format of the reply ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "fields", "keys"),
    [
        ("url", {}, {"url"}),
        ("b64_json", {}, {"b64_json"}),
        ("both", {}, {"url", "b64_json"}),
        ("both", {"n": 2}, {"url", "b64_json"}),
        ("both", {"response_format": "url"}, {"url"}),
        ("both", {"output_format": "b64_json"}, {"b64_json"}),
        ("b64_json", {"response_format": "url"}, {"url"}),
        ("b64_json", {"sync_mode": True}, {"url"}),
        ("both", {"sync_mode": True}, {"url", "b64_json"}),
        ("b64_json", {"sync_mode": True, "response_format": "b64_json"}, {"b64_json"}),
    ],
)
def test_the_setting_decides_where_the_request_names_no_format(
    servers: dict[str, Scripted], setting: str, fields: dict[str, Any], keys: set[str]
) -> None:
    reply = generate(servers[setting], **fields)
    assert keys_of(reply) == keys
    for item in reply.json()["data"]:
        if "url" in keys:
            assert item["url"].startswith("data:image/" if fields.get("sync_mode") else "http://127.0.0.1:")
        if keys == {"url", "b64_json"} and "sync_mode" not in fields:
            assert httpx.get(item["url"]).content == base64.b64decode(item["b64_json"])


def test_an_edit_answers_by_the_setting_too(servers: dict[str, Scripted]) -> None:
    assert keys_of(edit(servers["b64_json"], model="flux/srpo")) == {"b64_json"}


# --- other models' names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["url", "b64_json"])
@pytest.mark.parametrize(("model", "keys"), [("dall-e-3", {"url"}), ("gpt-image-1", {"b64_json"}), ("painter", None)])
def test_an_alias_answers_as_its_namesake(
    servers: dict[str, Scripted], setting: str, model: str, keys: set[str] | None
) -> None:
    for reply in (generate(servers[setting], model=model), edit(servers[setting], model=model)):
        assert keys_of(reply) == (keys or {setting})
    assert keys_of(generate(servers[setting], model="dall-e-3", response_format="b64_json")) == {"b64_json"}
    assert keys_of(generate(servers[setting], model="gpt-image-1", sync_mode=True)) == {"url"}


def test_an_alias_of_a_gpt_image_model_has_what_its_replies_have(servers: dict[str, Scripted]) -> None:
    """Dify reads `usage` of every reply, LangChain4j takes the type from `output_format`."""
    used = 52500
    for reply in (generate(servers["url"], model="gpt-image-1"), edit(servers["b64_json"], model="gpt-image-1")):
        body = reply.json()
        assert body["usage"] == {
            "total_tokens": used,
            "input_tokens": 0,
            "output_tokens": used,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        }
        size = f"{body['data'][0]['width']}x{body['data'][0]['height']}"
        assert (body["size"], body["output_format"], body["background"]) == (size, "png", "opaque")
    for model in ("flux/srpo", "dall-e-3", "painter"):
        body = generate(servers["url"], model=model).json()
        assert not {"usage", "size", "output_format", "background"} & body.keys()


@pytest.mark.parametrize(
    ("model", "output_format", "drawn"),
    [
        ("dall-e-3", None, "PNG"),
        ("gpt-image-1", None, "PNG"),
        ("gpt-image-1", "b64_json", "PNG"),
        ("gpt-image-1", "webp", "WEBP"),
        ("dall-e-3", "jpeg", "JPEG"),
        ("painter", None, "JPEG"),
        ("flux/srpo", None, "JPEG"),
    ],
)
def test_an_alias_draws_png_as_its_namesake(
    servers: dict[str, Scripted], model: str, output_format: str | None, drawn: str
) -> None:
    """LobeHub, LibreChat, AnythingLLM and Dify call the picture a PNG without looking; some services then refuse it."""
    (item,) = generate(servers["url"], model=model, output_format=output_format, sync_mode=True).json()["data"]
    content = base64.b64decode(item.get("b64_json") or item["url"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).format == drawn
    assert item["content_type"] == f"image/{drawn.lower()}"


def test_aliases_are_listed_and_an_unknown_name_is_named_as_it_was_sent(servers: dict[str, Scripted]) -> None:
    models = httpx.get(f"{servers['url'].url}/v1/models").json()["data"]
    assert {"dall-e-3", "gpt-image-1", "painter", "flux/srpo"} <= {model["id"] for model in models}
    assert httpx.get(f"{servers['url'].url}/v1/models/dall-e-3").json()["type"] == "image"
    for reply in (generate(servers["both"], model="gpt-image-1"), edit(servers["both"], model="gpt-image-1")):
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "model_not_found")
        assert "received 'gpt-image-1'" in error["message"]
    for reply in (generate(servers["url"], model="gpt-4o"), edit(servers["url"], model="gpt-4o")):
        assert "flux/srpo, flux/srpo/image-to-image" in reply.json()["message"]
        assert "dall-e-3, gpt-image-1, painter, received 'gpt-4o'" in reply.json()["message"]


@pytest.mark.parametrize("alias", ["dall-e-3", "=flux/srpo", "dall-e-3=", "flux/srpo=flux/srpo", "dall-e-3=dall-e-2"])
def test_an_alias_needs_a_new_name_and_a_known_model(alias: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected NAME=MODEL"):
        Settings(data_dir=tmp_path, model_aliases=alias)


def test_an_alias_of_a_model_that_is_not_loaded_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dall-e-3 stands for flux/dev, but tiny is loaded"):
        create_app(Settings(data_dir=tmp_path, model="tiny", model_aliases="dall-e-3=flux/dev"))


# --- sizes and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "drawn", "exact"),
    [
        ("576x512", (576, 512), True),
        ("portrait_16_9", (576, 1024), True),
        ("256x256", (512, 512), False),
        ("1024x1792", (864, 1536), False),
        ("1792x1024", (1536, 864), False),
        ("1920x1080", (1536, 864), False),
        ("1000x600", (992, 608), False),
        ("99999x1", (1536, 512), False),
        ("auto", (1024, 768), False),
        ("0x512", (1024, 768), False),
        ("huge", (1024, 768), False),
        (7, (1024, 768), False),
    ],
)
def test_a_size_keeps_its_orientation(
    servers: dict[str, Scripted], size: Any, drawn: tuple[int, int], exact: bool
) -> None:
    reply = generate(servers["url"], size=size, image_size=None)
    (image,) = reply.json()["images"]
    assert (image["width"], image["height"]) == drawn
    assert open_image(httpx.get(image["url"]).content).size == drawn
    assert reply.headers.get("x-ignored-fields") == (None if exact else "size")


@pytest.mark.parametrize(("n", "images"), [(5, 4), (100, 4), (7.0, 4), (0, 1), (-3, 1), ("5", 1), (True, 1), (1.5, 1)])
def test_more_images_than_there_can_be_are_as_many_as_there_can_be(
    servers: dict[str, Scripted], n: Any, images: int
) -> None:
    reply = generate(servers["url"], n=n)
    assert len(reply.json()["images"]) == images
    assert reply.headers["x-ignored-fields"] == "n"


def test_cfg_is_the_guidance() -> None:
    assert translate({"cfg": 9}).native == {"guidance_scale": 9}
    assert translate({"cfg": 9, "guidance_scale": 2}).native == {"guidance_scale": 2}
    assert translate({"cfg": "much"}).ignored == ["cfg"]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "dall-e-3", "quality": "hd", "style": "vivid", "n": 1, "size": "1024x1024", "response_format": "url"},
        {"model": "gpt-image-1", "quality": "auto", "size": "auto", "background": "transparent", "moderation": "low"},
        {"model": "gpt-image-1", "output_format": "webp", "output_compression": 50, "user": "u", "partial_images": 0},
        {"quality": "standard", "stream": False, "user": "", "style": None, "background": None, "n": None},
    ],
)
def test_what_openais_models_are_asked_is_never_refused(servers: dict[str, Scripted], fields: dict[str, Any]) -> None:
    assert keys_of(generate(servers["url"], **{"output_format": None, "image_size": None} | fields))
    form = {name: str(value).lower() for name, value in fields.items() if value is not None}
    assert keys_of(edit(servers["url"], **form | {"input_fidelity": "high"}))


def test_a_name_as_long_as_a_body_is_neither_encoded_nor_kept_whole() -> None:
    name = "\u00e9" * 2**20
    body = {"model": "flux/srpo", "prompt": "p", "image_size": {"width": 512, name: name, "junk": [name]}, name: name}
    translated = translate(body | {f"{number:05}{name[:80]}": 1 for number in range(30)})
    translated.ignore(["one.more", "another"])
    header = translated.format_ignored()
    assert len(header) < 2000
    assert header.endswith(", +15")
    assert translate({}).format_ignored() == ""
    spec = JobSpec(translated, read_body(translated.native, "flux/srpo"), "http://localhost")
    assert isinstance(spec.body, GenerationBody)
    stored = json.dumps(spec.to_json(spec.body.to_request("flux/srpo")))
    assert len(stored) < 5000
    assert JobSpec.from_json(json.loads(stored), "flux/srpo").translated.format_ignored() == header
    assert len(str(translated.native)) < 200


# --- edits ----------------------------------------------------------------------------------------------------------


def test_of_several_pictures_the_first_is_used_and_the_others_are_named(servers: dict[str, Scripted]) -> None:
    files = [("image[]", ("a.png", FILE)), ("image[]", ("b.png", OTHER)), ("image[]", ("c.png", OTHER))]
    reply = edit(servers["b64_json"], files, model="flux/srpo", strength="0.5")
    assert reply.status_code == 201, reply.text
    assert reply.headers["x-ignored-fields"] == "image.1, image.2"
    drawn = Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))
    assert drawn.tobytes() == PIXELS.tobytes()


def test_several_pictures_are_refused_by_setting(servers: dict[str, Scripted]) -> None:
    reply = edit(servers["url"], [("image", ("a.png", FILE)), ("image", ("b.png", OTHER))])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")
    assert "expected one picture, received 2" in reply.json()["message"]


def test_an_edit_without_a_model_is_the_loaded_ones(servers: dict[str, Scripted]) -> None:
    assert keys_of(edit(servers["url"])) == {"url"}
    document = httpx.get(f"{servers['url'].url}/openapi.json").json()
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    schema = content["multipart/form-data"]["schema"]
    assert set(schema["required"]) == {"prompt", "image"}
    assert schema["properties"]["model"]["default"] in schema["properties"]["model"]["enum"]
    assert generate(servers["url"], model=None).status_code == 400  # the contract asks for it there


def edit_in_json(server: Scripted, **fields: Any) -> httpx.Response:
    body = {"prompt": "quick", "output_format": "png", "enable_safety_checker": False, "strength": 0.5} | fields
    return httpx.post(f"{server.url}/v1/images/edits", json=body, timeout=START_LIMIT)


DATA_URI = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"
OTHER_URI = f"data:image/png;base64,{base64.b64encode(OTHER).decode()}"


@pytest.mark.parametrize(
    ("pictures", "ignored"),
    [
        ({"images": [{"image_url": DATA_URI}]}, None),
        ({"images": [{"image_url": {"url": DATA_URI}}, {"image_url": OTHER_URI}]}, "image.1"),
        ({"image": {"url": DATA_URI, "type": "image_url"}}, None),
        ({"image": [DATA_URI, OTHER_URI], "size": "auto"}, "size, image.1"),
        ({"image": DATA_URI, "mask": None}, None),
        ({"image_url": DATA_URI, "images": []}, None),
    ],
)
def test_an_edit_in_json_names_its_pictures(
    servers: dict[str, Scripted], pictures: dict[str, Any], ignored: str | None
) -> None:
    """OpenAI's API takes `images` in JSON, other hosts' `image`; proxies pass both on."""
    reply = edit_in_json(servers["b64_json"], **pictures)
    assert reply.status_code == 201, reply.text
    assert reply.headers.get("x-ignored-fields") == ignored
    drawn = Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))
    assert drawn.tobytes() == PIXELS.tobytes()


@pytest.mark.parametrize(
    ("pictures", "param", "said"),
    [
        ({}, "image", "the address or data URI of a picture"),
        ({"images": []}, "image", "the address or data URI of a picture"),
        ({"images": [{"file_id": "file-1"}]}, "image", "no files are kept here"),
        ({"images": [7]}, "image_url", "received 7"),
        ({"image": {"b64": "x"}}, "image_url", "expected"),
        ({"image": DATA_URI, "mask": {"image_url": DATA_URI}}, "mask", "leave the mask out"),
    ],
)
def test_an_edit_in_json_without_a_picture_says_so(
    servers: dict[str, Scripted], pictures: dict[str, Any], param: str, said: str
) -> None:
    reply = edit_in_json(servers["b64_json"], **pictures)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert said in reply.json()["message"]


def test_several_pictures_in_json_are_refused_by_setting(servers: dict[str, Scripted]) -> None:
    reply = edit_in_json(servers["url"], image=[DATA_URI, OTHER_URI])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")


# --- when to come back ----------------------------------------------------------------------------------------------


def test_an_overdue_loading_time_grows() -> None:
    told = [CostModel().estimate_load_seconds(elapsed, 0.0) for elapsed in (0.0, 1.0, 5.0, 8.0, 30.0, 100.0)]
    assert told[0] == 5.0
    assert told[2:] == sorted(told[2:])
    assert min(told[2:]) >= 5.0
    stuck = [CostModel().estimate_load_seconds(elapsed, 0.99) for elapsed in (10.0, 60.0, 300.0)]
    assert stuck == sorted(stuck)
    assert stuck[0] > 2
    assert CostModel().estimate_load_seconds(10.0, 0.5) == 10.0  # as the progress says


def test_refused_clients_are_told_different_times_and_none_too_early() -> None:
    refusals = Refusals()
    told = [refusals.error(3.0, [], 1).retry_after for _ in range(4)]
    assert min(told) > 3.0
    assert told == sorted(set(told))
    assert all(later - sooner >= 1 for sooner, later in pairwise(told))


def test_the_queues_message_says_what_is_waiting_and_what_is_running() -> None:
    message = str(QueueFull(0, 1, 2.2))
    assert message == "The queue is full: 0 requests are waiting and 1 are running. Try again in 3 s."


# --- addresses and keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1//images/generations", "//v1/images/generations", "/v1//images//generations//"])
def test_doubled_slashes_are_one(servers: dict[str, Scripted], path: str) -> None:
    assert generate(servers["url"], path).status_code == 201


def test_doubled_slashes_elsewhere(servers: dict[str, Scripted]) -> None:
    url = servers["url"].url
    assert httpx.get(f"{url}/v1//models").json()["object"] == "list"
    reply = httpx.post(f"{url}//images//edits", data={"prompt": "quick"}, files={"image": FILE}, timeout=START_LIMIT)
    assert reply.status_code == 201
    assert httpx.get(f"{url}//v1//nothing").json()["path"] == "/v1/nothing"


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1/models/flux/srpo"])
def test_a_wrong_key_is_told_where_none_is_needed(live: LiveServer, live_with_key: LiveServer, path: str) -> None:
    for key, status in (("wrong", 401), ("secret-key-1", 200), ("", 200)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert httpx.get(live_with_key.url + path, headers=headers).status_code == status
    assert httpx.get(live.url + path, headers={"authorization": "Bearer any"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_chat_client_is_told_where_images_are_drawn(live: LiveServer, path: str) -> None:
    reply = httpx.post(live.url + path, json={"model": "flux/srpo", "messages": []})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert "/v1/images/generations" in reply.json()["message"]
    assert "/v1/images/edits" in reply.json()["message"]
