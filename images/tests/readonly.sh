# A full bastion with a read-only root file system: sessions, files, agent forwarding.
. "$CLIENTS/lib.sh"
on() { ssh -F "$SSH_CONFIG" readonly "$@"; }
fails on 'touch /var/x'
equal write "$(on 'touch ~/x /tmp/x && echo written')" written
random 1000000 >data
scp -q -F "$SSH_CONFIG" data readonly:copy
sftp -q -F "$SSH_CONFIG" readonly >/dev/null <<<'get copy back'
cmp data back
equal terminal "$(on -tt tty </dev/null | tr -d '\r')" /dev/pts/0
on -tt 'tmux new-session -d -s one; tmux list-sessions; tmux kill-server' </dev/null | grep -q '^one: '
eval "$(ssh-agent -s)" >/dev/null
children+=("$SSH_AGENT_PID")
ssh-add -q "$KEY"
on -A 'ssh-add -l' | grep -q ED25519
DISPLAY=127.0.0.1:99 on -Y 'xauth list "$DISPLAY"' 2>/dev/null | grep -q MIT-MAGIC-COOKIE-1
