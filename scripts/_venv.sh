# Sourced by the scripts beside it: sets ROOT, VENV and VENV_PYTHON; `ensure_venv EXTRA` makes the environment ready.
#   PYTHON               interpreter the environment is made from (default: the first of python3, python3.13 ... that is 3.11 or later)
#   GRUQAT_TRANSFORMERS  transformers version with its own constraints file and environment (default: the newest that is pinned)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CONSTRAINTS="$ROOT/requirements/constraints.txt"
VENV="$ROOT/.venv"
if [ -n "${GRUQAT_TRANSFORMERS:-}" ] && ! grep -qx "transformers==$GRUQAT_TRANSFORMERS" "$CONSTRAINTS"; then
    CONSTRAINTS="$ROOT/requirements/constraints-$GRUQAT_TRANSFORMERS.txt"
    VENV="$ROOT/.venv-$GRUQAT_TRANSFORMERS"
    if [ ! -f "$CONSTRAINTS" ]; then
        echo "GRUQAT_TRANSFORMERS=$GRUQAT_TRANSFORMERS has no constraints file; pinned versions:" >&2
        grep -h '^transformers==' "$ROOT"/requirements/*.txt >&2
        exit 1
    fi
fi
VENV_PYTHON="$VENV/bin/python"

_is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if _is_recent "$PYTHON"; then echo "$PYTHON"; return; fi
        echo "PYTHON=$PYTHON does not run or is older than 3.11, which the pinned versions need" >&2
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if _is_recent "$candidate"; then echo "$candidate"; return; fi
    done
    echo "no Python 3.11 or later found; name one: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# Everything an installed environment depends on; compared as a whole with what the last installation wrote.
_fingerprint() { { cat "$CONSTRAINTS" "$ROOT/pyproject.toml"; echo "$ROOT $1"; } | cksum; }

# Whether the environment runs and comes from the interpreter that PYTHON asks for.
_is_usable() {
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(cat "$VENV/.made-from" 2>/dev/null)" = "$PYTHON" ]
}

# pip's output, shortened to one line for each package that is fetched; the whole of it is in install.log.
_pip_install() {
    local line
    {
        if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off -c "$CONSTRAINTS" "$@" 2>&1; then
            echo "gruqat: pip failed"
        fi
    } | while IFS= read -r line; do
        echo "$line" >>"$VENV/install.log"
        case "$line" in
            *Downloading*.metadata*) ;;
            *Downloading*" ("*) line="${line##*Downloading }"; echo "    ${line%%-[0-9]*} (${line##*(}" ;;
            *"Using cached "*.whl" ("*) line="${line##*Using cached }"; echo "    ${line%%-[0-9]*}" ;;
            "Processing "*.whl*) line="${line%% (from*}"; line="${line##*/}"; echo "    ${line%%-[0-9]*}" ;;
            "Installing collected packages"*) echo "    unpacking (takes a while without further output)" ;;
            "gruqat: pip failed") tail -n 25 "$VENV/install.log" >&2; return 1 ;;
        esac
    done
}

ensure_venv() {
    local extra="$1" python stamp started=$SECONDS
    stamp="$VENV/.installed-$extra"
    if _is_usable && [ "$(cat "$stamp" 2>/dev/null)" = "$(_fingerprint "$extra")" ]; then
        return
    fi
    python="$(_find_python)"
    echo "== setting up ${VENV#"$ROOT"/} ($("$python" --version), extra: $extra)"
    if ! _is_usable; then
        if ! "$python" -m venv --clear "$VENV"; then
            echo "'$python -m venv' failed; on Debian and Ubuntu it needs: apt install python3-venv" >&2
            return 1
        fi
        echo "$python" >"$VENV/.made-from"
    fi
    rm -f "$stamp"
    # torch in a call of its own: whichever build pip's settings offer of this version is taken, before anything else asks for torch.
    _pip_install "$(grep '^torch==' "$CONSTRAINTS")"
    _pip_install "$(grep '^setuptools==' "$CONSTRAINTS")"
    _pip_install --no-build-isolation -e "$ROOT[$extra]"
    _fingerprint "$extra" >"$stamp"
    echo "== ready in $((SECONDS - started)) s"
}
