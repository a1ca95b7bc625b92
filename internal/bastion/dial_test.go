package bastion

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

var alice = identity.Identity{User: "alice", Profile: "default", ConnID: "c1"}

// newDialer returns a gateway's dialer to w.
func newDialer(w *world, ledger Ledger) *Dialer {
	return &Dialer{
		Ledger:   ledger,
		Profiles: map[string]Profile{"default": {Launcher: w, Idle: 15 * time.Minute, MaxLife: time.Hour, StartTimeout: 5 * time.Minute}},
		FleetKey: w.fleet,
		Log:      slog.New(slog.DiscardHandler),
		NetDial:  w.netDial,
	}
}

// mustDial connects alice, hangs up, and returns the task she was in.
func mustDial(t *testing.T, d *Dialer, notify func(bool)) Task {
	t.Helper()
	conn, err := d.Dial(t.Context(), alice, notify)
	if err != nil {
		t.Fatal(err)
	}
	conn.hangUp()
	return conn.Task
}

func TestDialStartsThenFinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})

		began := time.Now()
		var notes []bool
		conn, err := d.Dial(t.Context(), alice, func(starting bool) { notes = append(notes, starting) })
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < w.boot || took > w.boot+time.Second {
			t.Errorf("the first login took %v, the boot %v", took, w.boot)
		}
		if !slices.Equal(notes, []bool{true}) {
			t.Errorf("notified %v, want once true", notes)
		}
		if string(conn.ClientVersion()) != "SSH-2.0-Sallyport" {
			t.Errorf("client version %q", conn.ClientVersion())
		}
		algs := conn.Conn.(ssh.AlgorithmsConnMetadata).Algorithms()
		if algs.KeyExchange != "mlkem768x25519-sha256" || algs.Read.Cipher != "aes128-gcm@openssh.com" || algs.HostKey != "ssh-ed25519" {
			t.Errorf("negotiated %+v", algs)
		}
		if conn.Owner != (Owner{"alice", "default"}) {
			t.Errorf("owner %v", conn.Owner)
		}
		// The deadline of the handshake must not end the connection.
		time.Sleep(time.Minute)
		if _, _, err := conn.SendRequest("ping", true, nil); err != nil {
			t.Errorf("a minute later: %v", err)
		}
		conn.hangUp()

		began = time.Now()
		task := mustDial(t, d, func(bool) { t.Error("notified on the warm path") })
		if took := time.Since(began); took != 0 {
			t.Errorf("the warm path took %v", took)
		}
		if launches, _, _ := w.counts(); launches != 1 || w.lookups > 7 {
			t.Errorf("%d launches, %d lookups", launches, w.lookups)
		}
		if got := w.task(0).logins; task.ID != w.task(0).ID || !slices.Equal(got, []string{"start", "c1", "c1"}) {
			t.Errorf("logins %q", got)
		}
	})
}

// countingLedger counts, to show what the warm path costs.
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

func TestWarmPathCostsOneGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		ledger := &countingLedger{}
		d := newDialer(w, ledger)
		mustDial(t, d, nil)
		*ledger = countingLedger{Memory: Memory{entries: ledger.entries}}
		launches, lookups := w.launches, w.lookups

		mustDial(t, d, nil)
		if ledger.gets != 1 || ledger.swaps != 0 || w.launches != launches || w.lookups != lookups {
			t.Errorf("%d gets, %d swaps, %d launches, %d lookups; want one get",
				ledger.gets, ledger.swaps, w.launches-launches, w.lookups-lookups)
		}
	})
}

func TestManyDialsOneLaunch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
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
				conn.hangUp()
			})
		}
		wg.Wait()
		if launches, _, _ := w.counts(); launches != 1 {
			t.Errorf("%d launches for 50 logins", launches)
		}
		if began != 1 || joined != 49 {
			t.Errorf("%d began the start and %d joined it", began, joined)
		}
	})
}

func TestBootOutlivesWhoAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.boot = time.Minute
		d := newDialer(w, &Memory{})
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
		if took := time.Since(began); took > w.boot+time.Second {
			t.Errorf("the second client waited until %v after the first began, the boot took %v", took, w.boot)
		}
		if launches, _, _ := w.counts(); launches != 1 || !slices.Equal(notes, []bool{false}) {
			t.Errorf("%d launches, notified %v", launches, notes)
		}
		if err := d.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestDeadTaskMakesWay(t *testing.T) {
	all := func(*fakeTask) bool { return true }
	tests := []struct {
		name string
		// kill sees to the end of the first task; the Dial after it must
		// give another.
		kill func(w *world)
	}{
		{"dead before the login", func(w *world) { w.killIf(all) }},
		{"dies between the ledger's answer and the connect", func(w *world) {
			w.onDial = func(task *fakeTask) error {
				w.onDial = nil
				w.killIf(all)
				return nil
			}
		}},
		{"dies during the handshake", func(w *world) {
			w.task(0).mute = true
			time.AfterFunc(3*time.Second, func() { w.killIf(all) })
		}},
		{"stops listening a while before it is seen dead", func(w *world) {
			w.task(0).listens = time.Now().Add(time.Hour)
			time.AfterFunc(8*time.Second, func() { w.killIf(all) })
		}},
		{"dead, and its address belongs to another", func(w *world) {
			w.killIf(all)
			w.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 1})
			w.task(1).Addr = w.task(0).Addr
			w.task(1).shows = newKey(w.t)
			w.task(1).listens = time.Now()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				d := newDialer(w, &Memory{})
				first := mustDial(t, d, nil)
				tt.kill(w)
				notes := 0
				second := mustDial(t, d, func(bool) { notes++ })
				if second.ID == first.ID || second.Generation != 2 || notes != 1 {
					t.Errorf("first %+v, then %+v, %d notes", first, second, notes)
				}
			})
		})
	}
}

// TestAddressOfAnother: a gateway has adopted a bastion, whose host key it does not
// know, and when that has ended, another user's bastion has its address.
func TestAddressOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.noKey = true
		mustDial(t, newDialer(w, &Memory{}), nil)
		d := newDialer(w, &Memory{})
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.killIf(func(*fakeTask) bool { return true })
		w.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 1})
		w.task(1).Addr = w.task(0).Addr
		w.task(1).listens = time.Now()
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("got %+v", task)
		}
		if len(w.task(1).logins) != 0 {
			t.Errorf("somebody got in to the other's bastion: %v", w.task(1).logins)
		}
	})
}

func TestRefusingForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		first := mustDial(t, d, nil)
		w.task(0).listens = time.Now().Add(3 * time.Second)
		w.onAlive = func() error { return errors.New("not known") }
		if again := mustDial(t, d, nil); again.ID != first.ID {
			t.Errorf("a bastion that was busy was replaced")
		}
		w.task(0).listens = time.Now().Add(time.Hour)
		began := time.Now()
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, errConnRefused) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took < patience || took > patience+5*time.Second {
			t.Errorf("gave up after %v", took)
		}
		if launches, _, _ := w.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}

// TestAlivePanics wants a launcher's panic to end neither the process nor the
// login.
func TestAlivePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		first := mustDial(t, d, nil)
		w.task(0).listens = time.Now().Add(3 * time.Second)
		asked := 0
		w.onAlive = func() error { asked++; panic("boom") }
		if again := mustDial(t, d, nil); again.ID != first.ID || asked == 0 {
			t.Errorf("first %s, then %s; asked %d times", first.ID, again.ID, asked)
		}
	})
}

