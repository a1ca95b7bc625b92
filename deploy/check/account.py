# Moto as a server, completed so that it deploys quickstart.yaml. Resources of the types
# below are made by the calls that CloudFormation makes for them, through boto3, which
# knows the name and the type of each parameter. Each entry says what moto lacks, and is
# an error if a version of moto does not lack it any more, so the lists can only shrink.
import copy
import inspect
import ipaddress
import os
import runpy
import sys
import types

import boto3
import botocore.exceptions
import moto.cloudformation.models as stacks
import moto.cloudformation.parsing as parsing
import moto.ecs.models as ecs

# Types that moto's CloudFormation does not have.
MISSING = ["AWS::CloudWatch::Alarm", "AWS::EC2::KeyPair", "AWS::Logs::MetricFilter"]

# Types of which moto's CloudFormation ignores properties, each with one of these.
IGNORED = {
    "AWS::DynamoDB::Table": "PointInTimeRecoverySpecification",
    "AWS::EC2::VPC": "EnableDnsHostnames",
    "AWS::ECS::Cluster": "ClusterSettings",
    "AWS::ECS::Service": "NetworkConfiguration",
    "AWS::ECS::TaskDefinition": "TaskRoleArn",
    "AWS::ElasticLoadBalancingV2::Listener": "ListenerAttributes",
    "AWS::ElasticLoadBalancingV2::LoadBalancer": "LoadBalancerAttributes",
    "AWS::ElasticLoadBalancingV2::TargetGroup": "TargetGroupAttributes",
}

# Parts of templates that moto's CloudFormation does not evaluate as AWS does. The values
# are those that AWS returns.
FUNCTIONS = [
    ({"Fn::Cidr": ["10.20.0.0/16", 4, 12]}, ["10.20.0.0/20", "10.20.16.0/20", "10.20.32.0/20", "10.20.48.0/20"]),
    ({"Fn::GetAZs": ""}, ["eu-west-1a", "eu-west-1b", "eu-west-1c", "eu-west-1d"]),
]


def client(service):
    return boto3.client(service, endpoint_url=f"http://{os.environ['MOTO_ADDRESS']}")


def typed(shape, value, where):
    """The value with the names and types of the API, which writes some names in another
    case. A name that the API does not have is an error."""
    if shape.type_name == "structure":
        names = {name.lower(): name for name in shape.members}
        for name in value:
            if name.lower() not in names:
                raise ValueError(f"{where} has no {name}")
        return {names[n.lower()]: typed(shape.members[names[n.lower()]], v, f"{where}.{n}") for n, v in value.items()}
    if shape.type_name == "list":
        return [typed(shape.member, v, where) for v in value]
    if shape.type_name == "map":
        return {k: typed(shape.value, v, where) for k, v in value.items()}
    if shape.type_name in ("integer", "long"):
        return int(value)
    if shape.type_name in ("float", "double"):
        return float(value)
    if shape.type_name == "boolean":
        return value in (True, "true")
    return str(value)


def call(service, operation, properties):
    c = client(service)
    shape = c.meta.service_model.operation_model(operation).input_shape
    snake = "".join("_" + ch.lower() if ch.isupper() else ch for ch in operation).lstrip("_")
    return getattr(c, snake)(**typed(shape, properties, operation))


def take(properties, name):
    return properties.pop(name, [])


class Made:
    """A resource that was made by a call, as moto's CloudFormation uses it."""

    def __init__(self, id, attributes=None, remove=None):
        self.id, self.attributes, self.remove = id, attributes or {}, remove

    @property
    def physical_resource_id(self):
        return self.id

    def is_created(self):
        return True

    def get_cfn_attribute(self, name):
        return self.attributes[name]

    def delete(self, account_id, region_name):
        try:
            if self.remove:
                call(*self.remove)
        except botocore.exceptions.ClientError as e:
            # Moto deletes in any order, and a load balancer takes its listeners along.
            if "NotFound" not in e.response["Error"]["Code"]:
                raise


