# Sourced by the scripts here, each of which is one test: it fails with the
# first command that does. They are given
#
#   USER_NAME, HOST, PORT   whom to log in as, and where
#   KEY                     her private key, in OpenSSH's format
#   FINGERPRINT             of the gateway's only host key
#   BIN                     folder of gateway and bastion-agent
#   SSH_CONFIG              for OpenSSH's clients: "Host bastion", and "inside"
#                           for the same gateway as seen from the bastion
#
# and start in an empty folder that is also HOME. The bastion's account is the
# one that runs the tests, so they see its files on this machine.
set -euo pipefail

children=()
# background COMMAND ...: until the test ends.
background() {
	"$@" &
	children+=($!)
}
trap 'for pid in "${children[@]}"; do kill "$pid" 2>/dev/null || true; done' EXIT

# eventually COMMAND ...: succeeds as soon as the command does, or fails.
eventually() {
	local i
	for i in $(seq 100); do
		"$@" >/dev/null 2>&1 && return 0
		sleep 0.1
	done
	echo "never succeeded: $*" >&2
	return 1
}

# equal WHAT GOT WANT
equal() {
	[ "$2" = "$3" ] && return 0
	printf '%s: got %q, want %q\n' "$1" "$2" "$3" >&2
	return 1
}

# status COMMAND ...: prints its exit status.
status() {
	local s=0
	"$@" >/dev/null || s=$?
	echo $s
}

free_port() {
	/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# greets HOST PORT: something there says it is an SSH server.
greets() { /usr/bin/python3 -c '
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
s.settimeout(5)
sys.exit(not s.recv(4) == b"SSH-")' "$1" "$2"; }

random() { head -c "$1" /dev/urandom; }
