package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// sshdPenalties are the defaults of sshd_config(5).
var sshdPenalties = Penalties{
	AuthFail: 5 * time.Second, NoAuth: time.Second, GraceExceeded: 10 * time.Second, Crash: 90 * time.Second,
	Max: 10 * time.Minute, Min: 15 * time.Second, MaxSources4: 65536, MaxSources6: 65536,
}

func TestNetBlockSize(t *testing.T) {
	for _, tt := range []struct {
		size       NetBlockSize
		addr, want string
	}{
		{NetBlockSize{}, "192.0.2.1", "192.0.2.1/32"},
		{NetBlockSize{}, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"},
		{NetBlockSize{}, "fe80::1%eth0", "fe80::/64"},
		{NetBlockSize{24, 48}, "192.0.2.1", "192.0.2.0/24"},
		{NetBlockSize{24, 48}, "2001:db8:1:2:3::4", "2001:db8:1::/48"},
		{NetBlockSize{0, 128}, "192.0.2.1", "0.0.0.0/0"},
		{NetBlockSize{0, 128}, "2001:db8::1", "2001:db8::1/128"},
	} {
		if got := tt.size.source(netip.MustParseAddr(tt.addr)); got.String() != tt.want {
			t.Errorf("%v: the source of %s is %s, want %s", tt.size, tt.addr, got, tt.want)
		}
	}
	if got := (NetBlockSize{}).source(netip.Addr{}); got.IsValid() {
		t.Errorf("the source of no address is %s", got)
	}
}

// TestPenalties follows one source: each step adds a penalty, waits, and checks whether the
// source is rejected.
func TestPenalties(t *testing.T) {
	type step struct {
		add     time.Duration
		wait    time.Duration
		refused bool // after the wait
	}
	const s = time.Second
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"below the minimum", []step{{5 * s, 0, false}, {5 * s, 0, false}, {4 * s, 0, false}}},
		{"up to the minimum", []step{{5 * s, 0, false}, {5 * s, 0, false}, {5 * s, 0, true}, {0, 14 * s, true}, {0, s, false}}},
		{"at once", []step{{90 * s, 89 * s, true}, {0, s, false}}},
		{"too slow to gather", []step{{5 * s, 5 * s, false}, {5 * s, 5 * s, false}, {5 * s, 5 * s, false}, {5 * s, 5 * s, false}}},
		{"it decays", []step{{10 * s, 6 * s, false}, {10 * s, 0, false}, {s, 0, true}, {0, 15 * s, false}}},
		{"in force until it is over, also below the minimum", []step{{15 * s, 14 * s, true}, {0, s, false}, {10 * s, 0, false}}},
		{"up to the maximum", []step{{500 * s, 0, true}, {500 * s, 599 * s, true}, {0, s, false}}},
		{"nothing for nothing", []step{{0, 0, false}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var p penalties
				source, other := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32")
				for i, step := range tt.steps {
					before := p.check(source, sshdPenalties)
					began := p.add(source, sshdPenalties, step.add, "x")
					after := p.check(source, sshdPenalties)
					if (before == nil && after != nil) != (began > 0) {
						t.Errorf("step %d: became active for %v; before %v, after %v", i, began, before, after)
					}
					time.Sleep(step.wait)
					if err := p.check(source, sshdPenalties); (err != nil) != step.refused {
						t.Errorf("step %d: %v", i, err)
					}
					if err := p.check(other, sshdPenalties); err != nil {
						t.Errorf("step %d: another source: %v", i, err)
					}
					if err := p.check(source, Penalties{}); err != nil {
						t.Errorf("step %d: without penalties: %v", i, err)
					}
				}
			})
		})
	}
}

