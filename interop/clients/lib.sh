# Helpers for the tests in this folder. Each is one script, and fails with its
# first failing command. Their environment has
#
#   USER_NAME, HOST, PORT   the user, and the gateway's address
#   KEY                     the user's private key, in OpenSSH's format
#   FINGERPRINT             of the gateway's only host key
#   BIN                     folder of gateway and bastion-agent
#   SSH_CONFIG              for OpenSSH's clients: "Host bastion", and "inside"
#                           for the same gateway as seen from the bastion
#
# They start in an empty folder that is also HOME. The bastion's account is the
# one that runs the tests, so they can read its files.
set -euo pipefail

children=()
# background COMMAND ...: runs the command until the test ends.
background() {
	"$@" &
	children+=($!)
}
trap 'for pid in "${children[@]}"; do kill "$pid" 2>/dev/null || true; done' EXIT

# eventually COMMAND ...: repeats the command until it succeeds, at most 100 times.
eventually() {
	local i
	for i in $(seq 100); do
		"$@" >/dev/null 2>&1 && return 0
		sleep 0.1
	done
	echo "never succeeded: $*" >&2
	return 1
}

# equal NAME GOT WANT: fails, with a message, if GOT is not WANT.
equal() {
	[ "$2" = "$3" ] && return 0
	printf '%s: got %q, want %q\n' "$1" "$2" "$3" >&2
	return 1
}

# fails COMMAND ...: fails, with a message, if the command succeeds. (Bash's -e ignores the
# status of "! COMMAND".)
fails() {
	"$@" >/dev/null 2>&1 || return 0
	echo "succeeded: $*" >&2
	return 1
}

# status COMMAND ...: prints the command's exit status.
status() {
	local s=0
	"$@" >/dev/null || s=$?
	echo $s
}

free_port() {
	/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# greets HOST PORT: succeeds if an SSH server answers there.
greets() { /usr/bin/python3 -c '
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
s.settimeout(5)
sys.exit(not s.recv(4) == b"SSH-")' "$1" "$2"; }

random() { head -c "$1" /dev/urandom; }

classic_kex=(curve25519-sha256 curve25519-sha256@libssh.org ecdh-sha2-nistp256 ecdh-sha2-nistp384 ecdh-sha2-nistp521
	diffie-hellman-group14-sha256)
ciphers=(aes128-gcm@openssh.com aes256-gcm@openssh.com aes128-ctr aes192-ctr aes256-ctr)
macs=(hmac-sha2-256-etm@openssh.com hmac-sha2-512-etm@openssh.com hmac-sha2-256 hmac-sha2-512)

# gateway_of_all_algorithms starts a gateway at $port that accepts each algorithm
# that it implements, and has a host key of each type. The user is alice; her keys
# are ed25519, ecdsa and rsa here.
gateway_of_all_algorithms() {
	local type
	port=$(free_port)
	mkdir -m 700 authorized_keys.d
	for type in ed25519 ecdsa rsa; do
		ssh-keygen -q -t $type -N '' -f host_$type
		ssh-keygen -q -t $type -N '' -f $type
		cat $type.pub >>authorized_keys.d/alice
	done
	ssh-keygen -q -t ed25519 -N '' -f fleet_key
	cat >gateway.yaml <<-EOF_YAML
		listen: 127.0.0.1:$port
		host_keys: [host_ed25519, host_ecdsa, host_rsa]
		fleet_key: fleet_key
		authorized_keys_dir: authorized_keys.d
		state_dir: state
		drain: 0s
		per_source_penalties: none
		kex_algorithms: "+ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group14-sha256"
		profiles:
		  default: {idle: 10s, local: {account: $(id -un)}}
	EOF_YAML
	background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
	eventually greets 127.0.0.1 "$port"
}

# suites KEX ...: prints lines of "KEX HOSTKEY CIPHER MAC" in which each of these
# key exchanges, each host key algorithm, and each pair of a cipher and a MAC is
# once at least.
suites() {
	local kex=$1 each cipher mac
	for each in "$@"; do echo "$each ssh-ed25519 aes128-gcm@openssh.com hmac-sha2-256"; done
	for each in ecdsa-sha2-nistp256 rsa-sha2-256 rsa-sha2-512; do echo "$kex $each aes128-gcm@openssh.com hmac-sha2-256"; done
	for cipher in "${ciphers[@]}"; do
		for mac in "${macs[@]}"; do
			case $cipher/$mac in *gcm*/hmac-sha2-[15]* | *gcm*etm*) ;; *) echo "$kex ssh-ed25519 $cipher $mac" ;; esac
		done
	done
}
