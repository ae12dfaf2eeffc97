# docker build -t hf-disranker .
# docker build -t hf-disranker --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .     # CUDA
# docker run -v "$PWD/runs:/home/ranker/runs" hf-disranker                # the quickstart
# docker run -v "$PWD/runs:/home/ranker/runs" hf-disranker disranker evaluate --help
FROM python:3.12-slim

# Index of the torch build: CPU by default; whl/cu130 and the like for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY constraints-cpu.txt ./
# A layer of its own: torch is most of the image and changes least.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --constraint constraints-cpu.txt torch
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints-cpu.txt .

RUN useradd --create-home --uid 1000 ranker && install -d -o ranker /home/ranker/runs
USER 1000
WORKDIR /home/ranker
CMD ["disranker", "quickstart"]
