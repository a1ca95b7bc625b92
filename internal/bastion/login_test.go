package bastion

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestDeadTaskMakesWay(t *testing.T) {
	all := func(*fakeTask) bool { return true }
	tests := []struct {
		name string
		// kill ends the first task. The Dial after it must start another.
		kill func(fake *fakeLauncher)
	}{
		{"dead before the login", func(fake *fakeLauncher) { fake.killIf(all) }},
		{"dies between the ledger's answer and the connect", func(fake *fakeLauncher) {
			fake.onDial = func(task *fakeTask) error {
				fake.onDial = nil
				fake.killIf(all)
				return nil
			}
		}},
		{"dies during the handshake", func(fake *fakeLauncher) {
			fake.task(0).mute = true
			time.AfterFunc(3*time.Second, func() { fake.killIf(all) })
		}},
		{"stops listening a while before it is seen dead", func(fake *fakeLauncher) {
			fake.task(0).listens = time.Now().Add(time.Hour)
			time.AfterFunc(8*time.Second, func() { fake.killIf(all) })
		}},
		{"dead, and its address belongs to another", func(fake *fakeLauncher) {
			fake.killIf(all)
			fake.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 1})
			fake.task(1).Addr = fake.task(0).Addr
			fake.task(1).shows = sshtest.NewKey(fake.t)
			fake.task(1).listens = time.Now()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				d := newDialer(fake, &Memory{})
				first := mustDial(t, d, nil)
				tt.kill(fake)
				notes := 0
				second := mustDial(t, d, func(bool) { notes++ })
				if second.ID == first.ID || second.Generation != 2 || notes != 1 {
					t.Errorf("first %+v, then %+v, %d notes", first, second, notes)
				}
			})
		})
	}
}

// TestAddressOfAnother: a gateway has adopted a bastion without knowing its host key,
// and another user's bastion has taken its address. Dial must not log in to that, and
// starts another bastion.
func TestAddressOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		fake.noKey = true
		mustDial(t, newDialer(fake, &Memory{}), nil)
		d := newDialer(fake, &Memory{})
		if err := d.Adopt(t.Context()); err != nil {
			t.Fatal(err)
		}
		fake.killIf(func(*fakeTask) bool { return true })
		fake.launch(Launch{Owner: Owner{"bob", "default"}, Generation: 1})
		fake.task(1).Addr = fake.task(0).Addr
		fake.task(1).listens = time.Now()
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("got %+v", task)
		}
		if len(fake.task(1).logins) != 0 {
			t.Errorf("logins to another user's bastion: %v", fake.task(1).logins)
		}
	})
}

func TestRefusingForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		first := mustDial(t, d, nil)
		fake.task(0).listens = time.Now().Add(3 * time.Second)
		fake.onAlive = func() error { return errors.New("not known") }
		if again := mustDial(t, d, nil); again.ID != first.ID {
			t.Errorf("replaced a bastion that refused connections for 3 s")
		}
		fake.task(0).listens = time.Now().Add(time.Hour)
		began := time.Now()
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, errConnRefused) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took < answerTimeout || took > answerTimeout+5*time.Second {
			t.Errorf("gave up after %v", took)
		}
		if launches, _, _ := fake.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}

// TestAlivePanics: if Launcher.Alive panics, neither the process nor the login ends.
func TestAlivePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		first := mustDial(t, d, nil)
		fake.task(0).listens = time.Now().Add(3 * time.Second)
		asked := 0
		fake.onAlive = func() error { asked++; panic("boom") }
		if again := mustDial(t, d, nil); again.ID != first.ID || asked == 0 {
			t.Errorf("first %s, then %s; asked %d times", first.ID, again.ID, asked)
		}
	})
}

