# Sourced by the other scripts: a ready environment in .venv at the repository's root, and $ROOT and $PY to use it.
# Installs only when pyproject.toml, constraints.txt or this file changed. PYTHON=/path/to/python chooses the interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PY="$VENV/bin/python"
INSTALL_LOG="$VENV/install.log"
TORCH_INDEX="https://download.pytorch.org/whl/cpu"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'lightkv: %s\n' "$*" >&2; }

fail() { # what was found, what to do
    printf 'error: %s\n  to do: %s\n' "$1" "$2" >&2
    exit 2
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer${PYTHON:+ at PYTHON=$PYTHON}" \
        "install Python 3.10 or newer, or name one: PYTHON=/path/to/python bash scripts/test.sh"
}

make_venv() {
    local python
    python="$(find_python)"
    say "creating .venv with $("$python" --version)"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$python has no venv module" "install it, e.g. sudo apt install python3-venv, and run this again"
    "$python" -m venv "$VENV" || fail "cannot create $VENV" "see the message above; remove $VENV and run this again"
}

pip_install() { "$PY" -m pip install --quiet "$@" >>"$INSTALL_LOG" 2>&1; }

fail_install() {
    tail -n 15 "$INSTALL_LOG" >&2
    fail "installing $1 failed (the last lines are above, all of them in $INSTALL_LOG)" \
        "check the network (proxy: HTTPS_PROXY, PIP_INDEX_URL) and the free space, then run this again"
}

# PyPI's torch for Linux brings gigabytes of CUDA packages. The CPU build comes from wherever pip is told to look, else
# from PyTorch's own index.
install_torch() {
    [ "$(uname -s)" = Linux ] || return 0
    local pin
    pin="$(sed -n "s/^\(torch==[^;]*\); sys_platform == 'linux'.*/\1/p" "$ROOT/constraints.txt")"
    if ! "$PY" -c "import importlib.metadata as m; assert 'torch==' + m.version('torch') == '$pin'" 2>/dev/null; then
        say "installing $pin (about 200 MB)"
        pip_install --no-deps "$pin" || pip_install --no-deps "$pin" --index-url "$TORCH_INDEX" || fail_install "$pin"
    fi
}

install_all() {
    local extras=export,dev
    [ "$(uname -sm)" = "Linux x86_64" ] && extras=export,trt,dev # TensorRT-RTX has no other wheels
    : >"$INSTALL_LOG"
    install_torch
    say "installing lightkv-export[$extras] (a few minutes the first time)"
    pip_install -c "$ROOT/constraints.txt" -e "$ROOT[$extras]" || fail_install "lightkv-export[$extras]"
}

if [ ! -e "$VENV" ]; then
    make_venv
elif ! is_recent "$PY"; then
    fail "$VENV does not work, or its Python is older than 3.10" "remove it: rm -r '$VENV', and run this again"
fi
STAMP="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "${BASH_SOURCE[0]}" | cksum) $("$PY" --version)"
if [ "$STAMP" != "$(cat "$VENV/installed" 2>/dev/null || true)" ]; then
    install_all
    printf '%s\n' "$STAMP" >"$VENV/installed"
fi
