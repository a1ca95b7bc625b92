package agent

import (
	"slices"
	"strings"
)

// excludedVariables are the variables of a container that sessions never get: those that
// describe the agent's own process, and those that sshd sets itself. A name that ends with
// _ is a prefix.
var excludedVariables = []string{
	"SALLYPORT_", // the agent's own settings
	"SSH_",
	"TERM", "PWD", "OLDPWD", "SHLVL", "_", // of a terminal or a shell
}

// credentialVariables lead programs to AWS credentials, or to ECS's endpoint that acts with
// those of the task.
var credentialVariables = []string{
	"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
	"AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN",
	"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME",
	"ECS_AGENT_URI",
}

// ContainerEnvironment returns the variables of an agent's container that sessions get. The
// variables of AWS credentials are among them only if taskRole is set.
//
// It excludes known variables instead of including known ones: only the operator knows the
// variables in the image's ENV and the task definition, and sets them for the programs in
// the bastion. The agent itself is given no secrets.
func ContainerEnvironment(all []string, taskRole bool) []string {
	return slices.DeleteFunc(slices.Clone(all), func(pair string) bool {
		name, _, _ := strings.Cut(pair, "=")
		if !taskRole && slices.Contains(credentialVariables, name) {
			return true
		}
		return slices.ContainsFunc(excludedVariables, func(excluded string) bool {
			return name == excluded || len(excluded) > 1 && strings.HasSuffix(excluded, "_") && strings.HasPrefix(name, excluded)
		})
	})
}
