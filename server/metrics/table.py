"""Every metric: its name, kind, labels and meaning. The table of docs/metrics.md is generated from here.

Names and units follow Prometheus' rules (https://prometheus.io/docs/practices/naming/). Where vLLM and vLLM-Omni
measure the same thing, the rest of the name is theirs: `num_requests_waiting`, `e2e_request_latency_seconds`. Sizes of
images are classes of megapixels (2^20 pixels), named by their upper bound.
"""

from dataclasses import dataclass
from typing import Literal

LATENCY = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)  # seconds: a request
STAGE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)  # seconds: a part of one
STEP = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
MEGAPIXELS = (0.25, 0.5, 1.0, 1.5, 2.25)  # 512x512 is 0.25, 1024x1024 is 1, 1536x1536 is 2.25


@dataclass(frozen=True, slots=True)
class Metric:
    """A row: one metric. `help` says what its labels mean, where their names do not; `buckets` are upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


EVENTS: tuple[Metric, ...] = (  # counted where they happen
    (
        HTTP_REQUESTS := Metric(
            "srpo_http_requests_total",
            "counter",
            "HTTP requests answered, by route template, method, status and `error.code` (empty: no error).",
            ("route", "method", "status", "code"),
        )
    ),
    (
        REQUESTS_REFUSED := Metric(
            "srpo_requests_refused_total",
            "counter",
            "Requests refused before any work, by `error.code`.",
            ("reason",),
        )
    ),
    (
        REQUESTS_ADMITTED := Metric(
            "srpo_requests_admitted_total",
            "counter",
            "Requests for images that were admitted to the queue.",
        )
    ),
    (
        REQUESTS_FINISHED := Metric(
            "srpo_requests_finished_total",
            "counter",
            "Admitted requests that ended: succeeded, cancelled (the client left or asked for it) or failed, with "
            "`error.code`.",
            ("outcome", "code"),
        )
    ),
    (
        E2E_LATENCY := Metric(
            "srpo_e2e_request_latency_seconds",
            "histogram",
            "From a request's admission to its finished reply, waiting included; of those that succeeded.",
            ("megapixels", "acceleration"),
            LATENCY,
        )
    ),
    (
        QUEUE_WAIT := Metric(
            "srpo_request_queue_wait_seconds",
            "histogram",
            "From a request's admission to its first work on a device; of those that were drawn.",
            buckets=(0.01, *LATENCY),
        )
    ),
    (
        STAGE_SECONDS := Metric(
            "srpo_request_stage_seconds",
            "histogram",
            "What a request's stage took for all its images: text, denoise and decode on the device, then safety, "
            "encode and store.",
            ("stage",),
            STAGE,
        )
    ),
    (
        STEP_LATENCY := Metric(
            "srpo_denoise_step_latency_seconds",
            "histogram",
            "One forward pass of the transformer; `step` is computed or skipped (by the acceleration preset).",
            ("megapixels", "acceleration", "step"),
            STEP,
        )
    ),
    (
        STEPS := Metric(
            "srpo_denoise_steps_total",
            "counter",
            "Steps of single images, computed or skipped by the acceleration preset.",
            ("acceleration", "step"),
        )
    ),
    (
        BATCH_SIZE := Metric(
            "srpo_batch_size",
            "histogram",
            "Images that share a forward pass.",
            buckets=(1, 2, 3, 4, 6, 8, 16),
        )
    ),
    (
        IMAGES := Metric(
            "srpo_images_total",
            "counter",
            "Images delivered, flagged ones included.",
            ("megapixels", "acceleration"),
        )
    ),
    (IMAGE_PIXELS := Metric("srpo_image_pixels_total", "counter", "Pixels of the images delivered.")),
    (
        KEY_REQUESTS := Metric(
            "srpo_key_requests_total",
            "counter",
            "Requests of a key that ended with images; `key` is its id, settings for those of the settings, or none.",
            ("key",),
        )
    ),
    (KEY_IMAGES := Metric("srpo_key_images_total", "counter", "Images of a key.", ("key",))),
    (KEY_PIXELS := Metric("srpo_key_image_pixels_total", "counter", "Pixels of a key's images.", ("key",))),
    (
        KEY_DEVICE_SECONDS := Metric(
            "srpo_key_device_seconds_total", "counter", "Seconds that devices worked for a key.", ("key",)
        )
    ),
    (KEY_CREDITS := Metric("srpo_key_credits_total", "counter", "Credits of a key, as replies tell them.", ("key",))),
    (
        IMAGES_CHECKED := Metric(
            "srpo_images_checked_total",
            "counter",
            "Images that the safety checker looked at, flagged or not.",
            ("flagged",),
        )
    ),
    (
        WORKER_LOADS := Metric(
            "srpo_worker_load_seconds",
            "histogram",
            "From a worker's start until it is ready: at the server's start, after a death, or to wake it.",
            ("cause",),
            (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
        )
    ),
)
STATE: tuple[Metric, ...] = (  # read when Prometheus asks
    (BUILD_INFO := Metric("srpo_build_info", "gauge", "Always 1; the label says which version runs.", ("version",))),
    (
        ENGINE_INFO := Metric(
            "srpo_engine_info",
            "gauge",
            "Always 1; the labels say what is loaded, and where.",
            ("model", "device", "dtype", "placement", "optimizations", "fingerprint"),
        )
    ),
    (READY := Metric("srpo_ready", "gauge", "1 where `/ready` answers 200.")),
    (POOL_STATE := Metric("srpo_pool_state", "gauge", "1 for the state that `/health` names, else 0.", ("state",))),
    (RUNNING := Metric("srpo_num_requests_running", "gauge", "Requests that are being drawn.")),
    (WAITING := Metric("srpo_num_requests_waiting", "gauge", "Requests that wait for a device.")),
    (CAPACITY := Metric("srpo_requests_capacity", "gauge", "Requests that may run and wait together.")),
    (
        QUEUE_SECONDS := Metric(
            "srpo_predicted_queue_seconds", "gauge", "Predicted wait of a request that would arrive now, in seconds."
        )
    ),
    (
        WORKER_STATE := Metric(
            "srpo_worker_state",
            "gauge",
            "1 for the state that a worker is in, else 0; workers are numbered as in SRPO_DEVICES.",
            ("worker", "device", "state"),
        )
    ),
    (
        WORKER_RESTARTS := Metric(
            "srpo_worker_restarts_total", "counter", "Workers that died, each followed by another one.", ("worker",)
        )
    ),
    (
        HEARTBEAT_AGE := Metric(
            "srpo_worker_heartbeat_age_seconds", "gauge", "Seconds since the worker was last heard of.", ("worker",)
        )
    ),
    (
        WORKER_MEMORY := Metric(
            "srpo_worker_resident_memory_bytes", "gauge", "Resident memory of a worker's process.", ("worker",)
        )
    ),
    (
        DEVICE_MEMORY := Metric(
            "srpo_device_memory_bytes",
            "gauge",
            "Memory of the device as the worker's allocator counts it: allocated (in use), reserved, and peak (most in "
            "use so far).",
            ("worker", "kind"),
        )
    ),
    (
        CARD_SIZE := Metric(
            "srpo_card_memory_size_bytes", "gauge", "Memory of an NVIDIA card, as its driver tells.", ("card",)
        )
    ),
    (
        CARD_FREE := Metric(
            "srpo_card_memory_free_bytes",
            "gauge",
            "Memory of the card that no process uses, of this server or of others.",
            ("card",),
        )
    ),
    (
        CACHE_HITS := Metric(
            "srpo_cache_hits_total",
            "counter",
            "Texts and rotary embeddings that a worker had kept.",
            ("worker", "cache"),
        )
    ),
    (
        CACHE_MISSES := Metric(
            "srpo_cache_misses_total",
            "counter",
            "Texts and rotary embeddings that a worker had to compute.",
            ("worker", "cache"),
        )
    ),
    (JOBS := Metric("srpo_jobs", "gauge", "Durable jobs in the database, by state.", ("state",))),
    (
        JOBS_UNWRITTEN := Metric(
            "srpo_jobs_unwritten", "gauge", "Jobs that are over, where the database could not be written yet."
        )
    ),
    (STORE_BYTES := Metric("srpo_store_bytes", "gauge", "Bytes of the stored images.")),
    (STORE_CAP := Metric("srpo_store_capacity_bytes", "gauge", "Bytes that stored images may take (SRPO_IMAGES_CAP).")),
    (DISK_SIZE := Metric("srpo_disk_size_bytes", "gauge", "Size of the disk with the data folder.")),
    (DISK_FREE := Metric("srpo_disk_free_bytes", "gauge", "What is free on it for this server's user.")),
    (CONSTANT_IMAGES := Metric("srpo_constant_images_total", "counter", "Images all of one colour that were drawn.")),
    (UPLOAD_BYTES := Metric("srpo_upload_bytes", "gauge", "Bytes of bodies in progress, in memory and in files.")),
    (BUSY_THREADS := Metric("srpo_busy_threads", "gauge", "Threads at work, of the pool for one thing.", ("pool",))),
    (
        LOOP_LAG := Metric(
            "srpo_event_loop_lag_seconds", "gauge", "The most by which the event loop was late within the last minute."
        )
    ),
)
METRICS = EVENTS + STATE


def size_class(pixels: int) -> str:
    """The label for an image's size: the upper bound of its class, in megapixels."""
    return f"{next((bound for bound in MEGAPIXELS if pixels <= bound * 2**20), MEGAPIXELS[-1]):g}"
