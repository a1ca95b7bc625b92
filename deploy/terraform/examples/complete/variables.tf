variable "region" {
  description = "The Region."
  type        = string
  default     = "eu-west-1"
}

variable "zones" {
  description = "Three availability zones of the Region."
  type        = list(string)
  default     = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
}

variable "name" {
  description = "Name of the deployment."
  type        = string
  default     = "sallyport"
}

variable "client_cidrs" {
  description = "Networks from which users may connect."
  type        = list(string)
}

variable "nat" {
  description = "Use NAT gateways in place of VPC endpoints."
  type        = bool
  default     = false
}

variable "gateway_image" {
  description = "The image of the gateway."
  type        = string
}

variable "bastion_image" {
  description = "The image of the bastions."
  type        = string
}

variable "host_key" {
  description = "The private host key."
  type        = string
  default     = null
  ephemeral   = true
  sensitive   = true
}

variable "fleet_key" {
  description = "The private key that signs logins to bastions."
  type        = string
  default     = null
  ephemeral   = true
  sensitive   = true
}

variable "keys_version" {
  description = "Increase it to write both keys into their secrets."
  type        = number
  default     = 0
}

variable "users" {
  description = "Authorized keys by user."
  type        = map(list(string))
  default     = {}
}
