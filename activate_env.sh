# shellcheck shell=bash disable=SC2296,SC1091  # zsh has its own word for this file, and .venv is made here
# Activate the project's environment, making it first where it is missing. For bash and zsh:
#   source activate_env.sh
# Leave it again with `deactivate`.

_kit_here="${BASH_SOURCE[0]:-${(%):-%x}}" 2>/dev/null || _kit_here="$0"
_kit_root="$(cd "$(dirname "$_kit_here")" && pwd)"

if [ "${BASH_SOURCE[0]:-}" = "$0" ] && [ -n "${BASH_VERSION:-}" ]; then
  echo "error: run it as: source activate_env.sh" >&2
  exit 2
fi

if ! make --no-print-directory -C "$_kit_root" setup; then
  echo "error: the environment could not be made; see the message above, then: make setup" >&2
  unset _kit_here _kit_root
  return 2
fi

. "$_kit_root/.venv/bin/activate"
echo "Environment active: $_kit_root/.venv (leave it with: deactivate). Next: make help"
unset _kit_here _kit_root
