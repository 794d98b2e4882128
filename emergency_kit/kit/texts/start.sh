#!/bin/sh
# Emergency Kit: opens the kit's page on this computer alone. Nothing is installed, nothing is sent anywhere.
# Run: sh @NAME@     Needs Python 3.8 or newer; with one of @PYTHONS@ the model runs faster. Without Python open cards.html.
cd "$(dirname "$0")" || exit 1
for how in native page; do
  for python in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$python" >/dev/null 2>&1 && "$python" computer/start.py --fits "$how" >/dev/null 2>&1; then exec "$python" computer/start.py "$@"; fi
  done
done
echo "No Python was found on this computer. The checked cards need none: open cards.html in any browser."
if command -v busybox >/dev/null 2>&1 && busybox httpd --help >/dev/null 2>&1; then
  echo "The page: http://127.0.0.1:8765/page/   (Ctrl-C stops)"
  exec busybox httpd -f -p 127.0.0.1:8765 -h .
fi
for opener in xdg-open open; do command -v "$opener" >/dev/null 2>&1 && exec "$opener" cards.html; done
exit 1
