package bastion

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
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
		ID: "arn:x", Principal: "p", Addr: "10.0.0.1:2022", Generation: 7, HostKey: newKey(t).PublicKey()}}
	made, err := f.Swap(t.Context(), owner, Entry{}, running)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Swap(t.Context(), owner, Entry{}, running); !errors.Is(err, ErrConflict) {
		t.Errorf("a second first: %v", err)
	}
	starting, err := f.Swap(t.Context(), Owner{"bob", "x"}, Entry{}, Entry{Generation: 2, State: Starting, Lease: time.Now().Add(time.Hour)})
	if err != nil || !starting.leased() {
		t.Fatal(starting, err)
	}
	if _, err := OpenFolder(dir, log); err == nil || !strings.Contains(err.Error(), "another gateway") {
		t.Errorf("opened twice: %v", err)
	}
	f.Close()

	f = open()
	got, _ := f.Get(t.Context(), owner)
	if !reflect.DeepEqual(got, made) {
		t.Errorf("\n got %+v\nwant %+v", got, made)
	}
	// Who was starting bob's is gone.
	if e, _ := f.Get(t.Context(), Owner{"bob", "x"}); e.State != Starting || e.Generation != 2 || e.leased() {
		t.Errorf("got %+v", e)
	}
	f.Close()

	// What makes no sense is passed over, and can be replaced.
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

	// A disk that is full keeps the entry as it was.
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

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"Version":3,"Generation":7,"State":2,"Task":{"ID":"arn","Principal":"p","Addr":"10.0.0.1:2022","HostKey":"","Generation":7},"Lease":"2026-01-01T00:00:00Z","Nonce":"n"}`))
	f.Add([]byte(`{"Version":1,"Task":{"HostKey":"ssh-ed25519 AAAA"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if e, err := parseEntry(data); err == nil && e.State == Running && e.Task.ID == "" {
			t.Errorf("accepted %q", data)
		}
	})
}
