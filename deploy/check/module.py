"""Gives a state of the Terraform module to moto and to gateway check.

    module.py STATE HOST_KEY FLEET_KEY GATEWAY

STATE is the output of terraform show -json. The parameters, secrets and task definitions
of the state are created in moto by the calls of the AWS provider, of which boto3 knows
each name and type. The command of the gateways' container then has to be one with which
the gateway in the file GATEWAY finds its configuration, its keys and its users.
"""

import json
import logging
import os
import pathlib
import subprocess
import sys

import boto3
from moto.server import ThreadedMotoServer

state, host_key, fleet_key, gateway = map(pathlib.Path, sys.argv[1:])

for name in list(os.environ):
    if name.startswith("AWS_"):
        del os.environ[name]
logging.getLogger("werkzeug").setLevel(logging.WARNING)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address, port = server.get_host_and_port()
os.environ |= {
    "AWS_ENDPOINT_URL": f"http://{address}:{port}", "AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1",
    "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
ecs, ssm, secrets = (boto3.client(s) for s in ("ecs", "ssm", "secretsmanager"))


def resources(module):
    yield from module.get("resources", [])
    for child in module.get("child_modules", []):
        yield from resources(child)


def check(command):
    """Runs gateway check with the configuration of the container."""
    assert command[0] == "serve", command
    return subprocess.run([gateway, "check", *command[1:]], capture_output=True, text=True)


def volume_of(v):
    """The volume of a task definition, as the API has it."""
    volume = {"name": v["name"]}
    for efs in v["efs_volume_configuration"]:
        volume["efsVolumeConfiguration"] = {
            "fileSystemId": efs["file_system_id"], "transitEncryption": efs["transit_encryption"],
            "authorizationConfig": {"accessPointId": efs["authorization_config"][0]["access_point_id"], "iam": efs["authorization_config"][0]["iam"]},
        }
    return volume


commands, stored = [], []
for r in resources(json.loads(state.read_text())["values"]["root_module"]):
    v = r["values"]
    match r["type"]:
        case "aws_ssm_parameter":
            ssm.put_parameter(Name=v["name"], Type=v["type"], Value=v["value"], Tier=v["tier"])
        case "aws_secretsmanager_secret":
            stored.append((v["name"], host_key if r["name"] == "host_key" else fleet_key))
        case "aws_ecs_task_definition":
            containers = json.loads(v["container_definitions"])
            made = ecs.register_task_definition(
                family=v["family"], networkMode=v["network_mode"], requiresCompatibilities=v["requires_compatibilities"],
                cpu=v["cpu"], memory=v["memory"], executionRoleArn=v["execution_role_arn"],
                taskRoleArn=v["task_role_arn"] or "", tags=[{"key": k, "value": t} for k, t in v["tags"].items()],
                volumes=[volume_of(volume) for volume in v["volume"]], containerDefinitions=containers)["taskDefinition"]
            for c in containers:
                volumes = [volume["name"] for volume in made["volumes"]]
                assert all(m["sourceVolume"] in volumes for m in c.get("mountPoints", [])), c
            if r["name"] == "gateway":
                commands.append(containers[0]["command"])
(command,) = commands

without = check(command)
assert without.returncode == 1 and all(name in without.stderr for name, _ in stored), f"without keys: {without}"
for name, file in stored:
    secrets.create_secret(Name=name, SecretString=file.read_text())
result = check(command)
print(result.stdout + result.stderr)
sys.exit(result.returncode)
