package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

func TestSplitUser(t *testing.T) {
	for _, tt := range []struct{ name, user, profile string }{
		{"alice", "alice", "default"},
		{"alice+prod", "alice", "prod"},
		{"alice+", "alice", ""},
		{"alice+a+b", "alice", "a+b"},
		{"+prod", "", "prod"},
		{"", "", "default"},
	} {
		if user, profile := splitUser(tt.name); user != tt.user || profile != tt.profile {
			t.Errorf("splitUser(%q) = %q, %q; want %q, %q", tt.name, user, profile, tt.user, tt.profile)
		}
	}
}

func TestLostMessage(t *testing.T) {
	gone := func(why error) error {
		return &bastion.GoneError{TaskID: "arn:aws:ecs:x", Why: fmt.Errorf("%w: container exited with 137", why)}
	}
	for _, tt := range []struct {
		why  error
		want string
	}{
		{nil, "Your bastion has gone, and this session with it. Connect again"},
		{gone(errors.New("exited with 1")), "Your bastion has gone, and this session with it. Connect again"},
		{gone(bastion.ErrMemory), "ran out of memory"},
		{gone(bastion.ErrInterrupted), "AWS has taken back the spare capacity"},
		{gone(bastion.ErrMaintenance), "maintenance of its host"},
		{gone(bastion.ErrStopped), "Your bastion was stopped"},
	} {
		got := lostMessage(tt.why, "ref12345")
		if !strings.Contains(got, tt.want) || strings.Contains(got, "137") || !strings.Contains(got, "ref12345") {
			t.Errorf("lostMessage(%v) = %q, want something with %q", tt.why, got, tt.want)
		}
	}
}

func TestUserMessage(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("x: %w", bastion.ErrTimeout), "did not start in time"},
		{fmt.Errorf("x: %w", bastion.ErrNoAnswer), "does not answer. Try again; if that does not help, stop it on your console"},
		{fmt.Errorf("x: %w: %w", bastion.ErrTimeout, bastion.ErrNoAnswer), "did not start in time"},
		{fmt.Errorf("x: %w", bastion.ErrLedger), "cannot find out whether you have a bastion, so it starts none"},
		{fmt.Errorf("x: %w", bastion.ErrNoAccount), "no account for you"},
		{fmt.Errorf("x: %w", bastion.ErrNoProfile), "No profile has this name"},
		{errTooManyConnections, "too many connections"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: time.Second}), "Try again in 1 second;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: 89*time.Second + 1}), "Try again in 90 seconds;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: 91 * time.Second}), "Try again in 2 minutes;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: time.Hour}), "Try again in 60 minutes;"},
		{errDraining, "going down for maintenance"},
		{errors.New("AccessDenied: arn:aws:iam::123456789012:role/x"), "could not be started"},
		{nil, "could not be started"},
	} {
		got := userMessage(tt.err, "ref12345")
		if !strings.Contains(got, tt.want) {
			t.Errorf("userMessage(%v) = %q, want something with %q", tt.err, got, tt.want)
		}
		if tt.err != nil && strings.Contains(got, tt.err.Error()) {
			t.Errorf("userMessage(%v) = %q, which has the error's text", tt.err, got)
		}
	}
}

// TestAlgorithms: OpenSSH clients are offered only AES-GCM, others also AES-CTR, and the
// configuration replaces both.
func TestAlgorithms(t *testing.T) {
	c := &conn{srv: &Server{}, cfg: &Settings{}}
	for client, want := range map[string][]string{
		"SSH-2.0-OpenSSH_9.2p1":      gcmCiphers,
		"SSH-2.0-PuTTY_Release_0.78": transport.DefaultCiphers,
		"SSH-2.0-Go":                 transport.DefaultCiphers,
	} {
		if got := c.transportConfig().CiphersFor(client); !slices.Equal(got, want) {
			t.Errorf("%s is offered %v", client, got)
		}
	}
	c.cfg.Ciphers = []string{ssh.CipherAES256CTR}
	if got := c.transportConfig().CiphersFor("SSH-2.0-OpenSSH_9.2p1"); !slices.Equal(got, c.cfg.Ciphers) {
		t.Errorf("configured %v, offered %v", c.cfg.Ciphers, got)
	}
}

func TestStartups(t *testing.T) {
	var s startups
	sourceOf := NetBlockSize{}.source
	max := Startups{Start: 4, Rate: 100, Full: 4}
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	admit := func(from netip.Addr) *startupSlot {
		t.Helper()
		a, err := s.take(sourceOf(from), max, 2)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a, b := admit(one), admit(one)
	if _, err := s.take(sourceOf(one), Startups{100, 0, 100}, 2); !errors.Is(err, errSourceStartups) {
		t.Errorf("third connection of one source: %v", err)
	}
	admit(two)
	c := admit(two)
	if _, err := s.take(sourceOf(netip.MustParseAddr("192.0.2.3")), max, 2); err == nil {
		t.Error("a fifth slot of four was taken")
	}
	c.release()
	c.release() // counts once
	if s.total != 3 {
		t.Errorf("%d are counted, want 3", s.total)
	}
	a.release()
	b.release()
	if _, ok := s.source[sourceOf(one)]; ok {
		t.Error("a source without connections is kept")
	}

	refused := 0
	s = startups{total: 5, source: map[netip.Prefix]int{sourceOf(one): 5}}
	for range 1000 {
		a, err := s.take(sourceOf(one), Startups{0, 50, 10}, 0)
		if err != nil {
			refused++
			continue
		}
		a.release()
	}
	if refused < 650 || refused > 850 { // 75 % half way
		t.Errorf("%d of 1000 refused half way from 50 %% to certainty", refused)
	}
}

func TestApplyList(t *testing.T) {
	byDefault := []string{"a", "b", "c1", "c2"}
	for _, tt := range []struct{ list, want string }{
		{"", "a b c1 c2"},
		{"x", "x"},
		{"b a", "b a"},
		{"+x y", "a b c1 c2 x y"},
		{"+b", "a c1 c2 b"},
		{"^x c1", "x c1 a b c2"},
		{"-b", "a c1 c2"},
		{"-c* x", "a b"},
		{"-*", "none"},
	} {
		if got := strings.Join(applyList(byDefault, strings.Fields(tt.list)), " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.list, got, tt.want)
		}
	}
	if want := "a b c1 c2"; strings.Join(byDefault, " ") != want {
		t.Errorf("the default is %q", byDefault)
	}
}
