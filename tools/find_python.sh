#!/bin/sh
# Print a Python that Megatron's wheels run on (3.12 or 3.13), or say what to do. PYTHON overrides.
fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python /opt/*/bin/python3.12; do
    if fits "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
    if [ -n "$PYTHON" ] && [ "$candidate" = "$PYTHON" ]; then
        echo "PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv." >&2
        exit 1
    fi
done
# a system whose package manager has it, as root in a container
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (apt-get update -qq && apt-get install -y -qq python3.12 python3.12-venv) >&2 2>/dev/null || true
    if fits python3.12; then command -v python3.12; exit 0; fi
fi
echo "No Python 3.12 or 3.13 with venv was found (Megatron-LM >= 0.17 needs one)." >&2
echo "Install one (apt install python3.12-venv, pyenv install 3.12, conda create python=3.12)" >&2
echo "and run make again, with PYTHON=/path/to/python3.12 if it is not on the PATH." >&2
exit 1
