package console

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// A testConsole is a gateway in memory with a console. The user root is an
// administrator, and any key is accepted. It implements Bastions.
type testConsole struct {
	t       testing.TB
	console *Console
	server  *gateway.Server
	key     ssh.Signer
	perms   identity.Permissions

	mu      sync.Mutex
	running []bastion.Status
	stopped []string // owner and reason
	stopErr error
	drained bool
	log     screen
	servers sync.WaitGroup
}

func newTestConsole(t testing.TB) *testConsole {
	tc := &testConsole{t: t, key: sshtest.NewKey(t), perms: identity.AllowAll()}
	log := slog.New(slog.NewTextHandler(&tc.log, nil))
	tc.server = &gateway.Server{
		Settings: gateway.Settings{Options: gateway.Options{HostKeys: []ssh.Signer{sshtest.NewKey(t)}}, Authorize: func(string, ssh.PublicKey, netip.Addr, time.Time) (auth.Grant, error) {
			return auth.Grant{Permissions: tc.perms}, nil
		}},
		Dial: tc.dial,
		Log:  log,
	}
	tc.console = &Console{
		Gateway: tc.server, Bastions: tc, Recent: &Recent{}, Log: log,
		Roles: func(id identity.Identity) ([]string, bool) {
			return []string{"of-" + id.User}, id.User == "root"
		},
		Drain: func() { tc.mu.Lock(); defer tc.mu.Unlock(); tc.drained = true },
	}
	tc.revokedIn(revoked.Folder(filepath.Join(t.TempDir(), "revoked")))
	tc.server.Drain, tc.server.Console = time.Minute, tc.console.Serve
	return tc
}

// revokedIn has revoked users stored there.
func (tc *testConsole) revokedIn(store revoked.Store) {
	list := &revoked.List{Store: store, Log: tc.console.Log}
	tc.console.Revoked, tc.server.Revoked = list, list.Check
}

// dial connects to a bastion in which every command runs for ever.
func (tc *testConsole) dial(_ context.Context, id identity.Identity, _ func(bool)) (*bastion.Conn, error) {
	near, far := sshtest.Pipe()
	tc.servers.Go(func() {
		cfg := &ssh.ServerConfig{NoClientAuth: true}
		cfg.AddHostKey(tc.key)
		conn, chans, reqs, err := ssh.NewServerConn(far, cfg)
		if err != nil {
			return
		}
		defer conn.Close()
		tc.servers.Go(func() { ssh.DiscardRequests(reqs) })
		for nc := range chans {
			if ch, reqs, err := nc.Accept(); err == nil {
				tc.servers.Go(func() {
					for req := range reqs {
						req.Reply(true, nil)
					}
					ch.Close()
				})
			}
		}
	})
	conn, err := sshtest.Connect(near, "bastion")
	if err != nil {
		return nil, err
	}
	owner := bastion.Owner{User: id.User, Profile: id.Profile}
	tc.mu.Lock()
	defer tc.mu.Unlock()
	if !slices.ContainsFunc(tc.running, func(s bastion.Status) bool { return s.Owner == owner }) {
		tc.running = append(tc.running, bastion.Status{
			Owner: owner, Idle: 15 * time.Minute, MaxLife: 12 * time.Hour,
			Entry: bastion.Entry{State: bastion.Running, Generation: 7, Since: time.Now(), Task: bastion.Task{ID: "task/of/" + id.User, Generation: 7}},
		})
	}
	return &bastion.Conn{Conn: conn, Owner: owner, Task: bastion.Task{ID: "task/of/" + id.User, Generation: 7}}, nil
}

func (tc *testConsole) Status(_ context.Context, user string) ([]bastion.Status, error) {
	tc.mu.Lock()
	defer tc.mu.Unlock()
	var all []bastion.Status
	for _, profile := range []string{"big", "default"} {
		s := bastion.Status{Owner: bastion.Owner{User: user, Profile: profile}}
		for _, r := range tc.running {
			if r.Owner == s.Owner {
				s = r
			}
		}
		all = append(all, s)
	}
	return all, nil
}

func (tc *testConsole) List(context.Context) ([]bastion.Status, error) {
	tc.mu.Lock()
	defer tc.mu.Unlock()
	return slices.Clone(tc.running), nil
}

