package gateway

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
)

// FuzzSession has a client send requests on a session, any it likes, and a
// bastion answer them as its state allows or, at its whim, refuse them. Whatever
// runs on a terminal is recorded, and each event is one line of JSON.
func FuzzSession(f *testing.F) {
	kinds := []string{
		"pty-req", "shell", "exec", "subsystem", "window-change", "env", "signal", "x11-req", // of a client
		"exit-status", "exit-signal", // of the bastion
	}
	const quiet, refused = 0x10, 0x20
	step := func(kind byte, payload any) []byte {
		p := ssh.Marshal(payload)
		return append([]byte{kind, byte(len(p))}, p...)
	}
	type size struct{ Columns, Rows, Width, Height uint32 }
	pty := func(flags byte) []byte { return step(flags, terminalRequest{"xterm", 80, 24, 0, 0, "\x00"}) }
	shell := []byte{1, 0}
	text := func(s string) any { return struct{ S string }{s} }
	join := func(steps ...[]byte) (all []byte) {
		for _, s := range steps {
			all = append(all, s...)
		}
		return all
	}
	f.Add(join(pty(0), shell))
	f.Add(join(pty(0), pty(0), shell))
	f.Add(join(pty(quiet), pty(0), shell))
	f.Add(join(pty(refused), pty(0), pty(quiet), shell))
	f.Add(join(pty(refused), shell))
	f.Add(join(pty(0), step(4, size{132, 50, 0, 0}), step(2, text("ls")), step(4, size{1 << 31, 0, 0, 0}), step(8, struct{ N uint32 }{3})))
	f.Add(join(step(3, text("sftp")), step(9, struct {
		Name string
		Core bool
		A, B string
	}{"KILL", false, "", ""})))
	f.Add([]byte{0, 3, 0, 0, 0, 1, 0})

	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, steps []byte) {
		s := &Server{Recordings: &record.Store{Dir: filepath.Join(dir, t.Name())}, Log: slog.New(slog.DiscardHandler)}
		defer os.RemoveAll(s.Recordings.Dir)
		c := &conn{Server: s, ref: "abcdefgh", log: s.Log, began: time.Now(), identity: identity.Identity{User: "alice", Profile: "default"}}
		w := &watcher{conn: c, mode: identity.RecordInput}
		ch, err := w.Open(relay.Opening{Kind: "session", FromClient: true})
		if err != nil {
			t.Fatal(err)
		}
		session := ch.(*sessionWatcher)
		tty, started := false, false // at the bastion
		for len(steps) >= 2 {
			kind, flags, n := kinds[int(steps[0]&0xf)%len(kinds)], steps[0], min(int(steps[1]), len(steps)-2)
			payload := steps[2 : 2+n]
			steps = steps[2+n:]
			fromClient := kind != "exit-status" && kind != "exit-signal"
			taps, err := session.Request(kind, fromClient, payload)
			if err != nil {
				t.Fatalf("%s: %v", kind, err)
			}
			if taps != nil {
				taps.ToClient(payload, false)
				taps.ToBastion(payload, false)
			}
			if !fromClient {
				continue
			}
			ok := flags&refused == 0
			switch kind {
			case "pty-req":
				var r terminalRequest
				ok = ok && !tty && !started && ssh.Unmarshal(payload, &r) == nil
				tty = tty || ok
			case "shell", "exec", "subsystem":
				ok = ok && !started
				started = started || ok
				if ok && tty && session.recording == nil {
					t.Fatal("a terminal, and no recording")
				}
			}
			if flags&quiet == 0 {
				session.Answered(kind, true, payload, ok)
			}
		}
		session.End(1, 2, false)
	})
}

// terminalRequest is what a bastion wants to see: RFC 4254, section 6.2.
type terminalRequest struct {
	Term                         string
	Columns, Rows, Width, Height uint32
	Modes                        string
}

// FuzzEvents has clients and bastions open channels and ask for things with any
// payload: an event comes of it that can be written.
func FuzzEvents(f *testing.F) {
	kinds := []string{
		"direct-tcpip", "forwarded-tcpip", "direct-streamlocal@openssh.com", "forwarded-streamlocal@openssh.com", "x11",
		"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "cancel-streamlocal-forward@openssh.com",
		"exec", "subsystem", "shell",
	}
	type hostPorts struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}
	f.Add(byte(0), ssh.Marshal(hostPorts{"db.internal", 5432, "::1", 1 << 31}), []byte{})
	f.Add(byte(1), ssh.Marshal(hostPorts{"a\nb", 0, "", 0}), []byte{})
	f.Add(byte(2), ssh.Marshal(struct {
		Path, Reserved string
		Zero           uint32
	}{"/run/x\x1b[0m", "", 0}), []byte{})
	f.Add(byte(4), ssh.Marshal(struct {
		Host string
		Port uint32
	}{"127.0.0.1", 6010}), []byte{})
	f.Add(byte(5), ssh.Marshal(struct {
		Host string
		Port uint32
	}{"", 0}), []byte{0, 0, 0x9c, 0x40})
	f.Add(byte(7), ssh.Marshal(struct{ Path string }{"/run/y"}), []byte{})
	f.Add(byte(9), ssh.Marshal(struct{ Command string }{"ls \xff"}), []byte{})
	f.Fuzz(func(t *testing.T, k byte, payload, reply []byte) {
		kind := kinds[int(k)%len(kinds)]
		events := []audit.Event{channelEvent(kind, payload), requestEvent(kind, payload)}
		if e, known := listenerEvent(kind, payload, reply); known {
			events = append(events, e)
		}
		var m hostPorts
		if kind == "direct-tcpip" && ssh.Unmarshal(payload, &m) == nil && events[0].Destination != hostPort(m.Host, m.Port) {
			t.Fatalf("destination %q, want %q", events[0].Destination, hostPort(m.Host, m.Port))
		}
		for _, e := range events {
			if _, err := json.Marshal(e); err != nil {
				t.Fatalf("%+v: %v", e, err)
			}
		}
	})
}
