package transfer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

type parser interface {
	FromClient([]byte) error
	FromServer([]byte) error
	End() error
}

// text formats an event for comparisons.
func text(e Event) string {
	op := map[bool]string{true: "upload", false: "download"}[e.Upload]
	if e.Kind == Change {
		op = e.Op
	}
	s := op + " " + e.Path
	if e.Base != "" {
		s += " in " + e.Base
	}
	if e.To != "" {
		s += " to " + e.To
	}
	if e.Kind == Transfer {
		s += fmt.Sprintf(" %d@%d", e.Bytes, e.Offset)
	}
	if e.Failure != "" {
		s += ": " + e.Failure
	}
	return s
}

// A step is data from the client ('c') or the server ('s').
type step struct {
	from byte
	p    []byte
}

// follow passes steps to a parser in pieces of n bytes. It returns the events except those
// of kind Opened.
func follow(make func(report func(Event) error) parser, steps []step, n int) (events []string, err error) {
	f := make(func(e Event) error {
		if e.Kind != Opened {
			events = append(events, text(e))
		}
		return nil
	})
	for _, s := range steps {
		for p := s.p; len(p) > 0 && err == nil; {
			k := min(n, len(p))
			if s.from == 'c' {
				err = f.FromClient(p[:k])
			} else {
				err = f.FromServer(p[:k])
			}
			p = p[k:]
		}
	}
	if endErr := f.End(); err == nil {
		err = endErr
	}
	return events, err
}

