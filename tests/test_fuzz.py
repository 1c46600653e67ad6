"""Bad input, property-based: never a 500, never a framework's own error, always the envelope, always naming the field.

The app is the real one on a real socket (some replies are lost only there); its pool answers at once with a few black
pixels, so that thousands of requests take seconds.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.specs.openapi.checks import AcceptedNegativeData, RejectedPositiveData
from support.instant import served

from pipelines.request import SIZES
from server.error_table import TABLE
from server.schema import ErrorReply

PATH = "/v1/images/generations"
BASE: dict[str, Any] = {"model": "flux/srpo", "prompt": "a red apple", "enable_safety_checker": False}
STATUSES = {row.status for row in TABLE.values()} - {499, 500}
IGNORED = re.compile(r"(?:[A-Za-z0-9_.-]|%[0-9A-F]{2}){0,64}")
UNPARSABLE = ("invalid_json", "invalid_body")  # a body that is no JSON object has no field to name

few = settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        served(tmp_path_factory.mktemp("fuzz")) as (_, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def post(client: httpx.Client) -> Callable[[bytes], httpx.Response]:
    return lambda raw: client.post(PATH, content=raw, headers={"content-type": "application/json"})


Post = Callable[[bytes], httpx.Response]


def refusal(reply: httpx.Response) -> dict[str, Any]:
    """The error of a refused request, once the reply is known to be a whole envelope."""
    assert reply.status_code in STATUSES, (reply.status_code, reply.text)
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    ErrorReply.model_validate(body, strict=True)
    assert "detail" not in body
    assert body["requestId"] == reply.headers["x-request-id"]
    assert body["status"] == body["statusCode"] == reply.status_code
    error: dict[str, Any] = body["error"]
    assert body["message"] == error["message"]
    for issue in error["data"]:
        assert issue.keys() == {"code", "path", "message", "expected", "received"}
        assert len(issue["received"]) <= 80
        assert issue["received"].isascii()
        assert issue["received"].isprintable()
    return error


def ignored(reply: httpx.Response) -> list[str]:
    """The names in `x-ignored-fields`, once each is known to be well formed."""
    header = reply.headers.get("x-ignored-fields")
    names = header.split(", ") if header else []
    more = [name for name in names if re.fullmatch(r"\+\d+", name)]
    assert names[len(names) - len(more) :] == more
    for name in names[:-1] if more else names:
        assert IGNORED.fullmatch(name), name
    assert len(names) - len(more) <= 20
    return names


# --- values ----------------------------------------------------------------------------------------------------------

EDGES = (
    0,
    -1,
    1,
    2,
    4,
    5,
    50,
    51,
    512,
    2**31 - 1,
    2**31,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**100,
    -(10**300),
)
NUMBERS = st.one_of(
    st.sampled_from(EDGES),
    st.sampled_from([float(edge) for edge in EDGES] + [-0.0, 5e-324, 1.5, 20.000001, 1e308]),
    st.integers(-100, 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
)
STRINGS = st.one_of(
    st.sampled_from(
        ["", "\0", "\ud800", "a\udfff", "\u202eabc", "\U0001f600", "\r\nx: y", "\x1b[31m", "28", "true", "auto"]
    ),
    st.sampled_from(
        ["256x256", "1024x768", "1000x1000", "512X512", "99999x1", "b64_json", "url", "webp", "png", *SIZES]
    ),
    st.text(max_size=20),
    st.text(st.characters(codec=None), max_size=6),  # lone surrogates too
    st.integers(60, 5000).map(lambda length: "\U0001f600" * length),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(STRINGS.filter(lambda key: len(key) < 60), inner, max_size=4)
    ),
    max_leaves=8,
)
SIDES = st.dictionaries(
    st.sampled_from(["width", "height", "depth"]), NUMBERS | st.sampled_from([544, 1536, 1568]) | JSON
)


def has_surrogate(value: Any) -> bool:
    """Whether a lone surrogate is in it (two halves that meet are a character)."""
    return re.search("[\ud800-\udfff]", json.dumps(json.loads(json.dumps(value)), ensure_ascii=False)) is not None


def whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: (
        type(value) in (int, float)
        and low <= value <= high
        and value == int(value)
        and (type(value) is int or value <= 2**53)
    )


def a_size(value: Any) -> bool:
    side = whole(512, 1536)
    return (isinstance(value, str) and value in SIZES) or (
        isinstance(value, dict)
        and all(
            value.get(name) is None or (side(value[name]) and value[name] % 32 == 0) for name in ("width", "height")
        )
    )


def named(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def flag(value: Any) -> bool:
    return isinstance(value, bool)


# What the contract accepts, said a second time and in other words.
ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "model": named("flux/srpo", "tiny"),
    "prompt": lambda value: isinstance(value, str) and 1 <= len(value) <= 4000,
    "image_size": a_size,
    "num_inference_steps": whole(1, 50),
    "guidance_scale": lambda value: type(value) in (int, float) and 1 <= value <= 20,
    "num_images": whole(1, 4),
    "seed": whole(1, 2**63 - 1),
    "sync_mode": flag,
    "enable_safety_checker": flag,
    "output_format": named("jpeg", "png", "webp", "b64_json", "url"),
    "acceleration": named("none", "regular", "high"),
}
REQUIRED = ("model", "prompt")
FOREIGN: dict[str, Callable[[Any], bool]] = {
    "n": whole(1, 4),
    "size": lambda value: (
        a_size(value)
        or (
            isinstance(value, str)
            and (match := re.fullmatch("([0-9]+)[xX]([0-9]+)", value)) is not None
            and a_size({"width": int(match[1]), "height": int(match[2])})
        )
    ),
    "response_format": named("url", "b64_json"),
    "steps": whole(1, 50),
    "guidance": ACCEPTED["guidance_scale"],
    "width": lambda value: a_size({"width": value}),
    "height": lambda value: a_size({"height": value}),
    "stream": lambda value: isinstance(value, bool),
    "partial_images": lambda value: value in range(4) and not isinstance(value, bool),
}
WITHOUT_USE = ("quality", "style", "user", "background", "moderation", "output_compression")


# --- native fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ACCEPTED)
@few
@given(value=JSON | SIDES)
@example(value=[])
@example(value={})
@example(value=5)
@example(value=10**4200)  # json reads it
@example(value=True)
@example(value=1)
def test_a_native_field_is_accepted_or_named(post: Post, field: str, value: Any) -> None:
    reply = post(json.dumps(BASE | {field: value}).encode())
    if has_surrogate(value):
        assert refusal(reply)["code"] == "invalid_json"
    elif ACCEPTED[field](value) or (value is None and field not in REQUIRED):
        assert reply.status_code == 201, reply.text
        ignored(reply)
    else:
        error = refusal(reply)
        assert reply.status_code == 400
        assert error["param"].split(".")[0] == field
        assert all(issue["path"][0] == field for issue in error["data"])


@pytest.mark.parametrize(
    "token",
    [
        "NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5000, "-" + "9" * 4301, '"\\ud800"', '["\\udfff"]',
        '{"\\udc00": 1}', '"\\ud800\\u0041"', "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000,
        '{"a":[' * 1000 + '"\\u0041"' + "]}" * 1000, "01", "+1", ".5", "0x1", "'a'", "undefined", "", "tru",
    ],
    ids=lambda token: token[:12] or "empty",
)  # fmt: skip
def test_what_is_no_strict_json_is_refused_in_any_field(post: Post, token: str) -> None:
    for field in (*ACCEPTED, *FOREIGN, *WITHOUT_USE, "extra_body", "unknown"):
        error = refusal(post(f'{{"model":"flux/srpo","prompt":"x","{field}":{token}}}'.encode()))
        assert (error["code"], error["param"]) == ("invalid_json", None), field


@pytest.mark.parametrize("brackets", ["[]", '{"a":1}'])
def test_no_depth_of_nesting_is_a_crash(post: Post, brackets: str) -> None:
    """Also just below the depth at which the parser gives up, where a second walk over the value may still fail."""
    opening, closing = (brackets[:-2], "1}") if len(brackets) > 2 else "[]"
    for depth in range(850, 1010):
        value = opening * depth + closing[:-1] + closing[-1] * depth
        reply = post(f'{{"model":"flux/srpo","prompt":"\\u0041","x":{value}}}'.encode())
        assert reply.status_code == 201 or refusal(reply)["code"] == "invalid_json"


@few
@given(wrong=st.dictionaries(st.sampled_from([*ACCEPTED]), st.sampled_from([[], -1, -1e6, {"width": 1}]), min_size=2))
def test_every_wrong_field_is_named_at_once(post: Post, wrong: dict[str, Any]) -> None:
    error = refusal(post(json.dumps(BASE | wrong).encode()))
    assert {issue["path"][0] for issue in error["data"]} == set(wrong)
    assert error["param"] == ".".join(error["data"][0]["path"])


@few
@given(left_out=st.sets(st.sampled_from(REQUIRED), min_size=1), null=st.booleans())
def test_missing_required_fields_are_named(post: Post, left_out: set[str], null: bool) -> None:
    body = {name: value for name, value in BASE.items() if name not in left_out}
    error = refusal(post(json.dumps(body | (dict.fromkeys(left_out) if null else {})).encode()))
    assert {(issue["code"], *issue["path"]) for issue in error["data"]} == {("required", name) for name in left_out}


# --- foreign fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FOREIGN)
@few
@given(value=(JSON | SIDES).filter(lambda value: not has_surrogate(value)))
@example(value=[])
@example(value="1024x1024")
@example(value="1920x1080")
@example(value=2)
@example(value=28)
@example(value="28")
@example(value="hd")
def test_a_foreign_field_is_honoured_or_listed(post: Post, field: str, value: Any) -> None:
    """None of them is a 400 for being present."""
    reply = post(json.dumps(BASE | {field: value}).encode())
    if field == "stream" and value is True:
        assert reply.headers["content-type"].startswith("text/event-stream")
        return
    assert reply.status_code == 201, reply.text
    names = {name.partition(".")[0] for name in ignored(reply)}
    assert names == (set() if value is None or FOREIGN[field](value) else {field}) or (
        isinstance(value, dict) and names == {"image_size"}  # a size's own extra members
    )


@few
@given(sent=st.fixed_dictionaries({}, optional=dict.fromkeys(WITHOUT_USE, JSON.filter(lambda v: not has_surrogate(v)))))
@example(sent=dict.fromkeys(WITHOUT_USE, "hd"))
@example(sent=dict.fromkeys(WITHOUT_USE, 2))
@example(sent=dict.fromkeys(WITHOUT_USE))
def test_a_foreign_field_without_use_here_is_listed(post: Post, sent: dict[str, Any]) -> None:
    reply = post(json.dumps(BASE | sent).encode())
    assert reply.status_code == 201, reply.text
    assert set(ignored(reply)) == {name for name, value in sent.items() if value is not None}


@few
@given(value=JSON.filter(lambda value: not has_surrogate(value)))
def test_extra_body_is_taken_apart_or_listed(post: Post, value: Any) -> None:
    reply = post(json.dumps(BASE | {"extra_body": value}).encode())
    assert reply.status_code == 201, reply.text
    shown = ignored(reply)
    assert isinstance(value, dict) or shown == ([] if value is None else ["extra_body"])


@few
@given(
    value=JSON.filter(lambda value: value is not None and not has_surrogate(value)),
    field=st.sampled_from(list(ACCEPTED)),
)
def test_a_native_field_in_extra_body_is_as_strict(post: Post, field: str, value: Any) -> None:
    body = {name: part for name, part in BASE.items() if name != field}
    reply = post(json.dumps(body | {"extra_body": {field: value}}).encode())
    if ACCEPTED[field](value):
        assert reply.status_code == 201, reply.text
    else:
        assert refusal(reply)["param"].split(".")[0] == field


def encoded(name: str) -> str:
    """As the header has it, if it is not too long."""
    return quote(name, safe="").replace("~", "%7E")


NAMES = STRINGS.filter(lambda name: not has_surrogate(name) and name not in ACCEPTED and name not in FOREIGN)


@few
@given(names=st.lists(NAMES, min_size=1, max_size=30, unique_by=lambda name: encoded(name)[:60]))
@example(names=["\U0001f600" * 30])
@example(names=["\r\nset-cookie: a=b"])
@example(names=["a, b"])
@example(names=["a", ""])
@example(names=[""])
@example(names=["~" * 64])
@example(names=[f"x{number}" for number in range(20)])
@example(names=[f"x{number}" for number in range(21)])
def test_unknown_names_come_back_in_a_header(post: Post, names: list[str]) -> None:
    reply = post(json.dumps(BASE | dict.fromkeys(names, 1)).encode())
    assert reply.status_code == 201, reply.text
    shown = ignored(reply)
    assert "set-cookie" not in reply.headers
    names = [name for name in names if name]
    for name, said in zip(names[:20], shown[:20], strict=True):
        full = encoded(name)
        assert said == full if len(full) <= 64 else full.startswith(said)
        assert name.encode().startswith(unquote(said, errors="surrogateescape").encode(errors="surrogateescape"))
    assert shown[20:] == ([f"+{len(names) - 20}"] if len(names) > 20 else [])


def test_ten_thousand_unknown_names(post: Post) -> None:
    reply = post(json.dumps(BASE | {f"\U0001f600\r\n{number}": 1 for number in range(10_000)}).encode())
    assert reply.status_code == 201
    assert ignored(reply)[20:] == ["+9980"]


# --- bodies, headers, paths ------------------------------------------------------------------------------------------


@few
@given(raw=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(raw=b"")
@example(raw=b"\xef\xbb\xbf")
@example(raw=b"null")
@example(raw=b"[]")
@example(raw=b'"\xed\xa0\x80"')  # a surrogate in UTF-8's clothes
@example(raw=b'{"model": "\xff"}')
@example(raw='{"model": "flux/srpo"}'.encode("utf-16"))
def test_any_bytes_as_a_body(post: Post, raw: bytes) -> None:
    """Hypothesis tries this project's own strings too, so that now and then a body names a model."""
    reply = post(raw)
    if reply.status_code == 201:
        assert {"model", "prompt"} <= set(json.loads(raw))
        return
    error = refusal(reply)
    assert error["code"] in UNPARSABLE or error["param"] == "model" or "model" in json.loads(raw)