func TestPenaltyOverflow(t *testing.T) {
	at := func(i int) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 32) }
	at6 := netip.MustParsePrefix("2001:db8::/64")
	t.Run("permissive", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var p penalties
			rules := sshdPenalties
			rules.MaxSources4 = 3
			p.add(at(1), rules, 20*time.Second, "x")
			p.add(at(2), rules, 60*time.Second, "x")
			p.add(at(3), rules, 40*time.Second, "x")
			p.add(at(1), rules, 60*time.Second, "x") // a known source; now at 80 s
			p.add(at(4), rules, 30*time.Second, "x") // replaces the third
			for i, refused := range []bool{1: true, 2: true, 3: false, 4: true} {
				if err := p.check(at(i), rules); (err != nil) != refused && i > 0 {
					t.Errorf("source %d: %v", i, err)
				}
			}
			p.add(at6, rules, 20*time.Second, "x")
			if p.check(at(4), rules) == nil || p.check(at6, rules) == nil {
				t.Error("a source of the other family counts")
			}
		})
	})
	t.Run("deny-all", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var p penalties
			rules := sshdPenalties
			rules.MaxSources4, rules.DenyAll4 = 2, true
			p.add(at(1), rules, time.Second, "x")
			if err := p.check(at(9), rules); err != nil {
				t.Errorf("with room: %v", err)
			}
			p.add(at(2), rules, 2*time.Second, "x") // counts although it is below Min
			p.add(at(3), rules, time.Hour, "x")     // is dropped
			if err := p.check(at(9), rules); !errors.Is(err, errPenaltiesFull) {
				t.Errorf("without room: %v", err)
			}
			if err := p.check(at6, rules); err != nil {
				t.Errorf("of the other family: %v", err)
			}
			time.Sleep(time.Second)
			if err := p.check(at(3), rules); err != nil {
				t.Errorf("with room again: %v", err)
			}
		})
	})
}

// TestPenaltiesAgainstModel compares random penalties with a simple model.
func TestPenaltiesAgainstModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type entry struct {
			until  time.Time
			active bool
		}
		seed := mathrand.Uint64()
		rnd := mathrand.New(mathrand.NewPCG(seed, 0))
		model := map[netip.Prefix]*entry{}
		var p penalties
		rules := sshdPenalties
		rules.MaxSources4 = 8
		for i := range 20_000 {
			time.Sleep(time.Duration(1 + rnd.IntN(int(3*time.Second))))
			now := time.Now()
			for k, e := range model {
				if !e.until.After(now) {
					delete(model, k)
				}
			}
			source := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rnd.IntN(12))}), 32)
			if refused := p.check(source, rules) != nil; refused != (model[source] != nil && model[source].active) {
				t.Fatalf("seed %d, step %d: refused is %v, of %+v", seed, i, refused, model[source])
			}
			d := time.Duration(1 + rnd.IntN(int(20*time.Second)))
			p.add(source, rules, d, "x")
			e := model[source]
			if e == nil {
				if len(model) == rules.MaxSources4 {
					var first netip.Prefix
					for k, e := range model {
						if !first.IsValid() || e.until.Before(model[first].until) {
							first = k
						}
					}
					delete(model, first)
				}
				e = &entry{until: now}
				model[source] = e
			}
			if e.until = e.until.Add(d); e.until.Sub(now) > rules.Max {
				e.until = now.Add(rules.Max)
			}
			e.active = e.active || e.until.Sub(now) >= rules.Min
			if len(p.v4.of) != len(model) || len(p.v4.queue) != len(model) {
				t.Fatalf("seed %d, step %d: %d and %d sources, want %d", seed, i, len(p.v4.of), len(p.v4.queue), len(model))
			}
		}
	})
}

