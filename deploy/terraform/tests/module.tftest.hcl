# Runs the module with a provider that makes up all values of AWS.

mock_provider "aws" {
  mock_data "aws_region" {
    defaults = { region = "eu-west-1" }
  }
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_subnet" {
    defaults = { cidr_block = "10.0.1.0/24" }
  }
}

variables {
  vpc_id           = "vpc-1"
  balancer_subnets = ["subnet-a1", "subnet-b1"]
  gateway_subnets  = ["subnet-a2", "subnet-b2"]
  client_cidrs     = ["203.0.113.0/24"]
  gateway_image    = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/gateway:1.2"
  bastion_image    = "ghcr.io/example/bastion@sha256:0123"
  users            = { alice = ["ssh-ed25519 AAAA alice", "ssh-rsa BBBB alice"] }
  host_key         = "host"
  fleet_key        = "fleet"
}

run "defaults" {
  assert {
    condition     = aws_lb_listener.ssh.port == 22 && aws_lb_target_group.gateway.port == 2222 && aws_lb_target_group.gateway.proxy_protocol_v2 && aws_lb_target_group.gateway.preserve_client_ip == "false"
    error_message = "port 22 must lead to port 2222 with PROXY headers"
  }
  assert {
    condition     = one(aws_lb_target_group.gateway.health_check[*].path) == "/readyz" && one(aws_lb_target_group.gateway.health_check[*].port) == "9222"
    error_message = "the health check must use the monitoring port"
  }
  assert {
    condition     = length(aws_lb.gateway.security_groups) == 1 && !aws_lb.gateway.internal
    error_message = "the balancer must be created with a security group"
  }
  assert {
    condition     = local.drain_delay + var.drain < local.stop_timeout && var.deregistration_delay >= local.drain_delay + var.drain
    error_message = "a gateway must have ended before stopTimeout, and before the deregistration delay"
  }
  assert {
    condition = (
      yamldecode(aws_ssm_parameter.config.value).listen == ":2222" &&
      yamldecode(aws_ssm_parameter.config.value).drain == "80s" &&
      yamldecode(aws_ssm_parameter.config.value).monitoring.listen == ":9222" &&
      yamldecode(aws_ssm_parameter.config.value).audit.to == "stdout" &&
      yamldecode(aws_ssm_parameter.config.value).authorized_keys_dir == "ssm:/sallyport/users" &&
      yamldecode(aws_ssm_parameter.config.value).proxy_protocol_from == ["10.0.1.0/24", "10.0.1.0/24"] &&
      yamldecode(aws_ssm_parameter.config.value).ledger.dynamodb.table == "sallyport"
    )
    error_message = "gateway.yaml: ${aws_ssm_parameter.config.value}"
  }
  assert {
    condition     = keys(yamldecode(aws_ssm_parameter.config.value).profiles) == ["default"] && yamldecode(aws_ssm_parameter.config.value).profiles.default.fargate.subnets == ["subnet-a2", "subnet-b2"]
    error_message = "profiles: ${aws_ssm_parameter.config.value}"
  }
  assert {
    condition     = aws_ssm_parameter.user["alice"].name == "/sallyport/users/alice" && aws_ssm_parameter.user["alice"].value == "ssh-ed25519 AAAA alice\nssh-rsa BBBB alice"
    error_message = "a user must have one parameter with all her keys"
  }
  assert {
    condition     = aws_ecs_service.gateway.desired_count == 2 && aws_ecs_service.gateway.deployment_maximum_percent == 200 && !aws_ecs_service.gateway.enable_execute_command
    error_message = "one gateway for each subnet, none stopped before its successor is healthy, and no ECS Exec"
  }
  assert {
    condition     = aws_dynamodb_table.ledger.hash_key == "pk" && aws_dynamodb_table.ledger.range_key == "sk" && aws_dynamodb_table.ledger.deletion_protection_enabled
    error_message = "the table must be that of gateway ledger create-table"
  }
  assert {
    condition = alltrue([
      for d in concat([aws_ecs_task_definition.gateway], values(aws_ecs_task_definition.bastion)) :
      alltrue([for c in jsondecode(d.container_definitions) : c.logConfiguration.options.mode == "non-blocking" && c.stopTimeout == 120 && !contains(keys(c), "secrets")])
    ])
    error_message = "containers must not block on their log, and have no secrets"
  }
  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].command == ["serve", "--config", "ssm:/sallyport/gateway.yaml"]
    error_message = "the gateway must read its configuration from the parameter"
  }
  assert {
    condition     = aws_ecs_task_definition.bastion["default"].task_role_arn == null && aws_ecs_task_definition.bastion["default"].family == "sallyport-bastion"
    error_message = "bastions have no role by default"
  }
  assert {
    condition     = [for s in jsondecode(aws_iam_role_policy.gateway_task.policy).Statement : s.Sid] == ["Start", "Tag", "FollowAndStop", "Find", "PassRoles", "Ledger", "ReadParameters", "ReadSecrets"]
    error_message = "the gateway has permissions that it does not need: ${aws_iam_role_policy.gateway_task.policy}"
  }
  assert {
    condition = (
      contains(flatten([for s in jsondecode(aws_iam_role_policy.gateway_execution.policy).Statement : s.Resource]), "arn:aws:ecr:eu-west-1:123456789012:repository/team/gateway") &&
      !strcontains(aws_iam_role_policy.bastion_execution.policy, "ecr:")
    )
    error_message = "execution roles may pull their own image from ECR, and need no permission for other registries"
  }
  assert {
    condition     = length(aws_secretsmanager_secret_version.host_key) == 0 && length(aws_vpc_endpoint.interface) == 0 && length(aws_route53_record.gateway) == 0
    error_message = "secrets are empty, and there are no endpoints and records, by default"
  }
  assert {
    condition     = !anytrue([for r in concat(values(aws_vpc_security_group_ingress_rule.gateway), [aws_vpc_security_group_ingress_rule.gateways, aws_vpc_security_group_ingress_rule.bastion]) : r.cidr_ipv4 != null])
    error_message = "gateways and bastions admit security groups only"
  }
}

