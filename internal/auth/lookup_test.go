package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// fakeLookup is a lookup whose answers, by user, take a second.
type fakeLookup struct {
	*lookup
	log bytes.Buffer

	mu      sync.Mutex
	answers map[string]string
	fail    error
	asked   []string

	out, most atomic.Int32 // questions that are out, and the most there were
}

func newFakeLookup(answers map[string]string) *fakeLookup {
	f := &fakeLookup{answers: answers}
	f.lookup = &lookup{
		setting: "fake", timeout: 10 * time.Second, ttl: time.Minute, staleTTL: 10 * time.Minute, loginGrace: 10 * time.Minute,
		inFlight: make(chan struct{}, maxInFlight), unknownInFlight: make(chan struct{}, maxUnknownInFlight),
	}
	f.lookup.log = slog.New(slog.NewTextHandler(&f.log, nil))
	f.fetch = func(ctx context.Context, user string, _ ssh.PublicKey, _ answer) (answer, error) {
		n := f.out.Add(1)
		defer f.out.Add(-1)
		for most := f.most.Load(); n > most && !f.most.CompareAndSwap(most, n); most = f.most.Load() {
		}
		f.mu.Lock()
		f.asked = append(f.asked, user)
		text, fail := f.answers[user], f.fail
		f.mu.Unlock()
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return answer{}, ctx.Err()
		}
		if fail != nil {
			return answer{}, fail
		}
		return newAnswer(user, []byte(text), nil), nil
	}
	return f
}

func (f *fakeLookup) set(fail error, user, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail, f.answers[user] = fail, text
}

// has asks, and says whether the answer has a key.
func (f *fakeLookup) has(t *testing.T, user string) (bool, error) {
	t.Helper()
	file, _, err := f.ask(user, edKey(1), home, true, time.Time{})
	if err != nil && !errors.Is(err, ErrUndecided) {
		t.Errorf("%v is not ErrUndecided", err)
	}
	return err == nil && len(file.entries) > 0, err
}

func TestLookupRemembers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLookup(map[string]string{"alice": authorized(edKey(1))})
		expect := func(step, user string, want bool, wantErr string, asked int) {
			t.Helper()
			got, err := f.has(t, user)
			if got != want || wantErr == "" && err != nil || wantErr != "" && (err == nil || !strings.Contains(err.Error(), wantErr)) {
				t.Errorf("%s: %v, %v", step, got, err)
			}
			if len(f.asked) != asked {
				t.Errorf("%s: asked %v", step, f.asked)
			}
		}
		expect("the first time", "alice", true, "", 1)
		time.Sleep(58 * time.Second)
		expect("while it counts", "alice", true, "", 1)
		time.Sleep(3 * time.Second)
		expect("when it counts no more", "alice", true, "", 2)

		// No keys is remembered for a shorter time.
		expect("a stranger", "bob", false, "", 3)
		time.Sleep(9 * time.Second)
		expect("the same", "bob", false, "", 3)
		f.set(nil, "bob", authorized(edKey(1)))
		time.Sleep(2 * time.Second)
		expect("no stranger any more", "bob", true, "", 4)

		// An old answer counts while no other can be had, but not for ever.
		f.set(errors.New("down"), "alice", "")
		time.Sleep(time.Minute)
		expect("down", "alice", true, "", 5)
		expect("still down, and not asked again at once", "alice", true, "", 5)
		expect("nothing is known", "carol", false, "fake: down", 6)
		expect("not asked again at once either", "carol", false, "fake: down", 6)
		time.Sleep(6 * time.Second)
		expect("asked again", "alice", true, "", 7)
		time.Sleep(10 * time.Minute)
		expect("too old", "alice", false, "fake: down", 8)
		f.set(nil, "alice", "")
		time.Sleep(retryAfter)
		expect("up again, without the key", "alice", false, "", 9)

		if n := strings.Count(f.log.String(), "keys could not be looked up"); n != 2 || !strings.Contains(f.log.String(), "not_logged_before=") {
			t.Errorf("logged %d times:\n%s", n, f.log.String())
		}
	})
}

func TestLookupDoesNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLookup(map[string]string{"alice": authorized(edKey(1))})
		began := time.Now()
		if _, _, err := f.ask("alice", edKey(1), home, false, time.Time{}); !errors.Is(err, ErrUndecided) || time.Since(began) != 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		time.Sleep(2 * time.Second)
		file, until, err := f.ask("alice", edKey(1), home, false, time.Time{})
		if err != nil || len(file.entries) != 1 || !until.Equal(began.Add(time.Second+time.Minute)) {
			t.Errorf("%v, until %v", err, until)
		}
	})
}

// TestLookupFails rechecks a login while queries fail, of a lookup
// that uses stale answers, and of one that does not.
func TestLookupFails(t *testing.T) {
	t.Parallel()
	for _, stale := range []time.Duration{0, 10 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeLookup(map[string]string{"alice": authorized(edKey(1))})
			f.staleTTL = stale
			if ok, err := f.has(t, "alice"); !ok {
				t.Fatal(err)
			}
			answered := time.Now()
			until := answered.Add(f.ttl)
			// recheck does the same as Recheck every few seconds.
			recheck := func() error {
				time.Sleep(2 * time.Second)
				if time.Now().Before(until) {
					return nil
				}
				_, next, err := f.ask("alice", edKey(1), home, false, until)
				if err == nil {
					until = next
				}
				return err
			}
			f.set(errors.New("down"), "alice", authorized(edKey(1)))
			for time.Since(answered) < f.loginGrace-2*time.Second {
				if err := recheck(); err != nil && !errors.Is(err, ErrUndecided) {
					t.Fatalf("stale %v: refused after %v: %v", stale, time.Since(answered), err)
				}
			}
			time.Sleep(4 * time.Second)
			for range 10 {
				if err := recheck(); err == nil || errors.Is(err, ErrUndecided) {
					t.Fatalf("stale %v: goes on after %v: %v", stale, time.Since(answered), err)
				}
			}
			// It answers again.
			f.set(nil, "alice", authorized(edKey(1)))
			time.Sleep(retryAfter)
			recheck()
			if err := recheck(); err != nil {
				t.Errorf("stale %v: up again, and refused: %v", stale, err)
			}
			time.Sleep(time.Minute) // for the queries in flight
		})
	}
}

// TestLookupOneAtATime has many ask for one user, by one key or by many.
func TestLookupOneAtATime(t *testing.T) {
	t.Parallel()
	for _, perKey := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeLookup(map[string]string{"alice": authorized(edKey(1))})
			f.perKey = perKey
			var wg sync.WaitGroup
			for i := range 12 {
				wg.Go(func() { f.ask("alice", edKey(byte(i%3)), home, true, time.Time{}) })
			}
			wg.Wait()
			want := 1
			if perKey {
				want = 3
			}
			if len(f.asked) != want || f.most.Load() != 1 {
				t.Errorf("per key %v: asked %d times, %d at once", perKey, len(f.asked), f.most.Load())
			}
		})
	}
}

// TestLookupKnownGoesFirst has clients offer as many unknown keys in alice's name as
// the limits permit, to a command that is asked about each key. She waits only for
// her own answer.
func TestLookupKnownGoesFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLookup(nil)
		f.perKey = true
		f.fetch = func(_ context.Context, user string, key ssh.PublicKey, _ answer) (answer, error) {
			f.most.Store(max(f.most.Load(), f.out.Add(1)))
			defer f.out.Add(-1)
			time.Sleep(time.Second)
			if bytes.Equal(key.Marshal(), edKey(1).Marshal()) {
				return newAnswer(user, []byte(authorized(edKey(1))), nil), nil
			}
			return newAnswer(user, nil, nil), nil
		}
		if ok, err := f.has(t, "alice"); !ok {
			t.Fatal(err)
		}
		over := make(chan struct{})
		var strangers sync.WaitGroup
		for i := range 100 {
			strangers.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-over:
						return
					default:
					}
					from := netip.AddrFrom4([4]byte{10, 0, byte(i), byte(n)})
					if _, _, err := f.ask("alice", edKey(byte(2+(i+n)%200)), from, true, time.Time{}); err != nil {
						time.Sleep(100 * time.Millisecond)
					}
				}
			})
		}
		for range 5 {
			time.Sleep(f.ttl + time.Second) // her answer counts no more
			began := time.Now()
			ok, err := f.has(t, "alice")
			if took := time.Since(began); !ok || took > time.Second {
				t.Errorf("alice got %v after %v: %v", ok, took, err)
			}
		}
		close(over)
		strangers.Wait()
		time.Sleep(2 * time.Second) // a query outlives its caller
		if most := f.most.Load(); most != 2 {
			t.Errorf("%d questions were out for one user, want 2", most)
		}
	})
}

