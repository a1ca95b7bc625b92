# dbclient of dropbear, whose windows are small.
. "$CLIENTS/lib.sh"
dropbearconvert openssh dropbear "$KEY" key >log 2>&1
client=(dbclient -y -i key -p "$PORT")

equal status "$(status "${client[@]}" "$USER_NAME@$HOST" exit 7 2>log)" 7
"${client[@]}" "$USER_NAME@$HOST" 'echo out; echo err >&2' >out 2>err
equal stdout "$(cat out)" out
grep -qx err err
random 8000000 >data
"${client[@]}" "$USER_NAME@$HOST" cat <data >copy 2>log
cmp data copy

equal netcat "$( (sleep 1) | "${client[@]}" -B "127.0.0.1:$PORT" "$USER_NAME@$HOST" 2>log | head -c 8)" SSH-2.0-
local=$(free_port)
background "${client[@]}" -N -L "$local:127.0.0.1:$PORT" "$USER_NAME@$HOST"
eventually greets 127.0.0.1 "$local"
remote=$(free_port)
background "${client[@]}" -N -R "$remote:127.0.0.1:$PORT" "$USER_NAME@$HOST"
eventually greets 127.0.0.1 "$remote"
