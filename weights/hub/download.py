"""One file from the hub with the hub's own client, and its errors in words that say what to do.

The client's own cache begins an interrupted file anew, so `fetch` keeps the partial file itself and gives it to the
client's `http_get`, which continues it. `HF_ENDPOINT`, `HF_TOKEN` and proxies are the client's business.
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights.checkpoints import Repository
from weights.errors import FileMismatch, PullError
from weights.hub.listing import Wanted
from weights.progress import Advance

TOKENS = "https://huggingface.co/settings/tokens"


class Counted(io.FileIO):
    """A partial file to append to, which tells how it grows (and shrinks, when a server cannot continue it)."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path, "ab")
        self._advance = advance
        self._advance(self.tell())

    def write(self, data: Any) -> int:
        """All of it: a full disk takes a part first, and is an error only at the next write."""
        written = 0
        while written < len(data):
            count = super().write(memoryview(data)[written:])
            self._advance(count)
            written += count
        return written

    def truncate(self, size: int | None = None) -> int:
        before = self.seek(0, io.SEEK_END) if size is None else os.fstat(self.fileno()).st_size
        left = super().truncate(size)
        self._advance(left - before)
        return left


def fetch(repository: Repository, wanted: Wanted, commit: str, partial: Path, advance: Advance) -> None:
    """Over plain HTTP, continued from what is there of it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not re-exported

    url = hf_hub_url(repository.name, wanted.path, revision=commit)
    offered = get_hf_file_metadata(url)
    if offered.etag and len(offered.etag) == len(wanted.digest) and offered.etag != wanted.digest:
        raise FileMismatch(wanted.path, "the etag", wanted.digest, offered.etag)
    if offered.size is not None and offered.size != wanted.size:
        raise FileMismatch(wanted.path, "bytes:", wanted.size, offered.size)
    with Counted(partial, advance) as file:
        http_get(
            url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=wanted.size, tqdm_class=Silent
        )
        os.fsync(file.fileno())


def fast(repository: Repository, wanted: Wanted, commit: str, partial: Path, advance: Advance) -> None:
    """With the client's own road, which takes xet where hub and file have it: parallel, but an interrupted file begins
    anew."""
    from huggingface_hub import hf_hub_download

    folder = partial.with_name(f"{partial.name}.fast")
    file = hf_hub_download(repository.name, wanted.path, revision=commit, local_dir=folder, tqdm_class=Silent)
    Path(file).replace(partial)
    shutil.rmtree(folder)
    advance(wanted.size)


class Silent:
    """The client's progress bar, unseen: ours counts the bytes that reach the disk."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return self.update


@contextmanager
def explained(repository: Repository, path: str = "") -> Iterator[None]:
    """What the hub or the network refuses, as `PullError` that names the file and the way out."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    what = f"{repository.name}: {path}" if path else repository.name
    try:
        yield
    except HfHubHTTPError as error:
        raise PullError(f"{what}: {refusal(repository, error.response.status_code, error)}") from error
    except httpx2.HTTPError as error:
        raise PullError(
            f"{what}: the hub cannot be reached ({type(error).__name__}: {error}). Pull again: it goes on from here. "
            "Behind a proxy set HTTPS_PROXY, for another hub HF_ENDPOINT; without a network use --offline"
        ) from error
    except OSError as error:
        if "onsistency check failed" not in str(error):
            raise
        raise PullError(f"{what}: the file came truncated ({str(error).splitlines()[0]}). Pull again") from error


def refusal(repository: Repository, status: int, error: Exception) -> str:
    """What a status of the hub's means, and what to do."""
    page = f"https://huggingface.co/{repository.name}"
    match status:
        case 401 if "Invalid credentials" in str(error):
            return f"the hub does not know your token. Make one with read access at {TOKENS}; then `hf auth login`"
        case 401:
            return (
                f"the hub asks who you are. Open {page}, log in and click 'Agree and access repository'; make a token "
                f"with read access at {TOKENS}; then `hf auth login` (or set HF_TOKEN), and pull again"
            )
        case 403:
            return (
                f"your account has no access. Open {page} while logged in and click 'Agree and access repository'; "
                "a fine-grained token also needs 'Read access to contents of all public gated repos you can access'"
            )
        case 404:
            return f"not found. See {page} for the revisions it has, and --revision"
        case 416:
            return "the hub cannot continue the partial file. Remove the folder .incoming, and pull again"
    return f"the hub answered {status}. Pull again later: it goes on from here"