// TestHangs: a bastion that is said to run and does not answer is replaced, unless
// it is of use to somebody, or the fault may be ours.
func TestHangs(t *testing.T) {
	tests := []struct {
		name string
		// hang has the first task answer no new connections; other is one
		// that exists.
		hang    func(w *world, d *Dialer, other *Conn)
		wantErr error // nil if it is replaced
	}{
		{"nobody is in it", func(w *world, _ *Dialer, other *Conn) {
			other.hangUp()
			w.task(0).mute = true
		}, nil},
		{"nobody hears from it", func(w *world, _ *Dialer, other *Conn) {
			w.task(0).mute = true
		}, nil},
		{"refuses", func(w *world, _ *Dialer, other *Conn) {
			w.task(0).listens = time.Now().Add(time.Hour)
		}, nil},
		{"another hears from it", func(w *world, _ *Dialer, other *Conn) {
			w.task(0).mute = true
			time.AfterFunc(20*time.Second, func() { other.SendRequest("ping", true, nil) })
		}, ErrNoAnswer},
		{"it is not known whether it runs", func(w *world, _ *Dialer, other *Conn) {
			w.task(0).mute = true
			w.onAlive = func() error { return errors.New("not known") }
		}, ErrNoAnswer},
		{"too many open files", func(w *world, _ *Dialer, other *Conn) {
			w.onDial = func(*fakeTask) error { return syscall.EMFILE }
		}, syscall.EMFILE},
		{"another gateway has replaced it", func(w *world, d *Dialer, other *Conn) {
			w.task(0).mute = true
			time.AfterFunc(20*time.Second, func() {
				if _, err := newDialer(w, d.Ledger).Stop(w.t.Context(), other.Owner, "test"); err != nil {
					w.t.Error(err)
				}
			})
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				d := newDialer(w, &Memory{})
				d.WrapConn = func(nc net.Conn) net.Conn { return &hearing{Conn: nc} }
				other, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer other.hangUp()
				time.Sleep(time.Minute)
				tt.hang(w, d, other)
				began := time.Now()
				conn, err := d.Dial(t.Context(), alice, nil)
				took := time.Since(began)
				_, _, live := w.counts()
				if live != 1 {
					t.Errorf("%d live tasks", live)
				}
				if tt.wantErr != nil {
					if !errors.Is(err, tt.wantErr) || took < patience || took > patience+handshakeTimeout+time.Second {
						t.Errorf("got %v after %v", err, took)
					}
					if w.stops > 0 {
						t.Error("it was stopped")
					}
					return
				}
				if err != nil {
					t.Fatalf("got %v after %v", err, took)
				}
				defer conn.hangUp()
				if conn.Task.Generation != 2 || w.stops != 1 {
					t.Errorf("generation %d, %d stops", conn.Task.Generation, w.stops)
				}
			})
		})
	}
}

// A hearing counts reads.
type hearing struct {
	net.Conn
	n atomic.Uint64
}

func (h *hearing) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	h.n.Add(1)
	return n, err
}

func (h *hearing) Heard() uint64 { return h.n.Load() }

// TestHangsForMany: those who wait for it together replace it once.
func TestHangsForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		ledger := &Memory{}
		gateways := []*Dialer{newDialer(w, ledger), newDialer(w, ledger)}
		mustDial(t, gateways[0], nil)
		w.task(0).mute = true
		w.onStop = func() error { time.Sleep(10 * time.Second); return nil }
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				conn, err := gateways[i%2].Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					return
				}
				conn.hangUp()
				if conn.Task.Generation != 2 {
					t.Errorf("generation %d", conn.Task.Generation)
				}
			})
		}
		wg.Wait()
		if _, tasks, _ := w.counts(); tasks != 2 || w.stops != 1 {
			t.Errorf("%d tasks, %d stops", tasks, w.stops)
		}
	})
}

