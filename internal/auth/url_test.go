package auth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestExpandURL(t *testing.T) {
	t.Parallel()
	tests := []struct{ template, user, want, wantErr string }{
		{"https://github.com/%u.keys", "alice", "https://github.com/alice.keys", ""},
		{"https://github.com/%u.keys", "a/../b?c#d%", "https://github.com/a%2F..%2Fb%3Fc%23d%25.keys", ""},
		{"https://x.test/keys?user=%u&v=1", "a&b=c", "https://x.test/keys?user=a%26b%3Dc&v=1", ""},
		{"https://x.test/%u/%u", "al", "https://x.test/al/al", ""},
		{"http://127.0.0.1:80/%u", "al", "http://127.0.0.1:80/al", ""},
		{"http://[::1]/%u", "al", "http://[::1]/al", ""},
		{"http://localhost/%u", "al", "http://localhost/al", ""},
		{"http://x.test/%u", "al", "", "does not begin with https"},
		{"http://127.0.0.1.x.test/%u", "al", "", "does not begin with https"},
		{"ftp://x.test/%u", "al", "", "does not begin with https"},
		{"https://%u.x.test/%u", "al", "", "in no other part"},
		{"https://x.test/", "al", "", "must be in the path"},
		{"https:///%u", "al", "", "no host"},
		{"https://me:secret@x.test/%u", "al", "", "has a password"},
		{"%u", "al", "", "must be in the path"},
	}
	for _, tt := range tests {
		u, err := expandURL(tt.template, tt.user)
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: error %v, want %q", tt.template, err, tt.wantErr)
			}
		} else if err != nil || u.String() != tt.want {
			t.Errorf("%s: %v, %v, want %s", tt.template, u, err, tt.want)
		}
	}
}

