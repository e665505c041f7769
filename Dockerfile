# GELLA with its tiny weights on a CPU. In a checkout:
#   docker build -t gella .
#   docker run --rm -v "$PWD:/data" gella
# grounds the example scenes and writes output/demo; what gella-demo takes may stand behind it.
# tests/test_release.py runs these steps without Docker.
FROM python:3.11-slim

WORKDIR /gella
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY projects projects
COPY tools/setup_detectron2.py tools/
# PyTorch's builds without CUDA are smaller by gigabytes.
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    python -m pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu .
RUN GELLA_DETECTRON2=core python tools/setup_detectron2.py
COPY configs configs
COPY weights/gella_tiny_shapes weights/gella_tiny_shapes
COPY examples examples

WORKDIR /data
ENTRYPOINT ["gella-demo", "--config-file", "/gella/weights/gella_tiny_shapes/config.yaml"]
CMD ["--input", "/gella/examples/shapes", "--captions", "/gella/examples/shapes/captions.jsonl"]
