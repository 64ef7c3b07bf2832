# docker build -f deploy/docker/cpu.Dockerfile -t rlhf-ray:0.1.0-cpu .
# Python is the tested one. One stage: what a build stage would leave behind (gcc) is wanted at run time too, where torch,
# vLLM and DeepSpeed may compile kernels.
FROM python:3.11-slim-bookworm

# libnuma1: vLLM on CPU; procps: drain.sh; rsync: `ray up`. Not pinned: Debian keeps no old versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libnuma1 make procps rsync \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rlhf_ray
COPY . .
# The same target, and so the same lock, as on any machine.
RUN --mount=type=cache,target=/root/.cache/pip make install VENV=/opt/venv \
    && install -m 755 deploy/docker/drain.sh /usr/local/bin/drain

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# A number, so that Kubernetes can see that it is not root.
RUN useradd --create-home --uid 1000 ray && install -d -o ray -g ray /outputs
USER 1000:1000
WORKDIR /home/ray
