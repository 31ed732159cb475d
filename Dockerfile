# syntax=docker/dockerfile:1
#
# Two images from the locks that the Makefile uses:
#   docker build --target pipeline -t bimode .          Prefect's server, and `bimode` commands against given endpoints
#   docker build --target gpu -t bimode-gpu .           a worker on the pool `gpu`: it starts vLLM and training programs
#
# The worker needs the NVIDIA container toolkit (`--gpus all`) and PREFECT_API_URL. Mount data and work folders under
# /project. No secret belongs into an image: pass keys as environment variables or Prefect blocks.

FROM python:3.11-slim-bookworm AS pipeline

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BIMODE_HOME=/project \
    PREFECT_HOME=/home/bimode/prefect \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/home/bimode/prefect-ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1 \
    PATH=/opt/pipeline/bin:$PATH

RUN useradd --create-home --uid 10001 bimode

COPY requirements/pipeline.txt /tmp/requirements/
RUN python -m venv /opt/pipeline \
    && /opt/pipeline/bin/python -m pip install --no-deps -r /tmp/requirements/pipeline.txt

COPY --chown=bimode:bimode . /project
WORKDIR /project
RUN /opt/pipeline/bin/python -m pip install --no-deps --no-build-isolation --editable . \
    && chown bimode:bimode /project

USER bimode
EXPOSE 4200
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:4200/api/health', timeout=8)"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]


FROM pipeline AS gpu

# The CUDA libraries come with the wheels; of the host only the driver is used. Triton compiles its launchers with gcc.
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BIMODE_GPU_PYTHON=/opt/gpu/bin/python

COPY requirements/gpu-cuda.txt /tmp/requirements/
RUN python3.11 -m venv /opt/gpu \
    && /opt/gpu/bin/python -m pip install -r /tmp/requirements/gpu-cuda.txt \
    && /opt/gpu/bin/python -m pip install --no-deps --no-build-isolation --editable /project

USER bimode
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=8)"]
CMD ["prefect", "worker", "start", "--pool", "gpu", "--type", "process", "--with-healthcheck"]
