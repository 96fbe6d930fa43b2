#!/usr/bin/env bash
# Create or reuse .venv. `setup.sh demo`: what the demo needs; `setup.sh test`: also what lint, types and tests need.
#
# PYTHON, TORCH and PIP_ARGS come from the Makefile. A stamp in .venv holds all that the set-up depends on, so that
# a second run with nothing changed takes no time; anything that fails ends with one sentence that says what to do.
set -euo pipefail
cd "$(dirname "$0")/.."

level=${1:?usage: setup.sh demo|test}
torch=${TORCH:-torch==2.13.0}
venv=.venv
log=$venv/setup.log
read -r -a pip_args <<<"${PIP_ARGS:-}"

case $level in
    demo) extras=transformers need_mb=2000 ;;
    test) extras=dev need_mb=2500 ;;
    *) echo "setup.sh: unknown level '$level': use demo or test" >&2; exit 2 ;;
esac

say() { printf '== %s\n' "$*"; }
fail() { printf '\n== Set-up failed: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer; name one that is, like: make PYTHON=python3.12 $level"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (python3 is: $(python3 --version 2>&1 || true)); install one and run: make PYTHON=/path/to/python3.12 $level"
}

create_venv() {
    local python free_mb
    python=$(find_python)
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge $need_mb ] || fail "the disk of $PWD has $free_mb MB free and .venv needs about $need_mb MB; make room there"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python cannot make virtual environments; on Debian or Ubuntu run: apt install $(basename "$python")-venv"
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear $venv || fail "'$python -m venv $venv' did not work; what it says is above"
}

pip_install() {
    # No newer pip is looked for, and the log is what tells a full disk from a missing network.
    $venv/bin/python -m pip --disable-pip-version-check --log $log install "${pip_args[@]+"${pip_args[@]}"}" "$@" && return
    if grep -q 'No space left on device' $log; then
        fail "the disk is full; .venv takes about $need_mb MB, with GPU libraries 7000 more. Make room and run make $level again"
    elif grep -qE 'NewConnectionError|NameResolutionError|Max retries exceeded|ReadTimeoutError|ConnectTimeoutError|ProxyError|SSLError' $log; then
        fail "the package index cannot be reached; check the network (or pip's proxy and certificate settings) and run make $level again"
    elif grep -qE 'No matching distribution found' $log; then
        fail "a package above has no version for this system and $($venv/bin/python --version); try another Python (make PYTHON=python3.12 $level) or another PyTorch (make TORCH=torch $level)"
    fi
    fail "pip could not install the packages; what it says is above, all of it is in $log. Then run make $level again"
}

settings() {
    # All that .venv depends on; the place too, because the package is installed in place.
    printf '%s\n' "$PWD" "$torch" "${PIP_ARGS:-}"
    cat pyproject.toml scripts/setup.sh
}

is_set_up() { [ -f "$venv/stamp-$1" ] && settings | cmp -s - "$venv/stamp-$1"; }

if ! new_enough $venv/bin/python || ! $venv/bin/python -c 'import pip' 2>/dev/null; then
    create_venv
fi
if is_set_up "$level" || is_set_up test; then
    exit 0
fi

start=$SECONDS
rm -f $log
say "1/2 installing $torch: the largest part, 200 MB for a CPU build, several GB for one with GPU libraries (minutes on a slow line)"
# First and by itself: asked for by another package, it may come as a newer build with GPU libraries.
pip_install "$torch"
say "2/2 installing zmqserve[$extras] in place: about 50 MB more, a minute or two"
pip_install --editable ".[$extras]"
settings >"$venv/stamp-$level"
say "set up in $((SECONDS - start)) s; the next time takes none"