run "everything" {
  variables {
    name                  = "prod"
    bastion_subnets       = ["subnet-c1", "subnet-c2", "subnet-c3"]
    gateway_count         = 3
    create_endpoints      = true
    endpoint_route_tables = ["rtb-1"]
    zone_id               = "Z1"
    domain_name           = "ssh.example.com"
    kms_key_arn           = "arn:aws:kms:eu-west-1:123456789012:key/k"
    task_protection       = "8h"
    keys_version          = 1
    alarm_topics          = ["arn:aws:sns:eu-west-1:123456789012:t"]
    settings              = { roles = { admins = { users = ["alice"], admin = true } }, audit = { to = "stdout", on_error = "continue" } }
    profiles = {
      default = { capacity = "spot", isolate = true, egress = ["tcp 443 0.0.0.0/0"] }
      deploy  = { cpu = 1024, memory = 2048, task_policy = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
    }
  }
  assert {
    condition = (
      yamldecode(aws_ssm_parameter.config.value).roles.admins.admin &&
      yamldecode(aws_ssm_parameter.config.value).audit.on_error == "continue" &&
      yamldecode(aws_ssm_parameter.config.value).task_protection == "8h" &&
      yamldecode(aws_ssm_parameter.config.value).profiles.default.fargate.isolate &&
      yamldecode(aws_ssm_parameter.config.value).profiles.default.fargate.capacity == "spot" &&
      !contains(keys(yamldecode(aws_ssm_parameter.config.value).profiles.default.fargate), "security_groups") &&
      yamldecode(aws_ssm_parameter.config.value).profiles.deploy.fargate.task_role == aws_iam_role.bastion_task["deploy"].arn
    )
    error_message = "gateway.yaml: ${aws_ssm_parameter.config.value}"
  }
  assert {
    condition = [for s in jsondecode(aws_iam_role_policy.gateway_task.policy).Statement : s.Sid] == [
      "Start", "Tag", "FollowAndStop", "Find", "PassRoles", "Ledger", "ReadParameters", "ReadSecrets", "Decrypt", "Protect", "LookAtGroups", "MakeGroups", "TagNewGroups", "ChangeOwnGroups",
    ]
    error_message = "policy: ${aws_iam_role_policy.gateway_task.policy}"
  }
  assert {
    condition     = one([for s in jsondecode(aws_iam_role_policy.gateway_task.policy).Statement : s.Resource if s.Sid == "PassRoles"]) == ["arn:aws:iam::123456789012:role/prod-bastion-execution", "arn:aws:iam::123456789012:role/prod-bastion-task-deploy"]
    error_message = "the gateway may pass the roles of bastions only"
  }
  assert {
    condition     = toset(keys(aws_vpc_endpoint.interface)) == toset(["ecs", "ssm", "secretsmanager", "ecr.api", "ecr.dkr", "logs", "kms", "ec2"]) && toset(keys(aws_vpc_endpoint.gateway)) == toset(["s3", "dynamodb"])
    error_message = "endpoints"
  }
  assert {
    condition     = output.address == "ssh.example.com" && aws_ecs_service.gateway.desired_count == 3 && length(aws_vpc_security_group_egress_rule.agents) == 3
    error_message = "name, number of gateways, and their way to the bastions"
  }
  assert {
    condition     = aws_secretsmanager_secret_version.host_key[0].secret_string == null && aws_secretsmanager_secret_version.host_key[0].secret_string_wo_version == 1
    error_message = "keys must not be in the state"
  }
}

run "homes" {
  variables {
    homes = true
    users = { alice = ["ssh-ed25519 AAAA alice"], "b_ob.smith" = ["ssh-ed25519 BBBB bob"] }
    profiles = {
      default = {}
      big     = {}
    }
  }
  assert {
    condition = (
      yamldecode(aws_ssm_parameter.config.value).profiles.default.fargate.user_task_definitions == "sallyport-user-%u" &&
      !contains(keys(yamldecode(aws_ssm_parameter.config.value).profiles.big.fargate), "user_task_definitions")
    )
    error_message = "gateway.yaml: ${aws_ssm_parameter.config.value}"
  }
  assert {
    condition     = aws_ecs_task_definition.home["b_ob.smith"].family == "sallyport-user-b_5fob_2esmith" && aws_ecs_task_definition.home["alice"].tags["sallyport:user"] == "alice"
    error_message = "the gateway must find the task definitions of users, and accept them"
  }
  assert {
    condition = alltrue([for user, definition in aws_ecs_task_definition.home :
      one(one(definition.volume).efs_volume_configuration).authorization_config[0].access_point_id == aws_efs_access_point.home[user].id &&
      one(one(definition.volume).efs_volume_configuration).authorization_config[0].iam == "ENABLED" &&
      definition.task_role_arn == aws_iam_role.home[user].arn &&
      jsondecode(aws_iam_role_policy.home[user].policy).Statement[0].Condition.StringEquals["elasticfilesystem:AccessPointArn"] == aws_efs_access_point.home[user].arn &&
      jsondecode(definition.container_definitions)[0].mountPoints == [{ sourceVolume = "home", containerPath = "/home/bastion" }]
    ])
    error_message = "each user must have her own home, and no role for another one"
  }
  assert {
    condition     = one([for s in jsondecode(aws_iam_role_policy.gateway_task.policy).Statement : length(s.Resource) if s.Sid == "PassRoles"]) == 3 && contains([for s in jsondecode(aws_iam_role_policy.gateway_task.policy).Statement : s.Sid], "StartUsersOwn")
    error_message = "policy: ${aws_iam_role_policy.gateway_task.policy}"
  }
}
