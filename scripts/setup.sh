#!/usr/bin/env bash
# The first half of `make setup`: .venv with every package of requirements.lock, or one sentence that says what stands in the way.
#   scripts/setup.sh                        make it, or bring it up to date
#   scripts/setup.sh stale                  say "stale" where it must be made anew
#   scripts/setup.sh also LOCK MARKER       install another lock into it
# In: VENV, PYTHON, TORCH_INDEX and GOAL (what to type next) from the environment. Out: $VENV/installed.txt, written last, a copy of the
# lock. What this run began and could not end goes again; an environment that was there before stays. Bash 3.2 and newer. Exit codes: 0, 2, 130.
set -uo pipefail
cd "${0%/*}/.." || exit 2
venv=${VENV:-.venv} python=${PYTHON:-python3} again="make ${GOAL:-setup}" needed_mb=2500 made=""
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 # a pip.conf with user=true would refuse every environment

fail() {
  [ -z "$made" ] || rm -rf "$venv"
  echo "error: $*" >&2
  exit 2
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; }

# Made in this folder, by a Python that is still there, and with the lock as it is now. A folder that was moved or copied has
# programs that start another folder's Python.
is_current() {
  [ -f "$venv/installed.txt" ] && cmp -s requirements.lock "$venv/installed.txt" && [ -x "$venv/bin/python" ] && ! wrong_python && ! moved
}

wrong_python() { ! grep -Eq '^version(_info)? *= *3\.1[123]\.' "$venv/pyvenv.cfg" 2>/dev/null; }

moved() {
  local first
  first=$(head -n 2 "$venv/bin/emergency-kit" 2>/dev/null | grep -o '/[^"]*/bin/python[0-9.]*' | head -n 1)
  [ -n "$first" ] && ! [ "${first%/*}" -ef "$venv/bin" ]
}

if [ "${1:-}" = stale ]; then
  is_current || echo stale
  exit 0
fi

check_python() {
  local found="" other
  supported "$python" && return
  for other in python3.13 python3.12 python3.11; do supported "$other" && found=$other && break; done
  local next="install one of them, or $again PYTHON=/path/to/python3.12"
  [ -z "$found" ] || next="$again PYTHON=$found"
  command -v -- "$python" >/dev/null 2>&1 || fail "PYTHON=$python: no such program; Python 3.11 to 3.13 is needed. Next: $next"
  fail "$python is $("$python" -V 2>&1 | head -n 1); Python 3.11 to 3.13 is needed. Next: $next"
}

free_mb() { df -Pk . | awk 'NR == 2 { print int($4 / 1000) }'; }

check_folder() {
  if ! [ -w . ] || { [ -e "$venv" ] && ! [ -w "$venv/" ]; }; then
    fail "$PWD: $(id -un 2>/dev/null || id -u) may not write here, and $venv, models and outputs are made here. Next: copy the folder to a place of your own, and there: $again"
  fi
  [ -e "$venv" ] || [ "$(free_mb)" -ge "$needed_mb" ] || fail "$PWD: $(free_mb) MB free, $needed_mb MB needed for $venv and models. Next: free some space, or move the folder to a larger disk, then: $again"
}

# An environment that can be used is kept, and one that came with a moved folder is told its new place, which needs no network.
make_venv() {
  local why="" said free_mb maker=$python
  if [ -e "$venv" ] || [ -L "$venv" ]; then
    if [ ! -f "$venv/pyvenv.cfg" ]; then why="is no Python environment that can be used"
    elif [ ! -x "$venv/bin/python" ]; then why="was made by a Python that is gone"
    elif wrong_python; then why="was made by Python $(sed -nE 's/^version(_info)? *= *//p' "$venv/pyvenv.cfg" | head -n 1)"
    elif moved; then echo "$venv was made in another folder; it is told its new place." && maker=$venv/bin/python
    elif ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then maker=$venv/bin/python
    else return
    fi
    if [ -n "$why" ]; then
      [ ! -L "$venv" ] || fail "$venv is a link to $(readlink "$venv"), which $why. Next: rm $venv, then: $again"
      [ -f "$venv/pyvenv.cfg" ] || [ -d "$venv/bin" ] || [ -z "$(ls -A "$venv" 2>/dev/null)" ] || fail "$PWD/$venv $why and holds something else. Next: move it away, then: $again"
      check_python
      echo "$venv $why; it is made anew."
      rm -rf "$venv"
    fi
  fi
  [ -e "$venv" ] || { check_python && made=1; }
  if ! said=$("$maker" -m venv "$venv" 2>&1); then
    case "$said" in
      *"No space left"*) free_mb=0 ;;
      *"ensurepip is not available"* | *"No module named"*) fail "$maker has no venv with pip. Next, on Debian and Ubuntu: sudo apt-get install python3-venv; then: $again" ;;
    esac
    [ "${free_mb:-$(free_mb)}" -ge 20 ] || fail "$PWD: no space left on the disk. Next: free $needed_mb MB, then: $again"
    fail "$maker cannot make $PWD/$venv ($(tail -n 1 <<<"$said")). Next: $again PYTHON=/path/to/another/python3.12"
  fi
}

