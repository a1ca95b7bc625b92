# Users reach the load balancer only, the load balancer reaches the gateways, and the
# gateways reach the bastions.

resource "aws_security_group" "balancer" {
  name_prefix = "${local.name}-balancer-"
  description = "The load balancer of ${local.name}"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${local.name}-balancer" })
  lifecycle { create_before_destroy = true }
}

resource "aws_security_group" "gateway" {
  name_prefix = "${local.name}-gateway-"
  description = "The gateways of ${local.name}"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${local.name}-gateway" })
  lifecycle { create_before_destroy = true }
}

resource "aws_security_group" "bastion" {
  #checkov:skip=CKV2_AWS_5:The gateway attaches it to each bastion.
  name_prefix = "${local.name}-bastion-"
  description = "The bastions of ${local.name}"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${local.name}-bastion" })
  lifecycle { create_before_destroy = true }
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each          = toset(var.client_cidrs)
  security_group_id = aws_security_group.balancer.id
  description       = "SSH from users"
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
  cidr_ipv4         = each.value
  tags              = local.tags
}

resource "aws_vpc_security_group_egress_rule" "balancer" {
  for_each                     = { ssh = local.ports.ssh, monitoring = local.ports.monitoring }
  security_group_id            = aws_security_group.balancer.id
  description                  = "${each.key} of the gateways"
  ip_protocol                  = "tcp"
  from_port                    = each.value
  to_port                      = each.value
  referenced_security_group_id = aws_security_group.gateway.id
  tags                         = local.tags
}

resource "aws_vpc_security_group_ingress_rule" "gateway" {
  for_each                     = { ssh = local.ports.ssh, monitoring = local.ports.monitoring }
  security_group_id            = aws_security_group.gateway.id
  description                  = "${each.key} from the load balancer"
  ip_protocol                  = "tcp"
  from_port                    = each.value
  to_port                      = each.value
  referenced_security_group_id = aws_security_group.balancer.id
  tags                         = local.tags
}

# Commands of the console are about all gateways.
resource "aws_vpc_security_group_ingress_rule" "gateways" {
  security_group_id            = aws_security_group.gateway.id
  description                  = "SSH from other gateways"
  ip_protocol                  = "tcp"
  from_port                    = local.ports.ssh
  to_port                      = local.ports.ssh
  referenced_security_group_id = aws_security_group.gateway.id
  tags                         = local.tags
}

resource "aws_vpc_security_group_egress_rule" "gateways" {
  security_group_id            = aws_security_group.gateway.id
  description                  = "SSH to other gateways"
  ip_protocol                  = "tcp"
  from_port                    = local.ports.ssh
  to_port                      = local.ports.ssh
  referenced_security_group_id = aws_security_group.gateway.id
  tags                         = local.tags
}

# By network, because isolated bastions have groups that the gateway creates.
resource "aws_vpc_security_group_egress_rule" "agents" {
  count             = length(local.bastion_subnets)
  security_group_id = aws_security_group.gateway.id
  description       = "Agents of bastions"
  ip_protocol       = "tcp"
  from_port         = local.ports.agent
  to_port           = local.ports.agent
  cidr_ipv4         = data.aws_subnet.bastion[count.index].cidr_block
  tags              = local.tags
}

# The addresses of AWS's services are public and change, and S3's differ from those of
# its endpoint.
resource "aws_vpc_security_group_egress_rule" "aws" {
  security_group_id = aws_security_group.gateway.id
  description       = "AWS, and the registry of the image"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
  tags              = local.tags
}

resource "aws_vpc_security_group_ingress_rule" "bastion" {
  security_group_id            = aws_security_group.bastion.id
  description                  = "The agent, from gateways"
  ip_protocol                  = "tcp"
  from_port                    = local.ports.agent
  to_port                      = local.ports.agent
  referenced_security_group_id = aws_security_group.gateway.id
  tags                         = local.tags
}

resource "aws_vpc_security_group_egress_rule" "bastion" {
  for_each          = toset(var.bastion_egress_cidrs)
  security_group_id = aws_security_group.bastion.id
  description       = "Hosts that users work on"
  ip_protocol       = "-1"
  cidr_ipv4         = each.value
  tags              = local.tags
}
