#!/bin/sh
# Make src:vllmlite-cuda from this tree:
#
#   debian/cudabuild.sh [BUILD_AREA]          (default: ../build-area)
#
# BUILD_AREA receives the .dsc and what it names; an orig tarball of src:vllmlite that lies there already is shared,
# otherwise scripts/make-orig makes it. The tree itself is read only: in a git checkout, as HEAD has it.
set -eu

cd "$(dirname "$0")/.."
area=${1:-../build-area}
mkdir -p "$area"
area=$(cd "$area" && pwd)

version=$(dpkg-parsechangelog -S Version)
upstream=${version%-*}
orig=vllmlite_$upstream.orig.tar.xz
tree=$area/vllmlite-cuda-$upstream

[ -e "$area/$orig" ] || scripts/make-orig "$area"
ln -f "$area/$orig" "$area/vllmlite-cuda_$upstream.orig.tar.xz"

rm -rf "$tree"
mkdir "$tree"
tar -xf "$area/$orig" -C "$tree" --strip-components=1
if [ -e .git ]; then
    git archive HEAD debian | tar -x -C "$tree"
else
    cp -a debian "$tree/"
fi

cd "$tree"
cp debian/control.cuda debian/control
cp debian/tests/control.cuda debian/tests/control
cp debian/install.cuda debian/python3-vllmlite-cuda.install
rm debian/python3-vllmlite.* debian/python3-vllmlite-cpu.* debian/vllmlite-server.*
# The top entry alone is this source's; bugs it closes are src:vllmlite's to close.
sed -i -e '1s/^vllmlite /vllmlite-cuda /' -e '1,/^ -- /s/ *(Closes:[^)]*)//I' debian/changelog
cd "$area"
dpkg-source --build "$tree"
