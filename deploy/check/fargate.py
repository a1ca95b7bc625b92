"""Plays Fargate and the load balancer for moto, which only keeps records of them.

    fargate.py DIR BIN

Each task of a service and each task of RunTask is a process of the program in BIN that
its image is named after, with the command, the environment and the folders of its task
definition, in a network namespace of its own at the task's address. The load balancer is
haproxy with the attributes of the listener and the target group. Traffic that the security
groups do not admit is an error. SIGHUP is passed to the gateways.

The file DIR/pushed lists the images of the registry. DIR has the log of each task.
"""

import http.server
import ipaddress
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import boto3

dir, bin = map(pathlib.Path, sys.argv[1:])
ecs, ec2, elb, logs = (boto3.client(s) for s in ("ecs", "ec2", "elbv2", "logs"))
AWS = os.environ["AWS_ADDRESS"]  # of moto, and of the agent of ECS
PROGRAMS = {"sallyport-gateway": "gateway", "sallyport-bastion": "bastion-agent"}
USERS = {"gateway": "65532", "bastion-agent": "0"}  # of the images


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


class Protection(http.server.BaseHTTPRequestHandler):
    """The task protection endpoint of ECS, which records what is asked for."""

    def do_PUT(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(dir / "protections", "a") as f:
            f.write(f"{self.path} {json.dumps(asked)}\n")
        answer = json.dumps({"protection": asked}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


class Container:
    """A running container of a task."""

    count = 0

    def __init__(self, definition, address, overrides):
        (c,) = definition["containerDefinitions"]
        image = c["image"]
        if image not in (dir / "pushed").read_text().split():
            raise ValueError(f"CannotPullContainerError: {image}")
        Container.count += 1
        name = f"task{Container.count}"
        program = PROGRAMS[image.split("/")[-1].split(":")[0]]
        env = {e["name"]: e["value"] for e in c.get("environment", []) + overrides.get("environment", [])}
        self.log = dir / f"{program}.{name}.log"
        stream(c, name)

        link = f"to-{name}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", link, "up")
        run("ip", "route", "add", address, "dev", link)
        for command in (["link", "set", "lo", "up"], ["link", "set", "eth0", "up"], ["addr", "add", address, "dev", "eth0"], ["route", "add", "default", "via", AWS, "dev", "eth0", "onlink"]):
            run("ip", "-n", name, *command)

        mounts = ""
        for m in c.get("mountPoints", []):
            assert m["sourceVolume"] in [v["name"] for v in definition["volumes"]]
            folder = dir / name / m["sourceVolume"]
            folder.mkdir(parents=True)
            os.chown(folder, int(USERS[program]), int(USERS[program]))
            folder.chmod(0o700)
            pathlib.Path(m["containerPath"]).mkdir(parents=True, exist_ok=True)
            mounts += f"mount --bind {folder} {m['containerPath']} && "
        user = USERS[program]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", name, "sh", "-c", mounts + f'exec setpriv --reuid {user} --regid {user} --clear-groups "$@"', "sh",
             bin / program, *overrides.get("command", c.get("command", []))],
            env={"PATH": os.environ["PATH"]} | {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
            | {"AWS_EXECUTION_ENV": "AWS_ECS_FARGATE", "ECS_AGENT_URI": f"http://{AWS}:51678/api/{name}"} | env,
            stdin=subprocess.DEVNULL, stdout=open(self.log, "w"), stderr=subprocess.STDOUT, cwd="/", start_new_session=True)

    def exited(self):
        return self.process.poll() is not None

    def stop(self):
        self.process.send_signal(signal.SIGTERM)


def stream(container, name):
    """Creates the log stream, as the driver awslogs does."""
    options = container["logConfiguration"]["options"]
    logs.create_log_stream(logGroupName=options["awslogs-group"], logStreamName=f"{options['awslogs-stream-prefix']}/{container['name']}/{name}")


def admitted(rules, port, group, network):
    """Whether rules of a security group admit a port for a group or a network."""
    return any(
        r["IpProtocol"] in ("-1", "tcp")
        and (r["IpProtocol"] == "-1" or r["FromPort"] <= port <= r["ToPort"])
        and (any(p["GroupId"] == group for p in r["UserIdGroupPairs"])
             or any(network.subnet_of(ipaddress.ip_network(i["CidrIp"])) for i in r["IpRanges"]))
        for r in rules)


def require(source, target, port, source_network, target_network):
    """Fails unless the security groups admit the port from source to target."""
    groups = {g["GroupId"]: g for g in ec2.describe_security_groups(GroupIds=[source, target])["SecurityGroups"]}
    if not admitted(groups[source]["IpPermissionsEgress"], port, target, target_network) or not admitted(groups[target]["IpPermissions"], port, source, source_network):
        raise ValueError(f"security groups do not admit port {port} from {source} to {target}")


def networks(ids):
    return [ipaddress.ip_network(s["CidrBlock"]) for s in sorted(ec2.describe_subnets(SubnetIds=ids)["Subnets"], key=lambda s: ids.index(s["SubnetId"]))]