func TestLaunchFailures(t *testing.T) {
	lost := errors.New("connection reset by peer")
	tests := []struct {
		name string
		// what happens to the first, second, ... Launch
		launches []func(ctx context.Context, w *world, l Launch) (bool, error)
		wantErr  error
		// after the failure, a Dial without faults must give this generation
		wantGeneration int64
	}{
		{"failed", []func(context.Context, *world, Launch) (bool, error){
			func(context.Context, *world, Launch) (bool, error) { return false, lost },
		}, lost, 1},
		{"worked, but the reply was lost", []func(context.Context, *world, Launch) (bool, error){
			func(context.Context, *world, Launch) (bool, error) { return true, lost },
		}, lost, 1},
		{"burnt once", []func(context.Context, *world, Launch) (bool, error){
			func(context.Context, *world, Launch) (bool, error) { return false, ErrGone },
		}, nil, 2},
		{"burnt twice", []func(context.Context, *world, Launch) (bool, error){
			func(context.Context, *world, Launch) (bool, error) { return false, ErrGone },
			func(context.Context, *world, Launch) (bool, error) { return false, ErrGone },
		}, ErrGone, 3},
		{"ends before it listens", []func(context.Context, *world, Launch) (bool, error){
			func(_ context.Context, w *world, l Launch) (bool, error) {
				time.AfterFunc(2*time.Second, func() { w.killIf(func(task *fakeTask) bool { return task.Generation == l.Generation }) })
				return true, nil
			},
		}, nil, 2},
		{"no account", []func(context.Context, *world, Launch) (bool, error){
			func(context.Context, *world, Launch) (bool, error) { return false, ErrNoAccount },
		}, ErrNoAccount, 1},
		{"hangs", []func(context.Context, *world, Launch) (bool, error){
			func(ctx context.Context, _ *world, _ Launch) (bool, error) { <-ctx.Done(); return false, ctx.Err() },
		}, ErrTimeout, 1},
		{"hangs, but worked", []func(context.Context, *world, Launch) (bool, error){
			func(ctx context.Context, _ *world, _ Launch) (bool, error) { <-ctx.Done(); return true, ctx.Err() },
		}, ErrTimeout, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				d := newDialer(w, &Memory{})
				next := 0
				w.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
					if next == len(tt.launches) {
						return true, nil
					}
					next++
					return tt.launches[next-1](ctx, w, l)
				}
				began := time.Now()
				conn, err := d.Dial(t.Context(), alice, nil)
				if !errors.Is(err, tt.wantErr) {
					t.Fatalf("got %v, want %v", err, tt.wantErr)
				}
				if errors.Is(err, ErrTimeout) && time.Since(began) != 5*time.Minute {
					t.Errorf("timed out after %v", time.Since(began))
				}
				if err == nil {
					conn.hangUp()
				}
				// Who tries again begins a start, and does not join one.
				again := func(starting bool) {
					if !starting {
						t.Error("joined a start that had failed")
					}
				}
				if task := mustDial(t, d, again); task.Generation != tt.wantGeneration {
					t.Errorf("generation %d, want %d", task.Generation, tt.wantGeneration)
				}
				if _, _, live := w.counts(); live != 1 {
					t.Errorf("%d live tasks", live)
				}
			})
		})
	}
}

// TestNeverReachable: a task that runs, and nobody can log in to, is stopped;
// otherwise each later login would wait for it in vain.
func TestNeverReachable(t *testing.T) {
	tests := []struct {
		name    string
		spoil   func(*fakeTask)
		wantErr error
	}{
		{"refuses connections", func(task *fakeTask) { task.listens = time.Now().Add(time.Hour) }, ErrTimeout},
		{"says nothing", func(task *fakeTask) { task.mute = true }, ErrTimeout},
		{"another host key", func(task *fakeTask) { task.shows = newKey(t) }, ErrHostKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				w.boot = 0
				d := newDialer(w, &Memory{})
				w.onDial = func(task *fakeTask) error {
					w.onDial = nil
					tt.spoil(task)
					return nil
				}
				if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, tt.wantErr) {
					t.Fatalf("got %v, want %v", err, tt.wantErr)
				}
				if w.stops != 1 || len(w.task(0).logins) != 0 {
					t.Errorf("stopped %d times, logins %q", w.stops, w.task(0).logins)
				}
				if task := mustDial(t, d, nil); task.Generation != 2 {
					t.Errorf("then generation %d", task.Generation)
				}
			})
		})
	}
}

func TestWrongHostKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		var log bytes.Buffer
		d.Log = slog.New(slog.NewTextHandler(&log, nil))
		mustDial(t, d, nil)
		task := w.task(0)
		task.shows = newKey(t)
		logins, attempts := len(task.logins), 0
		w.onDial = func(*fakeTask) error { attempts++; return nil }
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("got %v", err)
		}
		if attempts != 1 || len(task.logins) != logins || task.rejected != 0 {
			t.Errorf("%d attempts, %d logins more, %d rejected; want one attempt that sends no login",
				attempts, len(task.logins)-logins, task.rejected)
		}
		if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), ssh.FingerprintSHA256(task.shows.PublicKey())) {
			t.Errorf("the log does not say so: %s", &log)
		}
		if _, _, live := w.counts(); live != 0 || w.stops != 1 {
			t.Errorf("%d live tasks, %d stops; nobody is to be led there again", live, w.stops)
		}
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("then generation %d", task.Generation)
		}
	})
}

func TestFirstContactPinsTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		w.noKey = true
		ledger := &Memory{}
		d := newDialer(w, ledger)
		if task := mustDial(t, d, nil); task.HostKey == nil || !equal(task.HostKey, w.key.PublicKey()) {
			t.Error("the key was not learned")
		}
		w.task(0).shows = newKey(t)
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("another key than at first contact: %v", err)
		}
		mustDial(t, d, nil)

		// A gateway that adopts the task learns the key anew, once.
		ledger = &Memory{}
		d = newDialer(w, ledger)
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				conn, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					return
				}
				conn.hangUp()
			})
		}
		wg.Wait()
		w.task(1).shows = newKey(t)
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("another key than at first contact after adoption: %v", err)
		}
		if launches, _, _ := w.counts(); launches != 2 {
			t.Errorf("%d launches", launches)
		}
	})
}

func TestRefusedLoginIsNotRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		d.FleetKey = newKey(t)
		_, err := d.Dial(t.Context(), alice, nil)
		if !errors.Is(err, errRefused) {
			t.Errorf("got %v", err)
		}
		if got := w.task(0).rejected; got == 0 || got > 2 {
			t.Errorf("%d logins were tried", got)
		}
		if _, _, live := w.counts(); live != 1 {
			t.Errorf("a bastion others may be in was stopped")
		}
	})
}

// TestTakeover: a gateway that dies during a launch leaves a lease; another
// waits for it to end, and is given the task the dead one started.
func TestTakeover(t *testing.T) {
	for _, started := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			ledger := &Memory{}
			crashed, heir := newDialer(w, ledger), newDialer(w, ledger)
			var launches atomic.Int32
			w.onLaunch = func(ctx context.Context, l Launch) (bool, error) {
				if launches.Add(1) > 1 {
					return true, nil
				}
				if started {
					w.launch(l)
				}
				<-ctx.Done()
				return false, ctx.Err()
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			crashed.Dial(ctx, alice, nil)

			began := time.Now()
			var notes []bool
			task := mustDial(t, heir, func(starting bool) { notes = append(notes, starting) })
			if took := time.Since(began); took > lease+w.boot+3*time.Second {
				t.Errorf("took over after %v", took)
			}
			if _, tasks, _ := w.counts(); tasks != 1 || task.Generation != 1 || !slices.Equal(notes, []bool{false}) {
				t.Errorf("%d tasks, generation %d, notified %v", tasks, task.Generation, notes)
			}
			// The first one's StartTimeout must do no harm.
			crashed.Wait(t.Context())
			if again := mustDial(t, heir, nil); again.ID != task.ID {
				t.Errorf("the task was replaced")
			}
		})
	}
}

// TestTwoGateways: the second sees the first at work, and waits.
func TestTwoGateways(t *testing.T) {
	for _, boot := range []time.Duration{5 * time.Second, 2 * time.Minute} { // within the lease, and beyond it
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			w.boot = boot
			ledger := &Memory{}
			a, b := newDialer(w, ledger), newDialer(w, ledger)
			var wg sync.WaitGroup
			var ids [2]string
			for i, d := range []*Dialer{a, b} {
				wg.Go(func() { ids[i] = mustDial(t, d, nil).ID })
			}
			wg.Wait()
			if _, tasks, _ := w.counts(); tasks != 1 || ids[0] != ids[1] {
				t.Errorf("%d tasks: %q", tasks, ids)
			}
		})
	}
}

func TestAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		first := mustDial(t, newDialer(w, &Memory{}), nil)

		d := newDialer(w, &Memory{})
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, d, func(bool) { t.Error("notified") }); task.ID != first.ID {
			t.Errorf("got %s, want %s", task.ID, first.ID)
		}
		// Once adopted, it is as good as one of our own.
		w.killIf(func(*fakeTask) bool { return true })
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("after its end: generation %d", task.Generation)
		}
		// A listing that is behind the ledger changes nothing.
		if err := d.adopt(t.Context(), Profile{}, OwnedTask{Owner: Owner{"alice", "default"}, Task: first}); err != nil {
			t.Fatal(err)
		}
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("a stale listing was believed")
		}
	})
}

// TestAdoptHangs: a launcher that does not answer does not keep a gateway from
// starting, nor from finding later what runs.
func TestAdoptHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		first := mustDial(t, newDialer(w, &Memory{}), nil)
		d := newDialer(w, &Memory{})
		w.onList = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		began := time.Now()
		if err := d.Adopt(t.Context()); err == nil {
			t.Error("nothing was listed, and no error")
		}
		if took := time.Since(began); took > adoptTimeout {
			t.Errorf("took %v", took)
		}
		w.onList = nil
		if err := d.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if task := mustDial(t, d, nil); task.ID != first.ID {
			t.Errorf("got %s, want %s", task.ID, first.ID)
		}
	})
}

