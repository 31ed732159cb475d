# syntax=docker/dockerfile:1
#
# Two images from the locks that the Makefile uses:
#   docker build --target pipeline -t bimode .          Prefect's server, and workers that ask given endpoints
#   docker build --target gpu -t bimode-gpu .           workers that start vLLM and training; vLLM as a service
#
# Both run as user 10001 and with a read-only root: only /project/runs, /models, the home folder and /tmp are written to.
# Data and configurations are mounted under /project. No secret belongs into an image: the entry point takes keys from
# the environment or from files (deploy/image/entrypoint). With SOURCE_DATE_EPOCH given as a build argument, compiled
# files carry no time of their building. deploy/compose and deploy/kubernetes say how the images are run.

# Pinned by digest; the tag is for the reader. To renew: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba

FROM ${PYTHON_IMAGE} AS pipeline

ARG SOURCE_DATE_EPOCH=315532800
LABEL org.opencontainers.image.title="bimode" \
      org.opencontainers.image.licenses="Apache-2.0"

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    BIMODE_HOME=/project \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NUMBA_CACHE_DIR=/home/bimode/.cache/numba \
    PREFECT_HOME=/home/bimode/prefect \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/home/bimode/prefect-ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_UI_V2_ENABLED=false \
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false \
    DO_NOT_TRACK=1 \
    PATH=/opt/pipeline/bin:$PATH

# tini reaps what a worker's processes leave behind, and hands signals on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    && useradd --create-home --uid 10001 bimode \
    && install -d -o bimode -g bimode /project /project/runs /models

COPY requirements/pipeline.txt requirements/cluster.txt /tmp/requirements/
RUN python -m venv /opt/pipeline \
    && /opt/pipeline/bin/python -m pip install --no-deps -r /tmp/requirements/pipeline.txt -r /tmp/requirements/cluster.txt

# The code belongs to root: what runs here cannot change it.
COPY . /project
WORKDIR /project
RUN /opt/pipeline/bin/python -m pip install --no-deps --no-build-isolation --editable . \
    && /opt/pipeline/bin/python -m compileall -q . \
    && chown root:root /project \
    && chmod -R a+rX,go-w /project \
    && chmod 0555 deploy/image/entrypoint \
    && chown bimode:bimode runs

USER 10001
VOLUME ["/project/runs"]
EXPOSE 4200
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:4200/api/health', timeout=8)"]
ENTRYPOINT ["tini", "--", "/project/deploy/image/entrypoint"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]


FROM pipeline AS gpu

# The CUDA libraries come with the wheels; of the host only the driver is used. Triton compiles its launchers with gcc,
# which g++ brings along with the headers. The version is that of the whole Debian release, fixes included.
USER 0
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_NO_USAGE_STATS=1 \
    BIMODE_GPU_PYTHON=/opt/gpu/bin/python

COPY requirements/gpu-cuda.txt /tmp/requirements/
RUN python3.11 -m venv /opt/gpu \
    && /opt/gpu/bin/python -m pip install -r /tmp/requirements/gpu-cuda.txt \
    && /opt/gpu/bin/python -m pip install --no-deps --no-build-isolation --editable /project

USER 10001
EXPOSE 8000 8080
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=8)"]
CMD ["prefect", "worker", "start", "--pool", "gpu", "--type", "process", "--install-policy", "never", "--with-healthcheck"]