func str(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
func u32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// packet makes an SFTP packet.
func packet(typ byte, parts ...[]byte) []byte {
	body := append([]byte{typ}, bytes.Join(parts, nil)...)
	return append(u32(uint32(len(body))), body...)
}

func status(id, code uint32) []byte {
	return packet(fxpStatus, u32(id), u32(code), str("x"), str("en"))
}

var noAttrs = u32(0)

// sftpBegin is the start of every session.
var sftpBegin = []step{
	{'c', packet(fxpInit, u32(3))},
	{'s', packet(fxpVersion, u32(3), str("posix-rename@openssh.com"), str("1"))},
}

var sftpTests = []struct {
	name  string
	steps []step
	want  []string
	lost  string
}{
	{"an upload in parallel requests", []step{
		{'c', packet(fxpOpen, u32(1), str("/a b"), u32(0x1a), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpWrite, u32(2), str("h"), u64(0), str(strings.Repeat("x", 100_000)))},
		{'c', packet(fxpWrite, u32(3), str("h"), u64(100_000), str("yy"))},
		{'s', append(status(3, 0), status(2, 0)...)},
		{'c', packet(fxpFsetstat, u32(4), str("h"), u32(4), u32(0o100644))},
		{'c', packet(fxpClose, u32(5), str("h"))},
		{'s', append(status(4, 0), status(5, 0)...)},
	}, []string{"mode /a b to 0644", "upload /a b 100002@0"}, ""},
	{"a download that is resumed", []step{
		{'c', packet(fxpOpen, u32(1), str("f"), u32(1), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("\x00\x00\x00\x01"))},
		{'c', packet(fxpRead, u32(2), str("\x00\x00\x00\x01"), u64(1<<40), u32(32768))},
		{'s', packet(fxpData, u32(2), str("0123456789"))},
		{'c', packet(fxpRead, u32(3), str("\x00\x00\x00\x01"), u64(1<<40+10), u32(32768))},
		{'s', status(3, 1)},
		{'c', packet(fxpClose, u32(4), str("\x00\x00\x00\x01"))},
		{'s', status(4, 0)},
	}, []string{"download f 10@1099511627776"}, ""},
	{"an empty file, and one without permission", []step{
		{'c', packet(fxpOpen, u32(1), str("e"), u32(0x1a), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpClose, u32(2), str("h"))},
		{'s', status(2, 0)},
		{'c', packet(fxpOpen, u32(3), str("/etc/shadow"), u32(1), noAttrs)},
		{'s', status(3, 3)},
	}, []string{"upload e 0@0", "download /etc/shadow 0@0: permission denied"}, ""},
	{"a full disk", []step{
		{'c', packet(fxpOpen, u32(1), str("e"), u32(2), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpWrite, u32(2), str("h"), u64(0), str("12345"))},
		{'s', status(2, 0)},
		{'c', packet(fxpWrite, u32(3), str("h"), u64(5), str("12345"))},
		{'s', status(3, 4)},
		{'c', packet(fxpClose, u32(4), str("h"))},
		{'s', status(4, 0)},
	}, []string{"upload e 5@0: failure"}, ""},
	{"both directions", []step{
		{'c', packet(fxpOpen, u32(1), str("e"), u32(3), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpWrite, u32(2), str("h"), u64(7), str("12345"))},
		{'s', status(2, 0)},
		{'c', packet(fxpRead, u32(2), str("h"), u64(3), u32(4))},
		{'s', packet(fxpData, u32(2), str("1234"))},
		{'c', packet(fxpClose, u32(4), str("h"))},
		{'s', status(4, 0)},
	}, []string{"download e 4@3", "upload e 5@7"}, ""},
	{"the connection breaks off", []step{
		{'c', packet(fxpOpen, u32(1), str("e"), u32(2), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpWrite, u32(2), str("h"), u64(0), str("12345"))},
		{'s', status(2, 0)},
		{'c', packet(fxpWrite, u32(3), str("h"), u64(5), str("12345"))[:30]},
	}, []string{"upload e 5@0: not finished"}, ""},
	{"names", []step{
		{'c', packet(fxpRename, u32(1), str("a"), str("b"))},
		{'s', status(1, 0)},
		{'c', packet(fxpExtended, u32(1), str("posix-rename@openssh.com"), str("c"), str("d"))},
		{'s', status(1, 0)},
		{'c', packet(fxpExtended, u32(1), str("hardlink@openssh.com"), str("old"), str("new"))},
		{'s', status(1, 0)},
		{'c', packet(fxpSymlink, u32(1), str("target"), str("link"))},
		{'s', status(1, 0)},
		{'c', packet(fxpRemove, u32(1), str("x"))},
		{'s', status(1, 2)},
		{'c', packet(fxpMkdir, u32(1), str("m"), noAttrs)},
		{'s', status(1, 0)},
		{'c', packet(fxpRmdir, u32(1), str("m"))},
		{'s', status(1, 0)},
		{'c', packet(fxpSetstat, u32(1), str("s"), u32(0x8000000f), u64(3), u32(0), u32(1000), u32(0o104755), u32(1), u32(2))},
		{'s', status(1, 0)},
		{'c', packet(fxpExtended, u32(1), str("lsetstat@openssh.com"), str("l"), u32(2), u32(1), u32(2))},
		{'s', status(1, 0)},
		{'c', packet(17, u32(1), str("/looked at"))},
		{'s', packet(105, u32(1), noAttrs)},
		{'c', packet(fxpExtended, u32(1), str("limits@openssh.com"))},
		{'s', packet(201, u32(1), u64(1), u64(2), u64(3), u64(4))},
	}, []string{"rename a to b", "rename c to d", "link new to old", "symlink link to target", "remove x: no such file", "mkdir m", "rmdir m",
		"truncate s to 3", "owner s to 0:1000", "mode s to 4755", "owner l to 1:2"}, ""},
	{"a copy at the server", []step{
		{'c', packet(fxpOpen, u32(1), str("a"), u32(1), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("1"))},
		{'c', packet(fxpOpen, u32(1), str("b"), u32(2), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("2"))},
		{'c', packet(fxpExtended, u32(1), str("copy-data"), str("1"), u64(0), u64(0), str("2"), u64(0))},
		{'s', status(1, 0)},
		{'c', packet(fxpClose, u32(1), str("1"))},
		{'s', status(1, 0)},
		{'c', packet(fxpClose, u32(1), str("2"))},
		{'s', status(1, 0)},
	}, []string{"copy a to b", "download a 0@0", "upload b 0@0"}, ""},
	{"listing a directory", []step{
		{'c', packet(fxpOpendir, u32(1), str("/"))},
		{'s', packet(fxpHandle, u32(1), str("1"))},
		{'c', packet(12, u32(1), str("1"))},
		{'s', packet(104, u32(1), u32(1), str(strings.Repeat("n", 50_000)))},
		{'c', packet(fxpClose, u32(1), str("1"))},
		{'s', status(1, 0)},
	}, nil, ""},
	{"a handle that is closed, or never was one", []step{
		{'c', packet(fxpOpen, u32(1), str("e"), u32(2), noAttrs)},
		{'s', packet(fxpHandle, u32(1), str("h"))},
		{'c', packet(fxpClose, u32(1), str("h"))},
		{'c', packet(fxpWrite, u32(2), str("h"), u64(0), str("12345"))},
		{'c', packet(fxpFsetstat, u32(3), str("x"), u32(4), u32(0o644))},
		{'s', append(append(status(1, 0), status(2, 4)...), status(3, 4)...)},
	}, []string{"upload e 0@0"}, ""},
	{"an open without an answer", []step{{'c', packet(fxpOpen, u32(1), str("a"), u32(2), noAttrs)}}, []string{"upload a 0@0: not finished"}, ""},
	{"a path that is too long", []step{{'c', packet(fxpRemove, u32(1), str(strings.Repeat("/x", 2500)))}, {'s', status(1, 2)}},
		[]string{"remove " + strings.Repeat("/x", 2048) + "... (904 bytes more): no such file"}, ""},
	{"a path that is far too long", []step{{'c', packet(fxpRemove, u32(1), str(strings.Repeat("/x", 6000)))}}, nil, "a malformed packet of type 13"},
	{"a huge packet", []step{{'c', u32(1 << 30)}, {'c', []byte("x")}}, nil, "a packet of 1073741824 bytes"},
	{"an id twice", []step{{'c', packet(fxpRemove, u32(1), str("a"))}, {'c', packet(fxpRemove, u32(1), str("b"))}}, []string{"remove a: not finished"}, "a request has the id of one"},
	{"a string that is cut", []step{{'c', packet(fxpRemove, u32(1), u32(9), []byte("abc"))}}, nil, "a malformed packet of type 13"},
	{"an answer to nothing", []step{{'s', status(9, 0)}}, nil, "an answer to no request"},
}

func TestSFTP(t *testing.T) {
	newSFTP := func(report func(Event) error) parser { return NewSFTP(report) }
	for _, tt := range sftpTests {
		t.Run(tt.name, func(t *testing.T) {
			for _, n := range []int{1, 7, 1 << 20} {
				got, err := follow(newSFTP, append(append([]step(nil), sftpBegin...), tt.steps...), n)
				check(t, got, err, tt.want, tt.lost)
			}
		})
	}
	for _, steps := range [][]step{
		{{'c', []byte("GET / HTTP/1.0\r\n\r\n")}},
		{{'c', packet(fxpOpen, u32(1), str("a"), u32(1), noAttrs)}},
		{{'s', []byte("Welcome to this shell\n")}},
		{{'c', packet(fxpInit, u32(6))}, {'s', packet(fxpVersion, u32(6))}},
	} {
		if got, err := follow(newSFTP, steps, 1<<20); !errors.Is(err, ErrLost) || got != nil {
			t.Errorf("%q: %v, %v", steps, got, err)
		}
	}
}

// TestSFTPGuessedHandle: OpenSSH's server numbers its handles, so a client can send requests
// about a file before it has the handle. They are not followed, so decoding must stop.
func TestSFTPGuessedHandle(t *testing.T) {
	const handle = "\x00\x00\x00\x00"
	for name, tt := range map[string]struct{ request, answer []byte }{
		"write":     {packet(fxpWrite, u32(2), str(handle), u64(0), str("12345")), status(2, 0)},
		"read":      {packet(fxpRead, u32(2), str(handle), u64(0), u32(5)), packet(fxpData, u32(2), str("12345"))},
		"mode":      {packet(fxpFsetstat, u32(2), str(handle), u32(4), u32(0o4755)), status(2, 0)},
		"close":     {packet(fxpClose, u32(2), str(handle)), status(2, 0)},
		"copy from": {packet(fxpExtended, u32(2), str("copy-data"), str(handle), u64(0), u64(0), str("open"), u64(0)), status(2, 0)},
		"copy to":   {packet(fxpExtended, u32(2), str("copy-data"), str("open"), u64(0), u64(0), str(handle), u64(0)), status(2, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := follow(func(report func(Event) error) parser { return NewSFTP(report) }, append(slices.Clone(sftpBegin), []step{
				{'c', packet(fxpOpen, u32(9), str("other"), u32(1), noAttrs)},
				{'s', packet(fxpHandle, u32(9), str("open"))},
				{'c', append(packet(fxpOpen, u32(1), str("f"), u32(3), noAttrs), tt.request...)},
				{'s', append(packet(fxpHandle, u32(1), str(handle)), tt.answer...)},
			}...), 1<<20)
			slices.Sort(got) // the files are in no order
			check(t, got, err, []string{"download other 0@0: not finished", "upload f 0@0: not finished"}, "no open file had it")
		})
	}
}

func check(t *testing.T, got []string, err error, want []string, lost string) {
	t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("\n got %q\nwant %q", got, want)
	}
	if lost == "" && err != nil || lost != "" && (!errors.Is(err, ErrLost) || !strings.Contains(err.Error(), lost)) {
		t.Errorf("%v, want %q", err, lost)
	}
}