hide_login() { sed -E 's#//[^/@ ]*@#//***@#g'; }

# What of pip's own words a person can act on.
explain() {
  local what=$1 log=$venv/pip.log proxy
  proxy=$(env | grep -iE '^(https?|all)_proxy=.' | head -n 1 | hide_login)
  if grep -Eq 'No space left|Errno 28' "$log"; then
    echo "no space left on the disk of $PWD or of ${TMPDIR:-/tmp}. Next: free $needed_mb MB (or export TMPDIR=FOLDER on a larger disk), then: $again"
  elif grep -Eq 'ProxyError|Cannot connect to proxy|Tunnel connection failed|Unable to connect to proxy' "$log"; then
    echo "the proxy does not answer or refuses (${proxy:-see: pip config list}). Next: correct or unset it, then: $again"
  elif grep -Eq 'CERTIFICATE_VERIFY_FAILED|SSLError|certificate' "$log"; then
    echo "the certificate of the package index is not trusted here. Next: export PIP_CERT=FILE with the certificates of your network, then: $again"
  elif grep -Eq 'Permission denied|Errno 13|Errno 30|Read-only file system' "$log"; then
    echo "$(grep -Eo "'[^']*'" "$log" | tail -n 1) may not be written. Next: look whose it is (ls -l), then: $again"
  elif grep -Eq "command '[^']*(cc|gcc|clang|g\+\+|cl\.exe)'? failed|Failed to build|Failed building wheel|C compiler|can't find Rust compiler" "$log"; then
    echo "the index has no ready-built wheel for this system ($("$venv/bin/python" -V), $(uname -sm)), and none can be built here. Next: $again PYTHON=python3.12, or another computer"
  elif grep -Eq 'DO NOT MATCH THE HASHES|BadZipFile|invalid wheel|IncompleteRead|Connection broken' "$log"; then
    echo "a download was damaged or cut off. Next: $venv/bin/python -m pip cache purge, then: $again"
  elif grep -Eq 'from versions: none|NewConnectionError|NameResolutionError|ConnectTimeout|timed out|Failed to establish' "$log"; then
    echo "the package index cannot be reached. Next: check the network and the index (pip config list; PIP_INDEX_URL, TORCH_INDEX${proxy:+, the proxy $proxy}), then: $again"
  elif grep -q 'No matching distribution' "$log"; then
    echo "the package index has no such version for this system ($("$venv/bin/python" -V), $(uname -sm)). Next: $again PYTHON=python3.12, or TORCH_INDEX=URL for torch"
  else
    echo "see pip's words above; then: $again"
  fi | sed "s#^#$what could not be installed: #"
}

pip_install() {
  local what=$1 said
  shift
  "$venv/bin/python" -m pip install --quiet "$@" 2>"$venv/pip.log" && return
  grep -v -e WARNING -e '^ *$' "$venv/pip.log" | hide_login | tail -n 3 >&2
  said=$(explain "$what")
  fail "$said"
}

if [ "${1:-}" = also ]; then
  pip_install "a package of $2" -r "$2"
  cp "$2" "$3" || fail "$3: not written. Next: $again"
  exit 0
fi
[ -e "$venv" ] || check_python
check_folder
trap '[ -z "$made" ] || rm -rf "$venv"; echo "error: stopped. Next: $again" >&2; exit 130' INT TERM HUP
if ! is_current || [ pyproject.toml -nt "$venv/installed.txt" ]; then
  echo "Setting up $venv (about two minutes) ..."
  make_venv
  echo "  1/2 torch"
  if [ -n "${TORCH_INDEX:-}" ]; then pip_install torch --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)"; else pip_install torch "$(grep '^torch==' requirements.lock)"; fi
  echo "  2/2 the other pinned packages"
  pip_install "a pinned package" -r requirements.lock
  pip_install "the kit itself" --no-deps --no-build-isolation -e .
fi
cp requirements.lock "$venv/installed.txt" || fail "$venv/installed.txt: not written. Next: $again"
