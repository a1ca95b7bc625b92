# Each mistake is reported for its variable, before anything is planned.

mock_provider "aws" {}

variables {
  vpc_id           = "vpc-1"
  balancer_subnets = ["subnet-a1"]
  gateway_subnets  = ["subnet-a2"]
  client_cidrs     = ["203.0.113.0/24"]
  gateway_image    = "gateway:1"
  bastion_image    = "bastion:1"
}

run "name" {
  command = plan
  variables { name = "Sallyport" }
  expect_failures = [var.name]
}

run "no_subnets" {
  command = plan
  variables {
    balancer_subnets = []
    gateway_subnets  = []
    bastion_subnets  = []
  }
  expect_failures = [var.balancer_subnets, var.gateway_subnets, var.bastion_subnets]
}

run "networks" {
  command = plan
  variables {
    client_cidrs         = ["203.0.113.0"]
    bastion_egress_cidrs = ["::/0"]
  }
  expect_failures = [var.client_cidrs, var.bastion_egress_cidrs]
}

run "images" {
  command = plan
  variables {
    gateway_image = "gateway:latest"
    bastion_image = "registry:5000/bastion"
  }
  expect_failures = [var.gateway_image, var.bastion_image]
}

run "sizes" {
  command = plan
  variables {
    gateway_cpu    = 300
    gateway_memory = 128
    gateway_count  = 1.5
  }
  expect_failures = [var.gateway_cpu, var.gateway_memory, var.gateway_count]
}

run "times" {
  command = plan
  variables {
    drain                = 200
    deregistration_delay = 7200
    task_protection      = "8 hours"
  }
  expect_failures = [var.drain, var.deregistration_delay, var.task_protection]
}

run "settings" {
  command = plan
  variables { settings = { listen = ":22" } }
  expect_failures = [var.settings]
}

run "domain" {
  command = plan
  variables { domain_name = "ssh.example.com" }
  expect_failures = [var.domain_name]
}

run "users" {
  command = plan
  variables { users = { "al ice" = ["ssh-ed25519 AAAA"] } }
  expect_failures = [var.users]
}

run "keys" {
  command = plan
  variables { keys_version = -1 }
  expect_failures = [var.keys_version]
}

run "profiles_without_default" {
  command = plan
  variables { profiles = { big = {} } }
  expect_failures = [var.profiles]
}

run "profile_values" {
  command = plan
  variables { profiles = { default = { capacity = "cheap", egress = ["all 10.0.0.0/8"], task_policy = "none" } } }
  expect_failures = [var.profiles]
}

run "homes" {
  command = plan
  variables {
    homes    = true
    profiles = { default = { account = "root" } }
  }
  expect_failures = [var.homes]
}

run "tags" {
  command = plan
  variables { tags = { "sallyport:deployment" = "x" } }
  expect_failures = [var.tags]
}

run "endpoints_without_routes" {
  command = plan
  variables { create_endpoints = true }
  expect_failures = [aws_vpc_endpoint.gateway]
}