// TestSFTPLimits sends paths that the parser must keep, until it gives up after a few MiB.
func TestSFTPLimits(t *testing.T) {
	for _, open := range []bool{false, true} {
		s := NewSFTP(func(Event) error { return nil })
		s.FromClient(sftpBegin[0].p)
		s.FromServer(sftpBegin[1].p)
		var err error
		for i := uint32(0); err == nil; i++ {
			err = s.FromClient(packet(fxpOpen, u32(i), str(strings.Repeat("x", 4096)), u32(1), noAttrs))
			if open && err == nil {
				err = s.FromServer(packet(fxpHandle, u32(i), str(fmt.Sprint(i))))
			}
			if i > 2000 {
				t.Fatalf("%d paths of 4 KiB are kept", i)
			}
		}
		if !errors.Is(err, ErrLost) || s.FromClient([]byte("whatever")) != nil || len(s.pending)+len(s.files) > 0 {
			t.Errorf("%v", err)
		}
	}
}

// TestReportFails checks that an error of report is returned.
func TestReportFails(t *testing.T) {
	full := errors.New("full")
	s := NewSFTP(func(Event) error { return full })
	s.FromClient(sftpBegin[0].p)
	s.FromServer(sftpBegin[1].p)
	s.FromClient(packet(fxpRemove, u32(1), str("a")))
	if err := s.FromServer(status(1, 0)); err != full {
		t.Error(err)
	}
}

