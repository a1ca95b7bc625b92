# docs/iam.md has the reason for each action of the gateway's task role. A test compares
# the statements, by Sid.

locals {
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "ecs-tasks.amazonaws.com" }
      Condition = {
        StringEquals = { "aws:SourceAccount" = local.account }
        ArnLike      = { "aws:SourceArn" = "${local.ecs}:*" }
      }
    }]
  })

  families    = [for p in keys(var.profiles) : p == "default" ? "${local.name}-bastion" : "${local.name}-bastion-${p}"]
  isolated    = anytrue([for p in values(var.profiles) : p.isolate])
  in_cluster  = { ArnEquals = { "ecs:cluster" = local.cluster_arn } }
  tasks       = "${local.ecs}:task/${local.name}/*"
  groups      = "${local.arn}:ec2:${local.region}:${local.account}:security-group/*"
  role_prefix = "${local.arn}:iam::${local.account}:role"
}

resource "aws_iam_role" "gateway_task" {
  name                 = "${local.name}-gateway-task"
  description          = "What the gateways may do"
  assume_role_policy   = local.assume_role_policy
  permissions_boundary = var.permissions_boundary
  tags                 = local.tags
}

resource "aws_iam_role_policy" "gateway_task" {
  #checkov:skip=CKV_AWS_290:ecs:ListTasks, ecs:DescribeTaskDefinition and ec2:Describe* accept no resource; a condition limits them where one exists.
  #checkov:skip=CKV_AWS_355:ecs:ListTasks, ecs:DescribeTaskDefinition and ec2:Describe* accept no resource; a condition limits them where one exists.
  name = "gateway"
  role = aws_iam_role.gateway_task.id
  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = concat(local.launch, local.launch_own, local.ledger, local.read, local.decrypt, local.protect, local.isolate)
  })
}

locals {
  launch = [
    {
      Sid       = "Start"
      Effect    = "Allow"
      Action    = ["ecs:RunTask"]
      Resource  = [for f in local.families : "${local.ecs}:task-definition/${f}:*"]
      Condition = local.in_cluster
    },
    {
      Sid       = "Tag"
      Effect    = "Allow"
      Action    = ["ecs:TagResource"]
      Resource  = [local.tasks]
      Condition = { StringEquals = { "ecs:CreateAction" = "RunTask" } }
    },
    {
      Sid       = "FollowAndStop"
      Effect    = "Allow"
      Action    = ["ecs:DescribeTasks", "ecs:StopTask"]
      Resource  = [local.tasks]
      Condition = local.in_cluster
    },
    {
      Sid       = "Find"
      Effect    = "Allow"
      Action    = ["ecs:ListTasks"]
      Resource  = ["*"]
      Condition = local.in_cluster
    },
    {
      Sid       = "PassRoles"
      Effect    = "Allow"
      Action    = ["iam:PassRole"]
      Resource  = concat(["${local.role_prefix}/${local.name}-bastion-execution"], [for p, _ in local.with_task_role : "${local.role_prefix}/${local.name}-bastion-task-${p}"], [for r in values(local.home_role) : "${local.role_prefix}/${r}"])
      Condition = { StringEquals = { "iam:PassedToService" = "ecs-tasks.amazonaws.com" } }
    },
  ]

  launch_own = [for statement in [
    {
      Sid       = "StartUsersOwn"
      Effect    = "Allow"
      Action    = ["ecs:RunTask"]
      Resource  = ["${local.ecs}:task-definition/${local.name}-user-*:*"]
      Condition = local.in_cluster
    },
    {
      Sid      = "FindUsersOwn"
      Effect   = "Allow"
      Action   = ["ecs:DescribeTaskDefinition"]
      Resource = ["*"]
    },
  ] : statement if var.homes]

  ledger = [{
    Sid      = "Ledger"
    Effect   = "Allow"
    Action   = ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:DeleteItem", "dynamodb:Query", "dynamodb:DescribeTable"]
    Resource = ["${local.arn}:dynamodb:${local.region}:${local.account}:table/${local.name}"]
  }]

  read = [
    {
      Sid      = "ReadParameters"
      Effect   = "Allow"
      Action   = ["ssm:GetParameter", "ssm:GetParametersByPath"]
      Resource = ["${local.arn}:ssm:${local.region}:${local.account}:parameter/${local.name}/*"]
    },
    {
      Sid      = "ReadSecrets"
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue"]
      Resource = ["${local.arn}:secretsmanager:${local.region}:${local.account}:secret:${local.name}/*"]
    },
  ]

  decrypt = [for key in compact([var.kms_key_arn]) : {
    Sid       = "Decrypt"
    Effect    = "Allow"
    Action    = ["kms:Decrypt"]
    Resource  = [key]
    Condition = { StringLike = { "kms:ViaService" = ["ssm.${local.region}.amazonaws.com", "secretsmanager.${local.region}.amazonaws.com"] } }
  }]

  protect = [for statement in [{
    Sid      = "Protect"
    Effect   = "Allow"
    Action   = ["ecs:UpdateTaskProtection"]
    Resource = [local.tasks]
  }] : statement if var.task_protection != "none"]

  isolate = [for statement in [
    {
      Sid      = "LookAtGroups"
      Effect   = "Allow"
      Action   = ["ec2:DescribeSecurityGroups", "ec2:DescribeSubnets"]
      Resource = ["*"]
    },
    {
      Sid      = "MakeGroups"
      Effect   = "Allow"
      Action   = ["ec2:CreateSecurityGroup"]
      Resource = [local.groups, "${local.arn}:ec2:${local.region}:${local.account}:vpc/${var.vpc_id}"]
    },
    {
      Sid       = "TagNewGroups"
      Effect    = "Allow"
      Action    = ["ec2:CreateTags"]
      Resource  = [local.groups]
      Condition = { StringEquals = { "ec2:CreateAction" = "CreateSecurityGroup" } }
    },
    {
      Sid    = "ChangeOwnGroups"
      Effect = "Allow"
      Action = [
        "ec2:AuthorizeSecurityGroupIngress",
        "ec2:AuthorizeSecurityGroupEgress",
        "ec2:RevokeSecurityGroupIngress",
        "ec2:RevokeSecurityGroupEgress",
        "ec2:DeleteSecurityGroup",
      ]
      Resource  = [local.groups]
      Condition = { StringEquals = { "aws:ResourceTag/sallyport:deployment" = local.name } }
    },
  ] : statement if local.isolated]
}

