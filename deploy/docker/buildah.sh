#!/bin/sh
# Builds the image for CPUs without a Docker daemon, with Buildah, and runs `dreamfleet doctor` in it.
# Usage, as root, at the root of the tree: buildah.sh [FURTHER ARGUMENTS OF `buildah bud`]
#
#   STORE   directory of images, about 10 GB while building; a new one by default, which is said
#   BASE    `pull` gets the base image from its registry; `debootstrap` makes a stand-in from Debian's
#           packages and gives it the base image's name, for machines that reach no registry. Its
#           Python is Debian's 3.11 and not the one that the Dockerfile pins.
#   TARGET  stage of the Dockerfile: cpu or cuda
set -eu
for program in buildah $(test "${BASE:-pull}" != debootstrap || echo debootstrap); do
  command -v "$program" >/dev/null || {
    echo "$program is not installed (Debian's package has its name)" >&2
    exit 1
  }
done
store=${STORE:-$(mktemp -d "${TMPDIR:-/tmp}/dreamfleet-images-XXXXXX")}
target=${TARGET:-cpu}
file=deploy/docker/Dockerfile
base=$(sed -n 's/^FROM \(.*\) AS base$/\1/p' $file)

images() {
  buildah --root "$store/images" --runroot "$store/run" --storage-driver vfs "$@"
}

debian() {
  debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$store/debian"
  ln -sf /usr/bin/python3 "$store/debian/usr/local/bin/python"
  rm -rf "$store/debian/var/lib/apt/lists" "$store/debian/var/cache/apt/archives"
  made=$(images from scratch)
  images add -q "$made" "$store/debian" /
  images commit -q --rm "$made" "docker.io/library/$base"
  rm -rf "$store/debian"
}

pull=--pull
if [ "${BASE:-pull}" = debootstrap ]; then
  pull=--pull-never
  images inspect --type image "docker.io/library/$base" >/dev/null 2>&1 || debian
fi
images bud --isolation chroot "$pull" --target "$target" -t "dreamfleet:$target" \
  -f "$file" "$@" .
made=$(images from --pull-never "localhost/dreamfleet:$target")
echo "built dreamfleet:$target in $store/images"
images run --isolation chroot "$made" -- dreamfleet doctor