var scpTests = []struct {
	name, command string
	steps         []step
	want          []string
	lost          string
}{
	{"an upload", "scp -t dir", []step{
		{'s', []byte{0}},
		{'c', []byte("C0644 5 a b\n")}, {'s', []byte{0}}, {'c', []byte("12345\x00")}, {'s', []byte{0}},
		{'c', []byte("C0644 0 empty\n")}, {'s', []byte{0}}, {'c', []byte{0}}, {'s', []byte{0}},
	}, []string{"upload a b in dir 5@0", "upload empty in dir 0@0"}, ""},
	{"a download of directories", "scp -r -p -f dir other", []step{
		{'c', []byte{0}},
		{'s', []byte("T1 0 2 0\n")}, {'c', []byte{0}},
		{'s', []byte("D0755 0 dir\n")}, {'c', []byte{0}},
		{'s', []byte("D0755 0 sub\n")}, {'c', []byte{0}},
		{'s', []byte("C0644 3 f\n")}, {'c', []byte{0}}, {'s', []byte("abc")}, {'s', []byte{0}}, {'c', []byte{0}},
		{'s', []byte("E\n")}, {'c', []byte{0}},
		{'s', []byte("C0644 1 g\n")}, {'c', []byte{0}}, {'s', []byte("a\x00")}, {'c', []byte{0}},
		{'s', []byte("E\n")}, {'c', []byte{0}},
		{'s', []byte("\x01scp: other: No such file or directory\n")},
	}, []string{"download dir/sub/f in dir other 3@0", "download dir/g in dir other 1@0", "download dir other in dir other 0@0: scp: other: No such file or directory"}, ""},
	{"a sink that rejects files", "scp -rt dir", []step{
		{'s', []byte{0}},
		{'c', []byte("C0644 5 a\n")}, {'s', []byte("\x01scp: dir/a: Permission denied\n")},
		{'c', []byte("D0755 0 sub\n")}, {'s', []byte("\x01scp: dir/sub: Permission denied\n")},
		{'c', []byte("C0644 1 b\n")}, {'s', []byte{0}}, {'c', []byte("x\x00")}, {'s', []byte("\x01scp: dir/b: No space left on device\n")},
		{'c', []byte("C0644 1 c\n")}, {'s', []byte("\x02gone\n")},
	}, []string{"upload a in dir 0@0: scp: dir/a: Permission denied", "upload b in dir 1@0: scp: dir/b: No space left on device", "upload c in dir 0@0: gone"}, ""},
	{"an error after the data of a file", "scp -f a", []step{
		{'c', []byte{0}}, {'s', []byte("C0644 3 a\n")}, {'c', []byte{0}}, {'s', []byte("abc\x01scp: a: Input/output error\n")}, {'c', []byte{0}},
	}, []string{"download a in a 3@0: scp: a: Input/output error"}, ""},
	{"the connection breaks off", "scp -t a", []step{
		{'s', []byte{0}}, {'c', []byte("C0644 30 a\n")}, {'s', []byte{0}}, {'c', []byte("abc")},
	}, []string{"upload a in a 3@0: not finished"}, ""},
	{"no last answer to a download", "scp -f a", []step{
		{'c', []byte{0}}, {'s', []byte("C0644 3 a\n")}, {'c', []byte{0}}, {'s', []byte("abc\x00")},
	}, []string{"download a in a 3@0"}, ""},
	{"no last answer to an upload", "scp -t a", []step{
		{'s', []byte{0}}, {'c', []byte("C0644 3 a\n")}, {'s', []byte{0}}, {'c', []byte("abc\x00")},
	}, []string{"upload a in a 3@0: not finished"}, ""},
	{"a source that does not wait", "scp -t a", []step{{'s', []byte{0}}, {'c', []byte("C0644 3 a\nabc\x00")}}, []string{"upload a in a 0@0: not finished"}, "did not wait"},
	{"not scp", "scp -t a", []step{{'c', []byte("hello\n")}}, nil, `a line that begins with "h"`},
	{"a negative size", "scp -t a", []step{{'c', []byte("C0644 -3 a\n")}}, nil, "malformed"},
	{"a line without an end", "scp -t a", []step{{'c', bytes.Repeat([]byte("C"), 10_000)}}, nil, "a line of more than"},
	{"an answer to nothing", "scp -t a", []step{{'s', []byte{0, 0}}}, nil, "to nothing"},
}

