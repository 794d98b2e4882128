#!/usr/bin/env bash
# From a bare clone to the first answer: how long, with nothing kept from before (pip's cache is off).
# In: a committed checkout, a network; KIT_CLONE names the folder to use. Out: seconds of each part on standard output; the clone is removed.
# Run: make first-answer
set -euo pipefail
cd "$(dirname "$0")/.."
clone=${KIT_CLONE:-outputs/bench/first-answer}
rm -rf "$clone"
trap 'rm -rf "$clone"' EXIT
mkdir -p "$(dirname "$clone")"
export PIP_NO_CACHE_DIR=1
echo "Load before: $(uptime | sed 's/.*load average[s]*: //'); cores: $(getconf _NPROCESSORS_ONLN)"
SECONDS=0
git clone --quiet --no-hardlinks . "$clone"
cloned=$SECONDS
make --no-print-directory -C "$clone" setup
ready=$SECONDS
(cd "$clone" && .venv/bin/emergency-kit infer --checkpoint models/SmolLM2-135M-Instruct --prompt "the oil in my pan is on fire") >"$clone/answer.txt"
grep -q '^1\. ' "$clone/answer.txt" || { echo "error: no answer came; see above" >&2; exit 1; }
echo "Clone $cloned s, make setup $((ready - cloned)) s, first answer $((SECONDS - ready)) s, together $SECONDS s; disk: $(du -sh "$clone" | cut -f 1)"
