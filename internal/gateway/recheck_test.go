package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// TestRecheck ends logins that are no longer permitted, and only these.
func TestRecheck(t *testing.T) {
	gone := errors.New("alice:1 is gone")
	unknown := fmt.Errorf("the folder cannot be read: %w", auth.ErrUndecided)
	expired := fmt.Errorf("the key %w", auth.ErrExpired)
	tests := []struct {
		name    string
		answers []error // to the questions, one after the other; the last for good
		ends    time.Duration
		says    string
	}{
		{name: "good", answers: []error{nil}},
		{name: "gone", answers: []error{nil, gone}, ends: 8 * time.Second, says: "The key you logged in with may not be used any more, so this connection ends."},
		{name: "gone for a moment", answers: []error{gone, gone, nil, gone, gone, nil}},
		{name: "not known", answers: []error{nil, unknown}},
		{name: "not known for a moment", answers: []error{gone, unknown, gone, unknown, gone}, ends: 10 * time.Second, says: "may not be used any more"},
		{name: "expired", answers: []error{nil, nil, expired}, ends: 6 * time.Second, says: "The key or certificate you logged in with has expired"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				asked := 0
				w.srv.Recheck = func(user string, key ssh.PublicKey, _ netip.Addr, _ time.Time, g auth.Grant) (auth.Grant, error) {
					if user == "bob" {
						return g, nil
					}
					if user != "alice" || string(key.Marshal()) != string(w.alice.PublicKey().Marshal()) {
						t.Errorf("asked about %s", user)
					}
					err := tt.answers[min(asked, len(tt.answers)-1)]
					asked++
					return g, err
				}
				ctx, cancel := context.WithCancel(t.Context())
				var loop sync.WaitGroup
				loop.Go(func() { w.srv.recheckLogins(ctx) })
				defer loop.Wait()
				defer cancel()

				began := time.Now()
				c, err := w.connect(t.Context(), "alice", w.alice)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				bob, err := w.connect(t.Context(), "bob", w.bob)
				if err != nil {
					t.Fatal(err)
				}
				defer bob.Close()
				told := startShell(t, c)
				quiet := startShell(t, bob)

				ended := make(chan time.Duration, 1)
				go func() { c.Wait(); ended <- time.Since(began) }()
				time.Sleep(time.Minute)
				synctest.Wait()
				select {
				case after := <-ended:
					if tt.ends == 0 || after < tt.ends || after > tt.ends+time.Second {
						t.Errorf("it ended after %v, want %v", after, tt.ends)
					}
				default:
					if tt.ends != 0 {
						t.Error("it goes on")
					}
				}
				if got := told(); !strings.Contains(got, tt.says) || tt.says == "" && got != "" {
					t.Errorf("told %q, want %q", got, tt.says)
				}
				if out, err := bob.run("who"); err != nil || out != "I am bob" || quiet() != "" {
					t.Errorf("bob's login: %q, %v, told %q", out, err, quiet())
				}
				cause := tt.answers[len(tt.answers)-1]
				w.mu.Lock()
				defer w.mu.Unlock()
				if logged := strings.Contains(w.log.String(), "login is no longer permitted"); logged != (tt.ends != 0) || logged && !strings.Contains(w.log.String(), cause.Error()) {
					t.Errorf("logged\n%s", w.log.String())
				}
			})
		})
	}
}

// startShell opens a session with a terminal, and returns what is on it.
func startShell(t *testing.T, c *client) (told func() string) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var text strings.Builder
	w := writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return text.Write(p)
	})
	s.Stdout, s.Stderr = io.Writer(w), io.Writer(w)
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return text.String()
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
