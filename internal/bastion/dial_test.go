package bastion

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

var alice = identity.Identity{User: "alice", Profile: "default", ConnID: "c1"}

// newDialer returns a gateway's dialer to fake.
func newDialer(fake *fakeLauncher, ledger Ledger) *Dialer {
	return &Dialer{
		Settings: Settings{
			Profiles:  map[string]Profile{"default": {Launcher: fake, ProfileOptions: ProfileOptions{Idle: 15 * time.Minute, MaxLife: time.Hour, StartTimeout: 5 * time.Minute}}},
			FleetKeys: []ssh.Signer{fake.fleet},
		},
		Ledger:  ledger,
		Log:     slog.New(slog.DiscardHandler),
		NetDial: fake.netDial,
	}
}

// mustDial connects alice, closes the connection, and returns its task.
func mustDial(t *testing.T, d *Dialer, notify func(bool)) Task {
	t.Helper()
	conn, err := d.Dial(t.Context(), alice, notify)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	return conn.Task
}

// mustBastion returns the owner's bastion at a gateway.
func mustBastion(t *testing.T, d *Dialer, owner Owner) *bastion {
	t.Helper()
	b, err := d.bastion(owner)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDialStartsThenFinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})

		began := time.Now()
		var notes []bool
		conn, err := d.Dial(t.Context(), alice, func(starting bool) { notes = append(notes, starting) })
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < fake.boot || took > fake.boot+time.Second {
			t.Errorf("the first login took %v, the boot %v", took, fake.boot)
		}
		if !slices.Equal(notes, []bool{true}) {
			t.Errorf("notified %v, want once true", notes)
		}
		if conn.Version() != "SSH-2.0-Sallyport" {
			t.Errorf("client version %q", conn.Version())
		}
		algs := conn.Algorithms()
		if algs.Kex != "mlkem768x25519-sha256" || algs.CipherIn != "aes128-gcm@openssh.com" || algs.HostKey != "ssh-ed25519" {
			t.Errorf("negotiated %+v", algs)
		}
		if conn.Owner != (Owner{"alice", "default"}) {
			t.Errorf("owner %v", conn.Owner)
		}
		// The deadline of the handshake must not end the connection.
		time.Sleep(time.Minute)
		if err := ping(conn); err != nil {
			t.Errorf("a minute later: %v", err)
		}
		conn.Close()

		began = time.Now()
		task := mustDial(t, d, func(bool) { t.Error("notified on the warm path") })
		if took := time.Since(began); took != 0 {
			t.Errorf("the warm path took %v", took)
		}
		if launches, _, _ := fake.counts(); launches != 1 || fake.lookups > 7 {
			t.Errorf("%d launches, %d lookups", launches, fake.lookups)
		}
		if got := fake.task(0).logins; task.ID != fake.task(0).ID || !slices.Equal(got, []string{"start", "c1", "c1"}) {
			t.Errorf("logins %q", got)
		}
	})
}

// countingLedger counts calls, for the cost of the warm path.
type countingLedger struct {
	Memory
	gets, swaps int
}

func (c *countingLedger) Get(ctx context.Context, o Owner) (Entry, error) {
	c.gets++
	return c.Memory.Get(ctx, o)
}

func (c *countingLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	c.swaps++
	return c.Memory.Swap(ctx, o, old, new)
}

func TestWarmPathCostsNoCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &countingLedger{}
		d := newDialer(fake, ledger)
		mustDial(t, d, nil)
		*ledger = countingLedger{Memory: Memory{entries: ledger.entries}}
		launches, lookups := fake.launches, fake.lookups

		mustDial(t, d, nil)
		if ledger.gets != 0 || ledger.swaps != 0 || fake.launches != launches || fake.lookups != lookups {
			t.Errorf("%d gets, %d swaps, %d launches, %d lookups; want none",
				ledger.gets, ledger.swaps, fake.launches-launches, fake.lookups-lookups)
		}
	})
}

func TestManyDialsOneLaunch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		began, joined := 0, 0
		for range 50 {
			wg.Go(func() {
				conn, err := d.Dial(t.Context(), alice, func(starting bool) {
					mu.Lock()
					defer mu.Unlock()
					if starting {
						began++
					} else {
						joined++
					}
				})
				if err != nil {
					t.Error(err)
					return
				}
				conn.Close()
			})
		}
		wg.Wait()
		if launches, _, _ := fake.counts(); launches != 1 {
			t.Errorf("%d launches for 50 logins", launches)
		}
		if began != 1 || joined != 49 {
			t.Errorf("%d began the start and %d joined it", began, joined)
		}
	})
}

func TestBootOutlivesWhoAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		fake.boot = time.Minute
		d := newDialer(fake, &Memory{})
		began := time.Now()

		left := errors.New("the client left")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(10*time.Second, func() { cancel(left) })
		if _, err := d.Dial(ctx, alice, nil); !errors.Is(err, left) {
			t.Fatalf("got %v, want the cause of the end", err)
		}
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("left after %v", took)
		}
		impatient, cancelWait := context.WithTimeout(t.Context(), time.Second)
		defer cancelWait()
		if err := d.Wait(impatient); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait during a boot: %v", err)
		}

		var notes []bool
		mustDial(t, d, func(starting bool) { notes = append(notes, starting) })
		if took := time.Since(began); took > fake.boot+time.Second {
			t.Errorf("the second client waited until %v after the first began, the boot took %v", took, fake.boot)
		}
		if launches, _, _ := fake.counts(); launches != 1 || !slices.Equal(notes, []bool{false}) {
			t.Errorf("%d launches, notified %v", launches, notes)
		}
		if err := d.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestMost: a user's running bastions count towards the limit, and so do starts with
// an unknown outcome. Ended bastions and failed starts do not.
func TestMost(t *testing.T) {
	lost := func(context.Context, Launch) (bool, error) { return true, errors.New("lost") }
	none := func(context.Context, Launch) (bool, error) { return false, ErrBusy }
	for name, tt := range map[string]struct {
		other func(fake *fakeLauncher, dial func())
		want  error
	}{
		"none":    {func(*fakeLauncher, func()) {}, nil},
		"running": {func(_ *fakeLauncher, dial func()) { dial() }, ErrTooMany},
		"ended": {func(fake *fakeLauncher, dial func()) {
			dial()
			fake.killIf(func(*fakeTask) bool { return true })
		}, nil},
		"starting": {func(fake *fakeLauncher, dial func()) {
			fake.boot = time.Minute
			fake.servers.Go(dial)
			time.Sleep(time.Second)
		}, ErrTooMany},
		"not started": {func(fake *fakeLauncher, dial func()) { fake.onLaunch = none; dial(); fake.onLaunch = nil }, nil},
		"lost":        {func(fake *fakeLauncher, dial func()) { fake.onLaunch = lost; dial(); fake.onLaunch = nil }, ErrTooMany},
		"not known": {func(fake *fakeLauncher, dial func()) {
			fake.onLaunch = none
			dial()
			fake.onLaunch = nil
			fake.onList = func(context.Context) error { return errors.New("not now") }
		}, ErrTooMany},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				d := newDialer(fake, &Memory{})
				d.Profiles["other"] = d.Profiles["default"]
				dial := func(profile string) error {
					id := alice
					id.Profile, id.Permissions.Limits.Bastions = profile, 1
					conn, err := d.Dial(t.Context(), id, nil)
					if err == nil {
						conn.Close()
					}
					return err
				}
				tt.other(fake, func() { dial("other") })
				if err := dial("default"); !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				fake.servers.Wait() // for a Dial that is still starting the other
			})
		})
	}
}

func TestMemorySwap(t *testing.T) {
	var m Memory
	owner := Owner{"alice", "default"}
	first, err := m.Swap(t.Context(), owner, Entry{}, Entry{Generation: 1, Version: 99})
	if err != nil || first.Version != 1 {
		t.Fatalf("%+v, %v", first, err)
	}
	if _, err := m.Swap(t.Context(), owner, Entry{}, Entry{Generation: 2}); !errors.Is(err, ErrConflict) {
		t.Errorf("swapped what has changed: %v", err)
	}
	if now, err := m.Get(t.Context(), owner); err != nil || now.Generation != 1 {
		t.Errorf("%+v, %v", now, err)
	}
	if other, err := m.Get(t.Context(), Owner{"alice", "prod"}); err != nil || other.Version != 0 {
		t.Errorf("%+v, %v", other, err)
	}
}

func TestNoProfile(t *testing.T) {
	d := newDialer(newFakeLauncher(t), &Memory{})
	_, err := d.Dial(t.Context(), identity.Identity{User: "alice", Profile: "prod"}, nil)
	if !errors.Is(err, ErrNoProfile) {
		t.Errorf("got %v", err)
	}
}

// ping waits for the answer to a request.
func ping(c *Conn) error {
	c.WritePacket(sshmsg.GlobalRequest{Type: "ping", WantReply: true}.Append(nil))
	c.Flush()
	_, err := c.ReadPacket()
	return err
}
