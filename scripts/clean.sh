#!/usr/bin/env bash
# `make clean`: show what would be deleted, ask, delete. Trained models go only with --checkpoints.
set -euo pipefail
cd "$(dirname "$0")/.."

targets=(outputs/cache outputs/data outputs/logs outputs/merged outputs/gguf outputs/evaluation_report.json outputs/report.html)
[ "${1:-}" = "--checkpoints" ] && targets+=(outputs/checkpoints)
while IFS= read -r cache; do targets+=("$cache"); done < <(find . -name __pycache__ -not -path './.venv/*' -prune; find . -maxdepth 1 \( -name .pytest_cache -o -name .hypothesis -o -name .mypy_cache -o -name .ruff_cache \))

found=()
for target in "${targets[@]}"; do [ -e "$target" ] && found+=("$target"); done
if [ ${#found[@]} -eq 0 ]; then echo "Nothing to delete."; exit 0; fi

echo "This would be deleted:"
du -sh "${found[@]}" | sed 's/^/  /'
[ "${1:-}" = "--checkpoints" ] || { [ ! -d outputs/checkpoints ] || echo "Kept: outputs/checkpoints (make clean CHECKPOINTS=1 deletes it too)"; }
printf 'Delete? [y/N] '
read -r answer || answer=""
case "$answer" in
  y|Y|yes) rm -rf "${found[@]}"; echo "Deleted." ;;
  *) echo "Nothing was deleted." ;;
esac