@few
@given(at=st.integers(0, 200), junk=st.binary(max_size=3))
def test_a_damaged_body(post: Post, at: int, junk: bytes) -> None:
    whole_body = json.dumps(BASE | {"seed": 7, "image_size": {"width": 512, "height": 512}}).encode()
    at %= len(whole_body)
    reply = post(whole_body[:at])
    assert refusal(reply)["code"] in UNPARSABLE
    reply = post(whole_body[:at] + junk + whole_body[at + 1 :])
    if reply.status_code != 201:
        error = refusal(reply)
        assert error["code"] in UNPARSABLE or error["param"]


HEADER = st.binary(max_size=40).map(lambda raw: re.sub(rb"[\x00-\x1f\x7f]", b"", raw).strip())


@few
@given(sent=HEADER)
def test_any_content_type(client: httpx.Client, sent: bytes) -> None:
    reply = client.post(PATH, content=json.dumps(BASE), headers={b"content-type": sent})
    assert refusal(reply)["param"] == "content-type"


@few
@given(sent=HEADER | st.from_regex(rb"[A-Za-z0-9._:-]{1,130}", fullmatch=True))
def test_any_client_request_id(client: httpx.Client, sent: bytes) -> None:
    reply = client.get("/health", headers={b"x-client-request-id": sent})
    valid = re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", sent)
    assert reply.headers.get("x-client-request-id") == (sent.decode() if valid else None)