func TestURL(t *testing.T) {
	t.Parallel()
	var asked, unchanged atomic.Int32
	impatient, giveUp := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		switch r.URL.Path {
		case "/alice.keys", "/stranger.keys":
			w.Header().Set("ETag", `"v1"`)
			if r.Header.Get("If-None-Match") == `"v1"` {
				unchanged.Add(1)
				w.WriteHeader(http.StatusNotModified)
				return
			}
			fmt.Fprintln(w, authorized(edKey(1)))
		case "/more.keys":
			fmt.Fprintln(w, `cert-authority `+authorized(edKey(9)))
			fmt.Fprintln(w, `environment="A=b" `+authorized(edKey(1)))
			fmt.Fprintln(w, `restrict,command="x",from="192.0.2.0/24" `+authorized(edKey(2)))
		case "/page.keys":
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprintln(w, authorized(edKey(1)))
		case "/big.keys":
			fmt.Fprintln(w, authorized(edKey(1)))
			io.WriteString(w, strings.Repeat("#\n", maxFile))
		case "/broken.keys":
			http.Error(w, authorized(edKey(1)), http.StatusInternalServerError)
		case "/slow.keys":
			fmt.Fprintln(w, authorized(edKey(1)))
			w.(http.Flusher).Flush()
			giveUp()
			<-r.Context().Done()
		case "/moved.keys":
			http.Redirect(w, r, "/alice.keys", http.StatusFound)
		case "/loop.keys":
			http.Redirect(w, r, "/loop.keys", http.StatusFound)
		case "/away.keys":
			http.Redirect(w, r, "http://localhost:1/alice.keys", http.StatusFound)
		case "/down.keys":
			http.Redirect(w, r, "http://x.test/alice.keys", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	}))
	defer srv.Close()
	// All users but stranger have a file.
	dir := keysDir(t)
	for _, user := range []string{"alice", "moved", "nobody", "page", "big", "broken", "loop", "away", "down", "more"} {
		replace(t, filepath.Join(dir, user), "")
	}
	k := &Keys{Dir: dir, URL: srv.URL + "/%u.keys?token=hunter2"}
	tests := []struct{ user, wantErr string }{
		{"alice", ""},
		{"moved", ""},
		{"nobody", "no line of nobody's authorized keys has this key"},
		{"page", "is a web page"},
		{"big", "longer than 131072 bytes"},
		{"broken", "500 Internal Server Error"},
		{"loop", "redirected more than three times"},
		{"away", "redirected to another host without https"},
		{"down", "redirected: the URL does not begin with https"},
	}
	for _, tt := range tests {
		g, err := k.Authorize(tt.user, edKey(1), home, today)
		if tt.wantErr == "" {
			if err != nil || g.Source != "authorized_keys_url" || g.Line != "authorized_keys_url "+tt.user+":1" {
				t.Errorf("%s: %+v, %v", tt.user, g, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.wantErr) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: error %v, want %q", tt.user, err, tt.wantErr)
		}
		if errors.Is(err, ErrUndecided) != (tt.user != "nobody") {
			t.Errorf("%s: %v is undecided, or is not", tt.user, err)
		}
	}

	// Half an answer is none.
	if got, err := newFetcher(k.URL).fetch(impatient, "slow", nil, answer{}); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("of a server that is too slow: %+v, %v", got, err)
	}

	// It may restrict keys, but hands out no more than these.
	for _, key := range []ssh.PublicKey{edKey(1), sign(t, func(c *ssh.Certificate) { c.ValidPrincipals = []string{"more"} })} {
		if g, err := k.Authorize("more", key, home, today); err == nil || errors.Is(err, ErrUndecided) {
			t.Errorf("granted: %+v, %v", g, err)
		}
	}
	if g, err := k.Authorize("more", edKey(2), home, today); err != nil || g.ForceCommand != "x" || g.PTY {
		t.Errorf("a key with restrictions: %+v, %v", g, err)
	}

	// Keys at the server do not make a user.
	before := asked.Load()
	if _, err := k.Authorize("stranger", edKey(1), home, today); err == nil || asked.Load() != before {
		t.Errorf("a user without a file: %v", err)
	}
	// Without a file she is not a user any more.
	g, err := k.Authorize("alice", edKey(1), home, today)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(dir, "alice"))
	if _, err := k.Recheck("alice", edKey(1), home, today, g); err == nil || errors.Is(err, ErrUndecided) {
		t.Errorf("without a file: %v", err)
	}

	// An answer that has not changed is not sent again.
	before = asked.Load()
	f := newFetcher(srv.URL + "/%u.keys")
	first, err := f.fetch(t.Context(), "alice", nil, answer{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := f.fetch(t.Context(), "alice", nil, first)
	if err != nil || second.file != first.file || unchanged.Load() != 1 || asked.Load() != before+2 {
		t.Errorf("%v, %d unchanged", err, unchanged.Load())
	}
	srv.Close()
	if _, err := f.fetch(t.Context(), "alice", nil, first); err == nil || strings.Contains(err.Error(), "alice.keys") {
		t.Errorf("error %v", err)
	}
}

// TestURLByTLS wants the server's certificate to be checked, and a redirect to
// another host to be followed by https only.
func TestURLByTLS(t *testing.T) {
	t.Parallel()
	other := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, authorized(edKey(1))) }))
	defer other.Close()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusMovedPermanently)
	}))
	defer srv.Close()
	other.Config.ErrorLog, srv.Config.ErrorLog = nil, nil
	f := newFetcher(srv.URL + "/%u")
	if _, err := f.fetch(context.Background(), "alice", nil, answer{}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a server with an untrusted certificate: %v", err)
	}
	f.client.Transport = srv.Client().Transport
	if got, err := f.fetch(context.Background(), "alice", nil, answer{}); err != nil || len(got.file.entries) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRedirects(t *testing.T) {
	t.Parallel()
	via := func(s string) []*http.Request {
		u, _ := url.Parse(s)
		return []*http.Request{{URL: u}}
	}
	tests := []struct {
		from, to string
		ok       bool
	}{
		{"https://a.test/x", "https://a.test/y", true},
		{"https://a.test/x", "https://b.test/y", true},
		{"https://a.test/x", "http://a.test/y", false},
		{"https://a.test/x", "http://127.0.0.1/y", false},
		{"http://127.0.0.1:1/x", "http://127.0.0.1:1/y", true},
		{"http://127.0.0.1:1/x", "http://127.0.0.1:2/y", false},
		{"http://127.0.0.1:1/x", "https://b.test/y", true},
		{"https://a.test/x", "https://u:p@a.test/y", false},
	}
	for _, tt := range tests {
		u, err := url.Parse(tt.to)
		if err != nil {
			t.Fatal(err)
		}
		if err := checkRedirect(&http.Request{URL: u}, via(tt.from)); (err == nil) != tt.ok {
			t.Errorf("%s to %s: %v", tt.from, tt.to, err)
		}
	}
}

// FuzzExpandURL wants no name of a user to change anything but the place it is for.
func FuzzExpandURL(f *testing.F) {
	f.Add("https://github.com/%u.keys", "alice")
	f.Add("https://x.test/keys?a=b&u=%u#%u", "a&b=../c?d#e%41")
	f.Add("http://[::1]:80/%u?%u", "\x00\xff")
	f.Fuzz(func(t *testing.T, template, user string) {
		u, err := expandURL(template, user)
		if err != nil {
			return
		}
		plain, err := expandURL(template, "x")
		if err != nil {
			t.Fatalf("fine for %q, but not for x: %v", user, err)
		}
		if u.Scheme != plain.Scheme || u.Host != plain.Host || u.User != nil || strings.Count(u.EscapedPath(), "/") != strings.Count(plain.EscapedPath(), "/") ||
			strings.Count(u.RawQuery, "&") != strings.Count(plain.RawQuery, "&") || u.Fragment != "" {
			t.Fatalf("%q for %q is %s, for x %s", template, user, u, plain)
		}
	})
}
