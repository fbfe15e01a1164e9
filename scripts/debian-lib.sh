# shellcheck shell=bash disable=SC2034  # variables are for the scripts that source this
# Shared by test-debian and review-debian: a scratch directory, a build user, sid chroots, sources, builds, and counting
# of checks. Sourced; expects `set -euo pipefail`, root, and the repository root as working directory.

BUILD_USER=vllmlite-build-$$
# Expected results of src:vllmlite's autopkgtests. Nothing runs systemd here: `serve` does what the unit says without
# it.
EXPECTED=('generate-cpu +PASS' 'generate-native +PASS' 'generate-baseline +PASS' 'quantize +PASS' 'serve +PASS'
    'serve-unit +(PASS|SKIP)')
GROUPS_RUNNING=()
STARTED=$SECONDS

say() { printf '\n== %s (%d s so far)\n' "$*" $((SECONDS - STARTED)); }

# Prints the number of passed checks, counted across subshells.
passed() { { [ -z "${SCRATCH:-}" ] || cat "$SCRATCH/passed"; } | wc -l; }

die() {
    printf '\n%s: FAILED: %s\n' "${0##*/}" "$*" >&2
    printf '%d passed, 1 failed\n' "$(passed)"
    exit 1
}

# logged NAME COMMAND...: run the command with output to $SCRATCH/logs/NAME.log; set STATUS to its exit status. In a
# condition, a function would not stop at its first failure: neither this nor its callers may be used as one.
logged() {
    local log=$SCRATCH/logs/$1.log
    shift
    printf '+ %s\n' "$*"
    set +e
    (set -e && "$@") > "$log" 2>&1 < /dev/null
    STATUS=$?
    set -e
}

# check NAME COMMAND...: run the command and print the time it took; on failure print the end of the log and stop.
check() {
    local name=$1 since=$SECONDS
    shift
    logged "$name" "$@"
    if [ "$STATUS" -ne 0 ]; then
        tail -n 100 "$SCRATCH/logs/$name.log" >&2
        die "$name: exit status $STATUS after $((SECONDS - since)) s; the command was: $*"
    fi
    echo "$name" >> "$SCRATCH/passed"
    printf 'PASS %s (%d s)\n' "$name" $((SECONDS - since))
}

# together FUNCTION...: run each in its own process group. Stops when all have ended and one has failed.
together() {
    local function job failed=0
    GROUPS_RUNNING=()
    set -m
    for function in "$@"; do
        "$function" &
        GROUPS_RUNNING+=($!)
    done
    set +m
    for job in "${GROUPS_RUNNING[@]}"; do wait "$job" || failed=1; done
    GROUPS_RUNNING=()
    [ "$failed" -eq 0 ] || exit 1
}

as_user() {
    runuser -u "$BUILD_USER" -- env -i -C "$SCRATCH" HOME="$SCRATCH/home" TMPDIR="$SCRATCH/tmp" LANG=C.UTF-8 \
        LOGNAME="$BUILD_USER" USER="$BUILD_USER" PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        ${DEB_BUILD_OPTIONS:+"DEB_BUILD_OPTIONS=$DEB_BUILD_OPTIONS"} "$@"
}

install_tools() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${Status}\n' "$package" 2> /dev/null | grep -q ' installed$' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
}

# The mirror that this machine itself installs from.
mirror() {
    # shellcheck disable=SC2016  # placeholders for apt
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" { print $2; exit }'
}

# Prepare the machine: tools, a build user with subordinate ids for unshare, and a scratch directory; all but the tools
# are removed at exit.
prepare() {
    [ "$(id -u)" -eq 0 ] || die 'run me as root: I install tools and make a build user'
    say "tools: $*"
    install_tools "$@"
    SCRATCH=$(mktemp -d /var/tmp/vllmlite-debian.XXXXXX)
    trap cleanup EXIT
    useradd --home-dir "$SCRATCH/home" --shell /bin/bash "$BUILD_USER"
    grep -q "^$BUILD_USER:" /etc/subuid || usermod --add-subuids 1000000-1065535 "$BUILD_USER"
    grep -q "^$BUILD_USER:" /etc/subgid || usermod --add-subgids 1000000-1065535 "$BUILD_USER"
    mkdir "$SCRATCH"/{home,logs,tmp,source,cpu,cross,cuda}
    # Some of these settings have no command-line option of sbuild.
    cat > "$SCRATCH/home/.sbuildrc" << EOF
\$unshare_tmpdir_template = '$SCRATCH/tmp/sbuild.XXXXXXXXXX';
\$build_arch_all = 1;
\$run_lintian = 1;
\$lintian_require_success = 1;
\$lintian_opts = ['-EIL', '+pedantic', '--fail-on=error,warning'];
\$run_autopkgtest = 0;
\$run_piuparts = 0;
1;
EOF
    : > "$SCRATCH/passed"
    chown -R "$BUILD_USER:" "$SCRATCH"
    chmod 755 "$SCRATCH"
    chmod 1777 "$SCRATCH/tmp"
    VERSION=$(dpkg-parsechangelog -S Version)
    DSC=$SCRATCH/source/vllmlite_$VERSION.dsc
    CUDA_DSC=$SCRATCH/source/vllmlite-cuda_$VERSION.dsc
    MIRROR=$(mirror)
    [ -n "$MIRROR" ] || die 'apt knows no Debian mirror'
}