func (tc *testConsole) Stop(_ context.Context, owner bastion.Owner, why string) (bastion.Entry, error) {
	tc.mu.Lock()
	defer tc.mu.Unlock()
	if tc.stopErr != nil {
		return bastion.Entry{}, tc.stopErr
	}
	tc.stopped = append(tc.stopped, owner.String()+" "+why)
	tc.running = slices.DeleteFunc(tc.running, func(s bastion.Status) bool { return s.Owner == owner })
	return bastion.Entry{}, nil
}

// connect logs in as the user, with the given client version.
func (tc *testConsole) connect(user, version string) *ssh.Client {
	tc.t.Helper()
	near, far := sshtest.Pipe()
	tc.servers.Go(func() { tc.server.ServeConn(tc.t.Context(), far) })
	conn, chans, reqs, err := ssh.NewClientConn(near, "gateway", &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(tc.key)}, ClientVersion: version, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		tc.t.Fatal(err)
	}
	time.Sleep(time.Second)
	return ssh.NewClient(conn, chans, reqs)
}

// run runs one command line in the user's console.
func (tc *testConsole) run(user, line string) (stdout, stderr string, status int) {
	tc.t.Helper()
	c := tc.connect(user+"+ctl", "SSH-2.0-test")
	defer c.Close()
	s, err := c.NewSession()
	if err != nil {
		tc.t.Fatal(err)
	}
	var out, errs strings.Builder
	s.Stdout, s.Stderr = &out, &errs
	err = s.Run(line)
	var exit *ssh.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.ExitStatus()
	case err != nil:
		tc.t.Fatalf("%s: %v", line, err)
	}
	return out.String(), errs.String(), status
}

// work starts a command in a bastion. The channel gets its standard error at its end.
func (tc *testConsole) work(user string) (*ssh.Client, <-chan string) {
	tc.t.Helper()
	c := tc.connect(user, "SSH-2.0-evil")
	s, err := c.NewSession()
	if err != nil {
		tc.t.Fatal(err)
	}
	stderr, _ := s.StderrPipe()
	if err := s.Start("printf '\x1b[2J'"); err != nil {
		tc.t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		text, _ := io.ReadAll(stderr)
		said <- string(text)
	}()
	return c, said
}

func bubble(t *testing.T, f func(t *testing.T, tc *testConsole)) {
	synctest.Test(t, func(t *testing.T) {
		tc := newTestConsole(t)
		f(t, tc)
		tc.servers.Wait()
	})
}

