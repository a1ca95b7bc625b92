variable "name" {
  description = "Name of the deployment, and prefix of the names of its resources."
  type        = string
  default     = "sallyport"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "The name must be 3 to 20 lower-case letters, digits and -, a letter first, and no - last."
  }
}

# The network.

variable "vpc_id" {
  description = "The VPC. Its DNS support must be on."
  type        = string
}

variable "balancer_subnets" {
  description = "Subnets of the Network Load Balancer, one in each zone: public ones, unless `internal`."
  type        = list(string)
  validation {
    condition     = length(var.balancer_subnets) > 0
    error_message = "Name at least one subnet; for a service that survives the loss of a zone, at least two in different zones."
  }
}

variable "gateway_subnets" {
  description = "Subnets of the gateways, in the zones of `balancer_subnets`, with access to AWS and to the registry of the image."
  type        = list(string)
  validation {
    condition     = length(var.gateway_subnets) > 0
    error_message = "Name at least one subnet."
  }
}

variable "bastion_subnets" {
  description = "Subnets of the bastions, at most 16, zones alternating. Default: `gateway_subnets`."
  type        = list(string)
  default     = null
  validation {
    condition     = var.bastion_subnets == null ? true : length(var.bastion_subnets) >= 1 && length(var.bastion_subnets) <= 16
    error_message = "Name 1 to 16 subnets."
  }
}

variable "assign_public_ip" {
  description = "Give gateways and bastions public addresses, with which they reach AWS from public subnets without NAT gateway and VPC endpoints. Their security groups admit nobody from outside."
  type        = bool
  default     = false
}

variable "create_endpoints" {
  description = "Create VPC endpoints for the services that gateways and bastions use, so that they need no NAT gateway."
  type        = bool
  default     = false
}

variable "endpoint_route_tables" {
  description = "Route tables of `gateway_subnets` and `bastion_subnets`, for the gateway endpoints of S3 and DynamoDB. With `create_endpoints` only."
  type        = list(string)
  default     = []
}

variable "internal" {
  description = "Give the load balancer private addresses only."
  type        = bool
  default     = false
}

variable "client_cidrs" {
  description = "Networks from which users may connect, such as `[\"0.0.0.0/0\"]`."
  type        = list(string)
  validation {
    condition     = length(var.client_cidrs) > 0 && alltrue([for c in var.client_cidrs : can(cidrhost(c, 0)) && !strcontains(c, ":")])
    error_message = "Write IPv4 networks, such as 203.0.113.0/24."
  }
}

variable "bastion_egress_cidrs" {
  description = "Networks that bastions may connect to, on all ports. They need the registry of their image, CloudWatch Logs, and the hosts that users work on."
  type        = list(string)
  default     = ["0.0.0.0/0"]
  validation {
    condition     = alltrue([for c in var.bastion_egress_cidrs : can(cidrhost(c, 0)) && !strcontains(c, ":")])
    error_message = "Write IPv4 networks, such as 10.0.0.0/8."
  }
}

variable "cross_zone" {
  description = "Let the load balancer's nodes use the gateways of all zones. Without it, each zone needs a healthy gateway of its own."
  type        = bool
  default     = true
}

variable "zone_id" {
  description = "A hosted zone of Route 53 for `domain_name`."
  type        = string
  default     = null
}

variable "domain_name" {
  description = "The name that users connect to; a record is created in `zone_id`."
  type        = string
  default     = null
  validation {
    condition     = (var.domain_name == null) == (var.zone_id == null)
    error_message = "domain_name and zone_id belong together."
  }
}

# The gateways.

variable "gateway_image" {
  description = "The image of the gateway, with a tag or a digest."
  type        = string
  validation {
    condition     = can(regex("[:@][^/]+$", var.gateway_image)) && !endswith(var.gateway_image, ":latest")
    error_message = "Name a tag other than latest, or a digest, so that all gateways run one version."
  }
}

