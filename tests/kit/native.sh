#!/bin/sh
# Run within a network namespace of its own (unshare -rn): starts a kit as a person would, in an empty home with the system's Python, and asks it.
# In: a kit's folder, an empty folder for the home. Out: what the start script said, then the answer as JSON on the last line.
ip link set lo up || exit 3
HOME=$2 sh "$1/start-linux.sh" --no-open --port 8973 >"$2/log" 2>&1 &
pid=$!
trap 'kill "$pid" 2>/dev/null' EXIT
tries=0
until python3 - >"$2/answer" 2>/dev/null <<'ASK'
import json, urllib.request
urllib.request.urlopen("http://127.0.0.1:8973/health", timeout=2)
request = urllib.request.Request("http://127.0.0.1:8973/answer", json.dumps({"situation": "the oil in my pan is on fire", "country": "GB"}).encode(), {"content-type": "application/json"})
print(json.dumps(json.load(urllib.request.urlopen(request, timeout=300))))
ASK
do
  tries=$((tries + 1))
  if [ "$tries" -gt 600 ] || ! kill -0 "$pid" 2>/dev/null; then cat "$2/log"; exit 1; fi
  sleep 0.5
done
cat "$2/log" "$2/answer"
