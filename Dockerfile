# The commands of streamllm-sweep as an image, for CPUs or for CUDA; see docs/clusters/docker.md.
#   docker build -t streamllm .
#   docker build -t streamllm:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
# Any base with Ubuntu's or Debian's packages and Python >= 3.11 does. torch brings its own CUDA libraries, the base and
# the driver of the machine the rest.
ARG BASE=ubuntu:24.04
FROM ${BASE}

# Compiled steps and Triton need a compiler and Python's headers, KubeRay's probes wget.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

# Extras of the package; and what else is to be there: Ray's dashboard takes jobs, s3fs is for --output s3://...
ARG EXTRAS=quant,gguf
ARG ALSO="ray[default] s3fs"
# Where pip looks besides, for example for torch without CUDA, which is much smaller.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY streamllm streamllm
COPY orchestrator orchestrator
COPY search_spaces search_spaces
COPY dashboards dashboards
RUN python3 -m venv /opt/streamllm \
    && /opt/streamllm/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" ${ALSO}

ENV PATH=/opt/streamllm/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

RUN useradd --create-home --uid 10001 sweeper && install -d -o sweeper /work
USER sweeper
WORKDIR /work
ENTRYPOINT ["streamllm"]
CMD ["--help"]