// TestPenaltiesMemory: the memory for a million sources of each family is limited.
func TestPenaltiesMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	before := heapInUse()
	var p penalties
	for i := range uint32(1_000_000) {
		var four [4]byte
		binary.BigEndian.PutUint32(four[:], i)
		p.add(netip.PrefixFrom(netip.AddrFrom4(four), 32), sshdPenalties, time.Minute, "x")
		var six [16]byte
		copy(six[:], four[:])
		p.add(netip.PrefixFrom(netip.AddrFrom16(six), 64), sshdPenalties, time.Minute, "x")
	}
	after := heapInUse()
	if len(p.v4.of) != 65536 || len(p.v6.of) != 65536 {
		t.Errorf("%d and %d sources are kept", len(p.v4.of), len(p.v6.of))
	}
	t.Logf("%d bytes for each source", (after-before)/(2*65536))
	if after-before > 64<<20 {
		t.Errorf("the penalties use %d MiB", (after-before)>>20)
	}
	runtime.KeepAlive(&p)
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A stolenKey has a public key and signs with another key, or fails to sign if signer is
// nil.
type stolenKey struct {
	public ssh.PublicKey
	signer ssh.Signer
}

func (k stolenKey) PublicKey() ssh.PublicKey { return k.public }

func (k stolenKey) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	if k.signer == nil {
		return nil, errors.New("no private key")
	}
	return k.signer.Sign(rand, data)
}

// TestPenaltyReasons ends connections in all ways, and checks the penalty.
func TestPenaltyReasons(t *testing.T) {
	const from = "203.0.113.7"
	for _, tt := range []struct {
		name  string
		with  func(gw *testGateway)
		serve func(t *testing.T, gw *testGateway, nc net.Conn)
		want  time.Duration
	}{
		{"nothing sent", nil, func(_ *testing.T, _ *testGateway, nc net.Conn) { nc.Close() }, time.Second},
		{"garbage", nil, func(_ *testing.T, _ *testGateway, nc net.Conn) {
			io.WriteString(nc, "GET / HTTP/1.1\r\n\r\n")
			io.ReadAll(nc)
		}, time.Second},
		{"a header of the PROXY protocol", nil, func(_ *testing.T, _ *testGateway, nc net.Conn) {
			io.WriteString(nc, "PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n")
			io.ReadAll(nc)
		}, time.Second},
		{"no key offered", nil, func(_ *testing.T, _ *testGateway, nc net.Conn) { loginOn(nc, "alice") }, time.Second},
		{"a wrong key", nil, func(t *testing.T, _ *testGateway, nc net.Conn) { loginOn(nc, "alice", sshtest.NewKey(t)) }, 5 * time.Second},
		{"three wrong keys", nil, func(t *testing.T, _ *testGateway, nc net.Conn) {
			loginOn(nc, "alice", sshtest.NewKey(t), sshtest.NewKey(t), sshtest.NewKey(t))
		}, 5 * time.Second},
		{"her key, and a wrong signature", nil, func(t *testing.T, gw *testGateway, nc net.Conn) {
			loginOn(nc, "alice", stolenKey{gw.alice.PublicKey(), sshtest.NewKey(t)})
		}, 5 * time.Second},
		{"her key, and no signature", nil, func(t *testing.T, gw *testGateway, nc net.Conn) {
			loginOn(nc, "alice", stolenKey{gw.alice.PublicKey(), nil})
		}, 5 * time.Second},
		{"nobody", nil, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "mallory", gw.alice) }, 5 * time.Second},
		{"too slow", nil, func(_ *testing.T, _ *testGateway, nc net.Conn) { io.ReadAll(nc) }, 10 * time.Second},
		{"a wrong key and the right one", nil, func(t *testing.T, gw *testGateway, nc net.Conn) {
			c, err := loginOn(nc, "alice", sshtest.NewKey(t), gw.alice)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		}, 0},
		{"no bastion", func(gw *testGateway) { gw.fail = errors.New("broken") }, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, 0},
		{"keys cannot be read", func(gw *testGateway) {
			gw.srv.Authorize = func(string, ssh.PublicKey, netip.Addr, time.Time) (auth.Grant, error) {
				return auth.Grant{}, fmt.Errorf("reading: %w", auth.ErrUndecided)
			}
		}, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, time.Second},
		{"keys cannot be read any more", func(gw *testGateway) {
			var asked atomic.Int32
			before := gw.srv.Authorize
			gw.srv.Authorize = func(user string, key ssh.PublicKey, from netip.Addr, now time.Time) (auth.Grant, error) {
				if asked.Add(1) == 1 {
					return before(user, key, from, now)
				}
				return auth.Grant{}, fmt.Errorf("reading: %w", auth.ErrUndecided)
			}
		}, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, time.Second},
		{"whether a code is needed cannot be read", func(gw *testGateway) {
			gw.srv.SecondFactor = &auth.TOTP{Dir: "/nonexistent"}
		}, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, time.Second},
		{"a role for other addresses", func(gw *testGateway) {
			gw.srv.Roles = policy.Roles{{Name: "r", Users: []string{"*"}, From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Permit: policy.PermitAll()}}
		}, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, 0},
		{"no role", func(gw *testGateway) { gw.srv.Roles = policy.Roles{} }, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, 0},
		{"a panic", func(gw *testGateway) {
			gw.srv.Authorize = func(string, ssh.PublicKey, netip.Addr, time.Time) (auth.Grant, error) { panic("oh") }
		}, func(_ *testing.T, gw *testGateway, nc net.Conn) { loginOn(nc, "alice", gw.alice) }, 90 * time.Second},
		{"from an exempt network", func(gw *testGateway) {
			gw.srv.PerSourcePenaltyExemptList = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
		}, func(t *testing.T, _ *testGateway, nc net.Conn) { loginOn(nc, "alice", sshtest.NewKey(t)) }, 0},
		{"a balancer's own", func(gw *testGateway) {
			gw.srv.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
		}, func(_ *testing.T, _ *testGateway, nc net.Conn) {
			io.WriteString(nc, v2(proxyproto.LOCAL, far4, near4))
			nc.Close()
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newTestGateway(t)
				gw.srv.PerSourcePenalties = sshdPenalties
				gw.srv.LoginGraceTime = 30 * time.Second
				if tt.with != nil {
					tt.with(gw)
				}
				nc, served := gw.dialFrom(t.Context(), from)
				tt.serve(t, gw, nc)
				nc.Close()
				<-served
				var got time.Duration
				if p := gw.srv.penalties.v4.of[netip.MustParsePrefix(from+"/32")]; p != nil {
					got = time.Until(p.until)
				}
				if got != tt.want {
					t.Errorf("the penalty is %v, want %v; the log:\n%s", got, tt.want, gw.logged())
				}
			})
		})
	}
}

