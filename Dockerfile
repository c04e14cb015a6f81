# The image that jobs run, with the command `peer-jax` and the configs.
#
#   docker build --build-arg ACCELERATOR=tpu --tag IMAGE .     (for GPUs ACCELERATOR=cuda)
#
# The packages have the versions that the tests last passed with. Files of your own, such as configs or a module with
# layers, come in by an image of yours that begins with `FROM IMAGE` and copies them to /peer_jax.
FROM python:3.13-slim
ENV PYTHONUNBUFFERED=1 PYTHONPATH=/peer_jax PIP_CONSTRAINT=/peer_jax/python3.13.txt
WORKDIR /peer_jax
# Packages come first: they change less often than the code, and are most of the image.
COPY requirements.txt constraints/python3.13.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
ARG ACCELERATOR=tpu
COPY pyproject.toml README.md LICENSE ./
COPY peer_jax peer_jax
COPY configs configs
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[$ACCELERATOR,gcs]"
ENTRYPOINT ["peer-jax"]
