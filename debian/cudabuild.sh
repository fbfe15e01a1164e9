#!/bin/sh
# Create src:vllmlite-cuda from this tree:
#
#   debian/cudabuild.sh [BUILD_AREA]          (default: ../build-area)
#
# BUILD_AREA gets the .dsc and its files. An orig tarball of src:vllmlite that is already there is shared, otherwise
# scripts/make-orig creates it. The tree is only read; in a git checkout, HEAD is used.
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
# Only the top entry is this source's, and the bugs that it closes are src:vllmlite's.
sed -i -e '1s/^vllmlite /vllmlite-cuda /' -e '1,/^ -- /s/ *(Closes:[^)]*)//I' debian/changelog
cd "$area"
dpkg-source --build "$tree"
