package durable

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestReplace(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	for _, content := range []string{"first", "second", ""} {
		if err := Replace(name, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != content {
			t.Errorf("got %q, %v; want %q", got, err, content)
		}
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	// If the new content cannot be written, the old one stays.
	if err := Replace(name, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(name+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Replace(name, []byte("lost")); err == nil {
		t.Error("replaced without a place to write to")
	}
	if got, _ := os.ReadFile(name); string(got) != "kept" {
		t.Errorf("got %q, want the old content", got)
	}
}

func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	open := func() *os.File {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	first, second, third := open(), open(), open()
	if err := errors.Join(TryLock(first, syscall.LOCK_SH), TryLock(second, syscall.LOCK_SH)); err != nil {
		t.Fatal(err)
	}
	if err := TryLock(third, syscall.LOCK_EX); !errors.Is(err, ErrLocked) {
		t.Errorf("exclusive beside shared: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Lock(ended, third, syscall.LOCK_EX); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	locked := make(chan error)
	go func() { locked <- Lock(t.Context(), third, syscall.LOCK_EX) }()
	if err := Unlock(first); err != nil {
		t.Error(err)
	}
	select {
	case err := <-locked:
		t.Errorf("locked beside the second: %v", err)
	case <-time.After(5 * lockPoll):
	}
	second.Close()
	if err := <-locked; err != nil {
		t.Error(err)
	}
}
