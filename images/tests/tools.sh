# The tools of a full bastion, as its account, and sessions of all kinds.
. "$CLIENTS/lib.sh"
on() { ssh -F "$SSH_CONFIG" default "$@"; }
equal account "$(on 'id -un; pwd')" $'bastion\n/home/bastion'
while read -r line; do
	on "$line" >out 2>&1 </dev/null || { echo "$line:"; cat out; exit 1; }
done <<'TOOLS'
psql --version
mysql --version
redis-cli --version
dig -v
ping -c 1 127.0.0.1
nc -z 127.0.0.1 2222
ip -brief address
ss -ltn
curl --version
jq --version
vim --version
nano --version
less --version
tmux -V
git --version
python3 --version
rsync --version
aws --version
session-manager-plugin --version
aws ssm start-session help
TOOLS
grep -q 'AWS_REGION=eu-west-1' <(on env)
equal 'credentials' "$(on 'env | grep -c CREDENTIALS' || true)" 0

# UTF-8, also if the client sends another locale.
equal charmap "$(LANG=xx_XX on -o SendEnv=LANG locale charmap)" UTF-8
equal python "$(on "python3 -c 'print(\"\\u00e5lice\", len(\"åliçe\"))'")" 'ålice 5'
on 'touch "/tmp/ålice"; ls /tmp/?lice' | grep -qx /tmp/ålice

# The user is neither root nor near the agent.
fails on sudo -n true
fails on 'kill 1'
fails on 'cat /proc/1/environ'
fails on 'head -c 1 /proc/1/mem'

# Terminals, and programs that need their names.
for term in xterm-256color xterm-kitty alacritty tmux-256color; do
	equal "$term" "$(TERM=$term ssh -F "$SSH_CONFIG" -tt default 'tput cols >/dev/null && tty' </dev/null | tr -d '\r')" /dev/pts/0
done
on -tt 'tmux new-session -d -s one; tmux list-sessions; tmux kill-server' </dev/null | grep -q '^one: '

# X11: the client's programs, Debian's xauth in the bastion.
DISPLAY=127.0.0.1:99 on -Y 'xauth list "$DISPLAY"' 2>/dev/null | grep -q MIT-MAGIC-COOKIE-1

# Process 1 reaps orphans.
on 'for i in 1 2 3; do (setsid sleep 0.1 >/dev/null 2>&1 &); done'
no_zombies() { [ "$(on 'ps -eo stat= | grep -c Z')" = 0 ]; }
eventually no_zombies