// TestPenaltyBehindBalancer: a client behind a load balancer has a penalty, and neither
// other clients nor the load balancer have.
func TestPenaltyBehindBalancer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newProxiedGateway(t)
		gw.srv.PerSourcePenalties = sshdPenalties
		try := func(source string, key ssh.Signer) error {
			nc, served := gw.dialFrom(t.Context(), balancer)
			fmt.Fprintf(nc, "PROXY TCP4 %s 198.51.100.1 5000 22\r\n", source)
			c, err := loginOn(nc, "alice", key)
			if err == nil {
				c.Close()
			}
			nc.Close()
			<-served
			return err
		}
		for range 3 {
			if err := try("203.0.113.1", sshtest.NewKey(t)); err == nil {
				t.Fatal("logged in with an unknown key")
			}
		}
		if err := try("203.0.113.1", gw.alice); err == nil || len(gw.dials) > 0 {
			t.Errorf("logged in from a source with a penalty; the log:\n%s", gw.logged())
		}
		if n := strings.Count(gw.logged(), "source has a penalty"); n != 1 {
			t.Errorf("%d lines about the penalty, want 1:\n%s", n, gw.logged())
		}
		if err := try("203.0.113.2", gw.alice); err != nil {
			t.Errorf("another source: %v", err)
		}
		time.Sleep(15 * time.Second)
		if err := try("203.0.113.1", gw.alice); err != nil {
			t.Errorf("after the penalty: %v", err)
		}
	})
}
