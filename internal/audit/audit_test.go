package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
)

// TestMain is also the main function of the process that TestKill kills.
func TestMain(m *testing.M) {
	if path := os.Getenv("AUDIT_TEST_WRITE"); path != "" {
		l, err := Open(Config{File: path, FailClosed: true, Log: slog.New(slog.DiscardHandler)})
		for err == nil {
			err = l.Write(Event{Type: Exec, Conn: "victim", Command: strings.Repeat("x", 3*maxValue)})
			fmt.Println("written")
		}
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, cfg Config) *Log {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// lines returns the events of a file. Each line must be an event.
func lines(t *testing.T, path string) []Event {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > 0 && data[len(data)-1] != '\n' {
		t.Errorf("%s ends within a line", path)
	}
	var events []Event
	for line := range bytes.Lines(data) {
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v: %s", path, err, line)
		}
		events = append(events, e)
	}
	return events
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, Config{File: path, Gateway: "gw1"})
	status := uint32(7)
	channel := 0
	for _, e := range []Event{
		{Type: Exec, Conn: "abc", User: "alice", Channel: &channel, Command: "a < b && c"},
		{Type: SessionEnd, Conn: "abc", Channel: &channel, ExitStatus: &status, Totals: &Totals{FromClient: 1}},
	} {
		if err := l.Write(e); err != nil {
			t.Fatal(err)
		}
	}
	data, _ := os.ReadFile(path)
	got := strings.Split(string(data), "\n")
	for i, want := range []string{
		`"gateway":"gw1","event":"exec","conn":"abc","user":"alice","channel":0,"command":"a < b && c"}`,
		`"gateway":"gw1","event":"session-end","conn":"abc","channel":0,"exit_status":7,"bytes_from_client":1,"bytes_to_client":0,"seconds":0}`,
	} {
		if !strings.HasSuffix(got[i], want) || !strings.HasPrefix(got[i], fmt.Sprintf(`{"v":1,"seq":%d,"time":"2`, i+1)) {
			t.Errorf("line %d\n got %s\nwant %s", i+1, got[i], want)
		}
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
}

// TestNil calls the methods of a nil Log.
func TestNil(t *testing.T) {
	var l *Log
	l.OnFailure(func() {})
	l.Retry()
	if err := errors.Join(l.Write(Event{Type: End}), l.Reopen(), l.Close()); err != nil || l.Blocks() {
		t.Error(err)
	}
}

// TestReopen rotates the file repeatedly during concurrent writes. Each event must be
// in one of the files, whole, once and in order.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	l := open(t, Config{File: path, FailClosed: true})
	const writers, events, rotations = 8, 300, 40
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range events {
				if err := l.Write(Event{Type: Exec, Conn: fmt.Sprint(w), Generation: int64(i + 1), Command: strings.Repeat("x", 100*w)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range rotations {
		if err := os.Rename(path, filepath.Join(dir, fmt.Sprintf("audit.%03d", i))); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	writing.Wait()
	var all []Event
	for i := range rotations {
		all = append(all, lines(t, filepath.Join(dir, fmt.Sprintf("audit.%03d", i)))...)
	}
	all = append(all, lines(t, path)...)
	if len(all) != writers*events {
		t.Errorf("%d events, want %d", len(all), writers*events)
	}
	last := make(map[string]int64)
	for i, e := range all {
		if e.Seq != uint64(i+1) {
			t.Fatalf("event %d has seq %d", i+1, e.Seq)
		}
		if last[e.Conn]++; e.Generation != last[e.Conn] {
			t.Fatalf("writer %s: event %d comes after %d", e.Conn, e.Generation, last[e.Conn]-1)
		}
	}
}

// TestReopenFails: the old file stays in use.
func TestReopenFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "audit.log")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l := open(t, Config{File: path, FailClosed: true})
	l.Write(Event{Type: Connection})
	moved := filepath.Join(dir, "moved")
	if err := os.Rename(filepath.Dir(path), moved); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Reopen: %v", err)
	}
	if err := l.Write(Event{Type: End}); err != nil {
		t.Error(err)
	}
	if got := lines(t, filepath.Join(moved, "audit.log")); len(got) != 2 {
		t.Errorf("%d events in the old file", len(got))
	}
}

// TestTorn writes after a line without an end.
func TestTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(path, []byte("{\"v\":1}\n{\"v\":1,\"se"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := open(t, Config{File: path})
	l.Write(Event{Type: Connection})
	l.Write(Event{Type: End})
	data, _ := os.ReadFile(path)
	got := strings.Split(string(data), "\n")
	if len(got) != 5 || got[1] != `{"v":1,"se` || !strings.HasPrefix(got[2], `{"v":1,"seq":1,`) || !strings.HasPrefix(got[3], `{"v":1,"seq":2,`) {
		t.Errorf("%q", got)
	}
}

// TestKill kills a process during a write. All events whose Write has returned must be
// in the file, and the next process must begin a new line.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	total := 0
	for range 5 {
		victim := exec.Command(os.Args[0])
		victim.Env = append(os.Environ(), "AUDIT_TEST_WRITE="+path)
		out, err := victim.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		told := bufio.NewScanner(out)
		for range 50 {
			if !told.Scan() || told.Text() != "written" {
				t.Fatalf("the victim said %q", told.Text())
			}
			total++
		}
		victim.Process.Kill()
		for told.Scan() {
			total++
		}
		victim.Wait()
	}
	l := open(t, Config{File: path})
	l.Write(Event{Type: GatewayStarted})
	data, _ := os.ReadFile(path)
	whole, torn := 0, 0
	for line := range bytes.Lines(data) {
		if json.Valid(line) {
			whole++
		} else {
			torn++
		}
	}
	if whole < total+1 || torn > 5 {
		t.Errorf("%d lines, want at least %d; %d are torn, by 5 kills", whole, total+1, torn)
	}
}

// TestFullDisk fills a disk and frees space again. The next line must have the number
// of lost events.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a disk that can be filled needs root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	path, filler := filepath.Join(disk, "audit.log"), filepath.Join(disk, "filler")

	var said strings.Builder
	l := open(t, Config{File: path, FailClosed: true, Log: slog.New(slog.NewTextHandler(&said, nil))})
	var failures atomic.Int32
	l.OnFailure(func() { failures.Add(1) })
	written, lost := 0, 0
	for ; lost < 3; written++ {
		err := l.Write(Event{Type: Exec, Command: strings.Repeat("x", 1000)})
		if err == nil {
			continue
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		lost++
		written--
	}
	if got := lines(t, path); len(got) != written {
		t.Errorf("%d whole lines on the full disk, want %d", len(got), written)
	}
	if failures.Load() != 1 {
		t.Errorf("%d failures told of, want 1", failures.Load())
	}
	if n := strings.Count(said.String(), "CANNOT BE WRITTEN"); n != 1 {
		t.Errorf("the operator was told %d times within a minute:\n%s", n, said.String())
	}
	os.WriteFile(filler, nil, 0o600)
	if err := os.Truncate(path, 0); err != nil { // as logrotate's copytruncate does
		t.Fatal(err)
	}
	if err := l.Write(Event{Type: End}); err != nil {
		t.Fatal(err)
	}
	if got := lines(t, path); len(got) != 1 || got[0].Lost != 3 || got[0].Seq != uint64(written+1) {
		t.Errorf("after that: %+v", got)
	}
	if err := l.Write(Event{Type: End}); err != nil || lines(t, path)[1].Lost != 0 {
		t.Errorf("lost is told of twice (%v)", err)
	}
}

// TestRetry: a log that fails closed blocks logins until a retry succeeds. Retries are
// not counted as lost events, and write nothing while the log works.
func TestRetry(t *testing.T) {
	w := &shortWriter{}
	l := open(t, Config{Stdout: w, FailClosed: true})
	if l.Blocks() {
		t.Error("blocks before the first event")
	}
	if err := l.Write(Event{Type: Login}); err == nil || !l.Blocks() {
		t.Errorf("after a failed write (%v), it does not block", err)
	}
	for range 3 {
		l.Retry()
	}
	if !l.Blocks() {
		t.Error("a failed retry ends the failure")
	}
	w.room = 1000
	for range 3 {
		l.Retry()
	}
	if l.Blocks() {
		t.Error("a retry that succeeds does not end the failure")
	}
	var e Event
	if err := json.Unmarshal([]byte(w.String()), &e); err != nil || e.Type != LogResumed || e.Lost != 1 || e.Seq != 1 {
		t.Errorf("the log has %q (%v), want one event, with one lost", w.String(), err)
	}

	l = open(t, Config{Stdout: &shortWriter{}})
	if l.Write(Event{Type: Login}); l.Blocks() {
		t.Error("a log that does not fail closed blocks logins")
	}
}

// TestRetryStuck: while a write blocks, retries do not fill the queue.
func TestRetryStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipe := &stuckPipe{opened: make(chan struct{})}
		l := open(t, Config{Stdout: pipe, FailClosed: true})
		l.Write(Event{Type: Login})
		for range queueSize {
			l.Retry()
		}
		if len(l.queue) != 0 || !l.Blocks() {
			t.Errorf("%d events are queued, want none; blocks: %v", len(l.queue), l.Blocks())
		}
		close(pipe.opened)
		synctest.Wait()
		if l.Blocks() {
			t.Error("the queued event does not end the failure")
		}
	})
}