func TestSCP(t *testing.T) {
	for _, tt := range scpTests {
		t.Run(tt.name, func(t *testing.T) {
			c := ParseCommand(tt.command)
			if !c.SCP {
				t.Fatal("not a command of scp")
			}
			for _, n := range []int{1, 3, 1 << 20} {
				got, err := follow(func(report func(Event) error) parser { return NewSCP(c, report) }, tt.steps, n)
				check(t, got, err, tt.want, tt.lost)
			}
		})
	}
}

func TestParseCommand(t *testing.T) {
	for line, want := range map[string]Command{
		"scp -t .":                             {SCP: true, Upload: true, Base: ".", Plain: true},
		"scp -r -p -d -t -- -x":                {SCP: true, Upload: true, Base: "-x", Plain: true},
		"/usr/bin/scp -qf a b":                 {SCP: true, Base: "a b", Plain: true},
		"LANG=C exec scp -v -f 'a b'":          {SCP: true, Base: "'a b'", Plain: true},
		"scp -t x; sh":                         {SCP: true, Upload: true, Base: "x; sh"},
		"scp -t $(sh)":                         {SCP: true, Upload: true, Base: "$(sh)"},
		"sftp-server\nsh":                      {SFTP: true},
		"sftp-server & sh":                     {SFTP: true},
		"scp a host:b":                         {},
		"/usr/lib/openssh/sftp-server -l INFO": {SFTP: true, Plain: true},
		"internal-sftp":                        {SFTP: true, Plain: true},
		"sudo /usr/lib/openssh/sftp-server":    {SFTP: true, Plain: true},
		"rsync --server . x":                   {},
		"cat scp -t":                           {},
		"":                                     {},
	} {
		if got := ParseCommand(line); got != want {
			t.Errorf("%q: %+v, want %+v", line, got, want)
		}
	}
}

