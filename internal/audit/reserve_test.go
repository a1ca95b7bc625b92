package audit

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReserve fills the file system of a log completely. Events must go into the
// reserve, also after a rotation, and the reserve must be restored when there is space
// again.
func TestReserve(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system that can be filled needs root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	available := func() int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(disk, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Bavail) * st.Bsize
	}
	fill := func(name string) {
		f, err := os.Create(filepath.Join(disk, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for n := 4096; n > 0; {
			if _, err := f.Write(make([]byte, n)); err != nil {
				n /= 2
			}
		}
	}
	const size = 512 << 10
	var said strings.Builder
	path := filepath.Join(disk, "audit.log")
	l := open(t, Config{File: path, FailClosed: true, Reserve: size, Log: slog.New(slog.NewTextHandler(&said, nil))})
	l.OnFailure(func() { t.Error("the log has failed") })
	if free := l.Free(); free < 2<<20-64<<10 {
		t.Errorf("Free is %d at first", free)
	}
	event := Event{Type: Exec, Command: strings.Repeat("x", 900)}
	write := func(n int) {
		t.Helper()
		for i := range n {
			if err := l.Write(event); err != nil {
				t.Fatalf("event %d of %d: %v", i+1, n, err)
			}
		}
	}
	write(1)
	fill("filler")
	if left := available(); left != 0 {
		t.Fatalf("%d bytes left on a full file system", left)
	}
	write(200)
	if !strings.Contains(said.String(), "IS FULL") || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("the operator was told %q", said.String())
	}
	// The rotated file frees the rest of its reserve, which is too small for a
	// whole reserve.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	fill("filler2")
	write(100)
	if err := os.Remove(filepath.Join(disk, "filler")); err != nil {
		t.Fatal(err)
	}
	write(100)
	fill("filler3")
	write(400)
	if !strings.Contains(said.String(), "has room again") {
		t.Errorf("the operator was told %q", said.String())
	}
	for _, name := range []string{path, path + ".1"} {
		for line := range bytes.Lines([]byte(readFile(t, name))) {
			if line[0] != '{' || line[len(line)-1] != '\n' {
				t.Fatalf("%s: %q", name, line)
			}
		}
	}
	before := available()
	l.Close()
	if after := available(); after <= before {
		t.Errorf("%d bytes available after the end, %d before: the reserve stays", after, before)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestFullFileSystemIsNoticed: the operator of a gateway that writes few events is told,
// too, that the file system is full.
func TestFullFileSystemIsNoticed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system that can be filled needs root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	f, err := os.Create(filepath.Join(disk, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var said strings.Builder
	r := reserve{size: 128 << 10, log: slog.New(slog.NewTextHandler(&said, nil))}
	r.begin(f)
	if err := os.WriteFile(filepath.Join(disk, "filler"), make([]byte, 1<<20), 0o600); !isFull(err) {
		t.Fatal(err)
	}
	event := []byte("an event\n")
	write := func() {
		if _, err := f.Write(event); err != nil {
			t.Fatal(err)
		}
		r.used(f, len(event))
	}
	write()
	r.topped = time.Now().Add(-alertInterval)
	write()
	if !strings.Contains(said.String(), "IS FULL") {
		t.Errorf("after %v the operator was told %q", alertInterval, said.String())
	}
}

// TestReserveTooBig: a reserve that is too large is halved until it fits.
func TestReserveTooBig(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system that can be filled needs root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("none", disk, "tmpfs", 0, "size=512k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	var said strings.Builder
	l := open(t, Config{File: filepath.Join(disk, "audit.log"), Reserve: 16 << 20, Log: slog.New(slog.NewTextHandler(&said, nil))})
	if got := l.sink.(*file).reserve.left.Load(); got != 512<<10 && got != 256<<10 {
		t.Errorf("a reserve of %d bytes on a file system of 512 KiB", got)
	}
	if !strings.Contains(said.String(), "no room for the whole reserve") {
		t.Errorf("the operator was told %q", said.String())
	}
}
