#!/usr/bin/env bash
# Write requirements-ci.txt and requirements-vllm-ci.txt anew: all that CI installs, each file by its hash. Run it when what pyproject.toml
# or requirements-vllm.txt ask for has changed, or to take newer versions (lock.sh --upgrade).
#
# UV: the program uv. UV_FIND_LINKS: where PyTorch's builds for CPUs are, if no package index that is asked has them.
set -euo pipefail
cd "$(dirname "$0")/.."

cpu=$(mktemp)
trap 'rm -f "$cpu"' EXIT
echo 'torch==2.13.0+cpu' >"$cpu"

lock() {
    # What comes along with vLLM and is not needed is left out, as scripts/setup.sh does.
    local file=$1
    shift
    "${UV:-uv}" pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraint "$cpu" \
        --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
        --no-emit-index-url --no-annotate --no-header --output-file "$file" "$@"
    sed -i '1i # For CPython 3.11 on Linux, x86_64. Made by scripts/lock.sh, installed by scripts/setup.sh.' "$file"
}

# Without Node: where the system has one, that is used, and takes signals itself; the one from the package index is behind a Python program.
lock requirements-ci.txt --extra dev pyproject.toml "$@"
lock requirements-vllm-ci.txt pyproject.toml requirements-vllm.txt "$@"
