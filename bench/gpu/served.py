"""The real server on a model of FLUX.1's shapes: loading, its timings, a cancellation and a killed worker."""

import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from bench.gpu.setup import Results, Setup
from bench.start import load_elsewhere, write_model
from bench.support.server_process import GENERATIONS, start_server, worker_pids
from bench.support.sparse_weights import fill_random
from pipelines.engine.base import EngineConfig

WITHOUT_COMPILING = "texts,rotary,modulation,vae_layout"  # a start with an empty compile cache takes minutes
# What needs values so that pictures depend on their seed; all else is zero, and passes on what it gets.
DRAWING: Mapping[str, tuple[str, ...]] = {"transformer": ("x_embedder.weight", "proj_out.weight"), "vae": ()}
ASYNC = {"prefer": "respond-async"}


def measure(setup: Setup) -> Results:
    with tempfile.TemporaryDirectory(dir=setup.folder) as models:
        layers, t5_layers = ((1, 1), 1) if setup.rehearse else ((19, 38), 24)
        folder = Path(models) / "FLUX.1-dev"
        size = write_model(folder, layers, t5_layers)
        for name, tensors in DRAWING.items():
            fill_random(folder / name / "diffusion_pytorch_model.safetensors", tensors)
        device = "meta" if setup.rehearse else str(setup.device)
        config = EngineConfig("flux/dev", models, device, "bfloat16", optimizations=("none",))
        figures = load_elsewhere(config)
        yield "loading, s", figures["seconds"]
        yield "loading, GB/s", size / figures["seconds"] / 1e9
        yield "host's memory, peak of the files", (figures["peak"] - figures["before"]) / size
        flags = ["--models-dir", models, "--optimizations", WITHOUT_COMPILING, "--safety-policy", "never"]
        start = time.perf_counter()
        command = ["tiny"] if setup.rehearse else ["flux/dev", *flags]
        with start_server(*command, log=setup.folder / "server.log") as url:
            yield "ready, s", time.perf_counter() - start
            yield from ask_server(setup, url, "flux/srpo" if setup.rehearse else "flux/dev")


def ask_server(setup: Setup, url: str, model: str) -> Results:
    width, height = setup.sizes[0]
    body: dict[str, Any] = {"model": model, "prompt": "a red apple", "image_size": {"width": width, "height": height}}
    body |= {"num_inference_steps": setup.steps, "acceleration": "none"}
    with httpx.Client(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        reply = post(client, body | {"seed": 1}).json()
        yield "a request, s", time.perf_counter() - start
        yield "its timings, s", {stage: value for stage, value in reply["timings"].items() if stage != "notes"}
        drawn = digest(client, reply)

        job = begin(client, body | {"seed": 2, "num_inference_steps": 50})
        wait_for_step(client, job, 2)
        client.delete(job).raise_for_status()
        short = body | {"seed": 3, "num_inference_steps": 1, "image_size": {"width": 512, "height": 512}}
        reply = post(client, short).json()
        yield "cancelled: the next one begins after, s", reply["timings"]["queue"]

        job = begin(client, body | {"seed": 1})
        wait_for_step(client, job, 2)
        start = time.perf_counter()
        os.kill(worker_pids(url)[0], signal.SIGKILL)
        reply = wait_for_reply(client, job)
        yield "worker killed: drawn after, s", time.perf_counter() - start
        yield "worker killed: the same bytes", digest(client, reply) == drawn
        yield "another seed: other bytes", digest(client, post(client, body | {"seed": 4}).json()) != drawn


def post(client: httpx.Client, body: dict[str, Any], **headers: str) -> httpx.Response:
    """Ask for an image. Raises `RuntimeError` with what the server says against it."""
    reply = client.post(GENERATIONS, json=body, headers=headers)
    if reply.is_error:
        raise RuntimeError(f"{reply.status_code}: {reply.text}")
    return reply


def begin(client: httpx.Client, body: dict[str, Any]) -> str:
    """Accept a job; returns its address."""
    return str(post(client, body, **ASYNC).headers["location"])


def wait_for_step(client: httpx.Client, job: str, step: int) -> None:
    """Until the job has taken as many steps, or has ended."""
    while True:
        state = client.get(job).raise_for_status().json()
        if (state.get("progress") or {}).get("step", 0) >= step or state["status"] not in ("queued", "running"):
            return
        time.sleep(0.01)


def wait_for_reply(client: httpx.Client, job: str) -> dict[str, Any]:
    """The reply of a job that ends. Raises `RuntimeError` where it fails."""
    while True:
        state: dict[str, Any] = client.get(job).raise_for_status().json()
        if state["status"] == "succeeded":
            reply: dict[str, Any] = state["reply"]
            return reply
        if state["status"] not in ("queued", "running"):
            raise RuntimeError(f"the job is {state['status']}: {state.get('error')}")
        time.sleep(0.05)


def digest(client: httpx.Client, reply: dict[str, Any]) -> str:
    """SHA-256 of the reply's first image."""
    return hashlib.sha256(client.get(reply["images"][0]["url"]).raise_for_status().content).hexdigest()