// TestHangs: a bastion that is alive according to its launcher and does not answer is
// replaced, unless another connection receives data from it, or the fault may be the
// gateway's.
func TestHangs(t *testing.T) {
	tests := []struct {
		name string
		// hang stops the first task from answering new connections. other
		// is a connection to it that was made before.
		hang    func(fake *fakeLauncher, d *Dialer, other *Conn)
		wantErr error // nil if it is replaced
	}{
		{"without other connections", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			other.Close()
			fake.task(0).mute = true
		}, nil},
		{"with a silent connection", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			fake.task(0).mute = true
		}, nil},
		{"refuses connections", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			fake.task(0).listens = time.Now().Add(time.Hour)
		}, nil},
		{"another connection receives data", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			fake.task(0).mute = true
			time.AfterFunc(20*time.Second, func() { ping(other) })
		}, ErrNoAnswer},
		{"Alive fails", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			fake.task(0).mute = true
			fake.onAlive = func() error { return errors.New("not known") }
		}, ErrNoAnswer},
		{"closes connections", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			other.Close()
			fake.task(0).hangsUp = true
		}, ErrNoAnswer},
		{"closes connections at first", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			other.Close()
			fake.task(0).hangsUp = true
			task := fake.task(0)
			time.AfterFunc(30*time.Second, func() {
				fake.mu.Lock()
				defer fake.mu.Unlock()
				task.hangsUp, task.mute = false, true
			})
		}, ErrNoAnswer},
		{"too many open files", func(fake *fakeLauncher, _ *Dialer, other *Conn) {
			fake.onDial = func(*fakeTask) error { return syscall.EMFILE }
		}, syscall.EMFILE},
		{"another gateway stops it", func(fake *fakeLauncher, d *Dialer, other *Conn) {
			fake.task(0).mute = true
			time.AfterFunc(20*time.Second, func() {
				if _, err := newDialer(fake, d.Ledger).Stop(fake.t.Context(), other.Owner, "test"); err != nil {
					fake.t.Error(err)
				}
			})
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFakeLauncher(t)
				defer fake.end()
				d := newDialer(fake, &Memory{})
				other, err := d.Dial(t.Context(), alice, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
				time.Sleep(time.Minute)
				tt.hang(fake, d, other)
				began := time.Now()
				conn, err := d.Dial(t.Context(), alice, nil)
				took := time.Since(began)
				_, _, live := fake.counts()
				if live != 1 {
					t.Errorf("%d live tasks", live)
				}
				if tt.wantErr != nil {
					if !errors.Is(err, tt.wantErr) || took < answerTimeout || took > answerTimeout+handshakeTimeout+time.Second {
						t.Errorf("got %v after %v", err, took)
					}
					if fake.stops > 0 {
						t.Error("it was stopped")
					}
					return
				}
				if err != nil {
					t.Fatalf("got %v after %v", err, took)
				}
				defer conn.Close()
				if conn.Task.Generation != 2 || fake.stops != 1 {
					t.Errorf("generation %d, %d stops", conn.Task.Generation, fake.stops)
				}
			})
		})
	}
}

// TestHangsForMany: concurrent Dials replace a hanging bastion only once.
func TestHangsForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		ledger := &Memory{}
		gateways := []*Dialer{newDialer(fake, ledger), newDialer(fake, ledger)}
		mustDial(t, gateways[0], nil)
		fake.task(0).mute = true
		fake.onStop = func() error { time.Sleep(10 * time.Second); return nil }
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				conn, err := gateways[i%2].Dial(t.Context(), alice, nil)
				if err != nil {
					t.Error(err)
					return
				}
				conn.Close()
				if conn.Task.Generation != 2 {
					t.Errorf("generation %d", conn.Task.Generation)
				}
			})
		}
		wg.Wait()
		if _, tasks, _ := fake.counts(); tasks != 2 || fake.stops != 1 {
			t.Errorf("%d tasks, %d stops", tasks, fake.stops)
		}
	})
}

func TestWrongHostKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		var log bytes.Buffer
		d.Log = slog.New(slog.NewTextHandler(&log, nil))
		mustDial(t, d, nil)
		task := fake.task(0)
		task.shows = sshtest.NewKey(t)
		logins, attempts := len(task.logins), 0
		fake.onDial = func(*fakeTask) error { attempts++; return nil }
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("got %v", err)
		}
		if attempts != 2 || len(task.logins) != logins || task.rejected != 0 {
			t.Errorf("%d attempts, %d logins more, %d rejected; want two attempts that send no login, to the remembered task and to that of the ledger",
				attempts, len(task.logins)-logins, task.rejected)
		}
		if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), ssh.FingerprintSHA256(task.shows.PublicKey())) {
			t.Errorf("the log does not say so: %s", &log)
		}
		if _, _, live := fake.counts(); live != 0 || fake.stops != 1 {
			t.Errorf("%d live tasks, %d stops; nobody is to be led there again", live, fake.stops)
		}
		if task := mustDial(t, d, nil); task.Generation != 2 {
			t.Errorf("then generation %d", task.Generation)
		}
	})
}

func TestFirstContactPinsTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		fake.noKey = true
		ledger := &Memory{}
		d := newDialer(fake, ledger)
		if task := mustDial(t, d, nil); task.HostKey == nil || !equal(task.HostKey, fake.key.PublicKey()) {
			t.Error("the key was not learned")
		}
		fake.task(0).shows = sshtest.NewKey(t)
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("another key than at first contact: %v", err)
		}
		mustDial(t, d, nil)

		// A gateway that adopts the task learns its host key again, at the first
		// connection.
		ledger = &Memory{}
		d = newDialer(fake, ledger)
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
				conn.Close()
			})
		}
		wg.Wait()
		fake.task(1).shows = sshtest.NewKey(t)
		if _, err := d.Dial(t.Context(), alice, nil); !errors.Is(err, ErrHostKey) {
			t.Errorf("another key than at first contact after adoption: %v", err)
		}
		if launches, _, _ := fake.counts(); launches != 2 {
			t.Errorf("%d launches", launches)
		}
	})
}

func TestRefusedLoginIsNotRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.FleetKeys = []ssh.Signer{sshtest.NewKey(t)}
		_, err := d.Dial(t.Context(), alice, nil)
		if !errors.Is(err, errLoginDenied) {
			t.Errorf("got %v", err)
		}
		if got := fake.task(0).rejected; got == 0 || got > 2 {
			t.Errorf("%d logins were tried", got)
		}
		if _, _, live := fake.counts(); live != 1 {
			t.Errorf("a bastion others may be in was stopped")
		}
	})
}

// TestSilentBastion: if a bastion does not answer at once, Dial calls notify.
func TestSilentBastion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		mustDial(t, d, nil)
		var notes []time.Duration
		began := time.Now()
		fake.onDial = func(task *fakeTask) error {
			if time.Since(began) > 5*time.Second { // the launcher has noticed its end
				fake.killIf(func(t *fakeTask) bool { return t.Generation == 1 })
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

// TestStoppedAgent: the kernel accepts connections for an agent that is stopped. Dial
// calls notify soon, and not only when its first attempt has timed out.
func TestStoppedAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		mustDial(t, d, nil)
		fake.task(0).mute = true
		var notes []time.Duration
		began := time.Now()
		if task := mustDial(t, d, func(bool) { notes = append(notes, time.Since(began)) }); task.Generation != 2 {
			t.Errorf("generation %d", task.Generation)
		}
		if len(notes) != 1 || notes[0] > silence+time.Second {
			t.Errorf("told after %v", notes)
		}
	})
}

// TestLostSYN: while a task starts, SYNs to it are lost. Dial starts new TCP
// connections meanwhile, so that the task is reached at once when it is up, without
// waiting for a retransmission.
func TestLostSYN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		var open, most atomic.Int64
		d.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if time.Now().Before(fake.task(0).listens) {
				most.Store(max(most.Load(), open.Add(1)))
				defer open.Add(-1)
				<-ctx.Done() // the SYN is lost; its retransmission comes too late
				return nil, ctx.Err()
			}
			return fake.netDial(ctx, network, addr)
		}
		fake.boot = 25 * time.Second // more than one handshakeTimeout
		mustDial(t, d, nil)
		if n := most.Load(); n > 6 {
			t.Errorf("%d attempts at once", n)
		}
		if late := time.Since(fake.task(0).listens); late > 300*time.Millisecond {
			t.Errorf("reached after %v", late)
		}
	})
}

// TestSlowNetwork: Dial waits for a slow TCP handshake.
func TestSlowNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeLauncher(t)
		defer fake.end()
		d := newDialer(fake, &Memory{})
		d.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			select {
			case <-time.After(4 * time.Second):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			return fake.netDial(ctx, network, addr)
		}
		mustDial(t, d, nil)
		if launches, _, _ := fake.counts(); launches != 1 {
			t.Errorf("%d launches", launches)
		}
	})
}