# Copy packages and logs to RESULTS first, if the caller set it.
cleanup() {
    local group
    for group in "${GROUPS_RUNNING[@]}"; do kill -- "-$group" 2> /dev/null || true; done
    for group in "${GROUPS_RUNNING[@]}"; do wait "$group" || true; done
    [ -z "${RESULTS:-}" ] || { mkdir -p "$RESULTS" && cp -a "$SCRATCH"/{logs,source,cpu,cross,cuda} "$RESULTS"; }
    rm -rf "$SCRATCH" || true
    userdel "$BUILD_USER" 2> /dev/null || true
}

# Create a clean sid system as a tarball. A mirror that lags behind may have an expired Release file; a temporary system
# need not sync every unpacked file.
make_chroot() {
    as_user mmdebstrap --mode=unshare --variant=buildd --aptopt='Acquire::Check-Valid-Until "false"' \
        --dpkgopt=force-unsafe-io --include=apt-utils sid "$SCRATCH/sid.tar" "deb $MIRROR sid main"
}

# Create both source packages from HEAD in $SCRATCH/source.
make_sources() {
    local upstream=${VERSION%-*} tree
    tree=$SCRATCH/source/vllmlite-$upstream
    scripts/make-orig "$SCRATCH/source"
    mkdir "$tree"
    tar -xf "$SCRATCH/source/vllmlite_$upstream.orig.tar.xz" -C "$tree" --strip-components=1
    git archive HEAD debian | tar -x -C "$tree"
    (cd "$SCRATCH/source" && dpkg-source --build "$tree")
    debian/cudabuild.sh "$SCRATCH/source"
    chown -R "$BUILD_USER:" "$SCRATCH/source"
}

# build DIRECTORY DSC [SBUILD OPTION...]: build in a fresh chroot and run sid's lintian on all results, which go to
# DIRECTORY.
build() {
    local directory=$1 dsc=$2
    shift 2
    as_user env -C "$directory" sbuild --chroot-mode=unshare --chroot="$SCRATCH/sid.tar" --dist=unstable --nolog \
        --no-clean-source "$@" "$dsc"
}

# Build the extension for another architecture in a clean amd64 chroot.
cross_build() { build "$SCRATCH/cross" "$DSC" --no-arch-all --host=arm64; }

# Run the op tests and the built-in model's texts on the cross build's result under QEMU. The system is unpacked but not
# configured, and nothing in it starts another program, so the kernel need not know QEMU. A path below it is the same
# inside.
cross_tests() {
    local system=$SCRATCH/arm64 deb emulator
    mmdebstrap --mode=root --variant=extract --architectures=arm64,amd64 --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=base-files,python3-{huggingface-hub,hypothesis,jinja2,numpy,pytest,tokenizers,yaml},qemu-user:amd64 \
        sid "$system" "deb $MIRROR sid main"
    for deb in "$SCRATCH"/{cpu/python3-vllmlite,cross/python3-vllmlite-cpu}_*.deb; do dpkg-deb -x "$deb" "$system"; done
    mkdir -p "$system"/{proc,srv,tmp} "$system/${system%/*}"
    git archive HEAD tests | tar -x -C "$system/srv"
    ln -s / "$system/$system"
    # shellcheck disable=SC2016  # expanded by the inner shell
    emulator=(unshare --mount --pid --fork sh -c 'mount -t proc proc "$0/proc"; exec chroot "$0" "$@"' "$system"
        qemu-aarch64 -E "LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu/blas:/usr/lib/aarch64-linux-gnu/lapack")
    "${emulator[@]}" /usr/bin/python3 -B -m pytest -p no:cacheprovider --hypothesis-profile=ci -rs \
        -o pythonpath=/srv/tests/support /srv/tests/ops /srv/tests/backends/test_cpu_backend.py
    TMPDIR=$system/tmp debian/tests/generate native "${emulator[@]}"
    rm -rf "$system"
}

with_contrib() { printf -- '--extra-repository=deb %s sid contrib non-free' "$MIRROR"; }

# autopkgtest_of EXPECTED… -- AUTOPKGTEST ARGUMENT…: run a source's tests in a fresh sid. EXPECTED are patterns of lines
# that the summary must have, such as 'NAME +PASS'.
autopkgtest_of() {
    local expected=() status=0 output pattern
    while [ "$1" != -- ]; do
        expected+=("$1")
        shift
    done
    shift
    output=$(as_user mktemp -d "$SCRATCH/tmp/autopkgtest.XXXXXX")
    as_user autopkgtest --apt-upgrade --no-built-binaries --output-dir="$output" "$@" \
        -- unshare --release sid --tarball "$SCRATCH/sid.tar" || status=$?
    # 2: some test was skipped; EXPECTED decides whether it may be.
    if [ "$status" -ne 0 ] && [ "$status" -ne 2 ]; then
        tail -n 50 "$output"/*-std{out,err}
        return "$status"
    fi
    cat "$output/summary"
    for pattern in "${expected[@]}"; do
        grep -Eq "^$pattern" "$output/summary" || return 1
    done
}
