# schemathesis, against the HTTP API as an administrator with the operator's token: some five hundred requests that
# follow the served OpenAPI document or break it, among them starts and stops of bastions. openapi-spec-validator checks the document.
. "$CLIENTS/lib.sh"
tool=$CLIENTS/../others/openapi
/usr/bin/python3 -m venv venv
venv/bin/pip install --quiet --retries 10 --disable-pip-version-check -r "$tool/requirements.txt"
port=$(free_port) http=$(free_port)
mkdir -m 700 authorized_keys.d
cp "$KEY.pub" authorized_keys.d/alice
ssh-keygen -q -t ed25519 -N '' -f host
ssh-keygen -q -t ed25519 -N '' -f fleet_key
(umask 077 && openssl rand -hex 32 >token)
cat >gateway.yaml <<-EOF_YAML
	listen: 127.0.0.1:$port
	host_keys: [host]
	fleet_key: fleet_key
	authorized_keys_dir: authorized_keys.d
	state_dir: state
	drain: 0s
	per_source_penalties: none # some requests have a wrong token
	audit: {to: ./audit.log}
	api: {listen: "127.0.0.1:$http", operator_token: token}
	profiles:
	  default: {idle: 10s, local: {account: $(id -un)}}
	  big: {idle: 10s, local: {account: $(id -un)}} # of the document's example
EOF_YAML
background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
document=http://127.0.0.1:$http/v1/openapi.json
eventually curl -sf -o openapi.json "$document"
venv/bin/openapi-spec-validator openapi.json
TOKEN=$(cat token) venv/bin/schemathesis --no-color --config-file "$tool/schemathesis.toml" run --continue-on-failure "$document"
equal errors "$(grep '"level":"ERROR"' gateway.log || true)" '' # a panic is one
# They were not all refused.
grep -q '"event":"bastion-started"' audit.log
grep -q '"event":"bastion-stopped"' audit.log
