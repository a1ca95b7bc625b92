# Other servers in the place of bastion-agent, OpenSSH's sshd and asyncssh: commands, sftp, forwards in both directions, and
# 8 MB each way while the server re-keys at each MiB. Dropbear's server is in the tests of package transport.
. "$CLIENTS/lib.sh"
port=$(free_port)
user=$(id -un) # as sshd wants it to be an account
mkdir -m 700 authorized_keys.d
cp "$KEY.pub" "authorized_keys.d/$user"
ssh-keygen -q -t ed25519 -N '' -f host
ssh-keygen -q -t ed25519 -N '' -f fleet_key
/usr/bin/python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check asyncssh==2.24.1
servers=(sshd asyncssh)
for server in "${servers[@]}"; do
	printf '#!/bin/sh\nexec "%s" -W ignore "%s" %s "$@"\n' "$PWD/venv/bin/python" "$CLIENTS/../others/bastions/agent.py" "$server" >"$server"
	chmod +x "$server"
done
cat >gateway.yaml <<-EOF_YAML
	listen: 127.0.0.1:$port
	host_keys: [host]
	fleet_key: fleet_key
	authorized_keys_dir: authorized_keys.d
	state_dir: state
	drain: 0s
	profiles:
	  default: {idle: 10s, local: {account: $user, agent: $PWD/sshd}}
	  asyncssh: {idle: 10s, local: {account: $user, agent: $PWD/asyncssh}}
EOF_YAML
background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
eventually greets 127.0.0.1 "$port"
options=(-F none -o BatchMode=yes -o IdentitiesOnly=yes -i "$KEY" -o StrictHostKeyChecking=no -o UserKnownHostsFile=known_hosts -o LogLevel=ERROR)
random 8000000 >data

for server in "${servers[@]}"; do
	login=$user+$server
	[ "$server" != sshd ] || login=$user
	client=(ssh "${options[@]}" -p "$port" "$login@127.0.0.1")
	equal "$server: status" "$(status "${client[@]}" exit 7)" 7
	"${client[@]}" 'echo out; echo err >&2' >out 2>err
	equal "$server: stdout" "$(cat out)" out
	equal "$server: stderr" "$(grep -v '^Starting\|^$' err | tr -d '\r' | tail -n 1)" err
	"${client[@]}" cat <data >copy
	cmp data copy
	sftp -q "${options[@]}" -P "$port" "$login@127.0.0.1" >log 2>&1 <<-EOF_SFTP
		put data $PWD/put
		get $PWD/put got
	EOF_SFTP
	cmp data got
	rm put got
	local=$(free_port) remote=$(free_port)
	background "${client[@]}" -N -L "$local:127.0.0.1:$port" -R "$remote:127.0.0.1:$port"
	eventually greets 127.0.0.1 "$local"
	eventually greets 127.0.0.1 "$remote"
done
