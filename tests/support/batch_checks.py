"""What `make ray ARGS=--all` tries of batches: that they are whole whatever dies, and that the driver stays small."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import obstore
from support.buckets import S3Service
from support.cluster_site import TESTS, descendants, title
from support.waiting import LIMIT, within

LINES, FAILING = 60, 30
ENGINE = "ray::OfflineActor"
MORE = 32  # MiB that ten times as many lines may take


class Run:
    """`srpo generate --ray` into a bucket, with engines that do what the prompt says: 0.2 s a picture."""

    def __init__(self, folder: Path, s3: S3Service, bucket: str, engines: int) -> None:
        self._s3, self._bucket = s3, bucket
        file = folder / "requests.jsonl"
        shared = {"num_inference_steps": 4, "image_size": "square", "output_format": "png"}
        prompts = ["raise" if number == FAILING else "slow" for number in range(1, LINES + 1)]
        file.write_text("".join(json.dumps(shared | {"prompt": prompt}) + "\n" for prompt in prompts))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SRPO_", "RAY_"))}
        env = clean | {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "SRPO_STORE_ENDPOINT": s3.endpoint,
            "SRPO_MODEL": "tiny",
            "SRPO_SAFETY_CHECKER": "none",
        }
        flags = ["--ray", "--engines", str(engines), "--jsonl", str(file), "-o", bucket]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.ray_batch", "draw", *flags],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, int, str]:
        """The exit code, how many lines were drawn now, and what it said besides."""
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, len(out.splitlines()), err

    def wait_pictures(self, count: int) -> None:
        assert within(LIMIT, lambda: len(pictures(self._s3, self._bucket)) >= count)

    def kill_engine(self) -> None:
        os.kill(next(pid for pid in descendants(self.process.pid) if title(pid).startswith(ENGINE)), signal.SIGKILL)

    def kill(self) -> None:
        family = descendants(self.process.pid)
        self.process.kill()
        self.process.communicate()
        assert within(LIMIT, lambda: not any(title(pid) for pid in family))


def pictures(s3: S3Service, bucket: str) -> list[str]:
    return [name for name in s3.keys(bucket) if name.endswith(".png")]


def digests(s3: S3Service, bucket: str) -> dict[str, str]:
    handle = s3._handle(bucket)
    return {name: hashlib.sha256(obstore.get(handle, name).bytes()).hexdigest() for name in pictures(s3, bucket)}


def check_batch(folder: Path, s3: S3Service) -> list[str]:
    """An engine is killed, then all of it; then the same command ends it, as one engine without a fault does."""
    folder.mkdir()
    quiet, disturbed = s3.create_bucket(), s3.create_bucket()
    bad = []
    code, drawn, said = Run(folder, s3, quiet, 1).finish()
    if (code, drawn) != (1, LINES - 1):
        bad.append(f"without a fault: {code}, {drawn} drawn: {said}")
    first = Run(folder, s3, disturbed, 2)
    first.wait_pictures(6)
    first.kill_engine()
    first.wait_pictures(30)
    first.kill()
    code, drawn, said = Run(folder, s3, disturbed, 2).finish()
    if code != 1 or not 0 < drawn < LINES - 1:
        bad.append(f"continued: {code}, {drawn} drawn: {said}")
    if digests(s3, disturbed) != digests(s3, quiet) or len(pictures(s3, quiet)) != LINES - 1:
        bad.append(f"{len(pictures(s3, disturbed))} pictures, or other ones than without a fault")
    failures = bytes(obstore.get(s3._handle(disturbed), "failures.jsonl").bytes()).splitlines()
    if [json.loads(line)["line"] for line in failures] != [FAILING]:
        bad.append(f"failures: {failures}")
    return bad


def check_memory() -> list[str]:
    """The most that the driver needs for ten thousand lines and for a hundred thousand."""
    env = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    peaks = []
    for count in (10_000, 100_000):
        command = [sys.executable, "-m", "support.ray_batch", "memory", str(count)]
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3 * LIMIT, check=True)
        drawn, peak = map(int, ended.stdout.split())
        if drawn != count:
            return [f"{drawn} of {count} lines were drawn"]
        peaks.append(peak)
    print(f"a batch's driver: {peaks[0]} MiB for 10,000 lines, {peaks[1]} MiB for 100,000", flush=True)
    return [f"ten times as many lines took {peaks[1] - peaks[0]} MiB more"] if peaks[1] > peaks[0] + MORE else []
