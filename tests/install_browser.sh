#!/usr/bin/env bash
# Chromium for the tests of the page, from Debian's or Ubuntu's packages where one may install them. Without it these tests skip and say so.
set -uo pipefail
for name in chromium chromium-browser google-chrome; do command -v "$name" >/dev/null && exit 0; done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing chromium for the tests of the page ..."
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
fi
echo "No chromium: the tests of the page will be skipped. To run them install it (apt-get install chromium), or: .venv/bin/playwright install chromium" >&2
