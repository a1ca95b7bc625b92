package sftp

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// openssh is the server that the tests compare ours with.
const openssh = "/usr/lib/openssh/sftp-server"

// TestMain makes the test binary our server, if the environment has an option for it.
func TestMain(m *testing.M) {
	if option, ok := os.LookupEnv("SFTP_TEST_SERVER"); ok {
		s := Server{ReadOnly: option == "-R"}
		if denied, ok := strings.CutPrefix(option, "-P"); ok {
			s.Denied = strings.Split(denied, ",")
		}
		if allowed, ok := strings.CutPrefix(option, "-p"); ok {
			s.Allowed = strings.Split(allowed, ",")
		}
		if err := s.Serve(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(255)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A client talks to a server process.
type client struct {
	t    *testing.T
	name string
	dir  string
	in   io.WriteCloser
	out  *bufio.Reader
	cmd  *exec.Cmd
	id   uint32
	// handles are the handles that the server has returned, in order.
	handles []string
}

// connect starts a server in a directory of its own, as nobody or as the user of the test.
// option is a command-line option, or "".
func connect(t *testing.T, name, base, option string, nobody bool) *client {
	t.Helper()
	c := &client{t: t, name: name, dir: filepath.Join(base, name, "work")}
	locked := filepath.Join(base, name, "locked")
	if err := errors.Join(os.MkdirAll(c.dir, 0o755), os.Chmod(c.dir, 0o777), os.Mkdir(locked, 0o700), os.WriteFile(filepath.Join(locked, "f"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	c.cmd = exec.Command(openssh, strings.Fields(option)...)
	if name == "own" {
		c.cmd = exec.Command(filepath.Join(base, "server"))
		c.cmd.Env = append(os.Environ(), "SFTP_TEST_SERVER="+strings.ReplaceAll(option, " ", ""))
	}
	c.cmd.Dir = c.dir
	c.cmd.Stderr = io.Discard
	if nobody {
		c.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.in.Close(); c.cmd.Process.Kill(); c.cmd.Wait() })
	return c
}

// pair starts both servers, and compares their answers to SSH_FXP_INIT.
func pair(t *testing.T, option string, nobody bool) (own, other *client) {
	t.Helper()
	base := t.TempDir()
	for _, dir := range []string{filepath.Dir(base), base} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(base, "server"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	own, other = connect(t, "own", base, option, nobody), connect(t, "ssh", base, option, nobody)
	if a, b := own.init(), other.init(); a != b {
		t.Errorf("version: %s\nOpenSSH: %s", a, b)
	}
	return own, other
}

func (c *client) write(kind byte, body []byte) {
	c.t.Helper()
	m := binary.BigEndian.AppendUint32(nil, uint32(len(body)+1))
	if _, err := c.in.Write(append(append(m, kind), body...)); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
}

func (c *client) read() (kind byte, body []byte) {
	c.t.Helper()
	var head [5]byte
	if _, err := io.ReadFull(c.out, head[:]); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
	body = make([]byte, binary.BigEndian.Uint32(head[:])-1)
	if _, err := io.ReadFull(c.out, body); err != nil {
		c.t.Fatalf("%s: %v", c.name, err)
	}
	return head[4], body
}

func (c *client) init() string {
	c.write(typeInit, []byte{0, 0, 0, 3})
	kind, body := c.read()
	return fmt.Sprintf("%d %q", kind, body)
}

// An operation is a request.
type operation struct {
	kind byte
	args []any // string, uint32, uint64, attributes, handleNumber
}

// A handleNumber stands for the handle that the server has returned as the n-th, from 0.
type handleNumber int

func (o operation) String() string { return fmt.Sprintf("%d%+v", o.kind, o.args) }

// do sends a request and returns the answer as text, without times and directories that
// differ between the two servers.
func (c *client) do(o operation) string {
	c.t.Helper()
	c.id++
	m := &reply{}
	m.uint32(c.id)
	for _, a := range o.args {
		switch a := a.(type) {
		case string:
			m.string(a)
		case uint32:
			m.uint32(a)
		case uint64:
			m.uint64(a)
		case handleNumber:
			if int(a) < len(c.handles) {
				m.string(c.handles[a])
			} else {
				m.string("none")
			}
		case attributes:
			m.uint32(a.flags)
			if a.flags&hasSize != 0 {
				m.uint64(a.size)
			}
			if a.flags&hasOwner != 0 {
				m.uint32(a.uid).uint32(a.gid)
			}
			if a.flags&hasPermissions != 0 {
				m.uint32(a.permissions)
			}
			if a.flags&hasTimes != 0 {
				m.uint32(a.atime).uint32(a.mtime)
			}
		}
	}
	c.write(o.kind, m.data)
	kind, body := c.read()
	p := &packet{data: body}
	if id := p.uint32(); id != c.id {
		c.t.Fatalf("%s: answer to %d, want %d", c.name, id, c.id)
	}
	var text string
	switch kind {
	case typeStatus:
		text = fmt.Sprintf("status %d %q %q", p.uint32(), p.string(), p.string())
	case typeHandle:
		c.handles = append(c.handles, string(p.bytes()))
		text = "handle"
	case typeData:
		text = fmt.Sprintf("data %q", p.bytes())
	case typeAttrs:
		text = "attributes " + p.attributesText()
	case typeName:
		var names []string
		for n := p.uint32(); n > 0; n-- {
			name, long, attrs := p.string(), p.string(), p.attributesText()
			if strings.Contains(attrs, "mtime now") {
				long = clock.ReplaceAllString(long, "TIME ")
			}
			names = append(names, fmt.Sprintf("%q %q %s", name, long, attrs))
		}
		slices.Sort(names)
		text = strings.Join(names, "\n")
	case typeExtendedReply:
		text = fmt.Sprintf("extended %q", p.data)
		p.data = nil
	}
	if p.err != nil || len(p.data) > 0 {
		text += fmt.Sprintf(" MALFORMED %v %q", p.err, p.data)
	}
	return strings.NewReplacer(c.dir, "DIR", filepath.Dir(c.dir), "BASE").Replace(text)
}

var clock = regexp.MustCompile(`[A-Z][a-z]{2} [ \d]\d \d\d:\d\d `)

func (p *packet) attributesText() string {
	a := p.attributes()
	when := func(seconds uint32) string {
		if d := time.Since(time.Unix(int64(seconds), 0)); d > -time.Hour && d < time.Hour {
			return "now"
		}
		return fmt.Sprint(seconds)
	}
	if a.permissions&0o170000 == 0o040000 {
		a.size = 0 // some file systems do not shrink directories
	}
	return fmt.Sprintf("%x size %d owner %d:%d mode %o atime %s mtime %s", a.flags, a.size, a.uid, a.gid, a.permissions, when(a.atime), when(a.mtime))
}

func none() attributes             { return attributes{} }
func mode(m uint32) attributes     { return attributes{flags: hasPermissions, permissions: m} }
func size(n uint64) attributes     { return attributes{flags: hasSize, size: n} }
func times(a, m uint32) attributes { return attributes{flags: hasTimes, atime: a, mtime: m} }
func owner(u, g uint32) attributes { return attributes{flags: hasOwner, uid: u, gid: g} }

// compare sends operations to both servers, and compares the answers and the files.
func compare(t *testing.T, option string, nobody bool, operations []operation) {
	t.Helper()
	own, other := pair(t, option, nobody)
	for i, o := range operations {
		got, want := own.do(o), other.do(o)
		if got != want {
			t.Errorf("operation %d, %v:\n%s\nOpenSSH: %s", i, o, got, want)
		}
	}
	if got, want := tree(t, own.dir), tree(t, other.dir); got != want {
		t.Errorf("files in the end:\n%s\nOpenSSH:\n%s", got, want)
	}
}

// tree describes all files in a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `cd "$1" && find . -printf '%p %y %m %U:%G %l %n ' -type f -printf '%s ' -o -printf '\n' | LC_ALL=C sort; find . -type f | LC_ALL=C sort | while read f; do md5sum <"$f"; done`, "sh", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

const (
	openRead, openWrite, openAppend, openCreate, openTruncate, openExclusive = uint32(1), uint32(2), uint32(4), uint32(8), uint32(16), uint32(32)
)

// someOperations returns each operation at least once with success, and with common errors.
//
// The operations run as root, too, so they may only read files outside the test's
// directory.
func someOperations() []operation {
	ext := func(args ...any) operation { return operation{typeExtended, args} }
	link := func(target, path string) operation { return operation{typeSymlink, []any{target, path}} }
	on := func(kind byte, args ...any) operation { return operation{kind, args} }
	list := []operation{
		on(typeRealpath, "."), on(typeRealpath, ""), on(typeRealpath, "/"), on(typeRealpath, "//etc//passwd"), on(typeRealpath, "/etc/../etc/./passwd/"),
		on(typeRealpath, "none"), on(typeRealpath, "none/x"), on(typeRealpath, "/etc/passwd/x"), on(typeRealpath, "/.."), on(typeRealpath, "none/"), on(typeRealpath, strings.Repeat("x/", 3000)),
		on(typeMkdir, "d", none()), on(typeMkdir, "d", none()), on(typeMkdir, "e", mode(0o1710)), on(typeMkdir, "none/d", none()), on(typeMkdir, "", none()),
		on(typeOpen, "f", openRead, none()),
		on(typeOpen, "f", openWrite|openCreate|openTruncate, mode(0o640)),
		on(typeWrite, handleNumber(0), uint64(0), "hello"), on(typeWrite, handleNumber(0), uint64(10), "world"), on(typeWrite, handleNumber(99), uint64(10), "world"),
		on(typeWrite, handleNumber(0), uint64(1<<63), "x"), on(typeWrite, handleNumber(0), uint64(3), ""),
		on(typeRead, handleNumber(0), uint64(0), uint32(5)), on(typeFstat, handleNumber(0)), on(typeFstat, handleNumber(99)),
		on(typeFsetstat, handleNumber(0), size(12)), on(typeFsetstat, handleNumber(0), mode(0o604)), on(typeFsetstat, handleNumber(0), times(1, 1234567890)), on(typeFsetstat, handleNumber(99), mode(0)),
		ext("fsync@openssh.com", handleNumber(0)), ext("fsync@openssh.com", handleNumber(99)),
		on(typeClose, handleNumber(0)), on(typeClose, handleNumber(0)), on(typeRead, handleNumber(0), uint64(0), uint32(5)), on(typeClose, handleNumber(99)), on(typeClose, "1234"), on(typeClose, ""),
		on(typeOpen, "f", openRead, none()), on(typeRead, handleNumber(1), uint64(0), uint32(5)), on(typeRead, handleNumber(1), uint64(3), uint32(1<<20)), on(typeRead, handleNumber(1), uint64(12), uint32(1)), on(typeRead, handleNumber(1), uint64(12), uint32(0)), on(typeRead, handleNumber(1), uint64(1<<63), uint32(1)), on(typeWrite, handleNumber(1), uint64(0), "x"),
		on(typeOpen, "f", openWrite|openAppend, none()), on(typeWrite, handleNumber(2), uint64(0), "end"), on(typeClose, handleNumber(2)),
		on(typeOpen, "f", openWrite|openCreate|openExclusive, none()), on(typeOpen, "d", openRead, none()), on(typeRead, handleNumber(3), uint64(0), uint32(10)), on(typeOpen, "d", openWrite, none()), on(typeOpen, "x", uint32(0), none()), on(typeOpen, "", openRead, none()), on(typeOpen, "f/x", openRead, none()), on(typeOpen, strings.Repeat("x", 300), openRead, none()),
		on(typeStat, "f"), on(typeStat, "none"), on(typeLstat, "f"), on(typeStat, ""), on(typeStat, "f/x"), on(typeSetstat, "f", times(100, 200)), on(typeLstat, "f"),
		on(typeSetstat, "f", mode(0o7755)), on(typeSetstat, "f", size(3)), on(typeSetstat, "none", size(3)), on(typeSetstat, "d", size(3)), on(typeSetstat, "f", owner(65534, 65534)), on(typeSetstat, "f", owner(0, 0)), on(typeSetstat, "d", attributes{flags: hasSize | hasTimes, size: 1, atime: 5, mtime: 6}), on(typeStat, "d"), on(typeSetstat, "f", size(1<<63)),
		link("f", "l"), link("sub/f", "d/rel"), link("/abs/f", "abs"), link("none", "dangling"), link("loop", "loop"), link("x", "l"), link("", "m"), link("x", "none/m"), link("d", "ld"), link("../f", "d/up"), link("d/", "slash"),
		on(typeReadlink, "l"), on(typeReadlink, "d/rel"), on(typeReadlink, "abs"), on(typeReadlink, "f"), on(typeReadlink, "none"),
		on(typeLstat, "l"), on(typeStat, "l"), on(typeStat, "loop"), on(typeStat, "dangling"), on(typeRealpath, "l"), on(typeRealpath, "ld/rel"), on(typeRealpath, "ld/up"), on(typeRealpath, "loop"), on(typeRealpath, "dangling"), on(typeRealpath, "dangling/x"), on(typeRealpath, "slash/up"), on(typeRealpath, "abs"),
		ext("lsetstat@openssh.com", "l", times(7, 8)), on(typeLstat, "l"), on(typeStat, "l"), ext("lsetstat@openssh.com", "l", mode(0o600)), ext("lsetstat@openssh.com", "f", mode(0o611)), ext("lsetstat@openssh.com", "l", size(1)), ext("lsetstat@openssh.com", "l", owner(65534, 65534)), ext("lsetstat@openssh.com", "none", mode(1)),
		on(typeOpen, "g", openWrite|openCreate, none()), on(typeRename, "f", "g"), on(typeRename, "f", "h"), on(typeRename, "none", "h"), on(typeRename, "d", "e"), on(typeRename, "d", "d2"), on(typeRename, "d2", "d"), on(typeRename, "l", "l2"), on(typeRename, "l2", "h"), on(typeRename, "h", "none/h"), on(typeRename, "h", "h"), on(typeRename, "d", "d/x"), on(typeRename, "dangling", "dangling2"), on(typeRename, "h", "loop"),
		ext("posix-rename@openssh.com", "h", "g"), ext("posix-rename@openssh.com", "g", "e"), ext("posix-rename@openssh.com", "none", "g"), ext("posix-rename@openssh.com", "d", "e"), ext("posix-rename@openssh.com", "e", "d"),
		ext("hardlink@openssh.com", "g", "hard"), ext("hardlink@openssh.com", "g", "hard"), ext("hardlink@openssh.com", "none", "x"), on(typeStat, "hard"),
		on(typeOpendir, "."), on(typeReaddir, handleNumber(5)), on(typeReaddir, handleNumber(5)), on(typeReaddir, handleNumber(1)), on(typeReaddir, handleNumber(99)), on(typeRead, handleNumber(5), uint64(0), uint32(1)), on(typeFstat, handleNumber(5)), on(typeClose, handleNumber(5)), on(typeOpendir, "f"), on(typeOpendir, "none"), on(typeOpendir, "g"), on(typeOpendir, "ld"),
		ext("limits@openssh.com"), ext("expand-path@openssh.com", "~"), ext("expand-path@openssh.com", "~/x"), ext("expand-path@openssh.com", "~root"), ext("expand-path@openssh.com", "~root/none/x"), ext("expand-path@openssh.com", "~nobody-of-that-name/x"), ext("expand-path@openssh.com", "a"), ext("expand-path@openssh.com", ""), ext("expand-path@openssh.com", "~/"), ext("expand-path@openssh.com", "~//x"),
		ext("home-directory", "nobody-of-that-name"), ext("home-directory", ""),
		ext("users-groups-by-id@openssh.com", "\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x00\x00\x01", "\x00\x00\x00\x00\x7f\x00\x00\x01"), ext("users-groups-by-id@openssh.com", "", ""),
		ext("nothing@example.com", "x"), ext("statvfs@openssh.com", "none"), ext("fstatvfs@openssh.com", handleNumber(99)), ext("statvfs@openssh.com", "/proc"), ext("statvfs@openssh.com", "/sys"),
		on(typeOpen, "c", openWrite|openCreate|openRead, none()), ext("copy-data", handleNumber(8), uint64(0), uint64(5), handleNumber(4), uint64(2)), ext("copy-data", handleNumber(8), uint64(0), uint64(0), handleNumber(8), uint64(2)),
		on(typeWrite, handleNumber(8), uint64(0), strings.Repeat("abc", 50_000)), on(typeOpen, "c2", openWrite|openCreate, none()), ext("copy-data", handleNumber(8), uint64(1), uint64(0), handleNumber(9), uint64(4)), ext("copy-data", handleNumber(8), uint64(1), uint64(100_000), handleNumber(9), uint64(0)), ext("copy-data", handleNumber(8), uint64(1), uint64(1<<40), handleNumber(9), uint64(0)), ext("copy-data", handleNumber(99), uint64(0), uint64(1), handleNumber(8), uint64(0)), ext("copy-data", handleNumber(8), uint64(1<<63), uint64(1), handleNumber(9), uint64(0)),
		on(typeRemove, "d"), on(typeRemove, "none"), on(typeRemove, "abs"), on(typeRemove, "g"), on(typeRemove, ""), on(typeRmdir, "c"), on(typeRmdir, "d"), on(typeRmdir, "none"), on(typeRmdir, "ld"), on(typeRmdir, "."), on(typeRmdir, ".."), on(typeRmdir, "e"), on(typeRemove, "l/"), on(typeRemove, "hard"),
		on(typeOpen, "/dev/null", openRead|openWrite, none()), on(typeWrite, handleNumber(10), uint64(5), "x"), on(typeRead, handleNumber(10), uint64(5), uint32(1)),
		on(typeOpen, "../locked/f", openRead, none()), on(typeMkdir, "../locked/d", none()), on(typeRemove, "../locked/f"), on(typeOpendir, "../locked"), on(typeStat, "../locked/x"), on(typeRealpath, "../locked/x/y"), on(typeSetstat, "../locked", mode(0o755)), on(typeRename, "../locked", "p"), ext("hardlink@openssh.com", "../locked/f", "p"), on(typeMkdir, "../x", none()),
	}
	return list
}

func TestLikeOpenSSH(t *testing.T) {
	for _, option := range []string{"", "-R", "-P open,remove,statvfs,opendir", "-p realpath,stat,limits,open,read,close"} {
		t.Run(option, func(t *testing.T) { compare(t, option, false, someOperations()) })
		t.Run(option+" as nobody", func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("not root")
			}
			compare(t, option, true, someOperations())
		})
	}
}

// TestRandomLikeOpenSSH sends many random operations on few paths.
func TestRandomLikeOpenSSH(t *testing.T) {
	names := []string{"a", "b", "a/b", "b/a", "a/../b", "c", "./c/", "c/d", "..", ".", "", "/etc/hostname", "a/b/c"}
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		name := func() string { return names[rng.IntN(len(names))] }
		attr := func() attributes {
			return attributes{flags: uint32(rng.IntN(16)) &^ hasOwner, size: uint64(rng.IntN(100)), permissions: uint32(0o700 | rng.IntN(0o100)), atime: rng.Uint32N(1 << 30), mtime: rng.Uint32N(1 << 30)}
		}
		number := func() handleNumber { return handleNumber(rng.IntN(6)) }
		var list []operation
		for range 150 {
			var o operation
			switch kind := byte(3 + rng.IntN(24)); kind {
			case typeOpen:
				o = operation{kind, []any{name(), rng.Uint32N(64), attr()}}
			case typeClose, typeFstat:
				o = operation{kind, []any{number()}}
			case typeRead:
				o = operation{kind, []any{number(), rng.Uint64N(50), rng.Uint32N(50)}}
			case typeWrite:
				o = operation{kind, []any{number(), rng.Uint64N(50), strings.Repeat("x", rng.IntN(50))}}
			case typeFsetstat:
				o = operation{kind, []any{number(), attr()}}
			case typeSetstat, typeMkdir:
				if kind == typeSetstat && rng.IntN(2) == 0 {
					kind = typeMkdir
				}
				path := name()
				if strings.HasPrefix(path, "/") || strings.HasPrefix(path, "..") {
					path = "a"
				}
				o = operation{kind, []any{path, attr()}}
			case typeRename, typeSymlink:
				o = operation{kind, []any{name(), name()}}
			case typeLstat, typeStat, typeOpendir, typeRealpath, typeReadlink:
				o = operation{kind, []any{name()}}
			case typeRemove, typeRmdir:
				path := name()
				if strings.HasPrefix(path, "/") {
					path = "a"
				}
				o = operation{kind, []any{path}}
			default:
				o = operation{typeExtended, []any{[]string{"posix-rename@openssh.com", "hardlink@openssh.com"}[rng.IntN(2)], name(), name()}}
			}
			// Change nothing outside the two directories, and make no links that lead out.
			for i, a := range o.args {
				reads := o.kind == typeStat || o.kind == typeLstat || o.kind == typeRealpath || o.kind == typeReadlink
				if a == "/etc/hostname" && !reads || a == ".." && !reads {
					o.args[i] = "a"
				}
			}
			list = append(list, o)
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) { compare(t, "", os.Geteuid() == 0, list) })
	}
}

// TestReaddirLikeOpenSSH lists a directory that takes several messages.
func TestReaddirLikeOpenSSH(t *testing.T) {
	own, other := pair(t, "", false)
	var lists [2][]string
	for i, c := range []*client{own, other} {
		for n := range 250 {
			if err := os.WriteFile(filepath.Join(c.dir, fmt.Sprintf("file %d é", n)), make([]byte, n), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		c.do(operation{typeOpendir, []any{"."}})
		for {
			answer := c.do(operation{typeReaddir, []any{handleNumber(0)}})
			if strings.HasPrefix(answer, "status") {
				break
			}
			names := strings.Split(answer, "\n")
			if len(names) > maxNames {
				t.Errorf("%s: %d names in a message", c.name, len(names))
			}
			lists[i] = append(lists[i], names...)
		}
		slices.Sort(lists[i])
	}
	if !slices.Equal(lists[0], lists[1]) {
		t.Errorf("%q\nOpenSSH: %q", lists[0], lists[1])
	}
}

// FuzzServer checks that the server returns, and sends complete messages, for any input.
func FuzzServer(f *testing.F) {
	start := []byte{0, 0, 0, 5, typeInit, 0, 0, 0, 3}
	f.Add(start)
	f.Add(append(slices.Clone(start), 0, 0, 0, 10, typeStat, 0, 0, 0, 1, 0, 0, 0, 1, '.'))
	f.Add(append(slices.Clone(start), 0, 0, 0, 9, typeRealpath, 0, 0, 0, 1, 0, 0, 0, 0))
	f.Add(append(slices.Clone(start), 0, 0, 0, 14, typeClose, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, sent []byte) {
		var out bytes.Buffer
		// Read-only and without open, because fuzzed paths may name any file.
		s := &Server{ReadOnly: true, Denied: []string{"open", "opendir"}}
		s.serve(bytes.NewReader(sent), &out)
		for b := out.Bytes(); len(b) > 0; {
			if len(b) < 5 || uint64(binary.BigEndian.Uint32(b))+4 > uint64(len(b)) {
				t.Fatalf("an incomplete message: %q", b)
			}
			b = b[4+binary.BigEndian.Uint32(b):]
		}
	})
}
