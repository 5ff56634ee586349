#!/usr/bin/env bash
# Install the true programs that tests/test_real_agents.py drives: Claude Code and Codex by npm, the
# llama.cpp wheel by pip. Usage: install_real.sh [FOLDER]   (default: $SCALARLOOP_REAL_DIR)
#
# What is there already stays. What can't be had is said in a loud line, and its tests are skipped;
# the exit code is 0 as long as the folder can be made.
set -u
folder=${1:-${SCALARLOOP_REAL_DIR:?give a folder, or set SCALARLOOP_REAL_DIR}}
mkdir -p "$folder" || exit 1
cd "$folder" || exit 1

loud() { echo "LOUD: install_real.sh: $*; the tests that need it are skipped" >&2; }

install_npm() {   # PROGRAM PACKAGE
    [ -x "node_modules/.bin/$1" ] && "node_modules/.bin/$1" --version >/dev/null 2>&1 && return
    npm install --prefix . --no-audit --no-fund --loglevel error "$2" >"npm-$1.log" 2>&1
    "node_modules/.bin/$1" --version >/dev/null 2>&1 ||
        loud "$2 can't be had ($(grep -i error "npm-$1.log" | head -n 2 | tr '\n' ' '))"
}

if command -v npm >/dev/null; then
    install_npm claude @anthropic-ai/claude-code
    install_npm codex @openai/codex
else
    loud "there is no npm, so neither claude nor codex"
fi

if ! venv/bin/python -c 'import xllamacpp' 2>/dev/null; then
    { [ -x venv/bin/python ] || python3 -m venv venv; } >pip.log 2>&1 &&
        venv/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp >>pip.log 2>&1
    venv/bin/python -c 'import xllamacpp' 2>/dev/null ||
        loud "xllamacpp can't be had ($(tail -n 1 pip.log))"
fi
ls -d node_modules/.bin/claude node_modules/.bin/codex venv/bin/python 2>/dev/null
exit 0
