# Homes on EFS. A task definition names its volumes, so each user has one of her own, with
# an access point that her role may mount, and no other role.

locals {
  homes = var.homes ? var.users : {}
  # The gateway forms the names of families in the same way (user_task_definitions).
  home_family = { for user, _ in local.homes : user => "${local.name}-user-${replace(replace(user, "_", "_5f"), ".", "_2e")}" }
  home_role   = { for user, _ in local.homes : user => "${local.name}-home-${substr(sha256(user), 0, 16)}" }
}

resource "aws_efs_file_system" "homes" {
  #checkov:skip=CKV_AWS_184:var.kms_key_arn encrypts with a customer managed key.
  count      = var.homes ? 1 : 0
  encrypted  = true
  kms_key_id = var.kms_key_arn
  tags       = merge(local.tags, { Name = "${local.name}-homes" })
}

resource "aws_efs_backup_policy" "homes" {
  count          = var.homes ? 1 : 0
  file_system_id = aws_efs_file_system.homes[0].id
  backup_policy { status = "ENABLED" }
}

# With a policy, nobody has access whose role does not have it.
resource "aws_efs_file_system_policy" "homes" {
  count          = var.homes ? 1 : 0
  file_system_id = aws_efs_file_system.homes[0].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "EncryptedOnly"
      Effect    = "Deny"
      Principal = { AWS = "*" }
      Action    = "*"
      Resource  = aws_efs_file_system.homes[0].arn
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
}

resource "aws_security_group" "homes" {
  count       = var.homes ? 1 : 0
  name_prefix = "${local.name}-homes-"
  description = "The homes of ${local.name}"
  vpc_id      = var.vpc_id
  tags        = merge(local.tags, { Name = "${local.name}-homes" })
  lifecycle { create_before_destroy = true }
}

# By network, because isolated bastions have groups that the gateway creates.
resource "aws_vpc_security_group_ingress_rule" "homes" {
  count             = var.homes ? length(local.bastion_subnets) : 0
  security_group_id = aws_security_group.homes[0].id
  description       = "NFS from bastions"
  ip_protocol       = "tcp"
  from_port         = 2049
  to_port           = 2049
  cidr_ipv4         = data.aws_subnet.bastion[count.index].cidr_block
  tags              = local.tags
}

resource "aws_efs_mount_target" "homes" {
  count           = var.homes ? length(local.bastion_subnets) : 0
  file_system_id  = aws_efs_file_system.homes[0].id
  subnet_id       = local.bastion_subnets[count.index]
  security_groups = [aws_security_group.homes[0].id]
}

resource "aws_efs_access_point" "home" {
  for_each       = local.homes
  file_system_id = aws_efs_file_system.homes[0].id
  tags           = merge(local.tags, { Name = "${local.name} ${each.key}" })
  posix_user {
    uid = 1000
    gid = 1000
  }
  root_directory {
    path = "/${each.key}"
    creation_info {
      owner_uid   = 1000
      owner_gid   = 1000
      permissions = "700"
    }
  }
}

resource "aws_iam_role" "home" {
  for_each             = local.homes
  name                 = local.home_role[each.key]
  description          = "The home of ${each.key}"
  assume_role_policy   = local.assume_role_policy
  permissions_boundary = var.permissions_boundary
  tags                 = local.tags
}

resource "aws_iam_role_policy" "home" {
  for_each = local.homes
  name     = "home"
  role     = aws_iam_role.home[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = ["elasticfilesystem:ClientMount", "elasticfilesystem:ClientWrite"]
      Resource  = [aws_efs_file_system.homes[0].arn]
      Condition = { StringEquals = { "elasticfilesystem:AccessPointArn" = aws_efs_access_point.home[each.key].arn } }
    }]
  })
}

resource "aws_ecs_task_definition" "home" {
  #checkov:skip=CKV_AWS_336:A bastion is its user's machine, so she can write to its file system.
  for_each                 = local.homes
  family                   = local.home_family[each.key]
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = tostring(var.profiles.default.cpu)
  memory                   = tostring(var.profiles.default.memory)
  execution_role_arn       = aws_iam_role.bastion_execution.arn
  task_role_arn            = aws_iam_role.home[each.key].arn
  tags                     = merge(local.tags, { "sallyport:user" = each.key }) # the gateway requires it

  container_definitions = jsonencode([merge(local.bastion_container.default, {
    mountPoints = [{ sourceVolume = "home", containerPath = "/home/bastion" }]
  })])
  volume {
    name = "home"
    efs_volume_configuration {
      file_system_id     = aws_efs_file_system.homes[0].id
      transit_encryption = "ENABLED"
      authorization_config {
        access_point_id = aws_efs_access_point.home[each.key].id
        iam             = "ENABLED"
      }
    }
  }
  depends_on = [aws_efs_mount_target.homes, aws_iam_role_policy.home]
}
