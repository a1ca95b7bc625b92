package fargate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecs"
	"github.com/aws/aws-sdk-go-v2/service/ecs/types"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// userTag is the tag of a user's own task definition. Its value is the user's name.
const userTag = "sallyport:user"

// errNoDefinition means that a user has no task definition of her own.
var errNoDefinition = errors.New("there is no such task definition")

// family returns the family of a user's own task definition. In the user's name,
// characters that families cannot have, and "_", become "_" and two hexadecimal
// digits, so that no two users have the same family.
func (l *Launcher) family(user string) string {
	var escaped strings.Builder
	for _, c := range []byte(user) {
		switch {
		case c >= '0' && c <= '9', c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c == '-':
			escaped.WriteByte(c)
		default:
			fmt.Fprintf(&escaped, "_%02x", c)
		}
	}
	return strings.ReplaceAll(l.UserTaskDefinitions, "%u", escaped.String())
}

// taskDefinition returns the task definition for a user: the latest active revision
// of her own family, or, if there is none, that of the profile.
func (l *Launcher) taskDefinition(ctx context.Context, user string) (string, error) {
	if l.UserTaskDefinitions == "" {
		return l.TaskDefinition, nil
	}
	def, err := l.userDefinition(ctx, user)
	if errors.Is(err, errNoDefinition) {
		return l.TaskDefinition, nil
	}
	return aws.ToString(def.TaskDefinitionArn), err
}

// userDefinition returns a user's own task definition. The error wraps
// errNoDefinition if there is none.
//
// The name alone must not select a definition: with the pattern "web-%u", a user
// "frontend" would start the account's "web-frontend". So the definition has to name
// the user, in its tag.
func (l *Launcher) userDefinition(ctx context.Context, user string) (types.TaskDefinition, error) {
	family := l.family(user)
	out, err := l.Cloud.ecs.DescribeTaskDefinition(ctx, &ecs.DescribeTaskDefinitionInput{
		TaskDefinition: &family,
		Include:        []types.TaskDefinitionField{types.TaskDefinitionFieldTags},
	})
	switch {
	case hasCode(err, "ClientException") && strings.Contains(strings.ToLower(err.Error()), "unable to describe task definition"):
		return types.TaskDefinition{}, fmt.Errorf("%s: %w", family, errNoDefinition)
	case err != nil:
		return types.TaskDefinition{}, fmt.Errorf("DescribeTaskDefinition %s: %w", family, classify(err))
	case out.TaskDefinition == nil:
		return types.TaskDefinition{}, fmt.Errorf("DescribeTaskDefinition %s returned none", family)
	}
	def := *out.TaskDefinition
	if !slices.ContainsFunc(out.Tags, func(t types.Tag) bool { return aws.ToString(t.Key) == userTag && aws.ToString(t.Value) == user }) {
		return types.TaskDefinition{}, fmt.Errorf("%w: the task definition %s:%d has no tag %s with the value %s, so it may not be meant for her",
			bastion.ErrConfig, family, def.Revision, userTag, user)
	}
	return def, nil
}

// checkDefinitions describes the own task definitions of users, and returns them.
func (l *Launcher) checkDefinitions(ctx context.Context, users []string) (own []string, err error) {
	if len(users) == 0 {
		users = []string{"check"} // for the permission
	}
	var problems []error
	for _, user := range users {
		def, err := l.userDefinition(ctx, user)
		switch {
		case errors.Is(err, errNoDefinition):
		case errors.Is(err, bastion.ErrDenied): // for all users
			return nil, err
		case err != nil:
			problems = append(problems, err)
		case !slices.ContainsFunc(def.ContainerDefinitions, func(c types.ContainerDefinition) bool { return aws.ToString(c.Name) == l.Container }):
			problems = append(problems, fmt.Errorf("%w: the task definition %s:%d has no container %s", bastion.ErrConfig, aws.ToString(def.Family), def.Revision, l.Container))
		default:
			own = append(own, aws.ToString(def.TaskDefinitionArn))
		}
	}
	return own, errors.Join(problems...)
}
