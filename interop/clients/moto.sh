# The launcher for Fargate against moto, an imitation of AWS that others have written: starts, stops, lists, adopts,
# and a security group for each user. What moto cannot do is left out by name, and listed.
. "$CLIENTS/lib.sh"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
port=$(free_port)
background venv/bin/python "$CLIENTS/../moto/server.py" -H 127.0.0.1 -p "$port" >moto.log 2>&1
eventually curl -sf "http://127.0.0.1:$port/moto-api/data.json"
cd "$CLIENTS/../.."
SALLYPORT_AWS=http://127.0.0.1:$port go test ./internal/fargate -run '^TestContract$' -count=1 -v
