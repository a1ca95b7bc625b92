# Profiles: sudo in one of them, and in another one, alice's own image and her home on EFS,
# which outlives her bastions.
. "$CLIENTS/lib.sh"
equal sudo "$(ssh -F "$SSH_CONFIG" admin 'sudo -n id -u; id -un')" $'0\nbastion'

on() { ssh -F "$SSH_CONFIG" own "$@"; }
on 'rg --version' >/dev/null
equal 'another user' "$(status ssh -F "$SSH_CONFIG" bob-own 'rg --version' 2>/dev/null)" 127
on 'echo kept >file; touch /tmp/lost'
ssh -F "$SSH_CONFIG" console stop own --yes >/dev/null
equal 'files after a restart' "$(on 'cat file; test ! -e /tmp/lost || echo the same container')" kept
