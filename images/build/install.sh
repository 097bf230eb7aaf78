#!/bin/sh
# In the builder stage: /opt/venv from requirements.txt, out of wheels/ alone and checked by hash; the tools beside it.
# What has to be compiled for a GPU is left to kernels.sh.
set -eu
cd /build
python3.11 -m venv /build/tools
/build/tools/bin/pip install -q --no-cache-dir --disable-pip-version-check --no-index --find-links wheels \
  --require-hashes --no-deps -r tools.txt
/build/tools/bin/python build/split.py requirements.txt
export UV_NO_CACHE=1 UV_OFFLINE=1 UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
/build/tools/bin/uv venv -q --python /usr/bin/python3.11 /opt/venv
/build/tools/bin/uv pip install --no-index --find-links wheels --require-hashes --no-deps --compile-bytecode \
  -p /opt/venv/bin/python -r requirements.wheels.txt
mkdir -p /opt/harness