variable "gateway_count" {
  description = "The number of gateways. Default: one for each of `gateway_subnets`."
  type        = number
  default     = null
  validation {
    condition     = var.gateway_count == null ? true : var.gateway_count >= 0 && floor(var.gateway_count) == var.gateway_count
    error_message = "Write a whole number."
  }
}

variable "gateway_cpu" {
  description = "CPU units of a gateway."
  type        = number
  default     = 1024
  validation {
    condition     = contains([256, 512, 1024, 2048, 4096, 8192, 16384], var.gateway_cpu)
    error_message = "Fargate has 256, 512, 1024, 2048, 4096, 8192 and 16384."
  }
}

variable "gateway_memory" {
  description = "Memory of a gateway, in MiB, as Fargate offers it for `gateway_cpu`."
  type        = number
  default     = 2048
  validation {
    condition     = var.gateway_memory >= 512
    error_message = "At least 512."
  }
}

variable "settings" {
  description = "Further settings of `gateway.yaml`, such as `roles` and `max_startups`. See docs/configuration.md."
  type        = any
  default     = {}
  validation {
    condition = can(keys(var.settings)) && length(setintersection(try(keys(var.settings), []), [
      "listen", "host_keys", "fleet_key", "authorized_keys_dir", "state_dir", "deployment", "ledger",
      "proxy_protocol_from", "monitoring", "drain_delay", "drain", "task_protection", "profiles",
    ])) == 0
    error_message = "settings must be a mapping, without the keys that other variables of this module set: listen, host_keys, fleet_key, authorized_keys_dir, state_dir, deployment, ledger, proxy_protocol_from, monitoring, drain_delay, drain, task_protection and profiles."
  }
}

variable "drain" {
  description = "Seconds for open connections, from 25 seconds after SIGTERM on. The task is killed after 120."
  type        = number
  default     = 80
  validation {
    condition     = var.drain >= 0 && var.drain <= 85
    error_message = "0 to 85 seconds: the task is killed 120 seconds after SIGTERM."
  }
}

variable "deregistration_delay" {
  description = "Seconds that an old gateway keeps its connections, and gets no new ones, before it gets SIGTERM. A deployment takes at least as long, unless all connections end sooner."
  type        = number
  default     = 3600
  validation {
    condition     = var.deregistration_delay >= 0 && var.deregistration_delay <= 3600
    error_message = "0 to 3600 seconds."
  }
}

variable "task_protection" {
  description = "Duration, such as `8h`, for which a deployment does not stop a gateway with connections; see docs/configuration.md, Gateways on ECS."
  type        = string
  default     = "none"
  validation {
    condition     = can(regex("^(none|[1-9][0-9]*[mh])$", var.task_protection))
    error_message = "Write none, or a duration such as 8h, up to 48h."
  }
}

variable "host_key" {
  description = "The private host key, as `ssh-keygen -t ed25519 -N ''` writes it. It is not stored in the state. See `keys_version`."
  type        = string
  default     = null
  ephemeral   = true
  sensitive   = true
}

variable "fleet_key" {
  description = "The private key that signs logins to bastions; another key than `host_key`. It is not stored in the state. See `keys_version`."
  type        = string
  default     = null
  ephemeral   = true
  sensitive   = true
}

variable "keys_version" {
  description = "Increase it to write `host_key` and `fleet_key` into their secrets. With 0, the secrets are created empty, and gateways cannot start before you have stored the keys."
  type        = number
  default     = 0
  validation {
    condition     = var.keys_version >= 0 && floor(var.keys_version) == var.keys_version
    error_message = "Write a whole number."
  }
}

variable "users" {
  description = "Authorized keys by user, each a line in sshd's format. Users can also be added to the path of the output `users_path` without Terraform."
  type        = map(list(string))
  default     = {}
  validation {
    condition     = alltrue([for u, keys in var.users : can(regex("^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$", u)) && length(keys) > 0])
    error_message = "A user name has 1 to 64 letters, digits, . _ and -, a letter, a digit or _ first, and each user needs a key."
  }
}

# The bastions.

