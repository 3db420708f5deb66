# Sourced by the other scripts: makes .venv where there is none, installs what is missing, and uses it.
# Give requirement files as arguments: . scripts/environment.sh requirements.txt
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv || { echo "error: python3 -m venv failed; install Python 3.11 or newer with venv" >&2; exit 2; }
fi
for _file in "$@"; do
    _stamp=.venv/installed-$(sha256sum "$_file" | cut -c1-16)
    if [ ! -e "$_stamp" ]; then
        echo "installing $_file into .venv (a few minutes the first time)"
        # python compiles what is imported; to compile everything here takes half a minute
        .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r "$_file" && touch "$_stamp" || exit 2
    fi
done
export PATH="$PWD/.venv/bin:$PATH"
