package api

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/console"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A testAPI is an API in memory, of a gateway with real files of keys. It implements
// Bastions and console.Bastions: each user has the profiles big and default.
type testAPI struct {
	t       testing.TB
	server  *Server
	gateway *gateway.Server
	ln      *addressedListener
	dir     string // with keys.d
	keys    *auth.Keys
	alice   ssh.Signer
	root    ssh.Signer // an administrator, if there are roles
	events  func() []audit.Event

	boot time.Duration // of a start
	fail error         // its result

	mu      sync.Mutex
	log     strings.Builder
	dials   []identity.Identity
	running map[bastion.Owner]bastion.Entry
	stopped []bastion.Owner
}

// newTestAPI makes an API for alice and root. Change may change it before it serves.
func newTestAPI(t testing.TB, change func(*testAPI)) *testAPI {
	t.Helper()
	ta := &testAPI{t: t, dir: t.TempDir(), alice: sshtest.NewKey(t), root: sshtest.NewKey(t), running: map[bastion.Owner]bastion.Entry{}}
	ta.ln = &addressedListener{Listener: sshtest.NewListener(), remote: "192.0.2.1"}
	if err := os.MkdirAll(filepath.Join(ta.dir, "keys.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	ta.authorize("alice", "", ta.alice.PublicKey())
	ta.authorize("root", "", ta.root.PublicKey())
	ta.keys = &auth.Keys{Dir: filepath.Join(ta.dir, "keys.d")}
	log := slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		ta.mu.Lock()
		defer ta.mu.Unlock()
		return ta.log.Write(p)
	}), nil))

	path := filepath.Join(ta.dir, "audit.log")
	recent := &console.Recent{}
	events, err := audit.Open(audit.Config{File: path, FailClosed: true, Observe: recent.Add, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ta.gateway = &gateway.Server{
		Settings: gateway.Settings{
			Options: gateway.Options{MaxConnectionsPerUser: 5},
			Recheck: ta.keys.Recheck,
		},
		Audit: events, Log: log,
	}
	ta.gateway.Authorize = ta.keys.Authorize
	users := &console.Console{
		Gateway: ta.gateway, Bastions: ta, Recent: recent, Log: log,
		Roles: func(id identity.Identity) ([]string, bool) { return id.Permissions.Roles, id.Permissions.Admin },
	}
	ta.gateway.Console = users.Serve
	ta.server = &Server{
		Settings: Settings{Options: Options{Names: []string{"gateway.example"}, SSHAddress: ":2222"}, HostKeys: []ssh.PublicKey{ta.root.PublicKey()}},
		NewCall:  ta.gateway.NewCall, Console: users, Bastions: ta, Log: log,
	}
	if change != nil {
		change(ta)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 2)
	go func() { served <- ta.server.Serve(ctx, ta.ln) }()
	go func() { served <- ta.gateway.Serve(ctx, sshtest.NewListener()) }() // for rechecks
	end := sync.OnceFunc(func() {
		cancel()
		for range 2 {
			if err := <-served; err != nil {
				t.Error(err)
			}
		}
		events.Close()
	})
	t.Cleanup(end)
	ta.events = func() []audit.Event {
		t.Helper()
		end()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var all []audit.Event
		for line := range strings.Lines(string(data)) {
			var e audit.Event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			all = append(all, e)
		}
		return all
	}
	return ta
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// authorize adds a line to the user's authorized keys.
func (ta *testAPI) authorize(user, options string, key ssh.PublicKey) {
	ta.t.Helper()
	path := filepath.Join(ta.dir, "keys.d", user)
	old, _ := os.ReadFile(path)
	if err := os.WriteFile(path, []byte(string(old)+options+" "+string(ssh.MarshalAuthorizedKey(key))), 0o600); err != nil {
		ta.t.Fatal(err)
	}
}

// Dial implements Bastions.
func (ta *testAPI) Dial(ctx context.Context, id identity.Identity, _ func(bool)) (*bastion.Conn, error) {
	ta.mu.Lock()
	ta.dials = append(ta.dials, id)
	boot, fail := ta.boot, ta.fail
	ta.mu.Unlock()
	owner := bastion.Owner{User: id.User, Profile: id.Profile}
	if id.Profile != "default" && id.Profile != "big" {
		return nil, bastion.ErrNoProfile
	}
	select {
	case <-time.After(boot):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if fail != nil {
		return nil, fail
	}
	ta.mu.Lock()
	defer ta.mu.Unlock()
	if ta.running[owner].State == bastion.Idle {
		ta.running[owner] = bastion.Entry{State: bastion.Running, Generation: 1, Since: time.Now(), Task: bastion.Task{ID: "arn:aws:ecs:eu-central-1:123:task/of/" + id.User}}
	}
	near, far := sshtest.Pipe()
	go acceptLogin(far)
	conn, err := sshtest.Connect(near, "bastion")
	if err != nil {
		return nil, err
	}
	return &bastion.Conn{Conn: conn}, nil
}

var bastionKey = sync.OnceValue(func() ssh.Signer {
	t := &testing.T{}
	return sshtest.NewKey(t)
})

func acceptLogin(nc net.Conn) {
	cfg := &ssh.ServerConfig{NoClientAuth: true}
	cfg.AddHostKey(bastionKey())
	if conn, _, reqs, err := ssh.NewServerConn(nc, cfg); err == nil {
		ssh.DiscardRequests(reqs)
		conn.Close()
	}
}

// Status implements Bastions.
func (ta *testAPI) Status(_ context.Context, user string) (all []bastion.Status, err error) {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	for _, profile := range []string{"big", "default"} {
		owner := bastion.Owner{User: user, Profile: profile}
		all = append(all, bastion.Status{Owner: owner, Entry: ta.running[owner], Idle: 15 * time.Minute, MaxLife: 12 * time.Hour})
	}
	return all, nil
}

// List implements Bastions.
func (ta *testAPI) List(context.Context) (all []bastion.Status, err error) {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	for owner, entry := range ta.running {
		all = append(all, bastion.Status{Owner: owner, Entry: entry})
	}
	slices.SortFunc(all, func(a, b bastion.Status) int { return strings.Compare(a.Owner.String(), b.Owner.String()) })
	return all, nil
}

// Stop implements console.Bastions.
func (ta *testAPI) Stop(_ context.Context, owner bastion.Owner, _ string) (bastion.Entry, error) {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	entry, ok := ta.running[owner]
	switch {
	case !ok:
		return bastion.Entry{}, bastion.ErrGone
	case entry.State == bastion.Starting:
		return bastion.Entry{}, bastion.ErrStarting
	}
	delete(ta.running, owner)
	ta.stopped = append(ta.stopped, owner)
	return entry, nil
}

// UsualStart implements Bastions.
func (ta *testAPI) UsualStart(string) time.Duration { return 40 * time.Second }

func (ta *testAPI) logged() string {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	return ta.log.String()
}

// An addressedListener gives the connections the address of a client.
type addressedListener struct {
	*sshtest.Listener
	mu     sync.Mutex
	remote string
}

func (l *addressedListener) from(remote string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.remote = remote
}

func (l *addressedListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return addressed{nc, &net.TCPAddr{IP: net.ParseIP(l.remote), Port: 4711}}, nil
}

type addressed struct {
	net.Conn
	remote *net.TCPAddr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }

// An answer is the answer to a request.
type answer struct {
	status int
	header http.Header
	body   string
}

// code is the code of a problem.
func (a answer) code() string {
	var p problemJSON
	json.Unmarshal([]byte(a.body), &p)
	return p.Code
}

// detail is the sentence of a problem.
func (a answer) detail() string {
	var p problemJSON
	json.Unmarshal([]byte(a.body), &p)
	return p.Detail
}

func (a answer) String() string { return fmt.Sprintf("%d %s", a.status, a.body) }

// exchange sends a request and reads the answer.
func (ta *testAPI) exchange(req *http.Request) answer {
	ta.t.Helper()
	nc, err := ta.ln.Dial()
	if err != nil {
		ta.t.Fatal(err)
	}
	defer nc.Close()
	if err := req.Write(nc); err != nil {
		ta.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(nc), req)
	if err != nil {
		return answer{body: err.Error()}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		ta.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

// A call is a request to sign and send.
type call struct {
	Statement
	header http.Header
	body   io.Reader
	// forge changes the signed request before it is sent.
	forge func(*http.Request)
}

func newCall(method, target string) *call {
	return &call{
		Statement: Statement{Method: method, Host: "gateway.example", Target: target, User: "alice", Time: time.Now(), Nonce: nonce()},
		header:    http.Header{},
	}
}

var nonceCount struct {
	sync.Mutex
	n int
}

func nonce() string {
	nonceCount.Lock()
	defer nonceCount.Unlock()
	nonceCount.n++
	return fmt.Sprintf("nonce-%020d", nonceCount.n)
}

// request returns the signed request.
func (c *call) request(t testing.TB, key ssh.Signer) *http.Request {
	t.Helper()
	req, err := http.NewRequest(c.Method, "http://"+c.Host+c.Target, c.body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = c.header.Clone()
	req.Header.Set("User-Agent", "test/1")
	if key != nil {
		authorization, err := Sign(c.Statement, key)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", authorization)
	}
	if c.forge != nil {
		c.forge(req)
	}
	return req
}

func (ta *testAPI) send(c *call, key ssh.Signer) answer {
	ta.t.Helper()
	return ta.exchange(c.request(ta.t, key))
}

// do sends a request of alice's.
func (ta *testAPI) do(method, target string) answer {
	ta.t.Helper()
	return ta.send(newCall(method, target), ta.alice)
}

// as sends a request of another user's.
func (ta *testAPI) as(user string, key ssh.Signer, method, target string) answer {
	ta.t.Helper()
	c := newCall(method, target)
	c.User = user
	return ta.send(c, key)
}
