# Keepalives of the client, and autossh, which reconnects.
. "$CLIENTS/lib.sh"
equal 'keepalives' "$(ssh -F "$SSH_CONFIG" -o ServerAliveInterval=1 -o ServerAliveCountMax=3 bastion 'sleep 6; echo alive')" alive

forward=$(free_port)
AUTOSSH_GATETIME=0 AUTOSSH_POLL=5 AUTOSSH_PIDFILE=$PWD/autossh.pid background \
	autossh -M 0 -F "$SSH_CONFIG" -o ServerAliveInterval=1 -o ExitOnForwardFailure=yes -N -L "127.0.0.1:$forward:127.0.0.1:$PORT" bastion
eventually greets 127.0.0.1 "$forward"
first=$(pgrep -P "$(cat autossh.pid)")
kill -KILL "$first"
eventually greets 127.0.0.1 "$forward"
[ "$(pgrep -P "$(cat autossh.pid)")" != "$first" ]
