locals {
  # The services that gateways call, and those of Fargate itself: registry and log.
  interface_services = var.create_endpoints ? concat(
    ["ecs", "ssm", "secretsmanager", "ecr.api", "ecr.dkr", "logs"],
    var.kms_key_arn == null ? [] : ["kms"],
    local.isolated ? ["ec2"] : [],
  ) : []
}

resource "aws_security_group" "endpoints" {
  count       = var.create_endpoints ? 1 : 0
  name_prefix = "${local.name}-endpoints-"
  description = "The VPC endpoints of ${local.name}"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${local.name}-endpoints" })
  lifecycle { create_before_destroy = true }
}

resource "aws_vpc_security_group_ingress_rule" "endpoints" {
  for_each                     = var.create_endpoints ? { gateway = aws_security_group.gateway.id, bastion = aws_security_group.bastion.id } : {}
  security_group_id            = aws_security_group.endpoints[0].id
  description                  = "HTTPS from each ${each.key}"
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
  referenced_security_group_id = each.value
  tags                         = local.tags
}

# Isolated bastions are in groups that the gateway creates, so they are admitted by network.
resource "aws_vpc_security_group_ingress_rule" "isolated" {
  count             = var.create_endpoints && local.isolated ? length(local.bastion_subnets) : 0
  security_group_id = aws_security_group.endpoints[0].id
  description       = "HTTPS from isolated bastions"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = data.aws_subnet.bastion[count.index].cidr_block
  tags              = local.tags
}

resource "aws_vpc_endpoint" "interface" {
  for_each            = toset(local.interface_services)
  vpc_id              = var.vpc_id
  service_name        = "com.amazonaws.${local.region}.${each.value}"
  vpc_endpoint_type   = "Interface"
  subnet_ids          = distinct(var.gateway_subnets)
  security_group_ids  = [aws_security_group.endpoints[0].id]
  private_dns_enabled = true
  tags                = merge(local.tags, { Name = "${local.name}-${each.value}" })
}

resource "aws_vpc_endpoint" "gateway" {
  for_each          = toset(var.create_endpoints ? ["s3", "dynamodb"] : [])
  vpc_id            = var.vpc_id
  service_name      = "com.amazonaws.${local.region}.${each.value}"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.endpoint_route_tables
  tags              = merge(local.tags, { Name = "${local.name}-${each.value}" })
  lifecycle {
    precondition {
      condition     = length(var.endpoint_route_tables) > 0
      error_message = "create_endpoints needs endpoint_route_tables: without a route, images cannot be pulled from S3."
    }
  }
}