// TestContinue: a log that does not fail closed counts lost events.
func TestContinue(t *testing.T) {
	var said strings.Builder
	l := open(t, Config{File: "/dev/full", Log: slog.New(slog.NewTextHandler(&said, nil))})
	l.OnFailure(func() { t.Error("connections are ended") })
	for range 10 {
		if err := l.Write(Event{Type: Connection}); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(said.String(), "connections continue without it") {
		t.Errorf("the operator reads %q", said.String())
	}
}

// A stuckPipe blocks writes until it is opened.
type stuckPipe struct {
	opened chan struct{}
	got    strings.Builder
}

func (p *stuckPipe) Write(b []byte) (int, error) {
	<-p.opened
	return p.got.Write(b)
}

// TestStuck: no call blocks for longer than writeTimeout, the queue is limited, and
// queued events are written when the sink recovers.
func TestStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pipe := &stuckPipe{opened: make(chan struct{})}
		l := open(t, Config{Stdout: pipe, FailClosed: true})
		var failures atomic.Int32
		l.OnFailure(func() { failures.Add(1) })
		began := time.Now()
		if err := l.Write(Event{Type: Connection}); !errors.Is(err, ErrStuck) || time.Since(began) != writeTimeout {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		began = time.Now()
		for range queueSize + 100 {
			if err := l.Write(Event{Type: Connection}); !errors.Is(err, ErrStuck) {
				t.Errorf("%v", err)
			}
		}
		if time.Since(began) != 0 {
			t.Errorf("those after the first wait for %v", time.Since(began))
		}
		if failures.Load() != 1 {
			t.Errorf("%d failures", failures.Load())
		}
		if got, want := l.Stats(), (Stats{Queued: queueSize, Lost: 100, Failing: true, Free: -1}); got != want {
			t.Errorf("stats are %+v, want %+v", got, want)
		}
		close(pipe.opened)
		synctest.Wait()
		if err := l.Write(Event{Type: End}); err != nil {
			t.Error(err)
		}
		lost := uint64(0)
		events := 0
		for line := range strings.Lines(pipe.got.String()) {
			var e Event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			events++
			lost += e.Lost
		}
		if got, want := l.Stats(), (Stats{Written: queueSize + 2, Lost: 100, Free: -1}); got != want {
			t.Errorf("stats at the end are %+v, want %+v", got, want)
		}
		if events != queueSize+2 || lost != 100 {
			t.Errorf("%d events and %d lost, want %d and 100", events, lost, queueSize+2)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestNotAFile refuses paths that are no files.
func TestNotAFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, dir, filepath.Join(dir, "no", "such")} {
		if l, err := Open(Config{File: path, Log: slog.New(slog.DiscardHandler)}); err == nil {
			l.Close()
			t.Errorf("%s can be opened", path)
		}
	}
}

// TestStream begins a new line after a partial write.
func TestStream(t *testing.T) {
	w := &shortWriter{room: 5}
	s := &stream{w: w}
	if err := s.write([]byte("0123456789\n")); err == nil {
		t.Fatal("no error")
	}
	w.room = 1000
	s.write([]byte("abc\n"))
	s.write([]byte("def\n"))
	if got := w.String(); got != "01234\nabc\ndef\n" {
		t.Errorf("%q", got)
	}
}

type shortWriter struct {
	strings.Builder
	room int
}

func (w *shortWriter) Write(p []byte) (int, error) {
	if len(p) > w.room {
		n, _ := w.Builder.Write(p[:w.room])
		return n, io.ErrShortWrite
	}
	return w.Builder.Write(p)
}

// TestSyslog sends to a daemon, and to its successor.
func TestSyslog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "log")
	listen := func() *net.UnixConn {
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	read := func(c *net.UnixConn) string {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 1<<16)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	if _, err := Open(Config{Syslog: syslog.LOG_AUTHPRIV, Socket: socket}); err == nil {
		t.Error("a daemon that is not there can be reached")
	}
	first := listen()
	l := open(t, Config{Syslog: syslog.LOG_AUTHPRIV, Socket: socket, FailClosed: true})
	if err := l.Write(Event{Type: Connection, Conn: "abc"}); err != nil {
		t.Fatal(err)
	}
	// authpriv is 10, info is 6: 10 * 8 + 6 (RFC 3164 section 4.1.1).
	if got := read(first); !strings.HasPrefix(got, "<86>") || !strings.Contains(got, `"event":"connection","conn":"abc"}`) {
		t.Errorf("%q", got)
	}
	first.Close()
	os.Remove(socket)
	if err := l.Write(Event{Type: Exec}); err == nil {
		t.Error("it goes on without a daemon")
	}
	second := listen()
	if err := l.Write(Event{Type: End}); err != nil {
		t.Fatal(err)
	}
	if got := read(second); !strings.Contains(got, `"lost":1,"event":"end"`) {
		t.Errorf("%q", got)
	}
}