# The execution roles pull the images and write the logs.

resource "aws_iam_role" "gateway_execution" {
  name                 = "${local.name}-gateway-execution"
  description          = "Pulls the image of the gateways and writes their log"
  assume_role_policy   = local.assume_role_policy
  permissions_boundary = var.permissions_boundary
  tags                 = local.tags
}

resource "aws_iam_role" "bastion_execution" {
  name                 = "${local.name}-bastion-execution"
  description          = "Pulls the image of the bastions and writes their log"
  assume_role_policy   = local.assume_role_policy
  permissions_boundary = var.permissions_boundary
  tags                 = local.tags
}

locals {
  bastion_images = distinct(concat([var.bastion_image], [for p in values(var.profiles) : p.image if p.image != null]))
  # Repositories of ECR; other registries need no permission.
  repositories = { for who, images in { gateway = [var.gateway_image], bastion = local.bastion_images } : who => compact([
    for image in images : try(format("${local.arn}:ecr:%s:%s:repository/%s",
      regex("^(\\d{12})\\.dkr\\.ecr\\.([a-z0-9-]+)\\.", image)[1],
      regex("^(\\d{12})\\.dkr\\.ecr\\.([a-z0-9-]+)\\.", image)[0],
      regex("^[^/]+/(.+?)(?:@.+|:[^/]+)$", image)[0],
    ), "")
  ]) }
  log_groups = { gateway = aws_cloudwatch_log_group.gateway.name, bastion = aws_cloudwatch_log_group.bastion.name }
  execution_policy = { for who, repositories in local.repositories : who => jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      [{
        Sid      = "WriteLog"
        Effect   = "Allow"
        Action   = ["logs:CreateLogStream", "logs:PutLogEvents"]
        Resource = ["${local.arn}:logs:${local.region}:${local.account}:log-group:${local.log_groups[who]}:*"]
      }],
      [for statement in [
        {
          Sid      = "Registry"
          Effect   = "Allow"
          Action   = ["ecr:GetAuthorizationToken"]
          Resource = ["*"]
        },
        {
          Sid      = "Pull"
          Effect   = "Allow"
          Action   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
          Resource = repositories
        },
      ] : statement if length(repositories) > 0],
    )
  }) }
}

resource "aws_iam_role_policy" "gateway_execution" {
  #checkov:skip=CKV_AWS_290:ecr:GetAuthorizationToken accepts no resource.
  #checkov:skip=CKV_AWS_355:ecr:GetAuthorizationToken accepts no resource.
  name   = "execution"
  role   = aws_iam_role.gateway_execution.id
  policy = local.execution_policy.gateway
}

resource "aws_iam_role_policy" "bastion_execution" {
  #checkov:skip=CKV_AWS_290:ecr:GetAuthorizationToken accepts no resource.
  #checkov:skip=CKV_AWS_355:ecr:GetAuthorizationToken accepts no resource.
  name   = "execution"
  role   = aws_iam_role.bastion_execution.id
  policy = local.execution_policy.bastion
}

# Without task_policy, a bastion has no role: its users could use it.

locals {
  with_task_role = { for name, p in var.profiles : name => p.task_policy if p.task_policy != null }
}

resource "aws_iam_role" "bastion_task" {
  for_each             = local.with_task_role
  name                 = "${local.name}-bastion-task-${each.key}"
  description          = "What users of the profile ${each.key} may do"
  assume_role_policy   = local.assume_role_policy
  permissions_boundary = var.permissions_boundary
  tags                 = local.tags
}

resource "aws_iam_role_policy" "bastion_task" {
  for_each = local.with_task_role
  name     = "task"
  role     = aws_iam_role.bastion_task[each.key].id
  policy   = each.value
}
