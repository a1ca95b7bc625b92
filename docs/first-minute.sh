#!/bin/bash
# docs/first-minute.sh records a user's first minute with a gateway: real programs
# in a real terminal, typed at by this script. It writes
#
#   docs/first-minute.cast   the recording; asciinema play shows it
#   docs/first-minute.svg    the last screen of it, the picture in the README
#
# Run it again when output that it shows has changed. It needs root, because it
# works in namespaces of its own: there are an account alice, a host db.internal,
# and port 22 on loopback addresses. Nothing outside of them changes.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1-}" != --inside ]; then
	make --silent build
	scripts/apt-require asciinema tmux openssh-client openssh-server iproute2
	exec unshare --mount --net --pid --fork --kill-child --mount-proc "$0" --inside
fi

docs=$PWD/docs
work=$(mktemp -d)
chmod 755 "$work"
trap 'rm -rf "$work"' EXIT
ip link set lo up
mkdir -p /run/sshd

# The account, on the machine that runs the bastions, and the names of the hosts.
uid=64001
mkdir -p "$work"/{etc,bastion,laptop/.ssh,state,keys}
for file in passwd group shadow hosts; do
	cp "/etc/$file" "$work/etc/$file"
done
echo "alice:x:$uid:$uid::$work/bastion:/bin/bash" >>"$work/etc/passwd"
echo "alice:x:$uid:" >>"$work/etc/group"
echo "alice:*:20000::::::" >>"$work/etc/shadow"
echo "127.0.0.1 gateway
127.0.0.2 db.internal" >>"$work/etc/hosts"
for file in passwd group shadow hosts; do
	mount --bind "$work/etc/$file" "/etc/$file"
done
touch "$work/bastion/.hushlogin"
echo "PS1='alice@bastion:~\$ '" >"$work/bastion/.bash_profile"

# Her laptop knows the host keys, as it does after the first question.
for key in host fleet db; do
	ssh-keygen -q -t ed25519 -N '' -C '' -f "$work/$key"
done
ssh-keygen -q -t ed25519 -N '' -C alice@laptop -f "$work/laptop/.ssh/id_ed25519"
cp "$work/laptop/.ssh/id_ed25519.pub" "$work/keys/alice"
echo "gateway $(cat "$work/host.pub")
db.internal $(cat "$work/db.pub")" >"$work/laptop/.ssh/known_hosts"
echo "Quarterly report" >"$work/laptop/report.txt"
# HOME does not move ssh's files, so they are named.
cat >"$work/laptop/.ssh/config" <<END
Host *
  IdentityFile $work/laptop/.ssh/id_ed25519
  UserKnownHostsFile $work/laptop/.ssh/known_hosts
END
mkdir "$work/bastion/.ssh"
cp -r "$work/laptop/.ssh/." "$work/bastion/.ssh/"
cp "$work/keys/alice" "$work/bastion/.ssh/authorized_keys"
chown -R "$uid:$uid" "$work/bastion" "$work/laptop"
chmod 700 "$work"/{bastion,laptop}/.ssh

cat >"$work/gateway.yaml" <<END
listen: 127.0.0.1:22
host_keys: [host]
fleet_key: fleet
authorized_keys_dir: keys
state_dir: state
profiles:
  default: {idle: 10s}
END
bin/gateway serve --config "$work/gateway.yaml" 2>"$work/gateway.log" &
unshare --uts sh -c "hostname db; exec /usr/sbin/sshd -D -f /dev/null -p 22 -o ListenAddress=127.0.0.2 -h $work/db -o PidFile=none" 2>"$work/sshd.log" &
until grep -q '"listening"' "$work/gateway.log"; do sleep 0.1; done

cat >"$work/session" <<END
cd $work/laptop
export HOME=$work/laptop SHELL=/bin/bash TERM=xterm PS1='\$ ' PATH=/usr/bin:/bin
exec asciinema rec -q -i 1.5 -t "A first minute with Sallyport" -c 'bash --norc' $work/laptop/first-minute.cast
END
alice() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
screen() { alice tmux -S "$work/laptop/tmux" "$@"; }
columns=84 rows=21
screen -f /dev/null new-session -d -x $columns -y $rows "sh $work/session"

# await TEXT: waits until it is the last line of the screen.
await() {
	local i
	for i in $(seq 300); do
		[ "$(screen capture-pane -p | sed '/^ *$/d; s/ *$//' | tail -n 1)" != "$1" ] || return 0
		sleep 0.1
	done
	echo "the screen does not end with: $1" >&2
	screen capture-pane -p >&2
	exit 1
}

# enter LINE PROMPT: types a line, and waits for the prompt after it.
enter() {
	local i
	for ((i = 0; i < ${#1}; i++)); do
		screen send-keys -l -- "${1:i:1}"
		sleep 0.04
	done
	sleep 0.3
	screen send-keys Enter
	sleep 0.2
	await "$2"
	sleep 0.8
}

await '$'
enter 'ssh alice@gateway' 'alice@bastion:~$'
enter 'whoami' 'alice@bastion:~$'
enter 'exit' '$'
enter 'scp report.txt alice@gateway:' '$'
enter 'ssh -J alice@gateway db.internal hostname' '$'
enter 'ssh alice+ctl@gateway status' '$'
enter 'sleep 15   # this gateway has idle: 10s, the default is 15m' '$'
enter 'ssh alice+ctl@gateway status' '$'

screen capture-pane -p | sed '/^ *$/d; s/ *$//' | head -n -1 >"$work/screen"
screen send-keys -l exit
screen send-keys Enter
for i in $(seq 50); do
	screen has-session 2>/dev/null || break
	sleep 0.1
done

cp "$work/laptop/first-minute.cast" "$docs/first-minute.cast"

awk -v columns=$columns '
	{ line[NR] = $0 }
	END {
		width = columns * 8.5 + 32; height = NR * 19 + 32
		printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" role=\"img\">\n", width, height, width, height
		print "<title>A terminal: ssh alice@gateway starts a bastion, which ends after its last connection</title>"
		printf "<rect width=\"%d\" height=\"%d\" rx=\"8\" fill=\"#1e2127\"/>\n", width, height
		print "<g font-family=\"ui-monospace,SFMono-Regular,Menlo,Consolas,monospace\" font-size=\"14\" fill=\"#c8ccd4\" xml:space=\"preserve\">"
		for (i = 1; i <= NR; i++) {
			text = line[i]
			gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text)
			bold = line[i] ~ /^(\$|alice@bastion:~\$) / ? " fill=\"#ffffff\" font-weight=\"bold\"" : ""
			printf "<text x=\"16\" y=\"%d\"%s>%s</text>\n", i * 19 + 10, bold, text
		}
		print "</g>"
		print "</svg>"
	}' "$work/screen" >"$docs/first-minute.svg"
cat "$work/screen"
