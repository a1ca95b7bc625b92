# The gateway's private keys. Their values never enter a task definition or the state.

resource "aws_secretsmanager_secret" "host_key" {
  #checkov:skip=CKV2_AWS_57:A rotated host key would make every client warn; docs/operations.md has the rotation.
  #checkov:skip=CKV_AWS_149:var.kms_key_arn encrypts with a customer managed key.
  name        = "${local.name}/host_key"
  description = "The SSH host key of the gateways"
  kms_key_id  = var.kms_key_arn
  tags        = local.tags
}

resource "aws_secretsmanager_secret" "fleet_key" {
  #checkov:skip=CKV2_AWS_57:A new fleet key has to precede the old one for a time; docs/operations.md has the rotation.
  #checkov:skip=CKV_AWS_149:var.kms_key_arn encrypts with a customer managed key.
  name        = "${local.name}/fleet_key"
  description = "The key that signs the logins of gateways to bastions"
  kms_key_id  = var.kms_key_arn
  tags        = local.tags
}

resource "aws_secretsmanager_secret_version" "host_key" {
  count                    = var.keys_version > 0 ? 1 : 0
  secret_id                = aws_secretsmanager_secret.host_key.id
  secret_string_wo         = var.host_key
  secret_string_wo_version = var.keys_version
}

resource "aws_secretsmanager_secret_version" "fleet_key" {
  count                    = var.keys_version > 0 ? 1 : 0
  secret_id                = aws_secretsmanager_secret.fleet_key.id
  secret_string_wo         = var.fleet_key
  secret_string_wo_version = var.keys_version
}

# The configuration and the users. Gateways follow changes within 75 seconds.

locals {
  config_parameter = "/${local.name}/gateway.yaml"
  users_path       = "/${local.name}/users"
}

resource "aws_ssm_parameter" "config" {
  #checkov:skip=CKV2_AWS_34:The configuration contains no secret.
  #checkov:skip=CKV_AWS_337:The configuration contains no secret.
  name        = local.config_parameter
  description = "gateway.yaml of the gateways"
  type        = "String"
  tier        = "Intelligent-Tiering"
  value       = yamlencode(local.gateway)
  tags        = local.tags
}

resource "aws_ssm_parameter" "user" {
  #checkov:skip=CKV2_AWS_34:Public keys are no secrets.
  #checkov:skip=CKV_AWS_337:Public keys are no secrets.
  for_each    = var.users
  name        = "${local.users_path}/${each.key}"
  description = "Authorized keys of ${each.key}"
  type        = "String"
  tier        = "Intelligent-Tiering"
  value       = join("\n", each.value)
  tags        = local.tags
}
