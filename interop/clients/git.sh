# git clone, push and fetch.
. "$CLIENTS/lib.sh"
export GIT_SSH_COMMAND="ssh -F $SSH_CONFIG" GIT_CONFIG_GLOBAL=/dev/null
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.com GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.com
git init -q --bare -b main bare.git
git clone -q "ssh://bastion$PWD/bare.git" one 2>log
cd one
random 5000000 >blob
git add blob
git commit -q -m first
git push -q origin HEAD:main
cd ..
git clone -q "bastion:$PWD/bare.git" two
cmp one/blob two/blob
equal head "$(git ls-remote "ssh://bastion$PWD/bare.git" main | cut -f1)" "$(git -C one rev-parse HEAD)"
