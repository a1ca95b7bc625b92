package bastion

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	open := func() *Folder {
		t.Helper()
		f, err := OpenFolder(dir, log)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := open()
	owner := Owner{"a.b@c-d", "default"}
	running := Entry{Generation: 7, State: Running, Nonce: "n", Task: Task{
		ID: "arn:x", Principal: "p", Addr: "10.0.0.1:2022", Generation: 7, HostKey: sshtest.NewKey(t).PublicKey()}}
	made, err := f.Swap(t.Context(), owner, Entry{}, running)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Swap(t.Context(), owner, Entry{}, running); !errors.Is(err, ErrConflict) {
		t.Errorf("a second first: %v", err)
	}
	starting, err := f.Swap(t.Context(), Owner{"bob", "x"}, Entry{}, Entry{Generation: 2, State: Starting, Lease: time.Now().Add(maxLease)})
	if err != nil || !starting.leased() {
		t.Fatal(starting, err)
	}
	// A successor opens the folder while this process drains: the lease of the
	// start is still valid.
	successor := open()
	if e, err := successor.Get(t.Context(), Owner{"bob", "x"}); err != nil || !e.leased() {
		t.Errorf("got %+v, %v", e, err)
	}
	made, err = successor.Swap(t.Context(), owner, made, Entry{Generation: 8, State: Running, Since: time.Now().UTC().Round(0), Task: running.Task})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := f.Get(t.Context(), owner); err != nil || !reflect.DeepEqual(e, made) {
		t.Errorf("the predecessor sees %+v, %v", e, err)
	}
	if _, err := f.Swap(t.Context(), owner, Entry{Version: made.Version - 1}, running); !errors.Is(err, ErrConflict) {
		t.Errorf("the predecessor is late: %v", err)
	}
	f.Close()
	f = successor
	f.Close()

	f = open()
	got, _ := f.Get(t.Context(), owner)
	if !reflect.DeepEqual(got, made) {
		t.Errorf("\n got %+v\nwant %+v", got, made)
	}
	// The process that held the lease of bob's start has exited, so the lease has
	// ended.
	if e, _ := f.Get(t.Context(), Owner{"bob", "x"}); e.State != Starting || e.Generation != 2 || e.leased() {
		t.Errorf("got %+v", e)
	}
	f.Close()

	// An invalid entry is ignored, and can be replaced.
	for _, text := range []string{"", "{", "null", `{"Version":1,"State":9}`, `{"Version":1,"State":2}`, `{"Version":1,"Task":{"HostKey":"x"}}`, strings.Repeat(" ", maxEntry+1)} {
		if err := os.WriteFile(filepath.Join(dir, "a.b@c-d+default.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f = open()
		if e, _ := f.Get(t.Context(), owner); e != (Entry{}) {
			t.Errorf("%q: got %+v", text, e)
		}
		if _, err := f.Swap(t.Context(), owner, Entry{}, running); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		f.Close()
	}

	// If the disk is full, the entry is unchanged.
	f = open()
	defer f.Close()
	before, _ := f.Get(t.Context(), owner)
	if err := os.Mkdir(filepath.Join(dir, "a.b@c-d+default.json.new"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Swap(t.Context(), owner, before, Entry{Generation: 8, State: Starting}); err == nil {
		t.Error("written where nothing can be")
	}
	if after, _ := f.Get(t.Context(), owner); !reflect.DeepEqual(after, before) {
		t.Errorf("then %+v", after)
	}
}

// TestFolderShared: concurrent Swaps of several processes are applied one after
// another, and none is lost.
func TestFolderShared(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	owner := Owner{"alice", "default"}
	const folders, changes = 4, 25
	var wg sync.WaitGroup
	for range folders {
		wg.Go(func() {
			f, err := OpenFolder(dir, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			for made := 0; made < changes; {
				old, err := f.Get(t.Context(), owner)
				if err != nil {
					t.Error(err)
					return
				}
				_, err = f.Swap(t.Context(), owner, old, Entry{Generation: old.Generation + 1})
				switch {
				case err == nil:
					made++
				case !errors.Is(err, ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	f, err := OpenFolder(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if e, _ := f.Get(t.Context(), owner); e.Generation != folders*changes || e.Version != folders*changes {
		t.Errorf("after %d changes the entry is %+v", folders*changes, e)
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"Version":3,"Generation":7,"State":2,"Task":{"ID":"arn","Principal":"p","Addr":"10.0.0.1:2022","HostKey":"","Generation":7},"Lease":"2026-01-01T00:00:00Z","Nonce":"n"}`))
	f.Add([]byte(`{"Version":1,"Task":{"HostKey":"ssh-ed25519 AAAA"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if e, err := parseEntry(data); err == nil && e.State == Running && e.Task.ID == "" {
			t.Errorf("accepted %q", data)
		}
	})
}
