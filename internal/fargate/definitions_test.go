package fargate

import (
	"context"
	"errors"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// ownDefinitions permits a launcher's users to have task definitions of their own.
func ownDefinitions(l *Launcher) { l.UserTaskDefinitions = "sallyport-user-%u" }

// register registers a revision of a family; see [awsfake.Cloud.Define].
func (account *fakeAccount) register(family, container, user string) (arn string) {
	account.t.Helper()
	arn, err := account.cloud.Define(family, container, user)
	if err != nil {
		account.t.Fatal(err)
	}
	return arn
}

// definition returns the task definition of the last task.
func (account *fakeAccount) definition() string {
	tasks := account.cloud.Tasks()
	if len(tasks) == 0 {
		return "no task"
	}
	return tasks[len(tasks)-1].Definition
}

func TestFamily(t *testing.T) {
	l := &Launcher{Options: Options{UserTaskDefinitions: "sallyport-user-%u"}}
	for user, want := range map[string]string{
		"alice":              "sallyport-user-alice",
		"Alice-2":            "sallyport-user-Alice-2",
		"alice.smith":        "sallyport-user-alice_2esmith",
		"alice_2esmith":      "sallyport-user-alice_5f2esmith",
		"alice@corp.example": "sallyport-user-alice_40corp_2eexample",
	} {
		if got := l.family(user); got != want {
			t.Errorf("%s: got %s, want %s", user, got, want)
		}
	}
}

// FuzzFamily looks for two users with one family, and for a family that ECS rejects.
func FuzzFamily(f *testing.F) {
	f.Add("alice", "bob")
	f.Add("a.b", "a_2eb")
	f.Add("a_", "a_5f")
	f.Add("x", "-x")
	valid := regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	l := &Launcher{Options: Options{UserTaskDefinitions: strings.Repeat("p", 30) + "%u" + strings.Repeat("s", 30)}}
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, user := range []string{a, b} {
			if user == "" || len(user) > 64 { // is no user
				return
			}
			if family := l.family(user); !valid.MatchString(family) {
				t.Errorf("%q has the family %q", user, family)
			}
		}
		if a != b && l.family(a) == l.family(b) {
			t.Errorf("%q and %q have the family %q", a, b, l.family(a))
		}
	})
}

// TestUserTaskDefinitions: a user has the latest revision of her own task definition,
// or else the profile's. A definition that does not name her in its tag is not hers.
func TestUserTaskDefinitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(ownDefinitions)
		common := "arn:aws:ecs:eu-west-1:123456789012:task-definition/" + awsfake.TaskDefinition

		account.register("sallyport-user-alice", "bastion", "alice")
		hers := account.register("sallyport-user-alice", "bastion", "alice")
		account.register("sallyport-user-frontend", "bastion", "")
		account.register("sallyport-user-mallory", "bastion", "alice")
		account.register("sallyport-user-eve", "web", "eve")

		before := len(account.cloud.Calls())
		g.mustLogin(t, "alice")
		if got := account.definition(); got != hers {
			t.Errorf("alice has %s, want %s", got, hers)
		}
		if calls := account.calls(before); calls["ecs:DescribeTaskDefinition"] != 1 || calls["ecs:RunTask"] != 1 {
			t.Errorf("calls %v", calls)
		}
		g.mustLogin(t, "bob")
		if got := account.definition(); got != common {
			t.Errorf("bob has %s, want %s", got, common)
		}
		for user, want := range map[string]string{
			"frontend": "has no tag sallyport:user with the value frontend",
			"mallory":  "has no tag sallyport:user with the value mallory",
			"eve":      "Override for container named bastion is not a container",
		} {
			_, err := g.login(t.Context(), user)
			account.must(err, bastion.ErrConfig)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %q", user, err, want)
			}
		}
		account.live("alice", "bob")

		// The next bastion has the next revision; without one, the profile's.
		account.agents.idle()
		time.Sleep(time.Minute)
		account.agents.set(func() { account.agents.over = false })
		newer := account.register("sallyport-user-alice", "bastion", "alice")
		g.mustLogin(t, "alice")
		if got := account.definition(); got != newer {
			t.Errorf("alice has %s, want %s", got, newer)
		}
	})
}