// TestCommands runs all commands, as users and as an administrator, while two users are
// connected to bastions.
func TestCommands(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		alice, _ := tc.work("alice")
		defer alice.Close()
		bob, _ := tc.work("bob+big")
		defer bob.Close()
		tests := []struct {
			user, line string
			status     int
			out, err   string // substrings
		}{
			{"alice", "status", 0, "default  running", ""},
			{"carol", "status", 0, "No bastion of yours is running", ""},
			{"carol", "status --json", 0, "[]\n", ""},
			{"alice", "status --json", 0, `[{"profile":"default","state":"running","since":"2000-01-01T00:00:00Z","generation":7,"task":"alice","idle_seconds":900,"max_life_seconds":43200,"connections":1}]`, ""},
			{"alice", "sessions", 0, "evil", ""},
			{"alice", "sessions", 0, "session: exec printf '?[2J'", ""},
			{"alice", "sessions", 0, "(this one)", ""},
			{"alice", "sessions --json", 0, `"client_version":"SSH-2.0-evil","profile":"default","console":false`, ""},
			{"alice", "sessions --json", 0, `"runs":"exec","command":"printf '\u001b[2J'"`, ""},
			{"alice", "whoami", 0, "roles                      of-alice", ""},
			{"root", "whoami", 0, "administrator", ""},
			{"root", "whoami --json", 0, `"roles":["of-root"],"admin":true,"pty":true`, ""},
			{"root", "whoami --json", 0, `"permit_open":[],"permit_listen":[],"shell":true,`, ""},
			{"alice", "help", 0, "stop your bastion", ""},
			{"alice", "help --json", 0, `{"command":"status","usage":"","help":"your bastions","admin":false}`, ""},
			{"root", "help", 0, "For administrators:", ""},
			{"root", "help", 0, "  bastions                  all running bastions\n", ""},
			{"root", "help", 0, "  stop USER[+PROFILE] [--yes]\n                            stop a user's bastion and end", ""},
			{"alice", "gateways", 1, "", "for administrators"},
			{"root", "gateways", 1, "", "shares its ledger with no other gateway"},
			{"alice", "log", 0, "TIME (UTC)", ""},
			{"alice", "log --json", 0, "[]\n", ""},
			{"alice", "", 2, "", "no command"},
			{"alice", "\x1b[31mx", 2, "", `no command "?[31mx"`},
			{"alice", "status -v", 2, "", `no option "-v"`},
			{"alice", "status --yes", 2, "", "no option"},
			{"alice", "log -n", 2, "", "needs a number"},
			{"alice", "log -n 0", 2, "", "needs a number from 1 on"},
			{"alice", "stop a b", 2, "", "no use for"},
			{"alice", "stop", 2, "", "--yes"},
			{"alice", "stop big --yes", 1, "", "No bastion of yours is running with the profile big."},
			{"alice", "stop bob --yes", 1, "", "No bastion of yours is running with the profile bob."},
			{"alice", "stop bob+big --yes", 1, "", "Only administrators"},
			{"alice", "bastions", 1, "", "for administrators"},
			{"alice", "users", 1, "", "for administrators"},
			{"alice", "kick bob --yes", 1, "", "for administrators"},
			{"alice", "drain --yes", 1, "", "for administrators"},
			{"root", "kick --yes", 2, "", "usage: kick USER|ID"},
			{"root", "kick carol --yes", 1, "", "no connection"},
			{"root", "kick alice", 2, "", "--yes"},
			{"root", "stop carol --yes", 1, "", "No bastion of carol is running."},
			{"root", "drain", 2, "", "--yes"},
			{"root", "bastions", 0, "bob    big      running", ""},
			{"root", "bastions --json", 0, `"user":"bob","profile":"big","state":"running"`, ""},
			{"root", "users", 0, "evil", ""},
			{"root", "users --json", 0, `[{"user":"alice","connections":[{"id":`, ""},
		}
		for _, tt := range tests {
			out, errs, status := tc.run(tt.user, tt.line)
			if status != tt.status || !strings.Contains(out, tt.out) || !strings.Contains(errs, tt.err) || (errs != "") != (status != 0) {
				t.Errorf("%s: %s: status %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q", tt.user, tt.line, status, tt.status, out, tt.out, errs, tt.err)
			}
			if strings.ContainsAny(out+errs, "\x1b\x07\r") {
				t.Errorf("%s: %s: control characters in %q", tt.user, tt.line, out+errs)
			}
			if strings.Contains(tt.line, "--json") && status == 0 && !json.Valid([]byte(out)) {
				t.Errorf("%s: not JSON: %s", tt.line, out)
			}
		}
		// Administrators do not see the commands of others.
		if out, _, _ := tc.run("root", "users --json"); strings.Contains(out, "printf") {
			t.Errorf("an administrator sees %s", out)
		}
		if tc.drained || len(tc.stopped) > 0 {
			t.Errorf("drained %v, stopped %v", tc.drained, tc.stopped)
		}
	})
}

// TestStop stops bastions with connections.
func TestStop(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		_, alice := tc.work("alice")
		_, bob := tc.work("bob+big")
		if out, errs, status := tc.run("alice", "stop --yes"); status != 0 || out != "Your bastion of profile default is stopped.\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if said := <-alice; !strings.Contains(said, "stopped from your console") {
			t.Errorf("alice's session read %q", said)
		}
		if out, errs, status := tc.run("root", "stop bob --yes --json"); status != 0 || out != `{"user":"bob","profile":"big","connections":1}`+"\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if said := <-bob; !strings.Contains(said, "stopped by an administrator") {
			t.Errorf("bob's session read %q", said)
		}
		if want := []string{"alice+default by alice on the console", "bob+big by root on the console"}; !slices.Equal(tc.stopped, want) {
			t.Errorf("stopped %q", tc.stopped)
		}

		one, _ := tc.work("carol")
		two, _ := tc.work("carol+big")
		defer one.Close()
		defer two.Close()
		if _, errs, status := tc.run("carol", "stop --yes"); status != 2 || !strings.Contains(errs, "big, default") {
			t.Errorf("with two bastions: status %d, %q", status, errs)
		}
		tc.stopErr = bastion.ErrStarting
		if _, errs, status := tc.run("carol", "stop big --yes"); status != 1 || !strings.Contains(errs, "Try again") {
			t.Errorf("while the bastion starts: status %d, %q", status, errs)
		}
		tc.stopErr = errors.New("arn:aws:ecs")
		if _, errs, status := tc.run("carol", "stop +default --yes"); status != 1 || strings.Contains(errs, "arn:") {
			t.Errorf("own profile with a plus: status %d, %q", status, errs)
		}
		_, errs, status := tc.run("carol", "stop default --yes")
		if status != 1 || strings.Contains(errs, "arn:") || !strings.Contains(errs, "Reference: ") || !strings.Contains(tc.log.String(), "arn:aws:ecs") {
			t.Errorf("status %d, %q\n%s", status, errs, tc.log.String())
		}
	})
}