def make_key_pair(name, p):
    made = call("ec2", "CreateKeyPair", {"KeyName": p["KeyName"], "KeyType": p["KeyType"]})
    parameter = "/ec2/keypair/" + made["KeyPairId"]
    call("ssm", "PutParameter", {"Name": parameter, "Type": "SecureString", "Value": made["KeyMaterial"]})

    class KeyPair(Made):
        def delete(self, account_id, region_name):
            call("ec2", "DeleteKeyPair", {"KeyName": p["KeyName"]})
            call("ssm", "DeleteParameter", {"Name": parameter})

    return KeyPair(p["KeyName"], {"KeyPairId": made["KeyPairId"], "KeyFingerprint": made["KeyFingerprint"]})


def make_vpc(name, p):
    tags = {"ResourceType": "vpc", "Tags": p["Tags"]}
    vpc = call("ec2", "CreateVpc", {"CidrBlock": p["CidrBlock"], "TagSpecifications": [tags]})["Vpc"]["VpcId"]
    for attribute in "EnableDnsSupport", "EnableDnsHostnames":
        call("ec2", "ModifyVpcAttribute", {"VpcId": vpc, attribute: {"Value": p[attribute]}})
    return Made(vpc)  # which stays: moto does not delete its route tables


def make_table(name, p):
    encrypted, recovery = p.pop("SSESpecification"), p.pop("PointInTimeRecoverySpecification")
    table = {"TableName": p["TableName"]}
    arn = call("dynamodb", "CreateTable", p | {"SSESpecification": {"Enabled": encrypted["SSEEnabled"]}})["TableDescription"]["TableArn"]
    call("dynamodb", "UpdateContinuousBackups", table | {"PointInTimeRecoverySpecification": recovery})
    return Made(p["TableName"], {"Arn": arn}, ("dynamodb", "DeleteTable", table))


def make_alarm(name, p):
    call("cloudwatch", "PutMetricAlarm", p)
    return Made(p["AlarmName"], {}, ("cloudwatch", "DeleteAlarms", {"AlarmNames": [p["AlarmName"]]}))


def make_metric_filter(name, p):
    call("logs", "PutMetricFilter", p | {"FilterName": name})
    return Made(name, {}, ("logs", "DeleteMetricFilter", {"LogGroupName": p["LogGroupName"], "FilterName": name}))


def make_cluster(name, p):
    settings = p.pop("ClusterSettings")
    arn = call("ecs", "CreateCluster", p | {"Settings": settings})["cluster"]["clusterArn"]
    return Made(p["ClusterName"], {"Arn": arn}, ("ecs", "DeleteCluster", {"Cluster": p["ClusterName"]}))


def make_service(name, p):
    made = call("ecs", "CreateService", p)["service"]
    return Made(made["serviceArn"], {"Name": p["ServiceName"]}, ("ecs", "DeleteService", {"Cluster": p["Cluster"], "Service": p["ServiceName"], "Force": True}))


def make_task_definition(name, p):
    arn = call("ecs", "RegisterTaskDefinition", p)["taskDefinition"]["taskDefinitionArn"]
    return Made(arn, {}, ("ecs", "DeregisterTaskDefinition", {"TaskDefinition": arn}))


def make_load_balancer(name, p):
    attributes = take(p, "LoadBalancerAttributes")
    made = call("elbv2", "CreateLoadBalancer", {"Name": name} | p)["LoadBalancers"][0]
    arn = made["LoadBalancerArn"]
    call("elbv2", "ModifyLoadBalancerAttributes", {"LoadBalancerArn": arn, "Attributes": attributes})
    return Made(arn, {
        "DNSName": made["DNSName"],
        "CanonicalHostedZoneID": made["CanonicalHostedZoneId"],
        "LoadBalancerFullName": arn.split(":loadbalancer/")[1],
    }, ("elbv2", "DeleteLoadBalancer", {"LoadBalancerArn": arn}))


def make_target_group(name, p):
    attributes = take(p, "TargetGroupAttributes")
    arn = call("elbv2", "CreateTargetGroup", {"Name": name} | p)["TargetGroups"][0]["TargetGroupArn"]
    call("elbv2", "ModifyTargetGroupAttributes", {"TargetGroupArn": arn, "Attributes": attributes})
    return Made(arn, {"TargetGroupFullName": arn.split(":")[5]}, ("elbv2", "DeleteTargetGroup", {"TargetGroupArn": arn}))


