# The server as an image. The first stage compiles the kernel and installs the libraries in a virtual environment. The second
# stage contains that environment, the model store and Python, but no compiler, and torch only on request.
#
#   docker build -t gru-serve .
#   docker build -t gru-serve:train --build-arg WITH_TORCH=1 .      # for `gru-serve train` and the torch stepper
#   docker build -t gru-serve:otel --build-arg WITH_OTEL=1 .        # for traces
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/gru-serve --push .  # for both kinds of processors

FROM docker.io/library/python:3.11-slim-bookworm AS build

RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# The environment has its final path already, because its scripts contain the full path of their interpreter.
RUN python -m venv --without-pip /opt/gru-serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/gru-serve/bin/python

# The libraries are a layer of their own, because they change less often than the code.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > libraries.txt \
 && pip install -q -c constraints.txt -r libraries.txt

ARG WITH_TORCH=0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if [ "$WITH_TORCH" = 1 ]; then \
      pip install -q --retries 1 --timeout 20 --extra-index-url "$TORCH_INDEX" --no-deps "$(grep -o '^torch==[^ ;]*+cpu' constraints.txt)" \
   && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["torch"], sep="\n")' > torch.txt \
   && pip install -q -c constraints.txt -r torch.txt; \
    fi

ARG WITH_OTEL=0
RUN if [ "$WITH_OTEL" = 1 ]; then \
      python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["otel"], sep="\n")' > otel.txt \
   && pip install -q -c constraints.txt -r otel.txt; \
    fi

COPY setup.py README.md LICENSE ./
COPY service service
# Fails the build if the kernel is missing: the server would then need torch, which the image does not contain.
RUN pip install -q --no-deps . \
 && cd / && /opt/gru-serve/bin/python -c 'from service.engine.native.native_stepper import variants; assert variants(), "the kernel was not compiled"'


FROM docker.io/library/python:3.11-slim-bookworm

ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="gru-serve" \
      org.opencontainers.image.description="A REST service that generates text with a GRU character model." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# A user id that no user of the host is likely to have, and no home, because the server never writes a file.
RUN groupadd --gid 10001 gru-serve \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin gru-serve

COPY --from=build /opt/gru-serve /opt/gru-serve
# The shipped models. Mount a store of your own here, read-only, or name another directory in GRU_SERVE_MODEL_STORE.
COPY model_store /srv/model_store

ENV PATH=/opt/gru-serve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GRU_SERVE_HOST=0.0.0.0 \
    GRU_SERVE_PORT=8000 \
    GRU_SERVE_MODEL_STORE=/srv/model_store \
    GRU_SERVE_LOG_FORMAT=json

USER 10001:10001
WORKDIR /srv
EXPOSE 8000
STOPSIGNAL SIGTERM
# Asks the port on which the server listens, whichever option or variable has set it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "service.health"]
ENTRYPOINT ["gru-serve"]
CMD ["serve"]
