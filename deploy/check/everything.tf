# The module with all that changes gateway.yaml and the task definitions.

variable "host_key" {
  type      = string
  ephemeral = true
}

variable "fleet_key" {
  type      = string
  ephemeral = true
}

variable "users" {
  type = map(list(string))
}

module "sallyport" {
  source = "../.."

  name             = "everything"
  vpc_id           = "vpc-1"
  balancer_subnets = ["subnet-a1", "subnet-b1"]
  gateway_subnets  = ["subnet-a2", "subnet-b2"]
  bastion_subnets  = ["subnet-a3", "subnet-b3"]
  client_cidrs     = ["203.0.113.0/24"]
  assign_public_ip = true

  gateway_image   = "gateway:1"
  bastion_image   = "bastion:1"
  host_key        = var.host_key
  fleet_key       = var.fleet_key
  keys_version    = 1
  users           = var.users
  task_protection = "8h"
  homes           = true
  drain           = 60

  settings = {
    roles = { admins = { users = ["alice"], admin = true } }
  }
  profiles = {
    default = {}
    big     = { image = "bastion:2", cpu = 1024, memory = 4096, ephemeral_storage = 50, idle = "1h", max_life = "2d", start_timeout = "10m" }
    cheap   = { capacity = "spot", account = "root", accept_env = ["LANG", "LC_*"] }
    alone   = { isolate = true, egress = ["tcp 443 0.0.0.0/0"] }
    deploy = { task_policy = jsonencode({
      Version   = "2012-10-17"
      Statement = [{ Effect = "Allow", Action = ["s3:GetObject"], Resource = ["arn:aws:s3:::releases/*"] }]
    }) }
  }
}