// TestAdoptFails: who comes to a gateway that could not adopt anything when it
// began is led to the bastion she has, whatever generations came before, and gets
// no second one as long as it cannot be known.
func TestAdoptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		old := newDialer(w, &Memory{})
		mustDial(t, old, nil)
		w.killIf(func(*fakeTask) bool { return true })
		second := mustDial(t, old, nil)
		w.onceGen = false // ECS remembers a generation for an hour

		lost := func(err error) *Dialer {
			w.onList = func(context.Context) error { return err }
			d := newDialer(w, &Memory{})
			if got := d.Adopt(t.Context()); !errors.Is(got, err) {
				t.Fatalf("adopted: %v", got)
			}
			return d
		}
		d := lost(fmt.Errorf("no permission: %w", ErrDenied))
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrDenied) {
			t.Errorf("got in: %v", err)
		}
		d = lost(ErrBusy)
		soon := time.Now().Add(time.Minute)
		w.onList = func(context.Context) error {
			if time.Now().Before(soon) {
				return ErrBusy
			}
			return nil
		}
		if task := mustDial(t, d, nil); task.ID != second.ID {
			t.Errorf("got %s, want %s", task.ID, second.ID)
		}
		id := alice
		id.User = "bob"
		conn, err := d.Dial(t.Context(), id, nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.hangUp()
		if launches, tasks, _ := w.counts(); launches != 3 || tasks != 3 {
			t.Errorf("%d launches, %d tasks", launches, tasks)
		}
	})
}

// TestSweepSparesSessions: if there are two bastions of one owner after all, the
// one that somebody is in is not ended, and stays hers.
func TestSweepSparesSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		conn, err := d.Dial(t.Context(), alice, nil)
		if err != nil {
			t.Fatal(err)
		}
		other := *w.task(0)
		other.ID, other.Generation, other.Addr = "other", 7, "other:1"
		w.tasks = append(w.tasks, &other)
		for range 3 {
			if err := d.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := d.alive(t.Context(), w, aliceOwner, conn.Task.ID); err != nil {
				t.Fatalf("the sweep has ended a session: %v", err)
			}
			time.Sleep(10 * time.Minute)
		}
		if task := mustDial(t, d, nil); task.ID != conn.Task.ID {
			t.Errorf("another connection leads to %s", task.ID)
		}
		if _, _, live := w.counts(); live != 1 {
			t.Errorf("%d bastions are left", live)
		}
		conn.hangUp()
	})
}

// TestMost: which of a user's bastions count towards the most she may have.
func TestMost(t *testing.T) {
	lost := func(context.Context, Launch) (bool, error) { return true, errors.New("lost") }
	none := func(context.Context, Launch) (bool, error) { return false, ErrBusy }
	for name, tt := range map[string]struct {
		other func(w *world, dial func())
		want  error
	}{
		"none":    {func(*world, func()) {}, nil},
		"running": {func(_ *world, dial func()) { dial() }, ErrTooMany},
		"ended": {func(w *world, dial func()) {
			dial()
			w.killIf(func(*fakeTask) bool { return true })
		}, nil},
		"starting": {func(w *world, dial func()) {
			w.boot = time.Minute
			w.servers.Go(dial)
			time.Sleep(time.Second)
		}, ErrTooMany},
		"not started": {func(w *world, dial func()) { w.onLaunch = none; dial(); w.onLaunch = nil }, nil},
		"lost":        {func(w *world, dial func()) { w.onLaunch = lost; dial(); w.onLaunch = nil }, ErrTooMany},
		"not known": {func(w *world, dial func()) {
			w.onLaunch = none
			dial()
			w.onLaunch = nil
			w.onList = func(context.Context) error { return errors.New("not now") }
		}, ErrTooMany},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				d := newDialer(w, &Memory{})
				d.Profiles["other"] = d.Profiles["default"]
				dial := func(profile string) error {
					id := alice
					id.Profile, id.Permissions.Limits.Bastions = profile, 1
					conn, err := d.Dial(t.Context(), id, nil)
					if err == nil {
						conn.hangUp()
					}
					return err
				}
				tt.other(w, func() { dial("other") })
				if err := dial("default"); !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				w.servers.Wait() // for who is still starting the other
			})
		})
	}
}

