"""Downloads one file with huggingface_hub, and translates its errors into messages that say what to do.

The client's cache starts an interrupted file again from the beginning, so `download_http` keeps the partial file itself
and passes it to the client's `http_get`, which resumes it. The client reads `HF_ENDPOINT`, `HF_TOKEN` and the proxies.
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
from weights.hub.listing import RemoteFile
from weights.progress import Advance

INCOMPLETE = "onsistency check failed"  # the client's words for a file that ended too early, as behind some proxies
TOKENS = "https://huggingface.co/settings/tokens"


class ProgressFile(io.FileIO):
    """A partial file to append to. It reports the bytes it grows by, negative where a server cannot resume it."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path, "ab")
        self._advance = advance
        self._advance(self.tell())

    def write(self, data: Any) -> int:
        """Write all of `data`: a full disk first accepts a part, and fails only at the next write."""
        written = 0
        while written < len(data):
            count = super().write(memoryview(data)[written:])
            self._advance(count)
            written += count
        return written

    def truncate(self, size: int | None = None) -> int:
        before = os.fstat(self.fileno()).st_size
        left = super().truncate(self.tell() if size is None else size)
        self._advance(left - before)
        return left


def download_http(repository: Repository, file: RemoteFile, commit: str, partial: Path, advance: Advance) -> bool:
    """Download over HTTP to `partial`, from where an earlier attempt stopped. Raises `FileMismatch`, client errors.

    A file that ends too early is resumed up to twice. Returns whether the file was put together from several replies.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not re-exported

    url = hf_hub_url(repository.name, file.path, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag and len(metadata.etag) == len(file.digest) and metadata.etag != file.digest:
        raise FileMismatch(file.path, "the etag", file.digest, metadata.etag)
    if metadata.size is not None and metadata.size != file.size:
        raise FileMismatch(file.path, "bytes:", file.size, metadata.size)
    with ProgressFile(partial, advance) as target:
        resumed = target.tell() > 0
        truncated: OSError | None = None
        for last in (False, False, True):
            try:
                http_get(
                    url,
                    target,
                    resume_size=target.tell(),
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    tqdm_class=NoProgressBar,
                )
                break
            except OSError as error:  # the client's are too
                if last or INCOMPLETE not in str(error) or target.tell() >= file.size:
                    raise truncated or error from None
                truncated = error
        os.fsync(target.fileno())
    return resumed or truncated is not None


def download_fast(repository: Repository, file: RemoteFile, commit: str, partial: Path, advance: Advance) -> bool:
    """Download with the client's own transfer: xet where the hub offers it, so in parallel, but never resumed."""
    from huggingface_hub import hf_hub_download

    folder = partial.with_name(f"{partial.name}.fast")
    downloaded = hf_hub_download(
        repository.name, file.path, revision=commit, local_dir=folder, tqdm_class=NoProgressBar
    )
    Path(downloaded).replace(partial)
    shutil.rmtree(folder)
    advance(file.size)
    return False


class NoProgressBar:
    """Replaces the client's progress bar: ours counts the bytes that reach the disk."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "NoProgressBar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return self.update


@contextmanager
def translate_hub_errors(repository: Repository, path: str = "") -> Iterator[None]:
    """Turn errors of the hub and the network into `PullError`, which names the file and says what to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    what = f"{repository.name}: {path}" if path else repository.name
    try:
        yield
    except HfHubHTTPError as error:
        raise PullError(f"{what}: {explain_status(repository, error.response.status_code, error)}") from error
    except httpx2.HTTPError as error:
        raise PullError(
            f"{what}: the hub cannot be reached ({type(error).__name__}: {error}). Pull again: it goes on from here. "
            "Behind a proxy set HTTPS_PROXY, for another hub HF_ENDPOINT; without a network use --offline"
        ) from error
    except OSError as error:
        if INCOMPLETE not in str(error):
            raise
        raise PullError(f"{what}: the file came truncated ({str(error).splitlines()[0]}). Pull again") from error


def explain_status(repository: Repository, status: int, error: Exception) -> str:
    """What an HTTP status of the hub means, and what to do."""
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
