# Two images of the server, for a CPU and for GPUs: `docker compose build` in deploy/, as docs/operations.md shows. Needs
# BuildKit. Packages come from pip's own index, from those that the build arguments name, or from where the secret
# pip_conf says: no layer keeps it. Nothing here runs as root once it is built, and only /models, /cache and /tmp are
# written to.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# libnuma: vLLM's CPU kernels. g++ (0.4 GB): torch compiles models with it at the start, on GPUs too, and Triton its
# launchers. tini: reaps and forwards signals. Not pinned: Debian's stable release changes for security alone, and a release pins the whole image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*
# Group 0 may write wherever the user may, for platforms that run containers under a number of their own.
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home --shell /usr/sbin/nologin ultrafuser \
    && mkdir /models /cache \
    && chown 10001:0 /models /cache \
    && chmod 2770 /models /cache

FROM base AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
RUN python -m venv /opt/ultrafuser
WORKDIR /src

# The packages are gigabytes and seldom change, our own code megabytes and often: a stage each, so that a change of code
# makes a layer of its own size. torch comes first, since it is what a plain index lacks. pip's .pyc files (0.4 of 2.6 GB)
# stay: without them each process of a start takes twice as long for its imports, and the root is read-only.
FROM build AS packages-cpu
COPY requirements/serve-cpu.lock requirements/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca_bundle \
    torch="$(grep '^torch==' requirements/serve-cpu.lock)" \
    && { /opt/ultrafuser/bin/pip install --no-deps --only-binary :all: "$torch" \
        || { echo "torch's CPU build is on PyTorch's CPU wheel index: name it in PIP_EXTRA_INDEX_URL (deploy/.env)" >&2; exit 1; }; } \
    && /opt/ultrafuser/bin/pip install --no-deps --only-binary :all: --requirement requirements/serve-cpu.lock

FROM build AS packages-cuda
COPY requirements/serve-cuda.lock requirements/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca_bundle \
    /opt/ultrafuser/bin/pip install --no-deps --only-binary :all: --requirement requirements/serve-cuda.lock

FROM build AS project
COPY requirements/serve-cpu.lock requirements/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca_bundle \
    setuptools="$(grep '^setuptools==' requirements/serve-cpu.lock)" \
    && /opt/ultrafuser/bin/pip install --no-deps --only-binary :all: "$setuptools"
COPY pyproject.toml README.md LICENSE ./
COPY gating gating
COPY server server
COPY ultrafuser ultrafuser
RUN /opt/ultrafuser/bin/pip install --no-deps --no-build-isolation --no-index --prefix /project .
COPY --chmod=0755 deploy/entrypoint.sh /project/bin/entrypoint
COPY --chmod=0755 deploy/healthcheck.py /project/bin/healthcheck

FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="UltraFuser" \
      org.opencontainers.image.description="Several specialised language models served as one, fused token by token" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# /models: weights, may be shared by replicas. /cache: compiled code, which is executed: one container's own.
# HF_TOKEN_PATH names a file, which only exists if a secret is mounted there.
# hadolint ignore=DL3064
ENV PATH=/opt/ultrafuser/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    HF_HOME=/models/huggingface \
    HF_TOKEN_PATH=/run/secrets/hf_token \
    ULTRAFUSER_CACHE=/models/ultrafuser \
    ULTRAFUSER_HOST=0.0.0.0 \
    ULTRAFUSER_PORT=8000 \
    ULTRAFUSER_SHUTDOWN_TIMEOUT=30
USER 10001:0
WORKDIR /tmp
VOLUME ["/models", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: who restarts what is unhealthy must not restart a server that is only ending.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --start-interval=5s --retries=3 CMD ["healthcheck", "/health"]
ENTRYPOINT ["/usr/bin/tini", "--", "entrypoint"]

FROM runtime AS cpu
COPY --from=packages-cpu /opt/ultrafuser /opt/ultrafuser
COPY --from=project /project /opt/ultrafuser

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/ultrafuser /opt/ultrafuser
COPY --from=project /project /opt/ultrafuser