// TestUserTaskDefinitionAppears: another gateway launches the same generation before
// and after the user's task definition is registered. Both get one task.
func TestUserTaskDefinitionAppears(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		first := account.gateway(ownDefinitions)
		ctx, cancel := context.WithCancel(t.Context())
		go first.login(ctx, "alice")
		time.Sleep(time.Duration(rng.Int64N(int64(5 * time.Second))))
		account.register("sallyport-user-alice", "bastion", "alice")
		account.gateway(ownDefinitions).mustLogin(t, "alice")
		account.live("alice")
		cancel()
		first.Wait(t.Context())
	})
}

// TestUserTaskDefinitionFaults: while the definition cannot be read, no task is
// started, above all not with another definition.
func TestUserTaskDefinitionFaults(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		hers := account.register("sallyport-user-alice", "bastion", "alice")
		faults := []awsfake.Fault{awsfake.Throttled, awsfake.Unavailable, awsfake.Broken, {LoseReply: true}}
		account.cloud.OnCall = onCall("ecs:DescribeTaskDefinition", 1+rng.IntN(20), faults[rng.IntN(len(faults))])
		g := account.gateway(ownDefinitions)
		g.mustLogin(t, "alice")
		if got := account.definition(); got != hers || len(account.cloud.Tasks()) != 1 {
			t.Errorf("alice has %s, want %s; %d tasks", got, hers, len(account.cloud.Tasks()))
		}
		account.cloud.Deny("ecs:DescribeTaskDefinition", true)
		_, err := g.login(t.Context(), "bob")
		account.must(err, bastion.ErrDenied)
		account.live("alice")
	})
}

// TestCheckUserTaskDefinitions: the check finds mistakes in users' task definitions,
// and a policy that does not permit to run them.
func TestCheckUserTaskDefinitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		account := newFakeAccount(t)
		defer account.end()
		g := account.gateway(ownDefinitions)
		check := func(users ...string) map[string]error {
			t.Helper()
			_, findings, err := g.launcher.Check(t.Context(), users)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]error{}
			for _, f := range findings {
				got[f.Action] = f.Err
			}
			if _, ok := got["ecs:DescribeTaskDefinition"]; !ok {
				t.Fatalf("findings %v", findings)
			}
			return got
		}
		account.register("sallyport-user-alice", "bastion", "alice")
		account.register("sallyport-user-carol", "web", "carol")
		account.register("sallyport-user-dave", "bastion", "")
		for _, err := range check("alice", "bob") {
			if err != nil {
				t.Error(err)
			}
		}
		got := check("alice", "bob", "carol", "dave")["ecs:DescribeTaskDefinition"]
		account.must(got, bastion.ErrConfig)
		for _, want := range []string{"sallyport-user-carol:1 has no container bastion", "sallyport-user-dave:1 has no tag sallyport:user with the value dave"} {
			if got == nil || !strings.Contains(got.Error(), want) {
				t.Errorf("got %v, want %q", got, want)
			}
		}
		for _, users := range [][]string{nil, {"alice"}} {
			account.cloud.Deny("ecs:DescribeTaskDefinition", true)
			account.must(check(users...)["ecs:DescribeTaskDefinition"], bastion.ErrDenied)
			account.cloud.Permit()
		}
		// Without the family in the policy.
		policy := &awsfake.Policy{}
		for _, text := range []string{policies(t)[0], `{"Effect": "Allow", "Action": "ecs:DescribeTaskDefinition", "Resource": "*"}`} {
			if err := policy.Allow([]byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		account.cloud.Set(func() { account.cloud.Policy = policy })
		if err := check("bob")["ecs:RunTask"]; err != nil {
			t.Error(err)
		}
		if err := check("alice")["ecs:RunTask"]; !errors.Is(err, bastion.ErrDenied) {
			t.Errorf("got %v, want that it is denied", err)
		}
	})
}