@few
@given(
    folder=st.sampled_from(["", "files/", "v1/models/", "v1/images/", "v1/images/generations/"]),
    name=STRINGS.filter(lambda name: len(name) < 100 and not has_surrogate(name))
    | st.sampled_from(["../app.py", "a/../b"]),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "FOO"]),
)
def test_any_path(client: httpx.Client, folder: str, name: str, method: str) -> None:
    reply = client.request(method, f"/{folder}{quote(name, safe='')}-")
    error = refusal(reply)
    assert reply.status_code == (405 if error["code"] == "method_not_allowed" else 404)
    assert ("allow" in reply.headers) == (reply.status_code == 405)


@few
@given(
    name=st.sampled_from(["range", "if-none-match", "if-range", "authorization", "origin", "accept"]),
    sent=HEADER
    | st.from_regex(rb"bytes ?= ?[0-9]{0,30} ?-( ?[0-9]{1,30})?", fullmatch=True)
    | st.sampled_from([b"bytes=0-0,2-3", b"bytes=-0", b"bytes=--1", b"items=0-1", b"*", b'W/"x"']),
)
def test_any_header_on_a_file(client: httpx.Client, post: Post, name: str, sent: bytes) -> None:
    url = post(json.dumps(BASE).encode()).json()["images"][0]["url"]
    reply = client.get(url, headers={name.encode(): sent})
    if reply.status_code == 416:
        assert refusal(reply)["code"] == "range_not_satisfiable"
    else:
        assert reply.status_code in (200, 206, 304)


