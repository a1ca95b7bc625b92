# A VPC in three zones, and gateways and bastions in it. The gateways and bastions have
# private addresses, and reach AWS through VPC endpoints, or through a NAT gateway in each
# zone (nat = true), which bastions also need for the internet.

terraform {
  required_version = ">= 1.11"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

provider "aws" {
  region = var.region
}

resource "aws_vpc" "this" {
  #checkov:skip=CKV2_AWS_11:Flow logs are a choice of whoever owns the VPC.
  #checkov:skip=CKV2_AWS_12:The default security group is not used.
  cidr_block           = "10.20.0.0/16"
  enable_dns_support   = true
  enable_dns_hostnames = true # for VPC endpoints
  tags                 = { Name = var.name }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
  tags   = { Name = var.name }
}

resource "aws_subnet" "public" {
  count             = 3
  vpc_id            = aws_vpc.this.id
  availability_zone = var.zones[count.index]
  cidr_block        = cidrsubnet(aws_vpc.this.cidr_block, 8, count.index)
  tags              = { Name = "${var.name}-public-${var.zones[count.index]}" }
}

resource "aws_subnet" "private" {
  count             = 3
  vpc_id            = aws_vpc.this.id
  availability_zone = var.zones[count.index]
  cidr_block        = cidrsubnet(aws_vpc.this.cidr_block, 4, count.index + 1)
  tags              = { Name = "${var.name}-private-${var.zones[count.index]}" }
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id
  tags   = { Name = "${var.name}-public" }
}

resource "aws_route" "internet" {
  route_table_id         = aws_route_table.public.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.this.id
}

resource "aws_route_table_association" "public" {
  count          = 3
  subnet_id      = aws_subnet.public[count.index].id
  route_table_id = aws_route_table.public.id
}

resource "aws_route_table" "private" {
  count  = 3
  vpc_id = aws_vpc.this.id
  tags   = { Name = "${var.name}-private-${var.zones[count.index]}" }
}

resource "aws_route_table_association" "private" {
  count          = 3
  subnet_id      = aws_subnet.private[count.index].id
  route_table_id = aws_route_table.private[count.index].id
}

resource "aws_eip" "nat" {
  #checkov:skip=CKV2_AWS_19:It belongs to a NAT gateway, not to an instance.
  count  = var.nat ? 3 : 0
  domain = "vpc"
  tags   = { Name = "${var.name}-nat-${var.zones[count.index]}" }
}

resource "aws_nat_gateway" "this" {
  count         = var.nat ? 3 : 0
  allocation_id = aws_eip.nat[count.index].id
  subnet_id     = aws_subnet.public[count.index].id
  tags          = { Name = "${var.name}-${var.zones[count.index]}" }
  depends_on    = [aws_internet_gateway.this]
}

resource "aws_route" "nat" {
  count                  = var.nat ? 3 : 0
  route_table_id         = aws_route_table.private[count.index].id
  destination_cidr_block = "0.0.0.0/0"
  nat_gateway_id         = aws_nat_gateway.this[count.index].id
}

module "sallyport" {
  source = "../.."

  name             = var.name
  vpc_id           = aws_vpc.this.id
  balancer_subnets = aws_subnet.public[*].id
  gateway_subnets  = aws_subnet.private[*].id
  client_cidrs     = var.client_cidrs

  create_endpoints      = !var.nat
  endpoint_route_tables = aws_route_table.private[*].id

  gateway_image = var.gateway_image
  bastion_image = var.bastion_image
  host_key      = var.host_key
  fleet_key     = var.fleet_key
  keys_version  = var.keys_version
  users         = var.users

  profiles = {
    default = {}
    big     = { cpu = 1024, memory = 4096, idle = "1h" }
  }
}
