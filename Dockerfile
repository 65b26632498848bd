# docker build -t tdm-serve . && docker run -p 8000:8000 -v tdm-state:/state tdm-serve
FROM python:3.11-slim

# PyTorch's CPU wheel index; set it if the default index serves CUDA builds.
ARG TORCH_INDEX_URL=

WORKDIR /app
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url $TORCH_INDEX_URL} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY tdm_runtime tdm_runtime
COPY export export
COPY serving serving
COPY training training
COPY checkpoints checkpoints
RUN pip install --no-cache-dir --editable . && useradd --create-home tdm && install -d -o tdm -m 700 /state
USER tdm
# Build the artifacts now, so that the first start is fast.
RUN tdm-export
ENV RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000
# Jobs and their files.
VOLUME /state
HEALTHCHECK --start-period=60s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"
# Listen on every address: the container's network decides who can connect.
CMD ["tdm-serve", "--host", "0.0.0.0", "--state-folder", "/state"]
