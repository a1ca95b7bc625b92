# Starts of 35 s and of 70 s, with libraries at their defaults: Node's ssh2, JSch, sshj, phpseclib, paramiko, asyncssh, PuTTY,
# and OpenSSH. Each runs a command, and gets exactly its output and exit status.
. "$CLIENTS/lib.sh"
programs=$CLIENTS/../slowstart
npm install --silent --no-audit --no-fund --no-save --prefix node ssh2@1.17.0
cp "$programs/pom.xml" .
mvn -q -B -Dmaven.repo.local="$MAVEN_REPOSITORY" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies -DoutputDirectory=lib
javac -cp 'lib/*' -d classes "$programs/Jsch.java" "$programs/Sshj.java"
cp "$programs/node.js" node/
puttygen "$KEY" -O private -o key.ppk

# A gateway with slow bastions.
mkdir -m 700 authorized_keys.d
cp "$KEY.pub" authorized_keys.d/alice
ssh-keygen -q -t ed25519 -N '' -f host_key
ssh-keygen -q -t ed25519 -N '' -f fleet_key
for seconds in 35 70; do
	printf '#!/bin/sh\nsleep %d\nexec "%s/bastion-agent" "$@"\n' "$seconds" "$BIN" >agent$seconds
	chmod 755 agent$seconds
done
port=$(free_port)
cat >gateway.yaml <<EOF
listen: 127.0.0.1:$port
host_keys: [host_key]
fleet_key: fleet_key
authorized_keys_dir: authorized_keys.d
state_dir: state
drain: 0s
per_source_penalties: none
profiles:
  default: {idle: 20s, local: {account: $(id -un), agent: $PWD/agent35}}
  slow: {idle: 20s, local: {account: $(id -un), agent: $PWD/agent70}}
EOF
background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
eventually greets 127.0.0.1 "$port"

openssh() { echo hello | ssh -F /dev/null -p "$2" -i "$4" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=known_hosts."$3" -o LogLevel=ERROR "$3@$1" 'cat; exit 3' || echo "status $?"; }
putty() { echo hello | plink -ssh -batch -P "$2" -i key.ppk -hostkey "$(ssh-keygen -lf host_key.pub | cut -d' ' -f2)" "$3@$1" 'cat; exit 3' || echo "status $?"; }
run() {
	local user=$1 name=$2
	shift 2
	"$@" 127.0.0.1 "$port" "$user" "$KEY" >"$name.$user.out" 2>"$name.$user.err" || true
	tr '\n' ' ' <"$name.$user.out" | sed 's/ *$/\n/' >"$name.$user"
}
pids=()
for user in alice alice+slow; do
	run $user node node node/node.js & pids+=($!)
	run $user jsch java -cp 'lib/*:classes' Jsch & pids+=($!)
	run $user sshj java -cp 'lib/*:classes' Sshj & pids+=($!)
	run $user phpseclib php "$programs/phpseclib.php" & pids+=($!)
	run $user paramiko /usr/bin/python3 -W ignore "$programs/paramiko_client.py" & pids+=($!)
	run $user asyncssh /usr/bin/python3 "$programs/asyncssh_client.py" & pids+=($!)
	run $user openssh openssh & pids+=($!)
	run $user putty putty & pids+=($!)
done
wait "${pids[@]}"
failed=0
for user in alice alice+slow; do
	for name in node jsch sshj phpseclib paramiko asyncssh openssh putty; do
		equal "$name as $user" "$(cat "$name.$user")" "hello status 3" || { tail -n 5 "$name.$user.err"; failed=1; }
	done
done
[ $failed = 0 ] || { cat gateway.log; exit 1; }
