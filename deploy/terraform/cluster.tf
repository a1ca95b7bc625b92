resource "aws_ecs_cluster" "this" {
  #checkov:skip=CKV_AWS_65:var.container_insights is true by default.
  #checkov:skip=CKV_AWS_224:ECS Exec is off: it would bypass the gateway's audit log.
  name = local.name
  tags = local.tags
  setting {
    name  = "containerInsights"
    value = var.container_insights ? "enabled" : "disabled"
  }
}

resource "aws_ecs_cluster_capacity_providers" "this" {
  cluster_name       = aws_ecs_cluster.this.name
  capacity_providers = ["FARGATE", "FARGATE_SPOT"]
}

resource "aws_cloudwatch_log_group" "gateway" {
  #checkov:skip=CKV_AWS_158:var.kms_key_arn encrypts with a customer managed key.
  #checkov:skip=CKV_AWS_338:var.log_retention_days is a year by default.
  name              = "/${local.name}/gateways"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.kms_key_arn
  tags              = local.tags
}

resource "aws_cloudwatch_log_group" "bastion" {
  #checkov:skip=CKV_AWS_158:var.kms_key_arn encrypts with a customer managed key.
  #checkov:skip=CKV_AWS_338:var.log_retention_days is a year by default.
  name              = "/${local.name}/bastions"
  retention_in_days = var.log_retention_days
  kms_key_id        = var.kms_key_arn
  tags              = local.tags
}

locals {
  # Without non-blocking, a container stops while CloudWatch does not accept its log.
  log_options = {
    "awslogs-region"        = local.region
    "awslogs-stream-prefix" = "ecs"
    "mode"                  = "non-blocking"
    "max-buffer-size"       = "25m"
  }
}

resource "aws_ecs_task_definition" "gateway" {
  family                   = "${local.name}-gateway"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = tostring(var.gateway_cpu)
  memory                   = tostring(var.gateway_memory)
  execution_role_arn       = aws_iam_role.gateway_execution.arn
  task_role_arn            = aws_iam_role.gateway_task.arn
  tags                     = local.tags

  container_definitions = jsonencode([{
    name                   = "gateway"
    image                  = var.gateway_image
    essential              = true
    command                = ["serve", "--config", "ssm:${local.config_parameter}"]
    portMappings           = [for port in [local.ports.ssh, local.ports.monitoring] : { containerPort = port, protocol = "tcp" }]
    readonlyRootFilesystem = true
    mountPoints            = [{ sourceVolume = "state", containerPath = "/var/lib/sallyport" }]
    stopTimeout            = local.stop_timeout
    ulimits                = [{ name = "nofile", softLimit = 65536, hardLimit = 65536 }]
    environment            = [{ name = "GOMEMLIMIT", value = "${floor(var.gateway_memory * 0.9)}MiB" }]
    logConfiguration = {
      logDriver = "awslogs"
      options   = merge(local.log_options, { "awslogs-group" = aws_cloudwatch_log_group.gateway.name })
    }
  }])
  volume { name = "state" }
}

locals {
  bastion_container = { for name, p in var.profiles : name => {
    name         = "bastion"
    image        = coalesce(p.image, var.bastion_image)
    essential    = true
    portMappings = [{ containerPort = local.ports.agent, protocol = "tcp" }]
    stopTimeout  = local.stop_timeout
    environment  = [{ name = "SALLYPORT_STOP_TIMEOUT", value = "${local.stop_timeout}s" }]
    ulimits      = [{ name = "nofile", softLimit = 65536, hardLimit = 65536 }]
    # The agent reaps orphans itself.
    linuxParameters = { initProcessEnabled = false }
    logConfiguration = {
      logDriver = "awslogs"
      options   = merge(local.log_options, { "awslogs-group" = aws_cloudwatch_log_group.bastion.name })
    }
  } }
}

resource "aws_ecs_task_definition" "bastion" {
  #checkov:skip=CKV_AWS_336:A bastion is its user's machine, so she can write to its file system.
  for_each                 = var.profiles
  family                   = each.key == "default" ? "${local.name}-bastion" : "${local.name}-bastion-${each.key}"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = tostring(each.value.cpu)
  memory                   = tostring(each.value.memory)
  execution_role_arn       = aws_iam_role.bastion_execution.arn
  tags                     = local.tags

  container_definitions = jsonencode([local.bastion_container[each.key]])
}

resource "aws_ecs_service" "gateway" {
  #checkov:skip=CKV_AWS_333:var.assign_public_ip is false by default; the security group admits the load balancer only.
  name                               = "${local.name}-gateway"
  cluster                            = aws_ecs_cluster.this.arn
  task_definition                    = aws_ecs_task_definition.gateway.arn
  desired_count                      = local.gateway_count
  launch_type                        = "FARGATE"
  platform_version                   = "LATEST"
  enable_execute_command             = false
  deployment_minimum_healthy_percent = 100
  deployment_maximum_percent         = 200 # unhealthy gateways stay until there is a healthy one
  health_check_grace_period_seconds  = 60
  propagate_tags                     = "SERVICE"
  enable_ecs_managed_tags            = true
  tags                               = local.tags

  network_configuration {
    subnets          = var.gateway_subnets
    security_groups  = [aws_security_group.gateway.id]
    assign_public_ip = var.assign_public_ip
  }
  load_balancer {
    target_group_arn = aws_lb_target_group.gateway.arn
    container_name   = "gateway"
    container_port   = local.ports.ssh
  }
  deployment_circuit_breaker {
    enable   = true
    rollback = true
  }
  depends_on = [
    aws_lb_listener.ssh,
    aws_iam_role_policy.gateway_task,
    aws_iam_role_policy.gateway_execution,
    aws_iam_role_policy.bastion_execution,
    aws_secretsmanager_secret_version.host_key,
    aws_secretsmanager_secret_version.fleet_key,
    aws_ssm_parameter.config,
    aws_vpc_endpoint.interface,
    aws_vpc_endpoint.gateway,
  ]
}
