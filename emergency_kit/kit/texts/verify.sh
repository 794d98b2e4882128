#!/bin/sh
# Is every byte of this kit as it was packed? Needs nothing but a POSIX shell and sha256sum, shasum or openssl.
# Run: sh verify.sh     Ends with 0 when it is, 1 when it is not. KIT=FOLDER checks that folder with a script that you trust more.
cd "${KIT:-$(dirname "$0")}" || exit 2
bad() { echo "NOT as packed, do not use this kit: $1" >&2; exit 1; }
[ -f SHA256SUMS ] || bad "SHA256SUMS is missing"
if LC_ALL=C grep -Evq '^[0-9a-f]{64}  [A-Za-z0-9]' SHA256SUMS; then bad "SHA256SUMS is damaged"; fi
if command -v sha256sum >/dev/null 2>&1; then sum() { sha256sum "$1" | cut -d ' ' -f 1; }
elif command -v shasum >/dev/null 2>&1; then sum() { shasum -a 256 "$1" | cut -d ' ' -f 1; }
elif command -v openssl >/dev/null 2>&1; then sum() { openssl dgst -sha256 -r "$1" | cut -d ' ' -f 1; }
else echo "This computer has none of sha256sum, shasum and openssl; check the kit in its page instead." >&2; exit 2; fi
listed=0 wrong=
while read -r hash name; do
  listed=$((listed + 1))
  if [ ! -f "$name" ]; then wrong="$wrong $name (missing)"
  elif [ "$(sum "$name")" != "$hash" ]; then wrong="$wrong $name"
  elif [ "$name" != manifest.json ] && ! grep -qF "\"$name\": \"$hash\"" manifest.json; then wrong="$wrong $name (not in manifest.json)"; fi
done <SHA256SUMS
[ -z "$wrong" ] || bad "$wrong"
there=$(find . -type f ! -name SHA256SUMS ! -name SHA256SUMS.sig | wc -l)
[ "$there" -eq "$listed" ] || bad "$((there)) files are here and $listed were packed"
echo "$listed files, every byte as packed."
