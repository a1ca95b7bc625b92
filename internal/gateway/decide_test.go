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

func TestUserMessage(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("x: %w", bastion.ErrTimeout), "did not start in time"},
		{fmt.Errorf("x: %w", bastion.ErrNoAnswer), "does not answer at the moment. Please try again; if that does not help, end it on your console"},
		{fmt.Errorf("x: %w: %w", bastion.ErrTimeout, bastion.ErrNoAnswer), "did not start in time"},
		{fmt.Errorf("x: %w", bastion.ErrNoAccount), "no account for you"},
		{fmt.Errorf("x: %w", bastion.ErrNoProfile), "no bastion of that name"},
		{errTooManyConnections, "too many connections"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: time.Second}), "try again in 1 second;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: 89*time.Second + 1}), "try again in 90 seconds;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: 91 * time.Second}), "try again in 2 minutes;"},
		{fmt.Errorf("x: %w", &bastion.TooOftenError{Wait: time.Hour}), "try again in 60 minutes;"},
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

func TestAlgorithms(t *testing.T) {
	s := &Server{}
	for _, client := range []string{"SSH-2.0-OpenSSH_9.2p1", "SSH-2.0-PuTTY_Release_0.78", "SSH-2.0-Go"} {
		c := s.algorithms(client)
		// Package ssh deadlocks when its own side starts a rekey under load.
		if c.RekeyThreshold < 1<<50 {
			t.Errorf("%s: RekeyThreshold is %d", client, c.RekeyThreshold)
		}
		if ctr := slices.ContainsFunc(c.Ciphers, func(c string) bool { return strings.HasSuffix(c, "-ctr") }); ctr == strings.Contains(client, "OpenSSH") {
			t.Errorf("%s is offered %v", client, c.Ciphers)
		}
		insecure := ssh.InsecureAlgorithms()
		for _, list := range [][2][]string{{c.Ciphers, insecure.Ciphers}, {c.MACs, insecure.MACs}, {c.KeyExchanges, insecure.KeyExchanges}} {
			for _, name := range list[0] {
				if slices.Contains(list[1], name) || strings.Contains(name, "sha1") || strings.Contains(name, "chacha20") {
					t.Errorf("%s is offered %s", client, name)
				}
			}
		}
	}
	s.Ciphers = []string{ssh.CipherAES256CTR}
	if c := s.algorithms("SSH-2.0-OpenSSH_9.2p1"); !slices.Equal(c.Ciphers, s.Ciphers) {
		t.Errorf("configured %v, offered %v", s.Ciphers, c.Ciphers)
	}
}

func TestStartups(t *testing.T) {
	var s startups
	sourceOf := NetBlockSize{}.source
	max := Startups{Start: 4, Rate: 100, Full: 4}
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	admit := func(from netip.Addr) *admission {
		t.Helper()
		a, err := s.admit(sourceOf(from), max, 2)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a, b := admit(one), admit(one)
	if _, err := s.admit(sourceOf(one), Startups{100, 0, 100}, 2); !errors.Is(err, errSourceStartups) {
		t.Errorf("a third of one source: %v", err)
	}
	admit(two)
	c := admit(two)
	if _, err := s.admit(sourceOf(netip.MustParseAddr("192.0.2.3")), max, 2); err == nil {
		t.Error("a fifth was admitted, of four at most")
	}
	c.release()
	c.release() // counts once
	if s.total != 3 {
		t.Errorf("%d are counted, want 3", s.total)
	}
	a.release()
	b.release()
	if _, ok := s.source[sourceOf(one)]; ok {
		t.Error("a source without connections is remembered")
	}

	refused := 0
	s = startups{total: 5}
	for range 1000 {
		a, err := s.admit(sourceOf(one), Startups{0, 50, 10}, 0)
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
