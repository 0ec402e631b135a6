# One image for every pod: head, service, clients. `make image` builds it.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS built
RUN apt-get update && apt-get install -y --no-install-recommends g++ libaio-dev && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/chainfed
ENV PATH=/opt/chainfed/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# PyPI's torch brings 4 GB of CUDA, PyTorch's own index has one without. Empty: torch comes from the registry that pip is set to.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --no-deps -c constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch
# The project without its code, for the packages it depends on: a change of the code does not install them again.
RUN touch README.md && pip install --no-cache-dir -c constraints.txt '.[demo,nf4,plots,postgresql,s3]'
COPY README.md ./
COPY chainfed_ray chainfed_ray
COPY cluster cluster
COPY api api
RUN pip install --no-cache-dir --no-deps .
RUN python3 -c "from pathlib import Path; from chainfed_ray.api.serve.haproxy import write_launcher; write_launcher(Path('/opt/chainfed/bin/chainfed-haproxy'))"
# DeepSpeed's libraries are compiled where the compiler is, and kept for the next build: they change with the packages and the C library.
RUN --mount=type=cache,target=/var/cache/chainfed CHAINFED_EXTENSIONS="/var/cache/chainfed/$(ldd --version | awk 'NR == 1 {print $NF}')" python3 -c "\
from pathlib import Path; from shutil import copytree; from chainfed_ray.cluster.offload.build import build_ops, ops_folder; \
folder = ops_folder(); build_ops(folder); copytree(folder, Path('/opt/chainfed-ops', folder.name))"

FROM ${BASE}
# Ray looks at processes with ps, KubeRay's probes ask with wget, and DeepSpeed reads with libaio.
RUN apt-get update && apt-get install -y --no-install-recommends procps wget libaio1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home chainfed && mkdir /data && chown chainfed /data
COPY --from=built /opt/chainfed /opt/chainfed
COPY --from=built /opt/chainfed-ops /opt/chainfed-ops
# glibc gives freed memory back, so that a client's peak is what it uses; Serve's proxy is HAProxy.
ENV PATH=/opt/chainfed/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_MMAP_THRESHOLD_=65536 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=8 \
    LRU_CACHE_CAPACITY=8 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/chainfed/bin/chainfed-haproxy \
    CHAINFED_EXTENSIONS=/opt/chainfed-ops \
    CHAINFED_STORAGE=/data
USER chainfed
WORKDIR /home/chainfed
COPY examples examples
VOLUME /data
EXPOSE 8000
# It does not start before a key was made in the volume: chainfed keys create --owner ops --scopes admin
CMD ["chainfed", "serve", "--host", "0.0.0.0"]
