resource "aws_lb" "gateway" {
  #checkov:skip=CKV_AWS_91:A Network Load Balancer logs TLS connections only; the gateway's audit log has every connection.
  #checkov:skip=CKV_AWS_150:var.deletion_protection is true by default.
  #checkov:skip=CKV_AWS_152:var.cross_zone is true by default.
  name                             = local.name
  load_balancer_type               = "network"
  internal                         = var.internal
  subnets                          = var.balancer_subnets
  security_groups                  = [aws_security_group.balancer.id] # only possible at creation
  enable_cross_zone_load_balancing = var.cross_zone
  enable_deletion_protection       = var.deletion_protection
  tags                             = local.tags
}

resource "aws_lb_target_group" "gateway" {
  #checkov:skip=CKV_AWS_378:SSH is encrypted end to end; the load balancer does not take part.
  name_prefix            = substr(local.name, 0, 6)
  target_type            = "ip"
  protocol               = "TCP"
  port                   = local.ports.ssh
  vpc_id                 = var.vpc_id
  preserve_client_ip     = "false" # the PROXY header has the client's address
  proxy_protocol_v2      = true
  deregistration_delay   = tostring(var.deregistration_delay)
  connection_termination = false
  tags                   = local.tags

  health_check {
    protocol            = "HTTP"
    port                = tostring(local.ports.monitoring)
    path                = "/readyz"
    matcher             = "200"
    interval            = 10
    timeout             = 6
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }
  # A gateway that is not ready gets no new connections, and keeps its open ones.
  target_health_state {
    enable_unhealthy_connection_termination = false
    unhealthy_draining_interval             = 86400
  }
  lifecycle { create_before_destroy = true }
}

resource "aws_lb_listener" "ssh" {
  #checkov:skip=CKV_AWS_2:The protocol is SSH.
  #checkov:skip=CKV_AWS_103:The protocol is SSH.
  load_balancer_arn        = aws_lb.gateway.arn
  protocol                 = "TCP"
  port                     = 22
  tcp_idle_timeout_seconds = 350 # keepalives come every minute
  tags                     = local.tags

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.gateway.arn
  }
}

resource "aws_route53_record" "gateway" {
  count   = var.zone_id == null ? 0 : 1
  zone_id = var.zone_id
  name    = var.domain_name
  type    = "A"
  alias {
    name                   = aws_lb.gateway.dns_name
    zone_id                = aws_lb.gateway.zone_id
    evaluate_target_health = true
  }
}
