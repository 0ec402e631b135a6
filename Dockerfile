# One image for every pod: head, service, clients. Build: docker build -t chainfed-ray .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
# DeepSpeed's package is built from source; torch comes without CUDA unless another index is given.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ make libaio-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/chainfed
ENV PATH=/opt/chainfed/bin:$PATH
WORKDIR /build
# The packages depend on these two files alone: a change of the code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url ${TORCH_INDEX} torch \
    && python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; needed = project['dependencies'] + extras['demo'] + extras['plots']; \
        print('\n'.join(needed + extras['postgresql']))" > needed.txt \
    && pip install --no-cache-dir -c constraints.txt -r needed.txt
# DeepSpeed's libraries are compiled here, where the compiler is. What that needs of the code is copied by itself, as above.
COPY chainfed_ray/__init__.py chainfed_ray/errors.py chainfed_ray/quantities.py chainfed_ray/offload_ops.py chainfed_ray/
COPY cluster/__init__.py cluster/ops.py chainfed_ray/cluster/
RUN CHAINFED_EXTENSIONS=/opt/chainfed-ops python3 -c "from chainfed_ray.cluster.ops import build_ops, ops_folder; build_ops(ops_folder())" \
    && find /opt/chainfed-ops -name '*.o' -delete
COPY README.md ./
RUN rm -r chainfed_ray
COPY chainfed_ray chainfed_ray
COPY cluster cluster
COPY api api
RUN pip install --no-cache-dir --no-deps .

FROM ${BASE}
# Ray looks at processes with ps, KubeRay's probes ask with wget, and DeepSpeed reads with libaio.
RUN apt-get update && apt-get install -y --no-install-recommends procps wget libaio1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home chainfed && mkdir /data && chown chainfed /data
COPY --from=packages /opt/chainfed /opt/chainfed
COPY --from=packages /opt/chainfed-ops /opt/chainfed-ops
# glibc gives freed memory back, so that a client's peak is what it uses; Serve's proxy is HAProxy.
ENV PATH=/opt/chainfed/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_MMAP_THRESHOLD_=65536 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=8 \
    LRU_CACHE_CAPACITY=8 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    CHAINFED_EXTENSIONS=/opt/chainfed-ops \
    CHAINFED_STORAGE=/data
USER chainfed
WORKDIR /home/chainfed
COPY examples examples
VOLUME /data
EXPOSE 8000
CMD ["chainfed", "serve", "--host", "0.0.0.0"]
