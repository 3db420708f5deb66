# Sourced by other scripts: makes .venv if it is missing, installs requirement files into it, and activates it.
# Usage: . scripts/environment.sh requirements.txt [more]
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv || { echo "error: python3 -m venv failed; install Python 3.11 or newer with venv" >&2; exit 2; }
fi
for _file in "$@"; do
    _stamp=.venv/installed-$(sha256sum "$_file" | cut -c1-16)
    if [ ! -e "$_stamp" ]; then
        echo "installing $_file into .venv (a few minutes the first time)"
        # --no-compile: Python compiles what is imported; compiling everything takes half a minute
        .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r "$_file" && touch "$_stamp" || exit 2
    fi
done
export PATH="$PWD/.venv/bin:$PATH"
