# Three images from one tree: docker build --target gateway|trainer|engine .
#
#   gateway   no torch; runs the roles gateway (the default), controller and shadow
#   trainer   the same with the trainer's libraries
#   engine    vLLM, ready to load adapters from the artifact store at run time

ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sluice
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY constraints/sluice.txt constraints/
COPY gateway/ gateway/
COPY rollout/ rollout/
COPY trainer/ trainer/

# The data plane's hot path, compiled to C. The compiler reads types, so what is imported is installed
# first; all of that stays behind in this stage.
FROM build AS wheel
RUN apt-get update -qq \
    && apt-get install -qq --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/sluice/bin/pip install -c constraints/sluice.txt . mypy setuptools types-jsonschema
COPY setup.py ./
RUN SLUICE_COMPILE=1 /opt/sluice/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM build AS build-gateway
COPY --from=wheel /wheels/ /wheels/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/sluice/bin/pip install -c constraints/sluice.txt /wheels/*.whl

FROM build AS build-trainer
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/sluice/bin/pip install -c constraints/sluice.txt ".[trainer]"

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/sluice/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SLUICE_CONFIG=/etc/sluice/sluice.toml
# A number as the user lets Kubernetes prove that it is not root.
RUN groupadd --gid 10001 sluice \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin sluice \
    && install -d -o 10001 -g 10001 /etc/sluice /var/lib/sluice /srv/sluice/artifacts
WORKDIR /var/lib/sluice
USER 10001:10001
ENTRYPOINT ["sluice"]

FROM ${VLLM_IMAGE} AS engine
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sluice-engine" \
      org.opencontainers.image.description="vLLM that loads Sluice's adapters at run time" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Idle connections outlive the gateway's pool, so that it is the gateway that closes them.
ENV VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
    VLLM_HTTP_TIMEOUT_KEEP_ALIVE=120 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    HOME=/home/sluice \
    HF_HOME=/models/huggingface \
    VLLM_CACHE_ROOT=/models/vllm
# Adapters are read from the path at which the controller sees them: same mount, same name.
RUN groupadd --gid 10001 sluice \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin sluice \
    && install -d -o 10001 -g 10001 /models /srv/sluice/artifacts
VOLUME ["/models"]
EXPOSE 8100
USER 10001:10001
# Loading weights takes minutes, and a server that loads them is not unhealthy.
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8100/health', timeout=4)"]
# The base comes first: docker run sluice-engine MODEL --served-model-name NAME
ENTRYPOINT ["vllm", "serve", "--port", "8100", "--enable-lora"]

FROM runtime AS trainer
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sluice-trainer" \
      org.opencontainers.image.description="Sluice with the trainer's libraries" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-trainer /opt/sluice /opt/sluice
# The trainer serves no port. One that is stuck loses its lease, and the run goes to another.
HEALTHCHECK NONE
CMD ["trainer"]

FROM runtime AS gateway
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sluice-gateway" \
      org.opencontainers.image.description="Sluice: the roles gateway, controller and shadow" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-gateway /opt/sluice /opt/sluice
# For the controller run with -e HEALTH_PORT=8001; shadow is run --no-healthcheck.
ENV HEALTH_PORT=8000
EXPOSE 8000 8001 8002
# Streams may still be running when the container is told to stop.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=20s --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['HEALTH_PORT'] + '/healthz', timeout=4)"]
CMD ["gateway"]