func TestKick(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		_, first := tc.work("alice")
		_, second := tc.work("alice")
		bob, _ := tc.work("bob")
		defer bob.Close()
		id := tc.server.Connections()[1].ID()
		if out, errs, status := tc.run("root", "kick "+id+" --yes"); status != 0 || out != "1 connection ended.\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if said := <-second; !strings.Contains(said, "An administrator has ended this connection") {
			t.Errorf("the session read %q", said)
		}
		if out, errs, status := tc.run("root", "kick alice --yes --json"); status != 0 || !strings.HasPrefix(out, `{"ended":["`) {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		<-first
		// The connection of the command itself is left out.
		if _, errs, status := tc.run("root", "kick root --yes"); status != 1 {
			t.Errorf("status %d, %q", status, errs)
		}
		time.Sleep(time.Minute)
		if all := tc.server.Connections(); len(all) != 1 || all[0].Identity.User != "bob" {
			t.Errorf("remaining connections: %+v", all)
		}
	})
}

func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		alice, _ := tc.work("alice")
		defer alice.Close()
		if out, errs, status := tc.run("root", "drain --yes --json"); status != 0 || out != `{"connections":1,"drain_seconds":60}`+"\n" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
		if !tc.drained {
			t.Error("Drain was not called")
		}
	})
}

// terminal opens a prompt on a terminal.
func (tc *testConsole) terminal(c *ssh.Client) (s *ssh.Session, in io.WriteCloser, out func() string) {
	tc.t.Helper()
	s, err := c.NewSession()
	if err != nil {
		tc.t.Fatal(err)
	}
	in, _ = s.StdinPipe()
	shown := &screen{}
	s.Stdout = shown
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		tc.t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		tc.t.Fatal(err)
	}
	synctest.Wait()
	return s, in, shown.String
}

// A screen keeps its input.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// TestIdle: a prompt without input ends after the idle timeout, and input restarts it.
func TestIdle(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		c := tc.connect("alice+ctl", "SSH-2.0-test")
		s, in, shown := tc.terminal(c)
		for range 3 {
			time.Sleep(14 * time.Minute)
			io.WriteString(in, "whoami\r")
		}
		began := time.Now()
		s.Wait()
		if took := time.Since(began); took < 15*time.Minute || took > 15*time.Minute+2*time.Second || !strings.Contains(shown(), idleMessage) {
			t.Errorf("ended after %v; shown %q", took, shown())
		}
		if n := strings.Count(shown(), "user "); n != 3 {
			t.Errorf("answered %d times", n)
		}
		// So does a connection without sessions.
		c = tc.connect("alice+ctl", "SSH-2.0-test")
		began = time.Now()
		c.Wait()
		if took := time.Since(began); took > 15*time.Minute {
			t.Errorf("ended after %v", took)
		}
	})
}

func TestMaxSessions(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		tc.server.MaxSessions = 2
		c := tc.connect("alice+ctl", "SSH-2.0-test")
		defer c.Close()
		first, _, _ := tc.terminal(c)
		tc.terminal(c)
		var refused *ssh.OpenChannelError
		if _, err := c.NewSession(); !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
			t.Errorf("a third session: %v", err)
		}
		first.Close()
		synctest.Wait()
		s, _, _ := tc.terminal(c)
		s.Close()
	})
}