// TestLookupStrangers floods: from one source, and from many.
func TestLookupStrangers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeLookup(map[string]string{"alice": authorized(edKey(1))})
		if ok, err := f.has(t, "alice"); !ok {
			t.Fatal(err)
		}
		f.ttl = time.Millisecond // every login asks

		flood := func(n int, source func(i int) netip.Addr) (refused int) {
			var wg sync.WaitGroup
			var count atomic.Int32
			for i := range n {
				wg.Go(func() {
					if _, _, err := f.ask(fmt.Sprint("user", i, "-", time.Now().Unix()), edKey(1), source(i), true, time.Time{}); err != nil {
						count.Add(1)
					}
				})
			}
			// A user with keys is not affected.
			if ok, err := f.has(t, "alice"); !ok {
				t.Errorf("alice is refused: %v", err)
			}
			wg.Wait()
			return int(count.Load())
		}
		before := len(f.asked)
		if refused := flood(1000, func(int) netip.Addr { return netip.MustParseAddr("2001:db8::1") }); refused < 900 {
			t.Errorf("of 1000 from one source only %d were refused", refused)
		}
		if n := len(f.asked) - before; n > sourceBurst+2 {
			t.Errorf("one source caused %d questions", n)
		}
		time.Sleep(time.Minute)
		before = len(f.asked)
		flood(5000, func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) })
		if n := len(f.asked) - before; n > totalBurst+2 {
			t.Errorf("all sources caused %d questions", n)
		}
		if most := f.most.Load(); most > maxUnknownInFlight+1 {
			t.Errorf("%d questions were out at once", most)
		}
		if len(f.lookup.entries) > maxCached || len(f.limiter.sources) > maxSources {
			t.Errorf("%d answers and %d sources are remembered", len(f.lookup.entries), len(f.limiter.sources))
		}
		if f.lookup.entries[query{user: "alice"}] == nil {
			t.Error("unknown users have evicted a user with keys")
		}
		// It passes.
		time.Sleep(time.Minute)
		if _, err := f.has(t, "zoe"); err != nil {
			t.Error(err)
		}
	})
}

// TestLookupFillsUp remembers more users with keys than there is room for.
func TestLookupFillsUp(t *testing.T) {
	t.Parallel()
	l := &lookup{}
	file := &keyFile{entries: map[string][]entry{"k": nil}}
	for i := range 3 * maxCached {
		l.store(query{user: fmt.Sprint(i)}, &cacheEntry{answer: answer{file: file}})
	}
	if len(l.entries) != maxCached {
		t.Errorf("%d answers are remembered", len(l.entries))
	}
}

func TestRateLimiter(t *testing.T) {
	t.Parallel()
	var p rateLimiter
	now := time.Unix(1e9, 0)
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::ffff:192.0.2.1")
	for i := range sourceBurst {
		if !p.allow(one, now) {
			t.Fatalf("refused after %d", i)
		}
	}
	if p.allow(one, now) || p.allow(two, now) {
		t.Error("more than the burst")
	}
	for i, want := range []bool{true, true, false} {
		if p.allow(one, now.Add(time.Second)) != want {
			t.Errorf("a second later, number %d is not %v", i+1, want)
		}
	}
	if p.allow(one, now) {
		t.Error("a clock that goes back gives something")
	}
	// No address is a source like any other.
	if !p.allow(netip.Addr{}, now) {
		t.Error("refused without an address")
	}
	for i := range maxSources + 100 {
		p.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if len(p.sources) > maxSources {
		t.Errorf("%d sources are remembered", len(p.sources))
	}
	if !p.allow(netip.MustParseAddr("203.0.113.1"), now.Add(time.Minute)) || len(p.sources) > 2 {
		t.Errorf("%d sources are still remembered", len(p.sources))
	}
}
