output "address" {
  description = "The name that users connect to, on port 22."
  value       = module.sallyport.address
}

output "users_path" {
  description = "The path below which each parameter has a user's authorized keys."
  value       = module.sallyport.users_path
}