// TestAdoptHalfStarted: a task that its gateway left while it started is not
// started again.
func TestAdoptHalfStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		task, err := w.launch(Launch{Owner: Owner{"alice", "default"}, Generation: 3})
		if err != nil {
			t.Fatal(err)
		}
		d := newDialer(w, &Memory{})
		d.Profiles["default"] = Profile{Launcher: noAddress{w}}
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.Profiles["default"] = Profile{Launcher: w}
		if got := mustDial(t, d, nil); got.ID != task.ID {
			t.Errorf("got %s, want %s", got.ID, task.ID)
		}
	})
}

// noAddress lists tasks as they are before they have an address.
type noAddress struct{ *world }

func (n noAddress) List(ctx context.Context) ([]OwnedTask, error) {
	tasks, err := n.world.List(ctx)
	for i := range tasks {
		tasks[i].Task.Addr = ""
	}
	return tasks, err
}

// TestSilentBastion: a user whose bastion does not answer is told that she waits.
func TestSilentBastion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		mustDial(t, d, nil)
		var notes []time.Duration
		began := time.Now()
		w.onDial = func(task *fakeTask) error {
			if time.Since(began) > 5*time.Second { // what runs it has noticed its end
				w.killIf(func(t *fakeTask) bool { return t.Generation == 1 })
			}
			if task.Generation == 1 {
				return errConnRefused
			}
			return nil
		}
		if task := mustDial(t, d, func(bool) { notes = append(notes, time.Since(began)) }); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
		if len(notes) != 1 || notes[0] > time.Second {
			t.Errorf("told after %v", notes)
		}
	})
}

func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		profile := d.Profiles["default"]
		profile.MaxLife = 12 * time.Hour
		d.Profiles["default"] = profile
		sweep := func(wantLive int) {
			t.Helper()
			if err := d.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if _, _, live := w.counts(); live != wantLive {
				t.Errorf("%d live tasks, want %d", live, wantLive)
			}
		}
		current := mustDial(t, d, nil)
		// An earlier one that should have ended, and somebody's whom the
		// ledger does not know.
		orphan := &fakeTask{owner: Owner{"alice", "default"}, Task: Task{ID: "orphan", Generation: 0, Addr: "task:1"}, listens: time.Now(), fleet: w.fleet.PublicKey()}
		w.tasks = append(w.tasks, orphan)
		unknown, err := w.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 7})
		if err != nil {
			t.Fatal(err)
		}
		sweep(3) // the orphan is young: it may be part of a start
		if entry, _ := d.Ledger.Get(t.Context(), unknown.owner); entry.Generation != 7 || entry.Task.ID != unknown.ID {
			t.Errorf("the unknown bastion was not adopted: %+v", entry)
		}
		time.Sleep(11 * time.Minute)
		sweep(2)
		if !orphan.dead {
			t.Error("the orphan lives")
		}
		time.Sleep(12 * time.Hour)
		sweep(2) // the agents may be about to end by themselves
		time.Sleep(10 * time.Minute)
		sweep(0)
		if task := mustDial(t, d, nil); task.Generation != current.Generation+1 {
			t.Errorf("after its maximum life: generation %d", task.Generation)
		}
	})
}

// TestRetry: a start is tried once more, where that may help.
func TestRetry(t *testing.T) {
	for _, tt := range []struct {
		err   error
		wants int // launches
	}{
		{fmt.Errorf("%w: %w", ErrGone, ErrCapacity), 2},
		{fmt.Errorf("%w: %w", ErrGone, ErrPlatform), 2},
		{fmt.Errorf("%w: %w", ErrGone, ErrImage), 1},
		{fmt.Errorf("%w: %w", ErrGone, ErrQuota), 1},
		{fmt.Errorf("%w: %w", ErrGone, ErrSecrets), 1},
		{ErrDenied, 1},
		{ErrConfig, 1},
		{ErrBusy, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			d := newDialer(w, &Memory{})
			var attempts []int
			w.onLaunch = func(_ context.Context, l Launch) (bool, error) {
				attempts = append(attempts, l.Attempt)
				return false, tt.err
			}
			if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, tt.err) {
				t.Errorf("%v: got %v", tt.err, err)
			}
			if want := []int{0, 1}[:tt.wants]; !slices.Equal(attempts, want) {
				t.Errorf("%v: attempts %v, want %v", tt.err, attempts, want)
			}
			w.onLaunch = nil
			mustDial(t, d, nil)
		})
	}
}