# --- our own OpenAPI document ----------------------------------------------------------------------------------------


def is_by_contract(failure: Failure, body: Any) -> bool:
    """What the document cannot say: null means absent; and the tool takes 2^63 for 2^63 - 1, as floats are."""
    if not isinstance(body, dict):
        return False
    if isinstance(failure, AcceptedNegativeData):
        size = body.get("image_size")
        return None in body.values() or (isinstance(size, dict) and None in size.values())
    if isinstance(failure, RejectedPositiveData) and {"image", "images", "image_url"} & set(body):
        return True  # letters are no picture
    seed = body.get("seed")
    return isinstance(failure, RejectedPositiveData) and type(seed) is int and seed >= 2**63


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of the size of what schemathesis draws
def test_replies_are_what_the_openapi_document_says(tmp_path: Path) -> None:
    """schemathesis: examples, every boundary of the document, then random data, right and wrong."""
    replies = 0
    failures: dict[str, list[Any]] = {}
    with served(tmp_path, api_keys=("secret-key",)) as (app, url):
        config = SchemathesisConfig.from_dict(
            {
                "base-url": url,
                "headers": {"Authorization": "Bearer secret-key"},
                "continue-on-failure": True,
                "generation": {"deterministic": True, "max-examples": 150, "database": "none"},
                "phases": {"stateful": {"enabled": False}},
            }
        )
        for event in from_schema(schemathesis.openapi.from_dict(app.openapi(), config=config)).execute():
            assert not isinstance(event, FatalError | NonFatalError), event
            if isinstance(event, ScenarioFinished):
                replies += len(event.recorder.interactions)
                for case_id, nodes in event.recorder.checks.items():
                    case = event.recorder.cases[case_id].value
                    for failure in (node.failure_info.failure for node in nodes if node.failure_info):
                        if is_by_contract(failure, case.body):
                            continue
                        what = f"{case.method} {case.path}: {failure.title}: {failure.message}"
                        failures.setdefault(what, []).append(case.body)
    assert not failures, "\n".join(f"{what}: {bodies!r:.500}" for what, bodies in failures.items())
    assert replies > 200
