# The image server in a container.
#
#   docker build -t srpo .
#   docker run --gpus all --init --read-only --tmpfs /tmp --stop-timeout 70 -p 127.0.0.1:8000:8000 \
#     -v srpo-models:/models -v srpo-data:/data \
#     -e SRPO_API_KEYS=CHANGE-ME -e SRPO_PUBLIC_URL=http://localhost:8000 srpo
#
# docs/operations.md has more: weights, keys, TLS, the log, several cards.
#
# Keys       A container listens beyond loopback, so `serve` refuses to start without -e SRPO_API_KEYS=... (or
#            SRPO_API_KEYS_FILE; `docker run --rm srpo keys` makes a key), or -e SRPO_ALLOW_NO_KEYS=1 said on purpose.
# Addresses  Image URLs begin with SRPO_PUBLIC_URL, the address as clients see it; without it with the container's own,
#            which other machines cannot reach.
# Port       Set SRPO_PORT rather than --port: the health check reads the variable. The server speaks HTTP: publish it on
#            other addresses than 127.0.0.1 only where no stranger can listen, else put TLS before it.
# Volumes    /models is read (mount it :ro if you like), /data is written. A host folder must belong to uid 10001.
# Read-only  The root file system is never written: home and caches are below /data, temporary files in /tmp.
# Stopping   SIGTERM lets requests in flight finish (SRPO_SHUTDOWN_GRACE, 60 s); give the engine 10 s more than that.
#            --init reaps what a killed worker leaves behind, and stops the server during its first second as well.
# CUDA       comes with PyPI's torch wheel: the host needs NVIDIA's driver and container toolkit only. For a machine
#            without a GPU, a much smaller image:
#              docker build --build-arg INSTALL_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu" .
#            and `docker run` without --gpus.
# Ray        is left out, since one machine needs none: docker build -t srpo:cluster --build-arg EXTRAS=ray .
#
# `make image-test` builds this very file with buildah, which needs no daemon and no registry, and checks the result.

# Debian with `python`, `pip` and Python's headers, from which Triton and Inductor build modules while the server runs.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# Options for every step that asks pip for packages: an index, find-links, ...
ARG INSTALL_OPTIONS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /opt/srpo

# Dependencies, and those of the extras `fp8`, `otel`, `postgres` and `s3`: nothing below reruns or reships them when
# only code changes. Each file is held against its hash. torch, and the CUDA libraries that it brings, have none, since the same
# version differs from index to index.
COPY constraints.txt hashes.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/srpo/bin/python install ${INSTALL_OPTIONS} --require-hashes --no-deps -r hashes.txt \
    && pip --python /opt/srpo/bin/python install ${INSTALL_OPTIONS} -c constraints.txt torch \
    && pip --python /opt/srpo/bin/python check

# More extras, by name: EXTRAS="ray c2pa". hashes.txt does not know them, so they are pinned by version only, as torch is.
ARG EXTRAS=""
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${EXTRAS}" ]; then \
      python -c 'import sys, tomllib; known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*(need for name in sys.argv[1:] for need in known[name]), sep="\n")' ${EXTRAS} > extras.txt \
      && pip --python /opt/srpo/bin/python install ${INSTALL_OPTIONS} -c constraints.txt -r extras.txt \
      && pip --python /opt/srpo/bin/python check; \
    fi

# The project's wheel, installed beside the environment instead of into it, so that it can be a layer of its own.
COPY README.md LICENSE ./
COPY server server/
COPY pipelines pipelines/
COPY weights weights/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel ${INSTALL_OPTIONS} --no-deps --wheel-dir /dist . \
    && pip --python /opt/srpo/bin/python install --no-deps --no-index --root /code /dist/*.whl

FROM ${BASE}
ARG EXTRAS=""
# torch.compile needs a C compiler at run time: Triton builds its driver module with it, Inductor its code for the CPU
# (in C++). Without one the server would leave its compiled optimizations out. KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ $(case " ${EXTRAS} " in *" ray "*) echo wget;; esac) \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 srpo \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin srpo \
    && install -d -o 10001 -g 10001 /models /data
COPY --from=build /opt/srpo /opt/srpo
COPY --from=build /code/opt/srpo /opt/srpo
ENV PATH=/opt/srpo/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    XDG_CACHE_HOME=/data/cache \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor \
    TRITON_CACHE_DIR=/data/cache/triton \
    CUDA_CACHE_PATH=/data/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SRPO_HOST=0.0.0.0 \
    SRPO_PORT=8000 \
    SRPO_DATA_DIR=/data \
    SRPO_MODELS_DIR=/models
VOLUME ["/models", "/data"]
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
# Real weights take minutes to load: failures do not count until start-period is over, the first success ends it.
# The proxies that an engine may inject into the environment are left aside.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"SRPO_PORT\"]}/ready', timeout=4)"]
ENTRYPOINT ["srpo"]
CMD ["serve"]
# Given by `make image`. They come last, since they change with each build.
ARG VERSION="" REVISION="" CREATED="" SOURCE=""
LABEL org.opencontainers.image.title="srpo" \
      org.opencontainers.image.description="A self-hosted FLUX image server: the hosted flux/srpo API on your own GPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