// TestLostSYN: a machine that comes up while nobody hears what is sent to it is
// reached soon after, not when TCP asks again.
func TestLostSYN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		var open, most atomic.Int64
		d.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Now().Before(w.task(0).listens) {
				most.Store(max(most.Load(), open.Add(1)))
				defer open.Add(-1)
				<-ctx.Done() // lost, and so are all repetitions for some seconds
				return nil, ctx.Err()
			}
			return w.netDial(ctx, network, addr)
		}
		w.boot = 25 * time.Second // more than one handshakeTimeout
		mustDial(t, d, nil)
		if n := most.Load(); n > 6 {
			t.Errorf("%d attempts at once", n)
		}
		if late := time.Since(w.task(0).listens); late > 300*time.Millisecond {
			t.Errorf("reached after %v", late)
		}
	})
}

// TestSlowNetwork: what takes long to answer, but does, is waited for.
func TestSlowNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		d.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			select {
			case <-time.After(4 * time.Second):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return w.netDial(ctx, network, addr)
		}
		mustDial(t, d, nil)
		if launches, _, _ := w.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}

// lossyLedger makes each change, and answers the first ones with an error.
type lossyLedger struct {
	Memory
	losses []error
}

func (l *lossyLedger) Swap(ctx context.Context, o Owner, old, new Entry) (Entry, error) {
	made, err := l.Memory.Swap(ctx, o, old, new)
	if err == nil && len(l.losses) > 0 {
		err = l.losses[0]
		l.losses = l.losses[1:]
	}
	return made, err
}

// TestSwapReplyLost: a gateway must not take its own claim for another's, and
// wait for that lease to end. A conflict is what the ledger's client reports
// when it has repeated, by itself, a request that had worked.
func TestSwapReplyLost(t *testing.T) {
	for _, loss := range []error{ErrConflict, errors.New("connection reset by peer")} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			ledger := &lossyLedger{losses: []error{loss, loss}} // to claim, and to record
			began := time.Now()
			mustDial(t, newDialer(w, ledger), nil)
			if took := time.Since(began); took > w.boot+time.Second {
				t.Errorf("%v: took %v", loss, took)
			}
			if launches, _, _ := w.counts(); launches != 1 || len(ledger.losses) != 0 {
				t.Errorf("%v: %d launches, %d replies not lost", loss, launches, len(ledger.losses))
			}
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
	d := newDialer(newWorld(t), &Memory{})
	_, err := d.Dial(t.Context(), identity.Identity{User: "alice", Profile: "prod"}, nil)
	if !errors.Is(err, ErrNoProfile) {
		t.Errorf("got %v", err)
	}
}

func TestWrapConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		d := newDialer(w, &Memory{})
		wrapped := 0
		d.WrapConn = func(c net.Conn) net.Conn { wrapped++; return c }
		mustDial(t, d, nil)
		if wrapped != 2 { // the proof that it works, and the user's
			t.Errorf("wrapped %d connections", wrapped)
		}
	})
}

// TestFailedEvent wants the event of a start that fails to say which generation it
// was, and which task, as far as there was one.
func TestFailedEvent(t *testing.T) {
	for _, tt := range []struct {
		name string
		with func(w *world)
		task bool
	}{
		{"no task", func(w *world) { w.onLaunch = func(context.Context, Launch) (bool, error) { return false, ErrCapacity } }, false},
		{"nobody can log in to it", func(w *world) { w.onDial = func(task *fakeTask) error { task.mute = true; return nil } }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.end()
				tt.with(w)
				d := newDialer(w, &Memory{})
				var events []Event
				d.Event = func(e Event) { events = append(events, e) }
				if _, err := d.Dial(t.Context(), alice, func(bool) {}); err == nil {
					t.Fatal("it was started")
				}
				i := slices.IndexFunc(events, func(e Event) bool { return e.Kind == Failed })
				if i < 0 {
					t.Fatalf("no such event among %+v", events)
				}
				if e := events[i]; e.Task.Generation != 1 || (e.Task.ID != "") != tt.task || e.Reason == "" {
					t.Errorf("the event is %+v", e)
				}
			})
		})
	}
}
