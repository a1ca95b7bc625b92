package gateway

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/record"
	"github.com/sallyport-ssh/sallyport/internal/relay"
)

// sftp returns a packet (draft-ietf-secsh-filexfer-02, section 3).
func sftp(typ byte, body any) []byte {
	p := append([]byte{typ}, ssh.Marshal(body)...)
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(p))), p...)
}

type (
	sftpVersion struct{ Version uint32 }
	sftpOpen    struct {
		ID    uint32
		Path  string
		Flags uint32
		Attrs uint32
	}
	sftpString struct {
		ID     uint32
		String string
	}
	sftpStatus struct {
		ID, Code uint32
		Text     string
		Lang     string
	}
)

// openSession returns the watcher of a session of alice, and its taps.
func openSession(t *testing.T, gw *testGateway, mode identity.Record) (*sessionWatcher, *relay.Taps) {
	c := &conn{srv: gw.srv, cfg: gw.srv.settings(), ref: "abcdefgh", log: slog.New(slog.DiscardHandler), began: time.Now(), identity: identity.Identity{User: "alice", Profile: "default"}}
	c.quota.user.Store(gw.srv.budgets.get("alice", c.cfg.LogPerUser))
	ch, err := (&watcher{conn: c, mode: mode}).Open(relay.Opening{Kind: "session", FromClient: true})
	if err != nil {
		t.Fatal(err)
	}
	return ch.(*sessionWatcher), ch.Taps()
}

// upload passes the packets of an upload of an empty file.
func upload(taps *relay.Taps, path string) error {
	for _, step := range []struct {
		tap relay.Tap
		p   []byte
	}{
		{taps.ToBastion, sftp(3, sftpOpen{1, path, 0x1a, 0})},
		{taps.ToClient, sftp(102, sftpString{1, "h"})},
		{taps.ToBastion, sftp(4, sftpString{2, "h"})},
		{taps.ToClient, sftp(101, sftpStatus{2, 0, "", ""})},
	} {
		if err := step.tap(step.p, false); err != nil {
			return err
		}
	}
	return nil
}

var (
	sftpSubsystem = ssh.Marshal(struct{ Name string }{"sftp"})
	sftpInit      = sftp(1, sftpVersion{3})
	sftpHello     = sftp(2, sftpVersion{3})
)

// TestTransfersEarly: the client's first packet may be relayed before the request that
// starts the subsystem. After a refused subsystem, the client may request a command.
func TestTransfersEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		for _, refused := range []bool{false, true} {
			s, taps := openSession(t, gw, identity.RecordTransfers)
			kind, payload := "subsystem", sftpSubsystem
			if refused {
				if err := s.Request(kind, true, payload); err != nil {
					t.Fatal(err)
				}
				s.Answered(kind, true, payload, false)
				kind, payload = "exec", ssh.Marshal(struct{ Line string }{"test -x /usr/lib/sftp-server && exec /usr/lib/sftp-server"})
			}
			if err := taps.ToBastion(sftpInit, false); err != nil {
				t.Fatal(err)
			}
			if err := s.Request(kind, true, payload); err != nil {
				t.Fatal(err)
			}
			s.Answered(kind, true, payload, true)
			if err := taps.ToClient(sftpHello, false); err != nil {
				t.Fatal(err)
			}
			if err := upload(taps, "f"); err != nil {
				t.Fatal(err)
			}
			s.End(1, 2, false)
		}
		n := 0
		for _, e := range events() {
			if e.Type == audit.Transfer && e.Path == "f" && e.Direction == "upload" && e.Reason == "" {
				n++
			}
			if e.Incomplete != "" {
				t.Errorf("%+v", e)
			}
		}
		if n != 2 {
			t.Errorf("%d transfers in the audit log, want 2", n)
		}
	})
}

// TestTransfersLost: a session whose transfers cannot be followed goes on, or ends if its
// role requires the audit of transfers.
func TestTransfersLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		for _, mode := range []identity.Record{identity.RecordNone, identity.RecordTransfers, identity.RecordExec} {
			s, taps := openSession(t, gw, mode)
			if err := s.Request("subsystem", true, sftpSubsystem); err != nil {
				t.Fatal(err)
			}
			err := taps.ToBastion([]byte("GET / HTTP/1.0\r\n"), false)
			if ends := mode != identity.RecordNone; (err != nil) != ends || ends && !strings.Contains(err.Error(), "cannot be logged") {
				t.Errorf("%d: %v", mode, err)
			}
			s.End(1, 2, false)
		}
		n := 0
		for _, e := range events() {
			if e.Type == audit.SessionEnd && strings.HasPrefix(e.Incomplete, "file transfers cannot be followed: ") {
				n++
			}
		}
		if n != 3 {
			t.Errorf("%d session-end events are incomplete, want 3", n)
		}
	})
}

// TestTransfersTooEarly: too much data before the request makes a session incomplete only if
// its input is followed or recorded.
func TestTransfersTooEarly(t *testing.T) {
	for _, tt := range []struct {
		kind, text string
		mode       identity.Record
		ends       bool
		incomplete string
	}{
		{"exec", "cat", identity.RecordNone, false, ""},
		{"exec", "cat", identity.RecordExec, false, ""},
		{"exec", "cat", identity.RecordExec | identity.RecordInput, false, tooEarly},
		{"subsystem", "sftp", identity.RecordNone, false, "file transfers cannot be followed: " + tooEarly},
		{"subsystem", "sftp", identity.RecordTransfers, true, "file transfers cannot be followed: " + tooEarly},
	} {
		gw := newTestGateway(t)
		gw.srv.Recordings = &record.Store{Dir: t.TempDir()}
		events := gw.auditTo(t)
		s, taps := openSession(t, gw, tt.mode)
		for range 10 {
			if err := taps.ToBastion(make([]byte, 32<<10), false); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Request(tt.kind, true, ssh.Marshal(struct{ Text string }{tt.text})); (err != nil) != tt.ends {
			t.Errorf("%+v: %v", tt, err)
		}
		s.End(1, 2, false)
		all := events()
		if got := all[len(all)-1].Incomplete; got != tt.incomplete {
			t.Errorf("%+v: incomplete: %q", tt, got)
		}
	}
}

// TestTransfersMany: very many transfers are throttled, and the session does not end.
func TestTransfersMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newTestGateway(t)
		events := gw.auditTo(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 1 << 20, Per: time.Hour}
		s, taps := openSession(t, gw, identity.RecordNone)
		if err := s.Request("subsystem", true, sftpSubsystem); err != nil {
			t.Fatal(err)
		}
		taps.ToBastion(sftpInit, false)
		taps.ToClient(sftpHello, false)
		const files = 1000
		began := time.Now()
		for i := range files {
			if err := upload(taps, fmt.Sprint("file-", i)); err != nil {
				t.Fatalf("file %d: %v", i, err)
			}
			if i == 400 && time.Since(began) > 0 {
				t.Error("throttled from the beginning")
			}
		}
		if time.Since(began) < time.Minute/4 {
			t.Errorf("%d files in %v", files, time.Since(began))
		}
		s.End(1, 2, false)
		if _, n := times(events(), audit.Transfer); n != files {
			t.Errorf("%d transfers in the audit log", n)
		}
	})
}