// FuzzLine: any values from clients make one line of JSON, printable and short enough
// for syslog. Short values are unchanged.
func FuzzLine(f *testing.F) {
	f.Add("alice", "ls", "db:5432", 3)
	f.Add("a\nb", "\x1b[2J\u009b31m\u202e", "\xff\xfe", 100)
	f.Add("\u2028", strings.Repeat("\x00", 5000), "\U000e0001", 0)
	f.Add(`"`, strings.Repeat("é", 5000), `\`, 40)
	f.Fuzz(func(t *testing.T, user, command, destination string, principals int) {
		e := Event{
			Type: Exec, User: user, Command: command, Destination: destination, Reason: command, Rule: command, Origin: user,
			Listener: destination, ClientVersion: command, PTY: &PTY{Term: command},
			Certificate: &Certificate{ID: command, Principals: make([]string, max(0, min(principals, 10_000)))},
		}
		for i := range e.Certificate.Principals {
			e.Certificate.Principals[i] = destination
		}
		line, err := e.line()
		if err != nil {
			t.Fatal(err)
		}
		if len(line) > maxLine || bytes.IndexByte(line, '\n') != len(line)-1 || !utf8.Valid(line) {
			t.Fatalf("%d bytes: %q", len(line), line)
		}
		for _, r := range string(line[:len(line)-1]) {
			if !unicode.IsPrint(r) {
				t.Fatalf("%U in %q", r, line)
			}
		}
		var back Event
		if err := json.Unmarshal(line, &back); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if want := strings.ToValidUTF8(user, "\ufffd"); len(user) < 50 && utf8.ValidString(user) && back.User != want {
			t.Errorf("user %q has become %q", user, back.User)
		}
	})
}

func TestClip(t *testing.T) {
	for _, tt := range []struct {
		in    string
		limit int
		want  string
	}{
		{"abc", 3, "abc"},
		{"abcd", 3, "abc... (1 bytes more)"},
		{"aé", 2, "a... (2 bytes more)"},
		{"€€", 5, "€... (3 bytes more)"},
		{"\x80\x80\x80\x80\x80\x80", 5, "\x80\x80... (4 bytes more)"},
		{"x", 0, "... (1 bytes more)"},
	} {
		if got := clip(tt.in, tt.limit); got != tt.want {
			t.Errorf("clip(%q, %d) = %q, want %q", tt.in, tt.limit, got, tt.want)
		}
	}
}
