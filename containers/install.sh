#!/bin/sh
# Install ctx-distill into /opt/ctx-distill on Debian: `install.sh cpu` or `install.sh gpu`. The folder of this script
# also holds uv.txt, runtime-EXTRA.txt and the wheel. Dockerfile and apptainer.def run it.
set -eu
extra=$1
here=$(cd "$(dirname "$0")" && pwd)
export DEBIAN_FRONTEND=noninteractive
export UV_PYTHON_DOWNLOADS=never
export UV_CACHE_DIR="${UV_CACHE_DIR:-$here/cache}"

apt-get update -q
apt-get install -qy --no-install-recommends ca-certificates python3 python3-venv
if [ "$extra" = gpu ]; then # torch.compile builds kernels
  apt-get install -qy --no-install-recommends gcc libc6-dev python3-dev
fi
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/uv
/opt/uv/bin/pip install --quiet --no-cache-dir --require-hashes -r "$here/uv.txt"
/opt/uv/bin/uv venv --quiet --python python3 /opt/ctx-distill
/opt/uv/bin/uv pip install --quiet --require-hashes --python /opt/ctx-distill -r "$here/runtime-$extra.txt"
/opt/uv/bin/uv pip install --quiet --offline --no-deps --python /opt/ctx-distill "$here"/ctx_distill-*.whl
rm -rf /opt/uv
/opt/ctx-distill/bin/ctx-distill --version