// TestRefusals: channels and requests that the console does not need are refused, with any
// payload, and the session works nevertheless.
func TestRefusals(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		c := tc.connect("alice+ctl", "SSH-2.0-test")
		defer c.Close()
		for _, kind := range []string{"direct-tcpip", "direct-streamlocal@openssh.com", "tun@openssh.com", "x11", "auth-agent@openssh.com"} {
			if _, _, err := c.OpenChannel(kind, nil); err == nil {
				t.Errorf("%s was opened", kind)
			}
		}
		for _, kind := range []string{"tcpip-forward", "streamlocal-forward@openssh.com", "no-such-thing"} {
			if ok, _, err := c.SendRequest(kind, true, nil); ok || err != nil {
				t.Errorf("%s: %v, %v", kind, ok, err)
			}
		}
		ch, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		exit := make(chan string, 1)
		go func() {
			for req := range reqs {
				if req.Type == "exit-status" {
					exit <- fmt.Sprint(req.Payload)
				}
			}
		}()
		size := ssh.Marshal(struct{ W, H, X, Y uint32 }{80, 24, 0, 0})
		for _, req := range []struct {
			kind    string
			payload []byte
		}{
			{"env", ssh.Marshal(struct{ K, V string }{"A", "B"})},
			{"subsystem", ssh.Marshal(struct{ Name string }{"sftp"})},
			{"auth-agent-req@openssh.com", nil},
			{"x11-req", nil},
			{"break", ssh.Marshal(struct{ N uint32 }{1})},
			{"signal", ssh.Marshal(struct{ Name string }{"KILL"})},
			{"exec", nil},
			{"exec", []byte{0, 0, 0, 9, 'x'}},
			{"pty-req", nil},
			{"pty-req", []byte{0xff, 0xff, 0xff, 0xfd, 0, 0, 0, 0}}, // its length and the four bytes before add up to one
			{"window-change", size},
			{"window-change", size},
			{"window-change", size},
		} {
			if ok, err := ch.SendRequest(req.kind, true, req.payload); ok || err != nil {
				t.Errorf("%s %x: %v, %v", req.kind, req.payload, ok, err)
			}
		}
		if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Line string }{"whoami"})); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if ok, _ := ch.SendRequest("shell", true, nil); ok {
			t.Error("a second command in one session")
		}
		if out, _ := io.ReadAll(ch); !strings.Contains(string(out), "alice") {
			t.Errorf("got %q", out)
		}
		if got := <-exit; got != "[0 0 0 0]" {
			t.Errorf("status %s", got)
		}
		if strings.Contains(tc.log.String(), "panic") {
			t.Error(tc.log.String())
		}
	})
}

// TestPanic: a panic ends only its own connection.
func TestPanic(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		tc.console.Roles = func(id identity.Identity) ([]string, bool) {
			if id.User == "alice" {
				panic("no roles today")
			}
			return nil, false
		}
		other := tc.connect("bob+ctl", "SSH-2.0-test")
		defer other.Close()
		c := tc.connect("alice+ctl", "SSH-2.0-test")
		s, err := c.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		var exit *ssh.ExitError
		if err := s.Run("whoami"); err == nil || errors.As(err, &exit) {
			t.Errorf("the command ended with %v", err)
		}
		c.Wait()
		if !strings.Contains(tc.log.String(), "no roles today") {
			t.Errorf("the log has only %s", tc.log.String())
		}
		if s, err = other.NewSession(); err != nil {
			t.Fatal(err)
		}
		if err := s.Run("whoami"); err != nil {
			t.Errorf("another user's console: %v", err)
		}
	})
}

// TestResize sends invalid terminal sizes during and after a session.
func TestResize(t *testing.T) {
	bubble(t, func(t *testing.T, tc *testConsole) {
		c := tc.connect("alice+ctl", "SSH-2.0-test")
		defer c.Close()
		s, in, shown := tc.terminal(c)
		io.WriteString(in, strings.Repeat("long line ", 50))
		for _, n := range []int{0, 1, 2, 1 << 30, 3, 80, 1<<31 - 1, 40} {
			for range 5 {
				s.WindowChange(n, n)
			}
		}
		synctest.Wait()
		io.WriteString(in, "\x03whoami\rexit\r")
		for range 20 {
			s.WindowChange(10, 10)
		}
		if err := s.Wait(); err != nil || !strings.Contains(shown(), "SHA256:") {
			t.Errorf("%v; shown %q", err, shown())
		}
	})
}
