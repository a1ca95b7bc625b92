# ssh-audit finds no failure, and no warning that docs/security.md does not explain.
. "$CLIENTS/lib.sh"
ssh-audit --no-colors --level=warn --port="$PORT" "$HOST" >audit || true # Debian's version fails for unknown algorithms
grep -q '^(kex) mlkem768x25519-sha256' audit # the list is not empty
equal failures "$(grep -F '[fail]' audit || true)" ''
while read -r _ algorithm _; do
	grep -qF "| \`$algorithm\` |" "$CLIENTS/../../docs/security.md" || { echo "docs/security.md does not explain the warning about $algorithm:" >&2; cat audit >&2; exit 1; }
done < <(grep -F '[warn]' audit)
