output "address" {
  description = "The name that users connect to, on port 22."
  value       = coalesce(var.domain_name, aws_lb.gateway.dns_name)
}

output "balancer_dns_name" {
  description = "The DNS name of the load balancer."
  value       = aws_lb.gateway.dns_name
}

output "balancer_zone_id" {
  description = "The hosted zone of that name, for alias records."
  value       = aws_lb.gateway.zone_id
}

output "cluster_arn" {
  description = "The ECS cluster of gateways and bastions."
  value       = aws_ecs_cluster.this.arn
}

output "service_name" {
  description = "The ECS service of the gateways."
  value       = aws_ecs_service.gateway.name
}

output "gateway_security_group_id" {
  description = "The security group of the gateways."
  value       = aws_security_group.gateway.id
}

output "bastion_security_group_id" {
  description = "The security group of bastions that are not isolated. Admit it where users work."
  value       = aws_security_group.bastion.id
}

output "gateway_task_role_arn" {
  description = "The role of the gateways."
  value       = aws_iam_role.gateway_task.arn
}

output "bastion_task_definitions" {
  description = "The task definition of each profile."
  value       = { for name, definition in aws_ecs_task_definition.bastion : name => definition.arn }
}

output "config_parameter" {
  description = "The parameter with the gateways' file."
  value       = aws_ssm_parameter.config.name
}

output "users_path" {
  description = "The path below which each parameter has a user's authorized keys."
  value       = local.users_path
}

output "host_key_secret" {
  description = "The secret with the host key."
  value       = aws_secretsmanager_secret.host_key.name
}

output "fleet_key_secret" {
  description = "The secret with the fleet key."
  value       = aws_secretsmanager_secret.fleet_key.name
}

output "table_name" {
  description = "The DynamoDB table that the gateways share."
  value       = aws_dynamodb_table.ledger.name
}

output "log_groups" {
  description = "The log groups of gateways and bastions."
  value       = local.log_groups
}