// fuzzSteps decodes steps. Each begins with a byte whose lowest bit is the side that sends
// and whose other bits are the length.
func fuzzSteps(data []byte) (steps []step) {
	for len(data) > 0 {
		n := min(int(data[0]>>1)+1, len(data)-1)
		steps = append(steps, step{"cs"[data[0]&1], data[1 : 1+n]})
		data = data[1+n:]
	}
	return steps
}

func fuzzSeed(steps []step) (data []byte) {
	for _, s := range steps {
		for p := s.p; len(p) > 0; {
			n := min(len(p), 128)
			data = append(append(data, byte(n-1)<<1|byte(strings.IndexByte("cs", s.from))), p[:n]...)
			p = p[n:]
		}
	}
	return data
}

// FuzzSFTP and FuzzSCP check that a parser reports the same events for the same data in
// pieces of any size.
func FuzzSFTP(f *testing.F) {
	for _, tt := range sftpTests {
		if seed := fuzzSeed(append(append([]step(nil), sftpBegin...), tt.steps...)); len(seed) < 10_000 {
			f.Add(seed)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzz(t, data, func(report func(Event) error) parser { return NewSFTP(report) })
	})
}

func FuzzSCP(f *testing.F) {
	for _, tt := range scpTests {
		f.Add(fuzzSeed(tt.steps), tt.command)
	}
	f.Fuzz(func(t *testing.T, data []byte, command string) {
		c := ParseCommand(command)
		fuzz(t, data, func(report func(Event) error) parser { return NewSCP(c, report) })
	})
}

func fuzz(t *testing.T, data []byte, make func(report func(Event) error) parser) {
	steps := fuzzSteps(data)
	whole, wholeErr := follow(make, steps, 1<<20)
	bytewise, err := follow(make, steps, 1)
	// The order of unfinished transfers is random.
	if len(whole) != len(bytewise) || (err == nil) != (wholeErr == nil) || errors.Is(err, ErrLost) != errors.Is(wholeErr, ErrLost) {
		t.Errorf("%q, %v\n%q, %v", whole, wholeErr, bytewise, err)
	}
}
