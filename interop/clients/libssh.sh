# libssh, by ssh-python: keys of each type, a command and a forward with much data in both directions, with the client's
# re-keying at each MiB, and each key exchange, host key, cipher and MAC that both have.
. "$CLIENTS/lib.sh"
/usr/bin/python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check ssh-python==1.2.0.post1
gateway_of_all_algorithms
suites "${classic_kex[@]}" >suites
venv/bin/python "$CLIENTS/../others/python/libssh.py" "$port" alice ed25519 ecdsa rsa <suites
