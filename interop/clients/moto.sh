# The launcher for Fargate, the shared ledger and the keys in AWS against moto, an independent imitation: starts, stops,
# lists, adopts, and a security group for each user. Cases that moto does not support are skipped by name, and listed.
. "$CLIENTS/lib.sh"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check 'moto[server,dynamodb,ssm,secretsmanager]==5.2.5'
port=$(free_port)
background venv/bin/python "$CLIENTS/../moto/server.py" -H 127.0.0.1 -p "$port" >moto.log 2>&1
eventually curl -sf "http://127.0.0.1:$port/moto-api/data.json"
cd "$CLIENTS/../.."
SALLYPORT_AWS=http://127.0.0.1:$port go test ./internal/fargate -run '^TestContract$' -count=1 -v
SALLYPORT_DYNAMODB=http://127.0.0.1:$port go test ./internal/dynamo -count=1 -v
SALLYPORT_SECRETS=http://127.0.0.1:$port go test ./internal/secrets -count=1 -run '^TestMoto$' -v
