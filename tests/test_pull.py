"""`srpo weights pull` against a loopback hub, with the real hub client: whatever goes wrong, no unverified file."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.loopback_hub import COMMIT, TOKEN, Hub, git_id, serving, sha256
from support.namespaces import NAMESPACE, permitted
from support.published import BIG, DEV, SRPO_FILE, publish

import weights.hub.pull
from server.__main__ import main as srpo
from server.cli.weights import pull as pull_cli
from weights.checkpoints import CHECKPOINTS, COMPVIS, SAFETY, SRPO, locate_files
from weights.digests import SAMPLE, SAMPLES, hash_sample
from weights.errors import PullError, WrongWeights
from weights.hub import manifest
from weights.hub.listing import RemoteFile, select_files
from weights.manifest import MANIFEST, read_manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """FLUX.1-dev and SRPO at the tiny model's size, under the real names, with what serving does not need beside it."""
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A fresh hub of these files, and the client's settings for this process and those it starts."""
    with serving(Hub(files, {DEV.name: DEV.revision, SAFETY.name: SAFETY.revision})) as server:
        home = tmp_path / "home"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


Pull = Callable[..., tuple[int, str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def pull(hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]) -> Pull:
    """`srpo weights pull` in this process: the exit code, and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code = srpo(["weights", "pull", *arguments, "--models-dir", str(models)])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return run


IN_SMALL_CHUNKS = """
import sys
import huggingface_hub.constants
from server.__main__ import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1024  # it is 10 MiB, more than any file here
sys.exit(main(["weights", *sys.argv[1:]]))
"""


def started(models: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", IN_SMALL_CHUNKS, "pull", *arguments, "--models-dir", str(models)]


def in_place(models: Path) -> set[str]:
    """The path of every file that serving would find."""
    found = (file.relative_to(models) for file in models.rglob("*") if file.is_file())
    return {file.as_posix() for file in found if weights.hub.pull.INCOMING not in file.parts}


def assert_true(models: Path, hub: Hub) -> None:
    """What is in place is what the hub has, to the byte."""
    truth = hub.contents()
    for path in in_place(models):
        assert path.endswith(MANIFEST) or sha256((models / path).read_bytes()) in truth, path


def downloads(hub: Hub) -> list[str]:
    return [path for method, path, _ in hub.requests if method == "GET" and "/api/" not in path]


def pulled_revision(folder: Path) -> str | None:
    written = read_manifest(folder)
    return None if written is None else written.revision


def test_a_pull_brings_what_serving_needs_and_a_manifest(pull: Pull, hub: Hub, files: Any, models: Path) -> None:
    code, said = pull("flux/srpo", "--accept-license")
    assert code == 0, said
    useless = {"flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "text_encoder/pytorch_model.bin", "README.md"}
    dev = {path for path in files[DEV.name] if path not in useless and not path.startswith("transformer/")}
    expected = {f"FLUX.1-dev/{path}" for path in {*dev, "transformer/config.json", MANIFEST}}
    assert in_place(models) == expected | {f"SRPO/{SRPO_FILE}", f"SRPO/{MANIFEST}"}
    assert_true(models, hub)
    assert locate_files(CHECKPOINTS["flux/srpo"], models).transformer
    written = read_manifest(models / "SRPO")
    assert written is not None
    assert (written.repository, written.revision) == (SRPO.name, COMMIT)
    assert written.files[SRPO_FILE].sha256 == sha256(files[SRPO.name][SRPO_FILE])
    assert pulled_revision(models / "FLUX.1-dev") == DEV.revision
    assert "academic use only" in said.lower()
    assert "2(e)" in said
    hub.requests.clear()
    assert pull("flux/srpo", "--accept-license")[0] == 0
    assert downloads(hub) == []


def test_without_accepting_the_licences_nothing_is_asked_of_the_hub(pull: Pull, hub: Hub, models: Path) -> None:
    code, said = pull("flux/srpo")
    assert code == 2
    assert "--accept-license" in said
    assert "academic use only" in said.lower()
    assert hub.requests == []
    assert pull("safety")[0] == 0  # Apache-2.0 asks for no agreement
    assert in_place(models) == {f"safety/{name}" for name in (*SAFETY.files, MANIFEST)}


def test_a_pull_that_was_killed_goes_on_where_it_was(hub: Hub, models: Path) -> None:
    hub.stall_after = 9_000
    process = subprocess.Popen(started(models, "flux/srpo", "--accept-license"), cwd=ROOT, stderr=subprocess.DEVNULL)
    partials = lambda: [file for file in models.rglob("*.partial") if file.stat().st_size]  # noqa: E731
    try:
        deadline = time.monotonic() + 120
        while not (hub.stalled.is_set() and partials()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (partial,) = partials()
    begun = partial.stat().st_size
    assert 0 < begun <= 9_000
    assert in_place(models) == set()
    hub.stall_after = None
    hub.released.set()
    hub.requests.clear()
    ended = subprocess.run(
        started(models, "flux/srpo", "--accept-license"), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert f"bytes={begun}-" in [span for _, _, span in hub.requests]
    assert_true(models, hub)
    assert locate_files(CHECKPOINTS["flux/srpo"], models)


def test_a_flipped_byte_is_never_put_in_place(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    data = files[SRPO.name][SRPO_FILE]
    hub.served[sha256(data)] = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
    code, said = pull("flux/srpo", "--accept-license")
    assert code == 1
    assert SRPO_FILE in said
    assert sha256(data) in said
    assert sha256(hub.served[sha256(data)]) in said
    assert not any(path.startswith("SRPO") for path in in_place(models))
    hub.served.clear()
    assert pull("flux/srpo", "--accept-license")[0] == 0
    assert_true(models, hub)


def test_a_file_that_ends_too_early_is_gone_on_with(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    data = files[SRPO.name][SRPO_FILE]
    hub.once[sha256(data)] = data[:-100]
    assert pull("flux/srpo", "--accept-license")[0] == 0
    assert f"bytes={len(data) - 100}-" in [span for _, _, span in hub.requests]
    assert_true(models, hub)


def test_a_page_in_the_place_of_a_file_is_forgotten(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    """As a proxy sends it that wants somebody to log in."""
    hub.once[sha256(files[SRPO.name][SRPO_FILE])] = b"<html>Log in"
    assert pull("flux/srpo", "--accept-license")[0] == 0
    assert_true(models, hub)


def test_a_truncated_file_is_named_and_never_put_in_place(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    data = files[SRPO.name][SRPO_FILE]
    hub.served[sha256(data)] = data[:-100]
    code, said = pull("flux/srpo", "--accept-license")
    assert code == 1
    assert SRPO_FILE in said
    assert "truncated" in said
    assert not any(path.startswith("SRPO") for path in in_place(models))


@pytest.mark.parametrize(
    ("token", "expected"),
    [(None, "log in and click 'Agree and access repository'"), ("hf_stranger", "your account has no access")],
)
def test_a_gated_repository_says_what_to_click(
    pull: Pull, hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, expected: str
) -> None:
    hub.gated.add(DEV.name)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, said = pull("flux/srpo", "--accept-license")
    assert code == 1
    assert expected in said
    assert f"{DEV.name}: LICENSE.md" in said
    assert f"https://huggingface.co/{DEV.name}" in said
    assert in_place(models) == set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull("flux/srpo", "--accept-license")[0] == 0


def test_a_disk_without_room_is_an_error_before_any_download(
    pull: Pull, hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = weights.hub.pull.shutil.disk_usage
    monkeypatch.setattr(weights.hub.pull.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    code, said = pull("flux/srpo", "--accept-license")
    assert code == 1
    assert str(models) in said
    assert "are needed" in said
    assert ".safetensors" in said
    assert downloads(hub) == []


def test_a_disk_that_fills_up_keeps_what_there_is(hub: Hub, models: Path, files: Any) -> None:
    """A limit on the size of files stands for the full disk, where no file system can be mounted: the same road."""
    largest = max(len(data) for path, data in files[DEV.name].items() if data is not BIG and "transformer" not in path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    ended = subprocess.run(
        started(models, "flux/srpo", "--accept-license"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=limit,
    )
    said = " ".join(ended.stderr.split())
    assert ended.returncode == 1, said
    assert ".safetensors: the disk is full" in said
    assert in_place(models) == set()


@pytest.mark.skipif(not permitted(), reason="this machine does not permit `unshare -rn` (user namespaces)")
def test_a_full_tmpfs_is_an_error_that_names_the_file(hub: Hub, models: Path, tmp_path: Path) -> None:
    """A mirror folder on the disk, a models folder on a tmpfs that is smaller by the time it is written."""
    models.mkdir()
    full = (
        "import sys; import weights.hub.pull as p; p.check_disk_space = lambda *_: None; "
        "from server.__main__ import main; sys.exit(main(['weights', *sys.argv[1:]]))"
    )
    pull_all(hub, tmp_path / "mirror")
    inside = [sys.executable, "-c", full, "pull", "flux/srpo", "--accept-license", "--offline"]
    inside += ["--from", str(tmp_path / "mirror"), "--models-dir", str(models)]
    mount = f'mount -t tmpfs -o size=64k none "{models}" && exec "$@"'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", *inside], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    said = " ".join(ended.stderr.split())
    if "permission denied" in said or "must be superuser" in said:
        pytest.skip("this machine does not permit a tmpfs in a namespace")
    assert ended.returncode == 1, said
    assert re.search(r"text_encoder\S*/\S+: the disk is full", said), said


def pull_all(hub: Hub, models: Path) -> None:
    assert srpo(["weights", "pull", "flux/srpo", "--accept-license", "--models-dir", str(models)]) == 0
    hub.requests.clear()


def test_offline_takes_a_mirror_or_the_cache_and_asks_nobody(
    pull: Pull, hub: Hub, models: Path, tmp_path: Path, files: Any
) -> None:
    pull_all(hub, tmp_path / "mirror")
    code, said = pull("flux/srpo", "--accept-license", "--offline", "--from", str(tmp_path / "mirror"))
    assert code == 0, said
    assert hub.requests == []
    assert in_place(models) == in_place(tmp_path / "mirror")
    code, said = pull("safety", "--offline")
    assert code == 1
    assert SAFETY.name in said
    fill_cache(Path(constants.HF_HUB_CACHE), SAFETY.name, SAFETY.revision, files[SAFETY.name])
    assert pull("safety", "--offline")[0] == 0
    assert hub.requests == []
    assert_true(models, hub)


def fill_cache(cache: Path, name: str, commit: str, contents: dict[str, bytes]) -> None:
    """The hub client's cache as it lays files out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for path, data in contents.items():
        blob = folder / "blobs" / (sha256(data) if path.endswith(".safetensors") else git_id(data))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = folder / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_filled_cache_serves_and_the_hub_replaces_a_spoilt_one(
    pull: Pull, hub: Hub, models: Path, files: Any
) -> None:
    fill_cache(Path(constants.HF_HUB_CACHE), SAFETY.name, SAFETY.revision, files[SAFETY.name])
    assert pull("safety")[0] == 0
    assert downloads(hub) == []
    (models / "safety" / "model.safetensors").unlink()
    for blob in Path(constants.HF_HUB_CACHE).rglob(sha256(files[SAFETY.name]["model.safetensors"])):
        blob.write_bytes(b"t" * 99)
    code, said = pull("safety", "--offline")
    assert code == 1
    assert "model.safetensors: expected sha256" in said
    assert "safety/model.safetensors" not in in_place(models)
    assert pull("safety")[0] == 0
    assert len([path for path in downloads(hub) if "/resolve/" in path]) == 1
    assert_true(models, hub)


def test_a_hub_that_cannot_resume_sends_the_file_once(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    data = files[SAFETY.name]["model.safetensors"]
    partial = models / weights.hub.pull.INCOMING / "safety" / f"model.safetensors.{sha256(data)[:12]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:40])
    hub.resumes = False
    assert pull("safety")[0] == 0
    assert downloads(hub).count(f"/store/{sha256(data)}") == 1
    assert_true(models, hub)


@pytest.mark.parametrize("path", ["tokenizer/../../../evil", "/LICENSE", "../LICENSE"])
def test_a_path_that_leads_out_of_the_folder_is_refused(path: str) -> None:
    files = [RemoteFile(name, 1, "0" * 40) for name in (*SAFETY.files, path)]
    with pytest.raises(PullError, match="leads out of the folder"):
        select_files(SAFETY, files, "a mirror")


def test_a_changed_file_is_pulled_again_and_no_other_one(pull: Pull, hub: Hub, models: Path, files: Any) -> None:
    assert pull("safety")[0] == 0
    file = models / "safety" / "model.safetensors"
    file.write_bytes(b"s" * 98 + b"t")
    hub.requests.clear()
    assert pull("safety")[0] == 0
    stored = sha256(files[SAFETY.name]["model.safetensors"])
    resolved = f"/{SAFETY.name}/resolve/{SAFETY.revision}/model.safetensors"
    assert set(downloads(hub)) <= {resolved, f"/store/{stored}"}
    assert downloads(hub)[-1] == f"/store/{stored}"
    assert list(manifest.find_problems(models / "safety")) == []
    assert_true(models, hub)


def test_the_hub_clients_own_road_brings_the_same(pull: Pull, hub: Hub, models: Path) -> None:
    assert pull("safety", "--fast")[0] == 0
    assert in_place(models) == {f"safety/{name}" for name in (*SAFETY.files, MANIFEST)}
    assert_true(models, hub)


def test_a_hub_that_is_not_there_and_a_revision_that_is_not_there(pull: Pull, hub: Hub, files: Any) -> None:
    code, said = pull("safety", "--revision", "no-such")
    assert (code, "--revision" in said) == (1, True)
    hub.repositories = {SAFETY.name: {"config.json": b"{}"}}
    code, said = pull("safety")
    assert code == 1
    assert "preprocessor_config.json" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        code, said = pull("safety")
    assert code == 1
    assert "the hub cannot be reached" in said


def test_each_repository_can_be_pinned(pull: Pull, hub: Hub, models: Path, tmp_path: Path) -> None:
    """tencent/SRPO follows `main`: whoever wants the same files again names the commit that the manifest keeps."""
    pin = f"{SRPO.name}={COMMIT}"
    assert pull("flux/srpo", "--accept-license", "--revision", pin)[0] == 0
    asked = [path.removeprefix("/api/models/") for _, path, _ in hub.requests if path.startswith("/api/")]
    assert asked == [f"{DEV.name}/revision/{DEV.revision}", f"{SRPO.name}/revision/{COMMIT}"]
    assert pulled_revision(models / "SRPO") == COMMIT
    other = f"{SRPO.name}={'6' * 40}"
    code, said = pull("flux/srpo", "--accept-license", "--revision", other)
    assert (code, f"{SRPO.name}: not found" in said) == (1, True)
    models.rename(tmp_path / "mirror")
    offline = ["--offline", "--from", str(tmp_path / "mirror"), "--accept-license"]
    assert pull("flux/srpo", *offline, "--revision", pin)[0] == 0
    code, said = pull("flux/srpo", *offline, "--revision", other)
    assert (code, f"has it at {COMMIT}, not at {'6' * 40}" in said) == (1, True)


def test_a_digest_of_the_rows_own_holds_whatever_the_hub_says(hub: Hub, pull: Pull, models: Path, files: Any) -> None:
    """Stable Diffusion's checker has no safetensors file at a fixed commit, but one whose digest is known."""
    hub.repositories = {COMPVIS.name: files[SAFETY.name]}
    published = sha256(files[SAFETY.name]["model.safetensors"])
    code, said = pull("safety-compvis", "--accept-license")
    assert code == 1
    assert f"model.safetensors: expected sha256 {COMPVIS.sha256[0][1]}, got {published}" in said
    assert (downloads(hub), in_place(models)) == ([], set())
    row = replace(COMPVIS, sha256=(("model.safetensors", published),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull_cli, "list_downloads", lambda: {"safety-compvis": (row,), "safety": (SAFETY,)})
        code, said = pull("safety-compvis", "--accept-license")
    assert code == 0
    assert pulled_revision(models / "safety-compvis") == COMMIT
    assert f"SRPO_SAFETY_CHECKER=compvis:{models / 'safety-compvis'}" in said


@pytest.mark.parametrize("revision", [COMMIT, f"some/other={COMMIT}"])
def test_a_pin_says_of_which_repository_it_is(pull: Pull, hub: Hub, revision: str) -> None:
    code, said = pull("flux/srpo", "--accept-license", "--revision", revision)
    assert code == 2
    assert f"say of which repository. Without it: {DEV.name}={DEV.revision}, {SRPO.name}=main" in said
    assert hub.requests == []


def test_verify_names_what_has_changed_since(pull: Pull, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull("safety")[0] == 0
    arguments = ["--models-dir", str(models)]
    assert srpo(["weights", "verify", *arguments]) == 0
    file = models / "safety" / "model.safetensors"
    file.write_bytes(b"s" * 98 + b"t")
    assert srpo(["weights", "verify", "safety", *arguments]) == 1
    assert f"{file}: expected sha256" in capsys.readouterr().out
    file.unlink()
    assert srpo(["weights", "verify", *arguments]) == 1
    assert f"{file}: missing" in capsys.readouterr().out
    assert srpo(["weights", "verify", "flux/srpo", *arguments]) == 1


OFFLINE = """
import json, sys
from pathlib import Path
from support.server import running
with running(Path(sys.argv[1]), model="flux/srpo", devices="cpu", models_dir=sys.argv[2]) as server:
    reply = server.generate(output_format="png", acceleration="none")
    assert reply.status_code == 201, reply.text
    assert "x-served-model" not in reply.headers
print(json.dumps(reply.json()["seed"]))
"""


@pytest.mark.long
@pytest.mark.skipif(not permitted(), reason="this machine does not permit `unshare -rn` (user namespaces)")
def test_the_pulled_folder_serves_where_there_is_no_network(hub: Hub, tmp_path: Path) -> None:
    pull_all(hub, tmp_path / "pulled")
    (tmp_path / "pulled").rename(tmp_path / "carried")
    inside = [*NAMESPACE, sys.executable, "-c", OFFLINE, str(tmp_path / "server"), str(tmp_path / "carried")]
    ended = subprocess.run(inside, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) >= 1


@pytest.mark.parametrize("fault", ["a byte", "the size"])
def test_weights_that_are_not_what_was_pulled_are_not_loaded(pull: Pull, models: Path, fault: str) -> None:
    """A sample has every byte of a small file."""
    assert pull("flux/srpo", "--accept-license")[0] == 0
    located = locate_files(CHECKPOINTS["flux/srpo"], models)
    for whole in (False, True):
        manifest.check_pulled(located, whole)
    file = models / "SRPO" / SRPO_FILE
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content if fault == "a byte" else content + b"\0")
    for whole in (False, True):
        with pytest.raises(WrongWeights, match=re.escape(SRPO_FILE)):
            manifest.check_pulled(located, whole)


def test_what_was_not_pulled_or_is_not_needed_is_taken_as_it_is(pull: Pull, models: Path) -> None:
    """Another program's manifest.json beside a transformer, and a pulled file that its user has deleted."""
    assert pull("flux/srpo", "--accept-license")[0] == 0
    located = locate_files(CHECKPOINTS["flux/srpo"], models)
    assert located.folder is not None
    (located.folder / random.choice([*manifest.read_entries(located.folder)])).unlink()
    (models / "mine").mkdir()
    (models / "mine" / MANIFEST).write_text('{"name": "an app", "version": 3}')
    manifest.check_pulled(replace(located, transformer=models / "mine" / "mine.safetensors"), whole=True)


def test_a_sample_sees_the_ends_and_every_block_of_a_large_file(tmp_path: Path) -> None:
    file, size = tmp_path / "large", 3 * SAMPLES * SAMPLE + random.randrange(1000)
    file.write_bytes(random.randbytes(size))
    before = hash_sample(file)
    last = size - SAMPLE
    for number in (0, random.randrange(1, SAMPLES - 1), SAMPLES - 1):
        place = last * number // (SAMPLES - 1) + random.randrange(SAMPLE)
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 255]))
            opened.flush()
            assert hash_sample(file) != before
            opened.seek(place)
            opened.write(bytes([byte]))
    assert hash_sample(file) == before