def make_listener(name, p):
    attributes = take(p, "ListenerAttributes")
    arn = call("elbv2", "CreateListener", p)["Listeners"][0]["ListenerArn"]
    call("elbv2", "ModifyListenerAttributes", {"ListenerArn": arn, "Attributes": attributes})
    return Made(arn, {}, ("elbv2", "DeleteListener", {"ListenerArn": arn}))


MAKERS = {
    "AWS::CloudWatch::Alarm": make_alarm,
    "AWS::DynamoDB::Table": make_table,
    "AWS::EC2::KeyPair": make_key_pair,
    "AWS::EC2::VPC": make_vpc,
    "AWS::ECS::Cluster": make_cluster,
    "AWS::ECS::Service": make_service,
    "AWS::ECS::TaskDefinition": make_task_definition,
    "AWS::ElasticLoadBalancingV2::Listener": make_listener,
    "AWS::ElasticLoadBalancingV2::LoadBalancer": make_load_balancer,
    "AWS::ElasticLoadBalancingV2::TargetGroup": make_target_group,
    "AWS::Logs::MetricFilter": make_metric_filter,
}


class Maker:
    """In the place of moto's class for a type."""

    def __init__(self, make):
        self.make = make

    def create_from_cloudformation_json(self, resource_name, cloudformation_json, account_id, region_name, **kwargs):
        return self.make(resource_name, copy.deepcopy(cloudformation_json["Properties"]))

    def has_cfn_attr(self, attribute):
        return True

    def cloudformation_name_type(self):
        return ""


class Region:
    _region_name = "eu-west-1"


def complain(text):
    sys.exit(f"account.py: {text}: this version of moto does not need it any more, remove it")


def complete():
    models = dict(parsing.get_model_map())
    for name in MISSING:
        if name in models:
            complain(name)
    for name, ignored in IGNORED.items():
        if ignored in inspect.getsource(models[name].create_from_cloudformation_json):
            complain(f"{ignored} of {name}")
    if sorted(MAKERS) != sorted([*MISSING, *IGNORED]):
        sys.exit("account.py: the lists differ from MAKERS")
    models |= {name: Maker(make) for name, make in MAKERS.items()}
    parsing.get_model_map = lambda: models

    of_moto = parsing.clean_json

    def clean_json(value, resources):
        if isinstance(value, dict) and "Fn::Cidr" in value:
            network, count, bits = (of_moto(v, resources) for v in value["Fn::Cidr"])
            subnets = ipaddress.ip_network(network).subnets(new_prefix=32 - int(bits))
            return [str(next(subnets)) for _ in range(int(count))]
        if value == {"Fn::GetAZs": ""}:
            return [resources._region_name + zone for zone in "abcd"]
        return of_moto(value, resources)

    for function, want in FUNCTIONS:
        if of_moto(function, Region) == want:
            complain(function)
        if clean_json(function, Region) != want:
            sys.exit(f"account.py: {function} is {clean_json(function, Region)}")
    parsing.clean_json = clean_json

    # RunTask fails if containers leave their memory to the task.
    requirements = ecs.EC2ContainerServiceBackend._calculate_task_resource_requirements

    def with_memory(definition):
        containers = [{"memory": 0} | c for c in definition.container_definitions]
        return requirements(types.SimpleNamespace(container_definitions=containers))

    try:
        requirements(types.SimpleNamespace(container_definitions=[{}]))
    except TypeError:
        ecs.EC2ContainerServiceBackend._calculate_task_resource_requirements = staticmethod(with_memory)
    else:
        complain("memory of containers")

    # Change sets leave a stack without outputs.
    execute = stacks.CloudFormationBackend.execute_change_set

    def with_outputs(self, change_set_name, stack_name=None):
        execute(self, change_set_name, stack_name)
        change_set = self.describe_change_set(change_set_name)
        stack = self.stacks[change_set.stack_id]
        if stack.output_map.outputs:
            complain("outputs of change sets")
        stack.template_dict = change_set.template_dict
        stack.output_map = stack._create_output_map()

    stacks.CloudFormationBackend.execute_change_set = with_outputs


complete()
runpy.run_path(os.path.join(os.path.dirname(__file__), "../../interop/moto/server.py"), run_name="__main__")
