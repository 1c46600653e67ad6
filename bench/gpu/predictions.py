"""What an audit without a GPU expects of an H100 (and of an H200). Never results."""

from collections.abc import Mapping

PREDICTIONS: Mapping[str, Mapping[str, str]] = {
    "card": {
        "driver": "580 or later for torch's CUDA 13",
        "ceiling bf16, TFLOP/s": "700 to 790",
        "ceiling float8, TFLOP/s": "1200 to 1500",
        "from pinned memory, GB/s": "40 to 55",
        "native attention": "cudnn or flash",
    },
    "tiny": {"the same bytes": "True", "the same fingerprint": "True"},
    "bf16": {
        "step 1440x512, ms": "80 to 93",
        "step 1024x1024, ms": "115 to 133",
        "skipped_step 1440x512, ms": "1.5 to 2",
        "text 1440x512, ms": "20",
        "decode 1440x512, ms": "20 to 30",
        "host's part of a step 1440x512, ms": "under 10",
        "a step waits 1440x512": "False",
        "a step waits 1024x1024": "False",
        "none 1024x1024 to JPEG, s": "3.5 to 3.7 (H200: 3.3 to 3.4; goal 3.3)",
        "regular 1440x512 to JPEG, s": "1.3 to 1.5",
        "high 1440x512 to JPEG, s": "0.98 to 1.05 (H200: 0.90 to 0.95; goal 0.747)",
        "high 1024x1024 to JPEG, s": "1.3 to 1.4 (goal 1.0)",
    },
    "fp8": {
        "step 1440x512, ms": "60 to 68 (regular and high)",
        "regular 1440x512 to JPEG, s": "1.0 to 1.1 (goal 0.95)",
        "high 1440x512 to JPEG, s": "0.75 to 0.80 (H200: 0.72 to 0.78; goal 0.747)",
        "high 1024x1024 to JPEG, s": "1.0 to 1.1 (goal 1.0)",
    },
    "variants": {"512x512 compiled first, ms": "slower than the defaults", "coordinate descent, ms": "1 to 3 % faster"},
    "sizes": {"of 12 sizes eager": "0"},
    "pixels": {"the same bytes": "True", "exact batches 512x512": "none: cuBLAS chooses by the number of rows"},
    "memory": {
        "steps 1536x1536, GiB above the weights": "1.2 to 1.8",
        "decode 1536x1536, GiB above the weights": "3.6",
        "a picture to begin with 1536x1536, GiB above the weights": "2.9",
        "16 jobs 1536x1536, GiB above the weights": "3.0 and steps",
        "after out of memory": "draws",
    },
    "server": {
        "loading, GB/s": "1 to 4",
        "cancelled: the next one begins after, s": "at most one step: 0.1",
        "worker killed: the same bytes": "True",
    },
}
