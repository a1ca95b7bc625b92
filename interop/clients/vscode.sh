# The connections of VS Code: a script on bash's standard input, and SOCKS beside it; two at once, as VS Code opens
# them.
. "$CLIENTS/lib.sh"
web=$(free_port)
echo 'from the bastion' >page
background /usr/bin/python3 -m http.server --bind 127.0.0.1 "$web"

window() { # NAME SOCKS-PORT
	cat >"$1.script" <<-EOF
		echo "$1: running"
		uname -s
		for i in 1 2 3 4 5 6; do sleep 1; [ -e $PWD/$1.done ] && break; done
		echo "$1: end"
		exit 4
	EOF
	ssh -F "$SSH_CONFIG" -T -D "127.0.0.1:$2" -o ConnectTimeout=15 bastion bash <"$1.script" >"$1.out" 2>"$1.err"
}
first=$(free_port) second=$(free_port)
window one "$first" & one=$!
window two "$second" & two=$!
children+=($one $two)
eventually grep -q 'running' one.out
eventually grep -q 'running' two.out
for socks in "$first" "$second"; do
	for i in 1 2 3; do
		equal page "$(curl -sS -m 10 --socks5-hostname "127.0.0.1:$socks" "http://localhost:$web/page")" 'from the bastion'
	done
done
touch one.done two.done
for window in $one $two; do
	ended=0
	wait $window || ended=$?
	equal 'status' "$ended" 4
done
grep -qx 'one: end' one.out

# A forwarded Unix socket.
background /usr/bin/python3 -c '
import socket
s = socket.socket(socket.AF_UNIX); s.bind("server.sock"); s.listen()
while True:
    c, _ = s.accept(); c.sendall(c.recv(100).upper()); c.close()'
background ssh -F "$SSH_CONFIG" -N -L "$PWD/local.sock:$PWD/server.sock" bastion
eventually test -S local.sock
equal 'unix socket' "$(/usr/bin/python3 -c '
import socket
s = socket.socket(socket.AF_UNIX); s.connect("local.sock"); s.sendall(b"hello"); print(s.recv(100).decode())')" HELLO
