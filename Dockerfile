# mitrain in an image, with the pinned packages. A CPU:
#     docker build -t mitrain . && docker run --rm -v "$PWD:/work" mitrain train birds.yaml
# NVIDIA GPUs (torch brings its own CUDA libraries; the base has what flash-attn and DeepSpeed compile with):
#     docker build -t mitrain --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH_BUILD=gpu .
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG TORCH_BUILD=
ARG EXTRAS="audio peft plots serve video"
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /opt/mitrain
RUN TORCH_BUILD=${TORCH_BUILD} PYTHON=python3 bash /opt/mitrain/launch/setup.sh ${EXTRAS}
ENV PATH=/opt/mitrain/.venv/bin:${PATH}
WORKDIR /work
ENTRYPOINT ["mitrain"]
CMD ["--help"]
