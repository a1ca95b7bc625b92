package fargate

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// TestStaleList: a restarted gateway adopts the tasks in the listing. If the listing
// is stale and lacks a task, RunTask with the same client token returns that task.
func TestStaleList(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		account.cloud.ListLag = 3 * time.Second
		first := account.gateway(nil)
		ctx, cancel := context.WithCancel(t.Context())
		var task bastion.Task
		if rng.IntN(2) == 0 {
			task = first.mustLogin(t, "alice")
		} else {
			go first.login(ctx, "alice")
			time.Sleep(time.Duration(rng.Int64N(int64(5 * time.Second))))
		}
		second := account.gateway(nil)
		if got := second.mustLogin(t, "alice"); task.ID != "" && got.ID != task.ID {
			t.Errorf("got %s, want %s", got.ID, task.ID)
		}
		account.live("alice")
		cancel()
		first.Wait(t.Context())
	})
}

// TestRestart: a restarted gateway without a ledger does not know earlier
// generations, and still starts only one task.
func TestRestart(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		for range 1 + rng.IntN(5) {
			account.gateway(func(l *Launcher) {
				l.MaxSessions = rng.IntN(3) // another configuration each time
			}).mustLogin(t, "alice")
			account.live("alice")
			if rng.IntN(2) == 0 {
				account.cloud.StopAll("EssentialContainerExited", "Essential container in task exited")
			}
			time.Sleep(time.Duration(rng.Int64N(int64(40 * time.Minute))))
		}
		account.gateway(nil).mustLogin(t, "alice")
		account.live("alice")
	})
}

// TestRememberedFailure: if a RunTask failed for lack of capacity, ECS repeats the
// failure for the same client token for a day. With a ledger on disk, a restarted
// gateway uses a new generation, hence a new token.
func TestRememberedFailure(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		dir := t.TempDir()
		open := func() (*bastion.Folder, gateway) {
			ledger, err := bastion.OpenFolder(dir, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			g := account.dialer(ledger, nil)
			if err := g.Adopt(t.Context()); err != nil {
				t.Fatal(err)
			}
			return ledger, g
		}
		ledger, g := open()
		account.cloud.Set(func() {
			account.cloud.OnLaunch = func(awsfake.Launch) awsfake.Fate { return awsfake.Fate{Failure: awsfake.NoCapacity} }
		})
		_, err := g.login(t.Context(), "alice")
		account.must(err, bastion.ErrCapacity)
		ledger.Close()
		account.cloud.Set(func() { account.cloud.OnLaunch = nil })
		ledger, g = open()
		task := g.mustLogin(t, "alice")
		ledger.Close()
		time.Sleep(time.Duration(rng.Int64N(int64(time.Hour))))

		// The ledger holds the host key, too: an agent with another is
		// rejected.
		ledger, g = open()
		defer ledger.Close()
		other := sshtest.NewKey(t)
		account.agents.set(func() { account.agents.shows = func(string) ssh.Signer { return other } })
		_, err = g.login(t.Context(), "alice")
		account.must(err, bastion.ErrHostKey)
		account.live()
		account.agents.set(func() { account.agents.shows = nil })
		if again := g.mustLogin(t, "alice"); again.Generation != task.Generation+1 {
			t.Errorf("generation %d after %d", again.Generation, task.Generation)
		}
	})
}

// TestClockSkew: the clocks of AWS, gateway and agent differ. If AWS rejects a
// signature for its time, the SDK corrects its clock by the response and retries.
// Agents accept the gateway's certificates, which are valid from one minute before
// their signing until two minutes after. No bastion is stopped too early or too late.
func TestClockSkew(t *testing.T) {
	perSeed(t, func(t *testing.T, account *fakeAccount, rng *rand.Rand) {
		account.cloud.ClockOffset = time.Duration(rng.Int64N(int64(2*time.Hour))) - time.Hour
		account.agents.skew = time.Duration(rng.Int64N(int64(3*time.Minute-4*time.Second))) - time.Minute + 2*time.Second
		g := account.gateway(nil)
		g.mustLogin(t, "alice")
		g.launch(t, "bob")
		owner := bastion.Owner{User: "bob", Profile: "default"}
		if _, err := g.Ledger.Swap(t.Context(), owner, bastion.Entry{}, bastion.Entry{Generation: 2, State: bastion.Idle}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for _, step := range []struct {
			at   time.Duration
			live []string
		}{
			{5 * time.Second, []string{"alice", "bob"}},
			{9 * time.Minute, []string{"alice", "bob"}},
			{11 * time.Minute, []string{"alice"}},
			{12 * time.Hour, []string{"alice"}},
			{12*time.Hour + 17*time.Minute, nil},
		} {
			time.Sleep(time.Until(began.Add(step.at)))
			if err := g.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			account.live(step.live...)
		}
	})
}
