#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds deploy/Dockerfile without a container daemon, and without a registry: the base image is made of Debian's packages
# under the name that the Dockerfile asks for, unless that image is there. Run it as root from the repository's root.
#
#   deploy/build_image.sh cpu localhost/tokenpool:0.1.0-cpu
#
# It needs buildah and debootstrap. PIP_CONF is a configuration of pip for the build, PIP_VOLUMES are folders and files of
# this machine that it names, such as a local index; TORCH_CPU_INDEX takes the place of PyTorch's.
set -euo pipefail
device=${1:-cpu} image=${2:-localhost/tokenpool:cpu}
base=$(sed -n 's/^ARG BASE=//p' deploy/Dockerfile)
work=build/image

for program in buildah debootstrap; do
  command -v "$program" > /dev/null || { echo "$program is not there: apt-get install buildah debootstrap" >&2; exit 1; }
done

if ! buildah images "$base" > /dev/null 2>&1; then
  suite=${base##*-}
  mkdir -p "$work"
  if [ ! -e "$work/base/usr/local/bin/python" ]; then
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=python3.11,python3-pip,python3-venv,ca-certificates "$suite" "$work/base"
    # The official image has its Python there, and lets pip write into it.
    chroot "$work/base" /usr/bin/python3.11 -m venv --copies /usr/local
    chroot "$work/base" apt-get clean
    rm -rf "$work"/base/var/lib/apt/lists/*
  fi
  container=$(buildah from scratch)
  buildah copy -q "$container" "$work/base" /
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 "$container"
  buildah commit -q "$container" "localhost/$base"
  buildah rm "$container" > /dev/null
fi

words=()
for path in ${PIP_VOLUMES:-}; do words+=(-v "$path:$path:ro"); done
if [ -n "${PIP_CONF:-}" ]; then words+=(-v "$PWD/$PIP_CONF:/etc/pip.conf:ro"); fi
if [ -n "${TORCH_CPU_INDEX:-}" ]; then words+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX"); fi
buildah bud --layers --isolation chroot -f deploy/Dockerfile --ignorefile deploy/Dockerfile.dockerignore \
  --build-arg "DEVICE=$device" "${words[@]}" -t "$image" .
