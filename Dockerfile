# The server's image: no CUDA, no torch. The worker's is Dockerfile.gpu; docker-compose.yml runs both.
#   docker build -t sftd-server .
# Any base with Python 3.11 or newer and its venv module will do: --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# Server and worker share the data volume, whose files only their owner may read: the same user in both images.
RUN groupadd --gid 10001 sftd \
 && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin sftd \
 && install --directory --owner=sftd --group=sftd --mode=0700 /data
RUN python3 -m venv /opt/sftd/venv
ENV PATH=/opt/sftd/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/sftd

# What to install, on its own: so the layer below is made again only when a dependency changes, not with every edit.
FROM base AS wanted
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
  print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
        *p["project"]["optional-dependencies"]["server"], *p["project"]["optional-dependencies"]["postgres"], sep="\n")' > wanted.txt

FROM base
COPY requirements.lock ./
COPY --from=wanted /opt/sftd/wanted.txt ./
RUN pip install --no-cache-dir -r wanted.txt -c requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

ENV SFTD_DATA=/data SFTD_HOST=0.0.0.0
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('SFTD_PORT', '8000') + '/healthz', timeout=4)"]
CMD ["sftd-server"]
