# The agent alone: -L, -D, -J and -W, and a reason for sessions that it cannot have.
. "$CLIENTS/lib.sh"
for host in tunnel rotunnel; do # the second with a read-only root file system
	ssh=(ssh -F "$SSH_CONFIG")
	equal "$host: -W" "$( (sleep 1) | "${ssh[@]}" -W "127.0.0.1:$PORT" $host | head -c 8)" SSH-2.0-
	equal "$host: -J" "$("${ssh[@]}" -J $host inside 'echo $((6 * 7))')" 42
	local=$(free_port) socks=$(free_port) web=$(free_port)
	echo "through $host" >page
	background /usr/bin/python3 -m http.server --bind 127.0.0.1 "$web"
	background "${ssh[@]}" -N -L "$local:127.0.0.1:$web" -D "127.0.0.1:$socks" $host
	eventually curl -sf "http://127.0.0.1:$local/page"
	equal "$host: -L" "$(curl -sS "http://127.0.0.1:$local/page")" "through $host"
	equal "$host: -D" "$(curl -sS --socks5-hostname "127.0.0.1:$socks" "http://localhost:$web/page")" "through $host"
	equal "$host: a session" "$(status "${ssh[@]}" $host true 2>err)" 127
	grep -q '^This bastion has no shell and only forwards connections: ' err
	code=0
	"${ssh[@]}" -tt $host >terminal </dev/null || code=$?
	equal "$host: a terminal" $code 127
	grep -q '^This bastion has no shell and only forwards connections: ' terminal
done