variable "bastion_image" {
  description = "The image of the bastions, with a tag or a digest, for profiles without an image of their own."
  type        = string
  validation {
    condition     = can(regex("[:@][^/]+$", var.bastion_image)) && !endswith(var.bastion_image, ":latest")
    error_message = "Name a tag other than latest, or a digest, so that all bastions run one version."
  }
}

variable "profiles" {
  description = "The kinds of bastion, by name: `default` is for `ssh alice@gateway`, others are for `ssh alice+NAME@gateway`. `cpu` and `memory` (MiB) as Fargate offers them; `idle`, `max_life`, `start_timeout`, `capacity` (`on-demand` or `spot`), `account`, `record`, `accept_env` and `isolate` as in docs/configuration.md. `egress` are the rules of isolated bastions. `task_policy` is an IAM policy in JSON: sessions get credentials with it."
  type = map(object({
    image             = optional(string)
    cpu               = optional(number, 256)
    memory            = optional(number, 512)
    ephemeral_storage = optional(number)
    idle              = optional(string, "15m")
    max_life          = optional(string, "12h")
    start_timeout     = optional(string, "5m")
    capacity          = optional(string, "on-demand")
    account           = optional(string, "bastion")
    record            = optional(string, "none")
    accept_env        = optional(list(string))
    isolate           = optional(bool, false)
    egress            = optional(list(string))
    task_policy       = optional(string)
  }))
  default = { default = {} }
  validation {
    condition     = contains(keys(var.profiles), "default") && !contains(keys(var.profiles), "ctl") && alltrue([for n in keys(var.profiles) : can(regex("^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$", n))])
    error_message = "There must be a profile default, and none called ctl. A name has 1 to 32 letters, digits, - and _, a letter or digit first."
  }
  validation {
    condition     = alltrue([for p in values(var.profiles) : contains(["on-demand", "spot"], p.capacity)])
    error_message = "capacity is on-demand or spot."
  }
  validation {
    condition     = alltrue([for p in values(var.profiles) : p.egress == null || p.isolate])
    error_message = "egress needs isolate = true; for the other profiles there is bastion_egress_cidrs."
  }
  validation {
    condition     = alltrue([for p in values(var.profiles) : p.task_policy == null || can(jsondecode(p.task_policy).Statement)])
    error_message = "task_policy must be an IAM policy in JSON."
  }
}

variable "homes" {
  description = "Give each of `users` a home on EFS that outlives her bastions of the profile `default`. `bastion_subnets` must then be in different zones."
  type        = bool
  default     = false
  validation {
    condition     = !var.homes || try(var.profiles.default.account == "bastion" && var.profiles.default.task_policy == null, true)
    error_message = "homes needs the account bastion in the profile default, and no task_policy there: a user's role gives access to her home."
  }
}

# Operation.

variable "log_retention_days" {
  description = "Days for which CloudWatch keeps the logs. The log of the gateways contains the audit log."
  type        = number
  default     = 365
}

variable "alarm_topics" {
  description = "ARNs of SNS topics that are notified by the alarms."
  type        = list(string)
  default     = []
}

variable "container_insights" {
  description = "Collect metrics of the tasks with Container Insights."
  type        = bool
  default     = true
}

variable "kms_key_arn" {
  description = "A customer managed KMS key for the secrets, the table and the logs. Its policy must permit CloudWatch Logs to use it. Default: keys of AWS."
  type        = string
  default     = null
}

variable "deletion_protection" {
  description = "Protect the table and the load balancer from deletion."
  type        = bool
  default     = true
}

variable "permissions_boundary" {
  description = "ARN of a policy that is the permissions boundary of all roles."
  type        = string
  default     = null
}

variable "tags" {
  description = "Tags of all resources."
  type        = map(string)
  default     = {}
  validation {
    condition     = alltrue([for key in keys(var.tags) : !startswith(key, "sallyport:")])
    error_message = "Tags that begin with sallyport: are those of bastions and of their security groups."
  }
}
