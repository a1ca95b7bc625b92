# Gateways on ECS behind a Network Load Balancer, and all that they need to start a
# bastion for each user. README.md has the variables.

data "aws_region" "current" {}
data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

data "aws_subnet" "balancer" {
  count = length(var.balancer_subnets)
  id    = var.balancer_subnets[count.index]
}

data "aws_subnet" "bastion" {
  count = length(local.bastion_subnets)
  id    = local.bastion_subnets[count.index]
}

locals {
  name            = var.name
  region          = data.aws_region.current.region
  account         = data.aws_caller_identity.current.account_id
  bastion_subnets = coalesce(var.bastion_subnets, var.gateway_subnets)
  gateway_count   = coalesce(var.gateway_count, length(var.gateway_subnets))
  # Not sallyport:deployment: that tag marks the security groups that gateways may change.
  tags = merge({ sallyport = local.name }, var.tags)

  arn         = "arn:${data.aws_partition.current.partition}"
  ecs         = "${local.arn}:ecs:${local.region}:${local.account}"
  cluster_arn = "${local.ecs}:cluster/${local.name}"

  ports = { ssh = 2222, monitoring = 9222, agent = 2022 }

  # Seconds from SIGTERM to SIGKILL: the most that Fargate permits.
  stop_timeout = 120
  # Longer than the load balancer needs to notice a gateway that is not ready.
  drain_delay = 25

  # The gateway's file. It contains no secret.
  gateway = merge(
    { audit = { to = "stdout" } },
    var.settings,
    {
      listen              = ":${local.ports.ssh}"
      host_keys           = ["secretsmanager:${aws_secretsmanager_secret.host_key.name}"]
      fleet_key           = "secretsmanager:${aws_secretsmanager_secret.fleet_key.name}"
      authorized_keys_dir = "ssm:${local.users_path}"
      state_dir           = "/var/lib/sallyport"
      deployment          = local.name
      ledger              = { dynamodb = { table = aws_dynamodb_table.ledger.name } }
      proxy_protocol_from = data.aws_subnet.balancer[*].cidr_block
      monitoring          = { listen = ":${local.ports.monitoring}" }
      drain_delay         = "${local.drain_delay}s"
      drain               = "${var.drain}s"
      task_protection     = var.task_protection
      profiles            = { for name, p in var.profiles : name => local.profile[name] }
    },
  )

  profile = {
    for name, p in var.profiles : name => {
      launcher      = "fargate"
      idle          = p.idle
      max_life      = p.max_life
      start_timeout = p.start_timeout
      record        = p.record
      fargate = { for key, value in {
        cluster               = local.cluster_arn
        task_definition       = aws_ecs_task_definition.bastion[name].arn
        user_task_definitions = name == "default" && var.homes ? "${local.name}-user-%u" : null
        container             = "bastion"
        account               = p.account
        subnets               = local.bastion_subnets
        security_groups       = p.isolate ? null : [aws_security_group.bastion.id]
        assign_public_ip      = var.assign_public_ip
        capacity              = p.capacity
        ephemeral_storage     = p.ephemeral_storage
        accept_env            = p.accept_env
        task_role             = p.task_policy == null ? null : aws_iam_role.bastion_task[name].arn
        isolate               = p.isolate ? true : null
        ingress_from          = p.isolate ? [aws_security_group.gateway.id] : null
        egress                = p.egress
      } : key => value if value != null }
    }
  }
}