class Service:
    """The gateways, and the load balancer before them."""

    def __init__(self, service):
        vpc = service["networkConfiguration"]["awsvpcConfiguration"]
        self.group, self.subnets = vpc["securityGroups"][0], networks(vpc["subnets"])
        (target,) = service["loadBalancers"]
        self.definition = ecs.describe_task_definition(taskDefinition=service["taskDefinition"])["taskDefinition"]
        (container,) = self.definition["containerDefinitions"]
        assert container["name"] == target["containerName"] and target["containerPort"] in [m["containerPort"] for m in container["portMappings"]]
        self.addresses = [str(self.subnets[i % len(self.subnets)][10 + i]) for i in range(service["desiredCount"])]
        self.balance(target)
        self.containers = [Container(self.definition, a, {}) for a in self.addresses]

    def balance(self, target):
        (group,) = elb.describe_target_groups(TargetGroupArns=[target["targetGroupArn"]])["TargetGroups"]
        (balancer,) = elb.describe_load_balancers(LoadBalancerArns=group["LoadBalancerArns"])["LoadBalancers"]
        (listener,) = elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])["Listeners"]
        attributes = {a["Key"]: a["Value"] for a in elb.describe_target_group_attributes(TargetGroupArn=group["TargetGroupArn"])["Attributes"]}
        assert balancer["Type"] == "network" and listener["Protocol"] == group["Protocol"] == "TCP"
        assert attributes["preserve_client_ip.enabled"] == "false"
        nodes = networks([z["SubnetId"] for z in balancer["AvailabilityZones"]])
        for source in nodes:
            for subnet in self.subnets:
                for port in group["Port"], int(group["HealthCheckPort"]):
                    require(balancer["SecurityGroups"][0], self.group, port, source, subnet)
        node = str(nodes[0][10])
        run("ip", "addr", "add", f"{node}/32", "dev", "lo")
        proxy = "send-proxy-v2" if attributes["proxy_protocol_v2.enabled"] == "true" else ""
        servers = "\n".join(f"  server g{i} {a}:{group['Port']} {proxy} check port {group['HealthCheckPort']} inter 1s rise {group['HealthyThresholdCount']} fall {group['UnhealthyThresholdCount']} source {node}"
                            for i, a in enumerate(self.addresses))
        config = dir / "haproxy.cfg"
        config.write_text(f"""
defaults
  mode tcp
  timeout connect 5s
  timeout client 350s
  timeout server 350s
  balance source
frontend ssh
  bind {node}:{listener["Port"]}
  default_backend gateways
backend gateways
  option httpchk GET {group["HealthCheckPath"]}
  http-check expect status {group["Matcher"]["HttpCode"]}
{servers}
""")
        self.proxy = subprocess.Popen(["haproxy", "-db", "-f", config], stdout=open(dir / "haproxy.log", "w"), stderr=subprocess.STDOUT)
        with open("/etc/hosts", "a") as f:
            f.write(f"{node} {balancer['DNSName']}\n")

    def check(self, desired):
        """Stops the gateways if none is wanted. It fails if one has ended before."""
        if any(c.exited() for c in self.containers):
            raise ValueError("a gateway has ended: " + self.containers[0].log.read_text())
        if desired == 0:
            for c in self.containers:
                c.stop()
            self.containers = []


class Tasks:
    """The bastions."""

    def __init__(self, service):
        self.service, self.running, self.stopping = service, {}, set()

    def follow(self, cluster):
        arns = [a for status in ("RUNNING", "STOPPED") for a in ecs.list_tasks(cluster=cluster, desiredStatus=status)["taskArns"]]
        for task in ecs.describe_tasks(cluster=cluster, tasks=arns)["tasks"] if arns else []:
            arn = task["taskArn"]
            container = self.running.get(arn)
            if task["desiredStatus"] == "STOPPED":
                if container and arn not in self.stopping:
                    self.stopping.add(arn)
                    container.stop()
            elif not container:
                self.start(task)
            elif container.exited():
                ecs.stop_task(cluster=cluster, task=arn, reason="Essential container in task exited")

    def start(self, task):
        definition = ecs.describe_task_definition(taskDefinition=task["taskDefinitionArn"])["taskDefinition"]
        (overrides,) = task["overrides"]["containerOverrides"]
        details = {d["name"]: d["value"] for d in task["attachments"][0]["details"]}
        interface = ec2.describe_network_interfaces(NetworkInterfaceIds=[details["networkInterfaceId"]])["NetworkInterfaces"][0]
        port = definition["containerDefinitions"][0]["portMappings"][0]["containerPort"]
        for source in self.service.subnets:
            for group in interface["Groups"]:
                require(self.service.group, group["GroupId"], port, source, networks([interface["SubnetId"]])[0])
        self.running[task["taskArn"]] = Container(definition, details["privateIPv4Address"], overrides)


def main():
    (dir / "pid").write_text(str(os.getpid()))
    protection = http.server.ThreadingHTTPServer((AWS, 51678), Protection)
    threading.Thread(target=protection.serve_forever, daemon=True).start()
    service = tasks = None
    signal.signal(signal.SIGHUP, lambda *_: [c.process.send_signal(signal.SIGHUP) for c in service.containers])
    while True:
        for cluster in ecs.list_clusters()["clusterArns"]:
            for arn in ecs.list_services(cluster=cluster)["serviceArns"]:
                for found in ecs.describe_services(cluster=cluster, services=[arn])["services"]:
                    if not service:
                        service = Service(found)
                        tasks = Tasks(service)
                    service.check(found["desiredCount"])
            if tasks:
                tasks.follow(cluster)
        time.sleep(0.2)


main()
